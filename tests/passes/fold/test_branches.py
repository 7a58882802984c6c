"""An If with a constant condition becomes the branch that it takes: by the graph and by the numbers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from channelfold.passes.base import Context
from channelfold.passes.fold import FoldConstants, TakeBranch
from channelfold.runtime.errors import UsageError
from channelfold.runtime.io.edit import fix_inputs
from channelfold.runtime.io.files import check, import_model
from channelfold.tests import decoders
from channelfold.tests.graphs import assert_same, listing, run

TEXT = """<ir_version: 10, opset_import: ["" : 17]>
g (float[n,4] x) => (float[n,4] y, float[n,4] z, float[k] w) <float[4] c = {1, 2, 3, 4}, bool t = {1}> {
    f = Not(t)
    h = Relu(x)
    y, z, w = If(f) <
        then_branch = a () => (float[n,4] h1, float[n,4] h2, float[4] c2) {
            h1 = Neg(x) h2 = Exp(x) c2 = Identity(c)
        },
        else_branch = b () => (float[n,4] r, float[n,4] r2, float[4] c1) {
            r = Mul(h, c) r2 = Tanh(r) c1 = Constant<value = float[4] {5,6,7,8}>()
        }
    >
}"""


def test_the_branch_that_is_taken_is_left():
    graph = import_model(onnx.parser.parse_model(TEXT))
    feed = {"x": np.array([[-1, 2, 3, 4.0]], np.float32)}
    before = run(graph, feed)
    FoldConstants().apply(graph, Context())
    outcome = TakeBranch().apply(graph, Context())
    assert [(c.node, c.what) for c in outcome.changed] == [
        ("If_2", "If: its condition is constant, so the nodes of its else_branch take its place")
    ]
    assert listing(graph) == "h = Relu(x)\ny = Mul(h, c)\nz = Tanh(y)\nw = Identity(c1)"
    check(graph)
    assert_same(before, run(graph, feed))
    assert not TakeBranch().apply(graph, Context()).changed


def test_an_output_twice_and_names_that_are_taken():
    text = """<ir_version: 10, opset_import: ["" : 17]>
    g (float[n] x, bool p) => (float[n] y, float[n] z, float[n] o) <bool t = {1}> {
        y, z = If(t) <
            then_branch = a () => (float[n] r, float[n] r) { q = Neg(x) r = Relu(q) },
            else_branch = b () => (float[n] s, float[n] s) { s = Abs(x) }
        >
        o = If(p) <
            then_branch = d () => (float[n] q) { q = Exp(x) },
            else_branch = e () => (float[n] r) { r = Tanh(x) }
        >
    }"""
    graph = import_model(onnx.parser.parse_model(text))
    assert TakeBranch().apply(graph, Context()).changed
    assert listing(graph) == "q_1 = Neg(x)\ny = Relu(q_1)\nz = Identity(y)\no = If(p)"
    check(graph)
    x = np.array([-1, 2], np.float32)
    found = run(graph, {"x": x, "p": np.array(True)})
    np.testing.assert_allclose(found["y"], [1, 0])
    np.testing.assert_array_equal(found["z"], found["y"])
    np.testing.assert_allclose(found["o"], np.exp(x), rtol=1e-6)


def test_ifs_in_ifs_and_in_loops():
    text = """<ir_version: 10, opset_import: ["" : 17]>
    g (float[2] x, int64 trips) => (float[2] y) <bool t = {1}> {
        y = Loop(trips, t, x) <body = body (int64 i, bool going, float[2] h) => (bool again, float[2] r) {
            r = If(t) <
                then_branch = a () => (float[2] q) {
                    q = If(t) <
                        then_branch = b () => (float[2] n) { n = Neg(h) },
                        else_branch = c () => (float[2] m) { m = Abs(h) }
                    >
                },
                else_branch = d () => (float[2] e) { e = Exp(h) }
            >
            again = Identity(going)
        }>
    }"""
    graph = import_model(onnx.parser.parse_model(text))
    outcome = TakeBranch().apply(graph, Context())
    assert [c.node for c in outcome.changed] == ["If_0 in body of Loop Loop_0"] * 2
    assert listing(graph.nodes[0].attrs["body"]) == "r = Neg(h)\nagain = Identity(going)"
    found = run(graph, {"x": np.array([1, -2], np.float32), "trips": np.array(3)})
    np.testing.assert_array_equal(found["y"], [-1, 2])


def test_branches_that_the_inputs_decide_stay():
    graph = import_model(decoders.merged())
    assert not TakeBranch().apply(graph, Context()).changed


@pytest.mark.parametrize("cached", [True, False])
def test_an_input_that_is_fixed_leaves_one_branch(cached):
    feed = decoders.steps(1, (cached,))[0]
    before = run(import_model(decoders.merged()), feed)
    graph = import_model(decoders.merged())
    assert fix_inputs(graph, {"use_cache_branch": str(cached)})["use_cache_branch"].tolist() == [cached]
    assert TakeBranch().apply(graph, Context()).changed
    assert "If" not in listing(graph)
    assert [tensor.name for tensor in graph.inputs] == ["x", "past"]
    del feed["use_cache_branch"]
    assert_same(before, run(graph, feed), 1e-6)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"use_cache_brunch": "1"}, "is no input. Did you mean 'use_cache_branch'"),
        ({"use_cache_branch": "2"}, "gives 'use_cache_branch' the value '2'. Expected a value of type bool"),
        ({"x": "one"}, "gives 'x' the value 'one'. Expected a value of type float32"),
    ],
)
def test_values_that_do_not_fit(given, says):
    with pytest.raises(UsageError, match=says):
        fix_inputs(import_model(decoders.merged()), given)
