"""Which channels of which tensors are one: index maps through a graph.

Give every channel of a tensor a number of its own, its *class*, and follow the numbers through the graph by doing to
them what the operators do to the data: Transpose, Reshape, Slice and Gather move them, Add makes those that meet one
class, a linear node ends them. What comes out is a ``Region``: all tensors that must be scaled together, and the
weights that can take the scale up. With a scale s > 0 and a shift z per class, every tensor of the region becomes

    x' = (x - z) / s        writers (linears, norms, constant operands):  W' = diag(1/s) W,  b' = (b - z) / s
                            readers (linears):                            W' = W diag(s),    b' = b + W z

and nothing outside it changes. An index map is an array of the tensor's rank, each axis as long as the tensor's or 1.
Its entries are class numbers from 1; a negative one stands for the inverse scale, 1 / s: in q k^T the classes of q are
those of k, inverted, so that heads, grouped queries and rotary pairs need no rule of their own.

Worked example, v -> o in attention with 2 heads of 2 channels. The map of what o reads is [1 2 3 4]; backwards through
Reshape [[1 2] [3 4]], through Transpose and softmax(q k^T) v (linear in v) and another Transpose and Reshape to
[1 2 3 4] at the output of v: region {writer v, reader o}. With one kv head for both query heads an Expand makes
1 = 3 and 2 = 4.

What a class cannot pass (an activation function, an output of the graph) *pins* it to s = 1, z = 0, with the reason; a
region whose classes are all pinned has nothing to give. Traced with ``insert`` the region ends at its first tensor
instead, and explicit Mul and Add nodes on the edges that block it (its ``cuts``) undo the scale there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes import edit
from channelfold.passes.affine import Blocked, Vector, passes
from channelfold.passes.linear import LINEAR_OPS, Linear, NotLinear, view

Shape = tuple[int, ...]
NORMS = (
    "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization", "InstanceNormalization", "BatchNormalization", "GroupNormalization",
)  # fmt: skip
_UNBIASED = ("RMSNormalization", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization")
_SKIP = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
_RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
_MOVES = ("Transpose", *_RESHAPES, "Slice", "Gather", "Expand")
_ALONGSIDE = (  # what keeps every channel where it is
    "Identity", "Dropout", "Relu", "LeakyRelu", "PRelu", "MaxPool", "AveragePool", "GlobalMaxPool",
    "GlobalAveragePool", "ReduceMean", "Pad", "Neg", "Cast", "Resize", "Abs", "ReduceSum", "ReduceMax",
)  # fmt: skip


@dataclass(frozen=True)
class End:
    """Where a region ends in constants.

    ``role``: "out" and "in" are the output and input channels of a ``linear``, "norm" the gamma and beta of a norm,
    "factor" and "term" the constant operand of a Mul, Div, Add or Sub. ``index``: the classes, a vector over the
    channels, or an array that broadcasts against the operand's reader. ``shifted``: whether the shift ends here too.
    ``forward``: of a term, whether the region is on the side of the input, not of the result.
    """

    role: str
    node: gs.Node
    index: np.ndarray
    shifted: bool
    linear: Linear | None = None
    forward: bool = False


@dataclass(frozen=True)
class Cut:
    """An edge where the scale is undone by explicit nodes: in front of ``reader``, or (None) behind the writer."""

    tensor: gs.Tensor
    reader: gs.Node | None
    index: np.ndarray
    reason: str


@dataclass
class Region:
    """Tensors that are scaled together. ``index`` arrays hold signed class numbers; class c is row c - 1 of a scale.

    ``fixed``: why each class is pinned, "" where it is free. ``no_shift``: why nothing here can be shifted.
    """

    ends: list[End]
    cuts: list[Cut]
    fixed: list[str]
    no_shift: str
    places: dict[int, tuple[gs.Tensor, np.ndarray]]

    @property
    def size(self) -> int:
        return len(self.fixed)

    @property
    def free(self) -> np.ndarray:
        return np.array([not reason for reason in self.fixed], bool)

    def readers(self) -> list[End]:
        return [end for end in self.ends if end.role == "in"]

    def why_fixed(self, index: np.ndarray) -> str:
        """Why no class of an index map is free; empty when one is."""
        reasons = [self.fixed[abs(int(c)) - 1] for c in np.unique(index)]
        return "" if "" in reasons else next(iter(reasons), "it has no channels")


def trace(graph: gs.Graph, tensor: gs.Tensor, axis: int, shapes: Mapping[str, Shape], insert: bool = False) -> Region:
    """The region of a tensor whose channels lie along ``axis``. ``shapes``: of all tensors for some input, by name.

    With ``insert`` nothing is followed beyond that tensor and the constants that are next to it. Raises Blocked where
    the tensor's shape is unknown.
    """
    tracer = _Tracer(graph, shapes, insert)
    shape = tracer.shape(tensor)
    wide = [size if i == axis % len(shape) else 1 for i, size in enumerate(shape)]
    tracer.visit(tensor, tracer.fresh(wide), shifted=True)
    while tracer.pending:
        tracer.expand(tracer.pending.pop())
    return tracer.region()


@dataclass
class _Place:
    tensor: gs.Tensor
    index: np.ndarray
    shifted: bool


@dataclass
class _Tracer:
    graph: gs.Graph
    shapes: Mapping[str, Shape]
    insert: bool
    places: dict[int, _Place] = field(default_factory=dict)
    pending: list[_Place] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)
    pins: list[tuple[np.ndarray, str]] = field(default_factory=list)
    merges: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    tied: dict[int, tuple[gs.Tensor, ...]] = field(default_factory=dict)
    no_shift: str = ""
    count: int = 0

    def shape(self, tensor: gs.Tensor) -> Shape:
        if isinstance(tensor, gs.Constant):
            return tuple(tensor.shape)
        if tensor.name not in self.shapes:
            raise Blocked(f"the shape of {tensor.name!r} is unknown")
        return self.shapes[tensor.name]

    def fresh(self, shape: Sequence[int]) -> np.ndarray:
        size = int(np.prod(shape))
        self.count += size
        return np.arange(self.count - size + 1, self.count + 1).reshape(shape)

    def merge(self, one: np.ndarray, other: np.ndarray) -> None:
        if one.shape != other.shape or not np.array_equal(one, other):
            one, other = np.broadcast_arrays(one, other)
            self.merges.append((one.reshape(-1), other.reshape(-1)))

    def visit(self, tensor: gs.Tensor, index: np.ndarray, shifted: bool) -> None:
        index = _collapsed(index)
        old = self.places.get(id(tensor))
        if old is None:
            self.places[id(tensor)] = place = _Place(tensor, index, shifted)
            self.pending.append(place)
            return
        self.merge(old.index, index)
        if old.shifted != shifted:
            self.no_shift = self.no_shift or f"a shift reaches {tensor.name!r} on one way only"

    def expand(self, place: _Place) -> None:
        """Follows a tensor to the node that writes it and to all that read it."""
        tensor = place.tensor
        if edit.is_output(self.graph, tensor):
            self.pins.append((place.index.reshape(-1), "it is an output of the graph"))
        writer = edit.producer(tensor)
        try:
            if writer is None:
                raise Blocked("an input of the graph feeds it")
            if not edit.in_graph(self.graph, writer):
                raise Blocked("a subgraph writes it")
            self.backward(writer, place)
        except Blocked as error:
            self.block(place, None, str(error))
        for node in edit.consumers(tensor):
            if node.op in ("Shape", "Size") and edit.is_standard(node):
                continue
            try:
                if not edit.in_graph(self.graph, node):
                    raise Blocked("a subgraph reads it")
                self.forward(node, place)
            except Blocked as error:
                self.block(place, node, str(error))

    def block(self, place: _Place, reader: gs.Node | None, reason: str) -> None:
        if self.insert:
            self.cuts.append(Cut(place.tensor, reader, place.index, reason))
        else:
            self.pins.append((place.index.reshape(-1), reason))

    def tie(self, node: gs.Node, came_from: gs.Tensor, *tensors: gs.Tensor, close: bool = False) -> bool:
        """Notes that a node relates tensors to each other; False when that is known already.

        ``close``: it is followed even where the region ends at its first tensor.
        """
        known = self.tied.get(id(node))
        if known is not None and any(came_from is tensor for tensor in known):
            return False
        if known is not None:
            raise Blocked(f"{node.op} combines it with another scaled activation")
        if self.insert and not close:
            raise Blocked(f"{node.op} {'follows' if any(came_from is t for t in node.inputs) else 'precedes'} it")
        self.tied[id(node)] = (came_from, *tensors)
        return True

    def along(self, index: np.ndarray, axis: int, rank: int) -> np.ndarray:
        """An index map as a vector over one axis: all positions along the other axes become one class."""
        columns = np.moveaxis(index, axis % rank, 0).reshape(index.shape[axis % rank], -1)
        if columns.shape[1] > 1:
            self.merge(columns[:, :1], columns)
        return columns[:, 0]

    # ---- backward: from an output of a node to its inputs ------------------------------------------------------------

    def backward(self, node: gs.Node, place: _Place) -> None:
        linear = self.written_by(node, place.tensor)
        if linear is not None:
            shape = self.shape(place.tensor)
            vector = self.along(place.index, linear.out_axis, len(shape))
            self.ends.append(End("out", linear.node, _spread(vector, linear.channels[0]), place.shifted, linear))
        elif node.op in NORMS:
            self.norm(node, place)
        elif node.op in ("Mul", "Div", "Add", "Sub") and edit.is_standard(node):
            self.arithmetic_backward(node, place)
        elif node.op == "MatMul":
            self.product_backward(node, place)
        elif node.op in ("Concat", "Split") and edit.is_standard(node):
            self.pieces(node, place)
        elif node.op in _MOVES or node.op in _ALONGSIDE:
            source = node.inputs[0]
            if self.tie(node, place.tensor, source):
                self.visit(source, self.moved_back(node, place.index), self.shift_passes(node, place, place.index))
        else:
            raise Blocked(f"{node.op} is in between")

    def written_by(self, node: gs.Node, tensor: gs.Tensor) -> Linear | None:
        """The linear whose result, bias included, a tensor is."""
        sources = [node] if node.op in LINEAR_OPS else []
        if node.op == "Add":
            sources = [s for s in map(edit.producer, node.inputs) if s is not None and s.op == "MatMul"]
        for source in sources:
            try:
                linear = view(self.graph, source)
            except NotLinear as error:
                if source is node and "two activations" not in str(error):
                    raise Blocked(f"{node.op} precedes it, but {error}") from None
                continue
            if linear.output is tensor:
                return linear
        return None

    def norm(self, node: gs.Node, place: _Place) -> None:
        rank = len(self.shape(place.tensor))
        skip = node.op in _SKIP
        first = 2 if skip else 1
        if place.tensor is not node.outputs[0]:
            raise Blocked(f"it is the unnormalized sum of {node.op}")
        if not skip and any(not t.is_empty() for t in node.outputs[1:]):
            raise Blocked(f"{node.op} also returns its statistics")
        parameters = [t for t in node.inputs[first : first + 2] if not t.is_empty()]
        axis = 1 if node.op in ("InstanceNormalization", "BatchNormalization", "GroupNormalization") else rank - 1
        channels = self.shape(place.tensor)[axis]
        if any(not isinstance(t, gs.Constant) or tuple(t.shape) != (channels,) for t in parameters) or not parameters:
            raise Blocked(f"the parameters of {node.op} are not constant vectors over the channels")
        if place.shifted and node.op in _UNBIASED:
            self.no_shift = self.no_shift or f"{node.op} has no bias"
        self.ends.append(End("norm", node, _spread(self.along(place.index, axis, rank), channels), place.shifted))

    def arithmetic_backward(self, node: gs.Node, place: _Place) -> None:
        constants = [i for i, t in enumerate(node.inputs) if isinstance(t, gs.Constant)]
        additive = node.op in ("Add", "Sub")
        if len(constants) == 1:
            self.operand(node, constants[0], place, place.index)
        elif additive:
            if self.tie(node, place.tensor, *node.inputs):
                self.block_shift(place, node)
                for tensor in node.inputs:
                    self.visit(tensor, self.fitted(place.index, self.shape(tensor)), shifted=False)
        else:
            sides = (0,) if node.op == "Div" else (0, 1)
            carriers = [node.inputs[side] for side in sides if self.carries(node.inputs[side])]
            if not carriers:
                raise Blocked(f"{node.op} of two activations is in between")
            if self.tie(node, place.tensor, carriers[-1]):
                self.block_shift(place, node)
                self.visit(carriers[-1], self.fitted(place.index, self.shape(carriers[-1])), shifted=False)

    def operand(self, node: gs.Node, constant: int, place: _Place, index: np.ndarray) -> None:
        """Passes Mul, Div, Add or Sub with a constant, from either side. ``index``: the map of its result.

        A factor by channel takes up the whole scale, and what is on the other side stays as it is; a term takes up the
        shift, and the scale goes on; a factor that is one number lets the scale pass.
        """
        source, result, operand = node.inputs[1 - constant], node.outputs[0], node.inputs[constant]
        additive, forward = node.op in ("Add", "Sub"), place.tensor is source
        if constant == 0 and node.op in ("Sub", "Div"):
            raise Blocked("it is taken away from a constant" if additive else "a constant is divided by it")
        if not additive:
            self.block_shift(place, node)
        if not additive and int(np.prod(operand.shape)) > 1:
            if self.tie(node, place.tensor, close=True):
                self.ends.append(End("factor", node, -index if forward else index, False))
            return
        close = not forward and len(source.outputs) == 1 and not edit.is_output(self.graph, source)
        if self.tie(node, place.tensor, source, result, close=close):
            if additive:
                self.ends.append(End("term", node, index, place.shifted, forward=forward))
            self.visit(
                *((result, index) if forward else (source, self.fitted(index, self.shape(source)))), shifted=False
            )

    def block_shift(self, place: _Place, node: gs.Node) -> None:
        if place.shifted:
            self.no_shift = self.no_shift or f"a shift does not pass {node.op}"

    def carries(self, tensor: gs.Tensor) -> bool:
        """Whether a factor comes from weights by a way that nothing else reads."""
        while True:
            node = edit.producer(tensor)
            if node is None or isinstance(tensor, gs.Constant):
                return False
            readers = [n for n in tensor.outputs if n.op not in ("Shape", "Size")]
            if len(readers) != 1 or edit.is_output(self.graph, tensor):
                return node.op in ("Split", "Slice")
            if node.op in LINEAR_OPS or node.op in NORMS:
                return True
            if node.op in ("Mul", "Div", "Add", "Sub"):
                variables = [t for t in node.inputs if not isinstance(t, gs.Constant)]
                if len(variables) != 1:
                    return False
                tensor = variables[0]
            elif node.op in _MOVES or node.op in _ALONGSIDE:
                tensor = node.inputs[0]
            else:
                return node.op == "Split"

    def fitted(self, index: np.ndarray, shape: Shape) -> np.ndarray:
        """The map of an operand of this shape, from that of the result it is broadcast to."""
        index = index.reshape(index.shape[index.ndim - len(shape) :]) if index.ndim >= len(shape) else index
        if index.ndim != len(shape):
            raise Blocked("it is broadcast to more axes")
        for axis, size in enumerate(shape):
            if size == 1 and index.shape[axis] > 1:
                first = np.take(index, [0], axis=axis)
                self.merge(first, index)
                index = first
        return index

    def product_backward(self, node: gs.Node, place: _Place) -> None:
        """MatMul of two activations, from its result: rows follow the left operand, the rest the right one."""
        left, right = node.inputs
        index = place.index
        rows = index.ndim >= 2 and index.shape[-2] > 1
        side = 0 if rows else 1
        operand = (left, right)[side]
        shape = self.shape(operand)
        if len(shape) < 2 or (rows and index.shape[-1] > 1):
            raise Blocked("MatMul mixes its channels")
        shifted = place.shifted
        if shifted and not (side == 1 and _rows_sum_to_one(left)):
            self.no_shift, shifted = self.no_shift or "a shift does not pass MatMul", False
        free = np.take(index, [0], axis=-2 if side else -1)
        if self.tie(node, place.tensor, operand):
            self.visit(operand, self.fitted(free, shape), shifted)

    # ---- forward: from an input of a node to its outputs -------------------------------------------------------------

    def forward(self, node: gs.Node, place: _Place) -> None:
        tensor, index = place.tensor, place.index
        sides = [i for i, t in enumerate(node.inputs) if t is tensor]
        if len(sides) != 1:
            raise Blocked(f"{node.op} reads it twice")
        if node.op in LINEAR_OPS and edit.is_standard(node) and self.reads(node, place, sides[0]):
            return
        if node.op in ("Mul", "Div", "Add", "Sub") and edit.is_standard(node):
            self.arithmetic_forward(node, place, sides[0])
        elif node.op == "MatMul":
            self.product_forward(node, place, sides[0])
        elif node.op in ("Concat", "Split") and edit.is_standard(node):
            self.pieces(node, place)
        elif (node.op in _MOVES or node.op in _ALONGSIDE) and sides == [0]:
            if self.tie(node, tensor, node.outputs[0]):
                self.visit(node.outputs[0], self.moved(node, index), self.shift_passes(node, place, index))
        else:
            raise Blocked(f"{node.op} reads it")

    def reads(self, node: gs.Node, place: _Place, side: int) -> bool:
        """Whether a linear ends the region here; False for the product of two activations."""
        try:
            linear = view(self.graph, node)
        except NotLinear as error:
            if "two activations" in str(error):
                return False
            raise Blocked(f"{node.op} reads it, but {error}") from None
        if linear.data is not place.tensor:
            raise Blocked(f"{node.op} reads it as its {'bias' if side == 2 else 'weight'}")
        if place.shifted and linear.padded:
            self.no_shift = self.no_shift or f"a shift does not pass the zero padding of {node.op}"
        vector = self.along(place.index, linear.in_axis, len(self.shape(place.tensor)))
        self.ends.append(End("in", node, _spread(vector, linear.channels[1]), place.shifted, linear))
        return True

    def arithmetic_forward(self, node: gs.Node, place: _Place, side: int) -> None:
        other, result = node.inputs[1 - side], node.outputs[0]
        index = _raised(place.index, len(self.shape(result)))
        if isinstance(other, gs.Constant):
            self.operand(node, 1 - side, place, index)
            return
        if node.op == "Div" and side == 1:
            raise Blocked("Div divides by it")
        tied = (other, result) if node.op in ("Add", "Sub") else (result,)
        if self.tie(node, place.tensor, *tied):
            self.block_shift(place, node)
            for tensor in tied:
                self.visit(tensor, self.fitted(index, self.shape(tensor)), shifted=False)

    def product_forward(self, node: gs.Node, place: _Place, side: int) -> None:
        """MatMul of two activations: along the summed axis the other operand gets the inverse, else the result."""
        index, other = place.index, node.inputs[1 - side]
        if index.ndim < 2 or len(self.shape(other)) < 2:
            raise Blocked("MatMul sums over it")
        summed, own = (-1, -2) if side == 0 else (-2, -1)
        if index.shape[summed] > 1:
            if index.shape[own] > 1:
                raise Blocked("MatMul mixes its channels")
            if place.shifted:
                self.no_shift = self.no_shift or "a shift does not pass a product of two activations"
            if self.tie(node, place.tensor, other):
                shape = self.shape(other)
                inverse = _raised(-np.swapaxes(index, -1, -2), len(shape))
                self.visit(other, self.fitted(inverse, shape), shifted=False)
            return
        result = node.outputs[0]
        shifted = place.shifted
        if shifted and not (side == 1 and _rows_sum_to_one(other)):
            self.no_shift, shifted = self.no_shift or "a shift does not pass MatMul", False
        if self.tie(node, place.tensor, result):
            self.visit(result, _raised(index, len(self.shape(result))), shifted)

    # ---- operators that move channels --------------------------------------------------------------------------------

    def shift_passes(self, node: gs.Node, place: _Place, index: np.ndarray) -> bool:
        """Whether a shift comes along; notes why not. Raises Blocked where not even a positive scale passes."""
        reason = ""
        if node.op in ("Neg", "Abs", "ReduceSum"):
            reason = f"a shift does not pass {node.op}"
        elif node.op not in _MOVES and node.op not in ("Cast", "Resize", "ReduceMax"):
            for axis in [i for i, size in enumerate(index.shape) if size > 1] or [None]:
                reason = reason or passes(node, Vector(axis)).no_shift
        if place.shifted and reason:
            self.no_shift = self.no_shift or reason
        return place.shifted and not reason

    def moved(self, node: gs.Node, index: np.ndarray) -> np.ndarray:
        """The map of a node's result from that of its first input."""
        source, result = self.shape(node.inputs[0]), self.shape(node.outputs[0])
        if node.op == "Transpose":
            return index.transpose(node.attrs.get("perm"))
        if node.op in _RESHAPES:
            return _reshaped(index, source, result, node.op)
        if node.op == "Slice":
            return index[_slices(node, index.shape, source)]
        if node.op == "Gather":
            return _gathered(node, index)
        if node.op == "Expand":
            return _raised(index, len(result))
        if node.op in ("ReduceMean", "ReduceSum", "ReduceMax"):
            return _reduced(node, index)
        if node.op == "Resize" and any(a != b for a, b, n in zip(source, result, index.shape, strict=True) if n > 1):
            raise Blocked("Resize changes its channels")
        if node.op == "Cast" and not edit.is_float(node.outputs[0]):
            raise Blocked("Cast makes integers of it")
        if len(source) != len(result):
            raise Blocked(f"{node.op} changes its axes")
        return index

    def moved_back(self, node: gs.Node, index: np.ndarray) -> np.ndarray:
        """The map of a node's first input from that of its result."""
        source, result = self.shape(node.inputs[0]), self.shape(node.outputs[0])
        if node.op == "Transpose":
            perm = node.attrs.get("perm") or range(len(source))[::-1]
            return index.transpose(np.argsort(perm))
        if node.op in _RESHAPES:
            return _reshaped(index, result, source, node.op)
        if node.op == "Expand":
            return self.fitted(index, source)
        if node.op in ("Slice", "Gather"):
            wide = _axes_before(node, index, source)
            candidate = self.fresh([size if axis in wide else 1 for axis, size in enumerate(source)])
            self.merge(self.moved(node, candidate), index)
            return candidate
        if node.op in ("ReduceMean", "ReduceSum", "ReduceMax"):
            probe = np.zeros([1] * len(source), np.int64)
            if _reduced(node, probe).ndim != len(source):
                axes = {int(a) % len(source) for a in _reduced_axes(node)}
                index = np.expand_dims(index, tuple(sorted(axes)))
            self.moved(node, index)
            return index
        self.moved(node, index)
        return index

    def pieces(self, node: gs.Node, place: _Place) -> None:
        """Concat and Split: one whole tensor, and parts of it along an axis."""
        whole, parts = node.outputs[0], list(node.inputs)
        if node.op == "Split":
            whole, parts = node.inputs[0], [t for t in node.outputs if not t.is_empty()]
        if any(isinstance(t, gs.Constant) for t in parts):
            raise Blocked("Concat joins it with a constant")
        if not self.tie(node, place.tensor, whole, *parts):
            return
        shapes = [self.shape(t) for t in parts]
        axis = int(node.attrs.get("axis", 0)) % len(shapes[0])
        full = place.index
        if place.tensor is not whole and full.shape[axis] > 1:
            sizes = [[n if i == axis or full.shape[i] > 1 else 1 for i, n in enumerate(shape)] for shape in shapes]
            made = [full if t is place.tensor else self.fresh(size) for t, size in zip(parts, sizes, strict=True)]
            full = np.concatenate([np.broadcast_to(m, size) for m, size in zip(made, sizes, strict=True)], axis=axis)
        self.visit(whole, full, place.shifted)
        start = 0
        for tensor, shape in zip(parts, shapes, strict=True):
            stop = start + shape[axis]
            part = full if full.shape[axis] == 1 else np.take(full, range(start, stop), axis=axis)
            self.visit(tensor, part, place.shifted)
            start = stop

    # ---- the result --------------------------------------------------------------------------------------------------

    def region(self) -> Region:
        """The region with its classes renumbered: merged ones are one, those that nothing refers to are gone."""
        number = _components(self.count, self.merges)
        resolve = lambda index: np.sign(index) * number[np.abs(index)]  # noqa: E731
        used = [*(e.index for e in self.ends), *(c.index for c in self.cuts), *(p.index for p in self.places.values())]
        labels = np.unique(np.concatenate([np.abs(resolve(i)).reshape(-1) for i in used]))
        final = np.zeros(self.count + 2, np.int64)
        final[labels] = np.arange(1, labels.size + 1)
        renumber = lambda index: np.sign(resolve(index)) * final[np.abs(resolve(index))]  # noqa: E731
        fixed = [""] * labels.size
        if labels.size and labels[-1] == self.count + 1:
            fixed[-1] = "it is scaled against itself"
        for index, reason in self.pins:
            for c in np.unique(np.abs(renumber(index))):
                fixed[c - 1] = fixed[c - 1] or reason
        return Region(
            [replace(e, index=renumber(e.index)) for e in self.ends],
            [replace(c, index=renumber(c.index)) for c in self.cuts],
            fixed,
            self.no_shift,
            {key: (place.tensor, renumber(place.index)) for key, place in self.places.items()},
        )


def _components(count: int, merges: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """For every class the (signed) class that stands for it; ``count + 1`` where a class meets its own inverse."""
    number = np.arange(count + 1)
    if not merges:
        return number
    one, other = (np.concatenate(side) for side in zip(*merges, strict=True))
    label = np.arange(2 * count + 1) - count  # of -count .. count; a class and its inverse are two nodes
    edges = [(one + count, other + count), (count - one, count - other)]
    while True:
        new = label.copy()
        for a, b in edges:
            np.minimum.at(new, a, label[b])
            np.minimum.at(new, b, label[a])
        new = np.minimum(new, new[new + count])
        if np.array_equal(new, label):
            break
        label = new
    own, inverse = label[count:], label[count::-1]
    # The smallest label of a component and its mirror image is -m: a class is -m where it is its own, else m.
    number = np.where(own < inverse, own, -inverse)
    number[own == inverse] = count + 1
    number[0] = 0
    return number


def _raised(index: np.ndarray, rank: int) -> np.ndarray:
    """A map with leading axes, as broadcasting gives them."""
    return index.reshape([1] * (rank - index.ndim) + list(index.shape))


def _collapsed(index: np.ndarray) -> np.ndarray:
    """A map without the length of the axes along which nothing changes."""
    for axis, size in enumerate(index.shape):
        first = np.take(index, [0], axis=axis)
        if size > 1 and (index == first).all():
            index = first
    return index


def _spread(vector: np.ndarray, channels: int) -> np.ndarray:
    return np.broadcast_to(vector, (channels,))


def _rows_sum_to_one(tensor: gs.Tensor) -> bool:
    """Whether a tensor is a Softmax along its last axis."""
    node = edit.producer(tensor)
    while node is not None and node.op in ("Identity", "Dropout", "Cast"):
        node = edit.producer(node.inputs[0])
    if node is None or node.op != "Softmax" or not edit.is_standard(node):
        return False
    axis = node.attrs.get("axis", -1)
    return axis == -1 or axis + 1 == edit.rank(node.inputs[0])


def _reshaped(index: np.ndarray, source: Shape, result: Shape, op: str) -> np.ndarray:
    """The map of a reshaped tensor. Axes of equal volume belong together; only those with channels are spread out."""
    wide, new, start, stop = [], [], [0, 0], [0, 0]
    while stop[0] < len(source) or stop[1] < len(result):
        volumes = [1, 1]
        while True:
            side = 0 if volumes[0] <= volumes[1] and stop[0] < len(source) else 1
            if stop[side] == (len(source), len(result))[side]:
                raise Blocked(f"{op} mixes its channels with other axes")
            volumes[side] *= (source, result)[side][stop[side]]
            stop[side] += 1
            if volumes[0] == volumes[1] and stop[0] > start[0] and stop[1] > start[1]:
                break
            if volumes[0] == volumes[1] and (stop[0] == len(source) or stop[1] == len(result)):
                break
        held = any(size > 1 for size in index.shape[start[0] : stop[0]])
        wide += [size if held else 1 for size in source[start[0] : stop[0]]]
        new += [size if held else 1 for size in result[start[1] : stop[1]]]
        start = list(stop)
    return np.broadcast_to(index, wide).reshape(new)


def _slices(node: gs.Node, held: Sequence[int], shape: Shape) -> tuple[slice, ...]:
    """What a Slice with constant bounds takes of a map: everything along axes the map does not vary on."""
    starts, ends = edit.argument(node, 1, "starts"), edit.argument(node, 2, "ends")
    axes, steps = edit.argument(node, 3, "axes"), edit.argument(node, 4, "steps")
    taken = [slice(None)] * len(shape)
    if axes is None and not edit.has_input(node, 3):
        axes = range(len(shape) if starts is None else len(starts))
    if axes is None:
        raise Blocked("Slice cuts axes that are computed at run time")
    for place, axis in enumerate(int(a) % len(shape) for a in axes):
        if held[axis] == 1:
            continue
        if starts is None or ends is None or (steps is None and edit.has_input(node, 4)):
            raise Blocked("Slice cuts its channels at places computed at run time")
        step = 1 if steps is None else int(steps[place])
        if step < 0:
            raise Blocked("Slice turns its channels round")
        start, stop, _ = slice(int(starts[place]), int(ends[place])).indices(shape[axis])
        taken[axis] = slice(start, stop, step)
    return tuple(taken)


def _gathered(node: gs.Node, index: np.ndarray) -> np.ndarray:
    axis = int(node.attrs.get("axis", 0)) % index.ndim
    picked = edit.value(node.inputs[1])
    if index.shape[axis] == 1:
        size = edit.rank(node.inputs[1]) if picked is None else picked.ndim
        if size is None:
            raise Blocked("Gather takes indices of unknown rank")
        return index.reshape([*index.shape[:axis], *[1] * size, *index.shape[axis + 1 :]])
    if picked is None:
        raise Blocked("Gather picks its channels at run time")
    return np.take(index, picked, axis=axis)


def _axes_before(node: gs.Node, index: np.ndarray, source: Shape) -> set[int]:
    """The axes along which the input of a Slice or Gather may have channels, from the map of the result."""
    if node.op == "Slice":
        return {axis for axis, size in enumerate(index.shape) if size > 1}
    axis = int(node.attrs.get("axis", 0)) % len(source)
    more = index.ndim - len(source)  # axes that the indices add to the one they replace, -1 for a single index
    own = {
        i if i < axis else i - more for i, size in enumerate(index.shape) if size > 1 and not axis <= i <= axis + more
    }
    known = isinstance(node.inputs[1], gs.Constant) and isinstance(node.inputs[0].shape[axis], int)
    return own | ({axis} if known else set())


def _reduced_axes(node: gs.Node) -> np.ndarray:
    axes = edit.argument(node, 1, "axes")
    if axes is None:
        raise Blocked(f"{node.op} names no constant axes")
    return axes


def _reduced(node: gs.Node, index: np.ndarray) -> np.ndarray:
    axes = tuple(sorted({int(a) % index.ndim for a in _reduced_axes(node)}))
    if any(index.shape[a] > 1 for a in axes):
        raise Blocked(f"{node.op} reduces the channel axis")
    return index if node.attrs.get("keepdims", 1) else np.squeeze(index, axes)
