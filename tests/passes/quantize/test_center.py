"""Centered inputs: W x + b = W (x - c) + (b + W c), for the zero point 0 that TensorRT asks for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from channelfold.passes.quantize import Quantize
from channelfold.tests.graphs import build, changes, constants, node, ops, random, run
from channelfold.tests.passes.quantize.quantized import quantize, samples, snr

FFN = "m = MatMul(x, W) a = Add(m, b) g = {}(a) n = MatMul(g, V) y = Add(n, c)"


def gain(make: Any) -> tuple[float, Any, Any]:
    """How many dB centering buys the second linear, the graph with it and its outcome."""
    plain, graph = make(), make()
    data = samples(graph, count=4)
    before = [run(graph, feed) for feed in data]
    first = next(n.name for n in graph.nodes if n.op in ("Conv", "MatMul"))  # whose own error would hide the gain
    outcome = quantize(graph, Quantize(calibrator="minmax", exclude=(first,)), data)
    quantize(plain, Quantize(calibrator="minmax", exclude=(first,), center=False), data)
    figures = [
        snr({str(i): one["y"] for i, one in enumerate(before)}, {str(i): run(g, f)["y"] for i, f in enumerate(data)})
        for g in (graph, plain)
    ]
    return figures[0] - figures[1], graph, outcome


def exact(*shape: int) -> np.ndarray:
    """A weight that int8 holds exactly, so that only activations lose anything."""
    values = np.round(127 * np.tanh(random(shape, "exact")))
    values.reshape(shape[0], -1)[:, 0] = 127
    return (values / 127).astype(np.float32)


def ffn(act: str) -> Any:
    shapes = {"W": (32, 64), "b": 64, "V": exact(32, 64).T.copy(), "c": 32}
    return build("(float[N,32] x) => (float[] y)", FFN.format(act), kind="float", opset=20, **shapes)


def test_the_linear_in_front_of_a_relu_takes_the_offset():
    better, graph, outcome = gain(lambda: ffn("Relu"))
    assert "Sub" not in ops(graph)
    clip = node(graph, "Clip")
    low = float(constants(graph)[clip.inputs[1].name])
    assert low < 0
    assert len(clip.inputs) == 2
    step = float(constants(graph)["g_scale"])
    assert low == pytest.approx(-128 * step, rel=1e-6)
    assert changes(outcome)[0].endswith(", centered")
    assert 5 < better < 7


def test_clip_keeps_the_distance_of_its_bounds():
    text = "h = Conv(x, W, b) r = Clip(h, zero, six) y = Conv(r, V, c)"
    scalars = {"zero": np.float32(0), "six": np.float32(1.5)}

    def make():
        shapes = {"W": (32, 16, 1, 1), "b": 32, "V": exact(16, 32, 1, 1), "c": 16}
        return build("(float[N,16,6,6] x) => (float[] y)", text, kind="float", **shapes, **scalars)

    better, graph, _ = gain(make)
    clip, known = node(graph, "Clip"), constants(graph)
    low, high = (float(known[port.name]) for port in clip.inputs[1:])
    assert high - low == pytest.approx(1.5)
    assert -0.76 < low < -0.74
    assert 5 < better < 7


def test_behind_other_functions_stands_a_sub():
    better, graph, _ = gain(lambda: ffn("Gelu"))
    assert ops(graph).count("Sub") == 1
    sub = node(graph, "Sub")
    assert sub.inputs[0].name == "g"
    assert sub.outputs[0].outputs[0].op == "QuantizeLinear"
    assert 4.5 < better < 7


def test_a_depthwise_convolution_pads_with_the_offset():
    """All numbers are exact in 8 bits, so padding with anything but x = 0 would show at the border."""
    text = "h = Conv(x, W, b) r = Relu(h) y = Conv<group=32,pads=[1,2,0,1]>(r, V, c)"
    eye = np.eye(32, dtype=np.float32)[:, :, None, None]
    kernel = np.where(np.arange(32 * 9).reshape(32, 1, 3, 3) % 4 == 0, 127, -3).astype(np.float32)
    graph = build("(float[N,32,5,5] x) => (float[] y)", text, kind="float", W=eye, b=np.zeros(32, np.float32), V=kernel,
                  c=random(32, "c"))  # fmt: skip
    data = samples(graph, count=2, make=lambda shape, rng: _covering(rng.integers(-127, 128, shape)))
    before = [run(graph, feed)["y"] for feed in data]
    quantize(graph, Quantize(calibrator="minmax", correct_bias=False), data)
    known = constants(graph)
    pad = node(graph, "Pad")
    assert known[pad.inputs[1].name].tolist() == [0, 0, 1, 2, 0, 0, 0, 1]
    depthwise = [n for n in graph.nodes if n.op == "Conv"][1]
    assert depthwise.attrs["pads"] == [0, 0, 0, 0]
    for feed, old in zip(data, before, strict=True):
        np.testing.assert_allclose(run(graph, feed)["y"], old, atol=2e-2 * np.abs(old).max() / 2)


def _covering(values: np.ndarray) -> np.ndarray:
    values[..., 0, 0], values[..., 0, 1] = 127, -127
    return values


@pytest.mark.parametrize(
    ("inputs", "text", "shapes"),
    [
        ("float[N,16,6,6] x", "h = Conv(x, W, b) r = Relu(h) k = Conv<pads=[1,1,1,1]>(r, V, c) y = Relu(k)",
         {"W": (16, 16, 1, 1), "b": 16, "V": (16, 16, 3, 3), "c": 16}),
        ("float[N,16,6,6] x", "h = Conv(x, W, b) r = Relu(h) k = Conv(r, V, c) y = Add(k, r)",
         {"W": (16, 16, 1, 1), "b": 16, "V": (16, 16, 1, 1), "c": 16}),
        ("float[N,16,6,6] x", "h = Conv(x, W, b) s = Sigmoid(h) y = Conv(s, V, c)",
         {"W": (16, 16, 1, 1), "b": 16, "V": (16, 16, 1, 1), "c": 16}),
        ("float[N,16] x", "m = MatMul(x, W) r = Relu(m) y = MatMul(r, V)", {"W": (16, 16), "V": (16, 16)}),
    ],
)  # fmt: skip
def test_what_would_cost_a_kernel_or_a_bias_stays(inputs, text, shapes):
    graph = build(f"({inputs}) => (float[] y)", text, kind="float", **shapes)
    outcome = quantize(graph, Quantize(), samples(graph, make=lambda s, rng: rng.uniform(-1, 1, s)))
    assert not {"Sub", "Pad", "Clip"} & set(ops(graph))
    assert not any("centered" in what for what in changes(outcome))


def test_the_report_on_an_input_that_cannot_be_centered_is_of_the_steps_that_it_has():
    shapes = {"W": (16, 16, 1, 1), "b": 16, "V": (16, 16, 1, 1), "c": 16}
    text = "h = Conv(x, W, b) e = Abs(h) y = Conv(e, V, c)"  # a Sub would stand between Abs and its quantizer
    graph, plain = (build("(float[N,16,6,6] x) => (float[] y)", text, kind="float", **shapes) for _ in range(2))
    data = samples(graph, count=8)
    outcome, best = quantize(graph, Quantize(), data), quantize(plain, Quantize(center=False), data)
    told = outcome.facts["activations"]["e"]
    assert told["high"] == pytest.approx(127 * constants(graph)["e_scale"])
    assert best.facts["activations"]["e"]["snr_db"] - 1 < told["snr_db"] <= best.facts["activations"]["e"]["snr_db"]


def test_a_sub_serves_all_readers_and_leaves_others_alone():
    text = "s = Sigmoid(x) p = MatMul(s, W) q = Add(p, b) m = MatMul(s, V) n = Add(m, c) t = Mul(q, n) y = Add(t, s)"
    graph = build("(float[N,16] x) => (float[] y)", text, kind="float", W=(16, 16), b=16, V=(16, 16), c=16)
    data = samples(graph)
    before = [run(graph, feed)["y"] for feed in data]
    outcome = quantize(graph, Quantize(), data)
    assert ops(graph).count("Sub") == ops(graph).count("QuantizeLinear") == 1
    assert sum("centered" in what for what in changes(outcome)) == 2
    for feed, old in zip(data, before, strict=True):
        assert snr({"y": old}, run(graph, feed)) > 35


@pytest.mark.parametrize(("size", "subs"), [(1, 1), (2000, 0)])
def test_a_float16_bias_that_cannot_hold_the_offset_stays(size, subs):
    shapes: dict[str, Any] = {"W": (32, 64), "b": 64, "c": 32}
    weights = {name: random(shape, name).astype(np.float16) for name, shape in shapes.items()}
    weights["V"] = np.full((64, 32), size, np.float16)
    graph = build("(float16[N,32] x) => (float16[] y)", FFN.format("Sigmoid"), kind="float16", **weights)
    quantize(graph, Quantize())
    assert ops(graph).count("Sub") == subs


def test_the_other_target_has_zero_points_of_its_own():
    graph = ffn("Gelu")
    quantize(graph, Quantize(target="onnxruntime"))
    assert "Sub" not in ops(graph)
