"""Load and save: weights memory-mapped in, streamed out, the file replaced in one step.

``load`` reads the ONNX file as a skeleton (see ``wire``): every large weight stays in its file as (file, offset, length)
and is mapped when a pass looks at it. GraphSurgeon then sees only what it represents well; the rest (metadata, functions,
attribute kinds it drops, types it has no word for, initializers that are also inputs) is *carried* beside the graph, on
the objects it belongs to, and put back by ``export``. Constant nodes become initializers, so a weight has one form.

``save`` streams the weights from wherever they lie. The result is written beside the target and renamed, so a killed
process leaves the old file or the new one, never a part.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import secrets
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.importers.onnx_importer import OnnxImporter
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues
from onnx_graphsurgeon.logger import G_LOGGER

from channelfold.passes.base import ModelError, OutputError, VerificationError
from channelfold.runtime import wire
from channelfold.runtime.ort import Session

G_LOGGER.severity = G_LOGGER.ERROR

SPILL_LIMIT = 1 << 20  # bytes; a new weight at least this large goes to disk at once
EXTERNAL_LIMIT = 1_800_000_000  # bytes of weights above which a file gets external data (protobuf ends at 2 GiB)
_PAGE = 4096  # large external weights start on a page, so that they can be mapped where they lie

_OPAQUE_ATTRIBUTES = {
    onnx.AttributeProto.SPARSE_TENSOR, onnx.AttributeProto.SPARSE_TENSORS, onnx.AttributeProto.TENSORS,
    onnx.AttributeProto.GRAPHS, onnx.AttributeProto.TYPE_PROTO, onnx.AttributeProto.TYPE_PROTOS,
    onnx.AttributeProto.UNDEFINED,
}  # fmt: skip


class MappedValues(LazyValues):
    """The values of a constant that lie in a file, ``nbytes`` bytes from ``offset``; mapped read-only when loaded."""

    def __init__(self, proto: onnx.TensorProto, file: Path | IO[bytes], offset: int):
        super().__init__(proto)
        self.file = file
        self.offset = offset

    def load(self) -> np.ndarray:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(self.tensor.data_type)
        shape = tuple(self.tensor.dims)
        size = packed_nbytes(self.tensor)
        if size == 0:
            return np.zeros(shape, dtype)
        raw = np.memmap(self.file, np.uint8, "r", self.offset, size)
        if _bits(self.tensor.data_type) < 8:
            inline = onnx.TensorProto(data_type=self.tensor.data_type, dims=shape, raw_data=raw.tobytes())
            return onnx.numpy_helper.to_array(inline)
        return raw.view(dtype).reshape(shape)


@dataclass
class Carried:
    """What an ONNX file says beyond GraphSurgeon's graph. ``header`` and ``graph`` hold no nodes, no weights."""

    path: Path | None
    header: onnx.ModelProto
    graph: onnx.GraphProto
    defaults: list[onnx.TensorProto] = field(default_factory=list)  # of inputs that a caller may override
    scratch: IO[bytes] | None = None


def load(path: str | os.PathLike[str]) -> gs.Graph:
    """The graph of an ONNX file of any size; its large weights stay on disk.

    Raises ModelError for a file that is missing, truncated or not ONNX, and for external data that are missing, too
    short, or lie outside the model's folder.
    """
    path = Path(path)
    return import_model(_read(path), path)


def import_model(model: onnx.ModelProto, path: Path | None = None) -> gs.Graph:
    """The graph of a ModelProto; ``path`` is the file whose folder holds its external data. Consumes ``model``."""
    if not model.HasField("graph") or not model.opset_import:
        raise ModelError(f"{path or 'The model'} has no graph or no opset: it is not an ONNX model", "Export it again.")
    header = onnx.ModelProto()
    header.CopyFrom(_without(model, "graph"))
    model.ClearField("functions")
    inputs = {value.name for value in model.graph.input}
    defaults = []
    if model.ir_version >= 4:
        defaults = [t for t in model.graph.initializer if t.name in inputs]
        kept = [t for t in model.graph.initializer if t.name not in inputs]
        del model.graph.initializer[:]
        model.graph.initializer.extend(kept)
        defaults = [_inlined(t, path) for t in defaults]
    stripped = _strip(model.graph)
    try:
        graph = gs.import_onnx(model)
    except Exception as error:
        raise ModelError(
            f"{path or 'The model'} cannot be understood: {error}", "Check it with onnx.checker."
        ) from error
    carried = onnx.GraphProto()
    carried.CopyFrom(_without(model.graph, "node", "initializer", "sparse_initializer", "value_info"))
    _attach(graph, model.graph, stripped, path)
    graph.carried = Carried(path, header, carried, defaults)
    return graph


def save(graph: gs.Graph, path: str | os.PathLike[str], *, external: bool | None = None) -> None:
    """Writes ``graph`` to ``path``; its weights go beside it (``NAME.data``) when they pass 1.8 GB or are asked to.

    Raises OutputError when the file cannot be written; nothing is then left behind.
    """
    path = Path(path)
    model, weights = export(graph)
    if external is None:
        external = sum(values.nbytes for _, values in weights) + model.ByteSize() > EXTERNAL_LIMIT
    with writing(path) as file:
        if not external:
            wire.write_inline(model, weights, file)
            old = _old_data(path)
        else:
            old = _old_data(path)
            data = next(p for p in _data_names(path) if not p.exists())
            with writing(data) as data_file:
                for proto, values in weights:
                    _pad(data_file, values.nbytes)
                    _refer(proto, data.name, data_file.tell(), values.nbytes)
                    wire.write_array(values, data_file)
                    model.graph.initializer.append(proto)
            file.write(model.SerializeToString())
    for stale in old:
        stale.unlink(missing_ok=True)


def export(graph: gs.Graph) -> tuple[onnx.ModelProto, list[tuple[onnx.TensorProto, np.ndarray]]]:
    """The model without its large weights, and those: (TensorProto with name, type and dims, values) pairs."""
    carried: Carried | None = getattr(graph, "carried", None) if "carried" in vars(graph) else None
    large: dict[str, gs.Constant] = {}
    swapped: list[tuple[gs.Constant, Any]] = []
    try:
        for tensor in graph.tensors().values():
            if isinstance(tensor, gs.Constant) and not isinstance(tensor._values, SparseValues):
                values = tensor._values
                if isinstance(values, MappedValues) or (isinstance(values, np.ndarray) and _is_large(values)):
                    large[tensor.name] = tensor
                    tensor._values = LazyValues(_stub(tensor))
                    swapped.append((tensor, values))
                elif isinstance(values, np.ndarray):
                    tensor._values = LazyValues(onnx.numpy_helper.from_array(values, tensor.name))
                    swapped.append((tensor, values))
        model = gs.export_onnx(graph, do_type_check=False, opset_imports=_opset_imports(graph))
    finally:
        for tensor, values in swapped:
            tensor._values = values
    _restore(graph, model.graph, set())
    if carried is not None:
        _restore_header(graph, model, carried)
    model.ir_version = max(model.ir_version, onnx.helper.find_min_ir_version_for(model.opset_import, True), 4)
    kept = [t for t in model.graph.initializer if t.name not in large]
    stubs = [t for t in model.graph.initializer if t.name in large]
    weights = [(_copy(t), read(large[t.name])) for t in stubs]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model, weights


def read(constant: gs.Constant) -> np.ndarray:
    """The values of a constant without keeping them: a lazily loaded weight stays lazy."""
    values = constant._values
    if not isinstance(values, LazyValues):
        return values
    return (
        values.load() if isinstance(values, MappedValues | SparseValues) else onnx.numpy_helper.to_array(values.tensor)
    )


def constant(graph: gs.Graph, name: str, values: np.ndarray) -> gs.Constant:
    """A new constant under a free name made from ``name``. Large values go to a scratch file, not to memory."""
    return gs.Constant(free_name(graph, name), stored(graph, values, name))


def stored(graph: gs.Graph, values: np.ndarray, name: str = "") -> np.ndarray | MappedValues:
    """``values`` in the form a constant should hold them: on disk when they are large."""
    values = np.asarray(values)
    carried: Carried | None = vars(graph).get("carried")
    if carried is None or values.nbytes < SPILL_LIMIT or values.dtype == object:
        return values
    if carried.scratch is None:
        carried.scratch = tempfile.TemporaryFile(prefix="channelfold-")  # noqa: SIM115 - lives as long as the graph
    proto = onnx.TensorProto(data_type=onnx.helper.np_dtype_to_tensor_dtype(values.dtype), dims=values.shape, name=name)
    offset = carried.scratch.seek(0, os.SEEK_END)
    try:
        wire.write_array(packed(values), carried.scratch)
        carried.scratch.flush()
    except OSError as error:
        raise OutputError(
            f"No room for new weights in {tempfile.gettempdir()} ({error.strerror})", "Set TMPDIR to a larger disk."
        ) from error
    return MappedValues(proto, carried.scratch, offset)


def free_name(graph: gs.Graph, name: str) -> str:
    """``name``, or ``name_1``, ``name_2`` … when a tensor of the graph or its subgraphs has it already."""
    taken: set[str] | None = vars(graph).get("_names")
    if taken is None:
        taken = {t for g in all_graphs(graph) for t in g.tensors()}
        vars(graph)["_names"] = taken
    free, number = name, 0
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    taken.add(free)
    return free


def all_graphs(graph: gs.Graph) -> Iterator[gs.Graph]:
    """The graph and every subgraph below it (bodies of If, Loop, Scan …)."""
    yield graph
    for node in graph.nodes:
        for value in node.attrs.values():
            if isinstance(value, gs.Graph):
                yield from all_graphs(value)


def check(graph: gs.Graph) -> None:
    """Runs the ONNX checker; raises VerificationError with its message. Large weights take part by type and shape."""
    try:
        onnx.checker.check_model(weightless(graph))
    except onnx.checker.ValidationError as error:
        reason = " ".join(str(error).split())[:400]
        raise VerificationError(f"The graph is no longer valid ONNX: {reason}") from None


def infer_shapes(graph: gs.Graph) -> None:
    """Fills in the shapes and dtypes of variables as far as ONNX shape inference knows them."""
    try:
        inferred = onnx.shape_inference.infer_shapes(weightless(graph), data_prop=True)
    except Exception:  # an operator that inference chokes on leaves shapes unknown, which every pass copes with
        return
    known = {value.name: value for value in inferred.graph.value_info}
    for name, tensor in graph.tensors().items():
        if name in known and isinstance(tensor, gs.Variable) and known[name].type.HasField("tensor_type"):
            fresh = OnnxImporter.import_tensor(known[name])
            tensor.dtype = tensor.dtype if tensor.dtype is not None else fresh.dtype
            tensor.shape = fresh.shape if fresh.shape is not None else tensor.shape


def weightless(graph: gs.Graph) -> onnx.ModelProto:
    """The model with its large weights turned into inputs of the same type and shape."""
    model, weights = export(graph)
    for proto, _ in weights:
        model.graph.input.append(onnx.helper.make_tensor_value_info(proto.name, proto.data_type, list(proto.dims)))
    return model


def raise_opset(graph: gs.Graph, opset: int) -> gs.Graph:
    """The same function at a higher opset of the standard domain (the graph itself when it is there already).

    Raises ModelError when ONNX's version converter cannot convert an operator.
    """
    if graph.opset >= opset:
        return graph
    model, weights = export(graph)
    names = {proto.name for proto, _ in weights}
    for proto, _ in weights:
        model.graph.input.append(onnx.helper.make_tensor_value_info(proto.name, proto.data_type, list(proto.dims)))
    try:
        converted = onnx.version_converter.convert_version(model, opset)
    except Exception as error:
        raise ModelError(
            f"The model cannot be raised from opset {graph.opset} to {opset}: {' '.join(str(error).split())[:300]}",
            f"Export it again with opset_version={opset}.",
        ) from None
    kept = [value for value in converted.graph.input if value.name not in names]
    del converted.graph.input[:]
    converted.graph.input.extend(kept)
    old = vars(graph).get("carried")
    raised = import_model(converted, old.path if old else None)
    tensors = raised.tensors()
    constants = graph.tensors()
    for name in names & set(tensors):
        tensors[name].to_constant(constants[name]._values)
    if old is not None:
        raised.carried.header.CopyFrom(old.header)
        raised.carried.graph.CopyFrom(old.graph)
        raised.carried.defaults, raised.carried.scratch = old.defaults, old.scratch
        _set_opset(raised.carried.header, opset)
    return raised


def session(graph: gs.Graph, outputs: list[str] | None = None, **options: Any) -> Session:
    """An ONNX Runtime session on a graph; ``outputs`` names any tensors of it. Weights are used where they lie."""
    model, weights = export(graph)
    if outputs is not None:
        types = {value.name: value for value in model.graph.output}
        del model.graph.output[:]
        model.graph.output.extend(types.get(name) or onnx.ValueInfoProto(name=name) for name in outputs)
    return open_model(model, weights, **options)


def open_model(model: onnx.ModelProto, weights: list[tuple[onnx.TensorProto, np.ndarray]], **options: Any) -> Session:
    """A session on what ``export`` gave, possibly with nodes added."""
    arrays = {}
    inline = []
    for proto, values in weights:
        if _bits(proto.data_type) < 8 or values.dtype.kind == "V" or not values.flags.c_contiguous:
            inline.append((proto, packed(values)))
            continue
        _refer(proto, "weights", 0, values.nbytes)
        model.graph.initializer.append(proto)
        arrays[proto.name] = values
    with tempfile.TemporaryDirectory(prefix="channelfold-") as folder:
        path = Path(folder, "model.onnx")
        with path.open("wb") as file:
            wire.write_inline(model, inline, file)
        return Session(path, weights=arrays, **options)


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file to write beside ``path`` that takes its place at the end, or vanishes on an error.

    Raises OutputError for anything the file system refuses.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        hint = "Free some space." if error.errno == errno.ENOSPC else "Give another output path."
        raise OutputError(f"Cannot write {path} ({error.strerror or error})", hint) from error
    finally:
        temporary.unlink(missing_ok=True) if temporary.parent.is_dir() else None


def packed(values: np.ndarray) -> np.ndarray:
    """Values as ONNX stores them: little endian, types below 8 bits two or more to a byte."""
    if values.dtype.kind == "V" and _bits(onnx.helper.np_dtype_to_tensor_dtype(values.dtype)) < 8:
        return np.frombuffer(onnx.numpy_helper.from_array(values).raw_data, np.uint8)
    return np.ascontiguousarray(values)


def packed_nbytes(proto: onnx.TensorProto) -> int:
    """Bytes that a tensor of this type and these dims takes in a file."""
    return (int(np.prod(proto.dims, dtype=np.int64)) * _bits(proto.data_type) + 7) // 8


# ---- reading -----------------------------------------------------------------------------------------------------


def _read(path: Path) -> onnx.ModelProto:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise ModelError(f"{path} is empty", "Export the model again.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return onnx.ModelProto.FromString(wire.skeleton(data, path.name))
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist", "Check the path of the model.") from None
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read ({error.strerror or error})", "Give the path of an .onnx file."
        ) from None
    except ModelError:
        raise
    except Exception as error:  # protobuf's DecodeError has no public base of its own
        raise ModelError(
            f"{path} is truncated or not an ONNX file ({error})", "Export or download it again and compare its size."
        ) from None


def _mapped(proto: onnx.TensorProto, path: Path | None) -> MappedValues:
    """Where external data lie, checked: inside the model's folder, there, and long enough."""
    entries = {entry.key: entry.value for entry in proto.external_data}
    location = entries.get("location", "")
    what = f"External data of tensor {proto.name!r}"
    if path is None:
        raise ModelError(f"{what} cannot be found: the model has no folder", "Load it from its file.")
    folder = path.parent.resolve()
    parts = PurePosixPath(location.replace("\\", "/"))
    file = folder / parts
    own = location == path.name
    if not location or parts.is_absolute() or ":" in location or ".." in parts.parts:
        raise ModelError(
            f"{what} point to {location!r}, outside the model's folder", "Only relative paths are allowed."
        )
    if not own and not file.resolve().is_relative_to(folder):
        raise ModelError(f"{what}: the link {location!r} leaves the model's folder", "Put the data beside the model.")
    file = path if own else file
    if not file.is_file():
        raise ModelError(f"{what} are missing: there is no file {file}", "Put it beside the model.")
    try:
        offset = int(entries.get("offset") or 0)
        length = int(entries.get("length") or packed_nbytes(proto))
        needed = packed_nbytes(proto)
    except (ValueError, TypeError, KeyError):
        raise ModelError(f"{what}: offset or length is not a number", "Export the model again.") from None
    size = file.stat().st_size
    if offset < 0 or length != needed:
        raise ModelError(f"{what}: {length} bytes are declared, its type and shape need {needed}", "Export it again.")
    if offset + length > size:
        raise ModelError(
            f"{what} need bytes {offset} to {offset + length} of {file.name}, which has {size}",
            "The file is truncated: copy or download it again.",
        )
    return MappedValues(proto, file, offset)


def _inlined(proto: onnx.TensorProto, path: Path | None) -> onnx.TensorProto:
    if proto.data_location != onnx.TensorProto.EXTERNAL:
        return _copy(proto)
    return onnx.numpy_helper.from_array(np.array(_mapped(proto, path).load()), proto.name)


def _attach(graph: gs.Graph, proto: onnx.GraphProto, stripped: list, path: Path | None) -> None:
    """Maps external weights, turns Constant nodes into constants, and hangs what gs drops on nodes and tensors."""
    info = {value.name: value for value in [*proto.value_info, *proto.input, *proto.output]}
    for index, (node, source, (carried, inner)) in enumerate(zip(graph.nodes, proto.node, stripped, strict=True)):
        node.carried = carried
        node.name = node.name or f"{node.op}_{index}"
        bodies = {a.name: a.g for a in source.attribute if a.type == onnx.AttributeProto.GRAPH}
        for name, value in node.attrs.items():
            if isinstance(value, gs.Graph):
                _attach(value, bodies[name], inner[name], path)
            elif isinstance(value, gs.Constant):
                _map(value, path)
        if node.op == "Constant" and not node.domain and not node.carried.attribute:
            _lift(node)
    graph.nodes[:] = [n for n in graph.nodes if not (n.op == "Constant" and not n.outputs)]
    for tensor in list(graph.tensors().values()):
        if isinstance(tensor, gs.Constant):
            _map(tensor, path)
        elif tensor.name in info:
            tensor.carried = info[tensor.name], tensor.dtype, tuple(tensor.shape) if tensor.shape is not None else None


def _map(tensor: gs.Constant, path: Path | None) -> None:
    values = tensor._values
    if isinstance(values, LazyValues) and not isinstance(values, MappedValues | SparseValues):
        if values.tensor.data_location == onnx.TensorProto.EXTERNAL:
            tensor._values = _mapped(values.tensor, path)
            tensor.data_location = None


def _lift(node: gs.Node) -> None:
    """Turns the output of a Constant node into a constant of the graph."""
    (name, value), *others = node.attrs.items()
    if others or len(node.outputs) != 1:
        return
    output = node.outputs[0]
    if name == "value":
        values = value._values
    else:
        dtype = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
        values = np.array(value, dtype.get(name, object))
    node.outputs.clear()
    output.to_constant(values)


def _strip(graph: onnx.GraphProto) -> list[tuple[onnx.NodeProto, dict[str, list]]]:
    """Removes from every node what gs cannot represent; returns that (with documentation and metadata) node by node."""
    stripped = []
    for node in graph.node:
        carried = _without(node, "input", "output", "name", "op_type", "domain", "attribute")
        carried.attribute.extend(a for a in node.attribute if _is_opaque(a))
        if carried.attribute:
            kept = [_copy(a) for a in node.attribute if not _is_opaque(a)]
            del node.attribute[:]
            node.attribute.extend(kept)
        inner = {a.name: _strip(a.g) for a in node.attribute if a.type == onnx.AttributeProto.GRAPH}
        stripped.append((carried, inner))
    return stripped


def _is_opaque(attribute: onnx.AttributeProto) -> bool:
    kind = onnx.AttributeProto
    if attribute.type in _OPAQUE_ATTRIBUTES:
        return True
    if attribute.type in (kind.INTS, kind.FLOATS, kind.STRINGS):
        empty = not (attribute.ints or attribute.floats or attribute.strings)
        return empty or any(_not_text(s) for s in attribute.strings)
    return attribute.type == kind.STRING and _not_text(attribute.s)


def _not_text(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return True
    return False


# ---- writing -----------------------------------------------------------------------------------------------------


def _restore(graph: gs.Graph, proto: onnx.GraphProto, outer: set[str]) -> None:
    """Puts back on an exported graph what gs dropped, and takes out what it repeated from the graphs around it."""
    own = {tensor.name for node in graph.nodes for tensor in node.outputs} | {t.name for t in graph.inputs}
    constants = {t.name for t in proto.initializer}
    for name in ("initializer", "sparse_initializer"):
        kept = [t for t in getattr(proto, name) if _tensor_name(t) not in outer]
        proto.ClearField(name)
        getattr(proto, name).extend(kept)
    tensors = graph.tensors()
    proto.ClearField("value_info")
    outputs = {t.name for t in graph.outputs} | {t.name for t in graph.inputs}
    proto.value_info.extend(
        info for name, t in tensors.items() if name in own and name not in outputs and (info := _carried_info(t))
    )
    for values, sources in ((proto.input, graph.inputs), (proto.output, graph.outputs)):
        for value, tensor in zip(values, sources, strict=True):
            if info := _carried_info(tensor):
                value.CopyFrom(info)
    for node, target in zip(graph.nodes, proto.node, strict=True):
        if carried := vars(node).get("carried"):
            target.MergeFrom(carried)
        bodies = {a.name: a.g for a in target.attribute if a.type == onnx.AttributeProto.GRAPH}
        for name, value in node.attrs.items():
            if isinstance(value, gs.Graph):
                _restore(value, bodies[name], outer | constants)


def _restore_header(graph: gs.Graph, model: onnx.ModelProto, carried: Carried) -> None:
    imports = list(model.opset_import)
    ir_version = model.ir_version
    model.MergeFrom(_without(carried.header, "opset_import", "ir_version", "producer_name", "producer_version"))
    model.producer_name, model.producer_version = carried.header.producer_name, carried.header.producer_version
    model.ir_version = max(ir_version, carried.header.ir_version)
    del model.opset_import[:]
    model.opset_import.extend(imports)
    model.graph.metadata_props.extend(carried.graph.metadata_props)
    alive = set(graph.tensors())
    model.graph.quantization_annotation.extend(
        a for a in carried.graph.quantization_annotation if a.tensor_name in alive
    )
    model.graph.initializer.extend(carried.defaults)


def _carried_info(tensor: gs.Tensor) -> onnx.ValueInfoProto | None:
    """The type an input file gave a tensor, while it still holds."""
    if "carried" not in vars(tensor):
        return None
    info, dtype, shape = tensor.carried
    now = tuple(tensor.shape) if tensor.shape is not None else None
    return info if isinstance(tensor, gs.Constant) or (dtype, shape) == (tensor.dtype, now) else None


def _opset_imports(graph: gs.Graph) -> list[onnx.OperatorSetIdProto]:
    imports = {o.domain: o.version for o in graph.import_domains or []}
    imports["" if "ai.onnx" not in imports else "ai.onnx"] = graph.opset
    for part in all_graphs(graph):
        for node in part.nodes:
            if (node.domain or "") not in imports and node.domain != "ai.onnx":
                imports[node.domain or ""] = 1
    return [onnx.helper.make_opsetid(domain, version) for domain, version in imports.items()]


def _set_opset(header: onnx.ModelProto, opset: int) -> None:
    for entry in header.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = opset


def _stub(tensor: gs.Constant) -> onnx.TensorProto:
    values = tensor._values
    if isinstance(values, MappedValues):
        return onnx.TensorProto(name=tensor.name, data_type=values.tensor.data_type, dims=values.tensor.dims)
    data_type = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
    return onnx.TensorProto(name=tensor.name, data_type=data_type, dims=values.shape)


def _refer(proto: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    proto.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        proto.external_data.add(key=key, value=value)


def _data_names(path: Path) -> Iterator[Path]:
    yield path.with_name(path.name + ".data")
    number = 0
    while True:
        number += 1
        yield path.with_name(f"{path.name}.{number}.data")


def _old_data(path: Path) -> list[Path]:
    """The data files that the model now at ``path`` refers to and that carry a name this module gives."""
    try:
        model = _read(path)
    except ModelError:
        return []
    names = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
    ours = (path.with_name(n) for n in names if n.startswith(path.name + ".") and n.endswith(".data"))
    return [p for p in ours if p.parent == path.parent]


def _pad(file: IO[bytes], size: int) -> None:
    if size >= SPILL_LIMIT and file.tell() % _PAGE:
        file.write(b"\0" * (_PAGE - file.tell() % _PAGE))


def _is_large(values: np.ndarray) -> bool:
    return values.nbytes >= wire.INLINE_LIMIT and values.dtype != object


def _bits(data_type: int) -> int:
    name = onnx.TensorProto.DataType.Name(data_type)
    for suffix, bits in (("INT4", 4), ("INT2", 2), ("FLOAT4E2M1", 4)):
        if name.endswith(suffix):
            return bits
    return onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize * 8


def _tensor_name(proto: onnx.TensorProto | onnx.SparseTensorProto) -> str:
    return proto.values.name if isinstance(proto, onnx.SparseTensorProto) else proto.name


def _copy(proto: Any) -> Any:
    out = type(proto)()
    out.CopyFrom(proto)
    return out


def _without(proto: Any, *fields: str) -> Any:
    """A copy of a message that leaves some fields out, without copying them first."""
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
