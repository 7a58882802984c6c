"""The time that each node of a model takes in ONNX Runtime, from its own profiler.

Models run in turns, so that a change of the machine's speed affects all alike. A node's time is the mean over the
faster half of its runs: whatever interrupts a run makes it slower only, and the profiler tells whole microseconds.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from channelfold.runtime.errors import no_progress
from channelfold.runtime.io.session import Feed, Session

_WARMUP = 2


@dataclass(frozen=True)
class NodeTime:
    """A node as ONNX Runtime runs it, fused with others: its time in one run of the model, in milliseconds."""

    name: str
    op: str
    ms: float


def profiles(
    models: Mapping[str, Path],
    feed: Feed,
    *,
    threads: int | None = None,
    rounds: int = 25,
    seconds: float = 10.0,
    progress: Callable[[str, int, int], None] = no_progress,
) -> dict[str, list[NodeTime]]:
    """The nodes of every model in the order of their first run, after ``rounds`` runs or, from 5 on, ``seconds``."""
    with tempfile.TemporaryDirectory(prefix="channelfold-") as folder:
        sessions = {
            name: Session(path, threads=threads, timed=True, profile=Path(folder, f"profile{number}"))
            for number, (name, path) in enumerate(models.items())
        }
        feeds = {name: session.accepted(feed) for name, session in sessions.items()}
        started, done = time.perf_counter(), 0
        while done < rounds + _WARMUP and (done < 5 + _WARMUP or time.perf_counter() - started < seconds):
            progress("profile nodes", done, rounds + _WARMUP)
            for name in sessions if done % 2 else reversed(sessions):
                sessions[name].run(feeds[name])
            done += 1
        return {name: _nodes(session.events(), done) for name, session in sessions.items()}


def _nodes(events: list[tuple[str, str, float]], runs: int) -> list[NodeTime]:
    """The nodes of a profile of ``runs`` runs; the first ones, in order of time, do not count."""
    found: dict[tuple[str, str], list[float]] = {}
    for name, op, ms in events:
        found.setdefault((name, op), []).append(ms)
    nodes = []
    for (name, op), times in found.items():
        calls = len(times) / runs  # more than one in a loop
        kept = times[round(calls * _WARMUP) :] or times
        nodes.append(NodeTime(name, op, typical(kept) * calls))
    return nodes


def typical(times: list[float]) -> float:
    """The mean of the faster half."""
    return statistics.mean(sorted(times)[: (len(times) + 1) // 2])
