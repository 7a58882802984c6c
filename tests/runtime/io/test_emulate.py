"""Graphs with 4-bit floating point numbers, computed by the operators that ONNX Runtime has."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from channelfold.passes.base import Context
from channelfold.passes.quantize import QuantizeWeights
from channelfold.runtime.io.emulate import emulate
from channelfold.runtime.io.files import load, raise_opset, save, session
from channelfold.tests.graphs import build, constants, feeds, listing, run, samples
from channelfold.tests.passes.quantize.quantized import snr

FP4, FP8 = ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e4m3fn


def nvfp4(values: np.ndarray, unit: np.float32) -> np.ndarray:
    """Rounded as NVFP4 is defined, by the types of ml_dtypes."""
    blocks = values.astype(np.float32).reshape(-1, 16)
    scales = (np.abs(blocks).max(axis=1, keepdims=True) / (6 * unit)).astype(FP8).astype(np.float32) * unit
    codes = np.clip(blocks / np.maximum(scales, np.float32(1e-38)), -6, 6).astype(FP4).astype(np.float32)
    return (codes * scales).reshape(values.shape)


@pytest.mark.parametrize("kind", ["float", "float16"])
def test_activations_are_rounded_as_the_format_is_defined(kind):
    graph = build(f"({kind}[4,64] x) => ({kind}[] y)", "y = MatMul(x, W)", kind=kind, opset=23, W=np.eye(64))
    data = samples(
        graph, make=lambda shape, rng: rng.standard_t(3, shape) * 10.0 ** rng.integers(-4, 2, (*shape[:-1], 1))
    )
    QuantizeWeights(weights="nvfp4", activations="fp4").apply(graph, Context(calibration=data))
    unit = constants(graph)["x_unit"]
    assert emulate(graph)
    assert not emulate(graph)
    for feed in data:
        found = session(graph, optimize=False).run(feed)["y"]
        expected = nvfp4(feed["x"], unit)
        assert np.mean(np.isclose(found, expected, rtol=2e-3, atol=1e-6)) > 0.999  # ties may fall to either side


@pytest.mark.parametrize(("weights", "least"), [("fp4", 18), ("nvfp4", 18), ("mxfp4", 15)])
def test_weights(weights, least, tmp_path):
    graph = build("(float[4,64] x) => (float[] y)", "y = MatMul(x, W)", kind="float", W=(64, 32))
    feed = feeds(graph)
    before = run(graph, feed)
    step = QuantizeWeights(weights=weights)
    graph = raise_opset(graph, step.opset_for(graph))
    step.apply(graph, Context())
    save(graph, tmp_path / "m.onnx")
    graph = load(tmp_path / "m.onnx")
    assert emulate(graph)
    assert listing(graph) == "y = MatMul(x, W_dequantized_values)"
    assert snr(before, session(graph).run(feed)) > least


def test_other_graphs_stay():
    graph = build("(float[4,64] x) => (float[] y)", "y = MatMul(x, W)", kind="float", W=(64, 32))
    assert not emulate(graph)
    assert listing(graph) == "y = MatMul(x, W)"
