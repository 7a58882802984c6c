"""Calls of a model's own functions, replaced by the nodes of their bodies.

    y = Block(x, W)    with    Block(a, w) = Relu(MatMul(a, w))        becomes        y = Relu(MatMul(x, W))

Exporters put modules into local functions; passes look at the nodes of graphs alone, so that the weights of a function
would stay as they are. The inliner of the package ``onnx`` does it, names made unique, on the graph without its large
weights. A function of another opset than the model's is converted; one that cannot be is refused and stays.
"""

from __future__ import annotations

from collections import Counter

import onnx
import onnx.inliner
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Outcome
from channelfold.passes.fold import InlineFunctions
from channelfold.runtime.io.convert import all_graphs, carried, export_skeleton, import_model
from channelfold.runtime.io.snapshot import become


class Work(InlineFunctions):
    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        outcome = Outcome()
        own = carried(graph)
        if own is None or not own.header.functions:
            return outcome
        calls = _calls(graph, own.header)
        model, large = export_skeleton(graph)
        for function in model.functions:
            _relabel(function, graph.opset)
        inlined = onnx.inliner.inline_local_functions(model)
        left = {(function.domain, function.name) for function in inlined.functions}
        for (domain, name), (node, count) in calls.items():
            if (domain, name) in left:
                outcome.refuse(node, f"{name}: the function is of another opset than the model", "another opset")
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


def _relabel(function: onnx.FunctionProto, opset: int) -> None:
    """Gives a function the opset of the model where that changes none of its operators."""
    for used in function.opset_import:
        if used.domain in ("", "ai.onnx") and used.version != opset:
            ops = {node.op_type for node in function.node if node.domain == used.domain}
            if all(_since(op, used.version) == _since(op, opset) for op in ops):
                used.version = opset


def _since(op: str, opset: int) -> int:
    try:
        return onnx.defs.get_schema(op, opset, "").since_version
    except onnx.defs.SchemaError:
        return -opset
