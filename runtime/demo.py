"""The demo: the shipped digits network compressed to int8, its accuracy, size, latency and engines side by side."""

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
from channelfold.passes.base import DependencyError, no_progress
from channelfold.runtime import jobs, report, tensorrt
from channelfold.runtime.bench import latencies
from channelfold.runtime.ort import Session

MODEL = models.MODELS["digits_cnn"]


def run(out_dir: Path | None, sms: Sequence[int], progress: jobs.Progress = no_progress) -> jobs.Record:
    """Runs ``jobs.compress`` on the shipped network and adds ``demo`` and ``latency`` to its record.

    ``demo``: {accuracy: {float, int8} (top-1, 0 to 1), samples, folder, no_engines (why there are none, or "")}.
    """
    folder = out_dir or Path(tempfile.mkdtemp(prefix="channelfold-demo-"))
    sms, no_engines = _possible(sms)
    original = models.path(MODEL.onnx)
    evaluation = dict(np.load(models.path(MODEL.evaluation)))
    labels = evaluation.pop(MODEL.label)
    record = jobs.compress(
        original,
        folder,
        calibration=models.path(MODEL.calibration),
        evaluation=evaluation,
        sms=sms,
        command="demo",
        progress=progress,
    )
    sessions = {"float": Session(original), "int8": Session(folder / "model.onnx")}
    correct = {
        name: session.run(evaluation)[MODEL.output].argmax(axis=1) == labels for name, session in sessions.items()
    }
    sample = {MODEL.input: evaluation[MODEL.input][:1]}
    timed = latencies({name: lambda s=session: s.run(sample) for name, session in sessions.items()}, rounds=500)
    record["latency"] = [{"name": f"{t.name}, ONNX Runtime on the CPU", "ms": t.ms} for t in timed]
    record["demo"] = {
        "accuracy": {name: float(right.mean()) for name, right in correct.items()},
        "samples": len(labels),
        "folder": str(folder),
        "no_engines": no_engines,
    }
    report.write_json(record, folder / "report.json")
    return record


def _possible(sms: Sequence[int]) -> tuple[Sequence[int], str]:
    """The SMs to build for, or none and the reason when there is no TensorRT here."""
    try:
        for sm in sms:
            tensorrt.backend(sm)
    except DependencyError as error:
        return (), str(error)
    return sms, ""


def render(record: Mapping[str, Any], console: Console) -> None:
    """Prints the figures of both networks side by side, and where the files are."""
    demo = record["demo"]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("", "float", "int8"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    table.add_column("", style="dim")
    for row in _rows(record):
        table.add_row(*row)
    console.print(Text.assemble((f"{MODEL.name}: ", "bold"), MODEL.description), highlight=False)
    console.print()
    console.print(table, highlight=False)
    console.print()
    if demo["no_engines"]:
        console.print(Text(f"No engines were built. {demo['no_engines']}", "yellow"), highlight=False)
    for warning in record["warnings"]:
        console.print(Text(f"! {warning}", "yellow"), highlight=False)
    console.print(Text(f"Models, engines and report.json are in {demo['folder']}"), highlight=False, soft_wrap=True)
    console.print(Text("Next: channelfold compress MODEL.onnx -o DIR --calibration SAMPLES.npz"), highlight=False)


def _rows(record: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    demo, before, after = record["demo"], record["model"], record["output"]
    output = record["accuracy"]["outputs"][0]
    accuracy, latency = demo["accuracy"], [entry["ms"] for entry in record["latency"]]
    yield (
        "top-1 accuracy",
        f"{accuracy['float']:.1%}",
        f"{accuracy['int8']:.1%}",
        f"{demo['samples']} samples unseen by calibration",
    )
    yield "same class as float", "", f"{output['agreement']:.1%}", ""
    yield "signal to noise", "", f"{output['snr']:.1f} dB", f"{output['name']}, int8 against float"
    yield "file", _kilobytes(before), _kilobytes(after), f"{before['bytes'] / after['bytes']:.2f}x smaller"
    yield "nodes", str(before["nodes"]), str(after["nodes"]), "BatchNorm folded, QDQ added"
    yield (
        "ONNX Runtime latency",
        f"{latency[0]:.3f} ms",
        f"{latency[1]:.3f} ms",
        "CPU, batch 1; made for TensorRT",
    )
    for engine in record["engines"]:
        plan = engine["plan"]
        runs = f"{plan['int8']} of {plan['total']} nodes run as int8" if plan["readable"] else plan["reason"]
        yield f"engine for SM {engine['sm']}", "", _kilobytes(engine), f"{runs}, {engine['seconds']:.1f} s"


def _kilobytes(file: Mapping[str, Any]) -> str:
    return f"{file['bytes'] / 1e3:.0f} kB"
