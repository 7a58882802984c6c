"""Which positions along which axes of a node's inputs and outputs have to be cut together.

A link says of one operator what a user of it knows: removing output channel c of a convolution takes away row c of its
weight, entry c of its bias and channel c of its result. It is a list of members (port, axis, at): a position i of the
link is position ``at[i]`` along that axis of that port (``at`` None: i itself). Port k is input k, -1 - k output k.

    Conv                       [(0, 1), (1, 1)]  [(-1, 1), (1, 0), (2, 0)]
    Conv, depthwise, x 2       [(0, 1, 0 0 1 1 2 2 …), (-1, 1), (1, 0), (2, 0)]
    MatMul                     [(0, -1), (1, -2)]  [(0, -2), (-1, -2)]  [(1, -1), (-1, -1)]
    Concat of 3 and 2          [(0, 1), (-1, 1, 0 1 2)]  [(1, 1), (-1, 1, 3 4)]
    Conv, 2 groups of 3        [(0, 1), (1, 1, 0 1 2 0 1 2)]  and the like for its outputs
    Reshape, 12 to 4 x 3       [(0, 2), (-1, 2, 0 0 0 1 1 1 …)]  or  [(0, 2), (-1, 3, 0 1 2 0 1 2 …)]

In the last two, positions that share an entry of the other member become one: the same channel of every group is cut,
whole heads are, or the same channel of every head. What a Reshape cuts is a ``choice``: all its alternatives are
listed, and whoever follows the links decides.

Some axes cannot be cut: Softmax over them, a spatial axis of a pool. They are ``blocked`` with the reason, as is every
axis that no link mentions. Some can, but the node gives another result when their channels are zero instead of gone
(a mean, a norm): they are ``reduced``. What a node holds as numbers, not as data, is an ``edit``: sizes in the shape of
a Reshape, the group count of a depthwise Conv.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes import edit
from channelfold.passes.affine import Blocked
from channelfold.passes.index_maps import RESHAPES, Shape

ELEMENTWISE = {
    "Abs", "Acos", "Acosh", "Add", "And", "Asin", "Asinh", "Atan", "Atanh", "BitwiseAnd", "BitwiseNot", "BitwiseOr",
    "BitwiseXor", "Cast", "Ceil", "Celu", "Clip", "Cos", "Cosh", "Div", "Dropout", "Elu", "Equal", "Erf", "Exp",
    "Floor", "Gelu", "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu",
    "Less", "LessOrEqual", "Log", "Max", "Mean", "Min", "Mish", "Mod", "Mul", "Neg", "Not", "Or", "PRelu", "Pow",
    "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus", "Softsign", "Sqrt",
    "Sub", "Sum", "Swish", "Tan", "Tanh", "ThresholdedRelu", "Where", "Xor",
}  # fmt: skip
VENDOR_ELEMENTWISE = {"BiasGelu", "FastGelu", "Gelu", "QuickGelu"}  # of com.microsoft; FastGelu and BiasGelu add a bias
_POOLS = ("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool", "LpPool", "MaxPool")
_SOFTMAX = ("Softmax", "LogSoftmax", "Hardmax")
LAST_AXIS_NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
_SKIP_NORMS = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
_REDUCTIONS = (
    "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare",
    "ReduceLogSum", "ReduceLogSumExp",
)  # fmt: skip
_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@dataclass(frozen=True)
class Member:
    port: int
    axis: int
    at: np.ndarray | None = None


Link = tuple[Member, ...]
Edit = tuple[str, int, int, int]  # what ("size", "group", "slice", "gather", "split", "hidden"), its input, port, axis


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


def links_of(graph: gs.Graph, node: gs.Node, shapes: Mapping[str, Shape]) -> Links:
    """The links of a node. Raises Blocked, with the reason, where nothing is known of the operator or a shape."""
    ports = _Ports(graph, node, shapes)
    if edit.is_standard(node):
        rule = _RULES.get(node.op)
    else:
        rule = _VENDOR_RULES.get(node.op) if node.domain == "com.microsoft" else None
    if rule is None or any(isinstance(value, gs.Graph) for value in node.attrs.values()):
        raise Blocked(f"{node.op} reads or writes it")
    rule(ports)
    return ports.found


class _Ports:
    """A node, the shapes at its ports, and the links found so far."""

    def __init__(self, graph: gs.Graph, node: gs.Node, shapes: Mapping[str, Shape]):
        self.graph, self.node, self._shapes = graph, node, shapes
        self.found = Links()

    def has(self, port: int) -> bool:
        tensors, index = (self.node.inputs, port) if port >= 0 else (self.node.outputs, -1 - port)
        return index < len(tensors) and not tensors[index].is_empty()

    def shape(self, port: int) -> Shape:
        tensor = self.node.inputs[port] if port >= 0 else self.node.outputs[-1 - port]
        if isinstance(tensor, gs.Constant):
            return tuple(tensor.shape)
        if tensor.name not in self._shapes:
            raise Blocked(f"the shape of {tensor.name!r} is unknown")
        return self._shapes[tensor.name]

    def link(self, *members: tuple[int, int] | tuple[int, int, np.ndarray], summed: bool = False) -> Link:
        """Notes a link of the ports that are there; axes may count from the end."""
        made = []
        for port, axis, *at in members:
            if self.has(port):
                made.append(Member(port, axis % len(self.shape(port)), at[0] if at else None))
        (self.found.summed if summed else self.found.links).append(tuple(made))
        return tuple(made)

    def block(self, port: int, axis: int, reason: str) -> None:
        self.found.blocked[port, axis % len(self.shape(port))] = reason

    def reduce(self, port: int, axis: int, reason: str) -> None:
        self.found.reduced[port, axis % len(self.shape(port))] = reason

    def edit(self, what: str, holder: int, port: int, axis: int) -> None:
        self.found.edits.append((what, holder, port, axis % len(self.shape(port))))

    def attribute(self, name: str, default: int) -> int:
        return int(self.node.attrs.get(name, default))


# ---- operators that treat every channel alike ---------------------------------------------------------------------


def _elementwise(p: _Ports) -> None:
    """Everything that broadcasts: an axis of the result is that of each operand which is not broadcast along it."""
    rank = len(p.shape(-1))
    for axis in range(-rank, 0):
        ports = [k for k in range(len(p.node.inputs)) if p.has(k)]
        held = [k for k in ports if len(p.shape(k)) >= -axis and p.shape(k)[axis] > 1]
        outputs = [-1 - k for k in range(len(p.node.outputs)) if p.has(-1 - k)]
        p.link(*((k, axis) for k in held), *((k, axis) for k in outputs))


def _keep(p: _Ports, *axes: int, data: int = 0) -> None:
    for axis in axes:
        p.link((data, axis), (-1, axis), (-2, axis))


def _pool(p: _Ports) -> None:
    _keep(p, 0, 1)
    for port in (0, -1):
        for axis in range(2, len(p.shape(port))):
            p.block(port, axis, f"{p.node.op} works along it")


def _softmax(p: _Ports) -> None:
    rank = len(p.shape(0))
    axis = p.attribute("axis", -1 if p.graph.opset >= 13 else 1) % rank
    over = {axis} if p.graph.opset >= 13 else set(range(axis, rank))
    for a in range(rank):
        if a in over:
            p.block(0, a, f"{p.node.op} normalizes over it")
            p.block(-1, a, f"{p.node.op} normalizes over it")
        else:
            _keep(p, a)


def _lrn(p: _Ports) -> None:
    for port in (0, -1):
        p.block(port, 1, "LRN mixes neighbouring channels")
    _keep(p, *(a for a in range(len(p.shape(0))) if a != 1))


def _channel_norm(p: _Ports) -> None:
    """BatchNormalization and InstanceNormalization."""
    p.link((0, 1), (-1, 1), *((k, 0) for k in range(1, len(p.node.inputs))))
    _keep(p, *(a for a in range(len(p.shape(0))) if a != 1))


def _last_axis_norm(p: _Ports) -> None:
    rank, skip = len(p.shape(0)), p.node.op in _SKIP_NORMS
    first = rank - 1 if skip else p.attribute("axis", -1) % rank
    data, parameters = ((0, 1), (2, 3, 4)) if skip else ((0,), (1, 2))
    sums = [-1 - k for k in (3,) if skip]
    for axis in range(rank):
        members = [(k, axis) for k in (*data, -1, *sums)]
        if axis >= first:
            members += [(k, axis - rank) for k in parameters if p.has(k) and len(p.shape(k)) >= rank - axis]
            for port in (*data, -1, *sums):
                if p.has(port):
                    p.reduce(port, axis, f"{p.node.op} normalizes over it")
        p.link(*members)


def _group_norm(p: _Ports) -> None:
    """Whole groups are cut: what is left of the others would be another norm."""
    groups, channels = p.attribute("num_groups", 1), p.shape(0)[1]
    of = np.arange(channels) // (channels // groups)
    per_group = p.graph.opset < 21 and p.shape(1)[0] == groups
    p.link((0, 1), (-1, 1), *(((1, 0, of), (2, 0, of)) if per_group else ((1, 0), (2, 0))))
    if groups < channels:
        p.link((0, 1), (0, 1, of * (channels // groups)))
    p.edit("groups", 0, 0, 1)
    _keep(p, *(a for a in range(len(p.shape(0))) if a != 1))


def _lp_norm(p: _Ports) -> None:
    over = p.attribute("axis", -1) % len(p.shape(0))
    _keep(p, *range(len(p.shape(0))))
    for port in (0, -1):
        p.reduce(port, over, f"{p.node.op} normalizes over it")


def _reduction(p: _Ports) -> None:
    rank = len(p.shape(0))
    axes = edit.argument(p.node, 1, "axes")
    if axes is None and (edit.has_input(p.node, 1) or p.attribute("noop_with_empty_axes", 0)):
        raise Blocked(f"{p.node.op} names no constant axes")
    over = set(range(rank)) if axes is None or not axes.size else {int(a) % rank for a in axes}
    kept = [a for a in range(rank) if a not in over]
    for place, axis in enumerate(kept):
        p.link((0, axis), (-1, axis if p.attribute("keepdims", 1) else place))
    for axis in over:
        if p.shape(0)[axis] > 1:
            p.link((0, axis), summed=p.node.op == "ReduceSum")
            if p.node.op != "ReduceSum":
                p.reduce(0, axis, f"{p.node.op} reduces it")


# ---- weights ------------------------------------------------------------------------------------------------------


def _conv(p: _Ports) -> None:
    """W is (out, in / groups, *kernel), of ConvTranspose (in, out / groups, *kernel)."""
    groups, ins, outs = p.attribute("group", 1), p.shape(0)[1], p.shape(-1)[1]
    transposed = p.node.op == "ConvTranspose"
    if groups == ins and groups > 1:
        of = np.repeat(np.arange(ins), outs // ins)
        weight = ((1, 0), (1, 1, np.arange(outs) % (outs // ins))) if transposed else ((1, 0),)
        if transposed and outs == ins:
            p.link((0, 1), (-1, 1), (1, 0), (2, 0))
        elif transposed:
            p.link((0, 1), (1, 0))
            p.link((0, 1, of), (-1, 1), (2, 0))
        else:
            p.link((0, 1, of), (-1, 1), *weight, (2, 0))
        p.edit("group", 0, 0, 1)
    else:
        inner, outer = np.arange(ins) % (ins // groups), np.arange(outs) % (outs // groups)
        if transposed:
            p.link((0, 1), (1, 0), summed=True)
            p.link((-1, 1), (2, 0), *([(1, 1)] if groups == 1 else [(1, 1, outer)]))
        else:
            p.link((0, 1), *([(1, 1)] if groups == 1 else [(1, 1, inner)]), summed=True)
            p.link((-1, 1), (1, 0), (2, 0))
        if groups > 1:
            p.link((0, 1), (0, 1, inner))
            p.link((-1, 1), (-1, 1, outer))
    _keep(p, 0)
    for port in (0, -1):
        for axis in range(2, len(p.shape(port))):
            p.block(port, axis, f"{p.node.op} works along it")


def _gemm(p: _Ports) -> None:
    left, right = p.attribute("transA", 0), p.attribute("transB", 0)
    p.link((0, 0 if left else 1), (1, 1 if right else 0), summed=True)
    bias = p.shape(2) if p.has(2) else ()
    for axis, data in ((-2, (0, 1 if left else 0)), (-1, (1, 0 if right else 1))):
        held = [(2, axis)] if len(bias) >= -axis and bias[axis] > 1 else []
        p.link((-1, axis), data, *held)


def _matmul(p: _Ports) -> None:
    left, right = p.shape(0), p.shape(1)
    if min(len(left), len(right)) < 2:
        raise Blocked("MatMul with a vector is in between")
    p.link((0, -1), (1, -2), summed=True)
    p.link((0, -2), (-1, -2))
    p.link((1, -1), (-1, -1))
    for axis in range(-len(p.shape(-1)), -2):
        held = [(k, axis) for k, shape in enumerate((left, right)) if len(shape) >= -axis and shape[axis] > 1]
        p.link((-1, axis), *held)


def _recurrent(p: _Ports) -> None:
    """W (directions, gates H, in), R (directions, gates H, H), B (directions, 2 gates H), P, and states."""
    gates, hidden = _GATES[p.node.op], p.attribute("hidden_size", 0) or p.shape(2)[2]
    if p.attribute("layout", 0):
        raise Blocked(f"{p.node.op} with layout 1 is in between")
    p.link((0, 2), (1, 2), summed=True)
    units = np.arange(hidden)
    states: list = [(-1, 3), (-2, 2), (-3, 2), (5, 2)] + ([(6, 2)] if p.node.op == "LSTM" else [])
    p.link((2, 2), *states)
    rows = np.tile(units, gates)
    p.link((2, 2, rows), (1, 1), (2, 1))
    p.link((2, 2, np.tile(rows, 2)), (3, 1))
    p.link((2, 2, np.tile(units, 3)), (7, 1))
    p.edit("hidden", 0, 2, 2)


# ---- operators that move channels ---------------------------------------------------------------------------------


def _transpose(p: _Ports) -> None:
    perm = p.node.attrs.get("perm") or range(len(p.shape(0)))[::-1]
    for axis, source in enumerate(perm):
        p.link((0, source), (-1, axis))


def _concat(p: _Ports) -> None:
    rank = len(p.shape(-1))
    along, start = p.attribute("axis", 0) % rank, 0
    ports = range(len(p.node.inputs))
    for port in ports:
        size = p.shape(port)[along]
        p.link((port, along), (-1, along, np.arange(start, start + size)))
        start += size
    for axis in range(rank):
        if axis != along:
            p.link((-1, axis), *((port, axis) for port in ports))


def _split(p: _Ports) -> None:
    rank = len(p.shape(0))
    along, start = p.attribute("axis", 0) % rank, 0
    for port in range(-1, -1 - len(p.node.outputs), -1):
        if not p.has(port):
            raise Blocked("Split drops a part")
        size = p.shape(port)[along]
        p.link((port, along), (0, along, np.arange(start, start + size)))
        start += size
        for axis in range(rank):
            if axis != along:
                p.link((0, axis), (port, axis))
    p.edit("split", 1, 0, along)


def _slice(p: _Ports) -> None:
    shape, result = p.shape(0), p.shape(-1)
    starts, ends = edit.argument(p.node, 1, "starts"), edit.argument(p.node, 2, "ends")
    axes, steps = edit.argument(p.node, 3, "axes"), edit.argument(p.node, 4, "steps")
    if axes is None:
        if edit.has_input(p.node, 3):
            raise Blocked("Slice cuts axes that are computed at run time")
        axes = np.arange(len(shape) if starts is None else len(starts))
    touched = {int(a) % len(shape): place for place, a in enumerate(axes)}
    for axis in range(len(shape)):
        place = touched.get(axis)
        if place is None:
            _keep(p, axis)
            continue
        if starts is None or ends is None or (steps is None and edit.has_input(p.node, 4)):
            for port in (0, -1):
                p.block(port, axis, "Slice cuts it at places computed at run time")
            continue
        step = 1 if steps is None else int(steps[place])
        if step != 1:
            for port in (0, -1):
                p.block(port, axis, "Slice takes it in steps or turned round")
            continue
        taken = np.arange(shape[axis])[int(starts[place]) : int(ends[place])]
        if len(taken) != result[axis]:
            raise Blocked("the shapes of Slice do not agree")
        p.link((0, axis, taken), (-1, axis))
        p.edit("slice", place, 0, axis)


def _gather(p: _Ports) -> None:
    rank, more = len(p.shape(0)), len(p.shape(1))
    along, picked = p.attribute("axis", 0) % rank, edit.value(p.node.inputs[1])
    for axis in range(rank):
        if axis != along:
            p.link((0, axis), (-1, axis if axis < along else axis - 1 + more))
    for axis in range(more):
        if picked is None:
            p.link((1, axis), (-1, along + axis))
    if picked is None:
        p.block(0, along, "Gather picks from it at run time")
        return
    picked = picked % p.shape(0)[along]
    if picked.ndim == 1:
        p.link((0, along, picked), (-1, along))
    else:
        p.link((0, along))
        p.found.pinned.append((Member(0, along, picked.reshape(-1)), "Gather picks it"))
        for position in range(more):
            p.block(-1, along + position, "Gather makes several axes of it")
    p.edit("gather", 1, 0, along)


def _reshape(p: _Ports) -> None:
    """Axes between two places where the volumes to the left agree: one axis on one side, some on the other."""
    source, result = p.shape(0), p.shape(-1)
    if math.prod(source) != math.prod(result) or not math.prod(source):
        raise Blocked(f"{p.node.op} has shapes that do not agree")
    for before, after in _blocks(source, result):
        if not before or not after:
            continue
        if len(before) == 1 and len(after) == 1:
            p.link((0, before[0]), (-1, after[0]))
        elif len(before) == 1:
            p.found.choices.append(_parts(0, before[0], -1, after, result))
        elif len(after) == 1:
            p.found.choices.append(_parts(-1, after[0], 0, before, source))
        else:
            for port, axes in ((0, before), (-1, after)):
                for axis in axes:
                    p.block(port, axis, f"{p.node.op} mixes it with other axes")
    if p.node.op == "Reshape":
        _sizes(p, 1)


def _parts(whole: int, axis: int, parts: int, axes: Sequence[int], shape: Shape) -> list[Link]:
    """The alternatives when one axis is split into several: a position of any one of them is what is cut."""
    volume = math.prod(shape[a] for a in axes)
    found, stride = [], volume
    for a in axes:
        stride //= shape[a]
        at = np.arange(volume) // stride % shape[a]
        found.append((Member(whole, axis), Member(parts, a, at)))
    return found


def _blocks(source: Shape, result: Shape) -> list[tuple[list[int], list[int]]]:
    """Axes, those of length 1 left out, grouped so that both sides of a group have the same volume."""
    left = [a for a, n in enumerate(source) if n > 1]
    right = [a for a, n in enumerate(result) if n > 1]
    groups: list[tuple[list[int], list[int]]] = []
    while left and right:
        one, other = [left.pop(0)], [right.pop(0)]
        a, b = source[one[0]], result[other[0]]
        while a != b:
            if a < b:
                one.append(left.pop(0))
                a *= source[one[-1]]
            else:
                other.append(right.pop(0))
                b *= result[other[-1]]
        groups.append((one, other))
    return groups


def _sizes(p: _Ports, holder: int) -> None:
    """A shape among the inputs or attributes names the length of every axis of the result."""
    for axis, size in enumerate(p.shape(-1)):
        if size > 1:
            p.edit("size", holder, -1, axis)


def _expand(p: _Ports) -> None:
    shape, rank = p.shape(0), len(p.shape(-1))
    for axis in range(-rank, 0):
        held = len(shape) >= -axis and shape[axis] > 1
        p.link((-1, axis), *([(0, axis)] if held else []))
    _sizes(p, 1)


def _tile(p: _Ports) -> None:
    for axis, (size, new) in enumerate(zip(p.shape(0), p.shape(-1), strict=True)):
        if size == new:
            _keep(p, axis)
        elif size > 1:
            p.link((0, axis, np.arange(new) % size), (-1, axis))


def _pad(p: _Ports) -> None:
    pads = edit.argument(p.node, 1, "pads")
    if edit.has_input(p.node, 3):
        raise Blocked("Pad with axes is in between")
    rank = len(p.shape(0))
    for axis in range(rank):
        grown = pads[axis] or pads[axis + rank] if pads is not None else p.shape(0)[axis] != p.shape(-1)[axis]
        if grown or (pads is None and axis != 1):
            for port in (0, -1):
                p.block(port, axis, "Pad works along it")
        else:
            _keep(p, axis)


def _resize(p: _Ports) -> None:
    if p.node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        raise Blocked("Resize may fill in values of its own")
    axes = p.node.attrs.get("axes")
    for axis, (size, new) in enumerate(zip(p.shape(0), p.shape(-1), strict=True)):
        if size == new and axis < 2:
            _keep(p, axis)
        else:
            for port in (0, -1):
                p.block(port, axis, f"{p.node.op} works along it")
    if p.has(3) and axes is None:
        _sizes(p, 3)


def _depth_to_space(p: _Ports) -> None:
    deep, flat = (0, -1) if p.node.op == "DepthToSpace" else (-1, 0)
    channels, few = p.shape(deep)[1], p.shape(flat)[1]
    of = np.arange(channels) % few
    if p.node.op == "DepthToSpace" and p.node.attrs.get("mode", "DCR") == "CRD":
        of = np.arange(channels) // (channels // few)
    p.link((deep, 1), (flat, 1, of))
    _keep(p, 0)


def _dequantize(p: _Ports) -> None:
    rank = len(p.shape(0))
    along = p.attribute("axis", 1) % rank
    if p.attribute("block_size", 0):
        raise Blocked(f"{p.node.op} in blocks is in between")
    for axis in range(rank):
        vectors = [(k, 0) for k in (1, 2) if axis == along and p.has(k) and p.shape(k) not in ((), (1,))]
        p.link((0, axis), (-1, axis), *vectors)


def _shape_of(p: _Ports) -> None:
    """What is done with the sizes is looked at where they are used."""
    for axis in range(len(p.shape(0))):
        p.link((0, axis))
        p.edit("shape", 0, 0, axis)


_RULES: dict[str, Callable[[_Ports], None]] = (
    dict.fromkeys(ELEMENTWISE, _elementwise)
    | dict.fromkeys(_POOLS, _pool)
    | dict.fromkeys(_SOFTMAX, _softmax)
    | dict.fromkeys(("BatchNormalization", "InstanceNormalization"), _channel_norm)
    | dict.fromkeys(LAST_AXIS_NORMS, _last_axis_norm)
    | dict.fromkeys(_REDUCTIONS, _reduction)
    | dict.fromkeys(("Conv", "ConvTranspose"), _conv)
    | dict.fromkeys(_GATES, _recurrent)
    | dict.fromkeys(RESHAPES, _reshape)
    | dict.fromkeys(("Resize", "Upsample"), _resize)
    | dict.fromkeys(("DepthToSpace", "SpaceToDepth"), _depth_to_space)
    | dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _dequantize)
    | {
        "LRN": _lrn,
        "Concat": _concat,
        "Expand": _expand,
        "Gather": _gather,
        "Gemm": _gemm,
        "GroupNormalization": _group_norm,
        "LpNormalization": _lp_norm,
        "MatMul": _matmul,
        "Pad": _pad,
        "Shape": _shape_of,
        "Slice": _slice,
        "Split": _split,
        "Tile": _tile,
        "Transpose": _transpose,
    }
)
_VENDOR_RULES: dict[str, Callable[[_Ports], None]] = dict.fromkeys(VENDOR_ELEMENTWISE, _elementwise) | dict.fromkeys(
    _SKIP_NORMS, _last_axis_norm
)
