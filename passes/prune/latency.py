"""How many units each channel group keeps so that the model runs in a share of its time, measured in ONNX Runtime.

Of every group the model is cut to a few sizes, all other groups whole, and timed beside the uncut one. What a size
saves goes into a knapsack (``within_latency``), whose result is cut and timed in turn: several cuts save
less or more than the sum of what each saves. All times are shares of the uncut model's time in the same alternating
run, so that a machine that slows down meanwhile makes no difference.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context
from channelfold.passes.channels.cut import cut
from channelfold.passes.channels.groups import Copies
from channelfold.passes.numeric.knapsack import knapsack, unreachable
from channelfold.passes.prune import allocation
from channelfold.passes.prune.allocation import Group
from channelfold.passes.prune.costs import Keeps
from channelfold.runtime.data.probes import random_feeds
from channelfold.runtime.data.sources import random_data
from channelfold.runtime.errors import DataError, ModelError, UsageError, no_progress
from channelfold.runtime.io.facts import required_inputs
from channelfold.runtime.io.files import save
from channelfold.runtime.io.session import Feed, Session
from channelfold.runtime.io.snapshot import Snapshot
from channelfold.runtime.stats.bench import latencies

SHARES = np.arange(7, 0, -1) / 8  # of a group's units at which it is timed, beside the fewest
_EACH, _DECIDING = (10, 1.0), (40, 10.0)  # rounds and seconds for a size, and for an allocation


def units_within_latency(
    copies: Copies,
    keeps_of: Callable[[Sequence[int]], Keeps],
    sizes: Sequence[allocation.Group],
    values: Sequence[np.ndarray],
    share: float,
    align: int,
    feed: Feed,
    progress: Callable[[str, int, int], None],
) -> tuple[list[int], float]:
    """The units that each group keeps so that the model takes ``share`` of its time on ``feed``, and what it takes.

    ``keeps_of``: what stays when the groups keep so many units. ``values``: as for ``allocation.under_budget``. Raises
    UsageError when that is too little time.
    """
    whole = [group.units for group in sizes]
    with tempfile.TemporaryDirectory(prefix="channelfold-") as folder:
        paths = [Path(folder) / name for name in ("uncut.onnx", "cut.onnx")]
        _write(copies, {}, paths[0])

        def share_of(kept: list[int], rounds: int, seconds: float) -> float:
            """The time of the model cut like this. Two models are open at once, for they may be large."""
            _write(copies, keeps_of(kept), paths[1])
            uncut, cut = measured(paths.__getitem__, [0, 1], feed=feed, rounds=rounds, seconds=seconds).values()
            return cut / uncut

        tables = []
        for number, group in enumerate(sizes):
            progress("Measuring latencies", number, len(sizes))
            size = group.units * group.channels
            table = {size: 1.0, size + -size % STEP: 1.0}
            for count in _timed(group, align):
                table[count * group.channels] = share_of([*whole[:number], count, *whole[number + 1 :]], *_EACH)
            tables.append(table)
        progress("Measuring latencies", len(sizes), len(sizes))
        taken: dict[tuple[int, ...], float] = {}

        def measure(kept: list[int]) -> float:
            taken[tuple(kept)] = share_of(kept, *_DECIDING)
            return taken[tuple(kept)]

        kept = within_latency(sizes, values, tables, share, measure, align)
        return kept, taken[tuple(kept)]


def _write(copies: Copies, keeps: Keeps, path: Path) -> None:
    """Writes the graph without the labels that do not stay. Raises OutputError."""
    twin, cuts = copies.make(keeps)
    cut(twin, [(region, region.completed(keep)) for region, keep in cuts])
    save(twin, path)


def _timed(group: allocation.Group, align: int) -> list[int]:
    """The counts of units at which a group is timed: multiples of ``STEP`` channels, that stand for those below."""
    counts = group.counts(max(align, STEP))
    near = [allocation.at_share([group], float(share), max(align, STEP))[0] for share in SHARES]
    return sorted({int(counts[0]), *near} - {group.units})


def a_feed(graph: gs.Graph, ctx: Context) -> Feed:
    """What the model is timed on: a calibration sample, or else the first random feed that it runs on.

    Raises DataError when there is none.
    """
    if ctx.calibration is not None and (feed := next(iter(ctx.calibration), None)) is not None:
        return feed
    session: Session = Snapshot.of(graph).session()
    for feed in random_feeds(required_inputs(graph), ctx.seed):
        try:
            session.run(feed)
        except ModelError:
            continue
        return feed
    raise DataError("The model runs on no random input, and so cannot be timed", "Give calibration data")


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
