"""Channels cut from a graph, and the same graph with these channels masked instead.

    W2 diag(m) f(W1 x + b)   =   (W2 S) f(S^T W1 x + S^T b),      m in {0, 1}^n,  S: the columns of I where m = 1

``cut`` makes the right side: every constant, shape, split and index in the region loses the channels. ``mask`` makes
the left side and keeps all shapes: every node that sums over the channels reads zeros. Both sides are one function
where f treats every channel alike, whatever f makes of zero. The tests prove a cut by this equality.

A norm over the channels does not treat every channel alike, because a channel of zeros counts in the mean. There
``mask`` removes the channels in front of the node and puts zeros in their place behind the node.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Refused
from channelfold.passes.channels.cache import at_output
from channelfold.passes.channels.cut_regions import Part, Read, Region
from channelfold.passes.channels.renumber import renumber
from channelfold.passes.operators import operator
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import constant, free_name

Cut = tuple[Region, np.ndarray]  # a region and which of its labels stay, (size,) bool


def cut(graph: gs.Graph, cuts: Sequence[Cut]) -> None:
    """Cuts all labels that do not stay from the graph. Raises OutputError where the disk is full.

    The labels must be free, and no axis may lose all of its labels (``Region.completed``).
    """
    for region, keep in cuts:
        assert keep[~region.free].all()
        assert np.array_equal(keep, region.completed(keep))
    renumber(graph, cuts, "_cut")


def mask(graph: gs.Graph, cuts: Iterable[Cut]) -> None:
    """Masks all labels that do not stay: sums read zeros in their place, and norms leave them out.

    Raises Refused, with the reason, for a norm that cannot leave channels out.
    """
    for region, keep in cuts:
        for (_, axis), (tensor, labels) in region.axes.items():
            if edit.is_output(graph, tensor):  # a cache that is the model's own
                shape = [-1, *[1] * ((edit.rank(tensor) or 4) - axis - 1)]
                factor = keep[labels - 1].reshape(shape).astype(edit.dtype(tensor) or np.float32)
                at_output(graph, tensor, ("Mul", factor, {}))
        for part in filter(is_recurrence, region.parts):
            Mask.within(graph, part).set(keep)
        for read in region.reads:
            stays = keep[read.labels - 1]
            if stays.all():
                continue
            if not read.reduced:
                Mask.before(graph, read).set(keep)
            elif operator(read.node).kind == "norm" and operator(read.node).gamma == 1:
                _norm_of_the_rest(graph, read, stays)
            elif operator(read.node).kind == "reduce":
                _take(graph, read.node, read.port, read.axis, stays)
            else:
                raise Refused(f"{read.node.op} without some of its channels")


@dataclass(frozen=True)
class Mask:
    """A constant that masks channels. ``whole`` holds its values while all channels stay, ``labels`` its axis."""

    constant: gs.Constant
    whole: np.ndarray
    labels: np.ndarray
    axis: int

    @classmethod
    def before(cls, graph: gs.Graph, read: Read) -> Mask:
        """A new factor in front of a node that sums over channels."""
        tensor = read.node.inputs[read.port]
        whole = np.ones((read.labels.size, *[1] * (-1 - read.axis)), edit.dtype(tensor) or np.float32)
        factor = constant(graph, f"{tensor.name}_mask", whole)
        edit.set_input(read.node, read.port, _before(graph, read.node, "Mul", [tensor, factor], {}))
        return cls(factor, whole, read.labels, 0)

    @classmethod
    def within(cls, graph: gs.Graph, part: Part) -> Mask:
        """The recurrence weights of a cell, which sums over its own channels too, as a constant of its own."""
        whole = np.asarray(edit.value(part.node.inputs[part.input]))
        own = constant(graph, f"{part.node.name}_recurrence", whole)
        edit.set_input(part.node, part.input, own)
        return cls(own, whole, part.labels, part.axis)

    def set(self, keep: np.ndarray) -> None:
        """Masks all labels that do not stay, by ``keep`` (size of the region,) bool."""
        shape = [1] * self.whole.ndim
        shape[self.axis] = self.labels.size
        self.constant.values = self.whole * keep[self.labels - 1].reshape(shape).astype(self.whole.dtype)


def is_recurrence(part: Part) -> bool:
    """Whether a constant holds the recurrence weights of a cell, along the axis that the cell sums over."""
    return operator(part.node).gates > 0 and (part.input, part.axis) == (2, 2)


def _take(graph: gs.Graph, node: gs.Node, port: int, axis: int, stays: np.ndarray) -> None:
    """Puts a Gather of the channels that stay in front of a node."""
    tensor = node.inputs[port]
    index = constant(graph, f"{tensor.name}_kept", np.flatnonzero(stays))
    edit.set_input(node, port, _before(graph, node, "Gather", [tensor, index], {"axis": axis}))


def _norm_of_the_rest(graph: gs.Graph, read: Read, stays: np.ndarray) -> None:
    """Norms the channels that stay along the last axis, and writes zeros in the places of the others."""
    node, result = read.node, read.node.outputs[0]
    if read.axis != -1 or any(not t.is_empty() for t in node.outputs[1:]):
        raise Refused(f"{node.op} with several outputs or axes, without some of its channels")
    _take(graph, node, read.port, -1, stays)
    for port in range(1, len(node.inputs)):
        values = edit.value(node.inputs[port])
        if values is not None and values.shape[-1:] == stays.shape:
            edit.set_input(node, port, constant(graph, f"{node.name}_kept", np.compress(stays, values, axis=-1)))
    few = gs.Variable(free_name(graph, f"{result.name}_kept"), result.dtype)
    spread = np.eye(stays.size, dtype=edit.dtype(result) or np.float32)[stays]
    edit.set_output(node, 0, few)
    name = free_name(graph, f"{node.name}_spread")
    edit.insert_after(graph, node, gs.Node("MatMul", name, {}, [few, constant(graph, name, spread)], [result]))


def _before(graph: gs.Graph, node: gs.Node, op: str, inputs: list[gs.Tensor], attrs: dict) -> gs.Variable:
    """Puts a new node in front of another; returns the result of the new node."""
    result = gs.Variable(free_name(graph, f"{inputs[0].name}_{op.lower()}"), inputs[0].dtype)
    edit.insert(graph, gs.Node(op, free_name(graph, f"{node.name}_{op.lower()}"), attrs, inputs, [result]), before=node)
    return result
