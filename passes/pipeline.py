"""Runs passes over a graph and checks the contract of every pass.

    snapshot -> apply -> contract -> ONNX checker -> (exact passes) verify -> record -> (checkpoint)

The contract, for every pass:

- it returns an Outcome in which every change and refusal names a node, and whose facts are JSON;
- the model's inputs and outputs keep their names, dtypes (but for a pass that ``retypes``) and shapes (an open size of
  an output may become known);
- the pass reports changes if and only if the graph changed;
- the pass replaces weights and never writes into them;
- a valid graph stays valid ONNX, and an ``exact`` pass keeps the function of the graph (see ``verify``).

A pass that breaks the contract is rolled back: the graph is bit for bit what it was. The run then fails, because the
user did not ask for a model that lacks a step. With ``on_violation="skip"`` the run goes on and the record says so.
With ``on_violation="undo"`` an exact pass that changes the function is no error: the site to blame is taken back
(``undo``), or, where none can be found, the whole pass, and the record says why.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx_graphsurgeon as gs

from channelfold import __version__
from channelfold.passes.base import Context, Outcome, Pass
from channelfold.passes.bodies import verify_bodies
from channelfold.passes.checkpoint import Checkpoint, Progress
from channelfold.passes.smooth_methods import quantizer
from channelfold.passes.undo import SITES, leaving, to_blame
from channelfold.passes.verify import Verdict, Verifier, Violation, verify_rollout
from channelfold.runtime.data.sources import Data
from channelfold.runtime.errors import ChannelfoldError, UsageError, VerificationError
from channelfold.runtime.io.files import check, raise_opset
from channelfold.runtime.io.snapshot import Snapshot, become

WHOLE = "(whole graph)"  # the node of a record where no single node is to blame


@dataclass(frozen=True)
class RaiseOpset(Pass):
    """Raises the graph to the opset of the next pass with ONNX's version converter."""

    name, kind = "raise-opset", "exact"

    opset: int

    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        outcome = Outcome(facts={"from": graph.opset, "to": self.opset})
        outcome.change(WHOLE, f"opset {graph.opset} -> {self.opset}")
        become(graph, raise_opset(graph, self.opset))
        return outcome


def run(
    graph: gs.Graph,
    passes: Sequence[Pass],
    ctx: Context,
    *,
    probes: Data | None = None,
    verify: bool = True,
    checkpoint: Path | None = None,
    on_violation: Literal["raise", "skip", "undo"] = "raise",
) -> tuple[gs.Graph, list[dict[str, Any]]]:
    """Runs ``passes`` in order; returns the graph and one record a step (JSON-able, see ``warnings``).

    The run edits ``graph`` in place and returns it; a run that resumes a checkpoint returns another graph. ``probes``
    are real samples to verify on (default: the calibration data). ``checkpoint`` is a folder that keeps the state after
    every step, so that a later run with the same arguments resumes there; ``checkpoint.clear`` removes the state.

    Raises VerificationError for a pass that broke its contract. Other errors of a pass (missing calibration data, an
    opset that cannot be reached) pass through. In both cases the graph is as it was before the pass.
    """
    if on_violation not in ("raise", "skip", "undo"):
        raise UsageError(f"on_violation is {on_violation!r}", "Expected 'raise', 'skip' or 'undo'")
    probes = probes if probes is not None else ctx.calibration
    state = Snapshot.of(graph)
    progress, store = Progress(), None
    if checkpoint is not None:
        conditions = _conditions(state, ctx, probes, verify, on_violation)
        store = Checkpoint(Path(checkpoint), conditions, passes)
        progress = store.resume()
        if progress.graph is not None:
            graph, state = progress.graph, Snapshot.of(progress.graph)
    runner = _Runner(graph, state, ctx, Verifier(probes, ctx.seed) if verify else None, on_violation)
    for index in range(progress.done, len(passes)):
        ctx.progress(passes[index].name, index, len(passes))
        records, changed = runner.run(passes[index], passes[index + 1 :])
        if progress.warning:
            records[0]["warnings"], progress.warning = [progress.warning, *records[0].get("warnings", [])], ""
        progress.steps += records
        progress.done = index + 1
        if store is not None:
            store.write(graph, progress, changed=changed)
    return graph, progress.steps


def warnings(steps: Sequence[dict[str, Any]]) -> list[str]:
    """The warnings in the records of a run, one sentence each, with the name of the pass."""
    return [f"{step['pass']}: {text}" for step in steps for text in step.get("warnings", ())]


class _Runner:
    """A graph, and its snapshot from before the current pass."""

    def __init__(self, graph: gs.Graph, state: Snapshot, ctx: Context, verifier: Verifier | None, on_violation: str):
        self._graph = graph
        self._state = state
        self._ctx = ctx
        self._quantizer = ctx.quantizer
        self._verifier = verifier
        self._reaction = on_violation

    def run(self, step: Pass, later: Sequence[Pass]) -> tuple[list[dict[str, Any]], bool]:
        """Runs a pass at the opset that the pass needs. Returns the records, and whether the graph changed."""
        before, records = self._state, []
        self._ctx = replace(self._ctx, quantizer=quantizer(step, later, self._quantizer))
        needed = step.opset_for(self._graph)
        if needed > self._graph.opset:
            records.append(self._step(RaiseOpset(needed)))
        if needed > self._graph.opset:
            reason = f"it needs opset {needed}, and raising the graph to it was rolled back"
            records.append(_rolled_back(step, 0.0, reason, WHOLE))
        else:
            records.append(self._step(step))
        return records, self._state is not before

    def _step(self, step: Pass) -> dict[str, Any]:
        started = time.perf_counter()
        left: dict[str, str] = {}  # sites that are taken back, and why
        outcome = Outcome()
        while True:
            try:
                outcome, after = self._apply(step, left)
                seconds = time.perf_counter() - started
                verified, warned = self._accept(step, outcome, after)
            except VerificationError as error:
                self._state.restore(self._graph)
                if self._reaction == "undo" and isinstance(error, Violation) and len(left) < SITES:
                    site = to_blame(self._state, {change.node for change in outcome.changed} - left.keys(), error)
                    if site is not None:
                        left[site] = f"taken back, because {error}"
                        continue
                return self._give_up(step, error, time.perf_counter() - started)
            except Exception:
                self._state.restore(self._graph)
                raise
            break
        if outcome.changed:
            self._state = after
        outcome.refused = [one for one in outcome.refused if one.node not in left]
        for site, reason in left.items():
            outcome.refuse(site, reason, "taken back")
        return _record(step, seconds, outcome, verified, [*outcome.warnings, *warned])

    def _give_up(self, step: Pass, error: VerificationError, seconds: float) -> dict[str, Any]:
        """The record of a pass that was rolled back. Raises the error where the reaction does not allow that."""
        node = WHOLE
        if isinstance(error, Violation):
            node = error.node or WHOLE
            if self._reaction == "undo":
                return _rolled_back(step, seconds, f"taken back, because {error}", node)
            message = self._blame(step, f"it declares itself exact, but {error}")
            error = Violation(message, error.tensor, error.node, error.error)
        if self._reaction != "skip":
            raise error from error.__cause__
        return _rolled_back(step, seconds, str(error), node)

    def _blame(self, step: Pass, what: str) -> str:
        """What a pass did, in words for its author, and what a user can do."""
        hint = f"leave {step.name!r} out of the recipe"
        hint += ", or go on without it with on_violation='skip'" if self._reaction == "raise" else ""
        if isinstance(step, RaiseOpset):
            hint = f"export the model again with opset_version={step.opset}"
        broke = f"Pass {step.name!r} broke its contract and was rolled back: {what.rstrip('.')}"
        return f"{broke}. Mend the pass; until then {hint}."

    def _apply(self, step: Pass, left: Mapping[str, str]) -> tuple[Outcome, Snapshot]:
        """(outcome of a pass, snapshot of the graph after the pass). Raises VerificationError for a broken contract."""
        try:
            with self._state.frozen(), leaving(step, self._graph, left.keys()) as pass_:
                outcome = pass_.apply(self._graph, self._ctx)
            after = Snapshot.of(self._graph)
        except ChannelfoldError:
            raise
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(frame.filename).name}, line {frame.lineno}"
            what = f"it failed with {type(error).__name__}: {error} ({where})"
            raise VerificationError(self._blame(step, what)) from error
        if broken := _breach(step, outcome, self._state, after):
            raise VerificationError(self._blame(step, broken))
        return outcome, after

    def _accept(self, step: Pass, outcome: Outcome, after: Snapshot) -> tuple[dict[str, Any] | None, list[str]]:
        """(record of the verification, warnings) of a graph that changed. Raises VerificationError."""
        if not outcome.changed:
            return None, []
        warned = self._check(step)
        if self._verifier is None or step.kind != "exact":
            return None, warned
        verify = verify_rollout if step.moves_cache else self._verifier.verify
        verdict = verify(self._state, after)
        inside = list(verify_bodies(self._state, after, self._verifier.feeds, self._ctx.seed))
        said = [verdict.warning, *(f"{place}: {found.warning}" for place, found in inside if found.warning)]
        return _with(verdict.record, inside), [*warned, *filter(None, said)]

    def _check(self, step: Pass) -> list[str]:
        try:
            check(self._graph)
        except VerificationError as error:
            original = self._state.graph()
            try:
                check(original)
            except VerificationError as before:  # an operator that ONNX does not know is no news at every step
                same = str(before) == str(error)
                return [] if same else [f"{error}. It was not before the step either, for another reason: {before}"]
            raise VerificationError(self._blame(step, str(error))) from None
        return []


def _breach(step: Pass, outcome: Any, before: Snapshot, after: Snapshot) -> str:
    """How the result of a pass breaks the contract; empty where the result keeps the contract."""
    if not isinstance(outcome, Outcome):
        return f"apply() returned {type(outcome).__name__!r}, expected an Outcome"
    for entry in (*outcome.changed, *outcome.refused):
        if not isinstance(entry.node, str) or not entry.node:
            return f"it reports {asdict(entry)} without the name of a node"
    for what in ("input", "output"):
        was, now = ([_spec(v) for v in getattr(graph.model.graph, what)] for graph in (before, after))
        if step.retypes and len(was) == len(now):
            was = [(name, kind, dims) for (name, _, dims), (_, kind, _) in zip(was, now, strict=True)]
        refined = what == "output" and len(was) == len(now) and all(map(_refines, was, now))
        moved = step.moves_cache and [spec[:2] for spec in was] == [spec[:2] for spec in now]
        if was != now and not refined and not moved:
            return f"it changed the model's {what}s from {_listed(was)} to {_listed(now)}"
    try:
        json.dumps(outcome.facts)
    except (TypeError, ValueError) as error:
        return f"its facts are not JSON ({error})"
    if bool(outcome.changed) != before.same(after):
        return ""
    return "it reports changes, but the graph is the same" if outcome.changed else "it reports no change, but made one"


def _with(record: dict[str, Any], inside: list[tuple[str, Verdict]]) -> dict[str, Any]:
    """The record of a verification with the largest error in the bodies that were verified by themselves."""
    found = [verdict.record for _, verdict in inside if "unverified" not in verdict.record]
    if not found or "unverified" in record:
        return record
    return record | {"max_rel_error": max(one["max_rel_error"] for one in (record, *found))}


_Spec = tuple[str, str, tuple[int | str, ...] | None]


def _spec(value: onnx.ValueInfoProto) -> _Spec:
    """(name, type, dims) of an input or output; an unknown dim is ``?``, dims of an unknown rank are None."""
    if not value.type.HasField("tensor_type"):
        return value.name, " ".join(str(value.type).split()), None
    tensor = value.type.tensor_type
    dims = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim)
    kind = onnx.TensorProto.DataType.Name(onnx.TensorProto.DataType.ValueType(tensor.elem_type)).lower()
    return value.name, kind, dims if tensor.HasField("shape") else None


def _refines(old: _Spec, new: _Spec) -> bool:
    """Whether a spec is the same or better known: a number in place of a name, a number or a name in place of ``?``."""
    if old[0] != new[0] or old[1] not in ("", "undefined", new[1]):
        return False
    if old[2] is None:
        return True
    if new[2] is None or len(old[2]) != len(new[2]):
        return False
    return all(
        a in ("?", b) or (isinstance(a, str) and isinstance(b, int)) for a, b in zip(old[2], new[2], strict=True)
    )


def _listed(specs: list) -> str:
    return ", ".join(f"{name}: {kind}{'' if dims is None else list(dims)}" for name, kind, dims in specs) or "none"


def _record(
    step: Pass, seconds: float, outcome: Outcome, verified: dict[str, Any] | None, warned: list[str]
) -> dict[str, Any]:
    record = {
        "pass": step.name,
        "kind": step.kind,
        "options": step.options(),
        "seconds": seconds,
        "changed": [asdict(change) for change in outcome.changed],
        "refused": [asdict(refusal) for refusal in outcome.refused],
        "verified": verified,
        "facts": outcome.facts,
    }
    return json.loads(json.dumps(record | ({"warnings": warned} if warned else {})))


def _rolled_back(step: Pass, seconds: float, reason: str, node: str) -> dict[str, Any]:
    outcome = Outcome()
    outcome.refuse(node, reason, "rolled back")
    return _record(step, seconds, outcome, None, [reason])


def _conditions(source: Snapshot, ctx: Context, probes: Data | None, verify: bool, on_violation: str) -> dict[str, Any]:
    """Everything that the result of a run depends on, except the passes."""
    return {
        "channelfold": __version__,
        "source": source.fingerprint(),
        "calibration": ctx.calibration.fingerprint if ctx.calibration is not None else None,
        "probes": probes.fingerprint if probes is not None else None,
        "seed": ctx.seed,
        "verify": verify,
        "on_violation": on_violation,
    }
