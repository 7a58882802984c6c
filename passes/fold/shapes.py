"""Shapes that are known in part, folded through the nodes that compute with them.

    x: (b, t, 384)      Reshape(x, Concat(Shape(x)[0], Shape(x)[1], 6, 64))     =  Reshape(x, [0, 0, 6, 64])
    x: (b, 3, 1, t)     Expand(x, Concat(Shape(x)[0], 3, 5, Shape(x)[3]))       =  Expand(x, [1, 1, 5, 1])
    x: (b, 3, 1, t)     Shape(x)[1]                                             =  3
    y = Relu(x)         Shape(y)[0]                                             =  Shape(x)[0]

``symbolic`` tells what is known whatever the input. Sizes that depend on the input stay open: a shape becomes constant
only where each open size is that of the same axis of the data (0 in a Reshape, 1 in an Expand), or is the only one that
the others leave open (-1, where none of the others can be zero).
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Outcome
from channelfold.passes.fold import FoldConstants, FoldShapes
from channelfold.passes.fold.algebra import Size
from channelfold.passes.fold.symbolic import Shape, Sizes
from channelfold.passes.operators import operator
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import constant, infer_shapes


class Work(FoldShapes):
    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        outcome = Outcome()
        while more := _Sweep(graph).run().changed:  # a shape that is constant now makes other sizes known
            outcome.changed += more
            edit.remove_dead(graph)
            outcome.changed += FoldConstants().work().apply(graph, ctx).changed
        return outcome


class _Sweep:
    """One walk over the nodes in order, with the tensors that hold sizes, as far as the walk has come."""

    def __init__(self, graph: gs.Graph):
        infer_shapes(graph)
        self.graph, self.sizes, self.outcome = graph, Sizes(graph), Outcome()
        self.sizes.tell()
        self.same: dict[tuple, gs.Tensor] = {}  # by type, shape and sizes
        self.axes: dict[object, tuple[gs.Tensor, int]] = {}  # a Shape that holds the size, and the place there

    def run(self) -> Outcome:
        for node in list(self.graph.nodes):
            if not edit.is_standard(node) or not node.outputs or not node.inputs:
                continue
            if self._passes_on(node) or self._known(node) or self._again(node):
                continue
            if node.op == "Reshape":
                self._reshape(node)
            elif node.op == "Expand":
                self._expand(node)
        edit.sweep(self.graph)
        return self.outcome

    def _passes_on(self, node: gs.Node) -> bool:
        """Removes a node that gives its input the shape that the input has."""
        x, y = node.inputs[0], node.outputs[0]
        shape = self.sizes.shape(x)
        if operator(node).kind not in ("reshape", "expand", "slice") or shape is None or shape != self.sizes.shape(y):
            return False
        parts = self.sizes.parts(node) if operator(node).kind == "slice" else ()
        if parts is None or any(step != 1 for _, _, _, step in parts):
            return False
        if isinstance(x, gs.Constant) or not edit.bypass(self.graph, x, [node], y):
            return False
        self.outcome.change(node.name, f"{node.op} gives its input the shape that it has")
        return True

    def _known(self, node: gs.Node) -> bool:
        """Replaces a node whose result is the same for every input by the result."""
        (y, *more) = node.outputs
        numbers = self.sizes.numbers(y)
        if numbers is None or more or edit.is_output(self.graph, y):
            return False
        edit.detach(node)
        y.to_constant(numbers)
        self.outcome.change(node.name, f"{node.op} is {_listed(numbers)} for every input")
        return True

    def _again(self, node: gs.Node) -> bool:
        """Lets the readers of sizes read them where they were computed first."""
        (y, *more) = node.outputs
        value = self.sizes.value(y)
        if value is None or more or any(e is None for e in value.flat):
            return False
        if node.op == "Shape":
            value = self._read_input(node, value)
        first = self.same.setdefault(_key(y, value), y)
        if first is not y and edit.bypass(self.graph, first, [node], y):
            self.outcome.change(node.name, f"{node.op}: {first.name} holds the same sizes")
            return True
        if node.op == "Shape":
            for place, size in enumerate(value):
                self.axes.setdefault(size, (y, place))
        elif edit.dtype(y) == np.int64 and value.ndim < 2 and not self._take(node, value):
            self._join(node, value)
        return False

    def _read_input(self, node: gs.Node, value: np.ndarray) -> np.ndarray:
        """Lets a Shape read an input of the graph that has all sizes the Shape is asked for. Returns the new result."""
        y, readers = node.outputs[0], edit.consumers(node.outputs[0])
        asked = [self._sizes_of(reader, y) for reader in readers]
        if None in asked or any(node.inputs[0] is source for source in self.graph.inputs):
            return value
        for source in self.graph.inputs if readers and not edit.is_output(self.graph, y) else ():
            shape = self.sizes.shape(source) or ()
            if not all(size in shape for sizes in asked for size in sizes or ()):
                continue
            edit.rewrite(node, "Shape", [source])
            value = self.sizes.learn(y, shape)
            for reader, sizes in zip(readers, asked, strict=True):
                places = [shape.index(size) for size in sizes or ()]
                self._gather(reader, y, places)
            self.outcome.change(node.name, f"Shape: of {source.name}, which has the same sizes")
            break
        return value

    def _sizes_of(self, reader: gs.Node, shape: gs.Tensor) -> list[Size] | None:
        """The sizes that a node computes out of a shape alone; None where the node does anything else."""
        value = self.sizes.value(reader.outputs[0]) if edit.in_graph(self.graph, reader) else None
        if value is None or value.ndim > 1 or len(reader.outputs) > 1 or edit.dtype(reader.outputs[0]) != np.int64:
            return None
        alone = all(t is shape or isinstance(t, gs.Constant) for t in reader.inputs)
        return list(value.flat) if alone and edit.is_standard(reader) and None not in list(value.flat) else None

    def _take(self, node: gs.Node, value: np.ndarray) -> bool:
        """Makes a node that computes sizes a Gather of the first Shape that has them."""
        found = [self.axes.get(size) for size in value.flat]
        source = found[0][0] if found and found[0] is not None else None
        if source is None or any(place is None or place[0] is not source for place in found):
            return False
        if node.inputs[0] is not source:
            self.outcome.change(node.name, f"{node.op}: a Gather of {source.name}")
            self._gather(node, source, [self.axes[size][1] for size in value.flat])
        return True

    def _gather(self, node: gs.Node, source: gs.Tensor, places: list[int]) -> None:
        """Makes a node a Gather of elements of a shape; a scalar stays a scalar."""
        shape = [size.known or 0 for size in self.sizes.shape(node.outputs[0]) or ()]
        indices = np.array(places, np.int64).reshape(shape)
        edit.rewrite(node, "Gather", [source, constant(self.graph, f"{node.outputs[0].name}_axes", indices)])
        node.attrs["axis"] = 0

    def _join(self, node: gs.Node, value: np.ndarray) -> None:
        """Makes a node that computes sizes a Concat of sizes that are there already, and of numbers."""
        if node.op in ("Concat", "Gather", "Slice", "Split") or value.ndim != 1:
            return
        parts: list[gs.Tensor | list[int]] = []
        for size in value:
            tensor = self.same.get((np.dtype(np.int64), (1,), size))
            if size.known is not None:
                parts += [] if parts and isinstance(parts[-1], list) else [[]]
                parts[-1].append(size.known)
            elif tensor is None:
                return
            else:
                parts.append(tensor)
        name = f"{node.outputs[0].name}_sizes"
        inputs = [constant(self.graph, name, np.array(p, np.int64)) if isinstance(p, list) else p for p in parts]
        if len(inputs) > 1:
            self.outcome.change(node.name, f"{node.op}: a Concat of its elements")
            edit.rewrite(node, "Concat", inputs)
            node.attrs["axis"] = 0

    def _reshape(self, node: gs.Node) -> None:
        """Gives a Reshape a constant shape."""
        x, y = node.inputs[0], node.outputs[0]
        given, made = self.sizes.shape(x), self.sizes.shape(y)
        if isinstance(node.inputs[1], gs.Constant) or given is None or made is None:
            return
        wanted = reshape_to(given, made)
        value = self.sizes.value(node.inputs[1])
        if wanted is None and value is not None:
            inferred = [axis for axis, e in enumerate(value) if e is not None and e.known == -1]
            wanted = reshape_to(given, made, *inferred)
        if wanted is None:
            return
        node.attrs.pop("allowzero", None)
        self._set_shape(node, wanted)

    def _expand(self, node: gs.Node) -> None:
        """Gives an Expand a constant shape."""
        given, made = self.sizes.shape(node.inputs[0]), self.sizes.value(node.inputs[1])
        if isinstance(node.inputs[1], gs.Constant) or given is None or made is None:
            return
        first = len(given) - len(made)
        wanted = [
            1 if first + axis >= 0 and size is not None and given[first + axis] == size else size and size.known
            for axis, size in enumerate(made)
        ]
        if None not in wanted:
            self._set_shape(node, [size for size in wanted if size is not None])

    def _set_shape(self, node: gs.Node, shape: list[int]) -> None:
        values = np.array(shape, np.int64)
        edit.set_input(node, 1, constant(self.graph, f"{node.outputs[0].name}_shape", values))
        self.outcome.change(node.name, f"{node.op}: its shape is {_listed(values)} for every input")


def _key(tensor: gs.Tensor, value: np.ndarray) -> tuple:
    return (edit.dtype(tensor), value.shape, *value.flat)


def reshape_to(given: Shape, made: Shape, inferred: int | None = None) -> list[int] | None:
    """The constant with which a Reshape makes a tensor of one shape into another; None where there is none.

    Axis ``inferred`` is -1 already, so that no axis may be empty where the size of this one is not known.
    """
    wanted: list[int | None] = []
    for axis, size in enumerate(made):
        if size.known is not None and size.known > 0:
            wanted.append(size.known)
        else:
            wanted.append(0 if axis < len(given) and given[axis] == size else None)
    unknown = [axis for axis, size in enumerate(wanted) if size is None]
    if len(unknown) > 1 or (unknown and unknown != [inferred] and 0 in wanted):
        return None
    return [-1 if size is None else size for size in wanted]


def _listed(numbers: np.ndarray) -> str:
    return str(numbers.tolist())
