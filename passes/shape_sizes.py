"""Where the numbers in a shape come from and where they go.

Exporters write a shape as one constant, or put it together at run time: Concat of constants and of elements that Gather
or Slice take from a Shape. Both ways are followed element by element through operators that only move elements.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes import edit

_MOVING = ("Unsqueeze", "Squeeze", "Identity", "Cast", "Reshape", "Flatten")
_SHAPED = {"Reshape": 1, "Expand": 1, "Resize": 3}  # the input that is a shape


@dataclass(frozen=True)
class Written:
    """An element of a constant: ``element`` of the values, in C order, of ``input`` of ``node``."""

    node: gs.Node
    input: int
    element: int


@dataclass(frozen=True)
class Implied:
    """A size that nobody writes: 0 or -1 in a Reshape, or the operator works it out."""


def source_of_size(node: gs.Node, holder: int, element: int) -> Written | Implied | tuple[gs.Tensor, int] | None:
    """Where a node's input ``holder``, a shape, has an element from.

    A constant, or (tensor, axis) whose length it is; None where it is computed. Attributes count as written.
    """
    if not edit.has_input(node, holder):
        return Written(node, holder, element)
    return _source(node, holder, element)


def _source(node: gs.Node, port: int, element: int) -> Written | Implied | tuple[gs.Tensor, int] | None:
    tensor = node.inputs[port]
    values = edit.value(tensor)
    if values is not None:
        flat = values.reshape(-1)
        if element >= flat.size:
            return None
        copied = node.op == "Reshape" and port == 1 and flat[element] == 0 and not node.attrs.get("allowzero", 0)
        # -1 and 0 reach a Reshape through whatever moves them; nothing else writes sizes below 1
        return Implied() if flat[element] < 0 or copied else Written(node, port, element)
    before = edit.producer(tensor)
    if before is None or not edit.is_standard(before):
        return None
    if before.op == "Shape":
        axis = element + int(before.attrs.get("start", 0))
        return (before.inputs[0], axis) if axis >= 0 else None
    if before.op == "Concat":
        for k, piece in enumerate(before.inputs):
            size = _length(piece)
            if size is None:
                return None
            if element < size:
                return _source(before, k, element)
            element -= size
        return None
    if before.op == "Gather":
        picked = edit.value(before.inputs[1])
        if picked is None or element >= picked.size:
            return None
        size = _length(before.inputs[0])
        index = int(picked.reshape(-1)[element])
        return _source(before, 0, index if index >= 0 or size is None else index + size)
    if before.op == "Slice":
        taken = _taken(before)
        return None if taken is None or element >= len(taken) else _source(before, 0, int(taken[element]))
    if before.op in _MOVING:
        return _source(before, 0, element)
    return None


def readers_of_size(shape: gs.Node, axis: int) -> list[tuple[gs.Node, int]] | None:
    """The nodes whose shape has the length of an axis that a Shape node reads, with the element of their shape.

    None where something is computed with it, or it ends elsewhere.
    """
    start = int(shape.attrs.get("start", 0))
    end = shape.attrs.get("end")
    if start < 0 or (end is not None and end < 0):
        return None
    if axis < start or (end is not None and axis >= end):
        return []
    found: list[tuple[gs.Node, int]] = []
    pending = [(shape.outputs[0], axis - start)]
    while pending:
        tensor, element = pending.pop()
        for node in edit.consumers(tensor):
            for port, other in enumerate(node.inputs):
                if other is not tensor:
                    continue
                moved = _moved(node, port, element)
                if moved is None:
                    return None
                if _SHAPED.get(node.op) == port:
                    found.append((node, element))
                else:
                    pending += [(node.outputs[0], place) for place in moved]
    return found


def _moved(node: gs.Node, port: int, element: int) -> list[int] | None:
    """Which elements of its result a node makes of one of an input; None where it does more than move it."""
    if not edit.is_standard(node):
        return None
    if _SHAPED.get(node.op) == port:
        return []
    if node.op in _MOVING and port == 0:
        return [element]
    if node.op == "Gather" and port == 0:
        picked, size = edit.value(node.inputs[1]), _length(node.inputs[0])
        if picked is None or size is None:
            return None
        return np.flatnonzero(picked.reshape(-1) % size == element).tolist()
    if node.op == "Slice" and port == 0:
        taken = _taken(node)
        return None if taken is None else np.flatnonzero(taken == element).tolist()
    if node.op == "Concat":
        before = 0
        for piece in node.inputs[:port]:
            size = _length(piece)
            if size is None:
                return None
            before += size
        return [before + element]
    return None


def _length(tensor: gs.Tensor) -> int | None:
    """The number of elements of a tensor of sizes."""
    if tensor.shape is None or not all(isinstance(d, int | np.integer) for d in tensor.shape):
        node = edit.producer(tensor)
        if node is not None and node.op == "Shape" and node.inputs[0].shape is not None:
            return len(node.inputs[0].shape)
        return None
    return int(np.prod(tensor.shape))


def _taken(node: gs.Node) -> np.ndarray | None:
    size = _length(node.inputs[0])
    starts, ends = edit.argument(node, 1, "starts"), edit.argument(node, 2, "ends")
    steps = edit.argument(node, 4, "steps")
    if size is None or starts is None or ends is None or starts.size != 1:
        return None
    if steps is None and edit.has_input(node, 4):
        return None
    return np.arange(size)[slice(int(starts[0]), int(ends[0]), 1 if steps is None else int(steps[0]))]
