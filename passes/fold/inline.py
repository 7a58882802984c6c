"""Calls of the functions of a model replaced by the nodes of the functions.

    y = Block(x, W)    with    Block(a, w) = Relu(MatMul(a, w))        becomes        y = Relu(MatMul(x, W))

Exporters put modules into local functions. Passes see the nodes of graphs alone, so that they would never change the
weights of a function. The inliner of the package ``onnx`` works on the graph without its large weights and makes names
unique. A function of another opset than the model is converted where that is possible; other functions are refused.
"""

from __future__ import annotations

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
    """(the first node that calls a function, the number of calls) for each called function."""
    known = {(function.domain, function.name) for function in header.functions}
    calls: dict[tuple[str, str], tuple[str, int]] = {}
    for node in (node for part in all_graphs(graph) for node in part.nodes):
        if (key := (node.domain or "", node.op)) in known:
            first, count = calls.get(key, (node.name, 0))
            calls[key] = first, count + 1
    return calls


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
