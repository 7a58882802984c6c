from __future__ import annotations

import numpy as np
import pytest

from channelfold.passes.base import Context
from channelfold.passes.fold import FoldAffine, FoldPad
from channelfold.tests.graphs import build, changes, constants, fold, listing, ops, positive, reasons

IMAGE = "(float[N,4,5,6] x) => (float[] y)"
SPACE = np.array([0, 0, 1, 0, 0, 0, 2, 3])
W = {"W": (3, 4, 2, 2)}


def test_the_zeros_of_a_pad_become_those_of_the_conv():
    graph = build(IMAGE, "p = Pad(x, q)\n y = Conv(p, W)", q=SPACE, **W)
    outcome = fold(FoldPad(), graph, rtol=0)
    assert listing(graph) == "y = Conv<pads=[1, 0, 2, 3]>(x, W)"
    assert (outcome.changed[0].node, changes(outcome)) == ("Pad_0", ["Pad: [1, 0, 2, 3] into Conv_1"])


@pytest.mark.parametrize(
    ("pad", "conv", "opset", "given", "pads"),
    [
        ("Pad(x, q)", "Conv<pads=[1,1,0,2], strides=[2,1], dilations=[1,2]>(p, W)", 17, {"q": SPACE}, [2, 1, 2, 5]),
        ("Pad(x, q)", 'Conv<auto_pad="VALID">(p, W)', 17, {"q": SPACE}, [1, 0, 2, 3]),
        ("Pad(x, q, z)", 'Conv<auto_pad="NOTSET">(p, W)', 17, {"q": SPACE, "z": 0.0}, [1, 0, 2, 3]),
        ("Pad<pads=[0,0,1,0,0,0,2,3], value=0.0>(x)", "Conv(p, W)", 9, {}, [1, 0, 2, 3]),
        ("Pad(x, q, , a)", "Conv(p, W)", 18, {"q": np.array([1, 2, 3, 4]), "a": np.array([3, -2])}, [2, 1, 4, 3]),
    ],
)  # fmt: skip
def test_pads_in_all_their_forms(pad, conv, opset, given, pads):
    graph = build(IMAGE, f"p = {pad}\n y = {conv}", opset=opset, kind="float", **given, **W)
    fold(FoldPad(), graph, rtol=0)
    assert ops(graph) == ["Conv"]
    assert graph.nodes[0].attrs["pads"] == pads
    assert "auto_pad" not in graph.nodes[0].attrs


def test_every_conv_that_reads_a_pad_gets_it():
    body = "p = Pad(x, q)\n a = Conv(p, W)\n b = Conv<pads=[0,1,0,1], kernel_shape=[2,4]>(p, V)\n y = Add(a, b)"
    graph = build(IMAGE, body, q=SPACE, V=(3, 4, 2, 4), **W)
    fold(FoldPad(), graph, rtol=0)
    assert [n.attrs.get("pads") for n in graph.nodes] == [[1, 0, 2, 3], [1, 1, 2, 4], None]


def test_pads_in_a_row():
    graph = build(IMAGE, "o = Pad(x, q)\n p = Pad(o, q)\n y = Conv(p, W)", q=SPACE, **W)
    fold(FoldPad(), graph, rtol=0)
    assert listing(graph) == "y = Conv<pads=[2, 0, 4, 6]>(x, W)"


@pytest.mark.parametrize("axes", [1, 3])
def test_convs_of_other_dimensions(axes):
    pads = np.array([0, 0, *[1] * axes, 0, 0, *[2] * axes])
    signature = f"(float[N,4,{','.join('4' * axes)}] x) => (float[] y)"
    graph = build(signature, "p = Pad(x, q)\n y = Conv(p, W)", q=pads, W=(3, 4, *[2] * axes))
    fold(FoldPad(), graph, rtol=0)
    assert graph.nodes[0].attrs["pads"] == [1] * axes + [2] * axes


def test_a_computed_weight_is_no_hindrance():
    graph = build("(float[1,4,5,6] x, float[3,4,2,2] w) => (float[] y)", "p = Pad(x, q)\n y = Conv(p, w)", q=SPACE)
    fold(FoldPad(), graph, rtol=0)
    assert ops(graph) == ["Conv"]


REFUSED = {
    "it pads the batch or the channels": (
        "p = Pad(x, q)\n y = Conv(p, W)", {"q": np.array([0, 0, 0, 0, 0, 1, 0, 0]), "W": (3, 5, 2, 2)}
    ),
    "its pads are negative": ("p = Pad(x, q)\n y = Conv(p, W)", {"q": np.array([0, 0, 1, 0, 0, 0, 0, -1]), **W}),
    "it pads with a value that is not zero, or that is computed at run time": (
        "p = Pad(x, q, one)\n y = Conv(p, W)", {"q": SPACE, "one": 1.0, **W}
    ),
    "it pads by mode edge, not with zeros": ('p = Pad<mode="edge">(x, q)\n y = Conv(p, W)', {"q": SPACE, **W}),
    "its pads are computed at run time": ("r = Identity(q)\n p = Pad(x, r)\n y = Conv(p, W)", {"q": SPACE, **W}),
    "its axes are computed at run time, or the rank of its input is unknown": (
        "b = Identity(a)\n p = Pad(x, q, , b)\n y = Conv(p, W)",
        {"q": np.array([1, 1, 1, 1]), "a": np.array([2, 3]), **W},
    ),
    "Relu reads it, and only a Conv can add the zeros itself": (
        "p = Pad(x, q)\n c = Conv(p, W)\n r = Relu(p)\n s = ReduceMean(r)\n y = Add(c, s)", {"q": SPACE, **W}
    ),
    "MaxPool reads it, and only a Conv can add the zeros itself": (
        "p = Pad(x, q)\n y = MaxPool<kernel_shape=[2,2]>(p)", {"q": SPACE}
    ),
    "its result is an output of the graph": ("y = Pad(x, q)", {"q": SPACE}),
    "the Conv behind it pads by itself (SAME_UPPER)": (
        'p = Pad(x, q)\n y = Conv<auto_pad="SAME_UPPER">(p, W)', {"q": SPACE, **W}
    ),
    "Conv reads it, and only a Conv can add the zeros itself": (
        "p = Pad(k, q)\n y = Conv(x, p)", {"q": SPACE, "k": (4, 4, 1, 1)}
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_pads_that_stay_say_why(reason):
    body, given = REFUSED[reason]
    graph = build(IMAGE, body, opset=18 if "(x, q, , b)" in body else 17, kind="float", **given)
    before, values = listing(graph), constants(graph)
    outcome = FoldPad().apply(graph, Context())
    assert not outcome.changed
    assert reasons(outcome) == [f"Pad: {reason}"]
    assert (listing(graph), list(constants(graph))) == (before, list(values))


def test_a_conv_in_a_subgraph_keeps_the_pad():
    body = """
        p = Pad(x, q)
        y = If(b) <then_branch = t () => (float[N,3,7,8] u) { u = Conv(p, W) }, else_branch = e () => (float[N,3,7,8] f)
                  { f = Conv(p, W) }>
    """
    graph = build("(float[N,4,5,6] x, bool b) => (float[] y)", body, q=SPACE, **W)
    assert reasons(FoldPad().apply(graph, Context())) == ["Pad: a subgraph reads it"]


def test_before_or_after_folding_maps_is_the_same():
    body = "n = BatchNormalization(x, g, s, m, v)\n p = Pad(n, q)\n y = Conv(p, W)"
    results = []
    for order in ([FoldPad(), FoldAffine()], [FoldAffine(), FoldPad()]):
        graph = build(IMAGE, body, q=SPACE, g=4, s=4, m=4, v=positive(4), **W)
        for step in order:
            fold(step, graph)
        results.append((listing(graph), constants(graph)))
    (first, old), (second, new) = results
    assert first == second == "n = Add(x, BatchNormalization_0_add)\ny = Conv<pads=[1, 0, 2, 3]>(n, W)"
    assert all(np.array_equal(old[name], new[name]) for name in old)
