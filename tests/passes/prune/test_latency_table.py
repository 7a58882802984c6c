from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from channelfold.passes.prune.allocation import Group
from channelfold.passes.prune.latency import fitting, looked_up, time_share
from channelfold.runtime.errors import ModelError, UsageError
from channelfold.runtime.io.files import save
from channelfold.tests.graphs import build


def model(folder, size: int) -> Path:
    graph = build("(float[N,256] x) => (float[N,M] y)", "y = MatMul(x, W)", kind="float", W=(256, size))
    save(graph, folder / f"{size}.onnx")
    return folder / f"{size}.onnx"


def test_a_smaller_model_takes_a_share_of_the_time_of_a_larger_one(tmp_path):
    feed = {"x": np.zeros((64, 256), np.float32)}
    assert 0 < time_share(model(tmp_path, 4096), model(tmp_path, 8), feed, rounds=5, seconds=5) < 0.5


def test_models_run_on_the_feed_that_is_given(tmp_path):
    with pytest.raises(ModelError, match="Got invalid dimensions"):
        time_share(model(tmp_path, 16), model(tmp_path, 8), {"x": np.zeros((1, 7), np.float32)}, 1, 1)


def test_a_size_between_costs_what_the_next_measured_multiple_of_eight_costs():
    table = {8: 1.0, 12: 1.2, 16: 1.5, 30: 2.0, 32: 2.5}
    assert looked_up(table, 12) == 1.2
    assert looked_up(table, 13) == 1.5
    assert looked_up(table, 17) == 2.5
    assert looked_up(table, 5) == 1.0


GROUPS = [Group("a", 64), Group("b", 32)]
VALUES = [np.sqrt(np.arange(65)), 2 * np.sqrt(np.arange(33))]


def takes(kept):
    """Milliseconds of a model with a layer into a, one between a and b, one from b on."""
    a, b = kept[0] / 64, kept[1] / 32
    return 1 + 4 * a + 8 * a * b + 2 * b


TABLES = [{k: takes([k, 32]) for k in range(8, 65, 8)}, {k: takes([64, k]) for k in range(8, 33, 8)}]


@pytest.mark.parametrize("budget", [4.0, 7.5, 10.0, 14.0, 15.0])
def test_the_allocation_fits_by_measure_where_the_tables_alone_would_promise_too_much(budget):
    asked = []

    def measure(kept):
        asked.append(kept)
        return takes(kept)

    kept = fitting(GROUPS, VALUES, TABLES, budget, measure, align=8)
    fast = [tried for tried in asked if takes(tried) <= budget]
    assert takes(kept) <= budget
    assert kept == max(fast, key=lambda tried: VALUES[0][tried[0]] + VALUES[1][tried[1]])
    assert len(asked) <= 6
    every = itertools.product(range(8, 65, 8), range(8, 33, 8))
    best = max(VALUES[0][a] + VALUES[1][b] for a, b in every if takes([a, b]) <= budget)
    assert VALUES[0][kept[0]] + VALUES[1][kept[1]] >= 0.9 * best


def test_a_latency_that_cannot_be_reached_is_refused_with_the_least_that_was_measured():
    with pytest.raises(UsageError, match=r"A budget of 2 cannot be reached: the least possible is 2\.25"):
        fitting(GROUPS, VALUES, TABLES, 2.0, takes, align=8)
