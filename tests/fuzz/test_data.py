"""Broken and hostile data sets through the commands that read data."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from channelfold.tests.fuzz.harness import Case, budget, run_all
from channelfold.tests.fuzz.hostile_data import hostile
from channelfold.tests.fuzz.seeds import seeds

COMMANDS = (
    ["quantize", "-o", "{out}.onnx", "--calibration"],
    ["quantize", "-o", "{out}.onnx", "--target", "onnxruntime", "--calibration"],
    ["compress", "-o", "{out}", "--random", "2", "--evaluation"],
    ["smooth", "-o", "{out}.onnx", "--calibration"],
    ["prune", "-o", "{out}.onnx", "--ratio", "0.3", "--calibration"],
    ["inspect", "--calibration"],
    ["diff", "{model}", "--data"],
)


def _case(seed: int) -> Case:
    def make(folder: Path) -> list[str]:
        rng = np.random.default_rng([seed, 2])
        (folder / "model.onnx").write_bytes(seeds()["function" if rng.random() < 0.3 else "data"])
        name, *options = COMMANDS[int(rng.integers(len(COMMANDS)))]
        model, path = str(folder / "model.onnx"), hostile(rng, folder)
        options = [o.format(out=folder / "out", model=model) for o in options]
        return [name, model, *options, path]

    return Case(f"data-{seed}", make)


def test_hostile_data_sets():
    counts = run_all(map(_case, budget(25)))
    assert counts[1], "nothing was refused, so nothing was tested"
