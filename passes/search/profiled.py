"""The time of the nodes of every site in ONNX Runtime, which fuses nodes and names them anew.

A profile tells the shares of the nodes, and a run without the profiler the time of all together.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from channelfold.passes.layers.owners import owners
from channelfold.passes.search.latency import Timed
from channelfold.runtime.io.session import Feed, Session
from channelfold.runtime.stats.bench import latencies
from channelfold.runtime.stats.profile import profiles


def profiled(
    paths: Mapping[str, Path],
    sites: Sequence[Sequence[str]],
    feed: Feed,
    threads: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timed]:
    """The times of files with ``sites``, run in turns on one feed. ``clock`` gives the time of runs in seconds."""
    timed = profiles(paths, feed, threads=threads)
    sessions = {name: Session(path, threads=threads, timed=True) for name, path in paths.items()}
    runs = {name: functools.partial(s.run, s.accepted(feed)) for name, s in sessions.items()}
    # the lower quartile, for interruptions make runs longer
    whole = {found.name: found.low for found in latencies(runs, rounds=25, seconds=10.0, clock=clock)}
    found = {}
    for name, path in paths.items():
        scale = whole[name] / max(sum(node.ms for node in timed[name]), 1e-9)
        found[name] = Timed(whole[name], [scale * ms for ms in owners(path, timed[name], sites)])
    return found
