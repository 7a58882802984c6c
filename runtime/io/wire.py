"""ONNX files as bytes: large tensors are found where they lie in the file, and written without passing through memory.

An ONNX file is one protobuf message. Parsing it whole copies every weight at least twice; a file of 2 GB or more cannot
be parsed at all. ``skeleton`` walks the length-prefixed fields of the wire format instead and replaces the bytes of
every large tensor by a reference (file, offset, length) in ONNX's own form of external data, so that weights inside and
beside the file are alike. ``write_inline`` is the inverse of ``skeleton``.

Wire format: https://protobuf.dev/programming-guides/encoding; field numbers: onnx.proto.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from typing import IO

import numpy as np
import onnx

INLINE_LIMIT = 1024  # bytes; smaller tensors are parsed with the rest of the message
_DEPTH_LIMIT = 100  # nested messages; protobuf's own parsers stop there too

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FLOAT_DATA, _RAW_DATA, _DOUBLE_DATA, _EXTERNAL_DATA, _DATA_LOCATION = 4, 9, 10, 13, 14
_VALUES = (_FLOAT_DATA, _RAW_DATA, _DOUBLE_DATA)  # packed floats are stored as raw_data stores them
_TENSOR: dict = {}
_GRAPH: dict = {5: _TENSOR}
_ATTRIBUTE = {5: _TENSOR, 6: _GRAPH}
_GRAPH[1] = {5: _ATTRIBUTE}
_MODEL = {7: _GRAPH}
_INITIALIZERS = {7: {5: _TENSOR}}

Buffer = bytes | mmap.mmap


class WireError(ValueError):
    """The bytes are not a protobuf message, or end too early."""


def skeleton(data: Buffer, location: str, inner: bool = True) -> bytes:
    """The ModelProto in ``data`` with the bytes of large tensors replaced by references into the file ``location``.

    ``inner=False`` replaces those of the graph's initializers alone, not of attributes. Raises WireError.
    """
    message = _MODEL if inner else _INITIALIZERS
    return b"".join(_rewrite(data, 0, len(data), message, location, _DEPTH_LIMIT))


def write_inline(
    model: onnx.ModelProto, weights: Iterable[tuple[onnx.TensorProto, np.ndarray]], file: IO[bytes]
) -> None:
    """Streams ``model`` with more initializers: (name, type and dims; values in the form of ``raw_data``)."""
    graph = model.graph.SerializeToString()
    rest = onnx.ModelProto()
    rest.CopyFrom(model)
    rest.ClearField("graph")
    parts: list[tuple[bytes, np.ndarray]] = []
    for proto, values in weights:
        head = proto.SerializeToString()
        tail = _key(_RAW_DATA, _BYTES) + _varint(values.nbytes)
        parts.append((_key(5, _BYTES) + _varint(len(head) + len(tail) + values.nbytes) + head + tail, values))
    size = len(graph) + sum(len(head) + values.nbytes for head, values in parts)
    file.write(rest.SerializeToString() + _key(7, _BYTES) + _varint(size) + graph)
    for head, values in parts:
        file.write(head)
        write_array(values, file)


def write_array(values: np.ndarray, file: IO[bytes], chunk: int = 1 << 24) -> None:
    """Writes the bytes of an array piece by piece, so that a memory-mapped array is never whole in memory."""
    flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    for start in range(0, flat.size, chunk):
        file.write(flat[start : start + chunk].data)


def _rewrite(data: Buffer, start: int, end: int, message: dict, location: str, depth: int) -> Iterator[bytes]:
    if depth == 0:
        raise WireError(f"messages are nested more than {_DEPTH_LIMIT} deep at byte {start}")
    copied, references = start, b""
    for number, kind, key, begin, stop in _fields(data, start, end):
        if kind != _BYTES or stop - begin < INLINE_LIMIT:
            continue
        if message is _TENSOR:
            if number in _VALUES:
                yield data[copied:key]
                references += _reference(location, begin, stop - begin)
                copied = stop
        elif number in message:
            yield data[copied:key]
            inner = b"".join(_rewrite(data, begin, stop, message[number], location, depth - 1))
            yield _key(number, _BYTES) + _varint(len(inner)) + inner
            copied = stop
    yield data[copied:end]
    yield references  # last, because the last of equal fields wins


def _fields(data: Buffer, start: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
    """(field number, wire type, start of the key, start and end of the payload) of each field of a message."""
    at = start
    while at < end:
        key_start = at
        key, at = _read_varint(data, at, end)
        number, kind = key >> 3, key & 7
        if kind == _BYTES:
            length, at = _read_varint(data, at, end)
            stop = at + length
        elif kind == _VARINT:
            _, stop = _read_varint(data, at, end)
        elif kind in (_FIXED64, _FIXED32):
            stop = at + (8 if kind == _FIXED64 else 4)
        else:
            raise WireError(f"unknown wire type {kind} at byte {key_start}")
        if number == 0:
            raise WireError(f"field number 0 at byte {key_start}")
        if stop > end:
            raise WireError(f"a field needs bytes up to {stop}, but its message ends at {end}")
        yield number, kind, key_start, at, stop
        at = stop


def _read_varint(data: Buffer, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise WireError(f"an integer does not end at byte {at}")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _key(number: int, kind: int) -> bytes:
    return _varint(number << 3 | kind)


def _reference(location: str, offset: int, length: int) -> bytes:
    out = b""
    for name, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        entry = onnx.StringStringEntryProto(key=name, value=value).SerializeToString()
        out += _key(_EXTERNAL_DATA, _BYTES) + _varint(len(entry)) + entry
    return out + _key(_DATA_LOCATION, _VARINT) + _varint(onnx.TensorProto.EXTERNAL)
