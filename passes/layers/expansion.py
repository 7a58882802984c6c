"""Weights that a file stores in 8 bits and a runtime expands once, when it loads the file.

    W  =  Reshape((Cast(q) - 128) s)        q uint8, of one shape with W but for the groups that share a scale s

ONNX Runtime and TensorRT compute what depends on constants alone before the first run, so the node that reads W runs as
with a float constant. Behind a DequantizeLinear neither does: ONNX Runtime expands the weight on every call, and
TensorRT launches a kernel more. TensorRT takes uint8 codes alone in front of a Cast, no int8.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.runtime.io import edit

LEAST = 6_000  # weights; fewer save less than 17 kB
_STEPS = ("Reshape", "Mul", "Sub", "Cast")


def codes_behind(node: gs.Node | None) -> gs.Constant | None:
    """The codes that a node expands, or helps to expand; None for any other node."""
    for op in _STEPS:
        if node is None or not all(isinstance(tensor, gs.Constant) for tensor in node.inputs[1:]):
            return None
        if node.op != op:
            continue
        source = node.inputs[0]
        if op == "Cast" and isinstance(source, gs.Constant):
            stores = np.dtype(source.dtype) == np.uint8 and math.prod(source.shape) >= LEAST
            return source if stores else None
        node = edit.producer(source)
    return None
