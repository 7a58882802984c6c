"""What a model costs in milliseconds at each size of one of its groups: measured, not modelled.

Measured times go down in steps, where a size fills the vector registers and where it does not, and a smaller layer can
even be slower. A knapsack over a table of them needs no model of that: a size that costs more than a larger one is
dominated, and never chosen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from channelfold.passes.base import UsageError, no_progress
from channelfold.runtime.bench import latencies
from channelfold.runtime.calibration import random_data
from channelfold.runtime.ort import Session

STEP = 8  # sizes between the measured ones cost what the next multiple of this does


def measured(
    build: Callable[[int], str | Path | bytes],
    sizes: Sequence[int],
    *,
    threads: int | None = None,
    rounds: int = 30,
    seconds: float = 10.0,
    progress: Callable[[str, int, int], None] = no_progress,
) -> dict[int, float]:
    """Milliseconds of one run of ``build(size)`` in ONNX Runtime on the CPU, by size: medians of alternating runs.

    ``build`` gives the path of a model or a serialized one. All of them are open at once. Open dimensions of inputs are
    filled as ``random_data`` does. Raises ModelError where ONNX Runtime refuses one.
    """
    runs = {}
    for size in sizes:
        session = Session(build(size), threads=threads)
        runs[str(size)] = functools.partial(session.run, next(iter(random_data(session.inputs, 1))))
    return {int(t.name): t.ms for t in latencies(runs, rounds=rounds, seconds=seconds, progress=progress)}


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
