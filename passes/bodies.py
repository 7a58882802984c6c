"""One pass, applied to a graph and to every body of If, Loop and Scan in it.

A body is a graph of its own (``runtime.io.bodies``) with data of its own: what reaches it when the model around it, as
it was before the pass, runs on the data of the context. A pass does not know that it works in a body.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Change, Context, Outcome, Pass, Refusal
from channelfold.passes.operators import operator
from channelfold.passes.verify import Verdict, Verifier, Violation
from channelfold.runtime.data.bodies import reaching
from channelfold.runtime.data.sources import Data
from channelfold.runtime.errors import ChannelfoldError, ModelError
from channelfold.runtime.io.bodies import Body, bodies, located, share_constants
from channelfold.runtime.io.convert import all_graphs
from channelfold.runtime.io.files import session
from channelfold.runtime.io.snapshot import Snapshot

NEVER = "its body never ran on the calibration data"


def apply_everywhere(step: Pass, graph: gs.Graph, ctx: Context) -> Outcome:
    """Applies a pass to a graph, then to the bodies that are left. Equal weights of two parts become one at the end."""
    data = data_inside(graph, ctx.calibration) if step.inside and ctx.calibration is not None else {}
    ctx = dataclasses.replace(ctx, shared=_shared(graph))
    outcome = step.apply(graph, ctx)
    for body in bodies(graph) if step.inside else ():
        _take(outcome, _inside(step, body, ctx, data), body.place)
    if outcome.changed:
        share_constants(graph)
    return outcome


def _shared(graph: gs.Graph) -> frozenset[int]:
    """The ids of the values that nodes of more than one part read."""
    seen: dict[int, set[int]] = {}
    for part in all_graphs(graph):
        for tensor in (t for node in part.nodes for t in node.inputs if isinstance(t, gs.Constant)):
            seen.setdefault(id(tensor._values), set()).add(id(part))
    return frozenset(key for key, parts in seen.items() if len(parts) > 1)


def verify_bodies(before: Snapshot, after: Snapshot, probes: Data, seed: int) -> Iterator[tuple[str, Verdict]]:
    """(place, verdict) of every body that an exact pass has changed: the body itself, before and after.

    A body runs on what reaches it on ``probes`` of the whole model. A branch that no probe takes runs on what would
    reach it, or else on random inputs. Raises Violation.
    """
    old, new = gs.Graph(), gs.Graph()
    if not any(attribute.HasField("g") for node in before.model.graph.node for attribute in node.attribute):
        return
    before.restore(old)
    after.restore(new)
    pending = [(*pair, probes) for pair in _pairs(bodies(old), bodies(new))]
    while pending:
        was, now, outer = pending.pop()
        data = reaching(was, outer, always=True)
        pending += [(*pair, data) for pair in _pairs(was.bodies(), now.bodies())]
        with was.apart() as first, now.apart() as second:
            read = {tensor.name for tensor in second.inputs}
            if read - {tensor.name for tensor in first.inputs}:
                continue  # the graph around it has changed as well, and is verified as a whole
            second.inputs = [*second.inputs, *(tensor for tensor in first.inputs if tensor.name not in read)]
            pair = Snapshot.of(first), Snapshot.of(second)
        if not pair[0].same(pair[1]):
            try:
                yield was.place, Verifier(data if len(probes) else None, seed).verify(*pair)
            except Violation as error:
                raise Violation(f"{error} in {was.place}", error.tensor, error.node, error.error) from None


def _pairs(before: list[Body], after: list[Body]) -> list[tuple[Body, Body]]:
    """The bodies that have the same place."""
    known = {body.place: body for body in after}
    return [(body, known[body.place]) for body in before if body.place in known]


def data_inside(graph: gs.Graph, data: Data) -> dict[int, Data]:
    """What reaches every body when the graph as it is now runs on ``data``, by the id of the graph of the body."""
    found: dict[int, Data] = {}
    here = bodies(graph)
    pending = [(*pair, data) for pair in zip(here, bodies(Snapshot.of(graph).graph()) if here else [], strict=True)]
    while pending:
        body, copy, outer = pending.pop()
        found[id(body.graph)] = reaching(copy, outer)
        pending += [(*pair, found[id(body.graph)]) for pair in zip(body.bodies(), copy.bodies(), strict=True)]
    return found


def _inside(step: Pass, body: Body, ctx: Context, data: dict[int, Data]) -> Outcome:
    """Applies a pass to a body, and to the bodies in it."""
    mine, why = data.get(id(body.graph)), ""
    if ctx.calibration is not None and (why := _why_not_run(body, mine)):
        mine = None
    try:
        if why and step.needs_data:
            return _refused(step, body, why)
        with body.apart() as graph:
            outcome = step.apply(graph, dataclasses.replace(ctx, calibration=mine, keep=None))
    except ChannelfoldError:
        if not why:
            raise
        return _refused(step, body, why)
    for inner in body.bodies():
        _take(outcome, _inside(step, inner, ctx, data), inner.place)
    return outcome


def runs_on(body: Body, data: Data | None) -> Data | None:
    """The data, where the body runs on them."""
    return None if _why_not_run(body, data) else data


def _why_not_run(body: Body, data: Data | None) -> str:
    """Why a body has not run on the data, or cannot run by itself; empty where it runs."""
    try:
        feed = next(iter(data or ()), None)
        if feed is None:
            return NEVER
        with body.apart() as graph:
            opened = session(graph, optimize=False)
        opened.run(opened.accepted(feed))
    except ModelError as error:
        return str(error)
    return ""


def _refused(step: Pass, body: Body, why: str) -> Outcome:
    outcome = Outcome(facts=step.left(body.graph))
    for node in (node for part in all_graphs(body.graph) for node in part.nodes):
        held = [t for t in node.inputs if isinstance(t, gs.Constant) and t.dtype is not None]
        size = sum(int(np.prod(t.shape)) * np.dtype(t.dtype).itemsize for t in held)
        if operator(node).weights and size:
            outcome.refuse(node.name, f"{node.op} stays as it is: {why} ({size:,} bytes)", why)
    return outcome


def _take(outcome: Outcome, other: Outcome, place: str) -> None:
    """Adds the outcome in a body to that of the graph around it: counts add up, nodes are named with the place."""
    outcome.changed += [Change(located(change.node, place), change.what) for change in other.changed]
    outcome.refused += [Refusal(located(one.node, place), one.reason, one.code) for one in other.refused]
    outcome.warnings += [text for text in other.warnings if text not in outcome.warnings]
    _join(outcome.facts, other.facts, place)


def _join(facts: dict[str, Any], others: Mapping[str, Any], place: str) -> None:
    for key, value in others.items():
        old = facts.get(key)
        if isinstance(value, list) and isinstance(old, list) and all(type(v) is int for v in (*value, *old)):
            facts[key] = [a + b for a, b in zip(old, value, strict=True)]
        elif isinstance(value, list):
            facts[key] = [*(old or []), *(_placed(entry, place) for entry in value)]
        elif isinstance(old, dict) and isinstance(value, dict):
            _join(old, value, place)
        elif type(old) is type(value) is int:
            facts[key] += value
        elif old != value:
            facts[key if key not in facts else located(key, place)] = value


def _placed(entry: Any, place: str) -> Any:
    """An entry of a list of nodes, or of facts about nodes."""
    if isinstance(entry, str):
        return located(entry, place)
    return entry | {"node": located(entry["node"], place)} if isinstance(entry, dict) and "node" in entry else entry
