"""Scales, zero points, rounding of weights: the numbers that go into QDQ nodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from channelfold.passes.layers.formats import INT8, positive_scale
from channelfold.passes.layers.linear import linears
from channelfold.passes.quantize.qdq import (
    Inserter,
    Range,
    opset_of_scales,
    summary,
    weight_axis,
    why_not_int8,
)
from channelfold.tests.graphs import build, listing, random

FLOAT, HALF = np.dtype(np.float32), np.dtype(np.float16)


@pytest.mark.parametrize(
    ("seen", "scale", "zero_point"),
    [
        (Range(-127, 100), 1.0, 0),
        (Range(-63.5, 127), 1.0, 0),
        (Range(0, 12.7), 0.1, 0),
        (Range(0, 0), 2.0**-126, 0),
    ],
)
def test_symmetric_parameters_are_scalars(seen, scale, zero_point):
    s, z = seen.parameters(True, FLOAT)
    assert (s.shape, z.shape, s.dtype, z.dtype) == ((), (), np.float32, np.int8)
    assert (s, z) == (np.float32(scale), zero_point)


@pytest.mark.parametrize(
    ("seen", "scale", "zero_point"),
    [
        (Range(0, 255), 1.0, 0),
        (Range(-128, 127), 1.0, 128),
        (Range(-255, 0), 1.0, 255),
        (Range(-1, 254), 1.0, 1),
        (Range(0, 0), 2.0**-126, 0),
    ],
)
def test_asymmetric_parameters(seen, scale, zero_point):
    s, z = seen.parameters(False, FLOAT)
    assert (s.shape, z.shape, s.dtype, z.dtype) == ((), (), np.float32, np.uint8)
    assert (s, z) == (np.float32(scale), zero_point)


def test_no_scale_is_zero_in_its_type():
    assert positive_scale(0.0, 127, FLOAT) == np.finfo(np.float32).tiny
    assert positive_scale(1e-12, 127, HALF) == np.float16(2.0**-17) > 0
    assert np.array_equal(positive_scale(np.array([0.0, 127.0]), 127, HALF), np.array([2.0**-17, 1], np.float16))


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 3, 3), (1, 1), (6, 0), (0, 4)])
def test_weights_are_rounded_by_channel(dtype, shape):
    """Half a step and the rounding of the comparison: float16 scales may clip the peak by another 127 * 2^-11 steps."""
    weight = random(shape, "w") * np.logspace(-3, 2, max(shape[0], 1))[: shape[0]].reshape(-1, *[1] * (len(shape) - 1))
    weight = weight.astype(dtype)
    values, scales = INT8.codes(weight, dtype)
    assert (values.dtype, values.shape, scales.dtype, scales.shape) == (np.int8, shape, dtype, shape[:1])
    assert (scales > 0).all()
    assert values.min(initial=0) >= -127
    steps = scales.astype(np.float64).reshape(-1, *[1] * (len(shape) - 1))
    error = np.abs(values * steps - weight.astype(np.float64)) / steps
    assert error.max(initial=0) <= 0.5 + 1e-4
    if weight.size:
        peaks = np.abs(values.reshape(shape[0], -1).astype(int)).max(axis=1)
        assert (peaks == 127).all() or (dtype == HALF and peaks.min() > 60)


def test_small_channels_of_float16_keep_their_precision():
    """2^-17 is 1.95 times the exact scale at a peak of 0.0005; with the smallest normal number it would be 15 times."""
    weight = (random((1, 64), "w") * 1e-3).astype(np.float16)
    values, scales = INT8.codes(weight, HALF)
    noise = np.square(values * scales.astype(np.float64)[:, None] - weight.astype(np.float64)).sum()
    assert 10 * np.log10(np.square(weight.astype(np.float64)).sum() / noise) > 38


def test_rounding_is_half_to_even():
    values, scales = INT8.codes(np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5]], np.float32), FLOAT)
    assert scales[0] == 1
    assert values.tolist() == [[127, 0, 2, 2, 0, -2]]


def test_dead_channels_and_floors():
    weight = np.array([[0, 0], [1, -2], [1e-9, 0]], np.float32)
    values, scales = INT8.codes(weight, FLOAT)
    assert values.tolist() == [[0, 0], [64, -127], [127, 0]]
    assert scales[0] == np.finfo(np.float32).tiny
    _, scales = INT8.codes(weight, FLOAT, np.array([0.5, 0.0, 0.25]))
    assert scales.tolist() == [0.5, np.float32(2 / 127), 0.25]


def test_large_weights_are_quantized_in_parts(monkeypatch):
    weight = random((50, 30), "w").astype(np.float32)
    whole = INT8.codes(weight, FLOAT)
    monkeypatch.setattr("channelfold.passes.layers.formats._CHUNK", 100)
    parts = INT8.codes(weight.T.copy().T, FLOAT)
    assert np.array_equal(whole[0], parts[0])
    assert np.array_equal(whole[1], parts[1])


@pytest.mark.parametrize(
    ("text", "shape", "axis"),
    [
        ("y = Conv(x, W)", (8, 4, 1, 1), 0),
        ("y = ConvTranspose(x, W)", (4, 8, 1, 1), 1),
        ("f = Flatten(x) y = Gemm(f, W)", (4, 8), 1),
        ("f = Flatten(x) y = Gemm<transB=1>(f, W)", (8, 4), 0),
        ("f = Flatten(x) y = MatMul(f, W)", (4, 8), 1),
        ("y = MatMul(W, x)", (8, 1), 0),
    ],
)
def test_the_axis_of_the_output_channels(text, shape, axis):
    graph = build("(float[1,4,1,1] x) => (float[] y)", text, kind="float", W=shape)
    (linear,) = linears(graph)
    assert weight_axis(linear) == axis


@pytest.mark.parametrize(
    ("kind", "text", "opset"),
    [
        ("float", "y = MatMul(x, W)", 13),
        ("float16", "y = MatMul(x, W)", 19),
        ("float16", "V = Transpose(W) y = MatMul(x, V)", 19),
        ("float16", "c = Cast<to=1>(x) V = Cast<to=1>(W) y = MatMul(c, V)", 13),
        ("float16", "y = Relu(x)", 13),
    ],
)
def test_float16_scales_need_opset_19(kind, text, opset):
    graph = build("(float[N,8] x) => (float[] y)".replace("float[] y", f"{'float' if 'Cast' in text else kind}[] y")
                  .replace("float[N", f"{kind}[N"), text, kind="float" if "Cast" in text else kind,
                  W=random((8, 8), "W").astype("float16" if kind == "float16" else "float32"))  # fmt: skip
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Variable) and tensor.name == "V":
            tensor.dtype = None
    assert opset_of_scales(graph) == opset


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(bad):
    for name in "Wb":
        constants: dict[str, Any] = {"W": random((8, 8), "W"), "b": random(8, "b")}
        constants[name].flat[3] = bad
        graph = build("(float[N,8] x) => (float[] y)", "y = Gemm(x, W, b)", kind="float", **constants)
        assert why_not_int8(linears(graph)[0]) == "its weight or bias holds infinities or NaN"


def test_other_types_are_refused():
    graph = build("(float[N,8] x) => (float[] y)", "y = MatMul(x, W)", kind="double", W=(8, 8))
    assert why_not_int8(linears(graph)[0]) == "it computes in float64, expected float32 or float16"


def test_readers_share_a_pair_and_others_keep_the_tensor():
    graph = build(
        "(float[N,8] x) => (float[] a, float[] b, float[] c)",
        "h = Relu(x) a = MatMul(h, V) b = MatMul(h, W) c = Neg(h)",
        kind="float", V=(8, 8), W=(8, 8),
    )  # fmt: skip
    inserter = Inserter(graph)
    first, second = linears(graph)
    inserter.activation(first.data, Range(-1, 2), [first.node])
    inserter.activation(second.data, Range(-1, 2), [second.node])
    inserter.finish()
    assert listing(graph) == (
        "h = Relu(x)\n"
        "h_quantized = QuantizeLinear(h, h_scale, h_zero_point)\n"
        "h_dequantized = DequantizeLinear(h_quantized, h_scale, h_zero_point)\n"
        "a = MatMul(h_dequantized, V)\n"
        "b = MatMul(h_dequantized, W)\n"
        "c = Neg(h)"
    )


def test_summary():
    graph = build(
        "(float[N,8] x) => (float[] b)", "a = MatMul(x, V) g = Gemm(a, W) b = MatMul(g, V)", kind="float",
        V=(8, 8), W=(8, 8),
    )  # fmt: skip
    sites = linears(graph)
    assert summary(graph, sites[:2]) == {
        "linears": 3,
        "quantized": 2,
        "by_op": {"MatMul": {"quantized": 1, "total": 2}, "Gemm": {"quantized": 1, "total": 1}},
        "quantized_nodes": [sites[0].name, sites[1].name],
    }


def test_names_of_new_nodes_are_their_own():
    """A weight read in two layouts gets two nodes, and the graph may hold a node that is called as one of them."""
    body = "a = MatMul(x, W)\nr = Relu(a)\n[W_DequantizeLinear] s = Neg(r)\n[x_QuantizeLinear] t = Neg(s)\n"
    graph = build("(float[4,16] x) => (float[4,16] y)", f"{body}y = Gemm<transB=1>(t, W)", kind="float", W=(16, 16))
    inserter = Inserter(graph)
    for linear in linears(graph):
        inserter.activation(linear.data, Range(-1.0, 1.0), [linear.node])
        inserter.weight(linear)
    inserter.finish()
    names = [node.name for node in graph.nodes]
    assert len(set(names)) == len(names)
    assert {"W_DequantizeLinear", "x_QuantizeLinear"} <= {node.name for node in graph.nodes if node.op == "Neg"}
