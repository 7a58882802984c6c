"""Operators that compute on codes, rewritten as float operators between DequantizeLinear and QuantizeLinear.

    y_q = QLinearConv(x_q, s_x, z_x, W_q, s_W, z_W, s_y, z_y, b_q)
    y_q = Q(Conv(DQ(x_q), DQ(W_q), s_x s_W b_q), s_y, z_y)

ONNX Runtime reads both forms alike; TensorRT reads the second alone.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.runtime.io import edit
from channelfold.runtime.io.files import constant, free_name
from channelfold.runtime.lint import Found
from channelfold.runtime.lint.reading import nodes

# by operator: the float operator, the places of its operands (codes, then scale, then zero point), that of the result's
# scale, and that of the bias or 0
FORMS: dict[str, tuple[str, tuple[int, ...], int, int]] = {
    "QLinearConv": ("Conv", (0, 3), 6, 8),
    "QLinearMatMul": ("MatMul", (0, 3), 6, 0),
    "QGemm": ("Gemm", (0, 3), 7, 6),
    "QLinearAdd": ("Add", (0, 3), 6, 0),
    "QLinearMul": ("Mul", (0, 3), 6, 0),
    "QLinearSigmoid": ("Sigmoid", (0,), 3, 0),
    "QLinearLeakyRelu": ("LeakyRelu", (0,), 3, 0),
    "QLinearSoftmax": ("Softmax", (0,), 3, 0),
    "QLinearGlobalAveragePool": ("GlobalAveragePool", (0,), 3, 0),
    "QLinearAveragePool": ("AveragePool", (0,), 3, 0),
}
_OWN = ("channels_last", "opset")  # attributes that the float operators do not have


def fused(graph: gs.Graph) -> Found:
    for node in nodes(graph, *FORMS, "QLinearConcat"):
        yield node.name, node.op


def unfuse(graph: gs.Graph) -> list[str]:
    """Rewrites the operators on codes in the main graph. Returns their names."""
    done = []
    for node in list(graph.nodes):
        places = _places(node)
        if places is None or node.attrs.get("channels_last", 0):
            continue
        op, operands, result, bias = places
        if any(not edit.has_input(node, place) for place in operands) or (bias and not _bias_known(node, bias)):
            continue
        _rewrite(graph, node, op, operands, result, bias)
        done.append(node.name)
    return done


def _places(node: gs.Node) -> tuple[str, tuple[int, ...], int, int] | None:
    if node.op == "QLinearConcat":
        return "Concat", tuple(range(2, len(node.inputs), 3)), 0, 0
    return FORMS.get(node.op)


def _bias_known(node: gs.Node, bias: int) -> bool:
    """Whether a node has no bias, or one that is constant with its scales."""
    return not edit.has_input(node, bias) or all(isinstance(node.inputs[at], gs.Constant) for at in (1, 4, bias))


def _rewrite(graph: gs.Graph, node: gs.Node, op: str, operands: tuple[int, ...], result: int, bias: int) -> None:
    inputs, output = list(node.inputs), node.outputs[0]
    scale = inputs[result] if len(inputs) > result and not inputs[result].is_empty() else None
    kind = edit.dtype(inputs[operands[0] + 1]) or np.dtype(np.float32)
    first = op == "Conv" or (op == "Gemm" and bool(node.attrs.get("transB", 0)))
    read = [_restored(graph, node, inputs[place : place + 3], kind, first and place > 0) for place in operands]
    if bias and edit.has_input(node, bias):
        codes, data, weight = (np.asarray(edit.value(inputs[place]), np.float64) for place in (bias, 1, 4))
        read.append(constant(graph, f"{node.name}_bias", (codes * data.reshape(()) * weight.reshape(-1)).astype(kind)))
    attrs = {key: value for key, value in node.attrs.items() if key not in _OWN}
    edit.detach(node)
    node.op, node.domain, node.attrs = op, None, attrs
    node.inputs.extend(read)
    if scale is None:  # QGemm without a scale writes float
        node.outputs.append(output)
        return
    node.outputs.append(gs.Variable(free_name(graph, f"{output.name}_float"), kind, output.shape))
    name = free_name(graph, f"{output.name}_QuantizeLinear")
    codes = gs.Node("QuantizeLinear", name, inputs=[node.outputs[0], *inputs[result : result + 2]], outputs=[output])
    edit.insert_after(graph, node, codes)


def _restored(graph: gs.Graph, node: gs.Node, three: list[gs.Tensor], kind: np.dtype, first: bool) -> gs.Tensor:
    """The result of a new DequantizeLinear in front of a node; ``first``: scales by channel are along axis 0."""
    codes, scale, *_ = three
    tensor = gs.Variable(free_name(graph, f"{codes.name}_dequantized"), kind, codes.shape)
    size = edit.rank(codes) or 1
    by_channel = scale.shape is not None and list(scale.shape) not in ([], [1])
    attrs = {"axis": 0 if first else size - 1} if by_channel else {}
    inputs = [tensor for tensor in three if not tensor.is_empty()]
    name = free_name(graph, f"{codes.name}_DequantizeLinear")
    edit.insert(graph, gs.Node("DequantizeLinear", name, attrs, inputs, [tensor]), before=node)
    return tensor
