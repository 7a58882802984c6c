"""Checkpoints of long runs: a folder with the graph and the records after the latest step.

The folder holds ``manifest.json``, one model, ``step-N.onnx``, and what the latest step has seen of the data and done
so far (``stats.kept``, ``quantize.done``). A step writes the model first and then replaces the manifest atomically, so
that a killed run leaves a valid folder. A run resumes a folder where everything that its results depend on is the same:
the source model, the data, the options of the run, and the version. The passes done must be the first passes of the
run. Otherwise the run starts anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs

from channelfold.passes.base import Pass
from channelfold.runtime.errors import ChannelfoldError, OutputError
from channelfold.runtime.io.files import load, remove_leftovers, save, writing

MANIFEST = "manifest.json"
SCHEMA = 1


@dataclass
class Progress:
    """The graph of a run (None: the unchanged source), the records of its steps and the number of passes done."""

    graph: gs.Graph | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)
    done: int = 0
    warning: str = ""


class Checkpoint:
    """The folder of one run. The results depend on ``conditions`` (JSON-able) and on the passes."""

    def __init__(self, folder: Path, conditions: dict[str, Any], passes: Sequence[Pass]):
        self._folder = folder
        self._conditions = _plain({"schema": SCHEMA, **conditions})
        self._passes = _plain([[step.name, step.options()] for step in passes])
        self._model: str | None = None  # the latest model
        self._files: dict[str, str] = {}  # SHA-256 of the files of the model

    def resume(self) -> Progress:
        """The progress of an earlier run with the same conditions. A damaged folder counts as empty, with a warning."""
        if not (self._folder / MANIFEST).exists():
            return Progress()
        try:
            manifest = json.loads((self._folder / MANIFEST).read_bytes())
            passes = manifest["passes"]
            if manifest["conditions"] != self._conditions or passes != self._passes[: len(passes)]:
                return Progress()
            graph = self._load(manifest["model"], manifest["files"])
            steps = [{**step, "resumed": True} for step in manifest["steps"]]
        except (ChannelfoldError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            reason = error if isinstance(error, ChannelfoldError | OSError | ValueError) else repr(error)
            return Progress(warning=f"the checkpoint in {self._folder} is damaged and was not used ({reason})")
        return Progress(graph, steps, len(passes))

    def write(self, graph: gs.Graph, progress: Progress, *, changed: bool) -> None:
        """Keeps the state after a step. Raises OutputError."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"Cannot make the folder {self._folder} ({error.strerror})", "Give another checkpoint folder."
            ) from None
        if changed:
            self._model = f"step-{len(progress.steps)}.onnx"
            save(graph, self._folder / self._model)
            self._files = {path.name: _digest(path) for path in _models(self._folder, self._model)}
        manifest = {
            "conditions": self._conditions,
            "passes": self._passes[: progress.done],
            "steps": progress.steps,
            "model": self._model,
            "files": self._files,
        }
        with writing(self._folder / MANIFEST) as file:
            file.write(json.dumps(manifest, indent=1).encode())
        _remove(path for path in _models(self._folder, "step-") if path.name not in self._files)

    def _load(self, model: str | None, digests: dict[str, str]) -> gs.Graph | None:
        if model is None:
            return None
        for name, digest in digests.items():
            if _digest(self._folder / Path(name).name) != digest:
                raise ValueError(f"{name} is not the file that was written")
        graph = load(self._folder / Path(model).name)
        self._model, self._files = model, digests
        return graph


def clear(folder: str | Path) -> None:
    """Removes a checkpoint, and its folder where the folder holds nothing else."""
    folder = Path(folder)
    remove_leftovers(folder)
    kept = (path for name in ("statistics", "rounded", "trial") for path in folder.glob(f"{name}-*.npz"))
    _remove([folder / MANIFEST, *_models(folder, "step-"), *kept])
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):  # some systems keep files whose weights are mapped
            path.unlink()


def _models(folder: Path, prefix: str) -> list[Path]:
    """The models of a checkpoint, and the files with their weights, whose names start with ``prefix``."""
    return [path for path in folder.glob("step-*.onnx*") if path.name.startswith(prefix)]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plain(value: Any) -> Any:
    """A value after a round trip through JSON: tuples become lists."""
    return json.loads(json.dumps(value))
