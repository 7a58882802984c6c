"""Results come in order whatever the number of workers, and survive the death of one."""

from __future__ import annotations

import sys
from functools import partial

import pytest

from channelfold.runtime.errors import ChannelfoldError, DependencyError, UsageError
from channelfold.runtime.io.workers import each
from channelfold.tests.tasks import dies, dies_once, fails, square


@pytest.mark.parametrize("workers", [1, 2])
def test_results_are_in_the_order_of_the_tasks(workers):
    assert list(each(square, range(6), workers)) == [0, 1, 4, 9, 16, 25]


def test_a_killed_worker_costs_its_task_alone(tmp_path):
    assert list(each(partial(dies_once, tmp_path), range(5), 2)) == [0, 1, 4, 9, 16]
    assert (tmp_path / "died").exists()


def test_workers_that_die_again_and_again_are_given_up():
    with pytest.raises(ChannelfoldError, match="again and again"):
        list(each(dies, range(2), 2))


def test_the_error_of_a_task_is_that_of_the_caller():
    with pytest.raises(ValueError, match="no 0"):
        list(each(fails, range(2), 2))


def test_a_cluster_without_dask_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(DependencyError, match="pip install distributed"):
        list(each(square, range(2), cluster="tcp://127.0.0.1:1"))


@pytest.fixture(scope="module")
def cluster():
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(2, processes=True, threads_per_worker=1, dashboard_address=None) as cluster:
        yield cluster.scheduler_address


def test_a_cluster_gives_the_same_results(cluster):
    assert list(each(square, range(6), cluster=cluster)) == [0, 1, 4, 9, 16, 25]


def test_a_killed_worker_of_a_cluster_costs_its_task_alone(cluster, tmp_path):
    assert list(each(partial(dies_once, tmp_path), range(5), cluster=cluster)) == [0, 1, 4, 9, 16]
    assert (tmp_path / "died").exists()


def test_an_address_without_a_scheduler_is_refused():
    pytest.importorskip("distributed")
    with pytest.raises(UsageError, match="There is no cluster"):
        list(each(square, range(2), cluster="127.0.0.1"))
