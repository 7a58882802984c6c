"""Losses of groups in units of the outputs: what the rest of a network takes out of the signal is cheap."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from channelfold.passes.base import Context
from channelfold.passes.prune.importance import RankedGroups, magnitudes, ranked
from channelfold.passes.prune.reconstruct import ReadStatistics, Reconstruction
from channelfold.passes.prune.sensitivity import scaled
from channelfold.runtime.io.snapshot import Snapshot
from channelfold.tests.graphs import build
from channelfold.tests.pruning import data_of, groups_of, kept, prune, spread

TWINS = """
    a = Gemm<transB=1>(x, A, a0) r = Relu(a) p = Gemm<transB=1>(r, C)
    b = Gemm<transB=1>(x, B, a0) s = Relu(b) q = Gemm<transB=1>(s, D)
    y = Add(p, q)
"""


def twins(weak: float):
    """Two branches that are the same but for what the second counts in the sum."""
    a, c = spread((16, 8), "A"), spread((4, 16), "C")
    order = np.arange(16)[::-1]  # so that the weights are not the same constants
    return build(
        "(float[N,8] x) => (float[] y)", TWINS, kind="float", A=a, a0=np.zeros(16), B=a[order], C=c,
        D=weak * c[:, order],
    )  # fmt: skip


@pytest.mark.parametrize("weak", [0.5, 0.1])
def test_losses_are_in_proportion_to_what_reaches_the_output(weak):
    graph = twins(weak)
    before = Snapshot.of(graph)
    groups = [group for group in groups_of(graph) if group.free.any()]
    context = Context(calibration=data_of(graph, size=50))
    rankings = [ranked(group, magnitudes(group, 1)) for group in groups]
    statistics = ReadStatistics(graph, [g.region for g in groups], context)
    reconstruct = partial(Reconstruction.of, mode="none", ridge=1e-3)
    found = scaled(graph, RankedGroups(groups, rankings), statistics, reconstruct, context).rankings
    assert before.same(Snapshot.of(graph))
    assert [f.order.tolist() for f in found] == [r.order.tolist() for r in rankings]
    # of the same half of the channels, by their magnitude, which the weak reader changes
    lost = [f.values[-1] - f.values[8] for f in found]
    assert lost[1] < 2 * weak**2 * lost[0]
    assert all(np.diff(f.values).min() >= 0 for f in found)


def test_a_budget_is_taken_from_where_it_hurts_least():
    graph = twins(0.05)
    counts = kept(prune(graph, data_of(graph, size=50), keep_params=0.6, align=1, importance="reconstruction"))
    assert counts["Gemm_0"] > 2 * counts["Gemm_3"]
