"""The formulas by which the methods of ``smooth`` scale and shift each class of channels.

    x' = (x - z) / s;   A = max |x - z|, W: the columns that read x; the geometric mean of s is 1

    smoothquant   s = A^alpha / max|W|^(1 - alpha)            Xiao et al., SmoothQuant, ICML 2023
    os-plus       s = max(1, A / t),  z = (max + min) / 2     Wei et al., Outlier Suppression+, EMNLP 2023
    awq           s = E|x|^ratio                              Lin et al., AWQ, MLSys 2024
    repq          s = r / r~,  z = (z~ - z_j) r               Li et al., RepQ-ViT, ICCV 2023; r = (max - min) / 255,
                                                              z_j = -min / r; r~ mean, median (DopQ-ViT) or mean of the
                                                              clipped r (LRP-QViT), z~ an integer
    outliertune   s = A,  z = mean of (max + min) / 2         Wang et al., OutlierTune, 2024; MergeQuant without z
    fp4-shift     s = 2^-k,  k = rint(b) - rint(min b)        Liu et al., LLM-FP4, EMNLP 2023

A channel that is always zero, or constant and shifted to zero, has s = 1 in all methods.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from channelfold.passes.smooth import Aim

_FAINT = 1e-3  # the least scale relative to the median, because channels that calibration hardly saw may grow later


@dataclass(frozen=True)
class ClassStatistics:
    """The calibration statistics of each class of channels; vectors (classes,) float64.

    ``middle`` is the mean of (minimum + maximum) / 2 of each sample. ``columns`` holds the largest magnitude of the
    weights that read the class. ``free`` classes may be scaled, and ``shiftable`` classes may be shifted.
    """

    minimum: np.ndarray
    maximum: np.ndarray
    absolute_mean: np.ndarray
    middle: np.ndarray
    columns: np.ndarray
    free: np.ndarray
    shiftable: np.ndarray

    def amax(self, shift: np.ndarray | float = 0.0) -> np.ndarray:
        """max |x - shift| of each class."""
        return np.maximum(np.abs(self.minimum - shift), np.abs(self.maximum - shift))

    @property
    def center(self) -> np.ndarray:
        return (self.minimum + self.maximum) / 2

    def normalized(self, scale: np.ndarray) -> np.ndarray:
        """A scale with a geometric mean of 1 over the free classes that are not dead; all other classes get 1."""
        usable = self.free & np.isfinite(scale) & (scale > 0)
        if not usable.any():
            return np.ones_like(scale)
        lowest = np.median(scale[usable]) * _FAINT
        logs = np.log(np.maximum(np.where(usable, scale, 1.0), lowest))
        return np.where(usable, np.exp(logs - logs[usable].mean()), 1.0)


def smoothquant(seen: ClassStatistics, alpha: float) -> np.ndarray:
    """A^alpha / max|W|^(1 - alpha). With alpha 0 the activations keep their ranges, with 1 the weights take them."""
    amax = seen.amax()
    columns = np.maximum(seen.columns, 1e-5)
    return seen.normalized(np.where(amax > 0, np.maximum(amax**alpha / columns ** (1 - alpha), 1e-5), 0.0))


def os_plus(seen: ClassStatistics, limit: float, shift: np.ndarray | float = 0.0) -> np.ndarray:
    """Shrinks the channels that exceed [-limit, limit] to this range; all other channels get 1."""
    return np.where(seen.free, np.maximum(1.0, seen.amax(shift) / limit), 1.0)


def awq(seen: ClassStatistics, ratio: float) -> np.ndarray:
    return seen.normalized(np.maximum(seen.absolute_mean**ratio, 1e-4) * (seen.absolute_mean > 0))


def repq(seen: ClassStatistics, aim: Aim, shifted: bool) -> tuple[np.ndarray, np.ndarray]:
    """(scale, shift) that give all channels one range. For symmetric int8 the common zero point is the middle, 128.

    A channel without a shift has a symmetric range, r = max|x| / 127.
    """
    moves = seen.shiftable & shifted
    step = np.where(moves, (seen.maximum - seen.minimum) / 255, seen.amax() / 127)
    zero_point = np.rint(np.divide(-seen.minimum, step, out=np.zeros_like(step), where=step > 0))
    shift = np.where(step > 0, (128 - zero_point) * step, seen.center)
    return _to_common(seen, step, aim), np.where(moves, shift, 0.0)


def _to_common(seen: ClassStatistics, step: np.ndarray, aim: Aim) -> np.ndarray:
    """step / step~, 1 for classes that are not free."""
    usable = seen.free & (step > 0)
    if not usable.any():
        return np.ones_like(step)
    steps = step[usable]
    if aim == "clipped":
        steps = np.clip(steps, *np.percentile(steps, (1, 99)))
    common = np.median(steps) if aim == "median" else steps.mean()
    return np.where(usable, np.maximum(np.where(usable, step, 1.0) / common, _FAINT), 1.0)


def outliertune(seen: ClassStatistics, shift: np.ndarray | float) -> np.ndarray:
    """Every channel is scaled by its own range: the weights carry one step for each channel."""
    return seen.normalized(seen.amax(shift))


def fp4_shift(seen: ClassStatistics, exponent_bits: int = 2, mantissa_bits: int = 1) -> np.ndarray:
    """Powers of two that give all channels a common exponent bias, at most 2^exponent_bits - 1 apart."""
    amax = seen.amax()
    usable = seen.free & (amax > 0)
    if not usable.any():
        return np.ones_like(amax)
    span = 2**exponent_bits
    bias = span - np.log2(np.where(usable, amax, 1.0)) + np.log2(2 - 2.0**-mantissa_bits) - 1
    lowest = np.rint(bias[usable].min())
    shift = np.clip(np.rint(bias), lowest, lowest + span - 1) - lowest
    return np.where(usable, 2.0**-shift, 1.0)
