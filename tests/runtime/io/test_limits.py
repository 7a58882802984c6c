"""Small files that ask for much memory or time are refused in one line that names the limit."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from channelfold.runtime import jobs
from channelfold.runtime.data.probes import random_data
from channelfold.runtime.errors import DataError, LimitError
from channelfold.runtime.io import limits
from channelfold.runtime.io.session import Session, TensorSpec

HEAD = '<ir_version: 9, opset_import: ["": 17]> g (float[N,8] x) => (float[N,8] y, float[] z)'
N = "n = Constant<value_ints=[2147483648]>()"
BOMBS = {
    "ConstantOfShape": f"{N} z = ConstantOfShape(n)",
    "Tile": f"{N} one = Constant<value_floats=[1.0]>() z = Tile(one, n)",
    "Expand": f"{N} one = Constant<value_floats=[1.0]>() z = Expand(one, n)",
    "Concat": "z0 = Constant<value_floats=[1.0]>() "
    + " ".join(f"z{i + 1} = Concat<axis=0>(z{i}, z{i})" for i in range(31))
    + " z = Identity(z31)",
}
ENDLESS = """
    <ir_version: 9, opset_import: ["": 17]> endless (float[1,4] x) => (float[1,4] y) {
        go = Constant<value=bool {1}>()
        y = Loop("", go, x)<body = step (int64 i, bool c, float[1,4] s) => (bool d, float[1,4] t) {
            d = Identity(c) t = Tanh(s)
        }>
    }"""


def _saved(model: onnx.ModelProto, path):
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("kind", BOMBS)
def test_a_constant_that_is_too_large(kind, tmp_path):
    model = _saved(parser.parse_model(f"{HEAD} {{ y = Relu(x) {BOMBS[kind]} }}"), tmp_path / "m.onnx")
    with pytest.raises(LimitError, match=r"takes [48]\.[36] GB; the limit for a model of 0\.0 MB is 3\.2 GB") as error:
        jobs.fold(model, tmp_path / "out.onnx")
    assert len(str(error.value)) < 500
    assert not (tmp_path / "out.onnx").exists()


def test_a_range_that_is_too_large(tmp_path):
    made = helper.make_graph(
        [helper.make_node("Range", ["start", "end", "step"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.INT64, None)],
        [numpy_helper.from_array(np.array(v), n) for n, v in {"start": 0, "end": 1 << 31, "step": 1}.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    with pytest.raises(LimitError, match=r"'y' takes 17\.2 GB"):
        jobs.inspect(_saved(model, tmp_path / "m.onnx"))


def test_an_input_that_is_too_large(tmp_path):
    text = '<ir_version: 9, opset_import: ["": 17]> g (float[2147483648] x) => (float[2147483648] y) { y = Relu(x) }'
    with pytest.raises(LimitError, match=r"'x' takes 8\.6 GB"):
        jobs.fold(_saved(parser.parse_model(text), tmp_path / "m.onnx"), tmp_path / "out.onnx")
    with pytest.raises(DataError, match=r"takes 8\.6 GB, 0\.3 at most"):
        random_data([TensorSpec("x", np.dtype(np.float32), ("N", 1 << 31))], 1)


def test_the_limits_can_be_lifted(monkeypatch):
    monkeypatch.setenv("CHANNELFOLD_LIMITS", "off")
    limits.check([("x", 1 << 60)], 0)


def test_a_larger_model_may_take_more():
    limits.check([("x", 9 << 30)], 1 << 30)
    with pytest.raises(LimitError):
        limits.check([("x", 9 << 30)], 1 << 20)


def test_a_loop_without_an_end(monkeypatch):
    monkeypatch.setattr(limits, "seconds", lambda size: 0.3)
    session = Session(parser.parse_model(ENDLESS).SerializeToString())
    with pytest.raises(LimitError, match=r"one sample may take 0\.3 s"):
        session.run({"x": np.ones((1, 4), np.float32)})


def test_a_run_that_takes_too_much_memory(monkeypatch):
    monkeypatch.setattr(limits, "nbytes", lambda size: -1)
    session = Session(parser.parse_model(ENDLESS).SerializeToString())
    with pytest.raises(LimitError, match="GB of memory"):
        session.run({"x": np.ones((1, 4), np.float32)})


def test_a_session_runs_on_after_it_was_stopped(monkeypatch):
    body = ENDLESS.replace('Loop("", go, x)', "Loop(count, go, x)").replace("x) =>", "x, int64 count) =>")
    session = Session(parser.parse_model(body).SerializeToString())
    feed = {"x": np.ones((1, 4), np.float32)}
    with monkeypatch.context() as patch:
        patch.setattr(limits, "seconds", lambda size: 0.3)
        with pytest.raises(LimitError):
            session.run(feed | {"count": np.array(1 << 40)})
    assert np.array_equal(session.run(feed | {"count": np.array(2)})["y"], np.tanh(np.tanh(feed["x"])))
