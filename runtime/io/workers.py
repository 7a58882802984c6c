"""Tasks in several processes, through the executors of ``concurrent.futures``.

A task is a function of a module and one argument, both small: what is large lies in files that the argument names. The
results come in the order of the tasks, and do not depend on the number of workers. A worker that is killed costs its
task, which another worker does again.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor
from typing import TypeVar

from channelfold.runtime.errors import ChannelfoldError, DependencyError, UsageError

A = TypeVar("A")
B = TypeVar("B")

_SECONDS = 10  # to reach a scheduler
_DEATHS = 3  # of a whole pool, after which the fault is not that of the machine


def each(function: Callable[[A], B], tasks: Sequence[A], workers: int = 1, cluster: str = "") -> Iterator[B]:
    """The results of a function for every task, in order.

    ``workers``: the number of processes; 1 is this process. ``cluster``: the address of a Dask scheduler in their
    place, whose workers see the temporary folder of this machine under the same path, and which does the tasks of lost
    workers again by itself. Raises ChannelfoldError where workers die again and again.
    """
    if workers <= 1 and not cluster:
        yield from map(function, tasks)
        return
    done = 0
    for _ in range(_DEATHS):
        with _executor(workers, cluster) as executor:
            futures = [executor.submit(function, task) for task in tasks[done:]]
            try:
                for future in futures:
                    result = future.result()
                    done += 1
                    yield result
                return
            except BrokenExecutor:
                pass  # what is not done is done again
            finally:
                for future in futures:
                    future.cancel()
    raise ChannelfoldError("Worker processes were killed again and again", "Is there enough memory? Take fewer workers")


@contextlib.contextmanager
def _executor(workers: int, cluster: str) -> Iterator[Executor]:
    if not cluster:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as executor:
            yield executor
        return
    try:
        from distributed import Client  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise DependencyError(f"A cluster needs Dask ({error})", "Run: pip install distributed") from None
    try:
        client = Client(cluster, timeout=_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"There is no cluster at {cluster!r} ({error})", "Give the address of a scheduler") from None
    with client:
        yield client.get_executor()
