"""Channel groups as a table for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from channelfold.runtime.report import terminal
from channelfold.runtime.report.tables import Page


def render(record: Mapping[str, Any], console: Console) -> None:
    """Prints the record of ``jobs.prune``: the report, then the groups that were cut."""
    terminal.render(record, console)
    for step in record["steps"]:
        if step["pass"] == "prune" and step["facts"].get("groups"):
            _cut(step["facts"], Page(console))


def show(entries: Sequence[Mapping[str, Any]], page: Page) -> None:
    """Prints ``groups`` of the record of ``jobs.inspect``."""
    page.blank()
    if not entries:
        page.say("No channel group was found.")
        return
    columns = (">channels", ">prunable", ">in", ">params", ">MACs", ">writers", ">readers", ">width")
    page.fill("Channel groups", columns, list(map(_row, entries)))
    channels, prunable = (sum(entry[key] for entry in entries) for key in ("channels", "prunable"))
    share = f", {prunable / channels:.1%}" if channels else ""
    page.say(f"{prunable:,} of {channels:,} channels can be cut{share}")
    if any(entry["units"] != entry["channels"] for entry in entries):
        page.note(
            "in: of how many units that go as a whole (heads, the same channel of every group), where not one by one"
        )
    if any(entry["reduced"] for entry in entries):
        page.note("width: a norm works on the channels, cut only with --width")
    stay: Counter[str] = Counter()
    for entry in entries:
        stay.update(entry["stay"])
    for reason, count in stay.most_common():
        page.say((f"{count:,} x ", "bold"), "stays: ", reason)


def _row(entry: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        entry["node"],
        f"{entry['channels']:,}",
        f"{entry['prunable']:,}",
        "" if entry["units"] == entry["channels"] else f"{entry['units']:,}",
        f"{entry['parameters']:,}",
        f"{entry['macs']:,}",
        f"{len(entry['writers'])}",
        f"{len(entry['readers'])}",
        "yes" if entry["reduced"] else "",
    )


def _cut(facts: Mapping[str, Any], page: Page) -> None:
    figures = ("channels", "kept", "parameters_saved", "macs_saved")
    rows = [(group["node"], group["op"], *(f"{group[key]:,.0f}" for key in figures)) for group in facts["groups"]]
    page.blank()
    page.fill("Cut", ("<op", ">channels", ">kept", ">params saved", ">MACs saved"), rows)
    for kind, words in (("macs", "MACs"), ("parameters", "parameters")):
        before, after = facts[kind]["before"], facts[kind]["after"]
        share = f", {after / before:.1%} kept" if before else ""
        page.say(f"{words}: {before:,.0f} -> {after:,.0f}{share}")
    if "latency" in facts:
        page.say(f"time in ONNX Runtime: {facts['latency']['kept']:.1%} kept")
    for name, error in facts.get("output_error", {}).items():
        page.say(f"error of {name!r} on calibration data: {error:.2%} of its variance")
    proof = facts["slice_equals_mask"]
    if proof and "max_rel_error" in proof:
        refitted = "; what reads the rest was refitted afterwards" if facts["statistics"] else ""
        error = f"{proof['max_rel_error']:.1e} on {proof['probes']} probes"
        page.say(f"The cut equals the same channels silenced, to {error}{refitted}")
    elif proof:
        page.say((f"The cut was not proven: {proof['unverified']}", "yellow"))
