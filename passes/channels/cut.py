"""Channels taken out of a graph, and the same graph with them silenced instead.

    W2 diag(m) f(W1 x + b)   =   (W2 S) f(S^T W1 x + S^T b),      m in {0, 1}^n,  S: the columns of I where m = 1

``cut`` makes the right side: every constant, shape, split and index in the region of the channels loses them. ``mask``
makes the left side, with all shapes as they were: whatever sums over the channels reads zeros. Wherever f treats every
channel alike both are one function, whatever f makes of zero, and that is how a cut is proven.

Where f does not, as a norm over the channels, a channel of zeros still counts. There ``mask`` takes the channels out in
front of the node and puts zeros in their place behind it: the norm of those that are left.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Refused
from channelfold.passes.channels.cut_regions import NodeEdit, Read, Region
from channelfold.passes.channels.sizes import Written
from channelfold.passes.operators import operator
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import constant, free_name

_HEADS = {"num_heads", "q_num_heads", "kv_num_heads", "qkv_hidden_sizes"}

Cut = tuple[Region, np.ndarray]  # a region and which of its labels stay, (size,) bool


def cut(graph: gs.Graph, cuts: Sequence[Cut]) -> None:
    """Takes all labels that do not stay out of the graph. Raises OutputError when the disk is full.

    They must be free, and no axis may lose all of its labels (``Region.completed``).
    """
    for region, keep in cuts:
        assert keep[~region.free].all()
        assert np.array_equal(keep, region.completed(keep))
    masks: dict[tuple[int, int], tuple[gs.Node, dict[int, np.ndarray]]] = {}
    for region, keep in cuts:
        for part in region.parts:
            node, axes = masks.setdefault((id(part.node), part.input), (part.node, {}))
            axes[part.axis] = axes.get(part.axis, True) & _stays(keep, part.labels)
    made: dict[tuple, gs.Constant] = {}
    for (_, port), (node, axes) in masks.items():
        if not all(stays.all() for stays in axes.values()):
            _slice_constant(graph, node, port, axes, made)
    for region, keep in cuts:
        for found in region.edits:
            _edit(graph, found, _stays(keep, found.labels))
        for (_, axis), (tensor, labels) in region.axes.items():
            if tensor.shape is not None:
                size = int(_stays(keep, labels).sum())
                tensor.shape = [*tensor.shape[:axis], size, *tensor.shape[axis + 1 :]]


def _stays(keep: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return keep[labels - 1]


def _slice_constant(
    graph: gs.Graph, node: gs.Node, port: int, axes: Mapping[int, np.ndarray], made: dict[tuple, gs.Constant]
) -> None:
    """A constant without what goes; those who shared it and lose the same share the new one."""
    old = node.inputs[port]
    assert isinstance(old, gs.Constant)
    key = (id(old), *((axis, axes[axis].tobytes()) for axis in sorted(axes)))
    new = made.get(key)
    if new is None:
        values = edit.value(old)
        assert values is not None
        for axis, stays in axes.items():
            values = np.compress(stays, values, axis=axis)
        new = made[key] = constant(graph, f"{old.name}_cut", np.ascontiguousarray(values))
    edit.set_input(node, port, new)


def _edit(graph: gs.Graph, found: NodeEdit, stays: np.ndarray) -> None:
    node, left = found.node, int(stays.sum())
    if left == stays.size:
        return
    if found.what == "group":
        node.attrs["group"] = left
    elif found.what == "groups":
        groups = int(node.attrs["num_groups"])
        node.attrs["num_groups"] = groups * left // stays.size
    elif found.what == "hidden":
        node.attrs["hidden_size"] = left
    elif found.what == "heads":
        for name in _HEADS & node.attrs.keys():
            new = np.asarray(node.attrs[name]) * left // stays.size
            node.attrs[name] = new.tolist()
    elif found.what == "scale":
        node.attrs.setdefault("scale", stays.size**-0.5)
    elif found.what == "size":
        _set_size(graph, found, left)
    elif found.what == "gather":
        picked = edit.value(node.inputs[1])
        assert picked is not None
        picked = picked % stays.size
        if picked.ndim == 1:
            picked = picked[stays[picked]]
        new = (np.cumsum(stays) - 1)[picked]
        edit.set_constant(graph, node, 1, new.astype(np.int64), f"{node.name}_indices")
    elif found.what == "split":
        _set_split(graph, node, found.axis, stays)
    elif found.what == "slice":
        _set_slice(graph, node, found.holder, stays)


def _set_size(graph: gs.Graph, found: NodeEdit, size: int) -> None:
    """Writes a length where a shape has it from, if that is written anywhere."""
    if not isinstance(found.source, Written):
        return
    if not found.source.ports:
        shape = list(found.node.attrs["shape"])
        shape[found.axis] = size
        found.node.attrs["shape"] = shape
        return
    node, port = _own(graph, found.node, found.source.ports)
    values = edit.value(node.inputs[port])
    assert values is not None
    new = np.array(values)
    new.reshape(-1)[found.source.element] = size
    edit.set_constant(graph, node, port, new, f"{found.node.name}_shape")


def _own(graph: gs.Graph, reader: gs.Node, ports: Sequence[int]) -> tuple[gs.Node, int]:
    """The node and input at the end of a way, for its first node alone: what others use on the way is copied."""
    port, *further = ports
    for next_port in further:
        tensor = reader.inputs[port]
        step = edit.producer(tensor)
        assert step is not None
        if len(tensor.outputs) > 1 or edit.is_output(graph, tensor):
            twin = gs.Variable(free_name(graph, f"{tensor.name}_own"), tensor.dtype, tensor.shape)
            name = free_name(graph, f"{step.name}_own")
            copy = gs.Node(step.op, name, dict(step.attrs), list(step.inputs), [twin], domain=step.domain)
            edit.insert_after(graph, step, copy)
            edit.set_input(reader, port, twin)
            step = copy
        reader, port = step, next_port
    return reader, port


def _set_split(graph: gs.Graph, node: gs.Node, axis: int, stays: np.ndarray) -> None:
    sizes = edit.argument(node, 1, "split")
    if sizes is None:
        sizes = np.full(len(node.outputs), -(-stays.size // len(node.outputs)))
        sizes[-1] = stays.size - sizes[:-1].sum()
    new = [int(part.sum()) for part in np.split(stays, np.cumsum(sizes)[:-1])]
    node.attrs.pop("num_outputs", None)
    if graph.opset >= 13:
        edit.set_constant(graph, node, 1, np.array(new, np.int64), f"{node.name}_sizes")
    else:
        node.attrs["split"] = new


def _set_slice(graph: gs.Graph, node: gs.Node, place: int, stays: np.ndarray) -> None:
    """A Slice begins and ends behind as many positions as are left in front."""
    for index, name in ((1, "starts"), (2, "ends")):
        values = edit.argument(node, index, name)
        assert values is not None
        new = np.array(values)
        at = min(max(int(new[place]) + (stays.size if new[place] < 0 else 0), 0), stays.size)
        new[place] = int(stays[:at].sum())
        if edit.has_input(node, index):
            edit.set_constant(graph, node, index, new, f"{node.name}_{name}")
        else:
            node.attrs[name] = new.tolist()


def mask(graph: gs.Graph, cuts: Iterable[Cut]) -> None:
    """Silences all labels that do not stay: what sums over them reads zeros, what norms them does without them.

    Raises Refused, with the reason, for a norm of which no such form is known.
    """
    for region, keep in cuts:
        for part in region.parts:
            if operator(part.node).gates and (part.input, part.axis) == (2, 2):
                _forget(graph, part.node, _stays(keep, part.labels))
        for read in region.reads:
            stays = _stays(keep, read.labels)
            if stays.all():
                continue
            if not read.reduced:
                _silence(graph, read, stays)
            elif operator(read.node).kind == "norm" and operator(read.node).gamma == 1:
                _norm_of_the_rest(graph, read, stays)
            elif operator(read.node).kind == "reduce":
                _take(graph, read.node, read.port, read.axis, stays)
            else:
                raise Refused(f"{read.node.op} without some of its channels")


def _forget(graph: gs.Graph, node: gs.Node, stays: np.ndarray) -> None:
    """A recurrent node sums over its own channels, too: columns of R."""
    values = edit.value(node.inputs[2])
    assert values is not None
    edit.set_input(node, 2, constant(graph, f"{node.name}_recurrence", values * stays.astype(values.dtype)))


def _silence(graph: gs.Graph, read: Read, stays: np.ndarray) -> None:
    tensor = read.node.inputs[read.port]
    factor = stays.astype(edit.dtype(tensor) or np.float32).reshape(-1, *[1] * (-1 - read.axis))
    operands = [tensor, constant(graph, f"{tensor.name}_mask", factor)]
    edit.set_input(read.node, read.port, _before(graph, read.node, "Mul", operands, {}))


def _take(graph: gs.Graph, node: gs.Node, port: int, axis: int, stays: np.ndarray) -> None:
    """Puts a Gather of the channels that stay in front of a node."""
    tensor = node.inputs[port]
    index = constant(graph, f"{tensor.name}_kept", np.flatnonzero(stays))
    edit.set_input(node, port, _before(graph, node, "Gather", [tensor, index], {"axis": axis}))


def _norm_of_the_rest(graph: gs.Graph, read: Read, stays: np.ndarray) -> None:
    """A norm over the last axis of the channels that stay, with zeros in the places of the others behind it."""
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
    new = gs.Node("MatMul", name, inputs=[few, constant(graph, name, spread)], outputs=[result])
    edit.insert_after(graph, node, new)


def _before(graph: gs.Graph, node: gs.Node, op: str, inputs: list[gs.Tensor], attrs: dict) -> gs.Variable:
    """Puts a new node in front of another; returns what it writes."""
    result = gs.Variable(free_name(graph, f"{inputs[0].name}_{op.lower()}"), inputs[0].dtype)
    new = gs.Node(op, free_name(graph, f"{node.name}_{op.lower()}"), attrs, inputs, [result])
    position = next(i for i, other in enumerate(graph.nodes) if other is node)
    graph.nodes.insert(position, new)
    new._graph = graph
    return result
