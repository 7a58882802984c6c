"""Positions and sizes: floating point numbers made of integers, which 16 bits would round.

float16 has no whole number between 2048 and 2050, bfloat16 none between 256 and 258. What computes with such numbers
(the angles of a rotary embedding, the sizes of a Resize, the steps of a diffusion) stays float32 up to the first
product with a weight. So does what leads from inputs of the model alone to Sin, Cos, or an integer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.cast.kinds import Kinds
from channelfold.passes.operators import operator
from channelfold.runtime.io import edit

_SOURCES = ("Cast", "Range", "ConstantOfShape", "EyeLike")
_ANGLES = ("Sin", "Cos", "Tan")


class Exact:
    """``nodes`` that stay float32, and the ids of the ``tensors`` that are made of integers alone."""

    def __init__(self, nodes: Sequence[gs.Node], kinds: Kinds):
        self._kinds = kinds
        self.tensors: set[int] = set()
        self.nodes: list[gs.Node] = []
        for node in nodes:
            self._take(node)
        known = {id(node) for node in self.nodes}
        for node in nodes:
            if node.op in _ANGLES or self._is_integer(node):
                self.nodes += self._leading(node, known) or []

    def _take(self, node: gs.Node) -> None:
        floats = [t for t in node.inputs if isinstance(t, gs.Variable) and self._kinds.is_float32(t)]
        kind = self._kinds.of(node.inputs[0]) if node.op == "Cast" else np.dtype(int)
        source = node.op in _SOURCES and not floats and kind is not None and kind.kind in "iub"
        if not source and not (floats and all(id(t) in self.tensors for t in floats) and _computes(node)):
            return
        self.tensors |= {id(t) for t in node.outputs if self._kinds.is_float32(t)}
        if not source and not operator(node).moves and not operator(node).asks_shape:
            self.nodes.append(node)

    def _is_integer(self, node: gs.Node) -> bool:
        """Whether a Cast makes an integer of a float32 number."""
        kind = self._kinds.of(node.outputs[0]) if node.op == "Cast" else None
        return kind is not None and kind.kind in "iu" and self._kinds.is_float32(node.inputs[0])

    def _leading(self, node: gs.Node, known: set[int]) -> list[gs.Node] | None:
        """The node and those that lead to it from integers and inputs of the model; None where a weight is behind."""
        found, seen, pending = [node], {id(node)}, [node]
        while pending:
            for tensor in pending.pop().inputs:
                source = edit.producer(tensor)
                if source is None or not self._kinds.is_float32(tensor) or id(source) in seen:
                    continue
                if id(tensor) in self.tensors:
                    continue
                if not _computes(source):
                    return None
                seen.add(id(source))
                found.append(source)
                pending.append(source)
        return [one for one in found if id(one) not in known]


def _computes(node: gs.Node) -> bool:
    """Whether an operator computes element by element, or moves or reduces; an outer product does so as well."""
    row = operator(node)
    if node.op == "MatMul":
        return any(_is_thin(tensor, axis) for tensor, axis in zip(node.inputs, (-1, -2), strict=True))
    table = node.op == "Gather" and isinstance(node.inputs[0], gs.Constant)
    return (row.elementwise or row.moves or row.kind in ("reduce", "reshape", "along_axis")) and not table


def _is_thin(tensor: gs.Tensor, axis: int) -> bool:
    shape = tensor.shape
    size = shape[axis] if shape is not None and len(shape) > 1 else None
    return isinstance(size, int | np.integer) and size == 1
