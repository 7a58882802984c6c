"""Pruning to a share of the measured time, with times that are made up from what the models hold."""

from __future__ import annotations

import math
from pathlib import Path

import onnx
import pytest

from channelfold.passes.base import Context
from channelfold.passes.prune import Prune
from channelfold.passes.prune import latency as latency_budget
from channelfold.runtime.data.probes import random_data
from channelfold.runtime.errors import DataError, UsageError
from channelfold.runtime.io.files import check, session
from channelfold.tests.graphs import build, feeds, run


def network():
    return build(
        "(float[N,3,8,8] x) => (float[] y)",
        """
        a = Conv<pads=[1,1,1,1]>(x, A, u)
        r = Relu(a)
        b = Conv<pads=[1,1,1,1]>(r, B, v)
        s = Relu(b)
        y = Conv(s, C, w)
        """,
        kind="float", A=(32, 3, 3, 3), u=32, B=(40, 32, 3, 3), v=40, C=(4, 40, 1, 1), w=4,
    )  # fmt: skip


def channels(path: Path) -> tuple[int, int]:
    model = onnx.load(path).graph
    sizes = {w.name: w.dims[0] for w in model.initializer}
    a, b, _ = (sizes[node.input[1]] for node in model.node if node.op_type == "Conv")
    return a, b


def takes(a: int, b: int) -> float:
    """Milliseconds: the second layer is worth most, and sizes count in steps of 16."""
    a, b = (16 * math.ceil(n / 16) for n in (a, b))
    return 1 + 3 * a / 32 + 16 * a / 32 * b / 48 + b / 48


@pytest.fixture
def measured(monkeypatch) -> list[tuple[int, int]]:
    """The channels of the models that are timed beside the uncut one."""
    asked = []

    def fake(uncut: Path, cut: Path, feed, rounds, seconds) -> float:
        assert [v.shape for v in feed.values()] == [(1, 3, 8, 8)]
        assert channels(uncut) == (32, 40)
        asked.append(channels(cut))
        return takes(*channels(cut)) / takes(32, 40)

    monkeypatch.setattr(latency_budget, "time_share", fake)
    return asked


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 1.0])
def test_the_share_is_kept_by_measure(measured, share):
    graph = network()
    feed = feeds(graph)
    shape = run(graph, feed)["y"].shape
    outcome = Prune(keep_latency=share).apply(graph, Context())
    check(graph)
    assert run(graph, feed)["y"].shape == shape
    a, b = (g["kept"] for g in outcome.facts["groups"])
    assert takes(a, b) <= share * takes(32, 40)
    assert outcome.facts["latency"]["kept"] == pytest.approx(takes(a, b) / takes(32, 40))
    assert measured[:7] == [(8, 40), (16, 40), (24, 40), (32, 8), (32, 16), (32, 24), (32, 32)]
    assert (a, b) in measured[7:]


def test_sizes_that_no_step_ends_at(measured):
    """Times are measured at multiples of 8 channels; 33 to 39 of 40 cost what 40 do."""
    graph = network()
    outcome = Prune(keep_latency=0.6, align=1, importance="l2").apply(graph, Context())
    a, b = (g["kept"] for g in outcome.facts["groups"])
    assert takes(a, b) <= 0.6 * takes(32, 40)
    assert all(n % 8 == 0 for n in (a, b))  # what lies between costs as much and is worth less


def test_a_calibration_sample_is_what_is_timed(measured):
    graph = network()
    data = random_data(session(graph).inputs, 4)
    assert Prune(keep_latency=0.5).apply(graph, Context(calibration=data)).changed


def test_too_little_time_is_refused(measured):
    with pytest.raises(UsageError, match=r"A budget of 0\.05 cannot be reached: the least possible is 0\.\d+"):
        Prune(keep_latency=0.05).apply(network(), Context())


def test_options_that_contradict_each_other():
    with pytest.raises(UsageError, match="found 'keep_macs' and 'keep_latency'"):
        Prune(keep_latency=0.5, keep_macs=0.5)
    with pytest.raises(
        UsageError, match=r"'keep_latency' takes the knapsack, 'allocation' is 'uniform'\. Take 'auto' or"
    ):
        Prune(keep_latency=0.5, allocation="uniform")
    with pytest.raises(UsageError, match="'keep_latency' is 0"):
        Prune(keep_latency=0.0)


def test_a_model_that_runs_on_nothing_random_needs_data():
    graph = build("(float[N,3] x, float[M,4] z) => (float[] y)", "y = Gemm(x, z)", kind="float")
    with pytest.raises(DataError, match="runs on no random input, and so cannot be timed"):
        latency_budget.a_feed(graph, Context())
