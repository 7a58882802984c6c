"""The job ``sensitivity``, and what a search shares with it: the board of a model with the errors of its sites.

``record["sensitivity"]``: {samples, runs (of a sample), additive: {option: {sum_db, measured_db}}, sites: [{nodes,
op, options: {option: {snr_db, worst_db, share, bytes}}}]}, from the site that int8 hurts most.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs

from channelfold.passes import pipeline
from channelfold.passes.base import Context, Pass
from channelfold.passes.layers.output_error import SAMPLES, decibels, spread
from channelfold.passes.layers.sensitivity import Crew, Site, Trial, brief, keep, measure
from channelfold.passes.layers.switchboard import FLOAT, Board
from channelfold.passes.search import options as choices
from channelfold.runtime.data.sources import Data
from channelfold.runtime.errors import DataError, UsageError
from channelfold.runtime.io import temporary
from channelfold.runtime.io.snapshot import Snapshot
from channelfold.runtime.jobs.job import Job


@dataclass(frozen=True)
class Prepared:
    """A board, the graph that it is of, and the passes of its options."""

    graph: gs.Graph
    board: Board
    passes: dict[str, Pass]

    def all_in(self, option: str) -> dict[str, str]:
        """The option for all nodes that have it."""
        return {name: option for name in self.board.slots if option in self.board.options(name)}


@contextlib.contextmanager
def prepared(
    job: Job, graph: gs.Graph, passes: dict[str, Pass], data: Data, keep_in: Path | None = None
) -> Iterator[Prepared]:
    """Makes the board of all options of a graph.

    ``keep_in``: the folder where statistics are kept for a later call.
    """
    with temporary.folder() as folder:
        ctx = Context(data, job.progress, job.source.seed, keep=keep_in)
        board = choices.board_of(graph, passes, ctx, folder)
        if not board.slots:
            raise UsageError("No node of the model can be quantized", "channelfold inspect shows why")
        yield Prepared(graph, board, passes)


def after(
    job: Job,
    graph: gs.Graph,
    passes: Sequence[Pass],
    data: Data,
    keep_in: Path | None = None,
    quantizer: Pass | None = None,
) -> tuple[gs.Graph, list[dict[str, Any]]]:
    """A copy of a graph after passes, which ``quantizer`` will quantize, and the records of the passes."""
    context = Context(data, job.progress, job.source.seed, quantizer=quantizer, keep=keep_in)
    return pipeline.run(Snapshot.of(graph).graph(), passes, context, verify=False)


def sensitivity(job: Job, before: Sequence[Pass], given: Mapping[str, Any], crew: Crew) -> None:
    """Adds ``record["sensitivity"]``."""
    if job.calibration is None:
        raise DataError("There are no calibration data", "Give some with --calibration")
    graph, _ = after(job, job.graph, [*job.prepared(), *before], job.calibration)
    with prepared(job, graph, choices.steps(given), job.calibration) as found:
        samples = keep(found.board, brief(found.board, spread(job.calibration, SAMPLES)), "sample")
        sites = measure(found.board, samples, crew=crew)
        names = [option for option in choices.OPTIONS if any(option in site.errors for site in sites)]
        mixes = [Trial(found.board, samples, (found.all_in(option),)) for option in names]
        whole = [float(errors.by_sample().mean()) for errors in crew.each("additivity", mixes)]
        sums = {o: sum(site.errors.get(o, 0.0) for site in sites) for o in names}
        additive = {
            option: {"sum_db": decibels(sums[option]), "measured_db": decibels(error)}
            for option, error in zip(names, whole, strict=True)
        }
        ranked = sorted(sites, key=lambda s: -s.errors.get(names[0], 0.0))
        job.record["sensitivity"] = {
            "samples": len(samples),
            "runs": dict(crew.runs),
            "outputs": list(found.board.outputs),
            "additive": additive,
            "sites": [_told(site, found.board, sums) for site in ranked],
        }


def _told(site: Site, board: Board, sums: Mapping[str, float]) -> dict[str, Any]:
    options = {
        option: {
            "snr_db": decibels(error),
            "worst_db": decibels(max(site.by_sample[option])),
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
