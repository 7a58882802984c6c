"""Stored arrays as feeds: finds the axis of the samples, cuts, and checks that every value fits the model.

A *feed* is one set of inputs for one run. Feeds are cut to single samples wherever the model allows it, so that no
result depends on how samples were stored. For a model with the inputs ``ids`` and ``mask``, both int64[batch, seq]:

==================================================  ==================================
``.npz`` with ids (64, 128) and mask (64, 128)      64 feeds of (1, 128) each
a folder of 8 such files with (8, 128) each         the same 64 feeds
stacked: ids (8, 8, 128) and mask (8, 8, 128)       the same 64 feeds
ids (64, 128) and mask (1, 128)                     one feed, as it was stored
==================================================  ==================================

If the model fixes ``batch`` to 4, the first three give 16 feeds of (4, 128). Names, dtypes and shapes are checked when
data is opened, values when they are read. One feed is in memory at a time, however large the files are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from channelfold.runtime.data.npz import Array, Reader, Spill
from channelfold.runtime.errors import DataError
from channelfold.runtime.io.session import Feed, TensorSpec


@dataclass(frozen=True)
class Batch:
    """Arrays stored together, by input name. ``label`` names their place; ``spill`` keeps a temporary file alive."""

    label: str
    arrays: Mapping[str, Array]
    spill: Spill | None = None


@dataclass(frozen=True)
class _Layout:
    """A batch as ``count`` consecutive blocks of the given shapes.

    ``samples``: whether each block is one sample, with a leading axis of 1, which may be joined with other samples.
    """

    count: int
    shapes: Mapping[str, tuple[int, ...]]
    samples: bool


class Feeds:
    """All feeds in some batches: ``len()``, repeated iteration, ``notes`` on changes to the data, a ``description``.

    Raises DataError when the batches do not fit ``inputs`` (at once) or their values do not (while iterating).
    """

    def __init__(self, batches: Sequence[Batch], inputs: Sequence[TensorSpec], origin: str):
        self._inputs = inputs
        self._size = batch_size(inputs)
        self._plan = [(batch, _layout(batch, inputs, self._size)) for batch in batches]
        layouts = [layout for _, layout in self._plan]
        self._count, dropped = _count(layouts, self._size or 1)
        total = sum(layout.count for layout in layouts)
        if not total:
            raise DataError(f"There are no samples in {origin}", "Give some; a generator that was read before is empty")
        if not self._count:
            raise DataError(
                f"The model takes batches of {self._size}, and there are only {total} samples in {origin}",
                "Give more, or export the model with a dynamic batch axis",
            )
        casts = (_cast_note(batch, spec) for batch in batches for spec in inputs)
        self.notes = list(dict.fromkeys(note for note in casts if note))
        if dropped:
            self.notes.append(f"{dropped} of {total} samples did not fill a batch of {self._size} and were dropped")
        if not all(layout.samples for layout in layouts):
            self.notes.append("The inputs share no sample axis, so each feed is run as it was stored")
            self.description = describe(self._count, 1, "feed")
        else:
            self.description = describe(self._count, self._size, "sample")

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Feed]:
        size = self._size or 1
        waiting: list[Feed] = []
        shapes = None
        with Reader() as reader:
            for batch, layout in self._plan:
                if layout.samples and layout.shapes != shapes:
                    waiting, shapes = [], layout.shapes
                for feed in _blocks(reader, batch, layout, self._inputs):
                    if size == 1 or not layout.samples:
                        yield feed
                        continue
                    waiting.append(feed)
                    if len(waiting) == size:
                        yield {name: np.concatenate([one[name] for one in waiting]) for name in feed}
                        waiting = []


def describe(feeds: int, size: int | None, word: str) -> str:
    """``64 samples``, or ``64 samples in batches of 4``."""
    samples = feeds * (size or 1)
    text = f"{samples} {word}{'s' * (samples != 1)}"
    return text if size in (1, None) else f"{text} in batches of {size}"


def _count(layouts: Sequence[_Layout], size: int) -> tuple[int, int]:
    """The number of feeds, and of samples that fill no batch. A batch spans files as long as their shapes agree."""
    count = waiting = dropped = 0
    shapes = None
    for layout in layouts:
        if not layout.samples:
            count += layout.count
            continue
        if layout.shapes != shapes:
            dropped, waiting, shapes = dropped + waiting, 0, layout.shapes
        count += (waiting + layout.count) // size
        waiting = (waiting + layout.count) % size
    return count, dropped + waiting


def batch_size(inputs: Sequence[TensorSpec]) -> int | None:
    """The samples in a feed: 1 where leading axes are dynamic, else their fixed size; None where inputs differ."""
    if not all(spec.shape for spec in inputs):
        return None
    fixed = {spec.shape[0] for spec in inputs if isinstance(spec.shape[0], int)}
    return None if len(fixed) > 1 else int(fixed.pop()) if fixed else 1


def _layout(batch: Batch, inputs: Sequence[TensorSpec], size: int | None) -> _Layout:
    shapes = {spec.name: batch.arrays[spec.name].shape for spec in inputs}
    stack = 1
    if all(len(shapes[spec.name]) == len(spec.shape) + 1 for spec in inputs):
        _check_same_length(batch.label, {name: shape[0] for name, shape in shapes.items()})
        stack = shapes[inputs[0].name][0]
        shapes = {name: shape[1:] for name, shape in shapes.items()}
    for spec in inputs:
        if len(shapes[spec.name]) != len(spec.shape):
            raise _shape_error(batch, spec)
    samples = size is not None and len({shape[0] for shape in shapes.values()}) == 1
    if samples:
        stack *= shapes[inputs[0].name][0]
        shapes = {name: (1, *shape[1:]) for name, shape in shapes.items()}
    else:
        for lead in {spec.shape[0] for spec in inputs if spec.shape and spec.shape[0] is not None}:
            alike = [spec.name for spec in inputs if spec.shape and spec.shape[0] == lead]
            _check_same_length(batch.label, {name: shapes[name][0] for name in alike})
    for spec in inputs:
        dims = list(zip(spec.shape, shapes[spec.name], strict=True))
        if any(isinstance(dim, int) and dim != found for dim, found in (dims[1:] if samples else dims)):
            raise _shape_error(batch, spec)
    return _Layout(stack, shapes, samples)


def _check_same_length(label: str, lengths: Mapping[str, int]) -> None:
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise DataError(f"{label}: the inputs disagree on the number of samples ({found})", "Store as many of each")


def _shape_error(batch: Batch, spec: TensorSpec) -> DataError:
    shape = batch.arrays[spec.name].shape
    wanted = ", ".join(str(dim) if isinstance(dim, int) and axis else "N" for axis, dim in enumerate(spec.shape))
    hint = f"Store {spec.name!r} with shape ({wanted})"
    if len(shape) == len(spec.shape) - 1:
        hint = f"If this is one sample, add the sample axis: {spec.name}[None]"
    for order, name in (((0, 3, 1, 2), "last"), ((0, 2, 3, 1), "first")):
        if len(shape) == len(spec.shape) == 4 and _fits([shape[axis] for axis in order], spec):
            hint = f"Its channels come {name}, so transpose it: {spec.name}.transpose{order}"
    return DataError(f"{batch.label}: {spec.name!r} has shape {shape}, and the model takes {spec}", hint)


def _fits(shape: Sequence[int], spec: TensorSpec) -> bool:
    return all(not isinstance(dim, int) or dim == found for dim, found in zip(spec.shape[1:], shape[1:], strict=True))


def _cast_note(batch: Batch, spec: TensorSpec) -> str | None:
    """A note on how an array is cast to the input's dtype. Raises DataError for a cast that changes the meaning."""
    found, wanted = batch.arrays[spec.name].dtype, np.dtype(spec.dtype)
    if found.newbyteorder("=") == wanted or (wanted.kind == "O" and found.kind == "U"):
        return None
    if (found.kind == wanted.kind == "f") or (found.kind in "iu" and wanted.kind in "iu"):
        return f"Input {spec.name!r} was cast from {found} to {wanted}"
    hint = f"Convert it before storing: {spec.name}.astype({str(wanted)!r})"
    if found == np.uint8 and wanted.kind == "f":
        hint = "This looks like raw image bytes: scale and normalize them as in training, then store floats"
    raise DataError(f"{batch.label}: {spec.name!r} is {found}, and the model takes {spec}", hint)


def _blocks(reader: Reader, batch: Batch, layout: _Layout, inputs: Sequence[TensorSpec]) -> Iterator[Feed]:
    blocks = [reader.blocks(batch.arrays[spec.name], layout.count, layout.shapes[spec.name]) for spec in inputs]
    for index, values in enumerate(zip(*blocks, strict=True)):
        where = batch.label if layout.count == 1 else f"{batch.label}, sample {index}"
        yield {spec.name: _checked(array, spec, where) for spec, array in zip(inputs, values, strict=True)}


def _checked(array: np.ndarray, spec: TensorSpec, where: str) -> np.ndarray:
    wanted = np.dtype(spec.dtype)
    if wanted.kind in "iu" and array.dtype != wanted and array.size:
        low, high = int(array.min()), int(array.max())
        if low < np.iinfo(wanted.name).min or high > np.iinfo(wanted.name).max:
            raise DataError(f"{where}: {spec.name!r} reaches from {low} to {high}, beyond {wanted}", "Check the values")
    if wanted.kind == "f" and not (finite := np.isfinite(array)).all():
        bad = array.size - np.count_nonzero(finite)
        raise DataError(
            f"{where}: {spec.name!r} holds NaN or Inf ({bad} of {array.size} values)",
            "Remove the sample; in an attention mask use a large negative number in place of -inf",
        )
    with np.errstate(over="ignore"):
        cast = array.astype(wanted, copy=False)
    if wanted.kind == "f" and cast is not array and not np.isfinite(cast).all():
        raise DataError(f"{where}: {spec.name!r} holds values beyond {wanted}", "Scale them as in training")
    return cast
