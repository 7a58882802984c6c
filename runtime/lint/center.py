"""Zero points of activations become part of the biases: the same codes, with the zero point 0 that TensorRT asks for.

    DQ(Q(x)), scale s, zero point z   =   DQ(Q'(x - c)) + c,     c = s (128 - z) for uint8, -s z for int8
    W (x' + c) + b                    =   W x' + (b + W c)

The zero padding of a Conv becomes a Pad with -c in front of a quantizer of its own. What is no product gets x' + c.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.layers.formats import SCALES
from channelfold.passes.layers.switchboard import dequantized
from channelfold.passes.operators import operator
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import constant, free_name
from channelfold.runtime.lint.reading import is_quantizer, kind, origin, weight


def centered(graph: gs.Graph, group: Sequence[gs.Node]) -> bool:
    """Gives a QuantizeLinear and the DequantizeLinear nodes behind it the zero point 0; whether that is possible."""
    first, *others = group
    scale, zero = (edit.value(tensor) if tensor is not None else None for tensor in _parameters(first))
    if scale is None or scale.size != 1 or scale.dtype not in SCALES or any(_differ(first, node) for node in others):
        return False
    readers = [(node, reader) for node in others for reader in edit.consumers(node.outputs[0])]
    products = [pair for pair in readers if _is_product(*pair)]
    rest = [pair for pair in readers if not _is_product(*pair)]
    if not products or any(edit.is_output(graph, node.outputs[0]) for node in others):
        return False
    if not all(_takes_back(reader) for _, reader in products) or any(_leads_to_a_product(reader) for _, reader in rest):
        return False
    middle = 128 if kind(first) == np.uint8 else 0
    step, point = float(scale.reshape(())), 0 if zero is None else int(zero.reshape(()))
    offset = float(np.asarray(step * (middle - point), scale.dtype))
    for _, reader in products:
        _move_bias(graph, reader, offset)
    _restore(graph, rest, offset, scale.dtype)
    moved = _node(graph, "Sub", first, [first.inputs[0], constant(graph, f"{first.name}_center", _like(offset, scale))])
    edit.insert(graph, moved, before=first)
    edit.set_input(first, 0, moved.outputs[0])
    parameters = (
        constant(graph, f"{first.name}_scale", scale.reshape(())),
        constant(graph, f"{first.name}_zero_point", np.array(0, np.int8)),
    )
    for node in group:
        for place, tensor in enumerate(parameters, 1):
            edit.set_input(node, place, tensor)
        node.attrs.pop("output_dtype", None)
    for node in others:
        tensor = node.inputs[0]
        while tensor is not moved.outputs[0]:  # codes that are moved between Q and DQ
            tensor.dtype = np.dtype(np.int8)
            writer = edit.producer(tensor)
            assert writer is not None
            tensor = writer.inputs[0]
    for node, reader in products:
        if any(reader.attrs.get("pads") or ()):
            _pad(graph, node, reader, moved.outputs[0], parameters, offset)
    edit.remove_dead(graph)
    return True


def _parameters(node: gs.Node) -> tuple[gs.Tensor, gs.Tensor | None]:
    return node.inputs[1], node.inputs[2] if edit.has_input(node, 2) else None


def _differ(first: gs.Node, node: gs.Node) -> bool:
    """Whether a DequantizeLinear has other parameters than its QuantizeLinear."""
    for mine, other in zip(_parameters(first), _parameters(node), strict=True):
        own, its = (np.zeros(1) if tensor is None else edit.value(tensor) for tensor in (mine, other))
        if own is None or its is None or not np.array_equal(own.reshape(-1), its.reshape(-1)):
            return True
    return False


def _is_product(node: gs.Node, reader: gs.Node) -> bool:
    return operator(reader).weighted and reader.inputs[0] is node.outputs[0]


def _takes_back(reader: gs.Node) -> bool:
    """Whether the bias of a product can take back W c: both are constants, and the padding is known."""
    attrs, stored = reader.attrs, weight(reader, 1)
    if reader.op not in ("Conv", "Gemm", "MatMul") or stored is None or stored.node.attrs.get("block_size"):
        return False
    if attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or attrs.get("transA", 0):
        return False
    if attrs.get("alpha", 1.0) != 1.0 or attrs.get("beta", 1.0) != 1.0:
        return False
    if any(edit.value(tensor) is None for tensor in stored.node.inputs if not tensor.is_empty()):
        return False
    if any(node.op not in ("Transpose", "Identity") for node in stored.chain):
        return False
    return not (reader.op != "MatMul" and edit.has_input(reader, 2)) or edit.value(reader.inputs[2]) is not None


def _leads_to_a_product(reader: gs.Node) -> bool:
    """Whether a product reads what a node that only moves elements, or takes the largest, makes of its input."""
    if operator(reader).weighted:
        return True
    if not reader.outputs or origin(reader.outputs[0]) is reader.outputs[0]:
        return False
    return any(_leads_to_a_product(node) for node in edit.consumers(reader.outputs[0]) if not is_quantizer(node))


def _move_bias(graph: gs.Graph, reader: gs.Node, offset: float) -> None:
    """Adds W c to the bias of a product."""
    stored = weight(reader, 1)
    assert stored is not None
    codes, scale, *zero = (edit.value(tensor) for tensor in stored.node.inputs)
    assert codes is not None
    assert scale is not None
    values = dequantized(codes, scale, zero[0] if zero else None, stored.node.attrs).astype(np.float64)
    for node in reversed(stored.chain):
        if node.op == "Transpose":
            values = values.transpose(node.attrs.get("perm", range(values.ndim)[::-1]))
    if reader.op == "Conv":
        summed = values.reshape(len(values), -1).sum(axis=1)
    else:
        summed = values.sum(axis=-1 if reader.attrs.get("transB", 0) else -2)
    if reader.op == "MatMul":
        result = reader.outputs[0]
        edit.set_output(reader, 0, gs.Variable(free_name(graph, f"{result.name}_centered"), result.dtype, result.shape))
        new = constant(graph, f"{reader.name}_taken_back", _like(summed * offset, scale))
        name = free_name(graph, f"{reader.name}_Add")
        edit.insert_after(graph, reader, gs.Node("Add", name, {}, [reader.outputs[0], new], [result]))
        return
    old = edit.value(reader.inputs[2]) if edit.has_input(reader, 2) else None
    bias = summed * offset + (0.0 if old is None else old.astype(np.float64))
    edit.set_input(reader, 2, constant(graph, f"{reader.name}_bias", _like(bias, scale)))


def _restore(graph: gs.Graph, readers: Sequence[tuple[gs.Node, gs.Node]], offset: float, dtype: np.dtype) -> None:
    """Lets what is no product read x' + c."""
    sums: dict[int, gs.Node] = {}
    for node, reader in readers:
        tensor = node.outputs[0]
        if id(node) not in sums:
            by = constant(graph, f"{node.name}_center", np.array(offset, dtype))
            sums[id(node)] = _node(graph, "Add", node, [tensor, by])
            edit.insert_after(graph, node, sums[id(node)])
        edit.redirect(tensor, sums[id(node)].outputs[0], [reader])


def _pad(
    graph: gs.Graph, node: gs.Node, reader: gs.Node, source: gs.Tensor, parameters: Sequence[gs.Tensor], offset: float
) -> None:
    """Gives a Conv with padding a quantizer of its own, of x - c with -c around it."""
    pads = list(reader.attrs["pads"])
    wide = [0, 0, *pads[: len(pads) // 2], 0, 0, *pads[len(pads) // 2 :]]
    fill = constant(graph, f"{reader.name}_padding", np.array(-offset, edit.dtype(parameters[0])))
    pad = _node(graph, "Pad", reader, [source, constant(graph, f"{reader.name}_pads", np.array(wide, np.int64)), fill])
    quantize = _node(graph, "QuantizeLinear", reader, [pad.outputs[0], *parameters])
    restored = _node(graph, "DequantizeLinear", reader, [quantize.outputs[0], *parameters])
    quantize.outputs[0].dtype = np.dtype(np.int8)
    for new in (pad, quantize, restored):
        edit.insert(graph, new, before=reader)
    edit.set_input(reader, 0, restored.outputs[0])
    reader.attrs["pads"] = [0] * len(pads)


def _node(graph: gs.Graph, op: str, of: gs.Node, inputs: list[gs.Tensor]) -> gs.Node:
    name = free_name(graph, f"{of.name}_{op}")
    return gs.Node(op, name, {}, inputs, [gs.Variable(f"{name}_result", edit.dtype(inputs[0]))])


def _like(values: float | np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.asarray(values, scale.dtype)
