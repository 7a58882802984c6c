"""Drops or repeats the channels of a region everywhere at once.

    W2 f(W1 x + b)   ->   (W2 P^T) f(P W1 x + P b)        P: rows of I, each as often as its channel stays

The edit indexes every constant in the region along the axis of the channels, and updates the shapes, splits and indices
in the graph. Before channels are repeated, the caller must divide the columns of W2 among the copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import InBetween, Refused
from channelfold.passes.channels.cache import select
from channelfold.passes.channels.cut_regions import NodeEdit, Region
from channelfold.passes.channels.maps import Shape
from channelfold.passes.channels.sizes import Written
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import constant, free_name

# attributes in proportion to heads or groups
_HEADS = {"num_heads", "q_num_heads", "kv_num_heads", "qkv_hidden_sizes", "num_groups"}


def renumber(
    graph: gs.Graph,
    changes: Sequence[tuple[Region, np.ndarray]],
    suffix: str = "",
    shapes: dict[str, Shape] | None = None,
) -> None:
    """Repeats label l of a region ``counts[l - 1]`` times, by counts (labels,); bool counts tell which labels stay.

    ``index_constants`` explains ``suffix``. The call updates ``shapes``, the shapes of tensors by name. Raises Refused,
    with nothing changed, where a fixed label would not stay as it is or a block would hold copies; and OutputError.
    """
    changes = [(region, counts.astype(np.int64)) for region, counts in changes]
    places = []
    for region, counts in changes:
        for node in region.blocks if counts.max(initial=0) > 1 else ():
            raise InBetween(node.op)
        for reason in filter(None, (region.fixed[label] for label in np.flatnonzero(counts != 1))):
            raise Refused(reason)
        places += [(part.node, part.input, part.axis, _positions(counts[part.labels - 1])) for part in region.parts]
    index_constants(graph, places, suffix)
    for region, counts in changes:
        for found in region.edits:
            if (counts[found.labels - 1] != 1).any():
                _edit(graph, found, counts)
        for (_, axis), (tensor, labels) in region.axes.items():
            size = int(counts[labels - 1].sum())
            if any(tensor is one for one in (*graph.inputs, *graph.outputs)):  # a cache that is the model's own
                if size < labels.size:
                    select(graph, tensor, axis, counts[labels - 1] > 0)
                continue
            if tensor.shape is not None:
                tensor.shape = [*tensor.shape[:axis], size, *tensor.shape[axis + 1 :]]
            if shapes is not None:
                shapes[tensor.name] = (*shapes[tensor.name][:axis], size, *shapes[tensor.name][axis + 1 :])


def _positions(counts: np.ndarray) -> np.ndarray:
    """The old position of each new position along an axis whose position i stays ``counts[i]`` times."""
    return np.repeat(np.arange(counts.size), counts)


def index_constants(graph: gs.Graph, places: Iterable[tuple[gs.Node, int, int, np.ndarray]], suffix: str = "") -> None:
    """Indexes constants, given as (node, input, axis, positions), along an axis. Raises OutputError.

    Readers that share a constant and take the same positions share the new constant. Its name ends in ``suffix``.
    Without a suffix the new constant keeps the old name where the old constant has one reader.
    """
    held: dict[tuple[int, int], tuple[gs.Node, dict[int, np.ndarray]]] = {}
    for node, port, axis, positions in places:
        axes = held.setdefault((id(node), port), (node, {}))[1]
        if not np.array_equal(positions, np.arange(node.inputs[port].shape[axis])):
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


def _edit(graph: gs.Graph, found: NodeEdit, by_label: np.ndarray) -> None:
    """Changes a number of a node, by the number of times that each label stays."""
    node, size, counts = found.node, found.labels.size, by_label[found.labels - 1]
    left = int(counts.sum())
    match found.what:
        case "group":
            node.attrs["group"] = left
        case "hidden":
            node.attrs["hidden_size"] = left
        case "groups" | "heads":
            for name in _HEADS & node.attrs.keys():
                node.attrs[name] = (np.asarray(node.attrs[name]) * left // size).tolist()
        case "scale":
            node.attrs.setdefault("scale", size**-0.5)
        case "size":
            _set_size(graph, found, left)
        case "gather":
            _set_indices(graph, node, counts)
        case "split":
            _set_split(graph, node, counts)
        case "slice":
            _set_slice(graph, node, found.holder, counts)


def _set_indices(graph: gs.Graph, node: gs.Node, counts: np.ndarray) -> None:
    """Gives a Gather the new places of the positions that the node picks."""
    picked = np.asarray(edit.value(node.inputs[1])) % counts.size
    if picked.ndim == 1:
        picked = np.repeat(picked, counts[picked])
    places = np.maximum(np.cumsum(counts) - 1, 0)  # the last copy of each position
    edit.set_constant(graph, node, 1, places[picked], f"{node.name}_indices")


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


def _set_split(graph: gs.Graph, node: gs.Node, counts: np.ndarray) -> None:
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
