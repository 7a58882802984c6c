"""Histograms against direct counts, and statistics of tensors inside a graph against the tensors themselves."""

from __future__ import annotations

import numpy as np
import pytest

from channelfold.runtime.data.sources import Data, open_data
from channelfold.runtime.errors import DataError
from channelfold.runtime.io.files import session
from channelfold.runtime.io.session import TensorSpec
from channelfold.runtime.stats import statistics as module
from channelfold.runtime.stats.statistics import (
    BINS,
    LOWER,
    MASK,
    WIDTH,
    ChannelStatistics,
    TensorStatistics,
    collect,
    observe,
)
from channelfold.tests.graphs import build, data_from

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


def test_inputs_and_inner_tensors_are_observed_in_the_graph():
    graph = build("(float[N,3] x) => (float[] z)", "y = MatMul(x, W) z = Relu(y)", kind="float", W=(3, 4))
    feeds = [{"x": np.random.default_rng(i).standard_normal((2, 3)).astype(np.float32)} for i in range(3)]
    found = collect(graph, {"x": None, "y": 1, "z": None}, data_from(*feeds))
    runner = session(graph, ["x", "y", "z"], optimize=False)
    runs = [runner.run(feed) for feed in feeds]
    for name in "xyz":
        expected = TensorStatistics(1 if name == "y" else None)
        for run in runs:
            expected.add(run[name])
        assert np.array_equal(found[name].counts, expected.counts), name
        assert (found[name].minimum, found[name].maximum) == (expected.minimum, expected.maximum)
    assert found["x"].channel_mean is None
    assert found["y"].channel_mean == pytest.approx(np.mean([r["y"] for r in runs], axis=(0, 1), dtype=float), rel=1e-9)
    assert [t.name for t in graph.outputs] == ["z"]


def test_float16_activations_are_cast():
    graph = build("(float16[N,3] x) => (float16[] y)", "y = Mul(x, two)", two=np.array(2, np.float16))
    found = collect(graph, {"y": None}, data_from({"x": np.array([[-3, 0, 0.1]], np.float16)}))
    assert (found["y"].minimum, found["y"].maximum) == (-6.0, float(np.float16(0.2)))


def test_integer_inputs():
    graph = build("(int64[N] ids) => (float[] y)", "y = Gather(E, ids)", E=np.arange(8, dtype=np.float32).reshape(4, 2))
    found = collect(graph, {"y": 1, "ids": None}, data_from({"ids": np.array([3, 1])}))
    assert (found["y"].minimum, found["y"].maximum, found["ids"].maximum) == (2.0, 7.0, 3.0)
    assert np.array_equal(means(found["y"]), [4.0, 5.0])


def test_a_small_limit_observes_in_groups_and_finds_the_same(monkeypatch):
    graph = build("(float[N,8] x) => (float[] z)", "y = MatMul(x, W) z = Relu(y)", kind="float", W=(8, 64))
    source = data_from(*({"x": np.random.default_rng(i).standard_normal((2, 8)).astype(np.float32)} for i in range(3)))
    tensors = {"x": None, "y": 1, "z": None}
    whole = collect(graph, tensors, source)
    monkeypatch.setattr(module, "GROUP_BYTES", 600)  # x has 64 bytes, y and z 512 each
    sizes = module._sizes(graph, next(iter(source)))
    groups = list(module.within(600, ((name, sizes[name]) for name in tensors)))
    assert groups == [["x", "y"], ["z"]]
    steps = []
    parts = collect(graph, tensors, source, lambda stage, done, total: steps.append((done, total)))
    assert steps == [(i, 6) for i in range(7)]
    for name in tensors:
        assert np.array_equal(parts[name].counts, whole[name].counts)
    assert np.array_equal(means(parts["y"]), means(whole["y"]))


def test_what_a_sample_weighs_is_measured_on_the_sample():
    graph = build("(float[N,L,8] x) => (float[] y)", "y = MatMul(x, W)", kind="float", W=(8, 64))
    feed = {"x": np.zeros((2, 5, 8), np.float32)}
    sizes = module._sizes(graph, feed)
    assert (sizes["x"], sizes["y"]) == (4 * 2 * 5 * 8, 4 * 2 * 5 * 64)


def test_nan_names_the_tensor_and_the_sample():
    graph = build("(float[N] x) => (float[] y)", "y = Log(x)", kind="float")
    feeds = [{"x": np.array([1.0], np.float32)}, {"x": np.array([-1.0], np.float32)}]
    with pytest.raises(DataError, match=r"Activation 'y' of sample 1 cannot be used: it holds NaN\. Check that sample"):
        collect(graph, {"y": None}, data_from(*feeds))


def test_samples_that_are_read_from_data_in_batches(tmp_path):
    graph = build("(float[N,3] x) => (float[] y)", "y = Relu(x)", kind="float")
    values = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    specs = [TensorSpec("x", np.dtype(np.float32), ("N", 3))]
    found = [collect(graph, {"y": 1}, open_data({"x": part}, specs))["y"] for part in (values, values[::-1])]
    direct = TensorStatistics(1)
    direct.add(np.maximum(values, 0))
    for statistics in found:
        assert np.array_equal(statistics.counts, direct.counts)
        assert statistics.channel_mean == pytest.approx(direct.channel_mean, rel=1e-12)


def test_no_samples_leave_everything_unseen():
    graph = build("(float[N] x) => (float[] y)", "y = Relu(x)", kind="float")
    empty = Data([TensorSpec("x", np.dtype(np.float32), (1,))], 0, lambda: iter(()), "nothing")
    assert collect(graph, {"y": None}, empty)["y"].total == 0
    assert collect(graph, {}, empty) == {}


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


# ---- channels ------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("bad", "what"), [(np.nan, "it holds NaN"), (np.inf, "infinities"), (-np.inf, "infinities")])
def test_a_value_that_is_no_number_names_tensor_and_sample(bad, what):
    graph = build("(float[N,3] x) => (float[] y)", "y = Relu(x)", kind="float")
    feeds = [{"x": np.ones((2, 3), np.float32)} for _ in range(3)]
    feeds[2]["x"][1, 2] = bad
    with pytest.raises(DataError, match=f"Activation 'x' of sample 2 cannot be used: .*{what}"):
        observe(graph, {"x": ChannelStatistics(-1)}, data_from(*feeds))


def test_channels_that_change_name_tensor_and_sample():
    graph = build("(float[N,M] x) => (float[] y)", "y = Relu(x)", kind="float")
    feeds = [{"x": np.ones((2, width), np.float32)} for width in (3, 4)]
    with pytest.raises(DataError, match=r"Activation 'y' of sample 1 .*it has 4 channels on axis -1, and had 3 before"):
        observe(graph, {"y": ChannelStatistics(-1, 8)}, data_from(*feeds))
