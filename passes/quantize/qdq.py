"""QuantizeLinear / DequantizeLinear nodes as each target wants them.

    activation   DQ(Q(x))       per tensor: q = clip(round(x / s) + z), s and z scalars, round half to even
    weight       DQ(W_q)        per output channel: W_q int8 stored, s a vector, z = 0, |q| <= 127
    bias         DQ(b_q)        onnxruntime only: b_q int32, s = s_x * s_W

tensorrt      int8, z = 0; a pair of nodes in front of the quantized operators only, which all share it; the bias stays
              float.
onnxruntime   uint8, z free; around convolutions *every* reader of a quantized tensor reads it through its pair, and the
              results of Conv and of the operators between convolutions are quantized too: that is what its integer
              kernels fuse. With int8 it fuses nothing around a tensor that has two readers. Products of matrices write
              float, and only they read through the pair. Of MatMul and Add it makes a float Gemm before it looks for
              QDQ nodes; see ``Inserter.fusable``.

A Q without a zero point would be uint8 by the ONNX specification, which TensorRT clamps to half its range, and ONNX
Runtime fuses no weight without a zero point, so the zero point is always written, but for biases. A scale is never
zero: a dead channel gets a small number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs

from channelfold.passes.base import DoesNotFit
from channelfold.passes.layers.formats import FLOAT, INT8, SCALES, Format, all_finite, positive_scale
from channelfold.passes.layers.linear import Linear, linears, live_linears
from channelfold.passes.operators import operator
from channelfold.passes.quantize import Quantize, QuantizeAttention, QuantizeWeights
from channelfold.passes.quantize.rounders import Rounded
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import constant, free_name
from channelfold.runtime.stats.channels import outlier_ratio

_FP4, _FP8 = np.dtype(ml_dtypes.float4_e2m1fn), np.dtype(ml_dtypes.float8_e4m3fn)
_NVFP4 = float(ml_dtypes.finfo(_FP4).max) * float(ml_dtypes.finfo(_FP8).max)
MIN_CHANNELS = 16  # TensorRT runs narrower operators in float, or slower than float


@dataclass(frozen=True)
class Range:
    """What 8 bits cover of a tensor, in its units; zero is always inside.

    Where the range is ``free``, its ends are those of the 8 bits; otherwise zero is in the middle of them.
    """

    low: float
    high: float
    free: bool = False

    @property
    def limit(self) -> float:
        """The largest magnitude."""
        return max(-self.low, self.high)

    def parameters(self, symmetric: bool, dtype: np.dtype, floating: str = "") -> tuple[np.ndarray, np.ndarray]:
        """(scale in ``dtype``, zero point), scalars: 0 in int8 or ``floating`` where ``symmetric``, else uint8.

        A symmetric quantizer of a free range reads x - ``offset``.
        """
        if floating:
            kind = np.dtype(getattr(ml_dtypes, floating))
            return positive_scale(self.limit, float(ml_dtypes.finfo(kind).max), dtype), np.zeros((), kind)
        if symmetric and not self.free:
            return positive_scale(self.limit, 127, dtype), np.array(0, np.int8)
        scale = positive_scale(self.high - self.low, 255, dtype)
        if symmetric:
            return scale, np.array(0, np.int8)
        return scale, np.array(np.clip(np.rint(-self.low / float(scale)), 0, 255), np.uint8)

    def offset(self, dtype: np.dtype) -> float:
        """c, a number of ``dtype`` and a whole number of steps, so that x = 0 is one of the values of DQ(Q(x - c))."""
        scale, zero_point = self.parameters(False, dtype)
        return float(np.asarray((128 - float(zero_point)) * float(scale), dtype)) if self.free else 0.0

    @property
    def step(self) -> float:
        """The width of a step."""
        return (self.high - self.low) / 255 if self.free else self.limit / 127


def opset_of_scales(graph: gs.Graph) -> int:
    """The opset at which a DequantizeLinear by channel can have the types of this graph's weights as scales."""
    kinds = {linear.dtype for linear in linears(graph)}
    kinds |= {t.dtype for n in graph.nodes if operator(n).kind == "recurrent" for t in n.inputs if t.dtype is not None}
    return 19 if np.dtype(np.float16) in map(np.dtype, kinds) else 13


def excluded(step: Quantize | QuantizeAttention | QuantizeWeights, node: gs.Node) -> str:
    """Why the options of a pass leave a node in float; empty when they do not."""
    if node.op in step.exclude_ops:
        return f"excluded by operator type {node.op}"
    return step.patterns.why_not(node.name)


def why_not_int8(linear: Linear) -> str:
    """Why a weight cannot be int8 by channel, whatever the target; empty when it can."""
    if linear.dtype not in SCALES:
        return f"it computes in {linear.dtype}, expected float32 or float16"
    bias = linear.bias()
    if not all_finite(linear.weight()) or (bias is not None and not all_finite(bias)):
        return "its weight or bias holds infinities or NaN"
    return ""


def weight_axis(linear: Linear) -> int:
    """The axis of the output channels in the weight as the node stores it."""
    if linear.node.op == "Gemm":
        return 0 if linear.node.attrs.get("transB", 0) else 1
    if linear.node.op == "MatMul":
        return 0 if linear.weight_input == 0 else 1
    return 0 if linear.node.op == "Conv" else 1


def summary(graph: gs.Graph, kept: list[Linear], cells: Sequence[gs.Node] = ()) -> dict[str, Any]:
    """The counts a report wants of a quantization: how many linear nodes there are, and which now read int8."""
    quantized = {id(node) for node in (*cells, *(site.node for site in kept))}
    nodes = [*live_linears(graph), *cells]
    by_op = {
        op: {
            "quantized": sum(node.op == op and id(node) in quantized for node in nodes),
            "total": sum(node.op == op for node in nodes),
        }
        for op in dict.fromkeys(node.op for node in nodes)
    }
    return {
        "linears": len(nodes),
        "quantized": len(quantized),
        "by_op": by_op,
        "quantized_nodes": [node.name for node in (*cells, *(site.node for site in kept))],
    }


def range_facts(linear: Linear) -> dict[str, Any]:
    """What a report says of a linear: what it reads, the largest value of its weight, and how its channels differ."""
    weight = linear.weight()
    rows = tuple(range(1, weight.ndim))
    largest = np.maximum(weight.max(rows, initial=0), -weight.min(rows, initial=0)).astype(np.float64)
    return {
        "node": linear.name,
        "op": linear.node.op,
        "tensor": linear.data.name,
        "weight": float(largest.max(initial=0)),
        "weight_outliers": outlier_ratio(largest),
    }


Codes = dict[str, tuple[np.ndarray, np.ndarray]]  # codes and scales by the name of the linear node


class Inserter:
    """Makes QDQ nodes and remembers them, so that readers of one tensor, or of one weight, share them.

    ``codes`` are those of a rounder, or of an inserter on a copy of the graph, so that no weight is rounded twice.
    ``centered``: by name of the linear, the c of those that read x - c, and of those that write it (see ``center``).
    ``inside``: by name of the linear, what the places of its kernel read (``borders``), for the correction of biases.
    """

    def __init__(self, graph: gs.Graph, symmetric: bool = True, codes: Codes | None = None, format: Format = INT8):
        self.graph = graph
        self.symmetric = symmetric
        self.format = format
        self._codes = {} if codes is None else codes
        self._before: dict[int, list[gs.Node]] = {}
        self._after: dict[int, list[gs.Node]] = {}
        self._pairs: dict[Hashable, gs.Variable] = {}
        self._weights: dict[Hashable, gs.Variable] = {}
        self.stored: dict[Hashable, list[gs.Constant]] = {}
        self.centered: dict[str, dict[str, float]] = {"read": {}, "written": {}}
        self.inside: Mapping[str, np.ndarray] = {}

    def activation(self, tensor: gs.Variable, seen: Range, readers: Sequence[gs.Node], floating: str = "") -> None:
        """Lets ``readers`` read a tensor through a Q and a DQ node, with codes of the type ``floating`` if given."""
        key = id(tensor), floating
        if key not in self._pairs:
            dtype = edit.dtype(tensor) or np.dtype(np.float32)
            scale, zero_point = seen.parameters(self.symmetric, dtype, floating)
            s = constant(self.graph, f"{tensor.name}_scale", scale)
            z = constant(self.graph, f"{tensor.name}_zero_point", zero_point)
            quantized = gs.Variable(free_name(self.graph, f"{tensor.name}_quantized"), zero_point.dtype, tensor.shape)
            restored = gs.Variable(free_name(self.graph, f"{tensor.name}_dequantized"), dtype, tensor.shape)
            pair = [
                gs.Node(op, free_name(self.graph, f"{tensor.name}_{op}"), inputs=[data, s, z], outputs=[result])
                for op, data, result in (
                    ("QuantizeLinear", tensor, quantized),
                    ("DequantizeLinear", quantized, restored),
                )
            ]
            self._behind(tensor, pair)
            self._pairs[key] = restored
        edit.redirect(tensor, self._pairs[key], readers)

    def activation_fp4(self, tensor: gs.Variable, limit: float, readers: Sequence[gs.Node]) -> None:
        """Lets ``readers`` read a tensor in NVFP4: E2M1 codes, and a scale for 16 of them made at run time.

        The operator is TensorRT's own. Of the calibration only the largest magnitude counts: E4M3 holds the scales in
        units of limit / (6 * 448).
        """
        key = id(tensor), "fp4"
        if key not in self._pairs:
            dtype = edit.dtype(tensor) or FLOAT
            unit = constant(self.graph, f"{tensor.name}_unit", positive_scale(limit, _NVFP4, FLOAT))
            codes, scales = self._new(tensor, "codes", _FP4), self._new(tensor, "scales", _FP8)
            quantize = self._node(tensor, "TRT_FP4DynamicQuantize", [tensor, unit], codes)
            quantize.outputs.append(scales)
            quantize.domain = "trt"
            quantize.attrs = {"axis": -1, "block_size": 16, "scale_type": onnx.TensorProto.FLOAT8E4M3FN}
            nodes, factor = self._scales_of(tensor, scales, unit, dtype)
            restored = self._new(tensor, "dequantized", dtype)
            last = self._node(tensor, "DequantizeLinear", [codes, factor], restored)
            last.attrs = {"axis": -1, "block_size": 16}
            self._behind(tensor, [quantize, *nodes, last])
            self._pairs[key] = restored
        edit.redirect(tensor, self._pairs[key], readers)

    def _scales_of(
        self, of: gs.Tensor, codes: gs.Tensor, unit: gs.Tensor, dtype: np.dtype
    ) -> tuple[list[gs.Node], gs.Variable]:
        """The nodes that make scales in ``dtype`` of E4M3 codes, and the scales."""
        factor = self._new(of, "factor", FLOAT)
        nodes = [self._node(of, "DequantizeLinear", [codes, unit], factor)]
        if dtype != FLOAT:
            wide, factor = factor, self._new(of, "factor_cast", dtype)
            nodes.append(self._node(of, "Cast", [wide], factor))
            nodes[-1].attrs = {"to": onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))}
        return nodes, factor

    def _new(self, of: gs.Tensor, what: str, dtype: np.dtype) -> gs.Variable:
        return gs.Variable(free_name(self.graph, f"{of.name}_{what}"), dtype)

    def _node(self, of: gs.Tensor, op: str, inputs: list[gs.Tensor], output: gs.Variable) -> gs.Node:
        return gs.Node(op, free_name(self.graph, f"{of.name}_{op}"), inputs=inputs, outputs=[output])

    def _behind(self, tensor: gs.Variable, nodes: list[gs.Node]) -> None:
        source = edit.producer(tensor)
        place = self._before.setdefault(-1, []) if source is None else self._after.setdefault(id(source), [])
        place += nodes

    def weight(
        self, linear: Linear, seen: Range | None = None, mean: np.ndarray | None = None, offset: float = 0.0
    ) -> np.ndarray:
        """Puts the int8 weight behind DequantizeLinear at a linear node; returns its scales, (out,).

        With the range ``seen`` of its activation no scale is so small that the bias would leave int32 in steps of
        s_x * s_W: runtimes that compute in integers store it so, and a nearly dead channel with a bias would overflow.
        With the ``mean`` of each input channel the bias takes back what rounding the weight does on average,
        b' = b - (W_q - W) E[x], wherever the node has a bias or a place for one. The bias of a node that reads
        x - ``offset`` takes back W_q offset.
        """
        floor = self._smallest_scale(linear, seen)
        known = self._codes.get(linear.name)
        if known is None or np.any(known[1] < np.asarray(floor, known[1].dtype)):
            self._codes[linear.name] = self.format.codes(linear.weight(), linear.dtype, floor)
        values, scales = self._codes[linear.name]
        if offset:
            rounded = values.astype(np.float64) * scales.astype(np.float64).reshape(-1, *[1] * (values.ndim - 1))
            bias, all_alike = linear.bias(), np.full(linear.channels[1], offset)
            linear.set_bias((0.0 if bias is None else bias) + linear.respond(rounded, all_alike))
        self.store(linear, Rounded(values, scales[:, None], mean=mean), self.format, scales.tobytes())
        return scales

    def store(
        self, linear: Linear, layer: Rounded, format: Format, variant: Hashable = None, inputs_first: bool = False
    ) -> None:
        """Lets a linear node read a rounded weight.

        Readers of one weight share its codes where ``variant`` is the same. ``layer.mean``: as for ``weight``. With
        ``inputs_first`` a Gemm gets its weight as (in, out).
        """
        self.correct_bias(linear, layer, format)
        key = self.key(linear, variant)
        if key not in self._weights:
            self._weights[key] = self._stored(linear, layer, format, inputs_first)
        self._connect(linear, key, inputs_first)

    def correct_bias(self, linear: Linear, layer: Rounded, format: Format) -> None:
        """Lets the bias take back what rounding the weight does on average, where there is a place and a mean."""
        mean, later = layer.mean, layer.later
        if mean is None or not linear.takes_bias:
            return
        weight, old = linear.weight(), linear.bias()
        restored = layer.restored(format)
        inside = self.inside.get(linear.name, 1.0)
        missed = linear.respond((restored - weight) * inside, mean)
        if later is not None:
            missed += linear.respond(restored * inside, later - mean)
        with contextlib.suppress(DoesNotFit):  # a float16 bias at the end of its type stays as it is
            linear.set_bias((0.0 if old is None else old) - missed)

    def shared(self, linear: Linear, inputs_first: bool = False, variant: Hashable = None) -> bool:
        """Lets a linear node read the codes that another reader of its weight has; whether there are any."""
        key = self.key(linear, variant)
        if key in self._weights:
            self._connect(linear, key, inputs_first)
        return key in self._weights

    def key(self, linear: Linear, variant: Hashable = None) -> Hashable:
        """What linears have in common that may read the same codes."""
        alpha = linear.node.attrs.get("alpha", 1.0) if linear.node.op == "Gemm" else 1.0
        chain = tuple(id(node) for node in linear.chain)
        return id(linear.source), chain, weight_axis(linear), linear.groups, alpha, variant

    def _stored(self, linear: Linear, layer: Rounded, format: Format, inputs_first: bool) -> gs.Variable:
        axis, flip, base = weight_axis(linear), inputs_first and linear.node.op == "Gemm", layer.base

        def oriented(values: np.ndarray) -> np.ndarray:
            return np.ascontiguousarray(values.T if flip else linear.unorient(values))

        attrs, zeros = {"axis": 1 if flip else axis}, layer.zeros
        if format.group:
            steps = oriented(layer.scales if base is None else format.steps(layer.scales, base))
            zeros = None if zeros is None else oriented(zeros.astype(format.dtype))
            attrs = {"axis": 1 - attrs["axis"], "block_size": format.group}
        else:
            steps = layer.scales[:, 0]
        if base is not None and format.grid.startswith("int"):
            steps = steps.astype(linear.dtype)
        constants = self.constants(linear.source.name, oriented(layer.codes), steps, zeros)
        if base is not None and format.grid == "fp8":
            return self._in_fp4(linear, constants, base, attrs)
        restored = self.dequantized(linear.source.name, constants, attrs, linear.node)
        return self._in_int8(linear, restored, base, axis) if base is not None else restored

    def _in_fp4(self, linear: Linear, constants: list[gs.Constant], base: np.ndarray, attrs: dict) -> gs.Variable:
        """DQ(codes, DQ(scales in E4M3, base)): the weight in NVFP4."""
        codes, scales, _ = constants
        unit = constant(self.graph, f"{linear.source.name}_unit", base.reshape(()))
        nodes, factor = self._scales_of(linear.source, scales, unit, linear.dtype)
        restored = self._new(linear.source, "dequantized", linear.dtype)
        nodes.append(self._node(linear.source, "DequantizeLinear", [codes, factor], restored))
        nodes[-1].attrs = attrs
        self._before.setdefault(id(linear.node), []).extend(nodes)
        return restored

    def _in_int8(self, linear: Linear, steps: gs.Variable, base: np.ndarray, axis: int) -> gs.Variable:
        """DQ(Q(integers)): codes times integer scales, of which TensorRT makes a weight in int8 when it starts."""
        name, dtype = linear.source.name, linear.dtype
        one = constant(self.graph, f"{name}_one", np.ones(len(base), dtype))
        zero = constant(self.graph, f"{name}_zero", np.zeros(len(base), np.int8))
        scales = constant(self.graph, f"{name}_base", positive_scale(base[:, 0], 1, dtype))
        integers, restored = (
            self._new(linear.source, "integers", np.dtype(np.int8)),
            self._new(linear.source, "int8", dtype),
        )
        nodes = [
            self._node(linear.source, "QuantizeLinear", [steps, one, zero], integers),
            self._node(linear.source, "DequantizeLinear", [integers, scales, zero], restored),
        ]
        for node in nodes:
            node.attrs = {"axis": axis}
        self._before.setdefault(id(linear.node), []).extend(nodes)
        return restored

    def _connect(self, linear: Linear, key: Hashable, inputs_first: bool) -> None:
        edit.set_input(linear.node, linear.weight_input, self._weights[key])
        if "alpha" in linear.node.attrs:
            linear.node.attrs["alpha"] = 1.0
        if inputs_first and linear.node.op == "Gemm":  # ONNX Runtime fuses this form alone
            if (bias := linear.bias()) is not None:
                linear.set_bias(bias)
            linear.node.attrs["transB"] = 0

    def _smallest_scale(self, linear: Linear, seen: Range | None) -> np.ndarray | float:
        bias = linear.bias()
        if seen is None or bias is None:
            return 0.0
        step = float(seen.parameters(self.symmetric, np.dtype(np.float32))[0])
        return np.abs(bias) / (2.0**30 * step)

    def fusable(self, linear: Linear) -> None:
        """Gives a MatMul in front of an Add a form that ONNX Runtime multiplies in integers.

        ONNX Runtime makes a float Gemm of both, where the matrix has two axes or the bias has one. So the product of
        two-dimensional matrices becomes a Gemm here, whose bias is int32; elsewhere the bias gets three axes.
        """
        node, size = linear.node, edit.rank(linear.data)
        adds = [reader for reader in edit.consumers(node.outputs[0]) if reader.op == "Add"]
        if node.op != "MatMul" or not adds or size is None:
            return
        bias = linear.bias()
        if size > 2 and bias is not None and linear.out_axis == -1:
            linear.set_bias(bias.reshape(1, 1, -1))
        if size != 2:
            return
        if linear.bias_node is not None and bias is not None:
            result = linear.output
            edit.detach(linear.bias_node)
            edit.set_output(node, 0, result)
            edit.set_constant(self.graph, node, 2, bias.astype(linear.dtype), f"{linear.name}_bias")
        node.op, linear.bias_node = "Gemm", None

    def keep_apart(self, tensor: gs.Variable) -> None:
        """Puts a Sum of one term behind the node that writes a tensor, which ONNX Runtime does not see through.

        ONNX Runtime does not fuse a product whose result is read by QuantizeLinear and by others; and it moves a
        QuantizeLinear in front of a float MaxPool, which takes thirty times as long in uint8. Every other operator that
        does nothing it removes.
        """
        node = edit.producer(tensor)
        assert node is not None
        term = gs.Variable(free_name(self.graph, f"{tensor.name}_term"), tensor.dtype, tensor.shape)
        edit.set_output(node, 0, term)
        name = free_name(self.graph, f"{tensor.name}_Sum")
        edit.insert_after(self.graph, node, gs.Node("Sum", name, inputs=[term], outputs=[tensor]))

    def keep_float(self, node: gs.Node) -> None:
        """Puts a Sum of one term between a DequantizeLinear and a node that stays float.

        ONNX Runtime quantizes the float weight of a Conv, ConvTranspose or Gemm behind DequantizeLinear by itself, with
        one scale for the whole weight.
        """
        restored = node.inputs[0]
        term = gs.Variable(free_name(self.graph, f"{node.name}_float"), restored.dtype, restored.shape)
        hides = gs.Node("Sum", free_name(self.graph, f"{node.name}_Sum"), inputs=[restored], outputs=[term])
        self._before.setdefault(id(node), []).append(hides)
        edit.set_input(node, 0, term)

    def bias(self, linear: Linear, scales: np.ndarray, seen: Range) -> None:
        """Puts an int32 bias behind DequantizeLinear at a Conv or Gemm that has one."""
        bias = linear.bias()
        if bias is None or linear.node.op == "MatMul":
            return
        step = float(seen.parameters(self.symmetric, scales.dtype)[0])
        combined = np.maximum(scales.astype(np.float64) * step, 1e-30)
        stored = np.rint(bias / combined).astype(np.int32)  # fits: see _smallest_scale
        constants = self.constants(f"{linear.name}_bias", stored, combined.astype(scales.dtype))[:2]
        restored = self.dequantized(f"{linear.name}_bias", constants, {"axis": 0}, linear.node)
        edit.set_input(linear.node, 2, restored)
        if "beta" in linear.node.attrs:
            linear.node.attrs["beta"] = 1.0

    def finish(self) -> None:
        """Puts the new nodes into the node list, each where its inputs are known."""
        nodes = list(self._before.get(-1, ()))
        for node in self.graph.nodes:
            nodes += [*self._before.get(id(node), ()), node, *self._after.get(id(node), ())]
        self.graph.nodes[:] = nodes

    def constants(
        self, name: str, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None = None
    ) -> list[gs.Constant]:
        """Codes, scales and zero points (by default 0) as constants named after ``name``."""
        zeros = np.zeros(scales.shape, codes.dtype) if zeros is None else zeros
        return [
            constant(self.graph, f"{name}_quantized", codes),
            constant(self.graph, f"{name}_scale", scales),
            constant(self.graph, f"{name}_zero_point", zeros),
        ]

    def dequantized(
        self, name: str, constants: list[gs.Constant], attrs: dict[str, int], reader: gs.Node
    ) -> gs.Variable:
        """The result of a DequantizeLinear of ``constants``, which will stand in front of ``reader``."""
        codes, scales = constants[:2]
        restored = gs.Variable(free_name(self.graph, f"{name}_dequantized"), scales.dtype, list(codes.shape))
        own = free_name(self.graph, f"{name}_DequantizeLinear")
        node = gs.Node("DequantizeLinear", own, attrs, list(constants), [restored])
        self._before.setdefault(id(reader), []).append(node)
        return restored

    def before(self, node: gs.Node, new: list[gs.Node]) -> None:
        """Puts new nodes directly in front of a node."""
        self._before.setdefault(id(node), []).extend(new)

    def after(self, node: gs.Node, new: list[gs.Node]) -> None:
        """Puts new nodes directly behind a node."""
        self._after[id(node)] = [*new, *self._after.get(id(node), ())]
