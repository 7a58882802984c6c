"""Recurrent cells: the weights W and R of LSTM, GRU and RNN, stored in the format of the weights.

    y = LSTM(x, W, R)   becomes    tensorrt      y = LSTM(x, DQ(W_q), DQ(R_q))
                                   onnxruntime   y = DynamicQuantizeLSTM(x, W_q^T, R_q^T),  which rounds x and h itself

W is (directions, gates * hidden, inputs) and R the same over the hidden channels; an output row has a scale, which both
directions share in the first form. TensorRT-RTX 1.7 keeps the codes of LSTM and RNN in the engine (of an LSTM of 512
hidden channels 4.1 MB where float takes 10.2), and fails to build a GRU with them. ONNX Runtime would expand the codes
to float on every call, which takes 1.1 to 2.8 times as long as float; its kernel for LSTM takes .30 to .55 of it. That
kernel quantizes activations, so a pass that leaves these alone has no form for ONNX Runtime. Of a cell without a form
``storage`` stores the weights.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Outcome, Refused
from channelfold.passes.layers.formats import SCALES, Format
from channelfold.passes.operators import operator
from channelfold.passes.quantize import Quantize, QuantizeWeights
from channelfold.passes.quantize.qdq import MIN_CHANNELS, Inserter, excluded
from channelfold.passes.quantize.rounders import by_scale, rounded
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import constant, read

_X, _W, _R, _LAST = 0, 1, 2, 7  # inputs of a cell; the last is the peepholes of an LSTM


def cells(graph: gs.Graph) -> Iterator[gs.Node]:
    """Every recurrent cell whose weights are constants."""
    for node in graph.nodes:
        if operator(node).kind == "recurrent" and all(isinstance(node.inputs[i], gs.Constant) for i in (_W, _R)):
            yield node


def quantize_cells(
    graph: gs.Graph, outcome: Outcome, format: Format, step: Quantize | QuantizeWeights
) -> list[gs.Node]:
    """Stores the weights of the cells in the format; returns these cells, and refuses those that stay float."""
    inserter, done = Inserter(graph), []
    for node, op in [(node, node.op) for node in cells(graph)]:
        with outcome.refusing(node.name, f"{op} stays float"):
            _check(node, format, step)
            (_dequantize if step.target == "tensorrt" else _dynamic)(inserter, node, format)
            outcome.change(node.name, f"{op}: weights in {format.dtype.name}")
            done.append(node)
    inserter.finish()
    return done


def _check(node: gs.Node, format: Format, step: Quantize | QuantizeWeights) -> None:
    """Raises Refused where the target has no form for a cell with weights in a format."""
    weights = [node.inputs[_W], node.inputs[_R]]
    kinds = {np.dtype(weight.dtype) for weight in weights}
    groups = [format.fitted(weight.shape[2]).group for weight in weights]
    if reason := excluded(step, node):
        raise Refused(reason)
    if len(kinds) > 1 or not kinds <= set(SCALES):
        raise Refused(f"it computes in {', '.join(map(str, kinds))}, expected float32 or float16")
    if min(weight.shape[2] for weight in weights) < MIN_CHANNELS:
        raise Refused(f"fewer than {MIN_CHANNELS} channels")
    if step.target == "tensorrt" and node.op == "GRU":
        raise Refused("TensorRT fails to build a GRU whose weights are stored in few bits")
    if any(group and weight.shape[2] % group for group, weight in zip(groups, weights, strict=True)):
        raise Refused(f"its inputs are no multiple of the group of {max(groups)}")
    if step.target == "onnxruntime":
        if node.op != "LSTM" or not isinstance(step, Quantize):
            raise Refused("ONNX Runtime would expand its weights to float on every call")
        if kinds != {np.dtype(np.float32)} or node.attrs.get("layout", 0):
            raise Refused("ONNX Runtime has an integer kernel for float32 with the time first alone")
    if not all(np.isfinite(read(weight)).all() for weight in weights):
        raise Refused("its weights hold infinities or NaN")


def _dequantize(inserter: Inserter, node: gs.Node, format: Format) -> None:
    """Lets a cell read its weights through DequantizeLinear."""
    for index in (_W, _R):
        source = node.inputs[index]
        own = format.fitted(source.shape[2])
        if id(source) not in inserter.stored:
            weight = read(source)
            rows = weight.reshape(-1, weight.shape[2]) if own.group else weight.transpose(1, 0, 2)
            layer = rounded(rows, by_scale(own, np.dtype(source.dtype)), own)
            codes = layer.codes.reshape(weight.shape) if own.group else layer.codes.transpose(1, 0, 2)
            scales = layer.scales.reshape(*weight.shape[:2], -1) if own.group else layer.scales[:, 0]
            inserter.stored[id(source)] = inserter.constants(source.name, np.ascontiguousarray(codes), scales)
        attrs = {"axis": 2, "block_size": own.group} if own.group else {"axis": 1}
        edit.set_input(node, index, inserter.dequantized(source.name, inserter.stored[id(source)], attrs, node))


def _dynamic(inserter: Inserter, node: gs.Node, format: Format) -> None:
    """Makes an LSTM the operator of ONNX Runtime that multiplies in integers."""
    graph = inserter.graph
    for place, index in enumerate((_W, _R)):
        source = node.inputs[index]
        if id(source) not in inserter.stored:
            weight = read(source)
            layer = rounded(weight.reshape(-1, weight.shape[2]), by_scale(format, np.dtype(np.float32)), format)
            codes = np.ascontiguousarray(layer.codes.reshape(weight.shape).transpose(0, 2, 1))
            inserter.stored[id(source)] = [
                constant(graph, f"{source.name}_quantized", codes),
                constant(graph, f"{source.name}_scale", layer.scales.reshape(weight.shape[:2])),
                # one for every scale: of one for each direction, which is allowed too, ONNX Runtime 1.32 reads wrongly
                constant(graph, f"{source.name}_zero_point", np.zeros(weight.shape[:2], codes.dtype)),
            ]
        codes, scales, zeros = inserter.stored[id(source)]
        edit.set_input(node, index, codes)
        edit.set_input(node, _LAST + 1 + 2 * place, scales)
        edit.set_input(node, _LAST + 2 + 2 * place, zeros)
    node.op, node.domain = "DynamicQuantizeLSTM", "com.microsoft"
    node.attrs.pop("layout", None)
