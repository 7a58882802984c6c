from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from channelfold.passes import pipeline
from channelfold.passes.base import Context
from channelfold.passes.layers.linear import GROWTH_LIMIT, linears
from channelfold.passes.smooth import Equalize
from channelfold.runtime.errors import UsageError
from channelfold.runtime.io.snapshot import Snapshot
from channelfold.tests.graphs import assert_same, build, changes, constants, feeds, fold, listing, random, reasons, run

IMAGE = "(float[N,3,8,8] x) => (float[] y)"
ROWS = "(float[N,6] x) => (float[] y)"
TOKENS = "(float[N,5,6] x) => (float[] y)"
BLOCK = """
    a = Conv(x, A, a0)
    b = Relu(a)
    c = Conv<group=8, pads=[1,1,1,1]>(b, D, d0)
    d = Relu(c)
    y = Conv(d, B, b0)
"""
MOBILE: dict[str, Any] = {"A": (8, 3, 1, 1), "D": (8, 1, 3, 3), "B": (4, 8, 1, 1), "a0": 8, "d0": 8, "b0": 4}


def equalize(graph, **options):
    return fold(Equalize(**options), graph)


def weights(graph):
    return [linear.weight() for linear in linears(graph)]


def rows(weight):
    return np.abs(weight).reshape(len(weight), -1).max(axis=1)


def columns(weight):
    return np.abs(weight).max(axis=(0, *range(2, weight.ndim)))


def per_tensor_error(weight):
    """The error that one int8 scale leaves, of the power of each row, on average."""
    scale = np.abs(weight).max() / 127
    error, weight = (np.reshape(w, (len(weight), -1)) for w in (weight - np.rint(weight / scale) * scale, weight))
    return float(np.mean(np.sum(error**2, axis=1) / np.sum(weight**2, axis=1)))


# ---- ranges ------------------------------------------------------------------------------------------------------

PAIRS = {
    "conv": (IMAGE, "a = Conv(x, A, b)\n r = Relu(a)\n y = Conv(r, B)", {"A": (4, 3, 2, 2), "b": 4, "B": (5, 4, 3, 3)}),
    "padded conv": (
        IMAGE, "a = Conv(x, A, b)\n r = Relu(a)\n y = Conv<pads=[1,1,1,1]>(r, B)",
        {"A": (4, 3, 2, 2), "b": 4, "B": (5, 4, 3, 3)},
    ),
    "transposed conv": (
        IMAGE, "a = ConvTranspose(x, A, b)\n r = Relu(a)\n y = ConvTranspose<group=2>(r, B)",
        {"A": (3, 4, 2, 2), "b": 4, "B": (4, 3, 2, 2)},
    ),
    "pooling": (
        IMAGE, "a = Conv(x, A)\n l = LeakyRelu<alpha=0.2>(a)\n m = MaxPool<kernel_shape=[2,2]>(l)\n y = Conv(m, B)",
        {"A": (4, 3, 1, 1), "B": (5, 4, 1, 1)},
    ),
    "slopes": (
        IMAGE, "a = Conv(x, A)\n p = PRelu(a, s)\n y = Conv(p, B)",
        {"A": (4, 3, 1, 1), "s": (4, 1, 1), "B": (5, 4, 1, 1)},
    ),
    "no activation": (ROWS, "a = Gemm(x, A, b)\n y = Gemm<transB=1>(a, B)", {"A": (6, 4), "b": 4, "B": (3, 4)}),
    "matmul": (TOKENS, "t = MatMul(x, A)\n a = Add(t, b)\n r = Relu(a)\n y = MatMul(r, B)",
               {"A": (6, 4), "b": 4, "B": (4, 3)}),
    "head": (IMAGE, "a = Conv(x, A)\n r = Relu(a)\n p = GlobalAveragePool(r)\n f = Flatten(p)\n y = Gemm(f, B)",
             {"A": (4, 3, 1, 1), "B": (4, 3)}),
}  # fmt: skip


@pytest.mark.parametrize("case", PAIRS)
def test_ranges_are_equal_on_both_sides(case):
    signature, body, given = PAIRS[case]
    graph = build(signature, body, **given)
    nodes = listing(graph)
    first, second = weights(graph)
    middle = np.sqrt(rows(first) * (per_input(second, 4)))
    outcome = equalize(graph)
    first, second = weights(graph)
    np.testing.assert_allclose(rows(first), middle, rtol=1e-12)
    np.testing.assert_allclose(per_input(second, 4), middle, rtol=1e-12)
    assert listing(graph) == nodes
    assert len(outcome.changed) == 1
    assert (outcome.facts["regions"], outcome.facts["scaled"]) == (1, 1)
    assert outcome.facts["iterations"] == 2  # the second finds nothing to do


def per_input(weight, ins):
    """The column ranges of a weight that may have groups."""
    groups = ins // weight.shape[1]
    return np.concatenate([columns(part) for part in np.split(weight, groups)])


def test_a_channel_is_told_what_it_was_scaled_by():
    eye = np.eye(2).reshape(2, 2, 1, 1)
    graph = build(
        "(float[1,2,2,2] x) => (float[] y)",
        "a = Conv(x, A, b)\n r = Relu(a)\n y = Conv(r, B)",
        A=eye * [[[[16.0]]], [[[1.0]]]],
        b=np.array([8.0, 3.0]),
        B=eye,
    )
    outcome = equalize(graph)
    assert changes(outcome) == ["Conv: 2 channels of 2 weights, scales 1 to 4"]
    assert outcome.changed[0].node == "Conv_0"
    first, second = linears(graph)
    np.testing.assert_array_equal(first.weight()[:, :, 0, 0], [[4, 0], [0, 1]])
    np.testing.assert_array_equal(first.bias(), [2, 3])
    np.testing.assert_array_equal(second.weight()[:, :, 0, 0], [[4, 0], [0, 1]])


def test_a_mobilenet_block():
    graph = build(IMAGE, BLOCK, **MOBILE)
    outcome = equalize(graph)
    expand, depthwise, project = weights(graph)
    np.testing.assert_allclose(rows(expand), rows(depthwise), rtol=1e-4)  # of the last round
    np.testing.assert_allclose(rows(depthwise), columns(project), rtol=1e-4)
    # The product of the three ranges of a channel cannot change, so each is its third root.
    before = weights(build(IMAGE, BLOCK, **MOBILE))
    root = np.cbrt(rows(before[0]) * rows(before[1]) * columns(before[2]))
    np.testing.assert_allclose(rows(depthwise), root, rtol=1e-4)
    assert [change.node for change in outcome.changed] == ["Conv_0", "Conv_2"]


def test_what_writes_and_reads_a_residual_stream_is_one_region():
    body = """
        s = Conv(x, A, a0)
        r = Relu(s)
        h = Conv(r, B, b0)
        g = Relu(h)
        u = Conv(g, C)
        t = Add(r, u)
        w = Relu(t)
        p = Conv(w, D)
        q = Conv(w, E)
        y = Concat<axis=1>(p, q)
    """
    shapes = {"A": (4, 3, 1, 1), "a0": 4, "B": (5, 4, 1, 1), "b0": 5, "C": (4, 5, 1, 1)}
    graph = build(IMAGE, body, **shapes, D=(2, 4, 1, 1), E=(3, 4, 1, 1))
    outcome = equalize(graph)
    a, b, c, d, e = weights(graph)
    written, read = np.maximum(rows(a), rows(c)), np.max([columns(w) for w in (b, d, e)], axis=0)
    np.testing.assert_allclose(written, read, rtol=1e-4)
    np.testing.assert_allclose(rows(b), columns(c), rtol=1e-4)
    assert changes(outcome)[0].startswith("Conv: 4 channels of 5 weights, ")
    assert reasons(outcome) == ["Conv is not equalized with what follows: it is an output of the graph"]


def test_a_weight_that_writes_what_it_reads_is_balanced():
    body = "s = Gemm(x, A)\n u = Gemm(s, B)\n t = Add(s, u)\n y = Gemm(t, C)"
    swing = np.array([[0.0, 64.0], [1.0, 0.0]])  # a whole step would turn it into its transpose, for ever
    graph = build("(float[N,3] x) => (float[] y)", body, A=(3, 2), B=swing, C=(2, 3))
    outcome = equalize(graph)
    a, b, c = weights(graph)
    np.testing.assert_allclose(np.maximum(rows(a), rows(b)), np.maximum(columns(b), columns(c)), rtol=1e-3)
    np.testing.assert_allclose(np.abs(b).max(), 8, rtol=1e-3)
    assert outcome.facts["iterations"] < 30


ATTENTION = """
    q0 = MatMul(x, Q)
    k0 = MatMul(x, K)
    v0 = MatMul(x, V)
    q1 = Reshape(q0, heads)
    k1 = Reshape(k0, heads)
    v1 = Reshape(v0, heads)
    q = Transpose<perm=[0,2,1,3]>(q1)
    k = Transpose<perm=[0,2,3,1]>(k1)
    v = Transpose<perm=[0,2,1,3]>(v1)
    s = MatMul(q, k)
    p = Softmax<axis=-1>(s)
    o0 = MatMul(p, v)
    o1 = Transpose<perm=[0,2,1,3]>(o0)
    o = Reshape(o1, flat)
    y = MatMul(o, O)
"""


def test_attention_is_equalized_between_q_and_k_and_between_v_and_o():
    shapes = {"heads": np.array([0, 0, 2, 3]), "flat": np.array([0, 0, 6])}
    graph = build(TOKENS, ATTENTION, Q=(6, 6), K=(6, 6), V=(6, 6), O=(6, 6), **shapes)
    outcome = equalize(graph)
    q, k, v, o = weights(graph)
    np.testing.assert_allclose(rows(q), rows(k), rtol=1e-12)
    np.testing.assert_allclose(rows(v), columns(o), rtol=1e-12)
    assert len(outcome.changed) == 2


def test_what_is_planted_is_found_again():
    plain = build(IMAGE, BLOCK, **MOBILE)
    expand, depthwise, _ = weights(plain)
    scale = np.ones(8)
    scale[2] = 100.0
    planted = build(
        IMAGE, BLOCK, **MOBILE | {
            "A": expand * scale.reshape(-1, 1, 1, 1),
            "a0": random(8, "a0") * scale,
            "D": depthwise / scale.reshape(-1, 1, 1, 1),
        },
    )  # fmt: skip
    assert per_tensor_error(weights(planted)[0]) > 50 * per_tensor_error(weights(plain)[0])
    equalize(planted)
    equalize(plain)
    for one, other in zip(weights(planted), weights(plain), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), widths=st.lists(st.integers(1, 6), min_size=2, max_size=6), spread=st.floats(0, 3)
)
@example(seed=62, widths=[5, 1], spread=3.0)  # a channel that is dead only until the largest has been scaled
def test_a_chain_of_any_length_and_spread_is_equal_everywhere(seed, widths, spread):
    rng = np.random.default_rng(seed)
    sizes = [4, *widths]
    body: list[str] = []
    given_: dict[str, Any] = {}
    tensor = "x"
    for i, (ins, outs) in enumerate(itertools.pairwise(sizes)):
        out = "y" if i == len(widths) - 1 else f"g{i}"
        body += [f"{out} = Gemm({tensor}, W{i}, b{i})"] + ([f"r{i} = Relu({out})"] if out != "y" else [])
        given_ |= {f"W{i}": rng.normal(size=(ins, outs)) * np.exp(rng.normal(size=outs) * spread)}
        given_ |= {f"b{i}": rng.normal(size=outs)}
        tensor = f"r{i}"
    graph = build("(float[N,4] x) => (float[] y)", "\n".join(body), **given_)
    equalize(graph, iterations=1000)
    for one, other in itertools.pairwise(weights(graph)):
        np.testing.assert_allclose(rows(one), columns(other), rtol=0.03)  # less than WORTHWHILE a side, and its square


def test_one_scale_per_tensor_costs_less_afterwards():
    spread = np.exp(2 * random(8, "spread")).reshape(-1, 1, 1, 1)
    graph = build(IMAGE, BLOCK, **MOBILE | {"A": random((8, 3, 1, 1), "A") * spread})
    before = [per_tensor_error(weight) for weight in weights(graph)]
    equalize(graph)
    after = [per_tensor_error(weight) for weight in weights(graph)]
    assert sum(after) < sum(before) / 5


# ---- what stays --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        ("r = Clip(a, zero, six)", "Clip reads it"),
        ("s = Sigmoid(a)\n r = Mul(a, s)", "Sigmoid reads it"),
        ("r = Tanh(a)", "Tanh reads it"),
        ("r = Mul(a, c)", "Mul ends it"),
    ],
)
def test_what_a_scale_does_not_pass_is_refused(between, reason):
    named = {"zero": 0.0, "six": 6.0, "c": (4, 1, 1)}
    used = {name: value for name, value in named.items() if f" {name}" in between}
    graph = build(IMAGE, f"a = Conv(x, A)\n {between}\n y = Conv(r, B)", A=(4, 3, 1, 1), B=(2, 4, 1, 1), **used)
    outcome = equalize(graph)
    assert not outcome.changed
    assert reasons(outcome)[0] == f"Conv is not equalized with what follows: {reason}"


def test_what_a_norm_writes_is_left_to_smoothing():
    body = "n = LayerNormalization(x, g)\n a = MatMul(n, A)\n t = Add(n, a)\n y = MatMul(t, B)"
    graph = build(TOKENS, body, g=6, A=(6, 6), B=(6, 3))
    outcome = equalize(graph)
    assert not outcome.changed
    assert reasons(outcome)[0] == "MatMul is not equalized with what follows: LayerNormalization writes it, too"


def test_dead_channels_stay():
    first, second = random((4, 3, 1, 1), "A"), random((5, 4, 1, 1), "B")
    first[0] = 0
    first[1] *= 1e-9
    second[:, 2] = 0
    graph = build(IMAGE, "a = Conv(x, A, b)\n r = Relu(a)\n y = Conv(r, B)", A=first, b=4, B=second)
    equalize(graph)
    np.testing.assert_array_equal(weights(graph)[0][:3], first[:3])
    bias = linears(graph)[0].bias()
    assert bias is not None
    np.testing.assert_array_equal(bias[:3], random(4, "b")[:3])
    assert rows(weights(graph)[0])[3] == pytest.approx(columns(weights(graph)[1])[3], rel=1e-12)


def test_an_excluded_weight_keeps_its_scale():
    graph = build(IMAGE, BLOCK, **MOBILE)
    before = weights(graph)
    outcome = equalize(graph, exclude=("Conv_4",))
    np.testing.assert_array_equal(weights(graph)[2], before[2])
    assert [change.node for change in outcome.changed] == ["Conv_0"]
    assert "Conv is not equalized with what follows: Conv_4 is excluded by pattern 'Conv_4'" in reasons(outcome)


def test_a_large_weight_that_others_read_too_stays():
    width = 600
    assert 4 * width**2 > GROWTH_LIMIT
    body = "a = Gemm(x, A)\n r = Relu(a)\n y = Gemm(r, B)\n z = Sin(B)"
    graph = build(f"(float[N,{width}] x) => (float[] y, float[] z)", body, kind="float", A=2 * random((width, width)),
                  B=(width, width))  # fmt: skip
    outcome = equalize(graph)
    assert not outcome.changed
    assert "would make the file 1.4 MB larger" in reasons(outcome)[-1]


def test_float16_stays_within_its_range():
    first = random((4, 3, 1, 1), "A") * 1e-3
    bias = np.full(4, 60000.0)
    graph = build(IMAGE, "a = Conv(x, A, b)\n r = Relu(a)\n y = Conv(r, B)", kind="float16", A=first, b=bias,
                  B=(5, 4, 1, 1))  # fmt: skip
    outcome = Equalize().apply(graph, Context())
    assert not outcome.changed
    assert "does not fit float16" in reasons(outcome)[-1]


def test_float16_is_equal_to_its_rounding():
    graph = build(IMAGE, BLOCK, kind="float16", **MOBILE)
    fold(Equalize(), graph, rtol=2e-2)
    expand, depthwise, _ = weights(graph)
    np.testing.assert_allclose(rows(expand), rows(depthwise), rtol=2e-3)  # two roundings to 11 bits


def test_the_limit_of_rounds_holds():
    graph = build(IMAGE, BLOCK, **MOBILE)
    before = run(graph, feeds(graph))["y"]
    outcome = Equalize(iterations=1).apply(graph, Context())
    assert outcome.facts["iterations"] == 1
    assert outcome.facts["last_step"] > 1e-2
    np.testing.assert_allclose(run(graph, feeds(graph))["y"], before, rtol=0, atol=1e-12 * np.abs(before).max())


def test_no_rounds_are_an_error():
    with pytest.raises(UsageError, match=r"'iterations' is 0\. Expected at least 1"):
        Equalize(iterations=0)


def test_it_keeps_the_contract_of_an_exact_pass():
    graph = build(IMAGE, BLOCK, kind="float", **MOBILE)
    _, (record,) = pipeline.run(graph, [Equalize()], Context())
    assert record["kind"] == "exact"
    assert record["verified"]["max_rel_error"] < 1e-6
    assert len(record["changed"]) == 2


def test_a_graph_without_weights_is_left_alone():
    graph = build(IMAGE, "y = Relu(x)")
    outcome = equalize(graph)
    assert (outcome.changed, outcome.refused, outcome.facts["iterations"]) == ([], [], 0)


# ---- Clip --------------------------------------------------------------------------------------------------------

RELU6 = "a = Conv(x, A, a0)\n r = Clip(a, low, high)\n y = Conv(r, B)"
RELU6_SHAPES: dict[str, Any] = {"A": (4, 3, 1, 1), "a0": 4, "B": (5, 4, 3, 3), "low": 0.0, "high": 1.5}


def test_a_clip_from_zero_gets_a_bound_by_channel():
    graph = build(IMAGE, RELU6, **RELU6_SHAPES)
    feed = feeds(graph)
    before = run(graph, feed)
    first, second = weights(graph)
    scale = np.sqrt(rows(first) / columns(second))
    outcome = Equalize(allow_insert=True).apply(graph, Context())
    assert_same(before, run(graph, feed))
    assert listing(graph).splitlines() == [
        "a = Conv(x, A, a0)",
        "Clip_1_relu = Relu(a)",
        "r = Min(Clip_1_relu, Clip_1_max)",
        "y = Conv(r, B)",
    ]
    np.testing.assert_allclose(constants(graph)["Clip_1_max"].reshape(-1), 1.5 / scale, rtol=1e-12)
    np.testing.assert_allclose(rows(weights(graph)[0]), columns(weights(graph)[1]), rtol=1e-12)
    assert changes(outcome)[1:] == ["Clip: a Relu and a Min by channel in its place"]
    again = Equalize(allow_insert=True).apply(graph, Context())
    assert not again.changed
    assert (again.facts["regions"], again.facts["scaled"]) == (1, 0)


def test_the_bound_of_a_single_channel_is_scaled_too():
    shapes = {"A": (1, 3, 1, 1), "a0": 1, "B": (5, 1, 3, 3), "low": 0.0, "high": 1.5}
    graph = build(IMAGE, RELU6, **shapes)
    feed = feeds(graph)
    before = run(graph, feed)
    outcome = Equalize(allow_insert=True).apply(graph, Context())
    assert_same(before, run(graph, feed))
    assert len(outcome.changed) == 2


@pytest.mark.parametrize(("low", "high"), [(-1.5, 1.5), (0.0, 0.0), (0.1, 6.0)])
def test_other_clips_stay(low, high):
    graph = build(IMAGE, RELU6, **RELU6_SHAPES | {"low": low, "high": high})
    outcome = equalize(graph, allow_insert=True)
    assert reasons(outcome)[0] == "Conv is not equalized with what follows: Clip reads it"


def test_a_clip_is_put_back_where_nothing_is_scaled():
    graph = build(IMAGE, "a = Conv(x, A)\n r = Clip(a, low, high)\n y = Sigmoid(r)", A=(4, 3, 1, 1), low=0.0, high=6.0)
    before = Snapshot.of(graph)
    outcome = equalize(graph, allow_insert=True)
    assert not outcome.changed
    assert before.same(Snapshot.of(graph))


def test_a_clip_with_attributes_is_raised_to_one_with_inputs():
    body = "a = Conv(x, A)\n r = Clip<min=0.0, max=6.0>(a)\n y = Conv(r, B)"
    graph = build(IMAGE, body, opset=10, kind="float", A=(4, 3, 1, 1), B=(5, 4, 1, 1))
    graph, (raised, record) = pipeline.run(graph, [Equalize(allow_insert=True)], Context())
    assert raised["pass"] == "raise-opset"
    assert record["verified"]["max_rel_error"] < 1e-6
    assert [node.op for node in graph.nodes] == ["Conv", "Relu", "Min", "Conv"]
