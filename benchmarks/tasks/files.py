"""Magika: the type of files of this machine, judged by their extension."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tasks.base import Feed, OpenSet, Task, session

TYPES = {
    ".py": "python", ".c": "c", ".h": "c", ".js": "javascript", ".ts": "typescript", ".json": "json", ".html": "html",
    ".css": "css", ".md": "markdown", ".xml": "xml", ".sh": "shell", ".pl": "perl", ".pm": "perl", ".png": "png",
    ".jpg": "jpeg", ".gif": "gif", ".gz": "gzip", ".zip": "zip", ".wav": "wav", ".ttf": "ttf", ".whl": "zip",
    ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".cpp": "cpp", ".hpp": "cpp", ".java": "java", ".go": "go",
    ".rs": "rust", ".php": "php", ".rb": "ruby", ".cmake": "cmake", ".po": "po", ".svg": "svg", ".npz": "zip",
    ".pyc": "pythonbytecode", ".so": "elf", ".deb": "deb", ".diff": "diff", ".patch": "diff", ".tcl": "tcl",
    ".lua": "lua", ".scss": "scss", ".vim": "vim", ".bat": "batch", ".ini": "ini", ".csv": "csv", ".sql": "sql",
    ".tif": "tiff", ".pdf": "pdf",
}  # fmt: skip
ALSO_RIGHT = {
    "c": {"cpp"}, "cpp": {"c"}, "javascript": {"typescript"}, "markdown": {"txt"},
    "zip": {"npz", "whl", "pythonwheel", "jar", "npy"},
}  # fmt: skip
EVALUATED, CALIBRATED = 40, 4
ROOTS = ("/usr/lib", "/usr/share", "/usr/include", "/usr/local/lib")


def find_files(open_set: OpenSet) -> dict[str, list[tuple[str, str]]]:
    """Up to 40 files of each extension to judge, and 4 others to calibrate with, as (path, type)."""
    found: dict[str, list[str]] = defaultdict(list)
    for root in (*ROOTS, open_set.data, open_set.root / "dl"):
        for folder, _, names in os.walk(root):
            for name in names:
                extension = Path(name).suffix.lower()
                path = Path(folder, name)
                if extension in TYPES and not path.is_symlink() and len(found[extension]) < 4000:
                    found[extension].append(str(path))
    rng = random.Random(0)
    chosen: dict[str, list[tuple[str, str]]] = {"evaluate": [], "calibrate": []}
    for extension, paths in found.items():
        paths.sort()
        rng.shuffle(paths)
        large = [(path, TYPES[extension]) for path in paths if Path(path).stat().st_size >= 300]
        chosen["evaluate"] += large[:EVALUATED]
        chosen["calibrate"] += large[EVALUATED : EVALUATED + CALIBRATED]
    return chosen


def labelled_files(open_set: OpenSet, use: str) -> list[tuple[Path, str]]:
    """The files chosen on the first run; the list is kept so that later figures stay comparable on this machine."""
    chosen = open_set.cached_json("magika_files", lambda: find_files(open_set))
    return [(Path(path), kind) for path, kind in chosen[use] if Path(path).is_file()]


def detector(open_set: OpenSet, model: Path) -> Any:
    """The magika package with ``model`` in the place of its own."""
    from magika import Magika

    own = open_set.packages / "magika/magika/models/standard_v3_3"
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(own, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.onnx"))
        shutil.copy(model, Path(folder) / "model.onnx")
        detect = Magika(model_dir=Path(folder))
    detect._onnx_session = session(model)
    return detect


def magika(open_set: OpenSet, model: Path) -> dict[str, Any]:
    """Share of files whose type is the one their extension says. Files too short for the network are left out."""
    detect = detector(open_set, model)
    right = []
    for path, kind in labelled_files(open_set, "evaluate"):
        label = str(detect.identify_path(path).dl.label)
        if label != "undefined":
            right.append(label == kind or label in ALSO_RIGHT.get(kind, ()))
    return {"accuracy": round(float(np.mean(right)), 4), "files": len(right)}


class Recorder:
    """Stands in for the session of a detector and keeps what it is fed."""

    def __init__(self, session: Any):
        self.session = session
        self.fed: list[np.ndarray] = []

    def run(self, outputs: list[str], feed: Feed) -> list[np.ndarray]:
        self.fed.append(feed["bytes"])
        return self.session.run(outputs, feed)


def magika_samples(open_set: OpenSet) -> Iterator[Feed]:
    """What the package feeds the network for up to 128 other files, four of each extension."""
    detect = detector(open_set, open_set.models / "magika.onnx")
    detect._onnx_session = recorder = Recorder(detect._onnx_session)
    for path, _ in labelled_files(open_set, "calibrate"):
        detect.identify_path(path)
    rows = np.concatenate(recorder.fed).astype(np.int32)
    return ({"bytes": row[None]} for row in rows[np.random.default_rng(100).permutation(len(rows))[:128]])


TASKS = (Task("magika", "magika.onnx", "accuracy", magika, magika_samples),)
