"""Groups of channels that layers write and read: convolutions, products, and the units between them."""

from __future__ import annotations

import numpy as np

from channelfold.tests.channel_cuts import OUT, Case, ints, named
from channelfold.tests.graphs import positive

S = np.s_
IMAGE = "(float[N,3,6,6] x) => (float[] y)"
TOKENS = "(float[N,5,8] x) => (float[] y)"
LAYERS = [
    Case(
        "conv, norm, relu, conv",
        IMAGE,
        """
        c1 = Conv<pads=[1,1,1,1]>(x, W1, B1)
        n = BatchNormalization(c1, g, b, m, v)
        r = Relu(n)
        y = Conv(r, W2, B2)
        """,
        f"c1 4/4\ny 0/5: {OUT} 5",
        named(W1=(4, 3, 3, 3), B1=4, g=4, b=4, m=4, v=positive(4), W2=(5, 4, 3, 3), B2=5),
        {"c1": [1, 3]},
        {"W2": S[:, [1, 3]]},
    ),
    Case(
        "residual: both writers and the shortcut lose the same channels",
        IMAGE,
        "s = Conv(x, Ws)  c1 = Conv(s, W1)  r = Relu(c1)  c2 = Conv(r, W2, B2)  t = Add(s, c2)  y = Conv(t, W3)",
        f"s 4/4\nc1 6/6\ny 0/2: {OUT} 2",
        named(Ws=(4, 3, 1, 1), W1=(6, 4, 1, 1), W2=(4, 6, 1, 1), B2=4, W3=(2, 4, 3, 3)),
        {"s": [0, 2], "c1": [5]},
        {"W1": S[:, [0, 2]], "W3": S[:, [0, 2]], "W2": S[:, 5]},
    ),
    Case(
        "concat, then slices of it",
        IMAGE,
        """
        a = Conv(x, Wa)
        b = Conv(x, Wb)
        c = Concat<axis=1>(a, b)
        d = Slice(c, starts, ends, axes)
        e = Conv(c, We)
        f = Conv(d, Wf)
        y = Concat<axis=1>(e, f)
        """,
        f"a 3/3\nb 4/4\ne 0/2: {OUT} 2\nf 0/2: {OUT} 2",
        named(
            Wa=(3, 3, 1, 1), Wb=(4, 3, 1, 1), We=(2, 7, 1, 1), Wf=(2, 4, 1, 1),
            starts=ints(-5), ends=ints(-1), axes=ints(1),
        ),
        {"a": [0], "b": [1, 3]},
        {"We": S[:, [0, 4, 6]], "Wf": S[:, [2]]},
    ),
    Case(
        "split into unequal parts",
        IMAGE,
        "a = Conv(x, Wa)  p, q = Split<axis=1>(a, sizes)  e = Conv(p, We)  f = Conv(q, Wf)  y = Add(e, f)",
        f"a 6/6\ne 0/3: {OUT} 3",
        named(Wa=(6, 3, 1, 1), sizes=ints(2, 4), We=(3, 2, 1, 1), Wf=(3, 4, 1, 1)),
        {"a": [0, 3, 4]},
        {"We": S[:, [0]], "Wf": S[:, [1, 2]]},
    ),
    Case(
        "split into as many equal parts as there are outputs, the sizes an attribute",
        IMAGE,
        """
        a = Conv(x, Wa)
        p, q = Split<axis=1, split=[3, 4]>(a)
        t, u = Split<axis=1>(q)
        e = Conv(p, We)
        f = Conv(t, Wf)
        y = Concat<axis=1>(e, f)
        """,
        f"a 7/7\ne 0/2: {OUT} 2\nf 0/2: {OUT} 2",
        named(Wa=(7, 3, 1, 1), We=(2, 3, 1, 1), Wf=(2, 2, 1, 1)),
        {"a": [1, 4, 5]},
        {"We": S[:, 1], "Wf": S[:, 1]},
        named(opset=11),
    ),
    Case(
        "the gated unit: both halves of one weight, or two weights, lose the same channels",
        TOKENS,
        """
        h = MatMul(x, W1)
        a, g = Split<axis=-1, num_outputs=2>(h)
        s = Sigmoid(g)
        m = Mul(a, s)
        u = MatMul(m, W2)
        v = MatMul(m, W3)
        w = Mul(u, v)
        y = MatMul(w, W4)
        """,
        f"h 3/3 x2\nu 4/4\ny 0/2: {OUT} 2",
        named(W1=(8, 6), W2=(3, 4), W3=(3, 4), W4=(4, 2)),
        {"h": [1], "u": [0, 3]},
        {"W2": S[1], "W3": S[1], "W4": S[[0, 3]]},
        named(opset=18),
    ),
    Case(
        "gather of several channels, and of one",
        IMAGE,
        """
        a = Conv(x, Wa)
        g = Gather<axis=1>(a, several)
        s = Gather<axis=1>(a, one)
        u = Unsqueeze(s, axes)
        r = Mul(g, u)
        y = Conv(r, W)
        """,
        f"a 4/5: Gather picks it 1\ny 0/2: {OUT} 2",
        named(Wa=(5, 3, 1, 1), several=ints(3, 0, -1, 3), one=np.array(2), axes=ints(1), W=(2, 4, 1, 1)),
        {"a": [0, 3]},
        {"W": S[:, [0, 1, 3]]},
    ),
    Case(
        "depthwise, with a multiplier, and normal convolutions around",
        IMAGE,
        "a = Conv(x, Wa)  d = Conv<group=4, pads=[1,1,1,1]>(a, Wd, Bd)  e = Conv<group=4>(d, We)  y = Conv(e, Wy)",
        f"a 4/4\ny 0/2: {OUT} 2",
        named(Wa=(4, 3, 1, 1), Wd=(4, 1, 3, 3), Bd=4, We=(8, 1, 1, 1), Wy=(2, 8, 1, 1)),
        {"a": [0, 1, 3]},
        {"Wy": S[:, [0, 1, 2, 3, 6, 7]]},
    ),
    Case(
        "groups: the same channel of every group",
        IMAGE,
        "a = Conv(x, Wa)  g = Conv<group=2>(a, Wg, Bg)  y = Conv(g, Wy)",
        f"a 3/3 x2\ng 2/2 x2\ny 0/2: {OUT} 2",
        named(Wa=(6, 3, 1, 1), Wg=(4, 3, 3, 3), Bg=4, Wy=(2, 4, 1, 1)),
        {"a": [1], "g": [0]},
        {"Wg": S[:, 1], "Wy": S[:, [0, 2]]},
    ),
    Case(
        "transposed convolutions: full, with groups, depthwise, depthwise with a multiplier",
        "(float[N,3,3,3] x) => (float[] y)",
        """
        a = ConvTranspose<strides=[2,2]>(x, Wa, Ba)
        g = ConvTranspose<group=2>(a, Wg, Bg)
        d = ConvTranspose<group=6>(g, Wd, Bd)
        m = ConvTranspose<group=6>(d, Wm)
        y = ConvTranspose(m, Wy)
        """,
        f"a 2/2 x2\ng 3/3 x2\ny 0/2: {OUT} 2",
        named(Wa=(3, 4, 2, 2), Ba=4, Wg=(4, 3, 1, 1), Bg=6, Wd=(6, 1, 2, 2), Bd=6, Wm=(6, 2, 1, 1), Wy=(12, 2, 1, 1)),
        {"a": [1], "g": [0, 2]},
        {"Wg": S[[1, 3]], "Wy": S[[0, 1, 4, 5, 6, 7, 10, 11]]},
    ),
    Case(
        "Gemm, both weights transposed or not, biases of every form",
        "(float[4,3] x) => (float[] y)",
        """
        a = Gemm<transB=1, alpha=0.5>(x, Wa, Ba)
        b = Gemm<transB=0>(a, Wb, Bb)
        t = Transpose<perm=[1,0]>(b)
        c = Gemm<transA=1>(t, Wc)
        y = Gemm<transB=1, beta=2.0>(c, Wy, By)
        """,
        f"a 5/5\nb 6/6\nc 2/2\ny 0/2: {OUT} 2",
        named(Wa=(5, 3), Ba=(1, 5), Wb=(5, 6), Bb=(4, 6), Wc=(6, 2), Wy=(2, 2), By=(4, 1)),
        {"a": [0, 4], "b": [1, 2], "c": [0]},
        {"Wb": S[[0, 4]], "Wc": S[[1, 2]], "Wy": S[:, 0]},
    ),
    Case(
        "MatMul with the weight on the left",
        TOKENS,
        "a = MatMul(Wa, x)  b = Add(a, ba)  r = Relu(b)  c = MatMul(Wc, r)  y = Relu(c)",
        f"a 6/6\nc 0/3: {OUT} 3",
        named(Wa=(6, 5), ba=(6, 1), Wc=(3, 6)),
        {"a": [2, 3]},
        {"Wc": S[:, [2, 3]]},
    ),
    Case(
        "weights behind Transpose, Cast and Identity",
        TOKENS,
        "A = Transpose<perm=[1,0]>(Wa)  a = MatMul(x, A)  B = Identity(Wb)  C = Cast<to=11>(B)  y = MatMul(a, C)",
        f"a 4/4\ny 0/2: {OUT} 2",
        named(Wa=(4, 8), Wb=(4, 2)),
        {"a": [3]},
        {"Wb": S[3]},
    ),
    Case(
        "one weight for two nodes of one region",
        "(float[N,5,4] x) => (float[] y)",
        "a = MatMul(x, W)  b = MatMul(a, W)  r = Add(a, b)  y = MatMul(r, V)",
        f"a 4/4\ny 0/2: {OUT} 2",
        named(W=(4, 4), V=(4, 2)),
        {"a": [0, 2]},
    ),
    Case(
        "one weight for two nodes of different regions",
        "(float[N,5,4] x, float[N,5,4] z) => (float[] y)",
        "a = MatMul(x, W)  b = MatMul(z, W)  c = MatMul(a, V)  d = MatMul(b, U)  y = Add(c, d)",
        f"a 6/6\nb 6/6\nc 0/2: {OUT} 2",
        named(W=(4, 6), V=(6, 2), U=(6, 2)),
        {"a": [0, 2], "b": [1, 2, 5]},
        {"V": S[[0, 2]], "U": S[[1, 2, 5]]},
    ),
]  # fmt: skip
