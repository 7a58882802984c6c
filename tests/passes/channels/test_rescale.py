"""A scale and a shift moved through a region: what is written, what is refused, and that a refusal changes nothing."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from channelfold.passes.base import Refused
from channelfold.passes.channels.rescale import at, clamped, rescale
from channelfold.passes.channels.scale_regions import Region, trace
from channelfold.passes.layers.linear import linears
from channelfold.runtime.io.files import check
from channelfold.runtime.io.shapes import shapes_on
from channelfold.tests.graphs import assert_same, build, constants, feeds, listing, positive, random, run

TOKENS = "(float[N,T,4] x) => (float[] y)"
TWO = "h = MatMul(x, V)\n t = Relu(h)\n y = MatMul(t, W)"
NORM = "n = LayerNormalization(x, g, b)\n y = MatMul(n, W)"


def traced(graph: gs.Graph, *, insert: bool = False) -> Region:
    """The region of what the last linear reads."""
    last = linears(graph)[-1]
    shapes = shapes_on(graph, {name: values.shape for name, values in feeds(graph).items()})
    return trace(graph, last.data, last.in_axis, shapes, insert)


def exact(graph: gs.Graph, scale: np.ndarray, shift: np.ndarray | None = None, *, insert=False, rtol=None) -> None:
    """Moves a scale and a shift through the region of what the last linear reads; the outputs stay."""
    feed = feeds(graph)
    before = run(graph, feed)
    rescale(graph, traced(graph, insert=insert), scale, shift)
    check(graph)
    assert_same(before, run(graph, feed), rtol)


def test_a_scale_divides_what_writes_and_multiplies_what_reads():
    graph = build(TOKENS, "h = MatMul(x, V)\n c = Add(h, b)\n t = Relu(c)\n y = MatMul(t, W)", V=(4, 3), b=3, W=(3, 5))
    s = np.array([2.0, 0.5, 4.0])
    exact(graph, s)
    written = constants(graph)
    np.testing.assert_array_equal(written["V"], random((4, 3), "V") / s)
    np.testing.assert_array_equal(written["b"], random(3, "b") / s)
    np.testing.assert_array_equal(written["W"], random((3, 5), "W") * s[:, None])


def test_a_shift_goes_from_the_bias_of_the_writer_to_that_of_the_reader():
    graph = build(TOKENS, NORM, g=4, b=4, W=(4, 5))
    s, z = np.array([2.0, 0.5, 4.0, 1.0]), np.array([1.0, 0.0, -2.0, 3.0])
    exact(graph, s, z)
    written = constants(graph)
    np.testing.assert_array_equal(written["g"], random(4, "g") / s)
    np.testing.assert_allclose(written["b"], (random(4, "b") - z) / s, rtol=1e-15)
    np.testing.assert_allclose(written["MatMul_1_bias"], z @ random((4, 5), "W"), rtol=1e-14)


@pytest.mark.parametrize(
    ("body", "sign"),
    [("t = Add(n, c)", -1), ("t = Add(c, n)", -1), ("t = Sub(n, c)", 1), ("t = Sub(c, n)", -1)],
)
def test_a_constant_term_takes_the_shift_and_its_part_of_the_scale(body, sign):
    graph = build(TOKENS, f"n = LayerNormalization(x, g)\n {body}\n y = MatMul(t, W)", g=4, c=4, W=(4, 5))
    s, z = positive(4, "s"), random(4, "z")
    exact(graph, s, z)
    np.testing.assert_allclose(constants(graph)["c"], (random(4, "c") + sign * z) / s, rtol=1e-14)


@pytest.mark.parametrize("body", ["t = Add(n, c)", "t = Sub(n, c)", "t = Sub(c, n)"])
def test_a_constant_term_behind_the_tensor_takes_the_shift_too(body):
    text = f"n = LayerNormalization(x, g, b)\n {body}\n w = MatMul(t, V)\n v = MatMul(n, W)\n y = Add(v, w)"
    exact(build(TOKENS, text, g=4, b=4, c=4, W=(4, 5), V=(4, 5)), positive(4, "s"), random(4, "z"))


@pytest.mark.parametrize("body", ["t = Mul(n, c)", "t = Mul(c, n)", "t = Div(n, c)"])
def test_a_constant_factor_behind_the_tensor_undoes_the_scale(body):
    text = f"n = LayerNormalization(x, g, b)\n {body}\n w = Sigmoid(t)\n v = MatMul(n, W)\n y = Mul(v, w)"
    graph = build(TOKENS, text, g=4, b=4, c=positive(4), W=(4, 4))
    s = positive(4, "s")
    exact(graph, s)
    factor = constants(graph)["c"] / positive(4)
    np.testing.assert_allclose(factor, 1 / s if "Div" in body else s, rtol=1e-14)


def test_a_scalar_term_becomes_a_vector():
    graph = build(TOKENS, "n = LayerNormalization(x, g)\n t = Add(n, c)\n y = MatMul(t, W)", g=4, c=0.5, W=(4, 5))
    exact(graph, positive(4, "s"), random(4, "z"))
    assert constants(graph)["c"].size == 4


@pytest.mark.parametrize("value", [0.0, -1.0, np.inf, -np.inf, np.nan])
def test_a_scale_that_is_no_positive_number_is_1(value):
    assert clamped(np.array([value, 2.0, 1e-9, 1e9, 3.0]), np.array([1, 1, 1, 1, 0], bool)).tolist() == [
        1.0, 2.0, 1e-5, 1e5, 1.0,
    ]  # fmt: skip
    exact(build(TOKENS, TWO, V=(4, 3), W=(3, 5)), np.array([value, 2.0, value]))


def test_a_negative_entry_of_a_map_takes_the_inverse():
    assert at(np.array([2.0, 4.0]), np.array([[1, -2], [-1, 2]])).tolist() == [[2.0, 0.25], [0.5, 4.0]]


def test_pinned_classes_stay():
    body = "h = MatMul(x, V)\n a, z = Split<axis=2>(h, p)\n y = MatMul(a, W)"
    graph = build(TOKENS.replace("y", "y, float[] z"), body, V=(4, 5), W=(3, 5), p=np.array([3, 2]))
    region = traced(graph)
    assert region.fixed == ["", "", "", *["it is an output of the graph"] * 2]
    exact(graph, positive(5, "s"), random(5, "z"))
    np.testing.assert_array_equal(constants(graph)["V"][:, 3:], random((4, 5), "V")[:, 3:])


def test_an_end_whose_classes_are_all_pinned_is_not_written():
    body = "h = MatMul(x, V)\n t = MatMul(x, U)\n c = Concat<axis=2>(h, t)\n z = Sigmoid(t)\n w = MatMul(z, U)\n"
    body += "r = MatMul(c, W)\n y = Add(r, w)"
    graph = build(TOKENS, body, V=(4, 3), U=(4, 4), W=(7, 4))
    last = next(linear for linear in linears(graph) if linear.data.name == "c")
    region = trace(graph, last.data, -1, shapes_on(graph, {"x": (2, 2, 4)}))
    old = graph.tensors()["U"]
    before = run(graph, feeds(graph))
    rescale(graph, region, positive(region.size, "s"))
    assert_same(before, run(graph, feeds(graph)))
    assert sum(node.inputs[-1] is old for node in graph.nodes) == 2


# ---- weights -------------------------------------------------------------------------------------------------------


def test_a_weight_that_another_node_reads_too_is_copied():
    graph = build(TOKENS, "h = MatMul(x, V)\n t = Relu(h)\n u = MatMul(t, V)\n y = Sigmoid(u)", V=(4, 4))
    exact(graph, positive(4, "s"))
    assert [node.inputs[1].name for node in graph.nodes if node.op == "MatMul"] == ["V", "V_folded"]


def test_both_readers_of_one_weight_take_the_scale():
    body = "h = MatMul(x, V)\n t = Relu(h)\n a = MatMul(t, W)\n b = MatMul(t, W)\n y = Mul(a, b)"
    exact(build(TOKENS, body, V=(4, 3), W=(3, 5)), positive(3, "s"))


@pytest.mark.parametrize("op", ["Transpose", "Identity", "Cast<to=11>"])
def test_a_weight_behind_other_nodes(op):
    shape = (5, 3) if op == "Transpose" else (3, 5)
    graph = build(TOKENS, f"w = {op}(W)\n h = MatMul(x, V)\n t = Relu(h)\n y = MatMul(t, w)", V=(4, 3), W=shape)
    exact(graph, positive(3, "s"))
    assert [node.op for node in graph.nodes] == ["MatMul", "Relu", "MatMul"]


def test_a_tied_embedding_is_refused_for_what_its_copy_weighs():
    body = "e = Gather(E, i)\n n = LayerNormalization(e, g, b)\n W = Transpose(E)\n y = MatMul(n, W)"
    graph = build("(float[1] unused, int64[N,T] i) => (float[] y)", body, E=(3000, 64), g=64, b=64)
    shapes = {"i": (2, 3), "e": (2, 3, 64), "n": (2, 3, 64), "y": (2, 3, 3000)}
    last = linears(graph)[-1]
    region, old = trace(graph, last.data, -1, shapes), listing(graph)
    with pytest.raises(Refused, match=r"a new weight for MatMul_3 would make the file 1\.5 MB larger"):
        rescale(graph, region, positive(64))
    assert listing(graph) == old
    np.testing.assert_array_equal(constants(graph)["g"], random(64, "g"))


def test_float16_weights_keep_their_type():
    graph = build(TOKENS, TWO, kind="float16", V=(4, 3), W=(3, 5))
    exact(graph, positive(3, "s"), rtol=5e-3)  # a few roundings to 11 bits
    assert {values.dtype for values in constants(graph).values()} == {np.dtype(np.float16)}


@pytest.mark.parametrize("insert", [False, True])
def test_what_float16_cannot_hold_is_refused_and_nothing_is_changed(insert):
    body = "h = MatMul(x, V)\n t = Sigmoid(h)\n y = MatMul(t, W)" if insert else TWO
    graph = build(TOKENS, body, kind="float16", V=(4, 3), W=np.full((3, 5), 1000.0))
    old, before = listing(graph), {name: values.copy() for name, values in constants(graph).items()}
    region = traced(graph, insert=insert)
    with pytest.raises(Refused, match="does not fit float16"):
        rescale(graph, region, np.full(3, 1e-5 if insert else 1e5))
    assert listing(graph) == old
    assert all(np.array_equal(before[name], values) for name, values in constants(graph).items())


def test_a_shift_where_there_can_be_none_is_refused():
    graph = build(TOKENS, TWO, V=(4, 3), W=(3, 5))
    with pytest.raises(Refused, match="a shift does not pass Relu"):
        rescale(graph, traced(graph), np.ones(3), np.ones(3))
    rescale(graph, traced(graph), np.ones(3), np.zeros(3))


def test_a_scale_of_one_changes_nothing():
    graph = build(TOKENS, NORM, g=4, b=4, W=(4, 5))
    old, before = listing(graph), constants(graph)
    rescale(graph, traced(graph), np.ones(4), np.zeros(4))
    assert listing(graph) == old
    assert all(constants(graph)[name] is values for name, values in before.items())


# ---- explicit nodes ------------------------------------------------------------------------------------------------


def test_the_scale_is_undone_in_front_of_each_reader_that_blocks_it():
    body = "n = LayerNormalization(x, g, b)\n a = Sigmoid(n)\n c = Tanh(n)\n d = MatMul(n, W)\n e = Add(a, c)\n"
    body += "y = Add(d, e)"
    graph = build(TOKENS, body, g=4, b=4, W=(4, 4))
    exact(graph, positive(4, "s"), random(4, "z"), insert=True)
    assert [node.op for node in graph.nodes] == [
        "LayerNormalization", "Mul", "Add", "Sigmoid", "Tanh", "MatMul", "Add", "Add", "Add",
    ]  # fmt: skip


def test_the_scale_is_computed_behind_a_writer_that_blocks_it():
    graph = build(TOKENS, "t = Sigmoid(x)\n y = MatMul(t, W)", W=(4, 5))
    s, z = positive(4, "s"), random(4, "z")
    exact(graph, s, z, insert=True)
    assert [node.op for node in graph.nodes] == ["Sigmoid", "Mul", "Add", "MatMul", "Add"]
    np.testing.assert_array_equal(graph.nodes[1].inputs[1].values.reshape(-1), 1 / s)


def test_no_node_is_inserted_for_what_does_nothing():
    graph = build(TOKENS, "t = Sigmoid(x)\n y = MatMul(t, W)", W=(4, 5))
    exact(graph, positive(4, "s"), insert=True)
    assert [node.op for node in graph.nodes] == ["Sigmoid", "Mul", "MatMul"]
