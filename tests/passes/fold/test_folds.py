"""All exact folds, one after another, on random graphs and on a real one."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings

from channelfold.passes.fold import (
    FoldAffine,
    FoldConstants,
    FoldPad,
    FoldShapes,
    MergeEqual,
    MergeMoves,
    RemoveIdentities,
)
from channelfold.tests.graphs import fold
from channelfold.tests.strategies import graphs

FOLDS = (
    *(FoldConstants(), FoldShapes(), RemoveIdentities(), FoldAffine(), FoldPad(), RemoveIdentities(), FoldAffine()),
    *(MergeMoves(), MergeEqual()),
)


# 1e-9 of the largest output: what a dozen float64 steps in an ill order may add up to. A wrong fold is off by far more.
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(graphs())
def test_random_graphs_keep_their_outputs(graph):
    for step in FOLDS:
        fold(step, graph, rtol=1e-9)
