"""Calibrators on histograms against the same criteria on the raw data."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from channelfold.passes.quantize import Calibrator
from channelfold.passes.quantize.calibrators import clipped, row_snr, snr, threshold
from channelfold.runtime.stats.histograms import LOWER, TensorStatistics, stride

SIZE = 100_000
_RNG = np.random.default_rng(0)
_NORMAL = _RNG.standard_normal(SIZE)
DATA = {
    name: values.astype(np.float32)
    for name, values in {
        "normal": _NORMAL,
        "relu": np.maximum(_RNG.standard_normal(SIZE), 0),
        "laplace": _RNG.laplace(size=SIZE),
        "student": _RNG.standard_t(3, SIZE),
        "outlier": np.append(_NORMAL, [300.0]),
        "far outlier": np.append(_NORMAL, [3e4]),
        "uniform": _RNG.uniform(-2, 3, SIZE),
        "exponential": _RNG.exponential(size=SIZE) ** 2,
        "large": 1e20 * _NORMAL,
        "small": 1e-30 * _NORMAL,
    }.items()
}


def seen(values) -> TensorStatistics:
    statistics = TensorStatistics()
    statistics.add(np.asarray(values, np.float32))
    return statistics


def measured(values: np.ndarray, limit: float, levels: int = 127) -> float:
    """The signal-to-noise ratio in dB of values rounded to ``levels`` steps up to ``limit``."""
    exact = values.astype(np.float64)
    step = limit / levels
    noise = np.square(exact - np.clip(np.rint(exact / step), -levels, levels) * step).sum()
    return float(10 * np.log10(np.square(exact).sum() / noise)) if noise else np.inf


@pytest.mark.parametrize("name", DATA)
def test_minmax_is_the_largest_magnitude(name):
    assert threshold(seen(DATA[name]), "minmax") == float(np.abs(DATA[name]).max())


@pytest.mark.parametrize("percent", [50.0, 99.0, 99.9, 99.999, 100.0])
@pytest.mark.parametrize("name", DATA)
def test_percentile_is_within_a_bin(name, percent):
    """A bin is 1/128 of its lower edge wide at most; a quantile between two samples lies between their bins."""
    values = np.abs(DATA[name]).astype(np.float64)
    low, high = (np.quantile(values, percent / 100, method=way) for way in ("lower", "higher"))
    found = threshold(seen(DATA[name]), "percentile", percentile=percent)
    assert low * (1 - 1 / 128) <= found <= high * (1 + 1 / 128)


@pytest.mark.parametrize("levels", [127, 255])
@pytest.mark.parametrize("name", DATA)
def test_mse_is_as_good_as_a_search_on_the_data(name, levels):
    """0.1 dB: candidates stand 3 % apart and noise is counted in bins, where the optimum is flat."""
    values = DATA[name]
    limits = np.abs(values).max() * np.geomspace(1, 1e-5, 1000)
    best = max(measured(values, limit, levels) for limit in limits)
    assert measured(values, threshold(seen(values), "mse", levels=levels), levels) >= best - 0.1


@pytest.mark.parametrize("levels", [127, 255])
@pytest.mark.parametrize("share", [1.0, 0.7, 0.3, 0.05])
@pytest.mark.parametrize("name", DATA)
def test_predicted_noise_is_the_noise(name, share, levels):
    values = DATA[name]
    limit = share * float(np.abs(values).max())
    if name == "far outlier" and share == 1.0:
        return  # one value makes half the noise here, and where in its bin it lies is not known
    assert snr(seen(values), limit, levels) == pytest.approx(measured(values, limit, levels), abs=0.1)


def reference_divergences(values: np.ndarray, bins: int = 2048, levels: int = 128) -> dict[float, float]:
    """Divergence by threshold: TensorRT's procedure as its slides give it, on a histogram of the data."""
    magnitudes = np.abs(values.astype(np.float64))
    peak = magnitudes.max()
    histogram = np.histogram(magnitudes[magnitudes > 0], bins, (0, peak))[0].astype(float)
    found = {}
    for stop in range(levels, bins + 1, 8):
        p = histogram[:stop].copy()
        p[-1] += histogram[stop:].sum()
        q = np.zeros(stop)
        for level in range(levels):
            start, end = -(-level * stop // levels), -(-(level + 1) * stop // levels)
            part = histogram[start:end]
            if (part > 0).any():
                q[start:end][part > 0] = part.sum() / (part > 0).sum()
        p, q = p / p.sum(), q / q.sum()
        if ((p > 0) & (q == 0)).any():  # only where the last bin was empty before the tail came
            continue
        filled = p > 0
        found[peak * stop / bins] = float((p[filled] * np.log(p[filled] / q[filled])).sum())
    return found


@pytest.mark.parametrize("kind", ["normal", "relu", "laplace", "student", "uniform", "squares"])
def test_entropy_agrees_with_the_procedure_on_the_data(kind):
    """Where both clip, the thresholds differ little; in any case the divergence on the data is as small.

    0.001 nat: in the tail, where the minimum is flat, bins smooth what sampling leaves uneven.
    """
    rng = np.random.default_rng(1)
    values = {
        "normal": rng.standard_normal,
        "relu": lambda size: np.maximum(rng.standard_normal(size), 0),
        "laplace": lambda size: rng.laplace(size=size),
        "student": lambda size: rng.standard_t(3, size),
        "uniform": lambda size: rng.uniform(-2, 3, size),
        "squares": lambda size: rng.exponential(size=size) ** 2,
    }[kind](1_000_000).astype(np.float32)
    found = threshold(seen(values), "entropy")
    divergences = reference_divergences(values)
    best = min(divergences, key=divergences.__getitem__)
    assert found == pytest.approx(best, rel=0.1)
    nearest = min(divergences, key=lambda limit: abs(limit - found))
    assert divergences[nearest] <= divergences[best] + 0.001


@pytest.mark.parametrize("calibrator", get_args(Calibrator))
@pytest.mark.parametrize("name", ["normal", "relu", "student", "outlier"])
def test_a_power_of_two_scales_exactly(name, calibrator):
    for factor in (2.0**-20, 8.0, 2.0**30):
        scaled = threshold(seen(DATA[name] * np.float32(factor)), calibrator)
        assert scaled == factor * threshold(seen(DATA[name]), calibrator)


@pytest.mark.parametrize("calibrator", get_args(Calibrator))
def test_the_sign_does_not_matter(calibrator):
    assert threshold(seen(-DATA["relu"]), calibrator) == threshold(seen(DATA["relu"]), calibrator)


@pytest.mark.parametrize("calibrator", get_args(Calibrator))
@pytest.mark.parametrize("values", [[5.3], [5.3] * 1000, [-5.3] * 10, [0.0, 5.3], [0.0] * 1000 + [5.3], [5.3, -5.3]])
def test_one_magnitude_is_the_range(calibrator, values):
    """But for the percentile of many zeros, which may cut the one value to its bin: 1/128."""
    assert threshold(seen(values), calibrator) == pytest.approx(np.float32(5.3), rel=1 / 128)
    assert threshold(seen(values), "minmax") == np.float32(5.3)


@pytest.mark.parametrize("calibrator", get_args(Calibrator))
def test_two_magnitudes(calibrator):
    limit = threshold(seen([1.0, 4.0] * 500), calibrator)
    assert 3.9 <= limit <= 4.0
    assert measured(np.array([1.0, 4.0] * 500), limit) > 40


@pytest.mark.parametrize("calibrator", get_args(Calibrator))
@pytest.mark.parametrize("values", [[], [0.0], [0.0, -0.0] * 50, [-3e38, np.inf], [0.0, -3e38]])
def test_nothing_but_zeros_has_no_range(calibrator, values):
    statistics = seen(values)
    assert threshold(statistics, calibrator) == 0.0
    assert snr(statistics, 0.0) == np.inf


@pytest.mark.parametrize("calibrator", get_args(Calibrator))
@pytest.mark.parametrize("value", [2**-149, 2**-134, 2**-133, 2**-126])
def test_denormal_numbers_have_a_range(calibrator, value):
    assert 0 < threshold(seen([0.0, value, -value]), calibrator) <= value


@pytest.mark.parametrize("calibrator", get_args(Calibrator))
def test_masks_do_not_count(calibrator):
    masked = np.append(DATA["normal"], np.full(1000, -3e38, np.float32))
    assert threshold(seen(masked), calibrator) == threshold(seen(DATA["normal"]), calibrator)
    assert snr(seen(masked), 3.0) == snr(seen(DATA["normal"]), 3.0)


def test_a_range_of_zero_loses_all():
    assert snr(seen([1.0, 2.0]), 0.0) == 0.0


def test_the_largest_values_fit():
    """Near the masks: nothing overflows."""
    for calibrator in get_args(Calibrator):
        assert 0 < threshold(seen(DATA["normal"] * np.float32(2.0**97)), calibrator) < 2.0**100
    assert LOWER[-1] > 3e38


# ---- tensors of rows -----------------------------------------------------------------------------------------------


def rows(*samples: np.ndarray) -> TensorStatistics:
    statistics = TensorStatistics(-1)
    for values in samples:
        statistics.add(values.astype(np.float32))
    return statistics


def test_a_range_holds_the_peak_of_the_median_sample():
    """Every sample has one value of 300: by squared error alone it is clipped, where rows are counted it is not."""
    parts = [part.reshape(1, -1, 8) for part in np.tile(_NORMAL, 8).reshape(10, -1)]
    for part in parts:
        part[0, 0, 0] = 300.0
    alone = threshold(seen(np.concatenate([part.reshape(-1) for part in parts])), "mse")
    assert alone < 250
    counted = rows(*parts)
    assert counted.typical_peak == 300
    assert threshold(counted, "mse") == 300


def test_a_peak_of_few_samples_is_still_clipped():
    parts = [part.reshape(1, -1, 4).copy() for part in _NORMAL.reshape(10, -1)]
    parts[3][0, 0, 0] = 100.0
    counted = rows(*parts)
    assert counted.typical_peak == np.median([np.abs(part.astype(np.float32)).max() for part in parts])
    assert counted.typical_peak <= threshold(counted, "mse") < 80


@pytest.mark.parametrize("calibrator", ["percentile", "entropy"])
def test_other_calibrators_do_not_look_at_rows(calibrator):
    values = DATA["student"].reshape(100, 100, 10)
    assert threshold(rows(values), calibrator) == threshold(seen(values), calibrator)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e4])
def test_the_ratio_of_the_median_row(scale):
    """1.1 dB: rows are counted in bins of a quarter of an octave (19 %), of which the middle is taken."""
    values = scale * _NORMAL.reshape(1000, 100) * np.geomspace(1, 1e3, 1000)[:, None]
    limit = float(np.abs(values).max())
    lengths = np.sqrt(np.square(values).mean(axis=1))
    expected = 20 * np.log10(np.median(lengths) / (limit / 127 / np.sqrt(12)))
    assert row_snr(rows(values[None]), limit) == pytest.approx(expected, abs=1.1)
    assert row_snr(rows(values[None]), limit, 254) == pytest.approx(row_snr(rows(values[None]), limit) + 6.02, abs=0.01)


def test_the_ratio_of_rows_where_none_were_counted():
    assert row_snr(seen(DATA["normal"]), 3.0) == np.inf
    assert row_snr(rows(np.ones((1, 3, 4))), 0.0) == np.inf
    images = TensorStatistics(1)
    images.add(np.ones((2, 4, 3, 3), np.float32))
    assert images.typical_row is None
    assert row_snr(images, 1.0) == np.inf


def test_rows_of_zeros_have_no_signal():
    values = np.zeros((1, 9, 4))
    values[0, :2] = 1.0
    assert row_snr(rows(values), 1.0) < -500


# ---- a part of the values -------------------------------------------------------------------------------------------


@st.composite
def samples(draw) -> list[np.ndarray]:
    """A few samples of 60 channels, with tails, zeros, scales and outliers of many kinds."""
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    make = {
        "normal": rng.standard_normal,
        "laplace": lambda shape: rng.laplace(size=shape),
        "student": lambda shape: rng.standard_t(2, shape),
        "levels": lambda shape: rng.integers(-6, 7, shape),
        "wide": lambda shape: 10.0 ** rng.uniform(-30, 3, shape),
    }[draw(st.sampled_from(["normal", "laplace", "student", "levels", "wide"]))]
    channels = np.exp(draw(st.sampled_from([0.0, 1.0, 2.0])) * rng.standard_normal((60, 1)))
    found = []
    for scale in draw(st.lists(st.sampled_from([0.01, 1.0, 1.0, 30.0]), min_size=1, max_size=3)):
        values = scale * channels * make((1, 60, 2501))
        values[0, rng.integers(60), : draw(st.integers(0, 20))] *= draw(st.sampled_from([1.0, 10.0, 1e4]))
        found.append((np.maximum(values, 0) if draw(st.booleans()) else values).astype(np.float32))
    return found


@given(samples())
@settings(max_examples=12, deadline=None, derandomize=True)
def test_ranges_by_a_part_of_the_values_are_those_by_all(found):
    """Percentiles to a bin, the least squared error to 0.05 dB, and the totals to the number of values."""
    part, whole = TensorStatistics(1, 20_000), TensorStatistics(1)
    for values in found:
        part.add(values)
        whole.add(values)
    assert part.total == whole.total
    assert threshold(part, "minmax") == threshold(whole, "minmax")
    for percent in (99.999, 99.99):
        chosen, expected = (threshold(one, "percentile", percentile=percent) for one in (part, whole))
        assert chosen == pytest.approx(expected, rel=1 / 128)
    chosen, expected = (snr(whole, threshold(one, "mse")) for one in (part, whole))
    assert chosen == expected or chosen >= expected - 0.05


@pytest.mark.parametrize("shown", [lambda size: np.zeros(size), lambda size: np.geomspace(1e-30, 1, size)])
def test_what_a_part_misses_is_counted_whole(shown):
    """Every n-th value is small, all others are not."""
    values = np.random.default_rng(0).standard_normal((1, 60, 2501)).astype(np.float32)
    part, whole = TensorStatistics(1, 20_000), TensorStatistics(1)
    every = values.reshape(-1)[:: stride(values.shape, 20_000)]
    every[:] = shown(every.size)
    part.add(values)
    whole.add(values)
    large = LOWER[: len(whole.magnitudes)] > 0.01
    assert np.array_equal(part.magnitudes[large], whole.magnitudes[large])
    assert part.total == whole.total


@pytest.mark.parametrize("name", DATA)
def test_clipped_values_are_counted_to_the_bin(name):
    values = DATA[name]
    statistics = TensorStatistics()
    statistics.add(values)
    assert clipped(statistics, statistics.minimum, statistics.maximum) == 0
    low, high = min(np.quantile(values, 0.01), 0.0), np.quantile(values, 0.95)
    near = [np.mean((values < low * wide) | (values > high * wide)) for wide in (1.01, 0.99)]
    assert near[0] <= clipped(statistics, low, high) <= near[1]
