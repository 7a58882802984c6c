"""Channels of attention heads turned by an orthogonal matrix, within each head.

    v' = Q^T v        W_v' = Q^T W_v      W_o' = W_o Q      (P v) W_o = (P v') W_o',   P: the probabilities
    q' = Q^T q        k' = Q^T k          q . k = q' . k'

Between the weights only linear operators may stand that treat all channels of a head alike. Rotary embeddings, norms
within heads and caches that others read are refused, as by ``reorder``.

Source: Ashkboos et al., QuaRot, NeurIPS 2024.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Outcome, Refused
from channelfold.passes.channels.scale_regions import End, Region, Shape
from channelfold.passes.layers.linear import cast, view
from channelfold.passes.numeric.hadamard import Turn
from channelfold.passes.operators import operator
from channelfold.passes.smooth.heads import Heads, attended, check_constant, why_unreached
from channelfold.runtime.io import edit


@dataclass(frozen=True)
class HeadTurn:
    """The heads of one product of two activations, called ``name``, and the constants that hold their channels."""

    graph: gs.Graph
    name: str
    kind: str
    heads: Heads
    ends: list[End]

    @property
    def what(self) -> str:
        return f"{self.kind}, {self.heads.rows.shape[0]} heads of {self.heads.rows.shape[1]} channels rotated"

    def turn(self, seed: int) -> None:
        """Turns the heads. Raises DoesNotFit where a weight does not fit its type."""
        size = self.heads.rows.shape[1]
        turn = Turn(size, seed)
        for end in self.ends:
            own = self.heads.place[np.abs(end.index)].reshape(-1, size)[:, 0] >= 0
            for node, port, axis in _places(self.graph, end):
                old = np.asarray(edit.value(node.inputs[port]))
                last = np.moveaxis(old, axis, -1) if end.linear is not None else old.reshape(-1)
                blocks = last.astype(np.float64).reshape(*last.shape[:-1], -1, size)
                blocks[..., own, :] = turn(blocks[..., own, :])
                new = cast(blocks.reshape(last.shape), old.dtype)
                new = np.moveaxis(new, -1, axis) if end.linear is not None else new.reshape(old.shape)
                edit.set_constant(
                    self.graph, node, port, np.ascontiguousarray(new), f"{node.inputs[port].name}_rotated"
                )


def _places(graph: gs.Graph, end: End) -> list[tuple[gs.Node, int, int]]:
    """The constants at an end, as (node, input, axis); of a term all axes hold the channels."""
    if end.linear is not None:
        return view(graph, end.node).places(end.role)
    return [(end.node, edit.constant_input(end.node), -1)]


def head_turns(graph: gs.Graph, shapes: Mapping[str, Shape], outcome: Outcome) -> Iterator[HeadTurn]:
    """The heads of every product of two activations that can be turned; refuses the others."""
    for product, region in attended(graph, shapes):
        with outcome.refusing(product.name, "MatMul"):
            if region is None:
                raise Refused(why_unreached(graph, product, shapes))
            yield _turn_of(graph, region, product, shapes)


def _turn_of(graph: gs.Graph, region: Region, product: gs.Node, shapes: Mapping[str, Shape]) -> HeadTurn:
    index = region.places[id(product.inputs[1])][1]
    heads = Heads.checked(graph, region, index, shapes)
    for tensor, held in region.places.values():
        for node in [*tensor.inputs, *edit.consumers(tensor)] if heads.touch(held) else ():
            if not _is_linear(node):
                raise Refused(f"{node.op} is not linear in its channels", what=node.op)
    ends = [end for end in region.ends if heads.touch(end.index)]
    for end in ends:
        check_constant(end)
        added = end.linear.bias_place if end.linear is not None else (end.node, edit.constant_input(end.node))
        if added is not None and math.prod(added[0].inputs[added[1]].shape) == 1:
            raise Refused(f"{added[0].op} adds one number to all of its channels")
    kind = "keys" if index.shape[-2] > 1 else "values"
    return HeadTurn(graph, product.name, kind, heads, ends)


def _is_linear(node: gs.Node) -> bool:
    """Whether a node is linear, and treats all channels alike unless it is a linear layer or adds a constant."""
    known = operator(node)
    if known.multiplies:
        return any(edit.scalar(tensor) is not None for tensor in node.inputs)
    return known.weighted or known.asks_shape or (known.linear and known.scale == "any")
