"""The FFNs of a model as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from channelfold.runtime.report.tables import Page


def show(entries: Sequence[Mapping[str, Any]], page: Page) -> None:
    """Prints ``ffns`` of the record of ``jobs.inspect``."""
    page.blank()
    if not entries:
        page.say("No FFN was found.")
        return
    rows = [_row(entry) for entry in entries]
    named = [(entry["node"], *row.values()) for entry, row in zip(entries, rows, strict=True)]
    page.fill("FFNs", [f">{heading}" for heading in rows[0]], named)
    total, folded = (sum(entry[key] for entry in entries) for key in ("weights", "folded"))
    if folded < total:
        share = f"{folded / total:.1%}"
        page.say(f"Folding the idle channels leaves {share} of these weights and MACs: channelfold reparam")


def _row(entry: Mapping[str, Any]) -> dict[str, str]:
    counted = (name for name in ("hidden", "idle", "dead", "linear", "weights") if name in entry)
    row = {name: f"{entry[name]:,}" for name in counted}
    row["folded"] = f"{entry['folded'] / entry['weights']:.1%}"
    for share in entry.get("shares", ()):
        snr = share["snr"] if isinstance(share["snr"], str) else f"{share['snr']:.0f} dB"
        row[f"{share['share']:.0%} idle"] = f"{share['weights'] / entry['weights']:.1%}, {snr}"
    return row
