"""Products that TensorRT builds and computes wrongly: blocks of a weight with scales of their own, times an activation
that is quantized.

    MatMul(DQ(Q(x)), DQ<block_size=g>(W_q))        every block is multiplied by the scales of the first block

There is no warning, whether the codes are int4, int8 or fp8, whatever the axis of the blocks; with tensorrt_rtx 1.7.1
for every SM. The same weight is right with a float activation, and so are two operands in NVFP4, where both have
blocks.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from channelfold.runtime.io import edit
from channelfold.runtime.io.convert import all_graphs

# Operators that TensorRT moves DequantizeLinear through, toward the product.
_MOVES = {
    *("Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split", "Gather", "Concat"),
    *("Expand", "Tile", "Cast", "Neg", "Abs", "Mul", "Div", "Max", "Min", "Sum", "MaxPool", "Dropout", "Where"),
}
_PRODUCTS = ("MatMul", "Gemm", "Einsum", "Conv", "ConvTranspose")


def wrong_products(graph: gs.Graph) -> list[str]:
    """The names of the nodes, in bodies too, that multiply an operand with scales by block by one without."""
    return [
        node.name
        for part in all_graphs(graph)
        for node in part.nodes
        if node.op in _PRODUCTS and edit.is_standard(node) and _is_wrong(node)
    ]


def _is_wrong(node: gs.Node) -> bool:
    sides = [_dequantizers(tensor, {}) for tensor in node.inputs[:2]]
    blocked = [any(_has_blocks(source) for source in side) for side in sides]
    return all(sides) and blocked[0] != blocked[1] if len(sides) == 2 else False


def _dequantizers(tensor: gs.Tensor, seen: dict[int, None]) -> list[gs.Node]:
    """The DequantizeLinear nodes that TensorRT may move to the reader of a tensor."""
    node = edit.producer(tensor)
    if node is None or id(node) in seen:
        return []
    seen[id(node)] = None
    if node.op == "DequantizeLinear":
        return [node]
    return [found for source in node.inputs for found in _dequantizers(source, seen)] if node.op in _MOVES else []


def _has_blocks(node: gs.Node) -> bool:
    """Whether a DequantizeLinear has more than one scale along the axis of its blocks, as far as that is known."""
    size, scales = node.attrs.get("block_size", 0), node.inputs[1]
    if not size:
        return False
    count = len(scales.shape or ())
    return count == 0 or scales.shape[node.attrs.get("axis", 1) % count] != 1
