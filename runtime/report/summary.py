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
    cards = list(_cards(record))
    if not cards:
        return
    body.section("summary", "Summary")
    body.cards(cards)
    rows = (record.get("weights") or {}).get("rows", ())
    states: dict[str, int] = {}
    for row in rows:
        states[row["state"]] = states.get(row["state"], 0) + row["bytes"]
    if states:
        body.shares("Weight bytes", sorted(states.items(), key=lambda item: -item[1]))


def _cards(record: Mapping[str, Any]) -> Iterator[Card]:
    for name, first, second, difference in compared(*record["runs"]) if record.get("runs") else ():
        if difference:
            yield Card("runs", name, second, f"{first} in the first run, {difference}")
    if accuracy := record.get("accuracy"):
        yield from _accuracy(accuracy)
    yield from _findings(record)
    yield from _sizes(record)
    for engine in record.get("engines") or ():
        plan = engine["plan"]
        runs = f"{plan['int8']} of {plan['total']} nodes run as int8" if plan["readable"] else plan["reason"]
        sm = "any SM" if engine["sm"] is None else f"SM {engine['sm']}"
        yield Card("engines", f"Engine for {sm}", size(engine["bytes"]), runs)
    if steps := record.get("steps"):
        changed, refused = (sum(len(step[key]) for step in steps) for key in ("changed", "refused"))
        seconds = sum(step["seconds"] for step in steps)
        yield Card("steps", "Changes", f"{changed:,}", f"{refused:,} refused, {seconds:.1f} s")
    if warnings := record.get("warnings"):
        yield Card("warnings", "Warnings", str(len(warnings)), style="yellow")


def _accuracy(accuracy: Mapping[str, Any]) -> Iterator[Card]:
    level, reasons = accuracy["verdict"]["level"], accuracy["verdict"]["reasons"]
    yield Card("accuracy", "Verdict", level.upper(), reasons[0] if reasons else accuracy["data"], LEVELS[level])
    outputs = accuracy["outputs"]
    if floating := [output for output in outputs if output["snr"] is not None]:
        worst = min(floating, key=lambda output: float(output["snr"]))
        several = f", lowest of {len(floating)} outputs" * (len(floating) > 1)
        yield Card("accuracy", "SNR", number(worst["snr"], "{:.2f} dB"), worst["name"] + several)
    shares = [output["equal"] if output["agreement"] is None else output["agreement"] for output in outputs]
    if known := [share for share in shares if share is not None]:
        yield Card("accuracy", "Agreement", f"{min(known):.2%}", "the same argmax, or equal elements")


def _findings(record: Mapping[str, Any]) -> Iterator[Card]:
    """Gates, and what an explanation, a search, a measurement of nodes and lint have found."""
    if gates := record.get("gates"):
        missed = [gate for gate in gates if not gate["met"]]
        told = f"{missed[0]['gate']} {missed[0]['found']}, {missed[0]['wanted']}" if missed else "all met"
        met = f"{len(gates) - len(missed)} of {len(gates)}"
        yield Card("gates", "Gates", met, told, "bold red" if missed else "green")
    if explanation := record.get("explanation"):
        advice = explanation["advice"]
        gain = UNKNOWN if advice is None else f"+{number(advice['gain'], '{:.1f}')} dB"
        told = (
            "no few sites stand out" if advice is None else f"by leaving {len(advice['nodes'])} of the nodes in float"
        )
        yield Card("explanation", "Can be recovered", gain, told)
    if search := record.get("search"):
        chosen = next(point for point in search["points"] if point["chosen"])
        told, style = ("limits kept", "green") if search["met"] else ("limits MISSED", "bold red")
        yield Card("search", f"{search['loss']} lost", f"{(chosen['proof'] or chosen)['loss']:.2%}", told, style)
    if sensitivity := record.get("sensitivity"):
        sites = sensitivity["sites"]
        yield Card("sensitivity", "Nodes measured", str(len(sites)), f"worst: {sites[0]['nodes'][0]}" if sites else "")
    if lint := record.get("lint"):
        told = f"{lint['warnings']} warnings, {lint['notes']} notes for {lint['target']}"
        yield Card("lint", "Errors", str(lint["errors"]), told, "bold red" if lint["errors"] else "green")


def _sizes(record: Mapping[str, Any]) -> Iterator[Card]:
    before, after = record.get("model") or {}, record.get("output") or {}
    if after:
        smaller = times(before["bytes"], after["bytes"], "smaller", "larger")
        yield Card("model", "File", size(after["bytes"]), f"{size(before['bytes'])} before, {smaller}")
    for key, label in (("parameters", "Parameters"), ("macs", "MACs per sample")):
        if before.get(key) and after.get(key) and (key == "macs" or after[key] < before[key]):  # scales are parameters
            told = f"{after[key] / before[key]:.1%} of {count(before[key])}"
            yield Card("model", label, count(after[key]), told)
    if weights := record.get("weights"):
        yield Card("weights", "Weights quantized", f"{weights['share']:.1%}", f"of {size(weights['bytes'])}")
    latency = record.get("latency") or ()
    if len(latency) > 1:
        first, last = latency[0], latency[-1]
        told = f"{first['ms']:.3f} ms before, {times(first['ms'], last['ms'], 'faster', 'slower')}"
        yield Card("latency", "Latency", f"{last['ms']:.3f} ms", told)
