"""Groups of attention operators and other fused ones: what is cut with what, printed and by numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from channelfold.tests.channel_cuts import (
    OUT,
    Case,
    assert_slice_equals_mask,
    assert_slice_equals_zeros,
    groups_of,
    ints,
    named,
    summary,
    written,
)

S = np.s_
TOKENS = "(float[2,5,8] x) => (float[2,5,2] y)"
HEADS = "q = MatMul(x, Wq) k = MatMul(x, Wk) v = MatMul(x, Wv)"
WEIGHTS = named(Wq=(8, 12), Wk=(8, 12), Wv=(8, 6), Wo=(6, 2))
GROUPED = named(Wq=(8, 12), Wk=(8, 6), Wv=(8, 8), Wo=(16, 2))
VENDOR = {"kind": "float", "domains": '"com.microsoft" : 1'}
LAST = f"y 0/2: {OUT} 2"

CASES = [
    Case(
        "MultiHeadAttention with a bias, 3 heads of 4 and 2 channels",
        TOKENS,
        HEADS + " o = com.microsoft.MultiHeadAttention<num_heads=3>(q, k, v, b) y = MatMul(o, Wo)",
        f"q 3/3 x4\n{LAST}",
        WEIGHTS | {"b": 30},
        {"q": [1]},
        {"Wo": S[2:4]},
        VENDOR,
    ),
    Case(
        "Attention that holds the weights of all three",
        TOKENS,
        """
        n = MatMul(x, Wn)
        o = com.microsoft.Attention<num_heads=3, qkv_hidden_sizes=[12, 12, 6], scale=0.3>(n, W, b, , , t)
        y = MatMul(o, Wo)
        """,
        f"n 4/4\no 3/3 x2\n{LAST}",
        named(Wn=(8, 4), W=(4, 30), b=30, t=(1, 3, 5, 5), Wo=(6, 2)),
        {"o": [0], "n": [2]},
        {"Wo": S[:2], "Wn": S[:, 2]},
        VENDOR,
    ),
    Case(
        "GroupQueryAttention: a key head goes with its two query heads",
        "(float[1,5,8] x) => (float[1,5,2] y)",
        HEADS
        + """
        o = com.microsoft.GroupQueryAttention<num_heads=4, kv_num_heads=2>(q, k, v, , , e, t, , , , , sink)
        y = MatMul(o, Wo)
        """,
        f"q 2/2 x16\n{LAST}",
        named(
            Wq=(8, 32), Wk=(8, 16), Wv=(8, 16), Wo=(32, 2), e=np.array([4], np.int32), t=np.array(5, np.int32), sink=4
        ),
        {"q": [1]},
        {"Wo": S[16:]},
        VENDOR,
    ),
    Case(
        "GroupQueryAttention of packed inputs, turned inside",
        "(float[1,5,8] x) => (float[1,5,2] y)",
        """
        p = MatMul(x, W)
        o = com.microsoft.GroupQueryAttention<num_heads=6, kv_num_heads=3, do_rotary=1>(p, , , , , e, t, cos, sin)
        y = MatMul(o, Wo)
        """,
        f"p 3/3 x64\n{LAST}",
        named(W=(8, 192), Wo=(96, 2), e=np.array([4], np.int32), t=np.array(5, np.int32), cos=(9, 8), sin=(9, 8)),
        {"p": [1]},
        {"Wo": S[32:64]},
        VENDOR,
    ),
    Case(
        "Attention and RotaryEmbedding, heads in the last axis",
        TOKENS,
        HEADS
        + """
        qr = RotaryEmbedding<num_heads=4, rotary_embedding_dim=2>(q, cos, sin)
        o = Attention<q_num_heads=4, kv_num_heads=2>(qr, k, v, m)
        y = MatMul(o, Wo)
        """,
        f"q 2/2 x6\n{LAST}",
        GROUPED | named(cos=(2, 5, 1), sin=(2, 5, 1), m=(4, 5, 5)),
        {"q": [0]},
        {"Wo": S[:8]},
        {"opset": 23},
    ),
    Case(
        "Attention, heads on their own axis: channels of one head",
        TOKENS,
        """
        q = MatMul(x, Wq) k = MatMul(x, Wk) v = MatMul(x, Wv)
        q4 = Unsqueeze(q, one) k4 = Unsqueeze(k, one) v4 = Unsqueeze(v, one)
        qr = RotaryEmbedding<interleaved=1>(q4, cos, sin)
        o4 = Attention(qr, k4, v4)
        o = Squeeze(o4, one)
        y = MatMul(o, Wo)
        """,
        f"q 2/2 x2\nv 4/4\n{LAST}",
        named(Wq=(8, 4), Wk=(8, 4), Wv=(8, 4), Wo=(4, 2), one=ints(1), cos=(2, 5, 2), sin=(2, 5, 2)),
        {"q": [1], "v": [2]},
        {"Wq": S[:, 2:4], "Wk": S[:, 2:4], "Wo": S[2]},
        {"opset": 23, "kind": "float"},
    ),
    Case(
        "a cache that the caller holds keeps its heads",
        "(float[2,5,8] x, float[2,3,4,4] pk, float[2,3,4,2] pv) => (float[] y, float[] nk, float[] nv)",
        HEADS
        + """
        o, nk, nv = Attention<q_num_heads=3, kv_num_heads=3>(q, k, v, , pk, pv)
        y = MatMul(o, Wo)
        """,
        f"q 0/3 x4: it is the output 'nv' of the model 3\n{LAST}",
        WEIGHTS,
        options={"opset": 23},
    ),
    Case(
        "BiasGelu, FastGelu and SkipLayerNormalization",
        TOKENS,
        """
        a = MatMul(x, Wa)
        g = com.microsoft.BiasGelu(a, ba)
        b = MatMul(g, Wb)
        h = com.microsoft.FastGelu(b, bb)
        c = MatMul(h, Wc)
        n = com.microsoft.SkipLayerNormalization(x, c, g8, b8)
        y = MatMul(n, Wy)
        """,
        f"a 5/5\nb 6/6\nc 0/8: it is the input 'x' of the model 8\n{LAST}",
        named(Wa=(8, 5), ba=5, Wb=(5, 6), bb=6, Wc=(6, 8), g8=8, b8=8, Wy=(8, 2)),
        {"a": [1, 3], "b": [0]},
        {"Wb": S[[1, 3]], "Wc": S[0]},
        VENDOR,
    ),
    Case(
        "EmbedLayerNormalization",
        "(float[2,3] x) => (float[2,3,2] y)",
        """
        a = Abs(x) i = Cast<to=6>(a)
        e, z = com.microsoft.EmbedLayerNormalization(i, , words, places, , g, b)
        y = MatMul(e, Wy)
        """,
        f"e 0/4: EmbedLayerNormalization normalizes over it 4\n{LAST}",
        named(words=(5, 4), places=(3, 4), g=4, b=4, Wy=(4, 2)),
        options=VENDOR,
    ),
    Case(
        "Einsum with weights",
        TOKENS,
        """
        q = Einsum<equation="btd,dhk->bthk">(x, Wq)
        k = Einsum<equation="hkd,btd->bthk">(Wk, x)
        v = Einsum<equation="btd,dhk->bthk">(x, Wv)
        s = Einsum<equation="bqhk,bthk->bhqt">(q, k)
        p = Softmax<axis=-1>(s)
        o = Einsum<equation="bhqt,bthk->bqhk">(p, v)
        y = Einsum<equation="bqhk,hkd->bqd">(o, Wo)
        """,
        f"q 3/3\nq 4/4\nv 2/2\n{LAST}",
        named(Wq=(8, 3, 4), Wk=(3, 4, 8), Wv=(8, 3, 2), Wo=(3, 2, 2)),
        {"v": [0]},
        {"Wo": S[:, 0]},
    ),
    Case(
        "FusedMatMul and FusedGemm",
        "(float[5,8] x) => (float[8,2] y)",
        """
        a = com.microsoft.FusedMatMul<alpha=0.5, transA=1, transB=1>(x, Wa)
        b = com.microsoft.FusedGemm<activation="Relu", transB=1>(a, Wb, bb)
        y = MatMul(b, Wy)
        """,
        f"a 4/4\nb 3/3\n{LAST}",
        named(Wa=(4, 5), Wb=(3, 4), bb=3, Wy=(3, 2)),
        {"a": [1], "b": [2]},
        {"Wb": S[:, 1], "Wy": S[2]},
        VENDOR,
    ),
    Case(
        "FusedConv with what it adds",
        "(float[1,2,5,5] x) => (float[1,2,5,5] y)",
        """
        a = Conv(x, Wa)
        b = com.microsoft.FusedConv<activation="Relu">(x, Wb, bb, a)
        y = Conv(b, Wy)
        """,
        f"a 3/3\n{LAST}",
        named(Wa=(3, 2, 1, 1), Wb=(3, 2, 1, 1), bb=3, Wy=(2, 3, 1, 1)),
        {"a": [1]},
        {"Wy": S[:, 1]},
        VENDOR,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_groups(case):
    assert summary(groups_of(case.make())) == case.groups


@pytest.mark.parametrize("case", [case for case in CASES if case.gone], ids=lambda case: case.name)
def test_a_cut_is_what_silencing_the_same_channels_is(case):
    assert_slice_equals_zeros(case)
    assert assert_slice_equals_mask(case.make)


@st.composite
def attentions(draw) -> Case:
    """A layer of attention with heads of any number and width, with and without what may go along."""
    kv, group, width, values = (draw(st.integers(1, 3)) for _ in range(4))
    op = draw(st.sampled_from(["MultiHeadAttention", "packed", "GroupQueryAttention", "standard"]))
    bias, scores = draw(st.booleans()), draw(st.booleans())
    options = {"opset": 23, "kind": "float", "domains": '"com.microsoft" : 1'}
    if op in ("MultiHeadAttention", "packed"):
        group = 1
    if op == "GroupQueryAttention":
        width = values = 8 * width
    heads = kv * group
    given = named(
        Wq=(8, heads * width), Wk=(8, kv * width), Wv=(8, kv * values), Wo=(heads * values, 3), t=(1, heads, 5, 5),
        b=kv * (2 * width + values), W=(8, kv * (2 * width + values)), e=np.array([4], np.int32),
        n=np.array(5, np.int32),
    )  # fmt: skip
    by_bias, by_score = ("b" if bias else "", "t" if scores else "")
    sizes = f"num_heads={heads}, qkv_hidden_sizes=[{kv * width},{kv * width},{kv * values}]"
    node = {
        "MultiHeadAttention": f"com.microsoft.MultiHeadAttention<num_heads={heads}>(q, k, v, {by_bias}, , {by_score})",
        "packed": f"com.microsoft.Attention<{sizes}>(x, W, b, , , {by_score})",
        "GroupQueryAttention": f"com.microsoft.GroupQueryAttention<num_heads={heads}, kv_num_heads={kv}>"
        f"(q, k, v, , , e, n, , , , {by_score})",
        "standard": f"Attention<q_num_heads={heads}, kv_num_heads={kv}>(q, k, v, {by_score})",
    }[op]
    signature = "(float[1,5,8] x) => (float[1,5,3] y)"
    return Case(op, signature, f"{HEADS} o = {node} y = MatMul(o, Wo)", "", given, options=options)


@given(attentions(), st.integers(0, 2**31))
@settings(max_examples=25)
def test_random_heads(case, seed):
    graph = case.make()
    attrs = graph.nodes[3].attrs
    (heads,) = (group for group in groups_of(graph) if written(group) == ("o" if case.name == "packed" else "q"))
    assert heads.units == attrs.get("kv_num_heads", attrs.get("num_heads"))
    assert_slice_equals_mask(case.make, seed=seed)
