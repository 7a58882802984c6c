"""Every row of the table of targets: what TensorRT makes of it on every GPU, and the numbers in ONNX Runtime."""

from __future__ import annotations

import os

import onnx_graphsurgeon as gs
import pytest

from channelfold.passes.base import Context, Outcome
from channelfold.passes.layers.targets import ROWS, verdict, why_not
from channelfold.passes.quantize import QuantizeWeights
from channelfold.runtime.engine import build as tensorrt
from channelfold.runtime.errors import BuildError, UsageError
from channelfold.runtime.io.files import check, raise_opset, save, session
from channelfold.tests.graphs import build, constants, feeds, listing, run, samples
from channelfold.tests.passes.quantize.quantized import optimized, snr

SMS = (75, 80, 86, 89, 120, 121) if os.environ.get("CHANNELFOLD_ALL_SMS") else (120,)
OURS = [pair for pair, row in ROWS.items() if "wrong" not in row.tensorrt]


def network(pairs: list[tuple[str, str]], kind: str = "float16") -> gs.Graph:
    """A MatMul and a Gemm with bias for every pair of formats, each written by the pass, all in one graph."""
    body, constants = [], {}
    for index, _ in enumerate(pairs):
        body += [f"m{index} = MatMul(x, W{index})", f"y{index} = Gemm<transB=1>(m{index}, V{index}, b{index})"]
        constants |= {f"W{index}": (128, 64), f"V{index}": (96, 64), f"b{index}": 96}
    outputs = ", ".join(f"{kind}[] y{index}" for index in range(len(pairs)))
    graph = build(f"({kind}[16,128] x) => ({outputs})", " ".join(body), kind=kind, opset=25, **constants)
    for node in graph.nodes:
        node.name = node.outputs[0].name
    for index, (weights, activations) in enumerate(pairs):
        others = tuple(f"{letter}{other}" for other in range(len(pairs)) if other != index for letter in "my")
        group = 32 if weights in ("int4", "uint4", "fp4", "dgq", "int2") else None
        with pytest.MonkeyPatch.context() as patch:  # also where the target should not get what the pass writes
            patch.setattr(QuantizeWeights, "check_for", lambda self, sm: None)
            step = QuantizeWeights(weights=weights, activations=activations, exclude=others, group=group)
            outcome = step.apply(raise_opset(graph, step.opset_for(graph)), Context(calibration=samples(graph)))
        assert [change.node for change in outcome.changed] == [f"m{index}", f"y{index}"]
    return graph


REFUSED = [(*pair, sm) for pair, row in ROWS.items() for sm, what in zip((75, 86, 89, 120), row.tensorrt, strict=True)
           if what == "refused"]  # fmt: skip


@pytest.mark.rtx
@pytest.mark.parametrize(("weights", "activations", "sm"), REFUSED if len(SMS) > 1 else [("fp8", "fp8", 86)])
def test_tensorrt_refuses_what_the_table_says(weights, activations, sm, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    save(network([(weights, activations)]), tmp_path / "m.onnx")
    with pytest.raises(BuildError):
        tensorrt.build(tmp_path / "m.onnx", tmp_path / "m.engine", sm=sm)


@pytest.mark.rtx
@pytest.mark.parametrize("sm", SMS)
def test_tensorrt_runs_every_row_as_the_table_says(sm, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    pairs = [pair for pair in OURS if verdict(*pair, "tensorrt", sm) != "refused"]
    save(network(pairs), tmp_path / "m.onnx")
    engine = tensorrt.build(tmp_path / "m.onnx", tmp_path / "m.engine", sm=sm)
    found = {pair: {engine.plan.nodes[f"{letter}{i}"].verdict for letter in "my"} for i, pair in enumerate(pairs)}
    assert found == {pair: {verdict(*pair, "tensorrt", sm)} for pair in pairs}


FORMS = {
    "matmul": ("float[N,96] x", "y = MatMul(x, W)", {"W": (96, 64)}),
    "odd": ("float[N,77] x", "h = MatMul(x, W) y = Add(h, b)", {"W": (77, 35), "b": 35}),
    "three axes": ("float[2,N,80] x", "h = MatMul(x, W) y = Add(b, h)", {"W": (80, 48), "b": 48}),
    "gemm": ("float[N,96] x", "y = Gemm<transB=1,alpha=0.5,beta=2.0>(x, W, b)", {"W": (64, 96), "b": 64}),
    "shared": ("float[N,64] x", "h = MatMul(x, W) y = MatMul(h, W)", {"W": (64, 64)}),
    "conv": ("float[N,32,6,6] x", "y = Conv<pads=[1,1,1,1]>(x, W, b)", {"W": (48, 32, 3, 3), "b": 48}),
}
LEAST = {
    "int8": 36,
    "int4": 17,
    "uint4": 17,
    "int2": 3,
    "fp8": 27,
    "fp4": 18,
    "mxfp4": 15,
    "mxfp8": 24,
    "dgq": 17,
}  # dB


def rows(target: str) -> list[tuple[str, str]]:
    return [pair for pair in OURS if not why_not(*pair, target)[0] and pair[1] != "fp4" and pair[0] != "nvfp4"]


@pytest.mark.parametrize(("weights", "activations"), rows("onnxruntime"))
@pytest.mark.parametrize("form", FORMS)
def test_the_numbers_in_onnxruntime(form, weights, activations, tmp_path):
    """Every form is quantized or refused by name; no weight is expanded on every call; the numbers are near.

    The weight of a convolution ONNX Runtime expands whatever the file says, and one that two nodes read with scales of
    their own.
    """
    before, outcome, graph = quantized(form, weights, activations, "onnxruntime")
    if not outcome.changed:
        assert outcome.refused
        return
    feed = feeds(before, size=8)
    for optimize in (False, True):
        found = session(graph, optimize=optimize).run(feed)
        assert snr(run(before, feed), found) > LEAST[weights] - 3 * (form == "shared")
    expanded = form == "conv" or (form, activations) == ("shared", "int8-per-token")
    assert expanded or "DequantizeLinear" not in optimized(graph, tmp_path)


@pytest.mark.parametrize(("weights", "activations"), [p for p in rows("tensorrt") if "fp4" not in p[0]])
@pytest.mark.parametrize("form", FORMS)
def test_the_numbers_of_what_tensorrt_gets(form, weights, activations):
    before, outcome, graph = quantized(form, weights, activations, "tensorrt")
    if not outcome.changed:
        assert outcome.refused
        return
    feed = feeds(before, size=8)
    found = session(graph, optimize=False).run(feed)
    assert snr(run(before, feed), found) > LEAST[weights] - 3 * (form == "shared")


def quantized(form: str, weights: str, activations: str, target: str) -> tuple[gs.Graph, Outcome, gs.Graph]:
    text, body, constants = FORMS[form]
    graph = build(f"({text}) => (float[] y)", body, kind="float", **constants)
    before = graph.copy()
    step = QuantizeWeights(weights=weights, activations=activations, target=target)
    graph = raise_opset(graph, step.opset_for(graph))
    outcome = step.apply(graph, Context(calibration=samples(graph)))
    check(graph)
    return before, outcome, graph


def test_a_pair_that_no_target_runs_is_refused_with_what_to_take():
    with pytest.raises(
        UsageError, match=r"TensorRT builds int4 weights with int8 activations and computes .* Take dgq"
    ):
        QuantizeWeights(weights="int4", activations="int8")
    with pytest.raises(UsageError, match=r"TensorRT does not run int2 weights\. Take int4"):
        QuantizeWeights(weights="int2")
    with pytest.raises(UsageError, match=r"With nvfp4 weights take activations none or fp4"):
        QuantizeWeights(weights="nvfp4", activations="int8")
    assert QuantizeWeights(weights="dgq").activations == "int8"


def test_what_an_sm_cannot_run_is_refused_before_the_work():
    with pytest.raises(UsageError, match=r"TensorRT for SM 75 does not run int4 weights\. Take int8"):
        QuantizeWeights(weights="int4").check_for(75)
    with pytest.raises(UsageError, match=r"TensorRT for SM 86 does not run fp8 weights with fp8 activations"):
        QuantizeWeights(weights="fp8", activations="fp8").check_for(86)
    QuantizeWeights(weights="int4", target="onnxruntime").check_for(75)
    QuantizeWeights(weights="int4").check_for(87)


def test_what_is_printed():
    """DGQ for TensorRT multiplies the codes by integers; fp8 reads both operands through E4M3; NVFP4 has two levels."""
    printed = {}
    for weights, activations in (("dgq", "int8"), ("fp8", "fp8"), ("nvfp4", "fp4")):
        graph = build("(float[N,64] x) => (float[] y)", "y = MatMul(x, W)", kind="float", opset=23, W=(64, 32))
        QuantizeWeights(weights=weights, activations=activations).apply(graph, Context(calibration=samples(graph)))
        printed[weights] = listing(graph)
    assert printed["dgq"].splitlines()[2:] == [
        "W_dequantized = DequantizeLinear<axis=0, block_size=32>(W_quantized, W_scale, W_zero_point)",
        "W_integers = QuantizeLinear<axis=1>(W_dequantized, W_one, W_zero)",
        "W_int8 = DequantizeLinear<axis=1>(W_integers, W_base, W_zero)",
        "y = MatMul(x_dequantized, W_int8)",
    ]
    assert printed["fp8"] == (
        "x_quantized = QuantizeLinear(x, x_scale, x_zero_point)\n"
        "x_dequantized = DequantizeLinear(x_quantized, x_scale, x_zero_point)\n"
        "W_dequantized = DequantizeLinear<axis=1>(W_quantized, W_scale, W_zero_point)\n"
        "y = MatMul(x_dequantized, W_dequantized)"
    )
    assert printed["nvfp4"] == (
        "x_codes, x_scales = TRT_FP4DynamicQuantize<axis=-1, block_size=16, scale_type=17>(x, x_unit)\n"
        "x_factor = DequantizeLinear(x_scales, x_unit)\n"
        "x_dequantized = DequantizeLinear<axis=-1, block_size=16>(x_codes, x_factor)\n"
        "W_factor = DequantizeLinear(W_scale, W_unit)\n"
        "W_dequantized = DequantizeLinear<axis=0, block_size=16>(W_quantized, W_factor)\n"
        "y = MatMul(x_dequantized, W_dequantized)"
    )


def test_dgq_for_onnxruntime(tmp_path):
    """Codes of 4 bits in the file, a product of integers at run time, the integer weight made when it is loaded."""
    graph = build("(float[N,512] x) => (float[] y)", "y = Gemm(x, W, b)", kind="float", opset=21, W=(512, 512), b=512)
    step = QuantizeWeights(weights="dgq", target="onnxruntime")
    before = run(graph, feeds(graph))
    step.apply(graph, Context(calibration=samples(graph)))
    save(graph, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").stat().st_size < 512 * 512 * 4 * 0.14
    found = optimized(graph, tmp_path)
    assert {"MatMulInteger", "DequantizeLinear", "Mul"}.isdisjoint(found)
    assert "DynamicQuantizeMatMul" in found or "MatMulIntegerToFloat" in found
    assert snr(before, session(graph).run(feeds(graph))) > 15


def test_nodes_that_keep_8_bits():
    body = "h = MatMul(x, W) g = MatMul(h, V) y = MatMul(g, U)"
    sizes = {"W": (64, 64), "V": (64, 64), "U": (64, 64)}
    for weights, kept in (("int4", "int8"), ("dgq", "int8"), ("nvfp4", "float4_e2m1fn")):
        graph = build("(float[N,64] x) => (float[] y)", body, kind="float", opset=23, **sizes)
        for node in graph.nodes:
            node.name = node.outputs[0].name
        step = QuantizeWeights(weights=weights, keep_8bit=("g",), activations="fp4" if weights == "nvfp4" else "none")
        outcome = step.apply(graph, Context(calibration=samples(graph)))
        stored = {name: t.dtype.name for name, t in constants(graph).items() if name.endswith("_quantized")}
        assert len(outcome.changed) == 3
        if weights == "nvfp4":
            assert stored == {"W_quantized": kept, "V_quantized": "float8_e4m3fn", "U_quantized": kept}
        else:
            assert stored == {"W_quantized": "int4", "V_quantized": kept, "U_quantized": "int4"}


@pytest.mark.rtx
def test_convolutions_in_fp8(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    body = "a = Conv<pads=[1,1,1,1]>(x, W, b) r = Relu(a) c = Conv<group=2>(r, V) p = GlobalAveragePool(c) " \
           "f = Flatten(p) y = Gemm<transB=1>(f, U, d)"  # fmt: skip
    graph = build("(float[4,16,12,12] x) => (float[] y)", body, kind="float", opset=19, W=(32, 16, 3, 3), b=32,
                  V=(32, 16, 1, 1), U=(20, 32), d=20)  # fmt: skip
    data = samples(graph)
    before = [run(graph, feed) for feed in data]
    outcome = QuantizeWeights(weights="fp8", activations="fp8").apply(graph, Context(calibration=data))
    assert len(outcome.changed) == 3
    for old, feed in zip(before, data, strict=True):
        assert snr(old, session(graph, optimize=False).run(feed)) > 20
    save(graph, tmp_path / "m.onnx")
    engine = tensorrt.build(tmp_path / "m.onnx", tmp_path / "m.engine", sm=89)
    assert {name: found.verdict for name, found in engine.plan.nodes.items()} == dict.fromkeys(engine.plan.nodes, "fp8")
