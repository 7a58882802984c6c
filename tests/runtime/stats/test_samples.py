"""The spread of the ratios of samples, and the worst of them."""

from __future__ import annotations

import numpy as np
import pytest

from channelfold.runtime.stats.samples import Worst, spread

INF = float("inf")


def test_every_finite_ratio_is_in_one_step():
    ratios = np.random.default_rng(0).normal(40, 12, 500).tolist() + [INF, INF, -INF]
    found = spread(ratios)
    assert found
    assert (sum(found["counts"]), found["quartiles"][0], found["quartiles"][-1]) == (500, -INF, INF)
    assert len(found["counts"]) <= 21
    edges = found["low"] + found["step"] * np.arange(len(found["counts"]) + 1)
    assert found["counts"] == np.histogram(ratios[:500], edges)[0].tolist()
    assert found["quartiles"][2] == pytest.approx(np.median(ratios), abs=0.5)


def test_the_ends_of_a_spread():
    assert spread([30.0]) is None
    assert spread([30.0, 30.0]) == {"quartiles": [30.0] * 5, "low": 30, "step": 1, "counts": [2]}
    assert spread([INF, INF]) == {"quartiles": [INF] * 5, "low": 0, "step": 1, "counts": []}


def test_the_worst_samples_come_first():
    worst = Worst()
    for sample, ratio in enumerate([30.0, INF, 20.0, 25.0, 50.0, 40.0, 45.0, 10.0, -INF]):
        worst.add(sample, "y", ratio, {"x": np.zeros((1, 1, 8, 8), np.float32)})
    assert [(one["sample"], one["snr"]) for one in worst.found] == [
        (8, -INF), (7, 10.0), (2, 20.0), (3, 25.0), (0, 30.0), (5, 40.0),
    ]  # fmt: skip
    assert all(one["picture"] for one in worst.found)
