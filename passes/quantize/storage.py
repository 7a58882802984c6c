"""The weights that float nodes read, stored in 8 bits: a node that stays float need not make the file large.

    W   becomes   Reshape((Cast(q) - 128) s),    a scale for 32 to 64 inputs of an output channel

Both targets expand the weight once, when they load the file (see ``layers/expansion``), so the node costs what it
costs in float. The scales are finer than those of an int8 node, because such a node often reads what 8 bits could not
represent: inputs of which a few are very large multiply the errors of their weights. MiniLM has three such products.
With a scale for a whole output channel its tokens fall from 16.9 to 14.7 dB, with one for 64 inputs to 16.8 dB.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from channelfold.passes.base import Outcome
from channelfold.passes.layers.expansion import LEAST
from channelfold.passes.layers.formats import FLOAT, SCALES, Format, all_finite
from channelfold.passes.operators import operator
from channelfold.passes.quantize import Quantize, QuantizeWeights
from channelfold.passes.quantize.qdq import excluded
from channelfold.passes.quantize.rounders import by_scale, rounded
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import constant, free_name, read

_GROUP = 64  # inputs that share a scale at most, and half of them at least
_MIDDLE = 128  # the code of zero
_NOTED = 0.02  # of the bytes of the constants; PLCMOS has stack traces of 14 %
_CONVOLUTIONS = ("conv", "fused_conv")
_PRODUCTS = ("gemm", "matmul", "fused_gemm", "fused_matmul", "packed_attention")


def store_rest(graph: gs.Graph, outcome: Outcome, step: Quantize | QuantizeWeights) -> None:
    """Stores the float weights that are left once others are quantized, but for those that the options exclude."""
    if not outcome.changed:
        return
    made: list[gs.Node] = []
    outcome.facts["expanded"] = []
    for node in graph.nodes:
        weights = list(_weights(node))  # none that a reader before has stored
        if weights and all(_may_be_stored(node.inputs[index], step) for index in weights):
            for index in weights:
                made += _store(graph, node, index)
            outcome.facts["expanded"].append(node.name)
    graph.nodes[:] = [*made, *graph.nodes]
    if size := _drop_notes(graph):
        outcome.warnings.append(f"What the exporter had noted at the nodes was left out: {size:,} bytes")


def _drop_notes(graph: gs.Graph) -> int:
    """Removes documentation and metadata of nodes where these are a large part of the file; returns their bytes."""
    held = [t for t in graph.tensors().values() if isinstance(t, gs.Constant) and t.dtype is not None]
    weights = sum(math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize for tensor in held)
    size = sum(map(edit.notes, graph.nodes))
    if size <= _NOTED * weights:
        return 0
    for node in graph.nodes:
        edit.drop_notes(node)
    return size


def _store(graph: gs.Graph, node: gs.Node, index: int) -> list[gs.Node]:
    """Lets all readers of the weight at an input of a node read what new nodes expand; returns these."""
    weight = node.inputs[index]
    name, dtype = weight.name, np.dtype(weight.dtype)
    codes, scales = _rounded(np.asarray(read(weight)), node, index)

    def held(what: str, values: np.ndarray) -> gs.Constant:
        return constant(graph, f"{name}_{what}", values)

    steps = [
        ("Cast", _to(FLOAT), []),
        ("Sub", {}, [held("middle", np.array(_MIDDLE, FLOAT))]),
        ("Mul", {}, [held("scales", scales)]),
        *([("Cast", _to(dtype), [])] if dtype != FLOAT else []),
        ("Reshape", {}, [held("shape", np.array(weight.shape, np.int64))]),
    ]
    made, tensor = [], held("codes", codes)
    for op, attrs, others in steps:
        result = gs.Variable(free_name(graph, f"{name}_{op}_output"))
        made.append(gs.Node(op, free_name(graph, f"{name}_{op}"), attrs, [tensor, *others], [result]))
        tensor = result
    tensor.dtype, tensor.shape = dtype, list(weight.shape)
    edit.redirect(weight, tensor)
    return made


def _to(dtype: np.dtype) -> dict[str, int]:
    return {"to": onnx.helper.np_dtype_to_tensor_dtype(dtype)}


def _weights(node: gs.Node) -> Iterator[int]:
    """The inputs of a node that are large float weights."""
    known = operator(node)
    for index in (0,) if known.kind == "gather" else known.weights:
        tensor = node.inputs[index] if edit.has_input(node, index) else gs.Variable.empty()
        large = isinstance(tensor, gs.Constant) and len(tensor.shape) > 1 and math.prod(tensor.shape) >= LEAST
        if large and edit.is_float_type(np.dtype(tensor.dtype)):
            yield index


def _may_be_stored(weight: gs.Constant, step: Quantize | QuantizeWeights) -> bool:
    """Whether a weight is of a type that can be expanded, and each of its readers may read it so."""
    for reader in edit.consumers(weight):
        known = operator(reader)
        place = next(index for index, tensor in enumerate(reader.inputs) if tensor is weight)
        table = known.kind == "gather" and step.embeddings and place == 0
        if excluded(step, reader) or not (table or place in known.weights):
            return False
    return np.dtype(weight.dtype) in SCALES and all_finite(read(weight))


def _rounded(weight: np.ndarray, node: gs.Node, index: int) -> tuple[np.ndarray, np.ndarray]:
    """The codes of a weight, with an axis for the inputs that share a scale, and scales that broadcast to them."""
    kind = operator(node).kind
    inputs_first = kind in _PRODUCTS and index > 0 and not node.attrs.get("transB", 0)
    weight = weight.swapaxes(-1, -2) if inputs_first else weight
    lead = weight.shape[: 1 if kind in _CONVOLUTIONS else -1]
    rows = np.ascontiguousarray(weight).reshape(math.prod(lead), -1)
    width = rows.shape[1]
    format = Format(group=next((size for size in range(_GROUP, _GROUP // 2 - 1, -1) if width % size == 0), width))
    layer = rounded(rows, by_scale(format, FLOAT), format)
    codes = (layer.codes.astype(np.int16) + _MIDDLE).astype(np.uint8).reshape(*lead, layer.scales.shape[1], -1)
    scales = layer.scales.reshape(*lead, -1, 1)
    if inputs_first:
        codes, scales = (np.ascontiguousarray(np.moveaxis(values, -3, -1)) for values in (codes, scales))
    return codes, scales
