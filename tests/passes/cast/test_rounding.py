"""What 16 bits do to weights: errors that cancel, products that stay float32, and what stands between these."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from channelfold.passes.base import Context
from channelfold.passes.cast import Cast
from channelfold.passes.cast.fit import fitted
from channelfold.passes.cast.kinds import HALVES
from channelfold.runtime.data.sources import Data
from channelfold.runtime.errors import no_progress
from channelfold.runtime.io import edit
from channelfold.tests.graphs import build, data_from, random
from channelfold.tests.passes.cast.casts import cast, computed, error, twin

LOSSY = np.float32(1 + 2.0**-8 - 2.0**-12)  # which bfloat16 rounds to 1
SIZE = 24
EXACT = np.eye(SIZE, dtype=np.float32)


def chain(*weights: np.ndarray) -> gs.Graph:
    """One Gemm for each weight, in a row."""
    names = ["x", *(f"h{i}" for i in range(len(weights) - 1)), "y"]
    steps = [f"{names[i + 1]} = Gemm({names[i]}, W{i}, B{i})" for i in range(len(weights))]
    constants = {f"W{i}": weight for i, weight in enumerate(weights)}
    biases = {f"B{i}": np.zeros(SIZE, np.float32) for i in range(len(weights))}
    return build(f"(float[N,{SIZE}] x) => (float[] y)", "  ".join(steps), **constants, **biases, kind="float")


@pytest.fixture(scope="module")
def data() -> Data:
    rng = np.random.default_rng(0)
    exact = [np.round(rng.uniform(2, 4, (8, SIZE)) * 16) / 16 for _ in range(6)]  # bfloat16 holds these numbers
    return data_from(*({"x": values.astype(np.float32)} for values in exact))


def lost(step: Cast, weights: list[np.ndarray], data: Data, folder) -> tuple[float, dict]:
    """The error of the outputs, and the facts of the pass."""
    graph, feed = chain(*weights), next(iter(data))
    exact = feed["x"]
    for weight in weights:
        exact = exact @ weight
    facts = cast(graph, step, data).facts
    return error({"y": exact}, {"y": twin(graph, folder, feed)["y"]}), facts


def test_a_bias_takes_back_the_mean_of_what_a_rounded_weight_changes(tmp_path, data):
    feed, misses = next(iter(data)), []
    for fits in (False, True):
        graph = chain(EXACT * LOSSY)
        cast(graph, Cast(type="bfloat16", max_error=4e-3 if fits else 0), data)
        misses.append(abs(np.mean(twin(graph, tmp_path, feed)["y"] - feed["x"] * LOSSY)))
    mean = np.mean([feed["x"] for feed in data], axis=(0, 1))
    bias = edit.value(graph.nodes[1].inputs[2])
    np.testing.assert_allclose(np.asarray(bias, np.float32), mean * (LOSSY - 1), rtol=2.0**-8)
    assert misses[1] < misses[0] / 2


def test_the_product_that_loses_most_stays_float32(tmp_path, data):
    weights = [EXACT * 2] * 3 + [np.full((SIZE, SIZE), LOSSY)] + [EXACT * 2] * 3
    step = Cast(type="bfloat16", fit=False, max_error=4e-3)
    before, _ = lost(Cast(type="bfloat16", fit=False, max_error=0), weights, data, tmp_path)
    after, facts = lost(step, weights, data, tmp_path)
    assert after < 3e-3 < before
    (name,) = facts["lossy"]
    assert name.endswith("_3")
    assert name in facts["float32_nodes"]
    assert facts["lossy"][name] == pytest.approx(before, rel=0.1)
    assert facts["error"] == pytest.approx(after, abs=1e-3)
    assert facts["error"] < before


def test_where_all_products_lose_alike_none_stays_float32(data):
    step = Cast(type="bfloat16", fit=False, max_error=1e-5)
    outcome = step.apply(chain(*[EXACT * LOSSY] * 6), Context(calibration=data))
    assert outcome.facts["lossy"] == {}
    assert outcome.facts["float32_nodes"] == []
    assert any("rounding adds up from all nodes" in warning for warning in outcome.warnings)


def test_nothing_is_measured_without_data(tmp_path):
    outcome = Cast(type="bfloat16", max_error=1e-5).apply(chain(EXACT * LOSSY), Context())
    assert "error" not in outcome.facts
    assert not outcome.warnings


def test_what_a_kernel_changes_at_the_borders_cancels_too():
    """The kernel reads 6.25 pixels of nine on average: the new weights and the bias keep the mean of the outputs."""
    lossy = np.float32(1 + 2.0**-11 - 2.0**-15)  # which float16 rounds to 1
    constants = {"W": np.full((1, 1, 3, 3), lossy), "B": np.zeros(1, np.float32)}
    feed, sums = {"x": np.ones((1, 1, 4, 4), np.float32)}, []
    for fits in (False, True):
        graph = build(
            "(float[1,1,4,4] x) => (float[] y)", "y = Conv<pads=[1,1,1,1]>(x, W, B)", **constants, kind="float"
        )
        before = computed(graph, feed)["y"]
        cast(graph, Cast(max_error=4e-4 if fits else 0), data_from(feed))
        (conv,) = (node for node in graph.nodes if node.op == "Conv")
        weight, bias = (np.asarray(edit.value(conv.inputs[i]), np.float64) for i in (1, 2))
        read = np.pad(feed["x"], [(0, 0), (0, 0), (1, 1), (1, 1)])
        windows = np.lib.stride_tricks.sliding_window_view(read[0, 0], (3, 3))
        sums.append(abs(np.mean((windows * weight[0, 0]).sum(axis=(2, 3)) + bias) - np.mean(before)))
    assert sums[1] < sums[0] / 8


def test_a_bias_stays_where_the_mean_is_little_of_the_error():
    feeds = [{"x": np.full((1, SIZE), value, np.float32)} for value in (-1.0, 1.0, 1.5)]  # mean 0.5, variance 1.17
    graph = chain(EXACT * LOSSY)
    cast(graph, Cast(type="bfloat16", max_error=0), data_from(*feeds))
    assert not np.any(edit.value(graph.nodes[1].inputs[2]))


def test_what_stays_float32_anyway_is_not_tried(data):
    """A weight that float16 does not hold, and a product that was named: neither is one of the few that may stay."""
    weights = [EXACT, EXACT * np.float32(1e5), EXACT * np.float32(1e-5), EXACT * np.float32(1 + 2.0**-11)]
    graph = chain(*weights)
    step = Cast(exclude=(graph.nodes[2].name,), fit=False, max_error=1e-6)
    outcome = step.apply(graph, Context(calibration=data))
    assert set(outcome.facts["lossy"]).isdisjoint(node.name for node in graph.nodes[1:3])
    assert np.isfinite(outcome.facts["error"])


def test_errors_of_the_inputs_cancel_and_zeros_of_a_sparse_weight_stay(data):
    weight, half = np.where(random((SIZE, SIZE)) > 0, random((SIZE, SIZE)), 0).astype(np.float32), HALVES["bfloat16"]
    graph = chain(weight)
    (name,) = (node.name for node in graph.nodes)
    found = fitted(graph, [name], data, half, no_progress)[name]
    new, x = found.weight.astype(np.float32).T, np.concatenate([feed["x"] for feed in data])
    assert not new[weight == 0].any()
    nearest, fit = x @ (half.rounded(weight) - weight), x @ (new - weight) + found.bias.astype(np.float32)
    assert np.linalg.norm(fit) < np.linalg.norm(nearest) / 3


def test_a_weight_of_two_products_keeps_one_value(data):
    graph = build(f"(float[N,{SIZE}] x) => (float[] y)", "h = MatMul(x, W)  y = MatMul(h, W)", W=EXACT * LOSSY,
                  kind="float")  # fmt: skip
    assert not fitted(graph, [node.name for node in graph.nodes], data, HALVES["bfloat16"], no_progress)


def test_a_residual_stream_stays_float32_where_that_halves_the_error():
    """Sums of many terms lose more than products here, whose weights and inputs bfloat16 holds."""
    steps = ["h0 = Gemm(x, W0, B0)"]
    for i in range(1, 9):
        steps.append(f"a{i} = Add(h{i - 1}, C{i})  h{i} = Sub(a{i}, D{i})")
    constants = {f"{n}{i}": np.float32([1000.0]) for i in range(1, 9) for n in "CD"}
    graph = build(f"(float[N,{SIZE}] x) => (float[] y)", "  ".join([*steps, "y = Gemm(h8, W0, B0)"]), W0=EXACT,
                  B0=np.zeros(SIZE, np.float32), **constants, kind="float")  # fmt: skip
    feed = {"x": np.round(random((8, SIZE)) * 64) / 64}
    outcome = cast(graph, Cast(type="bfloat16"), data_from({"x": feed["x"].astype(np.float32)}))
    assert outcome.facts["between_float32"]
    assert outcome.facts["error"] < 1e-2
    assert {node.op: {str(edit.dtype(t)) for t in node.outputs} for node in graph.nodes if node.op != "Cast"} == {
        "Gemm": {"bfloat16"}, "Add": {"float32"}, "Sub": {"float32"}
    }  # fmt: skip
