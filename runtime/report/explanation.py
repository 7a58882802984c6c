"""Where the error of a model comes from: the worst sites, the error along the depth, what to leave in float."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from channelfold.runtime.report.tables import Page, number

_SITES = 12
_EXACT = 100.0  # dB


def show(record: Mapping[str, Any], page: Page) -> None:
    """Prints ``explanation`` of a record."""
    found = record["explanation"]
    sites = found["sites"]
    page.say(("Where the error comes from", "bold"), f"  {_summary(found)}", indent=0)
    columns = ("<op", ">alone dB", ">share", ">own dB", ">so far dB")
    shown = sites if page.whole else sites[:_SITES]
    page.fill("Sites", columns, [(site["node"], *_figures(site)) for site in shown])
    if len(shown) < len(sites):
        page.note(f"… and {len(sites) - len(shown)} more, with --json")
    page.note(
        "alone: SNR of the outputs with the error of this site alone; own: at its end, from the original's values;"
    )
    page.note("so far: at its end, from its own values")
    depth = [(point["node"], point["snr"]) for point in found["depth"]]
    page.curve("SNR in dB along the depth", "dB", {"": list(itertools.dropwhile(_exact, depth))})
    _advice(found, page)


def _exact(point: tuple[str, Any]) -> bool:
    """Whether a point lies in front of the first error beyond that of rounding to float32."""
    return point[1] == "inf" or (isinstance(point[1], float) and point[1] > _EXACT)


def _summary(found: Mapping[str, Any]) -> str:
    covered = f"{found['covered']} of {found['linears']} products" if found["linears"] else "no products"
    return (
        f"{found['aligned']} tensors of both models are the same, {covered} in between; {found['samples']} samples, "
        f"{number(found['snr'], '{:.1f}')} dB"
    )


def _figures(site: Mapping[str, Any]) -> tuple[str, ...]:
    share = "" if site["share"] is None else f"{site['share']:.1%}"
    return (
        site["op"],
        number(site["snr"], "{:.1f}"),
        share,
        *(number(site[k], "{:.1f}") for k in ("own_snr", "so_far_snr")),
    )


def _advice(found: Mapping[str, Any], page: Page) -> None:
    rows = [(f"the first {row['sites']}", number(row["snr"], "{:.1f}")) for row in found["restored"]]
    if rows:
        page.blank()
        page.table("SNR in dB with the original in place of", (">",), rows)
    advice = found["advice"]
    if advice is None:
        page.say("No few sites stand out: smooth first, calibrate on more data, or take more bits")
        return
    gain = number(advice["gain"], "{:.1f}")
    nodes = len(advice["nodes"])
    what = f"these {nodes} nodes" if nodes != 1 else "this node"
    page.say((f"Leaving {what} in float recovers {gain} dB:", "bold"))
    page.nodes([(name, "") for name in advice["nodes"]], _SITES)
    if advice["command"]:
        page.say(advice["command"], wrap=False)
