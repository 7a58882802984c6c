"""Groups of channels of attention, recurrent cells and quantized weights."""

from __future__ import annotations

import numpy as np

from channelfold.tests.channel_cuts import OUT, Case, ints, named
from channelfold.tests.graphs import random

S = np.s_
TOKENS = "(float[N,5,8] x) => (float[] y)"
SEQUENCE = "(float[5,2,3] x) => (float[] y)"
HEADS = """
    q = MatMul(x, Wq)
    k = MatMul(x, Wk)
    v = MatMul(x, Wv)
    q4 = Reshape(q, to_heads)
    k4 = Reshape(k, to_kv_heads)
    v4 = Reshape(v, to_kv_heads)
    qh = Transpose<perm=[0,2,1,3]>(q4)
    vh = Transpose<perm=[0,2,1,3]>(v4)
"""
ATTEND = """
    s = MatMul(qh, kt)
    sc = Mul(s, scale)
    p = Softmax<axis=-1>(sc)
    o = MatMul(p, vv)
    ot = Transpose<perm=[0,2,1,3]>(o)
    o3 = Reshape(ot, to_width)
    y = MatMul(o3, Wo)
"""

SEQUENCES = [
    Case(
        "attention: whole heads of q, k and v",
        TOKENS,
        HEADS + "kt = Transpose<perm=[0,2,3,1]>(k4) vv = Identity(vh)" + ATTEND,
        f"q 3/3 x4\ny 0/2: {OUT} 2",
        named(
            Wq=(8, 12), Wk=(8, 12), Wv=(8, 12), to_heads=ints(0, -1, 3, 4), to_kv_heads=ints(0, 0, 3, -1),
            scale=np.array(0.5), to_width=ints(0, 0, 12), Wo=(12, 2),
        ),
        {"q": [1]},
        {"Wo": S[4:8]},
    ),
    Case(
        "grouped queries: a key head goes with all of its query heads",
        TOKENS,
        HEADS
        + """
        kh = Transpose<perm=[0,2,1,3]>(k4)
        k5 = Unsqueeze(kh, two)
        k6 = Expand(k5, copies)
        k7 = Reshape(k6, merged)
        kt = Transpose<perm=[0,1,3,2]>(k7)
        v5 = Unsqueeze(vh, two)
        v6 = Expand(v5, copies)
        vv = Reshape(v6, merged)
        """
        + ATTEND,
        f"q 2/2 x12\ny 0/2: {OUT} 2",
        named(
            Wq=(8, 24), Wk=(8, 8), Wv=(8, 8), to_heads=ints(0, 0, 6, 4), to_kv_heads=ints(0, 0, 2, 4), two=ints(2),
            copies=ints(1, 2, 3, 1, 1), merged=ints(0, 6, -1, 4), scale=np.array(0.5), to_width=ints(0, 0, -1),
            Wo=(24, 2),
        ),
        {"q": [1]},
        {"Wo": S[12:]},
    ),
    Case(
        "one weight for q, k and v: (3, heads, channels)",
        TOKENS,
        """
        qkv = MatMul(x, W)
        b = Add(qkv, B)
        r = Reshape(b, to_heads)
        t = Transpose<perm=[2,0,3,1,4]>(r)
        q1, k1, v1 = Split<axis=0>(t, ones)
        qh = Squeeze(q1, zero)
        kh = Squeeze(k1, zero)
        vv = Squeeze(v1, zero)
        kt = Transpose<perm=[0,1,3,2]>(kh)
        """
        + ATTEND,
        f"qkv 2/2 x12\ny 0/2: {OUT} 2",
        named(
            W=(8, 24), B=24, to_heads=ints(0, 0, 3, 2, 4), ones=ints(1, 1, 1), zero=ints(0), scale=np.array(0.5),
            to_width=ints(0, 0, 8), Wo=(8, 2),
        ),
        {"qkv": [0]},
        {"Wo": S[:4]},
    ),
    Case(
        "one weight for q, k and v, taken apart by Gather",
        TOKENS,
        """
        qkv = MatMul(x, W)
        r = Reshape(qkv, to_heads)
        t = Transpose<perm=[2,0,3,1,4]>(r)
        qh = Gather<axis=0>(t, zero)
        kh = Gather<axis=0>(t, one)
        vv = Gather<axis=0>(t, two)
        kt = Transpose<perm=[0,1,3,2]>(kh)
        """
        + ATTEND,
        f"qkv 2/2 x12\ny 0/2: {OUT} 2",
        named(
            W=(8, 24), to_heads=ints(0, 0, 3, 2, 4), zero=np.array(0), one=np.array(1), two=np.array(-1),
            scale=np.array(0.5), to_width=ints(0, 0, 8), Wo=(8, 2),
        ),
        {"qkv": [1]},
        {"Wo": S[4:]},
    ),
    Case(
        "rotary position embedding: a rotation of halves, heads stay whole",
        TOKENS,
        """
        q = MatMul(x, Wq)
        q4 = Reshape(q, to_heads)
        qh = Transpose<perm=[0,2,1,3]>(q4)
        lo, hi = Split<axis=3>(qh, halves)
        neg = Neg(hi)
        turned = Concat<axis=3>(neg, lo)
        c = Mul(qh, cos)
        s = Mul(turned, sin)
        e = Add(c, s)
        ot = Transpose<perm=[0,2,1,3]>(e)
        o3 = Reshape(ot, to_width)
        y = MatMul(o3, Wo)
        """,
        f"q 2/2 x4\ny 0/2: {OUT} 2",
        named(
            Wq=(8, 8), to_heads=ints(0, 0, 2, 4), halves=ints(2, 2), cos=(5, 4), sin=(5, 4), to_width=ints(0, 0, 8),
            Wo=(8, 2),
        ),
        {"q": [0]},
        {"Wo": S[:4]},
    ),
    Case(
        "LSTM, both directions: inputs and hidden units",
        SEQUENCE,
        """
        i = MatMul(x, Wi)
        h, hn, cn = LSTM<hidden_size=4, direction="bidirectional">(i, W, R, B, , h0, c0, P)
        t = Transpose<perm=[0,2,1,3]>(h)
        r = Reshape(t, merged)
        o = MatMul(r, Wo)
        m = ReduceMean<axes=[0], keepdims=0>(cn)
        n = MatMul(m, Wn)
        y = Add(o, n)
        """,
        f"i 6/6\nh 4/4\no 0/2: {OUT} 2",
        named(
            Wi=(3, 6), W=(2, 16, 6), R=(2, 16, 4), B=(2, 32), h0=(2, 2, 4), c0=(2, 2, 4), P=(2, 12),
            merged=ints(0, 0, -1), Wo=(8, 2), Wn=(4, 2),
        ),
        {"i": [0, 5], "h": [1]},
        {"W": S[:, :, [0, 5]], "R": S[:, :, 1], "Wo": S[[1, 5]], "Wn": S[1]},
        named(kind="float"),
    ),
    Case(
        "GRU: the reset gate before or after the product",
        SEQUENCE,
        """
        h = GRU<hidden_size=4>(x, W, R, B)
        s = Squeeze(h, one)
        , g = GRU<hidden_size=3, linear_before_reset=1>(s, V, Q)
        f = Squeeze(g, zero)
        y = MatMul(f, Wo)
        """,
        f"h 4/4\ng 3/3\ny 0/2: {OUT} 2",
        named(
            W=(1, 12, 3), R=(1, 12, 4), B=(1, 24), one=ints(1), zero=ints(0), V=(1, 9, 4), Q=(1, 9, 3), Wo=(3, 2),
        ),
        {"h": [0, 2], "g": [1]},
        {"R": S[:, :, [0, 2]], "V": S[:, :, [0, 2]], "Q": S[:, :, 1], "Wo": S[1]},
        named(kind="float"),
    ),
    Case(
        "RNN with a state of zeros in the batch size of its input",
        "(float[T,N,3] x) => (float[] y)",
        """
        s = Shape<start=1, end=2>(x)
        shape = Concat<axis=0>(one, s, four)
        h0 = ConstantOfShape(shape)
        h = RNN<hidden_size=4>(x, W, R, B, , h0)
        q = Squeeze(h, one)
        y = MatMul(q, Wo)
        """,
        f"h 4/4\ny 0/2: {OUT} 2",
        named(W=(1, 4, 3), R=(1, 4, 4), B=(1, 8), one=ints(1), four=ints(4), Wo=(4, 2)),
        {"h": [3]},
        {"R": S[:, :, 3], "Wo": S[3]},
        named(kind="float"),
    ),
    Case(
        "weights and activations quantized, per channel and per tensor",
        "(float[N,3,6,6] x) => (float[] y)",
        """
        W = DequantizeLinear<axis=0>(Wq, Ws, Wz)
        c = Conv(x, W, B)
        q = QuantizeLinear(c, s, z)
        d = DequantizeLinear(q, s, z)
        V = DequantizeLinear<axis=0>(Vq, Vs)
        y = Conv(d, V)
        """,
        f"c 4/4\ny 0/2: {OUT} 2",
        named(
            Wq=(random((4, 3, 1, 1), "Wq") * 40).astype(np.int8), Ws=np.linspace(0.01, 0.04, 4),
            Wz=np.zeros(4, np.int8), B=4, s=np.array(0.05), z=np.array(3, np.uint8),
            Vq=(random((2, 4, 1, 1), "Vq") * 40).astype(np.int8), Vs=np.linspace(0.01, 0.02, 2),
        ),
        {"c": [0, 3]},
        {"Vq": S[:, [0, 3]]},
        named(kind="float"),
    ),
]  # fmt: skip
