"""A histogram per tensor whose bins need no range beforehand, and the other statistics that calibrators use.

The bin of a float32 value is its upper 16 bits: sign, exponent and 7 bits of mantissa, so every octave has 128 bins
whatever the range. Only octaves with values take memory, in the narrowest integers that hold their counts. Minimum and
maximum are exact. Every calibrator works on these bins (``calibrators``), so that all of them together take one run.

Of a large sample a part is counted, and all of its largest magnitudes: where a range should end, those few decide.
"""

from __future__ import annotations

import array
import math
from dataclasses import dataclass, field

import numpy as np

from channelfold.runtime.errors import DataError
from channelfold.runtime.stats.exact import ExactSum
from channelfold.runtime.stats.observe import check_width

BINS = 1 << 15  # of magnitudes; with the sign there are twice as many
MASK = 2.0**100  # values at least this large (1.3e30) are attention masks and the like; the edge of a bin
COUNTED = 1 << 20  # values of a tensor, all samples together, that a histogram needs at least
_LEAST = 1 << 13  # values of a tensor in one sample that are counted at least
_TAIL = 1024  # one of so many values of a sample is in the tail, which is counted whole; up to …
_REACH = 20 * 128  # … bins from the largest magnitude
_SINGLY = 1 << 15  # values that are added up one by one in float64
_PIECE = 1 << 16  # values that stay in the cache
_SOME = 1 << 10  # values of which one is zero, if zeros are no exception
_SIGN = 1 << 31
_SUMMABLE = 1e37  # float32 ends at 3e38
_OCTAVE = 128  # bins
_COARSER = 5  # bits of a bin's number that are left out for rows

_INFINITE = 0xFF << 7  # the first bin of infinities and NaN
_EDGES = (np.arange(_INFINITE, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
LOWER = _EDGES[:-1]  # magnitude at the lower edge of each finite bin
WIDTH = np.diff(_EDGES)
_FIRST_MASKED = int(np.flatnonzero(LOWER == MASK)[0])


@dataclass
class Octaves:
    """Counts in ``size`` bins, ``width`` bins an octave. Octaves without counts are not stored."""

    size: int
    width: int
    _seen: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint16))
    _stored: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))

    @property
    def counts(self) -> np.ndarray:
        """All counts, (size,) int64."""
        counts = np.zeros((self.size // self.width, self.width), np.int64)
        counts[self._seen] = self._stored.reshape(-1, self.width)
        return counts.reshape(-1)

    @property
    def nbytes(self) -> int:
        return self._seen.nbytes + self._stored.nbytes

    def add(self, counts: np.ndarray) -> None:
        """Adds up to ``size`` integers."""
        if rest := -len(counts) % self.width:
            counts = np.concatenate([counts, np.zeros(rest, counts.dtype)])
        counts, old = counts.reshape(-1, self.width), self._stored.reshape(-1, self.width)
        (new,) = np.nonzero(np.add.reduce(counts, axis=1))
        if np.array_equal(new, self._seen):
            total = counts[new] + old
        else:
            seen = np.union1d(new, self._seen)
            total = np.zeros((len(seen), self.width), np.int64)
            total[np.searchsorted(seen, new)] = counts[new]
            total[np.searchsorted(seen, self._seen)] += old
            self._seen = seen.astype(np.uint16)
        self._stored = total.astype(np.min_scalar_type(total.max(initial=0)))


@dataclass
class TensorStatistics:
    """Histogram, range and peaks of one tensor; masked values (``MASK``) are left out.

    With a ``channel_axis`` there is the mean of each channel as well, in which masked values count as 0. Where the
    channel axis is the last axis, the root mean square of every row (a token, an embedding) is counted in ``_rows``.

    ``counted``: about how many values of one sample are counted, every n-th where a sample has more, and n times; None:
    all. The few values of the largest magnitudes, by which ranges are chosen, are all counted all the same. Minimum,
    maximum, peaks, masks and means are those of all values, and the bins of minimum and maximum are never empty.

    The histogram of normally distributed values takes less than 40,000 bytes, the sums 32 more for each channel, and
    the peaks 4 for each sample.
    """

    channel_axis: int | None = None
    counted: int | None = None
    minimum: float = np.inf
    maximum: float = -np.inf
    _octaves: Octaves = field(default_factory=lambda: Octaves(2 * BINS, _OCTAVE))
    _rows: Octaves = field(default_factory=lambda: Octaves(BINS >> _COARSER, _OCTAVE >> _COARSER))
    _peaks: array.array = field(default_factory=lambda: array.array("f"))
    _channels: ExactSum = field(default_factory=ExactSum)
    _positions: int = 0

    @property
    def counts(self) -> np.ndarray:
        """int64, first the ``BINS`` of positive values, then those of negative."""
        return self._octaves.counts

    @property
    def peaks(self) -> list[float]:
        """max |x| of each sample, in no particular order."""
        return self._peaks.tolist()

    @property
    def typical_peak(self) -> float:
        """The largest magnitude of the median sample; 0.0 when nothing was seen."""
        return float(np.median(self.peaks)) if self._peaks else 0.0

    @property
    def typical_row(self) -> float | None:
        """The root mean square of the median row (within 12 %); None where no rows were counted."""
        counted = np.cumsum(self._rows.counts)
        if not counted[-1]:
            return None
        index = int(np.searchsorted(counted, counted[-1] / 2)) << _COARSER
        return float(LOWER[index] + LOWER[index + (1 << _COARSER)]) / 2

    @property
    def channel_mean(self) -> np.ndarray | None:
        """Mean of each channel, (channels,) float64; None when no channel axis was asked for or nothing was seen."""
        return self._channels.value / self._positions if self._positions else None

    @property
    def magnitudes(self) -> np.ndarray:
        """Counts by magnitude, masks and infinities left out, (bins,) int64."""
        return self.counts.reshape(2, BINS).sum(axis=0)[:_FIRST_MASKED]

    @property
    def total(self) -> int:
        return int(self.magnitudes.sum())

    @property
    def masked(self) -> int:
        """How many values were left out because their magnitude is ``MASK`` or more."""
        return int(self.counts.reshape(2, BINS)[:, _FIRST_MASKED:].sum())

    @property
    def amax(self) -> float:
        """The largest magnitude, masks left out."""
        return max(abs(self.minimum), abs(self.maximum)) if self.total else 0.0

    def add(self, values: np.ndarray) -> None:
        """Counts the values of one sample, float32. Raises DataError for NaN, and where the channels change."""
        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        if flat.size == 0:
            return
        step = stride(values.shape, self.counted)
        counts, low, high = _estimated(flat, step) if step > 1 else (None, *_range(flat))
        if math.isnan(low) or math.isnan(high):
            raise DataError("it holds NaN")
        if not (low > -MASK and high < MASK):
            masked, counts = np.abs(values) >= MASK, None
            low = float(values.min(initial=np.inf, where=~masked))
            high = float(values.max(initial=-np.inf, where=~masked))
            values = np.where(masked, np.float32(0), values)
        if self.channel_axis is not None:
            self._add_channels(values, self.channel_axis % values.ndim, max(abs(low), abs(high)))
        if high >= low:
            self._peaks.append(max(abs(low), abs(high)))
        self._octaves.add(np.bincount(_bins(flat)) if counts is None else counts)
        self._widen(low, high)

    def merge(self, other: TensorStatistics) -> None:
        self._octaves.add(other._octaves.counts)
        self._rows.add(other._rows.counts)
        self._peaks.extend(other._peaks)
        if self._positions and other._positions:
            check_width(other._channels.size, self.channel_axis or 0, self._channels.size)
        self._channels.merge(other._channels)
        self._positions += other._positions
        self._widen(other.minimum, other.maximum)

    def _widen(self, low: float, high: float) -> None:
        # -0.0 and 0.0 are equal, and the order would decide between them: adding 0.0 makes both 0.0
        self.minimum, self.maximum = min(self.minimum, low) + 0.0, max(self.maximum, high) + 0.0

    def _add_channels(self, values: np.ndarray, axis: int, peak: float) -> None:
        if self._positions:
            check_width(values.shape[axis], self.channel_axis or 0, self._channels.size)
        self._channels.add(_sums(values, axis, peak))
        self._positions += values.size // values.shape[axis]
        if axis == values.ndim - 1:
            rows = values.reshape(-1, values.shape[axis])[:: -(-values.size // (self.counted or values.size))]
            wide = np.float64 if peak * peak * values.shape[axis] > _SUMMABLE else None
            energies = np.einsum("rc,rc->r", rows, rows, dtype=wide)
            found = np.sqrt(energies / values.shape[axis]).astype(np.float32)
            self._rows.add(np.bincount(_bins(found) >> _COARSER))


def counted(samples: int) -> int:
    """How many values of each of some samples are counted, so that ``COUNTED`` of a tensor are."""
    return max(_LEAST, COUNTED // max(1, samples))


def stride(shape: tuple[int, ...], limit: int | None) -> int:
    """The step from one counted value to the next, so that about ``limit`` are counted.

    The step has no factor in common with any size, so that it meets all channels and all rows alike.
    """
    step = max(1, math.prod(shape) // limit) if limit else 1
    while any(math.gcd(step, size) > 1 for size in shape):
        step += 1
    return step


def _bins(values: np.ndarray, step: int = 1) -> np.ndarray:
    """The bins of every n-th float32 value, uint16: the upper half is the second, the machine is little-endian."""
    return values.view(np.uint16)[1 :: 2 * step]


def _estimated(flat: np.ndarray, step: int) -> tuple[np.ndarray | None, float, float]:
    """(counts, minimum, maximum). Counts are those of every n-th value, n times, and in the tail those of all values.

    The tail begins at the edge of a bin that few of the n-th values reach. The counts add up to the number of values,
    and the last bin on each side is that of the end. They are None where every n-th value and all values disagree about
    the share of the tail; an end is NaN where a value is.
    """
    codes = np.ascontiguousarray(_bins(flat, step))
    counts, last = np.bincount(codes), int((codes & (BINS - 1)).max())
    first = min(last, _edge(counts, last, len(flat) // step // _TAIL))
    tail, low, high = _tail(flat, first, len(counts) > BINS)
    if math.isnan(low + high):  # also: both infinities
        return None, low, high
    counts[first:BINS] = counts[BINS + first :] = 0
    most = int(counts.argmax())
    ends, bins = _bins(np.array([low, high], np.float32)), _bins(tail)
    total = np.zeros((max(len(counts), int(ends.max()) + 1) + _OCTAVE - 1) // _OCTAVE * _OCTAVE, np.int64)
    np.multiply(counts, step, out=total[: len(counts)])
    np.add.at(total, bins, 1)
    total[ends] = np.maximum(total[ends], 1)
    lacking = flat.size - int(total.sum())
    total[most] += lacking
    return total if abs(lacking) < counts[most] * step else None, low, high


def _tail(flat: np.ndarray, first: int, signed: bool) -> tuple[np.ndarray, float, float]:
    """(the values in the bin ``first`` of magnitudes and in higher ones, minimum, maximum), one NaN where a value is.

    Where few values are negative, ``signed=False``, all of these are in the tail: seen as uint32 they are above all
    others, as NaN is, in one comparison. Then there is mostly a zero as well, the minimum.
    """
    bits, edge = flat.view(np.uint32), first << 16
    beyond = (flat.view(np.int32) >= edge) | (bits >= edge + _SIGN) if signed else bits >= edge
    tail = flat[np.flatnonzero(beyond)]
    low, high = tail.min(), tail.max()
    if not low < 0:
        low = flat.min() if signed or flat[:_SOME].min() else np.float32(0)
    return tail, float(low), float(high if high > 0 else flat.max())


def _edge(counts: np.ndarray, last: int, few: int) -> int:
    """The first bin of the magnitudes that no more than a few counted values reach, up to ``_REACH`` below the last."""
    below = max(0, last + 1 - _REACH)
    window = counts[below : last + 1].copy()
    negative = counts[BINS + below : BINS + last + 1]
    window[: len(negative)] += negative
    return last + 1 - int(np.searchsorted(np.cumsum(window[::-1]), few, side="right"))


def _range(flat: np.ndarray) -> tuple[float, float]:
    """Minimum and maximum, NaN where there is one, taken of pieces that stay in the cache."""
    pieces = [flat[start : start + _PIECE] for start in range(0, flat.size, _PIECE)]
    ends = np.array([(piece.min(), piece.max()) for piece in pieces])
    return float(ends[:, 0].min()), float(ends[:, 1].max())


def _sums(values: np.ndarray, axis: int, peak: float) -> np.ndarray:
    """The sum of each channel, (channels,) float64: of large tensors from sums of up to 128 values in float32."""
    if values.size <= _SINGLY or peak * values.size > _SUMMABLE:
        return values.sum(axis=tuple(i for i in range(values.ndim) if i != axis), dtype=np.float64)
    inner = math.prod(values.shape[axis + 1 :])
    if inner > 1:  # NumPy adds up neighbours in pairs, after 128 in a row
        return values.reshape(-1, values.shape[axis], inner).sum(axis=2).sum(axis=0, dtype=np.float64)
    rows = values.reshape(-1, values.shape[axis])
    return sum((rows[i : i + 128].sum(axis=0).astype(np.float64) for i in range(0, len(rows), 128)), start=np.zeros(()))
