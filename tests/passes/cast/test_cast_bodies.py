"""Bodies, foreign operators, values that are no tensors; and random graphs."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from channelfold.passes.cast import Cast
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import import_model, raise_opset
from channelfold.tests import strategies
from channelfold.tests.graphs import build, data_from, feeds, random, reasons, whole
from channelfold.tests.passes.cast.casts import EPSILON, cast, computed, error, twin

BRANCHES = """
    h = MatMul(x, A)
    y = If(c) <
        then_branch = then () => (float[4,8] t) { p = MatMul(h, B) t = Relu(p) },
        else_branch = other () => (float[4,8] e) { q = Exp(h) e = MatMul(q, B) }
    >
"""


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@pytest.mark.parametrize("taken", [True, False])
def test_branches_are_typed_with_the_graph_around_them(kind, taken, tmp_path):
    graph = build("(float[4,8] x, bool c) => (float[4,8] y)", BRANCHES, A=(8, 8), B=(8, 8), kind="float")
    feed = {"x": random((4, 8)).astype(np.float32) / 4, "c": np.array(taken)}
    before = computed(graph, feed)
    outcome = cast(graph, Cast(type=kind, exclude_ops=("Exp",)), data_from(feed))
    bodies = node_of(graph, "If").attrs
    assert [n.op for n in bodies["then_branch"].nodes] == ["MatMul", "Relu", "Cast"]
    assert [n.op for n in bodies["else_branch"].nodes] == ["Exp", "Cast", "MatMul", "Cast"]
    assert [n.op for n in graph.nodes] == ["Cast", "MatMul", "Cast", "If"]
    assert reasons(outcome) == ["Exp stays float32: excluded by operator type Exp"]
    after = computed(graph, feed) if kind == "float16" else twin(graph, tmp_path, feed)
    assert error(before, after) < 6 * EPSILON[kind]


def test_a_branch_that_never_ran_is_cast_as_without_data():
    graph = build("(float[4,8] x, bool c) => (float[4,8] y)", BRANCHES, A=(8, 8), B=(8, 8), kind="float")
    feed = {"x": random((4, 8)).astype(np.float32), "c": np.array(True)}
    assert reasons(cast(graph, data=data_from(feed))) == ["Exp stays float32: it may overflow, and no data tell"]
    graph = build("(float[4,8] x, bool c) => (float[4,8] y)", BRANCHES, A=(8, 8), B=(8, 8), kind="float")
    assert not cast(graph, data=data_from(feed, feed | {"c": np.array(False)})).refused


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_the_states_of_a_loop_keep_their_type(kind, tmp_path):
    body = """
        y, ys = Loop(n, , x) <body = step (int64 i, bool go, float[4,8] s) => (bool on, float[4,8] t, float[4,8] o) {
            on = Identity(go)  p = MatMul(s, A)  t = Tanh(p)  o = Identity(t) }>
        z = Relu(ys)
    """
    graph = build("(float[4,8] x, int64 n) => (float[4,8] y, float[] z)", body, A=(8, 8), kind="float")
    feed = {"x": random((4, 8)).astype(np.float32), "n": np.array(3)}
    before = computed(graph, feed)
    assert not cast(graph, Cast(type=kind), data_from(feed)).refused
    inside = node_of(graph, "Loop").attrs["body"]
    assert [edit.dtype(t) for t in inside.nodes[2].inputs] == [np.dtype(kind)] * 2 if kind == "float16" else True
    after = computed(graph, feed) if kind == "float16" else twin(graph, tmp_path, feed)
    assert error(before, after) < 32 * EPSILON[kind]


def node_of(graph, op):
    (found,) = (node for node in graph.nodes if node.op == op)
    return found


def test_foreign_operators_stay_and_are_named():
    body = "a = MatMul(x, A)  b = com.microsoft.FastGelu(a)  y = MatMul(b, A)"
    graph = build("(float[4,16] x) => (float[4,16] y)", body, A=(16, 16), domains='"com.microsoft" : 1', kind="float")
    feed = feeds(graph)
    before = computed(graph, feed)
    outcome = cast(graph)
    assert len(outcome.refused) == 1
    assert "com.microsoft is not a domain of ONNX" in outcome.refused[0].reason
    assert error(before, computed(graph, feed)) < 4 * EPSILON["float16"]


def test_sequences_keep_their_type():
    body = """
        a = Relu(x)  s = SequenceConstruct(a, x)  i = SequenceInsert(s, a)  e = SequenceAt(i, zero)  y = MatMul(e, A)
    """
    graph = build("(float[4,8] x) => (float[] y)", body, A=(8, 8), zero=np.array(0), kind="float")
    feed = feeds(graph)
    before = computed(graph, feed)
    outcome = cast(graph)
    assert {r.node.split("_")[0] for r in outcome.refused} == {"SequenceConstruct", "SequenceInsert", "SequenceAt"}
    assert error(before, computed(graph, feed)) < 2 * EPSILON["float16"]


@given(data=st.data(), kind=st.sampled_from(["float16", "bfloat16"]), seen=st.booleans())
@settings(max_examples=30, deadline=None, suppress_health_check=(HealthCheck.too_slow,))
def test_random_networks(data, kind, seen, tmp_path_factory):
    """Whatever the graph: strong types, a model that runs, outputs near those of float32, nothing that overflows."""
    model = whole(data.draw(strategies.graphs()))
    graph = import_model(_as_float32(model))
    feed = feeds(graph)
    before = computed(graph, feed)
    step = Cast(type=kind)
    graph = raise_opset(graph, step.opset_for(graph))
    cast(graph, step, data_from(feed) if seen else None)
    after = computed(graph, feed) if kind == "float16" else twin(graph, tmp_path_factory.mktemp("twin"), feed)
    for name, values in before.items():
        assert np.isfinite(after[name]).all() or not np.isfinite(values).all()
        scale = np.abs(values).max(initial=1e-3)
        assert np.abs(after[name] - values).max(initial=0.0) <= 128 * EPSILON[kind] * max(scale, 1.0)


def _as_float32(model: onnx.ModelProto) -> onnx.ModelProto:
    double, single = onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type == double:
            value.type.tensor_type.elem_type = single
    for tensor in model.graph.initializer:
        if tensor.data_type == double:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for attribute in (a for node in model.graph.node for a in node.attribute if node.op_type == "Cast"):
        attribute.i = single if attribute.i == double else attribute.i
    return model
