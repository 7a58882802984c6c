"""The share of the linear nodes that may stay float: how many, and which."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from channelfold.passes.base import Outcome
from channelfold.passes.quantize import Quantize
from channelfold.runtime.errors import UsageError
from channelfold.runtime.io.files import session
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
    for refusal in outcome.refused:
        assert refusal.code == "int8 of this node changes the outputs most"
        assert refusal.reason.startswith("MatMul stays float: int8 of this node changes the outputs most (")
        assert refusal.reason.endswith(" dB)")


def test_the_share_goes_to_what_changes_the_outputs_of_the_model_most():
    graph = chain(B=uneven("B"), D=uneven("D"))
    feeds = samples(graph, size=64, make=lambda shape, rng: rng.standard_normal(shape))
    names = float_nodes(quantize(graph, Quantize(float_share=0.4, min_activation_snr=0), feeds))
    errors = {}
    for one in (f"MatMul_{i}" for i in range(5)):
        alone = chain(B=uneven("B"), D=uneven("D"))
        reference = [session(alone).run(feed)["e"] for feed in feeds]
        others = tuple(f"MatMul_{i}" for i in range(5) if f"MatMul_{i}" != one)
        quantize(alone, Quantize(exclude=others, min_activation_snr=0), feeds)
        found = [session(alone).run(feed)["e"] for feed in feeds]
        errors[one] = sum(np.square(a - b).sum() for a, b in zip(reference, found, strict=True))
    assert set(names) == set(sorted(errors, key=errors.__getitem__)[-2:])


def test_what_no_output_sees_comes_last():
    graph = build("(float[N,16] x) => (float[] y)", "a = MatMul(x, A) b = MatMul(x, B) c = Mul(b, z) y = Add(a, c)",
                  kind="float", A=(16, 16), B=uneven("B"), z=np.array(1e-4))  # fmt: skip
    outcome = quantize(graph, Quantize(float_share=0.5, min_activation_snr=0), samples(graph, size=8))
    assert float_nodes(outcome) == ["MatMul_0"]


def test_a_convolution_with_a_kernel_is_measured_like_all_others():
    graph = build("(float[N,16,6,6] x) => (float[] y)", "c = Conv(x, W) y = Conv(c, V)", kind="float",
                  W=(16, 16, 3, 3), V=(16, 16, 1, 1))  # fmt: skip
    assert float_nodes(quantize(graph, Quantize(float_share=1.0))) == ["Conv_0", "Conv_1"]


def test_what_is_float_anyway_is_part_of_the_share():
    graph = chain()
    data = samples(graph, size=8)
    outcome = quantize(graph, Quantize(float_share=0.4, exclude=("MatMul_1", "MatMul_2")), data)
    assert float_nodes(outcome) == ["MatMul_1", "MatMul_2"]
    graph = chain()
    outcome = quantize(graph, Quantize(float_share=0.6, exclude=("MatMul_1", "MatMul_2")), data)
    names = float_nodes(outcome)
    assert len(names) == 3
    assert {"MatMul_1", "MatMul_2"} < set(names)


@pytest.mark.parametrize("share", [-0.1, 1.1, 30])
def test_a_share_that_is_none(share):
    with pytest.raises(UsageError, match=f"'float_share' is {share:g}. Expected 0 to 1"):
        Quantize(float_share=share)
