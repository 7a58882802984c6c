"""Channel-wise affine maps in a graph, and the operators they can move through.

    y[.., c, ..] = scale[c] * x[.., c, ..] + shift[c]

BatchNormalization at inference, and Mul, Div, Add, Sub and Neg with a constant that varies along one axis at most, are
all this map; a run of them is one map. ``Affine`` is that run. ``before`` and ``after`` say what becomes of the map on
the other side of an operator that commutes with it.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes import edit

_ARITHMETIC = ("Mul", "Div", "Add", "Sub", "Neg")


class Blocked(ValueError):
    """Why a map cannot move past a node; the text is the reason of a refusal."""


@dataclass(frozen=True)
class Affine:
    """A run of nodes that together map ``input`` to ``output`` by ``scale`` and ``shift``, float64.

    They are vectors over ``axis`` (counted from the front), or 0-d when ``axis`` is None.
    """

    nodes: tuple[gs.Node, ...]
    axis: int | None
    scale: np.ndarray
    shift: np.ndarray
    input: gs.Tensor
    output: gs.Tensor

    def then(self, other: Affine) -> Affine | None:
        """This map followed by another, when both go along one axis."""
        if self.axis is not None and other.axis is not None and self.axis != other.axis:
            return None
        axis = self.axis if self.axis is not None else other.axis
        scale, shift = other.scale * self.scale, other.scale * self.shift + other.shift
        return Affine(self.nodes + other.nodes, axis, scale, shift, self.input, other.output)


@dataclass(frozen=True)
class Vector:
    """How a map looks at another tensor: along ``axis``, each channel ``repeat`` times, all that ``tile`` times.

    ``positive``: something on the way only commutes with scales above zero. ``shifts``: why a shift cannot come along.
    """

    axis: int | None
    repeat: int = 1
    tile: int = 1
    positive: str = ""
    no_shift: str = ""

    def expand(self, values: np.ndarray) -> np.ndarray:
        return values if values.ndim == 0 else np.tile(np.repeat(values, self.repeat), self.tile)


def as_affine(node: gs.Node) -> Affine | None:
    """The map one node computes, or None."""
    if node.domain not in (None, "", "ai.onnx"):
        return None
    if node.op == "BatchNormalization":
        return _batchnorm(node)
    if node.op not in _ARITHMETIC or node.attrs:
        return None
    if node.op == "Neg":
        x = node.inputs[0]
        return Affine((node,), None, np.array(-1.0), np.array(0.0), x, node.outputs[0]) if edit.is_float(x) else None
    constants = [i for i, t in enumerate(node.inputs) if isinstance(t, gs.Constant)]
    if len(constants) != 1 or not edit.is_float(node.inputs[constants[0]]):
        return None
    constant, x = node.inputs[constants[0]], node.inputs[1 - constants[0]]
    found = _vector(constant, x)
    if found is None or (node.op == "Div" and constants[0] == 0):
        return None
    axis, values = found
    one, zero = np.ones_like(values), np.zeros_like(values)
    scale, shift = {
        "Mul": (values, zero),
        "Div": (one / np.where(values == 0, np.nan, values), zero),
        "Add": (one, values),
        "Sub": (-one, values) if constants[0] == 0 else (one, -values),
    }[node.op]
    if not np.isfinite(scale).all() or not np.isfinite(shift).all():
        return None
    return Affine((node,), axis, scale, shift, x, node.outputs[0])


def before(node: gs.Node, v: Vector) -> tuple[gs.Tensor, Vector]:
    """The map on the output of a node, moved to its input. Raises Blocked."""
    x, y = node.inputs[0] if node.inputs else None, node.outputs[0]
    if x is None or any(t.outputs for t in node.outputs[1:]):
        raise Blocked(f"{node.op} is in between")
    if v.axis is None or node.op in _KEEPS_AXES:
        return x, _pass(node, v, v.axis)
    if node.op == "Transpose":
        perm = node.attrs.get("perm")
        axis = perm[v.axis] if perm else (edit.rank(y) or 0) - 1 - v.axis
    elif node.op in ("Squeeze", "Unsqueeze", "Reshape", "Flatten", "ReduceMean"):
        axis = _axis_before(node, v.axis)
    else:
        axis = v.axis
    return x, _pass(node, v, axis)


def after(node: gs.Node, v: Vector) -> tuple[gs.Tensor, Vector]:
    """The map on the first input of a node, moved to its output. Raises Blocked."""
    y = node.outputs[0]
    if v.axis is None or node.op in _KEEPS_AXES:
        return y, _pass(node, v, v.axis)
    if node.op == "Transpose":
        perm = node.attrs.get("perm") or list(range(edit.rank(y) or 0))[::-1]
        return y, _pass(node, v, list(perm).index(v.axis))
    if node.op in ("Squeeze", "Unsqueeze", "Reshape", "Flatten", "ReduceMean"):
        axis, repeat, tile = _axis_after(node, v.axis)
        if (repeat, tile) != (1, 1):
            v = replace(v, repeat=v.repeat * repeat, tile=v.tile * tile)
        return y, _pass(node, v, axis)
    return y, _pass(node, v, v.axis)


_KEEPS_AXES = (
    "Identity", "Dropout", "Relu", "LeakyRelu", "PRelu", "MaxPool", "AveragePool", "GlobalAveragePool",
    "GlobalMaxPool", "Pad", "Slice",
)  # fmt: skip
_MOVES_DATA = ("Identity", "Dropout", "Transpose", "Squeeze", "Unsqueeze", "Reshape", "Flatten")


def _pass(node: gs.Node, v: Vector, axis: int | None) -> Vector:
    """The map past a node, with what the node asks of it."""
    v = replace(v, axis=axis)
    op, attrs = node.op, node.attrs
    if node.domain not in (None, "", "ai.onnx"):
        raise Blocked(f"{node.domain}.{op} is in between")
    if op in _MOVES_DATA or op in ("GlobalAveragePool", "ReduceMean"):
        return v
    if op in ("Relu", "LeakyRelu"):
        return replace(v, positive=v.positive or op, no_shift=v.no_shift or f"a shift does not pass {op}")
    if op == "PRelu" and isinstance(node.inputs[1], gs.Constant):
        return replace(v, positive=v.positive or op, no_shift=v.no_shift or f"a shift does not pass {op}")
    if op in ("MaxPool", "GlobalMaxPool"):
        return replace(v, positive=v.positive or op)
    if op == "AveragePool":
        counted = any(attrs.get("pads") or ()) or attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
        if attrs.get("count_include_pad", 0) and (counted or attrs.get("ceil_mode", 0)):
            return replace(v, no_shift=v.no_shift or "a shift does not pass the zero padding of AveragePool")
        return v
    if op == "Slice":
        axes = edit.value(node.inputs[3]) if len(node.inputs) > 3 else attrs.get("axes")
        size = edit.rank(node.inputs[0])
        if axis is None or (axes is not None and size is not None and axis not in {int(a) % size for a in axes}):
            return v
        raise Blocked("Slice cuts the channel axis")
    if op == "Pad" and attrs.get("mode", "constant") == "constant" and _pads_zero(node):
        return replace(v, no_shift=v.no_shift or "a shift does not pass zero padding (Pad)")
    raise Blocked(f"{op} is in between")


def _pads_zero(node: gs.Node) -> bool:
    if len(node.inputs) < 3 or node.inputs[2].is_empty():
        return float(node.attrs.get("value", 0.0)) == 0.0
    return edit.scalar(node.inputs[2]) == 0.0


def _batchnorm(node: gs.Node) -> Affine | None:
    parameters = [edit.value(t) for t in node.inputs[1:5]]
    training = node.attrs.get("training_mode", 0) or not node.attrs.get("spatial", 1)
    if training or len(parameters) != 4 or any(p is None or p.ndim != 1 for p in parameters):
        return None
    if any(t.outputs for t in node.outputs[1:]):
        return None
    gamma, beta, mean, var = (np.asarray(p, np.float64) for p in parameters)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = gamma / np.sqrt(var + float(np.float32(node.attrs.get("epsilon", 1e-5))))
    if not np.isfinite(scale).all():
        return None
    return Affine((node,), 1, scale, beta - mean * scale, node.inputs[0], node.outputs[0])


def _vector(constant: gs.Constant, x: gs.Tensor) -> tuple[int | None, np.ndarray] | None:
    """(axis, values) of a constant that varies along at most one axis of ``x`` and does not broaden ``x``."""
    shape = tuple(constant.shape)
    size = edit.rank(x)
    if all(d == 1 for d in shape) and (not shape or (size is not None and len(shape) <= size)):
        return None, np.asarray(edit.read(constant), np.float64).reshape(())
    if size is None or len(shape) > size or x.shape is None:
        return None
    wide = [i for i, d in enumerate(shape) if d != 1]
    axis = wide[0] + size - len(shape)
    if len(wide) != 1 or x.shape[axis] != shape[wide[0]]:
        return None
    return axis, np.asarray(edit.read(constant), np.float64).reshape(-1)


def _axis_before(node: gs.Node, axis: int) -> int:
    """The input axis that is output axis ``axis``; Blocked when the node splits or merges it."""
    size = edit.rank(node.inputs[0])
    for candidate in range(size or 0):
        try:
            if _axis_after(node, candidate) == (axis, 1, 1):
                return candidate
        except Blocked:
            continue
    raise Blocked(f"{node.op} does not keep the channels on one axis")


def _axis_after(node: gs.Node, axis: int) -> tuple[int, int, int]:
    """(output axis, repeat, tile) of input axis ``axis``."""
    shape, out = node.inputs[0].shape, node.outputs[0].shape
    if shape is None:
        raise Blocked(f"the shape in front of {node.op} is unknown")
    if node.op in ("Squeeze", "Unsqueeze", "ReduceMean"):
        return _axis_after_removal(node, axis, len(shape)), 1, 1
    if out is None:
        raise Blocked(f"the shape behind {node.op} is unknown")
    size = shape[axis]
    for position, wide in enumerate(out):
        if not isinstance(wide, int) or not isinstance(size, int) or wide % max(size, 1):
            continue
        start = next((i for i in range(axis + 1) if _volume(shape[:i]) == _volume(out[:position])), None)
        stop = next(
            (i for i in range(axis + 1, len(shape) + 1) if _volume(shape[i:]) == _volume(out[position + 1 :])), None
        )
        if start is None or stop is None:
            continue
        tile, repeat = _volume(shape[start:axis]), _volume(shape[axis + 1 : stop])
        if not tile[1] and not repeat[1] and tile[0] * size * repeat[0] == wide:
            return position, repeat[0], tile[0]
    raise Blocked(f"{node.op} mixes the channels with axes of unknown size")


def _axis_after_removal(node: gs.Node, axis: int, size: int) -> int:
    given = edit.value(node.inputs[1]) if len(node.inputs) > 1 else node.attrs.get("axes")
    if given is None:
        raise Blocked(f"{node.op} names no constant axes")
    given = [int(a) for a in np.asarray(given).reshape(-1)]
    if node.op == "Unsqueeze":
        total = size + len(given)
        new = {a % total for a in given}
        return [i for i in range(total) if i not in new][axis]
    gone = {a % size for a in given}
    if axis in gone:
        raise Blocked(f"{node.op} removes the channel axis")
    if node.op == "ReduceMean" and node.attrs.get("keepdims", 1):
        return axis
    return [i for i in range(size) if i not in gone].index(axis)


def _volume(shape) -> tuple[int, Counter]:
    """(product of the known sizes, the unknown ones), comparable between shapes."""
    unknown = Counter(d if isinstance(d, str) else object() for d in shape if not isinstance(d, int) or d < 0)
    return math.prod(d for d in shape if isinstance(d, int) and d >= 0), unknown
