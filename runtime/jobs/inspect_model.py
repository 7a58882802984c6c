"""The contents of a graph: linear nodes with shapes and costs, the nodes that could be int8, norms, parameters."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Outcome, Refused
from channelfold.passes.bodies import data_inside, runs_on
from channelfold.passes.layers.linear import Linear, linears, view
from channelfold.passes.operators import operator
from channelfold.passes.quantize.static import Work
from channelfold.runtime.data.probes import random_data
from channelfold.runtime.data.sources import Data
from channelfold.runtime.errors import ChannelfoldError, no_progress
from channelfold.runtime.io import edit
from channelfold.runtime.io.bodies import bodies, located
from channelfold.runtime.io.facts import external_files, required_inputs, spec
from channelfold.runtime.io.files import all_graphs, infer_shapes
from channelfold.runtime.io.shapes import Shape, measured_shapes
from channelfold.runtime.stats.channels import ChannelStatistics, outlier_ratio
from channelfold.runtime.stats.observe import by_name, observe


def int8_nodes(graph: gs.Graph) -> list[str]:
    """The linear nodes that are quantized to int8: both operands come from an int8 DequantizeLinear."""
    return [
        node.name
        for part in all_graphs(graph)
        for node in part.nodes
        if operator(node).weighted and all(_is_dequantized(tensor) for tensor in node.inputs[:2])
    ]


def _is_dequantized(tensor: gs.Tensor) -> bool:
    node = edit.producer(tensor)
    zero_point = node.inputs[2] if node is not None and len(node.inputs) > 2 else None
    return node is not None and node.op == "DequantizeLinear" and zero_point is not None and zero_point.dtype == np.int8


def inspect(
    path: Path,
    graph: gs.Graph,
    data: Data | None = None,
    progress: Callable[[str, int, int], None] = no_progress,
) -> dict[str, Any]:
    """The ``inspection`` entry of a report record.

    ``linears``: one entry a Conv, ConvTranspose, Gemm or MatMul, in bodies of If, Loop and Scan too, with ``shape``
    (out, in / groups, *kernel), ``macs`` for one sample (a symbolic first dimension counts as 1; None where a shape is
    unknown), and the ``reason`` where the pass ``quantize`` would leave the node in float. With ``data`` an entry has
    ``outlier_ratio``: the largest magnitude of the channels of the input against the median; None for a product of two
    activations. ``parameters`` counts the elements of constants that are not int32, int64, bool or strings. Fills in
    the shapes of ``graph``. Where an open size leaves the MACs unknown, every open size of an input counts as 1, which
    ``ones`` says.
    """
    known = _shapes_with_ones(graph) if costs(graph)["macs"] is None else {}
    entries = _linears(graph, data, progress, known)
    inside = data_inside(graph, data) if data is not None and bodies(graph) else {}
    pending = bodies(graph)
    while pending:
        body = pending.pop(0)
        pending = body.bodies() + pending
        mine = runs_on(body, inside.get(id(body.graph)))
        with body.apart() as part:
            found = _linears(part, mine, progress)
        entries += [entry | {"node": located(entry["node"], body.place)} for entry in found]
    norms = Counter(n.op for part in all_graphs(graph) for n in part.nodes if n.op.endswith("Normalization"))
    return {
        "inputs": [str(spec(tensor)) for tensor in graph.inputs],
        "outputs": [str(spec(tensor)) for tensor in graph.outputs],
        **costs(graph, known),
        "ones": bool(known),
        "norms": dict(norms),
        "external_data": [{"path": str(f), "bytes": f.stat().st_size} for f in external_files(path)],
        "linears": entries,
    }


def _shapes_with_ones(graph: gs.Graph) -> dict[str, Shape]:
    """The shapes of all tensors when every open size of an input is 1; empty where the model does not run on those."""
    try:
        found = measured_shapes(graph, next(iter(random_data(required_inputs(graph), 1, size=1))))
    except ChannelfoldError:
        return {}
    return found if all(min(shape, default=0) >= 0 for shape in found.values()) else {}  # kernels larger than an image


def _linears(
    graph: gs.Graph,
    data: Data | None,
    progress: Callable[[str, int, int], None],
    known: Mapping[str, Shape] | None = None,
) -> list[dict[str, Any]]:
    infer_shapes(graph)
    refused = Outcome()
    quantizable = {id(site.node) for site in Work().sites(graph, refused)}
    reasons = {refusal.node: refusal.code or refusal.reason for refusal in refused.refused}
    entries: list[dict[str, Any]] = [
        {
            **_linear(graph, node, known or {}),
            "quantizable": id(node) in quantizable,
            "reason": reasons.get(node.name, ""),
        }
        for node in graph.nodes
        if operator(node).weighted
    ]
    if data is not None:
        ratios = _outlier_ratios(graph, data, progress)
        entries = [entry | {"outlier_ratio": ratios.get(entry["node"])} for entry in entries]
    return entries


def costs(graph: gs.Graph, known: Mapping[str, Shape] | None = None) -> dict[str, int | None]:
    """``parameters`` and ``macs`` of a graph, as ``inspect`` counts them. Fills in its shapes.

    ``known`` has shapes that come before those of the graph. How often the bodies of If, Loop and Scan run is not
    known, and so neither are the MACs of a graph with such bodies.
    """
    infer_shapes(graph)
    macs = [_linear(graph, node, known or {})["macs"] for node in graph.nodes if operator(node).weighted]
    macs += [None for part in list(all_graphs(graph))[1:] for node in part.nodes if operator(node).weighted]
    tensors = {id(tensor): tensor for part in all_graphs(graph) for tensor in part.tensors().values()}
    return {
        "parameters": sum(_elements(t.shape) or 0 for t in tensors.values() if _is_parameter(t)),
        "macs": sum(macs) if None not in macs else None,
    }


def _outlier_ratios(graph: gs.Graph, data: Data, progress: Callable[[str, int, int], None]) -> dict[str, float | None]:
    """``outlier_ratio`` of the input of each linear node, by the node's name."""
    found = [linear for linear in linears(graph) if isinstance(linear.data, gs.Variable)]
    seen = {(linear.data.name, linear.in_axis): ChannelStatistics(linear.in_axis) for linear in found}
    observe(graph, by_name((name, statistics) for (name, _), statistics in seen.items()), data, progress)
    reached = [(linear.name, seen[linear.data.name, linear.in_axis]) for linear in found]
    return {name: outlier_ratio(statistics.amax) for name, statistics in reached if statistics.positions}


def _linear(graph: gs.Graph, node: gs.Node, known: Mapping[str, Shape]) -> dict[str, Any]:
    entry: dict[str, Any] = {"node": node.name, "op": node.op}
    try:
        linear = view(graph, node)
    except Refused:
        return entry | {"shape": None, "groups": 1, "parameters": 0, "macs": _product_macs(node, known)}
    outs, ins = linear.channels
    shape = [outs, ins // linear.groups, *linear.kernel]
    weights = math.prod(shape)
    entry |= {"shape": shape, "groups": linear.groups, "parameters": weights + outs * (linear.bias() is not None)}
    return entry | {"macs": _macs(linear, weights, known)}


def _macs(linear: Linear, weights: int, known: Mapping[str, Shape]) -> int | None:
    """The products of all weights with every position of the output (of a ConvTranspose: of the input)."""
    tensor, channels = linear.node.outputs[0], linear.channels[0]
    if linear.node.op == "ConvTranspose":
        tensor, channels = linear.data, linear.channels[1]
    positions = _elements(known.get(tensor.name, tensor.shape))
    return None if positions is None else positions // channels * weights


def _product_macs(node: gs.Node, known: Mapping[str, Shape]) -> int | None:
    """The products of a MatMul of two activations: one for each element of its output and of the summed axis."""
    result, left = (known.get(tensor.name, tensor.shape) for tensor in (node.outputs[0], node.inputs[0]))
    outputs = _elements(result)
    if node.op != "MatMul" or outputs is None or not left or not isinstance(left[-1], int):
        return None
    return outputs * left[-1]


def _elements(shape: Any) -> int | None:
    """The number of elements of a shape; a symbolic first dimension counts as 1. None when a size is unknown."""
    if shape is None:
        return None
    dims = [1 if axis == 0 and not isinstance(dim, int | np.integer) else dim for axis, dim in enumerate(shape)]
    return math.prod(int(d) for d in dims) if all(isinstance(d, int | np.integer) for d in dims) else None


def _is_parameter(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) and str(tensor.dtype) not in ("int32", "int64", "bool", "object")
