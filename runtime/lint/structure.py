"""What breaks a rule, for rules about operators, types, inputs and the file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from channelfold.passes.operators import operator
from channelfold.runtime.engine.build import MAX_OPSET
from channelfold.runtime.engine.repair import squeezes_without_axes
from channelfold.runtime.io import edit
from channelfold.runtime.io.convert import carried
from channelfold.runtime.io.files import drop_stale_shapes, is_known
from channelfold.runtime.lint import Found
from channelfold.runtime.lint.reading import dims, linears, nodes, quantized, weight
from channelfold.runtime.lint.unfuse import FORMS

_MEANINGLESS = ("?", "None", "-1", "unknown", "dynamic")
_BESIDE = {"Where": 1, "Pow": 2}  # operators whose inputs from here on, or up to here, have one type
_INTEGER = ("MatMulInteger", "ConvInteger", "DynamicQuantizeLinear")


def refused_operators(graph: gs.Graph) -> Found:
    for node in nodes(graph):
        if node.op in FORMS or node.op == "QLinearConcat":
            continue
        if edit.is_standard(node) and node.op in _INTEGER:
            yield node.name, node.op
        elif (node.domain or "").startswith("com.microsoft") and operator(node).kind != "quantize":
            yield node.name, f"{node.domain}.{node.op}"


def of_operator(op: str, *, quantized_alone: bool = False, kind: str = "") -> Callable[[gs.Graph], Found]:
    """The nodes of an operator; with ``kind`` those whose data have this type."""

    def find(graph: gs.Graph) -> Found:
        for node in nodes(graph, op):
            if kind and str(edit.dtype(node.inputs[0])) != kind:
                continue
            if not quantized_alone or quantized(node.inputs[0]) is not None or weight(node, 1) is not None:
                yield node.name, kind

    return find


def caching_attention(graph: gs.Graph) -> Found:
    for node in nodes(graph, "Attention"):
        if edit.is_standard(node) and any(not tensor.is_empty() for tensor in node.outputs[1:]):
            yield node.name, f"{len(node.outputs)} outputs"


def mixed_types(graph: gs.Graph) -> Found:
    for node in nodes(graph):
        row = operator(node)
        if not edit.is_standard(node) or not (row.weighted or row.joins or row.arithmetic or row.kind == "concat"):
            continue
        read = node.inputs[_BESIDE.get(node.op, 0) :]
        kinds = {str(edit.dtype(tensor)) for tensor in read if not tensor.is_empty() and tensor.dtype is not None}
        if len(kinds) > 1 and all("float" in kind for kind in kinds):
            yield node.name, " and ".join(sorted(kinds))


def in_type(name: str, *, of_linears: bool = False) -> Callable[[gs.Graph], Found]:
    """Nodes whose data have a type; products alone with ``of_linears``."""

    def find(graph: gs.Graph) -> Found:
        for node in linears(graph) if of_linears else nodes(graph):
            read = (tensor for tensor in (*node.inputs, *node.outputs) if tensor.dtype is not None)
            if any(str(edit.dtype(tensor)) == name for tensor in read):
                yield node.name, node.op

    return find


def float_products(graph: gs.Graph) -> Found:
    """Products in float32, which SM 75 refuses unless they are convolutions or run in int8."""
    for node in linears(graph):
        if operator(node).kind == "conv" or str(edit.dtype(node.inputs[0])) != "float32":
            continue
        yield node.name, node.op


def half_convs(graph: gs.Graph) -> Found:
    for node in nodes(graph, "Conv"):
        if str(edit.dtype(node.inputs[0])) == "float16" and quantized(node.inputs[0]) is not None:
            yield node.name, "float16"


def open_sizes(graph: gs.Graph) -> Found:
    for tensor in graph.inputs:
        if tensor.shape is not None and not all(isinstance(d, int) for d in tensor.shape):
            yield tensor.name, dims(tensor)


def alike_sizes(graph: gs.Graph) -> Found:
    """Open sizes that have one name though nothing says that they are equal: a name twice in an input, or no name."""
    named = Counter(dim for tensor in graph.inputs for dim in tensor.shape or () if isinstance(dim, str))
    for tensor in graph.inputs:
        own = Counter(dim for dim in tensor.shape or () if isinstance(dim, str))
        for dim, times in own.items():
            if times > 1 or (named[dim] > 1 and dim in _MEANINGLESS):
                yield tensor.name, f"{dim!r} in {dims(tensor)}"


def initializers_as_inputs(graph: gs.Graph) -> Found:
    own = carried(graph)
    names = {tensor.name for tensor in graph.inputs}
    for proto in own.graph.initializer if own is not None else ():
        if proto.name in names:
            yield proto.name, onnx.TensorProto.DataType.Name(proto.data_type).lower()  # pyright: ignore


def stale_shapes(graph: gs.Graph) -> Found:
    """One contradiction between value_info and the inputs. The graph forgets the shapes of value_info then."""
    if found := drop_stale_shapes(graph):
        yield graph.name or "graph", found


def opsets(graph: gs.Graph) -> Found:
    if not 9 <= graph.opset <= MAX_OPSET:
        yield graph.name or "graph", f"opset {graph.opset}"


def squeezes(graph: gs.Graph) -> Found:
    if any(True for _ in open_sizes(graph)):
        for node in squeezes_without_axes(graph):
            yield node.name, ""


def permuted_groups(graph: gs.Graph) -> Found:
    for node in nodes(graph, "MatMulNBits"):
        if edit.has_input(node, 4):
            yield node.name, dims(node.inputs[4])


def naive_kernels(graph: gs.Graph) -> Found:
    for node in nodes(graph, "MatMulNBits"):
        bits, level = int(node.attrs.get("bits", 4)), int(node.attrs.get("accuracy_level", 0))
        if bits in (2, 8) and level < 4:
            yield node.name, f"{bits} bits, accuracy_level {level}"


def unknown_operators(graph: gs.Graph) -> Found:
    own = carried(graph)
    local = {(f.domain, f.name) for f in own.header.functions} if own is not None else set()
    for node in nodes(graph):
        if not is_known(node.domain, node.op) and (node.domain or "", node.op) not in local:
            yield node.name, f"{node.domain or 'ai.onnx'}.{node.op}"


def not_finite(graph: gs.Graph) -> Found:
    """Weights that hold NaN or infinities."""
    for node in linears(graph):
        for tensor in node.inputs[1:3]:
            values = edit.value(tensor) if edit.is_float(tensor) else None
            if values is not None and not np.isfinite(values.astype(np.float32)).all():
                yield node.name, tensor.name
