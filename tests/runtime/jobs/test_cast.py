"""The command cast, its proof, and engines of what it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from channelfold.passes.recipe import load_recipe
from channelfold.runtime import jobs
from channelfold.runtime.io.files import save
from channelfold.tests.graphs import build, random

ATTENTION = """
    q = MatMul(x, Q) k = MatMul(x, K) v = MatMul(x, V)
    t = Transpose<perm=[0,2,1]>(k)
    s = MatMul(q, t) a = Softmax<axis=-1>(s) m = MatMul(a, v)
    o = MatMul(m, O) r = Add(o, x) n = LayerNormalization(r, g) y = MatMul(n, F)
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    weights: dict[str, Any] = {name: random((64, 64), name) / 8 for name in "QKVOF"}
    graph = build("(float[2,16,64] x) => (float[2,16,64] y)", ATTENTION, kind="float", g=64, **weights)
    save(graph, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.fixture
def data() -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(0).standard_normal((4, 2, 16, 64)).astype(np.float32).reshape(8, 16, 64)}


@pytest.mark.parametrize("io_type", ["same", "cast"])
@pytest.mark.parametrize(("kind", "limit"), [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_the_file_is_half_as_large_and_proven(model, data, tmp_path, kind, limit, io_type):
    out = tmp_path / "half.onnx"
    record = jobs.cast(model, out, source=jobs.Source(data, data), options={"type": kind, "io_type": io_type})
    assert record["output"]["bytes"] < 0.6 * record["model"]["bytes"]
    (accuracy,) = record["accuracy"]["outputs"]
    assert 0 < accuracy["relative_l2"] < limit
    types = {value.type.tensor_type.elem_type for value in onnx.load(out).graph.input}
    assert types == {onnx.TensorProto.FLOAT if io_type == "same" else onnx.TensorProto.DataType.Value(kind.upper())}
    twin = [text for text in record["warnings"] if "no bfloat16 kernels" in text]
    assert len(twin) == (kind == "bfloat16")


@pytest.mark.rtx
@pytest.mark.parametrize(("recipe", "sm", "runs"), [("fp16", 75, "fp16"), ("bf16", 80, "bf16"), ("int8-fp16", 86, "")])
def test_no_product_is_left_in_float32(model, data, tmp_path, recipe, sm, runs):
    pytest.importorskip("tensorrt_rtx")
    from channelfold.runtime.engine.plan import contractions, read_plan
    from channelfold.runtime.io.files import load

    assert load_recipe(recipe).passes[-1].name == "cast"
    jobs.compress(model, tmp_path / "out", recipe, source=jobs.Source(data, data), sms=[sm])
    nodes = contractions(load(tmp_path / "out" / "model.onnx"))
    plan = read_plan(tmp_path / "out" / f"model.sm{sm}.engine", nodes)
    assert plan.readable, plan.reason
    found = {run.arithmetic for run in plan.nodes.values()}
    assert found == ({runs} if runs else {"int8", "fp16"})
