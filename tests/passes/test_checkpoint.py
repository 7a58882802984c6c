"""Checkpoints: a run that was cut off goes on where it was, and only there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest

from channelfold.passes import checkpoint, pipeline
from channelfold.passes.base import Context, Outcome, Pass
from channelfold.runtime.data.probes import random_data
from channelfold.runtime.errors import OutputError
from channelfold.runtime.io import files
from channelfold.runtime.io.session import TensorSpec

applied: list[str] = []


@dataclass(frozen=True)
class Double(Pass):
    """Doubles a weight; ``crash`` is a killed process."""

    name: ClassVar[str] = "double"
    kind: ClassVar[Any] = "lossy"

    weight: str = "W1"
    factor: float = 2.0
    crash: bool = False

    def apply(self, graph, ctx):
        applied.append(self.weight)
        if self.crash:
            raise KeyboardInterrupt
        constant = graph.tensors()[self.weight]
        constant.values = files.read(constant) * np.float32(self.factor)
        outcome = Outcome(facts={"factor": self.factor})
        outcome.change(constant.outputs[0].name, "doubled")
        return outcome


@dataclass(frozen=True)
class Look(Pass):
    """Changes nothing."""

    name: ClassVar[str] = "look"
    kind: ClassVar[Any] = "exact"

    def apply(self, graph, ctx):
        applied.append("look")
        return Outcome()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
    g (float[n, 32] x) => (float[n, 8] y) { [a] h = MatMul (x, W1) [b] y = MatMul (h, W2) }""")
    rng = np.random.default_rng(0)
    for name, shape in (("W1", (32, 16)), ("W2", (16, 8))):
        values = rng.standard_normal(shape, np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    path = tmp_path / "source.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    applied.clear()
    return tmp_path / "checkpoint"


def run(source: Path, folder: Path | None, *passes: Pass, ctx: Context | None = None, **options: Any):
    """The weights after the run, its records, and what was applied."""
    applied.clear()
    graph, steps = pipeline.run(files.load(source), passes, ctx or Context(), checkpoint=folder, **options)
    weights = {name: files.read(graph.tensors()[name]) for name in ("W1", "W2")}
    return weights, steps, list(applied)


def crash(source: Path, folder: Path, *passes: Pass, **options: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(source, folder, *passes, **options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


DONE = (Double("W1"), Look(), Double("W2"))


def test_a_killed_run_goes_on_after_the_last_finished_step(source, folder):
    crash(source, folder, *DONE, Double("W1", crash=True))
    assert applied == ["W1", "look", "W2", "W1"]
    assert names(folder) == ["manifest.json", "step-3.onnx"]

    weights, steps, ran = run(source, folder, *DONE, Double("W1", 3.0))
    assert ran == ["W1"]
    expected, fresh, _ = run(source, None, *DONE, Double("W1", 3.0))
    assert all(np.array_equal(weights[name], expected[name]) for name in expected)
    assert [step.get("resumed", False) for step in steps] == [True, True, True, False]
    for step, other in zip(steps, fresh, strict=True):
        assert {k: v for k, v in step.items() if k not in ("seconds", "resumed")} == {
            k: v for k, v in other.items() if k != "seconds"
        }


def test_a_finished_run_is_not_repeated_and_can_be_extended(source, folder):
    first, *_ = run(source, folder, *DONE)
    again, steps, ran = run(source, folder, *DONE)
    assert ran == []
    assert all(step["resumed"] for step in steps)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    _, steps, ran = run(source, folder, *DONE, Double("W2"))
    assert ran == ["W2"]
    assert names(folder) == ["manifest.json", "step-4.onnx"]
    _, steps, ran = run(source, folder, *DONE, Double("W2"))
    assert (ran, [step["resumed"] for step in steps]) == ([], [True] * 4)


def test_steps_that_change_nothing_need_no_model(source, folder):
    crash(source, folder, Look(), Double("W1", crash=True))
    assert names(folder) == ["manifest.json"]
    _, steps, ran = run(source, folder, Look(), Double("W1"))
    assert ran == ["W1"]
    assert [step.get("resumed", False) for step in steps] == [True, False]


def random(seed: int):
    return random_data((TensorSpec("x", np.dtype(np.float32), ("n", 32)),), 2, seed=seed)


@pytest.mark.parametrize(
    ("passes", "options"),
    [
        ((Double("W1", 3.0), Look(), Double("W2")), {}),
        ((Look(), Double("W1"), Double("W2")), {}),
        ((Double("W1"), Look()), {}),
        (DONE, {"verify": False}),
        (DONE, {"on_violation": "skip"}),
        (DONE, {"probes": random(1)}),
        (DONE, {"ctx": Context(seed=1)}),
        (DONE, {"ctx": Context(calibration=random(1))}),
    ],
)
def test_anything_different_starts_anew(source, folder, passes, options):
    run(source, folder, *DONE)
    _, steps, ran = run(source, folder, *passes, **options)
    assert len(ran) == len(passes)
    assert not any("resumed" in step or "warnings" in step for step in steps)


def test_equal_calibration_data_count_as_the_same(source, folder):
    run(source, folder, *DONE, ctx=Context(calibration=random(1)))
    assert run(source, folder, *DONE, ctx=Context(calibration=random(1)))[2] == []


def test_another_source_or_version_starts_anew(source, folder, monkeypatch):
    run(source, folder, *DONE)
    model = onnx.load(source)
    values = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()
    values[0, 0] += 1
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(values, "W1"))
    onnx.save(model, source)
    assert len(run(source, folder, *DONE)[2]) == 3
    monkeypatch.setattr(pipeline, "__version__", "99")
    assert len(run(source, folder, *DONE)[2]) == 3


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def edit(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("file", "damage", "reason"),
    [
        ("manifest.json", truncate, "Unterminated string"),
        ("manifest.json", lambda path: path.write_text("[]"), "TypeError"),
        ("manifest.json", lambda path: path.write_text("{}"), "KeyError('passes')"),
        ("manifest.json", lambda path: edit(path, files=3), "AttributeError"),
        ("manifest.json", lambda path: edit(path, model=3), "TypeError"),
        ("manifest.json", lambda path: path.write_bytes(b"\xff\xfe\xff"), "codec can't decode"),
        ("step-3.onnx", truncate, "step-3.onnx is not the file that was written"),
        ("step-3.onnx", flip, "step-3.onnx is not the file that was written"),
        ("step-3.onnx", Path.unlink, "No such file"),
    ],
)
def test_damaged_checkpoints_are_ignored_with_a_warning(source, folder, file, damage, reason):
    run(source, folder, *DONE)
    damage(folder / file)
    _, steps, ran = run(source, folder, *DONE)
    assert len(ran) == 3
    [warning] = pipeline.warnings(steps)
    assert f"the checkpoint in {folder} is damaged and was not used" in warning
    assert reason in warning
    assert run(source, folder, *DONE)[2] == []  # a sound one has taken its place


def test_a_manifest_cannot_point_outside_its_folder(source, folder):
    run(source, folder, *DONE)
    edit(folder / "manifest.json", model=f"../{source.name}", files={})
    _, steps, ran = run(source, folder, *DONE)
    assert len(ran) == 3
    assert "is damaged" in pipeline.warnings(steps)[0]


def test_a_run_killed_while_it_saved_goes_on_from_the_step_before(source, folder, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        write = checkpoint.writing
        patch.setattr(
            checkpoint, "writing", lambda path: killed() if (folder / "step-3.onnx").exists() else write(path)
        )
        crash(source, folder, *DONE)
    assert names(folder) == ["manifest.json", "step-1.onnx", "step-3.onnx"]
    assert run(source, folder, *DONE)[2] == ["W2"]
    assert names(folder) == ["manifest.json", "step-3.onnx"]


def test_the_graph_of_a_resumed_run_outlives_the_checkpoint(source, folder, tmp_path):
    run(source, folder, *DONE)
    graph, _ = pipeline.run(files.load(source), DONE, Context(), checkpoint=folder)
    checkpoint.clear(folder)
    assert not folder.exists()
    files.save(graph, tmp_path / "out.onnx")
    saved = files.load(tmp_path / "out.onnx").tensors()
    expected, *_ = run(source, None, *DONE)
    assert all(np.array_equal(files.read(saved[name]), expected[name]) for name in expected)


def test_clear_leaves_what_is_not_its_own(source, folder):
    run(source, folder, *DONE)
    (folder / "notes.txt").write_text("mine")
    checkpoint.clear(folder)
    assert names(folder) == ["notes.txt"]
    checkpoint.clear(folder / "missing")


def test_a_folder_that_cannot_be_made_is_an_output_error(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Give another checkpoint folder"):
        run(source, tmp_path / "file" / "checkpoint", *DONE)
