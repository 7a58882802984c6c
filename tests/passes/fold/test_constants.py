from __future__ import annotations

import numpy as np
import pytest

from channelfold.passes.base import Context
from channelfold.passes.fold import FoldAffine, FoldConstants
from channelfold.passes.layers.linear import GROWTH_LIMIT
from channelfold.tests.graphs import (
    assert_same,
    build,
    changes,
    constants,
    feeds,
    fold,
    listing,
    ops,
    random,
    reasons,
    run,
)

ROWS = "(float[N,4] x) => (float[] y)"


def folded(graph, **options):
    return fold(FoldConstants(), graph, **options)


def test_weight_standardization_becomes_a_weight_and_takes_the_batchnorm():
    body = """
        m = ReduceMean<axes=[1,2,3], keepdims=1>(W)
        c = Sub(W, m)
        q = Mul(c, c)
        v = ReduceMean<axes=[1,2,3], keepdims=1>(q)
        e = Add(v, eps)
        s = Sqrt(e)
        w = Div(c, s)
        t = Conv(x, w)
        y = BatchNormalization(t, g, b, g, p)
    """
    graph = build("(float[N,4,5,5] x) => (float[] y)", body, W=(3, 4, 3, 3), eps=1e-5, g=3, b=3, p=np.ones(3))
    weight = constants(graph)["W"]
    outcome = folded(graph)
    assert listing(graph) == "t = Conv(x, w)\ny = BatchNormalization(t, g, b, g, p)"
    assert changes(outcome) == ["7 nodes up to Div computed"]
    centered = weight - weight.mean((1, 2, 3), keepdims=True)
    expected = centered / np.sqrt((centered**2).mean((1, 2, 3), keepdims=True) + 1e-5)
    assert constants(graph)["w"] == pytest.approx(expected, rel=1e-14)
    fold(FoldAffine(), graph)
    assert ops(graph) == ["Conv"]


def test_connected_nodes_fold_together_and_others_apart():
    body = """
        a = Neg(W)
        b = Transpose<perm=[1,0]>(V)
        c = Exp(a)
        d = MatMul(x, c)
        e = MatMul(d, b)
        y = MatMul(e, a)
    """
    outcome = folded(graph := build(ROWS, body, W=(4, 4), V=(4, 4)))
    assert listing(graph) == "d = MatMul(x, c)\ne = MatMul(d, b)\ny = MatMul(e, a)"
    assert changes(outcome) == ["2 nodes up to Exp computed", "Transpose computed"]
    assert [c.node for c in outcome.changed] == ["Exp_2", "Transpose_1"]


def test_nodes_with_one_source_fold_together():
    graph = build(ROWS, "a = Neg(W)\n b = Exp(a)\n c = Sin(a)\n d = MatMul(x, b)\n y = MatMul(d, c)", W=(4, 4))
    assert changes(folded(graph)) == ["3 nodes up to Sin computed"]


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("s = Shape(x)\n y = Reshape(r, s)", "y = Reshape(r, s)"),
        ("s = Shape<start=-1>(x)\n t = Concat<axis=0>(neg, s)\n y = Reshape(r, t)", "y = Reshape(r, t)"),
        ("s = Size(x)\n t = Unsqueeze(s, zero)\n y = Reshape(r, t)", "y = Reshape(r, t)"),
    ],
)
def test_a_known_shape_is_a_constant(body, left):
    used = {name: np.array([value]) for name, value in {"neg": -1, "zero": 0}.items() if name in body}
    graph = build("(float[2,4] x) => (float[] y)", f"r = Relu(x)\n {body}", **used)
    folded(graph)
    assert listing(graph) == f"r = Relu(x)\n{left}"


def test_an_open_shape_is_not():
    graph = build(ROWS, "s = Shape(x)\n t = Identity(s)\n y = Reshape(x, t)")
    outcome = folded(graph)
    assert (outcome.changed, outcome.refused) == ([], [])


def test_the_known_part_of_an_open_shape_is_folded():
    graph = build(ROWS, "s = Shape<start=1>(x)\n t = Concat<axis=0>(n, s)\n y = Reshape(x, t)", n=np.array([-1]))
    assert not folded(graph).changed  # Shape asks for one tensor; only its whole shape is looked at


KEPT = {
    "quantization": ("q = QuantizeLinear(W, s, z)\n w = DequantizeLinear(q, s, z)\n y = MatMul(x, w)", {}),
    "random numbers": ("w = RandomNormalLike<seed=1.0>(W)\n y = MatMul(x, w)", {}),
    "dropout": ("w = Dropout(W)\n y = MatMul(x, w)", {}),
    "other domains": ("w = my.Neg(W)\n y = MatMul(x, w)", {"domains": '"my": 1'}),
    "subgraphs": (
        "w = If(b) <then_branch = p () => (float[4,4] q) { q = Neg(W) }, else_branch = r () => (float[4,4] t) "
        "{ t = Identity(W) }>\n y = MatMul(x, w)", {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", KEPT)
def test_what_is_kept_though_its_inputs_are_constant(case):
    body, options = KEPT[case]
    given = {"W": random((4, 4)), "s": np.float32(0.1), "z": np.int8(0), "b": np.array(True)}
    given = {name: value for name, value in given.items() if f"{name}," in body or f"{name})" in body}
    graph = build(ROWS, body, kind="float", **given, **options)
    before = listing(graph)
    outcome = FoldConstants().apply(graph, Context())
    assert (outcome.changed, outcome.refused, listing(graph)) == ([], [], before)


def test_a_graph_output_keeps_its_node():
    graph = build("(float[N,4] x) => (float[] y, float[] w)", "v = Neg(W)\n w = Exp(v)\n y = MatMul(x, w)", W=(4, 4))
    outcome = folded(graph)
    assert listing(graph) == "w = Exp(v)\ny = MatMul(x, w)"
    assert changes(outcome) == ["Neg computed"]


def test_what_makes_the_file_much_larger_is_refused():
    rows = GROWTH_LIMIT // 4 + 100
    body = "w = ConstantOfShape(s)\n y = MatMul(x, w)"
    graph = build(f"(float[N,{rows}] x) => (float[] y)", body, kind="float", s=np.array([rows, 1]))
    outcome = folded(graph)
    assert reasons(outcome) == ["ConstantOfShape: its value would make the file 1.0 MB larger"]
    assert ops(graph) == ["ConstantOfShape", "MatMul"]


def test_a_large_weight_that_others_read_is_not_doubled_but_an_own_one_is_rewritten():
    side = 600
    body = "t = Transpose<perm=[1,0]>(W)\n y = MatMul(x, t)"
    graph = build(f"(float[N,{side}] x) => (float[] y)", body, W=(side, side))
    assert changes(folded(graph)) == ["Transpose computed"]

    body = "t = Transpose<perm=[1,0]>(W)\n u = MatMul(x, t)\n y = MatMul(u, W)"
    shared = build(f"(float[N,{side}] x) => (float[] y)", body, W=(side, side))
    assert reasons(folded(shared)) == ["Transpose: its value would make the file 2.9 MB larger"]


def test_what_onnx_runtime_cannot_compute_is_refused_and_the_rest_folded():
    body = "v = Neg(V)\n w = Upsample(W, s)\n u = MatMul(x, v)\n y = Add(u, w)"
    graph = build(ROWS, body, opset=9, kind="float", V=(4, 4), W=(1, 4), s=np.float32([1, -1]))
    outcome = FoldConstants().apply(graph, Context())
    assert changes(outcome) == ["Neg computed"]
    assert reasons(outcome)[0].startswith("Upsample: ONNX Runtime ")
    assert ops(graph) == ["Upsample", "MatMul", "Add"]


def test_a_value_that_is_no_tensor_is_refused():
    body = "q = SequenceConstruct(V, V)\n p = SequenceInsert(q, x)\n y = SequenceAt(p, i)"
    graph = build(ROWS, body, V=(4, 4), i=np.array(2), kind="float")
    assert reasons(folded(graph)) == ["SequenceConstruct: its value is not a tensor"]


def test_constants_that_a_subgraph_reads_are_folded_too():
    body = """
        w = Neg(W)
        y = If(b) <then_branch = p () => (float[N,4] q) { q = MatMul(x, w) }, else_branch = r () => (float[N,4] t)
                  { t = Identity(x) }>
    """
    graph = build("(float[N,4] x, bool b) => (float[] y)", body, W=(4, 4), kind="float")
    feed = feeds(graph) | {"b": np.array(True)}
    before = run(graph, feed)
    assert changes(FoldConstants().apply(graph, Context())) == ["Neg computed"]
    assert ops(graph) == ["If"]
    assert_same(before, run(graph, feed))


def test_a_node_with_several_results():
    graph = build(
        ROWS, "a, b = Split<axis=1>(W, s)\n c = MatMul(x, a)\n y = MatMul(x, b)", W=(4, 6), s=np.array([2, 4])
    )
    folded(graph)
    assert listing(graph) == "c = MatMul(x, a)\ny = MatMul(x, b)"


def test_long_chains_take_linear_time():
    length = 3000
    body = "\n".join(f"t{i + 1} = Neg(t{i})" for i in range(length))
    graph = build(ROWS, f"{body}\n y = MatMul(x, t{length})", t0=(4, 4))
    folded(graph)
    assert ops(graph) == ["MatMul"]
