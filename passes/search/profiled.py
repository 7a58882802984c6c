"""The time of the nodes of every site in ONNX Runtime, which fuses nodes and names them anew.

A profile tells the shares of the nodes, and a run without the profiler the time of all together, in turns with that of
the original. So there are never more than two models in memory.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from channelfold.passes.layers.owners import owners
from channelfold.passes.search.latency import ORIGINAL, Timed
from channelfold.runtime.io.session import Feed, Session
from channelfold.runtime.stats.bench import Latency, latencies
from channelfold.runtime.stats.profile import profiles

_ROUNDS, _SECONDS = 100, 4.0


def profiled(
    paths: Mapping[str, Path],
    sites: Sequence[Sequence[str]],
    feed: Feed,
    threads: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timed]:
    """The times of the original and of other files with ``sites``, on one feed, all relative to the original's first.

    ``clock`` gives the time of runs in seconds.
    """
    found: dict[str, Timed] = {}
    for name in paths.keys() - {ORIGINAL}:
        first, own = in_turns([paths[ORIGINAL], paths[name]], feed, threads, clock)
        whole = found.setdefault(ORIGINAL, Timed(first.low, ())).whole * own.low / first.low
        nodes = profiles({name: paths[name]}, feed, threads=threads)[name]
        scale = whole / max(sum(node.ms for node in nodes), 1e-9)
        found[name] = Timed(whole, [scale * ms for ms in owners(paths[name], nodes, sites)] if sites else ())
    return found


def in_turns(
    paths: Sequence[Path], feed: Feed, threads: int | None = None, clock: Callable[[], float] = time.perf_counter
) -> list[Latency]:
    """The times of models, run in turns."""
    sessions = [Session(path, threads=threads, timed=True) for path in paths]
    runs = {f"{number}": functools.partial(s.run, s.accepted(feed)) for number, s in enumerate(sessions)}
    return latencies(runs, rounds=_ROUNDS, seconds=_SECONDS, clock=clock)
