"""Runs of maps: who else reads them, what becomes of a run, and what overflows."""

from __future__ import annotations

import numpy as np
import pytest

from channelfold.passes.base import Context
from channelfold.passes.fold import FoldAffine
from channelfold.passes.layers.linear import GROWTH_LIMIT, Linear
from channelfold.tests.graphs import (
    assert_same,
    build,
    changes,
    constants,
    feeds,
    listing,
    node,
    ops,
    positive,
    random,
    reasons,
    run,
)
from channelfold.tests.passes.fold.maps import BN, IMAGE, NORM, ROWS, affine, left_after_a_fold

W = (4, 4, 1, 1)
K = (4, 1, 1)
TWO = "(float[N,4,6,6] x) => (float[] t, float[] y)"
FOLDED = {  # inputs, nodes, constants; what is left, and the changes or refusals
    "an output inside a run ends the run": (
        TWO, "c = Conv(x, W) t = Mul(c, a) y = Add(t, a)", {"W": W, "a": K}, "t = Conv(x, W)\ny = Add(t, a)", None
    ),
    "a tensor that is read twice is no run": (
        IMAGE, "c = Conv(x, W) a = Mul(c, k) y = Add(a, a)", {"W": W, "k": K}, "c = Conv(x, W)\ny = Add(c, c)", None
    ),
    "weights that two convs share part ways": (
        IMAGE, "c = Conv(x, W) n = Mul(c, a) d = Conv(x, W) m = Mul(d, e) y = Add(n, m)", {"W": W, "a": K, "e": K},
        "c = Conv(x, W_folded)\nd = Conv(x, W)\ny = Add(c, d)", None,
    ),
    "one weight on both sides of a map": (
        ROWS, "a = Gemm(x, W) b = Mul(a, k) c = Gemm(b, W) d = Mul(c, k) y = Sin(d)", {"W": (4, 4), "k": 4},
        ["Gemm", "Gemm", "Sin"], None,
    ),
    "a run that cannot move becomes one Mul and one Add": (
        IMAGE, "a = Mul(x, k) b = Add(a, k) c = Div(b, k) d = Sub(k, c) y = Sin(d)", {"k": K},
        "c = Mul(x, Div_2_mul)\nd = Add(c, Sub_3_add)\ny = Sin(d)",
        "Mul+Add+Div+Sub: 4 nodes merged into 2; they stay: an input of the graph precedes it; Sin follows it",
    ),
    "a run along two axes is two maps": (
        IMAGE, "c = Conv(x, W) a = Mul(c, k) b = Mul(a, two) d = Mul(b, h) y = Sin(d)",
        {"W": W, "k": K, "two": 2.0, "h": (6, 1)}, ["Conv", "Mul", "Sin"], None,
    ),
    "a run that does nothing vanishes": (
        IMAGE, "r = Sin(x) a = Mul(r, two) b = Add(a, two) c = Sub(b, two) y = Div(c, two)", {"two": 2.0},
        "y = Sin(x)", None,
    ),
    "a run that does nothing between two names becomes an Identity": (
        IMAGE, "a = Neg(x) y = Neg(a)", {}, "y = Identity(x)", None
    ),
    "a result with other readers is not scaled": (
        IMAGE, f"c = Conv(x, W) n = {BN}(c, g, s, m, v) y = Add(c, n)", {"W": W, **NORM},
        ["Conv", BN, "Add"], f"{BN}: Conv in front of it has other readers; Add follows it",
    ),
    "a result that is an output is not scaled": (
        TWO, "t = Conv(x, W) y = Mul(t, a)", {"W": W, "a": K}, ["Conv", "Mul"],
        "Mul: Conv in front of it has other readers; its result is an output of the graph",
    ),
    "where one way overflows the other is taken": (
        ROWS, "a = Gemm(x, A) b = Mul(a, k) y = Gemm(b, B)", {"kind": "float16", "rtol": 4e-3,
        "A": np.full((4, 4), 100.0), "k": np.full(4, 1e3), "B": np.full((4, 2), 1e-3)},
        ["Gemm", "Gemm"], "Mul: into what follows it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDED)
def test_what_is_left(case):
    left_after_a_fold(*FOLDED[case])


# ---- readers, names, subgraphs -----------------------------------------------------------------------------------


def test_who_only_asks_for_the_shape_is_no_reader():
    body = """
        c = Conv(x, W)
        s = Shape(c)
        r = Relu(c)
        n = Mul(r, a)
        t = Shape(n)
        m = Mul(n, a)
        d = Conv(m, W)
        u = Shape(m)
        v = Add(s, t)
        w = Add(u, v)
        y = Cast<to=11>(w)
        z = Sin(d)
    """
    graph = build("(float[N,4,6,6] x) => (float[] y, float[] z)", body, W=(4, 4, 1, 1), a=positive((4, 1, 1)))
    affine(graph)
    assert "Mul" not in ops(graph)


def test_shapes_that_contradict_the_weights_are_refused():
    body = "m = my.Pool(x)\n p = Mul(m, a)\n f = Flatten(p)\n y = Gemm(f, W)"
    graph = build(f"{IMAGE} <float[N,4,1,1] m>", body, domains='"my": 1', W=(144, 3), a=(4, 1, 1))
    outcome = FoldAffine().apply(graph, Context())
    assert not outcome.changed
    assert reasons(outcome) == [
        "Mul: it has 4 channels, but Gemm_3 has 144: the shapes in the file are wrong; Pool is in between"
    ]


def test_a_subgraph_that_reads_a_map_keeps_it():
    body = """
        n = Mul(x, a)
        d = Conv(n, W)
        e = If(b) <then_branch = p () => (float[N,4,6,6] q) { q = Conv(n, W) },
                   else_branch = r () => (float[N,4,6,6] s) { s = Identity(n) }>
        y = Add(d, e)
    """
    graph = build("(float[N,4,6,6] x, bool b) => (float[] y)", body, W=(4, 4, 1, 1), a=(4, 1, 1))
    outcome = FoldAffine().apply(graph, Context())
    assert not outcome.changed
    assert reasons(outcome) == ["Mul: an input of the graph precedes it; a subgraph reads its result"]


def test_a_subgraph_that_reads_a_weight_keeps_it():
    body = """
        c = Conv(x, W)
        n = Mul(c, a)
        e = If(b) <then_branch = p () => (float[N,4,6,6] q) { q = Conv(x, W) },
                   else_branch = r () => (float[N,4,6,6] s) { s = Identity(x) }>
        y = Add(n, e)
    """
    graph = build("(float[N,4,6,6] x, bool b) => (float[] y)", body, W=(4, 4, 1, 1), a=(4, 1, 1))
    feed = feeds(graph) | {"b": np.array(True)}
    before = run(graph, feed)
    assert FoldAffine().apply(graph, Context()).changed
    assert_same(before, run(graph, feed))
    assert graph.nodes[0].inputs[1].name == "W_folded"


def test_a_large_shared_weight_is_not_copied():
    side = 512
    assert side * side * 8 > GROWTH_LIMIT
    graph = build(
        f"(float[N,{side}] x, int64[2] i) => (float[] e, float[] y)",
        "e = Gather(E, i)\n t = Transpose<perm=[1,0]>(E)\n l = MatMul(x, t)\n y = Mul(l, k)",
        E=(side, side),
        k=side,
    )
    outcome = FoldAffine().apply(graph, Context())
    assert reasons(outcome) == [
        "Mul: a new weight for MatMul_2 would make the file 2.1 MB larger (the old one has other readers or takes "
        "fewer bytes); its result is an output of the graph"
    ]
    assert ops(graph) == ["Gather", "Transpose", "MatMul", "Mul"]


def test_nodes_of_one_name_are_refused_one_by_one():
    graph = build(IMAGE, "a = Mul(x, k)\n b = Sin(a)\n c = Mul(b, k)\n y = Sin(c)", k=(4, 1, 1))
    for n in graph.nodes:
        n.name = "same"
    assert len(affine(graph).refused) == 2


# ---- what becomes of a run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["double", "float", "float16"])
def test_merged_constants_have_the_type_of_the_data(kind):
    graph = build(IMAGE, "a = Neg(x)\n b = Neg(a)\n c = Neg(b)\n y = Sin(c)", kind=kind)
    affine(graph, rtol=1e-3)
    assert ops(graph) == ["Mul", "Sin"]
    assert node(graph, "Mul").inputs[1].dtype == graph.inputs[0].dtype


def test_parameters_of_another_type_than_the_data():
    body = f"c = Conv<pads=[1,1,1,1]>(x, W)\n r = Relu(c)\n n = {BN}(r, g, s, m, v)\n y = Sin(n)"
    given = {k: np.float32(random(v, k) if not isinstance(v, np.ndarray) else v) for k, v in NORM.items()}
    graph = build(IMAGE, body, kind="float16", W=(4, 4, 3, 3), **given | {"g": np.float32(positive(4))})
    FoldAffine().apply(graph, Context())
    assert ops(graph) == ["Conv", "Relu", "Add", "Sin"]
    assert node(graph, "Add").inputs[1].dtype == np.float16


def test_rounding_is_done_before_it_is_decided_what_is_needed():
    graph = build(
        IMAGE, "a = Mul(x, p)\n b = Mul(a, q)\n y = Sin(b)", kind="float16", p=3.0, q=float(np.float16(1 / 3))
    )
    affine(graph, rtol=2e-3)
    assert ops(graph) == ["Sin"]


# ---- types and overflow ------------------------------------------------------------------------------------------


def test_what_overflows_float16_is_refused_with_nothing_changed():
    graph = build(
        IMAGE,
        f"c = Conv(x, W)\n y = {BN}(c, g, s, m, v)",
        kind="float16",
        W=(4, 4, 1, 1),
        **NORM | {"g": np.full(4, 6e4), "v": np.full(4, 0.01)},
    )
    before = {name: values.copy() for name, values in constants(graph).items()}
    outcome = FoldAffine().apply(graph, Context())
    assert reasons(outcome) == [
        f"{BN}: a folded value of 1.16e+06 does not fit float16; its result is an output of the graph"
    ]
    assert all(np.array_equal(values, before[name]) for name, values in constants(graph).items())
    assert listing(graph) == "c = Conv(x, W)\ny = BatchNormalization(c, g, s, m, v)"


def test_float16_is_not_shifted_out_of_its_range():
    """s * x + t may fit where x + t / s does not, whatever x is."""
    body = f"n = {BN}(x, g, s, m, v)\n y = Conv<pads=[1,1,1,1]>(n, W)"
    given = NORM | {"g": np.full(4, 1e-3), "s": np.full(4, 50.0)}
    single = build(IMAGE, body, kind="float", W=(3, 4, 3, 3), **given)
    affine(single, rtol=1e-5)
    assert ops(single) == ["Add", "Conv"]
    half = build(IMAGE, body, kind="float16", W=(3, 4, 3, 3), **given)
    assert not FoldAffine().apply(half, Context()).changed


def test_products_out_of_the_range_of_float64_are_refused():
    graph = build(IMAGE, "a = Mul(x, k)\n b = Mul(a, k)\n y = Sin(b)", k=np.full((4, 1, 1), 1e200))
    outcome = FoldAffine().apply(graph, Context())
    assert not outcome.changed
    assert reasons(outcome) == ["Mul+Mul: an input of the graph precedes it; Sin follows it"]


def test_nothing_is_half_done_when_the_second_of_two_overflows():
    graph = build(
        ROWS,
        "s = Sin(x)\n a = Mul(s, k)\n b = Gemm(a, A)\n c = Gemm(a, B)\n y = Add(b, c)",
        kind="float16",
        k=np.full(4, 1e3),
        A=np.full((4, 2), 1.0),
        B=np.full((4, 2), 100.0),
    )
    before = listing(graph)
    outcome = FoldAffine().apply(graph, Context())
    assert not outcome.changed
    assert "does not fit float16" in reasons(outcome)[0]
    assert listing(graph) == before
    assert np.array_equal(constants(graph)["A"], np.full((4, 2), 1.0))


def test_bfloat16_is_folded():
    graph = build(ROWS, "a = Gemm(x, A)\n b = Mul(a, k)\n y = Add(b, k)", kind="bfloat16", A=(4, 4), k=4)
    assert changes(FoldAffine().apply(graph, Context())) == ["Mul+Add: into what precedes it"]
    assert {values.dtype.name for values in constants(graph).values()} == {"bfloat16"}


def test_an_error_in_the_middle_leaves_a_graph_that_computes_the_same(monkeypatch):
    body = f"c = Conv(x, W)\n n = {BN}(c, g, s, m, v)\n d = Conv(n, V)\n y = {BN}(d, g, s, m, v)"
    graph = build(IMAGE, body, W=(4, 4, 1, 1), V=(4, 4, 1, 1), **NORM)
    feed = feeds(graph)
    before, original, calls = run(graph, feed), Linear.rescaled, []

    def fails_the_second_time(self, **factors):
        calls.append(self)
        if len(calls) == 2:
            raise MemoryError
        return original(self, **factors)

    monkeypatch.setattr(Linear, "rescaled", fails_the_second_time)
    with pytest.raises(MemoryError):
        FoldAffine().apply(graph, Context())
    assert ops(graph) == ["Conv", "Conv", BN]
    assert_same(before, run(graph, feed))
