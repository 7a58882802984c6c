"""How many units each channel group keeps so that the model runs in a share of its time, measured in ONNX Runtime.

Of every group the model is cut to a few sizes, all other groups whole, and timed beside the uncut one. What a size
saves goes into a knapsack (``latency_table.within_latency``), whose result is cut and timed in turn: several cuts save
less or more than the sum of what each saves. All times are shares of the uncut model's time in the same alternating
run, so that a machine that slows down meanwhile makes no difference.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes import allocation
from channelfold.passes.base import Context, DataError, ModelError
from channelfold.passes.channel_groups import Copies
from channelfold.passes.cut import cut
from channelfold.passes.group_costs import Keeps
from channelfold.passes.verify import random_feeds
from channelfold.runtime.graph_io import save
from channelfold.runtime.inspection import required_inputs
from channelfold.runtime.latency_table import STEP, measured, within_latency
from channelfold.runtime.ort import Feed, Session
from channelfold.runtime.snapshot import Snapshot

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
