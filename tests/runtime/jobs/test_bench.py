"""The command bench: models in turns, their memory and their weights."""

from __future__ import annotations

import io
import json
import sys

import numpy as np
import pytest
from rich.console import Console

from channelfold.runtime import jobs
from channelfold.runtime.engine import build as tensorrt
from channelfold.runtime.engine.run import EngineSession
from channelfold.runtime.errors import UsageError
from channelfold.runtime.io.files import save
from channelfold.runtime.jobs import bench_models
from channelfold.runtime.report import terminal
from channelfold.tests.graphs import build
from channelfold.tests.shipped import CALIBRATION, DIGITS, EVALUATION


def test_models_are_measured_side_by_side(run, tmp_path):
    out = tmp_path / "int8.onnx"
    jobs.quantize(DIGITS, out, source=jobs.Source(CALIBRATION))
    line = ("bench", DIGITS, out, "--data", EVALUATION, "--batch", "1", "--batch", "4", "--rounds", "3")
    code, shown, _ = run(*line, "--threads", "1", "--json")
    rows = json.loads(shown)["bench"]["rows"]
    assert (code, [(row["model"], row["batch"]) for row in rows]) == (
        0, [("digits_cnn.onnx", 1), ("int8.onnx", 1), ("digits_cnn.onnx", 4), ("int8.onnx", 4)]
    )  # fmt: skip
    assert all(0 < row["low"] <= row["ms"] <= row["high"] and row["runs"] == 3 for row in rows)
    assert (rows[0]["parameters"], list(rows[0]["weights"])) == (46_124, ["float32"])
    assert next(iter(rows[1]["weights"])) == "int8"
    code, shown, _ = run(*line)
    assert (code, "x faster" in shown or "x slower" in shown, "int8 4" in shown) == (0, True, True), shown


def test_memory_is_that_of_the_model(tmp_path):
    for size in (256, 2048):
        graph = build("(float[1,N] x) => (float[] y)", "y = MatMul(x, W)", kind="float", W=np.ones((size, size)))
        graph.inputs[0].shape = [1, size]
        save(graph, tmp_path / f"{size}.onnx")
    record = jobs.bench([tmp_path / "256.onnx"], rounds=1)
    large = jobs.bench([tmp_path / "2048.onnx"], rounds=1)
    (small,), (large,) = (one["bench"]["rows"] for one in (record, large))
    assert large["memory"] - small["memory"] > 8e6
    assert large["macs"] == 2048 * 2048


def test_a_batch_that_the_model_fixes_is_refused(tmp_path):
    graph = build("(float[1,4] x) => (float[] y)", "y = Relu(x)", kind="float")
    save(graph, tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="--batch 2: the model takes x"):
        jobs.bench([tmp_path / "m.onnx"], batches=[2])


def test_nodes_by_time_and_their_record(run, tmp_path):
    table = tmp_path / "times.json"
    code, shown, _ = run("bench", DIGITS, "--rounds", "6", "--threads", "1", "--nodes", "--record", table)
    kept = json.loads(table.read_text())
    nodes = kept["nodes"]["digits_cnn.onnx"]
    assert (code, kept["schema"]) == (0, 1)
    assert [node["name"] for node in nodes if node["op"] == "Gemm"] == ["/head/Gemm"]
    assert sum(node["op"] == "Conv" for node in nodes) == 6
    assert all(node["ms"] >= 0 for node in nodes)
    assert f"{sum(node['ms'] for node in nodes):.3f}" in next(line for line in shown.splitlines() if "  all " in line)


STAND_IN = """
import sys
import numpy as np
from channelfold.runtime.engine.run import serve
layers = "layers" in sys.argv
def infer(feed):
    return {"names": np.array(["a", "b"]), "ms": np.array([1.5, 0.5])} if layers else {"logits": np.zeros((1, 10))}
serve(infer, sys.stdin.buffer, sys.stdout.buffer)
"""


def test_engines_are_timed_where_there_is_a_gpu(run, tmp_path, monkeypatch):
    """With a stand-in for TensorRT. Without a GPU the reason is told; a plan of unknown form is no error."""
    engine = tmp_path / "digits.engine"
    engine.write_bytes(b"of an unknown form")
    monkeypatch.setattr(tensorrt, "local_gpu", lambda: (None, "there is no NVIDIA driver on this machine"))
    line = ("bench", DIGITS, "--engine", engine, "--rounds", "1")
    code, shown, _ = run(*line)
    assert (code, "engines were not all timed: there is no NVIDIA driver" in shown, "not readable" in shown) == (
        0, True, True)  # fmt: skip

    class Session(EngineSession):
        def __init__(self, engine, package, **options):
            super().__init__(engine, package, (sys.executable, "-c", STAND_IN), **options)

    monkeypatch.setattr(tensorrt, "local_gpu", lambda: (89, ""))
    monkeypatch.setattr(bench_models, "EngineSession", Session)
    code, shown, _ = run(*line, "--nodes", "--json")
    bench = json.loads(shown)["bench"]
    assert (code, [row["model"] for row in bench["rows"]]) == (0, ["digits_cnn.onnx", "digits.engine"])
    assert 0 < bench["rows"][1]["ms"] < 1000
    assert [(row["name"], row["ms"]) for row in bench["nodes"]["digits.engine"]] == [("a", 1.5), ("b", 0.5)]


@pytest.mark.rtx
def test_engines_side_by_side_without_a_gpu(tmp_path):
    """Three small engines are built, because no stand-in has a real plan."""
    pytest.importorskip("tensorrt_rtx")
    jobs.compress(DIGITS, tmp_path, source=jobs.Source(CALIBRATION), sms=[89])
    ready = tmp_path / "model.sm89.engine"
    record = jobs.bench([DIGITS, tmp_path / "model.onnx"], sm=89, engines=[ready], rounds=1)
    plain, int8, given = record["engines"]
    assert (plain["cost"]["macs"].keys(), given["sm"]) == ({"float"}, 89)
    assert int8["cost"]["macs"]["int8"] > 0.9 * plain["cost"]["macs"]["float"]
    assert (given["plan"]["int8"], given["plan"]["total"]) == (5, 5)  # of the model whose nodes the plan names
    assert given["cost"] == int8["cost"]
    assert int8["cost"]["kernels"] > plain["cost"]["kernels"] > 0 < int8["cost"]["quantizing"]
    assert [row["card"] for row in int8["cost"]["modelled"]] == ["L4", "RTX 4090"]
    assert all(0 < row["least"] < row["most"] for row in int8["cost"]["modelled"])
    assert sum(kernel["traffic"] for kernel in int8["kernels"]) == int8["cost"]["traffic"]
    shown = io.StringIO()
    terminal.render(record, Console(file=shown, width=160))
    first, second = (row["most"] for engine in (plain, int8) for row in engine["cost"]["modelled"][:1])
    assert f"{first / second:.2f}x" in shown.getvalue().split("Modelled, not measured")[1]


@pytest.mark.gpu
@pytest.mark.skipif(tensorrt.local_gpu()[0] is None, reason=tensorrt.local_gpu()[1])
def test_engines_on_the_gpu(tmp_path):
    engine = tmp_path / "digits.engine"
    jobs.build(DIGITS, engine, shapes=["image:1x1x8x8:1x1x8x8:1x1x8x8"])
    record = jobs.bench([DIGITS], engines=[engine], rounds=20, nodes=True, source=jobs.Source(evaluation=EVALUATION))
    bench = record["bench"]
    assert [row["model"] for row in bench["rows"]] == ["digits_cnn.onnx", "digits.engine"]
    layers = sum(row["ms"] for row in bench["nodes"]["digits.engine"])
    assert 0 < layers < 10 * bench["rows"][1]["ms"]
