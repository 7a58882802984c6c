"""What a loss in one channel group does to the outputs of the model, measured.

    v_g(k) = s_g l_g(k),      s_g = E || y - y_g ||^2 / (E || y - E[y] ||^2 l_g(n_g / 2))

l_g(k) is what a ranking says that keeping k of n_g units loses, on its own scale: the error of the next layer, or a
magnitude. y_g are the outputs on calibration samples with half of the units of g gone, all other groups whole. So the
losses of all groups come in one currency, and a budget can be shared out among them: an error that the rest of the
network takes out of the signal again is cheap, one at the root of everything dear.

Those samples should be none that the rankings and the refitted weights come from (``held_out``). Late layers see few
positions: half of 1280 pooled features are made from the others without any error, on 100 images, and on no other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context
from channelfold.passes.channel_groups import Group
from channelfold.passes.importance import Ranking
from channelfold.passes.linear import Linear, view
from channelfold.passes.refit import Fit, ReadStatistics, matters
from channelfold.runtime.calibration import Data
from channelfold.runtime.graph_io import infer_shapes
from channelfold.runtime.ort import Feed
from channelfold.runtime.snapshot import Snapshot

SAMPLES = 16  # of the calibration data that the outputs are compared on
_SHARE = 5  # a sample in so many at most is held out for that


def held_out(data: Data) -> tuple[Data, Data]:
    """(seen, unseen): of ``data``, up to ``SAMPLES`` spread evenly over it are unseen, and all others seen.

    Where there are too few to do without any, both are all of the data.
    """
    number = min(SAMPLES, len(data) // _SHARE)
    places = frozenset((2 * i + 1) * len(data) // (2 * number) for i in range(number))
    return (_part(data, places, False), _part(data, places, True)) if places else (data, data)


def _part(data: Data, places: frozenset[int], inside: bool) -> Data:
    return Data(
        data.inputs,
        len(places) if inside else len(data) - len(places),
        lambda: (feed for place, feed in enumerate(data) if (place in places) is inside),
        data.description,
        notes=data.notes,
        synthetic=data.synthetic,
    )


def scaled(
    graph: gs.Graph,
    groups: Sequence[Group],
    rankings: Sequence[Ranking],
    statistics: ReadStatistics,
    fit: Callable[..., Fit],
    ctx: Context,
) -> list[Ranking]:
    """The rankings with values in units of the model's outputs, on the first ``SAMPLES`` of the data in ``ctx``.

    ``fit``: ``Fit.of`` with the settings of the pass.
    A group that no linear reads keeps its values, scaled as the others are in the middle.
    """
    assert ctx.calibration is not None
    before = Snapshot.of(graph)
    twin = gs.Graph()
    before.restore(twin)
    infer_shapes(twin)
    nodes = dict(zip(map(id, graph.nodes), twin.nodes, strict=True))
    feeds = list(islice(ctx.calibration, SAMPLES))
    expected = _outputs(before, feeds)
    halves = [group.labels[r.order[: group.units // 2]] for group, r in zip(groups, rankings, strict=True)]
    fits: list[list[tuple[Linear, np.ndarray, Fit]]] = [[] for _ in groups]
    for read, spread in statistics.each():
        for number, (group, gone) in enumerate(zip(groups, halves, strict=True)):
            if matters(read, group):
                stays = ~np.isin(read.labels, gone)
                fits[number] += [(linear, stays, fit(linear, stays, None, spread)) for linear in read.linears]
    factors = np.full(len(groups), np.nan)
    for number, (group, ranking) in enumerate(zip(groups, rankings, strict=True)):
        ctx.progress("Measuring sensitivities", number, len(groups))
        lost = float(ranking.values[-1] - ranking.values[group.units - group.units // 2])
        undo = []
        try:
            for linear, stays, found in fits[number]:
                other = view(twin, nodes[id(linear.node)])
                undo.append((other, other.weight(), other.bias()))
                found.silence(other, stays)
            if undo and lost > 0:
                factors[number] = _error(expected, _outputs(Snapshot.of(twin), feeds)) / lost
        except OverflowError:  # a layer that float16 cannot refit; the group counts like the others
            pass
        for other, weight, bias in undo:
            _restore(other, weight, bias)
    typical = float(np.nanmedian(factors)) if np.isfinite(factors).any() else 1.0
    factors = np.where(np.isfinite(factors), factors, typical)
    return [Ranking(r.order, r.values * factor) for r, factor in zip(rankings, factors, strict=True)]


def _restore(linear: Linear, weight: np.ndarray, bias: np.ndarray | None) -> None:
    linear = view(linear.graph, linear.node)
    linear.set_weight(weight)
    if linear.bias() is not None:
        linear.set_bias(np.zeros(linear.channels[0]) if bias is None else bias)


def _outputs(snapshot: Snapshot, feeds: Sequence[Feed]) -> list[dict[str, np.ndarray]]:
    session = snapshot.session()
    return [session.run(feed) for feed in feeds]


def _error(expected: list[dict[str, np.ndarray]], found: list[dict[str, np.ndarray]]) -> float:
    """The mean over the float outputs of the squared error, relative to their variance."""
    errors = []
    for name, first in expected[0].items():
        if first.dtype.kind != "f":
            continue
        error = sum(
            float(np.square(e[name] - f[name], dtype=np.float64).sum()) for e, f in zip(expected, found, strict=True)
        )
        mean = sum(float(e[name].sum(dtype=np.float64)) for e in expected) / sum(e[name].size for e in expected)
        whole = sum(float(np.square(e[name] - mean, dtype=np.float64).sum()) for e in expected)
        if whole > 0 and np.isfinite(error):
            errors.append(error / whole)
    return float(np.mean(errors)) if errors else float("nan")
