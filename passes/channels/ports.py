"""The members of a link, and how the rules of ``links``, ``link_moves`` and ``attention`` note links."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Refused
from channelfold.passes.channels.maps import Shape
from channelfold.runtime.io import edit


@dataclass(frozen=True)
class Member:
    """Position i of a link is position ``at[i]`` along ``axis`` of ``port``; without ``at`` it is i itself."""

    port: int
    axis: int
    at: np.ndarray | None = None


Link = tuple[Member, ...]
# what ("size", "group", "slice", "gather", "split", "hidden", "heads", "scale"), its input, port, axis
Edit = tuple[str, int, int, int]


@dataclass
class Links:
    """The links of one node.

    ``choices`` lists alternative links; exactly one link of each list holds. ``summed`` lists the links over which the
    node adds up. ``pinned`` lists positions that must stay, each with a reason. ``blocked`` and ``reduced`` give a
    reason for each (port, axis). ``edits`` lists the numbers of the node that a cut along (port, axis) changes; an edit
    of a size names the input that holds the shape.
    """

    links: list[Link] = field(default_factory=list)
    choices: list[list[Link]] = field(default_factory=list)
    summed: list[Link] = field(default_factory=list)
    pinned: list[tuple[Member, str]] = field(default_factory=list)
    blocked: dict[tuple[int, int], str] = field(default_factory=dict)
    reduced: dict[tuple[int, int], str] = field(default_factory=dict)
    edits: list[Edit] = field(default_factory=list)


def shape_of(tensor: gs.Tensor, shapes: Mapping[str, Shape]) -> Shape | None:
    """The shape of a constant, or of a tensor whose name is in ``shapes``; None for any other tensor."""
    return tuple(tensor.shape) if isinstance(tensor, gs.Constant) else shapes.get(tensor.name)


def known_shape(tensor: gs.Tensor, shapes: Mapping[str, Shape]) -> Shape:
    """``shape_of`` a tensor. Raises Refused where the shape is unknown."""
    shape = shape_of(tensor, shapes)
    if shape is None:
        raise Refused(f"the shape of {tensor.name!r} is unknown")
    return shape


def tensor_at(node: gs.Node, port: int) -> gs.Tensor:
    """The tensor at a port of a node: port k is input k, port -1 - k is output k."""
    return node.inputs[port] if port >= 0 else node.outputs[-1 - port]


def joins(link: Link, port: int, axis: int) -> bool:
    """Whether a link has a member along an axis of a port."""
    return any((member.port, member.axis) == (port, axis) for member in link)


class Ports:
    """A node, the shapes at its ports, and the links found so far. Axes may count from the end.

    ``LinkTable`` explains ``single``.
    """

    def __init__(self, graph: gs.Graph, node: gs.Node, shapes: Mapping[str, Shape], single: bool = False):
        self.graph, self.node, self._shapes, self.single = graph, node, shapes, single
        self.found = Links()

    def tensor(self, port: int) -> gs.Tensor:
        return tensor_at(self.node, port)

    def has(self, port: int) -> bool:
        tensors, index = (self.node.inputs, port) if port >= 0 else (self.node.outputs, -1 - port)
        return index < len(tensors) and not tensors[index].is_empty()

    def shape(self, port: int) -> Shape:
        """The shape at a port. Raises Refused where the shape is unknown."""
        return known_shape(self.tensor(port), self._shapes)

    def shape_of(self, tensor: gs.Tensor) -> Shape | None:
        return shape_of(tensor, self._shapes)

    def is_static(self, port: int, axis: int) -> bool:
        """Whether an axis has the same length for all inputs of the model, as far as the graph says."""
        shape = self.tensor(port).shape
        return shape is not None and len(shape) > axis and isinstance(shape[axis], int | np.integer)

    def link(self, *members: tuple[int, int] | tuple[int, int, np.ndarray], summed: bool = False) -> None:
        """Notes a link, without the members whose ports the node lacks."""
        made = []
        for port, axis, *at in members:
            if self.has(port):
                made.append(Member(port, axis % len(self.shape(port)), at[0] if at else None))
        (self.found.summed if summed else self.found.links).append(tuple(made))

    def keep(self, *axes: int) -> None:
        """Links each of these axes of the first input to the same axis of the outputs."""
        for axis in axes:
            self.link((0, axis), (-1, axis), (-2, axis))

    def block(self, axis: int, reason: str, *ports: int) -> None:
        """Notes why ``axis`` cannot be cut at ``ports``, by default at the first input and the first output."""
        for port in ports or (0, -1):
            self.found.blocked[port, axis % len(self.shape(port))] = reason

    def reduce(self, axis: int, reason: str, *ports: int) -> None:
        """Notes why channels of zero along ``axis`` count in the result, where channels that are gone do not."""
        for port in ports or (0, -1):
            if self.has(port):
                self.found.reduced[port, axis % len(self.shape(port))] = reason

    def edit(self, what: str, holder: int, port: int, axis: int) -> None:
        self.found.edits.append((what, holder, port, axis % len(self.shape(port))))

    def attribute(self, name: str, default: int) -> int:
        return int(self.node.attrs.get(name, default))

    def argument(self, index: int, name: str) -> np.ndarray | None:
        """A constant input or an attribute as an array (n,); None where the parameter is missing or computed."""
        return edit.argument(self.node, index, name)

    def computed(self, index: int) -> bool:
        """Whether the node has an input at ``index`` that is no constant."""
        return edit.has_input(self.node, index) and not isinstance(self.node.inputs[index], gs.Constant)


Rules = dict[str, Callable[[Ports], None]]  # by the kind of an operator: what notes the links of a node of this kind
