"""Channels repeated and merged: the graph that comes back is the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from channelfold.passes.base import Refused
from channelfold.passes.channels.renumber import renumber
from channelfold.passes.channels.widths import read_by
from channelfold.passes.layers.linear import linears
from channelfold.runtime.io.shapes import measured_shapes
from channelfold.tests.channel_cuts import groups_of, regions_of
from channelfold.tests.graphs import assert_same, build, constants, feeds, listing, run

TOKENS = "(float[N,5,8] x) => (float[] y)"
BODIES = {
    "gated": ("u = MatMul(x, U)\n g = MatMul(x, G)\n s = Sigmoid(g)\n h = Mul(u, s)\n y = MatMul(h, D)", {}),
    "fused": (
        "w = MatMul(x, W)\n u, g = Split<axis=-1>(w, k)\n s = Sigmoid(g)\n h = Mul(u, s)\n y = MatMul(h, D)",
        {"k": np.array([12, 12]), "W": (8, 24)},
    ),
    "two halves": ("u = MatMul(x, H)\n g = MatMul(x, H2)\n h = Concat<axis=-1>(u, g)\n y = MatMul(h, D)", {}),
    "reshaped": ("u = MatMul(x, U)\n r = Relu(u)\n h = Reshape(r, n)\n y = MatMul(h, D)", {"n": np.array([-1, 12])}),
    "picked": ("u = MatMul(x, U)\n h = Gather<axis=-1>(u, p)\n y = MatMul(h, D)", {"p": np.array([3, *range(1, 12)])}),
}
WEIGHTS = {"U": (8, 12), "G": (8, 12), "H": (8, 6), "H2": (8, 6), "D": (12, 4)}


def gated(name):
    body, more = BODIES[name]
    return build(TOKENS, body, **({n: v for n, v in WEIGHTS.items() if f"{n})" in body} | more))


def width_of(graph, shapes):
    return read_by(graph, linears(graph)[-1], shapes)


@given(st.sampled_from(sorted(BODIES)), st.lists(st.integers(1, 3), min_size=12, max_size=12))
def test_what_is_split_and_merged_is_the_same_graph(name, counts):
    graph, counts = gated(name), np.array(counts)
    text, old, feed = listing(graph), constants(graph), feeds(graph)
    before, shapes = run(graph, feed), measured_shapes(graph, feed)

    def divided(columns):
        return columns / counts[:, None]

    def summed(columns):
        new = columns.copy()
        new[first] = np.add.reduceat(columns, first)
        return new

    width_of(graph, shapes).blended(None, divided, shapes).repeat(counts, shapes)
    assert_same(before, run(graph, feed))
    measured = measured_shapes(graph, feed)
    assert all(shapes[tensor.name] == measured[tensor.name] for node in graph.nodes for tensor in node.outputs)
    assert shapes["h"][-1] == counts.sum()
    first = np.cumsum(counts) - counts
    stays = np.isin(np.arange(counts.sum()), first)
    width_of(graph, shapes).blended(None, summed, shapes).repeat(stays, shapes)
    assert listing(graph) == text
    for key, values in constants(graph).items():
        np.testing.assert_allclose(values, old[key], rtol=1e-15)


def test_what_cannot_be_told_is_refused_with_nothing_changed():
    body = "u = MatMul(x, U)\n a = Relu(u)\n h = Reshape(a, n)\n t = Transpose<perm=[0,1,3,2]>(h)\n y = MatMul(t, E)"
    graph = build(TOKENS, body, U=(8, 12), n=np.array([0, 5, 4, 3]), E=(4, 2))
    text, old = listing(graph), constants(graph)
    (region,) = (r for r in regions_of(groups_of(graph)) if r.free.any())
    with pytest.raises(Refused, match="Reshape is in between"):
        renumber(graph, [(region, np.arange(region.size) + 1)])
    (fixed,) = (r for r in regions_of(groups_of(graph)) if not r.free.any())
    with pytest.raises(Refused, match="it is the output 'y' of the model"):
        renumber(graph, [(fixed, np.zeros(fixed.size, bool))])
    assert listing(graph) == text
    assert all(np.array_equal(values, old[name]) for name, values in constants(graph).items())
