"""The folder of the open set, the task type, and the ONNX Runtime session every task uses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Feed = dict[str, np.ndarray]


@dataclass(frozen=True)
class OpenSet:
    """The folder that ``open_set.py fetch`` fills."""

    root: Path

    @property
    def models(self) -> Path:
        return self.root / "open"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def packages(self) -> Path:
        return self.root / "x"

    @property
    def calibration(self) -> Path:
        return self.root / "calibration"

    def cached(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The array ``make`` gives, computed once. For features of the float model on which a probe is trained."""
        path = self.data / "cache" / f"{name}.npy"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, make())
        return np.load(path)

    def cached_json(self, name: str, make: Callable[[], Any]) -> Any:
        """The same for a JSON value."""
        path = self.data / "cache" / f"{name}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(make(), indent=0))
        return json.loads(path.read_text())


@dataclass(frozen=True)
class Task:
    """One model, one number.

    ``evaluate(open_set, model)`` returns a JSON-able dict of figures, of which ``metric`` names the headline.
    ``samples(open_set)`` yields calibration feeds, with a leading sample axis.
    """

    name: str
    model: str
    metric: str
    evaluate: Callable[[OpenSet, Path], dict[str, Any]]
    samples: Callable[[OpenSet], Iterable[Feed]]


def session(model: Path) -> Any:
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.add_session_config_entry("session.x64quantprecision", "1")  # the file is judged, not this processor
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def write_samples(feeds: Iterable[Feed], folder: Path, name: str) -> Path:
    """``folder/name.npz`` with all samples along axis 0, or a folder of one file each where shapes differ."""
    feeds = list(feeds)
    single, many = folder / f"{name}.npz", folder / name
    folder.mkdir(parents=True, exist_ok=True)
    single.unlink(missing_ok=True)
    shutil.rmtree(many, ignore_errors=True)
    shapes = {tuple((key, value.shape) for key, value in feed.items()) for feed in feeds}
    if len(shapes) == 1:
        np.savez_compressed(single, **{key: np.concatenate([feed[key] for feed in feeds]) for key in feeds[0]})  # pyright: ignore[reportArgumentType]
        return single
    many.mkdir()
    for i, feed in enumerate(feeds):
        np.savez_compressed(many / f"{i:03}.npz", **feed)  # pyright: ignore[reportArgumentType]
    return many
