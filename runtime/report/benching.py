"""Latency, memory, costs and weights of models, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from channelfold.runtime.report.tables import Page, count, size, times


def show(record: Mapping[str, Any], page: Page) -> None:
    """Prints ``bench`` of a record; every model is compared with the first at the same batch."""
    found = record["bench"]
    threads = f"threads: {found['threads'] or 'all'}"
    first: dict[int, Mapping[str, Any]] = {}
    rows = []
    for row in found["rows"]:
        base = first.setdefault(row["batch"], row)
        told = "" if row is base else times(base["ms"], row["ms"], "faster", "slower")
        spread = f"{row['low']:.3f} – {row['high']:.3f}"
        cells = (
            str(row["batch"]),
            f"{row['ms']:.3f}",
            spread,
            (told, "green" if row["ms"] <= base["ms"] else "yellow"),
        )
        rows.append((row["model"], *cells, size(row["memory"])))
    page.fill("ONNX Runtime", (">batch", ">ms", ">middle half", "<", ">memory"), rows)
    page.note(
        f"medians of runs in turns, {threads}; memory: peak of a process that runs the model, beyond an empty one"
    )
    page.blank()
    models = {row["model"]: row for row in found["rows"]}
    costs = [
        (name, size(row["bytes"]), count(row["parameters"]), count(row["macs"]), _weights(row))
        for name, row in models.items()
    ]
    page.fill("Models", (">file", ">parameters", ">MACs per sample", "<weights"), costs)


def _weights(row: Mapping[str, Any]) -> str:
    total = sum(row["weights"].values()) or 1
    shown = [f"{kind} {size(taken)}" for kind, taken in row["weights"].items() if taken > total / 200]
    return ", ".join(shown)
