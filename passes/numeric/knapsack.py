"""Multiple-choice knapsack: one option of every group, the greatest sum of values at a sum of costs within a budget.

    max  sum_g v_g(j_g)    subject to    sum_g c_g(j_g) <= B

Groups are merged one after another into a frontier of the sums that no other sum dominates (at least its value at no
more cost), which is how SMCP (Humble et al., ECCV 2022) allocates channels.
Two rules keep the frontier short. The first rule loses nothing: for any price p >= 0 the optimum is at most

    L(p) = p B + sum_g max_j (v_g(j) - p c_g(j)),

and a partial sum is dropped where this bound stays below the value of a known solution. The second rule applies where
more than ``levels`` sums are left: the room between the least reachable cost and the budget is divided into ``levels``
cells, and each cell keeps its most valuable sum, with the true cost. The budget is therefore never exceeded, and the
result is at least as good as the best one under ``B - merges * room / levels``, for the merges that were thinned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from channelfold.runtime.errors import UsageError

LEVELS = 4096
_ROUNDING = 1e-12  # relative difference of two sums of the same values in different order


@dataclass(frozen=True, eq=False)
class _Frontier:
    """Sums in order of cost, each more valuable than the previous sum; ``picks`` tells the parts of each sum.

    ``picks`` of a group, int64[n], holds options; ``picks`` of a merge, int64[2, n], holds places in both frontiers.
    """

    values: np.ndarray
    costs: np.ndarray
    picks: np.ndarray

    def at(self, kept: np.ndarray) -> _Frontier:
        return _Frontier(self.values[kept], self.costs[kept], self.picks[..., kept])


def knapsack(options: Sequence[Sequence[tuple[float, float]]], budget: float, levels: int = LEVELS) -> list[int]:
    """The option of every group, by its place in ``options[group]``, a sequence of (value, cost).

    The result is exact while no frontier is longer than ``levels``, as is the rule; else the module's bound holds.
    Raises UsageError, with the least cost, where the cheapest options cost more than ``budget``.
    """
    arrays = [np.asarray(choices, np.float64).reshape(-1, 2) for choices in options]
    groups = [_undominated(_Frontier(choices[:, 0], choices[:, 1], np.arange(len(choices)))) for choices in arrays]
    least = sum(group.costs[0] for group in groups)
    if least > budget:
        raise unreachable(budget, float(least))
    groups = [_Frontier(g.values - g.values[0], g.costs - g.costs[0], g.picks) for g in groups]
    room = float(budget - least)
    price, known = _priced(groups, room)
    best = sum(float(group.values[i]) for group, i in zip(groups, known, strict=True))
    chosen = _merged(groups, room, levels, price, best * (1 - _ROUNDING))
    return chosen or [int(group.picks[i]) for group, i in zip(groups, known, strict=True)]


def unreachable(budget: float, least: float) -> UsageError:
    return UsageError(
        f"A budget of {_number(budget)} cannot be reached: the least possible is {_number(least)}",
        "Raise it, lower the alignment, or let more channels be cut",
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def _undominated(sums: _Frontier) -> _Frontier:
    """The sums in order of cost, without sums whose value another sum reaches at the same or a lower cost."""
    order = np.lexsort((-sums.values, sums.costs))
    values = sums.values[order]
    before = np.maximum.accumulate(values)
    return sums.at(order[np.concatenate([[True], values[1:] > before[:-1]])])


def _priced(groups: Sequence[_Frontier], room: float) -> tuple[float, list[int]]:
    """(price with the lowest bound, choices at this price, improved as far as the remaining budget allows)."""
    shape = len(groups), max((len(group.values) for group in groups), default=1)
    values, costs = np.full(shape, -np.inf), np.zeros(shape)
    for index, group in enumerate(groups):
        values[index, : len(group.values)], costs[index, : len(group.costs)] = group.values, group.costs

    def places(price: float) -> np.ndarray:
        return np.argmax(values - price * costs, axis=1)

    def cost(chosen: np.ndarray) -> float:
        return float(np.take_along_axis(costs, chosen[:, None], axis=1).sum())

    if cost(places(0.0)) <= room:
        return 0.0, places(0.0).tolist()
    low, high = 0.0, 1 + max(float(np.max(g.values[1:] / g.costs[1:])) for g in groups if len(g.costs) > 1)
    for _ in range(60):
        price = (low + high) / 2
        low, high = (low, price) if cost(places(price)) <= room else (price, high)
    chosen = places(high)
    left = room - cost(chosen)
    # one pass over the groups, the highest gain per cost first; a second pass would find little
    for index in sorted(range(len(groups)), key=lambda g: -_next_gain(groups[g], chosen[g])):
        group, place = groups[index], chosen[index]
        fits = int(np.searchsorted(group.costs, group.costs[place] + left, side="right")) - 1
        left = max(0.0, left - float(group.costs[fits] - group.costs[place]))
        chosen[index] = fits
    return high, chosen.tolist()


def _next_gain(group: _Frontier, place: int) -> float:
    if place + 1 == len(group.costs):
        return 0.0
    return float((group.values[place + 1] - group.values[place]) / (group.costs[place + 1] - group.costs[place]))


def _merged(groups: Sequence[_Frontier], room: float, levels: int, price: float, least: float) -> list[int]:
    """The options of the best sum of value ``least`` or more; empty where thinning has lost all such sums."""
    worth = [group.values - price * group.costs for group in groups]
    rest = price * room + sum(float(w.max()) for w in worth)
    groups = [g.at(np.flatnonzero(w + (rest - w.max()) >= least)) for g, w in zip(groups, worth, strict=True)]
    sums = _Frontier(np.zeros(1), np.zeros(1), np.zeros((2, 1), np.int64))
    merges: list[_Frontier] = []
    for group, best in zip(groups, (float(w.max()) for w in worth), strict=True):
        rest -= best
        values = np.add.outer(sums.values, group.values)
        costs = np.add.outer(sums.costs, group.costs)
        picks = np.stack(np.nonzero((costs <= room) & (values - price * costs + rest >= least)))
        if not picks.size:
            return []
        sums = _undominated(_Frontier(values[tuple(picks)], costs[tuple(picks)], picks))
        if len(sums.values) > levels:
            sums = _thinned(sums, room / levels)
        merges.append(sums)
    place, options = len(sums.values) - 1, []
    for merge, group in zip(reversed(merges), reversed(groups), strict=True):
        place, own = merge.picks[:, place]
        options.append(int(group.picks[own]))
    return options[::-1]


def _thinned(sums: _Frontier, width: float) -> _Frontier:
    """The most valuable (last) sum of each cell of costs, and the cheapest sum of the first cell."""
    cells = np.floor(sums.costs / width)
    kept = np.append(cells[1:] != cells[:-1], True)
    kept[0] = True
    return sums.at(np.flatnonzero(kept))
