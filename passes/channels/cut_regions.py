"""The region of an axis: every tensor and constant that has the channels of the axis, from the graph alone.

``best_trace`` starts at one axis of one tensor and follows ``links`` forwards and backwards. The trace keeps a label
for every position along every axis; positions that a link puts together share one label. The result has labels 1 .. n.
It tells where each label stands along which axes, and why the label must stay, if it must.

A Reshape that splits channels leaves a choice: whole heads, or the same channel of every head, say. The trace tries the
outer axes first (heads, then channels of heads) and takes the first alternative that leaves two or more free labels.

Channels stay where an input or output of the model has them, or where an operator mixes them. The trace follows sizes
that are computed from the length of a cut axis; the axis stays where such a size ends in anything but a shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import InBetween, Refused
from channelfold.passes.channels.links import LinkTable
from channelfold.passes.channels.maps import Classes
from channelfold.passes.channels.ports import Edit, Link, joins, tensor_at
from channelfold.passes.channels.sizes import Length, Source, readers_of_size, source_of_size
from channelfold.passes.operators import operator
from channelfold.runtime.io import edit

CHOICES = 3  # alternatives of a Reshape that a trace tries


@dataclass(frozen=True)
class Part:
    """A constant that has the channels: ``input`` of ``node``, along ``axis``; ``labels`` (length of the axis,).

    ``role`` is "out" for a weight whose rows make the channels, "in" for a weight that sums over them, else "".
    ``layer`` is the node that multiplies by the weight. A Transpose, Cast or DequantizeLinear in between is ``node``;
    without one ``layer`` is ``node``.
    """

    node: gs.Node
    input: int
    axis: int
    labels: np.ndarray
    role: str
    layer: gs.Node


@dataclass(frozen=True)
class Read:
    """An input of a node that sums over the channels, normalizes or averages them; ``axis`` counts from the end.

    ``reduced`` is the reason why channels of zero give another result than missing channels; "" for a sum.
    """

    node: gs.Node
    port: int
    axis: int
    labels: np.ndarray
    reduced: str


@dataclass(frozen=True)
class NodeEdit:
    """A number of a node that a cut changes (``links`` explains edits), and the labels of its axis.

    ``source`` is the origin of the length in a shape.
    """

    node: gs.Node
    what: str
    holder: int
    axis: int
    labels: np.ndarray
    source: Source | None = None


@dataclass
class Region:
    """Everything that has the channels of one tensor, with labels 1 .. ``size``.

    ``fixed`` gives the reason why each label must stay, "" for a free label. ``axes`` holds the labels of activations
    by tensor and axis. ``blocks`` lists the nodes that link one position to several, as a Reshape into heads does.
    """

    size: int
    fixed: list[str]
    axes: dict[tuple[int, int], tuple[gs.Tensor, np.ndarray]]
    parts: list[Part]
    reads: list[Read]
    edits: list[NodeEdit]
    blocks: list[gs.Node]

    @property
    def free(self) -> np.ndarray:
        """Which labels may go, (size,) bool."""
        return np.array([not reason for reason in self.fixed])

    def completed(self, keep: np.ndarray) -> np.ndarray:
        """``keep`` (size,) bool, plus the first label of every axis that would lose all of its labels."""
        keep = keep.copy()
        for labels in [*(labels for _, labels in self.axes.values()), *(part.labels for part in self.parts)]:
            if not keep[labels - 1].any():
                keep[labels[0] - 1] = True
        return keep

    def copied(self, nodes: Mapping[str, gs.Node], tensors: Mapping[str, gs.Tensor]) -> Region:
        """The same region in a copy of the graph; ``nodes`` and ``tensors`` of the copy have the same names."""

        def source(found: Source | None) -> Source | None:
            return replace(found, tensor=tensors[found.tensor.name]) if isinstance(found, Length) else found

        axes = {(id(tensors[t.name]), axis): (tensors[t.name], labels) for (_, axis), (t, labels) in self.axes.items()}
        parts = [replace(part, node=nodes[part.node.name], layer=nodes[part.layer.name]) for part in self.parts]
        reads = [replace(read, node=nodes[read.node.name]) for read in self.reads]
        edits = [replace(edit, node=nodes[edit.node.name], source=source(edit.source)) for edit in self.edits]
        blocks = [nodes[node.name] for node in self.blocks]
        return Region(self.size, self.fixed, axes, parts, reads, edits, blocks)

    @property
    def reduced(self) -> str:
        """Why cutting differs from masking (a norm over the channels), or ""."""
        return next((read.reduced for read in self.reads if read.reduced), "")


def best_trace(table: LinkTable, tensor: gs.Tensor, axis: int) -> Region:
    """The region of an axis, traced with the first choices at reshapes that leave two or more free labels.

    Raises Refused where the table follows single channels and an operator does not pass each of them alone.
    """
    regions = []
    for choice in range(CHOICES):
        tracer = _Tracer(table=table, choice=choice)
        regions.append(tracer.trace(tensor, axis))
        if regions[-1].free.sum() > 1 or not tracer.chose:
            break
    return max(regions, key=lambda region: region.free.sum())


@dataclass
class _Tracer(Classes):
    """One trace.

    ``axes`` holds the labels of activations by (tensor, axis), ``held`` the labels of constants by (node, input, axis).
    ``pending`` lists the axes to follow, ``waiting`` the choices to make, and ``chosen`` the choices made so far.
    """

    table: LinkTable = field(kw_only=True)
    choice: int = field(kw_only=True)
    axes: dict[tuple[int, int], tuple[gs.Tensor, np.ndarray]] = field(default_factory=dict)
    held: dict[tuple[int, int, int], tuple[gs.Node, np.ndarray]] = field(default_factory=dict)
    pending: list[tuple[int, int]] = field(default_factory=list)
    waiting: list[tuple[gs.Node, int]] = field(default_factory=list)
    chosen: dict[tuple[int, int], Link] = field(default_factory=dict)
    blocks: list[gs.Node] = field(default_factory=list)
    chose: bool = False

    def trace(self, tensor: gs.Tensor, axis: int) -> Region:
        self._reach(tensor, axis, None, self.fresh([self.table.known_shape(tensor)[axis]]))
        while self.pending or self.waiting:
            if self.pending:
                self._expand(*self.pending.pop())
            else:
                self._choose(*self.waiting.pop())
        self._check_sizes()
        return self._region()

    # ---- one axis of one tensor --------------------------------------------------------------------------------------

    def _reach(self, tensor: gs.Tensor, axis: int, at: np.ndarray | None, labels: np.ndarray) -> None:
        """Gives labels to the positions ``at`` along an axis of an activation."""
        shape = self.table.shape(tensor)
        if shape is None:
            self.pin(labels, f"the shape of {tensor.name!r} is unknown")
        elif (id(tensor), axis) in self.axes:
            self._meet(self.axes[id(tensor), axis][1], at, labels)
        else:
            self.axes[id(tensor), axis] = tensor, self._spread(at, labels, shape[axis])
            self.pending.append((id(tensor), axis))

    def _hold(self, node: gs.Node, port: int, axis: int, at: np.ndarray | None, labels: np.ndarray) -> None:
        """Gives labels to the positions ``at`` along an axis of a constant."""
        key = (id(node), port, axis)
        if key in self.held:
            self._meet(self.held[key][1], at, labels)
            return
        self.held[key] = node, self._spread(at, labels, node.inputs[port].shape[axis])
        readers = edit.consumers(node.inputs[port])
        if not all(edit.in_graph(self.table.graph, reader) for reader in readers):  # which would need a copy
            self.pin(labels, "another part of the model reads the same weight")

    def _meet(self, known: np.ndarray, at: np.ndarray | None, labels: np.ndarray) -> None:
        self.merge(known if at is None else known[at], labels)

    def _spread(self, at: np.ndarray | None, labels: np.ndarray, size: int) -> np.ndarray:
        """Labels along a whole axis: ``labels`` at positions ``at``, fresh labels elsewhere."""
        if at is None:
            return np.broadcast_to(labels, (size,))
        along = self.fresh([size])
        along[at] = labels
        self.merge(along[at], labels)
        return along

    def _expand(self, identity: int, axis: int) -> None:
        tensor, labels = self.axes[identity, axis]
        writer, caches = edit.producer(tensor), self.table.caches
        if edit.is_output(self.table.graph, tensor) and not caches.owns(tensor):
            self.pin(labels, caches.why(f"it is the output {tensor.name!r} of the model", tensor))
        if writer is None and not caches.owns(tensor):
            self.pin(labels, caches.why(f"it is the input {tensor.name!r} of the model", tensor))
        elif writer is not None and len(tensor.inputs) == 1:
            port = next(-1 - k for k, t in enumerate(writer.outputs) if t is tensor)
            self._pass(writer, port, axis, labels)
        for node in edit.consumers(tensor):
            for port, other in enumerate(node.inputs):
                if other is tensor:
                    self._pass(node, port, axis, labels)

    def _pass(self, node: gs.Node, port: int, axis: int, labels: np.ndarray) -> None:
        """Follows the channels from one port of a node to all other ports that have them."""
        if not edit.in_graph(self.table.graph, node):
            self.pin(labels, "a subgraph reads it")
            return
        try:
            links = self.table.of(node)
        except Refused as error:
            self._stop(node, labels, str(error))
            return
        reason = links.blocked.get((port, axis)) or (self.table.single and links.reduced.get((port, axis))) or None
        known = reason is not None
        if reason is not None:
            self._stop(node, labels, reason)
        for member, why in links.pinned:
            if (member.port, member.axis) == (port, axis):
                self._stop(node, labels[member.at], why)
        for link in (*links.links, *links.summed):
            known |= self._follow(node, link, port, axis, labels)
        for number, alternatives in enumerate(links.choices):
            if any(joins(link, port, axis) for link in alternatives):
                known = True
                self._decide(node, number, alternatives, port, axis, labels)
        if not known:
            self._stop(node, labels, f"{node.op} reads it" if port >= 0 else f"{node.op} writes it")

    def _stop(self, node: gs.Node, labels: np.ndarray, reason: str) -> None:
        if self.table.single:
            raise InBetween(node.op)
        self.pin(labels, reason)

    def _follow(self, node: gs.Node, link: Link, port: int, axis: int, labels: np.ndarray) -> bool:
        """Gives the labels of one member of a link to the others; returns whether there was such a member."""
        mine = [m for m in link if (m.port, m.axis) == (port, axis)]
        if not mine:
            return False
        values = labels if mine[0].at is None else labels[mine[0].at]
        if any(m.at is not None and np.unique(m.at).size < m.at.size for m in link):
            self.blocks.append(node)
        for member in link:
            if member is mine[0]:
                continue
            tensor = tensor_at(node, member.port)
            if isinstance(tensor, gs.Constant):
                self._hold(node, member.port, member.axis, member.at, values)
            else:
                self._reach(tensor, member.axis, member.at, values)
        return True

    def _decide(
        self, node: gs.Node, number: int, alternatives: list[Link], port: int, axis: int, labels: np.ndarray
    ) -> None:
        """Follows a Reshape that splits channels: the link of a part from that part, the chosen link from the whole.

        The choice waits until nothing else is left to follow, because the trace may reach a part on another way.
        """
        link = self.chosen.get((id(node), number))
        parts = [a for a in alternatives if (a[1].port, a[1].axis) == (port, axis)]
        if parts:
            self.chosen.setdefault((id(node), number), parts[0])
            self._follow(node, parts[0], port, axis, labels)
        elif link is not None:
            self._follow(node, link, port, axis, labels)
        else:
            self.waiting.append((node, number))

    def _choose(self, node: gs.Node, number: int) -> None:
        if (id(node), number) not in self.chosen:
            alternatives = self.table.of(node).choices[number]
            self.chosen[id(node), number] = alternatives[min(self.choice, len(alternatives) - 1)]
            self.chose = True
        link = self.chosen[id(node), number]
        whole = link[0]
        labels = self.axes[id(tensor_at(node, whole.port)), whole.axis][1]
        self._follow(node, link, whole.port, whole.axis, labels)

    # ---- sizes -------------------------------------------------------------------------------------------------------

    def _along(self, node: gs.Node, port: int, axis: int) -> np.ndarray | None:
        """The labels along an axis of a port of a node, None where the axis has none."""
        tensor = tensor_at(node, port)
        held = isinstance(tensor, gs.Constant)
        found = self.held.get((id(node), port, axis)) if held else self.axes.get((id(tensor), axis))
        return found[1] if found is not None else None

    def _edits(self) -> Iterator[tuple[gs.Node, Edit, np.ndarray]]:
        nodes = {id(n): n for t, _ in self.axes.values() for n in (*t.inputs, *t.outputs)}
        for node in nodes.values():
            for found in self.table.known(node).edits:
                labels = self._along(node, found[2], found[3])
                if labels is not None:
                    yield node, found, labels

    def _check_sizes(self) -> None:
        """Pins axes whose length is used in a computation, and axes whose length in a shape comes from elsewhere."""
        graph, shape_of = self.table.graph, self.table.shape
        for node, (what, holder, _, axis), labels in self._edits():
            if what == "size":
                reason = self._wrong_source(source_of_size(node, holder, axis, shape_of), labels)
                if reason:
                    self._stop(node, labels, f"{node.op} {node.name!r} {reason}")
            elif what == "shape":
                readers = readers_of_size(graph, node, axis, shape_of)
                if readers is None:
                    self._stop(node, labels, f"its size, read by {node.name!r}, is computed with")
                for reader, element in readers or ():
                    along = self._along(reader, -1, element)
                    if along is None or len(along) != len(labels):
                        self._stop(node, labels, f"its size is used in the shape of {reader.name!r}")
                    else:
                        self.merge(along, labels)

    def _wrong_source(self, source: Source | None, labels: np.ndarray) -> str:
        """Why the size of a result cannot change with the axis; "" where the size can change."""
        if source is None:
            return "has a shape that is computed"
        if isinstance(source, Length):
            along = self.axes.get((id(source.tensor), source.axis))
            if along is None:
                return f"takes its size from {source.tensor.name!r}"
            if len(along[1]) != len(labels):
                return f"takes its size from {source.tensor.name!r}, of another length"
            self.merge(along[1], labels)
        return ""

    # ---- the result --------------------------------------------------------------------------------------------------

    def _region(self) -> Region:
        used = [labels for _, labels in (*self.axes.values(), *self.held.values())]
        renumber, size = self.renumbered(used)
        axes = {key: (tensor, renumber(labels)) for key, (tensor, labels) in self.axes.items()}
        parts = [
            Part(node, port, axis, renumber(labels), *self._role(node, port, axis))
            for (_, port, axis), (node, labels) in self.held.items()
        ]
        edits = []
        for node, (what, holder, _, axis), labels in self._edits():
            source = source_of_size(node, holder, axis, self.table.shape) if what == "size" else None
            if what != "shape":
                edits.append(NodeEdit(node, what, holder, axis, renumber(labels), source))
        fixed = self.reasons(self.pins, renumber, size)
        return Region(size, fixed, axes, parts, list(self._reads(renumber)), edits, self.blocks)

    def _role(self, node: gs.Node, port: int, axis: int) -> tuple[str, gs.Node]:
        """The role of a constant, and the node that reads it as a weight (``Part`` explains both)."""
        known = operator(node)
        if known.kind == "gather" and port == 0:
            return "out" if axis > 0 else "", node
        if port in known.weights:
            return self._weight_role(node, port, axis), node
        if (known.copies or known.kind in ("quantize", "transpose")) and port == 0:
            for result in self._moved_to(node, axis):
                for layer in edit.consumers(node.outputs[0]):
                    for place in (k for k, other in enumerate(layer.inputs) if other is node.outputs[0]):
                        role, owner = self._role(layer, place, result)
                        if role:
                            return role, owner
        return "", node

    def _moved_to(self, node: gs.Node, axis: int) -> list[int]:
        """The axes of the first output of a node that have the same positions as an axis of its first input."""
        links = [link for link in self.table.of(node).links if joins(link, 0, axis)]
        return [m.axis for link in links for m in link if m.port == -1 and m.at is None]

    def _weight_role(self, node: gs.Node, port: int, axis: int) -> str:
        shape, source = self.table.shape(node.inputs[port]), self.table.shape(node.inputs[0])
        if shape is None or source is None or (node.op == "MatMul" and axis < len(shape) - 2):
            return ""
        if operator(node).kind in ("conv", "fused_conv") and 1 < int(node.attrs.get("group", 1)) == source[1]:
            return ""  # a depthwise convolution keeps the channels of its input
        return "in" if any(joins(link, port, axis) for link in self.table.of(node).summed) else "out"

    def _reads(self, renumber: Callable[[np.ndarray], np.ndarray]) -> Iterator[Read]:
        seen = set()
        for (_, axis), (tensor, labels) in self.axes.items():
            for node in edit.consumers(tensor):
                links = self.table.known(node)
                for port in (k for k, other in enumerate(node.inputs) if other is tensor):
                    summed = any(joins(link, port, axis) for link in links.summed)
                    reduced = links.reduced.get((port, axis), "")
                    if (summed or reduced) and (id(node), port, axis) not in seen:
                        seen.add((id(node), port, axis))
                        rank = len(self.table.shape(tensor) or ())
                        yield Read(node, port, axis - rank, renumber(labels), reduced)
