"""What no runtime forgives is refused when a file is read, in one sentence that names the node."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import helper, numpy_helper

from channelfold.runtime.errors import ModelError
from channelfold.runtime.io import files
from channelfold.runtime.io.files import load
from channelfold.runtime.io.names import reads
from channelfold.tests.graphs import random


def model() -> onnx.ModelProto:
    text = """<ir_version: 8, opset_import: ["" : 17]> m (float[N,4,8,8] x, bool c) => (float[N,4,8,8] y) {
        [conv] a = Conv(x, W)
        [relu] b = Relu(a)
        [add] d = Add(b, a)
        [if] y = If (c) <then_branch = p () => (float[N,4,8,8] k) { [neg] k = Neg(d) },
                         else_branch = q () => (float[N,4,8,8] l) { [abs] l = Abs(d) }> }"""
    made = onnx.parser.parse_model(text)
    made.graph.initializer.append(numpy_helper.from_array(random((4, 4, 1, 1), "W").astype("f4"), "W"))
    return made


def _attribute(made: onnx.ModelProto, node: int, **attributes) -> None:
    made.graph.node[node].attribute.extend(helper.make_attribute(name, v) for name, v in attributes.items())


def _branch(made: onnx.ModelProto) -> onnx.NodeProto:
    return made.graph.node[3].attribute[0].g.node[0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.opset_import[0].__setattr__("version", 0), "its opset is 0"),
        (lambda m: m.graph.node[0].ClearField("input"), "Conv 'conv' has 0 inputs, and Conv takes at least 2"),
        (lambda m: m.graph.node[1].input.append("a"), "Relu 'relu' has 2 inputs, and Relu takes 1"),
        (lambda m: m.graph.node[1].ClearField("output"), "Relu 'relu' has 0 outputs"),
        (lambda m: m.graph.node[2].output.append("e"), "Add 'add' has 2 outputs"),
        (lambda m: m.graph.node[1].output.__setitem__(0, "a"), "'relu' writes 'a', which is written before"),
        (lambda m: m.graph.node[1].output.__setitem__(0, "W"), "'relu' writes 'W', which is written before"),
        (lambda m: m.graph.node[0].input.__setitem__(0, "d"), "depends on its own output"),
        (lambda m: m.graph.initializer.append(m.graph.initializer[0]), "two initializers 'W'"),
        (lambda m: m.graph.input.append(m.graph.input[0]), "the input 'x' twice"),
        (lambda m: [_attribute(m, 0, group=1) for _ in range(2)], "the attribute 'group' twice"),
        (lambda m: _attribute(m, 0, axis=1), "'axis', which Conv has not in opset 17"),
        (lambda m: _attribute(m, 0, group=1.5), "'group' is of type FLOAT"),
        (lambda m: m.graph.node[3].attribute.pop(), "lacks the attribute"),
        (lambda m: _branch(m).ClearField("input"), "Neg 'neg' has 0 inputs"),
    ],
)
def test_faults(change, says, tmp_path):
    made = model()
    change(made)
    (tmp_path / "m.onnx").write_bytes(made.SerializeToString())
    with pytest.raises(ModelError, match="not a valid model") as error:
        load(tmp_path / "m.onnx", strict=True)
    assert says in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_what_runs_is_not_refused(tmp_path):
    made = model()
    made.graph.node[0].input.append("")  # optional inputs that are left out
    nodes = list(reversed(made.graph.node))  # not sorted
    made.graph.ClearField("node")
    made.graph.node.extend(nodes)
    made.graph.node.add(op_type="Vendor", input=["x"], output=["v"], name="v")
    (tmp_path / "m.onnx").write_bytes(made.SerializeToString())
    assert len(load(tmp_path / "m.onnx", strict=True).nodes) == 5


def test_branches_may_name_their_outputs_as_those_of_the_if():
    text = """<ir_version: 10, opset_import: ["" : 17]>
    g (float[n] x, bool c) => (float[n] y) {
        h = Relu(x)
        y = If(c) <
            then_branch = a () => (float[n] y) { z = Neg(x) y = Exp(z) },
            else_branch = b () => (float[n] y) { y = Abs(h) }
        >
    }"""
    model = onnx.parser.parse_model(text)
    (choice,) = (node for node in model.graph.node if node.op_type == "If")
    assert list(reads(choice)) == ["c", "x", "h"]
    graph = files.import_model(model)
    x = np.array([-1, 2], np.float32)
    for condition, expected in ((True, np.exp(-x)), (False, [0, 2])):
        found = files.session(graph, optimize=False).run({"x": x, "c": np.array(condition)})
        np.testing.assert_allclose(found["y"], expected, rtol=1e-6)


def test_nodes_are_put_in_order():
    """ONNX Runtime sorts the nodes of a file, those that only a branch reads too, and so does reading it."""
    text = """<ir_version: 10, opset_import: ["" : 17]>
    g (float[n] x, bool c) => (float[n] y) {
        y = If(c) <
            then_branch = a () => (float[n] t) { t = Neg(h) },
            else_branch = b () => (float[n] e) { e = Abs(h) }
        >
        h = Sub(k, x)
        k = Exp(x)
    }"""
    model = onnx.parser.parse_model(text)
    graph = files.import_model(model)
    assert [node.op for node in graph.nodes] == ["Exp", "Sub", "If"]
    (read,) = graph.nodes[-1].attrs["then_branch"].nodes[0].inputs
    assert read is graph.nodes[1].outputs[0]
    feed = {"x": np.array([1, -2], np.float32), "c": np.array(True)}
    found = files.session(graph, optimize=False).run(feed)
    np.testing.assert_allclose(found["y"], feed["x"] - np.exp(feed["x"]), rtol=1e-6)


@pytest.mark.parametrize(
    ("equation", "fine"),
    [
        ("ij,jk->ik", True),
        ("ij, jk -> ik", True),
        ("...ij,...jk", True),
        ("ii->i", True),
        ("i,->i", True),
        ("." * 30_000, False),  # shape inference does not end
        ("ij,j.k->ik", False),
        ("ij,jk->ik->i", False),
        ("ij,j1", False),
        (",".join("a" * 2000), False),
    ],
)
def test_the_equation_of_an_einsum(equation, fine, tmp_path):
    made = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]> m (float[2,2] x) => (float y) {
        y = Einsum<equation = "ij,jk">(x, x) }""")
    made.graph.node[0].attribute[0].s = equation.encode()
    (tmp_path / "m.onnx").write_bytes(made.SerializeToString())
    if fine:
        assert load(tmp_path / "m.onnx", strict=True).nodes
        return
    with pytest.raises(ModelError, match="has the equation") as error:
        load(tmp_path / "m.onnx", strict=True)
    assert len(str(error.value)) < 400
