"""Weights as int8: printed, to half a step, and without memory of their own."""

from __future__ import annotations

import json

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from channelfold.passes.base import Context, Outcome
from channelfold.passes.quantize import QuantizeWeights
from channelfold.runtime.io.files import MappedValues, check, load, raise_opset, save, session
from channelfold.runtime.io.session import Session
from channelfold.tests.graphs import build, constants, feeds, listing, node, ops, random, reasons, run
from channelfold.tests.passes.quantize.quantized import check_counts


def quantize(graph: gs.Graph, step: QuantizeWeights | None = None) -> Outcome:
    outcome = (step or QuantizeWeights()).apply(graph, Context())
    check(graph)
    json.dumps(outcome.facts)
    check_counts(outcome)
    return outcome


def test_facts_tell_the_ranges_of_weights():
    weight = np.ones((16, 8), np.float32)
    weight[3, 5] = -6.0
    graph = build("(float[N,16] x) => (float[] y)", "h = MatMul(x, W) y = Gemm<transB=1>(h, V)", kind="float",
                  W=weight, V=np.full((4, 8), -2.0))  # fmt: skip
    assert quantize(graph).facts["ranges"] == [
        {"node": "MatMul_0", "op": "MatMul", "tensor": "x", "weight": 6.0, "weight_outliers": 6.0},
        {"node": "Gemm_1", "op": "Gemm", "tensor": "h", "weight": 2.0, "weight_outliers": 1.0},
    ]


FORMS = [
    ("y = Conv<pads=[1,1,1,1]>(x, W, b)", {"W": (6, 4, 3, 3), "b": 6}, 0),
    ("y = Conv<group=4>(x, W)", {"W": (8, 1, 3, 3)}, 0),
    ("y = ConvTranspose<strides=[2,2]>(x, W, b)", {"W": (4, 6, 2, 2), "b": 6}, 1),
    ("f = Flatten(x) y = Gemm(f, W, b)", {"W": (64, 6), "b": 6}, 1),
    ("f = Flatten(x) y = Gemm<transB=1,alpha=-0.5,beta=2.0>(f, W, b)", {"W": (6, 64), "b": 6}, 0),
    ("y = MatMul(x, W)", {"W": (4, 6)}, 1),
    ("y = MatMul(W, x)", {"W": (6, 4)}, 0),
    ("V = Transpose<perm=[1,0]>(W) y = MatMul(x, V)", {"W": (6, 4)}, 1),
]


@pytest.mark.parametrize(("text", "shapes", "axis"), FORMS)
def test_every_form(text, shapes, axis):
    """The stored weight is within half a step of the old one, by channel; outputs are those of the rounded weight."""
    graph = build("(float[N,4,4,4] x) => (float[] y)", text, kind="float", **shapes)
    alpha = graph.nodes[-1].attrs.get("alpha", 1.0)
    before = run(graph, feeds(graph))["y"]
    outcome = quantize(graph)
    assert (outcome.facts["quantized"], outcome.refused) == (1, [])
    restored = node(graph, "DequantizeLinear")
    assert restored.attrs["axis"] == axis
    stored = constants(graph)
    values, scales, zero_points = (stored[t.name] for t in restored.inputs)
    assert (values.dtype, scales.dtype, zero_points.dtype) == (np.int8, np.float32, np.int8)
    assert scales.shape == zero_points.shape == (values.shape[axis],)
    assert not zero_points.any()
    steps = np.expand_dims(scales.astype(float), [i for i in range(values.ndim) if i != axis])
    old = alpha * random(shapes["W"], "W").astype(np.float32).astype(float)
    old = old.T if "Transpose" in text.split("(")[0] and "Conv" not in text else old
    assert np.abs((values * steps - old) / steps).max() <= 0.5 + 1e-4
    after = session(graph, optimize=False).run(feeds(graph))["y"]
    assert 0 < np.square(after - before).sum() < 1e-3 * np.square(before).sum()


def test_what_it_prints():
    graph = build("(float[N,8] x, int64[N] ids) => (float[] y, float[] e)",
                  "T = Transpose<perm=[1,0]>(E) h = MatMul(x, T) y = Gemm<transB=1>(h, E) e = Gather(E, ids)",
                  kind="float", E=(8, 8))  # fmt: skip
    quantize(graph)
    assert listing(graph) == (
        "E_dequantized = DequantizeLinear<axis=1>(E_quantized, E_scale, E_zero_point)\n"
        "h = MatMul(x, E_dequantized)\n"
        "E_dequantized_1 = DequantizeLinear<axis=0>(E_quantized_1, E_scale_1, E_zero_point_1)\n"
        "y = Gemm<transB=1>(h, E_dequantized_1)\n"
        "e = Gather(E, ids)"
    )
    assert np.array_equal(constants(graph)["E"], random((8, 8), "E").astype(np.float32))


def test_a_shared_weight_is_stored_once():
    graph = build("(float[N,8] x) => (float[] y)", "h = MatMul(x, W) y = MatMul(h, W)", kind="float", W=(8, 8))
    quantize(graph)
    assert ops(graph) == ["DequantizeLinear", "MatMul", "MatMul"]


def test_float16_has_float16_scales():
    graph = build("(float16[N,8] x) => (float16[] y)", "y = Gemm(x, W, b)", kind="float16",
                  W=random((8, 8), "W").astype(np.float16), b=random(8, "b").astype(np.float16))  # fmt: skip
    assert QuantizeWeights().opset_for(graph) == 19
    graph = raise_opset(graph, 19)
    before = session(graph).run(feeds(graph))["y"].astype(float)
    quantize(graph)
    assert constants(graph)["W_scale"].dtype == np.float16
    after = session(graph).run(feeds(graph))["y"]
    assert np.square(after - before).sum() < 1e-3 * np.square(before).sum()


def test_what_stays_float():
    weight = random((8, 8), "N")
    weight[0, 0] = np.inf
    graph = build(
        "(float[N,8,3,3] x, float[N,8] v) => (float[] a, float[] b, float[] c, float[] d)",
        "a = ConvTranspose<group=2>(x, T)  b = MatMul(v, N)  s = Transpose(v)  c = MatMul(v, s)  d = Gemm(v, G)",
        kind="float", T=(8, 2, 2, 2), N=weight, G=(8, 8),
    )  # fmt: skip
    graph.nodes[-1].name = "/head/fc"
    before = listing(graph)
    outcome = quantize(graph, QuantizeWeights(exclude=("/head/*",)))
    assert reasons(outcome) == [
        "ConvTranspose stays float: the output channels of a grouped ConvTranspose are not on one axis of its weight",
        "MatMul stays float: its weight or bias holds infinities or NaN",
        "MatMul stays float: it multiplies two activations",
        "Gemm stays float: excluded by pattern '/head/*'",
    ]
    assert listing(graph) == before
    assert "excluded by operator type Gemm" in reasons(quantize(graph, QuantizeWeights(exclude_ops=("Gemm",))))[-1]


def test_nothing_is_touched_when_nothing_is_quantized():
    """Not even nodes that nobody reads."""
    graph = build("(double[N,8] x) => (double[] y)", "d = Relu(x) y = MatMul(x, W)", kind="double", W=(8, 8))
    before = listing(graph)
    assert not quantize(graph).changed
    assert listing(graph) == before


def test_a_second_time_there_is_nothing_to_do():
    graph = build("(float[N,8] x) => (float[] y)", "y = MatMul(x, W)", kind="float", W=(8, 8))
    quantize(graph)
    before = listing(graph)
    assert reasons(quantize(graph)) == ["MatMul stays float: its weight is quantized already"]
    assert listing(graph) == before


def test_large_weights_go_to_disk(tmp_path):
    """The file shrinks to a quarter, and neither the old nor the new weight stays in memory."""
    graph = build("(float[N,1024] x) => (float[] y)", "y = MatMul(x, W)", kind="float", W=(1024, 2048))
    save(graph, tmp_path / "float.onnx")
    graph = load(tmp_path / "float.onnx")
    before = session(graph).run(feeds(graph))["y"]
    quantize(graph)
    (stored,) = (t for name, t in graph.tensors().items() if name == "W_quantized")
    assert isinstance(stored, gs.Constant)
    assert isinstance(stored._values, MappedValues)
    save(graph, tmp_path / "int8.onnx")
    sizes = [(tmp_path / f"{name}.onnx").stat().st_size for name in ("float", "int8")]
    assert sizes[1] < 0.26 * sizes[0]
    after = Session(tmp_path / "int8.onnx").run(feeds(graph))["y"]
    assert np.square(after - before).sum() < 1e-3 * np.square(before).sum()
