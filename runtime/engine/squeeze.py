"""Repairs for TensorRT: Squeeze nodes without axes, unequal sizes of one name, codes and names of bodies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.runtime.engine.build import ShapeRange
from channelfold.runtime.io import edit
from channelfold.runtime.io.bodies import bodies, located
from channelfold.runtime.io.convert import all_graphs
from channelfold.runtime.io.files import constant, free_name
from channelfold.runtime.io.shapes import Shape, shapes_on


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
            edit.set_input(node, 1, constant(graph, f"{node.name}_axes", np.array(axes, np.int64)))
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
                inside = gs.Variable(free_name(graph, f"{codes.name}_inside"), codes.dtype, codes.shape)
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
