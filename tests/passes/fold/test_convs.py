from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from channelfold.passes.base import Context
from channelfold.passes.fold import FoldAffine, MergeConvs
from channelfold.passes.pipeline import run as run_pipeline
from channelfold.runtime.errors import UsageError
from channelfold.tests.graphs import (
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

ANY = MergeConvs(max_macs_growth=float("inf"))
IMAGE = "(float[N,4,7,8] x) => (float[] y)"
CLR = "c = Conv<strides=[2,2]>(x, W)\n y = Conv<pads=[1,1,1,1], group=6>(c, D)"
WEIGHTS = {"W": (6, 4, 1, 1), "D": (6, 1, 3, 3)}


# ---- what is merged ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["double", "float"])
def test_pointwise_and_depthwise_become_one_conv_when_asked(kind):
    graph = build(IMAGE, CLR, kind=kind, **WEIGHTS)
    pointwise, depthwise = (constants(graph)[name].astype(np.float64) for name in WEIGHTS)
    outcome = fold(ANY, graph)
    assert listing(graph) == (
        "y = Conv<dilations=[2, 2], group=1, kernel_shape=[3, 3], pads=[2, 2, 2, 2], strides=[2, 2]>(x, D)"
    )
    assert np.array_equal(constants(graph)["D"], (pointwise * depthwise).astype(graph.inputs[0].dtype))
    assert (outcome.changed[0].node, changes(outcome)) == ("Conv_1", ["Conv_0 merged into it, 2.77 times the MACs"])


def test_and_not_when_not_asked():
    outcome = fold(MergeConvs(), graph := build(IMAGE, CLR, **WEIGHTS))
    assert ops(graph) == ["Conv", "Conv"]
    limit = "(max_macs_growth is 1)"
    reason = f"Conv: merged with the Conv in front of it, it would take 2.77 times the MACs of both {limit}"
    assert reasons(outcome) == [reason]  # 6 * 4 * 9 / (6 * 4 + 6 * 9)
    assert outcome.refused[0].code == f"too many MACs {limit}"


def test_the_limit_is_the_largest_growth_that_is_allowed():
    assert not fold(MergeConvs(max_macs_growth=2.76), build(IMAGE, CLR, **WEIGHTS)).changed
    assert fold(MergeConvs(max_macs_growth=216 / 78), build(IMAGE, CLR, **WEIGHTS)).changed


def test_a_re_parameterizable_layer_with_its_batchnorm():
    body = f"{CLR.replace('y =', 'd =')}\n r = BatchNormalization(d, g, s, m, v)\n y = Relu(r)"
    graph = build(IMAGE, body, g=6, s=6, m=6, v=positive(6), **WEIGHTS)
    fold(FoldAffine(), graph)
    fold(ANY, graph)
    assert ops(graph) == ["Conv", "Relu"]


@pytest.mark.parametrize(
    ("bias", "merged"), [("", ""), ("b", ", Conv_1_bias"), ("c", ", c"), ("bc", ", c")], ids=["none", "b", "c", "both"]
)
def test_pointwise_convs_become_one(bias, merged):
    given = {name: shape for name, shape in (("b", 12), ("c", 8)) if name in bias}
    first, second = (f", {name}" if name in bias else "" for name in "bc")
    body = f"t = Conv<strides=[2,1]>(x, W{first})\n y = Conv<strides=[1,3]>(t, V{second})"
    graph = build("(float[N,8,5,6] x) => (float[] y)", body, W=(12, 8, 1, 1), V=(8, 12, 1, 1), **given)
    old = constants(graph)
    outcome = fold(MergeConvs(), graph)
    attrs = "dilations=[1, 1], group=1, kernel_shape=[1, 1], pads=[0, 0, 0, 0], strides=[2, 3]"
    assert listing(graph) == f"y = Conv<{attrs}>(x, V{merged})"
    # of the base, the second conv reads every third column: 3 * 12 * 8 + 8 * 12 MACs for both, 8 * 8 for the one
    assert changes(outcome) == ["Conv_0 merged into it, 0.167 times the MACs"]
    v, w = old["V"][:, :, 0, 0], old["W"][:, :, 0, 0]
    assert constants(graph)["V"][:, :, 0, 0] == pytest.approx(v @ w, rel=1e-12, abs=1e-12)
    if bias:
        expected = v @ old.get("b", np.zeros(12)) + old.get("c", np.zeros(8))
        assert constants(graph)[merged[2:]] == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(("middle", "convs"), [(3, 2), (4, 1), (5, 1)])
def test_a_bottleneck_stays(middle, convs):
    """Between 8 and 8 channels, through ``middle``: 16 * middle MACs for two, 64 for one."""
    given = {"W": (middle, 8, 1, 1), "V": (8, middle, 1, 1)}
    graph = build("(float[N,8,5,6] x) => (float[] y)", "t = Conv(x, W)\n y = Conv(t, V)", **given)
    fold(MergeConvs(), graph)
    assert len(graph.nodes) == convs


def test_a_bias_passes_a_depthwise_conv_that_does_not_pad():
    body = "c = Conv(x, W, b)\n y = Conv<group=6>(c, D, a)"
    graph = build(IMAGE, body, b=6, a=6, **WEIGHTS)
    old = constants(graph)
    fold(ANY, graph)
    assert listing(graph).endswith("(x, D, a)")
    assert constants(graph)["a"] == pytest.approx(old["b"] * old["D"].sum((1, 2, 3)) + old["a"], rel=1e-12)


def test_a_bias_of_zeros_is_none():
    graph = build(IMAGE, CLR.replace("(x, W)", "(x, W, b)"), b=np.zeros(6), **WEIGHTS)
    fold(ANY, graph)
    assert listing(graph).endswith("(x, D)")


def test_padding_of_the_base_is_added_and_auto_pad_valid_is_none():
    body = 'c = Conv<pads=[1,0,2,3], strides=[3,2]>(x, W)\n y = Conv<auto_pad="VALID", group=6>(c, D)'
    graph = build(IMAGE, body, kind="float", **WEIGHTS)
    fold(ANY, graph)
    assert graph.nodes[0].attrs == {
        "dilations": [3, 2], "group": 1, "kernel_shape": [3, 3], "pads": [1, 0, 2, 3], "strides": [3, 2]
    }  # fmt: skip


def test_an_expanding_layer_in_front_of_a_pointwise_one_keeps_its_kernel():
    body = "c = Conv<pads=[1,1,1,1], dilations=[2,1], strides=[1,2]>(x, W, b)\n y = Conv<strides=[2,1]>(c, V)"
    graph = build(IMAGE, body, W=(16, 4, 3, 3), b=16, V=(2, 16, 1, 1))
    fold(MergeConvs(), graph)
    assert listing(graph) == (
        "y = Conv<dilations=[2, 1], group=1, kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2]>(x, V, Conv_1_bias)"
    )


def test_separable_kernels_become_one_when_asked():
    body = "c = Conv<pads=[0,1,0,1]>(x, W)\n y = Conv<pads=[1,0,1,0]>(c, V)"
    graph = build(IMAGE, body, W=(5, 4, 1, 3), V=(4, 5, 3, 1))
    outcome = fold(ANY, graph)
    assert node(graph, "Conv").attrs["kernel_shape"] == [3, 3]
    assert changes(outcome) == [f"Conv_0 merged into it, {144 / 120:.3g} times the MACs"]


def test_groups_meet_in_their_greatest_common_divisor():
    body = "c = Conv<group=6>(x, W)\n y = Conv<group=4, pads=[1,1,1,1]>(c, V)"
    graph = build("(float[N,12,5,5] x) => (float[] y)", body, W=(12, 2, 1, 1), V=(8, 3, 3, 3))
    fold(ANY, graph)
    assert graph.nodes[0].attrs["group"] == 2
    assert constants(graph)["V"].shape == (8, 6, 3, 3)


def test_depthwise_convs_stay_depthwise():
    graph = build(IMAGE, "c = Conv<group=4>(x, W)\n y = Conv<group=4>(c, D)", W=(4, 1, 1, 1), D=(4, 1, 3, 3))
    assert changes(fold(MergeConvs(), graph)) == ["Conv_0 merged into it, 0.9 times the MACs"]
    assert graph.nodes[0].attrs["group"] == 4


def test_a_run_of_convs():
    """The first two alone would take more MACs; all three together take fewer."""
    body = "a = Conv(x, A)\n b = Conv(a, B)\n y = Conv(b, C)"
    graph = build(IMAGE, body, A=(1, 4, 1, 1), B=(8, 1, 1, 1), C=(1, 8, 1, 1))
    outcome = fold(MergeConvs(), graph)
    assert ops(graph) == ["Conv"]
    assert [change.node for change in outcome.changed] == ["Conv_2", "Conv_2"]
    assert not outcome.refused


def test_shared_weights_are_not_written():
    body = "c = Conv(x, W)\n d = Conv(c, V)\n e = Conv(x, W)\n f = Conv(e, V)\n r = Relu(d)\n y = Sub(f, r)"
    graph = build(IMAGE, body, W=(6, 4, 1, 1), V=(1, 6, 1, 1))
    fold(MergeConvs(), graph)
    assert ops(graph) == ["Conv", "Conv", "Relu", "Sub"]
    assert [n.inputs[1].name for n in graph.nodes[:2]] == ["V_folded", "V"]


def test_weights_behind_transposes_take_these_along():
    body = """
        w = Transpose<perm=[1,0,2,3]>(W)
        c = Conv(x, w)
        v = Transpose<perm=[1,0,2,3]>(V)
        d = Conv(c, v)
        u = Transpose<perm=[1,0,2,3]>(W)
        y = Conv(d, u)
    """
    graph = build(IMAGE, body, W=(4, 6, 1, 1), V=(6, 4, 1, 1))
    fold(MergeConvs(), graph)
    assert ops(graph) == ["Conv"]


def test_a_transpose_that_another_conv_reads_stays():
    body = "w = Transpose<perm=[1,0,2,3]>(W)\n c = Conv(x, w)\n d = Conv(c, V)\n e = Conv(x, w)\n y = Add(d, e)"
    graph = build(IMAGE, body, W=(4, 6, 1, 1), V=(6, 6, 1, 1))
    fold(MergeConvs(), graph)
    assert ops(graph) == ["Transpose", "Conv", "Conv", "Add"]


@pytest.mark.parametrize("axes", [1, 2, 3])
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(st.data())
def test_random_pairs(axes, data):
    """Merged or refused for a reason that is true, and equal to 1e-12 of the largest output."""
    pick = lambda *choices: data.draw(st.sampled_from(choices))  # noqa: E731
    g1, g2, size = pick(1, 2, 3, 6), pick(1, 2, 3, 6), 13
    narrow = [pick("first", "second", "both") for _ in range(axes)]
    kernels = [[1 if who in (name, "both") else pick(2, 3) for who in narrow] for name in ("first", "second")]
    geometry = [
        {"strides": [pick(1, 1, 2, 3) for _ in range(axes)], "dilations": [pick(1, 2) for _ in range(axes)],
         "pads": [pick(0, 0, 1, 2) for _ in range(2 * axes)]} for _ in range(2)
    ]  # fmt: skip
    biases = [pick("", name) for name in ("b", "c")]
    text = [", ".join(f"{k}={v}" for k, v in attrs.items()) for attrs in geometry]
    inputs = [f", {name}" if name else "" for name in biases]
    body = f"t = Conv<group={g1}, {text[0]}>(x, W{inputs[0]})\n y = Conv<group={g2}, {text[1]}>(t, V{inputs[1]})"
    given = {"W": (6, 12 // g1, *kernels[0]), "V": (12, 6 // g2, *kernels[1]), **{name: {"b": 6, "c": 12}[name]
             for name in biases if name}}  # fmt: skip
    graph = build(f"(float[1,12,{','.join([str(size)] * axes)}] x) => (float[] y)", body, **given)
    outcome = fold(ANY, graph)
    padded = any(geometry[1]["pads"])
    seen = any(kernels[0][a] > 1 and (geometry[1]["pads"][a] or geometry[1]["pads"][a + axes]) for a in range(axes))
    assert bool(outcome.refused) == bool((biases[0] and padded) or seen)
    assert len(graph.nodes) == (2 if outcome.refused else 1)


def test_the_pipeline_verifies_it():
    graph = build(IMAGE, CLR, kind="float", **WEIGHTS)
    _, steps = run_pipeline(graph, [ANY], Context())
    assert steps[0]["verified"]["max_rel_error"] < 1e-6
    assert steps[0]["options"] == {"max_macs_growth": float("inf")}


# ---- a conv that returns its input -------------------------------------------------------------------------------


def delta(channels: int, *kernel: int, at: tuple[int, ...], dense: bool = False) -> np.ndarray:
    weight = np.zeros((channels, channels if dense else 1, *kernel))
    weight[np.arange(channels), np.arange(channels) if dense else 0, *at] = 1
    return weight


@pytest.mark.parametrize(
    ("conv", "weight"),
    [
        ("Conv<pads=[1,1,1,1], group=6>(c, D)", delta(6, 3, 3, at=(1, 1))),
        ("Conv<pads=[2,1,2,1], dilations=[2,1], group=6>(c, D)", delta(6, 3, 3, at=(1, 1))),
        ("Conv<pads=[0,2,1,0], group=6>(c, D)", delta(6, 2, 3, at=(0, 2))),
        ("Conv<group=6>(c, D)", delta(6, 1, 1, at=(0, 0))),
        ("Conv(c, D)", delta(6, 1, 1, at=(0, 0), dense=True)),
        ("Conv<pads=[1,1,1,1], group=6>(c, D, z)", delta(6, 3, 3, at=(1, 1))),
    ],
)
def test_an_identity_is_removed(conv, weight):
    given = {"z": np.zeros(6)} if "z" in conv else {}
    graph = build(IMAGE, f"c = Conv(x, W)\n y = {conv}", W=(6, 4, 3, 3), D=weight, **given)
    outcome = fold(MergeConvs(), graph, rtol=0)
    assert listing(graph) == "y = Conv(x, W)"
    assert changes(outcome) == ["Conv returns its input"]


def test_an_identity_is_removed_whatever_is_in_front_of_it():
    body = "c = Conv(x, W)\n r = Relu(c)\n d = Conv<pads=[1,1,1,1], group=6>(r, D)\n y = Add(d, r)"
    graph = build(IMAGE, body, W=(6, 4, 3, 3), D=delta(6, 3, 3, at=(1, 1)))
    fold(MergeConvs(), graph, rtol=0)
    assert listing(graph) == "c = Conv(x, W)\nr = Relu(c)\ny = Add(r, r)"


@pytest.mark.parametrize(
    ("conv", "weight", "bias"),
    [
        ("Conv<pads=[1,1,1,1], group=6>(r, D)", delta(6, 3, 3, at=(1, 0)), 0),
        ("Conv<pads=[0,0,2,2], group=6>(r, D)", delta(6, 3, 3, at=(1, 1)), 0),
        ("Conv<pads=[1,1,1,1], group=6>(r, D)", 2 * delta(6, 3, 3, at=(1, 1)), 0),
        ("Conv<pads=[1,1,1,1], group=6>(r, D)", delta(6, 3, 3, at=(1, 1)) + 1e-9, 0),
        ("Conv<pads=[1,1,1,1], group=6, strides=[2,2]>(r, D)", delta(6, 3, 3, at=(1, 1)), 0),
        ("Conv<group=6>(r, D)", delta(6, 3, 3, at=(1, 1)), 0),
        ("Conv<pads=[1,1,1,1], group=6>(r, D, z)", delta(6, 3, 3, at=(1, 1)), 1e-9),
        ("Conv(r, D)", delta(6, 1, 1, at=(0, 0), dense=True)[::-1], 0),
        ("Conv<group=6>(r, D)", np.concatenate(2 * [delta(6, 1, 1, at=(0, 0))]), 0),
    ],
)
def test_what_is_nearly_an_identity_stays(conv, weight, bias):
    given = {"z": np.full(6, bias)} if bias else {}
    graph = build(IMAGE, f"c = Conv(x, W)\n r = Relu(c)\n y = {conv}", W=(6, 4, 3, 3), D=weight, **given)
    outcome = fold(MergeConvs(), graph)
    assert (ops(graph), outcome.changed, outcome.refused) == (["Conv", "Relu", "Conv"], [], [])


def test_an_identity_between_an_input_and_an_output_stays():
    graph = build(IMAGE, "y = Conv<group=4>(x, D)", D=delta(4, 1, 1, at=(0, 0)))
    assert not fold(MergeConvs(), graph).changed


# ---- what is refused ---------------------------------------------------------------------------------------------

SHARED = "the Conv in front of it has other readers, or is an output of the graph"
REFUSED = {
    "a bias in front of padding": (
        "c = Conv(x, W, b)\n y = Conv<pads=[1,1,1,1], group=6>(c, D)", {"b": 6},
        "the Conv in front of it has a bias, which does not pass its zero padding",
    ),
    "kernels of both": (
        "c = Conv<pads=[1,1,1,1]>(x, V)\n y = Conv<pads=[1,1,1,1], group=6>(c, D)", {"V": (6, 4, 3, 3), "W": None},
        "it and the Conv in front of it both have a kernel along one axis",
    ),
    "padding around a kernel's result": (
        "c = Conv(x, V)\n y = Conv<pads=[0,1,0,0], group=6>(c, E)", {"V": (6, 4, 3, 3), "E": (6, 1, 1, 1), "W": None,
        "D": None}, "it pads the result of a Conv with a kernel",
    ),
    "another reader": ("c = Conv(x, W)\n d = Conv<pads=[1,1,1,1], group=6>(c, D)\n y = Add(c, d)", {}, SHARED),
    "automatic padding": (
        'c = Conv(x, W)\n y = Conv<auto_pad="SAME_UPPER", group=6>(c, D)', {}, "Conv_1 pads by itself (SAME_UPPER)"
    ),
    "automatic padding of the base": (
        'c = Conv<auto_pad="SAME_LOWER">(x, W)\n y = Conv<group=6>(c, D)', {}, "Conv_0 pads by itself (SAME_LOWER)"
    ),
    "a computed weight": (
        "w = Exp(W)\n c = Conv(x, w)\n y = Conv<group=6>(c, D)", {},
        "Conv precedes it, but its weight is made at run time by Exp, from constants",
    ),
    "too small a product": (
        "c = Conv(x, W)\n y = Conv<group=6>(c, D)", {"W": np.full((6, 4, 1, 1), 1e-25), "D": np.full((6, 1, 3, 3),
        1e-25)}, "the folded weight, 1e-50 at most, is too small for float32",
    ),
    "too large a product": (
        "c = Conv(x, W)\n y = Conv<group=6>(c, D)", {"W": np.full((6, 4, 1, 1), 1e25), "D": np.full((6, 1, 3, 3),
        1e25)}, "a folded value of 1e+50 does not fit float32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_pairs_that_stay_say_why(case):
    body, changed, reason = REFUSED[case]
    weights = {name: values for name, values in {**WEIGHTS, **changed}.items() if values is not None}
    graph = build(IMAGE, body, kind="float", **weights)
    before, values = listing(graph), constants(graph)
    outcome = ANY.apply(graph, Context())
    assert (outcome.changed, reasons(outcome)) == ([], [f"Conv: {reason}"])
    assert listing(graph) == before
    assert all(np.array_equal(values[name], kept) for name, kept in constants(graph).items())


def test_a_base_that_is_an_output():
    graph = build("(float[N,4,7,8] x) => (float[] y, float[] c)", CLR, **WEIGHTS)
    assert reasons(fold(ANY, graph)) == [f"Conv: {SHARED}"]


def test_a_base_that_a_subgraph_reads():
    body = """
        c = Conv(x, W)
        d = Conv<group=6>(c, D)
        e = If(b) <then_branch = p () => (float[] q) { q = ReduceMax<keepdims=0>(c) }, else_branch = r () => (float[] t)
                  { t = ReduceMin<keepdims=0>(c) }>
        y = Add(d, e)
    """
    graph = build("(float[1,4,5,6] x, bool b) => (float[] y)", body, kind="float", **WEIGHTS)
    assert reasons(ANY.apply(graph, Context())) == [f"Conv: {SHARED}"]


def test_something_in_between_is_no_pair():
    graph = build(IMAGE, "c = Conv(x, W)\n r = Relu(c)\n y = Conv<group=6>(r, D)", **WEIGHTS)
    outcome = fold(ANY, graph)
    assert (outcome.changed, outcome.refused) == ([], [])


def test_a_refused_bias_shows_at_the_border_alone():
    """The reason for refusing it: with the bias let through, the inside agrees and the border does not."""
    given = {**WEIGHTS, "b": 6}
    graph = build(IMAGE, CLR.replace("(x, W)", "(x, W, b)").replace("strides=[2,2]", "strides=[1,1]"), **given)
    merged = build(IMAGE, "y = Conv<pads=[1,1,1,1]>(x, K, k)", K=random((6, 4, 1, 1), "W") * random((6, 1, 3, 3), "D"),
                   k=random(6, "b") * random((6, 1, 3, 3), "D").sum((1, 2, 3)))  # fmt: skip
    feed = feeds(graph)
    error = np.abs(run(graph, feed)["y"] - run(merged, feed)["y"])
    assert error[:, :, 1:-1, 1:-1].max() < 1e-12
    assert error[:, :, 0].min() > 1e-3


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_a_limit_that_is_none(limit):
    with pytest.raises(UsageError, match=r"'max_macs_growth' is .*Expected more than 0"):
        MergeConvs(max_macs_growth=limit)
