"""Channels of keys and values sorted by magnitude, so that neighbouring channels are of similar size.

    q' = P q,  k' = P k       q . k = q' . k'           rows of W_q, b_q and of W_k, b_k, within each head
    v' = P v,  o reads P v    W_o P^T P v = W_o v       rows of W_v, b_v and columns of W_o, within each head

P sorts the channels of a head by the norm of their rows in W_k (or W_v), largest first. With grouped queries each head
of keys has one order, which all its queries share. The pass is exact and needs no data. Number formats whose blocks
share an exponent then waste fewer bits, because small channels do not share the exponent of large channels.

``scale_regions.trace`` finds the tensors that share channels. Their channels can be sorted where each index map
consists of whole heads in one sequence of channels, so that every operator moves whole heads. The pass refuses rotary
embeddings, whose tables all heads share, norms within heads, and a cache of keys that is an output of the graph.

Source: K-sort, for block floating point caches of keys; the order of values is an extension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Outcome, Refused
from channelfold.passes.channels.renumber import index_constants
from channelfold.passes.channels.scale_regions import End, Region, Shape, trace
from channelfold.passes.layers.linear import check_growth, linears, view
from channelfold.passes.operators import operator
from channelfold.passes.smooth import ReorderChannels
from channelfold.runtime.data.probes import random_data
from channelfold.runtime.io import edit
from channelfold.runtime.io.facts import required_inputs
from channelfold.runtime.io.files import infer_shapes
from channelfold.runtime.io.shapes import measured_shapes

BLOCK, MANTISSA = 16, 4  # of the block floating point whose error is reported


def block_floating_point(values: np.ndarray, block: int = BLOCK, mantissa: int = MANTISSA) -> np.ndarray:
    """``values`` (…, n) float64 rounded with one exponent for each ``block`` neighbours along the last axis.

    e = floor(log2 max|v|) over a block;  v^ = clip(round(v 2^(m-1-e)), -(2^m - 1), 2^m - 1) 2^(e-m+1), with m bits of
    mantissa beside the sign. The last block may be shorter.
    """
    count = values.shape[-1]
    padded = np.concatenate([values, np.zeros((*values.shape[:-1], -count % block))], axis=-1)
    blocks = padded.reshape(*values.shape[:-1], -1, block)
    peak = np.abs(blocks).max(axis=-1, keepdims=True)
    step = np.exp2(np.floor(np.log2(np.where(peak > 0, peak, 1.0))) - mantissa + 1)
    limit = 2**mantissa - 1
    return (np.clip(np.rint(blocks / step), -limit, limit) * step).reshape(padded.shape)[..., :count]


class Work(ReorderChannels):
    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        infer_shapes(graph)
        outcome = Outcome()
        data = ctx.calibration if ctx.calibration is not None else random_data(required_inputs(graph), 1)
        shapes = measured_shapes(graph, next(iter(data)))
        products = {id(node): node for node in graph.nodes if _multiplies_activations(node)}
        facts, done = [], set()
        for linear in linears(graph) if products else ():
            if id(linear.node) in done:
                continue
            region = trace(graph, linear.output, linear.out_axis, shapes)
            done.update(id(end.node) for end in region.ends if end.role == "out")
            for product in [node for node in products.values() if id(node.inputs[1]) in region.places]:
                del products[id(product)]
                with outcome.refusing(product.name, "MatMul"):
                    facts.append(_sort(graph, region, product, shapes, outcome))
        for product in products.values():
            reason = _why_unreached(graph, product, shapes)
            outcome.refuse(product.name, f"MatMul: {reason}", reason)
        outcome.facts = {"block": BLOCK, "mantissa": MANTISSA, "sites": facts}
        return outcome


def _multiplies_activations(node: gs.Node) -> bool:
    return operator(node).kind == "matmul" and not any(isinstance(t, gs.Constant) for t in node.inputs)


def _why_unreached(graph: gs.Graph, product: gs.Node, shapes: dict[str, Shape]) -> str:
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
class _Heads:
    """Classes of a region that form heads: ``rows`` (heads, channels), in the order of every tensor.

    ``place`` holds the position of each class in ``rows`` flattened; -1 where a class is in no head.
    """

    rows: np.ndarray
    place: np.ndarray

    @classmethod
    def of(cls, region: Region, index: np.ndarray) -> _Heads:
        """The heads of the second operand of a product, from its index map."""
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


def _sort(
    graph: gs.Graph, region: Region, product: gs.Node, shapes: dict[str, Shape], outcome: Outcome
) -> dict[str, Any]:
    """Sorts the channels of the heads of one product. Raises Refused, with nothing changed."""
    index = region.places[id(product.inputs[1])][1]
    heads = _Heads.of(region, index)
    for reason in filter(None, (region.fixed[c - 1] for c in heads.rows.reshape(-1))):
        raise Refused(reason)
    _check_operands(graph, region, heads, shapes)
    if np.unique(heads.rows).size < heads.rows.size:
        raise Refused("its heads have channels in common")
    for tensor, held in region.places.values():
        if heads.touch(held):
            heads.check(held, tensor.name)
    signed = np.zeros(region.size + 1, np.int64)
    signed[np.abs(index)] = np.sign(index)
    weights = _weights(graph, region, heads, signed)
    order = np.argsort(-(weights**2).sum(axis=2), axis=1, kind="stable")
    kind = "keys" if index.shape[-2] > 1 else "values"
    after = np.take_along_axis(weights, order[:, :, None], axis=1)
    errors = [_relative_error(weights), _relative_error(after)]
    ends = [end for end in region.ends if heads.touch(end.index)]
    for end in ends:
        _check_constant(end)
    if (order != np.arange(order.shape[1])).any():
        for end in ends:
            _sort_end(graph, end, heads.positions(end.index, order))
        what = f"{kind}, {order.shape[0]} heads of {order.shape[1]} channels sorted"
        outcome.change(product.name, f"{what}; block floating point error {errors[0]:.3g} -> {errors[1]:.3g}")
    norms = np.sqrt((after**2).sum(axis=2))
    return {
        "node": product.name,
        "kind": kind,
        "heads": list(order.shape),
        "norms": [[float(row[0]), float(np.median(row)), float(row[-1])] for row in norms],
        "bfp_error": errors,
    }


def _check_operands(graph: gs.Graph, region: Region, heads: _Heads, shapes: dict[str, Shape]) -> None:
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


def _weights(graph: gs.Graph, region: Region, heads: _Heads, signed: np.ndarray) -> np.ndarray:
    """The rows that write the second operand, (heads, channels, in) float64. ``signed``: the sign of each class."""
    for end in region.ends:
        if end.role != "out" or not heads.touch(end.index):
            continue
        place = heads.place[np.abs(end.index)]
        own = (place >= 0) & (np.sign(end.index) == signed[np.abs(end.index)])
        if own.sum() < heads.rows.size:
            continue
        found = view(graph, end.node).weight()
        rows = np.zeros((heads.rows.size, found[0].size))
        rows[place[own]] = found[own].reshape(int(own.sum()), -1)
        return rows.reshape(*heads.rows.shape, -1)
    raise Refused("no single linear writes all of its heads")


def _check_constant(end: End) -> None:
    """Raises Refused where the constants at an end cannot be written."""
    if end.linear is None:
        if math.prod(end.node.inputs[edit.constant_input(end.node)].shape) not in (1, end.index.size):
            raise Refused(f"{end.node.op} adds a constant that is not one value for each of its channels")
    elif end.linear.groups > 1:
        raise Refused(f"{end.node.op} works in groups")
    else:
        check_growth(end.linear)


def _sort_end(graph: gs.Graph, end: End, positions: np.ndarray) -> None:
    """Sorts the constants at an end: along the channels of a linear, or all values of a term."""
    if end.linear is not None:
        index_constants(graph, [(*place, positions) for place in view(graph, end.node).places(end.role)])
        return
    port = edit.constant_input(end.node)
    old = np.asarray(edit.value(end.node.inputs[port]))
    if old.size > 1:
        new = old.reshape(-1)[positions].reshape(old.shape)
        edit.set_constant(graph, end.node, port, new, f"{end.node.inputs[port].name}_sorted")


def _relative_error(weights: np.ndarray) -> float:
    """The relative squared error of (heads, channels, in) in block floating point along the channels."""
    values = weights.swapaxes(1, 2)
    total = float((values**2).sum())
    return float(((block_floating_point(values) - values) ** 2).sum()) / total if total > 0 else 0.0
