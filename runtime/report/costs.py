"""What engines compute and move, side by side, and how their times compare by a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from channelfold.runtime.report.tables import UNKNOWN, Page, count, size

Engine = Mapping[str, Any]


def show(engines: Sequence[Engine], page: Page) -> None:
    """Prints the costs of engines whose plans tell them; on a whole page also every kernel."""
    known = [one for engine in engines for one in (*_given(engine), engine) if one.get("cost")]
    if not known:
        return
    page.blank()
    columns = (">kernels", ">only quantize", ">MACs", "<", ">traffic", ">constants", "<activations")
    page.fill("Engines do", columns, [(_name(engine), *_costs(engine["cost"])) for engine in known])
    page.note("traffic: bytes that kernels read and write in one run, of constants and activations, from the plan")
    if unmeasured := {_name(engine): engine["cost"]["unmeasured"] for engine in known}:
        for name, kernels in unmeasured.items():
            if kernels:
                page.say((f"{name}: the sizes of {kernels} kernels are not known; they count as nothing", "yellow"))
    _modelled(known, page)
    if page.whole:
        for engine in known:
            if engine.get("kernels"):
                columns = ("<computes in", ">MACs", ">traffic", "<nodes")
                page.fill(f"Kernels of {_name(engine)}", columns, _kernels(engine))


def _given(engine: Engine) -> list[Engine]:
    """The engine of the model as it was given, beside that of its quantized form."""
    return [{"path": "as given", "sm": engine["sm"], "cost": engine["float"]}] if engine.get("float") else []


def ratios(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, list[float]]:
    """By card, how many times as fast as the first of two costs the second one is, by both bounds; 0: not known."""
    theirs = {row["card"]: row for row in first["modelled"]}
    return {
        mine["card"]: sorted(
            theirs[mine["card"]][bound] / mine[bound] if mine[bound] else 0 for bound in ("least", "most")
        )
        for mine in second["modelled"]
    }


def _name(engine: Engine) -> str:
    return Path(engine["path"]).name


def _costs(cost: Mapping[str, Any]) -> tuple[str, ...]:
    macs = cost["macs"]
    return (
        str(cost["kernels"]),
        str(cost["quantizing"] or ""),
        count(sum(macs.values())),
        _shares(macs),
        size(cost["traffic"]),
        size(cost["constants"]),
        _shares(cost["activations"]),
    )


def _shares(parts: Mapping[str, int]) -> str:
    whole = sum(parts.values()) or 1
    return ", ".join(f"{name} {part / whole:.0%}" for name, part in parts.items() if part > whole / 200)


def _modelled(engines: Sequence[Engine], page: Page) -> None:
    """Prints how many times as fast as the first engine for its GPU each other engine is, by both bounds."""
    firsts: dict[Any, Engine] = {}
    pairs = []
    for engine in engines:
        first = firsts.setdefault(engine["sm"], engine)
        if first is not engine:
            pairs.append((first, engine))
    rows = []
    for first, engine in pairs:
        for card, both in ratios(first["cost"], engine["cost"]).items():
            rows.append((_name(engine), _name(first), card, *(f"{r:.2f}x" if r else UNKNOWN for r in both)))
    if rows:
        page.blank()
        page.fill("Modelled, not measured", ("<against", "<on", ">from", ">to times as fast"), rows)
        page.note("a roofline: peak rates of the data sheet, with all data in the cache or all in memory")


def _kernels(engine: Engine) -> list[tuple[str, ...]]:
    return [
        (row["name"], row["arithmetic"], count(row["macs"]) if row["macs"] else "", size(row["traffic"]),
         ", ".join(row["nodes"]))
        for row in engine["kernels"]
    ]  # fmt: skip
