"""The number of units that each channel group keeps so that the model runs in a share of its time in ONNX Runtime.

Every group is cut to a few sizes, all other groups whole, and each of these models is timed beside the uncut model. The
time that a size saves goes into a knapsack (``fitting``). Its result is cut and timed in turn, because several cuts
save less or more than the sum of their savings. All times are shares of the uncut model's time in the same alternating
run, so that a machine that slows down meanwhile makes no difference.
"""

from __future__ import annotations

import functools
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
from channelfold.passes.prune.importance import RankedGroups
from channelfold.runtime.data.probes import random_feeds
from channelfold.runtime.errors import DataError, ModelError
from channelfold.runtime.io import temporary
from channelfold.runtime.io.facts import required_inputs
from channelfold.runtime.io.files import save
from channelfold.runtime.io.session import Feed, Session
from channelfold.runtime.io.snapshot import Snapshot
from channelfold.runtime.stats.bench import latencies

SHARES = np.arange(7, 0, -1) / 8  # of the units of a group at which the group is timed, beside the fewest units
STEP = 8  # a size between two measured sizes costs as much as the next multiple of 8
_EACH, _DECIDING = (10, 1.0), (40, 10.0)  # rounds and seconds for a size, and for an allocation
_LEAST_STEP = 0.01  # of the budget: the least reduction after an allocation that took too long
_TRIES = 12  # allocations that are measured


def within_latency(
    copies: Copies,
    ranked: RankedGroups,
    share: float,
    align: int,
    feed: Feed,
    progress: Callable[[str, int, int], None],
) -> tuple[Keeps, float]:
    """(labels that stay so that the model takes ``share`` of its time on ``feed``, the share that the model takes).

    Raises UsageError where the model cannot be that fast.
    """
    sizes = ranked.sizes
    whole = [group.units for group in sizes]
    with temporary.folder() as folder:
        paths = folder / "uncut.onnx", folder / "cut.onnx"
        _write(copies, {}, paths[0])

        def share_of(kept: list[int], rounds: int, seconds: float) -> float:
            _write(copies, ranked.keeps(kept), paths[1])
            return time_share(*paths, feed, rounds, seconds)

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

        kept = fitting(sizes, ranked.values, tables, share, measure, align)
        return ranked.keeps(kept), taken[tuple(kept)]


def _write(copies: Copies, keeps: Keeps, path: Path) -> None:
    """Writes the graph without the labels that do not stay. Raises OutputError."""
    twin, cuts = copies.make(keeps)
    cut(twin, [(region, region.completed(keep)) for region, keep in cuts])
    save(twin, path)


def _timed(group: allocation.Group, align: int) -> list[int]:
    """The counts of units at which a group is timed: multiples of ``STEP`` channels, which stand for smaller counts."""
    counts = group.counts(max(align, STEP))
    near = [allocation.at_share([group], float(share), max(align, STEP))[0] for share in SHARES]
    return sorted({int(counts[0]), *near} - {group.units})


def a_feed(graph: gs.Graph, ctx: Context) -> Feed:
    """The feed that the model is timed on: a calibration sample, or else the first random feed on which the model runs.

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


def time_share(uncut: Path, cut: Path, feed: Feed, rounds: int, seconds: float) -> float:
    """The time of one model on ``feed`` as a share of the time of another, from alternating runs.

    The times are lower quartiles, which other work on the machine moves less than medians. Two models are open at a
    time, because models may be large. Raises ModelError where ONNX Runtime refuses one of them.
    """
    runs = {path.name: functools.partial(Session(path, timed=True).run, feed) for path in (uncut, cut)}
    whole, rest = (latency.low for latency in latencies(runs, rounds=rounds, seconds=seconds))
    return rest / whole


def looked_up(table: Mapping[int, float], size: int) -> float:
    """The time of ``size`` in a table, or else of the next measured multiple of 8."""
    return table[min(known for known in table if known == size or (known > size and known % STEP == 0))]


def fitting(
    groups: Sequence[Group],
    values: Sequence[np.ndarray],
    tables: Sequence[Mapping[int, float]],
    budget: float,
    measure: Callable[[list[int]], float],
    align: int = 1,
) -> list[int]:
    """The units that each group keeps so that the model takes at most ``budget``.

    ``values[g]``: float[units + 1], the importance of the best k units of group g, for every k; the sum over the groups
    is made as large as the tables allow. ``tables[g]``: the time of the model by the channels of g, all other groups
    whole. ``measure(kept)``: the time of the model after a cut, asked until an answer fits the budget closely. Raises
    UsageError where no answer fits.
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
    found: tuple[float, list[int]] | None = None  # the largest limit of an allocation that fits, and that allocation
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
