"""Regions of index maps: which ends, classes and reasons they have, and that a scale moved through them is exact."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from channelfold.passes.base import Refused
from channelfold.passes.channels.maps import image, preimage
from channelfold.passes.channels.region import Region
from channelfold.passes.channels.rescale import rescale
from channelfold.passes.channels.scale_regions import trace
from channelfold.passes.layers.linear import linears
from channelfold.runtime.io.files import check
from channelfold.runtime.io.shapes import shapes_on
from channelfold.tests.graphs import assert_same, build, feeds, positive, run

TOKENS = "(float[N,T,4] x) => (float[] y)"
IMAGE = "(float[N,3,6,6] x) => (float[] y)"
ROWS = "(float[N,4] x) => (float[] y)"


def region_of(graph: gs.Graph, *, start: str = "", insert: bool = False) -> Region:
    """The region of what the last linear reads, or of a tensor with channels along its last axis."""
    last = linears(graph)[-1]
    tensor, axis = (graph.tensors()[start], -1) if start else (last.data, last.in_axis)
    shapes = shapes_on(graph, {name: values.shape for name, values in feeds(graph, size=3).items()})
    return trace(graph, tensor, axis, shapes, insert)


def ends(region: Region) -> str:
    """``role result`` of every end, in alphabetical order."""
    return ", ".join(sorted(f"{end.role} {end.node.outputs[0].name.removesuffix('_unbiased')}" for end in region.ends))


def moved(graph: gs.Graph, *, rtol: float | None = None, **options) -> Region:
    """Moves a random scale, and a shift where there can be one, through a region.

    The outputs stay what they were, for the sizes the region was traced with and for others.
    """
    region = region_of(graph, **options)
    checked = [feeds(graph, size=3), feeds(graph, size=5)]
    before = [run(graph, feed) for feed in checked]
    rng = np.random.default_rng(0)
    scale, shift = np.exp(rng.normal(size=region.size)), rng.normal(size=region.size)
    assert region.free.any(), region.fixed
    rescale(graph, region, scale, None if region.no_shift else shift)
    check(graph)
    for feed, old in zip(checked, before, strict=True):
        assert_same(old, run(graph, feed), rtol)
    return region


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = Transpose<perm=[0,2,1]>(x)", [[[1], [2], [3], [4]]]),
        ("y = Reshape(x, to)", [[[[1, 2], [3, 4]]]]),
        ("y = Slice(x, from, end, last)", [[[3, 4]]]),
        ("y = Gather<axis=1>(x, first)", [[1, 2, 3, 4]]),
    ],
)
def test_maps_move_as_the_data_does(body, expected):
    given = {"to": np.array([2, 5, 2, 2]), "first": np.array(0), "from": np.array([2]), "end": np.array([4])}
    given = {name: value for name, value in (given | {"last": np.array([2])}).items() if name in body}
    (node,) = build("(float[2,5,4] x) => (float[] y)", body, **given).nodes
    index, result = np.arange(1, 5).reshape(1, 1, 4), tuple(node.outputs[0].shape)
    moved_on = image(node, index, (2, 5, 4), result)
    assert moved_on.tolist() == expected
    back, follows = preimage(node, moved_on, (2, 5, 4), result, lambda shape: np.broadcast_to(index, shape))
    np.testing.assert_array_equal(back, np.broadcast_to(index, back.shape))
    np.testing.assert_array_equal(follows, moved_on)


# ---- norms as writers --------------------------------------------------------------------------------------------

QKV = "q = MatMul(n, Wq)\n k = MatMul(n, Wk)\n v = MatMul(n, Wv)\n s = Add(q, k)\n t = Sigmoid(v)\n y = Mul(s, t)"
NORM = {"g": positive(4), "b": 4, "e": 0.01, "a": np.array([-1]), "two": 2.0, "one": 1.0}
MEAN = "m = ReduceMean(x, a)\n d = Sub(x, m)\n"
NORMS = {
    "fused": ("n = LayerNormalization(x, g, b)", "norm n"),
    "no bias": ("n = LayerNormalization(x, g)", "norm n"),
    "by hand": (
        MEAN + "p = Pow(d, two)\n v0 = ReduceMean(p, a)\n w = Add(v0, e)\n r = Sqrt(w)\n u = Div(d, r)\n"
        "f = Mul(u, g)\n n = Add(f, b)",
        "factor f, term n",
    ),
    "by hand, operands turned round": (
        MEAN + "p = Mul(d, d)\n v0 = ReduceMean(p, a)\n w = Add(v0, e)\n r = Sqrt(w)\n u = Div(d, r)\n"
        "f = Mul(g, u)\n n = Add(b, f)",
        "factor f, term n",
    ),
    "gamma times rsqrt": (
        MEAN + "p = Mul(d, d)\n v0 = ReduceMean(p, a)\n w = Add(v0, e)\n r = Sqrt(w)\n i = Reciprocal(r)\n"
        "f = Mul(i, g)\n l = Mul(x, f)\n o = Mul(m, f)\n c = Sub(b, o)\n n = Add(l, c)",
        "factor f, term c",
    ),
    "gamma is divided by": ("l = LayerNormalization(x, one4)\n f = Div(l, g)\n n = Sub(f, b)", "factor f, term n"),
    "taken away from beta": ("l = LayerNormalization(x, one4)\n f = Mul(l, g)\n n = Sub(b, f)", "factor f, term n"),
    "rms by hand": (
        "p = Mul(x, x)\n v0 = ReduceMean(p, a)\n w = Add(v0, e)\n r = Sqrt(w)\n i = Reciprocal(r)\n u = Mul(x, i)\n"
        "n = Mul(u, g)",
        "factor n",
    ),
    "rms by hand, divided": (
        "p = Pow(x, two)\n v0 = ReduceMean(p, a)\n w = Add(v0, e)\n r = Sqrt(w)\n i = Div(one, r)\n u = Mul(i, x)\n"
        "n = Mul(g, u)",
        "factor n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NORMS)
def test_a_norm_writes_what_q_k_and_v_read(case):
    body, writers = NORMS[case]
    given = {name: value for name, value in NORM.items() if name in body.replace("(", " ").replace(")", " ")}
    given |= {"one4": positive(4)} if "one4" in body else {}
    graph = build(TOKENS, f"{body}\n {QKV}", opset=18, Wq=(4, 5), Wk=(4, 5), Wv=(4, 5), **given)
    region = moved(graph)
    assert ends(region) == ", ".join(sorted([*writers.split(", "), "in k", "in q", "in v"]))
    assert region.fixed == [""] * 4
    if case == "gamma times rsqrt":
        assert region.no_shift == "a shift does not pass Add"
    else:
        assert region.no_shift == ("a shift does not pass Mul" if "rms" in case else "")


def test_a_norm_without_bias_gets_one_with_a_shift():
    graph = build(TOKENS, "n = LayerNormalization(x, g)\n y = MatMul(n, W)", g=4, W=(4, 5))
    moved(graph)
    assert [len(node.inputs) for node in graph.nodes] == [3, 2, 2]


@pytest.mark.parametrize("op", ["RMSNormalization", "SimplifiedLayerNormalization"])
def test_a_norm_by_mean_squares_has_no_bias_to_take_a_shift(op):
    domains = '"com.microsoft" : 1'
    graph = build(
        TOKENS, f"n = {op}<epsilon=0.01, axis=-1>(x, g)\n y = MatMul(n, W)", opset=23, kind="float", domains=domains,
        g=4, W=(4, 5),
    )  # fmt: skip
    if op != "RMSNormalization":
        graph.nodes[0].outputs[0].shape = ["N", "T", 4]
    last = linears(graph)[-1]
    shapes = {"x": (3, 3, 4), "n": (3, 3, 4), "y": (3, 3, 5)}
    region = trace(graph, last.data, last.in_axis, shapes)
    assert (ends(region), region.no_shift) == ("in y, norm n", f"{op} has no bias")
    before = run(graph, feeds(graph))
    rescale(graph, region, positive(4))
    assert_same(before, run(graph, feeds(graph)))


@pytest.mark.parametrize(("op", "gamma"), [("SkipLayerNormalization", 2), ("SkipSimplifiedLayerNormalization", 2)])
def test_a_skip_norm_scales_gamma_and_beta_and_not_the_bias_in_front_of_it(op, gamma):
    simple = "Simplified" in op
    parameters = "g, c" if simple else "g, b, c"
    given = {"g": 4, "c": 4, "W": (4, 5)} | ({} if simple else {"b": 4})
    graph = build(
        TOKENS, f"n = com.microsoft.{op}(x, x, {parameters})\n y = MatMul(n, W)", kind="float",
        domains='"com.microsoft" : 1', **given,
    )  # fmt: skip
    last = linears(graph)[-1]
    region = trace(graph, last.data, last.in_axis, {"x": (2, 2, 4), "n": (2, 2, 4), "y": (2, 2, 5)})
    assert (ends(region), region.no_shift) == ("in y, norm n", f"{op} has no bias" if simple else "")
    before = run(graph, feeds(graph))
    rescale(graph, region, positive(4), None if simple else positive(4, "shift"))
    assert_same(before, run(graph, feeds(graph)))


def test_group_normalization_made_of_an_instance_normalization():
    body = """
        f = Reshape(x, to)
        i = InstanceNormalization(f, one, zero)
        r = Reshape(i, back)
        s = Mul(r, g)
        n = Add(s, b)
        y = Conv(n, W)
    """
    given = {"to": np.array([0, 2, -1]), "back": np.array([0, 4, 6, 6]), "one": np.ones(2), "zero": np.zeros(2)}
    graph = build(IMAGE.replace("3", "4", 1), body, g=(4, 1, 1), b=(4, 1, 1), W=(5, 4, 1, 1), **given)
    region = moved(graph)
    assert (ends(region), region.size, region.no_shift) == ("factor s, in y, term n", 4, "")


@pytest.mark.parametrize("kernel", [1, 3])
def test_batchnorm_writes_for_a_conv_and_padding_stops_the_shift(kernel):
    body = f"n = BatchNormalization(x, g, b, m, v)\n y = Conv<pads=[{kernel // 2},0,0,0]>(n, W)"
    graph = build(IMAGE, body, g=3, b=3, m=3, v=positive(3), W=(5, 3, kernel, kernel))
    region = moved(graph)
    assert ends(region) == "in y, norm n"
    assert region.no_shift == ("a shift does not pass the zero padding of Conv" if kernel == 3 else "")


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ("z = Sigmoid(n)", "Sigmoid reads it"),
        ("z = Mul(n, n)", "Mul reads it twice"),
        ("z = Add(n, n)", "Add reads it twice"),
        ("z = Identity(n)", "it is an output of the graph"),
        ("z = Relu(n)", "it is an output of the graph"),
    ],
)
def test_a_norm_with_a_reader_that_no_scale_passes_is_restored_in_front_of_it(other, reason):
    body = f"n = LayerNormalization(x, g, b)\n {other}\n y = MatMul(n, W)"
    graph = build("(float[N,T,4] x) => (float[] y, float[] z)", body, g=4, b=4, W=(4, 5))
    assert set(region_of(graph).fixed) == {reason}
    region = moved(graph, insert=True)
    assert ends(region) == "in y, norm n"
    assert [cut.reader.outputs[0].name for cut in region.cuts] == ["z"]
    op = other.split()[2].split("(")[0]
    assert [node.op for node in graph.nodes] == ["LayerNormalization", "Mul", "Add", op, "MatMul", "Add"]


def test_an_output_of_the_graph_is_left_and_its_reader_gets_nodes_of_its_own():
    graph = build(
        "(float[N,T,4] x) => (float[] y, float[] n)", "n = LayerNormalization(x, g, b)\n y = MatMul(n, W)", g=4, b=4,
        W=(4, 5),
    )  # fmt: skip
    assert set(region_of(graph).fixed) == {"it is an output of the graph"}
    region = moved(graph, insert=True)
    assert (ends(region), [cut.reader for cut in region.cuts]) == ("in y", [None])
    assert [node.op for node in graph.nodes] == ["LayerNormalization", "Mul", "Add", "MatMul", "Add"]


def test_an_input_gets_nodes_in_front_of_the_linear():
    graph = build(TOKENS, "y = MatMul(x, W)", W=(4, 5))
    assert set(region_of(graph).fixed) == {"an input of the graph feeds it"}
    assert [cut.reason for cut in moved(graph, insert=True).cuts] == ["an input of the graph feeds it"]


def test_a_term_takes_the_shift_before_the_nodes_that_are_inserted_behind_it():
    graph = build(TOKENS, "s = Sigmoid(x)\n t = Add(s, c)\n y = MatMul(t, W)", c=4, W=(4, 5))
    region = moved(graph, insert=True)
    assert (ends(region), [cut.tensor.name for cut in region.cuts]) == ("in y, term t", ["s"])
    assert [node.op for node in graph.nodes] == ["Sigmoid", "Mul", "Add", "MatMul", "Add"]


def test_a_subgraph_that_reads_a_tensor_pins_it_or_gets_it_restored():
    body = """
        c = Conv(x, W)
        t = If(cond) <
            then_branch = p () => (float[] q) { q = Relu(c) }, else_branch = r () => (float[] o) { o = Neg(c) }
        >
        d = Conv(c, W2)
        y = Add(d, t)
    """
    graph = build(IMAGE, body, W=(4, 3, 1, 1), W2=(4, 4, 1, 1), cond=np.array(True))
    linear = linears(graph)[-1]
    shapes = {"x": (2, 3, 6, 6)} | dict.fromkeys("ctdy", (2, 4, 6, 6))
    assert set(trace(graph, linear.data, 1, shapes).fixed) == {"a subgraph reads it"}
    region = trace(graph, linear.data, 1, shapes, insert=True)
    assert [cut.reason for cut in region.cuts] == ["a subgraph reads it"] * 2
    before = run(graph, feeds(graph))
    rescale(graph, region, positive(region.size), positive(region.size, "shift"))
    check(graph)
    assert_same(before, run(graph, feeds(graph)))


# ---- from one linear to another ------------------------------------------------------------------------------------

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


# ---- attention -----------------------------------------------------------------------------------------------------

SCORES = """
    kt = Transpose<perm=[0,1,3,2]>(kh)
    s0 = MatMul(qh, kt)
    s1 = Mul(s0, half)
    p = Softmax<axis=-1>(s1)
"""
OUT = """
    o0 = MatMul(p, vh)
    o1 = Transpose<perm=[0,2,1,3]>(o0)
    o2 = Reshape(o1, joined)
    y = MatMul(o2, Wo)
"""
HEADS = "\n".join(
    f"{n} = MatMul(x, W{n})\n {n}r = Reshape({n}, by_head)\n {n}h = Transpose<perm=[0,2,1,3]>({n}r)" for n in "qkv"
)
SHAPES = {"half": 0.5, "by_head": np.array([0, 0, 2, 2]), "joined": np.array([0, 0, 4]), "Wo": (4, 5)}
SEPARATE = {"Wq": (4, 4), "Wk": (4, 4), "Wv": (4, 4)}
FUSED = {
    "Split": (
        "qkv = MatMul(x, W)\n q, k, v = Split<axis=-1>(qkv, thirds)\n"
        + "\n".join(f"{n}r = Reshape({n}, by_head)\n {n}h = Transpose<perm=[0,2,1,3]>({n}r)" for n in "qkv"),
        {"W": (4, 12), "thirds": np.array([4, 4, 4])},
    ),
    "Slice": (
        "qkv = MatMul(x, W)\n q = Slice(qkv, i0, i4, i2)\n k = Slice(qkv, i4, i8, i2)\n v = Slice(qkv, i8, i12, i2)\n"
        + "\n".join(f"{n}r = Reshape({n}, by_head)\n {n}h = Transpose<perm=[0,2,1,3]>({n}r)" for n in "qkv"),
        {"W": (4, 12)} | {f"i{n}": np.array([n]) for n in (0, 2, 4, 8, 12)},
    ),
    "Gather": (
        "qkv = MatMul(x, W)\n r = Reshape(qkv, five)\n t = Transpose<perm=[2,0,3,1,4]>(r)\n"
        + "\n".join(f"{n}h = Gather<axis=0>(t, j{i})" for i, n in enumerate("qkv")),
        {"W": (4, 12), "five": np.array([0, 0, 3, 2, 2])} | {f"j{i}": np.array(i) for i in range(3)},
    ),
    "Slice and Squeeze": (
        "qkv = MatMul(x, W)\n r = Reshape(qkv, five)\n t = Transpose<perm=[2,0,3,1,4]>(r)\n"
        + "\n".join(f"{n}s = Slice(t, i{i}, i{i + 1}, i0)\n {n}h = Squeeze({n}s, i0)" for i, n in enumerate("qkv")),
        {"W": (4, 12), "five": np.array([0, 0, 3, 2, 2])} | {f"i{i}": np.array([i]) for i in range(4)},
    ),
}


def free_classes(region: Region, name: str) -> list[int]:
    """The classes of a tensor, flat, 0 where pinned."""
    (index,) = (index for tensor, index in region.places.values() if tensor.name == name)
    return [int(c) if not region.fixed[abs(c) - 1] else 0 for c in index.reshape(-1)]


def test_v_and_o_of_attention_take_a_scale_and_a_shift():
    region = moved(build(TOKENS, HEADS + SCORES + OUT, **SHAPES, **SEPARATE))
    assert (ends(region), region.size, region.no_shift) == ("in y, out v", 4, "")
    assert free_classes(region, "v") == free_classes(region, "o2") == [1, 2, 3, 4]


@pytest.mark.parametrize("case", FUSED)
def test_v_and_o_of_attention_with_one_weight_for_q_k_and_v(case):
    body, given = FUSED[case]
    region = moved(build(TOKENS, body + SCORES + OUT, **SHAPES, **given))
    assert ends(region) == "in y, out qkv"
    assert free_classes(region, "qkv")[8:] == [1, 2, 3, 4]
    q, k, v = np.split(np.array(free_classes(region, "qkv")), 3)
    assert region.shiftable[v - 1].all()
    assert region.no_shift == ""
    assert (-q).tolist() == k.tolist() == [5, 6, 7, 8] or q.tolist() == (-k).tolist() == [5, 6, 7, 8]
    assert {region.unshifted[abs(c) - 1] for c in q} == {"a shift does not pass MatMul"}


def test_a_shift_needs_rows_that_sum_to_one():
    body = (HEADS + SCORES + OUT).replace("p = Softmax<axis=-1>(s1)", "p = Sigmoid(s1)")
    region = moved(build(TOKENS, body, **SHAPES, **SEPARATE))
    assert (ends(region), region.no_shift) == ("in y, out v", "a shift does not pass MatMul")


@pytest.mark.parametrize(
    ("opset", "axis", "passes"), [(11, "", False), (11, "<axis=3>", True), (13, "", True), (13, "<axis=2>", False)]
)
def test_softmax_sums_to_one_along_its_axis(opset, axis, passes):
    body = (HEADS + SCORES + OUT).replace("<axis=-1>", axis)
    region = region_of(build(TOKENS, body, opset=opset, **SHAPES, **SEPARATE))
    assert (region.no_shift == "") is passes


def test_grouped_queries_by_expand():
    repeat = "{n}u = Unsqueeze({n}h, axis)\n {n}e = Expand({n}u, five)\n {n}x = Reshape({n}e, four)\n"
    body = (
        HEADS
        + "\n"
        + "".join(repeat.format(n=n) for n in "kv")
        + (SCORES + OUT).replace("kh", "kx").replace("vh", "vx")
    )
    given = {
        **SHAPES, "by_head": np.array([0, 0, -1, 2]), "Wq": (4, 8), "Wk": (4, 4), "Wv": (4, 4), "axis": np.array([2]),
        "five": np.array([1, 1, 2, 1, 1]), "four": np.array([0, 4, -1, 2]), "joined": np.array([0, 0, 8]), "Wo": (8, 5),
    }  # fmt: skip
    graph = build(TOKENS, body, **given)
    region = moved(graph)
    assert ends(region) == "in y, out v"
    assert free_classes(region, "o2") == [1, 2, 1, 2, 3, 4, 3, 4]
    region = moved(graph, start="q")
    assert ends(region) == "out k, out q"
    assert free_classes(region, "q") == [1, 2, 1, 2, 3, 4, 3, 4]
    assert free_classes(region, "k") == [-1, -2, -3, -4]


def test_grouped_queries_by_broadcasting():
    body = """
        q = MatMul(x, Wq)
        qr = Reshape(q, heads)
        qh = Transpose<perm=[0,2,3,1,4]>(qr)
        k = MatMul(x, Wk)
        kr = Reshape(k, kv_heads)
        kh = Transpose<perm=[0,2,3,4,1]>(kr)
        v = MatMul(x, Wv)
        vr = Reshape(v, kv_heads)
        vh = Transpose<perm=[0,2,3,1,4]>(vr)
        s = MatMul(qh, kh)
        p = Softmax(s)
        o0 = MatMul(p, vh)
        o1 = Transpose<perm=[0,3,1,2,4]>(o0)
        o2 = Reshape(o1, joined)
        y = MatMul(o2, Wo)
    """
    given = {
        "heads": np.array([0, 0, 2, 2, 2]), "kv_heads": np.array([0, 0, 2, 1, 2]), "joined": np.array([0, 0, 8]),
        "Wq": (4, 8), "Wk": (4, 4), "Wv": (4, 4), "Wo": (8, 5),
    }  # fmt: skip
    graph = build(TOKENS, body, **given)
    region = moved(graph)
    assert (ends(region), free_classes(region, "o2")) == ("in y, out v", [1, 2, 1, 2, 3, 4, 3, 4])
    region = moved(graph, start="k")
    assert (ends(region), free_classes(region, "q")) == ("out k, out q", [-1, -2, -1, -2, -3, -4, -3, -4])


def test_one_head_of_keys_and_values_for_all_queries():
    body = """
        q = MatMul(x, Wq)
        qr = Reshape(q, by_head)
        qh = Transpose<perm=[0,2,1,3]>(qr)
        k = MatMul(x, Wk)
        kt = Transpose<perm=[0,2,1]>(k)
        ku = Unsqueeze(kt, one)
        v = MatMul(x, Wv)
        vh = Unsqueeze(v, one)
        s = MatMul(qh, ku)
        p = Softmax(s)
    """
    given = {**SHAPES, "Wq": (4, 4), "Wk": (4, 2), "Wv": (4, 2), "one": np.array([1])}
    graph = build(TOKENS, body + OUT, **{k: v for k, v in given.items() if k != "half"})
    region = moved(graph)
    assert (ends(region), region.no_shift, free_classes(region, "o2")) == ("in y, out v", "", [1, 2, 1, 2])
    region = moved(graph, start="q")
    assert (free_classes(region, "q"), free_classes(region, "k")) == ([1, 2, 1, 2], [-1, -2])


ROTARY = {
    "halves": (
        "{n}a = Slice({n}h, i0, i2, i3)\n {n}b = Slice({n}h, i2, i4, i3)\n {n}c = Neg({n}b)\n"
        "{n}d = Concat<axis=-1>({n}c, {n}a)",
        [1, 2, 1, 2, 3, 4, 3, 4],
    ),
    "interleaved": (
        "{n}a = Slice({n}h, i0, i4, i3, i2)\n {n}b = Slice({n}h, i1, i4, i3, i2)\n {n}c = Neg({n}b)\n"
        "{n}u = Unsqueeze({n}a, i4)\n {n}v = Unsqueeze({n}c, i4)\n {n}w = Concat<axis=-1>({n}v, {n}u)\n"
        "{n}d = Reshape({n}w, back)",
        [1, 1, 2, 2, 3, 3, 4, 4],
    ),
}


@pytest.mark.parametrize("case", ROTARY)
def test_a_rotary_embedding_ties_pairs_of_channels_of_q_and_k(case):
    form, expected = ROTARY[case]
    rotated = "".join(
        f"\n{form}\n {{n}}e = Mul({{n}}h, cos)\n {{n}}f = Mul({{n}}d, sin)\n {{n}}g = Add({{n}}e, {{n}}f)".format(n=n)
        for n in "qk"
    )
    body = HEADS + rotated + (SCORES + OUT).replace("(kh)", "(kg)").replace("(qh,", "(qg,")
    given = {
        **SHAPES, "by_head": np.array([0, 0, 2, 4]), "joined": np.array([0, 0, 8]), "Wo": (8, 5),
        "Wq": (4, 8), "Wk": (4, 8), "Wv": (4, 8), **{f"i{n}": np.array([n]) for n in range(5)},
    }  # fmt: skip
    if case == "interleaved":
        given["back"] = np.array([0, 2, -1, 4])
    unused = {"halves": "i1", "interleaved": ""}[case]
    given.pop(unused, None)
    signature = "(float[N,T,4] x, float[N,1,T,4] cos, float[N,1,T,4] sin) => (float[] y)"
    graph = build(signature, body, **given)
    region = moved(graph, start="q")
    assert ends(region) == "out k, out q"
    assert free_classes(region, "q") == expected
    assert free_classes(region, "k") == [-c for c in expected]
    assert ends(moved(graph)) == "in y, out v"


def test_a_tensor_times_its_own_transpose_is_scaled_against_itself():
    body = HEADS.replace("k = MatMul(x, Wk)", "k = Identity(q)") + SCORES + OUT
    region = region_of(build(TOKENS, body, **SHAPES, Wq=(4, 4), Wv=(4, 4)), start="q")
    assert set(region.fixed) == {"it is scaled against itself"}


@pytest.mark.parametrize("rank", [3, 4])
def test_the_attention_operator_is_linear_in_its_values(rank):
    body = "q = MatMul(x, Wq)\n k = MatMul(x, Wk)\n v = MatMul(x, Wv)\n"
    given = {"Wq": (4, 8), "Wk": (4, 4), "Wv": (4, 6), "Wo": (12, 5)}
    if rank == 3:
        body += "o = Attention<q_num_heads=4, kv_num_heads=2>(q, k, v)\n y = MatMul(o, Wo)"
    else:
        for n, heads in (("q", 4), ("k", 2), ("v", 2)):
            body += f"{n}r = Reshape({n}, h{heads})\n {n}h = Transpose<perm=[0,2,1,3]>({n}r)\n"
        body += "o0 = Attention(qh, kh, vh)\n o1 = Transpose<perm=[0,2,1,3]>(o0)\n o = Reshape(o1, back)\n"
        body += "y = MatMul(o, Wo)"
        given |= {"h4": np.array([0, 0, 4, -1]), "h2": np.array([0, 0, 2, -1]), "back": np.array([0, 0, 12])}
    graph = build(TOKENS, body, opset=23, **given)
    region = moved(graph)
    assert (ends(region), region.no_shift) == ("in y, out v", "a shift does not pass Attention")
    assert free_classes(region, "o") == [1, 2, 3, 1, 2, 3, 4, 5, 6, 4, 5, 6]
    scores = region_of(graph, start="q")
    assert (ends(scores), scores.fixed) == ("out k, out q", [""] * 4)


def test_multi_head_attention_is_linear_in_its_values():
    body = "q = MatMul(x, Wq)\n v = MatMul(x, Wv)\n o = com.microsoft.MultiHeadAttention<num_heads=2>(q, q, v)\n"
    body += "y = MatMul(o, Wo)"
    graph = build(TOKENS, body, kind="float", domains='"com.microsoft" : 1', Wq=(4, 4), Wv=(4, 4), Wo=(4, 5))
    shapes = dict.fromkeys("xqvo", (2, 2, 4)) | {"y": (2, 2, 5)}
    linear = linears(graph)[-1]
    region = trace(graph, linear.data, -1, shapes)
    assert (ends(region), region.fixed) == ("in y, out v", [""] * 4)
    before = run(graph, feeds(graph))
    rescale(graph, region, positive(4))
    assert_same(before, run(graph, feeds(graph)), 1e-5)


# ---- gated products ------------------------------------------------------------------------------------------------

GATED = {
    "separate": ("g = MatMul(x, Wg)\n u = MatMul(x, Wu)", {"Wg": (4, 6), "Wu": (4, 6)}, "in y, out u"),
    "Split": (
        "f = MatMul(x, W)\n g, u = Split<axis=-1>(f, h)", {"W": (4, 12), "h": np.array([6, 6])}, "in y, out f"
    ),
    "Slice": (
        "f = MatMul(x, W)\n g = Slice(f, a, b, c)\n u = Slice(f, b, e, c)",
        {"W": (4, 12), "a": np.array([0]), "b": np.array([6]), "c": np.array([2]), "e": np.array([12])}, "in y, out f",
    ),
}  # fmt: skip


@pytest.mark.parametrize("product", ["Mul(s, u)", "Mul(u, s)"])
@pytest.mark.parametrize("case", GATED)
def test_up_and_down_around_a_gate(case, product):
    body, given, expected = GATED[case]
    graph = build(
        TOKENS, f"{body}\n z = Sigmoid(g)\n s = Mul(g, z)\n t = {product}\n y = MatMul(t, V)", V=(6, 5), **given
    )
    region = moved(graph)
    assert (ends(region), region.no_shift) == (expected, "a shift does not pass Mul")
    assert free_classes(region, "u") == free_classes(region, "t") == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("product", ["Mul(g, u)", "Mul(u, g)"])
@pytest.mark.parametrize("blocked", ["g", "u"])
def test_where_both_sides_come_from_weights_the_one_that_can_takes_the_scale(product, blocked):
    body = "f = MatMul(x, Wf)\n e = MatMul(x, We)\n g, i = Split<axis=-1>(f, h)\n u, j = Split<axis=-1>(e, h)\n"
    body += f"t = {product}\n z = Sigmoid({blocked})\n w = MatMul(z, V)\n y = MatMul(t, V)"
    graph = build(TOKENS.replace("y", "y, float[] w"), body, Wf=(4, 9), We=(4, 9), h=np.array([6, 3]), V=(6, 5))
    region = moved(graph)
    assert ends(region) == ("in y, out e" if blocked == "g" else "in y, out f")
