"""Values of tensors segment by segment: those of a whole run, after changes that lie behind them too."""

from __future__ import annotations

import numpy as np
import pytest

from channelfold.runtime.errors import ModelError
from channelfold.runtime.io import weights
from channelfold.runtime.io.files import session
from channelfold.runtime.stats.segments import Segments
from channelfold.tests.graphs import build, data_from, samples

BODY = """
    a = MatMul(x, A)
    r = Relu(a)
    b = MatMul(r, B)
    s = Add(b, x)
    t = Shape(s)
    c = MatMul(s, C)
    u = Reshape(c, t)
    p = Add(u, r)
    y = MatMul(p, D)
"""


def network():
    return build("(float[N,8] x) => (float[] y)", BODY, kind="float", A=(8, 8), B=(8, 8), C=(8, 8), D=(8, 3))


def test_the_values_are_those_of_a_whole_run():
    graph, wanted = network(), ["p", "x", "s", "r"]
    data = samples(graph, 3, size=lambda index: 2 + index)
    found = Segments(graph.copy(), wanted, data)
    assert found.order == ["x", "r", "s", "p"]
    whole = session(graph, wanted, optimize=False)
    for name in found.order:
        for values, feed in zip(found.values(name), data, strict=True):
            assert np.allclose(values, whole.run(feed)[name], rtol=1e-5, atol=1e-6)


def test_what_is_changed_in_between_counts_from_there_on():
    graph = network()
    data = samples(graph, 2)
    found = Segments(graph, ["r", "s", "p"], data)
    before = [values.copy() for values in found.values("r")]
    graph.nodes[2].inputs[1].values = np.zeros((8, 8), np.float32)  # B
    for values, feed in zip(found.values("s"), data, strict=True):
        assert np.array_equal(values, feed["x"])
    assert all(len(sample) <= 3 for sample in found.samples)
    for values, old, feed in zip(found.values("p"), before, data, strict=True):
        assert np.allclose(values, old + feed["x"] @ graph.nodes[5].inputs[1].values, rtol=1e-5, atol=1e-5)


def test_bodies_read_what_was_kept():
    text = "q = Relu(x) c = If(w)<then_branch=g1 () => (float[N,8] z) {z = MatMul(q, A)}, " \
           "else_branch=g2 () => (float[N,8] z) {z = Neg(q)}> y = MatMul(c, B)"  # fmt: skip
    graph = build("(float[N,8] x, bool w) => (float[] y)", text, kind="float", A=(8, 8), B=(8, 3))
    feed = {"x": np.ones((2, 8), np.float32), "w": np.array(False)}
    found = Segments(graph, ["q", "c"], data_from(feed))
    assert np.array_equal(next(iter(found.values("q"))), np.ones((2, 8)))
    assert np.array_equal(next(iter(found.values("c"))), -np.ones((2, 8)))


def test_an_input_needs_no_run():
    graph = network()
    data = samples(graph, 2)
    for values, feed in zip(Segments(graph, ["x"], data).values("x"), data, strict=True):
        assert np.array_equal(values, feed["x"])


def test_large_values_lie_on_disk(monkeypatch):
    graph, data = network(), samples(network(), 2, size=lambda index: 3)
    plain = list(Segments(graph.copy(), ["r", "p"], data).values("p"))
    monkeypatch.setattr(weights, "SPILL_LIMIT", 1)
    found = Segments(graph.copy(), ["r", "p"], data)
    for values, other in zip(found.values("p"), plain, strict=True):
        assert np.array_equal(values, other)
        assert not values.flags.writeable  # mapped


def test_a_sequence_is_not_passed_on():
    text = "q = Relu(x) s = SequenceConstruct(q, x) r = Neg(q) c = ConcatFromSequence<axis=0>(s) y = Add(r, c)"
    graph = build("(float[4,8] x) => (float[] y)", text, kind="float")
    found = Segments(graph, ["r", "c"], data_from({"x": np.ones((4, 8), np.float32)}))
    with pytest.raises(ModelError, match="cannot be cut where 's' is read"):
        list(found.values("r"))
