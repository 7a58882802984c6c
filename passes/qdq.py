"""QuantizeLinear / DequantizeLinear nodes as each target wants them.

    activation   DQ(Q(x))       per tensor: q = clip(round(x / s) + z, -128, 127), s and z scalars, round half to even
    weight       DQ(W_q)        per output channel: W_q int8 stored, s a vector, z = 0, |q| <= 127
    bias         DQ(b_q)        onnxruntime only: b_q int32, s = s_x * s_W

tensorrt      z = 0; a pair of nodes in front of the quantized operators only, which all share it; the bias stays float.
onnxruntime   z free; *every* reader of a quantized tensor reads it through its pair, and the results of Conv and of the
              operators between convolutions are quantized too: that is what its integer kernels fuse.

A Q or DQ without a zero point would be uint8 by the ONNX specification, which TensorRT clamps to half its range, so the
zero point is always written. A scale is never zero: a dead channel gets the smallest normal number of its type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes import edit
from channelfold.passes.linear import LINEAR_OPS, Linear
from channelfold.runtime.graph_io import constant, free_name

_CHUNK = 1 << 22  # weight values quantized at once


@dataclass(frozen=True)
class Range:
    """What 8 bits cover of a tensor, in its units; zero is always inside."""

    low: float
    high: float

    def parameters(self, symmetric: bool, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """(scale in ``dtype``, zero point int8), scalars."""
        if symmetric:
            return positive_scale(max(-self.low, self.high), 127, dtype), np.array(0, np.int8)
        scale = positive_scale(self.high - self.low, 255, dtype)
        return scale, np.array(np.clip(np.rint(-128 - self.low / float(scale)), -128, 127), np.int8)


def positive_scale(limit: np.ndarray | float, levels: int, dtype: np.dtype) -> np.ndarray:
    """limit / levels in ``dtype``, at least the smallest normal number of that type."""
    return np.maximum(np.asarray(limit, np.float64) / levels, float(np.finfo(dtype).tiny)).astype(dtype)


def quantize_weight(
    weight: np.ndarray, dtype: np.dtype, floor: np.ndarray | float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int8 per output channel of a weight (out, ...): (values int8, scales (out,) in ``dtype``).

    No scale is below ``floor``, (out,) or a scalar.
    """
    limits = np.broadcast_to(np.asarray(floor, np.float64) * 127, weight.shape[:1])
    outs = weight.shape[0]
    rows = max(1, _CHUNK // max(1, weight[0].size if outs else 1))
    values = np.empty(weight.shape, np.int8)
    scales = np.empty(outs, dtype)
    for start in range(0, outs, rows):
        part = np.asarray(weight[start : start + rows], np.float32)
        peak = np.abs(part.reshape(part.shape[0], -1)).max(axis=1, initial=0.0)
        scale = positive_scale(np.maximum(peak, limits[start : start + rows]), 127, dtype)
        scales[start : start + rows] = scale
        steps = np.asarray(scale, np.float32).reshape(-1, *[1] * (part.ndim - 1))
        values[start : start + rows] = np.clip(np.rint(part / steps), -127, 127)
    return values, scales


def opset_of_scales(graph: gs.Graph) -> int:
    """The opset at which a DequantizeLinear by channel can have the types of this graph's weights as scales."""
    types = {node.inputs[1].dtype for node in graph.nodes if node.op in LINEAR_OPS and len(node.inputs) > 1}
    return (
        19 if np.dtype(np.float16) in {np.dtype(t) for t in types if t is not None and not isinstance(t, int)} else 13
    )


def weight_axis(linear: Linear) -> int:
    """The axis of the output channels in the weight as the node stores it."""
    if linear.node.op == "Gemm":
        return 0 if linear.node.attrs.get("transB", 0) else 1
    if linear.node.op == "MatMul":
        return 0 if linear.weight_input == 0 else 1
    return 0 if linear.node.op == "Conv" else 1


def summary(graph: gs.Graph, kept: list[Linear]) -> dict[str, Any]:
    """The counts a report wants of a quantization: how many linear nodes there are, and which now read int8."""
    quantized = {id(site.node) for site in kept}
    linears = [node for node in graph.nodes if node.op in LINEAR_OPS]
    by_op = {
        op: {
            "quantized": sum(node.op == op and id(node) in quantized for node in linears),
            "total": sum(node.op == op for node in linears),
        }
        for op in dict.fromkeys(node.op for node in linears)
    }
    return {
        "linears": len(linears),
        "quantized": len(kept),
        "by_op": by_op,
        "quantized_nodes": [site.name for site in kept],
    }


class Inserter:
    """Makes QDQ nodes and remembers them, so that readers of one tensor, or of one weight, share them."""

    def __init__(self, graph: gs.Graph, symmetric: bool = True):
        self.graph = graph
        self.symmetric = symmetric
        self._before: dict[int, list[gs.Node]] = {}
        self._after: dict[int, list[gs.Node]] = {}
        self._pairs: dict[int, gs.Variable] = {}
        self._weights: dict[tuple, tuple[gs.Variable, np.ndarray]] = {}

    def activation(self, tensor: gs.Variable, seen: Range, readers: Sequence[gs.Node]) -> None:
        """Lets ``readers`` read a tensor through a Q and a DQ node."""
        if id(tensor) not in self._pairs:
            dtype = edit.dtype(tensor) or np.dtype(np.float32)
            scale, zero_point = seen.parameters(self.symmetric, dtype)
            s = constant(self.graph, f"{tensor.name}_scale", scale)
            z = constant(self.graph, f"{tensor.name}_zero_point", zero_point)
            quantized = gs.Variable(free_name(self.graph, f"{tensor.name}_quantized"), np.int8, tensor.shape)
            restored = gs.Variable(free_name(self.graph, f"{tensor.name}_dequantized"), dtype, tensor.shape)
            pair = [
                gs.Node(op, f"{tensor.name}_{op}", inputs=[data, s, z], outputs=[result])
                for op, data, result in (
                    ("QuantizeLinear", tensor, quantized),
                    ("DequantizeLinear", quantized, restored),
                )
            ]
            source = edit.producer(tensor)
            place = self._before.setdefault(-1, []) if source is None else self._after.setdefault(id(source), [])
            place += pair
            self._pairs[id(tensor)] = restored
        for node in readers:
            for index, read in enumerate(node.inputs):
                if read is tensor:
                    edit.set_input(node, index, self._pairs[id(tensor)])

    def weight(self, linear: Linear, seen: Range | None = None, mean: np.ndarray | None = None) -> np.ndarray:
        """Puts the int8 weight behind DequantizeLinear at a linear node; returns its scales, (out,).

        With the range ``seen`` of its activation no scale is so small that the bias would leave int32 in steps of
        s_x * s_W: runtimes that compute in integers store it so, and a nearly dead channel with a bias would overflow.
        With the ``mean`` of each input channel the bias takes back what rounding the weight does on average,
        b' = b - (W_q - W) E[x], wherever the node has a bias or a place for one.
        """
        axis = weight_axis(linear)
        alpha = linear.node.attrs.get("alpha", 1.0) if linear.node.op == "Gemm" else 1.0
        floor = self._smallest_scale(linear, seen)
        chain = tuple(id(node) for node in linear.chain)
        key = (id(linear.source), chain, axis, linear.groups, alpha, np.asarray(floor).tobytes())
        corrected = mean is not None and (linear.node.op != "MatMul" or linear.bias_node is not None)
        if corrected or key not in self._weights:
            weight = linear.weight()
            values, scales = quantize_weight(weight, linear.dtype, floor)
            if corrected:
                steps = np.asarray(scales, np.float32).reshape(-1, *[1] * (weight.ndim - 1))
                old = linear.bias()
                linear.set_bias((0.0 if old is None else old) - linear.respond(values * steps - weight, mean))
        if key not in self._weights:
            stored = np.ascontiguousarray(linear.unorient(values))
            restored = self._dequantized(linear.source.name, stored, scales, axis, linear.node)
            self._weights[key] = restored, scales
        restored, scales = self._weights[key]
        edit.set_input(linear.node, linear.weight_input, restored)
        if "alpha" in linear.node.attrs:
            linear.node.attrs["alpha"] = 1.0
        return scales

    def _smallest_scale(self, linear: Linear, seen: Range | None) -> np.ndarray | float:
        bias = linear.bias()
        if seen is None or bias is None:
            return 0.0
        return np.abs(bias) / (2.0**30 * float(seen.parameters(self.symmetric, np.dtype(np.float32))[0]))

    def bias(self, linear: Linear, scales: np.ndarray, seen: Range) -> None:
        """Puts an int32 bias behind DequantizeLinear at a Conv or Gemm that has one."""
        bias = linear.bias()
        if bias is None or linear.node.op == "MatMul":
            return
        combined = np.maximum(
            scales.astype(np.float64) * float(seen.parameters(self.symmetric, scales.dtype)[0]), 1e-30
        )
        values = np.rint(bias / combined)
        if np.abs(values).max(initial=0) >= 2**31:
            return
        stored = values.astype(np.int32)
        restored = self._dequantized(f"{linear.name}_bias", stored, combined.astype(scales.dtype), 0, linear.node)
        edit.set_input(linear.node, 2, restored)
        if "beta" in linear.node.attrs:
            linear.node.attrs["beta"] = 1.0

    def finish(self) -> None:
        """Puts the new nodes into the node list, each where its inputs are known."""
        nodes = list(self._before.get(-1, ()))
        for node in self.graph.nodes:
            nodes += [*self._before.get(id(node), ()), node, *self._after.get(id(node), ())]
        self.graph.nodes[:] = nodes

    def _dequantized(
        self, name: str, stored: np.ndarray, scales: np.ndarray, axis: int, reader: gs.Node
    ) -> gs.Variable:
        q = constant(self.graph, f"{name}_quantized", stored)
        s = constant(self.graph, f"{name}_scale", scales)
        z = constant(self.graph, f"{name}_zero_point", np.zeros(scales.shape, stored.dtype))
        restored = gs.Variable(free_name(self.graph, f"{name}_dequantized"), scales.dtype, list(stored.shape))
        node = gs.Node("DequantizeLinear", f"{name}_DequantizeLinear", {"axis": axis}, [q, s, z], [restored])
        self._before.setdefault(id(reader), []).append(node)
        return restored
