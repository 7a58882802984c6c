"""QuantizeLinear / DequantizeLinear nodes as TensorRT wants them.

    activation   DQ(Q(x, s_x), s_x)          s_x a scalar, int8 zero point 0
    weight       DQ(W_q, s_w)                W_q int8 stored, s_w a vector over the output channels

    s = T / 127,  q = clip(round(v / s), -128, 127),  round half to even

A Q or DQ without a zero point would be uint8 by the ONNX specification, which TensorRT clamps to half its range, so the
zero point is always written. A scale is never zero: a dead channel gets the scale of its smallest normal number.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes import edit
from channelfold.passes.linear import Linear
from channelfold.runtime.graph_io import constant, free_name

_CHUNK = 1 << 22  # weight values quantized at once


def positive_scale(limit: np.ndarray | float, levels: int, dtype: np.dtype) -> np.ndarray:
    """limit / levels in ``dtype``, at least the smallest normal number of that type."""
    scale = np.asarray(limit, np.float64) / levels
    return np.maximum(scale, float(np.finfo(np.float32 if dtype.kind == "V" else dtype).tiny)).astype(dtype)


def quantize_weight(weight: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int8 per output channel of a weight (out, ...): (values int8, scales (out,) in ``dtype``)."""
    outs = weight.shape[0]
    rows = max(1, _CHUNK // max(1, weight[0].size if outs else 1))
    values = np.empty(weight.shape, np.int8)
    scales = np.empty(outs, dtype)
    for start in range(0, outs, rows):
        part = np.asarray(weight[start : start + rows], np.float32)
        flat = part.reshape(part.shape[0], -1)
        scale = positive_scale(np.abs(flat).max(axis=1, initial=0.0), 127, dtype)
        scales[start : start + rows] = scale
        steps = np.asarray(scale, np.float32).reshape(-1, *[1] * (part.ndim - 1))
        values[start : start + rows] = np.clip(np.rint(part / steps), -127, 127)
    return values, scales


def activation_qdq(
    graph: gs.Graph, tensor: gs.Tensor, scale: np.ndarray, zero_point: np.ndarray
) -> tuple[list[gs.Node], gs.Variable]:
    """A Q and a DQ node behind ``tensor``, and their result. They still have to be put into the node list."""
    dtype = scale.dtype
    s = constant(graph, f"{tensor.name}_scale", scale)
    z = constant(graph, f"{tensor.name}_zero_point", zero_point)
    quantized = gs.Variable(free_name(graph, f"{tensor.name}_quantized"), zero_point.dtype, tensor.shape)
    restored = gs.Variable(free_name(graph, f"{tensor.name}_dequantized"), dtype, tensor.shape)
    nodes = [
        gs.Node("QuantizeLinear", f"{tensor.name}_QuantizeLinear", inputs=[tensor, s, z], outputs=[quantized]),
        gs.Node("DequantizeLinear", f"{tensor.name}_DequantizeLinear", inputs=[quantized, s, z], outputs=[restored]),
    ]
    return nodes, restored


def weight_axis(linear: Linear) -> int:
    """The axis of the output channels in the weight as the node stores it."""
    if linear.node.op == "Conv":
        return 0
    if linear.node.op == "ConvTranspose":
        return 1
    if linear.node.op == "Gemm":
        return 0 if linear.node.attrs.get("transB", 0) else 1
    return 0 if linear.weight_input == 0 else 1


def weight_dq(graph: gs.Graph, linear: Linear, known: dict) -> list[gs.Node]:
    """Puts an int8 weight behind DequantizeLinear at a linear node; returns the new node, if one was needed.

    Linears that read the same constant the same way share one: ``known`` remembers them.
    """
    axis = weight_axis(linear)
    alpha = linear.node.attrs.get("alpha", 1.0) if linear.node.op == "Gemm" else 1.0
    key = (id(linear.source), tuple(id(node) for node in linear.chain), axis, linear.groups, alpha)
    nodes = []
    if key not in known:
        values, scales = quantize_weight(linear.weight(), linear.dtype)
        name = linear.source.name
        stored = np.ascontiguousarray(linear.unorient(values))
        q = constant(graph, f"{name}_int8", stored)
        s = constant(graph, f"{name}_scale", scales)
        z = constant(graph, f"{name}_zero_point", np.zeros(scales.shape, np.int8))
        output = gs.Variable(free_name(graph, f"{name}_dequantized"), linear.dtype, list(stored.shape))
        node = gs.Node("DequantizeLinear", f"{name}_DequantizeLinear", {"axis": axis}, [q, s, z], [output])
        nodes.append(node)
        known[key] = output
    edit.set_input(linear.node, linear.weight_input, known[key])
    if "alpha" in linear.node.attrs:
        linear.node.attrs["alpha"] = 1.0
    return nodes
