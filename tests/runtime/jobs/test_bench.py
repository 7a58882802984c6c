"""The command bench: models in turns, their memory and their weights."""

from __future__ import annotations

import json

import numpy as np
import pytest

from channelfold.runtime import jobs
from channelfold.runtime.errors import UsageError
from channelfold.runtime.io.files import save
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
