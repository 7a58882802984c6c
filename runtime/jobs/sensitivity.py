"""The job ``sensitivity``, and what a search shares with it: the board of a model with the errors of its sites.

``record["sensitivity"]``: {samples, additive: {option: {sum_db, measured_db}}, sites: [{nodes, op, options: {option:
{snr_db, worst_db, share, bytes}}}]}, from the site that int8 hurts most.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_graphsurgeon as gs

from channelfold.passes import pipeline
from channelfold.passes.base import Context, Pass
from channelfold.passes.layers.sensitivity import SAMPLES, Crew, Site, Trial, attempt, decibels, keep, measure, spread
from channelfold.passes.layers.switchboard import FLOAT, Board
from channelfold.passes.search import options as choices
from channelfold.runtime.data.sources import Data
from channelfold.runtime.errors import DataError, UsageError
from channelfold.runtime.io import temporary
from channelfold.runtime.io.snapshot import Snapshot
from channelfold.runtime.jobs.job import Job


@dataclass(frozen=True)
class Prepared:
    """A board with what is measured on it, and the graph that it is of."""

    graph: gs.Graph
    board: Board
    sites: list[Site]
    samples: tuple[str, ...]
    passes: dict[str, Pass]
    crew: Crew


@contextlib.contextmanager
def prepared(
    job: Job, graph: gs.Graph, given: Mapping[str, Any], data: Data, crew: Crew, together: bool = True
) -> Iterator[Prepared]:
    """Makes the board of all options of a graph, and measures its sites on some of the data."""
    passes = choices.steps(given)
    with temporary.folder() as folder:
        board = choices.board_of(graph, passes, Context(data, job.progress, job.source.seed), folder)
        if not board.slots:
            raise UsageError("No node of the model can be quantized", "channelfold inspect shows why")
        samples = keep(board, spread(data, SAMPLES), "sensitivity")
        groups = choices.groups(graph, board) if together else None
        yield Prepared(graph, board, measure(board, samples, groups, crew), samples, passes, crew)


def after(job: Job, graph: gs.Graph, passes: Sequence[Pass], data: Data) -> tuple[gs.Graph, bool]:
    """A copy of a graph after passes; whether the last one has changed it."""
    context = Context(data, job.progress, job.source.seed)
    graph, steps = pipeline.run(Snapshot.of(graph).graph(), passes, context, verify=False)
    return graph, bool(steps and steps[-1]["changed"])


def sensitivity(job: Job, before: Sequence[Pass], given: Mapping[str, Any], crew: Crew) -> None:
    """Adds ``record["sensitivity"]``."""
    if job.calibration is None:
        raise DataError("There are no calibration data", "Give some with --calibration")
    graph, _ = after(job, job.graph, [*job.prepared(), *before], job.calibration)
    with prepared(job, graph, given, job.calibration, crew, together=False) as found:
        names = [option for option in choices.OPTIONS if any(option in site.errors for site in found.sites)]
        mixes = [{n: o for n in found.board.slots if o in found.board.options(n)} for o in names]
        whole = attempt(Trial(found.board, found.samples, tuple(mixes))).by_sample().mean(axis=1)
        sums = {o: sum(site.errors.get(o, 0.0) for site in found.sites) for o in names}
        additive = {
            option: {"sum_db": float(decibels(sums[option])), "measured_db": float(decibels(error))}
            for option, error in zip(names, whole, strict=True)
        }
        ranked = sorted(found.sites, key=lambda s: -s.errors.get(names[0], 0.0))
        job.record["sensitivity"] = {
            "samples": len(found.samples),
            "outputs": list(found.board.outputs),
            "additive": additive,
            "sites": [_told(site, found.board, sums) for site in ranked],
        }


def _told(site: Site, board: Board, sums: Mapping[str, float]) -> dict[str, Any]:
    options = {
        option: {
            "snr_db": float(decibels(error)),
            "worst_db": float(decibels(max(site.by_sample[option]))),
            "share": error / sums[option] if sums[option] > 0 else 0.0,
            "bytes": site.sizes[option],
        }
        for option, error in site.errors.items()
    }
    return {
        "nodes": list(site.nodes),
        "op": board.slots[site.nodes[0]].op,
        "bytes": site.sizes[FLOAT],
        "options": options,
    }
