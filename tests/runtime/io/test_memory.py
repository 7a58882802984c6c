"""The memory of sessions that are gone."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from channelfold.runtime.io.files import save
from channelfold.runtime.io.memory import _library, mapped
from channelfold.runtime.io.session import Session
from channelfold.tests.graphs import build


def held() -> float:
    """MB of this process's own memory."""
    gc.collect()
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="the C library of GNU")
def test_the_weights_of_a_session_are_given_back(tmp_path):
    layers = range(40)
    text = "x0 = Identity(x) " + " ".join(f"x{i + 1} = MatMul(x{i}, W{i})" for i in layers) + " y = Identity(x40)"
    shapes: Any = {f"W{i}": (512, 512) for i in layers}
    save(build("(float[1,512] x) => (float[1,512] y)", text, kind="float", **shapes), tmp_path / "m.onnx")
    np.ones(1 << 22)  # the first large block that is freed
    before = held()
    for _ in range(3):
        session = Session(tmp_path / "m.onnx")
        assert session.inputs[0].name == "x"
        between = [np.ones(1 << 10) for _ in range(100)]  # smaller blocks that stay
        during = held()
        del session
        assert during > before + 30
        assert held() < (before + during) / 2
        assert len(between) == 100


def test_elsewhere_nothing_changes(monkeypatch):
    monkeypatch.setattr("channelfold.runtime.io.memory._library", lambda: None)
    with mapped():
        assert np.ones(3).sum() == 3


@pytest.mark.parametrize(
    ("system", "settings"),
    [
        ("musl", {}),
        ("", {}),
        ("glibc", {"MALLOC_MMAP_THRESHOLD_": "65536"}),
        ("glibc", {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536"}),
    ],
)
def test_another_library_and_what_a_user_has_set_are_left_alone(system, settings, monkeypatch):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("platform.libc_ver", lambda: (system, "1"))
    assert _library.__wrapped__() is None
