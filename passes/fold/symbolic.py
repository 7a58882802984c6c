"""The shapes of all tensors, and the values of those that hold sizes, as far as they are known whatever the input.

    s = Shape(x)            x: (b, 7, c)        s = [b, 7, c]
    t = Concat(s[:1], -1)                       t = [b, -1]
    y = Reshape(x, t)                           y: (b, 7 c)

ONNX's own inference of one node after the other does the most; the rules here are for operators that compute with
sizes, or whose result has sums, products or equal sizes that inference loses. A size that nothing is known about gets a
name: the axis of the tensor where the size shows first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from channelfold.passes.fold.algebra import Size, product
from channelfold.passes.operators import EVERY, operator
from channelfold.runtime.io import edit

Shape = tuple[Size, ...]

_LIMIT = 64  # elements of the largest tensor whose values are followed
_END = np.iinfo(np.int32).max  # exporters write the end of an axis as this number or a larger one
_ONE = Size.number(1)


class Sizes:
    """What is known about every tensor of a graph whose shapes are inferred (``infer_shapes``), bodies left out."""

    def __init__(self, graph: gs.Graph):
        self._graph, self._opset = graph, graph.opset
        self._shapes: dict[int, Shape | None] = {}
        self._values: dict[int, np.ndarray | None] = {}
        self._texts: dict[str, Size] = {}
        self._kept: list[Any] = []  # tensors are known by identity, which only living ones have
        for node in graph.nodes:
            self._follow(node)

    def shape(self, tensor: gs.Tensor) -> Shape | None:
        """The size of every axis; None where the number of axes is unknown."""
        if id(tensor) not in self._shapes:
            self._keep(tensor, _declared(tensor), None)
        return self._shapes[id(tensor)]

    def value(self, tensor: gs.Tensor) -> np.ndarray | None:
        """The elements of a small integer or bool tensor, each a Size, or None where nothing is known about one."""
        if id(tensor) not in self._values:
            self._values[id(tensor)] = _constant(tensor)
        return self._values[id(tensor)]

    def tell(self) -> None:
        """Gives the tensors inside the graph the sizes that ONNX's inference of the whole graph has not found."""
        for tensor in self._kept:
            found = self._shapes[id(tensor)]
            if tensor.inputs and found is not None and not edit.is_output(self._graph, tensor):
                known = tensor.shape if edit.rank(tensor) == len(found) else [None] * len(found)
                tensor.shape = [d if s.known is None else s.known for d, s in zip(known, found, strict=True)]

    def learn(self, tensor: gs.Tensor, sizes: Shape) -> np.ndarray:
        """Takes a tensor as the Shape of something that has these sizes; returns its elements."""
        value = _array(sizes, (len(sizes),))
        self._keep(tensor, (Size.number(len(sizes)),), value)
        return value

    def _keep(self, tensor: gs.Tensor, shape: Shape | None, value: np.ndarray | None) -> None:
        self._kept.append(tensor)
        self._shapes[id(tensor)] = shape
        if value is not None or not isinstance(tensor, gs.Constant):
            self._values[id(tensor)] = value

    def _follow(self, node: gs.Node) -> None:
        shapes = self._shapes_of(node)
        value = self._value_of(node) if edit.is_standard(node) else None
        for place, tensor in enumerate(node.outputs):
            found = _refined(tensor, shapes[place] if place < len(shapes) else None)
            held = value if place == 0 else None
            if held is not None and found is not None and [d.known for d in found] != list(held.shape):
                held = None
            if held is None:
                held = _nothing_known(tensor, found)
            self._keep(tensor, found, held)

    def _shapes_of(self, node: gs.Node) -> Sequence[Shape | None]:
        known, given = operator(node), [self.shape(t) for t in node.inputs]
        if known.elementwise:
            wide = given if node.op == "Where" or known.data == EVERY else given[:1]
            return [self._broadcast(wide, node.outputs[0].name)] * len(node.outputs)
        rule = _SHAPES.get(node.op) if edit.is_standard(node) else None
        found = rule(self, node, given[0]) if rule is not None and given and given[0] is not None else None
        return [found] if found is not None else self._inferred(node)

    def _value_of(self, node: gs.Node) -> np.ndarray | None:
        rule = _VALUES.get(node.op)
        if rule is None:
            return None
        try:
            found = rule(self, node)
        except (ValueError, IndexError, TypeError):  # a node that cannot run
            return None
        return None if found is None or found.size > _LIMIT else _in_range(found, node.outputs[0])

    def _broadcast(self, shapes: Sequence[Shape | None], name: str) -> Shape | None:
        if not shapes or any(shape is None for shape in shapes):
            return None
        result: list[Size] = []
        for axis in range(-max(len(shape) for shape in shapes if shape is not None), 0):
            sizes = [shape[axis] for shape in shapes if shape is not None and len(shape) >= -axis]
            result.append(_common(sizes) or Size.unknown((name, len(result))))
        return tuple(result)

    def _inferred(self, node: gs.Node) -> list[Shape | None]:
        """The shapes of a node's results by ONNX's inference for one node."""
        try:
            schema = onnx.defs.get_schema(node.op, self._opset if edit.is_standard(node) else 1, node.domain or "")
            inputs = [t for t in node.inputs if not t.is_empty()]
            types, data = {t.name: self._type(t) for t in inputs}, {}
            for tensor in inputs:
                numbers = self.numbers(tensor)
                if numbers is not None:
                    data[tensor.name] = onnx.numpy_helper.from_array(numbers, tensor.name)
            proto = onnx.helper.make_node(
                node.op, [t.name for t in node.inputs], [t.name for t in node.outputs], domain=node.domain, **node.attrs
            )
            found = onnx.shape_inference.infer_node_outputs(schema, proto, types, data)
        except Exception:  # inference says in many ways that it cannot
            return [None] * len(node.outputs)
        return [self._read(found.get(t.name), t.name) for t in node.outputs]

    def _type(self, tensor: gs.Tensor) -> onnx.TypeProto:
        kind, shape = edit.dtype(tensor), self.shape(tensor)
        if kind is None:
            raise ValueError("an input of unknown type")
        dims: list[int | str | None] | None = None
        if shape is not None:
            dims = []
            for size in shape:
                if size.known is None:
                    self._texts.setdefault(repr(size.terms), size)
                dims.append(repr(size.terms) if size.known is None else size.known)
        return onnx.helper.make_tensor_type_proto(onnx.helper.np_dtype_to_tensor_dtype(kind), dims)

    def _read(self, found: onnx.TypeProto | None, name: str) -> Shape | None:
        if found is None or not found.HasField("tensor_type") or not found.tensor_type.HasField("shape"):
            return None
        return tuple(
            Size.number(d.dim_value)
            if d.HasField("dim_value")
            else self._texts.get(d.dim_param) or Size.unknown((name, axis))
            for axis, d in enumerate(found.tensor_type.shape.dim)
        )

    def numbers(self, tensor: gs.Tensor) -> np.ndarray | None:
        """The values of a tensor where they are the same for every input."""
        value = self.value(tensor)
        if value is None or any(e is None or e.known is None for e in value.flat):
            return None
        return np.array([e.known for e in value.flat], edit.dtype(tensor)).reshape(value.shape)

    def argument(self, node: gs.Node, index: int, attribute: str) -> np.ndarray | None:
        """As ``edit.argument``, where the input may also be computed."""
        if edit.has_input(node, index):
            numbers = self.numbers(node.inputs[index])
            return None if numbers is None else numbers.reshape(-1)
        found = node.attrs.get(attribute)
        return None if found is None else np.asarray(found).reshape(-1)

    def reshaped(self, node: gs.Node, shape: Shape) -> Shape | None:
        """The shape that a Reshape gives to a tensor of ``shape``."""
        wanted = self.value(node.inputs[1]) if len(node.inputs) > 1 else _sizes(node.attrs.get("shape", ()))
        if wanted is None or wanted.ndim != 1:
            return None
        keeps = not node.attrs.get("allowzero", 0)
        sizes: list[Size | None] = []
        for axis, entry in enumerate(wanted):
            if keeps and entry is not None and entry.known == 0 and axis < len(shape):
                entry = shape[axis]
            sizes.append(entry if entry is not None and entry.never_negative else None)
        open_axes = [axis for axis, size in enumerate(sizes) if size is None]
        rest = product(size for size in sizes if size is not None)
        if len(open_axes) == 1 and rest.known != 0:
            sizes[open_axes[0]] = product(shape).over(rest)
        return _or_unknown(sizes, node.outputs[0].name)

    def expanded(self, node: gs.Node, shape: Shape) -> Shape | None:
        wanted = self.value(node.inputs[1])
        if wanted is None or wanted.ndim != 1:
            return None
        name = node.outputs[0].name
        return self._broadcast([shape, _or_unknown(wanted, name, "wanted")], name)

    def joined(self, node: gs.Node, shape: Shape) -> Shape | None:
        parts = [self.shape(t) for t in node.inputs]
        axis = node.attrs.get("axis", 1)
        if any(part is None or len(part) != len(shape) for part in parts) or not -len(shape) <= axis < len(shape):
            return None
        columns = list(zip(*(part for part in parts if part is not None), strict=True))
        sizes = [next((s for s in column if s.known is not None), column[0]) for column in columns]
        sizes[axis] = sum(columns[axis], Size.number(0))
        return tuple(sizes)

    def parts(self, node: gs.Node) -> list[tuple[int, int, Size | None, int]] | None:
        """(axis, start, end, step) of each axis that a Slice cuts; None where they depend on the input."""
        starts, axes, steps = (
            self.argument(node, index, name) for index, name in ((1, "starts"), (3, "axes"), (4, "steps"))
        )
        ends = self.value(node.inputs[2]) if len(node.inputs) > 2 else _sizes(node.attrs.get("ends", ()))
        if (
            starts is None
            or ends is None
            or any(found is None and edit.has_input(node, place) for place, found in ((3, axes), (4, steps)))
        ):
            return None
        axes = range(len(starts)) if axes is None else axes
        steps = [1] * len(starts) if steps is None else steps
        columns = (map(int, axes), map(int, starts), ends.reshape(-1), map(int, steps))
        return list(zip(*columns, strict=True))

    def sliced(self, node: gs.Node, shape: Shape) -> Shape | None:
        parts, sizes, name = self.parts(node), list(shape), node.outputs[0].name
        for axis, start, end, step in parts or ():
            sizes[axis] = _taken(shape[axis], start, end, step) or Size.unknown((name, axis % len(shape)))
        return tuple(sizes) if parts is not None else None

    def flattened(self, node: gs.Node, shape: Shape) -> Shape:
        axis = node.attrs.get("axis", 1)
        axis += len(shape) if axis < 0 else 0
        return product(shape[:axis]), product(shape[axis:])

    def transposed(self, node: gs.Node, shape: Shape) -> Shape:
        return tuple(shape[axis] for axis in node.attrs.get("perm") or reversed(range(len(shape))))

    def counted(self, node: gs.Node, shape: Shape) -> Shape | None:
        """The length of a Range from 0 in steps of 1."""
        first, step = self.numbers(node.inputs[0]), self.numbers(node.inputs[2])
        limit = self.value(node.inputs[1])
        if first is None or step is None or limit is None or first.item() != 0 or step.item() != 1:
            return None
        end = limit.item()
        return (end,) if end is not None and end.never_negative else None

    def sized(self, node: gs.Node, shape: Shape) -> Shape | None:
        """The shape that an input of the node holds."""
        place = operator(node).sized
        wanted = self.value(node.inputs[place]) if place is not None and edit.has_input(node, place) else None
        if wanted is None or "axes" in node.attrs or "keep_aspect_ratio_policy" in node.attrs:
            return None
        return _or_unknown(wanted.reshape(-1), node.outputs[0].name)


def _or_unknown(entries: Iterable[Size | None], *name: str) -> Shape:
    """The entries of a shape; those that are unknown, or may be -1, are sizes of their own."""
    known = (e if e is not None and e.never_negative else None for e in entries)
    return tuple(e or Size.unknown((*name, axis)) for axis, e in enumerate(known))


def _sizes(numbers: Any) -> np.ndarray:
    made = np.empty(np.shape(numbers), object)
    made.reshape(-1)[:] = [Size.number(n) for n in np.reshape(numbers, -1)]
    return made


def _declared(tensor: gs.Tensor) -> Shape | None:
    if tensor.shape is None:
        return None
    return tuple(
        Size.number(int(d)) if isinstance(d, int | np.integer) and d >= 0 else Size.unknown((tensor.name, axis))
        for axis, d in enumerate(tensor.shape)
    )


def _refined(tensor: gs.Tensor, shape: Shape | None) -> Shape | None:
    """A shape, with the numbers that the graph has for sizes that are unknown."""
    declared = _declared(tensor)
    if shape is None or declared is None or len(shape) != len(declared):
        return shape if shape is not None else declared
    return tuple(d if s.known is None and d.known is not None else s for s, d in zip(shape, declared, strict=True))


def _constant(tensor: gs.Tensor) -> np.ndarray | None:
    if not isinstance(tensor, gs.Constant):
        return _nothing_known(tensor, _declared(tensor))
    if not _holds_sizes(tensor) or np.prod(tensor.shape) > _LIMIT:
        return None
    return _sizes(edit.value(tensor))


def _holds_sizes(tensor: gs.Tensor) -> bool:
    return edit.dtype(tensor) in (np.dtype("int64"), np.dtype("int32"), np.dtype("bool"))


def _nothing_known(tensor: gs.Tensor, shape: Shape | None) -> np.ndarray | None:
    if shape is None or not _holds_sizes(tensor) or len(shape) > 1:
        return None
    numbers = [n for d in shape if (n := d.known) is not None and 0 <= n <= _LIMIT]  # a dead branch may subtract
    return np.full(numbers, None, object) if len(numbers) == len(shape) else None


def _common(sizes: Sequence[Size]) -> Size | None:
    """The size to which sizes broadcast; None where that depends on the input."""
    wide = {size for size in sizes if size != _ONE}
    numbers = [size for size in wide if size.known is not None]
    if numbers:
        return numbers[0]
    wide -= {cut for cut in wide for size in wide if cut is not size and _is_part(cut, size)}
    return next(iter(wide)) if len(wide) == 1 else None if wide else _ONE


def _is_part(cut: Size, size: Size) -> bool:
    """Whether a size is min(``size``, a number above 0), so that both broadcast to ``size`` where they do."""
    ((factors, times), *more) = cut.terms
    key = factors[0] if len(factors) == 1 and times == 1 and not more else None
    return isinstance(key, tuple) and key[:2] == ("least", size)


def _taken(size: Size, start: int, end: Size | None, step: int) -> Size | None:
    """How many elements of an axis a Slice takes."""
    if end is None:
        return None
    if size.known is not None and end.known is not None:
        return Size.number(len(range(size.known)[start : end.known : step]))
    if start != 0 or step != 1:
        return None
    if end == size or (end.known is not None and end.known >= _END):
        return size
    few, many = (size, end) if size.known is not None else (end, size)
    if few.known is not None and few.known > 0 and many.never_negative:
        return Size.unknown(("least", many, few.known))
    return None


def _elementwise(rule: Callable[[Size, Size], Size | None]) -> Callable[[Sizes, gs.Node], np.ndarray | None]:
    def computed(sizes: Sizes, node: gs.Node) -> np.ndarray | None:
        values = [sizes.value(t) for t in node.inputs]
        if len(values) != 2 or values[0] is None or values[1] is None:
            return None
        one, other = np.broadcast_arrays(values[0], values[1])
        found = [None if a is None or b is None else rule(a, b) for a, b in zip(one.flat, other.flat, strict=True)]
        return _array(found, one.shape)

    return computed


def _array(elements: Sequence[Size | None], shape: tuple[int, ...]) -> np.ndarray:
    made = np.empty(len(elements), object)
    made[:] = elements
    return made.reshape(shape)


def _equal(a: Size, b: Size) -> Size | None:
    return Size.number(1) if a == b else Size.number(0) if a.differs(b) else None


def _divided(a: Size, b: Size) -> Size | None:
    exact = a.over(b) if b.known != 0 else None
    if exact is not None or not a.never_negative or b.known is None or b.known <= 0:
        return exact
    return Size.number(a.known // b.known) if a.known is not None else Size.unknown(("floor", a, b.known))


def _shape_value(sizes: Sizes, node: gs.Node) -> np.ndarray | None:
    shape = sizes.shape(node.inputs[0])
    if shape is None:
        return None
    if node.op == "Size":
        return _array([product(shape)], ())
    return _array(part := shape[node.attrs.get("start", 0) : node.attrs.get("end")], (len(part),))


def _in_range(value: np.ndarray, tensor: gs.Tensor) -> np.ndarray | None:
    """The elements that the type of a tensor can hold."""
    kind = edit.dtype(tensor)
    if kind is None or not _holds_sizes(tensor):
        return None
    low, high = (0, 1) if kind == np.bool_ else (np.iinfo(kind).min, np.iinfo(kind).max)
    return _array(
        [e if e is None or e.known is None or low <= e.known <= high else None for e in value.flat], value.shape
    )


def _same(sizes: Sizes, node: gs.Node) -> np.ndarray | None:
    return sizes.value(node.inputs[0]) if _holds_sizes(node.outputs[0]) else None


def _cast(sizes: Sizes, node: gs.Node) -> np.ndarray | None:
    value = _same(sizes, node)
    if value is None or edit.dtype(node.outputs[0]) != np.bool_:
        return value
    zero = Size.number(0)
    truths = [zero if e == zero else _ONE if e is not None and e.differs(zero) else None for e in value.flat]
    return _array(truths, value.shape)


def _in_shape(sizes: Sizes, node: gs.Node) -> np.ndarray | None:
    value, shape = sizes.value(node.inputs[0]), sizes._shapes_of(node)[0]
    numbers = [d.known for d in shape] if shape is not None else [None]
    return None if value is None or None in numbers else value.reshape([n for n in numbers if n is not None])


def _gathered(sizes: Sizes, node: gs.Node) -> np.ndarray | None:
    value, indices = sizes.value(node.inputs[0]), sizes.numbers(node.inputs[1])
    return None if value is None or indices is None else _objects(np.take(value, indices, node.attrs.get("axis", 0)))


def _objects(values: Any) -> np.ndarray:
    return values if isinstance(values, np.ndarray) else _array([values], ())


def _concatenated(sizes: Sizes, node: gs.Node) -> np.ndarray | None:
    values = [sizes.value(t) for t in node.inputs]
    if any(value is None for value in values):
        return None
    return np.concatenate([value for value in values if value is not None], node.attrs.get("axis", 1))


def _slice_value(sizes: Sizes, node: gs.Node) -> np.ndarray | None:
    value, parts = sizes.value(node.inputs[0]), sizes.parts(node)
    for axis, start, end, step in parts or ():
        if value is not None:
            value = None if end is None or end.known is None else _range_of(value, axis, start, end.known, step)
    return value if parts is not None else None


def _range_of(value: np.ndarray, axis: int, start: int, end: int, step: int) -> np.ndarray:
    return np.take(value, range(value.shape[axis])[start:end:step], axis)


def _where(sizes: Sizes, node: gs.Node) -> np.ndarray | None:
    values = [sizes.value(t) for t in node.inputs]
    if any(value is None for value in values):
        return None
    asked, yes, no = np.broadcast_arrays(*(value for value in values if value is not None))
    chosen = [
        a if b == a else None if c is None else (a if c.known else b)
        for c, a, b in zip(asked.flat, yes.flat, no.flat, strict=True)
    ]
    return _array(chosen, asked.shape)


def _multiplied(sizes: Sizes, node: gs.Node) -> np.ndarray | None:
    value = sizes.value(node.inputs[0])
    if value is None or value.ndim != 1 or any(e is None for e in value) or edit.has_input(node, 1):
        return None
    return _array([product(value)], (1,) if node.attrs.get("keepdims", 1) else ())


_SHAPES: dict[str, Callable[[Sizes, gs.Node, Shape], Shape | None]] = {
    "Reshape": Sizes.reshaped,
    "Expand": Sizes.expanded,
    "Concat": Sizes.joined,
    "Slice": Sizes.sliced,
    "Flatten": Sizes.flattened,
    "Transpose": Sizes.transposed,
    "Range": Sizes.counted,
    "ConstantOfShape": Sizes.sized,
    "Resize": Sizes.sized,
}
_VALUES: dict[str, Callable[[Sizes, gs.Node], np.ndarray | None]] = {
    "Shape": _shape_value,
    "Size": _shape_value,
    "Identity": _same,
    "Cast": _cast,
    **dict.fromkeys(("Reshape", "Squeeze", "Unsqueeze", "Flatten"), _in_shape),
    "Gather": _gathered,
    "Concat": _concatenated,
    "Slice": _slice_value,
    "Add": _elementwise(Size.__add__),
    "Sub": _elementwise(Size.__sub__),
    "Mul": _elementwise(Size.__mul__),
    "Div": _elementwise(_divided),
    "Equal": _elementwise(_equal),
    "Where": _where,
    "ReduceProd": _multiplied,
}
