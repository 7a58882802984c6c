"""What is said of FFNs: channels that are idle, dead or nearly linear, and what folding them saves and costs."""

from __future__ import annotations

import numpy as np
import pytest

from channelfold.runtime.data.sources import open_data
from channelfold.runtime.io.facts import required_inputs
from channelfold.runtime.jobs.inspect_ffns import SHARES, idle
from channelfold.tests.graphs import build, constants, random

TOKENS = "(float[N,5,4] x) => (float[N,5,4] y)"
BODY = "p = MatMul(x, W1)\n h = Add(p, b1)\n a = Relu(h)\n w = Where(M, a, h)\n y = MatMul(w, W2)"
GIVEN = {"W1": (4, 8), "b1": 8, "W2": (8, 4)}


def ffn(body: str = BODY, **given):
    return build(TOKENS, body, kind="float", **{**GIVEN, "M": np.arange(8) < 6, **given})


def samples(graph, count: int = 40):
    return open_data(
        [{"x": random((1, 5, 4), f"x{i}").astype(np.float32)} for i in range(count)], required_inputs(graph)
    )


def test_idle_and_dead_channels():
    weight = random((8, 4), "W2")
    weight[[1, 7]] = 0
    (entry,) = idle(ffn(W2=weight))
    assert entry == {
        "node": "MatMul_4", "inner": ["MatMul_0"], "hidden": 8, "idle": 1, "dead": 2, "weights": 64, "folded": 64,
    }  # fmt: skip


def test_channels_that_are_nearly_linear():
    """Channels 0 and 1 are never cut off by Relu, channel 2 always is; the others are now and then."""
    graph = ffn(b1=np.array([50.0, 50.0, -50.0, 0, 0, 0, 0, 0]))
    (entry,) = idle(graph, samples(graph))
    assert (entry["idle"], entry["dead"], entry["linear"]) == (2, 0, 3)


def test_what_idle_channels_would_cost():
    """The error of single channels is what is measured with numpy; that of several is their sum."""
    graph = ffn("h = MatMul(x, W1)\n a = Relu(h)\n y = MatMul(a, W2)")
    data, values = samples(graph), constants(graph)
    (entry,) = idle(graph, data)
    x = np.concatenate([feed["x"].reshape(-1, 4) for feed in data]).astype(np.float64)
    h = x @ values["W1"]
    a = np.maximum(h, 0)
    costs = []
    for j in range(8):
        basis = np.stack([h[:, j], np.ones(len(h))], axis=1)
        rest = a[:, j] - basis @ np.linalg.lstsq(basis, a[:, j], rcond=None)[0]
        costs.append(rest.var() * np.square(values["W2"][j].astype(np.float64)).sum())
    power = (a @ values["W2"]).var(axis=0).sum()
    expected = [10 * np.log10(power / sum(sorted(costs)[: int(8 * share)])) for share in SHARES]
    assert [share["snr"] for share in entry["shares"]] == pytest.approx(expected, rel=1e-4)
    assert [share["weights"] for share in entry["shares"]] == [6 * 8 + 16, 4 * 8 + 16, 2 * 8 + 16]


def test_a_gated_ffn():
    body = "g = MatMul(x, G)\n u = MatMul(x, W1)\n s = Sigmoid(g)\n c = Mul(g, s)\n w = Mul(c, u)\n y = MatMul(w, W2)"
    graph = ffn(body, G=(4, 8))
    (entry,) = idle(graph, samples(graph))
    assert (entry["inner"], entry["weights"], entry["linear"]) == (["MatMul_0", "MatMul_1"], 96, 0)
    assert entry["shares"][1]["weights"] == 4 * 12 + 16


def test_what_is_no_ffn():
    assert idle(ffn("h = MatMul(x, W1)\n y = MatMul(h, W2)")) == []
    assert idle(ffn("h = MatMul(x, W1)\n s = Softmax(h)\n y = MatMul(s, W2)")) == []
