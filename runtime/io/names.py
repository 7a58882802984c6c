"""Names of nodes: reports, options and TensorRT's plans speak of nodes by them, so no two nodes share one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import onnx


class NodeNames:
    """The names of a model's nodes: those of the file, and made up where a node has none or that of one before it."""

    def __init__(self, graph: onnx.GraphProto):
        self._known = set(_names(graph))  # in the file, and by now
        self._used: set[str] = set()

    def of(self, node: onnx.NodeProto, index: int) -> str:
        name = base = node.name or f"{node.op_type}_{index}"
        numbers = itertools.count(1)
        while name in (self._used if name == node.name else self._known):
            name = f"{base}_{next(numbers)}"
        self._used.add(name)
        self._known.add(name)
        return name


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    for node in graph.node:
        yield node.name
        for attribute in node.attribute:
            yield from _names(attribute.g)
