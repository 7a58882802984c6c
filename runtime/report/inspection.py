"""What is in a model, as tables for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from channelfold.runtime.report import ffns, groups, terminal
from channelfold.runtime.report.tables import UNKNOWN, Page, count, ratio


def render(record: Mapping[str, Any], console: Console) -> None:
    """Prints the record of ``jobs.inspect``: the model, then every linear node."""
    terminal.render(record, console)
    page, found = Page(console), record["inspection"]
    linears = found["linears"]
    page.blank()
    facts = (
        ("inputs", found["inputs"]),
        ("outputs", found["outputs"]),
        ("parameters", [count(found["parameters"])]),
        ("MACs per sample", [count(found["macs"])]),
        ("norms", [f"{number} {op}" for op, number in found["norms"].items()]),
        ("external data", [f"{Path(f['path']).name}, {f['bytes']:,} bytes" for f in found["external_data"]]),
        ("could be int8", [f"{sum(linear['quantizable'] for linear in linears)} of {len(linears)} linear nodes"]),
    )
    page.grid([("" if index else label, line) for label, lines in facts for index, line in enumerate(lines)])
    if linears:
        page.blank()
        _linears(linears, page)
    if "ffns" in record:
        ffns.show(record["ffns"], page)
    if "groups" in record:
        groups.show(record["groups"], page)
    reasons = Counter(linear["reason"] for linear in linears if not linear["quantizable"])
    if reasons:
        page.blank()
    for reason, times in reasons.most_common():
        page.say((f"{times} x ", "bold"), "not int8: ", reason)


def _linears(linears: Sequence[Mapping[str, Any]], page: Page) -> None:
    columns = {
        "<op": [linear["op"] for linear in linears],
        "<weight": ["x".join(map(str, linear["shape"] or ())) for linear in linears],
        ">groups": [str(linear["groups"]) if linear["groups"] != 1 else "" for linear in linears],
        ">params": [count(linear["parameters"]) if linear["shape"] else "" for linear in linears],
        ">MACs": [count(linear["macs"]) for linear in linears],
        ">outliers": [ratio(linear.get("outlier_ratio")) for linear in linears],
        "<int8": [("yes", "green") if linear["quantizable"] else ("no", "yellow") for linear in linears],
    }
    columns = {heading: cells for heading, cells in columns.items() if set(cells) - {"", UNKNOWN}}
    page.fill(
        "Linear nodes",
        list(columns),
        [(linear["node"], *cells) for linear, *cells in zip(linears, *columns.values(), strict=True)],
    )
    if "outlier_ratio" in linears[0]:
        page.note("outliers: the largest channel of what a node reads, against the median channel")
