"""The region of an axis: every tensor and constant that has its channels, from the graph alone.

``best_trace`` starts at one axis of one tensor and follows ``links`` forwards and backwards. Along each axis it keeps a
label for every position; positions that links put together share one. In the end labels are 1 .. n, and of each is
known what it stands for along which axis, and why it must stay, if it must.

A Reshape that splits channels leaves a choice: whole heads or the same channel of every head, say. The first that
leaves two or more labels to choose from is taken, outer axes first: heads, then channels of heads.

Where the model's own input or output has the channels, or an operator mixes them, they stay, with that reason. Sizes
computed from the length of a cut axis are followed to a shape they end in, or the axis stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import InBetween, Refused
from channelfold.passes.channels.links import LinkTable
from channelfold.passes.channels.maps import Classes
from channelfold.passes.channels.ports import Edit, Link
from channelfold.passes.channels.sizes import Length, Source, readers_of_size, source_of_size
from channelfold.passes.operators import operator
from channelfold.runtime.io import edit

CHOICES = 3  # alternatives of a Reshape that are tried


@dataclass(frozen=True)
class Part:
    """A constant that has the channels: ``input`` of ``node``, along ``axis``; ``labels`` (length of the axis,).

    ``role``: "out" of a weight whose rows make the channels, "in" of one that sums over them, "" of anything else.
    ``layer``: whose weight it is, where a Transpose, Cast or DequantizeLinear (``node``) is in between; else ``node``.
    """

    node: gs.Node
    input: int
    axis: int
    labels: np.ndarray
    role: str
    layer: gs.Node


@dataclass(frozen=True)
class Read:
    """Where a node sums over the channels, or norms or averages them: its input, the axis from the end, the labels.

    ``reduced``: why the result differs when channels are zero instead of gone; "" for a sum.
    """

    node: gs.Node
    port: int
    axis: int
    labels: np.ndarray
    reduced: str


@dataclass(frozen=True)
class NodeEdit:
    """What a cut changes in a node beside its constants (see ``links``); ``labels`` along the axis it names.

    ``source``: where a shape has the length of the axis from.
    """

    node: gs.Node
    what: str
    holder: int
    axis: int
    labels: np.ndarray
    source: Source | None = None


@dataclass
class Region:
    """Everything that has the channels of one tensor: labels 1 .. ``size``; ``fixed``: why a label stays, or "".

    ``blocks``: the nodes with several positions on one side for one on the other, as a Reshape into heads.
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
        """``keep`` (size,) bool, with the first label of every axis that would be left without any."""
        keep = keep.copy()
        for labels in [*(labels for _, labels in self.axes.values()), *(part.labels for part in self.parts)]:
            if not keep[labels - 1].any():
                keep[labels[0] - 1] = True
        return keep

    def copied(self, nodes: Mapping[str, gs.Node], tensors: Mapping[str, gs.Tensor]) -> Region:
        """The same region of a copy of the graph, whose ``nodes`` and ``tensors`` go by the same names."""

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
    """The region of an axis, with the alternative of its reshapes that leaves something to choose from.

    Raises Refused where the table is one of single channels and an operator does not let all of them through.
    """
    best: Region | None = None
    for choice in range(CHOICES):
        tracer = _Tracer(table=table, choice=choice)
        region = tracer.trace(tensor, axis)
        if best is None or region.free.sum() > best.free.sum():
            best = region
        if best.free.sum() > 1 or not tracer.chose:
            break
    assert best is not None
    return best


@dataclass
class _Tracer(Classes):
    """One trace. ``axes``: labels by (tensor, axis); ``held``: those of constants, by (node, input, axis)."""

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
        shape = self.table.shape(tensor)
        assert shape is not None
        self._reach(tensor, axis, None, self.fresh([shape[axis]]))
        while self.pending or self.waiting:
            if self.pending:
                self._expand(*self.pending.pop())
            else:
                self._choose(*self.waiting.pop())
        self._check_sizes()
        return self._region()

    # ---- one axis of one tensor --------------------------------------------------------------------------------------

    def _reach(self, tensor: gs.Tensor, axis: int, at: np.ndarray | None, labels: np.ndarray) -> None:
        """Positions ``at`` along an axis of an activation have these labels."""
        key = (id(tensor), axis)
        shape = self.table.shape(tensor)
        if shape is None:
            self.pin(labels, f"the shape of {tensor.name!r} is unknown")
            return
        if key not in self.axes:
            self.axes[key] = (tensor, self._spread(at, labels, shape[axis]))
            self.pending.append(key)
        else:
            known = self.axes[key][1]
            self.merge(known if at is None else known[at], labels)

    def _hold(self, node: gs.Node, port: int, axis: int, at: np.ndarray | None, labels: np.ndarray) -> None:
        """The same of a constant."""
        key = (id(node), port, axis)
        if key not in self.held:
            self.held[key] = (node, self._spread(at, labels, node.inputs[port].shape[axis]))
        else:
            known = self.held[key][1]
            self.merge(known if at is None else known[at], labels)

    def _spread(self, at: np.ndarray | None, labels: np.ndarray, size: int) -> np.ndarray:
        """Labels along a whole axis of which some positions have known ones."""
        if at is None:
            return np.broadcast_to(labels, (size,))
        along = self.fresh([size])
        along[at] = labels
        self.merge(along[at], labels)
        return along

    def _expand(self, identity: int, axis: int) -> None:
        tensor, labels = self.axes[identity, axis]
        if edit.is_output(self.table.graph, tensor):
            self.pin(labels, f"it is the output {tensor.name!r} of the model")
        writer = edit.producer(tensor)
        if writer is None:
            self.pin(labels, f"it is the input {tensor.name!r} of the model")
        elif len(tensor.inputs) == 1:
            port = next(-1 - k for k, t in enumerate(writer.outputs) if t is tensor)
            self._pass(writer, port, axis, labels)
        for node in edit.consumers(tensor):
            for port, other in enumerate(node.inputs):
                if other is tensor:
                    self._pass(node, port, axis, labels)

    def _pass(self, node: gs.Node, port: int, axis: int, labels: np.ndarray) -> None:
        """Goes from one port of a node to all others that have the channels."""
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
            if any((m.port, m.axis) == (port, axis) for link in alternatives for m in link):
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
            tensor = node.inputs[member.port] if member.port >= 0 else node.outputs[-1 - member.port]
            if isinstance(tensor, gs.Constant):
                self._hold(node, member.port, member.axis, member.at, values)
            else:
                self._reach(tensor, member.axis, member.at, values)
        return True

    def _decide(
        self, node: gs.Node, number: int, alternatives: list[Link], port: int, axis: int, labels: np.ndarray
    ) -> None:
        """A split of channels: from one of the parts its own link is followed, from the whole the one that was chosen.

        Which that is waits until nothing else is left to follow, for a part may be reached another way.
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
        if (id(node), number) in self.chosen:
            link = self.chosen[id(node), number]
        else:
            alternatives = self.table.of(node).choices[number]
            link = alternatives[min(self.choice, len(alternatives) - 1)]
            self.chosen[id(node), number] = link
            self.chose = True
        whole = link[0]
        tensor = node.inputs[whole.port] if whole.port >= 0 else node.outputs[-1 - whole.port]
        self._follow(node, link, whole.port, whole.axis, self.axes[id(tensor), whole.axis][1])

    # ---- sizes -------------------------------------------------------------------------------------------------------

    def _along(self, node: gs.Node, port: int, axis: int) -> np.ndarray | None:
        """The labels along an axis of a port of a node, None where it has none."""
        tensor = node.inputs[port] if port >= 0 else node.outputs[-1 - port]
        if isinstance(tensor, gs.Constant):
            found = self.held.get((id(node), port, axis))
        else:
            found = self.axes.get((id(tensor), axis))
        return found[1] if found is not None else None

    def _edits(self) -> Iterator[tuple[gs.Node, Edit, np.ndarray]]:
        nodes = {id(n): n for t, _ in self.axes.values() for n in (*t.inputs, *t.outputs)}
        for node in nodes.values():
            if not edit.in_graph(self.table.graph, node):
                continue
            try:
                edits = self.table.of(node).edits
            except Refused:
                continue
            for found in edits:
                labels = self._along(node, found[2], found[3])
                if labels is not None:
                    yield node, found, labels

    def _check_sizes(self) -> None:
        """Pins what a size is computed from, unless it ends in, or comes from, the length of an axis that is cut."""
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
        """Why the size of a result cannot be changed where it is written; "" where it can, or follows by itself."""
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
        edits = [self._node_edit(*found[:2], renumber(found[2])) for found in self._edits() if found[1][0] != "shape"]
        fixed = self.reasons(self.pins, renumber, size)
        return Region(size, fixed, axes, parts, list(self._reads(renumber)), edits, self.blocks)

    def _node_edit(self, node: gs.Node, found: Edit, labels: np.ndarray) -> NodeEdit:
        what, holder, _, axis = found
        source = source_of_size(node, holder, axis, self.table.shape) if what == "size" else None
        return NodeEdit(node, what, holder, axis, labels, source)

    def _role(self, node: gs.Node, port: int, axis: int) -> tuple[str, gs.Node]:
        """Whether a constant is a weight that makes the channels or sums over them, and whose."""
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
        links = [link for link in self.table.of(node).links if any((m.port, m.axis) == (0, axis) for m in link)]
        return [m.axis for link in links for m in link if m.port == -1 and m.at is None]

    def _weight_role(self, node: gs.Node, port: int, axis: int) -> str:
        shape, source = self.table.shape(node.inputs[port]), self.table.shape(node.inputs[0])
        if shape is None or source is None or (node.op == "MatMul" and axis < len(shape) - 2):
            return ""
        if operator(node).kind in ("conv", "fused_conv") and 1 < int(node.attrs.get("group", 1)) == source[1]:
            return ""  # depthwise: its channels come from before
        summed = any((m.port, m.axis) == (port, axis) for link in self.table.of(node).summed for m in link)
        return "in" if summed else "out"

    def _reads(self, renumber: Callable[[np.ndarray], np.ndarray]) -> Iterator[Read]:
        seen = set()
        for (_, axis), (tensor, labels) in self.axes.items():
            for node in edit.consumers(tensor):
                if not edit.in_graph(self.table.graph, node):
                    continue
                try:
                    links = self.table.of(node)
                except Refused:
                    continue
                for port in (k for k, other in enumerate(node.inputs) if other is tensor):
                    summed = any((m.port, m.axis) == (port, axis) for link in links.summed for m in link)
                    reduced = links.reduced.get((port, axis), "")
                    if (summed or reduced) and (id(node), port, axis) not in seen:
                        seen.add((id(node), port, axis))
                        rank = len(self.table.shape(tensor) or ())
                        yield Read(node, port, axis - rank, renumber(labels), reduced)
