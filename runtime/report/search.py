"""A search and the sensitivities of nodes, as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from channelfold.runtime.report.tables import UNKNOWN, Page, number, size

_DB = "{:.1f}"
_EXACT = 299  # dB: no error at all
_OFF = 3  # dB between what was predicted and what was measured, from which on a prediction is no help


def show(record: Mapping[str, Any], page: Page) -> None:
    """Prints the front, and what was chosen for every site."""
    found = record["search"]
    names = [name for name in found["options"] if any(name in point["options"] for point in found["points"])]
    rows = [_point(point, names) for point in found["points"]]
    columns = (
        *(">cost", ">latency", ">predicted", "<start", "<float is"),
        *(f">{name}" for name in names),
        ">predicted dB",
        "<",
        ">error dB",
        ">SNR dB",
        ">agree",
        ">lost",
    )
    drawn = [point for point in found["points"] if point["error_db"] < _EXACT]
    told = (f"{size(point['bytes'])}, {number(point['error_db'], _DB)} dB, {_loss(point)} lost" for point in drawn)
    places = [(100 * p["cost"], p["error_db"], words, p["chosen"]) for p, words in zip(drawn, told, strict=True)]
    page.points("The front: each point is a model", "cost in % of float", "error dB", places)
    page.table("Front", (*columns, "<on other samples", "<"), rows)
    samples = found["samples"]
    if off := sum(map(_is_off, found["points"])):
        share = f"{off} of {len(found['points'])} predictions are off by over {_OFF} dB"
        page.note(f"{share}: errors do not add up there, and better points may be missing; every point was measured")
    page.note(
        "bytes of the file; cost, latency: relative to float; float, int8 …: share of the weights; worst output: SNR"
    )
    page.note(f"measured on {samples['steering']} samples, proved on {samples['proof']} others, with intervals of 95 %")
    chosen = next(point for point in found["points"] if point["chosen"])
    shown = chosen["proof"] or chosen
    verdict = ("kept", "green") if found["met"] else ("MISSED", "bold red")
    if found["limits"]:
        limits = ", ".join(f"{name.replace('_', '-')} {limit:g}" for name, limit in found["limits"].items())
        page.say(("limits: ", "bold"), limits, ", ", verdict)
    page.say((f"{found['loss']} lost: ", "bold"), f"{_loss(shown)} on the samples of the proof")
    if time := (found.get("file") or {}).get("latency"):
        spread = f"{time['low']:.1%} to {time['high']:.1%}"
        page.say(("the written file: ", "bold"), f"{time['value']:.1%} of float's time ({spread}), {time['how']}")
    limit = found["limits"].get("max_loss")
    if limit is not None and found["met"] and shown["high"] > limit:
        page.say(
            (
                f"{samples['proof']} samples cannot promise a loss of {limit:.1%}: more evaluation data narrow it",
                "yellow",
            )
        )
    sites = sorted(found["sites"], key=lambda site: site["snr_db"])
    columns = ("<option", ">bytes", ">cost", ">dB alone", "<next better", ">cost more", ">bytes more", ">dB then")
    page.fill("Nodes", columns, [(_names(site), *_site(site)) for site in sites])
    page.note("dB alone: at the outputs where these nodes alone have the option; next better: the cheapest one that is")


def _point(point: Mapping[str, Any], names: list[str]) -> tuple[Any, ...]:
    shares = (f"{point['options'][name]:.0%}" if name in point["options"] else "" for name in names)
    proof = point["proof"]
    told = f"{number(proof['snr_db'], _DB)} dB, {_loss(proof)}" if proof else ""
    agreement = number(point["agreement"], "{:.1%}")
    return (
        size(point["bytes"]),
        f"{point['cost']:.1%}",
        "" if point["latency"] is None else f"{point['latency']:.0%}",
        "" if point.get("latency_predicted") is None else f"{point['latency_predicted']:.0%}",
        point.get("start", ""),
        point.get("type", ""),
        *shares,
        number(point["predicted_db"], _DB),
        ("off", "yellow") if _is_off(point) else "",
        *(number(point[key], _DB) for key in ("error_db", "snr_db")),
        agreement,
        f"{point['loss']:.2%}",
        told,
        ("chosen", "green") if point["chosen"] else "",
    )


def _is_off(point: Mapping[str, Any]) -> bool:
    """Whether errors do not add up in a point. Only without any error nothing is predicted."""
    return point["error_db"] < _EXACT and abs(point["predicted_db"] - point["error_db"]) > _OFF


def _loss(point: Mapping[str, Any]) -> str:
    return f"{point['loss']:.2%} ({point['low']:.2%} to {point['high']:.2%})"


def _names(site: Mapping[str, Any]) -> str:
    more = len(site["nodes"]) - 1
    return site["nodes"][0] + (f" and {more} more" if more else "")


def _site(site: Mapping[str, Any]) -> tuple[str, ...]:
    better = site["better"]
    told = ("", "", "", "")
    if better:
        told = (better["option"], f"{better.get('cost', 0):+.2%}", f"{better['bytes']:+,}", _db(better["snr_db"]))
    return (site["option"], size(site["bytes"]), f"{site.get('cost', 0):.2%}", _db(site["snr_db"]), *told)


def _db(value: float) -> str:
    return UNKNOWN if value >= _EXACT else f"{value:.1f}"


def show_sensitivity(record: Mapping[str, Any], page: Page) -> None:
    """Prints the error of every node and option, from the largest."""
    found = record["sensitivity"]
    names = list(found["additive"])
    columns = [f"<{heading}" if heading == "op" else f">{heading}" for heading in
               ("op", "bytes", *(f"{name} {what}" for name in names for what in ("dB", "worst", "share")))]  # fmt: skip
    rows = [(_names(site), site["op"], size(site["bytes"]), *_options(site, names)) for site in found["sites"]]
    page.fill("Sensitivity", columns, rows)
    page.note(f"error of {', '.join(found['outputs'])} where one node has the option, on {found['samples']} samples; "
              "worst: on one sample; share: of the sum of all nodes")  # fmt: skip
    for name, pair in found["additive"].items():
        page.say((f"{name}: ", "bold"), f"the nodes add up to {pair['sum_db']:.1f} dB, all together measure "
                 f"{pair['measured_db']:.1f} dB")  # fmt: skip


def _options(site: Mapping[str, Any], names: list[str]) -> list[str]:
    cells = []
    for name in names:
        option = site["options"].get(name)
        cells += [_db(option["snr_db"]), _db(option["worst_db"]), f"{option['share']:.1%}"] if option else ["", "", ""]
    return cells
