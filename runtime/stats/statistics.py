"""Activation statistics in one streaming run: a histogram per tensor whose bins need no range beforehand.

The bin of a float32 value is its upper 16 bits: sign, exponent and 7 bits of mantissa, so every octave has 128 bins
whatever the range turns out to be. Counts are integers, so the result does not depend on the order of the samples, on
how they were batched, or on an interruption; minimum and maximum are kept exactly beside them. Every calibrator works
on these bins (``calibrators``), so all of them cost one run.

``ChannelStatistics`` keeps what scaling by channel asks for: ranges and means of every channel, and a bounded sample of
rows, on which the error of a layer can be measured. Which rows are kept depends on what the samples hold, not on their
order.

One sample's activations are in memory at a time. When even those are too many, the tensors are observed in groups, each
with a run of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from channelfold.runtime.data.sources import Data
from channelfold.runtime.errors import DataError, no_progress
from channelfold.runtime.io.files import export, open_model
from channelfold.runtime.io.session import Feed
from channelfold.runtime.io.shapes import shapes_on

T = TypeVar("T")

BINS = 1 << 15  # of magnitudes; with the sign there are twice as many
MASK = 2.0**100  # values at least this large (1.3e30) are attention masks and the like; the edge of a bin
_COARSER = 5  # bits of a bin's number that are left out for rows
_HASHED = 64  # values of a row that its key is made of
GROUP_BYTES = 1 << 29  # activations of one sample that may be observed in one run

_INFINITE = 0xFF << 7  # the first bin of infinities and NaN
_EDGES = (np.arange(_INFINITE, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
LOWER = _EDGES[:-1]  # magnitude at the lower edge of each finite bin
WIDTH = np.diff(_EDGES)
_FIRST_MASKED = int(np.flatnonzero(LOWER == MASK)[0])


@dataclass
class TensorStatistics:
    """What was seen of one tensor. ``counts``: int64, first the ``BINS`` of positive values, then those of negative.

    With a ``channel_axis``, sums over all other axes are kept too, with 0 in the place of what is masked; where it is
    the last one, the energy of every row (a token, an embedding) is counted as well. ``peaks``: max |x| of each sample.
    """

    channel_axis: int | None = None
    minimum: float = np.inf
    maximum: float = -np.inf
    counts: np.ndarray = field(default_factory=lambda: np.zeros(2 * BINS, np.int64))
    peaks: list[float] = field(default_factory=list)
    _channel_sum: np.ndarray | float = 0.0
    _positions: int = 0
    _rows: np.ndarray = field(default_factory=lambda: np.zeros(BINS >> _COARSER, np.int64))

    @property
    def typical_peak(self) -> float:
        """The largest magnitude of the median sample; 0.0 when nothing was seen."""
        return float(np.median(self.peaks)) if self.peaks else 0.0

    @property
    def typical_row(self) -> float | None:
        """The root mean square of the median row (within 12 %); None where no rows were counted."""
        counted = np.cumsum(self._rows)
        if not counted[-1]:
            return None
        index = int(np.searchsorted(counted, counted[-1] / 2)) << _COARSER
        return float(LOWER[index] + LOWER[index + (1 << _COARSER)]) / 2

    @property
    def channel_mean(self) -> np.ndarray | None:
        """Mean of each channel, (channels,) float64; None when no channel axis was asked for or nothing was seen."""
        return np.asarray(self._channel_sum) / self._positions if self._positions else None

    @property
    def magnitudes(self) -> np.ndarray:
        """Counts by magnitude, masks and infinities left out, (bins,) int64."""
        counts = self.counts[:BINS] + self.counts[BINS:]
        return counts[:_FIRST_MASKED]

    @property
    def total(self) -> int:
        return int(self.magnitudes.sum())

    @property
    def masked(self) -> int:
        """How many values were left out because their magnitude is ``MASK`` or more."""
        return int((self.counts[_FIRST_MASKED:BINS] + self.counts[BINS + _FIRST_MASKED :]).sum())

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
            self.peaks.append(max(abs(low), abs(high)))
        self.counts += np.bincount(flat.view(np.uint16)[1::2], minlength=2 * BINS)
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)

    def _add_channels(self, values: np.ndarray, axis: int) -> None:
        seen = np.size(self._channel_sum)
        if self._positions and seen != values.shape[axis]:
            raise DataError(f"it has {values.shape[axis]} channels on axis {self.channel_axis}, and had {seen} before")
        others = tuple(i for i in range(values.ndim) if i != axis)
        self._channel_sum = self._channel_sum + values.sum(axis=others, dtype=np.float64)
        self._positions += values.size // values.shape[axis]
        if axis == values.ndim - 1:
            rows = np.sqrt(np.square(values).mean(axis=axis, dtype=np.float32)).reshape(-1)
            bins = rows.view(np.uint16)[1::2] >> _COARSER
            self._rows += np.bincount(bins, minlength=self._rows.size)[: self._rows.size]


@dataclass
class ChannelStatistics:
    """What was seen of the channels of one tensor along ``axis``; all vectors are (channels,) float64.

    With ``rows``, 8 or more, that many positions are kept as they are (``sample``).
    """

    axis: int
    rows: int = 0
    minimum: np.ndarray | float = np.inf
    maximum: np.ndarray | float = -np.inf
    positions: int = 0
    samples: int = 0
    _absolute_sum: np.ndarray | float = 0.0
    _middle_sum: np.ndarray | float = 0.0
    _largest: _Kept = field(default_factory=lambda: _Kept())
    _random: _Kept = field(default_factory=lambda: _Kept())

    @property
    def amax(self) -> np.ndarray:
        """The largest magnitude of each channel."""
        return np.maximum(np.abs(self.minimum), np.abs(self.maximum))

    @property
    def absolute_mean(self) -> np.ndarray:
        """E|x| of each channel."""
        return np.asarray(self._absolute_sum) / self.positions

    @property
    def middle(self) -> np.ndarray:
        """(minimum + maximum) / 2 of each channel in each sample, averaged over the samples."""
        return np.asarray(self._middle_sum) / self.samples

    def sample(self) -> tuple[np.ndarray, np.ndarray]:
        """(rows (n, channels) float32, weights (n,)): a sample of all positions, each standing for ``weight`` of them.

        An eighth of the rows are those with the largest magnitudes, standing for themselves: a few tokens with huge
        values decide what a range costs, and a random sample would miss them. The others are drawn at random.
        """
        taken = len(self._largest.keys)
        others = ~np.isin(self._random.keys, self._largest.keys)
        rest = self.positions - taken
        weights = np.concatenate([np.ones(taken), np.full(others.sum(), rest / max(1, others.sum()))])
        return np.concatenate([self._largest.rows, self._random.rows[others]]), weights

    def add(self, values: np.ndarray) -> None:
        """Takes up the values of one sample, float32. Raises DataError for NaN and where the channels change."""
        if values.size == 0:
            return
        flat = np.moveaxis(values, self.axis, -1).reshape(-1, values.shape[self.axis])
        low, high = flat.min(axis=0).astype(np.float64), flat.max(axis=0).astype(np.float64)
        if np.isnan(low).any():
            raise DataError("it holds NaN")
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise DataError("it holds infinities")
        if self.positions and low.size != np.size(self.minimum):
            raise DataError(f"it has {low.size} channels on axis {self.axis}, and had {np.size(self.minimum)} before")
        self.minimum, self.maximum = np.minimum(self.minimum, low), np.maximum(self.maximum, high)
        self._absolute_sum = self._absolute_sum + np.abs(flat).sum(axis=0, dtype=np.float64)
        self._middle_sum = self._middle_sum + (low + high) / 2
        self.positions += flat.shape[0]
        self.samples += 1
        if self.rows:
            keys, peaks = _keys(flat), np.abs(flat).max(axis=1)
            self._largest.add(flat, keys, -peaks, self.rows // 8)
            self._random.add(flat, keys, keys, self.rows - self.rows // 8)


def outlier_ratio(amax: np.ndarray) -> float | None:
    """The largest of the magnitudes of channels, (channels,), against the median one; None where all are zero."""
    largest, median = float(amax.max(initial=0.0)), float(np.median(amax))
    return largest / median if median > 0 else math.inf if largest > 0 else None


@dataclass
class _Kept:
    """The rows of lowest rank so far, with the keys that tell them apart."""

    rows: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.float32))
    keys: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    ranks: np.ndarray = field(default_factory=lambda: np.empty(0))

    def add(self, rows: np.ndarray, keys: np.ndarray, ranks: np.ndarray, limit: int) -> None:
        if len(self.keys) == limit:
            better = ranks <= self.ranks[-1]  # of those that are as good, the keys decide
            rows, keys, ranks = rows[better], keys[better], ranks[better]
        if not len(keys):
            return
        if not len(self.keys):
            self.rows, self.ranks = np.empty((0, rows.shape[1]), rows.dtype), ranks[:0]
        keys, ranks = np.concatenate([self.keys, keys]), np.concatenate([self.ranks, ranks])
        order = np.lexsort((keys, ranks))[:limit]
        self.rows = np.concatenate([self.rows, rows])[order]
        self.keys, self.ranks = keys[order], ranks[order]


def _keys(rows: np.ndarray) -> np.ndarray:
    """A number for each row, as good as random, (n,) uint64: made of some of its values, its place and its sample."""
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


class Observer(Protocol):
    """What takes up the values of a tensor, one sample at a time; raises DataError for values it cannot use."""

    def add(self, values: np.ndarray) -> None: ...


def collect(
    graph: gs.Graph,
    tensors: Mapping[str, int | None],
    data: Data,
    progress: Callable[[str, int, int], None] = no_progress,
) -> dict[str, TensorStatistics]:
    """Statistics of the named float tensors of ``graph`` over all feeds of ``data``; see ``observe``.

    ``tensors`` gives the channel axis of each name, or None where means by channel are not needed.
    """
    statistics = {name: TensorStatistics(axis) for name, axis in tensors.items()}
    observe(graph, statistics, data, progress)
    return statistics


def observe(
    graph: gs.Graph,
    observers: Mapping[str, Observer],
    data: Data,
    progress: Callable[[str, int, int], None] = no_progress,
) -> None:
    """Shows each observer the tensor of its name, in float32, on every feed of ``data``.

    Raises DataError naming the tensor and the sample when an activation is NaN, ModelError when the model fails to run.
    """
    wanted = list(observers)
    first = next(iter(data), None)
    sizes = _sizes(graph, first) if first is not None else {}
    groups = list(within(GROUP_BYTES, ((name, sizes.get(name, 0)) for name in wanted))) if first is not None else []
    for number, group in enumerate(groups):
        observed = Observed(graph, group)
        for index, feed in enumerate(data):
            progress("Observing activations", number * len(data) + index, len(groups) * len(data))
            for name, values in observed.run(feed):
                try:
                    observers[name].add(values)
                except DataError as error:
                    raise DataError(
                        f"Activation {name!r} of sample {index} cannot be used: {error}",
                        "Check that sample, and that the float model computes finite values on it.",
                    ) from None
    progress("Observing activations", len(data) * len(groups), len(data) * len(groups))


class Observed:
    """A session whose outputs are tensors of the graph, cast to float32 where they are of another type."""

    def __init__(self, graph: gs.Graph, tensors: Sequence[str]):
        model, weights = export(graph)
        inputs = {value.name for value in model.graph.input}
        self.names = {f"{name}__observed": name for name in tensors}
        for output, name in self.names.items():
            node = onnx.helper.make_node("Cast", [name], [output], to=onnx.TensorProto.FLOAT, name=output)
            model.graph.node.append(node)
        del model.graph.output[:]
        model.graph.output.extend(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in self.names
        )
        self.session = open_model(model, weights)
        self.feeds = inputs & {spec.name for spec in self.session.inputs}

    def run(self, feed: Feed) -> Iterator[tuple[str, np.ndarray]]:
        values = self.session.run({name: array for name, array in feed.items() if name in self.feeds})
        for output, name in self.names.items():
            yield name, values.pop(output)


def within(limit: int, sized: Iterable[tuple[T, int]]) -> Iterator[list[T]]:
    """Things, given with their sizes, in order and in groups that stay below a limit; one alone may pass it."""
    group, used = [], 0
    for thing, size in sized:
        if group and used + size > limit:
            yield group
            group, used = [], 0
        group.append(thing)
        used += size
    if group:
        yield group


def _sizes(graph: gs.Graph, feed: Feed) -> dict[str, int]:
    """Bytes of each tensor as float32 when the model runs on this feed, as far as shape inference can tell."""
    shapes = shapes_on(graph, {name: array.shape for name, array in feed.items()})
    return {name: 4 * math.prod(shape) for name, shape in shapes.items()}
