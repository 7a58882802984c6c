"""Which positions along which axes of a node's inputs and outputs must be cut together.

A link states a fact about one operator. For a convolution: removing output channel c removes row c of the weight, entry
c of the bias and channel c of the result. A link is a list of members (port, axis, at). Position i of the link is
position ``at[i]`` along the axis of the port; where ``at`` is None, position i of the link is position i of the axis.
Port k is input k of the node, and port -1 - k is output k.

    Conv                       [(0, 1), (1, 1)]  [(-1, 1), (1, 0), (2, 0)]
    Conv, depthwise, x 2       [(0, 1, 0 0 1 1 2 2 …), (-1, 1), (1, 0), (2, 0)]
    MatMul                     [(0, -1), (1, -2)]  [(0, -2), (-1, -2)]  [(1, -1), (-1, -1)]
    Concat of 3 and 2          [(0, 1), (-1, 1, 0 1 2)]  [(1, 1), (-1, 1, 3 4)]
    Conv, 2 groups of 3        [(0, 1), (1, 1, 0 1 2 0 1 2)]  and the like for its outputs
    Reshape, 12 to 4 x 3       [(0, 2), (-1, 2, 0 0 0 1 1 1 …)]  or  [(0, 2), (-1, 3, 0 1 2 0 1 2 …)]

In the last two rows, positions that share an entry of the other member are cut together: the same channel of every
group, all channels of a head, or the same channel of every head. A Reshape that splits an axis leaves a ``choice``: the
table lists all alternatives, and the tracer that follows the links takes one of them.

Some axes cannot be cut, such as the axis of a Softmax or a spatial axis of a pool. These axes are ``blocked`` with a
reason, and so is every axis that no link mentions. Other axes are ``reduced``: they can be cut, but channels of zero
change the result of the node where missing channels do not (a mean, a norm). An ``edit`` is a number that the node
holds beside its data: a size in the shape of a Reshape, or the group count of a depthwise Conv.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import InBetween, Refused
from channelfold.passes.channels import attention, link_moves
from channelfold.passes.channels.cache import NO_CACHES, Caches
from channelfold.passes.channels.maps import Shape
from channelfold.passes.channels.ports import Links, Ports, Rules, known_shape, shape_of
from channelfold.passes.operators import operator
from channelfold.runtime.io import edit


def links_of(graph: gs.Graph, node: gs.Node, shapes: Mapping[str, Shape], single: bool = False) -> Links:
    """The links of a node. Raises Refused where no rule knows the operator or where a shape is unknown."""
    ports = Ports(graph, node, shapes, single)
    rule = _RULES.get(operator(node).kind)
    if rule is None or any(isinstance(value, gs.Graph) for value in node.attrs.values()):
        raise Refused(f"{node.op} reads or writes it")
    rule(ports)
    return ports.found


class LinkTable:
    """The links of every node of a graph, computed once. ``shapes`` holds the shapes of all tensors for one input.

    ``single`` serves edits that drop or repeat each channel independently of the others. The constant indices of a
    Gather then create channels, as the rows of a weight do. ``caches`` that are the model's own can be cut.
    """

    def __init__(self, graph: gs.Graph, shapes: Mapping[str, Shape], single: bool = False, caches: Caches = NO_CACHES):
        self.graph, self.shapes, self.single, self.caches = graph, shapes, single, caches
        self._known: dict[int, Links | str] = {}

    def of(self, node: gs.Node) -> Links:
        """The links of a node. Raises Refused with the reason where they are unknown."""
        if id(node) not in self._known:
            try:
                self._known[id(node)] = links_of(self.graph, node, self.shapes, self.single)
            except Refused as error:
                self._known[id(node)] = str(error)
        found = self._known[id(node)]
        if isinstance(found, str):
            raise Refused(found)
        return found

    def known(self, node: gs.Node) -> Links:
        """The links of a node of the graph; no links where they are unknown or the node belongs to a subgraph."""
        try:
            return self.of(node) if edit.in_graph(self.graph, node) else Links()
        except Refused:
            return Links()

    def shape(self, tensor: gs.Tensor) -> Shape | None:
        return shape_of(tensor, self.shapes)

    def known_shape(self, tensor: gs.Tensor) -> Shape:
        """The shape of a tensor. Raises Refused where the shape is unknown."""
        return known_shape(tensor, self.shapes)


# ---- operators that treat every channel alike ---------------------------------------------------------------------


def _elementwise(p: Ports) -> None:
    """An axis of the result is linked to the same axis of every operand that is not broadcast along that axis."""
    if "broadcast" in p.node.attrs:
        raise Refused(f"{p.node.op} broadcasts as before opset 7")
    operands = [k for k in range(len(p.node.inputs)) if p.has(k)]
    for axis in range(-len(p.shape(-1)), 0):
        held = [k for k in operands if len(p.shape(k)) >= -axis and p.shape(k)[axis] > 1]
        p.link(*((k, axis) for k in (*held, *range(-1, -1 - len(p.node.outputs), -1))))


def _pool(p: Ports) -> None:
    if p.has(-2):
        raise Refused(f"{p.node.op} counts places across channels")
    p.keep(0, 1)
    for axis in range(2, len(p.shape(0))):
        p.block(axis, f"{p.node.op} works along it")


def _softmax(p: Ports) -> None:
    rank = len(p.shape(0))
    axis = p.attribute("axis", -1 if p.graph.opset >= 13 else 1) % rank
    over = {axis} if p.graph.opset >= 13 else set(range(axis, rank))
    for a in range(rank):
        if a in over:
            p.block(a, f"{p.node.op} normalizes over it")
        else:
            p.keep(a)


def _lrn(p: Ports) -> None:
    p.block(1, "LRN mixes neighbouring channels")
    p.keep(*(a for a in range(len(p.shape(0))) if a != 1))


def _channel_norm(p: Ports) -> None:
    """BatchNormalization scales each channel; InstanceNormalization also normalizes over the positions of a channel."""
    if p.has(-2) or not p.attribute("spatial", 1):
        raise InBetween(f"{p.node.op} in training, or with a scale by place,")
    p.link((0, 1), (-1, 1), *((k, 0) for k in range(1, len(p.node.inputs))))
    for axis in (a for a in range(len(p.shape(0))) if a != 1):
        p.keep(axis)
        if p.node.op == "InstanceNormalization" and axis > 1:
            p.reduce(axis, "InstanceNormalization normalizes over it")


def _last_axis_norm(p: Ports) -> None:
    """A norm over the last axes. Output 3 of a norm with a skip connection is the sum of its inputs."""
    rank, skip = len(p.shape(0)), operator(p.node).gamma == 2
    first = rank - 1 if skip else p.attribute("axis", -1) % rank
    data, parameters = ((0, 1), (2, 3, 4)) if skip else ((0,), (1, 2))
    wide, narrow = ((-1, -4), (-2, -3)) if skip else ((-1,), (-2, -3))
    for axis in range(rank):
        members = [(k, axis) for k in (*data, *wide, *(narrow if axis < first else ()))]
        if axis >= first:
            members += [(k, axis - rank) for k in parameters if p.has(k) and len(p.shape(k)) >= rank - axis]
            p.reduce(axis, f"{p.node.op} normalizes over it", *data, *wide)
        p.link(*members)


def _group_norm(p: Ports) -> None:
    """Whole groups are cut, because a group without some of its channels has another mean and variance."""
    groups, channels = p.attribute("num_groups", 1), p.shape(0)[1]
    of = np.arange(channels) // (channels // groups)
    per_group = p.graph.opset < 21 and p.shape(1)[0] == groups
    p.link((0, 1), (-1, 1), *(((1, 0, of), (2, 0, of)) if per_group else ((1, 0), (2, 0))))
    if groups < channels:
        p.link((0, 1), (0, 1, of * (channels // groups)))
    p.edit("groups", 0, 0, 1)
    for axis in (a for a in range(len(p.shape(0))) if a != 1):
        p.keep(axis)
        if axis > 1:
            p.reduce(axis, "GroupNormalization normalizes over it")


def _lp_norm(p: Ports) -> None:
    """A channel of zeros adds nothing to the norm and stays zero in the result."""
    p.keep(*range(len(p.shape(0))))
    p.link((0, p.attribute("axis", -1)), summed=True)


def _reduction(p: Ports) -> None:
    rank = len(p.shape(0))
    axes = p.argument(1, "axes")
    over = {int(a) % rank for a in axes} if axes is not None else set()
    if p.computed(1) or (not over and p.attribute("noop_with_empty_axes", 0)):
        raise Refused(f"{p.node.op} names no constant axes")
    over = over or set(range(rank))
    kept = [a for a in range(rank) if a not in over]
    for place, axis in enumerate(kept):
        p.link((0, axis), (-1, axis if p.attribute("keepdims", 1) else place))
    for axis in over:
        if p.shape(0)[axis] > 1:
            p.link((0, axis), summed=operator(p.node).sums)
            if not operator(p.node).sums:
                p.reduce(axis, f"{p.node.op} reduces it", 0)


# ---- weights ------------------------------------------------------------------------------------------------------


def _conv(p: Ports) -> None:
    """W (out, in / groups, *kernel), of ConvTranspose (in, out / groups, *kernel). FusedConv adds input 3."""
    groups, ins, outs = p.attribute("group", 1), p.shape(0)[1], p.shape(-1)[1]
    transposed = p.node.op == "ConvTranspose"
    if groups == ins and groups > 1:
        of = np.repeat(np.arange(ins), outs // ins)
        if not transposed:
            p.link((0, 1, of), (-1, 1), (1, 0), (2, 0), (3, 1))
        elif outs == ins:
            p.link((0, 1), (-1, 1), (1, 0), (2, 0))
        else:
            p.link((0, 1), (1, 0))
            p.link((0, 1, of), (-1, 1), (2, 0))
        p.edit("group", 0, 0, 1)
    else:
        inner, outer = np.arange(ins) % (ins // groups), np.arange(outs) % (outs // groups)
        if transposed:
            p.link((0, 1), (1, 0), summed=True)
            p.link((-1, 1), (2, 0), *([(1, 1)] if groups == 1 else [(1, 1, outer)]))
        else:
            p.link((0, 1), *([(1, 1)] if groups == 1 else [(1, 1, inner)]), summed=True)
            p.link((-1, 1), (1, 0), (2, 0), (3, 1))
        if groups > 1:
            p.link((0, 1), (0, 1, inner))
            p.link((-1, 1), (-1, 1, outer))
    p.keep(0)
    for axis in range(2, len(p.shape(0))):
        p.block(axis, f"{p.node.op} works along it")


def _gemm(p: Ports) -> None:
    left, right = p.attribute("transA", 0), p.attribute("transB", 0)
    p.link((0, 0 if left else 1), (1, 1 if right else 0), summed=True)
    bias = p.shape(2) if p.has(2) else ()
    for axis, data in ((-2, (0, 1 if left else 0)), (-1, (1, 0 if right else 1))):
        held = [(2, axis)] if len(bias) >= -axis and bias[axis] > 1 else []
        p.link((-1, axis), data, *held)


def _matmul(p: Ports) -> None:
    left, right = p.shape(0), p.shape(1)
    if min(len(left), len(right)) < 2:
        raise InBetween(f"{p.node.op} with a vector")
    if p.attribute("transBatchA", 0) or p.attribute("transBatchB", 0):
        raise InBetween(f"{p.node.op} with its batches in another place")
    row, column = -2 - p.attribute("transA", 0), -1 - p.attribute("transB", 0)
    p.link((0, -3 - row), (1, -3 - column), summed=True)
    p.link((0, row), (-1, -2))
    p.link((1, column), (-1, -1))
    for axis in range(-len(p.shape(-1)), -2):
        held = [(k, axis) for k, shape in enumerate((left, right)) if len(shape) >= -axis and shape[axis] > 1]
        p.link((-1, axis), *held)


def einsum_terms(node: gs.Node) -> list[str]:
    """The indices of every operand, then those of the result. Raises Refused for an ellipsis and for diagonals."""
    equation = node.attrs["equation"].replace(" ", "")
    operands, arrow, result = equation.partition("->")
    if not arrow:
        result = "".join(sorted(letter for letter in operands if operands.count(letter) == 1 and letter != ","))
    found = [*operands.split(","), result]
    if "." in equation or any(len({*term}) < len(term) for term in found):
        raise InBetween("Einsum with an ellipsis or a diagonal")
    return found


def _einsum(p: Ports) -> None:
    """Every index is one link. The node sums over the indices that the result lacks."""
    *operands, result = einsum_terms(p.node)
    for letter in sorted({*"".join(operands)}):
        places = [(k, term.index(letter)) for k, term in enumerate(operands) if letter in term]
        places = [(k, axis) for k, axis in places if p.shape(k)[axis] > 1]
        written = [(-1, result.index(letter))] if letter in result else []
        p.link(*places, *written, summed=not written)


def _embedding(p: Ports) -> None:
    """EmbedLayerNormalization adds rows of up to three tables and normalizes the sum."""
    p.link((-1, 2), *((k, 1) for k in (2, 3, 4)), (5, 0), (6, 0), (-3, 2))
    p.block(2, f"{p.node.op} normalizes over it", *(port for port in (-1, -3) if p.has(port)))


def _recurrent(p: Ports) -> None:
    """W (directions, gates H, in), R (directions, gates H, H), B (directions, 2 gates H), P (directions, 3 H)."""
    gates, hidden = operator(p.node).gates, p.attribute("hidden_size", 0) or p.shape(2)[2]
    if p.attribute("layout", 0):
        raise InBetween(f"{p.node.op} with layout 1")
    p.link((0, 2), (1, 2), summed=True)
    states = [(-1, 3), (-2, 2), (-3, 2), (5, 2), (6, 2)]
    p.link((2, 2), *states)
    p.link((2, 2), summed=True)
    for port, axis in states:  # one link a state, because a constant state leads to no other constant
        for copies, *members in ((gates, (1, 1), (2, 1)), (2 * gates, (3, 1)), (3, (7, 1))):
            p.link((port, axis, np.tile(np.arange(hidden), copies)), *members)
    p.edit("hidden", 0, 2, 2)


def _dequantize(p: Ports) -> None:
    rank = len(p.shape(0))
    along = p.attribute("axis", 1) % rank
    if p.attribute("block_size", 0):
        raise InBetween(f"{p.node.op} in blocks")
    for axis in range(rank):
        vectors = [(k, 0) for k in (1, 2) if axis == along and p.has(k) and p.shape(k) not in ((), (1,))]
        p.link((0, axis), (-1, axis), *vectors)


_RULES: Rules = {
    **link_moves.RULES,
    **attention.RULES,
    "batch_norm": _channel_norm,
    "conv": _conv,
    "einsum": _einsum,
    "elementwise": _elementwise,
    "fused_conv": _conv,
    "fused_gemm": _gemm,
    "fused_matmul": _matmul,
    "embedding": _embedding,
    "gemm": _gemm,
    "group_norm": _group_norm,
    "instance_norm": _channel_norm,
    "lp_norm": _lp_norm,
    "lrn": _lrn,
    "matmul": _matmul,
    "norm": _last_axis_norm,
    "pool": _pool,
    "quantize": _dequantize,
    "recurrent": _recurrent,
    "reduce": _reduction,
    "softmax": _softmax,
}
