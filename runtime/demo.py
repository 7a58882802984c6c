"""The demo: a shipped network compressed to int8, its accuracy, size, latency and engines side by side.

A network with idle FFN channels (RePaViT) is shown in between as well: folded, but not yet quantized.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from channelfold import models
from channelfold.passes.base import DependencyError, UsageError, nearest, no_progress
from channelfold.runtime import graph_io, inspection, jobs, report, tensorrt
from channelfold.runtime.bench import latencies
from channelfold.runtime.metrics import ErrorSums
from channelfold.runtime.ort import Session

RECIPE = "int8-reparam"


def run(
    name: str, out_dir: Path | None = None, sms: Sequence[int] = (), progress: jobs.Progress = no_progress
) -> jobs.Record:
    """Runs ``jobs.compress`` on the shipped network ``name`` and adds ``demo`` and ``latency`` to its record.

    ``demo``: {model, stages: [{name, path, bytes, nodes, parameters, macs, accuracy (top-1, 0 to 1), agreement (with
    the classes of float, 0 to 1), snr (dB; null for float)}], samples, folder, no_engines (why there are none, or "")}.
    The stages are ``float``, ``folded`` (where channels were idle) and ``int8``.

    Raises UsageError when no network of that name ships.
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
        calibration=models.path(model.calibration),
        evaluation=evaluation,
        sms=sms,
        command=f"demo --model {name}",
        progress=progress,
    )
    files = {"float": original, "int8": folder / "model.onnx"}
    if any(step["pass"] == "reparameterize-ffn" and step["changed"] for step in record["steps"]):
        jobs.reparam(original, folder / "folded.onnx", progress=progress)
        files = {"float": original, "folded": folder / "folded.onnx", "int8": folder / "model.onnx"}
    sessions = {stage: Session(path) for stage, path in files.items()}
    logits = {stage: session.run(evaluation)[model.output] for stage, session in sessions.items()}
    sample = {model.input: evaluation[model.input][:1]}
    timed = latencies({stage: lambda s=session: s.run(sample) for stage, session in sessions.items()}, rounds=500)
    record["latency"] = [{"name": f"{t.name}, ONNX Runtime on the CPU", "ms": t.ms} for t in timed]
    record["demo"] = {
        "model": name,
        "stages": [_stage(stage, path, logits[stage], logits["float"], labels) for stage, path in files.items()],
        "samples": len(labels),
        "folder": str(folder),
        "no_engines": no_engines,
    }
    report.write_json(record, folder / "report.json")
    return record


def _stage(name: str, path: Path, logits: np.ndarray, reference: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Figures of one file; ``logits`` and ``reference`` (those of the float file) are float32 [samples, classes]."""
    graph = graph_io.load(path)
    facts, costs = inspection.model_facts(path, graph), inspection.costs(graph)
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
    """The SMs to build for, or none and the reason when there is no TensorRT here."""
    try:
        for sm in sms:
            tensorrt.backend(sm)
    except DependencyError as error:
        return (), str(error)
    return sms, ""


def render(record: Mapping[str, Any], console: Console) -> None:
    """Prints the figures of the networks side by side, and where the files are."""
    demo, model = record["demo"], models.MODELS[record["demo"]["model"]]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("", *(stage["name"] for stage in demo["stages"])):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    table.add_column("", style="dim")
    for row in _rows(record):
        table.add_row(*row)
    console.print(Text.assemble((f"{model.name}: ", "bold"), model.description), highlight=False)
    console.print()
    console.print(table, highlight=False)
    console.print()
    if demo["no_engines"]:
        console.print(Text(f"No engines were built. {demo['no_engines']}", "yellow"), highlight=False)
    for warning in record["warnings"]:
        console.print(Text(f"! {warning}", "yellow"), highlight=False)
    console.print(Text(f"Models, engines and report.json are in {demo['folder']}"), highlight=False, soft_wrap=True)
    console.print(Text("Next: channelfold compress MODEL.onnx -o DIR --calibration SAMPLES.npz"), highlight=False)


def _rows(record: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    demo, stages = record["demo"], record["demo"]["stages"]
    first, *changed = stages
    folded, last = len(changed) > 1, stages[-1]
    output, names = record["accuracy"]["outputs"][0]["name"], [stage["name"] for stage in changed]
    yield (
        "top-1 accuracy",
        *(f"{stage['accuracy']:.1%}" for stage in stages),
        f"{demo['samples']} samples unseen by calibration",
    )
    yield "same class as float", "", *(f"{stage['agreement']:.1%}" for stage in changed), ""
    yield (
        "signal to noise",
        "",
        *(f"{stage['snr']:.1f} dB" for stage in changed),
        f"{output}, {' and '.join(names)} against float",
    )
    yield "file", *map(_kilobytes, stages), f"{first['bytes'] / last['bytes']:.2f}x smaller"
    yield "nodes", *(str(stage["nodes"]) for stage in stages), _what_was_done(record, folded)
    if folded:
        yield "parameters", *(f"{stage['parameters'] / 1e3:.1f} k" for stage in stages), "int8: with its scales"
        yield "MACs", *(f"{stage['macs'] / 1e6:.2f} M" for stage in stages), "a sample"
    yield (
        "ONNX Runtime latency",
        *(f"{entry['ms']:.3f} ms" for entry in record["latency"]),
        "CPU, batch 1; int8 is made for TensorRT",
    )
    for engine in record["engines"]:
        plan = engine["plan"]
        runs = f"{plan['int8']} of {plan['total']} nodes run as int8" if plan["readable"] else plan["reason"]
        blank = [""] * (len(stages) - 1)
        yield f"engine for SM {engine['sm']}", *blank, _kilobytes(engine), f"{runs}, {engine['seconds']:.1f} s"


def _what_was_done(record: Mapping[str, Any], folded: bool) -> str:
    norms = "BatchNormalization" in record["model"]["ops"]
    gone = [name for name, present in (("BatchNorm", norms), ("idle channels", folded)) if present]
    return ", ".join([f"{' and '.join(gone)} folded"] * bool(gone) + ["QDQ added"])


def _kilobytes(file: Mapping[str, Any]) -> str:
    return f"{file['bytes'] / 1e3:.0f} kB"
