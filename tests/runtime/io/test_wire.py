"""ONNX files as bytes: what is taken out of the message, what is put back, and what broken bytes do."""

from __future__ import annotations

import contextlib
import io

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from channelfold.runtime.io.wire import INLINE_LIMIT, WireError, skeleton, write_array, write_inline


def _tensor(name: str, count: int = 300) -> TensorProto:
    return numpy_helper.from_array(np.arange(count, dtype=np.float32), name)


def _model() -> onnx.ModelProto:
    """Large tensors in every place that ``skeleton`` looks at, and small ones beside them."""
    packed = helper.make_tensor("packed", TensorProto.FLOAT, [300], np.arange(300.0))
    doubles = helper.make_tensor("doubles", TensorProto.DOUBLE, [200], np.arange(200.0))
    inner = helper.make_graph(
        [helper.make_node("Constant", [], ["k"], value=_tensor("")), helper.make_node("Add", ["k", "v"], ["y"])],
        "inner", [], [onnx.ValueInfoProto(name="y")], [_tensor("v")],
    )  # fmt: skip
    nodes = [
        helper.make_node("Constant", [], ["c"], value=_tensor("")),
        helper.make_node("If", ["b"], ["y"], then_branch=inner, else_branch=inner),
    ]
    graph = helper.make_graph(nodes, "g", [], [], [_tensor("w"), packed, doubles, _tensor("small", 5)])
    graph.doc_string = "long " * 500
    return helper.make_model(graph, producer_name="p" * 2000)


def _large(message) -> list[TensorProto]:
    if isinstance(message, TensorProto):
        return [message] if message.ByteSize() >= 200 or message.data_location else []
    fields = [(d, v) for d, v in message.ListFields() if d.message_type is not None]
    return [t for d, v in fields for item in (v if d.is_repeated else [v]) for t in _large(item)]


def test_skeleton_refers_to_every_large_tensor():
    model = _model()
    data = model.SerializeToString()
    out = onnx.ModelProto.FromString(skeleton(data, "model.onnx"))
    assert len(skeleton(data, "model.onnx")) < 8000 < len(data)
    tensors = _large(out)
    assert len(tensors) == 8  # four initializers less the small one, a Constant, and two in each of two subgraphs
    for tensor in tensors:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        assert entries.pop("location") == "model.onnx"
        start, length = int(entries["offset"]), int(entries["length"])
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        tensor.raw_data = data[start : start + length]
    for tensor in _large(model):  # what the file stores as float_data now is raw_data
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
    assert out == model


@pytest.mark.parametrize("location", [TensorProto.DEFAULT, TensorProto.EXTERNAL])
def test_the_reference_wins_over_what_a_tensor_says_of_its_place(location):
    tensor = _tensor("w")
    tensor.data_location = location  # DEFAULT is what onnx.load leaves behind raw_data that it has read from a file
    data = helper.make_model(helper.make_graph([], "g", [], [], [tensor])).SerializeToString()
    (found,) = onnx.ModelProto.FromString(skeleton(data, "here")).graph.initializer
    assert found.data_location == TensorProto.EXTERNAL
    assert {entry.key: entry.value for entry in found.external_data}["length"] == "1200"


def test_skeleton_of_a_small_model_is_the_model():
    data = helper.make_model(
        helper.make_graph([], "g", [], [], [_tensor("w", INLINE_LIMIT // 4 - 1)])
    ).SerializeToString()
    assert skeleton(data, "x") == data


def test_write_inline_is_the_inverse():
    model = _model()
    weights = [(TensorProto(name=f"n{i}", data_type=1, dims=[i, 70]), np.ones((i, 70), np.float32)) for i in range(9)]
    file = io.BytesIO()
    write_inline(model, iter(weights), file)
    out = onnx.ModelProto.FromString(file.getvalue())
    read = {t.name: numpy_helper.to_array(t) for t in out.graph.initializer}
    for proto, values in weights:
        assert np.array_equal(read[proto.name], values)
    del out.graph.initializer[-9:]
    assert out == model


@pytest.mark.parametrize(
    "values",
    [
        np.array(1.5),
        np.zeros((0, 3), np.float32),
        np.arange(12).reshape(3, 4).T,
        np.arange(40, dtype=np.uint8)[::3],
        np.ones(9, ml_dtypes.bfloat16),
    ],
    ids=["scalar", "empty", "transposed", "strided", "bfloat16"],
)
def test_write_array(values):
    file = io.BytesIO()
    write_array(values, file, chunk=7)
    assert file.getvalue() == values.tobytes()


def test_truncated_files_are_refused_unless_protobuf_takes_them():
    data = _model().SerializeToString()
    for cut in [*range(0, 2200), *range(2200, len(data), 61)]:
        try:
            onnx.ModelProto.FromString(data[:cut])
        except Exception:
            with pytest.raises(WireError):
                skeleton(data[:cut], "x")
        else:
            onnx.ModelProto.FromString(skeleton(data[:cut], "x"))


def test_depth_bomb():
    data = (
        b"\x52" + _varint(2000) + b"x" * 2000
    )  # a documentation, so that every level is long enough to be looked into
    for _ in range(2000):
        for key in (b"\x32", b"\x2a", b"\x0a"):  # attribute.g, node.attribute, graph.node
            data = key + _varint(len(data)) + data
    data = b"\x3a" + _varint(len(data)) + data
    with pytest.raises(WireError, match="nested more than 100 deep"):
        skeleton(data, "x")


def _varint(value: int) -> bytes:
    out = b""
    while value >= 0x80:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


@given(st.binary(max_size=64))
@example(b"\xff" * 11)  # an integer that does not end
@example(b"\x00\x00")  # field number 0
@example(b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f")  # 2**63 bytes
@example(b"\x0b\x0c")  # groups
def test_any_bytes(data):
    with contextlib.suppress(WireError):
        skeleton(data, "x")


@settings(max_examples=200)
@given(st.data())
def test_mutated_models_never_fail_otherwise(data):
    content = bytearray(_model().SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    with contextlib.suppress(WireError):
        skeleton(bytes(content), "x")
