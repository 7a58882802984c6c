"""What exporters and editors leave in files: every command copes with it, or says what it is."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from channelfold.runtime import jobs
from channelfold.runtime.errors import ModelError, UsageError
from channelfold.runtime.io.session import Session
from channelfold.tests.graphs import random


def written(path: Path, text: str, imports: str = '"" : 17', **constants: np.ndarray | tuple[int, ...]) -> Path:
    """An ONNX file from text; a shape stands for random float32 numbers, a fourth of their size."""
    model = onnx.parser.parse_model(f"<ir_version: 8, opset_import: [{imports}]> {text}")
    for name, values in constants.items():
        array = (random(values, name) / 4).astype(np.float32) if isinstance(values, tuple) else values
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.save(model, path)
    return path


@pytest.fixture
def samples(tmp_path) -> Path:
    np.savez(tmp_path / "x.npz", x=random((16, 32), "x").astype(np.float32))
    return tmp_path / "x.npz"


TWO = "m (float[N,32] x) => (float[N,32] y) { a = MatMul(x, W)  r = Relu(a)  y = MatMul(r, V) }"


@pytest.mark.parametrize("type_", ["none", "no shape"])
def test_outputs_without_a_type_or_a_shape(type_, samples, tmp_path):
    path = written(tmp_path / "m.onnx", TWO, W=(32, 64), V=(64, 32))
    model = onnx.load(path)
    (output,) = model.graph.output
    output.ClearField("type") if type_ == "none" else output.type.tensor_type.ClearField("shape")
    onnx.save(model, path)
    out = tmp_path / "out.onnx"
    for run in (
        lambda: jobs.fold(path, out),
        lambda: jobs.quantize(path, out, source=jobs.Source(samples)),
        lambda: jobs.smooth(path, out, source=jobs.Source(samples)),
        lambda: jobs.sparsify(path, out),
        lambda: jobs.prune(path, out, source=jobs.Source(samples), options={"ratio": 0.3}),
    ):
        run()
        assert Session(out).outputs[0].name == "y"


def test_a_batch_that_was_opened_by_hand(tmp_path):
    text = """m (float[batch,4] x) => (float[batch,8] y) <float[1,4] r> {
        r = Relu(x)  s = Shape(r)  n = Gather(s, zero)  u = Unsqueeze(n, axes)  c = Concat<axis=0>(u, minus)
        f = Reshape(r, c)  y = MatMul(f, W) }"""
    numbers = {"zero": np.array(0), "axes": np.array([0]), "minus": np.array([-1])}
    path = written(tmp_path / "m.onnx", text, W=(4, 8), **numbers)
    record = jobs.fold(path, tmp_path / "f.onnx")
    assert any("value_info" in text and "'r'" in text for text in record["warnings"])
    for batch in (1, 3):
        feed = {"x": random((batch, 4), "x").astype(np.float32)}
        before = Session(path, optimize=False).run(feed)["y"]  # optimized, the stale size makes it fail at batch 3
        after = Session(tmp_path / "f.onnx").run(feed)["y"]
        np.testing.assert_allclose(after, before, rtol=1e-5)


def test_sequences_and_maps(samples, tmp_path):
    text = """m (float[N,32] x) => (seq(map(int64, float)) maps, float[N,32] y) {
        a = MatMul(x, W)  r = Relu(a)  s = SplitToSequence<axis=1>(r)  c = ConcatFromSequence<axis=1>(s)
        y = MatMul(c, V)  p = Softmax(y)  maps = ai.onnx.ml.ZipMap<classlabels_int64s=[LABELS]>(p) }"""
    text = text.replace("LABELS", ",".join(map(str, range(32))))
    path = written(tmp_path / "m.onnx", text, '"" : 17, "ai.onnx.ml" : 3', W=(32, 64), V=(64, 32))
    out = tmp_path / "out.onnx"
    for run in (
        lambda: jobs.prune(path, out, source=jobs.Source(samples), options={"ratio": 0.3}),
        lambda: jobs.smooth(path, out, source=jobs.Source(samples)),
        lambda: jobs.reparam(path, out, source=jobs.Source(samples), approximate=True, options={"keep_hidden": 0.5}),
        lambda: jobs.diff(path, out, source=jobs.Source(evaluation=samples)),
    ):
        run()
        assert [spec.name for spec in Session(out).outputs] == ["maps", "y"]


needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the extra rtx")


@needs_rtx
def test_an_input_that_holds_sizes(tmp_path):
    text = """m (float[N,4,8,8] x, int64[2] size) => (float[N,4,H,W] y) {
        c = Conv<pads=[1,1,1,1]>(x, K)  s = Shape(c)  nc = Slice(s, zero, two)  sizes = Concat<axis=0>(nc, size)
        y = Resize<mode="linear">(c, , , sizes) }"""
    path = written(tmp_path / "m.onnx", text, K=(4, 4, 3, 3), zero=np.array([0]), two=np.array([2]))
    x = random((1, 4, 8, 8), "x").astype(np.float32)
    feeds = [{"x": x, "size": np.array(size)} for size in ([12, 12], [20, 16])]
    assert jobs.build(path, tmp_path / "e.engine", sm=89, source=jobs.Source(feeds))["engines"]
    with pytest.raises(UsageError, match="'size', which holds sizes, the values"):
        jobs.build(path, tmp_path / "e.engine", sm=89, shapes=["x:1x4x8x8:1x4x8x8:2x4x8x8"])


@needs_rtx
def test_open_sizes_that_share_a_name_and_nothing_else(tmp_path):
    text = "m (float[1,3,q,q] x) => (float[1,3,a,b] y) { y = Relu(x) }"
    path = written(tmp_path / "m.onnx", text)
    assert jobs.build(path, tmp_path / "e.engine", sm=89, shapes=["x:1x3x48x48:1x3x48x192:1x3x48x320"])["engines"]


PLUGIN = """m (float[1,16,8,8] x) => (float[1,10] scores, int32[1] number, float[1,16,8,8] y) {
    c = Conv<pads=[1,1,1,1]>(x, W)  r = Relu(c)  y = Conv(r, V)  t = Reshape(y, shape)
    number, scores = PLUGIN(t, r) }"""


@pytest.mark.parametrize("plugin", ["EfficientNMS_TRT", "vendor.Decode"])
def test_what_stands_in_front_of_a_plugin_is_quantized_and_compared(plugin, tmp_path):
    constants = {"W": (32, 16, 3, 3), "V": (16, 32, 1, 1), "shape": np.array([1, 16, 64])}
    imports = '"" : 17, "vendor" : 1'
    path = written(tmp_path / "m.onnx", PLUGIN.replace("PLUGIN", plugin), imports, **constants)
    data = {"x": random((8, 16, 8, 8), "x").astype(np.float32)}
    record = jobs.quantize(path, tmp_path / "q.onnx", source=jobs.Source(data))
    assert record["steps"][-1]["facts"]["quantized"] == 2
    op = plugin.split(".")[-1]
    assert any(f"does not know {op}" in text for text in record["warnings"])
    compared = {output["name"]: output["snr"] for output in record["accuracy"]["outputs"]}
    assert compared.keys() == {"y", f"{op} 0 input 0", f"{op} 0 input 1"}
    assert all(20 < snr < 70 for snr in compared.values())
    assert onnx.load(tmp_path / "q.onnx").graph.node[-1].op_type == op
    jobs.prune(path, tmp_path / "p.onnx", source=jobs.Source(data), options={"ratio": 0.3})


def test_a_model_that_onnxruntime_refuses_is_refused_before_the_work(samples, tmp_path):
    path = written(tmp_path / "m.onnx", TWO.replace("Relu(a)", "Conv(a, W)"), W=(32, 64), V=(64, 32))
    seen = []
    with pytest.raises(ModelError):
        jobs.quantize(
            path, tmp_path / "q.onnx", source=jobs.Source(samples), progress=lambda stage, *_: seen.append(stage)
        )
    assert set(seen) == {"load"}
    assert not (tmp_path / "q.onnx").exists()
