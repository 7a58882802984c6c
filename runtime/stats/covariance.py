"""Means and covariances of the channels of tensors, alone or side by side, in one streaming run.

    z = [x; h; …]          the channels of one or several tensors at one position (a token, a pixel)
    mean = E[z]            covariance = E[(z - mean) (z - mean)^T]

Least squares between channels need no more: they express a removed channel as an affine function of the kept channels,
or of the input of the layer. For a convolution the channels at its input suffice, because a relation that holds at
every position holds at every place of the kernel.

Rows are shifted by the mean of the first chunk and multiplied in float64, ``CHUNK`` rows at a time, across the borders
of samples. So the batching of samples changes nothing; their order, and a merge, change the last digits.
Sums that are exact would have each row split into two integers of 21 bits: the products then take 4.2 times as long
and three times the memory, which is more than the last digits are worth. A feature map may have more positions than an
estimate needs: of every entry along the first axis (an image, a sentence) at most ``limit`` are taken.

A Moments of n channels holds two matrices of n^2 float64 and the chunk (``bytes_of``). ``collect`` observes as many at
a time as fit into ``limit`` bytes, by default half of the memory that is free: one run where all of them fit, and else
the data run again for the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.runtime.data.sources import Data
from channelfold.runtime.errors import DataError, no_progress
from channelfold.runtime.io import limits
from channelfold.runtime.stats.observe import Joint, by_name, check_width, observe, within

CHUNK = 1024  # rows multiplied at once
POSITIONS = 4096  # of one entry along the first axis that are taken
LIMIT = 2 << 30  # bytes of moments held at a time, and more where there is more memory
_PANEL = 512  # rows of a sum of products that are made at once


@dataclass
class Moments(Joint):
    """Joint moments of the tensors named in ``axes``, concatenated in that order."""

    limit: int | None = POSITIONS
    _counted: int = field(default=0, init=False)
    _chunk: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.float32), init=False)
    _filled: int = field(default=0, init=False)
    _shift: np.ndarray | None = field(default=None, init=False)
    _sum: np.ndarray | float = field(default=0.0, init=False)
    _products: np.ndarray | float = field(default=0.0, init=False)

    @property
    def count(self) -> int:
        """The number of positions seen."""
        return self._counted + self._filled

    @property
    def places(self) -> dict[str, slice]:
        """Where the channels of each tensor lie in the vector z. Raises DataError where nothing was seen."""
        self._flush()
        stops = np.cumsum([self.widths[name] for name in self.axes])
        return {
            name: slice(int(stop) - self.widths[name], int(stop)) for name, stop in zip(self.axes, stops, strict=True)
        }

    @property
    def mean(self) -> np.ndarray:
        """E[z], (channels,) float64. Raises DataError where nothing was seen."""
        self._flush()
        return np.asarray(self._shift) + np.asarray(self._sum) / self.count

    @property
    def covariance(self) -> np.ndarray:
        """The covariance of z, (channels, channels) float64, symmetric. Raises DataError where nothing was seen."""
        self._flush()
        mean = np.asarray(self._sum) / self.count
        return self._products / self.count - np.outer(mean, mean)

    def add(self, parts: list[np.ndarray]) -> None:
        """Copies rows into the chunk, and multiplies it whenever it is full."""
        if not self._chunk.size:
            self._chunk = np.empty((CHUNK, sum(part.shape[1] for part in parts)), np.float32)
        done, total = 0, len(parts[0])
        while done < total:
            number = min(CHUNK - self._filled, total - done)
            place = self._chunk[self._filled : self._filled + number]
            np.concatenate([part[done : done + number] for part in parts], axis=1, out=place)
            done, self._filled = done + number, self._filled + number
            if self._filled == CHUNK:
                self._multiply()

    def merge(self, other: Moments) -> None:
        """Adds the moments of ``other``, which has seen other samples. ``other`` stays as it is."""
        if not other.count:
            return
        other._flush()
        for name, width in other.widths.items():
            check_width(width, self.axes[name], self.widths.setdefault(name, width))
        if not self.count:
            self._shift = other._shift
        else:
            self._flush()
        moved = np.asarray(other._shift) - np.asarray(self._shift)  # rows - own shift = rows - its shift + moved
        cross = np.outer(moved, np.asarray(other._sum) + other._counted * moved / 2)
        self._products = self._products + other._products + cross + cross.T
        self._sum = self._sum + other._sum + other._counted * moved
        self._counted += other._counted

    def _multiply(self) -> None:
        rows = self._chunk[: self._filled].astype(np.float64)
        shift = self._shift if self._shift is not None else rows.mean(axis=0)
        rows -= shift
        self._shift = shift
        self._sum = self._sum + rows.sum(axis=0)
        products = rows.T @ rows
        if isinstance(self._products, np.ndarray):
            self._products += products
        else:
            self._products = products
        self._counted += self._filled
        self._filled = 0

    def _flush(self) -> None:
        """Adds the rows in the unfinished chunk to the sums, and empties the chunk."""
        if self._filled:
            self._multiply()
        if not self._counted:
            raise DataError(f"No calibration sample reached {', '.join(map(repr, self.axes))}", "Check the data")


class ProductSum:
    """The sum of A^T B over the rows of many A and B (n, channels): float32 products, summed in float64.

    ``symmetric``: every B is its A, and only the upper half is held, which also halves the work.
    """

    def __init__(self, channels: int, symmetric: bool = True):
        self._starts = [(start, start if symmetric else 0) for start in range(0, channels, _PANEL)]
        self._panels = [np.zeros((min(_PANEL, channels - row), channels - column)) for row, column in self._starts]
        self._symmetric = symmetric

    def add(self, a: np.ndarray, b: np.ndarray) -> None:
        """Takes up rows, float32."""
        for panel, (row, column) in zip(self._panels, self._starts, strict=True):
            panel += a[:, row : row + len(panel)].T @ b[:, column:]

    def mean(self, count: int, less: Sequence[np.ndarray], plus: Sequence[np.ndarray]) -> np.ndarray:
        """The sum over ``count``, float32, less the outer product of two vectors and plus that of two, () for none."""
        channels = sum(map(len, self._panels))
        found = np.empty((channels, channels), np.float32)
        for panel, (row, column) in zip(self._panels, self._starts, strict=True):
            end, part = row + len(panel), panel / count
            for sign, vectors in ((-1, less), (1, plus)):
                part += sign * np.outer(vectors[0][row:end], vectors[1][column:]) if vectors else 0.0
            found[row:end, column:] = part
            if self._symmetric:
                found[row:, row:end] = found[row:end, row:].T
        return found


def bytes_of(channels: int) -> int:
    """The bytes that moments of so many channels take at most, including the products of the next chunk."""
    return 8 * (2 * channels**2 + 2 * CHUNK * channels)


def collect(
    graph: gs.Graph,
    wanted: Iterable[tuple[Moments, int]],
    data: Data,
    progress: Callable[[str, int, int], None] = no_progress,
    limit: int | None = None,
) -> Iterator[list[Moments]]:
    """Fills Moments, given with their numbers of channels, from all feeds of ``data``.

    Yields the Moments in order, in groups that take up to ``limit`` bytes (a single Moments may take more); each group
    is a run of its own. Memory keeps to the limit if ``wanted`` is a generator and the caller takes the Moments out of
    the lists. Raises DataError as ``observe`` does.
    """
    limit = max(LIMIT, limits.free_memory() // 2) if limit is None else limit
    for group in within(limit, ((moments, bytes_of(channels)) for moments, channels in wanted)):
        named = ((name, moments) for moments in group for name in moments.axes)
        observe(graph, by_name(named), data, progress)
        yield group
