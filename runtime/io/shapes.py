"""The shapes of all tensors when the inputs have given shapes: inferred, or measured in ONNX Runtime."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property

import onnx
import onnx_graphsurgeon as gs

from channelfold.runtime.errors import ModelError
from channelfold.runtime.io import edit, limits
from channelfold.runtime.io.convert import all_graphs
from channelfold.runtime.io.files import export, infer_shapes, inferred, open_model, read, weightless
from channelfold.runtime.io.front import behind_of, unknown
from channelfold.runtime.io.session import Feed
from channelfold.runtime.io.weights import bits

Shape = tuple[int, ...]
_TYPE = onnx.TensorProto


def shapes_on(graph: gs.Graph, inputs: Mapping[str, Shape]) -> dict[str, Shape]:
    """The shape of every tensor that ONNX shape inference can tell when the named inputs have these shapes."""
    return _known(_types_on(graph, inputs))


def _known(types: Mapping[str, onnx.TypeProto]) -> dict[str, Shape]:
    shapes = {name: kind.tensor_type.shape for name, kind in types.items() if kind.tensor_type.HasField("shape")}
    return {
        name: tuple(dim.dim_value for dim in shape.dim)
        for name, shape in shapes.items()
        if all(dim.HasField("dim_value") for dim in shape.dim)
    }


def _types_on(graph: gs.Graph, inputs: Mapping[str, Shape]) -> dict[str, onnx.TypeProto]:
    model = weightless(graph)
    for value in model.graph.input:
        if value.name in inputs:
            dims = [onnx.TensorShapeProto.Dimension(dim_value=size) for size in inputs[value.name]]
            value.type.tensor_type.shape.CopyFrom(onnx.TensorShapeProto(dim=dims))
    found = inferred(model, anew=True)
    return {value.name: value.type for value in (*found.value_info, *found.input, *found.output)}


def measured_shapes(graph: gs.Graph, feed: Feed) -> dict[str, Shape]:
    """The shape of every tensor of the graph (bodies of subgraphs left out) when the model runs on ``feed``.

    Shapes that ONNX shape inference cannot tell are measured in ONNX Runtime, in front of operators that ONNX Runtime
    does not know. Sequences, maps and optionals have no shape. Raises ModelError when the model does not run.
    """
    types = _types_on(graph, {name: values.shape for name, values in feed.items()})
    known = _known(types)
    others = {name for name, kind in types.items() if kind.WhichOneof("value") not in (None, "tensor_type")}
    others |= known.keys() | {""}
    behind = behind_of(graph, unknown(graph))
    names = [t.name for n in graph.nodes for t in n.outputs if t.name not in others and id(t) not in behind]
    if not names:
        return known
    model, weights = export(graph)
    asked = [f"{name}__shape" for name in names]
    for name, shape in zip(names, asked, strict=True):
        model.graph.node.append(onnx.helper.make_node("Shape", [name], [shape]))
    session = open_model(model, weights, asked, optimize=False)
    found = session.run(session.accepted(feed))
    return known | {name: tuple(map(int, found[shape])) for name, shape in zip(names, asked, strict=True)}


class LazyShapes:
    """The shapes of all tensors when the model runs on ``feed``, inferred or measured on the first question."""

    def __init__(self, graph: gs.Graph, feed: Feed):
        self.graph, self.feed = graph, feed

    def inferred(self, name: str) -> Shape | None:
        """The shape of a tensor as far as ONNX shape inference knows it."""
        return self._inferred.get(name)

    def measured(self, name: str) -> Shape | None:
        """The shape of a tensor by inference, else from a run of the model; None where the model does not run."""
        found = self.inferred(name)
        return self._measured.get(name) if found is None else found

    @cached_property
    def _inferred(self) -> dict[str, Shape]:
        return shapes_on(self.graph, {name: values.shape for name, values in self.feed.items()})

    @cached_property
    def _measured(self) -> dict[str, Shape]:
        try:
            return measured_shapes(self.graph, self.feed)
        except ModelError:
            return {}


def check_sizes(graph: gs.Graph, size: int) -> None:
    """Raises LimitError where a tensor of known shape is too large for a model of ``size`` bytes."""
    types = _types_on(graph, {})
    kinds = {name: types[name].tensor_type.elem_type for name in _known(types)}
    sized = {name: bits(kind) for name, kind in kinds.items() if kind not in (_TYPE.UNDEFINED, _TYPE.STRING)}
    limits.check(((name, math.prod(shape) * sized.get(name, 8) // 8) for name, shape in _known(types).items()), size)


def squeeze_weights(graph: gs.Graph) -> None:
    """Drops leading axes of 1 of the constants that MatMul multiplies by, where the result keeps its shape.

    Some exporters write W (in, out) as (1, in, out). With as many axes of the other operand both are the same product.
    """
    places = [(part, n, i) for part in all_graphs(graph) for n in part.nodes for i in _wide_operands(n)]
    if any(edit.rank(node.inputs[1 - index]) is None for _, node, index in places):
        infer_shapes(graph)
    for part, node, index in places:
        weight, other = node.inputs[index], edit.rank(node.inputs[1 - index])
        if other is not None and other >= len(weight.shape):
            edit.set_constant(part, node, index, read(weight).reshape(weight.shape[-2:]), f"{weight.name}_squeezed")


def _wide_operands(node: gs.Node) -> list[int]:
    """The operands of a MatMul that are constants (1, ..., in, out)."""
    if node.op != "MatMul" or not edit.is_standard(node):
        return []
    wide = (i for i, t in enumerate(node.inputs[:2]) if isinstance(t, gs.Constant) and len(t.shape) > 2)
    return [i for i in wide if all(size == 1 for size in node.inputs[i].shape[:-2])]
