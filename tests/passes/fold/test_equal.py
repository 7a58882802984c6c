from __future__ import annotations

import numpy as np
import pytest

from channelfold.passes.base import Context
from channelfold.passes.fold import MergeEqual
from channelfold.tests.graphs import build, changes, fold, listing, ops, reasons

IN = "(float[N,4] x) => (float[] y)"


def test_equal_nodes_are_one():
    graph = build(IN, "a = Sin(x) b = Sin(x) c = Cos(a) d = Cos(b) y = Add(c, d)")
    outcome = fold(MergeEqual(), graph, rtol=0)
    assert listing(graph) == "a = Sin(x)\nc = Cos(a)\ny = Add(c, c)"
    names = [node.name for node in graph.nodes]
    assert changes(outcome) == [f"Sin computes what {names[0]} does", f"Cos computes what {names[1]} does"]


def test_small_constants_are_compared_by_value():
    one, same = np.array([1, 0]), np.array([1, 0])
    graph = build(IN, "a = Gather<axis=1>(x, i) b = Gather<axis=1>(x, j) y = Add(a, b)", i=one, j=same)
    fold(MergeEqual(), graph, rtol=0)
    assert ops(graph) == ["Gather", "Add"]


def test_a_weight_is_compared_by_identity():
    weight = np.ones((4, 300))
    body = "a = MatMul(x, W) b = MatMul(x, V) c = MatMul(x, W) d = Add(a, b) y = Add(d, c)"
    graph = build(IN, body, W=weight, V=weight)
    fold(MergeEqual(), graph)
    assert listing(graph) == "a = MatMul(x, W)\nb = MatMul(x, V)\nd = Add(a, b)\ny = Add(d, a)"


def test_nodes_with_several_results():
    body = "a, b = Split<axis=1, num_outputs=2>(x) c, d = Split<axis=1, num_outputs=2>(x) e = Add(a, d) y = Add(e, c)"
    graph = build(IN, body, opset=18)
    fold(MergeEqual(), graph, rtol=0)
    assert listing(graph).endswith("e = Add(a, b)\ny = Add(e, a)")
    assert ops(graph) == ["Split", "Add", "Add"]


DIFFERENT = {
    "attributes": "a = Transpose<perm=[0,1]>(x) b = Transpose<perm=[1,0]>(x) y = MatMul(a, b)",
    "order of inputs": "n = Neg(x) a = Sub(x, n) b = Sub(n, x) y = Add(a, b)",
    "types": "a = Cast<to=1>(x) b = Cast<to=10>(x) c = Cast<to=11>(a) d = Cast<to=11>(b) y = Add(c, d)",
    "constants": "a = Add(x, one) b = Add(x, two) y = Mul(a, b)",
    "shapes of constants": "a = Add(x, one) b = Add(x, ones) y = MatMul(a, b)",
    "random": "a = RandomNormalLike(x) b = RandomNormalLike(x) c = Sub(a, b) d = Mul(c, zeros) y = Add(x, d)",
    "missing inputs": "a = Clip(x, one) b = Clip(x, , one) y = Add(a, b)",
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_different_nodes_stay(case):
    given = {"one": np.array(1.0), "two": np.array(2.0), "ones": np.ones((1, 1)), "zeros": np.zeros(4)}
    used = {
        name: value
        for name, value in given.items()
        if name in DIFFERENT[case].replace(")", " ").replace(",", " ").split()
    }
    graph = build("(float[4,4] x) => (float[] y)", DIFFERENT[case], **used)
    before = listing(graph)
    assert not MergeEqual().apply(graph, Context()).changed
    assert listing(graph) == before


def test_quantization_is_left_to_its_readers():
    body = """
        q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)
        p = QuantizeLinear(x, s, z) e = DequantizeLinear(p, s, z)
        y = Add(d, e)
    """
    graph = build(IN, body, kind="float", s=np.float32(0.1), z=np.int8(0))
    assert not MergeEqual().apply(graph, Context()).changed


def test_the_name_of_an_output_stays():
    graph = build("(float[N,4] x) => (float[] y, float[] z)", "a = Sin(x) z = Sin(x) b = Cos(a) y = Add(b, z)")
    fold(MergeEqual(), graph, rtol=0)
    assert listing(graph) == "z = Sin(x)\nb = Cos(z)\ny = Add(b, z)"


def test_two_outputs_stay():
    graph = build("(float[N,4] x) => (float[] y, float[] z)", "y = Sin(x) z = Sin(x)")
    outcome = fold(MergeEqual(), graph, rtol=0)
    assert ops(graph) == ["Sin", "Sin"]
    assert reasons(outcome) == [
        f"Sin computes what {graph.nodes[0].name} does, and both results are outputs of the graph"
    ]
