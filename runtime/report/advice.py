"""What to do next where a result is not good enough, from what the record says was done."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from channelfold.runtime.report.costs import ratios
from channelfold.runtime.report.tables import Page

_FEW = 64  # calibration samples below which more of them are worth a try
_NOISE = 3.0  # dB that exact arithmetic must be better for this machine to be the cause
_SMOOTHING = ("smooth", "smooth-activations", "equalize", "split-merge", "reorder-channels", "rotate")


def next_steps(record: Mapping[str, Any]) -> list[str]:
    """Sentences, the most promising first, on a result whose verdict is not ok or that has missed a gate."""
    return list(_steps(record, {step["pass"]: step for step in record["steps"] if step["changed"]}))


def _steps(record: Mapping[str, Any], done: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    data = record["data"].get("calibration") or ""
    quantized = done.get("quantize")
    weights = done.get("quantize-weights")
    if "random" in data:
        yield "Calibrate on real samples (--calibration): ranges of random data mean nothing"
    if _saturates(record):
        yield "Take weights of 7 bits (--reduce-range on): products of 8 bits saturate on this processor"
    if any(done) and record["command"] != "diff" and record.get("output"):
        yield f"See which nodes lose most, and what leaving them in float recovers: {_diff(record)}"
    searched = bool(record.get("search"))
    if quantized and not searched and not any(name.startswith(_SMOOTHING) for name in done):
        yield "Smooth before quantizing: channelfold compress --recipe int8-smooth"
    if quantized and not searched and not quantized["options"].get("float_share"):
        yield "Let the nodes that lose most stay in float: --float-share 0.05"
    if weights and weights["options"].get("rounder") not in ("gptq", "descent"):
        yield "Round the weights by GPTQ: --rounder gptq, with calibration data"
    if weights and weights["options"].get("weights") == "int4" and (weights["options"].get("group") or 128) > 32:
        yield "Let fewer weights share a scale: --group 32"
    if "prune" in done:
        yield "Cut less: a larger --keep-macs or --keep-params, or --tolerance"
    if "approximate-ffn" in done:
        yield "Keep more of the hidden channels: a larger --keep-hidden"
    yield from faster(record)
    count = data.split(" ", 1)[0]
    if quantized and count.isdigit() and int(count) < _FEW and "random" not in data:
        yield f"Calibrate on more than {count} samples"


def faster(record: Mapping[str, Any]) -> Iterator[str]:
    """A sentence on a file quantized for ONNX Runtime that is slower than float."""
    options = [step["options"] for step in record["steps"] if step["pass"] == "quantize" and step["changed"]]
    slow = len(times := record.get("latency", ())) == 2 and times[1]["ms"] > times[0]["ms"]
    if slow and any(o.get("target") == "onnxruntime" and not o.get("profile") for o in options):
        yield "Let the nodes that run slower in int8 than in float stay in float: --profile"


def slower(engine: Mapping[str, Any]) -> str:
    """A sentence on an int8 engine that launches more kernels than one of the given model; "" where none is slower."""
    given, cost = engine.get("float"), engine["cost"]
    if not given or cost["kernels"] <= given["kernels"]:
        return ""
    found = {card: pair for card, pair in ratios(given, cost).items() if pair[0] < 1}
    if not found:
        return ""
    times = ", ".join(f"{low:.2f} to {high:.2f} ({card})" for card, (low, high) in found.items())
    kernels = f"{cost['kernels']} kernels, where one of the given model launches {given['kernels']}"
    return f"{Path(engine['path']).name} launches {kernels}: modelled, it is {times} times as fast, so it may be slower"


def lighter(record: Mapping[str, Any]) -> Iterator[str]:
    """Sentences on an int8 engine that may be slower than one of float."""
    done = {step["pass"] for step in record["steps"] if step["changed"]}
    sms = " ".join(f"--sm {engine['sm']}" for engine in record["engines"] if engine["sm"] and slower(engine))
    if "cast" not in done:
        yield "Compare with float16, whose engine launches fewer kernels: --recipe fp16, or int8-fp16 for a transformer"
    yield f"Search the nodes whose int8 pays on this GPU: --max-latency 0.9 {sms}"


def _saturates(record: Mapping[str, Any]) -> bool:
    accuracy = record.get("accuracy") or {}
    pairs = zip(accuracy.get("outputs", ()), (accuracy.get("exact") or {}).get("outputs", ()), strict=False)
    known = ((here["snr"], there["snr"]) for here, there in pairs)
    return any(isinstance(a, float) and isinstance(b, float) and b - a > _NOISE for a, b in known)


def _diff(record: Mapping[str, Any]) -> str:
    paths = (shlex.quote(str(record[side]["path"])) for side in ("model", "output"))
    return f"channelfold diff {' '.join(paths)} --data DATA --explain"


def show(record: Mapping[str, Any], page: Page) -> None:
    """Prints ``next`` of a record."""
    page.say(("What to do next", "bold"), indent=0)
    for sentence in record["next"]:
        page.grid([("-", sentence)], gap=1)
