"""The calibrator ``measured``: ranges that end where the outputs want it."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.quantize import Quantize
from channelfold.runtime.data.sources import Data
from channelfold.runtime.io.files import session
from channelfold.tests.graphs import build, random
from channelfold.tests.passes.quantize.quantized import quantize, samples

HUGE = 60.0


def network(reads_huge: bool) -> gs.Graph:
    """Three products, the second of which reads a huge channel; its weights for that channel are zero or large."""
    weight = random((16, 16), "B")
    weight[0] = 0.5 if reads_huge else 0.0
    shapes = {"A": np.eye(16, dtype=np.float32), "B": weight, "C": (16, 16)}
    text = "a = MatMul(x, A) b = MatMul(a, B) c = MatMul(b, C)"
    return build("(float[N,16] x) => (float[N,16] c)", text, kind="float", **shapes)


def feeds(graph: gs.Graph) -> Data:
    """Samples of 64 rows, in each of which one row has a huge value in channel 0."""

    def make(shape, rng):
        values = rng.standard_normal(shape)
        values[0, 0] = HUGE * rng.choice([-1, 1])
        return values

    return samples(graph, size=64, make=make)


def snr(graph: gs.Graph, changed: gs.Graph, data: Data) -> float:
    pairs = [(session(graph).run(feed)["c"], session(changed).run(feed)["c"]) for feed in data]
    lost = sum(np.square(a - b).sum() for a, b in pairs)
    return 10 * np.log10(sum(np.square(a).sum() for a, _ in pairs) / lost)


def measured(reads_huge: bool, **options) -> tuple[list[str], float]:
    """(what the pass says of each node, signal to noise of the outputs)."""
    graph, result = network(reads_huge), network(reads_huge)
    data = feeds(graph)
    outcome = quantize(result, Quantize(min_activation_snr=0, **options), data)
    return [change.what for change in outcome.changed], snr(graph, result, data)


def test_huge_values_that_nothing_reads_are_clipped():
    says, found = measured(reads_huge=False, calibrator="measured")
    usual, before = measured(reads_huge=False)
    assert [", by percentile" in what for what in says] == [True, True, False]
    assert not any(", by " in what for what in usual)
    assert found > before + 6


def test_huge_values_that_the_outputs_need_stay_whole():
    says, found = measured(reads_huge=True, calibrator="measured")
    usual, before = measured(reads_huge=True)
    assert (says, found) == (usual, before)


def test_what_only_moves_values_keeps_one_range():
    graph = build(
        "(float[1,16,8,8] x) => (float[1,16,4,4] y)",
        "a = Conv<kernel_shape=[1,1]>(x, V) m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a) "
        "y = Conv<kernel_shape=[1,1]>(m, W)",
        kind="float",
        V=(16, 16, 1, 1),
        W=(16, 16, 1, 1),
    )
    quantize(graph, Quantize(calibrator="measured", target="onnxruntime"), samples(graph))
    quantizers = [node for node in graph.nodes if node.op == "QuantizeLinear"]
    scales = {node.inputs[0].name: float(node.inputs[1].values) for node in quantizers}
    assert scales["a"] == scales["m"]


def test_outputs_without_axes_can_be_measured():
    graph = build(
        "(float[4,16] x) => (float y)", "a = MatMul(x, A) y = ReduceMean<keepdims=0>(a)", kind="float", A=(16, 16)
    )
    outcome = quantize(graph, Quantize(calibrator="measured"), samples(graph))
    assert [change.node for change in outcome.changed] == ["MatMul_0"]
