"""Channels in another order, repeated and merged: what stays the same function, on random networks and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from channelfold.passes.base import Refused
from channelfold.passes.channels.renumber import Numbering, renumber
from channelfold.passes.channels.widths import read_by
from channelfold.passes.layers.linear import linears
from channelfold.runtime.io.files import check, import_model, infer_shapes, session
from channelfold.runtime.io.shapes import measured_shapes
from channelfold.tests.channel_cuts import groups_of, regions_of
from channelfold.tests.channel_strategies import networks
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


def floats(graph) -> set[bytes]:
    """The values of its weights; a constant that two nodes share may have become two."""
    return {values.tobytes() for values in constants(graph).values() if values.dtype == np.float32}


def exchangeable(region, rng: np.random.Generator) -> np.ndarray:
    """A permutation of the labels that may move, among those that stand once along the same axes."""
    along = [labels for _, labels in region.axes.values()] + [part.labels for part in region.parts]
    times = np.stack([np.bincount(labels, minlength=region.size + 1)[1:] for labels in along])
    source = np.arange(1, region.size + 1)
    kinds = np.unique(times, axis=1, return_inverse=True)[1].reshape(-1)
    for kind in range(kinds.max() + 1):
        members = np.flatnonzero((kinds == kind) & region.free & (times <= 1).all(axis=0))
        source[members] = rng.permutation(members) + 1
    return source


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(networks(), st.integers(0, 2**16))
def test_another_order_is_the_same_function(model, seed):
    graph = import_model(model)
    infer_shapes(graph)
    feed, rng = feeds(graph), np.random.default_rng(seed)
    before = session(graph, optimize=False).run(feed)
    weights, orders = floats(graph), []
    for back in (False, True):
        regions = regions_of(groups_of(graph))
        orders = [np.argsort(order) + 1 for order in orders] if back else [exchangeable(r, rng) for r in regions]
        renumber(graph, [(region, Numbering.ordered(order)) for region, order in zip(regions, orders, strict=True)])
        check(graph)
        infer_shapes(graph)
        assert_same(before, session(graph, optimize=False).run(feed), 1e-5)
    assert floats(graph) == weights


@given(st.sampled_from(sorted(BODIES.keys() - {"fused"})), st.permutations(range(1, 13)))
def test_an_order_and_its_inverse_leave_the_graph(name, order):
    graph = gated(name)
    text, old = listing(graph), constants(graph)
    shapes = measured_shapes(graph, feeds(graph))
    order = np.array(order)
    if name == "two halves":
        order = np.concatenate([order[order <= 6], order[order > 6]])
    for source in (order, np.argsort(order) + 1):
        renumber(graph, [(width_of(graph, shapes).region, Numbering.ordered(source))], shapes=shapes)
    assert listing(graph) == text
    assert all(np.array_equal(values, old[key]) for key, values in constants(graph).items())


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
        renumber(graph, [(region, Numbering.repeating(np.arange(region.size) + 1))])
    with pytest.raises(Refused, match="its channels stand in groups or blocks"):
        renumber(graph, [(region, Numbering.ordered(np.arange(region.size, 0, -1)))])
    (fixed,) = (r for r in regions_of(groups_of(graph)) if not r.free.any())
    with pytest.raises(Refused, match="it is the output 'y' of the model"):
        renumber(graph, [(fixed, Numbering.ordered(np.arange(fixed.size, 0, -1)))])
    assert listing(graph) == text
    assert all(np.array_equal(values, old[name]) for name, values in constants(graph).items())
