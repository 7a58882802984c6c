from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from channelfold.passes.prune.allocation import Costs, Group, Term
from channelfold.passes.prune.tolerance import cut_within_tolerance, tolerances
from channelfold.runtime.errors import UsageError


@given(st.floats(0.001, 0.5), st.floats(1.6, 20), st.integers(2, 200))
def test_the_tolerances_multiply_to_theta_and_form_a_geometric_series(r0, theta, layers):
    found = tolerances(theta, r0, layers)
    assert np.prod(1 + found) == pytest.approx(theta, rel=1e-9)  # the solution is one float wide, 200 factors round
    assert found[0] == r0
    ratio = found[1] / found[0]
    np.testing.assert_allclose(found, r0 * ratio ** np.arange(layers), rtol=1e-9)


def test_two_layers_by_hand():
    assert tolerances(1.1 * 1.2, 0.1, 2).tolist() == pytest.approx([0.1, 0.2], rel=1e-12)


def test_one_layer_may_lose_all_of_it():
    assert tolerances(6, 0.06, 1).tolist() == [5]


@pytest.mark.parametrize(("theta", "r0"), [(1.05, 0.06), (6, 0), (6, -1)])
def test_a_first_tolerance_beyond_the_whole_is_refused(theta, r0):
    with pytest.raises(UsageError, match="does not fit a loss that may grow"):
        tolerances(theta, r0, 5)


GROUPS = [Group("cheap", 100), Group("dear", 100), Group("middle", 100)]
COSTS = Costs(GROUPS, [Term(1, (0,)), Term(100, (1,)), Term(10, (2,))])


def losses(*slopes: tuple[float, float, float]):
    """A loss per row: 1 and the cut share of every group times a slope."""

    def loss(kept):
        loss.calls.append(list(kept))
        cut = 1 - np.array(kept) / 100
        return {f"task{i}": 1 + float(cut @ row) for i, row in enumerate(np.array(slopes))}

    loss.calls = []
    return loss


def test_every_group_is_cut_as_deep_as_its_tolerance_allows_in_order_of_what_it_saves():
    theta, r0 = 1.1 * 1.2 * 1.4, 0.1  # lambda = 2: the cheapest comes first, tolerances .1 .2 .4
    loss = losses((1.0, 1.0, 1.0))
    assert cut_within_tolerance(GROUPS, COSTS, loss, theta=theta, r0=r0) == [
        90,  # to a loss of 1.10
        50,  # from 1.30 by 40 % to 1.82 at most: 50 % makes 1.80
        80,  # from 1.10 by 20 % to 1.32
    ]
    first = [next(i for i, k in enumerate(kept) if k < 100) for kept in loss.calls[1:3]]
    assert first == [0, 0]


def test_with_lambda_below_one_the_dearest_group_comes_first():
    loss = losses((0.0, 0.0, 0.0))
    assert cut_within_tolerance(GROUPS, COSTS, loss, theta=1.12, r0=0.1) == [5, 5, 5]
    assert loss.calls[1::19] == [[100, 95, 100], [100, 5, 95], [95, 5, 5]]


def test_the_task_that_suffers_most_decides():
    kept = cut_within_tolerance(GROUPS, COSTS, losses((0, 0, 0), (0, 1, 0)), theta=1.3, r0=0.1)
    assert kept[0] == kept[2] == 5
    assert kept[1] > 50


def test_ratios_that_alignment_makes_equal_are_tried_once():
    groups = [Group("a", 64)]
    loss = CountedLoss()
    assert cut_within_tolerance(groups, Costs(groups, [Term(1, (0,))]), loss, theta=2, r0=0.1, align=16) == [16]
    assert loss.tried == [64, 48, 32, 16]


class CountedLoss:
    def __init__(self):
        self.tried: list[int] = []

    def __call__(self, kept):
        self.tried.append(kept[0])
        return {"loss": 1.0}
