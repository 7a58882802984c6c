"""Models with operators that ONNX Runtime does not know: the nodes in front of these operators can still be run.

TensorRT plugins are such operators, often in ONNX's own domain (EfficientNMS_TRT).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs

from channelfold.runtime.errors import ModelError
from channelfold.runtime.io import files


def unknown(graph: gs.Graph) -> list[gs.Node]:
    """The nodes whose operator neither ONNX, ONNX Runtime nor the file defines, here or in a body of the node."""
    carried = files.carried(graph)
    functions = (*graph.functions, *(carried.header.functions if carried else ()))
    own = {(function.domain or "", function.name) for function in functions}

    def is_known(node: gs.Node) -> bool:
        return files.is_known(node.domain, node.op) or (node.domain or "", node.op) in own

    return [node for node in graph.nodes if not all(map(is_known, _with_bodies(node)))]


def _with_bodies(node: gs.Node) -> Iterator[gs.Node]:
    yield node
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            for inner in value.nodes:
                yield from _with_bodies(inner)


class Front:
    """A session on the part of a model in front of unknown operators. The inputs of these operators become outputs.

    The new outputs are named by operator and position, because passes may rename tensors inside a graph. Raises
    ModelError when every operator is known, or when no node stands in front of the unknown operators.
    """

    def __init__(self, path: Path, **options: Any):
        graph = files.load(path)
        nodes = unknown(graph)
        self.operators = sorted({node.op for node in nodes})
        behind = behind_of(graph, nodes)
        self._names = {tensor.name: tensor.name for tensor in graph.outputs if id(tensor) not in behind}
        for number, node in enumerate(nodes):
            for index, tensor in enumerate(node.inputs):
                if tensor.inputs and id(tensor) not in behind:
                    self._names[f"{node.op} {number} input {index}"] = tensor.name
        if not nodes or not self._names:
            raise ModelError(f"Nothing in {path.name} can be run in ONNX Runtime", "Remove the custom operators.")
        self._session = files.session(graph, list(dict.fromkeys(self._names.values())), **options)
        self._inputs = {spec.name for spec in self._session.inputs}

    def run(self, feed: Mapping[str, Any]) -> dict[str, Any]:
        found = self._session.run({name: values for name, values in feed.items() if name in self._inputs})
        return {label: found[name] for label, name in self._names.items()}


def behind_of(graph: gs.Graph, nodes: list[gs.Node]) -> set[int]:
    """The tensors (by id) that depend on nodes of a sorted graph."""
    behind = {id(tensor) for node in nodes for tensor in node.outputs}
    for node in graph.nodes:
        if any(id(tensor) in behind for inner in _with_bodies(node) for tensor in inner.inputs):
            behind |= {id(tensor) for tensor in node.outputs}
    return behind
