"""An exact session computes what stands in the file."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest

from channelfold.runtime.io import session as sessions
from channelfold.runtime.io.files import session
from channelfold.runtime.io.session import Session
from channelfold.tests.graphs import build


@pytest.mark.parametrize("how", [{"exact": True}, {"fuse": False}])
def test_a_relu_in_front_of_an_fp8_quantizer_stays(how):
    graph = build(
        "(float[2,4] x) => (float[2,4] y)",
        "a = Relu(x) q = QuantizeLinear(a, s, z) y = DequantizeLinear(q, s, z)",
        kind="float", opset=19, s=np.float32(0.5), z=np.array(0, ml_dtypes.float8_e4m3fn),
    )  # fmt: skip
    x = np.array([[-3, -1, 0, 1], [2, 4, -8, 16]], np.float32)
    np.testing.assert_array_equal(session(graph, **how).run({"x": x})["y"], np.maximum(x, 0))


@pytest.mark.parametrize(
    ("options", "link", "mapped"), [({}, False, True), ({}, True, False), ({"timed": True}, False, False)]
)
def test_the_weights_of_a_large_file_are_mapped(options, link, mapped, monkeypatch, tmp_path):
    """Weights in the graph, in the attribute of a node and in a body; not through a link, and not to be timed."""
    ort, opened = sessions.onnxruntime(), []
    real = ort.InferenceSession

    def opening(source, *rest, **more):
        opened.append(source)
        return real(source, *rest, **more)

    monkeypatch.setattr(ort, "InferenceSession", opening)
    monkeypatch.setattr(sessions, "_LARGE", 1 << 12)
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17]>
        g (float[2,64] x, bool c) => (float[2,64] y) {
            a = MatMul(x, W)
            b = If(c) <then_branch = t () => (float[2,64] d) { d = MatMul(a, W) },
                       else_branch = e () => (float[2,64] f) { f = Neg(a) }>
            y = MatMul(b, K)
        }
    """)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "W"))
    value = onnx.numpy_helper.from_array(weight + 1)
    model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["K"], value=value))
    path, named = tmp_path / "model.onnx", tmp_path / "link" / "model.onnx" if link else tmp_path / "model.onnx"
    onnx.save(model, path)
    if link:
        named.parent.mkdir()
        named.symlink_to(path)
    x = np.random.default_rng(1).standard_normal((2, 64)).astype(np.float32)
    found = Session(named, **options).run({"x": x, "c": np.array(True)})["y"]
    np.testing.assert_allclose(found, x @ weight @ weight @ (weight + 1), rtol=1e-3, atol=1e-2)
    assert [isinstance(source, bytes) and len(source) < 1.5 * weight.nbytes for source in opened] == [mapped]
