"""Files that are read: what is refused, what a load keeps, and sessions on what was loaded."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from channelfold.runtime.errors import ModelError, VerificationError
from channelfold.runtime.io.files import (
    check,
    constant,
    import_model,
    infer_shapes,
    load,
    read,
    save,
    session,
    weightless,
)
from channelfold.runtime.io.session import Session
from channelfold.runtime.io.weights import MappedValues
from channelfold.tests.runtime.io.model_files import files_beside, model_of, weights_in

# ---- reading -----------------------------------------------------------------------------------------------------


def test_load_and_save(path, canonical):
    model = model_of()
    path.write_bytes(model.SerializeToString())
    for external in (False, True, None):
        loaded = load(path)
        assert all(isinstance(t._values, MappedValues) for t in loaded.nodes[0].inputs[1:])
        save(loaded, path, external=external)
        onnx.checker.check_model(path, full_check=True)
        assert canonical(onnx.load(path)) == canonical(model)
        assert files_beside(path) == (["model.onnx", "model.onnx.data"] if external else ["model.onnx"])
        x = np.arange(300, dtype=np.float32)
        for run in (Session(path), session(load(path))):
            assert np.array_equal(run.run({"x": x})["y"], x + 3)


def test_relative_paths(path, monkeypatch):
    path.write_bytes(model_of().SerializeToString())
    monkeypatch.chdir(path.parent)
    loaded = load("model.onnx")
    monkeypatch.chdir("/")
    assert np.array_equal(session(loaded).run({"x": np.zeros(300, np.float32)})["y"], np.full(300, 3))
    monkeypatch.chdir(path.parent)
    save(loaded, "other.onnx", external=True)
    assert weights_in(path.with_name("other.onnx")) == {1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty. Export the model again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "is a Git LFS pointer.* git lfs pull"),
        (b"PK\x03\x04" + bytes(99), "is truncated or not an ONNX file"),
        (b"not a model", "is truncated or not an ONNX file"),
        (b"\x08\x08", "has no graph or no opset: it is not an ONNX model"),
        (model_of().SerializeToString()[:-1], "is truncated or not an ONNX file"),
        (model_of(size=10).SerializeToString()[:-1], "is truncated or not an ONNX file"),
    ],
)
def test_files_that_are_no_models(path, content, message):
    path.write_bytes(content)
    with pytest.raises(ModelError, match=rf"^{re.escape(str(path))} {message}"):
        load(path)


def test_paths_that_are_no_files(path):
    os.mkfifo(path.with_name("pipe"))
    for name, message in [
        ("", "is not a file. Give the path of an .onnx file"),
        ("pipe", "is not a file"),  # opening it would wait for ever
        ("missing.onnx", "does not exist. Check the path"),
        ("missing/m.onnx", "does not exist"),
        ("x" * 300, "cannot be read .File name too long"),
    ]:
        with pytest.raises(ModelError, match=message):
            load(path.parent / name)
    with pytest.raises(ModelError, match="is not a file"):
        load("/dev/zero")


def _field(number: int, content: bytes) -> bytes:
    length, size = len(content), b""
    while length >= 0x80:
        size, length = size + bytes([length & 0x7F | 0x80]), length >> 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + content


def _nested(levels: int) -> bytes:
    graph = onnx.GraphProto(name="g").SerializeToString()
    for _ in range(levels):
        branch = onnx.AttributeProto(name="then_branch", type=onnx.AttributeProto.GRAPH).SerializeToString()
        node = onnx.NodeProto(op_type="If").SerializeToString() + _field(5, branch + _field(6, graph))
        graph = onnx.GraphProto(name="g").SerializeToString() + _field(1, node)
    return helper.make_model(onnx.GraphProto()).SerializeToString() + _field(7, graph)


@pytest.mark.parametrize("levels", [34, 400, 5000])
def test_subgraphs_nested_too_deep(path, levels):
    """Protobuf reads 100 messages inside each other, which is 33 subgraphs; Python would end at about 300."""
    path.write_bytes(_nested(levels))
    with pytest.raises(ModelError, match="is truncated or not an ONNX file"):
        load(path)


def test_subgraphs_nested_as_deep_as_can_be(path):
    path.write_bytes(_nested(32))
    loaded = load(path)
    save(loaded, path)
    assert load(path).nodes[0].op == "If"


def _small_model() -> bytes:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17, "local" : 1]> g (bool c, float[N,2] x) => (float[N,2] y)
        <float[2] w = {1, 2}> {
            k = Constant<value = float {2}>()
            z = If (c) <then_branch = t () => (float[N,2] a) <float[1] v = {3}> { a = Mul(x, v) },
                        else_branch = e () => (float[N,2] b) { b = local.f<alpha = 0.5>(x) }>
            y = Add(z, w)
        }
        <opset_import: ["" : 17], domain: "local"> f <alpha> (p) => (q) { q = LeakyRelu<alpha : float = @alpha>(p) }"""
    )
    large = numpy_helper.from_array(np.ones(300, np.float32), "large")
    model.graph.initializer.append(large)
    model.graph.node.append(helper.make_node("Neg", ["large"], ["n"], "neg"))
    model.graph.sparse_initializer.append(
        helper.make_sparse_tensor(
            numpy_helper.from_array(np.ones(1, np.float32), "sparse"), numpy_helper.from_array(np.array([1])), [2]
        )
    )
    model.graph.node.append(helper.make_node("Abs", ["sparse"], ["s"]))
    model.graph.metadata_props.add(key="k", value="v")
    return model.SerializeToString()


def _load_and_use(path: Path) -> None:
    """Either ModelError, or a graph that works as far as this package goes."""
    try:
        loaded = load(path)
        for tensor in loaded.tensors().values():
            if isinstance(tensor, gs.Constant):
                read(tensor)
    except ModelError as error:
        assert str(path) in str(error) or "tensor" in str(error)  # noqa: PT017
        return
    infer_shapes(loaded)
    save(loaded, path)
    load(path)


fuzz = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzz
@given(content=st.binary(max_size=200))
@example(content=b"\x3a\x00\x42\x00")
def test_any_bytes(path, content):
    path.write_bytes(content)
    _load_and_use(path)


@settings(fuzz, max_examples=400)
@given(data=st.data())
def test_any_change_to_a_model(path, data):
    content = bytearray(_small_model())
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    path.write_bytes(content)
    _load_and_use(path)


def test_a_model_cut_anywhere(path):
    content = _small_model()
    for end in range(len(content)):
        if end < 300 or end % 7 == 0 or end > len(content) - 300:
            path.write_bytes(content[:end])
            _load_and_use(path)


# ---- checking, inference, sessions --------------------------------------------------------------------------------


def test_check(graph):
    check(graph)
    graph.nodes[0].inputs[0] = gs.Variable("nothing")
    with pytest.raises(VerificationError, match=r"The graph is no longer valid ONNX: .*nothing"):
        check(graph)


def test_weightless(graph):
    model = weightless(graph)
    assert [value.name for value in model.graph.input] == ["x", "w0", "w1", "w2"]
    assert not model.graph.initializer


def test_infer_shapes():
    graph = import_model(
        onnx.parser.parse_model(
            """<ir_version: 8, opset_import: ["" : 17]> g (float[N,4,6] x, int64[2] s) => (y, float[A,B] z) {
                a = Transpose<perm = [0, 2, 1]>(x)  b = Cast<to = 11>(a)  c = Abs(s)  d = Reshape(x, c)
                y = NonZero(d)  z = ReduceSum(x) }"""
        )
    )
    infer_shapes(graph)
    tensors = graph.tensors()
    assert (tensors["a"].shape, tensors["a"].dtype) == (["N", 6, 4], np.float32)
    assert (tensors["b"].shape, tensors["b"].dtype) == (["N", 6, 4], np.float64)
    assert tensors["d"].shape == [None, None]  # no names for sizes that inference invents
    assert (tensors["y"].shape, tensors["y"].dtype) == ([2, None], np.int64)
    assert tensors["z"].shape == ["A", "B"]  # as declared


def test_sessions_on_inner_tensors(graph):
    graph.nodes[0].outputs[0].name = "sum"
    run = session(graph, ["sum", "x", "w1"], threads=1).run({"x": np.zeros(300, np.float32)})
    assert list(run) == ["sum", "x", "w1"]
    assert [values[0] for values in run.values()] == [3, 0, 1]
    with pytest.raises(ModelError, match="ONNX Runtime cannot open"):
        session(graph, ["nothing"])


def test_sessions_take_every_type(tmp_path):
    """Weights in memory, in a scratch file and in the model file; also such that numpy has no word for."""
    text = """<ir_version: 10, opset_import: ["" : 21]>
        g (float[1] x) => (float[3000] y, float[3000] z, float[3000] v) {
        y = DequantizeLinear(q, s)  h = Cast<to = 1>(b)  z = Add(h, x)  v = Mul(w, x) }"""
    model = onnx.parser.parse_model(text)
    numbers = np.arange(3000) % 7 - 3
    for name, kind in (("q", "INT4"), ("b", "BFLOAT16"), ("w", "FLOAT")):
        dtype = helper.tensor_dtype_to_np_dtype(onnx.TensorProto.DataType.Value(kind))
        model.graph.initializer.append(numpy_helper.from_array(numbers.astype(dtype), name))
    model.graph.initializer.append(numpy_helper.from_array(np.array(2, np.float32), "s"))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    for made in (import_model(model), load(tmp_path / "m.onnx")):
        out = session(made).run({"x": np.ones(1, np.float32)})
        assert np.array_equal(out["y"], numbers * 2)
        assert np.array_equal(out["z"], numbers + 1)
        assert np.array_equal(out["v"], numbers)
        made.nodes[-1].inputs[0] = constant(made, "w", np.full(3000, 5, np.float32))
        assert np.array_equal(session(made).run({"x": np.ones(1, np.float32)})["v"], np.full(3000, 5))
