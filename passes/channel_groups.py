"""Channel groups: which channels of which tensors have to be cut together, from the graph alone.

``trace`` starts at one axis of one tensor and follows ``links`` to every tensor and constant that has these channels,
forwards and backwards. Along each axis it keeps a label for every position; positions that links put together share
one. What comes out is a region: labels 1 .. n, what they stand for along which axis, and why some of them must stay.
Any set of labels that may go can be taken out of all of its tensors and constants, and the graph fits together again.

Within a region, labels that the same weights write form a ``Group``: one budget, one ranking. Worked example, a
residual block with a depthwise convolution, as ``channelfold inspect --groups`` prints it::

    y = Conv(x, A)  Relu  Conv(depthwise, D)  Relu  Conv(B)  Add(x)

    group  channels  prunable  written by  read by  also
    A      96        96        A           B        D (depthwise), 2 biases
    stem   24        24        stem, B     A, fc    the sum of the shortcut: both writers lose the same channels

A Reshape that splits channels leaves a choice: whole heads or the same channel of every head, say. The first that
leaves two or more labels to choose from is taken, outer axes first: heads, then channels of heads.

Where the model's own input or output has the channels, or an operator mixes them, they stay, with that reason. Sizes
computed from the length of a cut axis are followed to a shape they end in, or the axis stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes import edit
from channelfold.passes.affine import Blocked
from channelfold.passes.index_maps import Classes, Shape
from channelfold.passes.linear import LINEAR_OPS, NotLinear, view
from channelfold.passes.links import Edit, Link, Links, links_of
from channelfold.passes.shape_sizes import readers_of_size, source_of_size

CHOICES = 3  # alternatives of a Reshape that are tried


@dataclass(frozen=True)
class Part:
    """A constant that has the channels: ``input`` of ``node``, along ``axis``; ``labels`` (length of the axis,).

    ``role``: "out" of a weight whose rows make the channels, "in" of one that sums over them, "" of anything else.
    """

    node: gs.Node
    input: int
    axis: int
    labels: np.ndarray
    role: str


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
    """What a cut changes in a node beside its constants (see ``links.Edit``); ``labels`` along the axis it names."""

    node: gs.Node
    what: str
    holder: int
    axis: int
    labels: np.ndarray


@dataclass
class Region:
    """Everything that has the channels of one tensor: labels 1 .. ``size``; ``fixed``: why a label stays, or ""."""

    size: int
    fixed: list[str]
    axes: dict[tuple[int, int], tuple[gs.Tensor, np.ndarray]]
    parts: list[Part]
    reads: list[Read]
    edits: list[NodeEdit]

    @property
    def free(self) -> np.ndarray:
        """Which labels may go, (size,) bool."""
        return np.array([not reason for reason in self.fixed])

    @property
    def reduced(self) -> str:
        """Why cutting differs from masking (a norm over the channels), or ""."""
        return next((read.reduced for read in self.reads if read.reduced), "")


@dataclass(frozen=True)
class Group:
    """Labels of a region that the same weights write; ``name`` is the node that writes them first.

    ``labels`` (units,): one unit is what goes at once; ``channels`` (units,): how many rows of its first weight it is.
    """

    name: str
    region: Region
    labels: np.ndarray
    channels: np.ndarray
    writers: tuple[Part, ...]

    @property
    def units(self) -> int:
        return len(self.labels)

    @property
    def free(self) -> np.ndarray:
        """Which units may go, (units,) bool."""
        return self.region.free[self.labels - 1]

    @property
    def reasons(self) -> dict[str, int]:
        """How many units stay for which reason."""
        found: dict[str, int] = {}
        for label in self.labels:
            if reason := self.region.fixed[label - 1]:
                found[reason] = found.get(reason, 0) + 1
        return found

    def parts(self, role: str) -> list[Part]:
        """The constants with a role that some of its units are in."""
        return [p for p in self.region.parts if p.role == role and np.isin(p.labels, self.labels).any()]


class LinkTable:
    """The links of every node of a graph, looked up once. ``shapes``: of all tensors for some input, by name."""

    def __init__(self, graph: gs.Graph, shapes: Mapping[str, Shape]):
        self.graph, self.shapes = graph, shapes
        self._known: dict[int, Links | str] = {}

    def of(self, node: gs.Node) -> Links:
        """Raises Blocked, with the reason."""
        if id(node) not in self._known:
            try:
                self._known[id(node)] = links_of(self.graph, node, self.shapes)
            except Blocked as error:
                self._known[id(node)] = str(error)
        found = self._known[id(node)]
        if isinstance(found, str):
            raise Blocked(found)
        return found

    def shape(self, tensor: gs.Tensor) -> Shape | None:
        return tuple(tensor.shape) if isinstance(tensor, gs.Constant) else self.shapes.get(tensor.name)


def find_groups(graph: gs.Graph, shapes: Mapping[str, Shape]) -> list[Group]:
    """All channel groups of the weights of a graph, in the order in which they are written."""
    table = LinkTable(graph, shapes)
    seen: set[tuple[int, int]] = set()
    groups: list[Group] = []
    for node, axis in _written(graph, table):
        tensor = node.outputs[0]
        if (id(tensor), axis) in seen:
            continue
        region = best_trace(table, tensor, axis)
        seen |= set(region.axes)
        groups += _groups(region)
    return groups


def best_trace(table: LinkTable, tensor: gs.Tensor, axis: int) -> Region:
    """The region of an axis, with the alternative of its reshapes that leaves something to choose from."""
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


def _written(graph: gs.Graph, table: LinkTable) -> Iterator[tuple[gs.Node, int]]:
    """The nodes that make channels, with the axis of their first output: weights, recurrent cells, embeddings."""
    for node in graph.nodes:
        if not edit.is_standard(node):
            continue
        shape = table.shape(node.outputs[0])
        if shape is None:
            continue
        if node.op in ("Conv", "ConvTranspose"):
            groups = int(node.attrs.get("group", 1))
            source = table.shape(node.inputs[0])
            if groups == 1 or source is None or groups != source[1]:
                yield node, 1
        elif node.op == "Gemm":
            yield node, 1
        elif node.op == "MatMul" and len(shape) > 1:
            try:
                yield node, view(graph, node).out_axis % len(shape)
            except NotLinear:
                continue
        elif node.op in ("LSTM", "GRU", "RNN") and len(shape) == 4:
            yield node, 3
        elif node.op == "Gather" and isinstance(node.inputs[0], gs.Constant) and len(node.inputs[0].shape) == 2:
            yield node, len(shape) - 1


def _groups(region: Region) -> list[Group]:
    """The labels of a region sorted by the weights that write them; labels without any are left out."""
    writers = [part for part in region.parts if part.role == "out"]
    if not writers:
        return []
    written = np.zeros((region.size, len(writers)), bool)
    for column, part in enumerate(writers):
        written[part.labels - 1, column] = True
    groups = []
    patterns, inverse = np.unique(written, axis=0, return_inverse=True)
    for row in sorted(range(len(patterns)), key=lambda row: tuple(~patterns[row])):
        if not patterns[row].any():
            continue
        labels = np.flatnonzero(inverse.reshape(-1) == row) + 1
        mine = tuple(part for part, writes in zip(writers, patterns[row], strict=True) if writes)
        channels = np.bincount(mine[0].labels, minlength=region.size + 1)[labels]
        groups.append(Group(mine[0].node.name, region, labels, channels, mine))
    return groups


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
        except Blocked as error:
            self.pin(labels, str(error))
            return
        reason = links.blocked.get((port, axis))
        known = reason is not None
        if reason is not None:
            self.pin(labels, reason)
        for member, why in links.pinned:
            if (member.port, member.axis) == (port, axis):
                self.pin(labels[member.at], why)
        for link in (*links.links, *links.summed):
            known |= self._follow(node, link, port, axis, labels)
        for number, alternatives in enumerate(links.choices):
            if any((m.port, m.axis) == (port, axis) for link in alternatives for m in link):
                known = True
                self._decide(node, number, alternatives, port, axis, labels)
        if not known:
            self.pin(labels, f"{node.op} reads it" if port >= 0 else f"{node.op} writes it")

    def _follow(self, node: gs.Node, link: Link, port: int, axis: int, labels: np.ndarray) -> bool:
        """Gives the labels of one member of a link to the others; returns whether there was such a member."""
        mine = [m for m in link if (m.port, m.axis) == (port, axis)]
        if not mine:
            return False
        values = labels if mine[0].at is None else labels[mine[0].at]
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
            except Blocked:
                continue
            for found in edits:
                labels = self._along(node, found[2], found[3])
                if labels is not None:
                    yield node, found, labels

    def _check_sizes(self) -> None:
        """Pins what a size is computed from, unless it ends in, or comes from, the length of an axis that is cut."""
        for node, (what, holder, _, axis), labels in self._edits():
            if what == "size" and node.op != "Upsample":
                reason = self._wrong_source(node, holder, axis, labels)
                if reason:
                    self.pin(labels, reason)
            elif what == "shape":
                readers = readers_of_size(node, axis)
                if readers is None:
                    self.pin(labels, f"its size, read by {node.name!r}, is computed with")
                for reader, element in readers or ():
                    along = self._along(reader, -1, element)
                    if along is None or len(along) != len(labels):
                        self.pin(labels, f"its size is used in the shape of {reader.name!r}")
                    else:
                        self.merge(along, labels)

    def _wrong_source(self, node: gs.Node, holder: int, axis: int, labels: np.ndarray) -> str:
        """Why the size of a result cannot be changed where it is written; "" where it can, or follows by itself."""
        source = source_of_size(node, holder, axis)
        if source is None:
            return f"{node.op} {node.name!r} has a shape that is computed"
        if isinstance(source, tuple):
            tensor, of = source
            along = self.axes.get((id(tensor), of))
            if along is None:
                return f"{node.op} {node.name!r} takes its size from {tensor.name!r}"
            if len(along[1]) != len(labels):
                return f"{node.op} {node.name!r} takes its size from {tensor.name!r}, of another length"
            self.merge(along[1], labels)
        return ""

    # ---- the result --------------------------------------------------------------------------------------------------

    def _region(self) -> Region:
        used = [labels for _, labels in (*self.axes.values(), *self.held.values())]
        renumber, size = self.renumbered(used)
        axes = {key: (tensor, renumber(labels)) for key, (tensor, labels) in self.axes.items()}
        parts = [
            Part(node, port, axis, renumber(labels), self._role(node, port, axis))
            for (_, port, axis), (node, labels) in self.held.items()
        ]
        edits = [
            NodeEdit(node, what, holder, axis, renumber(labels))
            for node, (what, holder, _, axis), labels in self._edits()
            if what != "shape"
        ]
        fixed = self.reasons(self.pins, renumber, size)
        return Region(size, fixed, axes, parts, list(self._reads(renumber)), edits)

    def _role(self, node: gs.Node, port: int, axis: int) -> str:
        """Of a constant: whether a weight makes the channels or sums over them."""
        if node.op == "Gather" and port == 0:
            return "out"
        if not _is_weight(node, port):
            return ""
        summed = any((m.port, m.axis) == (port, axis) for link in self.table.of(node).summed for m in link)
        depthwise = node.op in LINEAR_OPS and math.prod(node.inputs[port].shape[1:2]) == 1 and axis == 0
        if depthwise and int(node.attrs.get("group", 1)) > 1:
            return ""
        return "in" if summed else "out"

    def _reads(self, renumber: Callable[[np.ndarray], np.ndarray]) -> Iterator[Read]:
        seen = set()
        for (_, axis), (tensor, labels) in self.axes.items():
            for node in edit.consumers(tensor):
                if not edit.in_graph(self.table.graph, node):
                    continue
                try:
                    links = self.table.of(node)
                except Blocked:
                    continue
                for port in (k for k, other in enumerate(node.inputs) if other is tensor):
                    summed = any((m.port, m.axis) == (port, axis) for link in links.summed for m in link)
                    reduced = links.reduced.get((port, axis), "")
                    if (summed or reduced) and (id(node), port, axis) not in seen:
                        seen.add((id(node), port, axis))
                        rank = len(self.table.shape(tensor) or ())
                        yield Read(node, port, axis - rank, renumber(labels), reduced)


def _is_weight(node: gs.Node, port: int) -> bool:
    if node.op in ("LSTM", "GRU", "RNN"):
        return port in (1, 2)
    return node.op in LINEAR_OPS and (port == 1 or (node.op == "MatMul" and port == 0))
