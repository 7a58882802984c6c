"""Activations with a scale for every token, made while the model runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from channelfold.passes.base import Context
from channelfold.passes.cast import Cast
from channelfold.passes.quantize import QuantizeWeights
from channelfold.passes.recipe import load_recipe
from channelfold.runtime.errors import UsageError
from channelfold.runtime.io.files import check, save, session
from channelfold.tests.graphs import build, feeds, listing, ops, random, reasons
from channelfold.tests.passes.quantize.quantized import optimized, snr

TARGETS = ("tensorrt", "onnxruntime")
BODY = """
    q = MatMul(x, A)  k = MatMul(x, B)  kb = Add(k, c)  s = Add(q, kb)  y = MatMul(s, C)
    u = Gemm<transB=1, alpha=2.0, beta=0.5>(z, D, d)  w = Gemm(u, E)
"""


def network(opset: int = 17, kind: str = "float") -> gs.Graph:
    weights = {"A": (64, 64), "B": (64, 64), "c": 64, "C": (64, 32), "D": (48, 64), "d": 48, "E": (48, 32)}
    weights = {name: random(shape, name) / 8 for name, shape in weights.items()}
    inputs = "(float[2,8,64] x, float[4,64] z) => (float[] y, float[] w)"
    return build(inputs, BODY, opset=opset, kind=kind, **weights)


def step(target: str = "tensorrt", **options) -> QuantizeWeights:
    return QuantizeWeights(activations="int8-per-token", target=target, **options)


@pytest.mark.parametrize("opset", [13, 17, 18])
@pytest.mark.parametrize("target", TARGETS)
def test_products_of_tokens(target, opset):
    """30 dB with a token a thousand times larger than the others, which one scale for all would leave at zero."""
    graph = network(opset)
    feed = feeds(graph)
    feed["x"][1, 1] *= 1000
    before = session(graph).run(feed)
    outcome = step(target).apply(graph, Context())
    check(graph)
    assert outcome.facts["quantized"] == outcome.facts["linears"] == 5
    assert not outcome.refused
    assert ops(graph).count("QuantizeLinear") == 4, "readers of a tensor share its codes"
    after = session(graph).run(feed)
    for name in before:
        for old, new in zip(before[name].reshape(-1, 32), after[name].reshape(-1, 32), strict=True):
            assert snr({"row": old}, {"row": new}) > 30


@pytest.mark.parametrize("target", TARGETS)
def test_tokens_of_zeros_stay_zero(target):
    graph = build("(float[2,8,64] x) => (float[] y)", "y = MatMul(x, A)", A=(64, 32), kind="float")
    feed = {"x": np.zeros((2, 8, 64), np.float32)}
    step(target).apply(graph, Context())
    assert not session(graph).run(feed)["y"].any()
    feed["x"][0, 0] = 1e-30
    assert np.abs(session(graph).run(feed)["y"]).max() < 1e-6


def test_the_form():
    graph = build("(float[8,64] x) => (float[] y)", "h = MatMul(x, A)  y = Add(h, b)", A=(64, 32), b=32, kind="float")
    step().apply(graph, Context())
    assert listing(graph).splitlines() == [
        "x_Abs = Abs(x)",
        "x_ReduceMax = ReduceMax<axes=[-1], keepdims=1>(x_Abs)",
        "x_Max = Max(x_ReduceMax, x_least)",
        "x_Div = Div(x, x_Max)",
        "x_QuantizeLinear = QuantizeLinear(x_Div, x_scale, x_zero_point)",
        "x_DequantizeLinear = DequantizeLinear(x_QuantizeLinear, x_scale, x_zero_point)",
        "A_dequantized = DequantizeLinear<axis=1>(A_quantized, A_scale, A_zero_point)",
        "h_by_token = MatMul(x_DequantizeLinear, A_dequantized)",
        "h = Mul(h_by_token, x_Max)",
        "y = Add(h, b)",
    ]


def test_onnxruntime_multiplies_integers(tmp_path):
    graph = network()
    step("onnxruntime").apply(graph, Context())
    names = optimized(graph, tmp_path)
    assert names.count("MatMulIntegerToFloat") == 5
    assert not {"MatMul", "Gemm", "DequantizeLinear"} & set(names)


@pytest.mark.rtx
def test_tensorrt_multiplies_in_int8(tmp_path: Path):
    pytest.importorskip("tensorrt_rtx")
    from channelfold.runtime.engine import build as tensorrt

    graph = network()
    nodes = step().apply(graph, Context()).facts["quantized_nodes"]
    save(graph, tmp_path / "model.onnx")
    engine = tensorrt.build(tmp_path / "model.onnx", tmp_path / "engine", sm=86)
    assert {engine.plan.nodes[name].arithmetic for name in nodes} == {"int8"}


def test_a_cast_leaves_nothing_in_float32():
    graph = network(19)
    step().apply(graph, Context())
    outcome = Cast().apply(graph, Context())
    check(graph)
    assert not outcome.refused


def test_what_has_no_tokens_stays_float():
    body = """
        a = Conv(x, K)  f = Flatten(a)  g = Gemm<transA=1>(z, A)  h = MatMul(B, z)  n = MatMul(z, N)
        m = Gemm(z, A, v)
    """
    weights = {"K": (16, 16, 3, 3), "A": (32, 32), "B": (32, 32), "N": (32, 8)}
    graph = build("(float[1,16,8,8] x, float[32,32] z, float[32] v) => (float[] f, float[] g, float[] h, float[] n, "
                  "float[] m)", body, kind="float", **weights)  # fmt: skip
    outcome = step().apply(graph, Context())
    assert sorted(reasons(outcome)) == sorted(
        [
            "Conv stays float: the input of a convolution has no tokens",
            "Gemm stays float: the tokens of its activation are columns",
            "MatMul stays float: the tokens of its activation are columns",
            "MatMul stays float: fewer than 16 channels",
            "Gemm stays float: its bias is not a constant vector over the output channels",
        ]
    )
    assert outcome.facts["quantized"] == 0


def test_other_weights_are_refused():
    with pytest.raises(UsageError):
        QuantizeWeights(weights="int4", activations="int8-per-token")


def test_the_recipe():
    last = load_recipe("int8-dynamic").passes[-1]
    assert last.options()["activations"] == "int8-per-token"


@given(
    shape=st.sampled_from([(64,), (3, 64), (2, 3, 64), (1, 2, 3, 64)]),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e4]),
    seed=st.integers(0, 1000),
    target=st.sampled_from(TARGETS),
)
@settings(max_examples=20, deadline=None)
def test_any_shape_and_size(shape, scale, seed, target):
    graph = build(
        f"(float[{','.join(map(str, shape))}] x) => (float[] y)", "y = MatMul(x, A)", A=(64, 32), kind="float"
    )
    feed = {"x": (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)}
    before = session(graph).run(feed)
    step(target).apply(graph, Context())
    check(graph)
    after = session(graph).run(feed)
    assert after["y"].shape == before["y"].shape
    assert snr(before, after) > 30 or scale < 1e-4
