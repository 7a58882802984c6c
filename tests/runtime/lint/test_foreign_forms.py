"""The forms in which other tools write a quantized layer, as small graphs: repaired, they compute what they did."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from channelfold.runtime.lint import fix, lint
from channelfold.runtime.lint.rules import RULES
from channelfold.tests.graphs import build, run

SIGNATURE = "(float[N,16,6,6] x) => (float[] y)"
CONV = "y = Conv<pads=[1,1,1,1]>"
RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((16, 16, 3, 3)).astype(np.float32)
SCALES = (np.abs(WEIGHT).max(axis=(1, 2, 3)) / 127).astype(np.float32)
CODES = np.rint(WEIGHT / SCALES[:, None, None, None]).astype(np.int8)
BIAS = RNG.standard_normal(16).astype(np.float32)
UNSIGNED = {"s": np.float32(0.02), "z": np.uint8(100)}  # -2 … 3.1
IMAGES = RNG.uniform(-1.9, 3.0, (2, 16, 6, 6)).astype(np.float32)
RESTORED = "w = DequantizeLinear<axis=0>(Wq, sw)"
ACTIVATION = "q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)"

FORMS = {  # (text, constants, rules that the form breaks)
    "NNCF": (
        f"{ACTIVATION} {RESTORED} {CONV}(d, w, b)", {"Wq": CODES, "sw": SCALES, "b": BIAS, **UNSIGNED},
        {"uint8-activation", "zero-point"},
    ),
    "Quark": (
        f"{ACTIVATION} {RESTORED} b = DequantizeLinear<axis=0>(bq, sb) {CONV}(d, w, b)",
        {"Wq": CODES, "sw": SCALES, "bq": np.rint(BIAS / (0.02 * SCALES)).astype(np.int32),
         "sb": (0.02 * SCALES).astype(np.float32), **UNSIGNED},
        {"uint8-activation", "zero-point", "int32-bias"},
    ),
    "ModelOpt": (
        f"{ACTIVATION} v = QuantizeLinear<axis=0>(W, sw, zw) w = DequantizeLinear<axis=0>(v, sw, zw) {CONV}(d, w, b)",
        {"W": WEIGHT, "sw": SCALES, "zw": np.zeros(16, np.int8), "b": BIAS,
         "s": np.float32(3.1 / 127), "z": np.int8(0)},
        {"weight-rounded-on-call"},
    ),
    "QOperator": (
        "q = QuantizeLinear(x, s, z)  p = QLinearConv<pads=[1,1,1,1]>(q, s, z, Wq, sw, zw, t, zt, bq)"
        "  y = DequantizeLinear(p, t, zt)",
        {"Wq": CODES, "sw": SCALES, "zw": np.zeros(16, np.int8), "t": np.float32(0.6), "zt": np.uint8(128),
         "bq": np.rint(BIAS / (0.02 * SCALES)).astype(np.int32), **UNSIGNED},
        {"operator-on-codes", "uint8-activation", "zero-point"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_named_and_repaired(form):
    text, constants, broken = FORMS[form]
    graph = build(SIGNATURE, text, kind="float", **constants)
    exact = run(build(SIGNATURE, f"{CONV}(x, W, b)", kind="float", W=WEIGHT, b=BIAS), {"x": IMAGES})["y"]
    before = error(graph, exact)
    assert {one.rule.id for one in lint(graph, RULES, "tensorrt")} >= broken
    fix(graph, RULES, "tensorrt")
    assert not [one for one in lint(graph, RULES, "tensorrt") if one.level != "note"]
    quantizers = [node for node in graph.nodes if node.op == "QuantizeLinear"]
    assert all(node.inputs[2].values.dtype == np.int8 and not node.inputs[2].values.any() for node in quantizers)
    assert error(graph, exact) < before * 10**0.05


def error(graph: gs.Graph, exact: np.ndarray) -> float:
    return float(((run(graph, {"x": IMAGES})["y"] - exact) ** 2).sum())


def test_a_constant_that_an_open_size_spreads_is_an_activation():
    """The class token of a transformer is a constant behind Expand: its quantizer reads no stored weight."""
    graph = build(
        "(float[N,16] x) => (float[] y)",
        "n = Shape(x) e = Expand(t, n) q = QuantizeLinear(e, s, z) d = DequantizeLinear(q, s, z) y = MatMul(d, W)",
        kind="float", t=(1, 16), W=(16, 16), **UNSIGNED,
    )  # fmt: skip
    feed = {"x": np.zeros((3, 16), np.float32)}
    before = run(graph, feed)["y"]
    fix(graph, RULES, "tensorrt")
    assert not [one for one in lint(graph, RULES, "tensorrt") if one.level == "error"]
    assert np.abs(run(graph, feed)["y"] - before).max() < 0.02 * 2 * 16
