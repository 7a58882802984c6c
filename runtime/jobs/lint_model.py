"""The job of the command lint: findings, a repaired file, and both in the forms of other programs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from channelfold.runtime.errors import GateError, UsageError
from channelfold.runtime.io import files
from channelfold.runtime.io.facts import computes_as_written, fuses_rightly, model_facts
from channelfold.runtime.io.outputs import check_kind
from channelfold.runtime.jobs.job import GateMissed, Job, Progress, Record, Source
from channelfold.runtime.lint import TARGETS, Finding, fix, formats, lint
from channelfold.runtime.lint.rules import RULES


def run(
    model: Path,
    target: str,
    sm: int | None,
    out: Path | None,
    reports: dict[str, Path],
    source: Source,
    progress: Progress,
) -> Record:
    """The record of a check, or of a repair where ``out`` is given; see ``jobs.lint``."""
    if target not in TARGETS:
        raise UsageError(f"The target is {target!r}", f"Expected {' or '.join(TARGETS)}")
    job = Job("lint", model, progress, source)
    job.record["warnings"].clear()  # the rule stale-shapes says so
    for path in reports.values():
        check_kind(path, "a report")
    graph = files.load(model)
    found = lint(graph, RULES, target, sm)
    entry: dict[str, Any] = {"target": target, "sm": sm}
    if out is not None:
        job.check_output(out, "an ONNX file")
        job.open_both()
        graph = files.raise_opset(graph, 13) if graph.opset < 13 else graph
        entry["before"] = counts(found)
        entry["fixed"] = [
            {"rule": rule.id, "fix": rule.fix, "nodes": nodes} for rule, nodes in fix(graph, RULES, target, sm)
        ]
        progress("save", 0, 0)
        with files.saving(graph, out) as candidate:
            written = files.load(candidate)
            job.record["output"] = model_facts(candidate, written) | {"path": str(out)}
            found, how = lint(written, RULES, target, sm), (computes_as_written(written), fuses_rightly(written))
            del written
            if entry["fixed"]:
                job.prove(candidate, *how)
    for kind, path in reports.items():
        form: Callable[..., str] = getattr(formats, kind)
        with files.writing(path) as file:
            file.write(form(found, [rule for rule in RULES if rule.concerns(target, sm)], out or model).encode())
    job.record["lint"] = entry | counts(found) | {"findings": [_row(one) for one in found]}
    errors = job.record["lint"]["errors"]
    if errors:
        left = " that no safe repair is known for" if out is not None else ""
        hint = (
            "The table says what to do" if out is not None else "The table says what to do; --fix -o OUT repairs some"
        )
        reason = f"{model.name} breaks rules of {target} in {errors} place{'s' * (errors != 1)}{left}"
        raise GateMissed(GateError(reason, hint), job.record)
    return job.record


def counts(found: list[Finding]) -> dict[str, int]:
    """The number of nodes that break a rule, by level."""
    return {f"{level}s": sum(one.level == level for one in found) for level in ("error", "warning", "note")}


def _row(found: Finding) -> dict[str, Any]:
    rule = found.rule
    return {
        "rule": rule.id,
        "level": found.level,
        "node": found.node,
        "detail": found.detail,
        "checks": rule.checks,
        "consequence": rule.consequence,
        "fix": rule.fix,
        "repairable": rule.repair is not None,
    }
