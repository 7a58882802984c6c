"""The FFNs of a model as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from channelfold.runtime.report.names import shorten_all


def render(entries: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Prints what ``idle`` found."""
    console.print()
    if not entries:
        console.print("  No FFN was found.", highlight=False)
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(Text("FFNs", "bold not dim"), no_wrap=True)
    rows = [_row(entry) for entry in entries]
    for heading in rows[0]:
        table.add_column(heading, justify="right", no_wrap=True)
    taken = sum(max(len(heading), *(len(row[heading]) for row in rows)) + 2 for heading in rows[0])
    names = shorten_all([entry["node"] for entry in entries], max(20, console.width - taken - 4))
    for name, row in zip(names, rows, strict=True):
        table.add_row(Text(f"  {name}"), *row.values())
    console.print(table, highlight=False)
    total, folded = (sum(entry[key] for entry in entries) for key in ("weights", "folded"))
    if folded < total:
        words = (
            f"  Folding the idle channels leaves {folded / total:.1%} of these weights and MACs: channelfold reparam"
        )
        console.print(Text(words), highlight=False)


def _row(entry: Mapping[str, Any]) -> dict[str, str]:
    row = {name: f"{entry[name]:,}" for name in ("hidden", "idle", "dead")}
    if "linear" in entry:
        row["linear"] = f"{entry['linear']:,}"
    row |= {"weights": f"{entry['weights']:,}", "folded": f"{entry['folded'] / entry['weights']:.1%}"}
    for share in entry.get("shares", ()):
        heading = f"{share['share']:.0%} idle"
        snr = share["snr"] if isinstance(share["snr"], str) else f"{share['snr']:.0f} dB"
        row[heading] = f"{share['weights'] / entry['weights']:.1%}, {snr}"
    return row
