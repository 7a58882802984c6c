"""The record of the demo, as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from channelfold.runtime.report.tables import Page


def show(record: Mapping[str, Any], page: Page) -> None:
    """Prints the figures of the stages side by side, and the folder of the files."""
    demo = record["demo"]
    page.say((f"{demo['model']}: ", "bold"), demo["description"], indent=0)
    page.blank()
    rows = [(*figures, (remark, "dim")) for *figures, remark in _rows(record)]
    page.table("", [*(f">{stage['name']}" for stage in demo["stages"]), "<"], rows, indent=0)
    page.blank()
    if demo["no_engines"]:
        page.say((f"No engines were built. {demo['no_engines']}", "yellow"), indent=0)
    for warning in record["warnings"]:
        page.say((f"! {warning}", "yellow"), indent=0)
    page.say(f"Models, engines and report.json are in {demo['folder']}", indent=0, wrap=False)
    page.say("Next: channelfold compress MODEL.onnx -o DIR --calibration SAMPLES.npz", indent=0)


def _rows(record: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    demo, stages = record["demo"], record["demo"]["stages"]
    first, *changed = stages
    folded, last = len(changed) > 1, stages[-1]
    output, names = record["accuracy"]["outputs"][0]["name"], [stage["name"] for stage in changed]
    unseen = f"{demo['samples']} samples unseen by calibration"
    yield "top-1 accuracy", *(f"{stage['accuracy']:.1%}" for stage in stages), unseen
    yield "same class as float", "", *(f"{stage['agreement']:.1%}" for stage in changed), ""
    against = f"{output}, {' and '.join(names)} against float"
    yield "signal to noise", "", *(f"{stage['snr']:.1f} dB" for stage in changed), against
    yield "file", *map(_kilobytes, stages), f"{first['bytes'] / last['bytes']:.2f}x smaller"
    yield "nodes", *(str(stage["nodes"]) for stage in stages), _what_was_done(record, folded)
    if folded:
        yield "parameters", *(f"{stage['parameters'] / 1e3:.1f} k" for stage in stages), "int8: with its scales"
        yield "MACs", *(f"{stage['macs'] / 1e6:.2f} M" for stage in stages), "a sample"
    times = (f"{entry['ms']:.3f} ms" for entry in record["latency"])
    yield "ONNX Runtime latency", *times, "CPU, batch 1; int8 is made for TensorRT"
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
