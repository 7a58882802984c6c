"""Tasks for workers, in a module that other processes can import."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path

import numpy as np

from channelfold.runtime.io.session import Session


def square(number: int) -> int:
    return number * number


def process(_: int) -> int:
    return os.getpid()


def dies_once(folder: Path, number: int) -> int:
    if number == 2 and not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def dies(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def fails(number: int) -> int:
    raise ValueError(f"no {number}")


def memory_around_sessions(model: Path) -> list[tuple[float, float, float]]:
    """MB of this process's own memory before, during and after each of three sessions; small blocks come between."""
    np.ones(1 << 22)  # the first large block that is freed
    before, kept, found = _own_memory(), [], []
    for _ in range(3):
        session = Session(model)
        kept += [np.ones(1 << 10) for _ in range(100)]
        during = _own_memory()
        del session
        found.append((before, during, _own_memory()))
    return found


def _own_memory() -> float:
    gc.collect()
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024
