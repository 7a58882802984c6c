"""How a quantized graph is read: pairs of Q and DQ, stored weights behind DequantizeLinear, quantized activations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from channelfold.passes.operators import operator
from channelfold.runtime.io import edit
from channelfold.runtime.io.convert import all_graphs


def nodes(graph: gs.Graph, *ops: str) -> Iterator[gs.Node]:
    """The nodes of these operators (of all without any) in a graph and its subgraphs."""
    for part in all_graphs(graph):
        for node in part.nodes:
            if not ops or node.op in ops:
                yield node


def linears(graph: gs.Graph) -> Iterator[gs.Node]:
    """The Conv, ConvTranspose, Gemm and MatMul nodes in a graph and its subgraphs."""
    return (node for node in nodes(graph) if operator(node).weighted)


def is_quantizer(node: gs.Node | None, op: str = "") -> bool:
    """Whether a node is a QuantizeLinear or a DequantizeLinear, or the one of both that ``op`` names."""
    return node is not None and operator(node).kind == "quantize" and node.op in (op or node.op)


def kind(node: gs.Node) -> np.dtype | None:
    """The type of the codes that a QuantizeLinear writes or a DequantizeLinear reads."""
    if edit.has_input(node, 2):
        return edit.dtype(node.inputs[2])
    if node.op == "QuantizeLinear":
        given = node.attrs.get("output_dtype", 0)
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(given)) if given else np.dtype(np.uint8)
    before = edit.producer(node.inputs[0])
    if edit.dtype(node.inputs[0]) is None and before is not None and is_quantizer(before, "QuantizeLinear"):
        return kind(before)
    return edit.dtype(node.inputs[0])


def origin(tensor: gs.Tensor) -> gs.Tensor:
    """The tensor whose elements a tensor holds, seen through the nodes that only move elements."""
    while (node := edit.producer(tensor)) is not None and _moves(node):
        tensor = node.inputs[0]
    return tensor


def _moves(node: gs.Node) -> bool:
    row = operator(node)
    return (row.moves or node.op == "MaxPool") and row.source == 0 and not row.random


def quantized(tensor: gs.Tensor) -> gs.Node | None:
    """The DequantizeLinear that restores an activation; None where a tensor is no quantized activation."""
    node = edit.producer(origin(tensor))
    if node is None or not is_quantizer(node, "DequantizeLinear"):
        return None
    return None if isinstance(stored(node), gs.Constant) else node


def pair(graph: gs.Graph, node: gs.Node) -> list[gs.Node] | None:
    """A QuantizeLinear and every DequantizeLinear that reads its codes; None where others read or return the codes."""
    group, pending = [node], [node.outputs[0]]
    while pending:
        tensor = pending.pop()
        if edit.is_output(graph, tensor):
            return None
        for reader in edit.consumers(tensor):
            if is_quantizer(reader, "DequantizeLinear") and reader.inputs[0] is tensor:
                group.append(reader)
            elif _moves(reader) and reader.inputs[0] is tensor:
                pending += reader.outputs
            else:
                return None
    return group


def serves_product(group: Sequence[gs.Node]) -> bool:
    """Whether a product reads what a pair restores, or an operator that is no part of this graph's main list."""
    pending = [node.outputs[0] for node in group[1:]]
    while pending:
        for reader in edit.consumers(pending.pop()):
            if operator(reader).weighted or is_quantizer(reader) or operator(reader).kind in ("attention", "einsum"):
                return True
            if _moves(reader) or operator(reader).kind == "pool":
                pending += reader.outputs
    return False


def stored(node: gs.Node) -> gs.Tensor:
    """What a DequantizeLinear restores: stored codes, a float constant behind QuantizeLinear, or activations."""
    tensor = origin(node.inputs[0])
    before = edit.producer(tensor)
    return origin(before.inputs[0]) if before is not None and is_quantizer(before, "QuantizeLinear") else tensor


@dataclass(frozen=True)
class Weight:
    """A weight behind DequantizeLinear at input ``index`` of a linear node, with the nodes in between, the last first.

    ``shape`` is that of the codes.
    """

    reader: gs.Node
    index: int
    node: gs.Node
    chain: tuple[gs.Node, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stored(self.node).shape)

    @property
    def scale(self) -> gs.Tensor:
        return self.node.inputs[1]

    @property
    def block(self) -> int:
        return int(self.node.attrs.get("block_size", 0))

    @property
    def by_channel(self) -> bool:
        """Whether there is a scale for each entry of one axis."""
        return not self.block and self.scale.shape is not None and math.prod(self.scale.shape) > 1

    @property
    def axis(self) -> int:
        """The axis along which the scales change: of the channels, or of the blocks."""
        return int(self.node.attrs.get("axis", 1)) % max(len(self.shape), 1)

    @property
    def activation(self) -> gs.Tensor:
        return self.reader.inputs[1 - self.index]

    @property
    def out_axis(self) -> int | None:
        """The axis of the output channels in the codes; None where a chain hides it."""
        axis, size = _out_axis(self.reader, self.index), len(self.shape)
        axis = axis % size if size else 0
        for node in self.chain:
            if node.op == "Transpose":
                axis = list(node.attrs.get("perm", range(size)[::-1]))[axis]
            elif node.op not in ("Identity", "Cast"):
                return None
        return axis


def _out_axis(node: gs.Node, index: int) -> int:
    if node.op == "Gemm":
        return 0 if node.attrs.get("transB", 0) else 1
    if node.op == "MatMul":
        return -1 if index else -2
    return 0 if node.op == "Conv" else 1


def weights(graph: gs.Graph) -> Iterator[Weight]:
    """Every weight behind DequantizeLinear at a linear node."""
    for node in linears(graph):
        for index in operator(node).weights:
            if index < len(node.inputs) and (found := weight(node, index)) is not None:
                yield found


def weight(reader: gs.Node, index: int) -> Weight | None:
    """The weight behind DequantizeLinear at an input of a linear node, if there is one."""
    chain, tensor = [], reader.inputs[index]
    while (node := edit.producer(tensor)) is not None and not is_quantizer(node):
        if not (operator(node).copies or operator(node).kind == "transpose"):
            return None
        chain.append(node)
        tensor = node.inputs[0]
    if node is None or node.op != "DequantizeLinear" or not isinstance(stored(node), gs.Constant):
        return None
    return Weight(reader, index, node, tuple(chain))


def dims(tensor: gs.Tensor) -> str:
    """A shape in words."""
    return "x".join(map(str, tensor.shape or ())) or "scalar"
