"""Renumbers the channels of a region: drops, repeats or permutes channels everywhere at once.

    W2 f(W1 x + b)   ->   (W2 P^T) f(P W1 x + P b)        P: rows of I

The edit indexes every constant in the region along the axis of the channels, and updates the shapes, splits and indices
in the graph. A permutation keeps the function where f treats every channel alike. Before channels are repeated, the
caller must divide the columns of W2 among the copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import InBetween, Refused
from channelfold.passes.channels.cut_regions import NodeEdit, Region
from channelfold.passes.channels.maps import Shape
from channelfold.passes.channels.sizes import Written
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import constant, free_name

_HEADS = {"num_heads", "q_num_heads", "kv_num_heads", "qkv_hidden_sizes"}  # attributes in proportion to heads


@dataclass(frozen=True)
class Numbering:
    """The labels that replace labels 1 .. n: ``counts[l - 1]`` labels replace label l; ``source`` lists all in order.

    cut 2               counts 1 0 1    source 1 3
    repeat 2            counts 1 2 1    source 1 2 2 3
    exchange 1 and 3    counts 1 1 1    source 3 2 1
    """

    counts: np.ndarray
    source: np.ndarray

    @classmethod
    def repeating(cls, counts: np.ndarray) -> Numbering:
        """Label l stands ``counts[l - 1]`` times; a bool tells whether the label stays."""
        counts = counts.astype(np.int64)
        return cls(counts, np.repeat(np.arange(1, counts.size + 1), counts))

    @classmethod
    def ordered(cls, source: np.ndarray) -> Numbering:
        """Label ``source[l - 1]`` takes the place of label l."""
        return cls(np.ones(source.size, np.int64), source)

    def positions(self, labels: np.ndarray) -> np.ndarray:
        """The old position of an axis for each new position. Raises Refused where the old position is ambiguous.

        A label that stands several times along an axis cannot replace another label, because the order of its positions
        need not match.
        """
        counts = self.counts[labels - 1]
        own = np.repeat(np.arange(labels.size), counts)  # the old position in the same place
        turn = np.arange(own.size) - np.repeat(np.cumsum(counts) - counts, counts)
        source = self.source[(np.cumsum(self.counts) - self.counts)[labels[own] - 1] + turn]
        times = np.bincount(labels, minlength=self.counts.size + 1)
        moved = source != labels[own]
        if (moved & ((times[labels[own]] > 1) | (times[source] != 1))).any():
            raise Refused("its channels stand in groups or blocks")
        where = np.zeros(times.size, np.int64)
        where[labels] = np.arange(labels.size)
        return np.where(moved, where[source], own)

    def check(self, region: Region) -> None:
        """Raises Refused with the reason where a fixed label would move, or where a block would hold copies."""
        for node in region.blocks if self.counts.max(initial=0) > 1 else ():
            raise InBetween(node.op)
        stays = self.counts == 1
        stays[stays] = self.source[(np.cumsum(self.counts) - 1)[stays]] == np.flatnonzero(stays) + 1
        for reason in filter(None, (region.fixed[label] for label in np.flatnonzero(~stays))):
            raise Refused(reason)


def renumber(
    graph: gs.Graph,
    changes: Sequence[tuple[Region, Numbering]],
    suffix: str = "",
    shapes: dict[str, Shape] | None = None,
) -> None:
    """Renumbers the labels of regions. Raises Refused, with nothing changed, and OutputError.

    ``index_constants`` explains ``suffix``. The call updates ``shapes``, the shapes of tensors by name.
    """
    places = []
    for region, numbering in changes:
        numbering.check(region)
        for _, labels in region.axes.values():
            numbering.positions(labels)
        places += [(part.node, part.input, part.axis, numbering.positions(part.labels)) for part in region.parts]
    index_constants(graph, places, suffix)
    for region, numbering in changes:
        for found in region.edits:
            if not _is_whole(numbering.positions(found.labels), found.labels.size):
                _edit(graph, found, numbering)
        for (_, axis), (tensor, labels) in region.axes.items():
            size = int(numbering.counts[labels - 1].sum())
            if tensor.shape is not None:
                tensor.shape = [*tensor.shape[:axis], size, *tensor.shape[axis + 1 :]]
            if shapes is not None:
                shapes[tensor.name] = (*shapes[tensor.name][:axis], size, *shapes[tensor.name][axis + 1 :])


def index_constants(graph: gs.Graph, places: Iterable[tuple[gs.Node, int, int, np.ndarray]], suffix: str = "") -> None:
    """Indexes constants, given as (node, input, axis, positions), along an axis. Raises OutputError.

    Readers that share a constant and take the same positions share the new constant. Its name ends in ``suffix``.
    Without a suffix the new constant keeps the old name where the old constant has one reader.
    """
    held: dict[tuple[int, int], tuple[gs.Node, dict[int, np.ndarray]]] = {}
    for node, port, axis, positions in places:
        axes = held.setdefault((id(node), port), (node, {}))[1]
        if not _is_whole(positions, node.inputs[port].shape[axis]):
            axes[axis] = np.intersect1d(axes[axis], positions) if axis in axes else positions  # two cuts are one
    made: dict[tuple, gs.Constant] = {}
    for (_, port), (node, axes) in held.items():
        old = node.inputs[port]
        key = (id(old), *((axis, axes[axis].tobytes()) for axis in sorted(axes)))
        if key in made:
            edit.set_input(node, port, made[key])
            continue
        values = edit.value(old) if axes else None
        if values is None:
            continue
        for axis, positions in axes.items():
            values = values.take(positions, axis)
        values = np.ascontiguousarray(values)
        if suffix:
            made[key] = constant(graph, f"{old.name}{suffix}", values)
            edit.set_input(node, port, made[key])
        else:
            made[key] = edit.set_constant(graph, node, port, values, f"{old.name}_resized")


def _is_whole(positions: np.ndarray, size: int) -> bool:
    return np.array_equal(positions, np.arange(size))


def _edit(graph: gs.Graph, found: NodeEdit, numbering: Numbering) -> None:
    node, labels = found.node, found.labels
    counts = numbering.counts[labels - 1]
    left = int(counts.sum())
    if found.what == "group":
        node.attrs["group"] = left
    elif found.what == "groups":
        node.attrs["num_groups"] = int(node.attrs["num_groups"]) * left // labels.size
    elif found.what == "hidden":
        node.attrs["hidden_size"] = left
    elif found.what == "heads":
        for name in _HEADS & node.attrs.keys():
            node.attrs[name] = (np.asarray(node.attrs[name]) * left // labels.size).tolist()
    elif found.what == "scale":
        node.attrs.setdefault("scale", labels.size**-0.5)
    elif found.what == "size":
        _set_size(graph, found, left)
    elif found.what == "gather":
        picked = np.asarray(edit.value(node.inputs[1])) % labels.size
        if picked.ndim == 1:
            picked = picked[numbering.positions(labels[picked])]
        places = np.zeros(labels.size, np.int64)
        places[numbering.positions(labels)] = np.arange(left)
        edit.set_constant(graph, node, 1, places[picked], f"{node.name}_indices")
    elif found.what == "split":
        _set_split(graph, node, found.axis, counts)
    elif found.what == "slice":
        _set_slice(graph, node, found.holder, counts)


def _set_size(graph: gs.Graph, found: NodeEdit, size: int) -> None:
    """Writes a length into the constant or attribute that a shape takes the length from, if there is one."""
    if not isinstance(found.source, Written):
        return
    if not found.source.ports:
        shape = list(found.node.attrs["shape"])
        shape[found.axis] = size
        found.node.attrs["shape"] = shape
        return
    node, port = _own(graph, found.node, found.source.ports)
    new = np.array(edit.value(node.inputs[port]))
    new.reshape(-1)[found.source.element] = size
    edit.set_constant(graph, node, port, new, f"{found.node.name}_shape")


def _own(graph: gs.Graph, reader: gs.Node, ports: Sequence[int]) -> tuple[gs.Node, int]:
    """The node and input at the end of a path of inputs; nodes on the path with other readers are copied first."""
    port, *further = ports
    for next_port in further:
        tensor = reader.inputs[port]
        step = tensor.inputs[0]
        if len(tensor.outputs) > 1 or edit.is_output(graph, tensor):
            twin = gs.Variable(free_name(graph, f"{tensor.name}_own"), tensor.dtype, tensor.shape)
            name = free_name(graph, f"{step.name}_own")
            copy = gs.Node(step.op, name, dict(step.attrs), list(step.inputs), [twin], domain=step.domain)
            edit.insert_after(graph, step, copy)
            edit.set_input(reader, port, twin)
            step = copy
        reader, port = step, next_port
    return reader, port


def _set_split(graph: gs.Graph, node: gs.Node, axis: int, counts: np.ndarray) -> None:
    sizes = edit.argument(node, 1, "split")
    if sizes is None:
        sizes = np.full(len(node.outputs), -(-counts.size // len(node.outputs)))
        sizes[-1] = counts.size - sizes[:-1].sum()
    new = [int(part.sum()) for part in np.split(counts, np.cumsum(sizes)[:-1])]
    node.attrs.pop("num_outputs", None)
    if graph.opset >= 13:
        edit.set_constant(graph, node, 1, np.array(new, np.int64), f"{node.name}_sizes")
    else:
        node.attrs["split"] = new


def _set_slice(graph: gs.Graph, node: gs.Node, place: int, counts: np.ndarray) -> None:
    """Moves the start and the end of a Slice by the positions that are dropped or repeated in front of them."""
    for index, name in ((1, "starts"), (2, "ends")):
        new = np.array(edit.argument(node, index, name))
        at = min(max(int(new[place]) + (counts.size if new[place] < 0 else 0), 0), counts.size)
        new[place] = int(counts[:at].sum())
        if edit.has_input(node, index):
            edit.set_constant(graph, node, index, new, f"{node.name}_{name}")
        else:
            node.attrs[name] = new.tolist()
