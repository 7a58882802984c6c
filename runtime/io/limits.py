"""What a file may make this program compute. A few nodes can ask for any amount of memory or time.

A model may take 3 GB and 16 times its own size for one tensor, and as much while it runs; one sample may take 40 s and
a second for every MB. ``CHANNELFOLD_LIMITS=off`` switches all of that off.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx

from channelfold.runtime.errors import LimitError

INTERVAL = 0.1  # seconds between two looks at the runs
_BYTES, _TIMES = 3 << 30, 16
_VALUES = 1 << 16
_SECONDS, _PER_SECOND = 40, 1 << 20
_HINT = "CHANNELFOLD_LIMITS=off lifts this limit"


def are_on() -> bool:
    return os.environ.get("CHANNELFOLD_LIMITS") != "off"


def nbytes(size: int) -> int:
    """Bytes that a model of ``size`` bytes may take."""
    return _BYTES + _TIMES * size


def seconds(size: int) -> int:
    """Seconds that one sample may take in a model of ``size`` bytes."""
    return _SECONDS + size // _PER_SECOND


def check(tensors: Iterable[tuple[str, int]], size: int) -> None:
    """Raises LimitError where one of the tensors (a name, its bytes) is too large for a model of ``size`` bytes."""
    limit = nbytes(size)
    for name, taken in tensors if are_on() else ():
        if taken > limit:
            raise LimitError(
                f"The tensor {name!r} takes {taken / 1e9:,.1f} GB; the limit for a model of {size / 1e6:,.1f} MB is "
                f"{limit / 1e9:.1f} GB",
                _HINT,
            )


def can_propagate(graph: onnx.GraphProto) -> bool:
    """Whether shape inference may compute with values: a Concat of its own results grows without bound."""
    lengths = {tensor.name: math.prod(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        found = [lengths.get(name, 1) for name in node.input] or [1]
        length = sum(found) if node.op_type == "Concat" else max(found)
        if node.op_type == "Concat" and length > max(_VALUES, *found):
            return False
        lengths |= dict.fromkeys(node.output, length)
    return True


class Watch(threading.Thread):
    """Ends runs of ONNX Runtime that take too much. One thread looks after all runs of this process."""

    def __init__(self) -> None:
        super().__init__(daemon=True, name="channelfold limits")
        self._runs: dict[int, tuple[Any, float, int, int]] = {}
        self._reasons: dict[int, str] = {}

    @contextlib.contextmanager
    def over(self, options: Any, size: int, before: int) -> Iterator[None]:
        """Watches a run with these RunOptions of a model of ``size`` bytes; ``before``: the process' memory before.

        Raises LimitError where the run had to be ended.
        """
        key = id(options)
        self._runs[key] = options, time.monotonic(), size, before
        try:
            yield
        except Exception:
            if key not in self._reasons:
                raise
            options.terminate = False
            raise LimitError(f"The model was stopped: {self._reasons.pop(key)}", _HINT) from None
        finally:
            self._runs.pop(key, None)

    def run(self) -> None:
        while True:
            time.sleep(INTERVAL)
            for key, (options, begin, size, before) in list(self._runs.items()):
                if reason := _too_much(time.monotonic() - begin, memory() - before, size):
                    self._reasons[key] = reason
                    options.terminate = True


def _too_much(taken: float, grown: int, size: int) -> str:
    if not are_on():
        return ""
    if taken > seconds(size):
        return f"one sample may take {seconds(size)} s (a Loop without an end?)"
    return f"it may take {nbytes(size) / 1e9:.1f} GB of memory" if grown > nbytes(size) else ""


def memory() -> int:
    """Bytes of memory that this process takes; 0 where the system does not say so."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def free_memory() -> int:
    """Bytes of memory that the system could still give, as far as it says so, and the limit of its group; else 0."""
    free = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free.append(next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")))
    with contextlib.suppress(OSError, ValueError):  # "max" is no number
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{what}").read_text()) for what in ("max", "current"))
        free.append(limit - used)
    return max(0, min(free, default=0))


_watches: dict[int, Watch] = {}


def watch() -> Watch:
    """The watch of this process; a forked process has one of its own."""
    found = _watches.get(os.getpid())
    if found is None:
        found = _watches[os.getpid()] = Watch()
        found.start()
    return found
