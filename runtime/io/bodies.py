"""Bodies of If, Loop and Scan as graphs of their own.

    y = If(c) {then: MatMul(x, W)}      the body then_branch, apart:   (x) => MatMul(x, W)

A body reads tensors of the graphs around it. While the body is *apart*, inputs of the body stand in for the computed
ones, so that whatever takes a graph (a pass, an observer, a proof) takes a body: nothing looks out of the body, and
what may change from one run of the body to the next is never a constant. Constants of the outer graphs stay what they
are, one object wherever it is read.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.runtime.io import edit
from channelfold.runtime.io.convert import Carried, all_graphs, carried
from channelfold.runtime.io.files import free_name, infer_shapes, taken_names
from channelfold.runtime.io.weights import is_large, packed


@dataclass(frozen=True, eq=False)
class Body:
    """The body ``name`` (an attribute) of a node in ``outer``, a part of the model ``root``; or of a body of it."""

    root: gs.Graph
    outer: gs.Graph
    node: gs.Node
    name: str
    parent: Body | None = None

    @property
    def graph(self) -> gs.Graph:
        return self.node.attrs[self.name]

    @property
    def place(self) -> str:
        """Where the body is, in words."""
        return f"{self.name} of {self.node.op} {self.node.name}"

    def bodies(self) -> list[Body]:
        """The bodies of the nodes of this body."""
        return [Body(self.root, self.graph, body.node, body.name, self) for body in bodies(self.graph)]

    def captured(self) -> list[gs.Variable]:
        """The tensors of outer graphs that the body reads, constants left out."""
        parts = list(all_graphs(self.graph))
        own = {id(t) for part in parts for t in (*part.inputs, *(t for node in part.nodes for t in node.outputs))}
        read = (t for part in parts for node in part.nodes for t in node.inputs)
        return list({id(t): t for t in read if isinstance(t, gs.Variable) and t.name and id(t) not in own}.values())

    @contextlib.contextmanager
    def apart(self) -> Iterator[gs.Graph]:
        """The body as a graph of its own, for as long as the context lasts. What is done to the graph stays."""
        if any(tensor.dtype is None for tensor in self.captured()):
            with self.parent.apart() if self.parent is not None else contextlib.nullcontext(self.root) as outer:
                infer_shapes(outer)
        graph, root, own = self.graph, carried(self.root), carried(self.graph)
        outside = {id(t) for part in all_graphs(self.root) if part is not graph for t in part.outputs}
        read = (t for part in all_graphs(graph) for node in part.nodes for t in node.inputs)
        returned = list({id(t): t for t in read if isinstance(t, gs.Constant) and id(t) in outside}.values())
        pairs = [(tensor, _twin(tensor)) for tensor in (*self.captured(), *returned)]
        nodes = _nodes(graph)
        for tensor, twin in pairs:
            _swap(nodes, tensor, twin)
        inside = [twin for _, twin in pairs if isinstance(twin, gs.Variable)]
        inputs = graph.inputs
        graph.inputs = [*inputs, *inside]
        vars(graph)["_names"] = taken_names(self.root)
        if root is not None:
            mine = own.graph if own is not None else Carried().graph
            vars(graph)["carried"] = Carried(root.path, root.header, mine, root.scratch)
        graph.ir_version = self.root.ir_version
        handed = zip(inputs, self.node.inputs, strict=False)
        untyped = [(to, source) for to, source in handed if to.dtype is None and to.type == "tensor_type"]
        for tensor, source in untyped:
            tensor.dtype = edit.dtype(source)
        try:
            yield graph
        finally:
            if root is not None:
                root.scratch = vars(graph)["carried"].scratch
                vars(graph)["carried"] = own
            for tensor, _ in untyped:
                tensor.dtype = None
            graph.inputs = inputs
            nodes = _nodes(graph)
            for tensor, twin in pairs:
                if isinstance(twin, gs.Variable) or twin._values is tensor._values:
                    _swap(nodes, twin, tensor)


def bodies(graph: gs.Graph) -> list[Body]:
    """The bodies of the nodes of a model, in order; those inside a body are ``Body.bodies``."""
    return [
        Body(graph, graph, node, name)
        for node in graph.nodes
        for name, value in node.attrs.items()
        if isinstance(value, gs.Graph)
    ]


def located(node: str, place: str) -> str:
    """The name of a node in a body, as reports have it."""
    return f"{node} in {place}"


def tell_apart(graph: gs.Graph) -> None:
    """Gives nodes of bodies names that no node of the graph has: patterns of names mean nodes of one of them."""
    taken = {node.name for node in graph.nodes}
    for node in [node for part in list(all_graphs(graph))[1:] for node in part.nodes if node.name in taken]:
        node.name = free_name(graph, node.name)


def _twin(tensor: gs.Tensor) -> gs.Tensor:
    """A tensor of the same name, type and values that nothing computes and nothing reads."""
    if isinstance(tensor, gs.Constant):
        return gs.Constant(tensor.name, tensor._values)
    twin = gs.Variable(tensor.name, tensor.dtype, tensor.shape, type=tensor.type)
    if "carried" in vars(tensor):  # what the file says of its type
        vars(twin)["carried"] = vars(tensor)["carried"]
    return twin


def _nodes(graph: gs.Graph) -> set[int]:
    return {id(node) for part in all_graphs(graph) for node in part.nodes}


def _swap(inside: set[int], old: gs.Tensor, new: gs.Tensor) -> None:
    """Lets the nodes that are ``inside`` read ``new`` in place of ``old``."""
    edit.redirect(old, new, [node for node in edit.consumers(old) if id(node) in inside])


def share_constants(graph: gs.Graph) -> int:
    """Lets the parts of a model that hold equal large constants read one of them. Returns the bytes saved.

    Exporters store the weights of a decoder once in each branch of an If.
    """
    parts = list(all_graphs(graph))
    if len(parts) == 1:
        return 0
    returned = {id(tensor) for part in parts for tensor in part.outputs}
    alike: dict[tuple, dict[int, gs.Constant]] = {}
    readers: dict[int, set[int]] = {}
    for part in parts:
        for tensor in (t for node in part.nodes for t in node.inputs):
            if isinstance(tensor, gs.Constant) and id(tensor) not in returned and is_large(tensor._values):
                alike.setdefault((str(tensor.dtype), tuple(tensor.shape)), {})[id(tensor)] = tensor
                readers.setdefault(id(tensor), set()).add(id(part))
    everything = _nodes(graph)
    saved = 0
    for group in alike.values():
        first: dict[bytes, gs.Constant] = {}
        apart = len({frozenset(readers[key]) for key in group}) > 1  # or else there is no need to read the values
        for tensor in group.values() if apart else ():
            values = packed(tensor._values).reshape(-1).view(np.uint8)
            kept = first.setdefault(hashlib.sha256(values.data).digest(), tensor)
            if readers[id(kept)] != readers[id(tensor)]:
                _swap(everything, tensor, kept)
                readers[id(kept)] |= readers[id(tensor)]
                saved += values.nbytes
    return saved
