from __future__ import annotations

import pytest

from channelfold.passes.base import UsageError
from channelfold.runtime.graph_io import weightless
from channelfold.runtime.latency_table import looked_up, measured
from channelfold.tests.graphs import build


def model(size: int) -> bytes:
    graph = build("(float[N,8] x) => (float[N,M] y)", "y = MatMul(x, W)", kind="float", W=(8, size))
    return weightless(graph).SerializeToString()


def test_every_size_is_run_and_timed():
    table = measured(model, [8, 16, 24], rounds=3)
    assert list(table) == [8, 16, 24]
    assert all(ms > 0 for ms in table.values())


def test_a_size_between_costs_what_the_next_measured_multiple_of_eight_costs():
    table = {8: 1.0, 12: 1.2, 16: 1.5, 30: 2.0, 32: 2.5}
    assert looked_up(table, 12) == 1.2
    assert looked_up(table, 13) == 1.5
    assert looked_up(table, 17) == 2.5
    assert looked_up(table, 5) == 1.0


def test_a_size_above_all_measured_ones_is_refused():
    with pytest.raises(UsageError, match=r"for 40 channels .* multiple of 8\. Measure .*; measured: 8, 32"):
        looked_up({8: 1.0, 32: 2.0}, 40)
