"""Channel-wise affine maps in a graph, and the operators they can move through.

    y[.., c, ..] = scale[c] * x[.., c, ..] + shift[c]

BatchNormalization at inference, and Mul, Div, Add, Sub and Neg with a constant that varies along one axis at most, are
all this map; a run of such nodes is one map. ``Affine`` is this run. ``before`` and ``after`` give the map on the other
side of an operator that commutes with the map:

    any scale and shift    Identity, Dropout, Transpose, Reshape, Flatten, Squeeze, Unsqueeze; pooling by averages;
                           Slice and ReduceMean along other axes; Pad that repeats elements
    any scale              Pad with zeros; AveragePool that counts its zero padding; Neg; ReduceSum
    scale >= 0, any shift  MaxPool, GlobalMaxPool, ReduceMax, ReduceMin
    scale >= 0             Relu, LeakyRelu and PRelu of any slope; Abs, LpPool, ReduceL2
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import InBetween, Refused
from channelfold.passes.layers.linear import Linear, view_beside
from channelfold.passes.operators import operator
from channelfold.runtime.io import edit

_PASSED = ("elementwise", "pad", "pool", "reduce", "reshape", "slice", "transpose")  # kinds of operators


@dataclass(frozen=True)
class Affine:
    """A run of nodes that together map ``input`` to ``output`` by ``scale`` and ``shift``, float64.

    Scale and shift are vectors over ``axis`` (counted from the front), or 0-d where ``axis`` is None.
    """

    nodes: tuple[gs.Node, ...]
    axis: int | None
    scale: np.ndarray
    shift: np.ndarray
    input: gs.Tensor
    output: gs.Tensor

    def then(self, other: Affine) -> Affine | None:
        """This map followed by ``other``; None where the two maps have different axes."""
        if self.axis is not None and other.axis is not None and self.axis != other.axis:
            return None
        axis = self.axis if self.axis is not None else other.axis
        with np.errstate(over="ignore", invalid="ignore"):  # the write refuses values that are not finite
            scale, shift = other.scale * self.scale, other.scale * self.shift + other.shift
        return Affine(self.nodes + other.nodes, axis, scale, shift, self.input, other.output)


@dataclass(frozen=True)
class Layout:
    """A map on another tensor: along ``axis`` each channel ``repeat`` times, and all channels ``tile`` times.

    ``no_negative`` names the operator that no negative scale passes; ``no_shift`` says why no shift passes.
    """

    axis: int | None
    repeat: int = 1
    tile: int = 1
    no_negative: str = ""
    no_shift: str = ""

    def expand(self, values: np.ndarray) -> np.ndarray:
        return values if values.ndim == 0 else np.tile(np.repeat(values, self.repeat), self.tile)


def as_affine(node: gs.Node) -> Affine | None:
    """The map that one node computes, or None also where ``find_affine`` raises Refused."""
    with contextlib.suppress(Refused):
        return find_affine(node)
    return None


def find_affine(node: gs.Node) -> Affine | None:
    """The map that one node computes, or None.

    Raises Refused for a BatchNormalization in training, and for a channel-wise constant beside a tensor of unknown
    shape.
    """
    known = operator(node)
    if known.kind == "batch_norm":
        return batch_norm(node)
    if node.attrs or not known.elementwise:
        return None
    if node.op == "Neg":
        x = node.inputs[0]
        return Affine((node,), None, np.array(-1.0), np.array(0.0), x, node.outputs[0]) if edit.is_float(x) else None
    if not known.arithmetic:
        return None
    constants = [i for i, t in enumerate(node.inputs) if isinstance(t, gs.Constant)]
    if len(constants) != 1 or (node.op == "Div" and constants == [0]):
        return None
    constant, x = node.inputs[constants[0]], node.inputs[1 - constants[0]]
    found = _vector(constant, x) if edit.is_float(constant) else None
    if found is None:
        return None
    axis, values = found
    one, zero = np.ones_like(values), np.zeros_like(values)
    with np.errstate(divide="ignore", over="ignore"):
        scale, shift = {
            "Mul": lambda: (values, zero),
            "Div": lambda: (one / values, zero),
            "Add": lambda: (one, values),
            "Sub": lambda: (-one, values) if constants == [0] else (one, -values),
        }[node.op]()
    if not np.isfinite(scale).all() or not np.isfinite(shift).all():
        return None
    return Affine((node,), axis, scale, shift, x, node.outputs[0])


def batch_norm(node: gs.Node) -> Affine:
    """The map of a BatchNormalization. Raises Refused where the node is in training or has no constant parameters."""
    if node.attrs.get("training_mode", 0) or not node.attrs.get("spatial", 1):
        raise Refused("it is in training mode" if node.attrs.get("training_mode") else "it is not per channel")
    if any(not t.is_empty() for t in node.outputs[1:]):
        raise Refused("it returns running statistics, as in training")
    parameters = [edit.value(t) for t in node.inputs[1:5]]
    if any(p is None for p in parameters):
        raise Refused("its parameters are computed at run time")
    gamma, beta, mean, var = (np.asarray(p, np.float64) for p in parameters)
    if any(p.ndim != 1 for p in (gamma, beta, mean, var)):
        raise Refused("its parameters are not vectors")
    if edit.rank(node.inputs[0]) in (0, 1):
        raise Refused("its input has no channel axis")
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = gamma / np.sqrt(var + float(np.float32(node.attrs.get("epsilon", 1e-5))))
        shift = beta - mean * scale
    if not np.isfinite(scale).all() or not np.isfinite(shift).all():
        raise Refused("its parameters give a scale or shift that is infinite or not a number")
    return Affine((node,), 1, scale, shift, node.inputs[0], node.outputs[0])


def _vector(constant: gs.Constant, x: gs.Tensor) -> tuple[int | None, np.ndarray] | None:
    """(axis, values) of a constant that varies along at most one axis of ``x`` and does not broaden ``x``.

    Raises Refused where the shape of ``x`` is unknown.
    """
    shape, size = tuple(constant.shape), edit.rank(x)
    wide = [i for i, d in enumerate(shape) if d != 1]
    if len(wide) > 1 or (size is not None and len(shape) > size):
        return None
    if shape and size is None:
        raise Refused("the shape of its input is unknown")
    if not wide:
        return None, np.asarray(edit.value(constant), np.float64).reshape(())
    axis = wide[0] + (size or 0) - len(shape)
    if not isinstance(x.shape[axis], int):
        raise Refused(f"the length of axis {axis} of its input is unknown")
    if x.shape[axis] != shape[wide[0]]:
        return None
    return axis, np.asarray(edit.value(constant), np.float64).reshape(-1)


def before(node: gs.Node, layout: Layout) -> tuple[gs.Tensor, Layout]:
    """The map on the output of a node, moved to its first input. Raises Refused."""
    axis = layout.axis
    if axis is not None and _changes_axes(node):
        axis = _axis_before(node, axis)
    return node.inputs[0], passes(node, replace(layout, axis=axis))


def after(node: gs.Node, layout: Layout) -> tuple[gs.Tensor, Layout]:
    """The map on the first input of a node, moved to its output. Raises Refused."""
    passed = passes(node, layout)
    if layout.axis is not None and _changes_axes(node):
        axis, repeat, tile = _axis_after(node, layout.axis)
        passed = replace(passed, axis=axis, repeat=layout.repeat * repeat, tile=layout.tile * tile)
    return node.outputs[0], passed


def readers(graph: gs.Graph, tensor: gs.Tensor, layout: Layout) -> list[tuple[Linear, Layout]]:
    """All linears that read a map on a tensor, each with the layout of the map there.

    Raises Refused where an output of the graph, or an operator that the map does not commute with, follows the tensor.
    """
    found, pending = [], [(tensor, layout)]
    while pending:
        tensor, layout = pending.pop()
        if edit.is_output(graph, tensor):
            raise Refused("its result is an output of the graph")
        for node in edit.consumers(tensor):
            if operator(node).asks_shape:
                continue
            if not edit.in_graph(graph, node):
                raise Refused("a subgraph reads its result")
            inputs = [i for i, read in enumerate(node.inputs) if read is tensor]
            if inputs != [0] and (node.op, inputs) != ("MatMul", [1]):
                raise Refused(f"{node.op} follows it")
            if not operator(node).weighted:
                try:
                    pending.append(after(node, layout))
                except InBetween as error:
                    raise Refused(error.behind) from None
                continue
            linear = view_beside(graph, node, "follows")
            check_axis(tensor, layout.axis, linear.in_axis, node.op)
            padded = f"a shift does not pass the zero padding of {node.op}" if linear.padded else ""
            found.append((linear, replace(layout, no_shift=layout.no_shift or padded)))
    return found


def check_axis(tensor: gs.Tensor, axis: int | None, channels: int, op: str) -> None:
    """Raises Refused unless ``axis`` of a tensor is ``channels``, the channel axis of an operator."""
    size = edit.rank(tensor)
    if axis is not None and axis != (channels + size if channels < 0 and size is not None else channels):
        raise Refused(f"its channels lie along axis {axis}, not along the channel axis of {op}")


def passes(node: gs.Node, layout: Layout) -> Layout:
    """The conditions under which a map on the first input of a node can move to its output. Raises Refused."""
    op, known = node.op, operator(node)
    kept = known.scale and known.kind in _PASSED and known.source == 0 and op != "Cast"
    if not kept or any(not t.is_empty() for t in node.outputs[1:]):  # a Cast rounds a scaled value differently
        raise InBetween(op)
    if known.kind == "pool" and layout.axis is not None and layout.axis > 1:
        raise Refused(f"{op} pools the axis it scales")
    if known.random and edit.has_input(node, 2):
        raise InBetween(f"{op} with a training switch")
    if (known.kind == "slice" and _touches(node, layout.axis, edit.argument(node, 3, "axes"))) or (
        known.kind == "pad" and _pads(node, layout.axis)
    ):
        raise InBetween(op, " and may cut or pad the channels")
    no_shift = "" if known.shift else f"a shift does not pass {op}"
    if op == "AveragePool" and counts_padding(node):
        no_shift = "a shift does not pass the zero padding of AveragePool"
    elif known.kind == "pad":
        constant = node.attrs.get("mode", "constant") == "constant"
        if constant and padded_value(node) != 0:
            raise InBetween("Pad with a value other than zero")
        no_shift = "a shift does not pass zero padding (Pad)" if constant else ""
    no_negative = op if known.scale == "positive" else ""
    return replace(layout, no_negative=layout.no_negative or no_negative, no_shift=layout.no_shift or no_shift)


def _touches(node: gs.Node, axis: int | None, axes: np.ndarray | None) -> bool:
    """Whether a node that works along ``axes`` of its input may work along ``axis``."""
    size = edit.rank(node.inputs[0])
    return axis is not None and (axes is None or size is None or axis in {int(a) % size for a in axes})


def _pads(node: gs.Node, axis: int | None) -> bool:
    """Whether a Pad may change the length of ``axis``."""
    pads = edit.argument(node, 1, "pads")
    if axis is None:
        return False
    if edit.has_input(node, 3):
        return _touches(node, axis, edit.argument(node, 3, ""))
    return pads is None or bool(pads[axis] or pads[axis + len(pads) // 2])


def padded_value(node: gs.Node) -> float:
    """The value that a Pad of mode "constant" writes; NaN where the value is computed at run time."""
    if not edit.has_input(node, 2):
        return float(node.attrs.get("value", 0.0))
    value = edit.scalar(node.inputs[2])
    return np.nan if value is None else value


def counts_padding(node: gs.Node) -> bool:
    """Whether an AveragePool averages over zeros of its padding."""
    attrs = node.attrs
    padded = any(attrs.get("pads") or ()) or attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    return bool(attrs.get("count_include_pad", 0) and (padded or attrs.get("ceil_mode", 0)))


def _changes_axes(node: gs.Node) -> bool:
    return operator(node).kind in ("reduce", "reshape", "transpose")


def _axis_before(node: gs.Node, axis: int) -> int:
    """The input axis that becomes output axis ``axis``. Raises Refused where the node splits or merges the axis."""
    size = edit.rank(node.inputs[0])
    if size is None:
        raise Refused(f"the shape in front of {node.op} is unknown")
    for candidate in range(size):
        with contextlib.suppress(Refused):
            if _axis_after(node, candidate) == (axis, 1, 1):
                return candidate
    raise Refused(f"{node.op} does not keep the channels on one axis")


def _axis_after(node: gs.Node, axis: int) -> tuple[int, int, int]:
    """(output axis, repeat, tile) of input axis ``axis``."""
    shape, out = node.inputs[0].shape, node.outputs[0].shape
    if shape is None:
        raise Refused(f"the shape in front of {node.op} is unknown")
    kind = operator(node).kind
    if kind == "transpose":
        return list(node.attrs.get("perm") or reversed(range(len(shape)))).index(axis), 1, 1
    if kind == "reduce" or node.op in ("Squeeze", "Unsqueeze"):
        return _axis_after_removal(node, axis, len(shape)), 1, 1
    if out is None:
        raise Refused(f"the shape behind {node.op} is unknown")
    for position in range(len(out)):
        start = _aligned(shape, range(axis, -1, -1), out, position)
        stop = _aligned(shape, range(axis + 1, len(shape) + 1), out, position + 1)
        if start is None or stop is None:
            continue
        (tile, unknown), (repeat, more) = _volume(shape[start:axis]), _volume(shape[axis + 1 : stop])
        if not unknown and not more:
            return position, repeat, tile
    raise Refused(f"{node.op} mixes the channels with axes of unknown size")


def _aligned(shape, places: Iterable[int], out, position: int) -> int | None:
    """The first of ``places`` that cuts ``shape`` where ``position`` cuts ``out``, both being of one volume."""
    head, tail = _volume(out[:position]), _volume(out[position:])
    return next((i for i in places if _volume(shape[:i]) == head or _volume(shape[i:]) == tail), None)


def _axis_after_removal(node: gs.Node, axis: int, size: int) -> int:
    given = edit.argument(node, 1, "axes")
    if given is None or not given.size:
        raise Refused(f"{node.op} names no constant axes")
    if node.op == "Unsqueeze":
        total = size + len(given)
        new = {int(a) % total for a in given}
        return [i for i in range(total) if i not in new][axis]
    gone = {int(a) % size for a in given}
    if axis in gone:
        raise Refused(f"{node.op} removes the channel axis")
    if operator(node).kind == "reduce" and node.attrs.get("keepdims", 1):
        return axis
    return [i for i in range(size) if i not in gone].index(axis)


def _volume(shape) -> tuple[int, Counter]:
    """(product of the known sizes, the unknown sizes), comparable between shapes."""
    unknown = Counter(d if isinstance(d, str) else object() for d in shape if not isinstance(d, int) or d < 0)
    return math.prod(d for d in shape if isinstance(d, int) and d >= 0), unknown
