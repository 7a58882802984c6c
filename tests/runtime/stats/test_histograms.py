"""Histograms against direct counts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from channelfold.runtime.errors import DataError
from channelfold.runtime.stats.histograms import BINS, COUNTED, LOWER, MASK, WIDTH, TensorStatistics, counted, stride

TINY = np.float32(2**-149)
BELOW_2 = np.nextafter(np.float32(2), np.float32(0))


def seen(*values: float, axis: int | None = None) -> TensorStatistics:
    statistics = TensorStatistics(axis)
    statistics.add(np.array(values, np.float32))
    return statistics


def means(statistics: TensorStatistics) -> np.ndarray:
    assert statistics.channel_mean is not None
    return statistics.channel_mean


@pytest.mark.parametrize(
    ("value", "lower", "width"),
    [
        (1.0, 1.0, 2**-7),
        (BELOW_2, 2 - 2**-7, 2**-7),
        (2.0, 2.0, 2**-6),
        (0.75, 0.75, 2**-8),
        (2**-126, 2**-126, 2**-133),
        (2**-133, 2**-133, 2**-133),  # denormal numbers have bins of one width
        (TINY, 0.0, 2**-133),
        (0.0, 0.0, 2**-133),
        (3e38, 225 * 2.0**120, 2.0**120),
        (127.5, 127.5, 0.5),
    ],
)
def test_a_value_is_counted_in_the_bin_that_holds_it(value, lower, width):
    """128 bins an octave, the lower edge inside; checked for the value and its negative."""
    (index,) = np.flatnonzero(seen(value).counts)
    assert (LOWER[index], WIDTH[index]) == (lower, width)
    assert lower <= value < lower + width
    (negative,) = np.flatnonzero(seen(-value).counts)
    assert negative == index + BINS


def test_bins_are_contiguous_and_their_number_is_right():
    assert len(LOWER) == len(WIDTH) == (0xFF << 7) - 1
    assert np.array_equal(LOWER[1:], (LOWER + WIDTH)[:-1])
    assert LOWER[0] == 0
    assert LOWER[-1] + WIDTH[-1] == 255 * 2.0**120  # the last bin holds masks alone


def test_counts_equal_a_direct_count():
    rng = np.random.default_rng(0)
    values = (rng.standard_normal(10_000) * 10.0 ** rng.integers(-40, 37, 10_000)).astype(np.float32)
    edges = np.append(LOWER, LOWER[-1] + WIDTH[-1])
    statistics = seen(*values)
    positive, negative = values[~np.signbit(values)], -values[np.signbit(values)]
    assert np.array_equal(statistics.counts[: len(LOWER)], np.histogram(positive.astype(float), edges)[0])
    assert np.array_equal(statistics.counts[BINS : BINS + len(LOWER)], np.histogram(negative.astype(float), edges)[0])
    kept = values[np.abs(values) < MASK]
    assert (statistics.minimum, statistics.maximum) == (kept.min(), kept.max())
    assert statistics.total == kept.size
    assert statistics.masked == values.size - kept.size


def test_both_zeros_are_zeros():
    statistics = seen(0.0, -0.0)
    assert (statistics.total, statistics.amax, statistics.magnitudes[0]) == (2, 0.0, 2)


@pytest.mark.parametrize("mask", [-3e38, 3.4e38, -np.inf, np.inf, MASK, -MASK, np.finfo(np.float32).min])
def test_masks_are_counted_and_change_nothing_else(mask):
    with_mask = TensorStatistics(-1)
    with_mask.add(np.array([[1.5, mask], [-0.5, mask]], np.float32))
    assert (with_mask.minimum, with_mask.maximum, with_mask.amax) == (-0.5, 1.5, 1.5)
    assert (with_mask.total, with_mask.masked) == (2, 2)
    assert np.array_equal(means(with_mask), [0.5, 0.0])


def test_the_largest_value_that_is_no_mask():
    value = float(np.nextafter(np.float32(MASK), np.float32(0)))
    assert (seen(value).amax, seen(value).masked) == (value, 0)


def test_nothing_but_masks():
    statistics = seen(-np.inf, -3e38)
    assert (statistics.total, statistics.masked, statistics.amax) == (0, 2, 0.0)


def test_nothing_at_all():
    statistics = TensorStatistics(1)
    statistics.add(np.zeros((0, 3), np.float32))
    statistics.add(np.zeros((3, 0), np.float32))
    assert (statistics.total, statistics.amax, statistics.channel_mean) == (0, 0.0, None)
    statistics.add(np.ones((1, 3), np.float32))
    assert np.array_equal(means(statistics), np.ones(3))


def test_scalars_and_views_are_counted():
    statistics = TensorStatistics()
    statistics.add(np.array(2.5, np.float32))
    statistics.add(np.arange(6, dtype=np.float32).reshape(2, 3).T[::2])
    assert (statistics.total, statistics.minimum, statistics.maximum) == (5, 0.0, 5.0)


def test_results_do_not_depend_on_order_or_batches():
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((12, 4, 5)) * np.logspace(-3, 3, 5)).astype(np.float32)
    whole, single, turned = (TensorStatistics(1) for _ in range(3))
    whole.add(values)
    for sample in values:
        single.add(sample[None])
    for part in np.array_split(values[::-1], [2, 3, 7]):
        turned.add(part)
    for other in (single, turned):
        assert np.array_equal(other.counts, whole.counts)
        assert (other.minimum, other.maximum) == (whole.minimum, whole.maximum)
        assert other.channel_mean == pytest.approx(whole.channel_mean, rel=1e-12)  # float64 sums in another order


@pytest.mark.parametrize("axis", [1, -1, -2, 0])
def test_means_by_channel(axis):
    """To 1e-12: summed in float64, though a float32 sum of these would be off by 1e-4."""
    values = (1000 + np.random.default_rng(0).standard_normal((7, 5, 300))).astype(np.float32)
    statistics = TensorStatistics(axis)
    statistics.add(values)
    others = tuple(i for i in range(3) if i != axis % 3)
    assert statistics.channel_mean == pytest.approx(values.mean(axis=others, dtype=np.float64), rel=1e-12)


def test_means_of_samples_of_different_lengths_weigh_every_position_alike():
    rng = np.random.default_rng(0)
    samples = [rng.standard_normal((1, length, 4)).astype(np.float32) for length in (3, 9, 1)]
    statistics = TensorStatistics(-1)
    for sample in samples:
        statistics.add(sample)
    expected = np.concatenate(samples, axis=1).mean(axis=(0, 1), dtype=np.float64)
    assert statistics.channel_mean == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("other", [1, 5])
def test_channels_must_stay(other):
    statistics = TensorStatistics(1)
    statistics.add(np.ones((2, 4), np.float32))
    with pytest.raises(DataError, match=f"it has {other} channels on axis 1, and had 4 before"):
        statistics.add(np.ones((2, other), np.float32))


# ---- a part of the values -------------------------------------------------------------------------------------------


def large(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).laplace(size=shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(1, 96, 40, 40), (1, 64, 2400), (2, 7, 11, 1000), (153_600,)])
def test_a_part_of_the_values_is_counted_and_stands_for_all(shape):
    """Every n-th value, n times; minimum, maximum and means by channel are those of all values."""
    values, axis = large(0, shape), 1 if len(shape) == 4 else -1
    part, whole = TensorStatistics(axis, 10_000), TensorStatistics(axis)
    for statistics in (part, whole):
        statistics.add(values)
    step = stride(shape, 10_000)
    assert step >= 15
    assert all(math.gcd(step, size) == 1 for size in shape)
    assert abs(part.total - values.size) <= step + 2
    assert (part.minimum, part.maximum, part.peaks) == (whole.minimum, whole.maximum, whole.peaks)
    assert np.abs(means(part) - means(whole)).max() == 0
    exact = np.cumsum(whole.magnitudes) / whole.total
    assert np.abs(np.cumsum(part.magnitudes) / part.total - exact).max() < 0.02  # two standard errors of 10,000
    ends = [int(np.float32(abs(end)).view(np.uint32)) >> 16 for end in (whole.maximum, whole.minimum)]
    assert [int(np.flatnonzero(half)[-1]) for half in part.counts.reshape(2, -1)] == ends


def rare(values: np.ndarray, *others: float) -> np.ndarray:
    """The values with others at places that a part of them does not hold."""
    changed = values.copy()
    changed.reshape(-1)[1 : 1 + len(others)] = others
    return changed


LARGE = large(0, (1, 64, 1000))


@pytest.mark.parametrize(
    "values",
    [
        LARGE,
        np.maximum(LARGE, 0),
        rare(np.maximum(LARGE, 0), -0.001, 99, -0.0),
        np.abs(LARGE) + 1,
        rare(np.abs(LARGE) + 1, 0.5, -0.5),
        -np.abs(LARGE) - 1,
        rare(-np.abs(LARGE) - 1, 0.25, -1e9),
        rare(np.full_like(LARGE, 3), 7, -7),
    ],
)
def test_the_ends_of_a_part_are_exact_however_rare(values):
    statistics = TensorStatistics(1, 1000)
    statistics.add(values)
    assert (statistics.minimum, statistics.maximum) == (values.min(), values.max())
    assert (statistics.total, statistics.peaks) == (values.size, [np.abs(values).max()])
    for end in (values.min(), values.max()):
        assert statistics.counts[int(np.float32(end).view(np.uint32)) >> 16] >= 1


@pytest.mark.parametrize("nan", [math.nan, -math.nan])
@pytest.mark.parametrize("values", [LARGE, np.maximum(LARGE, 0), -np.abs(LARGE) - 1])
def test_one_nan_among_many_values_is_found(values, nan):
    with pytest.raises(DataError, match="it holds NaN"):
        TensorStatistics(1, 1000).add(rare(values, nan))


def test_a_part_depends_on_no_order_and_no_split():
    samples = [large(seed, (1, 32, 30, 30)) for seed in range(6)]
    forward, backward, first, second = (TensorStatistics(1, 3000) for _ in range(4))
    for index, sample in enumerate(samples):
        forward.add(sample)
        (first if index % 2 else second).add(sample)
    for sample in reversed(samples):
        backward.add(sample)
    first.merge(second)
    for other in (backward, first):
        assert np.array_equal(other.counts, forward.counts)
        assert np.array_equal(means(other), means(forward))
        assert sorted(other.peaks) == sorted(forward.peaks)


def test_masks_are_found_among_all_values():
    values = large(0, (1, 64, 50, 50))
    values[0, 3, 20, 20] = -3e38
    statistics = TensorStatistics(1, 1000)
    statistics.add(values)
    assert (statistics.masked, statistics.total) == (1, values.size - 1)


def test_so_many_values_are_counted_that_enough_are():
    assert [counted(samples) for samples in (1, 16, 64, 10_000)] == [COUNTED, COUNTED // 16, COUNTED // 64, 1 << 13]


@pytest.mark.parametrize(("shape", "axis"), [((1, 64, 70, 70), 1), ((1, 500, 768), -1), ((300, 3, 200), 0)])
def test_sums_of_large_tensors(shape, axis):
    """Pieces of up to 128 values in float32, these in float64: to 1e-6 of the mean magnitude."""
    values = (3 + np.random.default_rng(0).standard_normal(shape)).astype(np.float32)
    statistics = TensorStatistics(axis)
    statistics.add(values)
    others = tuple(i for i in range(3 if len(shape) == 3 else 4) if i != axis % len(shape))
    assert np.abs(means(statistics) - values.mean(axis=others, dtype=np.float64)).max() < 1e-6 * 3
    huge = TensorStatistics(axis)
    huge.add(np.full(shape, 1e30, np.float32))
    assert means(huge) == pytest.approx(np.full(shape[axis], np.float32(1e30)), rel=1e-5)


# ---- peaks and rows ------------------------------------------------------------------------------------------------


def test_the_peak_of_every_sample():
    statistics = TensorStatistics()
    assert statistics.typical_peak == 0.0
    for values in ([1.0, -3.0], [0.5], [], [-np.inf, 2.0], [-np.inf]):
        statistics.add(np.array(values, np.float32))
    assert statistics.peaks == [3.0, 0.5, 2.0]  # masks left out, and the sample that holds nothing else
    assert statistics.typical_peak == 2.0


def test_the_median_row():
    """Rows are counted in bins of 32 / 128 of an octave's lower edge: 12 % to either side of the middle."""
    values = np.random.default_rng(0).standard_normal((3, 101, 64)) * np.geomspace(1e-3, 1e3, 101)[:, None]
    statistics = TensorStatistics(-1)
    for sample in values:
        statistics.add(sample.astype(np.float32)[None])
    expected = np.median(np.sqrt(np.square(values).mean(axis=-1)))
    assert statistics.typical_row == pytest.approx(expected, rel=0.13)
    assert seen(1.0, 2.0).typical_row is None


@pytest.mark.parametrize("size", [1e19, 1e25, 1e29])
def test_rows_whose_squares_do_not_fit_float32(size):
    statistics = TensorStatistics(-1)
    statistics.add(np.full((4, 8), size, np.float32))
    assert statistics.typical_row == pytest.approx(size, rel=0.12)
    assert statistics.amax == np.float32(size)
