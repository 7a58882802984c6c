"""Local functions inlined: by the graph they leave and by what it computes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from channelfold.passes.base import Context
from channelfold.passes.fold import InlineFunctions
from channelfold.runtime.io import edit, files
from channelfold.tests.graphs import listing

OPSETS = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
ATTRIBUTE = onnx.AttributeProto(name="transB", type=onnx.AttributeProto.INT, ref_attr_name="t")


def model(opset=18, inner=None):
    gemm = helper.make_node("Gemm", ["x", "w", "b"], ["g"])
    gemm.attribute.append(ATTRIBUTE)
    nodes = [gemm, *(inner or []), helper.make_node("Relu", ["g"], ["y"])]
    block = helper.make_function("own", "Block", ["x", "w", "b"], ["y"], nodes, [helper.make_opsetid("", opset)], ["t"])
    calls = [
        helper.make_node("Block", ["x", "W", "B"], ["h"], domain="own", t=1),
        helper.make_node("Block", ["h", "V", "C"], ["y"], domain="own", t=0),
    ]
    shapes = {"W": (6, 4), "B": (6,), "V": (6, 3), "C": (3,)}
    weights = {name: np.random.default_rng(len(name)).normal(size=shape) for name, shape in shapes.items()}
    graph = helper.make_graph(
        calls,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(values.astype(np.float32), name) for name, values in weights.items()],
    )
    return helper.make_model(graph, opset_imports=OPSETS, functions=[block], ir_version=8)


@pytest.mark.parametrize("opset", [18, 17])
def test_calls_become_nodes(opset):
    graph = files.import_model(model(opset))
    feed = {"x": np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)}
    before = files.session(graph).run(feed)["y"]
    outcome = InlineFunctions().apply(graph, Context())
    assert [change.what for change in outcome.changed] == ["Block: 2 calls replaced by the nodes of the function"]
    assert [node.op for node in graph.nodes] == ["Gemm", "Relu", "Gemm", "Relu"]
    assert "Gemm<transB=1>(x, W, B)" in listing(graph)
    assert np.array_equal(files.session(graph).run(feed)["y"], before)
    assert not InlineFunctions().apply(graph, Context()).changed


def test_a_function_of_another_opset_whose_operators_changed_is_refused():
    squeeze = [helper.make_node("ReduceSum", ["g"], ["s"], axes=[1]), helper.make_node("Identity", ["s"], ["r"])]
    graph = files.import_model(model(12, squeeze))
    outcome = InlineFunctions().apply(graph, Context())
    assert not outcome.changed
    assert [(r.node, r.code) for r in outcome.refused] == [("Block_0", "another opset")]
    assert [node.op for node in graph.nodes] == ["Block", "Block"]


def test_a_model_without_functions_stays_the_object_it_is():
    plain = model()
    del plain.functions[:], plain.graph.node[:]
    plain.graph.node.append(helper.make_node("Relu", ["x"], ["y"]))
    graph = files.import_model(plain)
    nodes = list(graph.nodes)
    assert not InlineFunctions().apply(graph, Context()).changed
    assert graph.nodes == nodes


def test_defaults_of_inputs_become_constants():
    made = model()
    made.graph.input.append(helper.make_tensor_value_info("V", TensorProto.FLOAT, [6, 3]))
    graph = files.import_model(made)
    feed = {"x": np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)}
    before = files.session(graph).run(feed)["y"]
    assert [tensor.name for tensor in graph.inputs] == ["x", "V"]
    assert edit.take_defaults(graph) == ["V"]
    assert [tensor.name for tensor in graph.inputs] == ["x"]
    assert edit.value(graph.nodes[1].inputs[1]).shape == (6, 3)
    assert np.array_equal(files.session(graph).run(feed)["y"], before)
    assert edit.take_defaults(graph) == []
