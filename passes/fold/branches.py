"""An If whose condition is constant, replaced by the nodes of the branch that it takes.

    y = If(true) {then: a = Relu(x), else: b = Tanh(x)}        becomes        y = Relu(x)

The other branch goes, with the weights that it alone reads.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Outcome
from channelfold.passes.fold import TakeBranch
from channelfold.runtime.io import edit
from channelfold.runtime.io.convert import all_graphs
from channelfold.runtime.io.files import free_name


class Work(TakeBranch):
    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        outcome = Outcome()
        while found := next(((node, name) for node in graph.nodes if (name := _taken(node))), None):
            node, name = found
            outcome.change(node.name, f"If: its condition is constant, so the nodes of its {name} take its place")
            _inline(graph, node, name)
        return outcome


def _taken(node: gs.Node) -> str:
    """The branch that an If always takes; "" where the inputs decide."""
    if node.op != "If" or not edit.is_standard(node):
        return ""
    condition = edit.scalar(node.inputs[0])
    return "" if condition is None else "then_branch" if condition else "else_branch"


def _inline(graph: gs.Graph, node: gs.Node, name: str) -> None:
    branch: gs.Graph = node.attrs.pop(name)
    results, names = list(node.outputs), graph.tensors()
    place = next(index for index, other in enumerate(graph.nodes) if other is node)
    edit.detach(node)
    del graph.nodes[place]
    _rename(graph, branch)
    extra = []
    for result, inner in zip(results, branch.outputs, strict=True):
        source = edit.producer(inner)
        if result.is_empty():
            continue
        if source is None or any(inner is other for other in results):  # a constant, or an output for the second time
            read = inner if isinstance(inner, gs.Constant) or source is not None else names.get(inner.name, inner)
            extra.append(gs.Node("Identity", free_name(graph, f"{result.name}_Identity"), {}, [read], [result]))
            continue
        port = next(index for index, tensor in enumerate(source.outputs) if tensor is inner)
        for reader in edit.consumers(inner):
            for index, tensor in enumerate(reader.inputs):
                if tensor is inner:
                    edit.set_input(reader, index, result)
        edit.set_output(source, port, result)
        branch.outputs = [result if tensor is inner else tensor for tensor in branch.outputs]
    graph.nodes[place:place] = [*branch.nodes, *extra]


def _rename(graph: gs.Graph, branch: gs.Graph) -> None:
    """Gives the tensors and nodes of a branch names that nothing in the graph and its other bodies has."""
    parts = list(all_graphs(graph))
    others = {id(t): t.name for part in parts for node in part.nodes for t in (*node.inputs, *node.outputs)}
    others |= {id(t): t.name for part in parts for t in (*part.inputs, *part.outputs)}
    taken, known = set(others.values()), {node.name for node in graph.nodes}
    for node in branch.nodes:
        if node.name in known:
            node.name = free_name(graph, node.name)
        for tensor in (*node.inputs, *node.outputs):
            if tensor.name in taken and id(tensor) not in others:
                tensor.name = free_name(graph, tensor.name)
