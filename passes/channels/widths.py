"""How many channels a tensor has, changed: rows of what writes it and columns of what reads it.

Channels can be repeated, dropped or merged where only operators that treat every channel alike stand between the
linears that write them and the linears that read them. For x = f(W u + b) with f elementwise and y = V x:

    rows      W' = R W,  b' = R b     R repeats or drops rows, which commutes with any f; another R where f is linear
    columns   V' = V C                C such that V' f(R (W u + b)) is what is wanted of y

``follow`` finds the group of tensors that change together. Worked example, SwiGLU, from what ``down`` reads: back
through Mul to up (a writer) and to the activation, whose Sigmoid and Mul lead to gate (another writer); all tensors
between them get the new width. A Gather with constant indices along the channels is a writer, too: its indices are its
rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import DoesNotFit, InBetween, Refused
from channelfold.passes.channels.scale_regions import Shape
from channelfold.passes.layers.linear import Linear, cast, check_growth, view
from channelfold.passes.operators import operator
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import constant, free_name

Columns = Callable[[np.ndarray], np.ndarray]


@dataclass
class Width:
    """Tensors that have their channels in common, ``channels`` of them, and what writes and reads them.

    ``vectors``: constants along the channels, as (node, input, axis from the end). ``linear``: whether nothing but sums
    stands between writers and readers.
    """

    graph: gs.Graph
    channels: int
    axes: dict[int, tuple[gs.Tensor, int]] = field(default_factory=dict)
    writers: list[Linear] = field(default_factory=list)
    readers: list[Linear] = field(default_factory=list)
    gathers: list[gs.Node] = field(default_factory=list)
    vectors: list[tuple[gs.Node, int, int]] = field(default_factory=list)
    linear: bool = True

    def rows(self) -> list[np.ndarray]:
        """Everything that makes a channel what it is, arrays (channels, …)."""
        parts = [part for linear in self.writers for part in (linear.weight(), _own_bias(linear))]
        parts += [np.moveaxis(np.asarray(edit.value(n.inputs[i])), axis, 0) for n, i, axis in self.vectors]
        return [*parts, *(np.asarray(edit.value(gather.inputs[1])) for gather in self.gathers)]

    def columns(self) -> np.ndarray:
        """The weights that read the channels, (outputs, channels); each place of a kernel counts as an output."""
        return np.concatenate([columns_of(linear) for linear in self.readers])

    def resize(self, rows: Columns, columns: Columns, shapes: dict[str, Shape]) -> None:
        """Gives the group another width.

        ``rows`` and ``columns`` map an array (channels, …), of what writes and of what reads the channels, to one with
        the new number of channels. ``shapes``, of tensors by name, are brought up to date. Raises Refused, with nothing
        changed, where a value does not fit its type.
        """
        try:
            writes = [write for linear in self._linears() for write in self._planned(linear, rows, columns)]
            for node, place, axis in self.vectors:
                old = np.asarray(edit.value(node.inputs[place]))
                new = cast(np.moveaxis(rows(np.moveaxis(old, axis, 0)), 0, axis), old.dtype)
                name = f"{node.inputs[place].name}_resized"
                writes.append(lambda n=node, p=place, v=new, m=name: edit.set_constant(self.graph, n, p, v, m))
        except DoesNotFit as error:
            raise Refused(str(error)) from None
        for gather in self.gathers:
            index = rows(np.asarray(edit.value(gather.inputs[1])))
            writes.append(lambda n=gather, v=index: edit.set_constant(self.graph, n, 1, v, f"{n.name}_indices"))
        for write in writes:
            write()
        self.channels = len(rows(np.zeros(self.channels)))
        for tensor, axis in self.axes.values():
            if tensor.shape is not None:
                tensor.shape = [*tensor.shape[:axis], self.channels, *tensor.shape[axis + 1 :]]
            known = shapes[tensor.name]
            shapes[tensor.name] = (*known[:axis], self.channels, *known[axis + 1 :])

    def _linears(self) -> list[Linear]:
        """Each linear once: one may read the channels and write them."""
        return list({id(linear.node): linear for linear in (*self.writers, *self.readers)}.values())

    def _planned(self, linear: Linear, rows: Columns, columns: Columns) -> list[Callable[[], object]]:
        linear = view(self.graph, linear.node)  # as it is now: its bias may have moved since
        weight, writes = linear.weight(), []
        if any(linear.node is reader.node for reader in self.readers):
            weight = columns(weight.swapaxes(0, 1)).swapaxes(0, 1)
        if any(linear.node is writer.node for writer in self.writers):
            weight = rows(weight)
            if linear.node.op != "MatMul" and (bias := linear.bias()) is not None:
                new = cast(rows(bias), linear.dtype)
                writes.append(lambda: linear.set_bias(new))
        weight = cast(weight, linear.dtype)
        return [lambda: linear.set_weight(weight), *writes]


def follow(graph: gs.Graph, tensor: gs.Tensor, axis: int, shapes: Mapping[str, Shape]) -> Width:
    """The group of a tensor whose channels lie along ``axis``. ``shapes``: of all tensors for some input, by name.

    Raises Refused, with the reason, where its width cannot change.
    """
    tracer = _Tracer(graph, shapes, Width(graph, _shape(shapes, tensor)[axis]))
    tracer.visit(tensor, axis)
    while tracer.pending:
        tracer.expand(*tracer.pending.pop())
    for linear in (*tracer.width.writers, *tracer.width.readers):
        check_growth(linear)
    return tracer.width


def read_by(graph: gs.Graph, linear: Linear, shapes: Mapping[str, Shape]) -> Width:
    """The group of what a linear reads. Raises Refused as ``follow``, and where linears read other tensors of it."""
    width = follow(graph, linear.data, linear.in_axis % len(_shape(shapes, linear.data)), shapes)
    if any(reader.data is not linear.data for reader in width.readers):
        raise Refused("linears read its channels from several tensors")
    return width


def gathered(graph: gs.Graph, readers: list[Linear], shapes: dict[str, Shape]) -> Width:
    """Puts a Gather of all channels between a tensor and some linears that read it; returns the group behind it."""
    tensor, channels = readers[0].data, readers[0].channels[1]
    axis = readers[0].in_axis % len(shapes[tensor.name])
    name = f"{tensor.name}_channels"
    result = gs.Variable(free_name(graph, name), tensor.dtype, tensor.shape)
    index = constant(graph, f"{name}_indices", np.arange(channels))
    node = gs.Node("Gather", name, {"axis": axis}, [tensor, index], [result])
    source = edit.producer(tensor)
    assert source is not None
    edit.insert_after(graph, source, node)
    shapes[result.name] = shapes[tensor.name]
    for linear in readers:
        edit.set_input(linear.node, 1 - linear.weight_input, result)
    return Width(graph, channels, {id(result): (result, axis)}, [], readers, [node], [], False)


def columns_of(linear: Linear) -> np.ndarray:
    """The weight of a linear without groups as (outputs, inputs), each place of its kernel an output."""
    weight = np.moveaxis(linear.weight(), 1, -1)
    return weight.reshape(-1, weight.shape[-1])


@dataclass
class _Tracer:
    graph: gs.Graph
    shapes: Mapping[str, Shape]
    width: Width
    pending: list[tuple[gs.Tensor, int]] = field(default_factory=list)
    passed: set[int] = field(default_factory=set)

    def visit(self, tensor: gs.Tensor, axis: int) -> None:
        axis %= len(_shape(self.shapes, tensor))
        known = self.width.axes.get(id(tensor))
        if known is None:
            self.width.axes[id(tensor)] = (tensor, axis)
            self.pending.append((tensor, axis))
        elif known[1] != axis:
            raise Refused(f"{tensor.name!r} has these channels on two axes")

    def expand(self, tensor: gs.Tensor, axis: int) -> None:
        """Follows a tensor to the node that writes it and to all that read it."""
        if edit.is_output(self.graph, tensor):
            raise Refused("it is an output of the graph")
        writer = edit.producer(tensor)
        if writer is None:
            raise Refused("an input of the graph feeds it")
        if not all(edit.in_graph(self.graph, node) for node in (writer, *edit.consumers(tensor))):
            raise Refused("a subgraph has a part in it")
        if not self.writes(writer, tensor, axis):
            self.step(writer, tensor, axis)
        for node in edit.consumers(tensor):
            if not self.reads(node, tensor, axis):
                self.step(node, tensor, axis)

    def writes(self, node: gs.Node, tensor: gs.Tensor, axis: int) -> bool:
        """Whether the group begins at a node that writes a tensor of it."""
        rank = len(_shape(self.shapes, tensor))
        if operator(node).kind == "gather":
            index = edit.value(node.inputs[1])
            if index is None or index.ndim != 1 or int(node.attrs.get("axis", 0)) % rank != axis:
                raise InBetween("Gather")
            self.width.gathers.append(node)
            self.width.linear = False
            return True
        linear = self.linear(node, "writes")
        if linear is None:
            return False
        if linear.out_axis % rank != axis:
            raise Refused(f"{node.op} writes its channels along another axis")
        self.width.writers.append(linear)
        return True

    def reads(self, node: gs.Node, tensor: gs.Tensor, axis: int) -> bool:
        """Whether the group ends at a linear that reads a tensor of it."""
        linear = self.linear(node, "reads")
        if linear is None:
            return False
        if linear.data is not tensor or linear.in_axis % len(_shape(self.shapes, tensor)) != axis:
            raise Refused(f"{node.op} reads it otherwise than along its channels")
        self.width.readers.append(linear)
        return True

    def linear(self, node: gs.Node, verb: str) -> Linear | None:
        if not operator(node).weighted:
            return None
        try:
            linear = view(self.graph, node)
        except Refused as error:
            raise Refused(f"{node.op} {verb} it, but {error}") from None
        if linear.groups > 1:
            raise Refused(f"{node.op} {verb} it in groups")
        return linear

    def step(self, node: gs.Node, tensor: gs.Tensor, axis: int) -> None:
        """Passes a node that treats all channels alike, to every other tensor that has them."""
        if id(node) in self.passed:
            return
        self.passed.add(id(node))
        known = operator(node)
        if any(not t.is_empty() for t in node.outputs[1:]):
            raise InBetween(f"{node.op}")
        self.width.linear = self.width.linear and known.linear
        if known.elementwise:
            self.operands(node, axis - len(_shape(self.shapes, tensor)))
            return
        source, result = node.inputs[0], node.outputs[0]
        if any(t is tensor for t in node.inputs[1:]):
            raise InBetween(f"{node.op}")
        if known.kind == "transpose":
            perm = list(node.attrs.get("perm") or range(len(_shape(self.shapes, source)))[::-1])
            before = axis if tensor is source else perm[axis]
            self.visit(source, before)
            self.visit(result, perm.index(before))
        elif known.kind == "pool" and axis == 1:
            self.visit(source, axis)
            self.visit(result, axis)
        else:
            raise InBetween(f"{node.op}")

    def operands(self, node: gs.Node, axis: int) -> None:
        """Passes a node whose operands are broadcast to each other; ``axis`` counts from the end."""
        for place, tensor in enumerate([*node.inputs, node.outputs[0]]):
            shape = _shape(self.shapes, tensor)
            if len(shape) < -axis or shape[axis] == 1:
                continue
            if isinstance(tensor, gs.Constant):
                self.width.vectors.append((node, place, axis))
            else:
                self.visit(tensor, axis)


def _shape(shapes: Mapping[str, Shape], tensor: gs.Tensor) -> Shape:
    if isinstance(tensor, gs.Constant):
        return tuple(tensor.shape)
    if tensor.name not in shapes:
        raise Refused(f"the shape of {tensor.name!r} is unknown")
    return shapes[tensor.name]


def _own_bias(linear: Linear) -> np.ndarray:
    """The bias that is an input of the node itself; that of a MatMul is an Add of its own."""
    bias = linear.bias() if linear.node.op != "MatMul" else None
    return np.zeros(linear.channels[0]) if bias is None else bias
