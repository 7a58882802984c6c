"""Repairs for TensorRT: Squeeze nodes without axes, unequal sizes of one name, codes and names of bodies."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.runtime.engine import build as tensorrt
from channelfold.runtime.engine.build import Progress, ShapeRange
from channelfold.runtime.engine.plan import PlanReport
from channelfold.runtime.errors import no_progress
from channelfold.runtime.io import edit, files, temporary
from channelfold.runtime.io.bodies import bodies, located
from channelfold.runtime.io.convert import all_graphs
from channelfold.runtime.io.facts import required_inputs
from channelfold.runtime.io.session import Feed, TensorSpec
from channelfold.runtime.io.shapes import Shape, shapes_on


@contextlib.contextmanager
def repaired(
    model: Path, inputs: Sequence[TensorSpec], ranges: Mapping[str, ShapeRange]
) -> Iterator[tuple[Path, list[str]]]:
    """A model in a form that TensorRT accepts, the file itself or a temporary copy, and what a user should know of it.

    In the copy every Squeeze names its axes, int8 constants that bodies read stand in the bodies, nodes of several
    parts have names of their own, and open sizes of one name with different ranges have different names: TensorRT
    takes sizes of one name to be equal, and exporters call several sizes ``?`` or ``None``.
    """
    graph = files.load(model)
    ranges = {s.name: ranges[s.name] for s in inputs if s.name in ranges and s.is_open}  # others: values
    sentences: list[str] = []
    if squeezes_without_axes(graph):
        fixed = {s.name: tuple(d for d in s.shape if isinstance(d, int)) for s in inputs if not s.is_open}
        low = fixed | {name: tuple(seen.min) for name, seen in ranges.items()}
        high = fixed | {name: tuple(seen.max) for name, seen in ranges.items()}
        sentences = name_squeezed_axes(graph, low, high)
    if not any([sentences, name_unequal_sizes(graph, ranges), put_codes_inside(graph), name_apart(graph)]):
        yield model, []
        return
    with temporary.folder() as folder:
        copy = folder / model.name
        files.save(graph, copy)
        yield copy, sentences


def plan_of(
    graph: gs.Graph,
    sm: int | None,
    data: Iterable[Feed] | None,
    progress: Progress = no_progress,
    shapes: Mapping[str, ShapeRange] = MappingProxyType({}),
) -> PlanReport:
    """How the linear nodes of a graph run in an engine for ``sm``, which is built and thrown away.

    Dynamic inputs without ``shapes`` take those in ``data``. Raises as ``tensorrt.build``.
    """
    with temporary.folder() as folder:
        path, inputs = folder / "model.onnx", required_inputs(graph)
        files.save(graph, path)
        ranges = {**tensorrt.default_shapes([spec for spec in inputs if spec.name not in shapes], data), **shapes}
        with repaired(path, inputs, ranges) as (source, _):
            values = tensorrt.default_values(inputs, data)
            engine = folder / "model.engine"
            return tensorrt.build(source, engine, sm=sm, shapes=ranges, values=values, progress=progress).plan


def squeezes_without_axes(graph: gs.Graph) -> list[gs.Node]:
    """The Squeeze nodes without axes, which remove axes of size 1. TensorRT refuses them where sizes vary."""
    return [
        node
        for node in graph.nodes
        if node.op == "Squeeze" and not node.attrs.get("axes") and not edit.has_input(node, 1)
    ]


def name_squeezed_axes(graph: gs.Graph, low: Mapping[str, Shape], high: Mapping[str, Shape]) -> list[str]:
    """Gives every Squeeze its axes where they are the same for all input shapes from ``low`` to ``high``.

    Returns a sentence for each node that was given axes. A node whose axes vary stays as it is.
    """
    nodes = squeezes_without_axes(graph)
    smallest, largest = shapes_on(graph, low), shapes_on(graph, high)
    done = []
    for node in nodes:
        first, last = smallest.get(node.inputs[0].name), largest.get(node.inputs[0].name)
        if first is None or last is None or len(first) != len(last):
            continue
        if any((a == 1) != (b == 1) for a, b in zip(first, last, strict=True)):
            continue
        axes = [axis for axis, size in enumerate(first) if size == 1]
        if graph.opset < 13:
            node.attrs["axes"] = axes
        else:
            edit.set_input(node, 1, files.constant(graph, f"{node.name}_axes", np.array(axes, np.int64)))
        done.append(f"{node.name} was given axes {axes}, which it removes for every shape of the engine")
    return done


def name_unequal_sizes(graph: gs.Graph, ranges: Mapping[str, ShapeRange]) -> bool:
    """Renames open sizes of inputs that share a name but not a range. Returns whether there were such sizes."""
    places: dict[str, list[tuple[gs.Tensor, int]]] = {}
    for tensor in graph.inputs:
        for axis, dim in enumerate(tensor.shape or () if tensor.name in ranges else ()):
            if isinstance(dim, str):
                places.setdefault(dim, []).append((tensor, axis))
    found = False
    for dim, alike in places.items():
        given = {(ranges[t.name].min[axis], ranges[t.name].opt[axis], ranges[t.name].max[axis]) for t, axis in alike}
        for tensor, axis in alike if len(given) > 1 else ():
            tensor.shape = [f"{dim}_{tensor.name}_{axis}" if i == axis else d for i, d in enumerate(tensor.shape)]
            found = True
    return found


def put_codes_inside(graph: gs.Graph) -> bool:
    """Puts the constants that nodes in bodies dequantize into these bodies. Returns whether there were such constants.

    A file holds large constants once, outside, while TensorRT wants int8 constants beside their DequantizeLinear.
    """
    found = False
    for part in list(all_graphs(graph))[1:]:
        for node in [node for node in part.nodes if node.op == "DequantizeLinear"]:
            codes = node.inputs[0]
            if isinstance(codes, gs.Constant):
                inside = gs.Variable(files.free_name(graph, f"{codes.name}_inside"), codes.dtype, codes.shape)
                held = gs.Node("Constant", inside.name, {"value": codes}, [], [inside])
                part.nodes.insert(next(i for i, other in enumerate(part.nodes) if other is node), held)
                edit.set_input(node, 0, inside)
                found = True
    return found


def name_apart(graph: gs.Graph) -> bool:
    """Adds the place to the names that nodes of several parts share. Returns whether there were such names.

    The branches of a merged decoder are alike to their names, and TensorRT answers for one node of a name.
    """
    counts = Counter(node.name for part in all_graphs(graph) for node in part.nodes)
    pending, found = bodies(graph), False
    while pending:
        body = pending.pop()
        pending += body.bodies()
        for node in body.graph.nodes:
            if node.name and counts[node.name] > 1:
                node.name, found = located(node.name, body.place), True
    return found
