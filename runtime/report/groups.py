"""Channel groups as a table for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from channelfold.runtime.report import terminal
from channelfold.runtime.report.names import shorten_all


def render(record: Mapping[str, Any], console: Console) -> None:
    """Prints the record of ``jobs.prune``: the report, then the groups that were cut."""
    terminal.render(record, console)
    for step in record["steps"]:
        if step["pass"] == "prune" and step["facts"].get("groups"):
            _cut(step["facts"], console)


def render_groups(entries: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Prints what ``describe`` found."""
    rows = [
        {
            "channels": f"{e['channels']:,}",
            "prunable": f"{e['prunable']:,}",
            "in": "" if e["units"] == e["channels"] else f"{e['units']:,}",
            "params": f"{e['parameters']:,}",
            "MACs": f"{e['macs']:,}",
            "writers": f"{len(e['writers'])}",
            "readers": f"{len(e['readers'])}",
            "width": "yes" if e["reduced"] else "",
        }
        for e in entries
    ]
    _table("Channel groups", [e["node"] for e in entries], rows, console)
    channels, prunable = (sum(e[key] for e in entries) for key in ("channels", "prunable"))
    share = f", {prunable / channels:.1%}" if channels else ""
    console.print(Text(f"  {prunable:,} of {channels:,} channels can be cut{share}"), highlight=False)
    if any(e["units"] != e["channels"] for e in entries):
        words = (
            "  in: of how many units that go as a whole (heads, the same channel of every group), where not one by one"
        )
        console.print(Text(words, "dim"), highlight=False)
    if any(e["reduced"] for e in entries):
        words = "  width: a norm works on the channels, cut only with --width"
        console.print(Text(words, "dim"), highlight=False)
    stay: Counter[str] = Counter()
    for entry in entries:
        stay.update(entry["stay"])
    for reason, count in stay.most_common():
        console.print(Text.assemble((f"  {count:,} x ", "bold"), "stays: ", reason), highlight=False)


def _cut(facts: Mapping[str, Any], console: Console) -> None:
    rows = [
        {
            "op": g["op"],
            "channels": f"{g['channels']:,}",
            "kept": f"{g['kept']:,}",
            "params saved": f"{g['parameters_saved']:,.0f}",
            "MACs saved": f"{g['macs_saved']:,.0f}",
        }
        for g in facts["groups"]
    ]
    _table("Cut", [g["node"] for g in facts["groups"]], rows, console)
    for kind, words in (("macs", "MACs"), ("parameters", "parameters")):
        before, after = facts[kind]["before"], facts[kind]["after"]
        share = f", {after / before:.1%} kept" if before else ""
        console.print(Text(f"  {words}: {before:,.0f} -> {after:,.0f}{share}"), highlight=False)
    if "latency" in facts:
        console.print(Text(f"  time in ONNX Runtime: {facts['latency']['kept']:.1%} kept"), highlight=False)
    for name, error in facts.get("output_error", {}).items():
        console.print(Text(f"  error of {name!r} on calibration data: {error:.2%} of its variance"), highlight=False)
    proof = facts["slice_equals_mask"]
    if proof and "max_rel_error" in proof:
        refitted = "; what reads the rest was refitted afterwards" if facts["statistics"] else ""
        words = (
            f"  The cut equals the same channels silenced, to {proof['max_rel_error']:.1e} on {proof['probes']} probes"
        )
        console.print(Text(f"{words}{refitted}"), highlight=False)
    elif proof:
        console.print(Text(f"  The cut was not proven: {proof['unverified']}", "yellow"), highlight=False)


def _table(heading: str, names: Sequence[str], rows: Sequence[Mapping[str, str]], console: Console) -> None:
    console.print()
    if not rows:
        console.print("  No channel group was found.", highlight=False)
        return
    kept = [column for column in rows[0] if any(row[column] for row in rows)]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(Text(heading, "bold not dim"), no_wrap=True)
    for column in kept:
        table.add_column(column, justify="left" if column == "op" else "right", no_wrap=True)
    taken = sum(max(len(column), *(len(row[column]) for row in rows)) + 2 for column in kept)
    shown = shorten_all(list(names), max(20, console.width - taken - 4))
    for name, row in zip(shown, rows, strict=True):
        table.add_row(Text(f"  {name}"), *(row[column] for column in kept))
    console.print(table, highlight=False)
