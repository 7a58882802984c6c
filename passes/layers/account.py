"""Where the weight bytes of a model are: which operator reads them, in which part of the model, in which type.

A *weight* is a constant of floating point numbers, or of the integer codes that stand for some. Its bytes are counted
as if all of it were stored in the floating point type it is computed in, so that quantizing moves bytes from one row
to another and leaves the sum alone. A constant is read by the first operator behind it that does more than move,
convert or dequantize.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from channelfold.passes.operators import operator
from channelfold.runtime.io import edit
from channelfold.runtime.io.bodies import Body, bodies, located
from channelfold.runtime.io.convert import carried

MAIN = "main graph"
FLOAT = "float"
VECTOR = "biases, norms and scales stay float"
_THROUGH = ("DequantizeLinear", "Transpose", "Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze")
_INTEGER = (
    "Integer",
    "QLinear",
    "NBits",
    "QAttention",
    "QGemm",
    "BlockQuantized",
    "QMoE",
    "QOrdered",
    "QEmbed",
    "BnbQ",
)


@dataclass
class Row:
    """``bytes`` of ``tensors`` weights in one ``place``, read by one ``op``, in one ``state``, for one ``reason``.

    ``state``: float, or the type of the stored codes. ``largest``: the name of the largest of them, and ``most`` its
    bytes. ``reason``: why they are float.
    """

    place: str
    op: str
    state: str
    reason: str
    bytes: int = 0
    tensors: int = 0
    largest: str = ""
    most: int = field(default=0, repr=False)

    def add(self, name: str, size: int) -> None:
        self.bytes += size
        self.tensors += 1
        if size > self.most:
            self.largest, self.most = name, size


def account(graph: gs.Graph, reasons: Mapping[str, str] | None = None) -> list[Row]:
    """The rows of a graph, the largest first.

    ``reasons``: why nodes were left in float, by the name of the node, as ``located`` names nodes in bodies. None where
    nothing is quantized yet.
    """
    rows: dict[tuple[str, str, str, str], Row] = {}
    readers: dict[int, tuple[gs.Constant, list[tuple[str, gs.Node]]]] = {}
    for place, part in _places(bodies(graph), MAIN, graph):
        for node in part.nodes:
            for tensor in node.inputs:
                if isinstance(tensor, gs.Constant):
                    readers.setdefault(id(tensor), (tensor, []))[1].append((place, node))
    for tensor, found in readers.values():
        place, node = min(found, key=lambda reader: _rank(*_reader(reader[1], tensor)))
        _count(rows, place, node, tensor, reasons)
    own = carried(graph)
    for tensor in own.graph.initializer if own else ():
        _add(rows, MAIN, "graph input", tensor.name, _dtype(tensor.data_type), tuple(tensor.dims), "may be overridden")
    for function in own.header.functions if own else ():
        for name, tensor in _constants_of(function):
            where = f"function {function.name}"
            _add(rows, where, "", name, _dtype(tensor.data_type), tuple(tensor.dims), "inside a local function")
    return sorted(rows.values(), key=lambda row: -row.bytes)


ASKED = ("excluded by", "not included", "int8 changes its outputs most")  # how the reasons begin that a user gave
WARNED = 0.05  # share of the bytes that may stay float without a word


def to_json(rows: Sequence[Row]) -> dict[str, Any]:
    """The ``weights`` of a report record: {share, bytes, rows: [the fields of a Row]}."""
    keys = ("place", "op", "state", "reason", "bytes", "tensors", "largest")
    entries = [{key: getattr(row, key) for key in keys} for row in rows]
    return {"share": share(rows), "bytes": sum(row.bytes for row in rows), "rows": entries}


def unasked(rows: Sequence[Row]) -> str:
    """A sentence about the bytes that stay float although nobody asked for it, the largest named; "" for a few."""
    counted = [row for row in rows if row.reason != VECTOR]
    left = [row for row in counted if row.state == FLOAT and not row.reason.startswith(ASKED)]
    part = sum(row.bytes for row in left) / max(1, sum(row.bytes for row in counted))
    if part <= WARNED:
        return ""
    told = ", ".join(f"{_size(row.bytes)} read by {_who(row)} ({row.reason})" for row in left[:3])
    return f"{part:.0%} of the weight bytes stay float: {told}" + (
        f" and {len(left) - 3} more" if len(left) > 3 else ""
    )


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _who(row: Row) -> str:
    return f"{row.op or row.place} such as {row.largest}" if row.place == MAIN else f"{row.op} in the {row.place}"


def share(rows: Sequence[Row]) -> float:
    """The share of the bytes that is not float, 1.0 where there are none; vectors do not count."""
    counted = [row for row in rows if row.reason != VECTOR]
    total = sum(row.bytes for row in counted)
    return sum(row.bytes for row in counted if row.state != FLOAT) / total if total else 1.0


def _places(inside: Sequence[Body], place: str, graph: gs.Graph) -> Iterator[tuple[str, gs.Graph]]:
    yield place, graph
    for body in inside:
        where = body.place if place == MAIN else located(body.place, place)
        yield from _places(body.bodies(), where, body.graph)


def _count(
    rows: dict[tuple[str, str, str, str], Row],
    place: str,
    node: gs.Node,
    tensor: gs.Constant,
    reasons: Mapping[str, str] | None,
) -> None:
    dtype = np.dtype(tensor.dtype) if tensor.dtype is not None else np.dtype(object)
    shape = tuple(tensor.shape)
    reader, scale = _reader(node, tensor)
    if edit.is_float_type(dtype):
        if node.op in ("DequantizeLinear", "QuantizeLinear") or any(part in node.op for part in _INTEGER):
            return  # a scale: it comes with the codes
        reason = (reasons or {}).get(reader.name if place == MAIN else located(reader.name, place), "")
        if math.prod(shape) == max(shape, default=1):
            reason = VECTOR
        elif not reason and place != MAIN:
            reason = f"inside {place.split(' ')[2]}"
        elif not reason and reasons is not None:
            reason = f"no weight of {reader.op} is quantized"
        _add(rows, place, reader.op, tensor.name, dtype, shape, reason)
    elif _is_code(node, tensor):
        width = (scale.itemsize if scale is not None else 4) * 8 // int(node.attrs.get("bits", 8))  # several to a byte
        _add(rows, place, reader.op, tensor.name, dtype, shape, "", width)


def _add(
    rows: dict[tuple[str, str, str, str], Row],
    place: str,
    op: str,
    name: str,
    dtype: np.dtype,
    shape: tuple[int, ...],
    reason: str,
    width: int = 0,
) -> None:
    if not width and not edit.is_float_type(dtype):
        return
    state = dtype.name if width else FLOAT
    row = rows.setdefault((place, op, state, reason), Row(place, op, state, reason))
    row.add(name, math.prod(shape) * (width or dtype.itemsize))


def _reader(node: gs.Node, tensor: gs.Tensor) -> tuple[gs.Node, np.dtype | None]:
    """The operator that uses a constant, and the type that it is dequantized to on the way."""
    scale = None
    for _ in range(len(_THROUGH)):
        if node.op not in _THROUGH or not edit.is_standard(node) or node.inputs[0] is not tensor:
            break
        if node.op == "DequantizeLinear" and edit.dtype(node.inputs[1]) is not None:
            scale = edit.dtype(node.inputs[1])
        readers = edit.consumers(node.outputs[0])
        if not readers:
            break
        node, tensor = readers[0], node.outputs[0]
    return node, scale


def _rank(reader: gs.Node, scale: np.dtype | None) -> int:
    """Of several readers, which one a constant is counted for: the lowest."""
    return 2 if operator(reader).asks_shape else int(not operator(reader).weighted)


def _is_code(node: gs.Node, tensor: gs.Constant) -> bool:
    """Whether a constant of integers stands for floating point numbers."""
    if edit.is_standard(node) and node.op == "DequantizeLinear":
        return node.inputs[0] is tensor
    known = any(part in node.op for part in _INTEGER) or operator(node).kind == "gather"
    return known and len(tensor.shape) > 1 and np.dtype(tensor.dtype).itemsize == 1


def _dtype(kind: int) -> np.dtype:
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind))


def _constants_of(function: onnx.FunctionProto) -> Iterator[tuple[str, Any]]:
    for node in function.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield node.output[0], attribute.t
