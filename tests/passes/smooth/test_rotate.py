"""Streams and heads turned: the same function, in whatever form; refused where what is not linear reads them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from channelfold.passes.base import Context
from channelfold.passes.quantize import QuantizeWeights
from channelfold.passes.smooth import Rotate
from channelfold.tests.graphs import (
    assert_same,
    build,
    changes,
    constants,
    feeds,
    listing,
    positive,
    random,
    run,
    samples,
)

NORMS = {
    "operator": "{y} = RMSNormalization<axis=-1,epsilon=1e-5>({x}, {g})",
    "pow": """{y}s = Pow({x}, two) {y}m = ReduceMean<keepdims=1>({y}s, last) {y}e = Add({y}m, eps)
              {y}r = Sqrt({y}e) {y}i = Reciprocal({y}r) {y}n = Mul({x}, {y}i) {y} = Mul({g}, {y}n)""",
    "mul": """{y}s = Mul({x}, {x}) {y}m = ReduceMean<keepdims=1>({y}s, last) {y}e = Add({y}m, eps)
              {y}r = Sqrt({y}e) {y}n = Div({x}, {y}r) {y} = Mul({y}n, {g})""",
    "l2": "{y}s = ReduceL2<keepdims=1>({x}, last) {y}e = Add({y}s, eps) {y}n = Div({x}, {y}e) {y} = Mul({y}n, {g})",
}
BODY = """
    e0 = Gather(E, ids)
    z = MatMul(x, Z)
    e = Add(z, e0)
    x0 = Mul(e, root)
    {first}
    q = MatMul(a, Q)
    t = Tanh(q)
    o = MatMul(t, O)
    x1 = Add(x0, o)
    {second}
    u0 = MatMul(b, U)
    u = Add(u0, ub)
    v = Relu(u)
    d0 = MatMul(v, D)
    d = Add(d0, db)
    x2 = Add(d, x1)
    {third}
    y = MatMul(c, H)
"""
WEIGHTS = {
    "E": (20, 24), "ids": np.arange(10), "Z": (8, 24), "Q": (24, 16), "O": (16, 24), "U": (24, 48), "ub": 48,
    "D": (48, 24), "db": 24, "H": (24, 20), "g1": positive(24, "1"), "g2": positive(24, "2"), "g3": positive(24, "3"),
    "eps": np.array(1e-5), "two": np.array(2.0), "root": np.array(4.9), "last": np.array([-1]),
}  # fmt: skip
WHAT = "24 channels of the residual stream rotated, 4 weights write it, 3 read it"


def network(norm: str = "pow", body: str = BODY, how: dict[str, Any] | None = None, **weights) -> gs.Graph:
    """``how``: the kind, the opset and the domains of the graph."""
    parts = {
        place: NORMS[norm].format(x=x, y=y, g=g)
        for place, x, y, g in (("first", "x0", "a", "g1"), ("second", "x1", "b", "g2"), ("third", "x2", "c", "g3"))
    }
    held = {name: values for name, values in (WEIGHTS | weights).items() if values is not None}
    return build("(float[2,10,8] x) => (float[] y)", body.format(**parts), **{"opset": 23} | (how or {}), **held)


def rotate(graph, **options):
    return Rotate(**options).apply(graph, Context())


@pytest.mark.parametrize("norm", NORMS)
def test_the_function_stays(norm):
    graph = network(norm)
    feed = feeds(graph)
    before = run(graph, feed)
    outcome = rotate(graph)
    assert changes(outcome) == [WHAT]
    assert not outcome.refused
    assert_same(before, run(graph, feed))
    known = constants(graph)
    for gain in ("g1", "g2", "g3"):
        assert (known[gain] == 1).all()
    for name in ("E", "Z", "Q", "O", "U", "D", "H"):
        assert np.linalg.norm(known[name]) > 0
        assert not np.allclose(known[name], random(WEIGHTS[name], name), atol=0.1)
    assert np.array_equal(known["ub"], random(48, "ub"))  # of a reader; that of a writer is turned
    assert not np.allclose(known["db"], random(24, "db"), atol=0.1)


def test_a_fused_norm_adds_the_shortcut_itself():
    """com.microsoft's norm writes the sum too, and adds a bias."""
    body = """
        e = Gather(E, ids) z = MatMul(x, Z) x0 = Add(z, e)
        a = SimplifiedLayerNormalization<axis=-1,epsilon=1e-5>(x0, g1)
        q = MatMul(a, Q) t = Tanh(q) o = MatMul(t, O)
        b, unused, inverse, x1 = com.microsoft.SkipSimplifiedLayerNormalization<epsilon=1e-5>(x0, o, g2, db)
        u = MatMul(b, U) v = Relu(u) d = MatMul(v, D)
        c = com.microsoft.SkipSimplifiedLayerNormalization<epsilon=1e-5>(x1, d, g3)
        y = MatMul(c, H)
    """
    graph = network(body=body, how={"kind": "float", "domains": '"com.microsoft" : 1', "opset": 17})
    feed = feeds(graph)
    before = run(graph, feed)
    assert changes(rotate(graph)) == [WHAT]
    assert_same(before, run(graph, feed), 3e-6)
    known = constants(graph)
    assert all((known[gain] == 1).all() for gain in ("g1", "g2", "g3"))
    assert not np.allclose(known["db"], random(24, "db"), atol=0.1)


def test_a_tied_embedding_becomes_two():
    graph = network(body=BODY.replace("MatMul(c, H)", "MatMul(c, T)").replace("e0 =", "T = Transpose(E) e0 ="), H=None)
    feed = feeds(graph)
    before = run(graph, feed)
    assert changes(rotate(graph)) == [WHAT]
    assert_same(before, run(graph, feed))
    assert "Transpose" not in listing(graph)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("v = Relu(u)", "w = Softmax(x1) w2 = MatMul(w, U) v = Relu(u)", "Softmax is not linear in its channels"),
        ("x2 = Add(d, x1)", "x2 = Mul(d, x1)", "Mul multiplies its channels with 'x1'"),
        ("z = MatMul(x, Z)", "w = MatMul(x, Z) z = Relu(w)", "Relu is not linear in its channels"),
        ("{second}", "b = LayerNormalization(x1, g2)", "LayerNormalization takes the mean of its channels away"),
        ("y = MatMul(c, H)", "y = Identity(c)", "'y' is an output of the graph"),
        ("u0 = MatMul(b, U)", "m = Sigmoid(b) u0 = MatMul(m, U)", "Sigmoid is not linear in its channels"),
    ],
)
def test_what_is_refused(old, new, reason):
    graph = network(body=BODY.replace(old, new))
    before = listing(graph)
    outcome = rotate(graph)
    assert not outcome.changed
    assert [one.reason for one in outcome.refused] == [f"the stream that Gather writes stays as it is: {reason}"]
    assert listing(graph) == before


@pytest.mark.parametrize("pays", [False, True])
def test_what_does_not_pay_is_taken_back(pays):
    """int4 represents weights of one size as they are; two inputs that are far larger take all codes of the others."""
    shapes = {name: WEIGHTS[name] for name in "ZQOUDH"}
    weights: dict[str, Any] = {name: np.sign(random(shape, name)) for name, shape in shapes.items()}
    for name in "QUH" if pays else "":
        weights[name] = random(shapes[name], name) * np.where(np.arange(24) % 12 == 3, 30, 1)[:, None]
    step = QuantizeWeights(weights="int4", group=32, rounder="nearest", embeddings=False)
    graph = network(how={"kind": "float"}, **weights)
    before, ctx = listing(graph), Context(samples(graph, 8), quantizer=step)
    outcome = Rotate().apply(graph, ctx)
    assert bool(outcome.changed) == pays
    assert outcome.facts["trial"]["trials"] == 2
    if not pays:
        assert outcome.refused[0].code == "taken back, it does not pay"
        assert listing(graph) == before
        assert Rotate(roll_back=False).apply(graph, ctx).changed


def test_what_does_not_fit_its_type_changes_nothing():
    graph = network("l2", how={"kind": "float16"}, db=np.full(24, 6e4))
    before, held = listing(graph), {name: values.copy() for name, values in constants(graph).items()}
    outcome = rotate(graph)
    assert not outcome.changed
    assert "does not fit float16" in outcome.refused[0].reason
    assert listing(graph) == before
    assert all(np.array_equal(values, held[name]) for name, values in constants(graph).items())


HEADS = """
    q0 = MatMul(x, Q) k0 = MatMul(x, K) v0 = MatMul(x, V) v1 = Add(v0, bv)
    q1 = Reshape(q0, heads) k1 = Reshape(k0, heads) v2 = Reshape(v1, heads)
    q = Transpose<perm=[0,2,1,3]>(q1) k = Transpose<perm=[0,2,3,1]>(k1) v = Transpose<perm=[0,2,1,3]>(v2)
    s = MatMul(q, k) p = Softmax<axis=-1>(s) a = MatMul(p, v) a1 = Transpose<perm=[0,2,1,3]>(a)
    a2 = Reshape(a1, flat) y = MatMul(a2, O)
"""


def heads(body: str = HEADS, bias: int | np.ndarray = 24) -> gs.Graph:
    weights: dict[str, Any] = {"Q": (16, 24), "K": (16, 24), "V": (16, 24), "O": (24, 16), "bv": bias}
    shapes = {"heads": np.array([2, 10, 3, 8]), "flat": np.array([2, 10, 24])}
    return build("(float[2,10,16] x) => (float[] y)", body, **weights, **shapes)


def test_heads_are_turned_within_themselves():
    graph = heads()
    feed = feeds(graph)
    before, held = run(graph, feed), constants(graph)
    outcome = rotate(graph)
    assert changes(outcome) == [f"{kind}, 3 heads of 8 channels rotated" for kind in ("keys", "values")]
    assert_same(before, run(graph, feed))
    after = constants(graph)
    for name, axis in (("K", 1), ("Q", 1), ("V", 1), ("O", 0), ("bv", 0)):
        old, new = (np.moveaxis(part[name], axis, -1).reshape(-1, 3, 8) for part in (held, after))
        assert not np.allclose(old, new, atol=0.1)
        assert np.allclose(np.linalg.norm(old, axis=-1), np.linalg.norm(new, axis=-1))


@pytest.mark.parametrize(
    ("old", "new", "bias", "reason"),
    [
        ("v2 = Reshape(v1, heads)", "v3 = Relu(v1) v2 = Reshape(v3, heads)", 24, "Relu is not linear in its channels"),
        ("", "", np.array([0.5]), "Add adds one number to all of its channels"),
    ],
)
def test_heads_that_stay(old, new, bias, reason):
    graph = heads(HEADS.replace(old, new), bias)
    outcome = rotate(graph)
    assert changes(outcome) == ["keys, 3 heads of 8 channels rotated"]
    assert [one.reason for one in outcome.refused] == [f"MatMul: {reason}"]
