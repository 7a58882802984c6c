"""The front is that of trying everything, and no budget is exceeded."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from channelfold.passes.layers.sensitivity import Site
from channelfold.passes.search.front import Point, cheapest, front, most_accurate, point, uniform
from channelfold.passes.search.proof import Figures, Limits, interval, ranked, refined, undominated

numbers = st.floats(0.01, 100, allow_nan=False).map(lambda x: round(x, 2))


@st.composite
def sites(draw) -> list[Site]:
    found = []
    for index in range(draw(st.integers(1, 4))):
        names = draw(st.lists(st.sampled_from(["int8", "w8", "w4"]), unique=True, min_size=1))
        errors = {name: draw(numbers) for name in names}
        sizes = {name: draw(st.integers(1, 50)) for name in ["float", *names]}
        found.append(Site((f"n{index}",), errors, sizes, {}, {name: draw(numbers) for name in sizes}))
    return found


def every(found: list[Site]) -> list[Point]:
    return [point(found, options) for options in itertools.product(*(site.options() for site in found))]


@given(sites(), st.floats(0, 1))
def test_the_cheapest_point_of_an_error_is_that_of_trying_all(found, share):
    points = every(found)
    limit = share * max(p.predicted for p in points)
    best = min(p.cost for p in points if p.predicted <= limit)
    chosen = cheapest(found, limit)
    assert chosen.predicted <= limit
    assert chosen.cost == pytest.approx(best)


@given(sites(), st.floats(0, 1))
def test_the_most_accurate_point_within_bytes_is_that_of_trying_all(found, share):
    points = every(found)
    sizes = [p.size for p in points]
    limit = min(sizes) + share * (max(sizes) - min(sizes))
    best = min(p.predicted for p in points if p.size <= limit)
    chosen = most_accurate(found, limit)
    assert chosen.size <= limit
    assert chosen.predicted == pytest.approx(best)


@given(sites())
def test_fewer_bytes_than_there_can_be_give_the_fewest(found):
    assert most_accurate(found, 0).size == min(p.size for p in every(found))


@given(sites(), st.integers(2, 8))
def test_no_point_of_the_front_is_dominated(found, count):
    points = front(found, count)
    assert 1 <= len(points) <= count
    for chosen, other in itertools.product(points, every(found)):
        assert not (other.cost < chosen.cost - 1e-9 and other.predicted < chosen.predicted - 1e-9)


def test_uniform_points_are_those_of_recipes():
    costs = {"float": 1.0, "int8": 0.0, "w8": 0.0}
    first = Site(("a",), {"int8": 1.0, "w8": 0.5}, {"float": 4, "int8": 1, "w8": 1}, {}, costs)
    found = [first, Site(("b",), {"w8": 0.1}, {"float": 8, "w8": 2}, {}, costs)]
    assert [(p.options, p.size) for p in uniform(found)] == [
        (("float", "float"), 12), (("int8", "float"), 9), (("w8", "w8"), 3)
    ]  # fmt: skip


def figures(cost: float, error: float, loss: float = 0.0) -> Figures:
    return Figures(
        Point((str(cost),), int(cost), cost, error), error, -10 * np.log10(error), 1 - loss, loss, loss, loss
    )


def test_points_that_others_beat_are_left_out():
    found = [figures(1, 0.9), figures(2, 0.95), figures(3, 0.1), figures(3, 0.2), figures(4, 0.05)]
    assert [f.point.cost for f in undominated(found)] == [4, 3, 1]


def test_a_cost_of_one_percent_is_paid_for_a_smaller_error():
    found = [figures(*pair) for pair in ((0.5, 0.001), (0.2741, 0.002), (0.273, 0.05), (0.2735, 0.01), (0.28, 0.0015))]
    assert [f.point.cost for f in ranked(found)] == [0.2741, 0.2735, 0.273, 0.28, 0.5]


def test_bisection_finds_the_cheapest_point_that_keeps_a_limit():
    def at(error: float) -> Point:
        return Point((f"{error:.6f}",), 0, 1 / error, error)

    def measured(p: Point) -> Figures:
        return Figures(p, p.predicted, 0.0, 1.0, p.predicted, 0, 0)

    found = refined([measured(at(1e-4)), measured(at(1.0))], Limits(max_loss=0.03), at, measured, 8)
    kept = [f for f in found if f.loss <= 0.03]
    assert max(f.loss for f in kept) > 0.025
    assert len(found) <= 10


def test_an_interval_narrows_with_the_samples():
    mean, low, high = interval(np.array([0.0, 1.0] * 200))
    assert (mean, round(high - low, 2)) == (0.5, 0.1)
    assert interval(np.zeros(300)) == (0.0, 0.0, 0.01)
    assert interval(np.zeros(2), 1.0) == (0.0, 0.0, 1.0)
