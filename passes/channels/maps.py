"""Index maps: numbers for the channels of a tensor, moved as operators move the data.

An index map is an integer array of the rank of its tensor. An axis of the map is as long as that of the tensor, or 1
where the map is constant along the axis. ``image`` does to the map of the data input what the node does to the data;
``preimage`` goes back. With channels along the last axis of x [2, 5, 4] and the map [[[1 2 3 4]]]:

    Transpose, perm 0 2 1      [[[1] [2] [3] [4]]]
    Reshape to [2, 5, 2, 2]    [[[[1 2] [3 4]]]]
    Slice 2: of the last axis  [[[3 4]]]
    Gather 0 of axis 1         [[1 2 3 4]]

Numbers are signed: -c stands for the inverse of c (see ``scale_regions``). ``Shape`` arguments hold the sizes of real
data and no symbols. All functions raise Refused, with the reason, where no map can express what an operator does.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Refused
from channelfold.passes.operators import operator
from channelfold.runtime.io import edit

Shape = tuple[int, ...]
_FOLLOWED = (  # kinds of operators that ``image`` knows
    "elementwise", "expand", "gather", "pad", "pool", "reduce", "reshape", "resize", "slice", "transpose",
)  # fmt: skip


def data_input(node: gs.Node) -> int | None:
    """The input of a node that ``image`` can follow to the output; None where ``image`` can follow no input."""
    known = operator(node)
    if known.kind == "rotary":
        return 0
    source = known.source if known.scale and known.kind in _FOLLOWED else None
    return source if source is not None and edit.has_input(node, source) else None


def image(node: gs.Node, index: np.ndarray, source: Shape, result: Shape) -> np.ndarray:
    """The map of the result of a node (shape ``result``) from the map of its data input (shape ``source``)."""
    kind = operator(node).kind
    if kind == "transpose":
        return index.transpose(node.attrs.get("perm"))
    if kind == "reshape":
        return reshaped(index, source, result, node.op)
    if kind == "slice":
        return _sliced(node, index, source)
    if kind == "gather":
        return _gathered(node, index)
    if kind == "expand":
        return raised(index, len(result))
    if kind == "reduce":
        axes = _reduced_axes(node, len(source))
        if any(index.shape[axis] > 1 for axis in axes):
            raise Refused(f"{node.op} reduces the channel axis")
        return index if node.attrs.get("keepdims", 1) else np.squeeze(index, axes)
    if node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        raise Refused("Resize may fill in values of its own")
    return index


def preimage(
    node: gs.Node, index: np.ndarray, source: Shape, result: Shape, fresh: Callable[[Sequence[int]], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """(map of the data input of a node, its image), from ``index``, the map of the result.

    Where the image differs from ``index``, the caller must merge the classes of the two maps. ``fresh`` makes new
    classes, by shape, for channels that the node drops or repeats.
    """
    kind = operator(node).kind
    if kind == "transpose":
        return index.transpose(np.argsort(node.attrs.get("perm") or range(len(source))[::-1])), index
    if kind == "reshape":
        return reshaped(index, result, source, node.op), index
    if kind == "reduce":
        axes = _reduced_axes(node, len(source))
        before = index if node.attrs.get("keepdims", 1) else np.expand_dims(index, axes)
    elif kind in ("slice", "gather", "expand"):
        wide = _wide_before(node, index, source, result)
        before = fresh([size if axis in wide else 1 for axis, size in enumerate(source)])
    else:
        before = index
    return before, image(node, before, source, result)


def mixed_axes(node: gs.Node, source: Shape, result: Shape) -> set[int]:
    """The axes along which each result mixes several values of the source; these values must be of one class."""
    kind = operator(node).kind
    if kind == "pool":
        return set(range(2, len(source)))
    if kind != "resize":
        return set()
    scales = edit.argument(node, 2 if len(node.inputs) > 2 else 1, "scales")
    known = scales is not None and len(scales) == len(source)
    return {i for i, n in enumerate(source) if n != result[i] or (known and scales is not None and scales[i] != 1)}


def raised(index: np.ndarray, rank: int) -> np.ndarray:
    """A map with leading axes of length 1, as broadcasting adds them."""
    return index.reshape([1] * (rank - index.ndim) + list(index.shape))


def collapsed(array: np.ndarray) -> np.ndarray:
    """An array with length 1 along every axis along which its values are constant."""
    for axis, size in enumerate(array.shape):
        if size > 1:
            first = array.take([0], axis=axis)
            if (array == first).all():
                array = first
    return array


def reshaped(index: np.ndarray, source: Shape, result: Shape, op: str) -> np.ndarray:
    """The map of a reshaped tensor.

    Both shapes are cut at every place where the axes to the left have the same volume. Between two cuts the Reshape
    splits one axis or merges several axes. The map gets its full length between two cuts that hold channels.
    """
    before, after = np.cumprod((1, *source)), np.cumprod((1, *result))
    if before[-1] != after[-1] or before[-1] == 0:
        raise Refused(f"{op} has shapes that do not agree")
    cuts = sorted({*before.tolist()} & {*after.tolist()})
    places = [bisect_right(cuts, volume) for volume in before[:-1]]
    new_places = [bisect_right(cuts, volume) for volume in after[:-1]]
    held = {place for place, size in zip(places, index.shape, strict=True) if size > 1}
    for place in held:
        if min(sum(p == place and n > 1 for p, n in zip(*side, strict=True))
               for side in ((places, source), (new_places, result))) > 1:  # fmt: skip
            raise Refused(f"{op} mixes its channels with other axes")
    wide = [size if place in held else 1 for place, size in zip(places, source, strict=True)]
    new = [size if place in held else 1 for place, size in zip(new_places, result, strict=True)]
    return np.broadcast_to(index, wide).reshape(new)


@dataclass
class Classes:
    """The classes in index maps: merged classes, classes pinned to a scale of 1, and classes that take no shift."""

    count: int = 0
    merges: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    pins: list[tuple[np.ndarray, str]] = field(default_factory=list)
    unshifted: list[tuple[np.ndarray, str]] = field(default_factory=list)

    def fresh(self, shape: Sequence[int]) -> np.ndarray:
        size = int(np.prod(shape))
        self.count += size
        return np.arange(self.count - size + 1, self.count + 1).reshape(shape)

    def merge(self, one: np.ndarray, other: np.ndarray) -> None:
        if one.shape != other.shape or not np.array_equal(one, other):
            one, other = np.broadcast_arrays(one, other)
            self.merges.append((one.reshape(-1), other.reshape(-1)))

    def pin(self, index: np.ndarray, reason: str) -> None:
        self.pins.append((index.reshape(-1), reason))

    def forbid_shift(self, index: np.ndarray, reason: str) -> None:
        self.unshifted.append((index.reshape(-1), reason))

    def along(self, index: np.ndarray, axis: int, channels: int) -> np.ndarray:
        """A map as a vector over the channels along one axis; merges the classes along all other axes."""
        columns = np.moveaxis(index, axis, 0).reshape(index.shape[axis], -1)
        if columns.shape[1] > 1:
            self.merge(columns[:, :1], columns)
        return np.broadcast_to(columns[:, 0], (channels,))

    def fitted(self, index: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """The map of an operand of this shape from ``index``, the map of the result that it is broadcast to."""
        index = raised(index, max(index.ndim, len(shape)))
        first = index
        for axis in range(index.ndim):
            place = axis - index.ndim + len(shape)
            if first.shape[axis] > 1 and (place < 0 or shape[place] == 1):
                first = np.take(first, [0], axis=axis)
        if first.shape != index.shape:
            self.merge(first, index)
        return first.reshape(first.shape[first.ndim - len(shape) :])

    def renumbered(self, used: list[np.ndarray]) -> tuple[Callable[[np.ndarray], np.ndarray], int]:
        """(function that gives the maps in ``used`` classes 1 .. n, n); merged classes get one number."""
        number = _components(self.count, self.merges)
        labels = np.unique(np.concatenate([np.abs(number[np.abs(index)]).reshape(-1) for index in used]))
        final = np.zeros(self.count + 2, np.int64)
        final[labels] = np.arange(1, labels.size + 1)
        if labels[-1] == self.count + 1:
            self.pin(np.flatnonzero(number == self.count + 1), "it is scaled against itself")

        def renumber(index: np.ndarray) -> np.ndarray:
            found = number[np.abs(index)]
            return np.sign(index) * np.sign(found) * final[np.abs(found)]

        return renumber, labels.size

    @staticmethod
    def reasons(
        noted: list[tuple[np.ndarray, str]], renumber: Callable[[np.ndarray], np.ndarray], size: int
    ) -> list[str]:
        """The first reason noted for each class, "" for a class without a reason."""
        found = [""] * size
        for index, reason in noted:
            for c in np.unique(np.abs(renumber(index))):
                found[c - 1] = found[c - 1] or reason
        return found


def _components(count: int, merges: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The signed representative of every class 0 .. ``count``: the lowest class that the class is merged with.

    ``merges`` holds pairs of 1-d arrays; entry i of one array is merged with entry i of the other. A class that is
    merged with its own inverse gets ``count + 1``.
    """
    if not merges:
        return np.arange(count + 1)
    # in the graph of merges, vertex 2 c stands for class c and vertex 2 c + 1 for its inverse
    sides = (np.concatenate(side) for side in zip(*merges, strict=True))
    one, other = (2 * np.abs(index) + (index < 0) for index in sides)
    label = np.arange(2 * count + 2)
    edges = [(one, other), (one ^ 1, other ^ 1)]
    while True:
        new = label.copy()
        for a, b in edges:
            np.minimum.at(new, a, label[b])
            np.minimum.at(new, b, label[a])
        new = new[new]
        if np.array_equal(new, label):
            break
        label = new
    own = label[::2]
    return np.where(own == label[1::2], count + 1, np.where(own & 1, -(own >> 1), own >> 1))


def slices(node: gs.Node, shape: Shape) -> dict[int, tuple[int, slice | None]]:
    """(place in the arguments, slice) of every axis that a Slice cuts; no slice where the bounds are computed.

    Raises Refused where the axes are computed.
    """
    starts, ends = edit.argument(node, 1, "starts"), edit.argument(node, 2, "ends")
    axes, steps = edit.argument(node, 3, "axes"), edit.argument(node, 4, "steps")
    if axes is None and edit.has_input(node, 3) and len(shape) > 1:
        raise Refused("Slice cuts axes that are computed at run time")
    if axes is None:
        axes = range(len(shape) if starts is None else len(starts))
    found: dict[int, tuple[int, slice | None]] = {}
    for place, axis in enumerate(int(a) % len(shape) for a in axes):
        cut = None
        if starts is not None and ends is not None and (steps is not None or not edit.has_input(node, 4)):
            cut = slice(int(starts[place]), int(ends[place]), 1 if steps is None else int(steps[place]))
        found[axis] = place, cut
    return found


def _sliced(node: gs.Node, index: np.ndarray, source: Shape) -> np.ndarray:
    taken = [slice(None)] * len(source)
    for axis, (_, cut) in slices(node, source).items():
        if index.shape[axis] == 1:
            continue
        if cut is None:
            raise Refused("Slice cuts its channels at places computed at run time")
        if cut.step < 0:
            raise Refused("Slice turns its channels round")
        taken[axis] = cut
    return index[tuple(taken)]


def _gathered(node: gs.Node, index: np.ndarray) -> np.ndarray:
    axis = int(node.attrs.get("axis", 0)) % index.ndim
    picked = edit.value(node.inputs[1])
    if index.shape[axis] == 1:
        size = edit.rank(node.inputs[1]) if picked is None else picked.ndim
        if size is None:
            raise Refused("Gather takes indices of unknown rank")
        return index.reshape([*index.shape[:axis], *[1] * size, *index.shape[axis + 1 :]])
    if picked is None:
        raise Refused("Gather picks its channels at run time")
    return np.take(index, picked, axis=axis)


def _wide_before(node: gs.Node, index: np.ndarray, source: Shape, result: Shape) -> set[int]:
    """The axes along which the map of the data input of a node may vary, from the map of the result."""
    wide = {axis for axis, size in enumerate(index.shape) if size > 1}
    kind = operator(node).kind
    if kind == "slice":
        single = {i for i, n in enumerate(result) if n == 1 < source[i] and _is_certain(node.inputs[0], i)}
        return wide | single
    if kind == "expand":
        more = index.ndim - len(source)
        return {axis - more for axis in wide}
    axis = int(node.attrs.get("axis", 0)) % len(source)
    more = index.ndim - len(source)  # axes that the indices add to the one they replace, -1 for a single index
    own = {i if i < axis else i - more for i in wide if not axis <= i <= axis + more}
    known = isinstance(node.inputs[1], gs.Constant) and _is_certain(node.inputs[0], axis)
    return own | ({axis} if known else set())


def _is_certain(tensor: gs.Tensor, axis: int) -> bool:
    """Whether the length of an axis is the same for all inputs, as far as the graph says."""
    return tensor.shape is not None and isinstance(tensor.shape[axis], int)


def _reduced_axes(node: gs.Node, rank: int) -> tuple[int, ...]:
    axes = edit.argument(node, 1, "axes")
    if axes is None or not axes.size:
        raise Refused(f"{node.op} names no constant axes")
    return tuple(sorted({int(axis) % rank for axis in axes}))
