"""Codes of 4-bit floating point numbers in operators that ONNX Runtime has, so that a file can be proved without a GPU.

    DQ(W_q)                       the weight, in float
    DQ(TRT_FP4DynamicQuantize)    x rounded as TensorRT rounds it:  for every 16 entries of the last axis
                                  s = E4M3(max|x| / 6 u) u,   x' = s E2M1(x / s),   u the scale of the tensor

E2M1 has the steps 1/2 up to 2, 1 up to 4 and 2 up to 6.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs

from channelfold.runtime.io import edit
from channelfold.runtime.io.files import constant, free_name

_FP4 = np.dtype(ml_dtypes.float4_e2m1fn)
_FLOAT = np.dtype(np.float32)
DYNAMIC = "TRT_FP4DynamicQuantize"


def emulate(graph: gs.Graph) -> bool:
    """Replaces everything in 4-bit floating point numbers, in place; whether there was anything."""
    found = False
    for node in list(graph.nodes):
        if node.op != "DequantizeLinear":
            continue
        codes, result = node.inputs[0], node.outputs[0]
        source = edit.producer(codes)
        if isinstance(codes, gs.Constant) and np.dtype(codes.dtype) == _FP4:
            edit.replace_uses(graph, result, constant(graph, f"{result.name}_values", _values(node)))
        elif source is not None and source.op == DYNAMIC:
            edit.replace_uses(graph, result, _rounded(graph, source, node))
        else:
            continue
        found = True
    edit.remove_dead(graph)
    return found


def _values(node: gs.Node) -> np.ndarray:
    """What a DequantizeLinear makes of constants."""
    values, scale = (np.asarray(_read(tensor), np.float32) for tensor in node.inputs[:2])
    axis, block = node.attrs.get("axis", 1), node.attrs.get("block_size", 0)
    if block:
        scale = np.repeat(scale, block, axis=axis).take(np.arange(values.shape[axis]), axis=axis)
    elif scale.ndim:
        scale = scale.reshape([-1 if i == axis % values.ndim else 1 for i in range(values.ndim)])
    return (values * scale).astype(_type(node))


def _type(node: gs.Node) -> np.dtype:
    """The type of what a DequantizeLinear or Cast makes, which may stand nowhere: that of its scales."""
    if node.op == "Cast":
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(node.attrs["to"]))
    scales = node.inputs[1]
    known, source = node.outputs[0].dtype or scales.dtype, edit.producer(scales)
    if known is None and source is not None and source.op in ("Cast", "DequantizeLinear"):
        return _type(source)
    return np.dtype(known or np.float32)


def _read(tensor: gs.Tensor) -> np.ndarray:
    """A constant, or what Cast and DequantizeLinear make of constants."""
    if isinstance(tensor, gs.Constant):
        return tensor.values
    node = edit.producer(tensor)
    assert node is not None
    if node.op == "Cast":
        return _read(node.inputs[0]).astype(onnx.helper.tensor_dtype_to_np_dtype(node.attrs["to"]))
    return _values(node)


def _rounded(graph: gs.Graph, quantize: gs.Node, last: gs.Node) -> gs.Variable:
    data, unit = quantize.inputs
    dtype = _type(last)

    def add(op: str, *inputs: gs.Tensor | np.ndarray | float, kind: np.dtype = _FLOAT, **attrs: int):
        name = free_name(graph, f"{data.name}_{op}")
        read = [
            tensor if isinstance(tensor, gs.Tensor) else constant(graph, f"{name}_{i}", _as_array(tensor))
            for i, tensor in enumerate(inputs)
        ]
        result = gs.Variable(name, kind)
        edit.insert(graph, gs.Node(op, name, attrs, read, [result]), before=last)
        return result

    wide = add("Reshape", add("Cast", data, to=onnx.TensorProto.FLOAT), np.array([-1, 16]))
    peak = add("ReduceMax", add("Abs", wide), np.array([-1]), keepdims=1)
    scale = add("Div", peak, add("Mul", add("Cast", unit, to=onnx.TensorProto.FLOAT), 6.0))
    codes = add("Cast", scale, kind=np.dtype(ml_dtypes.float8_e4m3fn), to=onnx.TensorProto.FLOAT8E4M3FN)
    scale = add("Mul", add("Cast", codes, to=onnx.TensorProto.FLOAT), add("Cast", unit, to=onnx.TensorProto.FLOAT))
    parts = add("Div", wide, add("Max", scale, float(np.finfo(np.float32).tiny)))
    size, boolean = add("Min", add("Abs", parts), 6.0), np.dtype(bool)
    step = add("Where", add("Less", size, 4.0, kind=boolean), 1.0, 2.0)
    step = add("Where", add("Less", size, 2.0, kind=boolean), 0.5, step)
    nearest = add("Mul", add("Mul", add("Round", add("Div", size, step)), step), add("Sign", parts))
    shape = add("Shape", data, kind=np.dtype(np.int64))
    whole = add("Reshape", add("Mul", nearest, scale), shape)
    return add("Cast", whole, kind=dtype, to=onnx.helper.np_dtype_to_tensor_dtype(dtype))


def _as_array(values: np.ndarray | float) -> np.ndarray:
    return values if isinstance(values, np.ndarray) else np.array(values, np.float32)
