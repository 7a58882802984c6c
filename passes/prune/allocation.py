"""The number of units that each channel group keeps: by one share, by one ranking of all units, or by a knapsack.

A node whose weight has the groups g and h on its axes costs ``amount * (k_g / n_g) * (k_h / n_h)`` when k_g of n_g and
k_h of n_h units are kept: multiply-accumulates and parameters are both sums of such terms. Three allocations spend a
budget B of them, ``cost(k) <= B``, on counts k_g that alignment allows:

``uniform``       one share k_g / n_g for all groups, as large as fits
``ranked``        the most important units of all groups in one order, as many as fit
``under_budget``  max sum_g v_g(k_g), v_g(k) being the importance that k units of g hold

The last is a multiple-choice knapsack, except that the cost of a group depends on the other groups. The costs are
therefore linearised: around the best known counts, every count of a group is priced while the other groups stay, the
knapsack is solved, its limit is corrected until the true cost fits, and all of this is repeated while the value grows.
The result fits the budget and is worth at least as much as the two others, but is no proven optimum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from channelfold.passes.numeric.knapsack import knapsack, unreachable
from channelfold.runtime.errors import UsageError

_CORRECTIONS = 8  # of the linear limit in one round; the first two or three have nearly all of the effect
_ROUNDS = 20  # real networks take two to five
_CLOSE = 1e-3  # of the budget: the part that the last step spends unit by unit
_LEVELS = 512  # of the knapsack; the error of the linear costs hides finer ones


@dataclass(frozen=True)
class Group:
    """``units`` that can be removed one by one, of ``channels`` channels each; at least ``least`` of them stay."""

    name: str
    units: int
    least: int = 1
    channels: int = 1

    def counts(self, align: int = 1) -> np.ndarray:
        """The counts that may be kept, int64, ascending: whole multiples of ``align`` channels, and all units."""
        step = align // math.gcd(align, self.channels)
        first = -(-self.least // step) * step
        return np.array([*range(first, self.units, step), self.units])


@dataclass(frozen=True)
class Term:
    """The cost of one uncut node, and the numbers of the groups on the axes of its weight (twice for both axes)."""

    amount: float
    groups: tuple[int, ...] = ()


class Costs:
    """The sum of ``terms`` as a function of the units kept.

    Groups of 4 and 2 units, with a layer in front of the first, one between them, and one behind the second::

        costs = Costs([Group("a", 4), Group("b", 2)], [Term(12, (0,)), Term(8, (0, 1)), Term(6, (1,))])
        costs([4, 2]) == 26;  costs([2, 2]) == 6 + 4 + 6;  costs([2, 1]) == 6 + 2 + 3
    """

    def __init__(self, groups: Sequence[Group], terms: Sequence[Term]):
        self._units = np.array([group.units for group in groups], np.float64)
        self._amounts = np.array([term.amount for term in terms], np.float64)
        axes = max((len(term.groups) for term in terms), default=0)
        self._axes = np.full((len(terms), axes), len(groups))  # the place past the last group stands for "uncut"
        for row, term in zip(self._axes, terms, strict=True):
            row[: len(term.groups)] = term.groups

    def __call__(self, kept: Sequence[int]) -> float:
        shares = np.append(np.asarray(kept, np.float64) / self._units, 1.0)
        return float(self._amounts @ shares[self._axes].prod(axis=1))

    def along(self, group: int, counts: np.ndarray, kept: Sequence[int]) -> np.ndarray:
        """The cost for each of ``counts`` of a group, (counts,) float64; other groups keep the units in ``kept``."""
        shares = np.append(np.asarray(kept, np.float64) / self._units, 1.0)
        shares[group] = 1
        rest = self._amounts * shares[self._axes].prod(axis=1)
        by_power = np.bincount((self._axes == group).sum(axis=1), rest, minlength=1)
        return np.polynomial.polynomial.polyval(counts / self._units[group], by_power)


def at_share(groups: Sequence[Group], share: float, align: int = 1) -> list[int]:
    """The allowed count of every group nearest to ``share`` of its units; the larger of two counts equally near."""
    return [int(g.counts(align)[np.searchsorted(_switches(g, align), share, side="right")]) for g in groups]


def uniform(groups: Sequence[Group], costs: Costs, budget: float, align: int = 1) -> list[int]:
    """The counts at the greatest share that fits the budget. Raises UsageError where no share fits."""
    shares = [-1.0, *np.unique(np.concatenate([_switches(g, align) for g in groups] or [[]]))]
    return _last_that_fits(lambda index: at_share(groups, shares[index], align), len(shares), costs, budget)


def ranked(
    groups: Sequence[Group], values: Sequence[np.ndarray], costs: Costs, budget: float, align: int = 1
) -> list[int]:
    """The counts that keep the most important units of all groups together, as many as fit the budget.

    ``values[g]``: float[units + 1], the importance of the best k units of group g, for every k. The importance of one
    unit is its step on the least concave curve above these values. Equal units go in the order of their place in their
    group. Raises UsageError where the budget cannot be reached.
    """
    steps = [_concave_steps(value) for value in values]
    places = np.concatenate([np.arange(1, g.units + 1) / g.units for g in groups] or [[]])
    owners = np.repeat(np.arange(len(groups)), [g.units for g in groups])
    order = owners[np.lexsort((places, -np.concatenate([*steps, []])))]

    def counts(units: int) -> list[int]:
        taken = np.bincount(order[:units], minlength=len(groups))
        return [at_share([group], n / group.units, align)[0] for group, n in zip(groups, taken, strict=True)]

    return _last_that_fits(counts, len(order) + 1, costs, budget)


def under_budget(
    groups: Sequence[Group], values: Sequence[np.ndarray], costs: Costs, budget: float, align: int = 1
) -> list[int]:
    """The counts of (nearly) the greatest value under the budget, by the knapsack with linearised costs.

    ``values`` as in ``ranked``. Raises UsageError where the budget cannot be reached.
    """

    def value(kept: Sequence[int]) -> float:
        return sum(float(curve[k]) for curve, k in zip(values, kept, strict=True))

    counts = [group.counts(align) for group in groups]
    starts = (uniform(groups, costs, budget, align), ranked(groups, values, costs, budget, align))
    best = max(starts, key=value)
    for kept in (best, [int(options[0]) for options in counts]):  # the second where the first leads to nothing better
        for _ in range(_ROUNDS):
            better = max(_solutions_near(kept, counts, values, costs, budget), key=value, default=kept)
            if value(better) <= value(kept):
                break
            kept = better
        if value(kept) > value(best):
            best = kept
            break
    return _filled(best, counts, values, costs, budget)


def _switches(group: Group, align: int) -> np.ndarray:
    """The shares at which the nearest allowed count changes to the next count."""
    counts = group.counts(align)
    return (counts[1:] + counts[:-1]) / (2 * group.units)


def _last_that_fits(at: Callable[[int], list[int]], size: int, costs: Costs, budget: float) -> list[int]:
    """The last allocation within the budget of ``at(0)`` to ``at(size - 1)``, whose costs never fall."""
    low, high = 0, size
    if (least := costs(at(0))) > budget:
        raise unreachable(budget, least)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if costs(at(middle)) <= budget else (low, middle)
    return at(low)


def _concave_steps(values: np.ndarray) -> np.ndarray:
    """The steps of the least concave curve above ``values``, (units,) float64; no step exceeds the step before."""
    runs: list[
        tuple[float, int]
    ] = []  # mean step, length; a run with a larger step than the run before is joined to that run
    for step in np.diff(np.asarray(values, np.float64)):
        mean, length = float(step), 1
        while runs and runs[-1][0] <= mean:
            before, count = runs.pop()
            mean, length = (before * count + mean * length) / (count + length), count + length
        runs.append((mean, length))
    return np.repeat([mean for mean, _ in runs], [length for _, length in runs])


def _solutions_near(
    kept: list[int], counts: Sequence[np.ndarray], values: Sequence[np.ndarray], costs: Costs, budget: float
) -> list[list[int]]:
    """Solutions of the knapsack with costs linear around ``kept`` that truly fit the budget."""
    now, found = costs(kept), []
    options = [
        np.stack([np.asarray(values[g])[k], costs.along(g, k, kept) - now], axis=1).tolist()
        for g, k in enumerate(counts)
    ]
    limit = budget - now
    for _ in range(_CORRECTIONS):
        try:
            picks = knapsack(options, limit, _LEVELS)
        except UsageError:  # the corrections have gone below what the linear costs can reach
            break
        choice = [int(k[pick]) for k, pick in zip(counts, picks, strict=True)]
        cost = costs(choice)
        if cost <= budget:
            found.append(choice)
        if choice in found[:-1] or (1 - _CLOSE) * budget <= cost <= budget:
            break
        limit += budget - cost
    return found


def _filled(
    kept: list[int], counts: Sequence[np.ndarray], values: Sequence[np.ndarray], costs: Costs, budget: float
) -> list[int]:
    """Spends the rest of the budget: raises the group with the largest gain for its cost, while a raise fits."""
    kept = list(kept)
    while True:
        now, best, best_rate = costs(kept), None, 0.0
        for g, allowed in enumerate(counts):
            after = allowed[np.searchsorted(allowed, kept[g], side="right") :][:1]
            if not len(after):
                continue
            trial = [*kept[:g], int(after[0]), *kept[g + 1 :]]
            cost, gain = costs(trial), float(values[g][after[0]] - values[g][kept[g]])
            if cost <= budget and gain > 0 and (rate := gain / (cost - now) if cost > now else math.inf) > best_rate:
                best, best_rate = trial, rate
        if best is None:
            return kept
        kept = best
