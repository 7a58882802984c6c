"""Means and covariances of the channels of tensors, alone or side by side, in one streaming run.

    z = [x; h; …]          the channels of one or several tensors at one position (a token, a pixel)
    mean = E[z]            covariance = E[(z - mean) (z - mean)^T]

That is all that least squares between channels need: what a removed channel is as an affine function of the kept ones,
or of the input of the layer. For a convolution the channels at its input suffice: what holds at every position holds
at every place of the kernel.

Rows are shifted by the mean of the first chunk and multiplied in float64, a chunk of ``CHUNK`` rows at a time whatever
the samples were, so how they were batched changes nothing and their order the last digits only. A feature map may have
more positions than an estimate needs: of every entry along the first axis (an image, a sentence) at most ``limit`` are
taken, always the same ones for the same shape, drawn at random.

A Moments of n channels holds two matrices of n^2 float64 and the chunk (``bytes_of``). ``collect`` observes as many at
a time as fit into ``limit`` bytes and runs the data again for the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.runtime.data.sources import Data
from channelfold.runtime.errors import DataError, no_progress
from channelfold.runtime.stats.statistics import Observer, observe, within

CHUNK = 1024  # rows multiplied at once
POSITIONS = 4096  # of one entry along the first axis that are taken
LIMIT = 2 << 30  # bytes of moments held at a time


@dataclass
class Moments:
    """Joint moments of the tensors named in ``axes``, each with the axis of its channels, concatenated in that order.

    All of them have the same positions: the same lengths along their other axes, in order. Give ``parts()`` to
    ``statistics.observe``, all in one call.
    """

    axes: Mapping[str, int]
    limit: int = POSITIONS
    _counted: int = 0
    _widths: dict[str, int] = field(default_factory=dict)
    _pending: dict[str, np.ndarray] = field(default_factory=dict)
    _chunk: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.float32))
    _filled: int = 0
    _shift: np.ndarray | None = None
    _sum: np.ndarray | float = 0.0
    _products: np.ndarray | float = 0.0

    def parts(self) -> dict[str, Observer]:
        """An observer for each tensor."""
        return {name: _Part(self, name) for name in self.axes}

    @property
    def count(self) -> int:
        """The number of positions seen."""
        return self._counted + self._filled

    @property
    def places(self) -> dict[str, slice]:
        """Where the channels of each tensor lie in the vector z. Raises DataError where nothing was seen."""
        self._flush()
        stops = np.cumsum([self._widths[name] for name in self.axes])
        return {
            name: slice(int(stop) - self._widths[name], int(stop)) for name, stop in zip(self.axes, stops, strict=True)
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

    def take(self, name: str, values: np.ndarray) -> None:
        """Takes up one tensor of a sample, float32; when it is the last one, the sample counts.

        Raises DataError for NaN and infinities, where the number of channels changes, and where the tensors do not have
        the same positions.
        """
        if name in self._pending:
            raise DataError(f"it came twice before {self._awaited()}; a sample is too large to observe both at once")
        axis = self.axes[name] % values.ndim
        width = self._widths.setdefault(name, values.shape[axis])
        if values.shape[axis] != width:
            raise DataError(f"it has {values.shape[axis]} channels on axis {self.axes[name]}, and had {width} before")
        if not np.isfinite(values).all():
            raise DataError("it holds NaN" if np.isnan(values).any() else "it holds infinities")
        self._pending[name] = _rows(values, axis, self.limit)
        if len(self._pending) == len(self.axes):
            rows = [self._pending[other] for other in self.axes]
            self._pending.clear()
            if len({len(part) for part in rows}) > 1:
                shapes = ", ".join(f"{len(part)} of {other!r}" for other, part in zip(self.axes, rows, strict=True))
                raise DataError(f"the tensors have different positions: {shapes}")
            self._buffer(rows)

    def _awaited(self) -> str:
        return ", ".join(repr(name) for name in self.axes if name not in self._pending)

    def _buffer(self, parts: list[np.ndarray]) -> None:
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
        """Takes in what is left in the chunk. The chunk may fill up again afterwards: sums do not mind."""
        if self._filled:
            self._multiply()
        if not self._counted:
            raise DataError(f"No calibration sample reached {', '.join(map(repr, self.axes))}", "Check the data")


@dataclass
class _Part:
    """One tensor of a Moments, as an observer."""

    moments: Moments
    name: str

    def add(self, values: np.ndarray) -> None:
        if values.size:
            self.moments.take(self.name, values)


@dataclass
class _Shared:
    """Observers of one tensor."""

    observers: list[Observer]

    def add(self, values: np.ndarray) -> None:
        for observer in self.observers:
            observer.add(values)


def bytes_of(channels: int) -> int:
    """What the moments of that many channels take at most, products of the next chunk included."""
    return 8 * (2 * channels**2 + 2 * CHUNK * channels)


def collect(
    graph: gs.Graph,
    wanted: Iterable[tuple[Moments, int]],
    data: Data,
    progress: Callable[[str, int, int], None] = no_progress,
    limit: int = LIMIT,
) -> Iterator[list[Moments]]:
    """Fills Moments, given with their numbers of channels, from all feeds of ``data``.

    Yields them in order, in groups that together take ``limit`` bytes (one alone may take more); each group is a run of
    its own. To keep to the limit, let ``wanted`` be made as it is read, and take Moments out of the lists. Raises
    DataError as ``observe`` does.
    """
    for group in within(limit, ((moments, bytes_of(channels)) for moments, channels in wanted)):
        observers: dict[str, list[Observer]] = {}
        for moments in group:
            for name, part in moments.parts().items():
                observers.setdefault(name, []).append(part)
        observe(graph, {name: _Shared(parts) for name, parts in observers.items()}, data, progress)
        yield group


def _rows(values: np.ndarray, axis: int, limit: int) -> np.ndarray:
    """The positions of a tensor as rows (n, channels), at most ``limit`` of each entry along the first axis."""
    moved = np.moveaxis(values, axis, -1)
    entries = moved.reshape(1 if axis == 0 else len(moved), -1, moved.shape[-1])
    if entries.shape[1] > limit:
        chosen = np.random.default_rng(entries.shape[1]).choice(entries.shape[1], limit, replace=False)
        entries = entries[:, np.sort(chosen)]
    return entries.reshape(-1, entries.shape[-1])
