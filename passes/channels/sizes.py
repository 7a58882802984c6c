"""The origin of the numbers in a shape, and the shapes that use the length of an axis.

Exporters write a shape as one constant, or assemble the shape at run time: a Concat of constants and of elements that
Gather or Slice take from a Shape. The functions here follow single elements through operators that only move elements,
and through the Where that PyTorch puts in front of an Expand: Where(shape = -1, 1, shape).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.channels.maps import slices
from channelfold.passes.operators import operator
from channelfold.runtime.io import edit

ShapeOf = Callable[[gs.Tensor], tuple[int, ...] | None]


@dataclass(frozen=True)
class Written:
    """An element of a constant: ``element`` of its values, in C order.

    ``ports`` is the path to the constant: an input of the node that has the shape, an input of the node that writes
    this input, and so on.
    """

    ports: tuple[int, ...]
    element: int
    value: int


@dataclass(frozen=True)
class Length:
    """The length of an axis of a tensor."""

    tensor: gs.Tensor
    axis: int


@dataclass(frozen=True)
class Implied:
    """A size that follows from the data: -1 in a Reshape, or 1 in an Expand."""


Source = Written | Length | Implied


def source_of_size(node: gs.Node, holder: int, element: int, shape_of: ShapeOf) -> Source | None:
    """The origin of an element of the shape (input ``holder`` or an attribute) of a node; None for a computed size."""
    if edit.has_input(node, holder):
        found = _source(node, holder, element, shape_of)
    else:
        values = node.attrs.get("shape") or ()
        found = Written((), element, int(values[element])) if element < len(values) else None
    if not isinstance(found, Written):
        return found
    if found.value == 0 and node.op == "Reshape" and not node.attrs.get("allowzero", 0):
        return Length(node.inputs[0], element)
    # 1 in the shape of an Expand keeps the length of the data; a new axis has length 1 and no channels
    return Implied() if found.value < 0 or (found.value == 1 and node.op == "Expand") else found


def _source(node: gs.Node, port: int, element: int, shape_of: ShapeOf) -> Source | None:
    tensor = node.inputs[port]
    values = edit.value(tensor)
    if values is not None:
        flat = values.reshape(-1)
        return Written((port,), element, int(flat[element])) if element < flat.size else None
    before = edit.producer(tensor)
    if before is None or not edit.is_standard(before):
        return None
    if before.op == "Shape":
        axes = _axes(before, shape_of)
        return Length(before.inputs[0], axes[element]) if element < len(axes) else None
    found = None
    if before.op == "Where":
        found = _chosen(before, element, shape_of)
    elif element < len(origins := _origins(before, shape_of) or ()):
        found = _source(before, *origins[element], shape_of)
    return replace(found, ports=(port, *found.ports)) if isinstance(found, Written) else found


def _origins(node: gs.Node, shape_of: ShapeOf) -> list[tuple[int, int]] | None:
    """(input, element of the input) of each element of the result of a node that moves elements; None for others."""
    sizes = [_length(tensor, shape_of) for tensor in node.inputs]
    if node.op == "Concat":
        known = [size for size in sizes if size is not None]
        return [(k, i) for k, size in enumerate(known) for i in range(size)] if len(known) == len(sizes) else None
    if sizes[0] is None:
        return None
    taken = np.arange(sizes[0]) if operator(node).copies else _taken(node, sizes[0])
    return None if taken is None else [(0, i) for i in taken.tolist()]


def _taken(node: gs.Node, size: int) -> np.ndarray | None:
    """The elements of a vector of sizes that a Gather or Slice takes."""
    if node.op == "Gather":
        picked = edit.value(node.inputs[1])
        return None if picked is None else picked.reshape(-1) % size
    _, cut = slices(node, (size,)).get(0, (0, slice(None))) if node.op == "Slice" else (0, None)
    return None if cut is None else np.arange(size)[cut]


def _chosen(where: gs.Node, element: int, shape_of: ShapeOf) -> Source | None:
    """An element of Where(Equal(shape, -1), other, shape)."""
    test = edit.producer(where.inputs[0])
    if test is None or test.op != "Equal" or not any(t is where.inputs[2] for t in test.inputs):
        return None
    if not any(_is_negative(t) for t in test.inputs) or len({_length(t, shape_of) for t in where.inputs}) != 1:
        return None
    found = _source(where, 2, element, shape_of)
    return _source(where, 1, element, shape_of) if isinstance(found, Written) and found.value < 0 else found


def _is_negative(tensor: gs.Tensor) -> bool:
    """Whether all values of a constant are negative, so that a comparison with a size of an axis is always false."""
    values = edit.value(tensor)
    return values is not None and bool((values < 0).all())


def readers_of_size(graph: gs.Graph, node: gs.Node, axis: int, shape_of: ShapeOf) -> list[tuple[gs.Node, int]] | None:
    """(node, element of its shape) for every node whose shape uses the length of an axis that a Shape node reads.

    None where a node computes with the length, or the length ends anywhere but in a shape.
    """
    axes = _axes(node, shape_of)
    found: list[tuple[gs.Node, int]] = []
    pending = [(node.outputs[0], axes.index(axis))] if axis in axes else []
    while pending:
        tensor, element = pending.pop()
        if edit.is_output(graph, tensor):
            return None
        for reader in edit.consumers(tensor):
            for port in (k for k, other in enumerate(reader.inputs) if other is tensor):
                if not edit.in_graph(graph, reader) or not edit.is_standard(reader):
                    return None
                if operator(reader).sized == port:
                    found.append((reader, element))
                    continue
                moved = _moved(reader, port, element, shape_of)
                if moved is None:
                    return None
                pending += [(reader.outputs[0], place) for place in moved]
    return found


def _axes(node: gs.Node, shape_of: ShapeOf) -> list[int]:
    """The axes whose lengths a Shape node writes."""
    rank = len(shape_of(node.inputs[0]) or ())
    return list(range(rank)[slice(node.attrs.get("start", 0), node.attrs.get("end"))])


def _moved(node: gs.Node, port: int, element: int, shape_of: ShapeOf) -> list[int] | None:
    """The elements of its result that a node copies from an element of an input; None where the node computes."""
    if node.op == "Shape" or (node.op == "Equal" and _is_negative(node.inputs[1 - port])):
        return []
    if node.op == "Where" and len({_length(tensor, shape_of) for tensor in node.inputs}) == 1:
        return [element]
    origins = _origins(node, shape_of) if port == 0 or node.op == "Concat" else None
    return None if origins is None else [place for place, origin in enumerate(origins) if origin == (port, element)]


def _length(tensor: gs.Tensor, shape_of: ShapeOf) -> int | None:
    """The number of elements of a tensor of sizes."""
    shape = shape_of(tensor)
    return None if shape is None else int(np.prod(shape))
