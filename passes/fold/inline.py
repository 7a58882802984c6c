"""Calls of a model's own functions, replaced by the nodes of their bodies.

    y = Block(x, W)    with    Block(a, w) = Relu(MatMul(a, w))        becomes        y = Relu(MatMul(x, W))

Exporters put modules into local functions; passes look at the nodes of graphs alone, so that the weights of a function
would stay as they are. The inliner of the package ``onnx`` does it, names made unique, on the graph without its large
weights. A function of another opset than the model's is converted; one that cannot be is refused and stays.
"""

from __future__ import annotations

import contextlib
from collections import Counter

import onnx
import onnx.inliner
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Outcome
from channelfold.runtime.io.convert import all_graphs, carried, export_skeleton, import_model
from channelfold.runtime.io.snapshot import become


def apply(graph: gs.Graph, ctx: Context) -> Outcome:
    outcome = Outcome()
    own = carried(graph)
    if own is None or not own.header.functions:
        return outcome
    calls = _calls(graph, own.header)
    model, large = export_skeleton(graph)
    inlined = onnx.inliner.inline_local_functions(model)
    if inlined.functions:
        with contextlib.suppress(Exception):  # what the version converter does not know stays a function
            inlined = onnx.inliner.inline_local_functions(model, convert_version=True)
    left = {(function.domain, function.name) for function in inlined.functions}
    for (domain, name), (node, count) in calls.items():
        if (domain, name) in left:
            outcome.refuse(node, f"{name}: the function cannot be brought to the opset of the model", "another opset")
        else:
            outcome.change(node, f"{name}: {count} call{'s' * (count > 1)} replaced by the nodes of the function")
    if outcome.changed:
        scratch = own.scratch
        become(graph, import_model(inlined, own.path, weights={proto.name: held._values for proto, held in large}))
        (carried(graph) or own).scratch = scratch
    return outcome


def _calls(graph: gs.Graph, header: onnx.ModelProto) -> dict[tuple[str, str], tuple[str, int]]:
    """(the first node that calls it, how many do) of each function that the graph or its regions call."""
    known = {(function.domain, function.name) for function in header.functions}
    nodes = [node for part in all_graphs(graph) for node in part.nodes if (node.domain or "", node.op) in known]
    counts = Counter((node.domain or "", node.op) for node in nodes)
    return {key: (next(n.name for n in nodes if (n.domain or "", n.op) == key), count) for key, count in counts.items()}
