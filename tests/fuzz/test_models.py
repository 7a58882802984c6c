"""Broken and hostile models through the commands."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from channelfold.tests.fuzz.harness import Case, budget, run_all
from channelfold.tests.fuzz.mutate import Mutator, command
from channelfold.tests.fuzz.seeds import seeds


def _mutated(seed: int) -> Case:
    def make(folder: Path) -> list[str]:
        Mutator(seed).write(folder)
        return command(np.random.default_rng([seed, 1]), folder)

    return Case(f"model-{seed}", make)


def test_mutated_models():
    counts = run_all(map(_mutated, budget(40)))
    assert counts[0], "everything was refused, so nothing was tested"


def test_the_seeds_themselves_are_accepted():
    def unchanged(name: str, number: int) -> Case:
        def make(folder: Path) -> list[str]:
            (folder / "model.onnx").write_bytes(seeds()[name])
            return command(np.random.default_rng(number), folder)

        return Case(f"seed-{name}-{number}", make)

    cases = [unchanged(name, place) for place, name in enumerate(seeds())]
    run_all(cases)
    assert [(case.name, case.error) for case in cases if case.code != 0] == []
