"""What a model costs in milliseconds at each size of one of its groups: measured, not modelled.

Measured times go down in steps, where a size fills the vector registers and where it does not, and a smaller layer can
even be slower. A knapsack over tables of them needs no model of that: a size that costs more than a larger one is
dominated, and never chosen.

What tables of single groups cannot say is how two cuts act together: a layer between two groups that are both cut to a
half runs four times as fast, not "two halves saved". So the allocation is measured, and repeated with less to spend
until it fits, then with what lies between the last two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from channelfold.passes.allocation import Group
from channelfold.passes.base import UsageError, no_progress
from channelfold.passes.knapsack import knapsack, unreachable
from channelfold.runtime.bench import latencies
from channelfold.runtime.calibration import random_data
from channelfold.runtime.ort import Feed, Session

_LEAST_STEP = 0.01  # of the budget: by how much less an allocation that took too long is repeated with
_TRIES = 12  # allocations that are measured
STEP = 8  # sizes between the measured ones cost what the next multiple of this does


def measured(
    build: Callable[[int], str | Path | bytes],
    sizes: Sequence[int],
    *,
    feed: Feed | None = None,
    threads: int | None = None,
    rounds: int = 30,
    seconds: float = 10.0,
    progress: Callable[[str, int, int], None] = no_progress,
) -> dict[int, float]:
    """Milliseconds of one run of ``build(size)`` in ONNX Runtime on the CPU, by size: lower quartiles of alternating
    runs, which other work on the machine moves less than medians.

    ``build`` gives the path of a model or a serialized one. All of them are open at once. They run on ``feed``, or else
    on random numbers, with open dimensions as ``random_data`` fills them. Raises ModelError where ONNX Runtime refuses
    one.
    """
    runs = {}
    for size in sizes:
        session = Session(build(size), threads=threads)
        given = feed if feed is not None else next(iter(random_data(session.inputs, 1)))
        runs[str(size)] = functools.partial(session.run, given)
    return {int(t.name): t.low for t in latencies(runs, rounds=rounds, seconds=seconds, progress=progress)}


def looked_up(table: Mapping[int, float], size: int) -> float:
    """The time of ``size``, else of the next measured multiple of 8. Raises UsageError when there is none."""
    if size in table:
        return table[size]
    larger = [known for known in table if known > size and known % STEP == 0]
    if not larger:
        raise UsageError(
            f"No latency was measured for {size} channels or a larger multiple of {STEP}",
            f"Measure the size that the model has; measured: {', '.join(map(str, sorted(table)))}",
        )
    return table[min(larger)]


def within_latency(
    groups: Sequence[Group],
    values: Sequence[np.ndarray],
    tables: Sequence[Mapping[int, float]],
    budget: float,
    measure: Callable[[list[int]], float],
    align: int = 1,
) -> list[int]:
    """The units that each group keeps so that the model takes at most ``budget`` milliseconds.

    ``values[g]``: float[units + 1], what the best k units of group g are worth together; their sum is made as great as
    the tables can tell. ``tables[g]``: milliseconds of the model by the channels that g has, all other groups whole.
    ``measure(kept)``: milliseconds of the model cut like this, asked until the answer fits, closely. Raises UsageError
    when it never does.
    """
    counts = [group.counts(align) for group in groups]
    costs = [
        np.array([looked_up(table, int(k) * group.channels) for k in allowed])
        for group, table, allowed in zip(groups, tables, counts, strict=True)
    ]
    whole = float(np.mean([cost[-1] for cost in costs]))
    saved = [cost - cost[-1] for cost in costs]
    options = [
        list(zip(np.asarray(value)[allowed].tolist(), cost.tolist(), strict=True))
        for value, allowed, cost in zip(values, counts, saved, strict=True)
    ]
    floor = sum(float(cost.min()) for cost in saved)
    limit, least, failed = max(budget - whole, floor), whole, np.inf
    found: tuple[float, list[int]] | None = None  # the most that a fitting allocation could spend, and that one
    for _ in range(_TRIES):
        kept = [int(k[pick]) for k, pick in zip(counts, knapsack(options, limit), strict=True)]
        if found is not None and kept == found[1]:
            break
        taken = measure(kept)
        least = min(least, taken)
        if taken <= budget:
            found = limit, kept
        else:
            failed = limit
        if found is not None:
            if not _LEAST_STEP * budget < failed - found[0] < np.inf:
                break
            limit = (failed + found[0]) / 2
        elif limit == floor:
            break
        else:
            limit = max(limit - max(taken - budget, _LEAST_STEP * budget), floor)
    if found is None:
        raise unreachable(budget, least)
    return found[1]
