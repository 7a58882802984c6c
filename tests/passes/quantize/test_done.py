"""GPTQ that was killed goes on behind the last layer that it rounded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from channelfold.passes import checkpoint
from channelfold.passes.base import Context
from channelfold.passes.quantize import QuantizeWeights, rounders
from channelfold.runtime.errors import no_progress
from channelfold.runtime.io.files import raise_opset
from channelfold.runtime.io.snapshot import Snapshot
from channelfold.tests.graphs import build, data_from, random


def killed_at(stop: int) -> Callable[[str, int, int], None]:
    def progress(stage: str, done: int, total: int) -> None:
        if stage == "Quantizing weights" and done == stop:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("correct", [False, True])
def test_a_killed_run_goes_on_with_the_next_layer(tmp_path, monkeypatch, correct):
    """Layers that were rounded before are found again, if the model, the data and the options are the same."""
    names: dict[str, Any] = {name: random((32, 32), name) for name in "ABCD"}
    body = "a = Gemm(x, A, b) r = Relu(a) c = MatMul(r, B) s = Add(c, x) d = MatMul(s, C) t = Tanh(d) y = MatMul(t, D)"
    data = data_from({"x": np.random.default_rng(2).normal(size=(256, 32)).astype(np.float32)})
    made: list[int] = []
    real = rounders.Factored.__init__
    monkeypatch.setattr(rounders.Factored, "__init__", lambda self, products: (made.append(1), real(self, products))[0])

    def rounds(step: QuantizeWeights, keep: Path | None, progress=no_progress) -> str:
        graph = build("(float[N,32] x) => (float[] y)", body, kind="float", b=32, **names)
        raise_opset(graph, 21)
        step.apply(graph, Context(data, progress, keep=keep))
        return Snapshot.of(graph).fingerprint()

    step = QuantizeWeights(weights="dgq", activations="int8", group=8, rounder="gptq", correct_inputs=correct)
    whole = rounds(step, None)
    with pytest.raises(KeyboardInterrupt):
        rounds(step, tmp_path, killed_at(2))
    assert len(list(tmp_path.glob("rounded-*.npz"))) == 2
    made.clear()
    assert rounds(step, tmp_path) == whole
    assert len(made) == 2
    assert rounds(step, tmp_path) == whole
    assert len(made) == 2
    rounds(replace(step, group=16), tmp_path)
    assert len(made) == 6
    for file in tmp_path.glob("rounded-*.npz"):
        file.write_bytes(b"PK damaged")
    assert rounds(step, tmp_path) == whole
    assert len(made) == 10
    checkpoint.clear(tmp_path)
    assert not tmp_path.exists()
