"""What observers have seen, kept in files: found again bit for bit, and only where everything is the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from channelfold.runtime.data.sources import Data
from channelfold.runtime.io.session import Session, TensorSpec
from channelfold.runtime.stats import kept
from channelfold.runtime.stats.channels import ChannelMoments, ChannelStatistics
from channelfold.runtime.stats.covariance import Moments
from channelfold.runtime.stats.histograms import TensorStatistics
from channelfold.runtime.stats.observe import observe
from channelfold.tests.graphs import build

N = 40


def network(scale: float = 1.0):
    weight = np.linspace(-scale, scale, 12).reshape(3, 4)
    return build("(float[2,3] x) => (float[2,4] y)", "h = MatMul(x, W)  y = Relu(h)", kind="float", W=weight)


def data(count: int = N, stop: int | None = None, seed: int = 0) -> Data:
    """Samples; reading the sample ``stop`` fails, as a run that is killed there does."""

    def feeds():
        for index in range(count):
            if index == stop:
                raise KeyboardInterrupt
            yield {"x": np.random.default_rng([seed, index]).standard_normal((2, 3)).astype(np.float32)}

    return Data([TensorSpec("x", np.dtype(np.float32), (2, 3))], count, feeds, "a test")


def observers() -> dict[str, list[Any]]:
    joint = Moments({"x": -1, "h": -1})
    return {"h": [TensorStatistics(-1), joint, ChannelMoments(-1)], "x": [ChannelStatistics(-1, 16), joint]}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Moments):  # whose chunk holds anything behind what fills it
        return same(a.mean, b.mean) and same(a.covariance, b.covariance) and a.count == b.count
    if dataclasses.is_dataclass(a):
        return all(same(value, vars(b)[name]) for name, value in vars(a).items())
    return np.array_equal(np.asarray(a), np.asarray(b)) and type(a) is type(b)


@pytest.fixture
def opened(monkeypatch) -> list[int]:
    """The number of runs of every session."""
    counted: list[int] = []
    real = Session.run

    def run(self, *args):
        counted.append(1)
        return real(self, *args)

    monkeypatch.setattr(Session, "run", run)
    return counted


def test_a_second_run_finds_everything_and_runs_nothing(tmp_path, opened):
    plain, first, second = observers(), observers(), observers()
    observe(network(), plain, data())
    observe(network(), first, data(), keep=tmp_path / "cache")
    assert len(opened) == 2 * N
    steps: list[tuple[int, int]] = []
    observe(network(), second, data(), lambda stage, done, total: steps.append((done, total)), tmp_path / "cache")
    assert len(opened) == 2 * N
    assert steps == [(N, N)]
    for name, seen in plain.items():
        for one, other, third in zip(seen, first[name], second[name], strict=True):
            assert same(one, other), (name, type(one))
            assert same(one, third), (name, type(one))


@pytest.mark.parametrize("stop", [5, 17, 33, 39])
def test_an_interrupted_run_goes_on_behind_its_last_block(tmp_path, opened, monkeypatch, stop):
    monkeypatch.setattr(Data, "fingerprint", "the same data")
    monkeypatch.setattr(kept, "_SHARE", 0)
    plain, killed, resumed = observers(), observers(), observers()
    observe(network(), plain, data())
    with pytest.raises(KeyboardInterrupt):
        observe(network(), killed, data(stop=stop), keep=tmp_path)
    opened.clear()
    observe(network(), resumed, data(), keep=tmp_path)
    assert len(opened) == N - stop // kept.BLOCK * kept.BLOCK
    assert all(same(one, other) for name in plain for one, other in zip(plain[name], resumed[name], strict=True))


@pytest.mark.parametrize("what", ["weights", "data", "number", "setting", "kind", "version"])
def test_what_is_not_the_same_is_not_found(tmp_path, opened, monkeypatch, what):
    observe(network(), {"h": [TensorStatistics(-1)]}, data(), keep=tmp_path)
    opened.clear()
    if what == "version":
        monkeypatch.setattr("channelfold.__version__", "0.0")
    other: Any = TensorStatistics(0) if what == "setting" else TensorStatistics(-1)
    other = ChannelMoments(-1) if what == "kind" else other
    samples = data(seed=1) if what == "data" else data(N - 1) if what == "number" else data()
    observe(network(2.0 if what == "weights" else 1.0), {"h": [other]}, samples, keep=tmp_path)
    assert len(opened) == len(samples)


@pytest.mark.parametrize("damage", [b"", b"PK\3\4 nothing", b"\x80\x04.", None])
def test_a_damaged_file_counts_as_none(tmp_path: Path, opened, damage):
    observe(network(), {"h": [TensorStatistics(-1)]}, data(), keep=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:500] if damage is None else damage)
    opened.clear()
    found = TensorStatistics(-1)
    observe(network(), {"h": [found]}, data(), keep=tmp_path)
    assert len(opened) == N
    assert found.total == N * 8
