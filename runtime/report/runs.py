"""Two records side by side: what each figure is in the one and in the other run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from channelfold.runtime.report.tables import UNKNOWN, Page, number, size


def show(record: Mapping[str, Any], page: Page) -> None:
    """Prints ``runs``, a list of two records: every figure that one of them has."""
    first, second = record["runs"]
    page.say(("first   ", "bold"), first.get("command", ""))
    page.say(("second  ", "bold"), second.get("command", ""))
    page.blank()
    sides = [dict(_figures(run)) for run in (first, second)]
    names = dict.fromkeys([*sides[0], *sides[1]])
    rows = [(name, *(side.get(name, UNKNOWN) for side in sides)) for name in names]
    page.table("Runs", (">first", ">second"), rows)


def _figures(run: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    file = run.get("output") or run.get("model") or {}
    yield "model", file.get("path", "").rpartition("/")[2]
    if "bytes" in file:
        yield "file", size(file["bytes"])
    for key, form in (("nodes", "{}"), ("parameters", "{:,}"), ("macs", "{:,}")):
        if key in file:
            yield {"macs": "MACs per sample"}.get(key, key), form.format(file[key])
    if weights := run.get("weights"):
        yield "weights quantized", f"{weights['share']:.1%}"
    if accuracy := run.get("accuracy"):
        yield "verdict", accuracy["verdict"]["level"]
        for output in accuracy["outputs"]:
            yield f"{output['name']}: SNR", number(output["snr"], "{:.2f} dB")
            agreement = output["equal"] if output["agreement"] is None else output["agreement"]
            yield f"{output['name']}: agreement", number(agreement, "{:.2%}")
    for engine in run.get("engines", ()):
        plan = engine["plan"]
        yield f"engine SM {engine['sm']}", size(engine["bytes"])
        if plan["readable"]:
            yield f"engine SM {engine['sm']}: runs as int8", f"{plan['int8']} of {plan['total']}"
    for entry in run.get("latency", ()):
        yield f"latency of {entry['name']}", f"{entry['ms']:.3f} ms"
    yield "seconds", f"{sum(step['seconds'] for step in run.get('steps', ())):.1f}"
