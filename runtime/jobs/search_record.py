"""The record of a search.

``record["search"]``: {loss: what it is, options, limits, met, samples: {sensitivity, steering, proof}, runs: {what for:
of the whole network, on one sample}, resumed (how many of them), kappa_db, points: [{bytes, cost, latency,
latency_predicted, start, type, options: {option: share of the weights}, predicted_db, error_db, snr_db, agreement,
loss, low, high, proof (the same figures on other samples, or null), chosen}], sites: [{nodes, option, bytes, cost,
snr_db, better: null or {option, snr_db, and how much more bytes and cost}}], file (the figures of the written file on
the samples of the proof, with its bytes, its latency: {value, low, high, how} or null, and whether it has met the
limits)}. Bytes of a point are those of its file, nearly; cost and latency are relative to float, latency is null
without a limit of time; ``start`` names the variant of the network, if it is one; ``type`` is that of what stays float.
``better`` is the cheapest of the better options.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from channelfold.passes.layers.output_error import SAMPLES, decibels
from channelfold.passes.layers.sensitivity import Crew, Site
from channelfold.passes.layers.switchboard import FLOAT
from channelfold.passes.search import options as choices
from channelfold.passes.search.choice import Choice
from channelfold.passes.search.proof import Figures, undominated


def told(work: Choice, chosen: Figures, start: str, kind: str) -> dict[str, Any]:
    """The record of the search on one network, called ``start``, where what stays float is of the type ``kind``."""
    limits = dataclasses.asdict(work.limits)
    ratios = [f.error / f.point.predicted for f in work.measured if f.point.predicted > 0 and f.error > 0]
    return {
        "loss": work.steering.kind,
        "options": [FLOAT, *choices.OPTIONS],
        "limits": {name: limit for name, limit in limits.items() if limit is not None},
        "met": work.met(chosen),
        "samples": {
            "sensitivity": min(SAMPLES, len(work.steering.files)),
            "steering": len(work.steering.files),
            "proof": len(work.proof.files),
        },
        "kappa_db": float(10 * np.log10(np.median(ratios))) if ratios else 0.0,
        "points": [
            _told_point(work, figures, chosen) | {"start": start, "type": kind}
            for figures in _front(work.measured, chosen)
        ],
        "sites": [_told_choice(s, o) for s, o in zip(work.sites, chosen.point.options, strict=True) if s.nodes],
    }


def _front(found: Sequence[Figures], chosen: Figures) -> list[Figures]:
    """The front, with the chosen point, which others may beat where no point keeps the limits."""
    kept = undominated(found)
    return sorted(kept if chosen in kept else [*kept, chosen], key=lambda figures: -figures.point.cost)


def _told_point(work: Choice, figures: Figures, chosen: Figures) -> dict[str, Any]:
    point, shares = figures.point, dict[str, float]()
    chosen_of = [(site, option) for site, option in zip(work.sites, point.options, strict=True) if site.nodes]
    whole = sum(site.sizes[FLOAT] for site, _ in chosen_of)
    for site, option in chosen_of:
        shares[option] = shares.get(option, 0.0) + site.sizes[FLOAT] / whole
    proof = work.proved.get(point)
    return {
        "bytes": point.size,
        "cost": point.cost,
        "latency": work.times.get(point),
        "latency_predicted": work.latency.share(point.options) if work.latency else None,
        "options": shares,
        "predicted_db": decibels(point.predicted),
        **shown(figures),
        "proof": shown(proof) if proof else None,
        "chosen": point == chosen.point,
    }


def told_float(found: Figures, start: str, kind: str) -> dict[str, Any]:
    """A network called ``start`` that is all of the type ``kind``, as a point."""
    told = {"bytes": found.point.size, "cost": found.point.cost, "latency": None, "latency_predicted": None}
    told |= {"options": {FLOAT: 1.0}, "predicted_db": decibels(found.error), **shown(found)}
    return told | {"proof": None, "chosen": False, "start": start, "type": kind}


def shown(found: Figures) -> dict[str, Any]:
    told = {name: getattr(found, name) for name in ("agreement", "loss", "low", "high")}
    told["agreement"] = None if math.isnan(found.agreement) else found.agreement
    return {"error_db": decibels(found.error), "snr_db": found.snr, **told}


def _told_choice(site: Site, option: str) -> dict[str, Any]:
    """The option of a site, and the cheapest of the better ones: what it would cost, and what it would buy."""

    def told(name: str, beside: str = "") -> dict[str, Any]:
        size, cost = site.sizes[name], site.costs[name]
        if beside:
            size, cost = size - site.sizes[beside], cost - site.costs[beside]
        return {"option": name, "bytes": size, "cost": cost, "snr_db": decibels(site.errors.get(name, 0.0))}

    better = [o for o in site.options() if site.errors.get(o, 0.0) < site.errors.get(option, 0.0)]
    following = min(better, key=lambda o: (site.costs[o], site.errors.get(o, 0.0)), default=None)
    return {"nodes": list(site.nodes), **told(option), "better": told(following, option) if following else None}


def together(best: dict[str, Any], records: Sequence[dict[str, Any]], crew: Crew) -> dict[str, Any]:
    """The record of the best network with the points of all, without those that others beat."""
    points = [p | {"chosen": p["chosen"] and other is best} for other in records for p in other["points"]]
    points.sort(key=lambda p: (p["cost"], -p["error_db"]))
    kept = [p for i, p in enumerate(points) if p["chosen"] or all(q["error_db"] < p["error_db"] for q in points[:i])]
    return best | {"points": kept[::-1], "runs": dict(crew.runs), "resumed": crew.resumed}
