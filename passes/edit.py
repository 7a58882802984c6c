"""Small questions to a graph, and the edits that keep it whole.

GraphSurgeon compares tensors and nodes by name and contents; here everything goes by identity.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.runtime.graph_io import read


def is_output(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    return any(tensor is output for output in graph.outputs)


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """The node that computes a tensor; None for inputs and constants."""
    return tensor.inputs[0] if len(tensor.inputs) == 1 else None


def consumers(tensor: gs.Tensor) -> list[gs.Node]:
    """The nodes that read a tensor (nodes of subgraphs too), each once, in order."""
    return list({id(node): node for node in tensor.outputs}.values())


def sole_consumer(graph: gs.Graph, tensor: gs.Tensor) -> gs.Node | None:
    """The one node of this graph that reads a tensor once and is all that reads it; None when there are others."""
    if is_output(graph, tensor) or len(tensor.outputs) != 1:
        return None
    return tensor.outputs[0]


def rank(tensor: gs.Tensor) -> int | None:
    return len(tensor.shape) if tensor.shape is not None else None


def is_float(tensor: gs.Tensor) -> bool:
    """Whether a tensor is of a floating type numpy computes with; an unknown type counts as floating."""
    dtype = tensor.dtype
    if dtype is None:
        return True
    return not isinstance(dtype, int) and np.dtype(dtype).kind == "f"


def value(tensor: gs.Tensor) -> np.ndarray | None:
    """The values of a constant, None for anything else. They are not kept."""
    return read(tensor) if isinstance(tensor, gs.Constant) else None


def scalar(tensor: gs.Tensor) -> float | None:
    """The value of a constant with one element, None for anything else."""
    if not isinstance(tensor, gs.Constant) or int(np.prod(tensor.shape)) != 1:
        return None
    return float(read(tensor).reshape(()))


def set_input(node: gs.Node, index: int, tensor: gs.Tensor) -> None:
    """Makes ``tensor`` the input of a node at ``index``, padding with empty inputs where there were none."""
    while len(node.inputs) <= index:
        node.inputs.append(gs.Variable.empty())
    _unlink(node.inputs[index].outputs, node)
    list.__setitem__(node.inputs, index, tensor)
    list.append(tensor.outputs, node)


def replace_uses(graph: gs.Graph, old: gs.Tensor, new: gs.Tensor) -> None:
    """Lets every reader of ``old`` in the graph and its subgraphs read ``new``. ``old`` must not be a graph output."""
    for node in consumers(old):
        for index, tensor in enumerate(node.inputs):
            if tensor is old:
                set_input(node, index, new)


def set_output(node: gs.Node, index: int, tensor: gs.Tensor) -> None:
    """Makes ``tensor`` the output of a node at ``index``; whatever produced it before no longer does."""
    for other in list(tensor.inputs):
        other_index = next(i for i, t in enumerate(other.outputs) if t is tensor)
        list.__delitem__(other.outputs, other_index)
    list.clear(tensor.inputs)
    _unlink(node.outputs[index].inputs, node)
    list.__setitem__(node.outputs, index, tensor)
    list.append(tensor.inputs, node)


def detach(node: gs.Node) -> None:
    """Takes a node's edges away, so that it is dead."""
    for tensors, field in ((node.inputs, "outputs"), (node.outputs, "inputs")):
        for tensor in tensors:
            _unlink(getattr(tensor, field), node)
        list.clear(tensors)


def remove(graph: gs.Graph, nodes: list[gs.Node]) -> None:
    """Detaches nodes and takes them out of the graph."""
    gone = {id(node) for node in nodes}
    for node in nodes:
        detach(node)
    graph.nodes[:] = [node for node in graph.nodes if id(node) not in gone]


def bypass(graph: gs.Graph, first: gs.Tensor, nodes: list[gs.Node], last: gs.Tensor) -> bool:
    """Removes a chain of nodes that leads from ``first`` to ``last``: readers of ``last`` read ``first``.

    Names of graph outputs stay: when ``last`` is one, the producer of ``first`` gets to write it, if it can.
    Returns False, with nothing changed, where the names forbid it (an input or output would have to be renamed).
    """
    if not is_output(graph, last):
        replace_uses(graph, last, first)
        remove(graph, nodes)
        return True
    source = producer(first)
    if source is None or is_output(graph, first) or not any(source is node for node in graph.nodes):
        return False
    remove(graph, nodes)
    replace_uses(graph, first, last)
    set_output(source, next(i for i, t in enumerate(source.outputs) if t is first), last)
    return True


def remove_dead(graph: gs.Graph) -> list[gs.Node]:
    """Removes the nodes whose results nobody reads; returns them."""
    dead: dict[int, gs.Node] = {}
    for node in reversed(graph.nodes):
        if not any(t.outputs or is_output(graph, t) for t in node.outputs if not t.is_empty()):
            dead[id(node)] = node
            detach(node)
    graph.nodes[:] = [node for node in graph.nodes if id(node) not in dead]
    return list(dead.values())


def insert_after(graph: gs.Graph, node: gs.Node, new: gs.Node) -> None:
    """Puts ``new`` into the node list right behind ``node``."""
    position = next(i for i, other in enumerate(graph.nodes) if other is node)
    graph.nodes.insert(position + 1, new)


def _unlink(nodes: list[gs.Node], node: gs.Node) -> None:
    for index, other in enumerate(nodes):
        if other is node:
            list.__delitem__(nodes, index)
            return
