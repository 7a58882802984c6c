"""The contents of a model, as tables for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from channelfold.runtime.report.tables import UNKNOWN, Page, count, ratio


def show(record: Mapping[str, Any], page: Page) -> None:
    """Prints the record of ``jobs.inspect``: the model, then every linear node, FFN and group of channels."""
    found = record["inspection"]
    linears = found["linears"]
    ones = found["macs"] and found.get("ones")
    facts = (
        ("inputs", found["inputs"]),
        ("outputs", found["outputs"]),
        ("parameters", [count(found["parameters"])]),
        ("MACs per sample", [count(found["macs"]) + (" with 1 for open sizes" if ones else "")]),
        ("norms", [f"{number} {op}" for op, number in found["norms"].items()]),
        ("external data", [f"{Path(f['path']).name}, {f['bytes']:,} bytes" for f in found["external_data"]]),
        ("could be int8", [f"{sum(linear['quantizable'] for linear in linears)} of {len(linears)} linear nodes"]),
    )
    page.grid([("" if index else label, line) for label, lines in facts for index, line in enumerate(lines)])
    if linears:
        page.blank()
        _linears(linears, page)
    if "ffns" in record:
        _ffns(record["ffns"], page)
    if "groups" in record:
        show_groups(record["groups"], page)
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
    nodes = [linear["node"] for linear in linears]
    page.fill("Linear nodes", list(columns), list(zip(nodes, *columns.values(), strict=True)))
    if "outlier_ratio" in linears[0]:
        page.note("outliers: the largest channel of the input of a node against the median channel")


def _ffns(entries: Sequence[Mapping[str, Any]], page: Page) -> None:
    page.blank()
    if not entries:
        page.say("No FFN was found.")
        return
    rows = [_ffn(entry) for entry in entries]
    page.fill("FFNs", [f">{heading}" for heading in rows[0]][1:], [tuple(row.values()) for row in rows])
    total, folded = (sum(entry[key] for entry in entries) for key in ("weights", "folded"))
    if folded < total:
        share = f"{folded / total:.1%}"
        page.say(f"Folding the idle channels leaves {share} of these weights and MACs: channelfold reparam")


def _ffn(entry: Mapping[str, Any]) -> dict[str, str]:
    counted = (name for name in ("hidden", "idle", "dead", "linear", "weights") if name in entry)
    row = {"node": entry["node"]} | {name: f"{entry[name]:,}" for name in counted}
    row["folded"] = f"{entry['folded'] / entry['weights']:.1%}"
    for share in entry.get("shares", ()):
        snr = share["snr"] if isinstance(share["snr"], str) else f"{share['snr']:.0f} dB"
        row[f"{share['share']:.0%} idle"] = f"{share['weights'] / entry['weights']:.1%}, {snr}"
    return row


def show_groups(entries: Sequence[Mapping[str, Any]], page: Page) -> None:
    """Prints the channels that can be cut together."""
    page.blank()
    if not entries:
        page.say("No channel group was found.")
        return
    columns = (">channels", ">prunable", ">in", ">params", ">MACs", ">writers", ">readers", ">width")
    page.fill("Channel groups", columns, [(entry["node"], *_group(entry)) for entry in entries])
    channels, prunable = (sum(entry[key] for entry in entries) for key in ("channels", "prunable"))
    share = f", {prunable / channels:.1%}" if channels else ""
    page.say(f"{prunable:,} of {channels:,} channels can be cut{share}")
    if any(entry["units"] != entry["channels"] for entry in entries):
        page.note("in: of how many units that go as a whole (heads, the same channel of every group)")
    if any(entry["reduced"] for entry in entries):
        page.note("width: a norm works on the channels, cut only with --width")
    stay = sum((Counter(entry["stay"]) for entry in entries), Counter())
    for reason, channels in stay.most_common():
        page.say((f"{channels:,} x ", "bold"), "stays: ", reason)


def _group(entry: Mapping[str, Any]) -> tuple[str, ...]:
    counted = ("channels", "prunable", "units", "parameters", "macs")
    channels, prunable, units, *costs = (f"{entry[key]:,}" for key in counted)
    ends = (str(len(entry[key])) for key in ("writers", "readers"))
    return channels, prunable, "" if units == channels else units, *costs, *ends, "yes" if entry["reduced"] else ""
