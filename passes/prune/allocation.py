"""How many units each channel group keeps: uniformly, by one ranking of all units, or the best under a budget.

A node whose weight has the groups g and h on its axes costs ``amount * (k_g / n_g) * (k_h / n_h)`` when k_g of n_g and
k_h of n_h units are kept: multiply-accumulates and parameters are both sums of such terms. Three allocations spend a
budget B of them, ``cost(k) <= B``, on counts k_g that alignment allows:

``uniform``       k_g / n_g the same everywhere, as large as it fits
``ranked``        the units of all groups in one order of importance, as many from its top as fit
``under_budget``  max sum_g v_g(k_g), v_g(k) being the importance that k units of g hold

The last is a multiple-choice knapsack, but for the cost of a group depending on the other groups. It is solved by
linearising: around the best counts known, every count of a group is priced with the others held, the knapsack is
solved, its limit corrected until the true cost fits, and all of it repeated while the value grows. What comes back fits
the budget and is worth at least as much as the two others; it is no proven optimum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from channelfold.passes.numeric.knapsack import knapsack, unreachable
from channelfold.runtime.errors import UsageError

_CORRECTIONS = 8  # of the linear limit in one round; the first two or three bring nearly all there is
_ROUNDS = 20  # never reached on networks: two to five rounds end it
_CLOSE = 1e-3  # of the budget: what the last step spends unit by unit
_LEVELS = 512  # for the knapsack: finer ones are lost in the error of the linear costs


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
    """What one node costs uncut, and the groups on the axes of its weight by number; on both axes: named twice."""

    amount: float
    groups: tuple[int, ...] = ()


class Costs:
    """The sum of ``terms`` as a function of the units kept.

    Groups of 4 and 2 units, with a layer from the input to the first, one between them, one from the second on::

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
        """float64[len(counts)]: the cost with each of these counts of ``group``, the others as in ``kept``."""
        shares = np.append(np.asarray(kept, np.float64) / self._units, 1.0)
        shares[group] = 1
        rest = self._amounts * shares[self._axes].prod(axis=1)
        by_power = np.bincount((self._axes == group).sum(axis=1), rest, minlength=1)
        return np.polynomial.polynomial.polyval(counts / self._units[group], by_power)


def at_share(groups: Sequence[Group], share: float, align: int = 1) -> list[int]:
    """Of every group the allowed count nearest to ``share`` of its units; of two equally near, the larger."""
    return [int(g.counts(align)[np.searchsorted(_switches(g, align), share, side="right")]) for g in groups]


def uniform(groups: Sequence[Group], costs: Costs, budget: float, align: int = 1) -> list[int]:
    """The counts at the greatest share that fits the budget. Raises UsageError when none does."""
    shares = [-1.0, *np.unique(np.concatenate([_switches(g, align) for g in groups] or [[]]))]
    return _last_that_fits(lambda index: at_share(groups, shares[index], align), len(shares), costs, budget)


def ranked(
    groups: Sequence[Group], values: Sequence[np.ndarray], costs: Costs, budget: float, align: int = 1
) -> list[int]:
    """The counts that keep the most important units of all groups together, as many as fit the budget.

    ``values[g]``: float[units + 1], what the best k units of group g are worth together, for every k. A unit's
    importance is its step, along the least concave curve above them: a unit before a greater one counts like it. Equal
    units leave in the order of their place in their group. Raises UsageError when the budget cannot be reached.
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
    """The counts of (nearly) the greatest value under the budget: the knapsack, linearised again and again.

    ``values`` as in ``ranked``, which need not be concave. Raises UsageError when the budget cannot be reached.
    """

    def value(kept: Sequence[int]) -> float:
        return sum(float(curve[k]) for curve, k in zip(values, kept, strict=True))

    counts = [group.counts(align) for group in groups]
    starts = (uniform(groups, costs, budget, align), ranked(groups, values, costs, budget, align))
    kept = max(starts, key=value)
    for _ in range(_ROUNDS):
        better = max(_solutions_near(kept, counts, values, costs, budget), key=value, default=kept)
        if value(better) <= value(kept):
            break
        kept = better
    return _filled(kept, counts, values, costs, budget)


def _switches(group: Group, align: int) -> np.ndarray:
    """The shares at which the nearest allowed count becomes the next one."""
    counts = group.counts(align)
    return (counts[1:] + counts[:-1]) / (2 * group.units)


def _last_that_fits(at: Callable[[int], list[int]], size: int, costs: Costs, budget: float) -> list[int]:
    """Of the allocations ``at(0)`` to ``at(size - 1)``, which never become cheaper, the last within the budget."""
    low, high = 0, size
    if (least := costs(at(0))) > budget:
        raise unreachable(budget, least)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if costs(at(middle)) <= budget else (low, middle)
    return at(low)


def _concave_steps(values: np.ndarray) -> np.ndarray:
    """float64[units]: the steps of the least concave curve above ``values``, none greater than the one before."""
    runs: list[tuple[float, int]] = []  # mean step, length; a run that rises above the one before is joined to it
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
    """Solutions of the knapsack whose costs are linear around ``kept``; only those that truly fit the budget."""
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
    """Spends what is left: again and again the next count of the group that gains most for its cost and still fits."""
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
