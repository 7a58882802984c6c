"""Load and save: weights memory-mapped in, streamed out, the file replaced in one step.

``load`` reads the ONNX file as a skeleton (see ``wire``): every large weight stays in its file as a place there and is
mapped when a pass looks at it (see ``weights``). What GraphSurgeon cannot represent is carried beside the graph
(see ``convert``).

``save`` streams the weights from wherever they lie. The result is written beside the target and renamed, so a killed
process leaves the old file or the new one, never a part.
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import mmap
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from channelfold.runtime.errors import ModelError, OutputError, VerificationError, nearest_path
from channelfold.runtime.io import limits, temporary, wire
from channelfold.runtime.io import weights as _weights
from channelfold.runtime.io.convert import (
    Carried,
    all_graphs,
    carried,
    export,
    export_skeleton,
    import_model,
    tensor_type,
)
from channelfold.runtime.io.names import reads
from channelfold.runtime.io.opset import raise_opset
from channelfold.runtime.io.session import Session
from channelfold.runtime.io.validate import validate
from channelfold.runtime.io.weights import SPILL_LIMIT, MappedFile, MappedValues, Scratch, packed, read

__all__ = [
    "Carried", "MappedValues", "all_graphs", "carried", "check", "constant", "drop_stale_shapes", "export",
    "free_name", "import_model", "infer_shapes", "is_known", "load", "open_model", "packed", "raise_opset", "read",
    "remove_leftovers", "save", "saving", "session", "stored", "weightless", "writing",
]  # fmt: skip

EXTERNAL_LIMIT = 1_800_000_000  # bytes above which a file gets external data
PROTOBUF_LIMIT = 2_000_000_000  # bytes; protobuf ends at 2 GiB
_PAGE = mmap.ALLOCATIONGRANULARITY


def load(path: str | os.PathLike[str], *, strict: bool = False) -> gs.Graph:
    """The graph of an ONNX file of any size; its large weights stay on disk. ``strict``: see ``validate``.

    Raises ModelError for a file that is missing, truncated or not ONNX, and for external data that are missing, too
    short, or lie outside the model's folder.
    """
    path = Path(path)
    model, file = read_skeleton(path)
    if strict:
        validate(model, path)
    return import_model(model, path, file)


def read_skeleton(path: Path) -> tuple[onnx.ModelProto, MappedFile]:
    try:
        if path.exists() and not path.is_file():
            raise ModelError(f"{path} is not a file", "Give the path of an .onnx file.")
        file = MappedFile(path)
        if not file.data:
            raise ModelError(f"{path} is empty", "Export the model again.")
        if path.suffix in (".pt", ".pth", ".ckpt", ".safetensors", ".h5", ".keras", ".pb", ".tflite"):
            raise ModelError(f"{path} is not ONNX", "Export the network first, for example with torch.onnx.export.")
        if file.data[:24] == b"version https://git-lfs.":
            raise ModelError(f"{path} is a Git LFS pointer, not the model", "Run: git lfs pull")
        return onnx.ModelProto.FromString(wire.skeleton(file.data, _weights.OWN_FILE)), file
    except FileNotFoundError:
        hint = nearest_path(path)
        hint = hint if hint.startswith("Did") else "Check the path of the model."
        raise ModelError(f"{path} does not exist", hint) from None
    except OSError as error:
        reason = error.strerror or error
        raise ModelError(f"{path} cannot be read ({reason})", "Give the path of an .onnx file.") from None
    except ModelError:
        raise
    except Exception as error:  # protobuf's DecodeError has no public base of its own
        raise ModelError(
            f"{path} is truncated or not an ONNX file ({error})", "Export or download it again and compare its size."
        ) from None


def save(graph: gs.Graph, path: str | os.PathLike[str], *, external: bool | None = None) -> None:
    """Writes ``graph`` to ``path``.

    ``external``: whether the weights go into a file beside the model (``NAME.data``); by default from 1.8 GB on.
    Raises OutputError when a file cannot be written; the folder is then as it was before.
    """
    with saving(graph, path, external):
        pass


@contextlib.contextmanager
def saving(graph: gs.Graph, path: str | os.PathLike[str], external: bool | None = None) -> Iterator[Path]:
    """Writes ``graph`` beside ``path``. The file replaces ``path`` when the context ends without an error.

    The context holds no reference to the graph.
    """
    given, path = path, _target(path)
    model, large = export_skeleton(graph)
    size = sum(_weights.packed_nbytes(proto) for proto, _ in large)
    size += model.ByteSize()
    if external is None:
        external = size > EXTERNAL_LIMIT
    if not external and size > PROTOBUF_LIMIT:
        raise OutputError(f"Cannot write {path}: {size} bytes are too many for one file", "Let it have external data.")
    streamed = ((proto, packed(c._values)) for proto, c in large)
    with contextlib.ExitStack() as marks, contextlib.ExitStack() as undo:
        with writing(given) as file:
            if external:
                _write_data(model, streamed, path, marks, undo)
                file.write(model.SerializeToString())
            else:
                wire.write_inline(model, streamed, file)
            file.flush()
            del graph, model, large, streamed
            yield Path(file.name)
            stale = _old_data(path)
            for old in stale:
                with contextlib.suppress(OSError):  # where it cannot be marked, only a kill can leave it behind
                    os.link(old, _marked(path, marks))
        undo.pop_all()
        for old in stale:
            old.unlink(missing_ok=True)


def _marked(path: Path, marks: contextlib.ExitStack) -> Path:
    """A temporary name for a file of weights: a file that has one, and that no model reads, is from a killed run."""
    mark = temporary.beside(path)
    marks.callback(mark.unlink, missing_ok=True)
    return mark


def _target(path: str | os.PathLike[str]) -> Path:
    """The file that a path leads to. A link stays, and the file behind the link is replaced."""
    with contextlib.suppress(OSError):  # a name too long, of which writing will tell
        if Path(path).is_symlink():
            return Path(path).resolve()
    return Path(path)


def _write_data(
    model: onnx.ModelProto,
    weights: Iterator[tuple[onnx.TensorProto, np.ndarray]],
    path: Path,
    marks: contextlib.ExitStack,
    undo: contextlib.ExitStack,
) -> None:
    """Writes the weights to a new file beside ``path``, to which the model then refers. ``undo`` removes the file."""
    if not _is_text(path.name):
        raise OutputError(f"Cannot write {path}: ONNX cannot refer to {path.name!r}", "Give another output path.")
    mark = _marked(path, marks)
    with mark.open("xb") as file:
        temporary.hold(file.fileno())
        name = _named_data(mark, path)
        undo.callback(path.with_name(name).unlink, missing_ok=True)
        for proto, values in weights:
            if values.nbytes >= SPILL_LIMIT:  # on a page of its own, a weight can be mapped where it lies
                file.write(b"\0" * (-file.tell() % _PAGE))
            _refer(proto, name, file.tell(), values.nbytes)
            wire.write_array(values, file)
            model.graph.initializer.append(proto)
        file.flush()
        os.fsync(file.fileno())


def _named_data(mark: Path, path: Path) -> str:
    """Gives the file ``mark`` the first free name for weights of the model ``path``."""
    for number in itertools.count():
        name = f"{path.name}.{number}.data" if number else f"{path.name}.data"
        try:
            os.link(mark, path.with_name(name))
        except FileExistsError:
            continue
        except OSError:  # a file system without links
            if path.with_name(name).exists():
                continue
            mark.rename(path.with_name(name))
        return name
    raise AssertionError


def _refer(proto: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    proto.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        proto.external_data.add(key=key, value=value)


def _old_data(path: Path) -> list[Path]:
    """The data files of the model at ``path``, as far as their names are those that ``save`` gives."""
    ours = re.compile(re.escape(path.name) + r"(\.\d+)?\.data")
    files = {file.name: file for file in path.parent.iterdir() if ours.fullmatch(file.name)}
    if not files:
        return []
    with contextlib.suppress(ModelError):
        return [files[name] for name in locations(path) & set(files)]
    return []


def locations(path: Path) -> set[str]:
    """The names of the files beside a model that hold its weights. Raises ModelError where there is no model."""
    model, _ = read_skeleton(path)
    named = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
    return named - {_weights.OWN_FILE}


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Opens a temporary file beside ``path``. The file replaces ``path`` at the end, and is removed on an error.

    Raises OutputError for anything the file system refuses.
    """
    given, path = Path(path), _target(path)
    new = temporary.beside(path)
    remove_leftovers(path.parent)
    try:
        if path != given and Path("/dev") in (given.absolute().parent, path.parent):
            raise OutputError(f"Cannot write {given}: it is a device", "Give the path of a file.")
        if path.exists() and not path.is_file():
            what = "a folder" if path.is_dir() else "not a regular file"
            raise OutputError(f"Cannot write {path}: it is {what}", "Give the path of a file.")
        with new.open("wb") as file:
            temporary.hold(file.fileno())
            yield file
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, new)
        new.replace(path)
    except OSError as error:
        hint = "Give another output path."
        if error.errno == errno.ENOSPC:
            hint = "Free some space, or give a path on another disk."
        elif not path.parent.is_dir():
            hint = f"Create the folder {path.parent} first."
        raise OutputError(f"Cannot write {path} ({error.strerror or error})", hint) from error
    finally:
        with contextlib.suppress(OSError):
            new.unlink()


def remove_leftovers(folder: Path) -> None:
    """Removes the unfinished files of processes that were killed, and files of weights that no model came to read."""
    with contextlib.suppress(OSError):
        for file in temporary.abandoned(folder):
            if file.stat().st_nlink > 1:
                for other in folder.glob("*.data"):
                    if other.samefile(file) and not _is_read(other):
                        other.unlink()
            file.unlink(missing_ok=True)


def _is_read(data: Path) -> bool:
    """Whether the model reads the file of weights, to go by the name that ``save`` gave the file."""
    name = data.name.removesuffix(".data")
    for model in {data.with_name(name), data.with_name(re.sub(r"\.\d+$", "", name))}:
        if model.exists():
            try:
                if data.name in locations(model):
                    return True
            except ModelError:
                return True
    return False


def constant(graph: gs.Graph, name: str, values: np.ndarray) -> gs.Constant:
    """A new constant under a free name made from ``name``. Large values go to a scratch file, not to memory."""
    return gs.Constant(free_name(graph, name), stored(graph, values, name))


def stored(graph: gs.Graph, values: np.ndarray, name: str = "") -> np.ndarray | MappedValues:
    """The values as a constant should hold them: large values lie in a scratch file.

    Raises OutputError when the disk is full.
    """
    values = np.asarray(values)
    own = carried(graph)
    if own is None or values.nbytes < SPILL_LIMIT or values.dtype == object:
        return values
    own.scratch = own.scratch or Scratch()
    return _weights.stored(own.scratch, values, name)


def free_name(graph: gs.Graph, name: str) -> str:
    """A name that no tensor or node of the graph and its subgraphs has: ``name``, or ``name_1``, ``name_2`` …"""
    taken = taken_names(graph)
    free, number = name, 0
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    taken.add(free)
    return free


def taken_names(graph: gs.Graph) -> set[str]:
    """The names of the tensors and nodes of a graph and its subgraphs; ``free_name`` adds those that it gives."""
    taken: set[str] | None = vars(graph).get("_names")
    if taken is None:
        taken = {t for g in all_graphs(graph) for t in (*g.tensors(), *(node.name for node in g.nodes))}
        vars(graph)["_names"] = taken
    return taken


def weightless(graph: gs.Graph) -> onnx.ModelProto:
    """The model with its large weights turned into inputs of the same type and shape."""
    model, large = export_skeleton(graph)
    for proto, _ in large:
        model.graph.input.append(onnx.helper.make_tensor_value_info(proto.name, proto.data_type, list(proto.dims)))
    return model


def check(graph: gs.Graph) -> None:
    """Runs the ONNX checker; raises VerificationError with its message. Large weights take part by type and shape."""
    try:
        onnx.checker.check_model(weightless(graph))
    except onnx.checker.ValidationError as error:
        reason = " ".join(str(error).split())[:400]
        raise VerificationError(f"The graph is no longer valid ONNX: {reason}") from None


def infer_shapes(graph: gs.Graph) -> None:
    """Fills in the shapes and dtypes of variables as far as ONNX shape inference knows them.

    The declared shapes of the graph's outputs stay. A size for which inference invents a name is None, because the next
    inference may give the same name to another size.
    """
    found = inferred(weightless(graph))
    known = {value.name: value.type for value in (*found.value_info, *found.output)}
    declared = {id(tensor) for tensor in graph.outputs if tensor.shape is not None}
    for name, tensor in graph.tensors().items():
        if name in known and isinstance(tensor, gs.Variable) and known[name].HasField("tensor_type"):
            dtype, shape = tensor_type(known[name].tensor_type)
            tensor.dtype = dtype if tensor.dtype is None else tensor.dtype
            if shape is not None and id(tensor) not in declared:
                tensor.shape = [None if isinstance(d, str) and d.startswith("unk__") else d for d in shape]


def inferred(model: onnx.ModelProto, anew: bool = False) -> onnx.GraphProto:
    """The graph of a model after ONNX shape inference; an empty graph where inference fails.

    ``anew`` has ``model`` first forget the shapes that the file declares behind its inputs.
    """
    if anew:
        del model.graph.value_info[:]
        for value in model.graph.output:
            if value.type.HasField("tensor_type"):
                value.type.tensor_type.ClearField("shape")
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=limits.can_propagate(model.graph)).graph
    except Exception:  # an operator that inference chokes on leaves shapes unknown, which every pass copes with
        return onnx.GraphProto()


def drop_stale_shapes(graph: gs.Graph) -> str:
    """Forgets the shapes inside the graph where the file's value_info contradicts the shapes of the inputs.

    Tools that edit the inputs of a model, most often to open the batch, leave the old sizes in value_info. Returns one
    contradiction in words, or an empty text.
    """
    model = weightless(graph)
    declared = {
        v.name: tensor_type(v.type.tensor_type)[1] for v in model.graph.value_info if v.type.HasField("tensor_type")
    }
    if not declared:
        return ""
    open_sizes = {dim for tensor in graph.inputs for dim in tensor.shape or () if isinstance(dim, str)}
    found = ""
    for value in inferred(model, anew=True).value_info:
        old, new = declared.get(value.name), tensor_type(value.type.tensor_type)[1]
        if old is None or new is None:
            continue
        pairs = list(zip(old, new, strict=False))
        if len(old) != len(new) or any(
            isinstance(a, int) and a != b and (isinstance(b, int) or b in open_sizes) for a, b in pairs
        ):
            found = f"{value.name!r} is {old} in value_info and {new} by the inputs"
            break
    if found:
        outputs = {id(tensor) for tensor in graph.outputs}
        for tensor in graph.tensors().values():
            if isinstance(tensor, gs.Variable) and tensor.inputs and id(tensor) not in outputs:
                tensor.shape = None
    return found


def session(graph: gs.Graph, outputs: list[str] | None = None, **options: Any) -> Session:
    """An ONNX Runtime session on a graph. ``outputs`` names any tensors of the graph. Weights in files stay there."""
    return open_model(*export(graph), outputs, **options)


def open_model(
    model: onnx.ModelProto,
    weights: list[tuple[onnx.TensorProto, np.ndarray]],
    outputs: Sequence[str] | None = None,
    *,
    whole: bool = False,
    **options: Any,
) -> Session:
    """A session on what ``export`` gave, possibly with more nodes. ``outputs`` names any tensors of the main graph.

    Nodes that no output depends on are left out, among them operators that ONNX Runtime does not know (TensorRT
    plugins), unless ``whole`` keeps every node. Large weights that lie in memory alone, or whose file has been
    replaced, are written to disk for the session.
    """
    if outputs is not None:
        types = {value.name: value for value in model.graph.output}
        kept = [types.get(name) or onnx.ValueInfoProto(name=name) for name in outputs]
        del model.graph.output[:]
        model.graph.output.extend(kept)
    if not whole:
        _leave_out_unread(model)
    root = Path(tempfile.gettempdir()).anchor
    scratch, inline = Scratch(), []
    for proto, values in weights:
        file, offset = getattr(values, "place", None) or (None, 0)
        if file is None or not _is_reachable(file, root):
            if values.nbytes < SPILL_LIMIT:
                inline.append((proto, values))
                continue
            file, offset = scratch, _weights.spill(scratch, values)
        _refer(proto, file.path.relative_to(root).as_posix(), offset, values.nbytes)
        model.graph.initializer.append(proto)
    skeleton = io.BytesIO()
    wire.write_inline(model, inline, skeleton)
    size = skeleton.tell() + sum(values.nbytes for _, values in weights)
    return Session(skeleton.getvalue(), folder=root, size=size, **options)


# operators of ONNX Runtime that are in the domain of ONNX
_MISPLACED = ("SimplifiedLayerNormalization", "Affine", "Crop", "DynamicSlice", "ImageScaler", "ParametricSoftplus",
              "ScaledTanh")  # fmt: skip


def is_known(domain: str | None, op: str) -> bool:
    """Whether ONNX or ONNX Runtime defines an operator, and not a vendor or a function of the model."""
    domain = "" if domain in (None, "ai.onnx") else domain
    if domain in ("", "ai.onnx.ml"):
        return onnx.defs.has(op, domain) or op in _MISPLACED
    return domain.startswith(("com.microsoft", "com.ms.", "ai.onnx.", "org.pytorch."))


def _leave_out_unread(model: onnx.ModelProto) -> None:
    nodes = model.graph.node
    writers = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    needed: set[int] = set()
    pending = [value.name for value in model.graph.output]
    while pending:
        index = writers.get(pending.pop())
        if index is not None and index not in needed:
            needed.add(index)
            pending += reads(nodes[index])
    for index in reversed(range(len(nodes))):
        if index not in needed:
            del nodes[index]


def _is_reachable(file: MappedFile | Scratch, root: str) -> bool:
    """Whether ONNX Runtime finds the bytes of a file by its path below ``root``."""
    return file.path.anchor == root and _is_text(str(file.path)) and file.is_at_its_path()


def _is_text(name: str) -> bool:
    """Whether ONNX can refer to a file of this name."""
    return name.encode(errors="ignore").decode() == name
