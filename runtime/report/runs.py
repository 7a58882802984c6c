"""Two records side by side: their figures, the options and versions that differ, the nodes treated differently."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from channelfold.runtime.report.tables import UNKNOWN, Page, number, size, times

_NODES = 12


def show(record: Mapping[str, Any], page: Page) -> None:
    """Prints ``runs``, a list of two records: every figure that one of them has, then what differs."""
    first, second = record["runs"]
    page.say(("first   ", "bold"), first.get("command", ""))
    page.say(("second  ", "bold"), second.get("command", ""))
    page.blank()
    sides = [{name: (value, text) for name, value, text in _figures(run)} for run in (first, second)]
    rows = [(name, *(text for _, text in pair), _change(*(value for value, _ in pair))) for name, pair in _both(sides)]
    page.table("Runs", (">first", ">second", ">second against first"), rows)
    for title, of in (("Options", _options), ("Versions", _versions)):
        _differing(title, [of(run) for run in (first, second)], page)
    _nodes([_treated(run) for run in (first, second)], page)


def _both(sides: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[Any]]]:
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        yield name, [side.get(name, (None, UNKNOWN)) for side in sides]


def _figures(run: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Names, numbers (None for words) and texts. Numbers are ratios in dB or shares, in texts that say so, or sizes."""
    file = run.get("output") or run.get("model") or {}
    yield "model", None, file.get("path", "").rpartition("/")[2]
    if "bytes" in file:
        yield "file", file["bytes"], size(file["bytes"])
    for key, name in (("nodes", "nodes"), ("parameters", "parameters"), ("macs", "MACs per sample")):
        if file.get(key) is not None:
            yield name, file[key], f"{file[key]:,}"
    if weights := run.get("weights"):
        yield "weights quantized", None, f"{weights['share']:.1%}"
    if accuracy := run.get("accuracy"):
        yield "verdict", None, accuracy["verdict"]["level"]
        for output in accuracy["outputs"]:
            yield f"{output['name']}: SNR", None, number(output["snr"], "{:.2f} dB")
            agreement = output["equal"] if output["agreement"] is None else output["agreement"]
            yield f"{output['name']}: agreement", None, number(agreement, "{:.2%}")
    for engine in run.get("engines") or ():
        plan = engine["plan"]
        yield f"engine SM {engine['sm']}", engine["bytes"], size(engine["bytes"])
        if plan["readable"]:
            yield f"engine SM {engine['sm']}: runs as int8", None, f"{plan['int8']} of {plan['total']}"
    for entry in run.get("latency") or ():
        yield f"latency of {entry['name']}", entry["ms"], f"{entry['ms']:.3f} ms"
    yield "seconds", None, f"{sum(step['seconds'] for step in run.get('steps') or ()):.1f}"


def _change(first: float | None, second: float | None) -> str:
    return times(first, second, "less", "more") if first and second and first != second else ""


def _differing(title: str, sides: Sequence[Mapping[str, str]], page: Page) -> None:
    pairs = ((name, [side.get(name, UNKNOWN) for side in sides]) for name in dict.fromkeys([*sides[0], *sides[1]]))
    if rows := [(name, *pair) for name, pair in pairs if pair[0] != pair[1]]:
        page.blank()
        page.table(f"{title} that differ", ("<first", "<second"), rows)


def _options(run: Mapping[str, Any]) -> dict[str, str]:
    steps = run.get("steps") or ()
    return {f"{step['pass']} {name}": str(value) for step in steps for name, value in step["options"].items()}


def _versions(run: Mapping[str, Any]) -> dict[str, str]:
    return {"tool": run["tool"], **run.get("environment", {})}


def _treated(run: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """What passes that quantize have done to each node, by its name: {"changed" or "refused": in words}."""
    found: dict[str, dict[str, str]] = {}
    for step in run.get("steps") or ():
        if "quantized" in step["facts"]:
            found |= {change["node"]: {"changed": change["what"]} for change in step["changed"]}
            found |= {one["node"]: {"refused": one["code"] or one["reason"]} for one in step["refused"]}
    return found


def _nodes(sides: Sequence[Mapping[str, Mapping[str, str]]], page: Page) -> None:
    """Prints the nodes that one run has quantized and the other has not."""
    rows = []
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        pair = [side.get(name, {}) for side in sides]
        if pair[0].keys() != pair[1].keys():
            rows.append((name, *(one.get("changed", one.get("refused", UNKNOWN)) for one in pair)))
    if rows:
        page.blank()
        shown = rows if page.whole else rows[:_NODES]
        page.fill("Nodes quantized by one run alone", ("<first", "<second"), shown)
        if len(shown) < len(rows):
            page.note(f"… and {len(rows) - len(shown)} more, on the web page")
