"""Weights that a file stores in 8 bits and a runtime expands once, when it loads the file.

    W  =  Reshape((Cast(q) - 128) s)        q uint8, s float32 for groups of weights; float16 behind one more Cast

ONNX Runtime and TensorRT compute what depends on constants alone before the first run, so the node that reads W runs as
with a float constant. Behind a DequantizeLinear neither does: ONNX Runtime expands the weight on every call, and
TensorRT launches a kernel more. TensorRT takes uint8 codes alone in front of a Cast, no int8; and ONNX Runtime computes
a difference of float16 in advance nowhere on a CPU, for lack of a kernel.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.runtime.io import edit

LEAST = 6_000  # weights; fewer save less than 17 kB
_STEPS = ("Cast", "Sub", "Mul", "Reshape")


def codes_behind(node: gs.Node | None) -> gs.Constant | None:
    """The codes that a node expands, or helps to expand; None for any other node."""
    while node is not None and node.op in _STEPS and all(isinstance(t, gs.Constant) for t in node.inputs[1:]):
        source = node.inputs[0]
        if isinstance(source, gs.Constant):
            stores = node.op == "Cast" and np.dtype(source.dtype) == np.uint8
            return source if stores and math.prod(source.shape) >= LEAST else None
        node = edit.producer(source)
    return None
