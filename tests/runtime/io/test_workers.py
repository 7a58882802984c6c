"""Results come in order whatever the number of workers, and survive the death of one."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pytest

from channelfold.runtime.errors import ChannelfoldError, DependencyError, UsageError
from channelfold.runtime.io.workers import Pool
from channelfold.tests.tasks import dies, dies_once, fails, process, square


def done(function: Callable[[int], int], tasks: Iterable[int], workers: int = 1, cluster: str = "") -> list[int]:
    with Pool(workers, cluster) as pool:
        return list(pool.each(function, list(tasks)))


@pytest.mark.parametrize("workers", [1, 2])
def test_results_are_in_the_order_of_the_tasks(workers):
    assert done(square, range(6), workers) == [0, 1, 4, 9, 16, 25]


def test_a_killed_worker_costs_its_task_alone(tmp_path):
    assert done(partial(dies_once, tmp_path), range(5), 2) == [0, 1, 4, 9, 16]
    assert (tmp_path / "died").exists()


def test_workers_stay_for_the_tasks_that_follow():
    with Pool(2) as pool:
        pool.prepare(square)
        used = {*pool.each(process, range(8)), *pool.each(process, range(8))}
        assert len(used - {os.getpid()}) in (1, 2)
    assert not any(child.pid in used for child in multiprocessing.active_children())


STARTS = """
import os, time
from channelfold.runtime.io.workers import Pool

def process(_):
    return os.getpid()

if __name__ == "__main__":
    pool = Pool(2)
    print(*set(pool.each(process, range(4))), flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_workers_end_with_the_process_that_has_started_them(tmp_path):
    """It is killed while they have nothing to do."""
    (tmp_path / "starts.py").write_text(STARTS)
    with subprocess.Popen([sys.executable, tmp_path / "starts.py"], stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        workers = [int(word) for word in started.stdout.readline().split()]
        assert workers
        assert all(map(lives, workers))
        started.kill()
    until = time.monotonic() + 30
    while any(map(lives, workers)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(lives, workers))


def lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_one_task_needs_no_worker():
    with Pool(2) as pool:
        assert list(pool.each(process, [0])) == [os.getpid()]


def test_workers_that_die_again_and_again_are_given_up():
    with pytest.raises(ChannelfoldError, match="again and again"):
        done(dies, range(2), 2)


def test_the_error_of_a_task_is_that_of_the_caller():
    with pytest.raises(ValueError, match="no 0"):
        done(fails, range(2), 2)


def test_a_cluster_without_dask_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(DependencyError, match="pip install distributed"):
        done(square, range(2), cluster="tcp://127.0.0.1:1")


@pytest.fixture(scope="module")
def cluster():
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(2, processes=True, threads_per_worker=1, dashboard_address=None) as cluster:
        yield cluster.scheduler_address


def test_a_cluster_gives_the_same_results(cluster):
    assert done(square, range(6), cluster=cluster) == [0, 1, 4, 9, 16, 25]


def test_a_killed_worker_of_a_cluster_costs_its_task_alone(cluster, tmp_path):
    assert done(partial(dies_once, tmp_path), range(5), cluster=cluster) == [0, 1, 4, 9, 16]
    assert (tmp_path / "died").exists()


def test_an_address_without_a_scheduler_is_refused():
    pytest.importorskip("distributed")
    with pytest.raises(UsageError, match="There is no cluster"):
        done(square, range(2), cluster="127.0.0.1")
