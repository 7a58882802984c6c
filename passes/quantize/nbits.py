"""Products for ONNX Runtime written as its own operator, where DequantizeLinear and MatMul cannot say enough.

    y = W x + b   becomes   y = MatMulNBits(x, W_q, s, z) + b

ONNX Runtime makes this operator of DequantizeLinear and MatMul by itself, but not where two nodes read one weight: that
weight it would expand on every call. And only the operator has an accuracy level: at 1 the product is that of the
restored weight in float32, at 4 the activation is rounded to 8 bits by groups, which is faster (and the usual level).
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.layers.formats import Format
from channelfold.passes.layers.linear import Linear
from channelfold.passes.quantize.qdq import Inserter
from channelfold.passes.quantize.rounders import Rounded
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import constant

FAST = 4
_WHOLE = 128  # inputs that share a scale where all inputs of a channel do


def why_not_nbits(linear: Linear, format: Format) -> str:
    """Why MatMulNBits does not do what a linear does; empty where it does."""
    size = format.group or _WHOLE
    if linear.is_conv or linear.weight_input == 0 or linear.node.attrs.get("transA", 0) or edit.rank(linear.data) == 1:
        return "MatMulNBits multiplies rows of its activation with a weight"
    return "" if size >= 16 and not size & (size - 1) else f"MatMulNBits has no groups of {size}, but of 16, 32, 64 …"


def many_readers(linear: Linear) -> bool:
    """Whether other nodes read the weight of a linear."""
    return len((linear.chain[-1].outputs[0] if linear.chain else linear.source).outputs) > 1


def multiply_nbits(
    inserter: Inserter, linear: Linear, key: Hashable, layer: Rounded | None, format: Format, level: int
) -> None:
    """Replaces a MatMul or Gemm. ``layer`` is None where ``inserter`` has stored the codes under ``key``."""
    node, name, (outs, ins) = linear.node, linear.source.name, linear.channels
    size = format.group or _WHOLE
    if layer is not None:
        inserter.correct_bias(linear, layer, format)
        inserter.stored[key] = [
            constant(inserter.graph, f"{name}_{what}", values) for what, values in _packed(layer, format, size).items()
        ]
    inputs: list[gs.Tensor] = [linear.data, *inserter.stored[key]]
    if node.op == "Gemm" and (bias := linear.bias()) is not None:
        inputs += [gs.Variable.empty() for _ in range(5 - len(inputs))]
        inputs.append(constant(inserter.graph, f"{linear.name}_bias", bias.astype(linear.dtype)))
    edit.rewrite(node, "MatMulNBits", inputs)
    node.domain = "com.microsoft"
    node.attrs = {"K": ins, "N": outs, "bits": format.bits, "block_size": size, "accuracy_level": level}


def _packed(layer: Rounded, format: Format, size: int) -> dict[str, np.ndarray]:
    """Codes (out, groups, bytes), scales and zero points as the operator reads them: unsigned, the low bits first."""
    outs, ins = layer.codes.shape
    middle = 0 if layer.zeros is not None else 1 << (format.bits - 1)
    codes = layer.codes.astype(np.int16) + middle
    if (behind := -ins % size) and layer.zeros is None:
        codes = np.pad(codes, ((0, 0), (0, behind)), constant_values=middle)
    elif behind and layer.zeros is not None:
        codes = np.concatenate([codes, np.repeat(layer.zeros[:, -1:], behind, axis=1)], axis=1)
    groups = codes.shape[1] // size
    found = {
        "quantized": _bytes(codes, format.bits).reshape(outs, groups, -1),
        "scale": np.ascontiguousarray(np.broadcast_to(layer.scales, (outs, groups))).reshape(-1),
    }
    if layer.zeros is not None:
        found["zero_point"] = _bytes(np.pad(layer.zeros, ((0, 0), (0, groups % 2))), format.bits).reshape(-1)
    return found


def _bytes(codes: np.ndarray, bits: int) -> np.ndarray:
    """The rows of unsigned codes with 8 / ``bits`` of them in a byte."""
    parts = codes.astype(np.uint8).reshape(len(codes), -1, 8 // bits)
    places = np.arange(0, 8, bits, dtype=np.uint8)
    return np.bitwise_or.reduce(parts << places, axis=2).astype(np.uint8)
