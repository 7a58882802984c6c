"""Similar channels merged in pairs, so that a width is aligned again.

    linear -> linear       x_new = (x_i + x_j) / 2,  w_new = w_i + w_j
                           change = |x_i - x_j|^2 |w_i - w_j|^2 / 4
    with f in between      x_new = x_i,  w_new = w_i + c w_j,  c = <x_i, x_j> / <x_i, x_i>
                           change = |x_j - c x_i|^2 |w_j|^2

where w_i is the column that reads channel i. The change of the outputs is measured on a sample of rows. The mean of two
rows of a weight makes the mean of two channels only if nothing but sums stands between the linears. Behind an
activation, a gate or a Gather one of the two channels stays for both, with the factor c of least squares.

An even channel can be paired with any odd channel, and each channel is in one pair at most. The pair with the least
change is merged first. Copies that ``split-channels`` made have equal rows and equal columns. The pass never merges two
copies, because the merge would undo the split; the number of copies tells the width before the split. Run the pass once
after a split, because a second run would remove as many channels again.

Source: Liu et al., QLLM, ICLR 2024, section 4.1 (channel assembly), which merges activations by their mean at run time.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Outcome, Refused
from channelfold.passes.channels.widths import Width, read_by
from channelfold.passes.layers.linear import Linear, usable
from channelfold.passes.smooth import MergeChannels
from channelfold.passes.smooth.sites import Shapes, change_each
from channelfold.runtime.stats.channels import ChannelStatistics


class Work(MergeChannels):
    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        find, change = functools.partial(self._sites, graph), functools.partial(self._merge, graph)
        return change_each(self, graph, ctx, find, change)

    def _sites(self, graph: gs.Graph, shapes: Shapes, outcome: Outcome) -> list[Linear]:
        """The first reader of each tensor that is too wide; with ``align`` refuses a width that cannot change."""
        tried: set[int] = set()

        def why_not(linear: Linear) -> str | None:
            if id(linear.data) in tried or (self.align and linear.channels[1] % self.align == 0):
                return None
            tried.add(id(linear.data))
            return "" if self._surplus(read_by(graph, linear, shapes)) else None

        return list(usable(graph, outcome if self.align else Outcome(), why_not))

    def _surplus(self, width: Width) -> int:
        """The number of channels to remove."""
        if self.align:
            return width.channels % self.align if width.channels > self.align else 0
        return round(float((1 - 1 / _copies(width)).sum()))

    def _merge(
        self, graph: gs.Graph, linear: Linear, shapes: Shapes, seen: ChannelStatistics, outcome: Outcome
    ) -> dict[str, Any]:
        """Merges input channels of a linear. Raises Refused, with nothing changed."""
        width = read_by(graph, linear, shapes)
        rows, weights = seen.sample()
        before, columns, single = width.channels, width.columns(), _copies(width) == 1
        merger = _paired(rows * np.sqrt(weights)[:, None], columns, single, self._surplus(width), width.linear)
        change = merger.change(rows, weights, columns)
        if change > self.max_change:
            raise Refused(f"merging {len(merger.kept)} pairs changes its outputs by {change:.2g} (max_change)")
        mean = width.linear
        width = width.blended(merger.rows if mean else None, merger.columns, shapes)
        width.repeat(merger.stays(before), shapes)
        how = "by their mean" if mean else "one for both"
        what = f"{before} -> {width.channels} channels, {len(merger.kept)} pairs merged {how}, outputs {change:.2g} off"
        outcome.change(linear.name, f"{linear.data.name}: {what}")
        return {
            "node": linear.name,
            "tensor": linear.data.name,
            "width": [before, width.channels],
            "relative_change": change,
            "mean": mean,
        }


@dataclass(frozen=True)
class _Merger:
    """Pairs of channels (pairs,): ``kept`` stays, ``gone`` goes. ``factors`` holds c, or is None for the mean."""

    kept: np.ndarray
    gone: np.ndarray
    factors: np.ndarray | None

    def rows(self, old: np.ndarray) -> np.ndarray:
        """The new constants that make the channels, (channels, …), before channels go."""
        new = old.astype(np.float64)
        if self.factors is None:
            new[self.kept] = (new[self.kept] + new[self.gone]) / 2
        return new

    def columns(self, old: np.ndarray) -> np.ndarray:
        """The new weights that read the channels, (channels, …), before channels go."""
        new = old.astype(np.float64)
        factors = np.ones(len(self.kept)) if self.factors is None else self.factors
        new[self.kept] += new[self.gone] * factors.reshape(-1, *[1] * (new.ndim - 1))
        return new

    def stays(self, channels: int) -> np.ndarray:
        """Which channels stay, (channels,) bool."""
        return ~np.isin(np.arange(channels), self.gone)

    def change(self, rows: np.ndarray, weights: np.ndarray, matrix: np.ndarray) -> float:
        """The squared change of the outputs, ``matrix`` (out, channels) times ``rows``, relative to the outputs."""
        old = rows @ matrix.T
        stays = self.stays(matrix.shape[1])
        new = self.rows(rows.T)[stays].T @ self.columns(matrix.T)[stays]
        signal = float(weights @ (old**2).sum(axis=1, dtype=np.float64))
        return float(weights @ ((new - old) ** 2).sum(axis=1)) / signal if signal > 0 else 0.0


def _paired(rows: np.ndarray, matrix: np.ndarray, single: np.ndarray, wanted: int, linear: bool) -> _Merger:
    """The ``wanted`` pairs of least change among the ``single`` channels. Raises Refused where there are too few pairs.

    ``rows`` (n, channels) are multiplied by the square roots of their weights.
    """
    even, odd = (np.flatnonzero(single & (np.arange(len(single)) % 2 == side)) for side in (0, 1))
    if min(len(even), len(odd)) < wanted:
        raise Refused(f"{wanted} pairs are to be merged, but only {min(len(even), len(odd))} can be")
    x, w = ((rows**2).sum(axis=0), (matrix**2).sum(axis=0))
    cross = rows[:, even].T @ rows[:, odd]
    if linear:
        distance = x[even, None] + x[odd] - 2 * cross
        cost = distance * (w[even, None] + w[odd] - 2 * matrix[:, even].T @ matrix[:, odd]) / 4
        keeps_even = np.ones(cost.shape, bool)
    else:
        lost_odd = (x[odd] - cross**2 / np.maximum(x[even, None], 1e-30)) * w[odd]
        lost_even = (x[even, None] - cross**2 / np.maximum(x[odd], 1e-30)) * w[even, None]
        cost, keeps_even = np.minimum(lost_odd, lost_even), lost_odd <= lost_even
    pairs, used = [], (np.zeros(len(even), bool), np.zeros(len(odd), bool))
    for place in np.argsort(cost, axis=None, kind="stable"):
        i, j = divmod(int(place), len(odd))
        if len(pairs) == wanted:
            break
        if not used[0][i] and not used[1][j]:
            used[0][i] = used[1][j] = True
            pairs.append((i, j))
    i, j = np.array(pairs).T
    first, second = even[i], odd[j]
    kept, gone = np.where(keeps_even[i, j], (first, second), (second, first))
    return _Merger(kept, gone, None if linear else cross[i, j] / np.maximum(x[kept], 1e-30))


def _copies(width: Width) -> np.ndarray:
    """The number of channels that equal each channel, itself included, (channels,); 1 for an unread channel."""
    columns = width.columns().T
    channels = [hashlib.blake2b() for _ in range(width.channels)]
    for labels, values in (*width.rows(), (np.arange(width.channels) + 1, columns)):
        for label, row in zip(labels, values, strict=True):
            channels[label - 1].update(row.tobytes())
    digests = [channel.digest() for channel in channels]
    counts = Counter(digests)
    return np.where(columns.any(axis=1), [counts[digest] for digest in digests], 1)
