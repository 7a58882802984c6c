"""Links of the operators that move channels, and the numbers in the graph that describe the moves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import InBetween, Refused
from channelfold.passes.channels.maps import Shape, slices
from channelfold.passes.channels.ports import Link, Member, Ports, Rules
from channelfold.passes.channels.sizes import Length, source_of_size
from channelfold.runtime.io import edit


def _transpose(p: Ports) -> None:
    perm = p.node.attrs.get("perm") or range(len(p.shape(0)))[::-1]
    for axis, source in enumerate(perm):
        p.link((0, source), (-1, axis))


def _concat(p: Ports) -> None:
    rank = len(p.shape(-1))
    along, start = p.attribute("axis", 1) % rank, 0
    ports = range(len(p.node.inputs))
    for port in ports:
        size = p.shape(port)[along]
        p.link((port, along), (-1, along, np.arange(start, start + size)))
        start += size
    for axis in (a for a in range(rank) if a != along):
        p.link((-1, axis), *((port, axis) for port in ports))


def _split(p: Ports) -> None:
    rank = len(p.shape(0))
    along, start = p.attribute("axis", 0) % rank, 0
    for port in range(-1, -1 - len(p.node.outputs), -1):
        if not p.has(port):
            raise Refused("Split drops a part")
        size = p.shape(port)[along]
        p.link((port, along), (0, along, np.arange(start, start + size)))
        start += size
        for axis in (a for a in range(rank) if a != along):
            p.link((0, axis), (port, axis))
    if p.computed(1):
        p.block(along, "Split has sizes that are computed", *range(-len(p.node.outputs), 1))
    p.edit("split", 1, 0, along)


def _slice(p: Ports) -> None:
    shape, result = p.shape(0), p.shape(-1)
    cuts = slices(p.node, shape)
    for axis in range(len(shape)):
        place, cut = cuts.get(axis, (0, None))
        if axis not in cuts:
            p.keep(axis)
        elif cut is None:
            p.block(axis, "Slice cuts it at places computed at run time")
        elif cut.step != 1:
            p.block(axis, "Slice takes it in steps or turned round")
        else:
            taken = np.arange(shape[axis])[cut]
            if len(taken) != result[axis]:
                raise Refused("the shapes of Slice do not agree")
            p.link((0, axis, taken), (-1, axis))
            p.edit("slice", place, 0, axis)


def _gather(p: Ports) -> None:
    rank, more = len(p.shape(0)), len(p.shape(1))
    along, picked = p.attribute("axis", 0) % rank, edit.value(p.node.inputs[1])
    for axis in range(rank):
        if axis != along:
            p.link((0, axis), (-1, axis if axis < along else axis - 1 + more))
    if picked is None:
        for axis in range(more):
            p.link((1, axis), (-1, along + axis))
        p.block(along, "Gather picks from it at run time", 0)
        return
    if p.single and picked.ndim == 1 and not isinstance(p.tensor(0), gs.Constant):
        p.link((1, 0), (-1, along))
        return
    picked = picked % p.shape(0)[along]
    if picked.ndim == 1:
        p.link((0, along, picked), (-1, along))
    else:
        p.link((0, along))
        p.found.pinned.append((Member(0, along, picked.reshape(-1)), "Gather picks it"))
        for position in range(more):
            p.block(along + position, "Gather makes several axes of it", -1)
    p.edit("gather", 1, 0, along)


def _reshape(p: Ports) -> None:
    """Groups the axes of both shapes into blocks of equal volume and links the axes of each block.

    A block with several axes on both sides arises when (N, C, H, W) becomes (N, groups, C / groups * H * W), say. In
    such a block the first axes share the count of their common divisor, here the groups, and so do the last axes.
    """
    source, result = p.shape(0), p.shape(-1)
    if math.prod(source) != math.prod(result) or not math.prod(source):
        raise Refused(f"{p.node.op} has shapes that do not agree")
    if p.node.op == "Squeeze" and p.argument(1, "axes") is None:
        raise Refused("Squeeze without axes would drop an axis of which one channel is left")
    same = set()
    for before, after in _blocks(source, result):
        if len(before) == 1 and len(after) == 1:
            p.link((0, before[0]), (-1, after[0]))
            same.add((before[0], after[0]))
        elif len(before) == 1:
            p.found.choices.append(_parts(0, before[0], -1, after, result))
        elif len(after) == 1:
            p.found.choices.append(_parts(-1, after[0], 0, before, source))
        else:
            _common(p, before, after)
    if p.node.op == "Reshape":
        _sizes(p, 1)
        for axis in range(min(len(source), len(result))):
            length = source_of_size(p.node, 1, axis, p.shape_of)
            copied = isinstance(length, Length) and length.tensor is p.node.inputs[0] and length.axis == axis
            if copied and source[axis] > 1 and (axis, axis) not in same:
                p.block(axis, "Reshape copies its length")


def _parts(whole: int, axis: int, parts: int, axes: Sequence[int], shape: Shape) -> list[Link]:
    """The alternatives for one axis that is split into several axes: a cut along any one of the several axes."""
    volume = math.prod(shape[a] for a in axes)
    found, stride = [], volume
    for a in axes:
        stride //= shape[a]
        at = np.arange(volume) // stride % shape[a]
        found.append((Member(whole, axis), Member(parts, a, at)))
    return found


def _common(p: Ports, before: list[int], after: list[int]) -> None:
    """Links the first and the last axes of a block that has several axes on both sides; blocks all other axes."""
    linked = set()
    for place in (0, -1):
        one, other = before[place], after[place]
        a, b = p.shape(0)[one], p.shape(-1)[other]
        if math.gcd(a, b) > 1 and p.is_static(0, one) and p.is_static(-1, other):
            at = np.arange(math.lcm(a, b))
            mine, theirs = (at * a // at.size, at * b // at.size) if place == 0 else (at % a, at % b)
            p.link((0, one, mine), (-1, other, theirs))
            linked |= {(0, one), (-1, other)}
    for port, axes in ((0, before), (-1, after)):
        for axis in axes:
            if (port, axis) not in linked:
                p.block(axis, f"{p.node.op} mixes it with other axes", port)


def _blocks(source: Shape, result: Shape) -> list[tuple[list[int], list[int]]]:
    """The axes longer than 1, grouped into the smallest blocks that have the same volume on both sides."""
    left = [a for a, n in enumerate(source) if n > 1]
    right = [a for a, n in enumerate(result) if n > 1]
    groups: list[tuple[list[int], list[int]]] = []
    while left and right:
        one, other = [left.pop(0)], [right.pop(0)]
        a, b = source[one[0]], result[other[0]]
        while a != b:
            if a < b:
                one.append(left.pop(0))
                a *= source[one[-1]]
            else:
                other.append(right.pop(0))
                b *= result[other[-1]]
        groups.append((one, other))
    return groups


def _sizes(p: Ports, holder: int) -> None:
    """Notes that input ``holder``, or an attribute, holds the length of every axis of the result."""
    for axis, size in enumerate(p.shape(-1)):
        if size > 1:
            p.edit("size", holder, -1, axis)


def _expand(p: Ports) -> None:
    shape, rank = p.shape(0), len(p.shape(-1))
    for axis in range(-rank, 0):
        held = len(shape) >= -axis and shape[axis] > 1
        p.link((-1, axis), *([(0, axis)] if held else []))
    _sizes(p, 1)


def _constant_of_shape(p: Ports) -> None:
    for axis in range(len(p.shape(-1))):
        p.link((-1, axis))
    _sizes(p, 0)


def _tile(p: Ports) -> None:
    for axis, (size, new) in enumerate(zip(p.shape(0), p.shape(-1), strict=True)):
        if size == new:
            p.keep(axis)
        elif size > 1:
            p.link((0, axis, np.arange(new) % size), (-1, axis))


def _pad(p: Ports) -> None:
    pads = p.argument(1, "pads")
    if edit.has_input(p.node, 3):
        raise InBetween("Pad with axes")
    rank = len(p.shape(0))
    for axis in range(rank):
        grown = pads[axis] or pads[axis + rank] if pads is not None else p.shape(0)[axis] != p.shape(-1)[axis]
        if grown or (pads is None and axis != 1):
            p.block(axis, "Pad works along it")
        else:
            p.keep(axis)


def _resize(p: Ports) -> None:
    if p.node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        raise Refused("Resize may fill in values of its own")
    scales, axes = p.argument(2 if len(p.node.inputs) > 2 else 1, "scales"), p.node.attrs.get("axes")
    for axis, (size, new) in enumerate(zip(p.shape(0), p.shape(-1), strict=True)):
        unscaled = scales is not None and axes is None and len(scales) > axis and scales[axis] == 1
        sized = axes is not None and axis in [int(a) % len(p.shape(0)) for a in axes]
        if not sized and (unscaled or (size == new and axis < 2)):
            p.keep(axis)
        else:
            p.block(axis, f"{p.node.op} works along it")
    if p.has(3) and axes is None:
        _sizes(p, 3)


def _depth_to_space(p: Ports) -> None:
    deep, flat = (0, -1) if p.node.op == "DepthToSpace" else (-1, 0)
    channels, few = p.shape(deep)[1], p.shape(flat)[1]
    of = np.arange(channels) % few
    if p.node.op == "DepthToSpace" and p.node.attrs.get("mode", "DCR") == "CRD":
        of = np.arange(channels) // (channels // few)
    p.link((deep, 1), (flat, 1, of))
    p.keep(0)


def _sampled(p: Ports) -> None:
    """GridSample, RoiAlign: the operator reads every channel of an image at the same positions."""
    p.link((0, 1), (-1, 1))


def _along_an_axis(p: Ports) -> None:
    """CumSum, TopK, ArgMax work along one axis and treat every position of the other axes alone."""
    rank, default = len(p.shape(0)), -1 if p.node.op == "TopK" else 0
    along = p.argument(1, "axis") if p.node.op == "CumSum" else np.array([p.attribute("axis", default)])
    if along is None:
        raise InBetween(f"{p.node.op} along an axis computed at run time")
    over = int(along[0]) % rank
    p.block(over, f"{p.node.op} works along it", 0)
    dropped = len(p.shape(-1)) < rank
    for axis in (a for a in range(rank) if a != over):
        new = axis - (dropped and axis > over)
        p.link((0, axis), (-1, new), (-2, new))


def _shape(p: Ports) -> None:
    """Every axis can be cut here; the tracer checks the nodes that use the sizes."""
    for axis in range(len(p.shape(0))):
        p.link((0, axis))
        p.edit("shape", 0, 0, axis)


def _scatter(p: Ports) -> None:
    """The second input is written into the first along one axis."""
    along = p.attribute("axis", -2) % len(p.shape(0))
    for axis in range(len(p.shape(0))):
        if axis == along:
            p.block(axis, f"{p.node.op} writes along it", 0, 1, -1)
        else:
            p.link((0, axis), (1, axis), (-1, axis), *([(2, 0)] if axis == 0 else []))


RULES: Rules = {
    "along_axis": _along_an_axis,
    "concat": _concat,
    "constant_of_shape": _constant_of_shape,
    "depth_to_space": _depth_to_space,
    "expand": _expand,
    "gather": _gather,
    "pad": _pad,
    "reshape": _reshape,
    "resize": _resize,
    "sampled": _sampled,
    "scatter": _scatter,
    "shape": _shape,
    "slice": _slice,
    "split": _split,
    "tile": _tile,
    "transpose": _transpose,
}
