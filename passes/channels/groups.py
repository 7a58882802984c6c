"""Channel groups: the channels of tensors that must be cut together, from the graph alone.

``best_trace`` starts at every weight and finds regions: all tensors and constants that have the same channels, as
labels 1 .. n. Any set of free labels can be cut from all of them, and the shapes of the graph agree again (``cut``).

Within a region, the labels that the same weights write form a ``Group`` with one budget and one ranking. Worked
example, a residual block of 24 channels around a depthwise convolution of 96, after a stem and before a classifier fc::

    y = Conv(x, A)  Relu  Conv(depthwise, D)  Relu  Conv(B)  Add(x)

    group A     96 units  written by A        read by B      D and both biases lose them, too
    group stem  24 units  written by stem, B  read by A, fc  the two sides of the Add lose the same channels
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Refused
from channelfold.passes.channels.cache import Caches
from channelfold.passes.channels.cut_regions import Part, Region, best_trace
from channelfold.passes.channels.links import LinkTable
from channelfold.passes.channels.maps import Shape
from channelfold.passes.layers.linear import view
from channelfold.passes.operators import operator
from channelfold.runtime.io.snapshot import Snapshot


@dataclass(frozen=True)
class Group:
    """Labels of a region that the same weights write; ``name`` is the first node that writes them.

    A unit is one label of ``labels`` (units,). ``channels`` (units,) counts the channels that the node writes for each.
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
        """The number of units that stay, for every reason."""
        return Counter(filter(None, (self.region.fixed[label - 1] for label in self.labels)))


def find_groups(graph: gs.Graph, shapes: Mapping[str, Shape], own_cache: bool = False) -> list[Group]:
    """All channel groups of the weights of a graph, in the order in which they are written.

    With ``own_cache`` only the model writes and reads its cache, so that heads can be cut from the cache too.
    """
    table = LinkTable(graph, shapes, caches=Caches.of(graph, own_cache))
    seen: set[tuple[int, int]] = set()
    groups: list[Group] = []
    for tensor, axis in _written(graph, table):
        if (id(tensor), axis) in seen:
            continue
        region = best_trace(table, tensor, axis)
        if seen & set(region.axes):  # a Reshape splits channels that another group cuts whole, or in other parts
            region.fixed[:] = [reason or "its channels are cut in another way" for reason in region.fixed]
        seen |= set(region.axes)
        groups += _groups(region)
    return groups


def regions_of(groups: Sequence[Group]) -> list[Region]:
    """The regions of groups, each once, in order."""
    return list({id(group.region): group.region for group in groups}.values())


class Copies:
    """Copies of a graph in its current state, for cuts in the regions of ``groups``."""

    def __init__(self, graph: gs.Graph, groups: Sequence[Group]):
        self._state, self._regions = Snapshot.of(graph), regions_of(groups)

    def make(self, keeps: Mapping[int, tuple[Region, np.ndarray]]) -> tuple[gs.Graph, list[tuple[Region, np.ndarray]]]:
        """A copy of the graph, and the regions in ``keeps`` in terms of the copy, each with the labels that stay.

        The keys of ``keeps`` are the ids of the regions of the original graph.
        """
        twin = self._state.graph()
        nodes, tensors = {node.name: node for node in twin.nodes}, twin.tensors()
        regions = (region for region in self._regions if id(region) in keeps)
        return twin, [(region.copied(nodes, tensors), keeps[id(region)][1]) for region in regions]


def _written(graph: gs.Graph, table: LinkTable) -> Iterator[tuple[gs.Tensor, int]]:
    """(tensor, axis) of the channels that weights write: of layers, recurrent cells and embeddings."""
    for node in graph.nodes:
        tensor = next((t for t in node.outputs if not t.is_empty()), None)
        shape = table.shape(tensor) if tensor is not None else None
        if tensor is None or shape is None:
            continue
        axis = _written_axis(node, len(shape), table)
        for own in [axis] if axis is not None else sorted(_made_axes(node, table)):
            yield tensor, own


def _written_axis(node: gs.Node, rank: int, table: LinkTable) -> int | None:
    known = operator(node)
    if known.kind == "conv":
        source = table.shape(node.inputs[0])
        depthwise = source is not None and 1 < int(node.attrs.get("group", 1)) == source[1]
        return None if depthwise else 1
    if known.kind == "matmul":
        try:
            return view(table.graph, node).out_axis % rank if rank > 1 else None
        except Refused:
            return None
    embedding = known.kind == "gather" and isinstance(node.inputs[0], gs.Constant) and len(node.inputs[0].shape) == 2
    return rank - 1 if known.kind == "gemm" or known.gates or embedding else None


def _made_axes(node: gs.Node, table: LinkTable) -> set[int]:
    """The axes of the first output that a constant weight makes, of fused operators with several weights."""
    known = operator(node)
    if known.weighted or known.gates or not known.weights:
        return set()
    found = set()
    for link in table.known(node).links:
        inputs = {m.port for m in link if m.port in (0, *known.weights)}
        if inputs and all(isinstance(node.inputs[port], gs.Constant) for port in inputs):
            found |= {m.axis for m in link if m.port == -1}
    return found


def _groups(region: Region) -> list[Group]:
    """The groups of a region: its labels by the weights that write them, without labels that no weight writes."""
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
        groups.append(Group(mine[0].layer.name, region, labels, _channels(region, mine[0], labels), mine))
    return groups


def _channels(region: Region, writer: Part, labels: np.ndarray) -> np.ndarray:
    """The number of positions of each label along the axis that a weight writes."""
    results = [along for tensor, along in region.axes.values() if any(tensor is t for t in writer.layer.outputs)]
    along = next((along for along in results if np.isin(along, labels).any()), writer.labels)
    return np.bincount(along, minlength=region.size + 1)[labels]
