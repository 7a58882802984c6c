"""The memory of sessions that are gone."""

from __future__ import annotations

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import pytest

from channelfold.runtime.io.files import save
from channelfold.runtime.io.memory import _library, mapped
from channelfold.tests.graphs import build
from channelfold.tests.tasks import memory_around_sessions


@pytest.mark.skipif(sys.platform != "linux", reason="the C library of GNU")
def test_the_weights_of_a_session_are_given_back(tmp_path):
    layers = range(40)
    text = "x0 = Identity(x) " + " ".join(f"x{i + 1} = MatMul(x{i}, W{i})" for i in layers) + " y = Identity(x40)"
    shapes: Any = {f"W{i}": (512, 512) for i in layers}
    save(build("(float[1,512] x) => (float[1,512] y)", text, kind="float", **shapes), tmp_path / "m.onnx")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(memory_around_sessions, tmp_path / "m.onnx").result()
    for before, during, after in found:
        assert during > before + 30
        assert after < (before + during) / 2


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
