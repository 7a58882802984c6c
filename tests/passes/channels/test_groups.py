"""Groups by hand-made graphs: what may be cut, why the rest stays, and that slicing is masking.

``zeros`` is the oracle that knows nothing of links: what has to be zero in the constants for the same channels to be
silent, told by hand. Where a norm works on the channels there is none; ``test_cut`` has numpy for those.
"""

from __future__ import annotations

import numpy as np
import pytest

from channelfold.tests.channel_cuts import (
    OUT,
    Case,
    assert_slice_equals_mask,
    assert_slice_equals_zeros,
    groups_of,
    ints,
    named,
    summary,
)
from channelfold.tests.graphs import positive, random

S = np.s_
IMAGE = "(float[N,3,6,6] x) => (float[] y)"
TOKENS = "(float[N,5,8] x) => (float[] y)"


CASES = [
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
        """
        s = Conv(x, Ws)
        c1 = Conv(s, W1)
        r = Relu(c1)
        c2 = Conv(r, W2, B2)
        t = Add(s, c2)
        y = Conv(t, W3)
        """,
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
        """
        a = Conv(x, Wa)
        p, q = Split<axis=1>(a, sizes)
        e = Conv(p, We)
        f = Conv(q, Wf)
        y = Add(e, f)
        """,
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
        """
        a = Conv(x, Wa)
        d = Conv<group=4, pads=[1,1,1,1]>(a, Wd, Bd)
        e = Conv<group=4>(d, We)
        y = Conv(e, Wy)
        """,
        f"a 4/4\ny 0/2: {OUT} 2",
        named(Wa=(4, 3, 1, 1), Wd=(4, 1, 3, 3), Bd=4, We=(8, 1, 1, 1), Wy=(2, 8, 1, 1)),
        {"a": [0, 1, 3]},
        {"Wy": S[:, [0, 1, 2, 3, 6, 7]]},
    ),
    Case(
        "groups: the same channel of every group",
        IMAGE,
        """
        a = Conv(x, Wa)
        g = Conv<group=2>(a, Wg, Bg)
        y = Conv(g, Wy)
        """,
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
        """
        a = MatMul(Wa, x)
        b = Add(a, ba)
        r = Relu(b)
        c = MatMul(Wc, r)
        y = Relu(c)
        """,
        f"a 6/6\nc 0/3: {OUT} 3",
        named(Wa=(6, 5), ba=(6, 1), Wc=(3, 6)),
        {"a": [2, 3]},
        {"Wc": S[:, [2, 3]]},
    ),
    Case(
        "weights behind Transpose, Cast and Identity",
        TOKENS,
        """
        A = Transpose<perm=[1,0]>(Wa)
        a = MatMul(x, A)
        B = Identity(Wb)
        C = Cast<to=11>(B)
        y = MatMul(a, C)
        """,
        f"a 4/4\ny 0/2: {OUT} 2",
        named(Wa=(4, 8), Wb=(4, 2)),
        {"a": [3]},
        {"Wb": S[3]},
    ),
    Case(
        "one weight for two nodes of one region",
        "(float[N,5,4] x) => (float[] y)",
        """
        a = MatMul(x, W)
        b = MatMul(a, W)
        r = Add(a, b)
        y = MatMul(r, V)
        """,
        f"a 4/4\ny 0/2: {OUT} 2",
        named(W=(4, 4), V=(4, 2)),
        {"a": [0, 2]},
    ),
    Case(
        "one weight for two nodes of different regions",
        "(float[N,5,4] x, float[N,5,4] z) => (float[] y)",
        """
        a = MatMul(x, W)
        b = MatMul(z, W)
        c = MatMul(a, V)
        d = MatMul(b, U)
        y = Add(c, d)
        """,
        f"a 6/6\nb 6/6\nc 0/2: {OUT} 2",
        named(W=(4, 6), V=(6, 2), U=(6, 2)),
        {"a": [0, 2], "b": [1, 2, 5]},
        {"V": S[[0, 2]], "U": S[[1, 2, 5]]},
    ),
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
        """
        a = Conv(x, Wa)
        s = Softmax<axis=1>(a)
        b = Conv(s, Wb)
        t = Softmax<axis=3>(b)
        y = Conv(t, Wy)
        """,
        f"a 0/4: Softmax normalizes over it 4\nb 5/5\ny 0/2: {OUT} 2",
        named(Wa=(4, 3, 1, 1), Wb=(5, 4, 1, 1), Wy=(2, 5, 1, 1)),
        {"b": [2]},
        {"Wy": S[:, 2]},
    ),
    Case(
        "softmax before opset 13 normalizes over all axes from its own on",
        IMAGE,
        """
        a = Conv(x, Wa)
        s = Softmax<axis=2>(a)
        b = Conv(s, Wb)
        t = Softmax(b)
        y = Conv(t, Wy)
        """,
        f"a 4/4\nb 0/5: Softmax normalizes over it 5\ny 0/2: {OUT} 2",
        named(Wa=(4, 3, 1, 1), Wb=(5, 4, 1, 1), Wy=(2, 5, 1, 1)),
        {"a": [2]},
        {"Wb": S[:, 2]},
        named(opset=11),
    ),
    Case(
        "local response normalization mixes neighbours",
        IMAGE,
        """
        a = Conv(x, Wa)
        l = LRN<size=3>(a)
        y = Conv(l, Wy)
        """,
        f"a 0/4: LRN mixes neighbouring channels 4\ny 0/2: {OUT} 2",
        named(Wa=(4, 3, 1, 1), Wy=(2, 4, 1, 1)),
    ),
    Case(
        "group norm, as one node: whole groups",
        "(float[N,3,6,6] x) => (float[N,2,6,6] y)",
        """
        a = Conv(x, Wa)
        n = GroupNormalization<num_groups=3>(a, g, b)
        y = Conv(n, Wy)
        """,
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
        """
        a = Conv(x, Wa)
        n = InstanceNormalization(a, g, b)
        y = Conv(n, Wy)
        """,
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
        """
        a = Conv(x, Wa)
        n = Shape<start=1, end=2>(a)
        t = Flatten(a)
        y = Gemm(t, Wy)
        """,
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


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request) -> Case:
    return request.param


def test_groups(case):
    assert summary(groups_of(case.make())) == case.groups


def test_slicing_is_masking(case):
    free = assert_slice_equals_mask(case.make)
    assert bool(free) == any(" 0/" not in line for line in case.groups.splitlines())


@pytest.mark.parametrize("case", [case for case in CASES if case.zeros], ids=lambda case: case.name)
def test_slicing_is_zeros_put_in_by_hand(case):
    assert_slice_equals_zeros(case)
