"""Calibrators: from the histogram of a tensor to the range that 8 bits should cover.

    minmax       T = max|x|
    percentile   T = the smallest magnitude that covers p percent of the values
    mse          T = argmin E[(x - Q_T(x))^2], the rounding inside the range plus the clipping outside; where rows were
                 counted (tokens), no less than what the median sample reaches
    entropy      T = argmin KL(P || Q_T) over 2048 linear bins, the procedure of TensorRT's entropy calibrator
                 (S. Migacz, 8-bit Inference with TensorRT, GTC 2017)

What every other sample reaches is no outlier: transformers keep a few huge activations on purpose, which attention
leans on, and by squared error alone it pays to clip them.

All of them work on the bins of ``histograms``, none looks at the data again.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from channelfold.runtime.stats.histograms import LOWER, WIDTH, TensorStatistics

_MSE_STEPS = 128
_MSE_FLOOR = 1 / 64  # of the largest magnitude: below it no range was ever better


def threshold(statistics: TensorStatistics, calibrator: str, *, percentile: float = 99.999, levels: int = 127) -> float:
    """The largest magnitude to represent, in the tensor's units; 0.0 when nothing but zeros was seen.

    ``percentile`` in (0, 100]; ``levels``: the steps from zero to that magnitude.
    """
    if statistics.amax < LOWER[1]:  # zeros, and denormals that have no bins
        return statistics.amax
    choose: dict[str, Callable[[], float]] = {
        "minmax": lambda: statistics.amax,
        "percentile": lambda: _percentile(statistics, percentile),
        "mse": lambda: _mse(statistics, levels),
        "entropy": lambda: _entropy(statistics, levels),
    }
    return choose[calibrator]()


def snr(statistics: TensorStatistics, limit: float, levels: int = 127) -> float:
    """Signal to quantization noise in dB of a tensor quantized to [-limit, limit]; inf when there is no noise."""
    counts, centers, widths = _occupied(statistics)
    signal = float((counts * centers**2).sum())
    noise = _noise(counts, centers, widths, limit, levels) if limit > 0 else signal
    if noise == 0 or signal == 0:
        return float("inf")
    return float(10 * np.log10(signal / noise))


def row_snr(statistics: TensorStatistics, limit: float, levels: int = 127) -> float:
    """Signal to rounding noise of the median row in dB; inf where no rows were counted.

    One token may hold nearly all the energy of a tensor: then the ratio over the whole tensor is high while every other
    token is rounded to zero.
    """
    if statistics.typical_row is None or limit <= 0:
        return float("inf")
    noise = limit / levels / np.sqrt(12)
    return float(20 * np.log10(max(statistics.typical_row, LOWER[1]) / noise))


def clipped(statistics: TensorStatistics, low: float, high: float) -> float:
    """The share of the values below ``low`` or above ``high``, to the bin; 0.0 when nothing was seen."""
    finite = len(statistics.magnitudes)
    above, below = (counts[:finite] for counts in statistics.counts.reshape(2, -1))
    beyond = int(above[LOWER[:finite] > high].sum() + below[LOWER[:finite] > -low].sum())
    return beyond / statistics.total if beyond else 0.0


def _occupied(statistics: TensorStatistics) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(counts, centers, widths) of the bins that hold values, float64; no center lies beyond the exact maximum."""
    counts = statistics.magnitudes
    (index,) = np.nonzero(counts)
    centers = np.minimum(LOWER[index] + WIDTH[index] / 2, statistics.amax)
    centers[index == 0] = 0.0
    return counts[index].astype(np.float64), centers, WIDTH[index]


def _percentile(statistics: TensorStatistics, percent: float) -> float:
    counts = statistics.magnitudes
    covered = np.cumsum(counts)
    target = percent / 100 * covered[-1]
    index = int(np.searchsorted(covered, target))
    before = covered[index - 1] if index else 0
    inside = (target - before) / counts[index]
    return float(min(LOWER[index] + inside * WIDTH[index], statistics.amax))


def _mse(statistics: TensorStatistics, levels: int) -> float:
    counts, centers, widths = _occupied(statistics)
    limits = statistics.amax * np.geomspace(1.0, _MSE_FLOOR, _MSE_STEPS)
    if statistics.typical_row is not None:
        limits = np.unique(np.maximum(limits, statistics.typical_peak))[::-1]
    noises = [_noise(counts, centers, widths, limit, levels) for limit in limits]
    return float(limits[int(np.argmin(noises))])


def _noise(counts: np.ndarray, centers: np.ndarray, widths: np.ndarray, limit: float, levels: int) -> float:
    """Expected squared error, summed over the values: rounding where a bin spans steps, exact where it does not."""
    step = limit / levels
    clipped = np.minimum(centers, limit)
    rounding = (clipped - np.round(clipped / step) * step) ** 2
    rounding = np.where(widths >= step / 2, step**2 / 12, rounding)
    return float((counts * np.where(centers > limit, (centers - limit) ** 2, rounding)).sum())


def _entropy(statistics: TensorStatistics, levels: int, bins: int = 2048) -> float:
    linear = _linear_histogram(statistics, bins)
    steps = levels + 1
    best, best_divergence = bins, np.inf
    for stop in range(bins, steps - 1, -8):  # from the widest, so that nothing is clipped without a gain
        divergence = _divergence(linear, stop, steps)
        if divergence < best_divergence - 1e-9:
            best, best_divergence = stop, divergence
    return float(statistics.amax * best / bins)


def _linear_histogram(statistics: TensorStatistics, bins: int) -> np.ndarray:
    """The magnitudes over equal bins from 0 to the maximum; a bin of the source is spread evenly over those it spans.

    Exact zeros say nothing about a range and are left out, as TensorRT leaves out the first bin.
    """
    counts = statistics.magnitudes.astype(np.float64)
    counts[0] = 0
    edges = np.append(LOWER[: len(counts)], LOWER[len(counts)])
    last = int(np.flatnonzero(counts)[-1])
    edges[last + 1] = max(statistics.amax, np.nextafter(edges[last], np.inf))
    covered = np.append(0.0, np.cumsum(counts))
    return np.diff(np.interp(np.linspace(0, statistics.amax, bins + 1), edges[: last + 2], covered[: last + 2]))


def _divergence(histogram: np.ndarray, stop: int, steps: int) -> float:
    """KL divergence between the first ``stop`` bins (the clipped tail added to the last) and their quantization."""
    p = histogram[:stop].copy()
    kept = p.copy()
    p[-1] += histogram[stop:].sum()
    group = np.minimum(np.arange(stop) * steps // stop, steps - 1)
    filled = kept > 0
    mass = np.bincount(group, kept, steps)
    members = np.bincount(group, filled, steps)
    q = np.where(filled, (mass / np.maximum(members, 1))[group], 0.0)
    if q.sum() == 0:
        return np.inf
    p, q = p / p.sum(), q / q.sum()
    both = (p > 0) & (q > 0)
    lost = p[(p > 0) & (q == 0)].sum()
    return float((p[both] * np.log(p[both] / q[both])).sum() + lost * 50)
