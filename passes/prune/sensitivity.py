"""The effect of a loss in one channel group on the outputs of the model, measured.

    v_g(k) = s_g l_g(k),      s_g = E_g / l_g(n_g / 2)

l_g(k) is the loss of a ranking when k of n_g units are kept, in the unit of the ranking: the error of the next layer,
or a magnitude. E_g is the error of the outputs (``output_error``) on calibration samples when half of the units of g
are gone and all other groups are whole. The products s_g l_g have one unit for all groups, so that a budget can be
shared out among the groups: an error that the rest of the network removes again is cheap, an error at the root of
everything is dear.

These samples should not be samples that the rankings and the reconstructions come from (``output_error.held_out``).
Late layers see few positions: on 100 images half of 1280 pooled features are reconstructed from the others without any
error, and on no other images.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context
from channelfold.passes.prune.importance import RankedGroups, Ranking
from channelfold.passes.prune.reconstruct import ReadStatistics, Reconstruct
from channelfold.passes.prune.trial import Trial


def scaled(
    graph: gs.Graph, ranked: RankedGroups, statistics: ReadStatistics, reconstruct: Reconstruct, ctx: Context
) -> RankedGroups:
    """The rankings with values in the unit of the model's outputs, measured on the data in ``ctx``.

    A group without a measurable loss gets the median of the other factors.
    """
    assert ctx.calibration is not None
    trial = Trial(graph, ranked, statistics, reconstruct, ctx.calibration)
    whole = [group.units for group in ranked.groups]
    factors = np.full(len(whole), np.nan)
    for number, values in enumerate(ranked.values):
        ctx.progress("Measuring sensitivities", number, len(whole))
        kept = whole[number] - whole[number] // 2
        lost = float(values[-1] - values[kept])
        counts = [*whole[:number], kept, *whole[number + 1 :]]
        if lost > 0 and trial.outputs.names:
            factors[number] = trial.errors(ranked.keeps(counts)).by_sample().mean() / lost
    known = factors[np.isfinite(factors)]
    factors = np.where(np.isfinite(factors), factors, np.median(known) if known.size else 1.0)
    rankings = [Ranking(r.order, r.values * factor) for r, factor in zip(ranked.rankings, factors, strict=True)]
    return RankedGroups(ranked.groups, rankings)
