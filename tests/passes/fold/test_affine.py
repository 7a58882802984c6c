"""Maps of a scale and a shift go into the linear nodes and norms around them."""

from __future__ import annotations

import time

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from channelfold.passes.base import Context
from channelfold.passes.fold import FoldAffine
from channelfold.tests.graphs import build, changes, constants, listing, ops, positive, random, reasons
from channelfold.tests.passes.fold.maps import BN, IMAGE, NORM, ROWS, TOKENS, affine, left_after_a_fold

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


FOLDED = {  # inputs, nodes, constants; what is left, and the changes or refusals
    "a scale along the rows goes into a weight on the left": (
        "(float[N,4,5] x) => (float[] y)", "t = MatMul(W, x) u = Add(b, t) y = Mul(u, a)",
        {"W": (3, 4), "b": (3, 1), "a": (3, 1)}, "t = MatMul(W, x)\ny = Add(b, t)", None,
    ),
    "a scalar goes into a vector product": (
        "(float[4] x) => (float[] y)", "t = MatMul(W, x) u = Mul(t, a) y = Add(u, c)",
        {"W": (3, 4), "a": 2.0, "c": 0.5}, ["MatMul", "Add"], None,
    ),
    "the order of operands counts": (
        IMAGE, "t = Conv(x, W) a = Sub(c, t) b = Div(a, d) e = Neg(b) y = Sub(e, c)",
        {"W": (4, 4, 1, 1), "c": (4, 1, 1), "d": positive((1, 4, 1, 1))}, ["Conv"],
        "Sub+Div+Neg+Sub: into what precedes it",
    ),
    "a norm without bias takes the scale, and the bias behind it stays": (
        TOKENS, "n = RMSNormalization(x, p) t = Mul(n, a) u = Add(t, c) y = Sin(u)",
        {"opset": 23, "kind": "float", "p": 4, "a": 4, "c": 4},
        "n = RMSNormalization(x, p)\nu = Add(n, Add_2_add)\ny = Sin(u)",
        "Add: RMSNormalization has no bias; Sin follows it",
    ),
    "a scale goes into a norm without bias": (
        TOKENS, "n = LayerNormalization(x, p) y = Mul(n, a)", {"p": 4, "a": 4}, "y = LayerNormalization(x, p)", None
    ),
    "input normalization goes into the first Conv": (
        IMAGE, "a = Sub(x, m) b = Div(a, d) y = Conv(b, W)",
        {"W": (3, 4, 2, 2), "m": (1, 4, 1, 1), "d": positive((4, 1, 1))},
        "y = Conv(x, W, Conv_2_bias)", "Sub+Div: into what follows it",
    ),
    "only the scale enters a padded Conv": (
        IMAGE, f"n = {BN}(x, g, s, m, v) y = Conv<pads=[1,0,0,0]>(n, W)", {"W": (3, 4, 2, 2), **NORM}, ["Add", "Conv"],
        "Add: an input of the graph precedes it; a shift does not pass the zero padding of Conv",
    ),
    "a map goes into every linear that reads it": (
        ROWS, "n = LayerNormalization(x, p) t = Mul(n, a) u = Add(t, c) q = Gemm(u, A, i) "
        "k = Gemm<transB=1, alpha=2.0>(u, B) y = Add(q, k)",
        {"p": 4, "a": 4, "c": 4, "A": (4, 3), "B": (3, 4), "i": 3}, ["LayerNormalization", "Gemm", "Gemm", "Add"],
        "Mul+Add: into what follows it",
    ),
    "shifts are not turned into more nodes": (
        TOKENS, "u = Add(x, c) q = MatMul(u, A) k = MatMul(u, B) y = Concat<axis=-1>(q, k)",
        {"c": 4, "A": (4, 3), "B": (4, 3)}, ["Add", "MatMul", "MatMul", "Concat"],
        "Add: it would take 2 bias Adds behind the MatMuls that read it; an input of the graph precedes it",
    ),
    "one shift becomes one bias": (TOKENS, "u = Add(x, c) y = MatMul(u, A)", {"c": 4, "A": (4, 3)},
                                   ["MatMul", "Add"], None),
    "layer scale in a residual block": (
        TOKENS, "a = MatMul(x, A) b = Add(a, p) r = Relu(b) c = MatMul(r, B) d = Add(c, q) s = Mul(g, d) y = Add(x, s)",
        {"A": (4, 6), "p": 6, "B": (6, 4), "q": 4, "g": 4}, ["MatMul", "Add", "Relu", "MatMul", "Add", "Add"], None,
    ),
    "a map behind a gate is no norm": (
        TOKENS, "s = Sigmoid(x) a = Mul(x, s) b = Mul(a, g) y = MatMul(b, W)", {"g": 4, "W": (4, 3)},
        ["Sigmoid", "Mul", "MatMul"], None,
    ),
    "gamma and beta of a decomposed norm stay": (
        TOKENS, "m = ReduceMean<axes=[-1]>(x) c = Sub(x, m) q = Pow(c, two) w = ReduceMean<axes=[-1]>(q) "
        "e = Add(w, eps) r = Sqrt(e) n = Div(c, r) s = Mul(n, g) t = Add(s, b) y = MatMul(t, W)",
        {"two": 2.0, "eps": 1e-5, "g": 4, "b": 4, "W": (4, 3)},
        ["ReduceMean", "Sub", "Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul", "Add", "MatMul"],
        "Mul+Add: it is the gamma or beta of a norm",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDED)
def test_what_is_left(case):
    left_after_a_fold(*FOLDED[case])


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


# ---- patterns that stay ------------------------------------------------------------------------------------------


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
