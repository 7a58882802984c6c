"""Weight formats in every form of a linear and of a table: the graph, the numbers, what runtimes make of it."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from channelfold.passes.base import Context
from channelfold.passes.layers.account import account
from channelfold.passes.quantize import Quantize, QuantizeWeights
from channelfold.runtime.engine import build as tensorrt
from channelfold.runtime.errors import DataError, UsageError
from channelfold.runtime.io.files import load, raise_opset, save, session
from channelfold.runtime.io.snapshot import Snapshot
from channelfold.tests.graphs import build, changes, constants, data_from, feeds, listing, random, reasons, run
from channelfold.tests.passes.quantize.quantized import optimized, quantize, samples, snr

FORMS = {
    "matmul": ("float[N,96] x", "y = MatMul(x, W)", {"W": (96, 64)}),
    "matmul, bias, ragged groups": ("float[2,N,75] x", "h = MatMul(x, W) y = Add(h, b)", {"W": (75, 33), "b": 33}),
    "matmul, groups of a divisor": (
        "float[2,N,90] x",
        "h = MatMul(x, W) y = Add(h, b)",
        {"W": (90, 33), "b": 33},
    ),
    "gemm": ("float[N,96] x", "y = Gemm(x, W, b)", {"W": (96, 64), "b": 64}),
    "gemm, transposed": ("float[N,96] x", "y = Gemm<transB=1,alpha=0.5,beta=2.0>(x, W, b)", {"W": (64, 96), "b": 64}),
    "behind a transpose": ("float[N,96] x", "T = Transpose<perm=[1,0]>(W) y = MatMul(x, T)", {"W": (64, 96)}),
}
LEAST = {"int8": 38, "int4": 18, "fp8": 29}  # dB


def weights(text: tuple[str, str, dict], step: QuantizeWeights, data=None, kind="float") -> tuple[gs.Graph, gs.Graph]:
    """The graph as it was, and quantized."""
    graph = build(f"({text[0]}) => ({kind}[] y)", text[1], kind=kind, **text[2])
    before = graph.copy()
    graph = raise_opset(graph, step.opset_for(graph))
    step.apply(graph, Context(calibration=data))
    return before, graph


@pytest.mark.parametrize(
    ("name", "target"),
    [("int8", "tensorrt"), ("int8", "onnxruntime"), ("int4", "tensorrt"), ("int4", "onnxruntime"), ("fp8", "tensorrt")],
)
@pytest.mark.parametrize("form", FORMS)
def test_the_numbers(form, name, target):
    before, graph = weights(FORMS[form], QuantizeWeights(weights=name, group=32, target=target))
    refused = (form, name, target) == ("matmul, bias, ragged groups", "int4", "tensorrt")  # both sizes are odd
    assert any(node.op == "DequantizeLinear" for node in graph.nodes) != refused
    feed = feeds(before, size=8)
    expected = run(before, feed)
    for optimize in (False, True):
        assert snr(expected, session(graph, optimize=optimize).run(feed)) > LEAST[name]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_onnxruntime_reads_the_codes(form, name, tmp_path):
    """No DequantizeLinear is left to run on every call."""
    _, graph = weights(FORMS[form], QuantizeWeights(weights=name, group=32, target="onnxruntime"))
    assert "MatMulNBits" in (kinds := optimized(graph, tmp_path))
    assert {"DequantizeLinear", "MatMul", "Gemm"}.isdisjoint(kinds)


def test_what_int4_prints():
    _, graph = weights(FORMS["gemm, transposed"], QuantizeWeights(weights="int4", group=32))
    assert listing(graph) == (
        "W_dequantized = DequantizeLinear<axis=1, block_size=32>(W_quantized, W_scale, W_zero_point)\n"
        "y = Gemm<alpha=1.0, beta=2.0, transB=1>(x, W_dequantized, b)"
    )
    stored = constants(graph)
    assert (stored["W_quantized"].dtype.name, stored["W_scale"].shape) == ("int4", (64, 3))
    _, graph = weights(FORMS["gemm, transposed"], QuantizeWeights(weights="int4", group=32, target="onnxruntime"))
    assert listing(graph) == (
        "W_dequantized = DequantizeLinear<axis=0, block_size=32>(W_quantized, W_scale, W_zero_point)\n"
        "y = Gemm<alpha=1.0, beta=1.0, transB=0>(x, W_dequantized, b)"
    )


def test_a_file_of_int4_holds_two_weights_a_byte(tmp_path):
    _, graph = weights(("float[N,512] x", "y = MatMul(x, W)", {"W": (512, 512)}), QuantizeWeights(weights="int4"))
    save(graph, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").stat().st_size < 512 * 512 * 4 * 0.14
    feed = feeds(graph)
    assert np.array_equal(session(load(tmp_path / "m.onnx")).run(feed)["y"], session(graph).run(feed)["y"])


def test_float16_weights_have_float16_scales():
    _, graph = weights(
        ("float16[N,64] x", "y = MatMul(x, W)", {"W": random((64, 32), "W").astype(np.float16)}),
        QuantizeWeights(weights="int4", group=16), kind="float16",
    )  # fmt: skip
    assert constants(graph)["W_scale"].dtype == np.float16


def test_what_no_kernel_reads_stays_float():
    graph = build(
        "(float[N,32,4,4] x, float[32,N] v) => (float[] a, float[] b)", "a = Conv(x, C) b = MatMul(W, v)",
        kind="float", C=(32, 32, 3, 3), W=(32, 32),
    )  # fmt: skip
    outcome = QuantizeWeights(weights="int4").apply(raise_opset(graph, 21), Context())
    assert reasons(outcome) == [
        "Conv stays float: no runtime reads the weight of a convolution in groups of inputs",
        "MatMul stays float: its weight is the left operand, which no kernel reads in this format",
    ]
    with pytest.raises(UsageError, match="would expand fp8 weights on every call"):
        QuantizeWeights(weights="fp8", target="onnxruntime")


def test_data_make_the_rounding_better():
    """One input is 30 times as large as the others: its weights matter most."""
    text = ("float[N,128] x", "y = Gemm(x, W, b)", {"W": (128, 64), "b": 64})
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(512, 16)) @ rng.normal(size=(16, 128)) + 1).astype(np.float32)
    rows[:, 5] *= 30
    data = data_from({"x": rows})
    found = {}
    for rounder in ("nearest", "search", "gptq"):
        before, graph = weights(text, QuantizeWeights(weights="int4", rounder=rounder), data)
        found[rounder] = snr(run(before, {"x": rows}), session(graph).run({"x": rows}))
    assert found["nearest"] + 2 < found["search"]
    assert found["search"] + 5 < found["gptq"]


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_later_layers_make_up_for_earlier_ones(target):
    """In a chain of layers, with more rows than weights, what was lost in front is won back in part."""
    body = "a = Gemm(x, A, b) r = Relu(a) c = MatMul(r, B) s = Add(c, x) d = MatMul(s, C) t = Tanh(d) y = MatMul(t, D)"
    names = {name: random((64, 64), name) / 8 for name in "ABCD"}
    rows = np.random.default_rng(1).normal(size=(2048, 64)) @ random((64, 64), "mix")
    data, unseen = data_from({"x": rows[:1024].astype(np.float32)}), {"x": rows[1024:].astype(np.float32)}
    found = []
    for correct in (False, True):
        step = QuantizeWeights(weights="int4", rounder="gptq", group=32, correct_inputs=correct, target=target)
        before, graph = weights(("float[N,64] x", body, names | {"b": 64}), step, data)
        found.append(snr(run(before, unseen), session(graph).run(unseen)))
    assert found[0] + 0.3 < found[1]


def test_gptq_needs_data_and_takes_what_it_cannot_do_by_search():
    with pytest.raises(DataError, match="GPTQ needs calibration data"):
        QuantizeWeights(rounder="gptq").apply(build("(float[N,8] x) => (float[] y)", "y = Relu(x)"), Context())
    graph = build(
        "(float[N,32,4,4] x) => (float[] y)", "h = Conv<pads=[1,1,1,1]>(x, C) y = Conv(h, D)",
        kind="float", C=(32, 32, 3, 3), D=(32, 32, 1, 1),
    )  # fmt: skip
    outcome = QuantizeWeights(rounder="gptq").apply(graph, Context(calibration=samples(graph)))
    assert changes(outcome) == ["Conv: int8 weight", "Conv: int8 weight, GPTQ"]


def table(rows: int, width: int) -> np.ndarray:
    return random((rows, width), "E").astype(np.float32)


TABLE = ("int64[N] ids", "y = Gather(E, ids)", {"E": table(300, 64)})


@pytest.mark.parametrize(
    ("name", "target", "printed"),
    [
        ("int8", "tensorrt", "E_dequantized = DequantizeLinear<axis=0>(E_quantized, E_scale, E_zero_point)\n"
         "y = Gather(E_dequantized, ids)"),
        ("int4", "tensorrt", "E_dequantized = DequantizeLinear<axis=1, block_size=32>(E_quantized, E_scale, "
         "E_zero_point)\ny = Gather(E_dequantized, ids)"),
        ("fp8", "tensorrt", "E_dequantized = DequantizeLinear<axis=0>(E_quantized, E_scale, E_zero_point)\n"
         "y = Gather(E_dequantized, ids)"),
        ("int8", "onnxruntime", "y_codes = Gather(E_quantized, ids)\ny_converted = Cast<to=1>(y_codes)\n"
         "y_scale = Gather(E_scale_column, ids)\ny = Mul(y_converted, y_scale)"),
        ("int4", "onnxruntime", "y = GatherBlockQuantized<block_size=32, gather_axis=0, quantize_axis=1>(E_quantized, "
         "ids, E_scale)"),
    ],
)  # fmt: skip
def test_tables(name, target, printed, tmp_path):
    before, graph = weights(TABLE, QuantizeWeights(weights=name, target=target))
    assert listing(graph) == printed
    feed = {"ids": np.arange(300)}
    assert snr(run(before, feed), session(graph).run(feed)) > LEAST[name]
    if target == "onnxruntime":
        assert "DequantizeLinear" not in optimized(graph, tmp_path)


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_a_table_in_front_of_what_is_quantized(target):
    """The pair of nodes stands behind the rows that were taken."""
    graph = build("(int64[N] ids) => (float[N,32] y)", "e = Gather(E, ids) y = MatMul(e, W)", kind="float",
                  E=table(300, 64), W=table(64, 32))  # fmt: skip
    data = data_from({"ids": np.arange(300)})
    before = run(graph, {"ids": np.arange(300)})
    outcome = quantize(graph, Quantize(target=target), data)
    assert changes(outcome)[-1] == "Gather: table in int8"
    assert snr(before, session(graph, optimize=False).run({"ids": np.arange(300)})) > 35


EXPERTS = {"E": random((4, 48, 64), "experts").astype(np.float32)}


@pytest.mark.parametrize("taken", ["Gather(E, which)", "GatherND(E, index)"])
@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_weights_of_experts(name, target, taken, tmp_path):
    """Each token takes the matrix of its expert; every row of every matrix has a scale, or scales, of its own."""
    index = "" if taken.startswith("Gather(") else "index = Unsqueeze(which, last)"
    body = f"{index} w = {taken} y = MatMul(w, x)"
    graph = build(
        "(float[N,64,1] x, int64[N] which) => (float[] y)", body, kind="float", **EXPERTS, last=np.array([-1])
    )
    before = Snapshot.of(graph).graph()
    graph = raise_opset(graph, (step := QuantizeWeights(weights=name, target=target, group=32)).opset_for(graph))
    assert changes(step.apply(graph, Context())) == [f"{taken.partition('(')[0]}: table in {name}"]
    feed = {"x": random((6, 64, 1), "x").astype(np.float32), "which": np.array([3, 0, 1, 1, 2, 3])}
    assert snr(run(before, feed), session(graph).run(feed)) > LEAST[name]
    assert not any(isinstance(t, gs.Constant) and t.shape == [4, 48, 64] and t.dtype == np.float32
                   for node in graph.nodes for t in node.inputs)  # fmt: skip
    (row,) = (row for row in account(graph) if row.state == name)
    assert row.bytes == EXPERTS["E"].nbytes


def test_a_gather_of_parts_of_rows_stays():
    body = (
        "a = GatherND(E, pairs) b = Gather<axis=1>(E, which) y = ReduceSum<keepdims=0>(a) z = ReduceSum<keepdims=0>(b)"
    )
    graph = build("(int64[N,2] pairs, int64[N] which) => (float[] y, float[] z)", body, kind="float", **EXPERTS)
    outcome = QuantizeWeights().apply(graph, Context())
    assert (outcome.changed, outcome.refused) == ([], [])


def test_tables_that_stay_float():
    graph = build(
        "(int64[N] ids) => (float[] a, float[] b, float[] c)",
        "a = Gather(E, ids) b = Gather(F, ids) c = Gather(G, ids)",
        kind="float", E=table(300, 8), F=np.float32(np.nan) + table(300, 64), G=table(300, 64),
    )  # fmt: skip
    graph.nodes[2].name = "positions"
    outcome = QuantizeWeights(exclude=("pos*",)).apply(graph, Context())
    assert reasons(outcome) == [
        "Gather stays float: its table has fewer than 16 rows or columns",
        "Gather stays float: its table holds infinities or NaN",
        "Gather stays float: excluded by pattern 'pos*'",
    ]
    assert not QuantizeWeights(embeddings=False).apply(graph, Context()).refused


@pytest.mark.rtx
@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
def test_tensorrt_builds_every_form(name, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    body = "e = Gather(E, ids) f = Add(x, e) h = MatMul(f, W) r = Gemm<transB=1>(h, V, b) y = MatMul(r, U)"
    graph = build("(float[8,256] x, int64[8] ids) => (float[] y)", body, kind="float", E=(300, 256), W=(256, 128),
                  V=(64, 128), b=64, U=(64, 64))  # fmt: skip
    step = QuantizeWeights(weights=name, group=64)
    graph = raise_opset(graph, step.opset_for(graph))
    assert len(step.apply(graph, Context()).changed) == 4
    save(graph, tmp_path / "m.onnx")
    engine = tensorrt.build(tmp_path / "m.onnx", tmp_path / "m.engine", sm=89)
    assert engine.plan.readable
