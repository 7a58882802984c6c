"""Which nodes are maps, and which operators let them through; seen by what FoldAffine makes of a graph."""

from __future__ import annotations

import re

import numpy as np
import pytest

from channelfold.passes.base import Context
from channelfold.passes.fold import FoldAffine
from channelfold.tests.graphs import build, changes, listing, ops, positive, reasons
from channelfold.tests.passes.fold.maps import BN, IMAGE, NORM, ROWS, affine

# ---- through other operators -------------------------------------------------------------------------------------

# what stands between a Conv with 4 channels and a BatchNormalization with positive scales: how much goes back
THROUGH = {
    "Relu": ("t = Relu(c)", "scale"),
    "LeakyRelu": ("t = LeakyRelu<alpha=-0.5>(c)", "scale"),
    "PRelu": ("t = PRelu(c, k)", "scale"),
    "MaxPool": ("t = MaxPool<kernel_shape=[2,2], pads=[1,0,0,1]>(c)", "all"),
    "GlobalMaxPool": ("t = GlobalMaxPool(c)", "all"),
    "AveragePool": ("t = AveragePool<kernel_shape=[2,2], pads=[1,0,0,1]>(c)", "all"),
    "AveragePool that counts its padding": (
        "t = AveragePool<kernel_shape=[2,2], pads=[1,0,0,1], count_include_pad=1>(c)", "scale"
    ),
    "AveragePool without padding": ("t = AveragePool<kernel_shape=[2,2], count_include_pad=1>(c)", "all"),
    "GlobalAveragePool": ("t = GlobalAveragePool(c)", "all"),
    "ReduceMean": ("t = ReduceMean<axes=[2,-1], keepdims=0>(c)", "all"),
    "Pad with zeros": ("t = Pad(c, pads)", "scale"),
    "Pad by repetition": ('t = Pad<mode="edge">(c, pads)', "all"),
    "Pad with ones": ("t = Pad(c, pads, one)", ""),
    "Slice of space": ("t = Slice(c, one_, two_, last)", "all"),
    "Slice of channels": ("t0 = Slice(c, one_, two_, first)\n t = Concat<axis=1>(t0, t0, t0, t0)", ""),
    "Transpose and back": ("t0 = Transpose<perm=[0,2,3,1]>(c)\n t = Transpose<perm=[0,3,1,2]>(t0)", "all"),
    "Reshape": ("t = Reshape(c, flat)", "all"),
    "Identity": ("t = Identity(c)", "all"),
    "Dropout": ("t = Dropout(c)", "all"),
    "Sigmoid": ("t = Sigmoid(c)", ""),
    "MaxPool with indices": ("t, i = MaxPool<kernel_shape=[2,2]>(c)", ""),
}  # fmt: skip
HELPERS = {
    "k": (4, 1, 1), "one": 1.0, "flat": np.array([0, 4, -1]),
    "pads": np.array([0, 0, 1, 0, 0, 0, 0, 2]), "one_": np.array([1]), "two_": np.array([2]), "first": np.array([1]),
    "last": np.array([-1]),
}  # fmt: skip


@pytest.mark.parametrize("case", THROUGH)
def test_how_much_of_a_positive_map_passes(case):
    between, passes = THROUGH[case]
    used = {name: value for name, value in HELPERS.items() if name in re.findall(r"\w+", between)}
    body = f"c = Conv(x, W)\n {between}\n n = {BN}(t, g, s, m, v)\n y = Sin(n)"
    graph = build(IMAGE, body, W=(4, 4, 1, 1), **used, **NORM | {"g": positive(4)})
    outcome = affine(graph)
    assert changes(outcome)[:1] == {
        "all": [f"{BN}: into what precedes it"],
        "scale": [f"{BN}: scale into what precedes it; the shift stays: {shift_reason(between)}; Sin follows it"],
        "": [],
    }[passes]  # fmt: skip
    assert ops(graph).count(BN) == (0 if passes else 1)


def shift_reason(between):
    op = between.split("= ")[1].split("(")[0].split("<")[0]
    return {
        "Pad": "a shift does not pass zero padding (Pad)",
        "AveragePool": "a shift does not pass the zero padding of AveragePool",
    }.get(op, f"a shift does not pass {op}")


@pytest.mark.parametrize(
    ("pad", "given"),
    [
        ("Pad(c, q)", {"q": np.array([0, 1, 0, 0, 0, 0, 0, 0])}),
        ("Pad(c, q, , a)", {"q": np.array([0, 1]), "a": np.array([-3])}),
        ("Pad(c, r)", {"q": np.array([0, 1, 0, 0, 0, 0, 0, 0])}),
    ],
)
def test_a_pad_that_may_add_channels_stops_a_map(pad, given):
    norm = {name: 5 if name != "v" else positive(5) for name in NORM}
    body = f"c = Conv(x, W)\n r = Identity(q)\n t = {pad}\n n = {BN}(t, g, s, m, v)\n y = Sin(n)"
    graph = build(IMAGE, body, opset=18, W=(4, 4, 1, 1), **given, **norm)
    outcome = affine(graph)
    assert not outcome.changed
    assert reasons(outcome) == [f"{BN}: Pad is in between and may cut or pad the channels; Sin follows it"]


@pytest.mark.parametrize("op", ["Relu(c)", "PRelu(c, k)", "MaxPool<kernel_shape=[2,2]>(c)", "GlobalMaxPool(c)"])
def test_a_negative_scale_does_not_pass(op):
    gamma = np.array([1.0, -2.0, 0.0, -1.0])
    graph = build(
        IMAGE,
        f"c = Conv(x, W)\n t = {op}\n n = {BN}(t, g, s, m, v)\n y = Sin(n)",
        W=(4, 4, 1, 1),
        **{"k": (4, 1, 1)} if "PRelu" in op else {},
        **NORM | {"g": gamma},
    )
    outcome = affine(graph)
    name = op.split("(")[0].split("<")[0]
    assert not outcome.changed
    assert reasons(outcome) == [f"{BN}: 2 scale(s) are negative, which does not pass {name}; Sin follows it"]


def test_a_scale_of_zero_passes_a_rectifier():
    graph = build(
        IMAGE,
        f"c = Conv(x, W)\n t = Relu(c)\n y = {BN}(t, g, s, m, v)",
        W=(4, 4, 1, 1),
        **NORM | {"g": np.array([1.0, 0, 2, 0])},
    )
    affine(graph)
    assert ops(graph) == ["Conv", "Relu", "Add"]


def test_a_map_that_a_pool_stops_goes_the_other_way():
    graph = build(
        IMAGE,
        f"c = Conv(x, W)\n t = GlobalMaxPool(c)\n n = {BN}(t, g, s, m, v)\n y = Conv(n, V)",
        W=(4, 4, 1, 1),
        V=(2, 4, 1, 1),
        **NORM | {"g": -positive(4)},
    )
    outcome = affine(graph)
    assert ops(graph) == ["Conv", "GlobalMaxPool", "Conv"]
    assert changes(outcome) == [f"{BN}: into what follows it"]


def test_the_scale_goes_back_alone_where_both_ways_stop_the_shift():
    body = f"c = Conv(x, W)\n r = Relu(c)\n n = {BN}(r, g, s, m, v)\n y = Conv<pads=[1,1,1,1]>(n, V)"
    graph = build(IMAGE, body, W=(4, 4, 1, 1), V=(2, 4, 3, 3), **NORM | {"g": positive(4)})
    affine(graph)
    assert ops(graph) == ["Conv", "Relu", "Add", "Conv"]


def test_the_shift_goes_back_and_the_scale_forth():
    tail = f"n = {BN}(p, g, s, m, v)\n y = Conv<pads=[1,1,1,1]>(n, V)"
    body = f"c = Conv(x, W)\n p = MaxPool<kernel_shape=[2,2]>(c)\n {tail}"
    graph = build(IMAGE, body, W=(4, 4, 1, 1), V=(2, 4, 3, 3), **NORM | {"g": -positive(4)})
    outcome = affine(graph)
    assert changes(outcome) == [f"{BN}: shift into what precedes it, scale into what follows it"]
    assert ops(graph) == ["Conv", "MaxPool", "Conv"]


def test_the_scale_goes_back_and_the_shift_forth():
    body = """
        n = LayerNormalization(x, p)
        a = Mul(n, k)
        b = Add(a, q)
        t = Transpose<perm=[0,3,1,2]>(b)
        m = MaxPool<kernel_shape=[2,2]>(t)
        y = Conv(m, V)
    """
    graph = build("(float[N,6,6,4] x) => (float[] y)", body, p=4, k=-positive(4), q=4, V=(2, 4, 1, 1))
    assert changes(affine(graph)) == ["Mul+Add: scale into what precedes it, shift into what follows it"]
    assert ops(graph) == ["LayerNormalization", "Transpose", "MaxPool", "Conv"]


def test_a_vector_is_repeated_by_a_flatten():
    graph = build(
        "(float[N,4,3,2] x) => (float[] y)",
        f"n = {BN}(x, g, s, m, v)\n f = Flatten(n)\n y = Gemm(f, W)",
        W=(24, 3),
        **NORM,
    )
    assert changes(affine(graph)) == [f"{BN}: into what follows it"]
    assert ops(graph) == ["Flatten", "Gemm"]


def test_a_vector_is_tiled_by_a_flatten_of_channels_last():
    body = f"n = {BN}(x, g, s, m, v)\n t = Transpose<perm=[0,2,3,1]>(n)\n f = Reshape(t, r)\n y = MatMul(f, W)"
    graph = build("(float[N,4,3,2] x) => (float[] y)", body, r=np.array([-1, 24]), W=(24, 3), **NORM)
    affine(graph, size=3)
    assert ops(graph) == ["Transpose", "Reshape", "MatMul", "Add"]


def test_a_conv_between_transposes():
    body = """
        t = Transpose<perm=[0,3,1,2]>(x)
        c = Conv(t, W)
        u = Transpose<perm=[0,2,3,1]>(c)
        a = Mul(u, p)
        y = Add(a, q)
    """
    graph = build("(float[N,6,6,4] x) => (float[] y)", body, W=(4, 4, 1, 1), p=4, q=(1, 1, 1, 4))
    affine(graph)
    assert ops(graph) == ["Transpose", "Conv", "Transpose"]


def test_a_map_along_a_pooled_axis_stays_though_the_linear_reads_that_axis():
    body = "a = Mul(x, p)\n b = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(a)\n y = MatMul(b, W)"
    graph = build(IMAGE, body, p=positive(6), W=(6, 2))
    outcome = affine(graph)
    assert not outcome.changed
    assert reasons(outcome) == ["Mul: an input of the graph precedes it; MaxPool pools the axis it scales"]


def test_a_map_of_the_batch_stays():
    graph = build("(float[4,4,3,3] x) => (float[] y)", "c = Conv(x, W)\n y = Mul(c, a)", W=(4, 4, 1, 1), a=(4, 1, 1, 1))
    outcome = affine(graph)
    assert reasons(outcome) == [
        "Mul: its channels lie along axis 0, not along the channel axis of Conv; its result is an output of the graph"
    ]


# ---- what is no map ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signature", "shape"),
    [
        ("(float[N,4,1,6] x) => (float[] y)", (3, 1)),  # enlarges
        ("(float[N,4,6,6] x) => (float[] y)", (1, 1, 4, 1, 1)),  # of higher rank
        ("(float[N,4,6,6] x) => (float[] y)", (4, 6, 1)),  # along two axes
    ],
)
def test_a_constant_that_is_no_vector_stays(signature, shape):
    graph = build(signature, "c = Conv(x, W)\n y = Mul(c, a)", W=(4, 4, 1, 1), a=shape)
    assert not affine(graph).changed


@pytest.mark.parametrize(
    ("signature", "reason"),
    [
        ("(float[N,4,H,W] x) => (float[] y)", "Mul: the length of axis 3 of its input is unknown"),
        ("(float[] x) => (float[] y)", "Mul: the shape of its input is unknown"),
    ],
)
def test_a_vector_along_an_open_axis_is_refused(signature, reason):
    graph = build(signature, "c = Relu(x)\n y = Mul(c, a)", a=(3,))
    assert reasons(FoldAffine().apply(graph, Context())) == [reason]


def test_division_of_a_constant_and_by_zero_are_no_maps():
    graph = build(
        IMAGE,
        "c = Conv(x, W)\n a = Div(k, c)\n b = Conv(a, W)\n y = Div(b, z)",
        kind="float",
        W=(4, 4, 1, 1),
        k=(4, 1, 1),
        z=np.array([1.0, 0, 1, 1]).reshape(4, 1, 1),
    )
    before = listing(graph)
    assert not FoldAffine().apply(graph, Context()).changed
    assert listing(graph) == before


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"v": np.array([1.0, -1, 1, 1])}, "its parameters give a scale or shift that is infinite or not a number"),
        ({"g": np.array([1.0, np.inf, 1, 1])}, "its parameters give a scale or shift that is infinite or not a number"),
        ({"m": np.array([1.0, np.nan, 1, 1])}, "its parameters give a scale or shift that is infinite or not a number"),
    ],
)
def test_a_broken_batchnorm_is_refused(changed, reason):
    graph = build(IMAGE, f"c = Conv(x, W)\n y = {BN}(c, g, s, m, v)", W=(4, 4, 1, 1), **NORM | changed)
    outcome = FoldAffine().apply(graph, Context())
    assert not outcome.changed
    assert reasons(outcome) == [f"{BN}: {reason}"]


@pytest.mark.parametrize(
    ("body", "opset", "reason"),
    [
        (f"y, a, b = {BN}<training_mode=1>(x, g, s, m, v)", 15, "it is in training mode"),
        (f"y, a, b, d, e = {BN}(x, g, s, m, v)", 9, "it returns running statistics, as in training"),
        (f"w = Exp(v)\n y = {BN}(x, g, s, m, w)", 15, "its parameters are computed at run time"),
        (f"y = {BN}<spatial=0>(x, g, s, m, v)", 7, "it is not per channel"),
    ],
)
def test_a_batchnorm_that_is_no_map_says_why(body, opset, reason):
    graph = build(IMAGE, body, opset=opset, **NORM)
    assert f"{BN}: {reason}" in reasons(FoldAffine().apply(graph, Context()))


def test_a_variance_of_nothing_but_epsilon():
    graph = build(
        IMAGE, f"c = Conv(x, W)\n y = {BN}<epsilon=1e-12>(c, g, s, m, v)", W=(4, 4, 1, 1), **NORM | {"v": np.zeros(4)}
    )
    affine(graph)
    assert ops(graph) == ["Conv"]


def test_batchnorm_of_rows():
    graph = build(ROWS, f"t = Gemm(x, W)\n y = {BN}(t, g, s, m, v)", W=(4, 4), **NORM)
    affine(graph)
    assert ops(graph) == ["Gemm"]


def test_integers_are_left_alone():
    graph = build(
        "(int64[N,4] x) => (int64[] y)",
        "a = Mul(x, k)\n b = Neg(a)\n c = Neg(b)\n y = Add(c, k)",
        k=np.array([1, 2, 3, 4]),
    )
    outcome = FoldAffine().apply(graph, Context())
    assert (outcome.changed, outcome.refused) == ([], [])


def test_broadcasting_by_attributes_is_left_alone():
    graph = build(IMAGE, "c = Conv(x, W)\n y = Mul<broadcast=1, axis=1>(c, k)", opset=6, W=(4, 4, 1, 1), k=4)
    assert not FoldAffine().apply(graph, Context()).changed
    assert FoldAffine().opset_for(graph) == 7


def test_operators_of_other_domains_are_left_alone():
    body = f"c = Conv(x, W)\n d = my.Relu(c)\n y = {BN}(d, g, s, m, v)"
    graph = build(IMAGE, body, domains='"my": 1', W=(4, 4, 1, 1), **NORM)
    outcome = FoldAffine().apply(graph, Context())
    assert reasons(outcome) == [f"{BN}: Relu is in between; its result is an output of the graph"]


@pytest.mark.parametrize(
    ("between", "opset", "left"),
    [
        ("t = Slice<starts=[1], ends=[9], axes=[-1]>(c)", 9, []),
        ("t0 = Slice<starts=[1], ends=[3], axes=[1]>(c)\n t = Concat<axis=1>(t0, t0)", 9, [BN]),
        ("t = Pad<pads=[0,0,1,1,0,0,0,0]>(c)", 9, ["Add"]),
        ("t = Pad<pads=[0,0,1,1,0,0,0,0], value=2.0>(c)", 9, [BN]),
        ("t0 = Unsqueeze<axes=[0]>(c)\n t = Squeeze<axes=[0]>(t0)", 11, []),
        ("t = Dropout<ratio=0.5>(c)", 11, []),
    ],
)
def test_old_opsets_say_it_in_attributes(between, opset, left):
    body = f"c = Conv(x, W)\n {between}\n y = {BN}(t, g, s, m, v)"
    graph = build(IMAGE, body, opset=opset, kind="float", W=(4, 4, 1, 1), **NORM)
    affine(graph)
    assert [op for op in ops(graph) if op in (BN, "Add")] == left


def test_dropout_with_a_training_switch_stops_a_map():
    body = f"c = Conv(x, W)\n t = Dropout(c, ratio, on)\n y = {BN}(t, g, s, m, v)"
    graph = build(IMAGE, body, W=(4, 4, 1, 1), ratio=np.float32(0.5), on=np.array(True), **NORM)
    reason = "Dropout with a training switch is in between; its result is an output of the graph"
    assert reasons(FoldAffine().apply(graph, Context())) == [f"{BN}: {reason}"]


def test_what_has_to_stay_needs_a_known_rank():
    body = f"n = {BN}(x, g, s, m, v)\n y = Conv<pads=[1,1,1,1]>(n, W)"
    graph = build("(float[] x) => (float[] y)", body, W=(3, 4, 3, 3), **NORM)
    outcome = FoldAffine().apply(graph, Context())
    assert not outcome.changed
    assert reasons(outcome) == [f"{BN}: the rank of its input is unknown; an input of the graph precedes it"]
