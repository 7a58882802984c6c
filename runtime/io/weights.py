"""The values of constants: old values are mapped from their file, new values are spilled to disk.

A large weight is a ``MappedValues``, a place in a file, and takes no memory. Files are opened once and stay readable
through their mapping, even when their path is overwritten later.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues

from channelfold.runtime.errors import ModelError, OutputError
from channelfold.runtime.io import temporary, wire

OWN_FILE = ":"  # the location of the model's own file; no other location may have a colon
SPILL_LIMIT = 1 << 20  # bytes; a new weight at least this large goes to disk at once
_PAGE = mmap.ALLOCATIONGRANULARITY

_BROKEN = (ValueError, TypeError, KeyError, OverflowError, MemoryError)  # what numpy and onnx raise for nonsense
_BITS = {"INT2": 2, "UINT2": 2, "INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "FLOAT6E2M3": 6, "FLOAT6E3M2": 6}


Values = np.ndarray | LazyValues  # what a gs.Constant holds


class MappedFile:
    """A file that stays open for reading as long as an object refers to this one. Raises OSError."""

    def __init__(self, path: Path):
        self.path = path.absolute()
        with path.open("rb") as file:
            self._stat = os.fstat(file.fileno())
            # Every mapping holds a file descriptor: exporters that write one file per tensor would use them up.
            small = self._stat.st_size < SPILL_LIMIT
            self.data = file.read() if small else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def is_at_its_path(self) -> bool:
        """Whether the path still leads to these bytes."""
        try:
            now = self.path.stat()
        except OSError:
            return False
        return all(getattr(now, f) == getattr(self._stat, f) for f in ("st_dev", "st_ino", "st_size", "st_mtime_ns"))


class Scratch:
    """A temporary file for new weights. The file is removed with its last weight."""

    def __init__(self):
        self._file = temporary.opened()
        self.path = Path(self._file.name)
        self.data: mmap.mmap | bytes = b""
        self._end = 0
        weakref.finalize(self, _discard, self._file, self.path)

    def append(self, values: np.ndarray) -> int:
        """Writes the bytes of an array on a page of their own and returns their offset. Raises OSError."""
        offset = -(-self._end // _PAGE) * _PAGE
        self._file.seek(offset)
        wire.write_array(values, self._file)
        self._file.flush()
        self._end = offset + values.nbytes
        if self._end > len(self.data):
            # The file grows in doubling, sparse steps, because every mapping holds a file descriptor.
            os.truncate(self.path, 2 * self._end)
            with self.path.open("rb") as file:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return offset

    def is_at_its_path(self) -> bool:
        return self.path.exists()


class PlacedArray(np.ndarray):
    """An array on a file. ``place`` is (file, offset); None for an array that is computed or cut from a PlacedArray."""

    place: tuple[MappedFile | Scratch, int] | None = None


def _discard(file: IO[bytes], path: Path) -> None:
    file.close()
    path.unlink(missing_ok=True)


class MappedValues(LazyValues):
    """The values of a constant in a file: ``nbytes`` bytes from ``offset`` on. ``tensor`` has the type and dims."""

    def __init__(self, proto: onnx.TensorProto, file: MappedFile | Scratch, offset: int):
        self.tensor = onnx.TensorProto(name=proto.name, data_type=proto.data_type, dims=proto.dims)
        self.file = file
        self.offset = offset
        self.shape = tuple(proto.dims)
        self.dtype = onnx.helper.tensor_dtype_to_np_dtype(proto.data_type)
        self.nbytes = packed_nbytes(proto)

    def load(self) -> np.ndarray:
        """A read-only array on the file; for types below 8 bits, of which numpy holds one to a byte, a copy."""
        if bits(self.tensor.data_type) < 8:
            inline = onnx.TensorProto(data_type=self.tensor.data_type, dims=self.shape, raw_data=self.raw().tobytes())
            return onnx.numpy_helper.to_array(inline)
        return self.raw().view(self.dtype).reshape(self.shape)

    def raw(self) -> np.ndarray:
        """The bytes in the file: uint8[nbytes]."""
        return np.frombuffer(self.file.data, np.uint8, self.nbytes, self.offset)


class DataFolder:
    """Finds the values of tensors in a model file and in the files beside it, each opened once.

    ``model`` is the path of the model (None: a model without files), ``own`` the file of the model if already open.
    """

    def __init__(self, model: Path | None, own: MappedFile | None = None):
        self._model = model
        self._files = {OWN_FILE: own} if own is not None else {}

    def values(self, proto: onnx.TensorProto) -> Values:
        """The values of a tensor: large external data mapped, all other values as an array.

        Raises ModelError for values that do not fit the tensor's type and dims, and for external data that are missing,
        too short, or lie outside the model's folder.
        """
        what = f"tensor {proto.name!r}"
        try:
            if any(dim < 0 for dim in proto.dims):
                raise ValueError(f"its dims are {list(proto.dims)}")
            if proto.data_location != onnx.TensorProto.EXTERNAL:
                return _parsed(proto)
            if proto.data_type == onnx.TensorProto.STRING:
                raise ValueError("strings cannot lie in another file")
            if math.prod(proto.dims) == 0:
                return np.zeros(tuple(proto.dims), onnx.helper.tensor_dtype_to_np_dtype(proto.data_type))
            values = self._mapped(proto)
            return values if values.nbytes >= wire.INLINE_LIMIT else np.array(values.load())
        except ModelError:
            raise
        except _BROKEN as error:
            raise ModelError(f"The data of {what} are broken: {error}", "Export the model again.") from None
        except OSError as error:
            raise ModelError(f"The data of {what} cannot be read: {error}", "Check the files of the model.") from None

    def inlined(self, proto: onnx.TensorProto) -> onnx.TensorProto:
        """The same tensor without external data."""
        if proto.data_location != onnx.TensorProto.EXTERNAL:
            return proto
        return tensor_proto(self.values(proto), proto.name)

    def _mapped(self, proto: onnx.TensorProto) -> MappedValues:
        entries = {entry.key: entry.value for entry in proto.external_data}
        file = self._open(entries.get("location", ""), f"External data of tensor {proto.name!r}")
        offset, needed = int(entries.get("offset") or 0), packed_nbytes(proto)
        length = int(entries.get("length") or needed)
        if offset < 0 or length != needed:
            raise ValueError(f"{length} bytes at {offset} are declared, its type and shape need {needed}")
        if offset + length > len(file.data):
            raise ModelError(
                f"External data of tensor {proto.name!r} need bytes {offset} to {offset + length} of {file.path.name}, "
                f"which has {len(file.data)}",
                "The file is truncated: copy or download it again.",
            )
        return MappedValues(proto, file, offset)

    def _open(self, location: str, what: str) -> MappedFile:
        if location in self._files:
            return self._files[location]
        if self._model is None:
            raise ModelError(f"{what} cannot be found: the model has no folder", "Load it from its file.")
        parts = PurePosixPath(location.replace("\\", "/"))
        if not location or parts.is_absolute() or ":" in location or ".." in parts.parts:
            raise ModelError(
                f"{what} point to {location!r}, outside the model's folder", "Only relative paths are allowed."
            )
        folder = self._model.parent.resolve()
        path = folder / parts
        if not path.resolve().is_relative_to(folder):
            raise ModelError(
                f"{what}: the link {location!r} leaves the model's folder", "Put the file itself beside the model."
            )
        if not path.is_file():
            raise ModelError(f"{what} are missing: there is no file {path}", "Put it beside the model.")
        return self._files.setdefault(location, MappedFile(path))


def _parsed(proto: onnx.TensorProto) -> Values:
    if proto.data_type == onnx.TensorProto.STRING and not all(is_text(s) for s in proto.string_data):
        return LazyValues(proto)
    return onnx.numpy_helper.to_array(proto)


def is_text(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def read(constant: gs.Constant) -> np.ndarray:
    """The values of a constant. The constant itself keeps no array: a weight in a file stays in the file."""
    values = constant._values
    if isinstance(values, SparseValues):
        return _dense(values.tensor)
    if isinstance(values, MappedValues):
        return values.load()
    return onnx.numpy_helper.to_array(values.tensor) if isinstance(values, LazyValues) else values


def sparse_values(proto: onnx.SparseTensorProto) -> SparseValues:
    """The values of a sparse initializer. Raises ModelError when they do not fit its dims."""
    try:
        indices, dims = onnx.numpy_helper.to_array(proto.indices), list(proto.dims)
        shape = (len(onnx.numpy_helper.to_array(proto.values)), len(dims))
        limits = math.prod(dims) if indices.ndim == 1 else np.array(dims)
        if indices.shape not in (shape, shape[:1]) or min(dims) < 0 or ((indices < 0) | (indices >= limits)).any():
            raise ValueError(f"its values or their indices do not fit its dims {dims}")
    except _BROKEN as error:
        raise ModelError(
            f"The sparse tensor {proto.values.name!r} is broken: {error}", "Export the model again."
        ) from None
    values = SparseValues(proto)
    values.shape = tuple(dims)
    return values


def _dense(proto: onnx.SparseTensorProto) -> np.ndarray:
    values, indices = onnx.numpy_helper.to_array(proto.values), onnx.numpy_helper.to_array(proto.indices)
    out = np.zeros(tuple(proto.dims), values.dtype)
    if indices.ndim == 1:
        out.reshape(-1)[indices] = values
    else:
        out[tuple(indices.T)] = values
    return out


def is_large(values: Values) -> bool:
    """Whether values stay outside the protobuf message."""
    if isinstance(values, np.ndarray):
        return values.nbytes >= wire.INLINE_LIMIT and values.dtype != object
    return isinstance(values, MappedValues)


def tensor_proto(values: Values, name: str) -> onnx.TensorProto:
    """A TensorProto that holds the values itself."""
    if isinstance(values, np.ndarray):
        return onnx.numpy_helper.from_array(values, name)
    proto = onnx.TensorProto()
    proto.CopyFrom(values.tensor)
    proto.name = name
    if isinstance(values, MappedValues):
        proto.raw_data = values.raw().tobytes()
    return proto


def described(values: Values, name: str) -> onnx.TensorProto:
    """A TensorProto with name, type and dims alone."""
    if isinstance(values, MappedValues):
        return onnx.TensorProto(name=name, data_type=values.tensor.data_type, dims=values.shape)
    return onnx.TensorProto(
        name=name, data_type=onnx.helper.np_dtype_to_tensor_dtype(values.dtype), dims=tuple(values.shape)
    )


def stored(scratch: Scratch, values: np.ndarray, name: str = "") -> MappedValues:
    """Puts values into a scratch file. Raises OutputError where the disk is full."""
    return MappedValues(described(values, name), scratch, spill(scratch, packed(values)))


def out_of_memory(scratch: Scratch, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by name, large arrays as arrays on a scratch file, which goes with the last of them."""
    return {
        name: stored(scratch, one).load()
        if isinstance(one, np.ndarray) and one.dtype != object and one.nbytes >= SPILL_LIMIT
        else one
        for name, one in values.items()
    }


def spill(scratch: Scratch, values: np.ndarray) -> int:
    """Appends the bytes of an array to a scratch file, returns their offset. Raises OutputError: the disk is full."""
    try:
        return scratch.append(values)
    except OSError as error:
        raise OutputError(
            f"No room for new weights in {tempfile.gettempdir()} ({error.strerror})", "Set TMPDIR to a larger disk."
        ) from error


def packed(values: Values) -> np.ndarray:
    """Values as ONNX stores them: little endian, types below 8 bits two or more to a byte (uint8[n]).

    Values in a file come as a PlacedArray.
    """
    if isinstance(values, MappedValues):
        array = values.raw() if bits(values.tensor.data_type) < 8 else values.load()
        array = array.view(PlacedArray)
        array.place = values.file, values.offset
        return array
    assert isinstance(values, np.ndarray)
    if bits(onnx.helper.np_dtype_to_tensor_dtype(values.dtype)) < 8:
        return np.frombuffer(onnx.numpy_helper.from_array(values).raw_data, np.uint8)
    return np.ascontiguousarray(values)


def packed_nbytes(proto: onnx.TensorProto) -> int:
    """The bytes of a tensor of this type and these dims in a file. Raises ValueError or KeyError for unknown types."""
    return (math.prod(proto.dims) * bits(proto.data_type) + 7) // 8


def bits(data_type: int) -> int:
    """The bits of one element of an ONNX data type in a file."""
    name = onnx.TensorProto.DataType.Name(data_type)  # pyright: ignore
    return _BITS.get(name) or onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize * 8
