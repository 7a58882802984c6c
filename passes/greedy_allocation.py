"""How many units each channel group keeps so that no output of the model is off by more than a tolerance.

    loss_o(k)  =  1 + E ||y_o - y_o(k)||^2 / E ||y_o - E[y_o]||^2          prod_g (1 + t_g)  <=  1 + tolerance

y_o is an output on calibration samples, y_o(k) the same when the groups keep k units and what reads them is refitted.
Groups are cut one after another, the one with the most multiply-accumulates to save first, in 19 steps from 5 to 95 %,
until the loss of some output grows by more than t_g (``tolerances``, after PAGCP). Nothing is cut for that (``trial``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from channelfold.passes import allocation
from channelfold.passes.base import UsageError
from channelfold.passes.group_costs import Keeps
from channelfold.passes.tolerances import cut_within_tolerance
from channelfold.passes.trial import Trial

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
