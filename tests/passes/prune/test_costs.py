"""Costs of channel groups against those of the graphs that the cuts leave."""

from __future__ import annotations

import numpy as np
import pytest

from channelfold.passes.channels.cut import cut
from channelfold.passes.prune.allocation import Costs
from channelfold.passes.prune.allocation import Group as Size
from channelfold.passes.prune.costs import GroupCosts, Keeps
from channelfold.runtime.io.shapes import measured_shapes
from channelfold.runtime.jobs.inspect_model import costs
from channelfold.tests.channel_cuts import groups_of, random_keep, regions_of
from channelfold.tests.graphs import build, feeds

CASES = {
    "convolutions": (
        "(float[1,3,9,9] x) => (float[] y)",
        """
        a = Conv<strides=[2,2]>(x, A, a0)
        d = Conv<group=16, pads=[1,1,1,1]>(a, D, d0)
        n = BatchNormalization(d, g, b, m, v)
        p = PRelu(n, s)
        y = Conv(p, B)
        """,
        {"A": (16, 3, 3, 3), "a0": 16, "D": (16, 1, 3, 3), "d0": 16, "g": 16, "b": 16, "m": 16, "v": np.ones(16),
         "s": (16, 1, 1), "B": (5, 16, 1, 1)},
    ),
    "a shortcut": (
        "(float[1,3,6,6] x) => (float[] y)",
        "a = Conv(x, A) r = Relu(a) b = Conv(r, B) s = Add(a, b) c = ConvTranspose<strides=[2,2]>(s, C) y = Conv(c, D)",
        {"A": (8, 3, 1, 1), "B": (8, 8, 1, 1), "C": (8, 6, 2, 2), "D": (2, 6, 1, 1)},
    ),
    "branches and a flatten": (
        "(float[1,3,4,4] x) => (float[] y)",
        "a = Conv(x, A) b = Conv(x, B) c = Concat<axis=1>(a, b) f = Flatten(c) y = Gemm(f, C, c0)",
        {"A": (8, 3, 1, 1), "B": (6, 3, 1, 1), "C": (224, 5), "c0": 5},
    ),
    "attention": (
        "(float[1,6,8] x) => (float[] y)",
        """
        q = MatMul(x, Q) k = MatMul(x, K) v = MatMul(x, V)
        q1 = Reshape(q, s) k1 = Reshape(k, s) v1 = Reshape(v, s)
        q2 = Transpose<perm=[0,2,1,3]>(q1) k2 = Transpose<perm=[0,2,3,1]>(k1) v2 = Transpose<perm=[0,2,1,3]>(v1)
        t = MatMul(q2, k2) p = Softmax(t) o = MatMul(p, v2)
        o1 = Transpose<perm=[0,2,1,3]>(o) o2 = Reshape(o1, u) y = MatMul(o2, W)
        """,
        {"Q": (8, 12), "K": (8, 12), "V": (8, 12), "W": (12, 8), "s": np.array([0, 6, 3, 4]),
         "u": np.array([0, 6, -1])},
    ),
}  # fmt: skip


def make(case: str):
    signature, body, constants = CASES[case]
    return build(signature, body, kind="float", **constants)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["macs", "parameters"])
def test_costs_are_those_of_the_cut_graph(case, kind):
    for ratio in (0.0, 0.3, 0.6, 1.0):
        graph = make(case)
        groups = groups_of(graph)
        found = GroupCosts(graph, groups, measured_shapes(graph, feeds(graph)))
        rng = np.random.default_rng(0)
        keeps: Keeps = {id(r): (r, random_keep(r, rng, ratio)) for r in regions_of(groups)}
        assert found.exact(kind, {}) == costs(graph)[kind]
        exact = found.exact(kind, keeps)
        cut(graph, list(keeps.values()))
        assert exact == pytest.approx(costs(graph)[kind], rel=1e-12)


@pytest.mark.parametrize("case", ["convolutions", "a shortcut", "branches and a flatten"])
@pytest.mark.parametrize("kind", ["macs", "parameters"])
def test_terms_are_the_same_costs_by_units(case, kind):
    """Where all units of a group are alike."""
    graph = make(case)
    groups = groups_of(graph)
    found = GroupCosts(graph, groups, measured_shapes(graph, feeds(graph)))
    total = Costs([Size(g.name, g.units) for g in groups], found.terms(kind))
    rng = np.random.default_rng(0)
    for _ in range(5):
        keeps: Keeps = {id(r): (r, random_keep(r, rng, 0.4)) for r in regions_of(groups)}
        kept = [int(keeps[id(g.region)][1][g.labels - 1].sum()) for g in groups]
        assert total(kept) == pytest.approx(found.exact(kind, keeps), rel=1e-12)


def test_a_constant_that_two_nodes_share_counts_once():
    graph = build(
        "(float[2,8] x) => (float[] y)",
        "a = MatMul(x, A) r = Relu(a) b = MatMul(r, B) s = Relu(b) c = MatMul(s, B) y = Add(b, c)",
        kind="float", A=(8, 16), B=(16, 16),
    )  # fmt: skip
    found = GroupCosts(graph, groups_of(graph), measured_shapes(graph, feeds(graph)))
    assert found.exact("parameters", {}) == 8 * 16 + 16 * 16
    assert found.exact("macs", {}) == 2 * (8 * 16 + 2 * 16 * 16)
