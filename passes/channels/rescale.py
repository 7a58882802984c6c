"""A scale and a shift moved through a region of a graph (``channels``) without changing its function.

    x' = (x - z) / s       in every tensor of the region, with s > 0 and z by class
    writers                W' = diag(1/s) W,   b' = (b - z) / s;    a norm's gamma' = gamma / s,  beta' = (beta - z) / s
    readers                W' = W diag(s),     b' = b + W z
    a constant factor      c' = c / s          x = c u becomes x' = c' u
    a constant term        c' = (c - z) / s    x = u + c becomes x' = u / s + c';  behind x, c' = (c + z) / s

where 1 / s stands for s in a map's negative entries. Everything is computed in float64 and cast once, and all of it
before anything is written: where one weight cannot be, the region stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Refused
from channelfold.passes.channels.region import Cut, End, Region
from channelfold.passes.layers.linear import Linear, cast, check_growth, norm_parameters, view
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import constant, free_name

LOWEST, HIGHEST = 1e-5, 1e5  # of a scale; a channel that is always zero asks for 0, one that explodes for infinity


def clamped(scale: np.ndarray, free: np.ndarray) -> np.ndarray:
    """A scale by class with 1 where the class is not free or the value is no number, and within 1e-5 .. 1e5."""
    usable = free & np.isfinite(scale) & (scale > 0)
    return np.where(usable, np.clip(np.where(usable, scale, 1.0), LOWEST, HIGHEST), 1.0)


def at(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """A scale by class, looked up for an index map; the inverse where the map is negative."""
    found = values[np.abs(index) - 1]
    return np.where(index > 0, found, 1 / found)


def rescale(graph: gs.Graph, region: Region, scale: np.ndarray, shift: np.ndarray | None = None) -> None:
    """Moves ``scale`` and ``shift``, (classes,) float64, through a region, 1 and 0 where a class cannot take them.

    Raises Refused with the reason, and nothing changed, where a weight cannot take its part: a value too large for its
    type, a shared weight of more than 1 MB, a shift where ``region.no_shift`` says why there can be none.
    """
    scale = clamped(scale, region.free)
    if shift is not None and np.any(shift) and region.no_shift:
        raise Refused(region.no_shift)
    shift = np.zeros_like(scale) if shift is None else np.where(region.shiftable, shift, 0.0)
    try:
        writes = [write for end in _joined(region.ends) for write in _planned(graph, end, scale, shift)]
        for tensor in {id(cut.tensor): cut.tensor for cut in region.cuts}.values():
            writes.append(_inserted(graph, [cut for cut in region.cuts if cut.tensor is tensor], scale, shift))
    except Refused as error:
        raise Refused(str(error)) from None
    for write in writes:
        write()
    edit.sweep(graph)


@dataclass
class _Both:
    """A linear with what its inputs and its outputs take up."""

    linear: Linear
    inner: End | None = None
    outer: End | None = None


def _joined(ends: list[End]) -> list[End | _Both]:
    """The ends, those of one linear together: it may write one tensor of a region and read another."""
    linears: dict[int, _Both] = {}
    others: list[End | _Both] = []
    for end in ends:
        if end.linear is None:
            others.append(end)
            continue
        both = linears.setdefault(id(end.node), _Both(end.linear))
        if end.role == "in":
            both.inner = end
        else:
            both.outer = end
    return [*others, *linears.values()]


def _planned(graph: gs.Graph, end: End | _Both, scale: np.ndarray, shift: np.ndarray) -> list[Callable[[], object]]:
    """The writes an end takes, computed."""
    if isinstance(end, _Both):
        return _planned_linear(end, scale, shift)
    s = at(scale, end.index)
    z = shift[np.abs(end.index) - 1] if end.shifted else np.zeros_like(s)
    if not np.any(s != 1) and not np.any(z):
        return []
    node = end.node
    if end.role == "norm":
        values = norm_parameters(node, 1 / s, -z / s)
        return [lambda i=i, v=v, name=name: edit.set_constant(graph, node, i, v, name) for i, v, name in values]
    place = next(i for i, t in enumerate(node.inputs) if isinstance(t, gs.Constant))
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


def _planned_linear(both: _Both, scale: np.ndarray, shift: np.ndarray) -> list[Callable[[], object]]:
    linear = view(both.linear.graph, both.linear.node)  # as it is now: other regions share it
    outs, ins = linear.channels
    out_scale, out_shift = np.ones(outs), np.zeros(outs)
    in_scale, in_shift = np.ones(ins), np.zeros(ins)
    if both.outer is not None:
        out_scale = 1 / at(scale, both.outer.index)
        if both.outer.shifted:
            out_shift = -shift[np.abs(both.outer.index) - 1] * out_scale
    if both.inner is not None:
        in_scale = at(scale, both.inner.index)
        if both.inner.shifted:
            in_shift = shift[np.abs(both.inner.index) - 1]
    if all(np.all(v == idle) for v, idle in ((out_scale, 1), (in_scale, 1), (out_shift, 0), (in_shift, 0))):
        return []
    check_growth(linear)
    values = linear.rescaled(out_scale=out_scale, out_shift=out_shift, in_scale=in_scale, in_shift=in_shift)
    return [lambda: linear.install(*values)]


def _inserted(graph: gs.Graph, cuts: list[Cut], scale: np.ndarray, shift: np.ndarray) -> Callable[[], object]:
    """Puts explicit nodes on the cut edges of a tensor.

    Where its writer cannot take the scale up, (x - z) / s is computed for the readers that expect it; else s x' + z is
    restored for those that do not.
    """
    tensor, index = cuts[0].tensor, cuts[0].index
    s = at(scale, index)
    z = shift[np.abs(index) - 1] if cuts[0].shifted else np.zeros_like(s)
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
    for reader in readers:
        for place, read in enumerate(reader.inputs):
            if read is tensor:
                edit.set_input(reader, place, source)
