from __future__ import annotations

import time

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from channelfold.passes.base import Context
from channelfold.passes.fold.affine import FoldAffine
from channelfold.passes.layers.linear import GROWTH_LIMIT, Linear
from channelfold.tests.graphs import (
    assert_same,
    build,
    changes,
    constants,
    feeds,
    fold,
    listing,
    node,
    ops,
    positive,
    random,
    reasons,
    run,
)

IMAGE = "(float[N,4,6,6] x) => (float[] y)"
ROWS = "(float[N,4] x) => (float[] y)"
TOKENS = "(float[N,5,4] x) => (float[] y)"
NORM = {"g": 4, "s": 4, "m": 4, "v": positive(4)}
BN = "BatchNormalization"


def affine(graph, **options):
    return fold(FoldAffine(), graph, **options)


# ---- backward ----------------------------------------------------------------------------------------------------


# (the reference evaluator, which runs float64, takes BatchNormalization before opset 14 to be in training)
@pytest.mark.parametrize(
    ("kind", "opset"), [*(("float", o) for o in (7, 9, 13, 14, 15, 21)), *(("double", o) for o in (14, 15, 21))]
)
def test_batchnorm_goes_into_the_conv_before_it(kind, opset):
    body = f"c = Conv<pads=[1,1,1,1]>(x, W, b)\n y = {BN}<epsilon=0.01>(c, g, s, m, v)"
    graph = build(IMAGE, body, opset=opset, kind=kind, W=(4, 4, 3, 3), b=4, **NORM)
    outcome = affine(graph)
    assert listing(graph) == "y = Conv<pads=[1, 1, 1, 1]>(x, W, b)"
    assert changes(outcome) == ["BatchNormalization: into what precedes it"]
    assert outcome.changed[0].node == "BatchNormalization_1"


# the linear, what stays of a following Mul and Add over its 4 output channels, constants
BEFORE = {
    "conv": (IMAGE, "t = Conv(x, W)", "y = Conv(x, W, n_bias)", {"W": (4, 4, 2, 2)}),
    "grouped conv": (IMAGE, "t = Conv<group=2>(x, W, b)", "y = Conv<group=2>(x, W, b)", {"W": (4, 2, 2, 2), "b": 4}),
    "conv 1-d": ("(float[N,3,6] x) => (float[] y)", "t = Conv(x, W)", "y = Conv(x, W, n_bias)", {"W": (4, 3, 2)}),
    "conv 3-d": (
        "(float[N,3,2,2,2] x) => (float[] y)", "t = Conv(x, W)", "y = Conv(x, W, n_bias)", {"W": (4, 3, 2, 2, 2)}
    ),
    "transposed conv": (
        IMAGE, "t = ConvTranspose<group=2, output_padding=[1,1], strides=[2,2]>(x, W)",
        "y = ConvTranspose<group=2, output_padding=[1, 1], strides=[2, 2]>(x, W, n_bias)", {"W": (4, 2, 3, 3)},
    ),
    "gemm": (ROWS, "t = Gemm<alpha=0.5, beta=3.0>(x, W, b)", "y = Gemm<alpha=1.0, beta=1.0>(x, W, b)",
             {"W": (4, 4), "b": (1, 4)}),
    "gemm with a scalar bias": (ROWS, "t = Gemm<transB=1>(x, W, b)", "y = Gemm<transB=1>(x, W, b)",
                                {"W": (4, 4), "b": ()}),
    "gemm without bias": (ROWS, "t = Gemm(x, W)", "y = Gemm(x, W, n_bias)", {"W": (4, 4)}),
    "matmul": (TOKENS, "t = MatMul(x, W)", "t = MatMul(x, W)\ny = Add(t, n_bias)", {"W": (4, 4)}),
    "matmul and bias": (TOKENS, "t0 = MatMul(x, W)\n t = Add(b, t0)", "t0 = MatMul(x, W)\ny = Add(b, t0)",
                        {"W": (4, 4), "b": 4}),
}  # fmt: skip


@pytest.mark.parametrize("case", BEFORE)
def test_a_scale_and_shift_go_into_any_linear_before_them(case):
    signature, body, expected, given = BEFORE[case]
    rank = signature.split("]")[0].count(",") + 1
    shape = (4,) if rank < 3 or "tokens" in body or "MatMul" in body else (4,) + (1,) * (rank - 2)
    graph = build(
        signature, f"{body}\n u = Mul(t, a)\n y = Add(c, u)", a=random(shape, "a"), c=random(shape, "c"), **given
    )
    graph.nodes[0].name = "n"
    affine(graph)
    text = listing(graph).replace("y_unbiased", "t").replace("u_unbiased", "t").replace("t_unbiased", "t")
    assert text == expected


def test_a_scale_along_the_rows_goes_into_a_weight_on_the_left():
    graph = build(
        "(float[N,4,5] x) => (float[] y)",
        "t = MatMul(W, x)\n u = Add(b, t)\n y = Mul(u, a)",
        W=(3, 4),
        b=(3, 1),
        a=(3, 1),
    )
    affine(graph)
    assert listing(graph) == "t = MatMul(W, x)\ny = Add(b, t)"


def test_a_scalar_goes_into_a_vector_product():
    graph = build(
        "(float[4] x) => (float[] y)", "t = MatMul(W, x)\n u = Mul(t, a)\n y = Add(u, c)", W=(3, 4), a=2.0, c=0.5
    )
    affine(graph)
    assert ops(graph) == ["MatMul", "Add"]


def test_the_order_of_operands_counts():
    body = "t = Conv(x, W)\n a = Sub(c, t)\n b = Div(a, d)\n e = Neg(b)\n y = Sub(e, c)"
    graph = build(IMAGE, body, W=(4, 4, 1, 1), c=(4, 1, 1), d=positive((1, 4, 1, 1)))
    outcome = affine(graph)
    assert ops(graph) == ["Conv"]
    assert changes(outcome) == ["Sub+Div+Neg+Sub: into what precedes it"]


@pytest.mark.parametrize(
    ("body", "given", "left"),
    [
        ("n = LayerNormalization(x, p, q)", {"p": 4, "q": 4}, "LayerNormalization"),
        ("n = LayerNormalization<axis=2>(x, p, q)", {"p": 4, "q": 4}, "LayerNormalization"),
        ("n = InstanceNormalization(x, p, q)", {"p": 5, "q": 5}, "InstanceNormalization"),
    ]
)  # fmt: skip
def test_a_map_goes_into_the_norm_before_it(body, given, left):
    axis = "5,1" if left.startswith("Instance") else "4"
    shape = tuple(map(int, axis.split(",")))
    graph = build(TOKENS, f"{body}\n t = Mul(n, a)\n y = Add(t, c)", a=shape, c=shape, **given)
    affine(graph)
    assert ops(graph) == [left]
    assert set(constants(graph)) == {"p", "q"}


def test_a_norm_without_bias_takes_the_scale_and_the_bias_behind_it_stays():
    body = "n = RMSNormalization(x, p)\n t = Mul(n, a)\n u = Add(t, c)\n y = Sin(u)"
    graph = build(TOKENS, body, opset=23, kind="float", p=4, a=4, c=4)
    outcome = affine(graph)
    assert listing(graph) == "n = RMSNormalization(x, p)\nu = Add(n, Add_2_add)\ny = Sin(u)"
    assert reasons(outcome) == ["Add: RMSNormalization has no bias; Sin follows it"]


def test_a_scale_goes_into_a_norm_without_bias():
    graph = build(TOKENS, "n = LayerNormalization(x, p)\n y = Mul(n, a)", p=4, a=4)
    affine(graph)
    assert listing(graph) == "y = LayerNormalization(x, p)"


@pytest.mark.parametrize(
    ("norm", "p", "a"),
    [
        ("LayerNormalization<axis=1>", (5, 4), (4,)),
        ("LayerNormalization<axis=1>", (5, 4), (5, 1)),
        ("LayerNormalization", (4,), (5, 1)),
        ("LayerNormalization", (1, 4), (4,)),
    ],
)
def test_a_map_along_another_axis_than_a_norms_parameters_stays(norm, p, a):
    graph = build(TOKENS, f"n = {norm}(x, p, q)\n y = Mul(n, a)", p=p, q=p, a=a)
    outcome = affine(graph)
    assert not outcome.changed
    assert len(outcome.refused) == 1


# ---- forward -----------------------------------------------------------------------------------------------------


def test_input_normalization_goes_into_the_first_conv():
    graph = build(
        IMAGE, "a = Sub(x, m)\n b = Div(a, d)\n y = Conv(b, W)", W=(3, 4, 2, 2), m=(1, 4, 1, 1), d=positive((4, 1, 1))
    )
    outcome = affine(graph)
    assert listing(graph) == "y = Conv(x, W, Conv_2_bias)"
    assert changes(outcome) == ["Sub+Div: into what follows it"]


def test_only_the_scale_enters_a_padded_conv():
    graph = build(IMAGE, f"n = {BN}(x, g, s, m, v)\n y = Conv<pads=[1,0,0,0]>(n, W)", W=(3, 4, 2, 2), **NORM)
    outcome = affine(graph)
    assert ops(graph) == ["Add", "Conv"]
    assert reasons(outcome) == [
        "Add: an input of the graph precedes it; a shift does not pass the zero padding of Conv"
    ]


def test_a_map_goes_into_every_linear_that_reads_it():
    body = """
        n = LayerNormalization(x, p)
        t = Mul(n, a)
        u = Add(t, c)
        q = Gemm(u, A, i)
        k = Gemm<transB=1, alpha=2.0>(u, B)
        y = Add(q, k)
    """
    graph = build(ROWS, body, p=4, a=4, c=4, A=(4, 3), B=(3, 4), i=3)
    outcome = affine(graph)
    assert changes(outcome) == ["Mul+Add: into what follows it"]
    assert ops(graph) == ["LayerNormalization", "Gemm", "Gemm", "Add"]


def test_shifts_are_not_turned_into_more_nodes():
    body = """
        u = Add(x, c)
        q = MatMul(u, A)
        k = MatMul(u, B)
        y = Concat<axis=-1>(q, k)
    """
    graph = build(TOKENS, body, c=4, A=(4, 3), B=(4, 3))
    outcome = affine(graph)
    assert not outcome.changed
    assert reasons(outcome) == [
        "Add: it would take 2 bias Adds behind the MatMuls that read it; an input of the graph precedes it"
    ]


def test_one_shift_becomes_one_bias():
    graph = build(TOKENS, "u = Add(x, c)\n y = MatMul(u, A)", c=4, A=(4, 3))
    affine(graph)
    assert ops(graph) == ["MatMul", "Add"]


@pytest.mark.parametrize(
    ("readers", "reason"),
    [
        ("y = Sin(n)", "Sin follows it"),
        ("y = Mul(n, n)", "Mul follows it"),
        ("r = Relu(n)\n c = Conv(n, W)\n y = Concat<axis=1>(c, r)", "Concat follows it"),
        ("y = Conv(x, n)", "Conv follows it"),
    ],
)
def test_a_reader_that_is_no_linear_keeps_the_map(readers, reason):
    used = {"W": (3, 4, 1, 1)} if "W" in readers else {}
    graph = build("(float[4,4,6,6] x) => (float[] y)", f"n = {BN}(x, g, s, m, v)\n {readers}", **used, **NORM)
    outcome = FoldAffine().apply(graph, Context())
    assert not outcome.changed
    assert reasons(outcome) == [f"{BN}: an input of the graph precedes it; {reason}"]


def test_layer_scale_in_a_residual_block():
    body = """
        a = MatMul(x, A)
        b = Add(a, p)
        r = Relu(b)
        c = MatMul(r, B)
        d = Add(c, q)
        s = Mul(g, d)
        y = Add(x, s)
    """
    graph = build(TOKENS, body, A=(4, 6), p=6, B=(6, 4), q=4, g=4)
    affine(graph)
    assert ops(graph) == ["MatMul", "Add", "Relu", "MatMul", "Add", "Add"]


# ---- readers, names, subgraphs -----------------------------------------------------------------------------------


def test_a_result_with_other_readers_is_not_scaled():
    graph = build(IMAGE, f"c = Conv(x, W)\n n = {BN}(c, g, s, m, v)\n y = Add(c, n)", W=(4, 4, 1, 1), **NORM)
    assert reasons(affine(graph)) == [f"{BN}: Conv in front of it has other readers; Add follows it"]


def test_a_result_that_is_an_output_is_not_scaled():
    graph = build(
        "(float[N,4,6,6] x) => (float[] c, float[] y)", "c = Conv(x, W)\n y = Mul(c, a)", W=(4, 4, 1, 1), a=(4, 1, 1)
    )
    assert reasons(affine(graph)) == [
        "Mul: Conv in front of it has other readers; its result is an output of the graph"
    ]


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


def test_an_output_inside_a_run_ends_it():
    graph = build(
        "(float[N,4,6,6] x) => (float[] t, float[] y)",
        "c = Conv(x, W)\n t = Mul(c, a)\n y = Add(t, a)",
        W=(4, 4, 1, 1),
        a=(4, 1, 1),
    )
    affine(graph)
    assert listing(graph) == "t = Conv(x, W)\ny = Add(t, a)"


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


def test_a_tensor_read_twice_is_no_run():
    graph = build(IMAGE, "c = Conv(x, W)\n a = Mul(c, k)\n y = Add(a, a)", W=(4, 4, 1, 1), k=(4, 1, 1))
    affine(graph)
    assert listing(graph) == "c = Conv(x, W)\ny = Add(c, c)"


def test_weights_that_two_convs_share_part_ways():
    body = "c = Conv(x, W)\n n = Mul(c, a)\n d = Conv(x, W)\n m = Mul(d, e)\n y = Add(n, m)"
    graph = build(IMAGE, body, W=(4, 4, 1, 1), a=(4, 1, 1), e=(4, 1, 1))
    affine(graph)
    assert listing(graph) == "c = Conv(x, W_folded)\nd = Conv(x, W)\ny = Add(c, d)"


def test_one_weight_on_both_sides_of_a_map():
    graph = build(ROWS, "a = Gemm(x, W)\n b = Mul(a, k)\n c = Gemm(b, W)\n d = Mul(c, k)\n y = Sin(d)", W=(4, 4), k=4)
    affine(graph)
    assert ops(graph) == ["Gemm", "Gemm", "Sin"]


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


def test_a_run_that_cannot_move_becomes_one_mul_and_one_add():
    graph = build(IMAGE, "a = Mul(x, k)\n b = Add(a, k)\n c = Div(b, k)\n d = Sub(k, c)\n y = Sin(d)", k=(4, 1, 1))
    outcome = affine(graph)
    assert listing(graph) == "c = Mul(x, Div_2_mul)\nd = Add(c, Sub_3_add)\ny = Sin(d)"
    assert changes(outcome) == [
        "Mul+Add+Div+Sub: 4 nodes merged into 2; they stay: an input of the graph precedes it; Sin follows it"
    ]


def test_a_run_along_two_axes_is_two_maps():
    graph = build(
        IMAGE,
        "c = Conv(x, W)\n a = Mul(c, k)\n b = Mul(a, two)\n d = Mul(b, h)\n y = Sin(d)",
        W=(4, 4, 1, 1),
        k=(4, 1, 1),
        two=2.0,
        h=(6, 1),
    )
    affine(graph)
    assert ops(graph) == ["Conv", "Mul", "Sin"]


def test_a_run_that_does_nothing_vanishes():
    graph = build(IMAGE, "r = Sin(x)\n a = Mul(r, two)\n b = Add(a, two)\n c = Sub(b, two)\n y = Div(c, two)", two=2.0)
    affine(graph)
    assert listing(graph) == "y = Sin(x)"


def test_a_run_that_does_nothing_between_two_names_becomes_an_identity():
    graph = build(IMAGE, "a = Neg(x)\n y = Neg(a)")
    affine(graph)
    assert listing(graph) == "y = Identity(x)"


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


def test_where_one_way_overflows_the_other_is_taken():
    graph = build(
        ROWS,
        "a = Gemm(x, A)\n b = Mul(a, k)\n y = Gemm(b, B)",
        kind="float16",
        A=np.full((4, 4), 100.0),
        k=np.full(4, 1e3),
        B=np.full((4, 2), 1e-3),
    )
    outcome = affine(graph, rtol=4e-3)
    assert changes(outcome) == ["Mul: into what follows it"]


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


# ---- patterns that stay ------------------------------------------------------------------------------------------


def test_gamma_and_beta_of_a_decomposed_norm_stay():
    body = """
        m = ReduceMean<axes=[-1]>(x)
        c = Sub(x, m)
        q = Pow(c, two)
        w = ReduceMean<axes=[-1]>(q)
        e = Add(w, eps)
        r = Sqrt(e)
        n = Div(c, r)
        s = Mul(n, g)
        t = Add(s, b)
        y = MatMul(t, W)
    """
    graph = build(TOKENS, body, two=2.0, eps=1e-5, g=4, b=4, W=(4, 3))
    outcome = affine(graph)
    assert not outcome.changed
    assert reasons(outcome) == ["Mul+Add: it is the gamma or beta of a norm"]


@pytest.mark.parametrize(
    "inverse",
    [
        "i = Reciprocal(r)\n n = Mul(x, i)",
        "i = Div(one, r)\n n = Mul(i, x)",
        "j = Reciprocal(r)\n i = Mul(j, g)\n n = Mul(x, i)",
    ],
)
def test_gamma_of_a_decomposed_rms_norm_stays(inverse):
    body = f"""
        q = Mul(x, x)
        w = ReduceMean<axes=[-1]>(q)
        e = Add(w, eps)
        r = Sqrt(e)
        {inverse}
        s = Mul(n, g)
        y = MatMul(s, W)
    """
    used = {"one": 1.0} if "one" in inverse else {}
    graph = build(TOKENS, body, eps=1e-5, g=4, W=(4, 3), **used)
    outcome = affine(graph)
    assert not outcome.changed
    assert reasons(outcome) == ["Mul: it is the gamma or beta of a norm"]


def test_a_map_behind_a_gate_is_no_norm():
    graph = build(TOKENS, "s = Sigmoid(x)\n a = Mul(x, s)\n b = Mul(a, g)\n y = MatMul(b, W)", g=4, W=(4, 3))
    affine(graph)
    assert ops(graph) == ["Sigmoid", "Mul", "MatMul"]


FORMULAS = {
    "GELU by Erf": "a = Div(t, k)\n b = Erf(a)\n c = Add(b, one)\n d = Mul(t, c)\n u = Mul(d, half)",
    "GELU by Tanh": """
        a = Mul(t, t)
        b = Mul(a, t)
        c = Mul(b, k)
        d = Add(t, c)
        e = Mul(d, half)
        f = Tanh(e)
        g = Add(f, one)
        h = Mul(t, g)
        u = Mul(h, half)
    """,
    "HardSwish": "a = Add(t, k)\n b = Clip(a, half, one)\n c = Mul(t, b)\n u = Div(c, k)",
}  # fmt: skip


@pytest.mark.parametrize("form", FORMULAS)
def test_factors_of_an_activation_stay_and_are_no_refusal(form):
    body = f"t = MatMul(x, A)\n {FORMULAS[form]}\n y = MatMul(u, B)"
    used = {name: value for name, value in {"k": 1.5, "one": 1.0, "half": 0.5}.items() if name in FORMULAS[form]}
    graph = build(TOKENS, body, A=(4, 4), B=(4, 3), kind="float", **used)
    before = listing(graph)
    outcome = affine(graph)
    assert (outcome.changed, outcome.refused, listing(graph)) == ([], [], before)


# ---- Gemm --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attrs", "given", "what"),
    [
        ("alpha=0.5", {}, "Gemm: alpha into its weight and bias"),
        ("beta=0.5", {}, "Gemm: beta into its weight and bias"),
        ("alpha=2.0, beta=0.5", {"b": 3}, "Gemm: alpha and beta into its weight and bias"),
    ],
)
def test_alpha_and_beta_go_into_the_weights(attrs, given, what):
    graph = build(ROWS, f"y = Gemm<{attrs}>(x, W{', b' if given else ''})", W=(4, 3), **given)
    outcome = affine(graph)
    assert changes(outcome) == [what]
    assert all(value == 1 for value in graph.nodes[0].attrs.values())


def test_a_gemm_with_a_column_for_a_bias_keeps_its_factors():
    graph = build("(float[3,4] x) => (float[] y)", "y = Gemm<alpha=2.0>(x, W, c)", W=(4, 3), c=(3, 1))
    outcome = affine(graph)
    assert reasons(outcome) == ["Gemm: alpha and beta stay: its bias is not a constant vector over the output channels"]


# ---- size --------------------------------------------------------------------------------------------------------


def chain(length):
    """A long network: Conv, BatchNormalization, Relu, over and over, with a Pad and a Mul now and then."""
    rng = np.random.default_rng(0)
    x = gs.Variable("x", np.float32, (1, 4, 4, 4))
    nodes, tensor = [], x

    def add(op, *arrays, **attrs):
        nonlocal tensor
        name = f"n{len(nodes)}"
        given = [gs.Constant(f"{name}_{i}", np.asarray(a)) for i, a in enumerate(arrays)]
        out = gs.Variable(f"{name}_y")
        nodes.append(gs.Node(op, name, attrs, [tensor, *given], [out]))
        tensor = out

    while len(nodes) < length:
        vectors = [rng.uniform(0.5, 1, 4).astype(np.float32) for _ in range(4)]
        add("Conv", rng.normal(size=(4, 4, 1, 1)).astype(np.float32))
        add("BatchNormalization", *vectors)
        add("Relu")
        add("Mul", vectors[0].reshape(4, 1, 1))
    add("Sigmoid")
    tensor.dtype, tensor.shape = np.float32, (1, 4, 4, 4)
    return gs.Graph(nodes, [x], [tensor], opset=17)


def test_two_thousand_nodes_take_a_moment():
    graph = chain(2000)
    start = time.perf_counter()
    outcome = FoldAffine().apply(graph, Context())
    assert time.perf_counter() - start < 10  # about half a second on one core of 2023; quadratic time would be a minute
    assert len(outcome.changed) == 1000
    assert ops(graph) == ["Conv", "Relu"] * 500 + ["Sigmoid"]
