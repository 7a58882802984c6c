"""The account of the weight bytes of a model: by operator, by part of the model, and by type.

A *weight* is a constant of floating point numbers, or of integer codes of such numbers. The bytes of a code are counted
in the floating point type of the computation, so that quantization moves bytes from one row to another and the sum
stays. A constant counts for the first operator that does more than move, convert or dequantize the constant.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from channelfold.passes.layers.expansion import codes_behind
from channelfold.passes.operators import operator
from channelfold.runtime.io import edit
from channelfold.runtime.io.bodies import Body, bodies, located
from channelfold.runtime.io.convert import carried

MAIN = "main graph"
FLOAT = "float"
VECTOR = "biases, norms and scales stay float"
EXPANDED = "for a float product, expanded when the file is loaded"
_THROUGH = ("DequantizeLinear", "Transpose", "Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze")
_INTEGER = (  # parts of the names of operators on integer codes
    "Integer", "QLinear", "NBits", "QAttention", "QGemm", "BlockQuantized", "QMoE", "QOrdered", "QEmbed", "BnbQ",
    "DynamicQuantize",
)  # fmt: skip


@dataclass
class Row:
    """``bytes`` of ``tensors`` weights in one ``place``, read by one ``op``, in one ``state``, for one ``reason``.

    ``state`` is "float" or the type of the codes, and ``reason`` says why the weights, or what is made of their codes,
    are float. ``largest`` is the name of the largest weight, and ``most`` its bytes.
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

    ``reasons`` says why nodes stay float, by the name of the node, which ``located`` gives for nodes in bodies. None
    where nothing is quantized yet.
    """
    rows: dict[tuple[str, ...], Row] = {}

    def add(place: str, op: str, state: str, reason: str, name: str, size: int) -> None:
        rows.setdefault((place, op, state, reason), Row(place, op, state, reason)).add(name, size)

    readers: dict[int, tuple[gs.Constant, list[tuple[str, gs.Node]]]] = {}
    for place, part in _places(bodies(graph), MAIN, graph):
        for node in part.nodes:
            for tensor in node.inputs:
                if isinstance(tensor, gs.Constant):
                    readers.setdefault(id(tensor), (tensor, []))[1].append((place, node))
    for tensor, found in readers.values():
        place, node = min(found, key=lambda reader: _rank(_reader(reader[1], tensor)[0]))
        if state := _state(place, node, tensor, reasons):
            reader, kind, reason, width = state
            add(place, reader, kind, reason, tensor.name, math.prod(tensor.shape) * width)
    own = carried(graph)
    held = [(MAIN, "graph input", "may be overridden", t.name, t) for t in (own.graph.initializer if own else ())]
    for function in own.header.functions if own else ():
        where = f"function {function.name}"
        held += [(where, "", "inside a local function", name, tensor) for name, tensor in _constants_of(function)]
    for place, op, reason, name, proto in held:
        kind = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(proto.data_type))
        if edit.is_float_type(kind):
            add(place, op, FLOAT, reason, name, math.prod(proto.dims) * kind.itemsize)
    return sorted(rows.values(), key=lambda row: -row.bytes)


ASKED = ("excluded by", "not included", "int8 changes its outputs most")  # beginnings of the reasons that users give
WARNED = 0.05  # a greater share of float bytes causes a warning


def to_json(rows: Sequence[Row]) -> dict[str, Any]:
    """The ``weights`` of a report record: {share, bytes, rows: [the fields of a Row]}."""
    keys = ("place", "op", "state", "reason", "bytes", "tensors", "largest")
    entries = [{key: getattr(row, key) for key in keys} for row in rows]
    return {"share": share(rows), "bytes": sum(row.bytes for row in rows), "rows": entries}


def unasked(rows: Sequence[Row]) -> str:
    """A sentence about the bytes that stay float unasked, with the largest rows; "" for a small share."""
    counted = [row for row in rows if row.reason != VECTOR]
    left = [row for row in counted if row.state == FLOAT and not row.reason.startswith(ASKED)]
    part = sum(row.bytes for row in left) / max(1, sum(row.bytes for row in counted))
    if part <= WARNED:
        return ""
    more = f" and {len(left) - 3} more" if len(left) > 3 else ""
    return f"{part:.0%} of the weight bytes stay float: {', '.join(map(_told, left[:3]))}{more}"


def _told(row: Row) -> str:
    size = f"{row.bytes / 1e6:.1f} MB" if row.bytes >= 1e6 else f"{row.bytes / 1e3:.1f} kB"
    where = f" such as {row.largest}" if row.place == MAIN else f" in the {row.place}"
    return f"{size} read by {row.op}{where} ({row.reason})"


def share(rows: Sequence[Row]) -> float:
    """The share of the bytes that are not float, without vectors; 1.0 where there are no bytes."""
    counted = [row for row in rows if row.reason != VECTOR]
    total = sum(row.bytes for row in counted)
    return sum(row.bytes for row in counted if row.state != FLOAT) / total if total else 1.0


def _places(inside: Sequence[Body], place: str, graph: gs.Graph) -> Iterator[tuple[str, gs.Graph]]:
    yield place, graph
    for body in inside:
        where = body.place if place == MAIN else located(body.place, place)
        yield from _places(body.bodies(), where, body.graph)


def _state(
    place: str, node: gs.Node, tensor: gs.Constant, reasons: Mapping[str, str] | None
) -> tuple[str, str, str, int] | None:
    """(operator, state, reason, bytes of an element) of a constant that a node reads; None where it is no weight."""
    dtype = np.dtype(tensor.dtype) if tensor.dtype is not None else np.dtype(object)
    reader, scale = _reader(node, tensor)
    if _is_code(node, tensor):
        width = (scale.itemsize if scale is not None else 4) * 8 // int(node.attrs.get("bits", 8))  # several to a byte
        return reader.op, dtype.name, EXPANDED if codes_behind(node) is tensor else "", width
    with_codes = node.op in ("DequantizeLinear", "QuantizeLinear") or any(part in node.op for part in _INTEGER)
    with_codes |= codes_behind(node) is not None
    if not edit.is_float_type(dtype) or with_codes:
        return None  # a scale comes with its codes
    unknown = "" if reasons is None else f"no weight of {reader.op} is quantized"
    reason = (reasons or {}).get(reader.name if place == MAIN else located(reader.name, place), unknown)
    vector = math.prod(tensor.shape) == max(tensor.shape, default=1)
    vector |= operator(reader).kind == "recurrent" and len(tensor.shape) == 2  # a bias for each direction
    return reader.op, FLOAT, VECTOR if vector else reason, dtype.itemsize


def _reader(node: gs.Node, tensor: gs.Tensor) -> tuple[gs.Node, np.dtype | None]:
    """(the operator that uses a constant, the type that the constant is dequantized to on the way)."""
    scale = None
    for _ in range(len(_THROUGH)):
        through = node.op in _THROUGH or codes_behind(node) is not None
        if not through or not edit.is_standard(node) or node.inputs[0] is not tensor:
            break
        if node.op == "Cast" and codes_behind(node) is not None:
            scale = edit.dtype(node.outputs[0])
        if node.op == "DequantizeLinear" and edit.dtype(node.inputs[1]) is not None:
            scale = edit.dtype(node.inputs[1])
        readers = edit.consumers(node.outputs[0])
        if not readers:
            break
        node, tensor = readers[0], node.outputs[0]
    return node, scale


def _rank(reader: gs.Node) -> int:
    """A constant counts for the reader of the lowest rank."""
    return 2 if operator(reader).asks_shape else int(not operator(reader).weighted)


def _is_code(node: gs.Node, tensor: gs.Constant) -> bool:
    """Whether a constant of integers stands for floating point numbers."""
    if edit.is_standard(node) and node.op == "DequantizeLinear":
        return node.inputs[0] is tensor
    if codes_behind(node) is tensor:
        return True
    known = any(part in node.op for part in _INTEGER) or operator(node).kind == "gather"
    least = 2 if node.op == "DynamicQuantizeLSTM" else 1  # its zero points are matrices
    return known and len(tensor.shape) > least and np.dtype(tensor.dtype).itemsize == 1


def _constants_of(function: onnx.FunctionProto) -> Iterator[tuple[str, Any]]:
    for node in function.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield node.output[0], attribute.t
