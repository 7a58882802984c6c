"""What breaks a rule, for rules about quantized tensors. Every function yields nodes and what is wrong with them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from channelfold.passes.operators import operator
from channelfold.runtime.io import edit
from channelfold.runtime.lint import Found
from channelfold.runtime.lint.reading import (
    dims,
    is_quantizer,
    kind,
    linears,
    nodes,
    origin,
    pair,
    quantized,
    serves_product,
    stored,
    weights,
)

NARROW = 16  # channels below which TensorRT has no faster kernels in 8 bits
_Q, _DQ = "QuantizeLinear", "DequantizeLinear"
_LOW = ("int4", "uint4", "int2", "uint2", "float4_e2m1fn")


def of_type(*names: str, op: str = "", weights: bool | None = None) -> Callable[[gs.Graph], Found]:
    """Quantizers whose codes have one of these types; of weights or of activations alone where ``weights`` is given."""

    def find(graph: gs.Graph) -> Found:
        for node in nodes(graph, _Q, _DQ):
            if not is_quantizer(node, op) or str(kind(node)) not in names:
                continue
            of_weight = isinstance(origin(node.inputs[0]) if node.op == _Q else stored(node), gs.Constant)
            if weights is None or weights == of_weight:
                yield node.name, str(kind(node))

    return find


def unsigned_activations(graph: gs.Graph) -> Found:
    yield from of_type("uint8", op=_Q, weights=False)(graph)


def unwritten_zero_points(graph: gs.Graph) -> Found:
    for node in nodes(graph, _Q):
        if not edit.has_input(node, 2) and not node.attrs.get("output_dtype", 0):
            yield node.name, "uint8 by the ONNX specification"


def zero_points(graph: gs.Graph) -> Found:
    for node in nodes(graph, _Q, _DQ):
        if not edit.has_input(node, 2):
            continue
        values = edit.value(node.inputs[2])
        if values is None:
            yield node.name, "its zero point is computed"
        elif np.any(values.astype(np.float32)):
            yield node.name, f"{_range(values)}"


def _range(values: np.ndarray) -> str:
    low, high = values.min(), values.max()
    return str(low) if low == high else f"{low} to {high}"


def integer_biases(graph: gs.Graph) -> Found:
    for node in nodes(graph, _DQ):
        if edit.dtype(node.inputs[0]) == np.int32:
            yield node.name, "int32"


def scales_not_positive(graph: gs.Graph) -> Found:
    for node in nodes(graph, _Q, _DQ):
        values = edit.value(node.inputs[1])
        if values is None:
            continue
        values = values.astype(np.float64)
        if wrong := int(np.count_nonzero(~(np.isfinite(values) & (values > 0)))):
            yield node.name, f"{wrong} of {values.size}, down to {values.min():g}"


def activation_scale_shapes(graph: gs.Graph) -> Found:
    """Scales of shape [1] at the activation of a Conv, which TensorRT wants as scalars."""
    for node in linears(graph):
        last = quantized(node.inputs[0])
        if operator(node).kind == "conv" and last is not None and tuple(last.inputs[1].shape or ()) == (1,):
            yield node.name, f"scale of {last.name}"


def activation_scales_by_channel(graph: gs.Graph) -> Found:
    for node in linears(graph):
        for tensor in node.inputs[:2]:
            pair = quantized(tensor)
            if pair is not None and pair.inputs[1].shape is not None and math.prod(_known(pair.inputs[1])) > 1:
                yield node.name, f"{dims(pair.inputs[1])} scales at {pair.name}"


def _known(tensor: gs.Tensor) -> list[int]:
    return [int(d) if isinstance(d, int | np.integer) else 2 for d in tensor.shape or ()]


def weight_axes(graph: gs.Graph) -> Found:
    for one in weights(graph):
        if one.by_channel and one.out_axis is not None and one.axis != one.out_axis:
            yield (
                one.reader.name,
                f"axis {one.axis} of {dims(stored(one.node))}, output channels are axis {one.out_axis}",
            )


def blocks_with_quantized_activations(graph: gs.Graph) -> Found:
    for one in weights(graph):
        if one.block and str(kind(one.node)) != "float4_e2m1fn" and quantized(one.activation) is not None:
            yield one.reader.name, f"blocks of {one.block}, activation in {kind(quantized(one.activation) or one.node)}"


def single_blocks(graph: gs.Graph) -> Found:
    for one in weights(graph):
        if one.block and one.shape and one.shape[one.axis] <= one.block:
            yield one.reader.name, f"one block of {one.block} along {one.shape[one.axis]}"


def low_bits_without_blocks(graph: gs.Graph) -> Found:
    for one in weights(graph):
        if str(kind(one.node)) == "int4" and not one.block and quantized(one.activation) is None:
            yield one.reader.name, "int4 by channel"


def wide_blocks(graph: gs.Graph) -> Found:
    """Blocked weights of 8 bits with float activations."""
    for one in weights(graph):
        if one.block and str(kind(one.node)) in ("int8", "float8_e4m3fn") and quantized(one.activation) is None:
            yield one.reader.name, f"{kind(one.node)} in blocks of {one.block}"


def mixed_codes(graph: gs.Graph) -> Found:
    """int8 activations with fp8 weights and the other way round."""
    for one in weights(graph):
        pair = quantized(one.activation)
        if pair is not None and {str(kind(pair)), str(kind(one.node))} in _APART:
            yield one.reader.name, f"{kind(pair)} activation, {kind(one.node)} weight"


_APART = ({"int8", "float8_e4m3fn"}, {"float8_e4m3fn", "int4"}, {"uint8", "float8_e4m3fn"})


def scale_types(graph: gs.Graph) -> Found:
    """Weights that are restored in another type than their node computes in."""
    for one in weights(graph):
        if any(node.op == "Cast" for node in one.chain):
            yield one.reader.name, f"scales in {edit.dtype(one.scale)}, then a Cast"
    for node in nodes(graph, _Q):
        data, scale = edit.dtype(node.inputs[0]), edit.dtype(node.inputs[1])
        if data is not None and scale is not None and data != scale:
            yield node.name, f"scale in {scale}, data in {data}"


def output_types(graph: gs.Graph) -> Found:
    for node in nodes(graph, _DQ):
        given, scale = node.attrs.get("output_dtype", 0), edit.dtype(node.inputs[1])
        if given and onnx.helper.tensor_dtype_to_np_dtype(given) != scale:
            yield node.name, f"scale in {scale}"


def computed_codes(graph: gs.Graph) -> Found:
    """Tables of codes whose rows are taken before they are dequantized."""
    for node in nodes(graph, "Gather"):
        table = node.inputs[0]
        codes = isinstance(table, gs.Constant) and str(edit.dtype(table)) in ("int8", "uint8", "float8_e4m3fn", *_LOW)
        if codes and any(is_quantizer(reader, _DQ) for reader in edit.consumers(node.outputs[0])):
            yield node.name, str(edit.dtype(table))


def narrow(graph: gs.Graph) -> Found:
    for one in weights(graph):
        pair, axis = quantized(one.activation), one.out_axis
        if pair is None or axis is None or len(one.shape) < 2:
            continue
        grouped = int(one.reader.attrs.get("group", 1))
        outs, ins = one.shape[axis], grouped * one.shape[1 - axis if axis < 2 else 1]
        if min(outs, ins) < NARROW and grouped == 1:
            yield one.reader.name, f"{ins} -> {outs} channels"


def needless(graph: gs.Graph) -> Found:
    """Pairs of quantizers of activations through which no product reads."""
    for node in nodes(graph, _Q):
        group = pair(graph, node)
        if group is not None and not isinstance(origin(node.inputs[0]), gs.Constant) and not serves_product(group):
            readers = [reader.name for one in group[1:] for reader in edit.consumers(one.outputs[0])]
            yield node.name, f"read by {', '.join(readers[:2])}"


def transposed_codes(graph: gs.Graph) -> Found:
    """DequantizeLinear of 8 bits whose result a Transpose reads, from opset 21 on."""
    if graph.opset < 21:
        return
    for node in nodes(graph, _DQ):
        if str(kind(node)) == "int8" and isinstance(node.inputs[0], gs.Constant):
            for reader in edit.consumers(node.outputs[0]):
                if reader.op == "Transpose":
                    yield reader.name, f"behind {node.name}"


def narrow_columns(graph: gs.Graph) -> Found:
    for one in weights(graph):
        axis = one.out_axis
        if str(kind(one.node)) in ("int2", "uint2") and axis is not None and one.shape[axis] % 4:
            yield one.reader.name, f"{one.shape[axis]} output channels"


def expanded_on_every_call(graph: gs.Graph) -> Found:
    """Weights that ONNX Runtime dequantizes on every call: it fuses codes stored (in, out) in blocks along axis 0."""
    for one in weights(graph):
        name, pair = str(kind(one.node)), quantized(one.activation)
        if name.startswith("float8"):
            yield one.reader.name, name
        elif pair is None and operator(one.reader).kind in ("gemm", "matmul") and (one.block or name in _LOW):
            turned = one.reader.op == "Gemm" and one.reader.attrs.get("transB", 0)
            if one.chain or turned or (one.block and one.axis != 0):
                yield one.reader.name, f"{name}, {'transposed' if one.chain or turned else f'axis {one.axis}'}"


def expanded_tables(graph: gs.Graph) -> Found:
    for node in nodes(graph, "Gather"):
        before = edit.producer(node.inputs[0])
        if before is not None and is_quantizer(before, _DQ) and isinstance(stored(before), gs.Constant):
            yield node.name, dims(stored(before))


def quantized_on_every_call(graph: gs.Graph) -> Found:
    for node in nodes(graph, _Q):
        before = edit.producer(node.inputs[0])
        if before is not None and is_quantizer(before, _DQ) and isinstance(stored(before), gs.Constant):
            yield node.name, f"of {before.name}"


def rounded_weights(graph: gs.Graph) -> Found:
    for node in nodes(graph, _Q):
        if isinstance(origin(node.inputs[0]), gs.Constant):
            yield node.name, f"{kind(node)} of {dims(node.inputs[0])}"


def saturating(graph: gs.Graph) -> Found:
    """Products of uint8 activations with weights of 8 whole bits."""
    for one in weights(graph):
        pair = quantized(one.activation)
        if pair is None or str(kind(pair)) != "uint8" or str(kind(one.node)) != "int8":
            continue
        codes = edit.value(stored(one.node))
        if codes is not None and codes.dtype == np.int8 and np.abs(codes.astype(np.int16)).max(initial=0) > 64:
            yield one.reader.name, f"codes up to {np.abs(codes.astype(np.int16)).max()}"


def overflowing_biases(graph: gs.Graph) -> Found:
    """float16 biases that ONNX Runtime would divide by scales so small that the result is beyond float16."""
    for one in weights(graph):
        pair, node = quantized(one.activation), one.reader
        if pair is None or operator(node).kind == "matmul" or not edit.has_input(node, 2):
            continue
        bias, step, scale = edit.value(node.inputs[2]), edit.value(pair.inputs[1]), edit.value(one.scale)
        if bias is None or bias.dtype != np.float16 or step is None or scale is None or one.block:
            continue
        largest = np.abs(bias.astype(np.float64) / (scale.astype(np.float64).reshape(-1) * step.astype(np.float64)))
        if largest.max(initial=0) > 65504:
            yield node.name, f"{largest.max():.3g}"


def float_gemms(graph: gs.Graph) -> Found:
    """Products in integers that ONNX Runtime makes float: it fuses MatMul and Add to Gemm before it looks for Q."""
    for one in weights(graph):
        node = one.reader
        if node.op != "MatMul" or quantized(one.activation) is None:
            continue
        for add in edit.consumers(node.outputs[0]):
            other = next((t for t in add.inputs if isinstance(t, gs.Constant)), None) if add.op == "Add" else None
            if other is not None and (len(other.shape) == 1 or edit.rank(node.inputs[0]) == 2) and len(one.shape) == 2:
                yield node.name, f"with {add.name}"
