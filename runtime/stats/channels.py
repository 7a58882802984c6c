"""Statistics of the channels of a tensor along one axis; all vectors are (channels,) float64.

``ChannelMoments``: mean, variance and root mean square. ``ChannelStatistics``, for scaling by channel: means of
magnitudes and of ranges, and a bounded sample of rows, on which the error of a layer can be measured. The sampled rows
depend on the values of the samples, not on the order of the samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from channelfold.runtime.stats.exact import ExactSum
from channelfold.runtime.stats.observe import check_finite, check_width

_HASHED = 64  # values of a row that its key is made of


@dataclass
class _Channels:
    """The range of each channel along ``axis``, over ``positions`` in ``samples`` samples."""

    axis: int
    minimum: np.ndarray | float = field(default=np.inf, init=False)
    maximum: np.ndarray | float = field(default=-np.inf, init=False)
    positions: int = field(default=0, init=False)
    samples: int = field(default=0, init=False)
    _sums: ExactSum = field(default_factory=ExactSum, init=False)

    @property
    def amax(self) -> np.ndarray:
        """The largest magnitude of each channel."""
        return np.maximum(np.abs(self.minimum), np.abs(self.maximum))

    def add(self, values: np.ndarray) -> None:
        """Takes up one sample, float32. Raises DataError for NaN and infinities, and where the channels change."""
        if values.size == 0:
            return
        flat = np.moveaxis(values, self.axis, -1).reshape(-1, values.shape[self.axis])
        low, high = flat.min(axis=0).astype(np.float64), flat.max(axis=0).astype(np.float64)
        check_finite(np.stack([low, high]))
        self._widen(low, high, len(flat), 1)
        self._sums.add(np.stack(self._terms(flat, low, high)))

    def merge(self, other: Self) -> None:
        if other.positions:
            self._widen(np.asarray(other.minimum), np.asarray(other.maximum), other.positions, other.samples)
            self._sums.merge(other._sums)

    def _widen(self, low: np.ndarray, high: np.ndarray, positions: int, samples: int) -> None:
        if self.positions:
            check_width(low.size, self.axis, np.size(self.minimum))
        # -0.0 and 0.0 are equal, and the order would decide between them: adding 0.0 makes both 0.0
        self.minimum, self.maximum = np.minimum(self.minimum, low) + 0.0, np.maximum(self.maximum, high) + 0.0
        self.positions += positions
        self.samples += samples

    def _terms(self, flat: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, ...]:
        """What a sample, (n, channels), adds to the sums, given the range of its channels."""
        raise NotImplementedError


@dataclass
class ChannelMoments(_Channels):
    """Mean, variance and root mean square of each channel, beside its range."""

    @property
    def mean(self) -> np.ndarray:
        return self._sums.value[0] / self.positions

    @property
    def variance(self) -> np.ndarray:
        return np.maximum(self._sums.value[1] / self.positions - np.square(self.mean), 0.0)

    @property
    def rms(self) -> np.ndarray:
        return np.sqrt(self._sums.value[1] / self.positions)

    def _terms(self, flat: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, ...]:
        return flat.sum(axis=0, dtype=np.float64), np.einsum("rc,rc->c", flat, flat, dtype=np.float64)


@dataclass
class ChannelStatistics(_Channels):
    """Mean magnitude and middle of each channel, beside its range.

    ``rows``: the number of positions that ``sample`` keeps, 0 or at least 8.
    """

    rows: int = 0
    _largest: _Kept = field(init=False)
    _random: _Kept = field(init=False)

    def __post_init__(self) -> None:
        self._largest, self._random = _Kept(self.rows // 8), _Kept(self.rows - self.rows // 8)

    @property
    def absolute_mean(self) -> np.ndarray:
        """E|x| of each channel."""
        return self._sums.value[0] / self.positions

    @property
    def middle(self) -> np.ndarray:
        """(minimum + maximum) / 2 of each channel in each sample, averaged over the samples."""
        return self._sums.value[1] / self.samples

    def sample(self) -> tuple[np.ndarray, np.ndarray]:
        """(rows (n, channels) float32, weights (n,)): a sample of all positions. A row stands for ``weight`` positions.

        An eighth of the rows are the positions with the largest magnitudes, each with weight 1: a few tokens with huge
        values decide what a range costs, and a random sample would miss these tokens. The other rows are random.
        """
        taken = len(self._largest.keys)
        others = ~np.isin(self._random.keys, self._largest.keys)
        rest = self.positions - taken
        weights = np.concatenate([np.ones(taken), np.full(others.sum(), rest / max(1, others.sum()))])
        return np.concatenate([self._largest.rows, self._random.rows[others]]), weights

    def merge(self, other: Self) -> None:
        super().merge(other)
        self._largest.merge(other._largest)
        self._random.merge(other._random)

    def _terms(self, flat: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, ...]:
        magnitudes = np.abs(flat)
        if self.rows:
            keys = _keys(flat)
            self._largest.add(flat, keys, -magnitudes.max(axis=1))
            self._random.add(flat, keys, keys)
        return magnitudes.sum(axis=0, dtype=np.float64), (low + high) / 2


def outlier_ratio(amax: np.ndarray) -> float | None:
    """The largest of the magnitudes of channels, (channels,), against the median one; None where all are zero."""
    largest, median = float(amax.max(initial=0.0)), float(np.median(amax))
    return largest / median if median > 0 else math.inf if largest > 0 else None


@dataclass
class _Kept:
    """The ``limit`` rows of lowest rank so far. ``keys`` order the rows of equal rank."""

    limit: int
    rows: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.float32))
    keys: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    ranks: np.ndarray = field(default_factory=lambda: np.empty(0))

    def merge(self, other: _Kept) -> None:
        self.add(other.rows, other.keys, other.ranks)

    def add(self, rows: np.ndarray, keys: np.ndarray, ranks: np.ndarray) -> None:
        if len(keys) and len(self.keys) == self.limit:
            better = ranks <= self.ranks[-1]  # of those that are as good, the keys decide
            rows, keys, ranks = rows[better], keys[better], ranks[better]
        if not len(keys):
            return
        if not len(self.keys):
            self.rows, self.ranks = np.empty((0, rows.shape[1]), rows.dtype), ranks[:0]
        rows = np.concatenate([self.rows, rows])
        keys, ranks = np.concatenate([self.keys, keys]), np.concatenate([self.ranks, ranks])
        order, bits = np.lexsort((keys, ranks)), rows.view(np.uint32)
        (tied,) = np.nonzero((np.diff(keys[order]) == 0) & (np.diff(ranks[order]) == 0))
        if (bits[order[tied]] != bits[order[tied + 1]]).any():  # keys know a part of a row only: here all of it decides
            order = np.lexsort((*bits.T, keys, ranks))
        order = order[: self.limit]
        self.rows, self.keys, self.ranks = rows[order], keys[order], ranks[order]


def _keys(rows: np.ndarray) -> np.ndarray:
    """A pseudo-random number for each row, (n,) uint64, hashed from some of its values, its place and its sample."""
    some = np.ascontiguousarray(rows[:, :: -(-rows.shape[1] // _HASHED)], np.float32)
    bits = some.view(np.uint32).astype(np.uint64)
    factors = np.random.default_rng(0).integers(1 << 63, size=bits.shape[1], dtype=np.uint64) | np.uint64(1)
    keys = _mixed(bits @ factors)
    return _mixed(keys + keys.sum() + np.arange(len(keys), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def _mixed(keys: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: every bit of the result depends on every bit of the key."""
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))
