"""Names in a file.

Reports, options and TensorRT's plans speak of nodes by their names, and ONNX Runtime refuses a graph in which two nodes
share one.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Mapping, Sequence

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


def in_order(nodes: Sequence[onnx.NodeProto]) -> list[int]:
    """The indices of nodes, each behind those that write what the node or its subgraphs read; otherwise as they are.

    Nodes that depend on their own output are left out. ONNX Runtime sorts nodes too, so that files need not be sorted.
    """
    writers = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    sources = [{writers[name] for name in reads(node) if name in writers} for node in nodes]
    readers: dict[int, list[int]] = {}
    for index, found in enumerate(sources):
        for source in found:
            readers.setdefault(source, []).append(index)
    waiting = [len(found) for found in sources]
    ready = [index for index, count in enumerate(waiting) if not count]  # a heap, being sorted
    order = []
    while ready:
        order.append(heapq.heappop(ready))
        for reader in readers.get(order[-1], ()):
            waiting[reader] -= 1
            if not waiting[reader]:
                heapq.heappush(ready, reader)
    return order


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """The names that a node reads, and those that its subgraphs read outside of themselves.

    A tensor in a subgraph may have the name of a tensor outside: exporters that merge decoders call the outputs of
    both branches of an If as its own.
    """
    yield from node.input
    for graph in _subgraphs(node):
        own = _own(graph)
        read = (name for inner in graph.node for name in reads(inner))
        yield from (name for name in (*read, *(output.name for output in graph.output)) if name not in own)


def rename(node: onnx.NodeProto, names: Mapping[str, str], prefix: str) -> None:
    """Gives new names to the tensors of a node and of its subgraphs: those in ``names``, and a prefix to the others."""
    names = {**names, "": ""}
    for field in (node.input, node.output):
        field[:] = [names.get(name, prefix + name) for name in field]
    for graph in _subgraphs(node):
        own = _own(graph)
        inside = {name: new for name, new in names.items() if name not in own}
        for tensor in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
            tensor.name = inside.get(tensor.name, prefix + tensor.name)
        for sparse in graph.sparse_initializer:
            sparse.values.name = prefix + sparse.values.name
        for inner in graph.node:
            rename(inner, inside, prefix)


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    return (attribute.g for attribute in node.attribute if attribute.HasField("g"))


def _own(graph: onnx.GraphProto) -> set[str]:
    """The names of the tensors that a subgraph makes."""
    own = {tensor.name for tensor in (*graph.input, *graph.initializer)}
    own |= {sparse.values.name for sparse in graph.sparse_initializer}
    return own | {name for inner in graph.node for name in inner.output}
