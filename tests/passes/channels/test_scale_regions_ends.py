"""Regions from one linear node to another: which ends, classes and reasons they have."""

from __future__ import annotations

import numpy as np
import pytest

from channelfold.passes.base import Refused
from channelfold.passes.channels.scale_regions import trace
from channelfold.passes.layers.linear import linears
from channelfold.tests.graphs import build, positive
from channelfold.tests.passes.channels.scaled import IMAGE, TOKENS, ends, moved, region_of

CONV = {"W1": (4, 3, 1, 1), "b1": 4, "W2": (6, 4, 1, 1)}
BETWEEN = {
    "Relu": ("t = Relu(c)", {}, 4, "a shift does not pass Relu"),
    "LeakyRelu": ("t = LeakyRelu<alpha=0.3>(c)", {}, 4, "a shift does not pass LeakyRelu"),
    "PRelu": ("t = PRelu(c, p)", {"p": (4, 1, 1)}, 4, "a shift does not pass PRelu"),
    "Abs": ("t = Abs(c)", {}, 4, "a shift does not pass Abs"),
    "Neg": ("t = Neg(c)", {}, 4, "a shift does not pass Neg"),
    "MaxPool": ("t = MaxPool<kernel_shape=[2,2], pads=[1,1,0,0]>(c)", {}, 4, ""),
    "AveragePool": ("t = AveragePool<kernel_shape=[2,2], pads=[1,1,0,0]>(c)", {}, 4, ""),
    "AveragePool that counts its padding": (
        "t = AveragePool<kernel_shape=[2,2], pads=[1,1,0,0], count_include_pad=1>(c)", {}, 4,
        "a shift does not pass the zero padding of AveragePool",
    ),
    "Pad": ("t = Pad(c, p)", {"p": np.array([0, 0, 1, 1, 0, 0, 0, 1])}, 4, "a shift does not pass zero padding (Pad)"),
    "Pad of the edge": ("t = Pad<mode=\"edge\">(c, p)", {"p": np.array([0, 0, 1, 1, 0, 0, 0, 1])}, 4, ""),
    "Identity and Dropout": ("i = Identity(c)\n t = Dropout(i)", {}, 4, ""),
    "Cast": ("t = Cast<to=11>(c)", {}, 4, ""),
    "Transpose there and back": (
        "i = Transpose<perm=[0,2,3,1]>(c)\n t = Transpose<perm=[0,3,1,2]>(i)", {}, 4, ""
    ),
    "Reshape there and back": (
        "i = Reshape(c, p)\n t = Reshape(i, q)", {"p": np.array([0, 2, 2, -1]), "q": np.array([0, 4, 6, 6])}, 4, ""
    ),
    "channels and rows in one axis": (
        "i = Reshape(c, p)\n t = Reshape(i, q)", {"p": np.array([0, 2, -1, 6]), "q": np.array([0, 4, 6, 6])}, 0, ""
    ),
    "Unsqueeze and Squeeze": ("i = Unsqueeze(c, p)\n t = Squeeze(i, p)", {"p": np.array([1])}, 4, ""),
    "Slice of the image": (
        "t = Slice(c, s, e, a)", {"s": np.array([1]), "e": np.array([5]), "a": np.array([3])}, 4, ""
    ),
    "Resize": ("t = Resize(c, no, r)", {"no": np.zeros(0), "r": np.array([1, 1, 2, 2], np.float32)}, 4, ""),
    "a number": ("i = Mul(c, k)\n t = Div(k, i)", {"k": 2.0}, 0, ""),
    "two numbers": ("i = Div(c, k)\n t = Mul(k, i)", {"k": 2.0}, 4, "a shift does not pass Mul"),
    "a factor": ("t = Mul(c, k)", {"k": (4, 1, 1)}, 4, "a shift does not pass Mul"),
    "a term": ("t = Sub(k, c)", {"k": (4, 1, 1)}, 4, ""),
    "a mask over the image": ("t = Mul(c, k)", {"k": (6, 6)}, 4, "a shift does not pass Mul"),
    "a term over the image": ("t = Add(k, c)", {"k": (6, 6)}, 4, ""),
    "BatchNormalization": ("t = BatchNormalization(c, g, s, s, g)", {"g": positive(4), "s": 4}, 4, ""),
    "bounds": ("i = Max(c, k)\n t = Min(l, i)", {"k": -0.5, "l": (4, 1, 1)}, 4, "a shift does not pass Min"),
    "the larger of two": ("r = Relu(c)\n t = Max(r, c)", {}, 4, "a shift does not pass Max"),
    "itself": ("r = Relu(c)\n t = Add(c, r)", {}, 4, "a shift does not pass Add"),
    "Clip": ("t = Clip(c)", {}, 0, ""),
    "its square": ("t = Mul(c, c)", {}, 0, ""),
    "its double": ("t = Add(c, c)", {}, 0, ""),
    "its gate": ("g = Sigmoid(c)\n t = Mul(c, g)", {}, 0, ""),
    "its maximum": ("g = ReduceMax<keepdims=1>(c)\n t = Mul(c, g)", {}, 0, ""),
}  # fmt: skip


@pytest.mark.parametrize("case", BETWEEN)
def test_a_scale_moves_from_conv_to_conv(case):
    body, given, free, no_shift = BETWEEN[case]
    graph = build(IMAGE, f"c = Conv(x, W1, b1)\n {body}\n y = Conv(t, W2)", opset=18, **CONV, **given)
    region = region_of(graph)
    assert int(region.free.sum()) == free
    if not free:
        return
    assert region.no_shift == no_shift
    moved(graph)


# body between c = Conv(x, W1) with 4 channels and the linear that writes y: (body, constants, ends, classes, why not)
TO_THE_END = {
    "depthwise": (
        "d = Conv<group=4, pads=[1,1,1,1]>(c, D)\n y = Conv(d, W)", {"D": (4, 1, 3, 3), "W": (5, 4, 1, 1)},
        "in y, out d", 4,
    ),
    "grouped": (
        "d = Conv<group=2>(c, D)\n y = Conv<group=3>(d, W)", {"D": (6, 2, 1, 1), "W": (3, 2, 1, 1)}, "in y, out d", 6,
    ),
    "transposed and grouped": (
        "d = ConvTranspose<group=2>(c, D)\n y = ConvTranspose<group=3>(d, W)",
        {"D": (4, 3, 2, 2), "W": (6, 1, 2, 2)}, "in y, out d", 6,
    ),
    "pooled and flattened": (
        "p = GlobalAveragePool(c)\n t = Flatten(p)\n y = Gemm<transB=1, alpha=0.5>(t, W, b)", {"W": (5, 4), "b": 5},
        "in y, out c", 4,
    ),
    "flattened": (
        "p = MaxPool<kernel_shape=[3,3], strides=[3,3]>(c)\n t = Flatten(p)\n y = Gemm(t, W)", {"W": (16, 5)},
        "in y, out c", 4,
    ),
    "mean over the image": (
        "t = ReduceMean<keepdims=0>(c, a)\n y = MatMul(t, W)", {"a": np.array([2, 3]), "W": (4, 5)}, "in y, out c", 4,
    ),
    "sum over the image": (
        "t = ReduceSum<keepdims=0>(c, a)\n y = MatMul(t, W)", {"a": np.array([-1, 2]), "W": (4, 5)}, "in y, out c", 4,
    ),
    "maximum over the image": (
        "t = ReduceMax<keepdims=0>(c, a)\n y = MatMul(t, W)", {"a": np.array([2, 3]), "W": (4, 5)}, "in y, out c", 4,
    ),
    "mean over the channels": ("t = ReduceMean(c, a)\n y = Conv(t, W)", {"a": np.array([1]), "W": (5, 1, 1, 1)},
        "in y, out c", 1,
    ),
    "split": (
        "s, t = Split<axis=1>(c, p)\n u = MaxPool<kernel_shape=[2,2]>(t)\n y = Conv(u, W)",
        {"p": np.array([1, 3]), "W": (5, 3, 1, 1)}, "in y, out c", 4,
    ),
    "slice of the channels": (
        "t = Slice(c, s, e, a)\n y = Conv(t, W)",
        {"s": np.array([-3]), "e": np.array([2**31]), "a": np.array([1]), "W": (5, 3, 1, 1)}, "in y, out c", 4,
    ),
    "every second channel": (
        "t = Slice(c, s, e, a, p)\n y = Conv(t, W)",
        {"s": np.array([1]), "e": np.array([4]), "a": np.array([1]), "p": np.array([2]), "W": (5, 2, 1, 1)},
        "in y, out c", 4,
    ),
    "channels picked twice": (
        "t = Gather<axis=1>(c, i)\n y = Conv(t, W)", {"i": np.array([3, 0, 0, -1]), "W": (5, 4, 1, 1)},
        "in y, out c", 4,
    ),
    "joined along the channels": (
        "d = Conv(x, V)\n t = Concat<axis=1>(c, d)\n y = Conv(t, W)",
        {"V": (2, 3, 1, 1), "W": (5, 6, 1, 1)}, "in y, out c, out d", 6,
    ),
    "joined along the rows": (
        "d = Conv(x, V)\n t = Concat<axis=2>(c, d)\n y = Conv(t, W)", {"V": (4, 3, 1, 1), "W": (5, 4, 1, 1)},
        "in y, out c, out d", 4,
    ),
    "added": (
        "d = Conv(x, V)\n t = Add(c, d)\n y = Conv(t, W)", {"V": (4, 3, 1, 1), "W": (5, 4, 1, 1)},
        "in y, out c, out d", 4,
    ),
    "added to one channel": (
        "d = Conv(x, V)\n t = Add(d, c)\n y = Conv(t, W)", {"V": (1, 3, 1, 1), "W": (5, 4, 1, 1)},
        "in y, out c, out d", 1,
    ),
    "residual": (
        "r = Relu(c)\n d = Conv(r, V)\n s = Relu(d)\n e = Conv(s, W)\n t = Add(r, e)\n u = Relu(t)\n"
        " f = Conv(u, V)\n g = Relu(f)\n h = Conv(g, W)\n w = Add(u, h)\n y = Conv(w, V)",
        {"V": (5, 4, 1, 1), "W": (4, 5, 1, 1)}, "in d, in f, in y, out c, out e, out h", 4,
    ),
    "gate of an SE block": (
        "p = GlobalAveragePool(c)\n f = Conv(p, V)\n g = Sigmoid(f)\n t = Mul(c, g)\n y = Conv(t, W)",
        {"V": (4, 4, 1, 1), "W": (5, 4, 1, 1)}, "in f, in y, out c", 4,
    ),
    "gate that follows from another tensor": (
        "p = GlobalAveragePool(x)\n f = Conv(p, V)\n g = HardSigmoid(f)\n t = Mul(g, c)\n y = Conv(t, W)",
        {"V": (4, 3, 1, 1), "W": (5, 4, 1, 1)}, "in y, out c", 4,
    ),
    "product where only the side tried last can take it": (
        "q = Conv(x, V)\n s, g = Split<axis=1>(q, p)\n h = Sigmoid(g)\n t = Mul(c, g)\n y = Conv(t, W)",
        {"V": (6, 3, 1, 1), "p": np.array([2, 4]), "W": (5, 4, 1, 1)}, "in y, out c", 4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TO_THE_END)
def test_the_ends_of_a_region(case):
    body, given, expected, classes = TO_THE_END[case]
    output = "y, float[] h" if "h = Sigmoid" in body else "y"
    graph = build(IMAGE.replace("y", output), f"c = Conv(x, W1, b1)\n {body}", opset=18, W1=(4, 3, 1, 1), b1=4, **given)
    region = region_of(graph)
    assert region.size == classes
    assert ends(region) == expected
    moved(graph)


def test_a_token_is_pooled_by_a_scalar_index():
    body = "c = MatMul(x, W1)\n t = Gather<axis=1>(c, i)\n y = MatMul(t, W)"
    region = moved(build(TOKENS, body, W1=(4, 6), W=(6, 5), i=np.array(0)))
    assert (ends(region), region.size, region.no_shift) == ("in y, out c", 6, "")


def test_rows_are_scaled_where_the_weight_is_on_the_left():
    region = moved(
        build(
            "(float[N,4,T] x) => (float[] y)", "c = MatMul(V, x)\n t = Relu(c)\n y = MatMul(W, t)", V=(6, 4), W=(5, 6)
        )
    )
    assert (ends(region), region.size) == ("in y, out c", 6)


def test_a_transpose_between_a_weight_on_the_right_and_one_on_the_left():
    body = "c = MatMul(x, V)\n t = Transpose<perm=[0,2,1]>(c)\n y = MatMul(W, t)"
    region = moved(build(TOKENS, body, V=(4, 6), W=(5, 6)))
    assert (ends(region), region.size) == ("in y, out c", 6)


def test_an_axis_whose_length_may_change_has_no_classes():
    body = "c = MatMul(V, x)\n t = Reshape(c, to)\n y = MatMul(W, t)"
    graph = build("(float[N,4,T] x) => (float[N,3,T] y)", body, V=(3, 4), W=(3, 3), to=np.array([0, 0, 0]))
    linear = linears(graph)[-1]
    shapes = dict.fromkeys("cty", (2, 3, 3)) | {"x": (2, 4, 3)}
    region = trace(graph, linear.data, -1, shapes)
    assert set(region.fixed) == {"the length of its axis 'T' may change"}


def test_an_unknown_shape_is_refused():
    graph = build(TOKENS, "c = MatMul(x, V)\n y = MatMul(c, W)", V=(4, 6), W=(6, 5))
    with pytest.raises(Refused, match="the shape of 'c' is unknown"):
        trace(graph, linears(graph)[-1].data, -1, {})
