from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from channelfold.passes.prune.allocation import Costs, Group, Term, at_share, ranked, under_budget, uniform
from channelfold.runtime.errors import UsageError

ALLOCATIONS = [
    lambda groups, values, costs, budget, align=1: uniform(groups, costs, budget, align),
    ranked,
    under_budget,
]
every_allocation = pytest.mark.parametrize("allocate", ALLOCATIONS, ids=["uniform", "ranked", "under_budget"])


@st.composite
def networks(draw):
    """Groups, values and costs of a random network: whole amounts and shares of 2 or 4 units, so sums are exact."""
    groups = [Group(f"g{i}", draw(st.sampled_from([2, 4]))) for i in range(draw(st.integers(1, 4)))]
    number = st.integers(0, len(groups) - 1)
    terms = draw(st.lists(st.builds(Term, st.integers(1, 50), st.lists(number, max_size=2).map(tuple)), min_size=1))
    steps = [draw(st.lists(st.integers(0, 30), min_size=g.units, max_size=g.units)) for g in groups]
    return groups, [np.concatenate([[0], np.cumsum(s)]) for s in steps], Costs(groups, terms)


def value(values, kept):
    return sum(float(curve[k]) for curve, k in zip(values, kept, strict=True))


def every_count(groups, align=1):
    return list(itertools.product(*(group.counts(align).tolist() for group in groups)))


def test_the_counts_of_a_group_are_aligned_channels_and_all_units():
    assert Group("conv", 40).counts(16).tolist() == [16, 32, 40]
    assert Group("conv", 40, least=17).counts(16).tolist() == [32, 40]
    assert Group("heads", 6, channels=64).counts(32).tolist() == [1, 2, 3, 4, 5, 6]
    assert Group("pairs", 12, channels=4).counts(16).tolist() == [4, 8, 12]
    assert Group("small", 10).counts(16).tolist() == [10]


def test_costs_multiply_over_the_axes_of_a_weight():
    costs = Costs([Group("a", 4), Group("b", 2)], [Term(12, (0,)), Term(8, (0, 1)), Term(6, (1,)), Term(1)])
    assert costs([4, 2]) == 12 + 8 + 6 + 1
    assert costs([2, 2]) == 6 + 4 + 6 + 1
    assert costs([2, 1]) == 6 + 2 + 3 + 1


def test_a_group_on_both_axes_counts_twice():
    costs = Costs([Group("width", 4)], [Term(16, (0, 0))])
    assert [costs([k]) for k in (4, 3, 2, 1)] == [16, 9, 4, 1]


@settings(max_examples=100)
@given(networks())
def test_costs_along_one_group_are_the_costs(network):
    groups, _, costs = network
    for kept in every_count(groups)[::5]:
        for g, group in enumerate(groups):
            counts = group.counts()
            expected = [costs([*kept[:g], k, *kept[g + 1 :]]) for k in counts]
            assert costs.along(g, counts, kept).tolist() == pytest.approx(expected, rel=1e-12)


def test_a_share_gives_the_nearest_allowed_count_and_the_larger_of_two():
    groups = [Group("a", 64), Group("b", 48), Group("c", 10)]
    assert at_share(groups, 0.5) == [32, 24, 5]
    assert at_share(groups, 0.5, align=16) == [32, 32, 10]  # 24 of 48 is as near to 16 as to 32
    assert at_share(groups, 1.0, align=16) == [64, 48, 10]
    assert at_share(groups, 0.0, align=16) == [16, 16, 10]


def test_uniform_keeps_the_same_share_everywhere():
    groups = [Group("a", 100), Group("b", 200)]
    costs = Costs(groups, [Term(1.0, (0, 1))])
    assert uniform(groups, costs, 0.25) == [50, 100]


def test_ranked_keeps_the_most_important_units_wherever_they_are():
    groups = [Group("a", 4), Group("b", 4)]
    values = [np.array([0, 9, 17, 18, 18.5]), np.array([0, 3, 5, 6.5, 7])]  # steps 9 8 1 .5 and 3 2 1.5 .5
    costs = Costs(groups, [Term(4, (0,)), Term(4, (1,))])
    assert ranked(groups, values, costs, 4) == [2, 2]
    assert ranked(groups, values, costs, 5) == [2, 3]


def test_ranked_takes_equal_units_in_equal_shares():
    groups = [Group("a", 10), Group("b", 20)]
    values = [np.arange(11.0), np.arange(21.0)]
    assert ranked(groups, values, Costs(groups, [Term(1, (0,)), Term(1, (1,))]), 1.0) == [5, 10]


def test_ranked_is_not_misled_by_a_curve_that_rises_late():
    groups = [Group("late", 2), Group("even", 2)]
    values = [np.array([0, 0, 10.0]), np.array([0, 4, 8.0])]  # both units of "late" are worth 5 each
    assert ranked(groups, values, Costs(groups, [Term(2, (0,)), Term(2, (1,))]), 3) == [2, 1]


def test_under_budget_spends_on_what_is_worth_it():
    groups = [Group("cheap", 8), Group("dear", 8)]
    values = [np.arange(9.0), np.arange(9.0)]
    assert under_budget(groups, values, Costs(groups, [Term(8, (0,)), Term(80, (1,))]), 48) == [8, 4]


@every_allocation
def test_a_budget_that_cannot_be_reached_names_the_least_cost(allocate):
    groups = [Group("a", 64), Group("b", 32, least=8)]
    values = [np.arange(65.0), np.arange(33.0)]
    costs = Costs(groups, [Term(1_000_000, (0, 1)), Term(64_000, (0,))])
    assert costs(allocate(groups, values, costs, 141_000, 16)) <= 141_000
    message = r"A budget of 140,999 cannot be reached: the least possible is 141,000\. Raise it, lower the alignment"
    with pytest.raises(UsageError, match=message):
        allocate(groups, values, costs, 140_999, 16)


@every_allocation
@settings(max_examples=150)
@given(networks(), st.floats(0, 1))
def test_the_budget_is_never_exceeded(allocate, network, share):
    groups, values, costs = network
    budget = share * costs([g.units for g in groups])
    fitting = [kept for kept in every_count(groups) if costs(kept) <= budget]
    if not fitting:
        with pytest.raises(UsageError, match="the least possible"):
            allocate(groups, values, costs, budget)
        return
    kept = allocate(groups, values, costs, budget)
    assert tuple(kept) in fitting


@pytest.mark.parametrize("allocate", ALLOCATIONS[:2], ids=["uniform", "ranked"])
@settings(max_examples=100)
@given(networks(), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_budget_keeps_at_least_as_much_of_every_group(allocate, network, one, other):
    groups, values, costs = network
    budgets = sorted(share * costs([g.units for g in groups]) for share in (one, other))
    if costs([1] * len(groups)) <= budgets[0]:
        smaller, larger = (allocate(groups, values, costs, budget) for budget in budgets)
        assert all(a <= b for a, b in zip(smaller, larger, strict=True))


@settings(max_examples=300)
@given(networks(), st.floats(0, 1))
def test_under_budget_is_worth_at_least_the_others_and_nearly_the_best(network, share):
    groups, values, costs = network
    budget = share * costs([g.units for g in groups])
    if costs([1] * len(groups)) > budget:
        return
    found = value(values, under_budget(groups, values, costs, budget))
    assert found >= value(values, uniform(groups, costs, budget))
    assert found >= value(values, ranked(groups, values, costs, budget))
    best = max(value(values, kept) for kept in every_count(groups) if costs(kept) <= budget)
    assert found >= 0.8 * best
