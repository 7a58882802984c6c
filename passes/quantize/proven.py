"""Which sites the target computes in int8 once their QDQ nodes are in, tried on copies of the graph.

onnxruntime  the graph that its optimizer leaves is read (``runtime.stats.fusions``)
tensorrt     an engine is built and read back (``runtime.engine.plan``), where the option ``verify_plan`` asks for it

A site that stays float inside its QDQ nodes loses accuracy and time and gains nothing, so its nodes are taken back.
Without them others may fuse differently: the rest is tried again, until all of it is int8. Products of two activations
are taken back as well where the engine launches more kernels with them in int8 than in float.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Outcome
from channelfold.passes.layers.linear import Linear, linears
from channelfold.passes.quantize.qdq import Inserter
from channelfold.runtime.engine.repair import plan_of
from channelfold.runtime.errors import BuildError, ModelError
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import infer_shapes
from channelfold.runtime.io.snapshot import Snapshot
from channelfold.runtime.stats.fusions import EXPANDS, readers_of_integers

_EXPANDED = "ONNX Runtime would expand its int8 weight to float on every call"


class Site(Protocol):
    """A linear, or a product of two activations."""

    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=Site)
Insert = Callable[[gs.Graph, list[T]], Inserter]
WhyFloat = Callable[[gs.Graph, Sequence[T]], dict[str, str]]


def by_name(graph: gs.Graph) -> dict[str, Linear]:
    """The linears of a graph by name."""
    return {linear.name: linear for linear in linears(graph)}


def in_int8(
    graph: gs.Graph,
    sites: list[T],
    outcome: Outcome,
    insert: Insert[T],
    why_float: WhyFloat[T],
    find: Callable[[gs.Graph], Mapping[str, T]] = by_name,
) -> tuple[list[T], Inserter]:
    """The sites that are int8 once ``insert`` has put QDQ nodes around them alone, and the inserter of the last copy.

    The others are refused for the reason that ``why_float`` gives by name of the site. ``find``: the sites of a copy.
    """
    ops = {node.name: node.op for node in graph.nodes}
    before = Snapshot.of(graph)
    while True:
        trial = before.graph()
        infer_shapes(trial)
        views = find(trial)
        tried = [views[site.name] for site in sites]
        inserter = insert(trial, tried)
        inserter.finish()
        edit.remove_dead(trial)
        lost = why_float(trial, tried) if tried else {}
        for site in sites:
            if reason := lost.get(site.name):
                outcome.refuse(site.name, f"{ops[site.name]} stays float: {reason}", reason)
        sites = [site for site in sites if site.name not in lost]
        if not lost:
            return sites, inserter


def expanded(outcome: Outcome) -> WhyFloat[Linear]:
    """Finds the sites whose weight ONNX Runtime would expand to float on every call."""

    def why_float(graph: gs.Graph, sites: Sequence[Linear]) -> dict[str, str]:
        try:
            readers = readers_of_integers(graph)
        except ModelError as error:
            outcome.warnings.append(f"Which nodes ONNX Runtime computes in integers is not known: {error}")
            return {}
        behind = {site.name: edit.producer(site.node.inputs[site.weight_input]) for site in sites}
        return {
            name: _EXPANDED for name, node in behind.items() if node and EXPANDS in readers.get(node.inputs[0].name, ())
        }

    return why_float


def planned(sm: int, ctx: Context, outcome: Outcome, than: gs.Graph | None = None) -> WhyFloat[Site]:
    """Finds the sites that an engine for ``sm`` computes in float.

    All are found where the engine launches more kernels than that of the graph ``than``.
    """

    def why_float(graph: gs.Graph, sites: Sequence[Site]) -> dict[str, str]:
        try:
            plan = plan_of(graph, sm, ctx.data, ctx.progress)
            reason = plan.reason
        except (BuildError, ModelError) as error:
            plan, reason = None, str(error)
        if plan is None or not plan.readable:
            outcome.warnings.append(f"Which nodes the engine computes in int8 is not known: {reason}")
            return {}
        runs = {site.name: plan.nodes[site.name].arithmetic for site in sites if site.name in plan.nodes}
        lost = {
            name: f"the engine for SM {sm} computes it in {kind} behind its QDQ nodes"
            for name, kind in runs.items()
            if kind not in ("int8", "unknown")
        }
        if than is None or lost:
            return lost
        before, after = len(plan_of(than, sm, ctx.data, ctx.progress).kernels), len(plan.kernels)
        more = f"the engine for SM {sm} launches {after} kernels with int8 products, {before} without"
        return {site.name: more for site in sites} if after > before else {}

    return why_float
