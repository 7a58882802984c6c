"""Regions of index maps: data and maps move alike, norms write what linear nodes read, and a scale is exact."""

from __future__ import annotations

import numpy as np
import pytest

from channelfold.passes.channels.maps import image, preimage
from channelfold.passes.channels.rescale import rescale
from channelfold.passes.channels.scale_regions import trace
from channelfold.passes.layers.linear import linears
from channelfold.runtime.io.files import check
from channelfold.tests.graphs import assert_same, build, feeds, positive, run
from channelfold.tests.passes.channels.scaled import IMAGE, TOKENS, ends, moved, region_of


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
