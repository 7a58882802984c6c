"""The demo: a shipped network compressed to int8, with accuracy, size, latency and engines side by side.

A network with idle FFN channels (RePaViT) has a third stage between the two: folded, but not quantized.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from channelfold import models
from channelfold.runtime import jobs
from channelfold.runtime.engine import build as tensorrt
from channelfold.runtime.errors import DependencyError, UsageError, nearest, no_progress
from channelfold.runtime.io import files
from channelfold.runtime.io.facts import model_facts
from channelfold.runtime.io.session import Session
from channelfold.runtime.jobs import inspect_model as inspection
from channelfold.runtime.report import terminal
from channelfold.runtime.stats.bench import latencies
from channelfold.runtime.stats.metrics import ErrorSums

RECIPE = "int8-reparam"


def run(
    name: str, out_dir: Path | None = None, sms: Sequence[int] = (), progress: jobs.Progress = no_progress
) -> jobs.Record:
    """Runs ``jobs.compress`` on the shipped network ``name`` and adds ``demo`` and ``latency`` to its record.

    ``demo``: {model, description, stages: [{name, path, bytes, nodes, parameters, macs, accuracy (top-1, 0 to 1),
    agreement (with the classes of float, 0 to 1), snr (dB; null for float)}], samples, folder, no_engines (the reason
    why there are none, or "")}. The stages are ``float``, ``folded`` (where channels were idle) and ``int8``.

    Raises UsageError where no network of that name ships.
    """
    if name not in models.MODELS:
        raise UsageError(f"No model {name!r} ships with channelfold", nearest(name, models.MODELS))
    model = models.MODELS[name]
    folder = out_dir or Path(tempfile.mkdtemp(prefix="channelfold-demo-"))
    sms, no_engines = _possible(sms)
    original = models.path(model.onnx)
    evaluation = dict(np.load(models.path(model.evaluation)))
    labels = evaluation.pop(model.label)
    record = jobs.compress(
        original,
        folder,
        RECIPE,
        source=jobs.Source(models.path(model.calibration), evaluation),
        sms=sms,
        command=f"demo --model {name}",
        progress=progress,
    )
    files = {"float": original, "int8": folder / "model.onnx"}
    if any(step["pass"] == "reparameterize-ffn" and step["changed"] for step in record["steps"]):
        jobs.reparam(original, folder / "folded.onnx", progress=progress)
        files = {"float": original, "folded": folder / "folded.onnx", "int8": folder / "model.onnx"}
    sessions = {stage: Session(path, timed=True) for stage, path in files.items()}
    logits = {stage: Session(path, exact=True).run(evaluation)[model.output] for stage, path in files.items()}
    sample = {model.input: evaluation[model.input][:1]}
    timed = latencies({stage: lambda s=session: s.run(sample) for stage, session in sessions.items()}, rounds=500)
    record["latency"] = [{"name": f"{t.name}, ONNX Runtime on the CPU", "ms": t.ms} for t in timed]
    record["demo"] = {
        "model": name,
        "description": model.description,
        "stages": [_stage(stage, path, logits[stage], logits["float"], labels) for stage, path in files.items()],
        "samples": len(labels),
        "folder": str(folder),
        "no_engines": no_engines,
    }
    terminal.write_both(record, folder)
    return record


def _stage(name: str, path: Path, logits: np.ndarray, reference: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Figures of one file, from its ``logits`` and those of the float file, float32 [samples, classes]."""
    graph = files.load(path)
    facts, costs = model_facts(path, graph), inspection.costs(graph)
    classes = logits.argmax(axis=1)
    return {
        "name": name,
        "path": str(path),
        "bytes": facts["bytes"],
        "nodes": facts["nodes"],
        "parameters": costs["parameters"],
        "macs": costs["macs"],
        "accuracy": float((classes == labels).mean()),
        "agreement": float((classes == reference.argmax(axis=1)).mean()),
        "snr": None if logits is reference else ErrorSums.of(reference, logits).snr,
    }


def _possible(sms: Sequence[int]) -> tuple[Sequence[int], str]:
    """(SMs to build engines for, ""); without TensorRT no SMs and the reason."""
    try:
        for sm in sms:
            tensorrt.backend(sm)
    except DependencyError as error:
        return (), str(error)
    return sms, ""
