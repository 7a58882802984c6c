"""How layers share what goes: sums, limits, the cheapest choice, and sensitivities that can be worked out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from channelfold.passes.layers.linear import linears
from channelfold.passes.sparsify.ratios import equal_slope, proportional, sensitivities
from channelfold.runtime.data.sources import Data
from channelfold.runtime.errors import DataError, ModelError
from channelfold.tests.graphs import build, data_from, random


@given(st.lists(st.tuples(st.integers(1, 5000), st.floats(0, 1e6), st.floats(0, 1)), min_size=1, max_size=8), st.data())
def test_the_sum_is_met_within_all_limits(layers, data):
    sizes = [size for size, _, _ in layers]
    least = [int(size * share) for size, _, share in layers]
    total = data.draw(st.integers(sum(least), sum(sizes)))
    counts = proportional(total, sizes, [weight for _, weight, _ in layers], least)
    assert sum(counts) == total
    assert all(low <= count <= high for low, count, high in zip(least, counts, sizes, strict=True))


def test_what_a_limit_holds_back_goes_to_the_others():
    assert proportional(60, [100, 100, 100], [1, 2, 3], [0, 0, 0]) == [10, 20, 30]
    assert proportional(120, [100, 100, 50], [1, 2, 30], [0, 0, 0]) == [23, 47, 50]
    assert proportional(60, [100, 100, 100], [0, 1, 1], [20, 0, 0]) == [20, 20, 20]
    with pytest.raises(ValueError, match="61 is not within 0 to 60"):
        proportional(61, [30, 30], [1, 1], [0, 0])


def test_equal_slopes_are_the_cheapest_of_all_choices():
    costs = [np.abs(random(size, f"costs{size}")) for size in (3, 4, 5)]
    for dropped in range(10):
        counts = equal_slope(dropped, costs, [1, 1, 1])
        assert sum(counts) == 12 - dropped
        assert min(counts) >= 1
        prices = [np.concatenate([[0], np.cumsum(np.sort(cost))]) for cost in costs]
        choices = [
            sum(price[n] for price, n in zip(prices, gone, strict=True))
            for gone in itertools.product(range(3), range(4), range(5))
            if sum(gone) == dropped
        ]
        found = sum(price[cost.size - n] for price, cost, n in zip(prices, costs, counts, strict=True))
        assert found == pytest.approx(min(choices), rel=1e-12)
    with pytest.raises(ValueError, match="10 is more than the 9"):
        equal_slope(10, costs, [1, 1, 1])


TWO = "u = MatMul(x, A)  h = MatMul(x, B)  y = Add(u, h)"


def data_of(*feeds: np.ndarray) -> Data:
    return data_from(*({"x": x} for x in feeds))


def measure(graph, *feeds, seed=0):
    weights = [linear.source for linear in linears(graph)]
    return sensitivities(graph, weights, data_of(*feeds), seed, lambda *step: None)


def test_a_sensitivity_is_the_norm_of_the_derivative():
    """y = x (A + B): a change of A by e r z moves y by e r x z, whose mean square is e^2 r^2 |x|^2 an output."""
    graph = build("(float[N,40] x) => (float[N,30] y)", TWO, kind="float", A=(40, 30), B=random((40, 30), "B") / 9)
    feeds = [random((64, 40), f"x{i}").astype(np.float32) for i in range(4)]
    found = measure(graph, *feeds)
    for linear, value in zip(linears(graph), found, strict=True):
        r2 = np.square(linear.weight()).mean()
        sums = np.sum([other.weight() for other in linears(graph)], axis=0, dtype=np.float64)
        shares = [r2 * np.square(x).sum(axis=1).mean() / np.square(x @ sums.T).mean() for x in feeds]
        # 1200 random directions on each of four samples: the estimate of a sum of squares is off by a few percent
        assert value == pytest.approx(np.sqrt(np.mean(shares) / 1200), rel=0.1)
    assert np.array_equal(measure(graph, *feeds), found)
    assert not np.array_equal(measure(graph, *feeds, seed=1), found)


def test_a_normalized_output_still_tells():
    """mean(y^2) is the same whatever the weights are; what is measured is not."""
    graph = build(
        "(float[N,16] x) => (float[N,16] y)", "h = MatMul(x, W)  y = LayerNormalization(h, g)", kind="float",
        W=(16, 16), g=np.ones(16),
    )  # fmt: skip
    assert measure(graph, random((4, 16), "x").astype(np.float32))[0] > 0.01


@pytest.mark.filterwarnings("ignore:invalid value")
def test_outputs_that_cannot_be_measured():
    graph = build("(float[N,8] x) => (float[N,8] y)", "h = MatMul(x, W)  y = Sqrt(h)", kind="float", W=(8, 8))
    with pytest.raises(DataError, match="Output 'y' of sample 0 is not finite"):
        measure(graph, random((4, 8), "x").astype(np.float32))
    graph = build("(float[N,8] x) => (int64[N] y)", "h = MatMul(x, W)  y = ArgMax<axis=1, keepdims=0>(h)", kind="float",
                  W=(8, 8))  # fmt: skip
    with pytest.raises(ModelError, match="no output of a float type"):
        measure(graph, random((4, 8), "x").astype(np.float32))
