"""The files of the points of a search, for what only a file can tell: its time, and the metric of the user."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from channelfold.passes.base import Pass
from channelfold.passes.search import options as choices
from channelfold.passes.search.choice import Choice
from channelfold.passes.search.front import Point
from channelfold.passes.search.latency import learned
from channelfold.runtime.data.sources import Data, call_script
from channelfold.runtime.errors import DataError, UsageError
from channelfold.runtime.io import files
from channelfold.runtime.jobs.job import Job
from channelfold.runtime.jobs.search_times import Clock
from channelfold.runtime.jobs.sensitivity import Prepared, after


class Files:
    """The files of points, each written once.

    ``choice``: the sites that the points have options for. ``behind``: passes behind those of the options.
    """

    choice: Choice
    behind: Sequence[Pass] = ()

    def __init__(self, job: Job, found: Prepared, data: Data):
        self.job, self._found, self._data = job, found, data
        self._known: dict[tuple[str, ...], Path] = {}

    def of(self, point: Point) -> Path:
        if point.options not in self._known:
            found, chosen = self._found, point.chosen(self.choice.sites)
            steps = choices.recipe([], found.passes, found.graph, found.board, chosen, self.behind)
            graph, _ = after(self.job, found.graph, steps, self._data)
            self._known[point.options] = found.board.folder / f"point.{len(self._known)}.onnx"
            files.save(graph, self._known[point.options])
        return self._known[point.options]

    def learn_times(self, clock: Clock, kind: str) -> None:
        """Gives the choice a clock, and a model of what it will tell. ``kind``: the type of what stays float."""
        sites = self.choice.sites
        timed = clock.timed(sites, kind, self.of)
        options = dict.fromkeys(option for site in sites for option in site.options())
        if unknown := [option for option in options if option not in timed]:
            self.job.warn(f"There are no times of {', '.join(unknown)}, which count like those of float")
        latency = self.choice.latency = learned(self._found.graph, sites, timed, clock.feed)
        self.choice.clock = lambda point: clock.share(point, self.of, latency.share(point.options))


class Metric:
    """A function of the user's that takes the path of a model; the loss of a model is relative to the float one."""

    def __init__(self, job: Job, where: str):
        script, colon, self._function = where.rpartition(":")
        if not (colon and Path(script).suffix == ".py"):
            raise UsageError(f"--metric is {where!r}", "Give a script and a function of it, such as metric.py:accuracy")
        if not job.source.allow_script:
            raise UsageError(f"{script} is a Python script, and measuring with it runs it", "Add --allow-script")
        self._script = Path(script)
        self._float = self._value(job.model)
        self._known: dict[Path, float] = {}

    def loss(self, written: Files, point: Point) -> float:
        """The loss of the file of a point, measured once."""
        path = written.of(point)
        if path not in self._known:
            self._known[path] = self.of(path)
        return self._known[path]

    def of(self, model: Path) -> float:
        return (self._float - self._value(model)) / max(abs(self._float), 1e-12)

    def _value(self, model: Path) -> float:
        value = call_script(self._script, self._function, str(model))
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise DataError(f"{self._function}() in {self._script} returned {value!r}", "Return a number")
        return float(value)
