"""What is in a model, as tables for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from channelfold.runtime.report import ffns, groups, terminal
from channelfold.runtime.report.names import shorten_all


def render(record: Mapping[str, Any], console: Console) -> None:
    """Prints the record of ``jobs.inspect``: the model, then every linear node."""
    terminal.render(record, console)
    found = record["inspection"]
    linears = found["linears"]
    facts = Table.grid(padding=(0, 2))
    for label, lines in (
        ("inputs", found["inputs"]),
        ("outputs", found["outputs"]),
        ("parameters", [_count(found["parameters"])]),
        ("MACs per sample", [_count(found["macs"])]),
        ("norms", [f"{count} {op}" for op, count in found["norms"].items()]),
        ("external data", [f"{Path(f['path']).name}, {f['bytes']:,} bytes" for f in found["external_data"]]),
        ("could be int8", [f"{sum(linear['quantizable'] for linear in linears)} of {len(linears)} linear nodes"]),
    ):
        for index, line in enumerate(lines):
            facts.add_row(Text(f"  {label}" if index == 0 else ""), Text(line))
    console.print()
    console.print(facts, highlight=False)
    if linears:
        console.print()
        console.print(_linears_table(linears, console.width), highlight=False)
        if "outlier_ratio" in linears[0]:
            words = "  outliers: the largest channel of what a node reads, against the median channel"
            console.print(Text(words, "dim"), highlight=False)
    if "ffns" in record:
        ffns.render(record["ffns"], console)
    if "groups" in record:
        groups.render_groups(record["groups"], console)
    reasons = Counter(linear["reason"] for linear in linears if not linear["quantizable"])
    if reasons:
        console.print()
    for reason, count in reasons.most_common():
        console.print(Text.assemble((f"  {count} x ", "bold"), "not int8: ", reason), highlight=False)


def _linears_table(linears: Sequence[Mapping[str, Any]], width: int) -> Table:
    columns = {
        "op": [linear["op"] for linear in linears],
        "weight": ["x".join(map(str, linear["shape"] or ())) for linear in linears],
        "groups": [str(linear["groups"]) if linear["groups"] != 1 else "" for linear in linears],
        "params": [_count(linear["parameters"]) if linear["shape"] else "" for linear in linears],
        "MACs": [_count(linear["macs"]) for linear in linears],
        "outliers": [terminal.ratio(linear.get("outlier_ratio")) for linear in linears],
        "int8": ["yes" if linear["quantizable"] else "no" for linear in linears],
    }
    columns = {heading: cells for heading, cells in columns.items() if set(cells) - {"", terminal.UNKNOWN}}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(Text("Linear nodes", "bold not dim"), no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="left" if heading in ("op", "weight", "int8") else "right", no_wrap=True)
    taken = sum(max(map(len, (heading, *cells))) + 2 for heading, cells in columns.items())
    names = shorten_all([linear["node"] for linear in linears], max(20, width - taken - 4))
    for name, *cells, int8 in zip(names, *columns.values(), strict=True):
        table.add_row(Text(f"  {name}"), *cells, Text(int8, "green" if int8 == "yes" else "yellow"))
    return table


def _count(number: int | None) -> str:
    """``1.40 M`` for 1398912; a dash for what is not known."""
    if number is None:
        return terminal.UNKNOWN
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.2f} {unit}"
    return str(number)
