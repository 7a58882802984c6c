"""Where weight bytes are: by operator, by place, by type of storage."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from channelfold.passes.layers.account import FLOAT, MAIN, VECTOR, account, share
from channelfold.runtime.io.files import import_model
from channelfold.tests.graphs import build


def rows(graph, **reasons):
    return {(row.place, row.op, row.state): row for row in account(graph, reasons)}


def test_float_weights_by_operator():
    text = "h = MatMul(x, W) b = Add(h, c) t = Transpose(V) y = MatMul(b, t)"
    graph = build("(float[N,8] x) => (float[N,4] y)", text, kind="float", W=(8, 6), c=(6,), V=(4, 6))
    found = rows(graph)
    assert found[MAIN, "MatMul", FLOAT].bytes == 4 * (48 + 24)
    assert found[MAIN, "MatMul", FLOAT].tensors == 2
    assert found[MAIN, "MatMul", FLOAT].largest == "W"
    assert found[MAIN, "Add", FLOAT].reason == VECTOR
    assert share(account(graph)) == 0


def test_codes_count_as_the_floats_they_stand_for():
    graph = build(
        "(float[N,8] x) => (float[N,6] y)",
        "d = DequantizeLinear<axis=1>(Q, s, z) y = MatMul(x, d)",
        Q=np.ones((8, 6), np.int8), s=np.ones(6, np.float32), z=np.zeros(6, np.int8),
    )  # fmt: skip
    (row,) = account(graph)
    assert (row.op, row.state, row.bytes) == ("MatMul", "int8", 4 * 48)
    assert share([row]) == 1


def test_codes_of_four_bits_stand_two_to_a_byte():
    graph = build(
        "(float[N,32] x) => (float[N,8] y)",
        "y = com.microsoft.MatMulNBits<K=32, N=8, bits=4, block_size=32>(x, Q, s)",
        kind="float", domains='"com.microsoft" : 1', Q=np.zeros((8, 1, 16), np.uint8), s=np.ones(8, np.float32),
    )  # fmt: skip
    (codes,) = (row for row in account(graph) if row.state == "uint8")
    assert (codes.op, codes.bytes) == ("MatMulNBits", 4 * 32 * 8)


def test_a_constant_of_several_readers_is_counted_once_for_the_linear_one():
    text = "s = Shape(E) e = Gather(E, ids) t = Transpose(E) y = MatMul(e, t)"
    graph = build("(int64[N] ids) => (float[N,6] y, int64[2] s)", text, kind="float", E=np.ones((6, 8), np.float32))
    (row,) = account(graph)
    assert (row.op, row.bytes) == ("MatMul", 4 * 48)


def test_the_reason_of_a_node_is_that_of_its_weight():
    graph = build("(float[N,8] x) => (float[N,6] y)", "y = MatMul(x, W)", kind="float", W=(8, 6))
    (row,) = account(graph, {graph.nodes[0].name: "too few channels"})
    assert row.reason == "too few channels"


@pytest.mark.parametrize("where", ["then_branch", "else_branch"])
def test_bodies_are_places(where):
    value = numpy_helper.from_array(np.ones((4, 4), np.float32), "W")
    other = numpy_helper.from_array(np.ones((1, 1), np.float32), "one")
    info = [helper.make_tensor_value_info("r", TensorProto.FLOAT, ["n", 4])]

    def body(weight):
        node = helper.make_node("MatMul" if weight is value else "Mul", ["x", weight.name], ["r"], "n")
        return helper.make_graph([node], "body", [], info, [weight])

    branches = {name: body(value if name == where else other) for name in ("then_branch", "else_branch")}
    node = helper.make_node("If", ["c"], ["y"], name="choice", **branches)
    graph = helper.make_graph(
        [node],
        "g",
        [
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    found = account(import_model(model), {f"n in {where} of If choice": "too few channels", "n": "another node"})
    (row,) = (row for row in found if row.op == "MatMul")
    assert (row.place, row.state, row.reason) == (f"{where} of If choice", FLOAT, "too few channels")


def test_functions_and_defaults_are_named():
    value = numpy_helper.from_array(np.ones((4, 4), np.float32))
    function = helper.make_function(
        "own", "Block", ["x"], ["y"],
        [helper.make_node("Constant", [], ["w"], value=value), helper.make_node("MatMul", ["x", "w"], ["y"])],
        [helper.make_opsetid("", 17)],
    )  # fmt: skip
    x, y, d = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 4]) for n in ("x", "y", "d"))
    nodes = [helper.make_node("Block", ["x"], ["h"], domain="own"), helper.make_node("Add", ["h", "d"], ["y"])]
    default = numpy_helper.from_array(np.ones((3, 4), np.float32), "d")
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x, d], [y], [default]), opset_imports=opsets, functions=[function], ir_version=8
    )
    onnx.checker.check_model(model)
    found = account(import_model(model))
    assert {(row.place, row.op, row.reason, row.bytes) for row in found} == {
        ("function Block", "", "inside a local function", 64),
        (MAIN, "graph input", "may be overridden", 48),
    }
