"""Names in a file.

Reports, options and TensorRT's plans speak of nodes by their names, and ONNX Runtime refuses a graph in which two nodes
share one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import onnx


class NodeNames:
    """The names of a graph's nodes. A node without a name, or with the name of an earlier node, gets a new name."""

    def __init__(self, graph: onnx.GraphProto):
        self._known = {node.name for node in graph.node}  # names in the file and names given since
        self._used: set[str] = set()

    def of(self, node: onnx.NodeProto, index: int) -> str:
        name = base = node.name or f"{node.op_type}_{index}"
        numbers = itertools.count(1)
        while name in (self._used if name == node.name else self._known):
            name = f"{base}_{next(numbers)}"
        self._used.add(name)
        self._known.add(name)
        return name


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """The names that a node reads, and its subgraphs read of the graphs around them.

    A subgraph may give its own tensors the names of outer ones: optimum names the results of both branches of an If as
    the outputs of the If.
    """
    yield from node.input
    for attribute in node.attribute:
        body = attribute.g
        own = {value.name for value in (*body.initializer, *body.input)}
        own |= {name for inner in body.node for name in inner.output}
        read = (*(output.name for output in body.output), *(name for inner in body.node for name in reads(inner)))
        yield from (name for name in read if name not in own)
