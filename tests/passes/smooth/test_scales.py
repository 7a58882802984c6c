"""The formulas of the methods: by hand, and by what each of them promises."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from channelfold.passes.channels.rescale import clamped
from channelfold.passes.smooth import scales
from channelfold.passes.smooth.scales import ClassStatistics
from channelfold.tests.graphs import random


def seen(low, high, *, mean=None, middle=None, columns=None, free=None, shiftable=None) -> ClassStatistics:
    low, high = np.asarray(low, float), np.asarray(high, float)
    ones = np.ones(low.shape)
    return ClassStatistics(
        low,
        high,
        np.asarray(mean if mean is not None else np.maximum(-low, high) / 2, float),
        np.asarray(middle if middle is not None else (low + high) / 2, float),
        np.asarray(columns if columns is not None else ones, float),
        np.asarray(free if free is not None else ones, bool),
        np.asarray(shiftable if shiftable is not None else ones, bool),
    )


def measured(values: np.ndarray, **options) -> ClassStatistics:
    """What calibration sees of values (samples, rows, channels)."""
    low, high = values.min(axis=(0, 1)), values.max(axis=(0, 1))
    middle = (values.min(axis=1) + values.max(axis=1)).mean(axis=0) / 2
    return seen(low, high, mean=np.abs(values).mean(axis=(0, 1)), middle=middle, **options)


def quantized(values: np.ndarray, step: float | np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values / step), -127, 127) * step


METHODS: dict[str, Callable[[ClassStatistics], tuple[np.ndarray, np.ndarray]]] = {
    "smoothquant": lambda s: (scales.smoothquant(s, 0.5), np.zeros(s.minimum.size)),
    "smoothquant 0": lambda s: (scales.smoothquant(s, 0.0), np.zeros(s.minimum.size)),
    "smoothquant 1": lambda s: (scales.smoothquant(s, 1.0), np.zeros(s.minimum.size)),
    "os-plus": lambda s: (scales.os_plus(s, 1.0, s.center), s.center),
    "awq": lambda s: (scales.awq(s, 0.5), np.zeros(s.minimum.size)),
    "repq mean": lambda s: scales.repq(s, "mean", True),
    "repq median": lambda s: scales.repq(s, "median", True),
    "repq clipped": lambda s: scales.repq(s, "clipped", True),
    "repq unshifted": lambda s: scales.repq(s, "mean", False),
    "outliertune": lambda s: (scales.outliertune(s, s.middle), s.middle),
    "fp4-shift": lambda s: (scales.fp4_shift(s), np.zeros(s.minimum.size)),
}


# ---- SmoothQuant ---------------------------------------------------------------------------------------------------


def test_smoothquant_by_hand():
    """A = (16, 4, 1), max|W| = (1, 4, 0.25): A^.5 / W^.5 = (4, 1, 2), divided by the geometric mean 2."""
    found = scales.smoothquant(seen([-16, 0, -1], [2, 4, 0.5], columns=[1, 4, 0.25]), 0.5)
    assert found == pytest.approx([2, 0.5, 1], rel=1e-15)


def test_the_extremes_of_alpha():
    channels = seen([-16, -1, -4], [2, 4, 1], columns=[1, 5, 0.25])
    weights, ranges = np.array([1, 5, 0.25]), np.array([16, 4, 4])
    assert scales.smoothquant(channels, 0.0) == pytest.approx(np.prod(weights) ** (1 / 3) / weights, rel=1e-14)
    assert scales.smoothquant(channels, 1.0) == pytest.approx(ranges / np.prod(ranges) ** (1 / 3), rel=1e-14)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.85, 1.0])
def test_smoothquant_splits_the_range(alpha):
    """A / s is the same power of A W everywhere, and so is W s."""
    a, w = np.exp(random(50, "a")), np.exp(random(50, "w"))
    found = scales.smoothquant(seen(-a, a / 2, columns=w), alpha)
    assert np.ptp(np.log(a / found) - (1 - alpha) * np.log(a * w)) < 1e-12
    assert np.ptp(np.log(w * found) - alpha * np.log(a * w)) < 1e-12
    assert np.log(found).mean() == pytest.approx(0, abs=1e-12)


def test_weights_of_a_channel_that_are_all_zero_count_as_small_not_as_none():
    found = scales.smoothquant(seen([-1, -1], [1, 1], columns=[0, 1]), 0.5)
    assert found[0] / found[1] == pytest.approx(1e-5**-0.5)


# ---- Outlier Suppression+ ------------------------------------------------------------------------------------------


def test_os_plus_by_hand():
    channels = seen([-8, -1, -3], [2, 1, 4])
    assert scales.os_plus(channels, 2.0).tolist() == [4, 1, 2]
    assert scales.os_plus(channels, 8.0).tolist() == [1, 1, 1]
    assert scales.os_plus(channels, 2.0, channels.center).tolist() == [2.5, 1, 1.75]


def test_a_channel_from_80_to_100_loses_most_of_its_range_by_the_shift_alone():
    channels = measured(np.linspace(80, 100, 50).reshape(5, 10, 1))
    assert channels.center.tolist() == [90]
    assert 1 - channels.amax(channels.center) / channels.amax() >= 0.8
    assert channels.amax(channels.center).tolist() == [10]


# ---- AWQ -----------------------------------------------------------------------------------------------------------


def test_awq_by_hand():
    channels = seen([-1] * 3, [1] * 3, mean=[0.25, 4, 1])
    assert scales.awq(channels, 0.0).tolist() == [1, 1, 1]
    assert scales.awq(channels, 0.5) == pytest.approx([0.5, 2, 1], rel=1e-14)
    assert scales.awq(channels, 1.0) == pytest.approx([0.25, 4, 1], rel=1e-14)


# ---- RepQ ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aim", ["mean", "median", "clipped"])
def test_the_codes_are_those_of_a_quantizer_by_channel(aim):
    """One common step and the zero point 128 give every value the code it has with the step and zero point of its own.

    Values lie on quarters of steps, never halfway between codes, so rounding in float64 cannot decide.
    """
    count = 24
    step = np.exp(2 * random(count, "step"))
    zero_point = np.random.default_rng(0).integers(0, 256, count)
    codes = np.random.default_rng(1).uniform(0, 255, (2000, count)).round(0)
    codes[0], codes[1] = 0, 255
    fraction = np.random.default_rng(2).choice([-0.25, 0, 0.25], codes.shape)
    fraction[:2] = 0
    values = (np.clip(codes + fraction, 0, 255) - zero_point) * step
    scale, shift = scales.repq(measured(values[None]), aim, True)
    own = np.clip(np.rint(values / step) + zero_point, 0, 255)
    common = float(np.ptp((values - shift) / scale, axis=0).max() / 255)
    moved = np.clip(np.rint((values - shift) / scale / common) + 128, 0, 255)
    np.testing.assert_array_equal(moved, own)


def test_repq_by_hand():
    """Steps 1 and 3, zero points 55 and 0: shifts (128 - 55) 1 and 128 * 3, aims 2."""
    channels = seen([-55, 0], [200, 765])
    scale, shift = scales.repq(channels, "mean", True)
    assert scale.tolist() == [0.5, 1.5]
    assert shift.tolist() == [73, 384]
    scale, shift = scales.repq(channels, "mean", False)
    assert scale == pytest.approx([2 * 200 / 965, 2 * 765 / 965])
    assert shift.tolist() == [0, 0]


def test_aims():
    """Steps 1 .. 99 and one of 10,000: the mean follows it, the median does not, nor does the clipped mean much."""
    steps = np.append(np.arange(1.0, 100), 1e4)
    channels = seen(-127 * steps, 127 * steps, shiftable=np.zeros(100))
    common = {aim: float((steps / scales.repq(channels, aim, True)[0]).mean()) for aim in ("mean", "median", "clipped")}
    assert common["mean"] == pytest.approx(steps.mean())
    assert common["median"] == pytest.approx(50.5)
    low, high = np.percentile(steps, (1, 99))
    assert common["clipped"] == pytest.approx(np.clip(steps, low, high).mean())
    assert common["median"] < common["clipped"] < common["mean"]


def test_the_aim_is_a_factor_of_all_channels_that_costs_the_weights_nothing():
    """Rows of W diag(s) rounded to 8 bits lose as much with every aim, even where 1 % of the channels are x100."""
    ranges = 1 + 0.2 * np.abs(random(200, "r"))
    ranges[:2] *= 100
    weight = random((64, 200), "w")

    def loss(aim) -> float:
        scale, _ = scales.repq(seen(-ranges, ranges), aim, False)
        moved = weight * scale
        step = np.abs(moved).max(axis=1, keepdims=True) / 127
        common = (ranges / scale).max()
        return float(np.square((np.rint(moved / step) * step - moved) * common).sum())

    assert [loss("median"), loss("clipped")] == pytest.approx([loss("mean")] * 2, rel=1e-9)


# ---- OutlierTune ---------------------------------------------------------------------------------------------------


def test_outliertune_rounds_every_channel_by_its_own_step():
    """One channel x40 in 8 bits: what is left is the error of a quantizer by channel, a fifth of that by tensor."""
    values = random((4, 500, 64), "x")
    values[..., 7] *= 40
    weight = random((32, 64), "w") / 8
    channels = measured(values, columns=np.abs(weight).max(axis=0))
    scale = scales.outliertune(channels, channels.middle)
    moved = (values - channels.middle) / scale
    assert np.abs(moved).max(axis=(0, 1)) == pytest.approx(np.full(64, np.abs(moved).max()), rel=1e-12)
    rounded = quantized(moved, np.abs(moved).max() / 127)
    own = quantized(values - channels.middle, channels.amax(channels.middle) / 127)
    np.testing.assert_allclose(rounded * scale, own, atol=1e-9)

    def loss(found: np.ndarray) -> float:
        return float(np.sqrt(np.square((found - values) @ weight.T).mean()))

    by_tensor = quantized(values, channels.amax().max() / 127)
    assert loss(rounded * scale + channels.middle) < loss(by_tensor) / 5


# ---- LLM-FP4 -------------------------------------------------------------------------------------------------------


def test_fp4_scales_are_powers_of_two_of_four_exponents():
    amax = 2 ** np.random.default_rng(0).uniform(-5, 0, 500)
    k = -np.log2(scales.fp4_shift(seen(-amax, amax)))
    assert set(np.unique(k)) == {0, 1, 2, 3}
    order = np.argsort(amax)
    assert (np.diff(k[order]) >= 0).all() or (np.diff(k[order]) <= 0).all()
    assert k[order[0]] == 3
    assert k[order[-1]] == 0


def test_fp4_by_hand():
    """Octaves below the largest range: 0, 1, 2, 3, and what is further down has 3, too."""
    k = -np.log2(scales.fp4_shift(seen([-8, -4, -2, -1, -0.1], [1] * 4 + [0.1])))
    assert k.tolist() == [0, 1, 2, 3, 3]


@pytest.mark.parametrize(("exponent", "mantissa"), [(2, 1), (1, 2), (3, 0)])
def test_folding_powers_of_two_is_exact_to_the_bit(exponent, mantissa):
    """In float32: scaled and scaled back, and the product of both, term by term."""
    values = random((50, 30), "x").astype(np.float32) * np.exp(random(30, "e")).astype(np.float32)
    weight = random((20, 30), "w").astype(np.float32)
    amax = np.abs(values).max(axis=0).astype(float)
    scale = scales.fp4_shift(seen(-amax, amax), exponent, mantissa)
    assert scale.min() >= 2.0 ** -(2**exponent - 1)
    scale = scale.astype(np.float32)
    np.testing.assert_array_equal((values / scale)[:, None] * (weight * scale), values[:, None] * weight)


# ---- channels that ask for nothing, or for the impossible ----------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_dead_channel_keeps_its_scale(method):
    scale, shift = METHODS[method](seen([-4, 0, -2, 0], [1, 0, 6, 0]))
    assert (scale[[1, 3]].tolist(), shift[[1, 3]].tolist()) == ([1, 1], [0, 0])
    assert np.isfinite(scale).all()
    assert (scale > 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_nothing_but_dead_channels(method):
    scale, shift = METHODS[method](seen(np.zeros(3), np.zeros(3), columns=np.zeros(3)))
    assert (scale.tolist(), shift.tolist()) == ([1, 1, 1], [0, 0, 0])


@pytest.mark.parametrize("method", ["os-plus", "repq mean", "repq median", "repq clipped", "outliertune"])
def test_a_constant_channel_is_shifted_to_zero(method):
    scale, shift = METHODS[method](seen([-4, 5, -2], [1, 5, 6]))
    assert (scale[1], shift[1]) == (1, 5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tiny", [1e-45, 1e-30, 1e-8])
def test_a_channel_that_is_nearly_dead_stays_in_bounds(method, tiny):
    channels = seen([-4, -tiny, -2], [1, tiny, 6])
    scale, shift = METHODS[method](channels)
    bounded = clamped(scale, channels.free)
    assert (bounded >= 1e-5).all()
    assert (bounded <= 1e5).all()
    assert np.isfinite(shift).all()
    assert 1e-3 < bounded[0] / bounded[2] < 1e3


@pytest.mark.parametrize("method", METHODS)
def test_pinned_channels_keep_scale_and_shift(method):
    free = np.array([1, 0, 1, 0], bool)
    channels = seen([-400, -4, -2, 1], [1, 1, 6, 9], free=free, shiftable=free)
    scale, shift = METHODS[method](channels)
    assert scale[~free].tolist() == [1, 1]
    assert "repq" not in method or shift[~free].tolist() == [0, 0]  # the others are given theirs
    alone, _ = METHODS[method](seen([-400, -2], [1, 6]))
    assert scale[free] == pytest.approx(alone, rel=1e-12)  # what is pinned does not count


@pytest.mark.parametrize("method", METHODS)
def test_no_free_channel_at_all(method):
    scale, _ = METHODS[method](seen([-4, -1], [1, 8], free=[0, 0], shiftable=[0, 0]))
    assert scale.tolist() == [1, 1]


def test_a_channel_that_cannot_be_shifted_has_a_symmetric_range():
    scale, shift = scales.repq(seen([-1, 0], [3, 3], shiftable=[1, 0]), "mean", True)
    assert shift[1] == 0
    assert scale[1] / scale[0] == pytest.approx((3 / 127) / (4 / 255))


@pytest.mark.parametrize("method", METHODS)
def test_the_unit_of_the_activation_does_not_matter_to_ratios(method):
    """But for a limit, which is one of the activation."""
    low, high = -np.exp(random(9, "l")), np.exp(random(9, "h"))
    if method == "os-plus":
        assert scales.os_plus(seen(8 * low, 8 * high), 8.0).tolist() == scales.os_plus(seen(low, high), 1.0).tolist()
        return
    one, other = METHODS[method](seen(low, high))[0], METHODS[method](seen(8 * low, 8 * high))[0]
    assert one / one[0] == pytest.approx(other / other[0], rel=1e-12)
