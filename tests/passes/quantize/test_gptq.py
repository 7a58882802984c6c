"""The option ``gptq`` of quantize: which weights it rounds, what they gain, and where they are kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from channelfold.passes.base import Context
from channelfold.passes.layers.linear import linears
from channelfold.passes.layers.switchboard import settle
from channelfold.passes.quantize import Quantize
from channelfold.tests.graphs import build, random, samples
from channelfold.tests.passes.quantize.quantized import quantize

MIXING = random((6, 32), "mixing")
TEXT = (
    "a = MatMul(x, A) b = MatMul(a, B) c = Gemm<transB=1>(b, B) r = Reshape(c, s) "
    "d = Conv<pads=[1,1]>(r, D) y = Conv(d, E)"
)


def network() -> gs.Graph:
    """A product; two that share a weight; a convolution with a kernel, and one without."""
    weights = {"A": (32, 32), "B": (32, 32), "D": (16, 16, 3), "E": (32, 16, 1)}
    return build("(float[N,32] x) => (float[N,32,2] y)", TEXT, kind="float", s=np.array([0, 16, 2]), **weights)


def data_of(graph: gs.Graph):
    """Rows of 32 values that depend on six."""
    return samples(graph, make=lambda shape, rng: rng.standard_normal((64, 6)) @ MIXING)


def weights(keep: Path | None = None, **options) -> dict[str, np.ndarray]:
    """The weights that the products of a quantized network read, by name of the node."""
    graph = network()
    Quantize(**options).apply(graph, Context(data_of(graph), keep=keep))
    settle(graph)
    return {linear.name: linear.weight() for linear in linears(graph)}


@pytest.fixture(scope="module")
def nearest() -> dict[str, np.ndarray]:
    return weights()


def test_correlated_inputs_lose_less(nearest):
    exact, found = {linear.name: linear.weight() for linear in linears(network())}, weights(gptq=True)
    before, after = (np.square((own["MatMul_0"] - exact["MatMul_0"]) @ MIXING.T).sum() for own in (nearest, found))
    assert after < 0.5 * before


def test_weights_with_a_kernel_or_several_readers_keep_the_nearest_codes(nearest):
    found = weights(gptq=True)
    changed = {name for name, values in found.items() if not np.array_equal(values, nearest[name])}
    assert changed == {"MatMul_0", "Conv_5"}


def test_codes_of_other_bits_do_not_come_from_the_folder(tmp_path):
    for bits in ("off", "on", "on"):
        kept, new = (weights(keep, gptq=True, reduce_range=bits) for keep in (tmp_path, None))
        assert all(np.array_equal(kept[name], new[name]) for name in new)
    assert len(list(tmp_path.glob("rounded-*"))) == 4


def test_a_nearly_dead_channel_with_a_bias_stays_in_32_bits():
    weight = random((16, 16), "W")
    weight[3] *= 1e-9
    graph = build("(float[N,16] x) => (float[] y)", "y = Gemm<transB=1>(x, W, b)", kind="float", W=weight, b=(16,))
    quantize(graph, Quantize(gptq=True, target="onnxruntime"), samples(graph))
    (stored,) = [node.inputs[0].values for node in graph.nodes if node.inputs[0].dtype == np.int32]
    assert np.abs(stored.astype(np.int64)).max() <= 2**30 + 1
