"""What a cut leaves, by the graph it prints, and what norms over the channels that are left compute, by numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from channelfold.passes.base import Refused
from channelfold.passes.channels.cut import cut, mask
from channelfold.tests.channel_cuts import assert_intact, groups_of, outputs_without, summary, without, written
from channelfold.tests.graphs import assert_same, build, constants, feeds, listing, positive, run

EPSILON = np.array(np.float32(0.01), np.float64)  # as an attribute holds it
TOKENS = "(float[N,5,4] x) => (float[] y)"
NORMS = {
    "fused": "n = LayerNormalization<epsilon=0.01>(h, g, b)",
    "decomposed": """
        m = ReduceMean<axes=[-1]>(h)
        d = Sub(h, m)
        s = Mul(d, d)
        v = ReduceMean<axes=[-1]>(s)
        e = Add(v, eps)
        r = Sqrt(e)
        q = Div(d, r)
        w = Mul(q, g)
        n = Add(w, b)
    """,
    "root mean square": """
        s = Mul(h, h)
        v = ReduceMean<axes=[-1]>(s)
        e = Add(v, eps)
        r = Sqrt(e)
        i = Reciprocal(r)
        q = Mul(h, i)
        w = Mul(q, g)
        n = Add(b, w)
    """,
}


def normed(name: str, h: np.ndarray, g: np.ndarray, b: np.ndarray) -> np.ndarray:
    if name != "root mean square":
        h = h - h.mean(axis=-1, keepdims=True)
    return h / np.sqrt((h * h).mean(axis=-1, keepdims=True) + EPSILON) * g + b


def width(norm: str) -> gs.Graph:
    """A transformer's width: an embedding, a norm, a block beside the shortcut, a head."""
    body = f"h = MatMul(x, We)\n{NORMS[norm]}\nu = MatMul(n, W1)\na = Relu(u)\nf = MatMul(a, W2)\nt = Add(h, f)"
    weights: dict[str, Any] = {"We": (4, 6), "g": 6, "b": 6, "W1": (6, 3), "W2": (3, 6), "Wh": (6, 2)}
    if norm != "fused":
        weights["eps"] = EPSILON
    return build(TOKENS, body + "\ny = MatMul(t, Wh)", **weights)


@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_over_the_channels_is_of_those_that_are_left(norm):
    def make() -> gs.Graph:
        return width(norm)

    groups = groups_of(make())
    assert summary(groups) == "h 6/6 reduced\nu 3/3\ny 0/2: it is the output 'y' of the model 2"
    graph, outputs = outputs_without(make, {"h": [1, 4], "u": [2]})
    c, left, hidden = constants(make()), [0, 2, 3, 5], [0, 1]
    h = feeds(graph)["x"] @ c["We"][:, left]
    n = normed(norm, h, c["g"][left], c["b"][left])
    f = np.maximum(n @ c["W1"][np.ix_(left, hidden)], 0) @ c["W2"][np.ix_(hidden, left)]
    assert_same({"y": (h + f) @ c["Wh"][left]}, outputs)
    masked = make()
    mask(masked, without(groups_of(masked), {"h": [1, 4], "u": [2]}))
    assert_same(outputs, run(masked, feeds(masked)))


def test_what_reduces_the_channels_is_of_those_that_are_left():
    def make() -> gs.Graph:
        return build(
            "(float[N,4] x) => (float[] y)",
            """
            h = Gemm(x, W)
            mean = ReduceMean<axes=[1]>(h)
            most = ReduceMax<axes=[1]>(h)
            length = ReduceL2<axes=[1]>(h)
            l = LpNormalization<axis=1>(h)
            c = Concat<axis=1>(mean, most, length, l)
            y = Gemm(c, V)
            """,
            W=(4, 5),
            V=(8, 2),
        )

    graph, outputs = outputs_without(make, {"h": [0, 3]})
    c, left = constants(make()), [1, 2, 4]
    h = feeds(graph)["x"] @ c["W"][:, left]
    length = np.linalg.norm(h, axis=1, keepdims=True)
    seen = np.concatenate([h.mean(1, keepdims=True), h.max(1, keepdims=True), length, h / length], axis=1)
    assert_same({"y": seen @ c["V"][[0, 1, 2, 4, 5, 7]]}, outputs)
    masked = make()
    mask(masked, without(groups_of(masked), {"h": [0, 3]}))
    assert_same(outputs, run(masked, feeds(masked)))


def test_what_goes_is_gone_from_every_constant_and_shape():
    def make() -> gs.Graph:
        return build(
            "(float[N,3,H,W] x) => (float[N,2,H,W] y)",
            """
            a = Conv(x, A, Ab)
            n = BatchNormalization(a, g, b, m, v)
            d = Conv<group=4>(n, D)
            p, q = Split<axis=1>(d, sizes)
            r = Slice(q, start, end, axis)
            c = Concat<axis=1>(p, r)
            i = Gather<axis=1>(c, order)
            y = Conv(i, B)
            """,
            A=(4, 3, 1, 1),
            Ab=4,
            g=4,
            b=4,
            m=4,
            v=positive(4),
            D=(4, 1, 1, 1),
            sizes=np.array([1, 3]),
            start=np.array([-2]),
            end=np.array([2**31 - 1]),
            axis=np.array([1]),
            order=np.array([2, 0, -2]),
            B=(2, 3, 1, 1),
        )

    graph, _ = outputs_without(make, {"a": [1, 2]})
    assert listing(graph) == "\n".join(
        [
            "a = Conv(x, A_cut, Ab_cut)",
            "n = BatchNormalization(a, g_cut, b_cut, m_cut, v_cut)",
            "d = Conv<group=2>(n, D_cut)",
            "p, q = Split<axis=1>(d, sizes)",
            "r = Slice(q, start, end, axis)",
            "c = Concat<axis=1>(p, r)",
            "i = Gather<axis=1>(c, order)",
            "y = Conv(i, B_cut)",
        ]
    )
    left = constants(graph)
    assert {name: values.shape for name, values in left.items() if name.endswith("_cut")} == {
        "A_cut": (2, 3, 1, 1), "Ab_cut": (2,), "g_cut": (2,), "b_cut": (2,), "m_cut": (2,), "v_cut": (2,),
        "D_cut": (2, 1, 1, 1), "B_cut": (2, 2, 1, 1),
    }  # fmt: skip
    assert [left[name].tolist() for name in ("sizes", "start", "end", "order")] == [[1, 1], [0], [1], [1, 0]]
    assert [graph.tensors()[name].shape[1] for name in "andpqrci"] == [2, 2, 2, 1, 1, 1, 2, 2]


def test_a_constant_of_two_readers_stays_as_it_is_for_the_one_that_needs_it():
    def make() -> gs.Graph:
        return build(
            "(float[N,4] x) => (float[] y)",
            "a = Gemm(x, W, B) r = Relu(a) b = Gemm(r, V, B) y = Add(b, B)",
            W=(4, 4),
            B=4,
            V=(4, 4),
        )

    graph, _ = outputs_without(make, {"a": [2]})
    assert listing(graph) == "a = Gemm(x, W_cut, B_cut)\nr = Relu(a)\nb = Gemm(r, V_cut, B)\ny = Add(b, B)"


def test_readers_that_lose_the_same_share_the_new_constant():
    def make() -> gs.Graph:
        return build(
            "(float[N,4] x) => (float[] y)",
            "a = Gemm(x, W, B) r = Mul(a, B) s = Add(r, B) y = Gemm(s, V)",
            W=(4, 3),
            B=3,
            V=(3, 2),
        )

    graph, _ = outputs_without(make, {"a": [1]})
    assert listing(graph) == "a = Gemm(x, W_cut, B_cut)\nr = Mul(a, B_cut)\ns = Add(r, B_cut)\ny = Gemm(s, V_cut)"


SHARED_SHAPE = """
    n = Shape<end=1>(x)
    c = Concat<axis=0>(n, four, minus)
    i = Identity(c)
    a = MatMul(x, W)
    ta = Transpose<perm=[0,2,1]>(a)
    ra = Reshape(ta, i)
    b = MatMul(x, V)
    tb = Transpose<perm=[0,2,1]>(b)
    rb = Reshape(tb, i)
    s = ReduceMean<axes=[2], keepdims=0>(ra)
    t = ReduceMean<axes=[2], keepdims=0>(rb)
    u = MatMul(s, U)
    w = MatMul(t, T)
    y = Add(u, w)
"""


def test_a_shape_that_another_reader_keeps_is_copied_with_the_way_to_it():
    def make() -> gs.Graph:
        return build(
            "(float[N,5,3] x) => (float[] y)",
            SHARED_SHAPE,
            W=(3, 4),
            V=(3, 4),
            U=(4, 2),
            T=(4, 2),
            four=np.array([4]),
            minus=np.array([-1]),
        )

    assert summary(groups_of(make())) == "a 4/4\nb 4/4\nu 0/2: it is the output 'y' of the model 2"
    graph, outputs = outputs_without(make, {"a": [0, 1]})
    assert listing(graph).splitlines()[1:5] == [
        "c = Concat<axis=0>(n, four, minus)",
        "c_own = Concat<axis=0>(n, Reshape_5_shape, minus)",
        "i = Identity(c)",
        "i_own = Identity(c_own)",
    ]
    silent = make()
    silent.tensors()["U"].values = constants(silent)["U"] * np.array([[0], [0], [1], [1]])
    assert_same(run(silent, feeds(silent)), outputs)


def test_dynamic_axes_stay_dynamic():
    def make() -> gs.Graph:
        return build(
            "(float[N,3,H,W] x) => (float[N,2,M] y)",
            """
            a = Conv(x, A)
            n = Shape<end=1>(a)
            shape = Concat<axis=0>(n, four, minus)
            r = Reshape(a, shape)
            y = Conv(r, B)
            """,
            A=(4, 3, 1, 1),
            four=np.array([4]),
            minus=np.array([-1]),
            B=(2, 4, 1),
        )

    graph, _ = outputs_without(make, {"a": [3]})
    for size in (1, 3):
        feed = feeds(graph, size=size)
        silent = make()
        silent.tensors()["B"].values = constants(silent)["B"] * np.array([[[1.0], [1], [1], [0]]])
        assert_same(run(silent, feed), run(graph, feed))
        assert run(graph, feed)["y"].shape == (size, 2, size * size)


def test_one_axis_cut_for_two_reasons():
    """A weight of which the rows are one group's and the columns another's."""

    def make() -> gs.Graph:
        return build(TOKENS, "a = MatMul(x, A) b = MatMul(a, B) y = MatMul(b, C)", A=(4, 5), B=(5, 6), C=(6, 2))

    graph, _ = outputs_without(make, {"a": [0, 1], "b": [5]})
    assert {n: c.shape for n, c in constants(graph).items()} == {"A_cut": (4, 3), "B_cut": (3, 5), "C_cut": (5, 2)}


def test_nothing_changes_when_all_stays():
    graph = width("fused")
    before = listing(graph)
    cut(graph, without(groups_of(graph), {}))
    assert listing(graph) == before


def test_no_axis_loses_all_of_its_channels():
    graph = build(
        "(float[N,4] x) => (float[] y)",
        "a = Gemm(x, A) p, q = Split<axis=1>(a) b = Gemm(p, B) c = Gemm(q, C) y = Add(b, c)",
        A=(4, 6),
        B=(3, 2),
        C=(3, 2),
    )
    group = groups_of(graph)[0]
    assert written(group) == "a"
    keep = np.array([False, False, False, False, True, False])
    assert group.region.completed(keep).tolist() == [True, False, False, False, True, False]
    with pytest.raises(AssertionError):
        cut(graph, [(group.region, keep)])


def test_a_norm_without_a_masked_form_is_named():
    graph = build(
        "(float[N,4] x) => (float[] y)",
        "a = Gemm(x, A) u = Unsqueeze(a, one) n = InstanceNormalization(u, g, b) s = Squeeze(n, one) y = Gemm(s, C)",
        A=(4, 6),
        one=np.array([1]),
        g=1,
        b=1,
        C=(6, 2),
    )
    assert summary(groups_of(graph)).startswith("a 6/6 reduced")
    with pytest.raises(Refused, match="InstanceNormalization without some of its channels"):
        mask(graph, without(groups_of(graph), {"a": [0]}))


def test_masking_leaves_all_shapes_alone():
    graph = width("decomposed")
    mask(graph, without(groups_of(graph), {"h": [0], "u": [1]}))
    assert_intact(width("decomposed"), graph)
    assert {n: c.shape for n, c in constants(graph).items() if n in ("We", "W1", "W2", "Wh")} == {
        "We": (4, 6), "W1": (6, 3), "W2": (3, 6), "Wh": (6, 2),
    }  # fmt: skip


def test_recurrent_channels_are_silent_inside_too():
    def make() -> gs.Graph:
        return build(
            "(float[6,2,3] x) => (float[] y)",
            "h = RNN<hidden_size=4>(x, W, R) s = Squeeze(h, one) y = MatMul(s, V)",
            kind="float",
            W=(1, 4, 3),
            R=(1, 4, 4),
            one=np.array([1]),
            V=(4, 2),
        )

    graph, outputs = outputs_without(make, {"h": [1]})
    c, left = constants(make()), [0, 2, 3]
    state, states = np.zeros((2, 3)), []
    for step in feeds(graph)["x"].astype(np.float64):
        state = np.tanh(step @ c["W"][0, left].T + state @ c["R"][0][np.ix_(left, left)].T)
        states.append(state @ c["V"][left])
    assert_same({"y": np.array(states, np.float32)}, outputs)
    masked = make()
    mask(masked, without(groups_of(masked), {"h": [1]}))
    assert_same(outputs, run(masked, feeds(masked)))
