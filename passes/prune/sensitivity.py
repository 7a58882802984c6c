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

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context
from channelfold.passes.channels.groups import Group, regions_of
from channelfold.passes.prune.importance import Ranking
from channelfold.passes.prune.refit import Fit, ReadStatistics
from channelfold.passes.prune.trial import Trial
from channelfold.runtime.data.sources import Data

SAMPLES = 16  # at most, of the calibration data, are held out
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
    """The rankings with values in units of the model's outputs, on samples of the data in ``ctx``.

    ``fit``: ``Fit.of`` with the settings of the pass. A group of which nothing can be measured is scaled as the others
    are in the middle.
    """
    assert ctx.calibration is not None
    regions = regions_of(groups)
    trial = Trial(graph, regions, statistics, fit, ctx.calibration)
    factors = np.full(len(groups), np.nan)
    for number, (group, ranking) in enumerate(zip(groups, rankings, strict=True)):
        ctx.progress("Measuring sensitivities", number, len(groups))
        half = group.units // 2
        lost = float(ranking.values[-1] - ranking.values[group.units - half])
        keeps = {id(region): (region, np.ones(region.size, bool)) for region in regions}
        keeps[id(group.region)][1][group.labels[ranking.order[:half]] - 1] = False
        errors = list(trial.errors(keeps).values()) if lost > 0 else []
        if errors:
            factors[number] = np.mean(errors) / lost
    known = factors[np.isfinite(factors)]
    factors = np.where(np.isfinite(factors), factors, np.median(known) if known.size else 1.0)
    return [Ranking(r.order, r.values * factor) for r, factor in zip(rankings, factors, strict=True)]
