"""Every channel of a tensor as a function of one channel of an earlier tensor.

    y[.., j, ..]  =  scale[j] * f_j(h[.., channel[j], ..]) + shift[j]

The reader follows the nodes between h and y (their *cone*). An elementwise node makes new functions out of old
functions; constant factors and terms go to scale and shift. A node that only moves data (Transpose, Slice, Concat,
ScatterND …) runs in ONNX Runtime on the numbers of the elements instead of their values. The node then does to the
numbers what it does to the data, so that no spelling of "some channels of h" needs a rule of its own. Masks, indices
and bounds that the graph computes from shapes are computed for the shapes at hand.

Worked example: h has 4 channels, m = [1 1 0 0] is computed by ConstantOfShape and ScatterND, y = Where(m, Gelu(h), h).
Channel: [0 1 2 3]. Functions: [Gelu(h) Gelu(h) h h]. The last two are affine: a linear in front of h and one behind y
are one linear for them (``reparameterize_ffn``).

Every element also has a place: the number of its position along all other axes of h. A cone that moves or mixes tokens
is no function of channels, even where every channel of y comes from one channel of h.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import InBetween, Refused
from channelfold.passes.channels.cones import Cone, is_followed
from channelfold.passes.channels.maps import Shape, collapsed, raised
from channelfold.passes.layers.affine import batch_norm
from channelfold.passes.operators import operator
from channelfold.runtime.errors import ModelError
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import free_name, session
from channelfold.runtime.io.shapes import LazyShapes

NOWHERE = -1  # the place of a constant that is moved together with data
_WHAT = np.dtype([("function", np.int32), ("channel", np.int32), ("scale", np.float64), ("shift", np.float64)])


class UnknownShape(Refused):
    """A tensor has no known shape for the input at hand."""


@dataclass(frozen=True, eq=False)
class Function:
    """A function of a channel: the result of ``node`` on ``arguments``; None stands for an input that is left out.

    Where the function is the channel itself, ``root`` is the number of the tensor that holds the channel. ``affine`` is
    (root, slope, intercept) of a function that is affine in a channel of one root, else None.
    """

    node: gs.Node | None = None
    arguments: tuple[Function | gs.Constant | None, ...] = ()
    root: int | None = None
    affine: tuple[int, float, float] | None = None

    def __str__(self) -> str:
        return self.node.op if self.node is not None else "a mixture"


CONSTANT, MIXED = 0, 1  # the first two functions: a constant, and a mixture of several channels or scales


@dataclass
class Functions:
    """All functions found so far, each once; a function goes by its place in ``items``."""

    items: list[Function] = field(default_factory=lambda: [Function(), Function()])
    known: dict[object, int] = field(default_factory=dict)

    def leaf(self, root: int) -> int:
        return self._number(("root", root), lambda: Function(root=root, affine=(root, 1.0, 0.0)))

    def applied(self, node: gs.Node, arguments: tuple[int | gs.Constant | None, ...]) -> int:
        """The number of the function that a node computes from functions (by number) and constants."""
        if any(isinstance(a, int) and a == MIXED for a in arguments):
            return MIXED
        attrs = tuple(sorted((name, str(value)) for name, value in node.attrs.items()))
        key = (node.op, node.domain, attrs, *(_key(a) if isinstance(a, gs.Constant) else a for a in arguments))
        return self._number(key, lambda: self._made(node, arguments))

    def _made(self, node: gs.Node, arguments: tuple[int | gs.Constant | None, ...]) -> Function:
        given = tuple(self.items[a] if isinstance(a, int) else a for a in arguments)
        return Function(node, given, affine=_affine(node, given))

    def _number(self, key: object, make: Callable[[], Function]) -> int:
        if key not in self.known:
            self.known[key] = len(self.items)
            self.items.append(make())
        return self.known[key]


def _key(constant: gs.Constant) -> tuple[str, bytes]:
    values = np.asarray(edit.value(constant))
    return str(values.dtype), values.tobytes()


def _affine(node: gs.Node, given: tuple[Function | gs.Constant | None, ...]) -> tuple[int, float, float] | None:
    """(root, slope, intercept) of the result of an arithmetic node on one affine function and constants, or None."""
    moving = [a for a in given if isinstance(a, Function)]
    if len(moving) != 1 or moving[0].affine is None:
        return None
    root, slope, intercept = moving[0].affine
    if node.op == "Neg":
        return root, -slope, -intercept
    if not operator(node).arithmetic:
        return None
    other = next(a for a in given if isinstance(a, gs.Constant))
    value = float(np.asarray(edit.value(other)).reshape(()))
    match node.op, given[0] is other:
        case "Add", _:
            return root, slope, intercept + value
        case "Sub", False:
            return root, slope, intercept - value
        case "Sub", True:
            return root, -slope, value - intercept
        case "Mul", _:
            return root, slope * value, intercept * value
        case "Div", False if value:
            return root, slope / value, intercept / value
    return None


@dataclass(frozen=True)
class _Elements:
    """The functions and places of the elements of a tensor: arrays that broadcast to ``size``, its shape.

    Every record of ``what`` holds the number of a function, a channel, a scale and a shift. ``place`` is None for
    constants.
    """

    what: np.ndarray
    place: np.ndarray | None
    size: Shape

    @property
    def uniform(self) -> bool:
        """Whether all elements have one function, scale 1 and shift 0."""
        what = self.what
        plain = bool(np.all(what["scale"] == 1) and not np.any(what["shift"]))
        return plain and bool(np.all(what["function"] == what["function"].flat[:1]))


@dataclass
class Reader:
    """Follows the elements of roots through cones. ``shapes`` holds the shapes of tensors for one input."""

    graph: gs.Graph
    shapes: LazyShapes
    functions: Functions = field(default_factory=Functions)
    elements: dict[int, _Elements] = field(default_factory=dict)
    values: dict[str, np.ndarray] = field(default_factory=dict)
    unknown: dict[int, str] = field(default_factory=dict)

    def read(self, found: Cone, axes: Mapping[int, int], axis: int) -> np.ndarray:
        """The channels of the target of a cone along ``axis``: records (n,) of function, channel, scale and shift.

        ``axes`` holds the axis of the channels of each root, by id. Raises Refused where the elements are no functions
        of channels, or vary along other axes.
        """
        self.unknown, self.elements = found.unknown, {}
        places = set()
        for number, root in enumerate(found.roots):
            shape = self.shapes.measured(root.name)
            if shape is None:
                raise UnknownShape(f"the shape of {root.name!r} is unknown")
            channels = axes[id(root)] % len(shape)
            places.add((channels, shape[:channels] + shape[channels + 1 :]))
            what = np.zeros([n if i == channels else 1 for i, n in enumerate(shape)], _WHAT)
            what["function"], what["scale"] = self.functions.leaf(number), 1
            what["channel"] = np.arange(shape[channels]).reshape(what.shape)
            place = np.arange(math.prod(shape) // max(shape[channels], 1))
            place = place.reshape([1 if i == channels else n for i, n in enumerate(shape)])
            self.elements[id(root)] = _Elements(what, place, shape)
        for node in found.nodes:
            self.follow(node)
        last = self.elements[id(found.target)]
        shape = last.size
        axis %= len(shape)
        expected = self.elements[id(found.roots[0])].place
        if len(places) > 1 or (axis, shape[:axis] + shape[axis + 1 :]) not in places:
            raise Refused("its channels are on another axis, or its shape is another one")
        constant = last.what["function"] == CONSTANT
        if last.place is None or not np.all((last.place == expected) | ((last.place == NOWHERE) & constant)):
            raise Refused("something else than channels is moved or mixed")
        if any(size > 1 for i, size in enumerate(last.what.shape) if i != axis):
            raise Refused("which channels go through the activation differs along another axis")
        return np.broadcast_to(last.what.reshape(-1), (shape[axis],))

    def follow(self, node: gs.Node) -> None:
        held = [i for i, t in enumerate(node.inputs) if id(t) in self.elements]
        known = operator(node)
        if known.asks_shape or not held:
            return
        if not is_followed(node):
            raise InBetween(f"{node.op}")
        if known.kind == "batch_norm":
            made = [self.scaled(node)]
        elif known.elementwise and known.moves:
            if edit.has_input(node, 2):
                raise InBetween("Dropout with a training switch")
            made = [self.elements[id(node.inputs[0])]]
        elif known.kind == "transpose":
            made = [self.transposed(node)]
        elif known.moves:
            made = self.moved(node)
        elif node.op == "Where" and id(node.inputs[0]) not in self.elements:
            made = [self.selected(node)]
        else:
            made = [self.computed(node)]
        for tensor, elements in zip(node.outputs, made, strict=False):
            self.elements[id(tensor)] = elements

    # ---- elementwise nodes -------------------------------------------------------------------------------------------

    def operand(self, tensor: gs.Tensor) -> _Elements:
        if id(tensor) in self.elements:
            return self.elements[id(tensor)]
        values = np.asarray(self.value(tensor))
        what = np.zeros(values.shape, _WHAT)
        what["channel"] = -1
        what["shift"] = values
        return _Elements(what, None, values.shape)

    def computed(self, node: gs.Node) -> _Elements:
        """The elements that an elementwise node computes from its inputs."""
        operands = [self.operand(t) for t in node.inputs if not t.is_empty()]
        plain = all(o.uniform if o.place is not None else o.what.size == 1 for o in operands)
        whats = [operand.what for operand in operands]
        if operator(node).arithmetic and not plain:
            result, done = _arithmetic(node.op, *whats)
        else:
            result, done = np.zeros(np.broadcast_shapes(*(w.shape for w in whats)), _WHAT), np.array(False)
        if not np.all(done):
            scalars = [o.place is None and o.what.size == 1 for o in operands]
            applied = self.applied(node, whats, scalars)
            result = np.where(done, result, applied)
        return _Elements(collapsed(result), *_common(operands))

    def applied(self, node: gs.Node, whats: list[np.ndarray], scalars: list[bool]) -> np.ndarray:
        """A new function for every combination of functions; MIXED where scales, shifts or channels differ."""
        shape = np.broadcast_shapes(*(what.shape for what in whats))
        wide = [np.broadcast_to(what, shape).reshape(-1) for what in whats]
        moving = [what for what, scalar in zip(wide, scalars, strict=True) if not scalar]
        plain = np.all([(what["scale"] == 1) & (what["shift"] == 0) for what in moving], axis=0)
        plain &= np.all([what["channel"] == moving[0]["channel"] for what in moving], axis=0)
        combined, where = np.unique(np.stack([what["function"] for what in moving]), axis=1, return_inverse=True)
        numbers = []
        for combination in combined.T:
            functions, fixed = map(int, combination), iter(scalars)
            arguments = (
                None if t.is_empty() else self.kept(t) if next(fixed) else next(functions) for t in node.inputs
            )
            numbers.append(self.functions.applied(node, tuple(arguments)))
        result = np.zeros(wide[0].shape, _WHAT)
        result["function"] = np.where(plain, np.array(numbers, np.int32)[where.reshape(-1)], MIXED)
        result["channel"], result["scale"] = moving[0]["channel"], 1
        return result.reshape(shape)

    def kept(self, tensor: gs.Tensor) -> gs.Constant:
        """A constant with the value of a tensor of one element."""
        if isinstance(tensor, gs.Constant):
            return tensor
        return gs.Constant(free_name(self.graph, tensor.name), np.asarray(self.value(tensor)))

    def selected(self, node: gs.Node) -> _Elements:
        """The elements that a Where with a known mask selects."""
        if id(node.inputs[0]) in self.unknown:
            raise Refused(f"its mask depends on {self.unknown[id(node.inputs[0])]}")
        mask = self.value(node.inputs[0])
        operands = [self.operand(t) for t in node.inputs[1:]]
        what = np.where(collapsed(mask), *(operand.what for operand in operands))
        return _Elements(collapsed(what), *_common(operands, mask.shape))

    def scaled(self, node: gs.Node) -> _Elements:
        """The elements of a BatchNormalization."""
        affine, source = batch_norm(node), self.elements[id(node.inputs[0])]
        vector = [-1] + [1] * (source.what.ndim - 2)
        scale, shift = affine.scale.reshape(vector), affine.shift.reshape(vector)
        what = np.broadcast_to(source.what, np.broadcast_shapes(source.what.shape, scale.shape)).copy()
        what["shift"] = what["shift"] * scale + shift
        what["scale"] *= scale
        _settle(what)
        return _Elements(what, source.place, source.size)

    # ---- nodes that move data ----------------------------------------------------------------------------------------

    def transposed(self, node: gs.Node) -> _Elements:
        source, perm = self.elements[id(node.inputs[0])], node.attrs.get("perm")
        perm = list(perm or reversed(range(len(source.size))))
        place = None if source.place is None else source.place.transpose(perm)
        return _Elements(source.what.transpose(perm), place, tuple(source.size[i] for i in perm))

    def moved(self, node: gs.Node) -> list[_Elements]:
        """The elements that a node moves. An element that Pad adds has the number 0, that of the constant 0."""
        slots = operator(node).inputs(node)
        if node.attrs.get("reduction", "none") != "none" or node.attrs.get("value"):
            raise Refused(f"{node.op} does more than to move channels")
        sources = {i: self.operand(node.inputs[i]) for i in slots if edit.has_input(node, i)}
        fixed = {i: self.value(t) for i, t in enumerate(node.inputs) if i not in sources and not t.is_empty()}
        whats = {i: elements.what for i, elements in sources.items()}
        places = {i: np.array(NOWHERE) if e.place is None else e.place for i, e in sources.items()}
        made, sizes = [], []
        for nothing, arrays in ((np.zeros(1, _WHAT), whats), (np.array([NOWHERE]), places)):
            table = np.concatenate([nothing, *(array.reshape(-1) for array in arrays.values())])
            numbers, start = {}, 1
            for i, array in arrays.items():
                number = np.arange(start, start + array.size).reshape(array.shape)
                numbers[i] = np.broadcast_to(number, sources[i].size)
                start += array.size
            moved = self.run(node, numbers | fixed)
            made.append([collapsed(table[collapsed(array)]) for array in moved])
            sizes = [array.shape for array in moved]
        return [_Elements(*parts) for parts in zip(*made, sizes, strict=True)]

    def run(self, node: gs.Node, feed: Mapping[int, np.ndarray]) -> list[np.ndarray]:
        """The outputs of one node for integer inputs, by position."""
        part, named = edit.alone(self.graph, node, feed, [np.dtype(np.int64)] * len(node.outputs))
        return list(session(part, optimize=False).run(named).values())

    # ---- what does not depend on the roots ---------------------------------------------------------------------------

    def value(self, tensor: gs.Tensor) -> np.ndarray:
        """The values of a tensor that the graph computes from constants and shapes alone."""
        if isinstance(tensor, gs.Constant):
            return np.asarray(edit.value(tensor))
        if tensor.name not in self.values:
            try:
                self.evaluate(tensor, self.shapes.inferred)
            except Refused:  # shape inference does not know every shape
                self.evaluate(tensor, self.shapes.measured)
        return self.values[tensor.name]

    def evaluate(self, tensor: gs.Tensor, shape: Callable[[str], Shape | None]) -> None:
        """Computes the values of a tensor in ONNX Runtime. Raises Refused."""
        nodes: list[gs.Node] = []
        known: dict[str, gs.Tensor] = {}
        pending, seen = [tensor], set()
        while pending:
            current = pending.pop()
            if isinstance(current, gs.Constant) or current.is_empty() or id(current) in seen:
                continue
            seen.add(id(current))
            node = edit.producer(current)
            if node is None or id(current) in self.elements:
                raise Refused(f"{tensor.name!r} depends on the values of {current.name!r}")
            if operator(node).asks_shape and (found := self.size(node.inputs[0], shape)) is not None:
                self.values[current.name] = _shape_value(node, found)
            if current.name in self.values:
                known[current.name] = current
                continue
            nodes.append(node)
            pending += node.inputs
        if tensor.name in self.values:
            return
        order = {id(node): place for place, node in enumerate(self.graph.nodes)}
        nodes = sorted({id(node): node for node in nodes}.values(), key=lambda node: order[id(node)])
        opset, domains = self.graph.opset, self.graph.import_domains
        part = gs.Graph(nodes, list(known.values()), [tensor], opset=opset, import_domains=domains)
        try:
            computed = session(part, optimize=False).run({name: self.values[name] for name in known})
        except ModelError as error:
            raise Refused(f"{tensor.name!r} cannot be computed: {error}") from None
        self.values[tensor.name] = computed[tensor.name]

    def size(self, tensor: gs.Tensor, shape: Callable[[str], Shape | None]) -> Shape | None:
        """The shape of a tensor from its elements where the reader follows it, else from ``shape``."""
        own = self.elements.get(id(tensor))
        return own.size if own is not None else shape(tensor.name)


def _shape_value(node: gs.Node, shape: Shape) -> np.ndarray:
    if node.op == "Size":
        return np.array(math.prod(shape), np.int64)
    return np.array(shape[node.attrs.get("start", 0) : node.attrs.get("end")], np.int64)


def _common(operands: Sequence[_Elements], size: Shape = ()) -> tuple[np.ndarray, Shape]:
    """(places, shape) of the result of operands. Raises Refused where the places of two operands differ."""
    size = np.broadcast_shapes(size, *(operand.size for operand in operands))
    place, *others = (raised(o.place, len(size)) for o in operands if o.place is not None)
    for other in others:
        if np.array_equal(place, other):
            continue
        if np.any((place != other) & (place != NOWHERE) & (other != NOWHERE)):
            raise Refused("tensors that are laid out differently meet")
        place = collapsed(np.maximum(place, other))
    return place, size


def _arithmetic(op: str, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(elements of a sum, difference, product or quotient, where each is one function, scaled and shifted)."""
    a, b = np.broadcast_arrays(a, b)
    fixed_a, fixed_b = a["function"] == CONSTANT, b["function"] == CONSTANT
    result = np.where(fixed_a, b, a)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if op in ("Add", "Sub"):
            sign = 1 if op == "Add" else -1
            same = (a["function"] == b["function"]) & (a["channel"] == b["channel"]) & (a["function"] != MIXED)
            result["scale"] = a["scale"] + sign * b["scale"]
            result["shift"] = a["shift"] + sign * b["shift"]
            done = fixed_a | fixed_b | same
        elif op == "Mul":
            factor = np.where(fixed_a, a["shift"], b["shift"])
            result["scale"], result["shift"] = result["scale"] * factor, result["shift"] * factor
            done = fixed_a | fixed_b
        else:
            result["scale"], result["shift"] = a["scale"] / b["shift"], a["shift"] / b["shift"]
            done = fixed_b
    done = done & np.isfinite(result["scale"]) & np.isfinite(result["shift"])
    _settle(result)
    return result, done


def _settle(what: np.ndarray) -> None:
    """Turns elements with a scale of 0 into constants."""
    gone = what["scale"] == 0
    what["function"][gone], what["channel"][gone] = CONSTANT, -1
