"""Samples that statistics have not seen: which ones, and that nothing of the data is lost by it."""

from __future__ import annotations

import numpy as np
import pytest

from channelfold.passes.base import Context
from channelfold.passes.layers.output_error import SAMPLES, held_out
from channelfold.passes.prune.reconstruct import ReadStatistics
from channelfold.tests.graphs import data_from
from channelfold.tests.pruning import data_of, groups_of, mlp


def numbered(count: int):
    return data_from(*({"x": np.full((1, 8), i, np.float32)} for i in range(count)))


def numbers(data) -> list[int]:
    found = [int(feed["x"][0, 0]) for feed in data]
    assert len(found) == len(data)
    return found


@pytest.mark.parametrize("count", [5, 9, 10, 79, 80, 104, 1000])
def test_every_sample_is_on_one_side(count):
    seen, unseen = map(numbers, held_out(numbered(count)))
    assert sorted([*seen, *unseen]) == list(range(count))
    assert len(unseen) == min(SAMPLES, count // 5)
    assert seen == sorted(seen)


def test_the_unseen_are_spread_evenly():
    assert numbers(held_out(numbered(20))[1]) == [2, 7, 12, 17]
    assert set(np.diff(numbers(held_out(numbered(104))[1]))) == {6, 7}


def test_of_few_samples_none_is_held_out():
    data = numbered(4)
    assert held_out(data) == (data, data)


@pytest.mark.parametrize("limit", [None, 0], ids=["held", "collected again"])
def test_data_added_later_count_like_data_given_at_once(limit, monkeypatch):
    if limit is not None:
        monkeypatch.setattr("channelfold.passes.prune.reconstruct.LIMIT", limit)
    graph = mlp()
    data, regions = data_of(graph), [group.region for group in groups_of(graph)]
    seen, unseen = held_out(data)
    assert seen is not unseen
    statistics = ReadStatistics(graph, regions, Context(calibration=seen))
    list(statistics.each())
    statistics.add(unseen)
    whole = ReadStatistics(graph, regions, Context(calibration=data))
    for (read, found), (_, expected) in zip(statistics.each(), whole.each(), strict=True):
        np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-9, atol=1e-12, err_msg=read.tensor.name)
        np.testing.assert_allclose(found.covariance, expected.covariance, rtol=1e-9, atol=1e-9)
