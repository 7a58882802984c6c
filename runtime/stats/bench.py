"""Latencies of models in alternating runs, so that a change of the machine's speed affects all models alike.

One round runs every model once. Every other round goes in the opposite order, so that no model always runs on a cache
that its neighbour has warmed. The figure is the median over the rounds: the few rounds in which the operating system
interferes do not move a median.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from channelfold.runtime.errors import UsageError, no_progress

_SIGMA = 1.96  # of a two-sided interval of 95 %


@dataclass(frozen=True)
class Latency:
    """The time of one run of ``name`` in milliseconds: ``ms`` the median, ``low`` and ``high`` the middle half.

    ``times``: of every round.
    """

    name: str
    ms: float
    low: float
    high: float
    times: tuple[float, ...]

    @property
    def runs(self) -> int:
        return len(self.times)


@dataclass(frozen=True)
class Ratio:
    """How many times as long one model takes as another; with a confidence of 95 % between ``low`` and ``high``."""

    value: float
    low: float
    high: float


def ratio(found: Latency, base: Latency) -> Ratio:
    """The median of the ratios of two times in one round, and the order statistics that enclose such medians."""
    ratios = sorted(one / other for one, other in zip(found.times, base.times, strict=True))
    last, half = len(ratios) - 1, _SIGMA * math.sqrt(len(ratios)) / 2
    low, high = max(0, math.floor(last / 2 - half)), min(last, math.ceil(last / 2 + half))
    return Ratio(statistics.median(ratios), ratios[low], ratios[high])


def latencies(
    runs: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 50,
    warmup: int = 2,
    seconds: float = 10.0,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[str, int, int], None] = no_progress,
) -> list[Latency]:
    """Times the given calls in alternating rounds, after ``warmup`` rounds that do not count.

    A call that returns a float has taken its own time, in seconds: an engine runs in another process.
    Stops after ``rounds`` rounds, or after ``seconds`` once there are at least 3. Raises UsageError for rounds < 1.
    """
    if rounds < 1:
        raise UsageError(f"{rounds} rounds were asked for", "Ask for at least 1")
    for _ in range(warmup):
        for run in runs.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    order, started = list(runs), clock()
    for index in range(rounds):
        progress("measure latency", index, rounds)
        for name in order:
            before = clock()
            own = runs[name]()
            times[name].append((own if isinstance(own, float) else clock() - before) * 1e3)
        order.reverse()
        if index >= 2 and clock() - started > seconds:
            break
    progress("measure latency", rounds, rounds)
    return [_latency(name, values) for name, values in times.items()]


def _latency(name: str, values: list[float]) -> Latency:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return Latency(name, median, low, high, tuple(values))
