from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from channelfold.passes.numeric.knapsack import knapsack
from channelfold.runtime.errors import UsageError

# Whole numbers, so that every sum is exact and "equal to brute force" means equal.
OPTION = st.tuples(st.integers(-20, 60), st.integers(0, 40))
INSTANCE = st.lists(st.lists(OPTION, min_size=1, max_size=5), min_size=1, max_size=4)


def totals(options, chosen):
    values, costs = zip(*(group[i] for group, i in zip(options, chosen, strict=True)), strict=True)
    return sum(values), sum(costs)


def brute_force(options, budget):
    """The greatest value within the budget; None when nothing fits."""
    every = (totals(options, chosen) for chosen in itertools.product(*map(range, map(len, options))))
    return max((value for value, cost in every if cost <= budget), default=None)


@settings(max_examples=400)
@given(INSTANCE, st.integers(-5, 160))
def test_equals_brute_force(options, budget):
    best = brute_force(options, budget)
    if best is None:
        least = sum(min(cost for _, cost in group) for group in options)
        with pytest.raises(UsageError, match=f"A budget of {budget} cannot be reached: the least possible is {least}"):
            knapsack(options, budget)
        return
    value, cost = totals(options, knapsack(options, budget))
    assert value == best
    assert cost <= budget


@settings(max_examples=100)
@given(INSTANCE, st.integers(0, 160), st.integers(0, 40))
def test_a_larger_budget_never_gives_less(options, budget, more):
    if brute_force(options, budget) is not None:
        smaller, larger = (totals(options, knapsack(options, b))[0] for b in (budget, budget + more))
        assert larger >= smaller


@settings(max_examples=100)
@given(INSTANCE, st.integers(0, 160), st.integers(1, 8))
def test_with_few_levels_it_fits_the_budget_and_loses_no_more_than_it_says(options, budget, levels):
    if brute_force(options, budget) is None:
        return
    value, cost = totals(options, knapsack(options, budget, levels))
    assert cost <= budget
    room = budget - sum(min(cost for _, cost in group) for group in options)
    bound = brute_force(options, budget - len(options) * room / levels)
    assert bound is None or value >= bound


def test_the_cheapest_of_equally_valuable_options_and_the_better_of_equally_cheap_ones():
    assert knapsack([[(5, 3), (5, 2), (4, 2)]], 10) == [1]


def test_what_only_fits_together_is_found_where_the_best_value_per_cost_would_miss_it():
    # 6 / 4 is the best bargain, but 5 + 5 for 3 + 3 is worth more than 6 + 0
    assert knapsack([[(0, 0), (6, 4)], [(0, 0), (5, 3)], [(0, 0), (5, 3)]], 6) == [0, 1, 1]


def test_no_groups_fit_any_budget_that_is_not_negative():
    assert knapsack([], 0) == []


def test_a_network_with_fifty_wide_groups_is_solved_to_a_thousandth_of_the_bound():
    rng = np.random.default_rng(0)
    options = []
    for _ in range(50):
        importances = np.sort(rng.gamma(0.5, size=256))[::-1]
        options.append(list(zip(np.cumsum(importances), np.arange(1, 257) * rng.uniform(1, 9), strict=True)))
    budget = 0.5 * sum(group[-1][1] for group in options)
    value, cost = totals(options, knapsack(options, budget))
    # The best at any price per cost bounds the optimum from above.
    bound = min(p * budget + sum(max(v - p * c for v, c in g) for g in options) for p in np.linspace(0.02, 0.2, 60))
    assert cost <= budget
    assert 0.999 * bound <= value <= bound
