"""The first section of a web page: how good the result is and what it brings, at one look."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from channelfold.runtime.report.accuracy import LEVELS
from channelfold.runtime.report.runs import compared
from channelfold.runtime.report.tables import UNKNOWN, Cell, count, number, size, times
from channelfold.runtime.report.web import Card, Web


def title(record: Mapping[str, Any]) -> tuple[str, Cell]:
    """The command with the model's name, and the verdict."""
    words = str(record.get("command", "")).split()
    model = str((record.get("model") or {}).get("path", "")).rpartition("/")[2]
    name = " ".join([*words[:1], model] if model else words) or record["tool"]
    accuracy = record.get("accuracy")
    if any(not gate["met"] for gate in record.get("gates") or ()):
        return name, ("GATE MISSED", "bold red badge")
    level = accuracy["verdict"]["level"] if accuracy else ""
    return name, (level.upper(), f"{LEVELS.get(level, '')} badge")


def show(record: Mapping[str, Any], body: Web) -> None:
    """Shows the figures of a record that matter most, each with a link to its section."""
    body.cards(list(_cards(record)))
    rows = (record.get("weights") or {}).get("rows", ())
    states: dict[str, int] = {}
    for row in rows:
        states[row["state"]] = states.get(row["state"], 0) + row["bytes"]
    if states:
        body.shares("Weight bytes", sorted(states.items(), key=lambda item: -item[1]))


def _cards(record: Mapping[str, Any]) -> Iterator[Card]:
    if runs := record.get("runs"):
        for name, first, second, difference in compared(*runs):
            if difference:
                yield Card(name, second, f"{first} in the first run, {difference}", section="runs")
    yield from _quality(record)
    yield from _sizes(record)
    for engine in record.get("engines") or ():
        plan = engine["plan"]
        runs = f"{plan['int8']} of {plan['total']} nodes run as int8" if plan["readable"] else plan["reason"]
        sm = "any SM" if engine["sm"] is None else f"SM {engine['sm']}"
        yield Card(f"Engine for {sm}", size(engine["bytes"]), runs, section="engines")
    steps = record.get("steps") or ()
    if steps:
        changed, refused = (sum(len(step[key]) for step in steps) for key in ("changed", "refused"))
        done = f"{refused:,} refused, {sum(step['seconds'] for step in steps):.1f} s"
        yield Card("Changes", f"{changed:,}", done, section="steps")
    if warnings := record.get("warnings"):
        yield Card("Warnings", str(len(warnings)), "", "yellow", "warnings")


def _quality(record: Mapping[str, Any]) -> Iterator[Card]:
    accuracy = record.get("accuracy")
    if accuracy:
        level, reasons = accuracy["verdict"]["level"], accuracy["verdict"]["reasons"]
        yield Card("Verdict", level.upper(), reasons[0] if reasons else accuracy["data"], LEVELS[level], "accuracy")
        floating = [output for output in accuracy["outputs"] if output["snr"] is not None]
        if floating:
            worst = min(floating, key=lambda output: float(output["snr"]))
            several = f", lowest of {len(floating)} outputs" * (len(floating) > 1)
            yield Card("SNR", number(worst["snr"], "{:.2f} dB"), worst["name"] + several, section="accuracy")
        shares = [
            output["equal"] if output["agreement"] is None else output["agreement"] for output in accuracy["outputs"]
        ]
        if known := [share for share in shares if share is not None]:
            yield Card("Agreement", f"{min(known):.2%}", "the same argmax, or equal elements", section="accuracy")
    if gates := record.get("gates"):
        missed = [gate for gate in gates if not gate["met"]]
        told = f"{missed[0]['gate']} {missed[0]['found']}, {missed[0]['wanted']}" if missed else "all met"
        yield Card(
            "Gates", f"{len(gates) - len(missed)} of {len(gates)}", told, "bold red" if missed else "green", "gates"
        )
    if explanation := record.get("explanation"):
        advice = explanation["advice"]
        gain = UNKNOWN if advice is None else f"+{number(advice['gain'], '{:.1f}')} dB"
        told = (
            "no few sites stand out" if advice is None else f"by leaving {len(advice['nodes'])} of the nodes in float"
        )
        yield Card("Can be recovered", gain, told, section="explanation")
    if search := record.get("search"):
        chosen = next(point for point in search["points"] if point["chosen"])
        style = "green" if search["met"] else "bold red"
        found = "limits kept" if search["met"] else "limits MISSED"
        yield Card(f"{search['loss']} lost", f"{(chosen['proof'] or chosen)['loss']:.2%}", found, style, "search")
    if sensitivity := record.get("sensitivity"):
        worst = sensitivity["sites"][0]
        yield Card(
            "Nodes measured", str(len(sensitivity["sites"])), f"worst: {worst['nodes'][0]}", section="sensitivity"
        )
    if lint := record.get("lint"):
        told = f"{lint['warnings']} warnings, {lint['notes']} notes for {lint['target']}"
        yield Card("Errors", str(lint["errors"]), told, "bold red" if lint["errors"] else "green", "lint")


def _sizes(record: Mapping[str, Any]) -> Iterator[Card]:
    before, after = record.get("model") or {}, record.get("output") or {}
    if after:
        smaller = times(before["bytes"], after["bytes"], "smaller", "larger")
        yield Card("File", size(after["bytes"]), f"{size(before['bytes'])} before, {smaller}", section="model")
    for key, label in (("parameters", "Parameters"), ("macs", "MACs per sample")):
        grown = key == "parameters" and after.get(key, 0) >= before.get(key, 0)  # scales are parameters as well
        if before.get(key) and after.get(key) and not grown:
            told = f"{after[key] / before[key]:.1%} of {count(before[key])}"
            yield Card(label, count(after[key]), told, section="model")
    if weights := record.get("weights"):
        yield Card("Weights quantized", f"{weights['share']:.1%}", f"of {size(weights['bytes'])}", section="weights")
    latency = record.get("latency") or ()
    if len(latency) > 1:
        first, last = latency[0], latency[-1]
        told = f"{first['ms']:.3f} ms before, {times(first['ms'], last['ms'], 'faster', 'slower')}"
        yield Card("Latency", f"{last['ms']:.3f} ms", told, section="latency")
