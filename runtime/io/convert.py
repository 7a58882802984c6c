"""ModelProto to gs.Graph and back, without a loss.

GraphSurgeon's own importer and exporter drop metadata, quantization annotations and some kinds of attributes and
values, copy an initializer of an outer graph into every subgraph that reads the initializer, and crash on optional and
map types. Here the graph gets all parts that GraphSurgeon can represent. The other parts are *carried* on the object
that they belong to, and put back on export:

    graph.carried    Carried: the model's header, the graph's metadata, defaults of inputs that a caller may override
    node.carried     NodeProto: documentation, metadata, and the attributes gs cannot hold
    tensor.carried   the ValueInfoProto of the file, and the dtype and shape it gave the tensor

A graph, node or tensor made by hand has no ``carried`` and exports as well. Constant nodes become initializers, so that
weights have one form.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnx_graphsurgeon.ir.tensor import SparseValues
from onnx_graphsurgeon.logger import G_LOGGER

from channelfold.runtime.errors import ModelError
from channelfold.runtime.io import weights
from channelfold.runtime.io.names import NodeNames, in_order
from channelfold.runtime.io.weights import DataFolder, MappedFile, Scratch, Values

G_LOGGER.severity = G_LOGGER.ERROR

_STANDARD = (None, "", "ai.onnx")
_KIND = onnx.AttributeProto
_LIFTED = {"value": None, "value_float": np.float32, "value_floats": np.float32, "value_int": np.int64,
           "value_ints": np.int64, "value_string": object, "value_strings": object}  # fmt: skip


@dataclass
class Carried:
    """The parts of an ONNX file that GraphSurgeon's graph cannot hold.

    ``header`` has no graph and no opsets. ``graph`` has metadata, quantization annotations and, as initializers, the
    defaults of inputs and the tensors that only annotations name. ``path`` is the model's file. ``scratch`` takes new
    large weights. A subgraph has ``graph`` alone.
    """

    path: Path | None = None
    header: onnx.ModelProto = field(default_factory=onnx.ModelProto)
    graph: onnx.GraphProto = field(default_factory=onnx.GraphProto)
    scratch: Scratch | None = None


def carried(graph: gs.Graph) -> Carried | None:
    return vars(graph).get("carried")


def all_graphs(graph: gs.Graph) -> Iterator[gs.Graph]:
    """The graph and every subgraph below it (bodies of If, Loop, Scan …), in the order of their nodes."""
    yield graph
    for node in graph.nodes:
        for value in node.attrs.values():
            if isinstance(value, gs.Graph):
                yield from all_graphs(value)


# ---- ModelProto -> gs.Graph --------------------------------------------------------------------------------------


def import_model(
    model: onnx.ModelProto,
    path: Path | None = None,
    file: MappedFile | None = None,
    weights: Mapping[str, Values] | None = None,
) -> gs.Graph:
    """The graph of a ModelProto.

    ``path``: the file of the model; external data lie beside it. ``file``: the same file, if already open. ``weights``:
    the values, by name, of the initializers that ``export_skeleton`` has left out of the main graph.

    Raises ModelError for an invalid model.
    """
    what = str(path or "The model")
    if not model.HasField("graph") or not model.opset_import:
        raise ModelError(f"{what} has no graph or no opset: it is not an ONNX model", "Export it again.")
    try:
        return _Importer(model, DataFolder(path, file)).run(path, weights or {})
    except ModelError:
        raise
    except Exception as error:  # a file can be wrong in more ways than protobuf, numpy and gs have exceptions for
        raise ModelError(f"{what} cannot be understood: {error}", "Check it with onnx.checker.check_model.") from error


class _Importer:
    def __init__(self, model: onnx.ModelProto, folder: DataFolder):
        self.model = model
        self.folder = folder
        self.opsets = [onnx.helper.make_opsetid(o.domain, o.version) for o in model.opset_import]
        self.opset = next((o.version for o in self.opsets if o.domain in _STANDARD), None)

    def run(self, path: Path | None, weights: Mapping[str, Values]) -> gs.Graph:
        constants = {name: gs.Constant(name, values) for name, values in weights.items()}
        _check_text(self.model.producer_name, self.model.producer_version)
        graph = self._graph(self.model.graph, ChainMap(), constants)
        for tensor in constants.values():  # by now all tensors of the main graph
            vars(tensor)["outermost"] = True
        graph.import_domains = self.opsets
        graph.ir_version = self.model.ir_version
        graph.producer_name, graph.producer_version = self.model.producer_name, self.model.producer_version
        own = carried(graph)
        assert own is not None
        own.path = path
        own.header = self._inlined(_without(self.model, "graph", "opset_import", "ir_version"))
        return graph

    def _graph(self, proto: onnx.GraphProto, outer: ChainMap, constants: dict[str, Any] | None = None) -> gs.Graph:
        scope = outer.new_child(constants)
        local = scope.maps[0]
        _check_text(proto.name, proto.doc_string, *(tensor.name for tensor in proto.initializer))
        keep = _without(
            proto, "node", "input", "output", "initializer", "sparse_initializer", "value_info", "name", "doc_string"
        )
        initializers = {tensor.name for tensor in proto.initializer}
        # Until IR version 4 every initializer had to be an input too; since then, such an input may be overridden.
        inputs = [v for v in proto.input if self.model.ir_version >= 4 or v.name not in initializers]
        names = {value.name for value in inputs}
        described = {p.value for a in proto.quantization_annotation for p in a.quant_parameter_tensor_names}
        for tensor in proto.initializer:
            if tensor.name in names | described:
                keep.initializer.append(weights.tensor_proto(self.folder.values(tensor), tensor.name))
            if tensor.name not in names:
                local[tensor.name] = gs.Constant(tensor.name, self.folder.values(tensor))
        for sparse in proto.sparse_initializer:
            _check_text(sparse.values.name)
            local[sparse.values.name] = gs.Constant(sparse.values.name, weights.sparse_values(self._inlined(sparse)))
        info = {value.name: value for value in (*proto.value_info, *proto.output, *inputs)}
        graph_inputs = [_lookup(value.name, local, local, info) for value in inputs]
        names = NodeNames(proto)
        named = [(source, names.of(source, index)) for index, source in enumerate(proto.node)]
        order = in_order(proto.node)
        order = order if len(order) == len(named) else range(len(named))  # a node that depends on itself: see validate
        nodes = [node for i in order if (node := self._node(*named[i], scope, info)) is not None]
        outputs = [_lookup(value.name, local, local, info) for value in proto.output]
        for tensor in outputs:
            if isinstance(tensor, gs.Constant):
                _set_info(tensor, info[tensor.name])
        graph = gs.Graph(nodes, graph_inputs, outputs, proto.name, proto.doc_string, self.opset, self.opsets)
        vars(graph)["carried"] = Carried(graph=keep)
        return graph

    def _node(self, proto: onnx.NodeProto, name: str, scope: ChainMap, info: dict) -> gs.Node | None:
        attributes = (attribute.name for attribute in proto.attribute)
        _check_text(proto.op_type, proto.name, proto.domain, *proto.output, *attributes)
        keep = _without(proto, "input", "output", "name", "op_type", "domain", "attribute")
        attrs: dict[str, Any] = {}
        for attribute in proto.attribute:
            value = self._attribute(attribute, scope)
            if value is None or _is_empty(value):  # an empty list would lose its type
                keep.attribute.append(self._inlined(attribute))
            if value is not None:
                attrs[attribute.name] = value
        local = scope.maps[0]
        if proto.op_type == "Constant" and proto.domain in _STANDARD and _lift(proto, attrs, local):
            return None
        domain = proto.domain if proto.HasField("domain") else None
        node = gs.Node(
            proto.op_type,
            name,
            attrs,
            [_lookup(n, scope, local, info) for n in proto.input],
            [_lookup(n, local, local, info) for n in proto.output],
            domain,
        )
        if keep.ByteSize():
            vars(node)["carried"] = keep
        return node

    def _attribute(self, proto: onnx.AttributeProto, scope: ChainMap) -> Any:
        """The value of an attribute in the form of gs; None where gs has no form."""
        if proto.ref_attr_name:
            return None
        match proto.type:
            case _KIND.FLOAT:
                return proto.f
            case _KIND.INT:
                return proto.i
            case _KIND.STRING if weights.is_text(proto.s):
                return proto.s.decode()
            case _KIND.FLOATS:
                return list(proto.floats)
            case _KIND.INTS:
                return list(proto.ints)
            case _KIND.STRINGS if all(weights.is_text(s) for s in proto.strings):
                return [s.decode() for s in proto.strings]
            case _KIND.TENSOR:
                _check_text(proto.t.name)
                return gs.Constant(proto.t.name, self.folder.values(proto.t))
            case _KIND.GRAPH:
                return self._graph(proto.g, scope)
        return None

    def _inlined(self, message: Any) -> Any:
        """The message with the external data of all its tensors inside."""
        for tensor in _tensors(message):
            tensor.CopyFrom(self.folder.inlined(tensor))
        return message


def _tensors(message: Any) -> Iterator[onnx.TensorProto]:
    if isinstance(message, onnx.TensorProto):
        yield message
        return
    for descriptor, value in message.ListFields():
        if descriptor.message_type is not None:
            for item in value if descriptor.is_repeated else (value,):
                yield from _tensors(item)


def _check_text(*texts: str | bytes | None) -> None:
    """Raises ValueError for a text that is not UTF-8: protobuf returns such a text as bytes, and accepts no bytes."""
    for text in texts:
        if isinstance(text, bytes):
            raise ValueError(f"the name {text!r} is not UTF-8")


def _lookup(name: str, scope: Any, local: Any, info: dict[str, onnx.ValueInfoProto]) -> gs.Tensor:
    """The tensor of a name in ``scope``. A tensor for a new name is made in ``local``."""
    if not name:
        return gs.Variable.empty()
    tensor = scope.get(name)
    if tensor is None:
        _check_text(name)
        tensor = local[name] = gs.Variable(name)
        if name in info:
            _set_info(tensor, info[name])
    return tensor


def _set_info(tensor: gs.Tensor, info: onnx.ValueInfoProto) -> None:
    kind = info.type.WhichOneof("value")
    if isinstance(tensor, gs.Variable) and kind == "tensor_type":
        tensor.dtype, tensor.shape = tensor_type(info.type.tensor_type)
    elif isinstance(tensor, gs.Variable) and kind is not None:
        tensor.type = kind
    vars(tensor)["carried"] = info, tensor.dtype, _shape(tensor)


def tensor_type(proto: onnx.TypeProto.Tensor) -> tuple[np.dtype | None, list[int | str | None] | None]:
    """numpy dtype (None: not declared) and shape (None: not even the rank) of a declared tensor type."""
    dtype = onnx.helper.tensor_dtype_to_np_dtype(proto.elem_type) if proto.elem_type else None
    if not proto.HasField("shape"):
        return dtype, None
    dims = [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in proto.shape.dim]
    _check_text(*(d for d in dims if not isinstance(d, int)))
    return dtype, [None if isinstance(d, int) and d < 0 else d for d in dims]


def _lift(proto: onnx.NodeProto, attrs: dict[str, Any], local: Any) -> bool:
    """Turns the output of a Constant node into a constant of the graph; False where the node must stay."""
    if len(proto.attribute) != 1 or len(proto.output) != 1 or not proto.output[0] or not attrs:
        return False
    ((kind, value),) = attrs.items()
    if kind not in _LIFTED or (kind == "value") != isinstance(value, gs.Constant):
        return False
    values = value._values if isinstance(value, gs.Constant) else np.array(value, _LIFTED[kind])
    name = proto.output[0]
    if isinstance(known := local.get(name), gs.Variable):  # read by an earlier node of an unsorted graph, or declared
        known.to_constant(values)
    else:
        local[name] = gs.Constant(name, values)
    return True


def _without(proto: Any, *fields: str) -> Any:
    """A copy of a message without some fields, which are never copied."""
    out = type(proto)()
    for descriptor, value in proto.ListFields():
        if descriptor.name in fields:
            continue
        if descriptor.is_repeated:
            getattr(out, descriptor.name).extend(value)
        elif descriptor.message_type is not None:
            getattr(out, descriptor.name).CopyFrom(value)
        else:
            setattr(out, descriptor.name, value)
    return out


# ---- gs.Graph -> ModelProto --------------------------------------------------------------------------------------


def export(graph: gs.Graph) -> tuple[onnx.ModelProto, list[tuple[onnx.TensorProto, np.ndarray]]]:
    """The model without its large weights, and the large weights: pairs of a TensorProto without data, and values.

    The values are as a file holds them: types below 8 bits packed to uint8[n], all others in their shape.
    """
    model, large = export_skeleton(graph)
    return model, [(proto, weights.packed(constant._values)) for proto, constant in large]


def export_skeleton(graph: gs.Graph) -> tuple[onnx.ModelProto, list[tuple[onnx.TensorProto, gs.Constant]]]:
    """The model without its large weights, and the large weights: pairs of a TensorProto without data, and constant."""
    model = onnx.ModelProto()
    if own := carried(graph):
        model.CopyFrom(own.header)
    _set(model, producer_name=graph.producer_name, producer_version=graph.producer_version)
    model.opset_import.extend(_opset_imports(graph))
    model.ir_version = max(graph.ir_version or 4, onnx.helper.find_min_ir_version_for(model.opset_import, True), 4)
    model.functions.extend(OnnxExporter.export_function(function) for function in graph.functions)
    places = _Places(graph)
    _write_graph(graph, model.graph, places)
    return model, [(weights.described(c._values, places.names[id(c)]), c) for c in places.large]


class _Places:
    """Which graph writes a constant, and under which name.

    The outermost graph writes its own constants, the constants that several graphs read, and the large constants
    (``large``). A subgraph writes the constants that it returns, and the small constants that it alone reads.
    """

    def __init__(self, graph: gs.Graph):
        self.names: dict[int, str] = {}
        self.small: dict[int, list[gs.Constant]] = {}
        self.large: list[gs.Constant] = []
        owners: dict[str, set[int]] = {}
        readers: dict[int, tuple[gs.Constant, dict[int, gs.Graph]]] = {}
        for part in all_graphs(graph):
            for tensor in _tensors_of(part):
                owners.setdefault(tensor.name, set()).add(id(tensor))
                if isinstance(tensor, gs.Constant):
                    readers.setdefault(id(tensor), (tensor, {}))[1][id(part)] = part
        outermost: dict[str, int] = {}
        for key, (tensor, parts) in readers.items():
            home = next(iter(parts.values()))
            large = weights.is_large(tensor._values)
            returned = any(tensor is output for output in home.outputs)
            old = "outermost" in vars(tensor)
            if len(parts) > 1 or ((old or large) and not returned):
                home = graph
            name = tensor.name
            fresh = home is graph and id(graph) not in parts and not old  # its name may be taken there
            while home is graph and (
                outermost.setdefault(name, key) != key or (fresh and owners.get(name, {key}) != {key})
            ):
                name, fresh = f"{name}_", True
            self.names[key] = name
            (self.large if large and home is graph else self.small.setdefault(id(home), [])).append(tensor)

    def name(self, tensor: Any) -> str:
        return self.names.get(id(tensor)) or tensor.name


def _tensors_of(graph: gs.Graph) -> Iterator[gs.Tensor]:
    """The tensors of a graph, inputs and outputs first; some more than once."""
    yield from graph.inputs
    yield from graph.outputs
    for node in graph.nodes:
        yield from (t for t in node.inputs if t.name)
        yield from (t for t in node.outputs if t.name)


def _write_graph(graph: gs.Graph, proto: onnx.GraphProto, places: _Places) -> None:
    _set(proto, name=graph.name or "graph", doc_string=graph.doc_string)
    names: set[str] = set()
    for node in graph.nodes:
        _write_node(node, written := proto.node.add(), places)
        while written.name in names:  # a pass may have given the name of another node
            written.name += "_"
        names.update({written.name} if written.name else ())
    proto.input.extend(_value_info(tensor) for tensor in graph.inputs)
    proto.output.extend(_value_info(tensor) for tensor in graph.outputs)
    listed = {t.name for t in (*graph.inputs, *graph.outputs)} | {""}
    for node in graph.nodes:
        known = (t for t in node.outputs if t.name not in listed and _still_holds(t))
        proto.value_info.extend(_value_info(tensor) for tensor in known)
    for constant in places.small.get(id(graph), ()):
        name, values = places.names[id(constant)], constant._values
        if isinstance(values, SparseValues):
            sparse = proto.sparse_initializer.add()
            sparse.CopyFrom(values.tensor)
            sparse.values.name = name
        else:
            proto.initializer.append(weights.tensor_proto(values, name))
    if own := carried(graph):
        _write_carried(own.graph, graph, proto)


def _write_carried(own: onnx.GraphProto, graph: gs.Graph, proto: onnx.GraphProto) -> None:
    tensors = {tensor.name: tensor for tensor in _tensors_of(graph)}
    proto.metadata_props.extend(own.metadata_props)
    proto.quantization_annotation.extend(a for a in own.quantization_annotation if a.tensor_name in tensors)
    described = {p.value for a in proto.quantization_annotation for p in a.quant_parameter_tensor_names}
    inputs = {tensor.name for tensor in graph.inputs}
    proto.initializer.extend(t for t in own.initializer if t.name in inputs | (described - set(tensors)))


def _write_node(node: gs.Node, proto: onnx.NodeProto, places: _Places) -> None:
    if (keep := vars(node).get("carried")) is not None:
        proto.CopyFrom(keep)
        kept = [attribute for attribute in keep.attribute if _is_empty(node.attrs.get(attribute.name, []))]
        del proto.attribute[:]
        proto.attribute.extend(kept)
    _set(proto, op_type=node.op, name=node.name, domain=node.domain)
    proto.input.extend(places.name(tensor) for tensor in node.inputs)
    proto.output.extend(tensor.name for tensor in node.outputs)
    kept = {attribute.name for attribute in proto.attribute}
    for name, value in node.attrs.items():
        if name in kept and _is_empty(value):
            continue
        if isinstance(value, gs.Graph):
            attribute = proto.attribute.add(name=name, type=_KIND.GRAPH)
            _write_graph(value, attribute.g, places)
        elif isinstance(value, gs.Constant):
            proto.attribute.append(onnx.helper.make_attribute(name, weights.tensor_proto(value._values, value.name)))
        else:
            proto.attribute.append(_attribute(name, value))


def _attribute(name: str, value: Any) -> onnx.AttributeProto:
    if isinstance(value, type | np.dtype):  # gs lets a Cast name its type so
        value = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(value))
    return onnx.helper.make_attribute(name, value, attr_type=_KIND.INTS if _is_empty(value) else None)


def _is_empty(value: Any) -> bool:
    return isinstance(value, list | tuple) and not value


def _value_info(tensor: gs.Tensor) -> onnx.ValueInfoProto:
    """The declared type of a tensor: that of the file while dtype and shape are unchanged, else made from both."""
    if _still_holds(tensor):
        out = deepcopy(tensor.carried[0])
        out.name = tensor.name
        return out
    kind = "tensor_type" if isinstance(tensor, gs.Constant) else tensor.type
    if tensor.dtype is None or kind != "tensor_type":
        return _named(OnnxExporter.export_value_info_proto(tensor, False), tensor)
    dtype = tensor.dtype
    dtype = dtype if isinstance(dtype, int) else onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return _named(onnx.helper.make_tensor_value_info(tensor.name, dtype, _shape(tensor)), tensor)


def _named(out: onnx.ValueInfoProto, tensor: gs.Tensor) -> onnx.ValueInfoProto:
    """A new type with the documentation and metadata of the tensor in the file."""
    if "carried" in vars(tensor):
        old = tensor.carried[0]
        _set(out, doc_string=old.doc_string)
        out.metadata_props.extend(old.metadata_props)
    return out


def _still_holds(tensor: gs.Tensor) -> bool:
    if "carried" not in vars(tensor):
        return False
    _, dtype, shape = tensor.carried
    return (dtype, shape) == (tensor.dtype, _shape(tensor))


def _shape(tensor: gs.Tensor) -> tuple[int | str | None, ...] | None:
    if tensor.shape is None:
        return None
    dims = (int(d) if isinstance(d, int | np.integer) else d for d in tensor.shape)
    return tuple(None if isinstance(d, int) and d < 0 else d for d in dims)


def _opset_imports(graph: gs.Graph) -> list[onnx.OperatorSetIdProto]:
    imports = {o.domain: o.version for o in graph.import_domains or []}
    used = {node.domain or "" for part in all_graphs(graph) for node in part.nodes}
    standard = [domain for domain in imports if domain in _STANDARD]
    if not standard and (not imports or "" in used):
        standard = [""]
    imports |= dict.fromkeys(standard, graph.opset)
    imports |= dict.fromkeys((d for d in used if d not in imports and d not in _STANDARD), 1)
    return [onnx.helper.make_opsetid(domain, version) for domain, version in imports.items()]


def _set(proto: Any, **fields: str | None) -> None:
    """Sets the fields that are not empty. In ONNX an empty string and a missing one have the same meaning."""
    for name, value in fields.items():
        if value:
            setattr(proto, name, value)
