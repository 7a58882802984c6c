"""Constants in 16 bits: what rounding does to them, and which of them may be limited instead."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.cast.kinds import Half
from channelfold.passes.operators import operator
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import read

_CHUNK = 1 << 22  # values rounded at once
_BOUNDS = {"Clip": (1, 2), "Min": (0, 1, 2, 3), "Max": (0, 1, 2, 3)}  # inputs that limit values and are no values
_SELECTS = ("Add", "Where", "Min", "Max", "Cast")  # what a mask passes on its way to the Softmax


@dataclass
class Rounded:
    """What rounding does to the values of a constant: how many overflow, become subnormal, become zero.

    ``largest`` is the largest finite magnitude, ``error`` the relative L2 error of the values that do not overflow.
    """

    count: int = 0
    largest: float = 0.0
    overflow: int = 0
    subnormal: int = 0
    zero: int = 0
    nonzero: int = 0
    error: float = 0.0


def rounded(tensor: gs.Constant, half: Half) -> Rounded:
    found, signal, noise = Rounded(), 0.0, 0.0
    for values in _chunks(np.asarray(read(tensor))):
        sizes = np.abs(values)
        finite = np.isfinite(values)
        result = half.rounded(values)
        over = finite & ~np.isfinite(result)
        known = finite & ~over
        found.count += values.size
        found.largest = max(found.largest, float(sizes[finite].max(initial=0.0)))
        found.overflow += int(over.sum())
        found.nonzero += int((values != 0).sum())
        found.zero += int(((result == 0) & (values != 0)).sum())
        found.subnormal += int(((sizes < half.smallest) & (result != 0)).sum())
        signal += float(np.square(sizes[known], dtype=np.float64).sum())
        noise += float(np.square(result[known] - values[known], dtype=np.float64).sum())
    found.error = math.sqrt(noise / signal) if signal else 0.0
    return found


def converted(tensor: gs.Constant, half: Half, limit: float = math.inf) -> np.ndarray:
    """The values in 16 bits; those whose magnitude is finite and above ``limit`` become the limit."""
    values = np.asarray(read(tensor))
    result = np.empty(values.shape, half.dtype)
    flat = result.reshape(-1)
    start = 0
    for part in _chunks(values):
        flat[start : start + part.size] = limited(part, limit).astype(half.dtype)
        start += part.size
    return result


def limited(values: np.ndarray, limit: float) -> np.ndarray:
    """The values; those whose magnitude is finite and above ``limit`` are the limit."""
    return np.where(np.isfinite(values), np.clip(values, -limit, limit), values) if math.isfinite(limit) else values


def _chunks(values: np.ndarray) -> Iterator[np.ndarray]:
    flat = np.ascontiguousarray(values).reshape(-1)
    yield from (flat[start : start + _CHUNK] for start in range(0, flat.size, _CHUNK))


class Masks:
    """Which tensors lead to nothing but a Softmax: a number far below the others makes a zero there, however far.

    ``outputs``: ids of the outputs of the model and its bodies. ``exact``: ids of the tensors made of integers alone.
    """

    def __init__(self, outputs: set[int], exact: set[int]):
        self._outputs, self._exact = outputs, exact
        self._hide: dict[int, bool] = {}

    def bound(self, node: gs.Node, index: int, half: Half) -> float:
        """The largest magnitude that a constant input may be limited to with the same results; inf where none is."""
        if index in _BOUNDS.get(node.op, ()):
            return half.limit
        return half.limit / 2 if self._leads(node) else math.inf  # half: the mask may be added to a score, or twice

    def hides(self, tensor: gs.Tensor) -> bool:
        """Whether every way from a tensor leads to a Softmax, through operators that select, add and move."""
        if id(tensor) not in self._hide:
            readers = edit.consumers(tensor)
            known = bool(readers) and id(tensor) not in self._outputs
            self._hide[id(tensor)] = known and all(map(self._leads, readers))
        return self._hide[id(tensor)]

    def hidden(self, node: gs.Node) -> set[int]:
        """The ids of the tensors from a node to the Softmax that all ways from its results lead to."""
        found, pending = set[int](), [node]
        while pending:
            for tensor in pending.pop().outputs:
                if id(tensor) not in found and not tensor.is_empty() and self.hides(tensor):
                    found.add(id(tensor))
                    pending += edit.consumers(tensor)
        return found

    def _leads(self, node: gs.Node) -> bool:
        if node.op in ("Softmax", "LogSoftmax"):
            return True
        passes = node.op in _SELECTS or operator(node).moves
        if node.op in ("Sub", "Mul"):  # of 0 and 1, not of scores
            passes = all(isinstance(t, gs.Constant) or id(t) in self._exact for t in node.inputs)
        return (
            edit.is_standard(node)
            and passes
            and all(self.hides(tensor) for tensor in node.outputs if not tensor.is_empty())
        )
