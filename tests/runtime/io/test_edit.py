from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from channelfold.runtime.io import edit
from channelfold.runtime.io.files import check, export, import_model
from channelfold.tests.graphs import assert_same, build, feeds, listing, node, ops, run

BRANCHES = """
    r = Relu(x)
    s = Neg(r)
    y = If(c) <then_branch = a () => (float[2] p) { p = Exp(r) }, else_branch = b () => (float[2] q) { q = Mul(r, w) }>
"""


@pytest.fixture
def branches():
    return build("(float[2] x, bool c) => (float[2] y, float[2] s)", BRANCHES, w=np.array([2.0, 3.0]))


def tensor(graph, name):
    return graph.tensors()[name]


def test_nodes_of_subgraphs_are_told_from_those_of_the_graph(branches):
    readers = edit.consumers(tensor(branches, "r"))
    assert [n.op for n in readers] == ["Neg", "Exp", "Mul"]
    assert [edit.in_graph(branches, n) for n in readers] == [True, False, False]
    added = gs.Node("Relu", inputs=[tensor(branches, "r")], outputs=[gs.Variable("t")])
    branches.nodes.append(added)
    assert edit.in_graph(branches, added)


def test_a_sole_consumer_stands_in_the_graph_and_reads_once():
    graph = build(
        "(float[2] x, bool c) => (float[2] y, float[2] f)",
        """
        d = Relu(x)
        e = Mul(d, d)
        f = Neg(e)
        g = Exp(f)
        h = Exp(g)
        y = If(c) <then_branch = a () => (float[2] p) { p = Exp(h) }, else_branch = b () => (float[2] q) { q = Exp(x) }>
        """,
    )
    found = {name: edit.sole_consumer(graph, tensor(graph, name)) for name in "defgh"}
    assert {name: n and n.op for name, n in found.items()} == {"d": None, "e": "Neg", "f": None, "g": "Exp", "h": None}


@pytest.mark.parametrize(
    ("dtype", "kind", "is_float"),
    [
        (np.float32, np.dtype("float32"), True),
        (onnx.TensorProto.BFLOAT16, np.dtype(ml_dtypes.bfloat16), True),
        (onnx.TensorProto.FLOAT8E4M3FN, np.dtype(ml_dtypes.float8_e4m3fn), False),
        (np.int64, np.dtype("int64"), False),
        (None, None, True),
    ],
)
def test_types_have_one_form(dtype, kind, is_float):
    assert edit.dtype(gs.Variable("t", dtype)) == kind
    assert edit.is_float(gs.Variable("t", dtype)) is is_float


def test_set_constant_writes_in_place_for_a_sole_reader_and_copies_for_others():
    graph = build("(float[2] x) => (float[2] y)", "a = Mul(x, v)\n b = Mul(a, w)\n y = Add(b, w)", v=2, w=2)
    first, second = graph.nodes[:2]
    edit.set_constant(graph, first, 1, np.array([5.0, 6.0]), "new")
    edit.set_constant(graph, second, 1, np.array([7.0, 8.0]), "new")
    assert listing(graph) == "a = Mul(x, v)\nb = Mul(a, new)\ny = Add(b, w)"
    assert run(graph, {"x": np.ones(2)})["y"] == pytest.approx([35, 48] + tensor(graph, "w").values)


def test_a_constant_that_is_an_output_of_the_graph_is_copied():
    graph = build("(float[2] x) => (float[2] y, float[2] w)", "y = Mul(x, w)", w=2)
    edit.set_constant(graph, graph.nodes[0], 1, np.zeros(2), "w")
    assert listing(graph) == "y = Mul(x, w_1)"


def test_bypass_moves_the_readers_those_in_subgraphs_too(branches):
    feed = {"x": np.array([-1.0, 2.0]), "c": np.array(True)}
    relu = node(branches, "Relu")
    assert edit.bypass(branches, tensor(branches, "x"), [relu], tensor(branches, "r"))
    edit.sweep(branches)
    check(branches)
    assert ops(branches) == ["Neg", "If"]
    assert_same(run(branches, feed), {"y": np.exp(feed["x"]), "s": -feed["x"]})


def test_bypass_lets_the_producer_write_a_graph_output():
    graph = build("(float[2] x) => (float[2] y)", "a = Exp(x)\n b = Identity(a)\n c = Mul(a, a)\n y = Identity(b)")
    assert [n.op for n in edit.consumers(tensor(graph, "a"))] == ["Identity", "Mul"]
    assert edit.bypass(graph, tensor(graph, "a"), [graph.nodes[1], graph.nodes[3]], tensor(graph, "y"))
    edit.sweep(graph)
    assert listing(graph) == "y = Exp(x)\nc = Mul(y, y)"


@pytest.mark.parametrize(
    ("signature", "body", "constants"),
    [
        ("(float[2] x) => (float[2] y)", "y = Identity(x)", {}),
        ("(float[2] x) => (float[2] y)", "y = Identity(c)", {"c": 2}),
        ("(float[2] x) => (float[2] e, float[2] y)", "e = Exp(x)\n y = Identity(e)", {}),
    ],
    ids=["input", "constant", "output"],
)
def test_bypass_leaves_a_graph_alone_where_two_names_have_to_stay(signature, body, constants):
    graph = build(signature, body, **constants)
    before, last = listing(graph), graph.nodes[-1]
    assert not edit.bypass(graph, last.inputs[0], [last], last.outputs[0])
    assert listing(graph) == before


def test_bypass_renames_the_right_one_of_several_outputs():
    graph = build("(float[4] x) => (float[2] y)", "a, b = Split(x, s)\n y = Identity(b)", s=np.array([2, 2]))
    assert edit.bypass(graph, tensor(graph, "b"), [graph.nodes[1]], tensor(graph, "y"))
    edit.sweep(graph)
    assert listing(graph) == "a, y = Split(x, s)"


def test_rewrite_drops_attributes_that_are_carried():
    squeeze = onnx.helper.make_node("Squeeze", ["x"], ["y"], doc_string="said")
    squeeze.attribute.add(name="axes", type=onnx.AttributeProto.INTS)
    sides = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]) for name in "xy"]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([squeeze], "g", sides[:1], sides[1:]), opset_imports=[onnx.helper.make_opsetid("", 11)]
    )
    graph = import_model(model)
    edit.rewrite(graph.nodes[0], "Relu", [graph.inputs[0]])
    check(graph)
    (written,) = export(graph)[0].graph.node
    assert (written.op_type, list(written.attribute), written.doc_string) == ("Relu", [], "said")


def test_rewrite_drops_attributes_and_further_outputs():
    graph = build("(float[N,3,2] x) => (float[] y)", "y, m, v = BatchNormalization<training_mode=1>(x, g, b, m0, v0)",
                  g=3, b=3, m0=3, v0=3)  # fmt: skip
    edit.rewrite(graph.nodes[0], "Add", [graph.inputs[0], tensor(graph, "b")])
    assert listing(graph) == "y = Add(x, b)"
    assert edit.producer(tensor(graph, "y")) is graph.nodes[0]


def test_dead_nodes_go_with_their_subgraphs_and_what_only_those_read():
    graph = build(
        "(float[2] x, bool c) => (float[2] z)",
        """
        r = Relu(x)
        y = If(c) <then_branch = a () => (float[2] p) { p = Exp(r) }, else_branch = b () => (float[2] q) { q = Exp(x) }>
        d = Neg(y)
        z = Exp(x)
        """,
    )
    assert [n.op for n in edit.remove_dead(graph)] == ["Neg", "If", "Relu"]
    assert listing(graph) == "z = Exp(x)"


def test_arguments_are_inputs_or_attributes():
    new = build("(float[2,2] x) => (float[] y)", "y = Squeeze(x, a)", a=np.array([1]))
    old = build("(float[2,2] x) => (float[] y)", "y = Squeeze<axes=[1]>(x)", opset=11)
    runtime = build("(float[2,2] x, int64[1] a) => (float[] y)", "y = Squeeze(x, a)")
    assert [edit.argument(g.nodes[0], 1, "axes") for g in (new, old, runtime)] == [[1], [1], None]


def test_insert_after_keeps_the_order():
    graph = build("(float[2] x) => (float[2] y)", "a = Exp(x)\n y = Neg(a)")
    old = tensor(graph, "y")
    fresh = gs.Variable("t")
    edit.set_output(graph.nodes[1], 0, fresh)
    edit.insert_after(
        graph, graph.nodes[0], gs.Node("Abs", "n", inputs=[tensor(graph, "a")], outputs=[gs.Variable("u")])
    )
    edit.insert_after(graph, graph.nodes[2], gs.Node("Relu", "m", inputs=[fresh], outputs=[old]))
    assert listing(graph) == "a = Exp(x)\nu = Abs(a)\nt = Neg(a)\ny = Relu(t)"
    check(graph)
    assert run(graph, feeds(graph))["y"].shape == (2,)


def test_readers_of_an_identity_of_a_constant_read_the_constant():
    body = "i = Identity(b)\n h = Gemm(x, W, i)\n y = Gemm(h, V, i)"
    graph = build("(float[N,4] x) => (float[] y)", body, W=(4, 4), V=(4, 4), b=4)
    before = run(graph, feeds(graph))
    edit.see_through_identities(graph)
    assert listing(graph) == "h = Gemm(x, W, b)\ny = Gemm(h, V, b)"
    assert_same(before, run(graph, feeds(graph)))
