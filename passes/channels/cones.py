"""Cones: the nodes between some root tensors and a target tensor that depends on them.

A cone holds nodes that treat every element alike, nodes that move elements, and the nodes that compute masks and
indices from shapes. A cone ends at nodes that mix channels: linears, norms over channels, softmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from channelfold.passes.base import InBetween, Refused
from channelfold.passes.operators import operator
from channelfold.runtime.io import edit

LARGEST_CONE, DEEPEST = 400, 200  # nodes; the masks of PyTorch's exporters take about 50


@dataclass(frozen=True)
class Cone:
    """The nodes between some tensors (``roots``) and ``target``, in order.

    ``unknown`` holds masks, by id, that depend on the values of other tensors; each comes with the obstacle's name.
    """

    target: gs.Tensor
    nodes: list[gs.Node]
    roots: list[gs.Tensor]
    unknown: dict[int, str]

    @property
    def linear(self) -> bool:
        """Whether every node is linear, or adds or multiplies by a constant."""
        return all(
            operator(node).linear
            or (operator(node).arithmetic and any(isinstance(t, gs.Constant) for t in node.inputs))
            for node in self.nodes
        )

    @property
    def varied(self) -> bool:
        """Whether a node may treat channels differently, or the whole cone is linear."""
        kinds = {operator(n).kind for n in self.nodes if operator(n).moves}
        scaled = any(isinstance(t, gs.Constant) and math.prod(t.shape) > 1 for n in self.nodes for t in n.inputs)
        return bool(kinds - {"elementwise", "transpose"}) or scaled or self.linear or self.mixed

    @property
    def mixed(self) -> bool:
        """Whether a node assembles its result from elements of several tensors."""
        return any(operator(n).merges for n in self.nodes)


def cone(graph: gs.Graph, target: gs.Tensor, is_root: Callable[[gs.Tensor], bool], roots: int) -> Cone:
    """The nodes that compute ``target`` from at most ``roots`` tensors for which ``is_root`` holds.

    Raises Refused where the target depends on the values of another tensor, or a node in between mixes channels.
    """
    found = Cone(target, [], [], {})
    seen: set[int] = set()

    def visit(tensor: gs.Tensor, depth: int) -> None:
        if isinstance(tensor, gs.Constant) or tensor.is_empty() or id(tensor) in seen:
            return
        seen.add(id(tensor))
        if is_root(tensor):
            found.roots.append(tensor)
            if len(found.roots) > roots:
                raise Refused("several linears feed it")
            return
        node = edit.producer(tensor)
        if node is None or not edit.in_graph(graph, node):
            raise InBetween(f"{'the input ' if node is None else ''}{tensor.name!r}")
        if id(node) in seen:
            return
        seen.add(id(node))
        if depth == DEEPEST or len(found.nodes) == LARGEST_CONE:
            raise Refused("too many nodes are in between", what="too many nodes")
        if not operator(node).asks_shape:
            if edit.is_float(tensor) and not is_followed(node):
                raise InBetween(f"{node.op}")
            for place, source in enumerate(node.inputs):
                visit_input(node, place, source, depth + 1)
        found.nodes.append(node)

    def visit_input(node: gs.Node, place: int, source: gs.Tensor, depth: int) -> None:
        try:
            visit(source, depth)
        except Refused as error:
            if node.op != "Where" or place:
                raise
            found.unknown[id(source)] = error.what

    visit(target, 0)
    if not found.roots:
        raise Refused("nothing feeds it")
    return found


def is_followed(node: gs.Node) -> bool:
    """Whether a node on floating point data keeps channels apart, or only moves channels."""
    known = operator(node)
    return known.elementwise or known.moves or known.kind == "batch_norm"
