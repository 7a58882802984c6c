"""Shapes under given inputs, and the Squeeze that TensorRT wants told its axes."""

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest

from channelfold.runtime.engine.repair import name_squeezed_axes, squeezes_without_axes
from channelfold.runtime.errors import ChannelfoldError
from channelfold.runtime.io import files
from channelfold.runtime.io.shapes import measured_shapes, shapes_on, squeeze_weights
from channelfold.tests.graphs import build, constants, random, run


def squeeze(opset: int) -> gs.Graph:
    """x [N, 1, L] -> Squeeze -> Relu -> y"""
    x = gs.Variable("x", np.float32, ["N", 1, "L"])
    squeezed, y = gs.Variable("squeezed", np.float32), gs.Variable("y", np.float32)
    nodes = [
        gs.Node("Squeeze", "squeeze", inputs=[x], outputs=[squeezed]),
        gs.Node("Relu", "relu", inputs=[squeezed], outputs=[y]),
    ]
    return gs.Graph(nodes, [x], [y], opset=opset)


def test_shapes_follow_the_inputs():
    assert shapes_on(squeeze(13), {"x": (2, 1, 5)}) == {"x": (2, 1, 5), "squeezed": (2, 5), "y": (2, 5)}


RESHAPED = "(float[N,4] x, int64[M] to) => (float[] y, float[] z)"  # to a shape that only a run can tell
BODY = "r = Reshape(x, to)\n y = Relu(r)\n z = Relu(x)"


def test_what_inference_cannot_tell_is_measured():
    graph = build(RESHAPED, BODY, kind="float")
    feed = {"x": np.zeros((3, 4), np.float32), "to": np.array([2, 6])}
    inferred = {"x": (3, 4), "to": (2,), "z": (3, 4)}
    assert shapes_on(graph, {name: values.shape for name, values in feed.items()}) == inferred
    assert measured_shapes(graph, feed) == inferred | {"r": (2, 6), "y": (2, 6)}
    assert [t.name for t in graph.outputs] == ["y", "z"]


def test_shapes_of_subgraphs_are_left_out():
    body = """
        r = Reshape(x, to)
        y = If(c) <
            then_branch = p () => (float[A,B] q) { q = Relu(r) }, else_branch = s () => (float[A,B] o) { o = Neg(r) }
        >
        z = Relu(x)
    """
    graph = build(RESHAPED, body, kind="float", c=np.array(True))
    shapes = measured_shapes(graph, {"x": np.zeros((3, 4), np.float32), "to": np.array([2, 6])})
    assert shapes == {"x": (3, 4), "to": (2,), "r": (2, 6), "y": (2, 6), "z": (3, 4)}


def test_a_model_that_does_not_run_says_so():
    graph = build(RESHAPED, BODY, kind="float")
    with pytest.raises(ChannelfoldError, match="Reshape"):
        measured_shapes(graph, {"x": np.zeros((3, 4), np.float32), "to": np.array([5, 5])})


@pytest.mark.parametrize("opset", [11, 13])
@pytest.mark.parametrize(
    ("low", "high", "axes"), [((1, 1, 4), (1, 1, 9), [0, 1]), ((2, 1, 4), (8, 1, 4), [1])], ids=["batch 1", "batch > 1"]
)
def test_squeeze_is_given_the_axes_it_has_for_every_shape(opset, low, high, axes):
    graph = squeeze(opset)
    (sentence,) = name_squeezed_axes(graph, {"x": low}, {"x": high})
    assert sentence == f"squeeze was given axes {axes}, which it removes for every shape of the engine"
    assert squeezes_without_axes(graph) == []
    for shape in (low, high):
        feed = {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
        np.testing.assert_array_equal(files.session(graph).run(feed)["y"], files.session(squeeze(opset)).run(feed)["y"])


def test_squeeze_whose_axes_vary_is_left_alone():
    graph = squeeze(13)
    assert name_squeezed_axes(graph, {"x": (1, 1, 4)}, {"x": (8, 1, 4)}) == []
    assert [node.name for node in squeezes_without_axes(graph)] == ["squeeze"]


def test_sequences_and_maps_have_no_shape():
    body = """
        s = SplitToSequence<axis = 1>(x)
        n = SequenceLength(s)
        a = ConcatFromSequence<axis = 1>(s)
        r = Reshape(a, to)
        z = Relu(x)
        y = Relu(r)
    """
    graph = build(RESHAPED, body, kind="float")
    shapes = measured_shapes(graph, {"x": np.zeros((3, 4), np.float32), "to": np.array([2, 6])})
    assert "s" not in shapes
    assert (shapes["n"], shapes["a"], shapes["y"]) == ((), (3, 4), (2, 6))


STALE = "m (float[batch,4] x) => (float[batch,4] y) <{}> {{ r = Relu(x)  s = Neg(r)  y = vendor.Op(s) }}"


@pytest.mark.parametrize(
    ("said", "stale"),
    [
        ("float[batch,4] r, float[batch,4] s", ""),
        ("float[N,4] r", ""),  # another name for the same size
        ("float[1,4] r, float[1,4] s", "'r' is [1, 4] in value_info and ['batch', 4] by the inputs"),
        ("float[batch,4] r, float[batch,5] s", "'s' is"),
        ("float[batch,1,4] r", "'r' is"),
    ],
)
def test_what_contradicts_the_inputs_is_forgotten(said, stale):
    text = '<ir_version: 8, opset_import: ["" : 17, "vendor" : 1]> '
    graph = files.import_model(onnx.parser.parse_model(text + STALE.format(said)))
    before = {name: tensor.shape for name, tensor in graph.tensors().items()}
    found = files.drop_stale_shapes(graph)
    assert found.startswith(stale)
    assert bool(found) is bool(stale)
    inside = {"r": None, "s": None} if stale else {}
    assert {name: tensor.shape for name, tensor in graph.tensors().items()} == before | inside


def test_operators_that_nobody_knows_have_no_shapes_and_functions_of_the_file_do():
    text = """<ir_version: 8, opset_import: ["" : 17, "vendor" : 1, "local" : 1]>
        m (float[N,4] x) => (float[] y, float[] z) { a = local.twice(x)  r = Relu(a)  y = vendor.Op(r)  z = Neg(r) }
        <opset_import: ["" : 17], domain: "local"> twice (p) => (q) { q = Add(p, p) }"""
    graph = files.import_model(onnx.parser.parse_model(text))
    shapes = measured_shapes(graph, {"x": np.zeros((3, 4), np.float32)})
    assert shapes == {"x": (3, 4), "a": (3, 4), "r": (3, 4), "z": (3, 4)}


def test_what_the_runtime_defines_in_the_domain_of_onnx_is_measured():
    body = "n = SimplifiedLayerNormalization<axis = -1>(x, g) y = MatMul(n, W)"
    graph = build("(float[N,4] x) => (float[] y)", body, kind="float", g=4, W=(4, 3))
    assert measured_shapes(graph, {"x": np.ones((2, 4), np.float32)}) == {"x": (2, 4), "n": (2, 4), "y": (2, 3)}


@pytest.mark.parametrize(
    ("x", "body", "squeezed"),
    [
        ("float[N,5,8]", "y = MatMul(x, W)", True),
        ("float[N,2,5,8]", "h = Relu(x) y = MatMul(h, W)", True),  # whose rank only inference knows
        ("float[5,8]", "y = MatMul(x, W)", False),  # the result has three axes
        ("float[N,6,5]", "y = MatMul(V, x)", True),
        ("float[3,5,8]", "y = MatMul(x, U)", False),
    ],
)
def test_weights_lose_leading_axes_of_one(x, body, squeezed):
    name = next(name for name in "UVW" if name in body)
    weight = random({"U": (3, 8, 6), "V": (1, 4, 6), "W": (1, 8, 6)}[name], name)
    graph = build(f"({x} x) => (float[] y)", body, kind="float", **{name: weight})
    feed = {"x": random(tuple(2 if d == "N" else d for d in graph.inputs[0].shape), "x").astype(np.float32)}
    before = run(graph, feed)
    squeeze_weights(graph)
    assert len(constants(graph)[name].shape) == (2 if squeezed else 3)
    np.testing.assert_array_equal(run(graph, feed)["y"], before["y"])
