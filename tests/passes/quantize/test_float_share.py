"""The share of the linear nodes that may stay float: how many, and which."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from channelfold.passes.base import Outcome
from channelfold.passes.quantize import Quantize
from channelfold.runtime.errors import UsageError
from channelfold.tests.graphs import build, random
from channelfold.tests.passes.quantize.quantized import quantize, samples

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
