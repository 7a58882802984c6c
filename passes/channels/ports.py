"""What a link is made of, and how the rules of ``links`` and ``link_moves`` note them."""

from __future__ import annotations

from collections.abc import Mapping
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
Edit = tuple[
    str, int, int, int
]  # what ("size", "group", "slice", "gather", "split", "hidden", "heads", "scale"), its input, port, axis


@dataclass
class Links:
    """``blocked`` and ``reduced``: reasons by (port, axis). ``choices``: of each, links of which one holds. ``pinned``:
    positions that have to stay, with the reason. ``summed``: the links over which a node adds up, whose channels it
    reads. ``edits``: what a cut along (port, axis) changes beside the data; of a size, the input that holds it, at the
    place of the axis.
    """

    links: list[Link] = field(default_factory=list)
    choices: list[list[Link]] = field(default_factory=list)
    summed: list[Link] = field(default_factory=list)
    pinned: list[tuple[Member, str]] = field(default_factory=list)
    blocked: dict[tuple[int, int], str] = field(default_factory=dict)
    reduced: dict[tuple[int, int], str] = field(default_factory=dict)
    edits: list[Edit] = field(default_factory=list)


class Ports:
    """A node, the shapes at its ports, and the links found so far. Axes may count from the end.

    ``single``: see ``LinkTable``.
    """

    def __init__(self, graph: gs.Graph, node: gs.Node, shapes: Mapping[str, Shape], single: bool = False):
        self.graph, self.node, self._shapes, self.single = graph, node, shapes, single
        self.found = Links()

    def tensor(self, port: int) -> gs.Tensor:
        return self.node.inputs[port] if port >= 0 else self.node.outputs[-1 - port]

    def has(self, port: int) -> bool:
        tensors, index = (self.node.inputs, port) if port >= 0 else (self.node.outputs, -1 - port)
        return index < len(tensors) and not tensors[index].is_empty()

    def shape(self, port: int) -> Shape:
        """Raises Refused where it is unknown."""
        shape = self.shape_of(self.tensor(port))
        if shape is None:
            raise Refused(f"the shape of {self.tensor(port).name!r} is unknown")
        return shape

    def shape_of(self, tensor: gs.Tensor) -> Shape | None:
        return tuple(tensor.shape) if isinstance(tensor, gs.Constant) else self._shapes.get(tensor.name)

    def is_static(self, port: int, axis: int) -> bool:
        """Whether an axis is known to have one length whatever the inputs are."""
        shape = self.tensor(port).shape
        return shape is not None and len(shape) > axis and isinstance(shape[axis], int | np.integer)

    def link(self, *members: tuple[int, int] | tuple[int, int, np.ndarray], summed: bool = False) -> None:
        """Notes a link of the ports that are there."""
        made = []
        for port, axis, *at in members:
            if self.has(port):
                made.append(Member(port, axis % len(self.shape(port)), at[0] if at else None))
        (self.found.summed if summed else self.found.links).append(tuple(made))

    def keep(self, *axes: int) -> None:
        """The node leaves these axes of its data alone."""
        for axis in axes:
            self.link((0, axis), (-1, axis), (-2, axis))

    def block(self, axis: int, reason: str, *ports: int) -> None:
        """``ports``: all that have the axis, or else the first input and output."""
        for port in ports or (0, -1):
            self.found.blocked[port, axis % len(self.shape(port))] = reason

    def reduce(self, axis: int, reason: str, *ports: int) -> None:
        for port in ports or (0, -1):
            if self.has(port):
                self.found.reduced[port, axis % len(self.shape(port))] = reason

    def edit(self, what: str, holder: int, port: int, axis: int) -> None:
        self.found.edits.append((what, holder, port, axis % len(self.shape(port))))

    def attribute(self, name: str, default: int) -> int:
        return int(self.node.attrs.get(name, default))

    def argument(self, index: int, name: str) -> np.ndarray | None:
        """A parameter that is a constant input or an attribute, (n,); None where it is missing or computed."""
        return edit.argument(self.node, index, name)

    def computed(self, index: int) -> bool:
        """Whether an input is there and not constant."""
        return edit.has_input(self.node, index) and not isinstance(self.node.inputs[index], gs.Constant)
