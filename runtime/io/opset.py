"""Raising the opset of a graph, one node at a time.

Between two opsets most operators only learn new types: their nodes stay as they are. Each of the others goes through
ONNX's version converter in a model of its own, and what comes back takes its place. The rest of the graph never passes
through the converter, which would drop names, metadata, functions, sparse tensors and types it has no word for.

The converter leaves some changes of meaning out. Those are mended here (Resize, Clip, Pad) or refused (``_REFUSED``).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import onnx
import onnx.version_converter
import onnx_graphsurgeon as gs

from channelfold.runtime.errors import ModelError
from channelfold.runtime.io.convert import carried, export_skeleton, import_model

_STANDARD = ("", "ai.onnx")
_REFUSED = {  # operator: (first opset with the new meaning, what is new)
    "Scan": (9, "has no batch axis"),
    "Dropout": (12, "returns a mask of another type and meaning"),
    "Hardmax": (13, "no longer flattens its input"),
    "BatchNormalization": (14, "returns other statistics"),
    "GroupNormalization": (21, "scales channels instead of groups"),
}
_TRAINING = ("Dropout", "BatchNormalization")  # their first output alone keeps its meaning


def raise_opset(graph: gs.Graph, opset: int) -> gs.Graph:
    """The same function at a higher opset of the standard domain; ``graph`` itself where its opset is high enough.

    The result is a new graph that shares the weights. Raises ModelError when an operator cannot be converted.
    """
    if graph.opset >= opset:
        return graph
    if opset > (known := onnx.defs.onnx_opset_version()):
        raise ModelError(
            f"Opset {opset} is not known to onnx {onnx.__version__}, which ends at {known}", "Update onnx."
        )
    model, large = export_skeleton(graph)
    inferred = _inferred(model, [proto for proto, _ in large])
    _Raised(graph.opset, opset, model.graph).convert(model.graph, inferred, {}, {})
    for entry in model.opset_import:
        if entry.domain in _STANDARD:
            entry.version = opset
    for function in model.functions:
        _raise_function(function, opset)
    own = carried(graph)
    return import_model(model, own.path if own else None, weights={proto.name: c._values for proto, c in large})


def _raise_function(function: onnx.FunctionProto, opset: int) -> None:
    """Raises a function's own opset to the model's. New constants become nodes: a function has no initializers."""
    imported = next((entry for entry in function.opset_import if entry.domain in _STANDARD), None)
    if imported is None or imported.version >= opset:
        return
    body = onnx.GraphProto(node=function.node)
    _Raised(imported.version, opset, body).convert(body, body, {}, {})
    nodes = [onnx.helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in body.initializer]
    del function.node[:]
    function.node.extend([*nodes, *body.node])
    imported.version = opset


class _Raised:
    def __init__(self, old: int, new: int, graph: onnx.GraphProto):
        self.old = old
        self.new = new
        self.names = {name for part in _graphs(graph) for node in part.node for name in (*node.input, *node.output)}

    def convert(self, graph: onnx.GraphProto, inferred: onnx.GraphProto, types: Mapping, constants: Mapping) -> None:
        """Converts the nodes of a graph and of its subgraphs in place.

        ``inferred`` is the same graph after shape inference; ``types`` and ``constants`` are those of the outer graphs.
        """
        values = (*inferred.value_info, *inferred.input, *inferred.output)
        types = {**types, **{value.name: value.type for value in values}}
        constants = {**constants, **{tensor.name: tensor for tensor in graph.initializer}}
        read = {name for part in _graphs(graph) for node in part.node for name in node.input}
        read |= {value.name for value in graph.output}
        nodes = []
        for node, twin in zip(graph.node, inferred.node, strict=True):
            for attribute, other in zip(node.attribute, twin.attribute, strict=True):
                if attribute.type == onnx.AttributeProto.GRAPH:
                    self.convert(attribute.g, other.g, types, constants)
            if node.domain not in _STANDARD or not _is_changed(node.op_type, self.old, self.new):
                nodes.append(node)
                continue
            while node.op_type in _TRAINING and len(node.output) > 1 and node.output[-1] not in read:
                del node.output[-1]
            self._refuse(node)
            part = self._converted(node, types, constants)
            self._mend(part, node, types, constants)
            nodes.extend(part.node)
            graph.initializer.extend(part.initializer)
        nodes = [deepcopy(node) for node in nodes]
        del graph.node[:]
        graph.node.extend(nodes)

    def _refuse(self, node: onnx.NodeProto) -> None:
        if any(attribute.ref_attr_name for attribute in node.attribute):
            raise self._error(node, f"{node.op_type} takes an attribute from the function it stands in")
        first, what = _REFUSED.get(node.op_type, (0, ""))
        if self.old < first <= self.new and not (node.op_type in _TRAINING and len(node.output) == 1):
            raise self._error(node, f"{node.op_type} {what} from opset {first} on")

    def _mend(self, part: onnx.GraphProto, node: onnx.NodeProto, types: Mapping, constants: Mapping) -> None:
        """Corrects the types and the rounding that the converter gets wrong."""
        if node.op_type in ("Clip", "Pad") and node.input[0] in types:
            _cast_constants(part, types[node.input[0]].tensor_type.elem_type or onnx.TensorProto.FLOAT)
        resized = node.op_type in ("Upsample", "Resize") and self.old < 11 <= self.new
        if resized and not _set_coordinates(part.node[-1], _scales(node, constants)):
            reason = "Resize rounded down when it grew and up when it shrank before opset 11; this one may do both"
            raise self._error(node, reason)

    def _error(self, node: onnx.NodeProto, reason: str) -> ModelError:
        return ModelError(
            f"The model cannot be raised from opset {self.old} to {self.new}: node {node.name!r}: {reason}",
            f"Export it again with opset_version={self.new}.",
        )

    def _converted(self, node: onnx.NodeProto, types: Mapping, constants: Mapping) -> onnx.GraphProto:
        """The graph that computes the node at the new opset: same inputs and outputs, free names for all else."""
        # Under neutral names, so that equal nodes are converted once.
        neutral = {name: f"_{i}" for i, name in enumerate(dict.fromkeys((*node.input, *node.output))) if name} | {
            "": ""
        }
        bare = onnx.NodeProto(op_type=node.op_type, attribute=node.attribute)
        bare.input.extend(neutral[name] for name in node.input)
        bare.output.extend(neutral[name] for name in node.output)
        part = onnx.GraphProto(name="node", node=[bare])
        for name in filter(None, dict.fromkeys(node.input)):
            if name in constants:
                part.initializer.append(deepcopy(constants[name]))
                part.initializer[-1].name = neutral[name]
            else:
                part.input.append(onnx.ValueInfoProto(name=neutral[name], type=_rank(types.get(name), self.old)))
        for name in filter(None, node.output):
            part.output.append(onnx.ValueInfoProto(name=neutral[name], type=_rank(types.get(name), self.old)))
        try:
            part = onnx.GraphProto.FromString(_convert_version(part.SerializeToString(), self.old, self.new))
        except Exception as error:
            reason = " ".join(str(error).split()).rpartition("failed: ")[2]
            raise self._error(node, f"{node.op_type} cannot be converted ({reason[:200]})") from None
        names = {new: name for name, new in neutral.items()}
        fresh = [tensor for tensor in part.initializer if tensor.name not in names]
        del part.initializer[:]
        part.initializer.extend(fresh)
        for name in [t.name for t in fresh] + [name for new in part.node for name in new.output]:
            if name not in names:
                names[name] = self._free(f"{node.output[0]}_{name.strip('_')}")
        for tensor in part.initializer:
            tensor.name = names[tensor.name]
        heir = next((new for new in part.node if new.op_type == node.op_type), part.node[-1])
        for index, new in enumerate(part.node):
            new.input[:] = [names[name] for name in new.input]
            new.output[:] = [names[name] for name in new.output]
            new.name = node.name if new is heir or not node.name else f"{node.name}_{index}"
            new.doc_string = node.doc_string
            new.metadata_props.extend(node.metadata_props)
        return part

    def _free(self, name: str) -> str:
        while name in self.names:
            name += "_"
        self.names.add(name)
        return name


@functools.lru_cache(1024)
def _convert_version(graph: bytes, old: int, new: int) -> bytes:
    model = onnx.ModelProto(ir_version=8, opset_import=[onnx.helper.make_opsetid("", old)])
    model.graph.ParseFromString(graph)
    return onnx.version_converter.convert_version(model, new).graph.SerializeToString()


def _rank(declared: onnx.TypeProto | None, old: int) -> onnx.TypeProto | None:
    """A type without sizes. Up to opset 6 the sizes stay: broadcasting was an attribute, and conversion needs them."""
    if declared is None or not declared.tensor_type.HasField("shape") or old < 7:
        return declared
    rank = len(declared.tensor_type.shape.dim)
    return onnx.helper.make_tensor_type_proto(declared.tensor_type.elem_type, [None] * rank)


@functools.cache
def _is_changed(op: str, old: int, new: int) -> bool:
    """Whether an operator has other attributes, defaults, inputs or outputs at the new opset, or is gone."""
    try:
        before, after = onnx.defs.get_schema(op, old), onnx.defs.get_schema(op, new)
    except onnx.defs.SchemaError:  # not of the standard: nobody's converter knows it
        return False
    return after.deprecated or _signature(before) != _signature(after)


def _signature(schema: Any) -> tuple:
    attributes = {name: (a.type, str(a.default_value)) for name, a in schema.attributes.items()}
    return attributes, len(schema.inputs), len(schema.outputs)


def _scales(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> np.ndarray:
    """The scales of an Upsample or Resize node before opset 11; NaN where the scales are not constant."""
    if node.op_type == "Upsample":
        return np.ones(1)  # it never shrinks, which is all that matters here
    return onnx.numpy_helper.to_array(constants[node.input[1]]) if node.input[1] in constants else np.array(np.nan)


def _set_coordinates(resize: onnx.NodeProto, scales: np.ndarray) -> bool:
    """Sets the options that round indices of a Resize as before opset 11; False where no options do.

    Before opset 11 an index was divided by the scale, then rounded down when growing and up when shrinking. Opset 11
    has another default, and the converter does not set the options that opset 11 offers for the old rounding.
    """
    rounding = "floor" if (scales >= 1).all() else "ceil"
    modes = {"coordinate_transformation_mode": "asymmetric"}
    if next((a.s for a in resize.attribute if a.name == "mode"), b"nearest") == b"nearest":
        if rounding == "ceil" and not (scales <= 1).all():
            return False
        modes["nearest_mode"] = rounding
    resize.attribute.extend(onnx.helper.make_attribute(name, mode) for name, mode in modes.items())
    return True


def _cast_constants(part: onnx.GraphProto, data_type: int) -> None:
    """Casts the float32 constants that the converter made of attributes to the type of the node's data."""
    tensors = [a.t for node in part.node if node.op_type == "Constant" for a in node.attribute]
    for tensor in tensors + list(part.initializer):
        if tensor.data_type == onnx.TensorProto.FLOAT:
            values = onnx.numpy_helper.to_array(tensor).astype(onnx.helper.tensor_dtype_to_np_dtype(data_type))
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def _inferred(model: onnx.ModelProto, weights: list[onnx.TensorProto]) -> onnx.GraphProto:
    """The graph with the types of all tensors, as far as shape inference knows them."""
    bare = deepcopy(model)
    for proto in weights:
        bare.graph.input.append(onnx.helper.make_tensor_value_info(proto.name, proto.data_type, list(proto.dims)))
    with contextlib.suppress(Exception):  # types that stay unknown only leave the converter less to go by
        return onnx.shape_inference.infer_shapes(bare, data_prop=True).graph
    return bare.graph


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g)
