"""The FFNs of a graph: channels that bypass the activation or hardly need it, and the weights that folding saves.

*Idle* channels are affine in the channel before the activation for all data (``passes.ffn.pairs``): the pass
``reparameterize-ffn`` folds them exactly. *Dead* channels are constant, or no linear reads them. *Linear* channels are
nearly affine on the data: the best fit p h_j + r leaves less than 1 % of the variance of act(h_j),

    p = cov(h, act(h)) / var(h)        left_j = var(act(h_j)) - p cov(h_j, act(h_j))

If they were made idle, the squared error of the output would be about sum_j left_j |w2_j|^2, for uncorrelated
residuals. `reparam --approximate` is more accurate than these fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Refused
from channelfold.passes.ffn.pairs import Pair, Pairs
from channelfold.passes.fold import FoldConstants
from channelfold.passes.layers.linear import Linear
from channelfold.runtime.data.sources import Data
from channelfold.runtime.errors import no_progress
from channelfold.runtime.io.files import infer_shapes
from channelfold.runtime.stats.compare import json_number
from channelfold.runtime.stats.exact import ExactSum
from channelfold.runtime.stats.observe import Joint, by_name, observe

SHARES = (0.25, 0.5, 0.75)  # of the hidden channels that the record folds, to show the error
LINEAR = 0.01  # share of the variance that a fit may leave


class _Fits(Joint):
    """The fit of every channel that ``outer`` reads, by the channels of the inner linears that feed it.

    ``products``: for each channel the sums of [1, h, …, act] [1, h, …, act]^T, (2 + inner, 2 + inner, hidden).
    """

    def __init__(self, pair: Pair):
        inner = {root.name: linear.out_axis for root, linear in zip(pair.cone.roots, pair.inner, strict=True)}
        outer = {pair.outer.data.name: pair.outer.in_axis, pair.outer.output.name: pair.outer.out_axis}
        super().__init__(inner | outer)
        self.pair, self.products, self.outputs = pair, ExactSum(), ExactSum()

    def add(self, parts: list[np.ndarray]) -> None:
        *inner, read, out = (part.astype(np.float64) for part in parts)
        channels = self.pair.channels["channel"]
        rows = [np.ones_like(read), *(h[:, channels] for h in inner), read]
        self.products.add(np.array([[np.einsum("nc,nc->c", one, other) for other in rows] for one in rows]))
        self.outputs.add(np.stack([np.ones(out.shape[1]) * len(out), out.sum(0), np.square(out).sum(0)]))

    def merge(self, other: _Fits) -> None:
        self.products.merge(other.products)
        self.outputs.merge(other.outputs)

    def left(self) -> tuple[np.ndarray, np.ndarray]:
        """(share of the variance of each channel that the fit leaves, error of the output when the fit replaces it)."""
        products = np.moveaxis(self.products.value, -1, 0)
        moments = products / products[:, :1, :1]
        covariance = moments[:, 1:, 1:] - moments[:, 1:, :1] * moments[:, :1, 1:]
        own, cross, total = covariance[:, :-1, :-1], covariance[:, :-1, -1], covariance[:, -1, -1]
        fitted = np.einsum("ci,cij,cj->c", cross, np.linalg.pinv(own, hermitian=True), cross)
        rest = np.clip(total - fitted, 0, None)
        weight = self.pair.outer.weight().reshape(self.pair.outer.channels[0], -1).astype(np.float64)
        share = np.divide(rest, total, out=np.zeros_like(rest), where=total > 0)
        return share, rest * np.square(weight).sum(axis=0)

    def power(self) -> float:
        """The variance of the output, summed over its channels."""
        count, total, squares = self.outputs.value
        return float(np.sum(squares / count - np.square(total / count)))


def idle(
    graph: gs.Graph, data: Data | None = None, progress: Callable[[str, int, int], None] = no_progress
) -> list[dict[str, Any]]:
    """One entry an FFN. Folds the constants of ``graph``.

    ``node``: the second linear. ``inner``: the linears in front of the activation. ``hidden``, ``idle``, ``dead`` and
    (with data) ``linear`` count channels. ``weights``: the number of weights, each one multiply-accumulate a position;
    ``folded``: the number without the idle channels. With data ``shares``: for each of ``SHARES``, the ``weights`` and
    the approximate ``snr`` of the output in dB when this share of the channels is idle, those with the least error.
    """
    FoldConstants().apply(graph, Context())
    infer_shapes(graph)
    pairs = Pairs(graph, data)
    found = [pair for node in graph.nodes if (pair := _at(pairs, node)) is not None and pair.activated]
    fits = [_Fits(pair) for pair in found]
    if data is not None:
        observe(graph, by_name((name, fit) for fit in fits for name in fit.axes), data, progress)
    return [_entry(fit, data is not None) for fit in fits]


def _at(pairs: Pairs, node: gs.Node) -> Pair | None:
    try:
        return pairs.at(node, plain=True)
    except Refused:  # the pass says why
        return None


def _entry(fit: _Fits, measured: bool) -> dict[str, Any]:
    pair = fit.pair
    dead, idle = _dead(pair), pair.idle
    entry = {
        "node": pair.outer.name,
        "inner": [linear.name for linear in pair.inner],
        "hidden": idle.size,
        "idle": int(np.sum(idle & ~dead)),
        "dead": int(dead.sum()),
        "weights": pair.macs,
        "folded": pair.folded_macs if idle.any() else pair.macs,
    }
    if not measured:
        return entry
    share, cost = fit.left()
    active = pair.active & ~dead
    order = np.argsort(np.where(active, cost, -1.0), kind="stable")
    shares = []
    for part in SHARES:
        count = math.ceil(part * idle.size)
        error = float(np.sum(cost[order[:count]], where=active[order[:count]]))
        kept = int(active[order[count:]].sum())
        snr = 10 * math.log10(fit.power() / error) if error > 0 else math.inf
        shares.append({"share": part, "weights": pair.macs_with(kept), "snr": json_number(snr)})
    return entry | {"linear": int(np.sum(active & (share < LINEAR))), "shares": shares}


def _dead(pair: Pair) -> np.ndarray:
    """A mask of the channels that are constant or that no linear reads."""
    dead = pair.dead | (np.abs(_matrix(pair.outer)).max(axis=0, initial=0) == 0)
    for linear in pair.inner:
        unfed = np.abs(_matrix(linear)).max(axis=1, initial=0) == 0
        dead |= unfed[pair.channels["channel"]]
    return dead


def _matrix(linear: Linear) -> np.ndarray:
    return linear.weight().reshape(linear.channels)
