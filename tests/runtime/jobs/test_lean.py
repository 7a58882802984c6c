"""What a command reads, opens and runs: nothing twice that can be had once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from channelfold.models import MODELS
from channelfold.runtime import jobs
from channelfold.runtime.io import files
from channelfold.runtime.io.session import Session
from channelfold.runtime.jobs.job import SEEN, Source
from channelfold.runtime.stats import saturation

MODEL = Path(jobs.__file__).parents[2] / "models"
VIT, CALIBRATION = MODEL / MODELS["digits_vit"].onnx, MODEL / MODELS["digits_vit"].calibration
SAMPLES = 128


@pytest.fixture
def counted(monkeypatch) -> Counter[str]:
    """How often files were read and written, sessions opened and run, and graphs exported."""
    counts: Counter[str] = Counter()

    def count(what: str, owner: object, name: str) -> None:
        real = getattr(owner, name)

        def counting(*args, **options):
            counts[what] += 1
            return real(*args, **options)

        monkeypatch.setattr(owner, name, counting)

    count("loads", files, "read_skeleton")
    count("saves", files, "saving")
    count("sessions", Session, "__init__")
    count("runs", Session, "run")
    return counts


def test_quantize(counted, tmp_path):
    """Reads: skeleton and names of the files beside it, of both files. Sessions: the original, what is in
    it, the result. Runs: every sample once, and the comparison.
    """
    jobs.quantize(VIT, tmp_path / "int8.onnx", source=Source(calibration=CALIBRATION))
    assert counted == {"loads": 4, "saves": 1, "sessions": 3, "runs": SAMPLES + 2 * SEEN}


def test_quantize_for_onnxruntime(counted, tmp_path, monkeypatch):
    """The comparison runs the file as this machine does and in exact arithmetic, the first is timed as well."""
    saturation.saturates()
    counted.clear()
    timed: list[Any] = []
    monkeypatch.setattr(jobs.job.Job, "_time", lambda self, feed, candidate: timed.append(candidate))
    source, options = Source(calibration=CALIBRATION), {"target": "onnxruntime", "reduce_range": "off"}
    jobs.quantize(VIT, tmp_path / "int8.onnx", source=source, options=options)
    assert [type(candidate) for candidate in timed] == [Session]
    assert counted["runs"] == SAMPLES + 3 * SEEN
    assert (counted["loads"], counted["saves"]) == (4, 1)
    assert counted["sessions"] <= 5  # one that tells which weights are read as integers


def test_a_second_command_finds_the_statistics(counted, tmp_path):
    source = Source(calibration=CALIBRATION, cache=tmp_path / "cache")
    first = jobs.quantize(VIT, tmp_path / "mse.onnx", source=source)
    assert counted["runs"] == SAMPLES + 2 * SEEN
    counted.clear()
    options = {"calibrator": "minmax"}
    second = jobs.quantize(VIT, tmp_path / "minmax.onnx", source=source, options=options)
    assert counted["runs"] == 2 * SEEN
    ends = [
        {name: (seen["minimum"], seen["maximum"]) for name, seen in record["steps"][-1]["facts"]["activations"].items()}
        for record in (first, second)
    ]
    assert ends[0] == ends[1]


def test_compress_calibrates_once(counted, tmp_path):
    jobs.compress(VIT, tmp_path / "out", source=Source(calibration=CALIBRATION))
    folds = 4 * 3  # the graph before and after each exact step, on three probes
    assert counted["runs"] == SAMPLES + 2 * SEEN + folds
    assert not list((tmp_path / "out").glob("checkpoint*"))
