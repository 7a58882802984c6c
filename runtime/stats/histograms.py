"""A histogram per tensor whose bins need no range beforehand, and the other statistics that calibrators use.

The bin of a float32 value is its upper 16 bits: sign, exponent and 7 bits of mantissa, so every octave has 128 bins
whatever the range. Only octaves with values take memory, in the narrowest integers that hold their counts. Minimum and
maximum are exact. Every calibrator works on these bins (``calibrators``), so that all of them together take one run.
"""

from __future__ import annotations

import array
from dataclasses import dataclass, field

import numpy as np

from channelfold.runtime.errors import DataError
from channelfold.runtime.stats.exact import ExactSum
from channelfold.runtime.stats.observe import check_width

BINS = 1 << 15  # of magnitudes; with the sign there are twice as many
MASK = 2.0**100  # values at least this large (1.3e30) are attention masks and the like; the edge of a bin
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
        """Adds (size,) integers."""
        octaves = counts.reshape(-1, self.width)
        seen = np.union1d(np.flatnonzero(octaves.any(axis=1)), self._seen)
        total = octaves[seen]
        total[np.searchsorted(seen, self._seen)] += self._stored.reshape(-1, self.width).astype(np.int64)
        self._seen = seen.astype(np.uint16)
        self._stored = total.astype(np.min_scalar_type(total.max(initial=0)))


@dataclass
class TensorStatistics:
    """Histogram, range and peaks of one tensor; masked values (``MASK``) are left out.

    With a ``channel_axis`` there is the mean of each channel as well, in which masked values count as 0. Where the
    channel axis is the last axis, the root mean square of every row (a token, an embedding) is counted in ``_rows``.

    The histogram of normally distributed values takes less than 40,000 bytes, the sums 32 more for each channel, and
    the peaks 4 for each sample.
    """

    channel_axis: int | None = None
    minimum: float = np.inf
    maximum: float = -np.inf
    _octaves: Octaves = field(default_factory=lambda: Octaves(2 * BINS, 128))
    _rows: Octaves = field(default_factory=lambda: Octaves(BINS >> _COARSER, 128 >> _COARSER))
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
        """Counts the values of one sample, float32. Raises DataError for NaN, and where the channels are not as before.

        The upper half of a value is the second of its two uint16: ONNX Runtime runs on little-endian machines only.
        """
        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        if flat.size == 0:
            return
        low, high = float(flat.min()), float(flat.max())
        if np.isnan(low):
            raise DataError("it holds NaN")
        if not (low > -MASK and high < MASK):
            masked = np.abs(values) >= MASK
            low = float(values.min(initial=np.inf, where=~masked))
            high = float(values.max(initial=-np.inf, where=~masked))
            values = np.where(masked, np.float32(0), values)
        if self.channel_axis is not None:
            self._add_channels(values, self.channel_axis % values.ndim)
        if high >= low:
            self._peaks.append(max(abs(low), abs(high)))
        self._octaves.add(np.bincount(flat.view(np.uint16)[1::2], minlength=2 * BINS))
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

    def _add_channels(self, values: np.ndarray, axis: int) -> None:
        if self._positions:
            check_width(values.shape[axis], self.channel_axis or 0, self._channels.size)
        others = tuple(i for i in range(values.ndim) if i != axis)
        self._channels.add(values.sum(axis=others, dtype=np.float64))
        self._positions += values.size // values.shape[axis]
        if axis == values.ndim - 1:
            energies = np.einsum("...c,...c->...", values, values, dtype=np.float64)  # in float32, 1e19 overflows
            rows = np.sqrt(energies / values.shape[axis]).astype(np.float32).reshape(-1)
            self._rows.add(np.bincount(rows.view(np.uint16)[1::2] >> _COARSER, minlength=self._rows.size))
