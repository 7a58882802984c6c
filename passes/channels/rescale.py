"""Moves a scale and a shift through a region of a graph (``scale_regions``); the graph computes the same function.

    x' = (x - z) / s       in every tensor of the region, with s > 0 and z by class
    writers                W' = diag(1/s) W,   b' = (b - z) / s;    a norm's gamma' = gamma / s,  beta' = (beta - z) / s
    readers                W' = W diag(s),     b' = b + W z
    a constant factor      c' = c / s          x = c u becomes x' = c' u
    a constant term        c' = (c - z) / s    x = u + c becomes x' = u / s + c';  behind x, c' = (c + z) / s

where 1 / s stands for s in the negative entries of a map. All new values are computed in float64, cast once, and
written together: where one weight cannot take its new values, the region stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Refused
from channelfold.passes.channels.cache import at_input, at_output
from channelfold.passes.channels.region import Cut, End, Region
from channelfold.passes.layers.linear import Linear, cast, check_growth, norm_parameters, view
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import constant, free_name

Write = Callable[[], object]  # puts values that are computed already into the graph
LOWEST, HIGHEST = 1e-5, 1e5  # of a scale: a channel that is always zero asks for 0, a diverging channel for infinity


def clamped(scale: np.ndarray, free: np.ndarray) -> np.ndarray:
    """A scale (classes,) clipped to 1e-5 .. 1e5, with 1 where a class is pinned or the value is no positive number."""
    usable = free & np.isfinite(scale) & (scale > 0)
    return np.where(usable, np.clip(np.where(usable, scale, 1.0), LOWEST, HIGHEST), 1.0)


def fitted(scale: np.ndarray, region: Region) -> np.ndarray:
    """A scale that a region can take: ``clamped``, and powers of two where the region holds a cache (``cache``)."""
    found = clamped(scale, region.free)
    return np.exp2(np.rint(np.log2(found))) if region.caches else found


def at(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The scale of every entry of an index map, from a scale (classes,): the inverse where an entry is negative."""
    found = values[np.abs(index) - 1]
    return np.where(index > 0, found, 1 / found)


def rescale(graph: gs.Graph, region: Region, scale: np.ndarray, shift: np.ndarray | None = None) -> None:
    """Moves ``scale`` and ``shift``, (classes,) float64, through a region; pinned classes get scale 1 and shift 0.

    Raises Refused, with nothing changed, where a weight does not fit its type, where a shared weight is larger than
    1 MB, and where ``region.no_shift`` gives a reason against a shift.
    """
    scale = fitted(scale, region)
    if shift is not None and np.any(shift) and region.no_shift:
        raise Refused(region.no_shift)
    shift = np.zeros_like(scale) if shift is None else np.where(region.shiftable, shift, 0.0)
    linears: dict[int, tuple[Linear, dict[str, End]]] = {}  # a linear may write a tensor of the region and read another
    writes: list[Write] = []
    for end in region.ends:
        if end.linear is None:
            writes += _planned(graph, end, scale, shift)
        else:
            linears.setdefault(id(end.node), (end.linear, {}))[1][end.role] = end
    for linear, ends in linears.values():
        writes += _planned_linear(linear, ends, scale, shift)
    for tensor in {id(cut.tensor): cut.tensor for cut in region.cuts}.values():
        writes.append(_inserted(graph, [cut for cut in region.cuts if cut.tensor is tensor], scale, shift))
    for tensor, index in region.caches:
        writes.append(_at_cache(graph, tensor, at(scale, index)))
    for write in writes:
        write()
    edit.sweep(graph)


def _taken(place: End | Cut, scale: np.ndarray, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The scale and the shift of every entry of the map of an end or a cut."""
    s = at(scale, place.index)
    return s, shift[np.abs(place.index) - 1] if place.shifted else np.zeros_like(s)


def _planned(graph: gs.Graph, end: End, scale: np.ndarray, shift: np.ndarray) -> list[Write]:
    """The writes to the constants of a norm, a factor or a term."""
    s, z = _taken(end, scale, shift)
    if not np.any(s != 1) and not np.any(z):
        return []
    node = end.node
    if end.role == "norm":
        values = norm_parameters(node, 1 / s, -z / s)
        return [lambda i=i, v=v, name=name: edit.set_constant(graph, node, i, v, name) for i, v, name in values]
    place = edit.constant_input(node)
    old = np.asarray(edit.value(node.inputs[place]))
    wide = old.astype(np.float64)
    if end.role == "factor":
        new = wide * s if node.op == "Div" else wide / s
    else:
        sign = -1 if node.op == "Sub" and place == 1 else 1  # of c in x = u + c, x = u - c, x = c - u
        taken = end.forward and not (node.op == "Sub" and place == 0)
        new = (wide + sign * (z if taken else -z)) / s
    values = cast(new.reshape(old.shape) if new.size == old.size else new, old.dtype)
    name = f"{node.inputs[place].name}_smoothed"
    return [lambda: edit.set_constant(graph, node, place, values, name)]


def _planned_linear(old: Linear, ends: dict[str, End], scale: np.ndarray, shift: np.ndarray) -> list[Write]:
    """The write to a linear; ``ends`` by role: "out" scales its outputs, "in" its inputs."""
    linear, moved = view(old.graph, old.node), {}  # viewed anew, because other regions may have changed the weight
    if "out" in ends:
        s, z = _taken(ends["out"], scale, shift)
        moved |= {"out_scale": 1 / s, "out_shift": -z * (1 / s)}
    if "in" in ends:
        moved["in_scale"], moved["in_shift"] = _taken(ends["in"], scale, shift)
    if all(np.all(values == name.endswith("scale")) for name, values in moved.items()):
        return []
    check_growth(linear)
    values = linear.rescaled(**moved)
    return [lambda: linear.install(*values)]


def _at_cache(graph: gs.Graph, tensor: gs.Tensor, scale: np.ndarray) -> Write:
    """The write that keeps the interface of the model's own cache: x = past / s, present = x s."""
    feeds, kind = any(tensor is one for one in graph.inputs), edit.dtype(tensor) or np.dtype(np.float32)
    values = cast(1 / scale if feeds else scale, kind)
    if not np.any(values != 1):
        return lambda: None
    return lambda: (
        at_input(graph, tensor, "Mul", values, {}) if feeds else at_output(graph, tensor, ("Mul", values, {}))
    )


def _inserted(graph: gs.Graph, cuts: list[Cut], scale: np.ndarray, shift: np.ndarray) -> Write:
    """The write that puts explicit nodes on the cut edges of a tensor.

    A writer that cannot take the scale writes x; the nodes compute (x - z) / s for the readers in the region. Otherwise
    the nodes restore s x' + z for the readers that cannot take the scale.
    """
    tensor = cuts[0].tensor
    s, z = _taken(cuts[0], scale, shift)
    blocked = [cut.reader for cut in cuts if cut.reader is not None]
    if len(blocked) < len(cuts):
        readers = [n for n in edit.consumers(tensor) if not any(n is b for b in blocked)]
        steps = [("Mul", 1 / s), ("Add", -z / s)]
    else:
        readers, steps = blocked, [("Mul", s), ("Add", z)]
    kind = edit.dtype(tensor) or np.dtype(np.float32)
    needed = [(op, cast(values, kind)) for op, values in steps if np.any(values != (op == "Mul"))]
    return lambda: _insert(graph, tensor, readers, needed)


def _insert(graph: gs.Graph, tensor: gs.Tensor, readers: list[gs.Node], steps: list[tuple[str, np.ndarray]]) -> None:
    after, source = edit.producer(tensor), tensor
    for op, values in steps:
        name = f"{tensor.name}_smooth_{op}"
        result = gs.Variable(free_name(graph, name), tensor.dtype, tensor.shape)
        node = gs.Node(op, name, inputs=[source, constant(graph, f"{name}_by", values)], outputs=[result])
        if after is None:
            graph.nodes.insert(0, node)
        else:
            edit.insert_after(graph, after, node)
        after, source = node, result
    edit.redirect(tensor, source, readers)
