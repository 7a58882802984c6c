"""Scales of quantizers that float16 would round to zero, or to a few bits.

    (q - z) s = (q' - z) s'     with s' = max(s, 2^-17),  q' = z + round((q - z) s / s')

A range [-128 s, 127 s] lies within [-128 s', 127 s'], so quantized activations do not clip where they did not before.
Stored codes move with their scale. The weights of a channel that is nearly dead have such scales.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.layers.formats import positive_scale, spread
from channelfold.runtime.io import edit
from channelfold.runtime.io.convert import all_graphs

_LEAST = positive_scale(0, 1, np.dtype(np.float16)).astype(np.float32)


def raise_scales(graph: gs.Graph) -> None:
    """Raises the float32 scales of all quantizers that are too small for float16."""
    for node in [node for part in all_graphs(graph) for node in part.nodes]:
        if node.op not in ("QuantizeLinear", "DequantizeLinear") or not edit.is_standard(node):
            continue
        scale = edit.value(node.inputs[1])
        if scale is None or scale.dtype != np.float32:
            continue
        raised = np.maximum(scale, _LEAST)
        if np.array_equal(raised, scale):
            continue
        codes = edit.value(node.inputs[0])
        if node.op == "DequantizeLinear" and codes is not None:
            zero = edit.value(node.inputs[2]) if edit.has_input(node, 2) else None
            moved = _moved(codes, zero, scale / raised, node)
            edit.set_constant(graph, node, 0, moved, f"{node.name}_codes")
        edit.set_constant(graph, node, 1, raised, f"{node.name}_scale")


def _moved(codes: np.ndarray, zero: np.ndarray | None, ratio: np.ndarray, node: gs.Node) -> np.ndarray:
    """The codes of the same values, for scales that are 1 / ``ratio`` times as large."""
    origin = 0.0 if zero is None else spread(zero.astype(np.float64), codes.shape, node.attrs)
    values = (codes.astype(np.float64) - origin) * spread(ratio.astype(np.float64), codes.shape, node.attrs)
    integer = codes.dtype.name.lstrip("u").startswith("int")
    return ((np.rint(values) if integer else values) + origin).astype(codes.dtype)
