"""Groups of channels that other operators move, normalize, resize or keep."""

from __future__ import annotations

import numpy as np

from channelfold.tests.channel_cuts import OUT, Case, ints, named
from channelfold.tests.graphs import random

S = np.s_
IMAGE = "(float[N,3,6,6] x) => (float[] y)"
TOKENS = "(float[N,5,8] x) => (float[] y)"
OPERATORS = [
    Case(
        "squeeze and excitation",
        IMAGE,
        """
        a = Conv(x, Wa)
        p = GlobalAveragePool(a)
        s1 = Conv(p, W1, B1)
        r = Relu(s1)
        s2 = Conv(r, W2, B2)
        g = Sigmoid(s2)
        m = Mul(a, g)
        y = Conv(m, Wy)
        """,
        f"a 6/6\ns1 2/2\ny 0/2: {OUT} 2",
        named(Wa=(6, 3, 1, 1), W1=(2, 6, 1, 1), B1=2, W2=(6, 2, 1, 1), B2=6, Wy=(2, 6, 1, 1)),
        {"a": [0, 5], "s1": [1]},
        {"W1": S[:, [0, 5]], "Wy": S[:, [0, 5]], "W2": S[:, 1]},
    ),
    Case(
        "efficient channel attention: a convolution across channels",
        IMAGE,
        """
        a = Conv(x, Wa)
        p = GlobalAveragePool(a)
        q = Squeeze(p, last)
        t = Transpose<perm=[0,2,1]>(q)
        e = Conv<pads=[1,1]>(t, We)
        u = Transpose<perm=[0,2,1]>(e)
        v = Unsqueeze(u, last)
        g = Sigmoid(v)
        m = Mul(a, g)
        y = Conv(m, Wy)
        """,
        f"a 0/6: Conv works along it 6\ne 0/1: Unsqueeze reads it 1\ny 0/2: {OUT} 2",
        named(Wa=(6, 3, 1, 1), last=ints(3), We=(1, 1, 3), Wy=(2, 6, 1, 1)),
    ),
    Case(
        "channel shuffle between grouped convolutions",
        IMAGE,
        """
        a = Conv(x, Wa)
        r = Reshape(a, shape)
        t = Transpose<perm=[0,2,1,3,4]>(r)
        s = Reshape(t, back)
        g = Conv<group=2>(s, Wg)
        y = Conv(g, Wy)
        """,
        f"a 2/2 x6\ng 2/2 x2\ny 0/2: {OUT} 2",
        named(
            Wa=(12, 3, 1, 1), shape=ints(0, 2, 6, 6, 6), back=ints(0, -1, 6, 6), Wg=(4, 6, 1, 1), Wy=(2, 4, 1, 1),
        ),
        {"a": [1]},
        {"Wg": S[:, [1, 3, 5]]},  # channel 6 g + k becomes 2 k + g
    ),
    Case(
        "depth to space and back, both orders",
        IMAGE,
        """
        a = Conv(x, Wa)
        d = DepthToSpace<blocksize=2, mode="DCR">(a)
        e = DepthToSpace<blocksize=2, mode="CRD">(a)
        s = Add(d, e)
        f = SpaceToDepth<blocksize=2>(s)
        y = Conv(f, Wy)
        """,
        f"a 1/1 x8\ny 0/2: {OUT} 2",
        named(Wa=(8, 3, 1, 1), Wy=(2, 8, 1, 1)),
    ),
    Case(
        "depth to space, depth first",
        IMAGE,
        """
        a = Conv(x, Wa)
        d = DepthToSpace<blocksize=2, mode="DCR">(a)
        y = Conv(d, Wy)
        """,
        f"a 3/3 x4\ny 0/2: {OUT} 2",
        named(Wa=(12, 3, 1, 1), Wy=(2, 3, 1, 1)),
        {"a": [1]},
        {"Wy": S[:, 1]},
    ),
    Case(
        "pixel shuffle as reshapes",
        IMAGE,
        """
        a = Conv(x, Wa)
        r = Reshape(a, parts)
        t = Transpose<perm=[0,1,4,2,5,3]>(r)
        s = Reshape(t, whole)
        y = Conv(s, Wy)
        """,
        f"a 3/3 x4\ny 0/2: {OUT} 2",
        named(Wa=(12, 3, 1, 1), parts=ints(0, 3, 2, 2, 6, 6), whole=ints(0, 3, 12, 12), Wy=(2, 3, 1, 1)),
        {"a": [0, 2]},
        {"Wy": S[:, [0, 2]]},
    ),
    Case(
        "flattened places of channels, read by a Gemm",
        IMAGE,
        """
        a = Conv(x, Wa)
        p = MaxPool<kernel_shape=[2,2], strides=[3,3]>(a)
        f = Flatten(p)
        h = Gemm<transB=1>(f, Wh)
        r = Relu(h)
        y = Gemm(r, Wy)
        """,
        f"a 3/3\nh 5/5\ny 0/2: {OUT} 2",
        named(Wa=(3, 3, 1, 1), Wh=(5, 12), Wy=(5, 2)),
        {"a": [1], "h": [0, 4]},
        {"Wh": S[:, 4:8], "Wy": S[[0, 4]]},
    ),
    Case(
        "softmax over channels, and over places",
        IMAGE,
        "a = Conv(x, Wa)  s = Softmax<axis=1>(a)  b = Conv(s, Wb)  t = Softmax<axis=3>(b)  y = Conv(t, Wy)",
        f"a 0/4: Softmax normalizes over it 4\nb 5/5\ny 0/2: {OUT} 2",
        named(Wa=(4, 3, 1, 1), Wb=(5, 4, 1, 1), Wy=(2, 5, 1, 1)),
        {"b": [2]},
        {"Wy": S[:, 2]},
    ),
    Case(
        "softmax before opset 13 normalizes over all axes from its own on",
        IMAGE,
        "a = Conv(x, Wa)  s = Softmax<axis=2>(a)  b = Conv(s, Wb)  t = Softmax(b)  y = Conv(t, Wy)",
        f"a 4/4\nb 0/5: Softmax normalizes over it 5\ny 0/2: {OUT} 2",
        named(Wa=(4, 3, 1, 1), Wb=(5, 4, 1, 1), Wy=(2, 5, 1, 1)),
        {"a": [2]},
        {"Wb": S[:, 2]},
        named(opset=11),
    ),
    Case(
        "local response normalization mixes neighbours",
        IMAGE,
        "a = Conv(x, Wa)  l = LRN<size=3>(a)  y = Conv(l, Wy)",
        f"a 0/4: LRN mixes neighbouring channels 4\ny 0/2: {OUT} 2",
        named(Wa=(4, 3, 1, 1), Wy=(2, 4, 1, 1)),
    ),
    Case(
        "group norm, as one node: whole groups",
        "(float[N,3,6,6] x) => (float[N,2,6,6] y)",
        "a = Conv(x, Wa)  n = GroupNormalization<num_groups=3>(a, g, b)  y = Conv(n, Wy)",
        f"a 3/3 x2\ny 0/2: {OUT} 2",
        named(Wa=(6, 3, 1, 1), g=6, b=6, Wy=(2, 6, 1, 1)),
        {"a": [1]},
        {"Wy": S[:, [2, 3]]},
        named(opset=21, kind="float"),
    ),
    Case(
        "group norm through Reshape and InstanceNormalization",
        IMAGE,
        """
        a = Conv(x, Wa)
        r = Reshape(a, groups)
        i = InstanceNormalization(r, one, none)
        shape = Shape(a)
        s = Reshape(i, shape)
        m = Mul(s, g)
        n = Add(m, b)
        y = Conv(n, Wy)
        """,
        f"a 3/3 x2\ny 0/2: {OUT} 2",
        named(
            Wa=(6, 3, 1, 1), groups=ints(0, 3, -1), one=np.ones(3), none=np.zeros(3), g=(6, 1, 1), b=(6, 1, 1),
            Wy=(2, 6, 1, 1),
        ),
        {"a": [1]},
        {"Wy": S[:, [2, 3]]},
    ),
    Case(
        "instance norm of every channel by itself",
        IMAGE,
        "a = Conv(x, Wa)  n = InstanceNormalization(a, g, b)  y = Conv(n, Wy)",
        f"a 4/4\ny 0/2: {OUT} 2",
        named(Wa=(4, 3, 1, 1), g=4, b=4, Wy=(2, 4, 1, 1)),
        {"a": [0, 1]},
        {"Wy": S[:, [0, 1]]},
    ),
    Case(
        "sizes and scales of Resize, a Pad around",
        IMAGE,
        """
        a = Conv(x, Wa)
        s = Shape(a)
        nc = Slice(s, zero, two)
        full = Concat<axis=0>(nc, hw)
        r = Resize<mode="nearest">(a, roi, scales, full)
        q = Resize<mode="linear">(r, roi, twice)
        p = Pad(q, pads)
        y = Conv(p, Wy)
        """,
        f"a 4/4\ny 0/2: {OUT} 2",
        named(
            Wa=(4, 3, 1, 1), zero=ints(0), two=ints(2), hw=ints(12, 9), roi=np.zeros(0, np.float32),
            scales=np.zeros(0, np.float32), twice=np.array([1, 1, 2, 2], np.float32),
            pads=ints(0, 0, 1, 1, 0, 0, 0, 2), Wy=(2, 4, 1, 1),
        ),
        {"a": [0, 3]},
        {"Wy": S[:, [0, 3]]},
    ),
    Case(
        "sizes that come from pieces of a Shape and a constant",
        IMAGE,
        """
        a = Conv(x, Wa)
        s = Shape(a)
        n = Slice(s, zero, one)
        r = Concat<axis=0>(n, written, rest)
        f = Reshape(a, r)
        c = Gather(s, index)
        cu = Unsqueeze(c, zero)
        back = Concat<axis=0>(n, cu, six, rest)
        g = Reshape(f, back)
        y = Conv(g, Wy)
        """,
        f"a 4/4\ny 0/2: {OUT} 2",
        named(
            Wa=(4, 3, 1, 1), zero=ints(0), one=ints(1), written=ints(4), rest=ints(-1), index=np.array(1), six=ints(6),
            Wy=(2, 4, 1, 1),
        ),
        {"a": [1]},
        {"Wy": S[:, 1]},
    ),
    Case(
        "a size that is computed with",
        IMAGE,
        """
        a = Conv(x, Wa)
        s = Shape<start=1, end=2>(a)
        half = Div(s, two)
        rest = Concat<axis=0>(zero, half, two, minus)
        f = Reshape(a, rest)
        r = ReduceMean<axes=[2, 3], keepdims=0>(f)
        y = Gemm(r, Wy)
        """,
        "a 0/2 x2: its size, read by 'Shape_1', is computed with 2\ny 0/2: " + OUT + " 2",
        named(Wa=(4, 3, 1, 1), two=ints(2), zero=ints(0), minus=ints(-1), Wy=(2, 2)),
        options=named(kind="float"),
    ),
    Case(
        "a size that is an output of the model",
        "(float[N,3,6,6] x) => (float[] y, int64[] n)",
        "a = Conv(x, Wa)  n = Shape<start=1, end=2>(a)  t = Flatten(a)  y = Gemm(t, Wy)",
        "a 0/4: its size, read by 'Shape_1', is computed with 4\ny 0/2: " + OUT + " 2",
        named(Wa=(4, 3, 1, 1), Wy=(144, 2)),
    ),
    Case(
        "an Expand that leaves the channels alone, as PyTorch writes it",
        "(float[N,5,8] x, float[1,1,8] z) => (float[] y)",
        """
        a = MatMul(z, Wa)
        s = Shape<end=1>(x)
        want = Concat<axis=0>(s, minus, minus)
        open = Equal(want, minus)
        shape = Where(open, one, want)
        e = Expand(a, shape)
        b = MatMul(x, Wb)
        c = Concat<axis=1>(e, b)
        y = MatMul(c, Wy)
        """,
        f"a 6/6\ny 0/2: {OUT} 2",
        named(Wa=(8, 6), minus=ints(-1), one=ints(1, 1, 1), Wb=(8, 6), Wy=(6, 2)),
        {"a": [1, 2]},
        {"Wy": S[[1, 2]]},
    ),
    Case(
        "a subgraph reads them",
        "(float[N,3] x, bool c) => (float[] y)",
        """
        a = Gemm(x, Wa)
        b = If(c)<
            then_branch = then () => (float[] t) { t = Relu(a) },
            else_branch = other () => (float[] e) { e = Neg(a) }
        >
        d = Gemm(x, Wd)
        r = Add(d, b)
        y = Gemm(r, Wy)
        """,
        f"a 0/4: a subgraph reads it 4\nd 0/4: If reads or writes it 4\ny 0/2: {OUT} 2",
        named(Wa=(3, 4), Wd=(3, 4), Wy=(4, 2)),
    ),
    Case(
        "operators that nothing is known of",
        "(float[N,3] x) => (float[] y)",
        """
        a = Gemm(x, Wa)
        u = Trilu(a)
        b = Gemm(u, Wb)
        k = Constant<value_int=1>()
        t = CumSum(b, k)
        y = Gemm(t, Wy)
        """,
        f"a 0/4: Trilu reads or writes it 4\nb 0/5: CumSum works along it 5\ny 0/2: {OUT} 2",
        named(Wa=(3, 4), Wb=(4, 5), Wy=(5, 2)),
    ),
    Case(
        "an embedding that is tied to the classifier",
        "(float[N,5,4] e, int64[N,5] x) => (float[] y)",
        """
        a = Gather(E, x)
        s = Add(a, e)
        h = MatMul(s, W1)
        r = Relu(h)
        d = MatMul(r, W2)
        T = Transpose<perm=[1,0]>(E)
        y = MatMul(d, T)
        """,
        f"a 0/4: it is the input 'e' of the model 4\nh 6/6\nd 4/4\ny 0/7: {OUT} 7",
        named(E=random((7, 4), "E"), W1=(4, 6), W2=(6, 4)),
        {"h": [1], "d": [0]},
        {"W2": [S[1], S[:, 0]]},
    ),
]  # fmt: skip
