"""Products in integers for ONNX Runtime, of weights that a file holds in 4 bits (DGQ).

    y = W x + b   becomes   y = MatMulInteger(q(x), Cast(W_q S)) (s_x s_W) + b

The integer weight is W_q S, codes of 4 bits times the scales of their groups, integers too. ONNX Runtime multiplies
them out once, when it loads the file. The activation is quantized for every call (DynamicQuantizeLinear), which ONNX
Runtime fuses with the product into DynamicQuantizeMatMul.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from channelfold.passes.layers.formats import FLOAT, Format
from channelfold.passes.layers.linear import Linear
from channelfold.passes.quantize.qdq import Inserter
from channelfold.passes.quantize.rounders import Rounded
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import constant, free_name


def why_not_integers(linear: Linear, format: Format) -> str:
    """Why ONNX Runtime cannot multiply a linear in this form; empty where it can."""
    if linear.dtype != FLOAT:
        return "ONNX Runtime has no integer kernels for float16"
    if linear.node.attrs.get("transA", 0):
        return "its activation is transposed"
    ins = linear.channels[1]
    return f"its {ins} inputs do not divide into groups" if ins % format.group else ""


def multiply_integers(
    inserter: Inserter,
    linear: Linear,
    layer: Rounded,
    format: Format,
) -> None:
    """Replaces a MatMul or Gemm by a product of integers."""
    codes, base = layer.codes, layer.base
    assert base is not None
    inserter.correct_bias(linear, layer, format)
    graph, node, name = inserter.graph, linear.node, linear.source.name
    outs, ins = codes.shape
    bias = linear.bias() if node.op == "Gemm" else None
    key = "integers", id(linear.source), tuple(map(id, linear.chain)), node.op, node.attrs.get("transB", 0)
    nodes: list[gs.Node] = []

    def add(op: str, inputs: list[gs.Tensor], dtype: np.dtype | type, **attrs: int) -> gs.Variable:
        result = gs.Variable(free_name(graph, f"{linear.name}_{op}"), np.dtype(dtype))
        nodes.append(gs.Node(op, free_name(graph, f"{linear.name}_{op}"), attrs, inputs, [result]))
        return result

    if key not in inserter.stored:
        stored = np.ascontiguousarray(codes.T).reshape(-1, format.group, outs)
        steps = np.ascontiguousarray(format.steps(layer.scales, base).T.astype(np.int32))[:, None]
        inserter.stored[key] = [
            constant(graph, f"{name}_quantized", stored),
            constant(graph, f"{name}_scale", steps),
            constant(graph, f"{name}_base", base[:, 0]),
            constant(graph, f"{name}_shape", np.array([ins, outs], np.int64)),
        ]
    stored, steps, units, shape = inserter.stored[key]
    wide = add("Mul", [add("Cast", [stored], np.int32, to=onnx.TensorProto.INT32), steps], np.int32)
    weight = add("Reshape", [add("Cast", [wide], np.int8, to=onnx.TensorProto.INT8), shape], np.int8)
    data = linear.data
    quantized = add("DynamicQuantizeLinear", [data], np.uint8)
    unit, zero = (gs.Variable(free_name(graph, f"{linear.name}_{what}"), kind)
                  for what, kind in (("unit", FLOAT), ("zero", np.dtype(np.uint8))))  # fmt: skip
    nodes[-1].outputs += [unit, zero]
    product = add("MatMulInteger", [quantized, weight, zero], np.int32)
    product = add("Cast", [product], FLOAT, to=onnx.TensorProto.FLOAT)
    product = add("Mul", [product, add("Mul", [unit, units], FLOAT)], FLOAT)
    if bias is None:
        last = nodes.pop()
        edit.rewrite(node, last.op, list(last.inputs))
        last.inputs.clear()
        last.outputs.clear()
    else:
        edit.rewrite(node, "Add", [product, constant(graph, f"{linear.name}_bias", bias.astype(FLOAT))])
    inserter.before(node, nodes)
