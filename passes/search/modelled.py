"""The time of the nodes of every site in TensorRT, by a model of a GPU and the plans of engines, built without it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from channelfold.passes.layers.owners import nearest
from channelfold.passes.search.latency import Timed
from channelfold.runtime.engine.plan import PlanReport
from channelfold.runtime.engine.repair import plan_of
from channelfold.runtime.engine.roofline import Card, bounds, cards
from channelfold.runtime.errors import BuildError, UsageError
from channelfold.runtime.io import files
from channelfold.runtime.io.session import Feed


def card_of(sm: int) -> Card:
    """The GPU of an architecture whose figures are known. Raises UsageError where none are."""
    found = cards(sm)
    if not found:
        raise UsageError(f"No GPU of SM {sm} is known here", "Leave --max-latency out")
    return found[0]


def modelled(
    paths: Mapping[str, Path], sites: Sequence[Sequence[str]], sm: int, data: Iterable[Feed]
) -> dict[str, Timed]:
    """The upper bounds of the times of engines of files with ``sites``, for the shapes in ``data``.

    A kernel belongs to the first site that it computes a node of; one without such a node, as a quantizer that TensorRT
    has not fused, to the nearest site (``owners.nearest``). Raises BuildError where TensorRT builds no engine
    whose plan is readable.
    """
    card, found = card_of(sm), {}
    places = {name: place for place, names in enumerate(sites) for name in names}
    for name, path in paths.items():
        graph = files.load(path)
        plan = plan_of(graph, sm, data)
        around, times = nearest(graph, places), [0.0] * len(sites)
        for kernel in plan.kernels:
            place = next((of[node] for of in (places, around) for node in kernel.nodes if node in of), None)
            if place is not None:
                times[place] += bounds([kernel], card).most * 1e3
        found[name] = Timed(milliseconds(plan, card, path.name), times)
    return found


def milliseconds(plan: PlanReport, card: Card, name: str) -> float:
    """The upper bound of the time of an engine of a model; raises BuildError where its plan does not tell."""
    if not plan.kernels:
        raise BuildError(f"The time of {name} cannot be modelled: {plan.reason}", "Leave --max-latency out")
    return sum(bounds([kernel], card).most * 1e3 for kernel in plan.kernels)
