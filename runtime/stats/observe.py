"""Observers of activations, all shown the same samples in one streaming run.

An observer takes up the values of a tensor, one sample (a feed) at a time, and merges with another that has seen other
samples of the same tensor. The result does not depend on how the samples were split or ordered: for counts and minima
by nature, for sums because they are exact (``exact``), for covariances up to rounding (``covariance``).

Every node runs once for a sample. The activations of one sample are in memory at a time, or of a part of the model
(``parts``), and those that the next run makes while they are counted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self, TypeVar

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.runtime.data.sources import Data
from channelfold.runtime.errors import DataError, no_progress
from channelfold.runtime.io.shapes import shapes_on
from channelfold.runtime.stats.kept import Kept
from channelfold.runtime.stats.parts import Observed

T = TypeVar("T")


class Observer(Protocol):
    """An object that takes up the values of a tensor, float32, one sample at a time."""

    def add(self, values: np.ndarray) -> None:
        """Takes up one sample. Raises DataError for values that cannot be used."""
        ...

    def merge(self, other: Self) -> None:
        """Adds the state of another observer, which has seen other samples of the same tensor."""
        ...


@dataclass
class Joint:
    """An observer of several tensors side by side, named in ``axes`` with the axis of their channels.

    The tensors have the same positions: the same lengths along their other axes, in order. Of every entry along the
    first axis at most ``limit`` positions are taken. A subclass defines in ``add`` what the positions are used for.
    """

    axes: Mapping[str, int]
    limit: int | None = None
    widths: dict[str, int] = field(default_factory=dict, init=False)
    _pending: dict[str, np.ndarray] = field(default_factory=dict, init=False)

    def add(self, parts: list[np.ndarray]) -> None:
        """Takes up one sample: the positions of each tensor as rows, (n, channels), in the order of ``axes``."""
        raise NotImplementedError

    def take(self, name: str, values: np.ndarray) -> None:
        """Takes up one tensor of a sample, float32. ``add`` gets the sample when its last tensor has come.

        Raises DataError for NaN and infinities, where the number of channels changes, and where the tensors do not have
        the same positions.
        """
        if not values.size:
            return
        if name in self._pending:
            awaited = ", ".join(repr(other) for other in self.axes if other not in self._pending)
            raise DataError(f"it came twice before {awaited}; a sample is too large to observe both at once")
        axis = self.axes[name] % values.ndim
        check_width(values.shape[axis], self.axes[name], self.widths.setdefault(name, values.shape[axis]))
        check_finite(values)
        self._pending[name] = rows(values, axis, self.limit)
        if len(self._pending) == len(self.axes):
            parts = [self._pending.pop(other) for other in self.axes]
            if len({len(part) for part in parts}) > 1:
                shapes = ", ".join(f"{len(part)} of {other!r}" for other, part in zip(self.axes, parts, strict=True))
                raise DataError(f"the tensors have different positions: {shapes}")
            self.add(parts)


def observe(
    graph: gs.Graph,
    observers: Mapping[str, Sequence[Observer | Joint]],
    data: Data,
    progress: Callable[[str, int, int], None] = no_progress,
    keep: Path | None = None,
) -> None:
    """Shows observers the tensor of their name, in float32, on every feed of ``data``; a Joint stands at all its names.

    ``keep``: a folder where what they see is kept, block by block, and found again (``kept``).

    Raises DataError naming the tensor and the sample when an activation is NaN, ModelError when the model fails to run.
    """
    if not observers or not len(data):
        return
    kept = Kept(keep, graph, observers, data) if keep is not None else None
    begun = done = kept.restore() if kept else 0
    if done < len(data):
        observed = Observed(graph, list(observers), _sizes(graph, data))
        feeds = itertools.islice(enumerate(data), done, None)
        for index, values in ahead((index, values) for index, feed in feeds for values in observed.run(feed)):
            if index == begun:
                progress("Observing activations", begun, len(data))
                if kept and begun > done:
                    kept.save(begun)
                begun += 1
            _show(observers, values, index)
        if kept:
            kept.save(len(data), last=True)
    progress("Observing activations", len(data), len(data))


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The items; the next one is made in a thread while the caller is at work on the last."""
    with ThreadPoolExecutor(1) as maker:
        made = maker.submit(next, items, None)
        while (item := made.result()) is not None:
            made = maker.submit(next, items, None)
            yield item


def _show(observers: Mapping[str, Sequence[Observer | Joint]], values: dict[str, np.ndarray], index: int) -> None:
    """Shows some tensors of a sample, each of which is then free again."""
    for name in list(values):
        seen = values.pop(name)
        try:
            for observer in observers[name]:
                if isinstance(observer, Joint):
                    observer.take(name, seen)
                else:
                    observer.add(seen)
        except DataError as error:
            raise unusable(name, index, error) from None


def unusable(name: str, index: int, error: DataError) -> DataError:
    """An error in the values of a tensor, with its name and the number of the sample."""
    return DataError(
        f"Activation {name!r} of sample {index} cannot be used: {error}",
        "Check that sample, and that the float model computes finite values on it.",
    )


def by_name(observers: Iterable[tuple[str, T]]) -> dict[str, list[T]]:
    """The observers of every tensor, by the tensor's name, made of pairs (name, observer)."""
    found: dict[str, list[T]] = {}
    for name, observer in observers:
        found.setdefault(name, []).append(observer)
    return found


def within(limit: int, sized: Iterable[tuple[T, int]]) -> Iterator[list[T]]:
    """Groups of things, in order, from pairs (thing, size).

    The sizes of a group add up to at most ``limit``; a single thing above the limit is a group of its own.
    """
    group, used = [], 0
    for thing, size in sized:
        if group and used + size > limit:
            yield group
            group, used = [], 0
        group.append(thing)
        used += size
    if group:
        yield group


def rows(values: np.ndarray, axis: int, limit: int | None) -> np.ndarray:
    """The positions of a tensor as rows (n, channels), at most ``limit`` of each entry along the first axis.

    The positions are drawn at random, and are the same for every tensor of the same shape.
    """
    moved = np.moveaxis(values, axis, -1)
    entries = moved.reshape(1 if axis == 0 else len(moved), -1, moved.shape[-1])
    if limit is not None and entries.shape[1] > limit:
        chosen = np.random.default_rng(entries.shape[1]).choice(entries.shape[1], limit, replace=False)
        entries = entries[:, np.sort(chosen)]
    return entries.reshape(-1, entries.shape[-1])


def check_width(width: int, axis: int, before: int) -> None:
    """Raises DataError where a tensor has another number of channels than before."""
    if width != before:
        raise DataError(f"it has {width} channels on axis {axis}, and had {before} before")


def check_finite(values: np.ndarray) -> None:
    """Raises DataError for NaN and infinities."""
    if not np.isfinite(values).all():
        raise DataError("it holds NaN" if np.isnan(values).any() else "it holds infinities")


def _sizes(graph: gs.Graph, data: Data) -> dict[str, int]:
    """Bytes of each tensor as float32 on the largest feed, as far as shape inference can tell."""
    fixed = data.inputs and all(isinstance(size, int) for spec in data.inputs for size in spec.shape)
    feeds = itertools.islice(data, 1) if fixed else data
    largest = max(({name: values.shape for name, values in feed.items()} for feed in feeds), key=_positions, default={})
    return {name: 4 * math.prod(shape) for name, shape in shapes_on(graph, largest).items()}


def _positions(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes.values()))
