"""How many units each group keeps when every task's loss may only grow so much: groups cut one by one, greedily.

PAGCP (Ye et al., T-PAMI 2023). Over all of its L groups a network may lose a factor ``theta`` in any task's loss. The
i-th cut group may take the factor 1 + r0 lambda^i of it, where lambda solves

    prod_{i=0..L-1} (1 + r0 lambda^i) = theta

Groups come in order of the cost that cutting 30 % of them saves, so that the dearest ones get the widest tolerance: the
dearest first when lambda <= 1, else last. A group's ratio is raised from 5 % to 95 % until some task's loss exceeds its
reference by more than the tolerance; the ratio before that stays, its losses become the references where they are
higher, and the next cut group has the next tolerance. Of the groups cut like this only those with the least growth of
the losses for the cost they saved stay cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from channelfold.passes.prune import allocation
from channelfold.passes.prune.allocation import Costs, Group, at_share
from channelfold.passes.prune.costs import Keeps
from channelfold.passes.prune.trial import Trial
from channelfold.runtime.errors import UsageError

RATIOS = np.arange(0.05, 0.96, 0.05)
_PROBE = 0.3  # the share of a group whose cost stands for what cutting it saves

Loss = Callable[[Sequence[int]], Mapping[str, float]]


def tolerances(theta: float, r0: float, layers: int) -> np.ndarray:
    """float64[layers]: r0 lambda^i with prod(1 + r0 lambda^i) = theta; of one layer all that theta allows.

    Raises UsageError unless 0 < r0 and 1 + r0 < theta: the first layer alone would use up more.
    """
    if not (r0 > 0 and 1 + r0 < theta < math.inf):
        raise UsageError(
            f"A first tolerance of {r0:g} does not fit a loss that may grow {theta:g}-fold",
            f"Choose it between 0 and {max(theta - 1, 0):g}, both excluded, or allow more loss",
        )
    if layers == 1:
        return np.array([theta - 1])
    powers, low, high = np.arange(layers), 0.0, 1.0

    def excess(ratio: float) -> float:
        return float(np.log1p(r0 * ratio**powers).sum()) - math.log(theta)

    while excess(high) < 0:
        low, high = high, 2 * high
    while (middle := (low + high) / 2) not in (low, high):  # until no float lies between
        low, high = (low, middle) if excess(middle) > 0 else (middle, high)
    return r0 * low**powers


def cut_within_tolerance(
    groups: Sequence[Group],
    costs: Costs,
    loss: Loss,
    *,
    theta: float = 6.0,
    r0: float = 0.06,
    share: float = 0.8,
    align: int = 1,
) -> list[int]:
    """The units that each group keeps. ``loss(kept)`` gives the loss of every task, all positive, smaller is better.

    At most ``share`` of the groups stay cut. With all of them no task's loss is above ``theta`` times what it was.
    Calls ``loss`` up to 19 times a group. Raises UsageError where ``tolerance`` does.
    """
    whole = [group.units for group in groups]
    kept, references = list(whole), dict(loss(whole))
    allowed = tolerances(theta, r0, max(1, len(groups)))
    saved = [costs(whole) - costs(_with(whole, g, at_share([group], 1 - _PROBE)[0])) for g, group in enumerate(groups)]
    growth_per_cost: dict[int, float] = {}
    for g in sorted(range(len(groups)), key=lambda g: saved[g], reverse=bool(allowed[-1] <= allowed[0])):
        count, losses = _deepest(groups[g], g, kept, references, loss, allowed[len(growth_per_cost)], align)
        if count == kept[g]:
            continue
        growth = sum(losses[task] / old - 1 for task, old in references.items())
        after = _with(kept, g, count)
        growth_per_cost[g] = growth / max(costs(kept) - costs(after), np.finfo(float).tiny)
        kept, references = after, {task: max(old, losses[task]) for task, old in references.items()}
    cheapest = sorted(growth_per_cost, key=lambda g: growth_per_cost[g])[: math.ceil(share * len(groups))]
    return [kept[g] if g in cheapest else whole[g] for g in range(len(groups))]


def _with(kept: Sequence[int], group: int, count: int) -> list[int]:
    return [*kept[:group], count, *kept[group + 1 :]]


def _deepest(
    group: Group,
    index: int,
    kept: Sequence[int],
    references: Mapping[str, float],
    loss: Loss,
    tolerance: float,
    align: int,
) -> tuple[int, Mapping[str, float]]:
    """The count before the first at which some task loses too much, and the losses there."""
    count, losses = group.units, references
    for smaller in dict.fromkeys(at_share([group], 1 - float(ratio), align)[0] for ratio in RATIOS):
        if smaller == count:
            continue
        tried = loss(_with(kept, index, smaller))
        if any(tried[task] > references[task] * (1 + tolerance) for task in references):
            break
        count, losses = smaller, tried
    return count, losses


TRIED = 8  # samples of the calibration data that the outputs are compared on
_FRONT = 2  # times the tolerance of an even share that the first group has


def units_within_tolerance(
    trial: Trial,
    keeps_of: Callable[[Sequence[int]], Keeps],
    sizes: Sequence[allocation.Group],
    costs: allocation.Costs,
    tolerance: float,
    align: int,
    progress: Callable[[str, int, int], None],
) -> tuple[list[int], dict[str, float]]:
    """The units that each group keeps, and the error that is left at each output, relative to its variance.

    ``keeps_of``: what stays when the groups keep so many units. ``costs``: what cutting a group saves.

    Raises UsageError when no output varies.
    """
    whole = [group.units for group in sizes]
    if not trial.errors(keeps_of(whole)):
        raise UsageError("No output of the model varies on the calibration data", "Give another budget")
    touched: set[int] = set()

    def loss(kept: Sequence[int]) -> Mapping[str, float]:
        touched.update(g for g, (group, count) in enumerate(zip(sizes, kept, strict=True)) if count < group.units)
        progress("Cutting within the tolerance", len(touched), len(sizes))
        return {name: 1 + error for name, error in trial.errors(keeps_of(kept)).items()}

    theta = 1 + tolerance
    first = _FRONT * (theta ** (1 / max(len(sizes), 2)) - 1)
    kept = cut_within_tolerance(sizes, costs, loss, theta=theta, r0=first, share=1.0, align=align)
    return kept, trial.errors(keeps_of(kept))
