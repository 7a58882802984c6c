"""Regions of tensors whose channels must be scaled together, found by index maps through a graph.

Every channel of a tensor gets a number of its own, its *class*. The trace follows the numbers through the graph and
does to them what the operators do to the data: Transpose, Reshape, Slice and Gather move classes, Add merges the
classes of its operands, and a linear node ends the trace. The result is a ``Region``: all tensors that must be scaled
together, and the weights that take the scale. With a scale s > 0 and a shift z per class, every tensor x becomes

    x' = (x - z) / s        writers (linears, norms, constant operands):  W' = diag(1/s) W,  b' = (b - z) / s
                            readers (linears):                            W' = W diag(s),    b' = b + W z

and no tensor outside the region changes. Index maps (``maps``) are arrays of the rank of the tensor whose entries are
class numbers from 1. A negative entry stands for the inverse scale, 1 / s: in q k^T the classes of q are the inverse
classes of k, so that heads, grouped queries and rotary pairs need no rule of their own.

Worked example, v -> o in attention with 2 heads of 2 channels. The map of the tensor that o reads is [1 2 3 4]. The
trace goes back through Reshape ([[1 2] [3 4]]), Transpose, softmax(q k^T) v (linear in v), another Transpose and
Reshape to [1 2 3 4] at the output of v: region {writer v, reader o}. With one kv head for both query heads an Expand
merges 1 with 3 and 2 with 4.

An obstacle (an activation function, an output of the graph) *pins* a class to s = 1, z = 0, with a reason. A region
whose classes are all pinned cannot be scaled. With ``insert`` the region ends at its first tensor instead, and explicit
Mul and Add nodes undo the scale on the edges that block the scale (the ``cuts``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import InBetween, Refused, TwoActivations
from channelfold.passes.channels.attention import attended, is_attention, ties_scores, turned
from channelfold.passes.channels.cache import NO_CACHES, Caches
from channelfold.passes.channels.maps import (
    Classes,
    Shape,
    collapsed,
    data_input,
    image,
    mixed_axes,
    preimage,
    raised,
)
from channelfold.passes.channels.ports import Ports, known_shape
from channelfold.passes.channels.region import Cut, End, Region
from channelfold.passes.layers.affine import Layout, passes
from channelfold.passes.layers.linear import Linear, view, view_beside
from channelfold.passes.operators import operator
from channelfold.runtime.io import edit

Move = tuple[gs.Tensor, np.ndarray, bool]  # a tensor to follow, its map, whether a shift comes along


def trace(
    graph: gs.Graph,
    tensor: gs.Tensor,
    axis: int | tuple[int, ...],
    shapes: Mapping[str, Shape],
    insert: bool = False,
    caches: Caches = NO_CACHES,
) -> Region:
    """The region of a tensor along one axis or several. ``shapes`` holds the shapes of all tensors for one input.

    With ``insert`` the trace follows nothing but the tensor and the constants next to it. The trace passes ``caches``
    that are the model's own. Raises Refused where the shape of the tensor is unknown.
    """
    tracer = _Tracer(graph=graph, shapes=shapes, insert=insert, caches=caches)
    first = tracer.follow(tensor, axis)
    for node in tracer.choices:
        if not first.why_fixed(first.places[id(tensor)][1]):
            break
        other = _Tracer(graph=graph, shapes=shapes, insert=insert, caches=caches, instead=node).follow(tensor, axis)
        if not other.why_fixed(other.places[id(tensor)][1]):
            return other
    return first


def reach(
    graph: gs.Graph, linear: Linear, shapes: Mapping[str, Shape], allow_insert: bool, caches: Caches = NO_CACHES
) -> Region:
    """The region of the input of a linear; where all classes are pinned and ``allow_insert``, traced with ``insert``.

    Raises Refused with the reason where no channel can be scaled.
    """
    reason = ""
    for insert in (False, True) if allow_insert else (False,):
        region = trace(graph, linear.data, linear.in_axis, shapes, insert, caches)
        reason = region.why_fixed(region.places[id(linear.data)][1])
        if not reason:
            return region
    raise Refused(reason)


@dataclass
class _Place:
    tensor: gs.Tensor
    index: np.ndarray
    shifted: bool


@dataclass(kw_only=True)
class _Tracer(Classes):
    """Follows maps from tensor to tensor, over every node once.

    ``related`` holds the tensors that every node ties together; the key True marks the queries and keys of attention.
    ``choices`` lists the products of two activations where either operand can take the scale. At the product
    ``instead`` the trace gives the scale to the operand that the trace does not try first.
    """

    graph: gs.Graph
    shapes: Mapping[str, Shape]
    insert: bool
    caches: Caches = NO_CACHES
    instead: gs.Node | None = None
    choices: list[gs.Node] = field(default_factory=list)
    places: dict[int, _Place] = field(default_factory=dict)
    pending: list[_Place] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)
    related: dict[tuple[int, bool], list[gs.Tensor]] = field(default_factory=dict)
    deferred: list[tuple[_Place, gs.Node | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dynamic = {d for t in self.graph.inputs for d in t.shape or () if isinstance(d, str)}

    def follow(self, tensor: gs.Tensor, axis: int | tuple[int, ...]) -> Region:
        shape = self.shape(tensor)
        axes = {i % len(shape) for i in (axis if isinstance(axis, tuple) else (axis,))}
        wide = [size if i in axes else 1 for i, size in enumerate(shape)]
        self.visit(tensor, self.fresh(wide), shifted=True)
        while self.pending or self.deferred:
            if self.pending:
                self.expand(self.pending.pop())
            else:
                self.attempt(*self.deferred.pop(), last=True)
        return self.region()

    def shape(self, tensor: gs.Tensor) -> Shape:
        return known_shape(tensor, self.shapes)

    def visit(self, tensor: gs.Tensor, index: np.ndarray, shifted: bool) -> None:
        index = collapsed(index)
        old = self.places.get(id(tensor))
        if old is not None:
            self.merge(old.index, index)
            if old.shifted != shifted:
                self.forbid_shift(index, f"a shift reaches {tensor.name!r} on one way only")
            return
        self.places[id(tensor)] = place = _Place(tensor, index, shifted)
        if isinstance(tensor, gs.Constant):
            self.pin(index, "a constant feeds it")
        elif not edit.is_float(tensor):
            self.pin(index, "it is not floating point")
        else:
            self.pending.append(place)
        if self.owns(tensor):
            self.forbid_shift(index, "a shift does not pass a cache")
            return
        for size, length in zip(index.shape, tensor.shape or (), strict=False):
            if size > 1 and length in self.dynamic:  # another input would have another map
                self.pin(index, f"the length of its axis {length!r} may change")

    def expand(self, place: _Place) -> None:
        """Follows a tensor to its writer and to all of its readers."""
        readers = [n for n in edit.consumers(place.tensor) if not operator(n).asks_shape]
        for node in (None, *readers):
            self.attempt(place, node)

    def attempt(self, place: _Place, reader: gs.Node | None, last: bool = False) -> None:
        """Follows a tensor across a reader, or across its writer (reader None).

        A product of two activations waits until it is ``last``, because the trace may reach one of its operands before.
        """
        if reader is None and self.owns(place.tensor) and edit.producer(place.tensor) is None:
            return
        try:
            node = reader or self.writer(place.tensor)
            if reader is None and not last and operator(node).multiplies and _constant_operand(node) is None:
                self.deferred.append((place, None))
            else:
                self.cross(node, place, forward=reader is not None)
        except Refused as error:
            if self.insert:
                self.cuts.append(Cut(place.tensor, reader, place.index, str(error), place.shifted))
            else:
                self.pin(place.index, str(error))

    def ports(self, node: gs.Node) -> Ports:
        return Ports(self.graph, node, self.shapes)

    def writer(self, tensor: gs.Tensor) -> gs.Node:
        if edit.is_output(self.graph, tensor) and not self.owns(tensor):
            raise Refused(self.caches.why("it is an output of the graph", tensor))
        node = edit.producer(tensor)
        if node is None:
            raise Refused(self.caches.why("an input of the graph feeds it", tensor))
        return node

    def owns(self, tensor: gs.Tensor) -> bool:
        """Whether a tensor is a past or a present that the trace may scale."""
        return not self.insert and self.caches.owns(tensor)

    def cross(self, node: gs.Node, place: _Place, forward: bool) -> None:
        """Ends the region at a node, or follows the map to the other side. Raises Refused, with nothing merged."""
        if not edit.in_graph(self.graph, node):
            raise Refused("a subgraph " + ("reads it" if forward else "writes it"))
        if forward and sum(t is place.tensor for t in node.inputs) > 1:
            raise Refused(f"{node.op} reads it twice")
        if self.reads(node, place) if forward else self.writes(node, place):
            return
        half = is_attention(node) and ties_scores(self.ports(node), place.tensor)
        known = self.related.get((id(node), half), [])
        if any(place.tensor is tensor for tensor in known):
            return
        if known:
            raise Refused(f"{node.op} combines it with another scaled activation")
        if self.insert and not self.is_near(node, place, forward):
            raise Refused(f"{node.op} {'follows' if forward else 'precedes'} it")
        moves = self.moves(node, place, forward)
        self.related[id(node), half] = [place.tensor, *(tensor for tensor, _, _ in moves)]
        for move in moves:
            self.visit(*move)

    def is_near(self, node: gs.Node, place: _Place, forward: bool) -> bool:
        """Whether a region traced with ``insert`` passes a node, because the constant operand takes the scale."""
        operand = _constant_operand(node)
        if operand is None:
            return False
        source = node.inputs[1 - operand]
        alone = edit.sole_consumer(self.graph, source) is node
        index = raised(place.index, len(self.shape(node.outputs[0])))
        return self.takes_scale(node, operand, index) or (alone and not forward)

    # ---- where a region ends -----------------------------------------------------------------------------------------

    def writes(self, node: gs.Node, place: _Place) -> bool:
        """Whether a linear or a norm that writes a tensor ends the region."""
        linear = self.written_by(node, place.tensor)
        if linear is not None:
            vector = self.along(place.index, linear.out_axis, linear.channels[0])
            self.ends.append(End("out", linear.node, vector, place.shifted, linear))
        elif operator(node).gamma:
            self.norm(node, place)
        return linear is not None or operator(node).gamma > 0

    def written_by(self, node: gs.Node, tensor: gs.Tensor) -> Linear | None:
        """The linear whose result, bias included, is ``tensor``; None where no linear writes the tensor."""
        sources = [node] if operator(node).weighted else []
        if node.op == "Add":
            sources = [s for s in map(edit.producer, node.inputs) if s is not None and s.op == "MatMul"]
        for source in sources:
            try:
                linear = view(self.graph, source)
            except Refused as error:
                if source is node and not isinstance(error, TwoActivations):
                    raise Refused(f"{node.op} precedes it, but {error}") from None
                continue
            if linear.output is tensor:
                return linear
        return None

    def norm(self, node: gs.Node, place: _Place) -> None:
        known = operator(node)
        skip = known.gamma > 1
        if place.tensor is not node.outputs[0]:
            raise Refused(f"it is the unnormalized sum of {node.op}" if skip else f"it is a statistic of {node.op}")
        if not skip and any(not t.is_empty() for t in node.outputs[1:]):
            raise Refused(f"{node.op} also returns its statistics")
        axis = known.norm_axis % len(self.shape(place.tensor))
        channels = self.shape(place.tensor)[axis]
        parameters = [t for t in node.inputs[known.gamma : known.gamma + 1 + known.beta] if not t.is_empty()]
        if any(not isinstance(t, gs.Constant) or tuple(t.shape) != (channels,) for t in parameters) or not parameters:
            raise Refused(f"the parameters of {node.op} are not constant vectors over the channels")
        if place.shifted and not known.beta:
            self.forbid_shift(place.index, f"{node.op} has no bias")
        self.ends.append(End("norm", node, self.along(place.index, axis, channels), place.shifted))

    def reads(self, node: gs.Node, place: _Place) -> bool:
        """Whether a linear that reads a tensor ends the region; False for the product of two activations."""
        if not operator(node).weighted:
            return False
        try:
            linear = view_beside(self.graph, node, "reads")
        except TwoActivations:
            return False
        if linear.data is not place.tensor:
            raise Refused(f"{node.op} reads it as its weight")
        if place.shifted and linear.padded:
            self.forbid_shift(place.index, f"a shift does not pass the zero padding of {node.op}")
        vector = self.along(place.index, linear.in_axis, linear.channels[1])
        self.ends.append(End("in", node, vector, place.shifted, linear))
        return True

    # ---- from one side of a node to the other ------------------------------------------------------------------------

    def moves(self, node: gs.Node, place: _Place, forward: bool) -> list[Move]:
        """The tensors that a node ties to one of its inputs (``forward``) or to its output."""
        if is_attention(node):
            if place.shifted:
                self.forbid_shift(place.index, f"a shift does not pass {node.op}")
            return [(*move, False) for move in attended(self, self.ports(node), place.tensor, place.index, self.caches)]
        data = data_input(node)
        if data is not None and not (forward and node.inputs[data] is not place.tensor):
            return self.moved(node, node.inputs[data], place, forward)
        known = operator(node)
        if known.joins or known.multiplies:
            return self.arithmetic(node, place, forward)
        if known.kind == "matmul":
            return self.product(node, place, forward)
        if known.kind in ("concat", "split"):
            return self.pieces(node, place)
        if known.kind == "scatter":
            if place.index.shape[int(node.attrs.get("axis", -2))] > 1:
                raise Refused(f"{node.op} writes along it")
            return [(tensor, place.index, place.shifted) for tensor in (*node.inputs[:2], node.outputs[0])]
        raise Refused(f"{node.op} reads it") if forward else InBetween(node.op)

    def moved(self, node: gs.Node, source: gs.Tensor, place: _Place, forward: bool) -> list[Move]:
        """Follows a map across a node that moves the channels of one input to its output."""
        result = node.outputs[0]
        if place.tensor is not source and place.tensor is not result:
            raise Refused(f"it is a second output of {node.op}")
        if node.op == "Cast" and not edit.is_float(result):
            raise Refused("Cast makes integers of it")
        shapes = self.shape(source), self.shape(result)
        mixed = mixed_axes(node, *shapes)
        index = self.fitted(place.index, [1 if i in mixed else n for i, n in enumerate(place.index.shape)])
        if operator(node).kind == "rotary":
            turned(self, self.ports(node), index)
        shifted = self.shift_passes(node, index, place.shifted)
        if forward:
            return [(result, image(node, index, *shapes), shifted)]
        before, follows = preimage(node, index, *shapes, self.fresh)
        self.merge(follows, index)
        return [(source, before, shifted)]

    def shift_passes(self, node: gs.Node, index: np.ndarray, shifted: bool) -> bool:
        """Whether a shift passes a node; notes why not. Raises Refused where not even a positive scale passes."""
        known = operator(node)
        reason = "" if known.shift or known.kind in ("pad", "pool") else f"a shift does not pass {node.op}"
        if known.kind in ("pad", "pool") or known.random:  # it depends on their attributes and inputs
            wide = [axis for axis, size in enumerate(index.shape) if size > 1]
            for axis in wide or [None]:
                reason = reason or passes(node, Layout(axis)).no_shift
        if shifted and reason:
            self.forbid_shift(index, reason)
        return shifted and not reason

    def arithmetic(self, node: gs.Node, place: _Place, forward: bool) -> list[Move]:
        """Mul, Div, Add, Max and the like: the operands and the result have one map, except along broadcast axes.

        A constant factor by channel takes the whole scale, and the tensor on its other side stays. A constant term
        takes the shift (the bound of a Max or Min does not) and passes the scale. Other factors pass the scale.
        """
        result, operand = node.outputs[0], _constant_operand(node)
        index = raised(place.index, len(self.shape(result)))
        known = operator(node)
        if operand is None:
            tied = node.inputs if known.joins else [place.tensor if forward else self.carrier(node)]
        else:
            tied = [node.inputs[1 - operand]]
        if node.op == "Div" and tied[0] is node.inputs[1]:
            raise Refused("a constant is divided by it" if operand == 0 else "Div divides by it")
        shifted = place.shifted and operand is not None and known.adds
        if place.shifted and not shifted:
            self.forbid_shift(index, f"a shift does not pass {node.op}")
        at_a_cache = not self.insert and self.caches.owns_inside(tied[0]) and self.caches.owns_inside(result)
        if operand is not None and self.takes_scale(node, operand, index) and not at_a_cache:
            self.ends.append(End("factor", node, -index if forward else index, False))
            return []
        moves = [(tensor, self.fitted(index, self.shape(tensor)), False) for tensor in (*tied, result)]
        if known.joins and operand is not None:
            self.ends.append(End("term", node, index, shifted, forward=forward))
        return [move for move in moves if move[0] is not place.tensor]

    def takes_scale(self, node: gs.Node, operand: int, index: np.ndarray | None = None) -> bool:
        """Whether a constant operand is a factor that varies over the channels of a map (over any axis without one)."""
        if operator(node).joins or (node.op == "Div" and operand == 0):
            return False
        shape = tuple(node.inputs[operand].shape)
        if index is None or index.size == 1:
            return int(np.prod(shape)) > 1
        wide = index.shape[index.ndim - len(shape) :]
        return any(size > 1 and held > 1 for size, held in zip(shape, wide, strict=True))

    def carrier(self, node: gs.Node) -> gs.Tensor:
        """The operand of a product of two activations that takes the scale: an operand made from weights."""
        sides = (0,) if node.op == "Div" else (1, 0)
        carriers = [node.inputs[side] for side in sides if self.comes_from_weights(node.inputs[side])]
        if not carriers:
            raise InBetween(f"{node.op} of two activations")
        if len(carriers) > 1:
            self.choices.append(node)
        carriers.sort(key=lambda tensor: len(tensor.outputs))
        return carriers[-1 if node is self.instead else 0]

    def comes_from_weights(self, tensor: gs.Tensor) -> bool:
        """Whether a tensor is made from one linear, norm or factor by operators that a scale passes."""
        while (node := edit.producer(tensor)) is not None:
            operand, known = _constant_operand(node), operator(node)
            if known.weighted or known.gamma or (operand is not None and self.takes_scale(node, operand)):
                return True
            data = 0 if known.kind in ("concat", "split") else data_input(node) if operand is None else 1 - operand
            data = 2 if is_attention(node) and edit.has_input(node, 2) else data
            if data is None:
                return False
            tensor = node.inputs[data]
        return False

    def product(self, node: gs.Node, place: _Place, forward: bool) -> list[Move]:
        """MatMul of two activations: the rows of the result follow the left operand, its columns the right operand.

        Along the axis that is summed over, the other operand gets the inverse classes.
        """
        left, right = node.inputs
        result, index = node.outputs[0], place.index
        if min(len(self.shape(left)), len(self.shape(right))) < 2:
            raise Refused("MatMul sums over it") if forward else InBetween("MatMul with a vector")
        if index.shape[-1] > 1 and index.shape[-2] > 1:
            raise Refused("MatMul mixes its channels")
        if not forward:
            by_rows = index.shape[-2] > 1
            passed = place.shifted and not by_rows and self.rows_sum_to_one(left)
            tensor = left if by_rows else right
            other = self.fitted(index, (*self.shape(tensor)[:-2], *(index.shape[-2:])))
        elif index.shape[-1 if place.tensor is left else -2] > 1:
            passed, tensor = False, right if place.tensor is left else left
            other = self.fitted(-np.swapaxes(index, -1, -2), self.shape(tensor))
        else:
            passed = place.shifted and place.tensor is right and self.rows_sum_to_one(left)
            tensor, other = result, raised(index, len(self.shape(result)))
        if place.shifted and not passed:
            self.forbid_shift(index, "a shift does not pass MatMul")
        return [(tensor, other, passed)]

    def rows_sum_to_one(self, tensor: gs.Tensor) -> bool:
        """Whether a tensor is a Softmax along its last axis."""
        node = edit.producer(tensor)
        while node is not None and operator(node).copies and operator(node).elementwise:
            node = edit.producer(node.inputs[0])
        if node is None or node.op != "Softmax" or operator(node).kind != "softmax":
            return False
        axis = node.attrs.get("axis", -1 if self.graph.opset >= 13 else 1)
        return axis == -1 or axis + 1 == len(self.shape(node.outputs[0]))

    def pieces(self, node: gs.Node, place: _Place) -> list[Move]:
        """Concat and Split: a whole tensor, and the parts of the tensor along an axis."""
        whole, parts = node.outputs[0], list(node.inputs)
        if node.op == "Split":
            whole, parts = node.inputs[0], list(node.outputs)
        if any(t.is_empty() for t in parts):
            raise Refused(f"{node.op} drops a part")
        shapes = [self.shape(t) for t in parts]
        axis = int(node.attrs.get("axis", 0)) % len(shapes[0])
        full = place.index
        if place.tensor is not whole and full.shape[axis] > 1:
            sizes = [[n if i == axis or full.shape[i] > 1 else 1 for i, n in enumerate(shape)] for shape in shapes]
            made = [full if t is place.tensor else self.fresh(size) for t, size in zip(parts, sizes, strict=True)]
            full = np.concatenate([np.broadcast_to(m, size) for m, size in zip(made, sizes, strict=True)], axis=axis)
        stops = np.cumsum([shape[axis] for shape in shapes])[:-1]
        split = [full] * len(parts) if full.shape[axis] == 1 else np.split(full, stops, axis=axis)
        return [(t, index, place.shifted) for t, index in zip((whole, *parts), (full, *split), strict=True)]

    # ---- the result --------------------------------------------------------------------------------------------------

    def region(self) -> Region:
        """The region with classes 1 .. n: merged classes have one number, unused classes have none."""
        used = [*(e.index for e in self.ends), *(c.index for c in self.cuts), *(p.index for p in self.places.values())]
        renumber, size = self.renumbered(used)
        fixed = self.reasons(self.pins, renumber, size)
        return Region(
            [replace(e, index=renumber(e.index)) for e in self.ends],
            [replace(c, index=renumber(c.index)) for c in self.cuts],
            fixed,
            [one or other for one, other in zip(fixed, self.reasons(self.unshifted, renumber, size), strict=True)],
            {key: (place.tensor, renumber(place.index)) for key, place in self.places.items()},
            [(p.tensor, renumber(p.index)) for p in self.places.values() if self.owns(p.tensor)],
        )


def _constant_operand(node: gs.Node) -> int | None:
    """The constant operand of an arithmetic node; None where no operand or both operands are constant."""
    known = operator(node)
    if not (known.joins or known.multiplies) or len(node.inputs) != 2:
        return None
    constants = [i for i, tensor in enumerate(node.inputs) if isinstance(tensor, gs.Constant)]
    return constants[0] if len(constants) == 1 else None
