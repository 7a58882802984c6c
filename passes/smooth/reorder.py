"""Channels of keys and values sorted by magnitude, so that neighbouring channels are of similar size.

    q' = P q,  k' = P k       q . k = q' . k'           rows of W_q, b_q and of W_k, b_k, within each head
    v' = P v,  o reads P v    W_o P^T P v = W_o v       rows of W_v, b_v and columns of W_o, within each head

P sorts the channels of a head by the norm of their rows in W_k (or W_v), largest first. With grouped queries each head
of keys has one order, which all its queries share. The pass is exact and needs no data. Number formats whose blocks
share an exponent then waste fewer bits, because small channels do not share the exponent of large channels.

Where heads can be sorted is told by ``heads``. The pass refuses rotary embeddings, whose tables all heads share, norms
within heads, and a cache of keys that is an output of the graph.

Source: K-sort, for block floating point caches of keys; the order of values is an extension.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Outcome, Refused
from channelfold.passes.channels.renumber import index_constants
from channelfold.passes.channels.scale_regions import End, Region, Shape
from channelfold.passes.layers.linear import view
from channelfold.passes.smooth import ReorderChannels
from channelfold.passes.smooth.heads import Heads, attended, check_constant, why_unreached
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
        facts = []
        for product, region in attended(graph, shapes):
            with outcome.refusing(product.name, "MatMul"):
                if region is None:
                    raise Refused(why_unreached(graph, product, shapes))
                facts.append(_sort(graph, region, product, shapes, outcome))
        outcome.facts = {"block": BLOCK, "mantissa": MANTISSA, "sites": facts}
        return outcome


def _sort(
    graph: gs.Graph, region: Region, product: gs.Node, shapes: dict[str, Shape], outcome: Outcome
) -> dict[str, Any]:
    """Sorts the channels of the heads of one product. Raises Refused, with nothing changed."""
    index = region.places[id(product.inputs[1])][1]
    heads = Heads.checked(graph, region, index, shapes)
    signed = np.zeros(region.size + 1, np.int64)
    signed[np.abs(index)] = np.sign(index)
    weights = _weights(graph, region, heads, signed)
    order = np.argsort(-(weights**2).sum(axis=2), axis=1, kind="stable")
    kind = "keys" if index.shape[-2] > 1 else "values"
    after = np.take_along_axis(weights, order[:, :, None], axis=1)
    errors = [_relative_error(weights), _relative_error(after)]
    ends = [end for end in region.ends if heads.touch(end.index)]
    for end in ends:
        check_constant(end)
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


def _weights(graph: gs.Graph, region: Region, heads: Heads, signed: np.ndarray) -> np.ndarray:
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
