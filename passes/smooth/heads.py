"""The channels of attention heads: which classes of a region form heads, and what keeps a pass from mixing them.

``scale_regions.trace`` finds the tensors that share channels. Channels can be sorted or turned within heads where each
index map consists of whole heads in one sequence of channels, so that every operator moves whole heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Refused
from channelfold.passes.channels.scale_regions import End, Region, Shape, trace
from channelfold.passes.layers.linear import check_growth, linears
from channelfold.passes.operators import operator
from channelfold.runtime.io import edit


def attended(graph: gs.Graph, shapes: Mapping[str, Shape]) -> Iterator[tuple[gs.Node, Region | None]]:
    """Every product of two activations, and the region of its second operand; None where no linear writes that."""
    products = {id(node): node for node in graph.nodes if _multiplies_activations(node)}
    done: set[int] = set()
    for linear in linears(graph) if products else ():
        if id(linear.node) in done:
            continue
        region = trace(graph, linear.output, linear.out_axis, shapes)
        done.update(id(end.node) for end in region.ends if end.role == "out")
        for product in [node for node in products.values() if id(node.inputs[1]) in region.places]:
            del products[id(product)]
            yield product, region
    yield from ((product, None) for product in products.values())


def _multiplies_activations(node: gs.Node) -> bool:
    return operator(node).kind == "matmul" and not any(isinstance(t, gs.Constant) for t in node.inputs)


def why_unreached(graph: gs.Graph, product: gs.Node, shapes: Mapping[str, Shape]) -> str:
    """Why no linear writes the second operand of a product."""
    for axis in (-2, -1):
        try:
            region = trace(graph, product.inputs[1], axis, shapes)
        except Refused as error:
            return str(error)
        norms = [end.node.op for end in region.ends if end.role == "norm"]
        if norms:
            return f"{norms[0]} works within its heads"
        if reason := next(filter(None, region.fixed), ""):
            return reason
    return "no linear writes what it multiplies"


@dataclass(frozen=True)
class Heads:
    """Classes of a region that form heads: ``rows`` (heads, channels), in the order of every tensor.

    ``place`` holds the position of each class in ``rows`` flattened; -1 where a class is in no head.
    """

    rows: np.ndarray
    place: np.ndarray

    @classmethod
    def checked(cls, graph: gs.Graph, region: Region, index: np.ndarray, shapes: Mapping[str, Shape]) -> Heads:
        """The heads of the second operand of a product, from its index map. Raises Refused where they cannot change."""
        heads = cls._of(region, index)
        for reason in filter(None, (region.fixed[c - 1] for c in heads.rows.reshape(-1))):
            raise Refused(reason)
        _check_operands(graph, region, heads, shapes)
        if np.unique(heads.rows).size < heads.rows.size:
            raise Refused("its heads have channels in common")
        for tensor, held in region.places.values():
            if heads.touch(held):
                heads.check(held, tensor.name)
        return heads

    @classmethod
    def _of(cls, region: Region, index: np.ndarray) -> Heads:
        if index.ndim < 2 or (index.shape[-1] > 1) == (index.shape[-2] > 1):
            raise Refused("its channels lie along no single axis")
        moved = index.swapaxes(-1, -2) if index.shape[-2] > 1 else index
        rows = np.unique(np.abs(moved).reshape(-1, moved.shape[-1]), axis=0)
        place = np.full(region.size + 1, -1)
        place[rows.reshape(-1)] = np.arange(rows.size)
        return cls(rows, place)

    def touch(self, index: np.ndarray) -> bool:
        return bool((self.place[np.abs(index)] >= 0).any())

    def check(self, index: np.ndarray, name: str) -> None:
        """Raises Refused unless an index map consists of whole heads and of channels that are in no head."""
        found = self.place[np.abs(index)].reshape(-1)
        size = self.rows.shape[1]
        if found.size % size:
            raise Refused(f"{name!r} has parts of its heads")
        blocks = found.reshape(-1, size)
        whole = (blocks == blocks[:, :1] + np.arange(size)).all(axis=1) & (blocks[:, 0] % size == 0)
        if not (whole | (blocks < 0).all(axis=1)).all():
            raise Refused(f"{name!r} does not keep its heads together")

    def positions(self, index: np.ndarray, order: np.ndarray) -> np.ndarray:
        """The old position of each position of a sorted vector of whole heads. ``order``: (heads, channels)."""
        size = self.rows.shape[1]
        positions = np.arange(index.size).reshape(-1, size)
        first = self.place[np.abs(index)].reshape(-1, size)[:, 0]
        heads = first[first >= 0] // size
        positions[first >= 0] = np.take_along_axis(positions[first >= 0], order[heads], axis=1)
        return positions.reshape(-1)


def _check_operands(graph: gs.Graph, region: Region, heads: Heads, shapes: Mapping[str, Shape]) -> None:
    """Raises Refused where a node combines the channels of heads with a tensor that has its own order."""
    for end in region.ends:
        if end.role in ("norm", "factor") and heads.touch(end.index):
            raise Refused(f"{end.node.op} scales the channels of its heads")
    biases = {id(end.linear.bias_node) for end in region.ends if end.linear is not None}
    for tensor, index in region.places.values():
        if not heads.touch(index):
            continue
        varied = [axis - index.ndim for axis, size in enumerate(index.shape) if size > 1]
        for node in [*tensor.inputs, *edit.consumers(tensor)]:
            if operator(node).kind == "gather" and _picks_channels(node, region):
                raise Refused("Gather picks its channels one by one")
            if not operator(node).arithmetic or id(node) in biases:
                continue
            for other in [t for t in node.inputs if not isinstance(t, gs.Constant) and id(t) not in region.places]:
                shape = shapes[other.name]
                if any(len(shape) >= -axis and shape[axis] > 1 for axis in varied):
                    raise Refused(f"{node.op} combines its channels with {other.name!r}, as rotary embeddings do")


def _picks_channels(node: gs.Node, region: Region) -> bool:
    """Whether a Gather picks several channels along the axis of the channels of one head."""
    indices, source = edit.argument(node, 1, "indices"), region.places.get(id(node.inputs[0]))
    if indices is None or indices.size == 1 or source is None:
        return False
    index = source[1]
    last = max((axis for axis, size in enumerate(index.shape) if size > 1), default=-1)
    return int(node.attrs.get("axis", 0)) % index.ndim == last


def check_constant(end: End) -> None:
    """Raises Refused where the constants at an end cannot be written."""
    if end.linear is None:
        if math.prod(end.node.inputs[edit.constant_input(end.node)].shape) not in (1, end.index.size):
            raise Refused(f"{end.node.op} adds a constant that is not one value for each of its channels")
    elif end.linear.groups > 1:
        raise Refused(f"{end.node.op} works in groups")
    else:
        check_growth(end.linear)
