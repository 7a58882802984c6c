"""Tasks in several processes, through the executors of ``concurrent.futures``.

A task is a function of a module and one argument, both small: what is large lies in files that the argument names. The
results come in the order of the tasks, and do not depend on the number of workers. A worker that is killed costs its
task, which another worker does again.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor
from typing import TypeVar

from channelfold.runtime.errors import ChannelfoldError, DependencyError, UsageError
from channelfold.runtime.io.session import onnxruntime

A = TypeVar("A")
B = TypeVar("B")

_SECONDS = 10  # to reach a scheduler
_DEATHS = 3  # of a whole pool, after which the fault is not that of the machine


class Pool:
    """Workers that start when they are needed, and stay for the tasks that follow until the end of a ``with`` block.

    ``workers``: the number of processes; 1 is this process. ``cluster``: the address of a Dask scheduler in their
    place, whose workers see the temporary folder of this machine under the same path, and which does the tasks of lost
    workers again by itself.
    """

    def __init__(self, workers: int = 1, cluster: str = ""):
        self._workers, self._cluster = workers, cluster
        self._open = contextlib.ExitStack()
        self._executor: Executor | None = None

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self._executor = None
        self._open.close()

    def prepare(self, function: Callable[..., object]) -> None:
        """Starts the processes, which load the module of a function while this process does other work."""
        if self._workers > 1 and not self._cluster:
            for _ in range(self._workers):
                self._started().submit(_load, function)

    def each(self, function: Callable[[A], B], tasks: Sequence[A]) -> Iterator[B]:
        """The results of a function for every task, in order. Raises ChannelfoldError where workers die over and over.

        One task alone is done by this process, unless there is a cluster for it.
        """
        if not self._cluster and (self._workers <= 1 or len(tasks) <= 1):
            yield from map(function, tasks)
            return
        done = 0
        for _ in range(_DEATHS):
            futures = []
            try:
                futures += [self._started().submit(function, task) for task in tasks[done:]]
                for future in futures:
                    result = future.result()
                    done += 1
                    yield result
                return
            except BrokenExecutor:
                self.__exit__()  # what is not done is done again, by new workers
            finally:
                for future in futures:
                    future.cancel()
        raise ChannelfoldError(
            "Worker processes were killed again and again", "Is there enough memory? Take fewer workers"
        )

    def _started(self) -> Executor:
        if self._executor is None:
            spawn = multiprocessing.get_context("spawn")
            processes = functools.partial(ProcessPoolExecutor, self._workers, spawn, _end_with_parent)
            new = _of_cluster(self._cluster) if self._cluster else processes()
            self._executor = self._open.enter_context(new)
        return self._executor


def _end_with_parent() -> None:
    """Ends this process when the one that has started it is killed: a pool alone would wait for its tasks for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _load(function: Callable[..., object]) -> None:
    """Is called in a worker, which has loaded the module of the function for it."""
    onnxruntime()


@contextlib.contextmanager
def _of_cluster(address: str) -> Iterator[Executor]:
    try:
        from distributed import Client  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise DependencyError(f"A cluster needs Dask ({error})", "Run: pip install distributed") from None
    try:
        client = Client(address, timeout=_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"There is no cluster at {address!r} ({error})", "Give the address of a scheduler") from None
    with client:
        yield client.get_executor()
