"""Quantized graphs, by what they print and by what they compute."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from channelfold.passes.base import Context
from channelfold.passes.quantize import Quantize
from channelfold.runtime.data.sources import Data
from channelfold.runtime.errors import DataError, UsageError
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import import_model, infer_shapes, raise_opset, session
from channelfold.tests.graphs import build, constants, data_from, listing, node, ops, random, reasons, run, whole
from channelfold.tests.passes.quantize.quantized import network, quantize, samples, snr


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
    """Weight tying: products share one int8 weight, whatever their biases, and the Gather has one by row."""
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
        "E_dequantized_1 = DequantizeLinear<axis=0>(E_quantized_1, E_scale_1, E_zero_point_1)\n"
        "e = Gather(E_dequantized_1, ids)"
    )
    assert constants(graph)["E_quantized"].shape == (16, 24)
    rows = constants(graph)["E_quantized_1"] * constants(graph)["E_scale_1"][:, None]
    assert np.abs(rows - random((24, 16), "E")).max() < 0.02


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


def test_facts_of_the_ranges_of_sites():
    weight = np.ones((16, 16), np.float32)
    weight[:, 3] = 5.0
    text = "y = MatMul(x, W) z = MatMul(x, V)"
    graph = build("(float[N,16] x) => (float[] y, float[] z)", text, kind="float", W=weight, V=(16, 8))
    data = samples(graph, size=256)
    outcome = quantize(graph, Quantize(calibrator="percentile", percentile=90.0), data)
    kept, left = outcome.facts["ranges"], outcome.refused
    assert [(row["node"], row["op"], row["tensor"]) for row in kept] == [("MatMul_0", "MatMul", "x")]
    values = np.abs(np.concatenate([feed["x"] for feed in data]))
    limit = outcome.facts["activations"]["x"]["high"]
    assert np.mean(values > 1.01 * limit) <= kept[0]["clipped"] <= np.mean(values > 0.99 * limit)
    assert (kept[0]["weight"], kept[0]["weight_outliers"]) == (pytest.approx(5.0), pytest.approx(5.0))
    assert [refusal.code for refusal in left] == ["fewer than 16 channels"]


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


@pytest.mark.parametrize(
    ("target", "body"),
    [("tensorrt", "y = Conv(x, W, b)"), ("onnxruntime", "f = Flatten(x) y = Gemm<transB=1>(f, W, b)")],
)
def test_dead_channels(target, body):
    weight = random((24, 16, 1, 1) if target == "tensorrt" else (24, 256), "W")
    weight[[0, 5]] = 0
    weight[7] = 1e-30
    bias = random(24, "b")
    bias[5] = 0
    graph = build("(float[N,16,4,4] x) => (float[] y)", body, kind="float", W=weight, b=bias)
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


EXACT = Quantize(center=False, calibrator="minmax")


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


@pytest.mark.parametrize(
    "attrs",
    [
        "pads=[2,2,2,2]",
        "pads=[0,1,3,2],strides=[2,1],dilations=[1,2]",
        'auto_pad="SAME_UPPER",strides=[2,3]',
        'auto_pad="SAME_LOWER",strides=[3,2]',
        'auto_pad="VALID"',
    ],
)
@pytest.mark.parametrize("sizes", ["1,16,9,9", "N,16,H,W"])
def test_bias_correction_knows_that_padding_is_zero(sizes, attrs):
    """Every channel has one value: then the outputs differ from one another by what they read beyond the border."""
    text = f"y = Conv<{attrs}>(x, W, b)"
    graph = build(f"(float[{sizes}] x) => (float[] y)", text, kind="float", W=(24, 16, 4, 5), b=24)
    data = samples(graph, count=3, size=9, make=lambda shape, rng: np.zeros(shape) + grid((1, 16, 1, 1), rng))
    before = [run(graph, feed)["y"] for feed in data]
    quantize(graph, EXACT, data)
    errors = [session(graph, optimize=False).run(f)["y"] - y for f, y in zip(data, before, strict=True)]
    largest = max(np.abs(y).max() for y in before)
    assert np.abs(np.mean(errors, axis=(0, 1, 3, 4))).max() <= 2e-6 * largest


def test_bias_correction_knows_the_padding_of_a_centered_input():
    """The padding is a Pad in front of the convolution then. Every channel has one value, which 8 bits hold."""
    text = "h = Conv(x, V, c) r = Relu(h) y = Conv<group=16,pads=[1,1,1,1]>(r, W, b)"
    made: Any = {"V": np.eye(16)[..., None, None], "c": np.full(16, 128.0), "W": (16, 1, 3, 3), "b": 16}
    values = np.linspace(-127, 127, 16).round().reshape(1, 16, 1, 1)
    graph = build("(float[1,16,5,5] x) => (float[] y)", text, kind="float", **made)
    data = samples(graph, count=1, make=lambda shape, rng: np.zeros(shape) + values)
    before = [run(graph, feed)["y"] for feed in data]
    quantize(graph, Quantize(calibrator="minmax"), data)
    assert "Pad" in ops(graph)
    errors = [session(graph, optimize=False).run(feed)["y"] - y for feed, y in zip(data, before, strict=True)]
    assert np.abs(np.mean(errors, axis=(0, 1, 3, 4))).max() < 1e-5 * max(np.abs(y).max() for y in before)


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


def test_float16():
    graph = build("(float16[N,16,4,4] x) => (float16[] y)", "c = Conv(x, W, b) y = Relu(c)", opset=17, kind="float16",
                  W=random((24, 16, 1, 1), "W").astype(np.float16), b=random(24, "b").astype(np.float16))  # fmt: skip
    step = Quantize()
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


@pytest.mark.parametrize(
    ("target", "op", "shapes"), [("tensorrt", "Conv", ("4,4", (1, 1))), ("onnxruntime", "MatMul", ("16", ()))]
)
def test_the_branch_that_runs_is_quantized(target, op, shapes):
    def body(name):
        nodes = [onnx.helper.make_node(op, ["h", "W"], [f"{name}_y"], f"{name}_conv")]
        return onnx.helper.make_graph(nodes, name, [], [onnx.helper.make_tensor_value_info(f"{name}_y", 1, None)])

    sizes, kernel = shapes
    graph = build(f"(float[N,16,{sizes}] x, bool p) => (float[] y)", f"h = {op}(x, W) y = {op}(h, W)", kind="float",
                  W=(16, 16, *kernel))  # fmt: skip
    model = whole(graph)
    branches = onnx.helper.make_node("If", ["p"], ["i"], "if", then_branch=body("then"), else_branch=body("else"))
    model.graph.node.append(branches)
    model.graph.output.append(onnx.helper.make_tensor_value_info("i", 1, None))
    graph = import_model(model)
    infer_shapes(graph)
    data = samples(graph, make=lambda shape, rng: rng.standard_normal(shape))
    before = session(graph).run(next(iter(data)))
    data = data_from(*({**feed, "p": np.array(False)} for feed in data))
    outcome = quantize(graph, Quantize(target=target), data)
    assert outcome.facts["quantized"] == 3
    branches = node(graph, "If").attrs
    assert [n.op for n in branches["then_branch"].nodes] == [op]
    taken = branches["else_branch"].nodes[-1]
    assert [edit.producer(tensor).op for tensor in taken.inputs[:2]] == ["DequantizeLinear", "DequantizeLinear"]
    assert [(r.node, r.code) for r in outcome.refused] == [
        ("then_conv in then_branch of If if", "its body never ran on the calibration data")
    ]
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
