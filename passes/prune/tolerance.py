"""The number of units that each group keeps within a tolerance of the outputs: groups are cut one by one, greedily.

PAGCP (Ye et al., T-PAMI 2023). The loss of every task of a network may grow by a factor ``theta`` over all of its L
groups. The i-th cut group may use the factor 1 + r0 lambda^i of it, where lambda solves

    prod_{i=0..L-1} (1 + r0 lambda^i) = theta

The groups come in the order of the cost that a cut of 30 % saves, so that the dearest groups get the widest tolerances:
the dearest group is the first where lambda <= 1, else the last. The ratio of a group is raised from 5 % to 95 % until
the loss of some task exceeds its reference by more than the tolerance. The ratio before that stays, its losses become
the references where they are higher, and the next cut group has the next tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from channelfold.passes.prune.allocation import Costs, Group, at_share
from channelfold.passes.prune.costs import GroupCosts, Keeps
from channelfold.passes.prune.importance import RankedGroups
from channelfold.passes.prune.trial import Trial
from channelfold.runtime.errors import UsageError

RATIOS = np.arange(0.05, 0.96, 0.05)
TRIED = 8  # samples of the calibration data on which outputs are compared
_PROBE = 0.3  # the share of a group whose cost stands for the cost that a cut saves
_FRONT = 2  # times the tolerance of an even share that the first group has

Loss = Callable[[Sequence[int]], Mapping[str, float]]


def within_tolerance(
    trial: Trial,
    ranked: RankedGroups,
    costs: GroupCosts,
    tolerance: float,
    align: int,
    progress: Callable[[str, int, int], None],
) -> Keeps:
    """The labels that stay while no output has a larger error than ``tolerance``, relative to its variance.

    Raises UsageError where no output varies.
    """
    sizes = ranked.sizes
    if not any(trial.outputs.variances.values()):
        raise UsageError("No output of the model varies on the calibration data", "Give another budget")
    touched: set[int] = set()

    def loss(kept: Sequence[int]) -> Mapping[str, float]:
        touched.update(g for g, (group, count) in enumerate(zip(sizes, kept, strict=True)) if count < group.units)
        progress("Cutting within the tolerance", len(touched), len(sizes))
        return {name: 1 + error for name, error in of_variance(trial, ranked.keeps(kept)).items()}

    theta = 1 + tolerance
    first = _FRONT * (theta ** (1 / max(len(sizes), 2)) - 1)
    return ranked.keeps(cut_within_tolerance(sizes, Costs(sizes, costs.terms("macs")), loss, theta, first, align))


def of_variance(trial: Trial, keeps: Keeps) -> dict[str, float]:
    """The squared error of every output that varies, relative to its variance, when these labels alone stay."""
    lost = trial.errors(keeps).lost[0].sum(axis=0)
    whole = trial.outputs.variances
    return {name: float(lost[place] / whole[name]) for place, name in enumerate(whole) if whole[name] > 0}


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
    groups: Sequence[Group], costs: Costs, loss: Loss, theta: float, r0: float, align: int = 1
) -> list[int]:
    """The units that each group keeps such that no task's loss is above ``theta`` times the loss of the uncut model.

    ``loss(kept)`` gives the loss of every task, a positive number, and is called up to 19 times a group. Raises
    UsageError as ``tolerances`` does.
    """
    whole = [group.units for group in groups]
    kept, references = list(whole), dict(loss(whole))
    allowed = tolerances(theta, r0, max(1, len(groups)))
    saved = [costs(whole) - costs(_with(whole, g, at_share([group], 1 - _PROBE)[0])) for g, group in enumerate(groups)]
    number = 0
    for g in sorted(range(len(groups)), key=lambda g: saved[g], reverse=bool(allowed[-1] <= allowed[0])):
        count, losses = whole[g], references
        for smaller in dict.fromkeys(at_share([groups[g]], 1 - float(ratio), align)[0] for ratio in RATIOS):
            if smaller == count:
                continue
            tried = loss(_with(kept, g, smaller))
            if any(tried[task] > reference * (1 + allowed[number]) for task, reference in references.items()):
                break
            count, losses = smaller, tried
        number += count < whole[g]
        kept, references = _with(kept, g, count), {task: max(old, losses[task]) for task, old in references.items()}
    return kept


def _with(kept: Sequence[int], group: int, count: int) -> list[int]:
    return [*kept[:group], count, *kept[group + 1 :]]
