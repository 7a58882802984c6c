"""Ranges, means and rows of channels."""

from __future__ import annotations

import numpy as np
import pytest

from channelfold.runtime.stats.channels import ChannelStatistics


def channels(*samples: np.ndarray, axis: int = -1, rows: int = 0) -> ChannelStatistics:
    statistics = ChannelStatistics(axis, rows)
    for values in samples:
        statistics.add(np.asarray(values, np.float32))
    return statistics


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2])
def test_ranges_and_means_of_channels(axis):
    values = np.random.default_rng(0).standard_normal((4, 3, 5, 6)).astype(np.float32)
    found = channels(*values, axis=axis)
    flat = np.moveaxis(values, axis % 3 + 1, -1)
    by_sample = flat.reshape(4, -1, flat.shape[-1])
    flat = flat.reshape(-1, flat.shape[-1]).astype(np.float64)
    assert np.array_equal(found.minimum, flat.min(axis=0))
    assert np.array_equal(found.maximum, flat.max(axis=0))
    assert np.array_equal(found.amax, np.abs(flat).max(axis=0))
    assert found.absolute_mean == pytest.approx(np.abs(flat).mean(axis=0), rel=1e-12)
    middle = (by_sample.min(axis=1).astype(float) + by_sample.max(axis=1)).mean(axis=0) / 2
    assert found.middle == pytest.approx(middle, rel=1e-12)
    assert (found.positions, found.samples) == (len(flat), 4)


def test_the_middle_is_an_average_over_samples_not_of_all():
    found = channels([[0.0], [2.0]], [[0.0], [10.0]], [[-4.0], [-2.0]])
    assert found.middle == pytest.approx([(1 + 5 - 3) / 3])
    assert ((found.minimum + found.maximum) / 2).tolist() == [3.0]


def test_a_sample_without_values_is_none():
    found = channels(np.zeros((0, 3)), np.ones((2, 3)), np.zeros((1, 0, 3)))
    assert (found.positions, found.samples) == (2, 1)
    assert found.absolute_mean.tolist() == [1, 1, 1]


def sorted_rows(statistics: ChannelStatistics) -> tuple[np.ndarray, np.ndarray]:
    values, weights = statistics.sample()
    order = np.lexsort((weights, *values.T))
    return values[order], weights[order]


ROWED = [
    np.random.default_rng(i).standard_normal((1, length, 6)).astype(np.float32)
    for i, length in enumerate((50, 300, 7, 120, 64))
]


def test_rows_that_are_few_are_all_kept():
    found = channels(*ROWED[2:3], rows=64)
    values, weights = sorted_rows(found)
    expected = ROWED[2].reshape(-1, 6)
    assert np.array_equal(values, expected[np.lexsort(expected.T)])
    assert weights.tolist() == [1.0] * 7


def test_the_sample_does_not_depend_on_the_order_of_the_samples():
    whole = sorted_rows(channels(*ROWED, rows=64))
    for order in ([4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):
        turned = sorted_rows(channels(*(ROWED[i] for i in order), rows=64))
        assert np.array_equal(turned[0], whole[0])
        assert np.array_equal(turned[1], whole[1])


def test_the_sample_does_not_depend_on_the_order_where_many_rows_are_equally_large():
    """As behind ReLU6: ties are decided by the rows, not by which came first."""
    clipped = [np.clip(part, -0.5, 0.5) for part in ROWED]
    whole = sorted_rows(channels(*clipped, rows=64))
    turned = sorted_rows(channels(*clipped[::-1], rows=64))
    assert np.array_equal(turned[0], whole[0])


def test_the_weights_of_the_rows_sum_to_all_positions():
    found = channels(*ROWED, rows=64)
    values, weights = found.sample()
    assert weights.sum() == pytest.approx(found.positions, rel=1e-12)
    assert 56 <= len(values) == len(weights) <= 64
    assert np.sum(weights == 1.0) >= 8


def test_samples_that_are_given_twice_count_twice():
    found = channels(*ROWED[:3], *ROWED[:3], rows=64)
    values, weights = found.sample()
    assert len(values) == len(weights)
    assert weights.sum() == pytest.approx(2 * 357, rel=1e-12)


def test_the_largest_rows_are_in_the_sample():
    everything = np.concatenate([part.reshape(-1, 6) for part in ROWED])
    largest = everything[np.argsort(-np.abs(everything).max(axis=1))[:8]]
    values, weights = channels(*ROWED, rows=64).sample()
    for row in largest:
        (place,) = np.flatnonzero((values == row).all(axis=1))
        assert weights[place] == 1.0


def test_the_sample_stands_for_the_whole():
    """The mean square of 20,000 rows, from 256 of them: 10 % is 2.6 standard deviations."""
    values = np.random.default_rng(0).standard_normal((20, 1000, 4)).astype(np.float32)
    kept, weights = channels(*values, rows=256).sample()
    found = weights @ np.square(kept) / weights.sum()
    assert found == pytest.approx(np.square(values).mean(axis=(0, 1)), rel=0.25)
    assert found.mean() == pytest.approx(1.0, rel=0.1)


def test_memory_is_bounded_and_samples_are_not_kept_alive():
    found = ChannelStatistics(-1, 64)
    for index in range(50):
        found.add(np.random.default_rng(index).standard_normal((1, 200, 8)).astype(np.float32))
        for kept, limit in ((found._largest, 8), (found._random, 56)):
            assert len(kept.rows) == len(kept.keys) == len(kept.ranks) == limit
            assert kept.rows.base is None
