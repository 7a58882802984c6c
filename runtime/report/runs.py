"""Two records side by side: their figures, the options and versions that differ, the nodes treated differently."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from channelfold.runtime.report.tables import UNKNOWN, Page, number, size, times, told

T = TypeVar("T")
_NODES = 12


class Figure(NamedTuple):
    """A figure of a run as a text; ``value`` and what a difference of two such values is in: "x", "dB", "points"."""

    text: str
    value: Any = None
    unit: str = ""


def show(record: Mapping[str, Any], page: Page) -> None:
    """Prints ``runs``, a list of two records: every figure that one of them has, then what differs."""
    first, second = record["runs"]
    page.say(("first   ", "bold"), first.get("command", ""))
    page.say(("second  ", "bold"), second.get("command", ""))
    page.blank()
    page.table("Runs", (">first", ">second", ">second against first"), compared(first, second))
    for title, sides in (
        ("Options that differ", (_options(first, second), _options(second, first))),
        ("Versions that differ", (_versions(first), _versions(second))),
    ):
        rows = [(name, *pair) for name, *pair in _both(*sides, UNKNOWN) if pair[0] != pair[1]]
        if rows:
            page.blank()
            page.table(title, ("<first", "<second"), rows)
    _nodes(first, second, page)


def compared(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(name, first, second, difference) of every figure that one of two runs has, as texts."""
    sides = dict(_figures(first)), dict(_figures(second))
    return [(name, a.text, b.text, _difference(a, b)) for name, a, b in _both(*sides, Figure(UNKNOWN))]


def _both(first: Mapping[str, T], second: Mapping[str, T], missing: T) -> Iterator[tuple[str, T, T]]:
    for name in dict.fromkeys([*first, *second]):
        yield name, first.get(name, missing), second.get(name, missing)


def _figures(run: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    file = run.get("output") or run.get("model") or {}
    yield "model", Figure(file.get("path", "").rpartition("/")[2])
    if "bytes" in file:
        yield "file", Figure(size(file["bytes"]), file["bytes"], "x")
    for key in ("nodes", "parameters", "macs"):
        if file.get(key) is not None:
            yield {"macs": "MACs per sample"}.get(key, key), Figure(f"{file[key]:,}", file[key], "x")
    if weights := run.get("weights"):
        yield "weights quantized", Figure(f"{weights['share']:.1%}", weights["share"], "points")
    if accuracy := run.get("accuracy"):
        yield "verdict", Figure(accuracy["verdict"]["level"])
        for output in accuracy["outputs"]:
            yield f"{output['name']}: SNR", Figure(number(output["snr"], "{:.2f} dB"), output["snr"], "dB")
            agreement = output["equal"] if output["agreement"] is None else output["agreement"]
            yield f"{output['name']}: agreement", Figure(number(agreement, "{:.2%}"), agreement, "points")
    for engine in run.get("engines") or ():
        plan = engine["plan"]
        yield f"engine SM {engine['sm']}", Figure(size(engine["bytes"]), engine["bytes"], "x")
        if cost := engine.get("cost"):
            yield f"engine SM {engine['sm']}: kernels", Figure(str(cost["kernels"]), cost["kernels"], "x")
            yield f"engine SM {engine['sm']}: traffic", Figure(size(cost["traffic"]), cost["traffic"], "x")
        if plan["readable"]:
            yield f"engine SM {engine['sm']}: runs as int8", Figure(f"{plan['int8']} of {plan['total']}")
    for entry in run.get("latency") or ():
        yield f"latency of {entry['name']}", Figure(f"{entry['ms']:.3f} ms", entry["ms"], "x")
    seconds = sum(step["seconds"] for step in run.get("steps") or ())
    yield "seconds", Figure(f"{seconds:.1f}", seconds, "x")


def _difference(first: Figure, second: Figure) -> str:
    a, b = first.value, second.value
    if not (isinstance(a, int | float) and isinstance(b, int | float)) or first.text == second.text:
        return ""
    if first.unit == "x":
        return times(a, b, "less", "more") if a and b else ""
    return f"{b - a:+.2f} dB" if first.unit == "dB" else f"{100 * (b - a):+.2f} points"


def _options(run: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, str]:
    """The passes of a run, and the options of those that the other run has as well."""
    shared = {step["pass"] for step in other.get("steps") or ()}
    found = {}
    for step in run.get("steps") or ():
        name, options = step["pass"], step["options"] if step["pass"] in shared else {}
        found |= {name: "runs"} | {f"{name} --{key.replace('_', '-')}": told(value) for key, value in options.items()}
    return found


def _versions(run: Mapping[str, Any]) -> dict[str, str]:
    return {"tool": run["tool"], **run.get("environment", {})}


def _treated(run: Mapping[str, Any]) -> dict[str, tuple[bool, str]]:
    """Whether passes that quantize have changed a node, and their words, by its name."""
    found: dict[str, tuple[bool, str]] = {}
    for step in run.get("steps") or ():
        if "quantized" in step["facts"]:
            found |= {one["node"]: (False, one["code"] or one["reason"]) for one in step["refused"]}
            found |= {change["node"]: (True, change["what"]) for change in step["changed"]}
    return found


def _nodes(first: Mapping[str, Any], second: Mapping[str, Any], page: Page) -> None:
    """Prints the nodes that one run has quantized and the other has not."""
    pairs = _both(_treated(first), _treated(second), (False, UNKNOWN))
    rows = [(name, a[1], b[1]) for name, a, b in pairs if a[0] != b[0]]
    if rows:
        page.blank()
        shown = rows if page.whole else rows[:_NODES]
        page.fill("Nodes quantized by one run alone", ("<first", "<second"), shown)
        if len(shown) < len(rows):
            page.note(f"… and {len(rows) - len(shown)} more, on the web page")
