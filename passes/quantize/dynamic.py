"""Activations quantized while the model runs: every token (row) with a scale of its own, no data needed.

    y = W x + b   becomes   y = m (DQ(W_q) DQ(Q(x / m))) + b,    m = max |x| of the token, the scale of Q 1 / 127

A token whose values are large leaves the others their resolution, which is what transformers need. A tensor that
several products read is quantized once. A token of zeros stays zero: m is never below a small number, which float16
still holds. TensorRT multiplies in int8 and puts the rest into the kernels before and behind the product. ONNX Runtime
makes a MatMulIntegerToFloat of the product; where several products read a tensor it does so with uint8 alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context
from channelfold.passes.layers.linear import Linear
from channelfold.passes.quantize import weights
from channelfold.passes.quantize.done import Rounded
from channelfold.passes.quantize.qdq import MIN_CHANNELS, Inserter
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import constant, free_name

_LEAST = 2.0**-14  # the smallest normal number of float16
_AXES_ARE_INPUTS = 18  # the opset from which ReduceMax has them so


class Work(weights.Work):
    def _formats(self, node: gs.Node) -> tuple[str, str]:
        return self.weights, "none"

    def _limits(self, graph: gs.Graph, sites: list[Linear], ctx: Context) -> dict[str, Any]:
        """By the name of each activation its tokens in int8, and their magnitudes."""
        found: dict[str, Any] = {}
        for site in sites:
            if site.data.name not in found:
                site.data.dtype = site.dtype
                zero = np.array(0, np.int8) if self.target == "tensorrt" else np.array(128, np.uint8)
                found[site.data.name] = _tokens(graph, site.data, zero)
        return found

    def _why_float(self, linear: Linear) -> str:
        if linear.is_conv:
            return "the input of a convolution has no tokens"
        if linear.weight_input == 0 or linear.node.attrs.get("transA", 0):
            return "the tokens of its activation are columns"
        if min(linear.channels) < MIN_CHANNELS:
            return f"fewer than {MIN_CHANNELS} channels"
        return super()._why_float(linear)

    def _quantize(
        self, inserter: Inserter, linear: Linear, seen: Any, limits: Mapping[str, Any], made: dict[str, Rounded]
    ) -> str:
        tokens, magnitudes = limits[linear.data.name]
        says = super()._quantize(inserter, linear, seen, {}, made)
        edit.set_input(linear.node, 0, tokens)
        _multiply(inserter.graph, linear, magnitudes)
        return f"{says}, int8 activation by token"


def _tokens(graph: gs.Graph, tensor: gs.Variable, zero_point: np.ndarray) -> tuple[gs.Variable, gs.Variable]:
    """DQ(Q(x / m)) and m, (..., 1), behind the node that writes x."""
    name, dtype = tensor.name, np.dtype(tensor.dtype)
    rows = None if tensor.shape is None else [*tensor.shape[:-1], 1]
    nodes: list[gs.Node] = []

    def add(op: str, inputs: list[gs.Tensor], kind: np.dtype, shape: Any, **attrs: Any) -> gs.Variable:
        result = gs.Variable(free_name(graph, f"{name}_{op}"), kind, shape)
        nodes.append(gs.Node(op, free_name(graph, f"{name}_{op}_by_token"), attrs, inputs, [result]))
        return result

    axes = [constant(graph, f"{name}_axes", np.array([-1]))] if graph.opset >= _AXES_ARE_INPUTS else []
    attrs = {"keepdims": 1} | ({} if axes else {"axes": [-1]})
    largest = add("ReduceMax", [add("Abs", [tensor], dtype, tensor.shape), *axes], dtype, rows, **attrs)
    magnitudes = add("Max", [largest, constant(graph, f"{name}_least", np.array(_LEAST, dtype))], dtype, rows)
    scale = constant(graph, f"{name}_scale", np.array(1 / 127, dtype))
    zero = constant(graph, f"{name}_zero_point", zero_point)
    codes = add("Div", [tensor, magnitudes], dtype, tensor.shape)
    codes = add("QuantizeLinear", [codes, scale, zero], zero_point.dtype, tensor.shape)
    restored = add("DequantizeLinear", [codes, scale, zero], dtype, tensor.shape)
    source = edit.producer(tensor)
    for node in reversed(nodes):
        edit.insert(graph, node) if source is None else edit.insert_after(graph, source, node)
    return restored, magnitudes


def _multiply(graph: gs.Graph, linear: Linear, magnitudes: gs.Variable) -> None:
    """Multiplies the product of a linear by the magnitudes of its tokens, in front of its bias."""
    node, bias = linear.node, None
    if node.op == "Gemm":
        if edit.has_input(node, 2):
            bias = np.asarray(edit.value(node.inputs[2])) * node.attrs.get("beta", 1.0)
        flipped = node.attrs.get("transB", 0)
        edit.rewrite(node, "Gemm" if flipped else "MatMul", list(node.inputs[:2]))
        node.attrs = {"transB": 1} if flipped else {}
    result = node.outputs[0]

    def made(what: str) -> gs.Variable:
        return gs.Variable(free_name(graph, f"{result.name}_{what}"), linear.dtype, result.shape)

    product = made("by_token")
    edit.set_output(node, 0, product)
    scaled = made("scaled") if bias is not None else result
    new = [gs.Node("Mul", free_name(graph, f"{linear.name}_by_token"), {}, [product, magnitudes], [scaled])]
    if bias is not None:
        values = constant(graph, f"{linear.name}_bias", bias.astype(linear.dtype))
        new.append(gs.Node("Add", free_name(graph, f"{linear.name}_bias"), {}, [scaled, values], [result]))
    for member in reversed(new):
        edit.insert_after(graph, node, member)
