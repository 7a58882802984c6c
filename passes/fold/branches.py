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
    name = "" if condition is None else "then_branch" if condition else "else_branch"
    made = not name or all(isinstance(t, gs.Constant) or t.inputs for t in node.attrs[name].outputs)
    return name if made else ""


def _inline(graph: gs.Graph, node: gs.Node, name: str) -> None:
    branch: gs.Graph = node.attrs.pop(name)
    results = list(node.outputs)
    place = next(index for index, other in enumerate(graph.nodes) if other is node)
    edit.detach(node)
    del graph.nodes[place]
    _rename(graph, branch)
    copies, moved = [], {}
    for result, inner in zip(results, branch.outputs, strict=True):
        if result.is_empty():
            continue
        source = edit.producer(inner)
        if source is None:  # a constant, or an output for the second time
            read = moved.get(id(inner), inner)
            copies.append(gs.Node("Identity", free_name(graph, f"{result.name}_Identity"), {}, [read], [result]))
            continue
        edit.replace_uses(graph, inner, result)
        edit.set_output(source, next(i for i, t in enumerate(source.outputs) if t is inner), result)
        moved[id(inner)] = result
    graph.nodes[place:place] = [*branch.nodes, *copies]


def _rename(graph: gs.Graph, branch: gs.Graph) -> None:
    """Gives the tensors and nodes of a branch names that nothing in the graph and its other bodies has."""
    parts = list(all_graphs(graph))
    others = {id(t): t.name for part in parts for node in part.nodes for t in (*node.inputs, *node.outputs)}
    others |= {id(t): t.name for part in parts for t in (*part.inputs, *part.outputs)}
    taken, known = set(others.values()), {node.name for node in graph.nodes}
    for node in branch.nodes:
        if node.name in known:
            node.name = free_name(graph, node.name)
    inside = (t for node in branch.nodes for t in (*node.inputs, *node.outputs))
    for tensor in {id(t): t for t in (*inside, *branch.outputs)}.values():
        if tensor.name in taken and id(tensor) not in others:
            tensor.name = free_name(graph, tensor.name)
