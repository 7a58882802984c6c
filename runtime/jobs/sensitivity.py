"""The job ``sensitivity``, and what a search shares with it: the board of a model with the errors of its sites.

``record["sensitivity"]``: {samples, additive: {option: {sum_db, measured_db}}, sites: [{nodes, op, options: {option:
{snr_db, worst_db, share, bytes}}}]}, from the site that int8 hurts most.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    """A board, the graph that it is of, and its ``sites`` once they are measured."""

    graph: gs.Graph
    board: Board
    samples: tuple[str, ...]
    passes: dict[str, Pass]
    crew: Crew
    sites: list[Site] = field(default_factory=list)

    def measured(self, groups: Sequence[tuple[str, ...]] | None = None) -> Prepared:
        return replace(self, sites=measure(self.board, self.samples, groups, self.crew))

    def all_in(self, option: str) -> dict[str, str]:
        """The option for all nodes that have it."""
        return {name: option for name in self.board.slots if option in self.board.options(name)}


@contextlib.contextmanager
def prepared(job: Job, graph: gs.Graph, given: Mapping[str, Any], data: Data, crew: Crew) -> Iterator[Prepared]:
    """Makes the board of all options of a graph, with samples of the data to measure its sites on."""
    passes = choices.steps(given)
    with temporary.folder() as folder:
        board = choices.board_of(graph, passes, Context(data, job.progress, job.source.seed), folder)
        if not board.slots:
            raise UsageError("No node of the model can be quantized", "channelfold inspect shows why")
        samples = keep(board, spread(data, SAMPLES), "sensitivity")
        yield Prepared(graph, board, samples, passes, crew)


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
    with prepared(job, graph, given, job.calibration, crew) as board:
        found = board.measured()
        names = [option for option in choices.OPTIONS if any(option in site.errors for site in found.sites)]
        mixes = tuple(found.all_in(option) for option in names)
        whole = attempt(Trial(found.board, found.samples, mixes)).by_sample().mean(axis=1)
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
