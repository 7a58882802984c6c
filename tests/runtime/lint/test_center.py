"""Zero points that become part of the biases: the same codes, so the same numbers."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from channelfold.runtime.lint import fix, lint
from channelfold.runtime.lint.rules import RULES
from channelfold.tests.graphs import build, ops, random, run

READ = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) V = DequantizeLinear<axis={}>(W, t) "
CONV = "float[N,16,6,6] x"
FORMS = {
    "padded convolution": (CONV, 0, "y = Conv<pads=[1,2,0,1]>(d, V, b)", (24, 16, 3, 3), 24),
    "groups, no bias": (CONV, 0, "y = Conv<group=4>(d, V)", (24, 4, 3, 3), 24),
    "two readers, one of them no product": (
        CONV, 0, "c = Conv<pads=[1,1,1,1]>(d, V, b) r = Relu(d) y = Add(c, r)", (16, 16, 3, 3), 16,
    ),
    "two paddings": (
        CONV, 0, "c = Conv<pads=[1,1,1,1]>(d, V, b) e = Conv<pads=[1,1,1,1],strides=[1,1]>(d, V) y = Add(c, e)",
        (16, 16, 3, 3), 16,
    ),
    "matrix": ("float[N,5,16] x", 1, "y = MatMul(d, V)", (16, 24), 24),
    "transposed": ("float[N,16] x", 0, "y = Gemm<transB=1>(d, V, b)", (24, 16), 24),
    "behind a transpose": ("float[N,16] x", 0, "T = Transpose<perm=[1,0]>(V) y = Gemm(d, T)", (24, 16), 24),
}  # fmt: skip


def graph_of(form: str, zero: np.generic) -> gs.Graph:
    inputs, axis, text, shape, outs = FORMS[form]
    codes = np.random.default_rng(0).integers(-127, 128, shape).astype(np.int8)
    constants = {"s": np.float32(0.02), "z": np.array(zero), "W": codes, "t": np.full(outs, 0.01, np.float32)}
    if ", b)" in text:
        constants["b"] = random(outs, "b")
    return build(f"({inputs}) => (float[] y)", READ.format(axis) + text, kind="float", **constants)


@pytest.mark.parametrize("zero", [np.uint8(0), np.uint8(100), np.int8(-128), np.int8(7)])
@pytest.mark.parametrize("form", FORMS)
def test_the_repair_changes_no_number(form, zero):
    graph = graph_of(form, zero)
    size = [dim if isinstance(dim, int) else 2 for dim in graph.inputs[0].shape]
    feed = {"x": 2.5 * random(size, "x")}  # beyond both ends of the range
    before = run(graph, feed)["y"]
    fix(graph, [rule for rule in RULES if rule.id != "needless-quantizer"], "tensorrt")  # which rounds less
    assert {node.inputs[2].dtype for node in graph.nodes if node.op == "QuantizeLinear"} == {np.dtype(np.int8)}
    assert not any(np.any(node.inputs[2].values) for node in graph.nodes if node.op == "QuantizeLinear")
    assert not [one for one in lint(graph, RULES, "tensorrt") if one.level == "error"]
    products = [node for node in graph.nodes if node.op in ("Conv", "Gemm", "MatMul")]
    assert all(node.inputs[0].inputs[0].op == "DequantizeLinear" for node in products)
    np.testing.assert_allclose(run(graph, feed)["y"], before, atol=1e-4 * np.abs(before).max())


def test_a_pool_between_a_quantizer_and_a_product_gets_a_wider_range_instead():
    graph = build(
        f"({CONV}) => (float[] y)",
        READ.format(0) + "p = MaxPool<kernel_shape=[2,2]>(d) y = Conv(p, V)",
        kind="float", s=np.float32(0.02), z=np.uint8(100), t=np.full(16, 0.01, np.float32),
        W=np.ones((16, 16, 1, 1), np.int8),
    )  # fmt: skip
    fix(graph, RULES, "tensorrt")
    assert "Sub" not in ops(graph)
    scale = next(node.inputs[1].values for node in graph.nodes if node.op == "QuantizeLinear")
    assert scale == pytest.approx(0.02 * 155 / 127)
