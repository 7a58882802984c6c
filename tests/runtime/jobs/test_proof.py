"""The proof measures the file: what this machine's arithmetic adds to its errors is told apart."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import numpy as np
import pytest

from channelfold import models
from channelfold.runtime import jobs
from channelfold.runtime.errors import GateError
from channelfold.runtime.io import files
from channelfold.runtime.io import session as sessions
from channelfold.runtime.io.session import Session
from channelfold.runtime.jobs import job
from channelfold.runtime.stats import bench
from channelfold.runtime.stats.compare import Gates
from channelfold.tests.graphs import build, random

DIGITS = models.path("digits_cnn.onnx")
CALIBRATION = models.path("digits_calibration.npz")
EVALUATION = models.path("digits_evaluation.npz")


class Saturating(Session):
    """A session on a processor that saturates: unless it is told to be exact, outputs are cut off at 3."""

    def __init__(self, *args, exact: bool = False, **options):
        super().__init__(*args, exact=exact, **options)
        self.exact = exact

    def run(self, feed, outputs=None):
        return {name: v if self.exact else np.minimum(v, 3) for name, v in super().run(feed, outputs).items()}


@pytest.fixture
def saturating(monkeypatch):
    monkeypatch.setattr(job, "Session", Saturating)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    for target in ("tensorrt", "onnxruntime"):
        jobs.quantize(DIGITS, folder / f"{target}.onnx", source=jobs.Source(CALIBRATION), options={"target": target})
    return folder


def test_a_file_for_tensorrt_is_proved_in_exact_arithmetic(quantized, saturating):
    record = jobs.diff(
        DIGITS, quantized / "tensorrt.onnx", source=jobs.Source(evaluation=EVALUATION), gates=Gates(min_snr=20)
    )
    assert record["accuracy"]["verdict"]["level"] == "ok"
    assert "exact" not in record["accuracy"]
    assert not any("VNNI" in text for text in record["warnings"])


def test_a_file_for_onnxruntime_is_proved_both_ways(quantized, saturating):
    record = jobs.diff(DIGITS, quantized / "onnxruntime.onnx", source=jobs.Source(evaluation=EVALUATION))
    assert record["accuracy"]["outputs"][0]["snr"] < 10 < 20 < record["accuracy"]["exact"]["outputs"][0]["snr"]
    (named,) = [text for text in record["warnings"] if "VNNI" in text]
    assert "saturates" in named
    assert "7 bits" in named
    with pytest.raises(GateError, match="SNR"):
        jobs.diff(
            DIGITS, quantized / "onnxruntime.onnx", source=jobs.Source(evaluation=EVALUATION), gates=Gates(min_snr=20)
        )


def test_where_nothing_saturates_nothing_is_said(quantized):
    record = jobs.diff(DIGITS, quantized / "onnxruntime.onnx", source=jobs.Source(evaluation=EVALUATION))
    run, exact = record["accuracy"]["outputs"][0], record["accuracy"]["exact"]["outputs"][0]
    if abs(run["snr"] - exact["snr"]) < 1:
        assert not any("VNNI" in text for text in record["warnings"])


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_every_command_that_quantizes(target, saturating, tmp_path):
    record = jobs.compress(DIGITS, tmp_path, source=jobs.Source(CALIBRATION, EVALUATION), overrides={"target": target})
    assert any("VNNI" in text for text in record["warnings"]) is (target == "onnxruntime")


@pytest.mark.parametrize(
    ("body", "written"),
    [
        ("y = Relu(x)", True),
        ("q = QuantizeLinear(x, s, z8)\ny = DequantizeLinear(q, s, z8)", True),
        ("q = QuantizeLinear(x, s, u8)\ny = DequantizeLinear(q, s, u8)", False),
        ("q, s1, z1 = DynamicQuantizeLinear(x)\nf = Cast<to=1>(q)\ny = Mul(f, s1)", False),
    ],
)
def test_what_a_file_is_made_for(body, written):
    constants = {"s": np.float32(0.1), "z8": np.int8(0), "u8": np.uint8(3)}
    used = {name: value for name, value in constants.items() if name in body}
    graph = build("(float[4] x) => (float[4] y)", body, kind="float", **used)
    assert job.computes_as_written(graph) is written


def test_the_option_reaches_onnxruntime(monkeypatch):
    ort, entries = sessions.onnxruntime(), {}

    class Options(ort.SessionOptions):
        def add_session_config_entry(self, key, value):
            entries[key] = value
            super().add_session_config_entry(key, value)

    monkeypatch.setattr(ort, "SessionOptions", Options)
    Session(DIGITS, timed=True)
    assert not entries
    Session(DIGITS, exact=True, timed=True)
    assert entries == {"session.x64quantprecision": "1", "session.qdq_matmulnbits_accuracy_level": "1"}


@pytest.mark.parametrize(("given", "expected"), [(None, "1"), ("0", "0")])
def test_telemetry_is_off_unless_it_is_asked_for(given, expected):
    code = (
        "import os; from channelfold.runtime.io.session import onnxruntime; onnxruntime(); "
        "print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    env = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    env |= {} if given is None else {"ORT_DISABLE_TELEMETRY": given}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert found.stdout.strip() == expected


def test_an_int8_weight_of_several_nodes(tmp_path):
    """With exact kernels ONNX Runtime 1.32 makes two unsigned weights of one name, and fails."""
    body = """
        h = Gemm<transB=1>(x, W, b)
        r = Relu(h)
        y = Gemm<transB=1>(r, W, c)
    """
    graph = build("(float[N,32] x) => (float[] y)", body, kind="float", W=random((32, 32), "W") / 6, b=32, c=32)
    files.save(graph, tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=random((16, 32), "x").astype(np.float32))
    record = jobs.quantize(tmp_path / "m.onnx", tmp_path / "q.onnx", source=jobs.Source(tmp_path / "x.npz"))
    assert record["accuracy"]["outputs"][0]["snr"] > 30


@pytest.mark.parametrize(("milliseconds", "said"), [((2, 3), "1.50x"), ((3, 2), ""), ((2, 2), "")])
@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_a_file_slower_than_float_is_said_to_be(target, milliseconds, said, monkeypatch, tmp_path):
    """The clock is a stub: a run of the float model takes the first time, a run of the quantized file the second."""
    now, times = [0.0], dict(zip(("float", "quantized"), milliseconds, strict=True))

    def timed(runs, **options):
        def advancing(name, run):
            run()
            now[0] += times[name] / 1e3

        stubs = {name: functools.partial(advancing, name, run) for name, run in runs.items()}
        return bench.latencies(stubs, clock=lambda: now[0], **options)

    monkeypatch.setattr(job, "latencies", timed)
    source = jobs.Source(CALIBRATION, EVALUATION)
    record = jobs.quantize(DIGITS, tmp_path / "q.onnx", source=source, options={"target": target})
    slow = [text for text in record["warnings"] if "as slow as float" in text]
    assert slow == ([f"The quantized file is {said} as slow as float on this machine"] if said and now[0] else [])
    assert any("--profile" in step for step in record.get("next", ())) == bool(slow)
    assert [round(row["ms"], 6) for row in record["latency"]] == (list(milliseconds) if target == "onnxruntime" else [])
