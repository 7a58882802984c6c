"""Latency, memory, costs and weights of models and engines, side by side, and the nodes that take the time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from channelfold.runtime.report.tables import UNKNOWN, Page, count, size, times

_TOP = 20  # nodes that are shown in a terminal

Times = Mapping[str, Sequence[Mapping[str, Any]]]


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
        faster = row["ms"] <= base["ms"]
        cells = (str(row["batch"]), f"{row['ms']:.3f}", spread, (told, "green" if faster else "yellow"))
        rows.append((row["model"], *cells, UNKNOWN if row["memory"] is None else size(row["memory"])))
    page.fill("Latency", (">batch", ">ms", ">middle half", "<", ">memory"), rows)
    page.note(
        f"medians of runs in turns, models in ONNX Runtime, {threads}; memory: peak of a process that runs the model, "
        "beyond an empty one"
    )
    if reason := found.get("unmeasured"):
        page.say((f"engines were not all timed: {reason}", "yellow"))
    page.blank()
    models = {row["model"]: row for row in found["rows"] if "macs" in row}
    costs = [
        (name, size(row["bytes"]), count(row["parameters"]), count(row["macs"]), _weights(row))
        for name, row in models.items()
    ]
    page.fill("Models", (">file", ">parameters", ">MACs per sample", "<weights"), costs)
    if nodes := found.get("nodes"):
        _operators(nodes, page)
        _nodes(nodes, page)


def _weights(row: Mapping[str, Any]) -> str:
    total = sum(row["weights"].values()) or 1
    shown = [f"{kind} {size(taken)}" for kind, taken in row["weights"].items() if taken > total / 200]
    return ", ".join(shown)


def _operators(nodes: Times, page: Page) -> None:
    """Prints the sums by operator, side by side."""
    sums: dict[str, dict[str, float]] = {}
    for model, rows in nodes.items():
        for row in rows:
            own = sums.setdefault(row["op"], {})
            own[model] = own.get(model, 0.0) + row["ms"]
    page.blank()
    ranked = sorted(sums, key=lambda op: -max(sums[op].values()))
    lines = [(op, *(f"{sums[op][model]:.3f}" if model in sums[op] else "" for model in nodes)) for op in ranked]
    lines.append(("all", *(f"{sum(row['ms'] for row in rows):.3f}" for rows in nodes.values())))
    page.fill("ms by operator", [f">{model}" for model in nodes], lines)


def _nodes(nodes: Times, page: Page) -> None:
    """Prints the nodes of every model that take the most time; on a whole page all of them."""
    for model, rows in nodes.items():
        whole = sum(row["ms"] for row in rows) or 1.0
        ranked = sorted(rows, key=lambda row: -row["ms"])
        shown = ranked if page.whole else ranked[:_TOP]
        page.blank()
        lines = [(row["name"], row["op"], f"{row['ms']:.3f}", f"{row['ms'] / whole:.1%}") for row in shown]
        page.fill(f"Nodes of {model}", ("<operator", ">ms", ">share"), lines)
        if left := len(ranked) - len(shown):
            page.note(f"and {left} more; the names are those that ONNX Runtime gives to nodes that it has fused")
