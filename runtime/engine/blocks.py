"""What TensorRT builds from weights with scales by block and computes wrongly, without a warning.

    MatMul(DQ(Q(x)), DQ<block_size=g>(W_q))    every block is multiplied by the scales of the first block
    DQ<block_size=g>(W_q), K not in whole g    the scales are spread evenly: K = 180 and g = 64 become blocks of 60

Both whether the codes are int4, int8 or fp8, whatever the axis of the blocks; with tensorrt_rtx 1.7.1 for every SM. The
same weight in whole blocks is right with a float activation, and so are two operands in NVFP4, where both have blocks.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_graphsurgeon as gs

from channelfold.runtime.errors import BuildError
from channelfold.runtime.io import edit
from channelfold.runtime.io.convert import all_graphs

# Operators that TensorRT moves DequantizeLinear through, toward the product.
_MOVES = {
    *("Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split", "Gather", "Concat"),
    *("Expand", "Tile", "Cast", "Neg", "Abs", "Mul", "Div", "Max", "Min", "Sum", "MaxPool", "Dropout", "Where"),
}
_PRODUCTS = ("MatMul", "Gemm", "Einsum", "Conv", "ConvTranspose")


FIRST_SCALES = "an activation is quantized and its weight has scales by block, of which all blocks would get the first"
_UNEVEN = "its weight has {size} entries in blocks of {block}, which TensorRT would make {made}"


def wrong_products(graph: gs.Graph) -> dict[str, str]:
    """The nodes, in bodies too, that TensorRT would compute wrongly without a word, each with the reason."""
    found = {}
    for node in (node for part in all_graphs(graph) for node in part.nodes):
        if node.op in _PRODUCTS and edit.is_standard(node) and _is_wrong(node):
            found[node.name] = FIRST_SCALES
        elif node.op == "DequantizeLinear" and (reason := _uneven(node)):
            found[node.name] = reason
    return found


def refusal(model: str, nodes: Mapping[str, str]) -> BuildError:
    """The error for nodes that TensorRT would compute wrongly."""
    some = "; ".join(f"{name}: {reason}" for name, reason in list(nodes.items())[:3])
    more = f"; {len(nodes) - 3} more" if len(nodes) > 3 else ""
    return BuildError(
        f"TensorRT would compute {len(nodes)} nodes of {model} wrongly, without a warning: {some}{more}",
        "Keep these activations in float, or give the weights one scale for each output channel",
    )


def _uneven(node: gs.Node) -> str:
    """Why TensorRT misreads the blocks of a DequantizeLinear; empty where it refuses them or reads them rightly."""
    data, scales, block = node.inputs[0].shape, node.inputs[1].shape, node.attrs.get("block_size", 0)
    if not block or not data or not scales:
        return ""
    size, count = (shape[node.attrs.get("axis", 1) % len(shape)] for shape in (data, scales))
    if not isinstance(size, int) or not isinstance(count, int) or size % block == 0 or count < 2 or size % count:
        return ""
    return _UNEVEN.format(size=size, block=block, made=size // count)


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
