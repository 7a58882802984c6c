"""Pruning within a tolerance of the outputs, on small networks."""

from __future__ import annotations

import numpy as np
import pytest

from channelfold.passes.base import Context
from channelfold.passes.prune import Prune
from channelfold.runtime.data.probes import random_data
from channelfold.runtime.errors import UsageError
from channelfold.runtime.io.files import check, session
from channelfold.tests.graphs import build, random, run


def context(graph, samples: int = 12) -> Context:
    return Context(calibration=random_data(session(graph).inputs, samples, dims={"N": 256}))


def errors(before, after, ctx: Context) -> dict[str, float]:
    """The squared error of each output on the first samples, relative to its variance."""
    feeds = list(ctx.calibration)[:8]
    old, new = ([run(graph, feed) for feed in feeds] for graph in (before, after))
    stacked = {
        name: [np.stack([o[name] for o in outputs], dtype=np.float64) for outputs in (old, new)] for name in old[0]
    }
    return {name: float(np.square(a - b).sum() / np.square(a - a.mean()).sum()) for name, (a, b) in stacked.items()}


def redundant():
    """24 hidden channels of which 16 are sums of the other 8, and 24 that are all needed alike."""
    basis = random((8, 8), "basis")
    first = np.concatenate([basis, basis @ random((8, 16), "mix")], axis=1)
    return build(
        "(float[N,8] x) => (float[] y)",
        "a = Gemm(x, A) b = Gemm(a, B) h = Tanh(b) y = Gemm(h, C)",
        kind="float", A=first / 3, B=random((24, 24), "B") / 12, C=random((24, 24), "C") / 5,
    )  # fmt: skip


def test_what_is_redundant_goes_and_the_error_is_what_is_reported():
    """What the reconstruction makes up for does not count as an error."""
    kept = {}
    for compensate in ("none", "lstsq"):
        graph = redundant()
        ctx = context(graph)
        outcome = Prune(tolerance=0.01, align=1, compensate=compensate).apply(graph, ctx)
        check(graph)
        found = errors(redundant(), graph, ctx)
        assert found["y"] <= 0.01
        assert found == pytest.approx(outcome.facts["output_error"], rel=1e-3)
        kept[compensate] = next(g["kept"] for g in outcome.facts["groups"])
    assert kept["lstsq"] <= 11
    assert kept["none"] >= 18


def test_more_tolerance_keeps_less():
    macs = []
    for tolerance in (0.001, 0.05, 0.4):
        graph = redundant()
        ctx = context(graph)
        outcome = Prune(tolerance=tolerance, align=1, allocation="greedy").apply(graph, ctx)
        assert errors(redundant(), graph, ctx)["y"] <= tolerance
        macs.append(outcome.facts["macs"]["after"])
    assert macs[0] > macs[1] > macs[2]


def test_every_output_keeps_the_tolerance():
    def two():
        return build(
            "(float[N,8] x) => (float[] y, float[] z)",
            "a = Gemm(x, A) r = Relu(a) y = Gemm(r, B) s = Gemm(r, C) t = Relu(s) z = Gemm(t, D)",
            kind="float", A=random((8, 32), "A"), B=random((32, 4), "B"), C=random((32, 16), "C"), D=random((16, 2)),
        )  # fmt: skip

    graph = two()
    ctx = context(graph)
    outcome = Prune(tolerance=0.1, align=4).apply(graph, ctx)
    found = errors(two(), graph, ctx)
    assert outcome.changed
    assert max(found.values()) <= 0.1
    assert found == pytest.approx(outcome.facts["output_error"], rel=1e-3)


ATTENTION = """
    q = MatMul(x, Q)
    k = MatMul(x, K)
    kt = Transpose<perm=[0,2,1]>(k)
    s = MatMul(q, kt)
    p = Softmax<axis=-1>(s)
    v = MatMul(x, V)
    o = MatMul(p, v)
    y = MatMul(o, W)
"""


def test_sums_without_weights_take_part():
    """Queries meet keys in a MatMul of activations."""
    strength = np.where(np.arange(12) < 6, 0.5, 0.01)

    def attention():
        return build(
            "(float[N,5,8] x) => (float[] y)", ATTENTION,
            kind="float", Q=random((8, 12), "Q") * strength, K=random((8, 12), "K") * strength, V=(8, 8), W=(8, 4),
        )  # fmt: skip

    graph = attention()
    ctx = context(graph)
    outcome = Prune(tolerance=1e-3, align=1).apply(graph, ctx)
    kept = {g["node"]: g["kept"] for g in outcome.facts["groups"]}
    assert 5 <= kept["MatMul_0"] <= 7
    found = errors(attention(), graph, ctx)
    assert found == pytest.approx(outcome.facts["output_error"], rel=1e-2)
    assert found["y"] <= 1e-3


def test_recurrent_cells():
    def cell():
        return build(
            "(float[5,N,6] x) => (float[] y)",
            "l = LSTM<hidden_size=16>(x, W, R) s = Squeeze(l, one) y = MatMul(s, V)",
            kind="float", W=random((1, 64, 6), "W"), R=random((1, 64, 16), "R") / 4, V=random((16, 3), "V"),
            one=np.array([1]),
        )  # fmt: skip

    graph = cell()
    ctx = context(graph)
    outcome = Prune(tolerance=0.2, align=1).apply(graph, ctx)
    assert outcome.changed
    found = errors(cell(), graph, ctx)
    assert found == pytest.approx(outcome.facts["output_error"], rel=1e-3)
    assert found["y"] <= 0.2


def test_a_reconstruction_that_float16_cannot_hold_counts_as_none():
    """Twins whose weights, added up, are more than 65504."""
    half = random((8, 8), "half") / 1000

    def twins():
        return build(
            "(float[N,8] x) => (float[] y)", "a = Gemm(x, A) y = Gemm(a, B)", kind="float16",
            A=np.concatenate([half, half], axis=1), B=np.sign(random((16, 3), "B")) * 5e4,
        )  # fmt: skip

    graph = twins()
    ctx = context(graph)
    outcome = Prune(tolerance=0.3, align=1, importance="l2").apply(graph, ctx)
    assert errors(twins(), graph, ctx) == pytest.approx(outcome.facts["output_error"], rel=0.05)


def test_options_that_do_not_fit():
    with pytest.raises(UsageError, match="'keep_macs' is a budget to share out, 'allocation' is 'greedy'"):
        Prune(keep_macs=0.5, allocation="greedy")
    with pytest.raises(UsageError, match="found 'keep_macs' and 'tolerance'"):
        Prune(keep_macs=0.5, tolerance=0.1)
    with pytest.raises(UsageError, match=r"'tolerance' is 0\. Expected more than 0"):
        Prune(tolerance=0.0)
    with pytest.raises(UsageError, match="cannot judge channels that a norm works on"):
        Prune(tolerance=0.1, width=True)
    with pytest.raises(UsageError, match="needs calibration data"):
        Prune(tolerance=0.1).apply(redundant(), Context())
