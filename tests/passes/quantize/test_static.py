"""Quantized graphs, by what they print and by what they compute."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from channelfold.passes.base import Context, Outcome
from channelfold.passes.quantize.static import Quantize
from channelfold.runtime.data.sources import Data
from channelfold.runtime.errors import DataError, UsageError
from channelfold.runtime.io.files import check, export, import_model, infer_shapes, load, raise_opset, save, session
from channelfold.runtime.io.session import Session, TensorSpec, onnxruntime
from channelfold.runtime.io.weights import tensor_proto
from channelfold.tests import strategies
from channelfold.tests.graphs import build, constants, listing, node, ops, random, reasons, run


def samples(graph: gs.Graph, count: int = 4, *, size: int = 2, make=None) -> Data:
    """Normal random feeds; ``make(shape, rng)`` for other ones. Open dimensions get ``size``."""
    make = make or (lambda shape, rng: rng.standard_normal(shape))
    feeds = []
    for index in range(count):
        rng = np.random.default_rng(index)
        shapes = {t.name: [d if isinstance(d, int) else size for d in t.shape] for t in graph.inputs}
        feeds.append({t.name: np.asarray(make(shapes[t.name], rng), t.dtype) for t in graph.inputs})
    specs = [TensorSpec(name, array.dtype, array.shape) for name, array in feeds[0].items()]
    return Data(specs, count, lambda: iter(feeds), "random samples")


def quantize(graph: gs.Graph, step: Quantize | None = None, data: Data | None = None) -> Outcome:
    """Quantizes and asserts what always holds: a valid graph, the same inputs and outputs, facts that are JSON."""
    sides = [(t.name, t.dtype, t.shape) for t in (*graph.inputs, *graph.outputs)]
    outcome = (step or Quantize()).apply(graph, Context(calibration=data or samples(graph)))
    check(graph)
    assert sides == [(t.name, t.dtype, t.shape) for t in (*graph.inputs, *graph.outputs)]
    json.dumps(outcome.facts)
    assert outcome.facts["quantized"] == len(outcome.changed) == len(outcome.facts["quantized_nodes"])
    assert [change.node for change in outcome.changed] == outcome.facts["quantized_nodes"]
    assert outcome.facts["linears"] == len(outcome.changed) + len(outcome.refused)
    return outcome


def snr(before: dict, after: dict) -> float:
    noise = sum(np.square(before[name].astype(np.float64) - after[name]).sum() for name in before)
    signal = sum(np.square(before[name].astype(np.float64)).sum() for name in before)
    return float(10 * np.log10(signal / noise)) if noise else np.inf


def test_convolution():
    graph = build("(float[N,16,6,6] x) => (float[] y)", "y = Conv<pads=[1,1,1,1]>(x, W, b)", kind="float",
                  W=(24, 16, 3, 3), b=24)  # fmt: skip
    outcome = quantize(graph)
    assert listing(graph) == (
        "x_quantized = QuantizeLinear(x, x_scale, x_zero_point)\n"
        "x_dequantized = DequantizeLinear(x_quantized, x_scale, x_zero_point)\n"
        "W_dequantized = DequantizeLinear<axis=0>(W_quantized, W_scale, W_zero_point)\n"
        "y = Conv<pads=[1, 1, 1, 1]>(x_dequantized, W_dequantized, b)"
    )
    stored = constants(graph)
    assert (stored["x_scale"].shape, stored["x_scale"].dtype) == ((), np.float32)
    assert (stored["x_zero_point"].shape, stored["x_zero_point"].dtype, stored["x_zero_point"]) == ((), np.int8, 0)
    assert (stored["W_quantized"].shape, stored["W_quantized"].dtype) == ((24, 16, 3, 3), np.int8)
    assert (stored["W_scale"].shape, stored["W_zero_point"].dtype) == ((24,), np.int8)
    assert not stored["W_zero_point"].any()
    assert (stored["b"].shape, stored["b"].dtype) == ((24,), np.float32)
    facts = outcome.facts
    assert (facts["linears"], facts["quantized"], facts["by_op"]) == (1, 1, {"Conv": {"quantized": 1, "total": 1}})
    (activation,) = facts["activations"].items()
    assert activation[0] == "x"
    assert set(activation[1]) == {"minimum", "maximum", "low", "high", "snr_db", "row_snr_db", "masked"}
    assert outcome.changed[0].what.startswith("Conv: int8, activation x up to ")


@pytest.mark.parametrize(
    ("text", "shapes", "printed"),
    [
        ("y = Gemm(x, W, b)", {"W": (16, 24), "b": 24}, "<axis=1> Gemm(x_dequantized, W_dequantized, b)"),
        (
            "y = Gemm<transB=1>(x, W)",
            {"W": (24, 16)},
            "<axis=0> Gemm<transB=1>(x_dequantized, W_dequantized, Gemm_0_bias)",
        ),
        (
            "y = Gemm<alpha=0.5,beta=3.0>(x, W, b)",
            {"W": (16, 24), "b": 24},
            "<axis=1> Gemm<alpha=1.0, beta=1.0>(x_dequantized, W_dequantized, b)",
        ),
        ("y = MatMul(x, W)", {"W": (16, 24)}, "<axis=1> MatMul(x_dequantized, W_dequantized)"),
    ],
)  # fmt: skip
def test_products(text, shapes, printed):
    graph = build("(float[N,16] x) => (float[] y)", text, kind="float", **shapes)
    before = run(graph, next(iter(samples(graph))))
    quantize(graph)
    axis, _, line = printed.partition(" ")
    assert listing(graph).splitlines()[2:] == [
        f"W_dequantized = DequantizeLinear{axis}(W_quantized, W_scale, W_zero_point)", f"y = {line}",
    ]  # fmt: skip
    assert snr(before, run(graph, next(iter(samples(graph))))) > 35


def test_depthwise_and_grouped_convolutions():
    graph = build("(float[N,32,6,6] x) => (float[] y)", "d = Conv<group=32>(x, W) y = Conv<group=4>(d, V)",
                  kind="float", W=(32, 1, 3, 3), V=(16, 8, 1, 1))  # fmt: skip
    before = run(graph, next(iter(samples(graph))))
    assert quantize(graph).facts["quantized"] == 2
    assert constants(graph)["W_scale"].shape == (32,)
    assert constants(graph)["V_scale"].shape == (16,)
    assert snr(before, run(graph, next(iter(samples(graph))))) > 35


def test_projections_share_one_pair():
    graph = build(
        "(float[N,4,16] x) => (float[] q, float[] k, float[] v)", "q = MatMul(x, Q) k = MatMul(x, K) v = MatMul(x, V)",
        kind="float", Q=(16, 16), K=(16, 16), V=(16, 16),
    )  # fmt: skip
    quantize(graph)
    assert ops(graph).count("QuantizeLinear") == 1
    assert ops(graph).count("DequantizeLinear") == 4
    assert all(n.inputs[0].name == "x_dequantized" for n in graph.nodes if n.op == "MatMul")


def test_a_weight_shared_with_a_lookup():
    """Weight tying: products share one int8 weight, whatever their biases, and the Gather keeps the float one."""
    graph = build(
        "(float[N,16] x, int64[N] ids) => (float[] a, float[] b, float[] e)",
        "T = Transpose<perm=[1,0]>(E) a = Gemm(x, T, b1) b = Gemm(x, T, b2) e = Gather(E, ids)",
        kind="float", E=(24, 16), b1=24, b2=24,
    )  # fmt: skip
    quantize(graph)
    assert listing(graph) == (
        "x_quantized = QuantizeLinear(x, x_scale, x_zero_point)\n"
        "x_dequantized = DequantizeLinear(x_quantized, x_scale, x_zero_point)\n"
        "E_dequantized = DequantizeLinear<axis=1>(E_quantized, E_scale, E_zero_point)\n"
        "a = Gemm(x_dequantized, E_dequantized, b1)\n"
        "b = Gemm(x_dequantized, E_dequantized, b2)\n"
        "e = Gather(E, ids)"
    )
    assert constants(graph)["E_quantized"].shape == (16, 24)
    assert np.array_equal(constants(graph)["E"], random((24, 16), "E").astype(np.float32))


def emulated(x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray) -> np.ndarray:
    info = np.iinfo(zero_point.dtype)
    rounded = np.clip(np.rint(x / scale) + zero_point, info.min, info.max)
    return (rounded - zero_point.astype(np.float64)) * scale


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_numbers_equal_those_of_fake_quantization(target):
    """1e-5 of the largest value: float32 sums of 32 products against float64, nothing else differs."""
    graph = build("(float[N,32] x) => (float[] y)", "h = Gemm(x, W, b) r = Relu(h) y = MatMul(r, V)", kind="float",
                  W=(32, 48), b=48, V=(48, 24))  # fmt: skip
    quantize(graph, Quantize(target=target), samples(graph, size=64))
    c = {
        name: value.astype(np.float64) if value.dtype == np.float32 else value
        for name, value in constants(graph).items()
    }
    feed = next(iter(samples(graph, size=8)))
    x = emulated(feed["x"], c["x_scale"], c["x_zero_point"])
    bias = c["b"] if target == "tensorrt" else c["Gemm_0_bias_quantized"] * c["Gemm_0_bias_scale"]
    r = np.maximum(x @ (c["W_quantized"] * c["W_scale"]) + bias, 0)
    r = emulated(r, c["r_scale"], c["r_zero_point"])
    y = r @ (c["V_quantized"] * c["V_scale"])
    found = session(graph, optimize=False).run(feed)["y"]
    assert np.abs(found - y).max() <= 1e-5 * np.abs(y).max()


@pytest.mark.parametrize("calibrator", ["minmax", "percentile", "mse", "entropy"])
@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_calibrators_set_the_range(calibrator, target):
    graph = build("(float[N,16] x) => (float[] y)", "y = MatMul(x, W)", kind="float", W=(16, 16))
    data = samples(graph, size=256)
    outcome = quantize(graph, Quantize(calibrator=calibrator, target=target), data)
    values = np.concatenate([feed["x"] for feed in data])
    facts = outcome.facts["activations"]["x"]
    assert (facts["minimum"], facts["maximum"]) == (values.min(), values.max())
    limit = max(-facts["low"], facts["high"])
    assert limit == np.abs(values).max() if calibrator == "minmax" else limit <= np.abs(values).max()
    span = 127 if target == "tensorrt" else 255
    width = limit if target == "tensorrt" else facts["high"] - facts["low"]
    assert constants(graph)["x_scale"] == np.float32(width / span)
    q = emulated(values, *(constants(graph)[f"x_{n}"] for n in ("scale", "zero_point")))
    measured = snr({"x": values}, {"x": q})
    assert facts["snr_db"] == pytest.approx(measured, abs=0.3)  # few values: chance decides where they round to


def test_what_is_refused_by_rule():
    graph = build(
        "(float[N,16,8,8] x, float[N,8,16] z) => (float[] a, float[] b, float[] c, float[] d, float[] e)",
        """
        a = Conv(x, W)
        b = ConvTranspose(x, T)
        c = MatMul(z, V)
        y = Transpose<perm=[0,2,1]>(z)
        d = MatMul(z, y)
        e = MatMul(L, z)
        """,
        kind="float", W=(8, 16, 1, 1), T=(16, 16, 2, 2), V=(16, 4), L=(16, 8),
    )  # fmt: skip
    before = listing(graph)
    outcome = quantize(graph)
    assert reasons(outcome) == [
        "Conv stays float: fewer than 16 channels",
        "ConvTranspose stays float: ConvTranspose runs in float anyway",
        "MatMul stays float: fewer than 16 channels",
        "MatMul stays float: it multiplies two activations",
        "MatMul stays float: its weight is the left operand",
    ]
    assert listing(graph) == before
    assert outcome.refused[0].code == "fewer than 16 channels"


def test_what_is_excluded():
    graph = build("(float[N,16] x) => (float[] c)", "a = Gemm(x, W) b = MatMul(a, W) c = MatMul(b, V)", kind="float",
                  W=(16, 16), V=(16, 16))  # fmt: skip
    for member, name in zip(graph.nodes, ("/in/fc", "/mid/fc", "/head/fc"), strict=True):
        member.name = name
    outcome = quantize(graph, Quantize(exclude=("/head/*", "nothing"), exclude_ops=("Gemm",)))
    assert reasons(outcome) == [
        "Gemm stays float: excluded by operator type Gemm",
        "MatMul stays float: excluded by pattern '/head/*'",
    ]
    assert outcome.facts["quantized_nodes"] == ["/mid/fc"]


def test_activations_that_8_bits_cannot_hold():
    graph = build("(float[N,16] x) => (float[] y)", "y = MatMul(x, W)", kind="float", W=(16, 16))
    data = samples(graph, size=4, make=lambda shape, rng: np.exp(4 * rng.standard_normal(shape)))
    strict = quantize(graph, Quantize(min_activation_snr=60.0), data)
    facts = strict.facts["activations"]["x"]
    assert facts["row_snr_db"] < facts["snr_db"]
    assert reasons(strict) == [
        f"MatMul stays float: 8 bits cannot represent its activation (x: {facts['row_snr_db']} dB, 60 wanted)"
    ]
    assert ops(graph) == ["MatMul"]
    assert quantize(graph, Quantize(min_activation_snr=0.0), data).facts["quantized"] == 1


def test_a_token_that_holds_all_energy_hides_what_the_others_lose():
    """Of 64 tokens one is 10,000 times the others: 8 bits keep it, and round the others to zero."""

    def make(shape, rng):
        values = rng.standard_normal(shape)
        values[:, 0] *= 1e4
        return values

    graph = build("(float[1,64,16] x) => (float[] y)", "y = MatMul(x, W)", kind="float", W=(16, 16))
    outcome = quantize(graph, data=samples(graph, make=make))
    facts = outcome.facts["activations"]["x"]
    assert facts["snr_db"] > 30
    assert facts["row_snr_db"] < -20
    assert outcome.facts["quantized"] == 0


def test_the_rows_of_images_are_not_counted():
    graph = build("(float[N,16,6,6] x) => (float[] y)", "y = Conv(x, W)", kind="float", W=(16, 16, 1, 1))
    assert quantize(graph).facts["activations"]["x"]["row_snr_db"] is None


# ---- a share that stays float --------------------------------------------------------------------------------------

CHAIN = "a = MatMul(x, A) b = MatMul(a, B) c = MatMul(b, C) d = MatMul(c, D) e = MatMul(d, E)"


def chain(outputs: str = "float[] e", **weights) -> gs.Graph:
    """Five products; the weights of ``weights`` differ much by input channel, so int8 loses more of them."""
    return build(f"(float[N,16] x) => ({outputs})", CHAIN, kind="float", **dict.fromkeys("ABCDE", (16, 16)) | weights)


def uneven(name: str) -> np.ndarray:
    """In every row one weight is 100 times the others, and reads a channel that matters no more than they do."""
    weight = random((16, 16), name)
    weight[0] *= 100
    return weight


def float_nodes(outcome: Outcome) -> list[str]:
    return [refusal.node for refusal in outcome.refused]


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.19, 0), (0.2, 1), (0.5, 2), (0.6, 3), (1.0, 5)])
def test_a_share_that_may_stay_float_is_counted_exactly(share, count):
    graph = chain()
    outcome = quantize(graph, Quantize(float_share=share), samples(graph, size=8))
    assert len(outcome.refused) == count
    assert "MatMul_4" in float_nodes(outcome) or not count  # it writes the output of the graph
    for refusal in outcome.refused:
        assert refusal.code == "int8 changes its outputs most"
        assert refusal.reason.startswith("MatMul stays float: int8 changes its outputs most (")
        assert refusal.reason.endswith(" dB)")


def test_the_share_goes_to_what_int8_changes_most():
    graph = chain(B=uneven("B"), D=uneven("D"))
    feeds = samples(graph, size=64, make=lambda shape, rng: rng.standard_normal(shape))
    outcome = quantize(graph, Quantize(float_share=0.4, min_activation_snr=0), feeds)
    names = float_nodes(outcome)
    assert len(names) == 2
    assert names[-1] == "MatMul_4"
    every = chain(B=uneven("B"), D=uneven("D"))
    errors = {r.node: r.reason for r in quantize(every, Quantize(float_share=1, min_activation_snr=0), feeds).refused}
    decibels = {name: float(reason.split("(")[1].split(" dB")[0]) for name, reason in errors.items()}
    assert names[0] == min(list(decibels)[:-1], key=decibels.__getitem__)


def test_every_output_of_the_graph_comes_before_any_other():
    graph = chain("float[] a, float[] c, float[] e", B=uneven("B"), D=uneven("D"))
    outcome = quantize(graph, Quantize(float_share=0.6, min_activation_snr=0), samples(graph, size=8))
    assert float_nodes(outcome) == ["MatMul_0", "MatMul_2", "MatMul_4"]


def test_what_is_float_anyway_is_part_of_the_share():
    graph = chain()
    data = samples(graph, size=8)
    outcome = quantize(graph, Quantize(float_share=0.4, exclude=("MatMul_1", "MatMul_2")), data)
    assert float_nodes(outcome) == ["MatMul_1", "MatMul_2"]
    graph = chain()
    outcome = quantize(graph, Quantize(float_share=0.6, exclude=("MatMul_1", "MatMul_2")), data)
    assert sorted(float_nodes(outcome)) == ["MatMul_1", "MatMul_2", "MatMul_4"]


def test_a_convolution_with_a_kernel_is_quantized_whatever_the_share():
    graph = build("(float[N,16,6,6] x) => (float[] y)", "c = Conv(x, W) y = Conv(c, V)", kind="float",
                  W=(16, 16, 3, 3), V=(16, 16, 1, 1))  # fmt: skip
    outcome = quantize(graph, Quantize(float_share=1.0))
    assert float_nodes(outcome) == ["Conv_1"]


@pytest.mark.parametrize("share", [-0.1, 1.1, 30])
def test_a_share_that_is_none(share):
    with pytest.raises(UsageError, match=f"'float_share' is {share:g}. Expected 0 to 1"):
        Quantize(float_share=share)


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_activations_that_are_always_zero(target):
    """A range of zero would turn whatever comes later to zero."""
    graph = build("(float[N,16] x) => (float[] z)", "y = MatMul(x, W) z = MatMul(y, V)", kind="float", W=(16, 16),
                  V=(16, 16))  # fmt: skip
    outcome = quantize(graph, Quantize(target=target), samples(graph, make=lambda shape, rng: np.zeros(shape)))
    assert reasons(outcome) == [
        f"MatMul stays float: its activation is zero in every calibration sample ({name})" for name in "xy"
    ]
    assert ops(graph) == ["MatMul", "MatMul"]


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_dead_channels(target):
    weight = random((24, 16, 1, 1), "W")
    weight[[0, 5]] = 0
    weight[7] = 1e-30
    bias = random(24, "b")
    bias[5] = 0
    graph = build("(float[N,16,4,4] x) => (float[] y)", "y = Conv(x, W, b)", kind="float", W=weight, b=bias)
    before = run(graph, next(iter(samples(graph))))
    quantize(graph, Quantize(target=target))
    assert (constants(graph)["W_scale"] > 0).all()
    after = session(graph).run(next(iter(samples(graph))))
    assert np.isfinite(after["y"]).all()
    assert np.abs(after["y"][:, 5]).max() == 0
    assert np.abs(after["y"][:, 0] - bias[0]).max() <= 1e-6 * abs(bias[0])
    assert snr(before, after) > 35


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_masks_leave_range_and_bias_alone(target):
    def make(shape, rng):
        values = rng.standard_normal(shape)
        values[-1, 3] = -3.4e38
        return values

    graph = build("(float[N,16] x) => (float[] y)", "y = Gemm(x, W, b)", kind="float", W=(16, 16), b=16)
    outcome = quantize(graph, Quantize(target=target), samples(graph, size=50, make=make))
    facts = outcome.facts["activations"]["x"]
    assert (facts["masked"], facts["snr_db"] > 35) == (4, True)
    assert -5 < facts["low"] < facts["high"] < 5
    assert all(np.isfinite(values).all() for values in constants(graph).values())


def grid(shape, rng):
    """Integers with a mean of 20 and a largest magnitude of 127, which int8 holds exactly at a scale of 1."""
    values = np.clip(np.rint(20 + 30 * rng.standard_normal(shape)), -127, 127)
    values.flat[0] = 127
    return values


EXACT = Quantize(calibrator="minmax")


@pytest.mark.parametrize(
    ("inputs", "text", "shapes"),
    [
        ("float[N,16,5,5] x", "y = Conv(x, W, b)", {"W": (24, 16, 1, 1), "b": 24}),
        ("float[N,16,5,5] x", "y = Conv(x, W)", {"W": (24, 16, 1, 1)}),
        ("float[N,16,5,5] x", "y = Conv<group=4>(x, W, b)", {"W": (24, 4, 1, 1), "b": 24}),
        ("float[N,16] x", "y = Gemm(x, W, b)", {"W": (16, 24), "b": 24}),
        ("float[N,16] x", "y = Gemm<alpha=-0.5,beta=2.0,transB=1>(x, W, b)", {"W": (24, 16), "b": 24}),
        ("float[16,N] x", "y = Gemm<transA=1>(x, W)", {"W": (16, 24)}),
        ("float[N,7,16] x", "m = MatMul(x, W) y = Add(b, m)", {"W": (16, 24), "b": 24}),
    ],
)
def test_bias_correction_leaves_no_mean_error(inputs, text, shapes):
    """The activation is exact, so what is left is the rounding of the weights: 0 on average, but for float32 sums."""
    graph = build(f"({inputs}) => (float[] y)", text, kind="float", **shapes)
    other = build(f"({inputs}) => (float[] y)", text, kind="float", **shapes)
    data = samples(graph, count=3, size=6, make=grid)
    before = [run(graph, feed)["y"] for feed in data]
    quantize(graph, EXACT, data)
    quantize(other, dataclasses.replace(EXACT, correct_bias=False), data)
    assert constants(graph)["x_scale"] == 1

    def mean_error(quantized: gs.Graph) -> float:
        errors = [session(quantized, optimize=False).run(f)["y"] - y for f, y in zip(data, before, strict=True)]
        axis = tuple(i for i in range(errors[0].ndim) if i != (1 if "Conv" in text else errors[0].ndim - 1))
        return float(np.abs(np.mean(errors, axis=(0, *(a + 1 for a in axis)))).max())

    peak = max(np.abs(y).max() for y in before)
    assert mean_error(graph) <= 2e-6 * peak < 1e-4 * peak < mean_error(other)


def test_a_product_without_bias_gets_none():
    graph = build("(float[N,16] x) => (float[] y)", "m = MatMul(x, W) y = Relu(m)", kind="float", W=(16, 24))
    quantize(graph, EXACT, samples(graph, make=grid))
    assert ops(graph) == ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul", "Relu"]


def test_a_shared_bias_is_not_changed_under_others():
    graph = build("(float[N,16] x) => (float[] y, float[] z)", "y = Gemm(x, W, b) z = Add(x, b)", kind="float",
                  W=(16, 16), b=16)  # fmt: skip
    quantize(graph, EXACT, samples(graph, make=grid))
    assert np.array_equal(constants(graph)["b"], random(16, "b").astype(np.float32))
    assert node(graph, "Gemm").inputs[2].name == "Gemm_0_bias"
    assert not np.array_equal(constants(graph)["Gemm_0_bias"], constants(graph)["b"])


def test_a_tensor_that_a_convolution_and_a_product_read():
    """Their channels lie on different axes, so the mean by channel of one of them is not known."""
    graph = build("(float[1,16,20] x) => (float[] a, float[] b)", "a = Conv(x, W, b1) m = MatMul(x, V) b = Add(m, b2)",
                  kind="float", W=(16, 16, 1), b1=16, V=(20, 24), b2=24)  # fmt: skip
    before = run(graph, next(iter(samples(graph))))
    assert quantize(graph).facts["quantized"] == 2
    assert snr(before, run(graph, next(iter(samples(graph))))) > 35


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_float16(target):
    graph = build("(float16[N,16,4,4] x) => (float16[] y)", "c = Conv(x, W, b) y = Relu(c)", opset=17, kind="float16",
                  W=random((24, 16, 1, 1), "W").astype(np.float16), b=random(24, "b").astype(np.float16))  # fmt: skip
    step = Quantize(target=target)
    assert step.opset_for(graph) == 19
    graph = raise_opset(graph, 19)
    before = session(graph).run(next(iter(samples(graph))))
    quantize(graph, step)
    for name in ("x_scale", "W_scale", "b"):
        assert constants(graph)[name].dtype == np.float16
    assert snr(before, session(graph).run(next(iter(samples(graph))))) > 30


def test_float16_bias_at_the_end_of_its_type():
    bias = np.full(16, 65504, np.float16)
    graph = build("(float16[N,16] x) => (float16[] y)", "y = Gemm(x, W, b)", opset=19, kind="float16",
                  W=(100 * random((16, 16), "W")).astype(np.float16), b=bias)  # fmt: skip
    quantize(graph, Quantize(calibrator="minmax"), samples(graph, make=lambda s, r: -100 + r.standard_normal(s)))
    assert np.isfinite(constants(graph)["b"]).all()


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_inputs_and_outputs_of_the_graph_as_activations(target):
    graph = build("(float[N,16] x) => (float[] h, float[] y)", "h = MatMul(x, W) y = MatMul(h, W)", kind="float",
                  W=(16, 16))  # fmt: skip
    before = session(graph).run(next(iter(samples(graph))))
    assert quantize(graph, Quantize(target=target)).facts["quantized"] == 2
    assert [t.name for t in graph.outputs] == ["h", "y"]
    assert snr(before, session(graph).run(next(iter(samples(graph))))) > 30


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_subgraphs_are_left_alone_and_may_read_quantized_tensors(target):
    def body(name):
        nodes = [onnx.helper.make_node("Conv", ["h", "W"], [f"{name}_y"], f"{name}_conv")]
        return onnx.helper.make_graph(nodes, name, [], [onnx.helper.make_tensor_value_info(f"{name}_y", 1, None)])

    graph = build("(float[N,16,4,4] x, bool p) => (float[] y)", "h = Conv(x, W) y = Conv(h, W)", kind="float",
                  W=(16, 16, 1, 1))  # fmt: skip
    model = whole(graph)
    branches = onnx.helper.make_node("If", ["p"], ["i"], "if", then_branch=body("then"), else_branch=body("else"))
    model.graph.node.append(branches)
    model.graph.output.append(onnx.helper.make_tensor_value_info("i", 1, None))
    graph = import_model(model)
    infer_shapes(graph)
    data = samples(graph, make=lambda shape, rng: rng.standard_normal(shape))
    before = session(graph).run(next(iter(data)))
    outcome = quantize(graph, Quantize(target=target), data)
    assert outcome.facts["quantized"] == 2
    assert [n.op for n in node(graph, "If").attrs["then_branch"].nodes] == ["Conv"]
    assert snr(before, session(graph).run(next(iter(data)))) > 30


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_a_quantized_model_is_refused_site_by_site(target):
    graph = network()
    first = quantize(graph, Quantize(target=target))
    assert not first.refused
    before = listing(graph)
    again = quantize(graph, Quantize(target=target))
    assert [(r.node, r.code) for r in again.refused] == [
        (change.node, "its weight is quantized already") for change in first.changed
    ]
    assert listing(graph) == before


def test_without_calibration_data():
    graph = network()
    with pytest.raises(DataError, match="Quantization needs calibration data"):
        Quantize().apply(graph, Context())
    empty = dataclasses.replace(Context(), calibration=Data([], 0, lambda: iter(()), "nothing"))
    outcome = Quantize().apply(graph, empty)
    assert {r.code for r in outcome.refused} == {"no calibration sample reached its activation"}


@pytest.mark.parametrize("percentile", [0.0, -1.0, 100.1])
def test_percentiles_out_of_range(percentile):
    with pytest.raises(UsageError, match=r"'percentile' is .*Expected more than 0 and at most 100"):
        Quantize(percentile=percentile)


def test_weights_that_are_not_finite_stay():
    weight = random((16, 16), "W")
    weight[3, 3] = np.nan
    graph = build("(float[N,16] x) => (float[] y)", "y = MatMul(x, W)", kind="float", W=weight)
    assert reasons(quantize(graph)) == ["MatMul stays float: its weight or bias holds infinities or NaN"]


def test_nodes_that_nobody_reads_do_not_count():
    text = "d = MatMul(x, W) e = MatMul(d, W) {}"
    dead = build("(float[N,16] x) => (float[] y)", text.format("y = Relu(x)"), kind="float", W=(16, 16))
    before = listing(dead)
    assert quantize(dead).facts["linears"] == 0
    assert listing(dead) == before
    live = build("(float[N,16] x) => (float[] y)", text.format("y = MatMul(x, W)"), kind="float", W=(16, 16))
    assert quantize(live).facts["linears"] == 1
    assert ops(live) == ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul"]


def network() -> gs.Graph:
    """Convolutions with a residual, pools and a classifier, 16 channels wide from the start."""
    weights: dict[str, Any] = {"W1": (32, 16, 3, 3), "W2": (32, 32, 3, 3), "W3": (24, 32)}
    for name, shape in weights.items():
        weights[name] = np.sqrt(2 / np.prod(shape[1:])) * random(shape, name)
    return build(
        "(float[N,16,8,8] x) => (float[] y)",
        """
        c1 = Conv<pads=[1,1,1,1]>(x, W1, b1)
        r1 = Relu(c1)
        p = MaxPool<kernel_shape=[2,2],strides=[2,2]>(r1)
        c2 = Conv<pads=[1,1,1,1]>(p, W2, b2)
        s = Add(c2, p)
        r2 = Relu(s)
        g = GlobalAveragePool(r2)
        f = Flatten(g)
        y = Gemm<transB=1>(f, W3, b3)
        """,
        kind="float",
        **weights,
        b1=0.1 * random(32, "b1"),
        b2=0.1 * random(32, "b2"),
        b3=0.1 * random(24, "b3"),
    )


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
@pytest.mark.parametrize("calibrator", ["minmax", "mse"])
def test_accuracy_of_a_network(target, calibrator, tmp_path):
    """30 dB is a noise of 3 % of the signal; these reach 35 or more."""
    graph = network()
    data = samples(graph, 8)
    before = [session(graph).run(feed) for feed in data]
    quantize(graph, Quantize(target=target, calibrator=calibrator), data)
    save(graph, tmp_path / "quantized.onnx")
    onnx.checker.check_model(tmp_path / "quantized.onnx", full_check=True)
    runner = Session(tmp_path / "quantized.onnx")
    found = [runner.run(feed) for feed in data]
    assert snr({"y": np.stack([b["y"] for b in before])}, {"y": np.stack([f["y"] for f in found])}) > 32


def test_onnxruntime_runs_in_integers(tmp_path):
    graph = network()
    quantize(graph, Quantize(target="onnxruntime"))
    stored = constants(graph)
    assert stored["x_zero_point"].dtype == np.uint8
    assert stored["Conv_0_bias_quantized"].dtype == np.int32
    assert stored["Conv_0_bias_scale"] == pytest.approx(stored["x_scale"] * stored["W1_scale"], rel=1e-6)
    save(graph, tmp_path / "quantized.onnx")
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(str(tmp_path / "quantized.onnx"), options, providers=["CPUExecutionProvider"])
    kinds = [n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert (kinds.count("QLinearConv"), kinds.count("QLinearAdd"), kinds.count("QGemm")) == (2, 1, 1)
    assert kinds.count("QLinearGlobalAveragePool") == 1
    assert {"Conv", "FusedConv", "Gemm", "Add", "MaxPool", "Relu"}.isdisjoint(kinds)
    assert kinds.count("QuantizeLinear") == 1


def test_onnxruntime_multiplies_matrices_in_integers(tmp_path):
    graph = build("(float[N,4,32] x) => (float[] y)", "h = MatMul(x, W) g = Relu(h) y = MatMul(g, V)", kind="float",
                  W=(32, 32), V=(32, 16))  # fmt: skip
    quantize(graph, Quantize(target="onnxruntime"))
    save(graph, tmp_path / "quantized.onnx")
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(str(tmp_path / "quantized.onnx"), options, providers=["CPUExecutionProvider"])
    kinds = [n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert "MatMul" not in kinds
    assert kinds == ["QuantizeLinear", "QLinearMatMul", "MatMulIntegerToFloat"]


def test_what_is_refused_leaves_its_result_float_for_onnxruntime():
    graph = network()
    outcome = quantize(graph, Quantize(target="onnxruntime", exclude=("Conv_3",)))
    assert outcome.facts["quantized"] == 2
    quantized = [n.inputs[0].name for n in graph.nodes if n.op == "QuantizeLinear"]
    assert quantized == ["x", "r1", "p", "f"]


def test_old_models_whose_weights_are_computed_are_refused(tmp_path):
    """The large models of ONNX's backend suite: opset 9, every weight made at run time by ConstantOfShape."""
    for file in sorted(Path(onnx.__file__).parent.glob("backend/test/data/light/*.onnx")):
        graph = raise_opset(load(file), 13)
        outcome = quantize(graph)
        assert outcome.facts["quantized"] == 0, file.name
        assert outcome.refused
        assert all("ConstantOfShape" in reason or "computed" in reason for reason in reasons(outcome)), reasons(outcome)


@given(
    data=st.data(), target=st.sampled_from(["tensorrt", "onnxruntime"]), calibrator=st.sampled_from(["minmax", "mse"])
)
@settings(max_examples=25, deadline=None, suppress_health_check=(HealthCheck.too_slow,))
def test_random_networks(data, target, calibrator):
    """Whatever the graph: no crash, a model that runs, and outputs that stay near the float ones."""
    graph = data.draw(strategies.graphs())
    floats = _as_float32(graph)
    feeds = samples(floats, 6)
    before = [session(floats).run(feed) for feed in feeds]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("channelfold.passes.quantize.static.MIN_CHANNELS", 1)
        quantize(floats, Quantize(target=target, calibrator=calibrator), feeds)
    after = [session(floats).run(feed) for feed in feeds]
    for name in before[0]:
        old, new = (np.stack([run[name] for run in runs]) for runs in (before, after))
        assert np.isfinite(new).all()
        assert snr({name: old}, {name: new}) > 10 or np.square(old - new).sum() < 1e-10


def whole(graph: gs.Graph) -> onnx.ModelProto:
    model, large = export(graph)
    model.graph.initializer.extend(tensor_proto(values, proto.name) for proto, values in large)
    return model


def _as_float32(graph: gs.Graph) -> gs.Graph:
    model = whole(graph)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    del model.graph.value_info[:]
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.DOUBLE:
            tensor.CopyFrom(
                onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.float32), tensor.name)
            )
    for member in model.graph.node:
        for attribute in member.attribute:
            if member.op_type == "Cast" and attribute.i == onnx.TensorProto.DOUBLE:
                attribute.i = onnx.TensorProto.FLOAT
    return import_model(model)


@pytest.mark.rtx
def test_tensorrt_runs_every_quantized_node_in_int8(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    from channelfold.runtime.engine import build as tensorrt

    weights: dict[str, Any] = {name: random((64, 64), name) / 8 for name in "QKVOF"}
    attention = build(
        "(float[2,16,64] x) => (float[] y)",
        """
        q = MatMul(x, Q) k = MatMul(x, K) v = MatMul(x, V)
        t = Transpose<perm=[0,2,1]>(k)
        s = MatMul(q, t) a = Softmax<axis=-1>(s) m = MatMul(a, v)
        o = MatMul(m, O) r = Add(o, x) y = MatMul(r, F)
        """,
        kind="float", **weights,
    )  # fmt: skip
    cnn = network()
    for name, graph in (("cnn", cnn), ("attention", attention)):
        graph.inputs[0].shape = [2, *graph.inputs[0].shape[1:]]
        outcome = quantize(graph)
        save(graph, tmp_path / f"{name}.onnx")
        engine = tensorrt.build(tmp_path / f"{name}.onnx", tmp_path / f"{name}.engine", sm=89)
        assert engine.plan.readable, engine.plan.reason
        runs = {n: engine.plan.nodes[n].arithmetic for n in outcome.facts["quantized_nodes"]}
        assert set(runs.values()) == {"int8"}, (name, runs)
