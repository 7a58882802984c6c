"""The search of ``compress``: front, proof and choice, as a record.

``record["search"]``: {loss: what it is, options, limits, met, samples: {sensitivity, steering, proof}, runs (of one
sample), kappa_db, points: [{bytes, cost, latency, smooth, options: {option: share of the bytes}, predicted_db,
error_db, snr_db, agreement, loss, low, high, proof (the same figures on other samples, or null), chosen}], sites:
[{nodes, option, bytes, snr_db, better: {option, bytes, snr_db} or null}]}. Bytes of a point are those of its file,
nearly; cost and latency are relative to float.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from channelfold.passes.base import Pass
from channelfold.passes.layers.sensitivity import Crew, Site, Trial, attempt, decibels, keep
from channelfold.passes.layers.switchboard import FLOAT
from channelfold.passes.recipe import make
from channelfold.passes.search import options as choices
from channelfold.passes.search.front import Point, cheapest, front, most_accurate, uniform
from channelfold.passes.search.proof import Figures, Limits, Split, refined, undominated
from channelfold.runtime.data.npz import read_headers
from channelfold.runtime.data.sources import Data, call_script
from channelfold.runtime.errors import DataError, GateError, UsageError
from channelfold.runtime.io import files
from channelfold.runtime.io.session import Feed, Session
from channelfold.runtime.jobs.job import GateMissed, Job
from channelfold.runtime.jobs.sensitivity import Prepared, after, prepared
from channelfold.runtime.stats.bench import latencies
from channelfold.runtime.stats.compare import DEGRADED_SNR

STEERING, PROOF = 32, 256  # samples at most on which points are compared, and on which the best is proved
_LABELS = ("label", "labels", "target", "targets", "y", "class", "classes")
_SMOOTH = "smooth"
_GAIN = 0.8  # of the error of all in int8: where smoothing leaves more, it is not searched
_NODE = 1000  # bytes of the nodes and names that a quantized node adds to a file


@dataclass(frozen=True)
class Search:
    """What to search for. ``max_size``: bytes of the file, or a share of the model's where it is 1 at most.

    ``max_latency``: share of the float model's time in ONNX Runtime on this machine.
    ``metric``: a script and a function of it, which takes the path of a model and returns a number, higher is better;
    its loss is relative to that of the float model. ``minimize``: "size", "arithmetic" or "both". Without a limit the
    outputs must have the SNR of the verdict OK.
    """

    max_loss: float | None = None
    max_size: float | None = None
    max_latency: float | None = None
    metric: str = ""
    minimize: str = "both"
    trials: int = 12
    workers: int = 1
    cluster: str = ""


@dataclass
class _Searching:
    """A search at work, from sites and splits to the chosen point."""

    found: Prepared
    steering: Split
    proof: Split
    limits: Limits
    trials: int
    bytes_beside: int
    smoothed: bool = False
    clock: Callable[[Point], float] | None = None
    times: dict[Point, float] = field(default_factory=dict)
    measured: list[Figures] = field(default_factory=list)
    proved: dict[Point, Figures] = field(default_factory=dict)

    @property
    def sites(self) -> list[Site]:
        return self.found.sites

    def size(self, point: Point) -> int:
        """Bytes of the file of a point, nearly."""
        nodes = sum(len(s.nodes) for s, o in zip(self.sites, point.options, strict=True) if o != FLOAT)
        return point.size + self.bytes_beside + _NODE * nodes

    def run(self) -> Figures:
        """The chosen point."""
        first = [*uniform(self.sites), *front(self.sites, max(4, self.trials // 2))]
        if self.limits.max_size is not None:
            first.append(self._within(self.limits.max_size))
        self.measured = self.steering.measured(first, self.sites)
        if self.limits.of_accuracy:
            left = max(2, self.trials - self.trials // 2)
            self.measured = refined(
                self.measured,
                self.limits,
                lambda error: cheapest(self.sites, error),
                lambda point: self.steering.measured([point], self.sites)[0],
                left,
            )
        if self.clock:
            self.times = {f.point: self.clock(f.point) for f in undominated(self.measured)}
        return self._proved()

    def small(self, point: Point) -> bool:
        """Whether a point keeps the limits of size and time."""
        limits = self.limits
        fast = limits.max_latency is None or self.times.get(point, math.inf) <= limits.max_latency
        return fast and (limits.max_size is None or self.size(point) <= limits.max_size)

    def _within(self, size: float) -> Point:
        """The most accurate point whose file has at most ``size`` bytes."""
        room = size - self.bytes_beside
        for _ in range(20):
            found = most_accurate(self.sites, room)
            if self.size(found) <= size or room <= 0:
                break
            room -= self.size(found) - size
        return found

    def _proved(self) -> Figures:
        """The best point that keeps the limits on the samples of the proof as well; else the nearest one."""
        fits = [f for f in self.measured if self.small(f.point)]
        fits = fits or [min(self.measured, key=lambda f: (self.times.get(f.point, math.inf), f.point.size))]
        if not self.limits.of_accuracy:
            best = min(fits, key=lambda f: f.error)
            self.proved[best.point] = self.proof.measured([best.point], self.sites)[0]
            return best
        kept = sorted((f for f in undominated(fits) if self.limits.accurate(f)), key=lambda f: f.point.cost)
        for candidate in kept[: self.trials]:
            self.proved[candidate.point] = self.proof.measured([candidate.point], self.sites)[0]
            if self.limits.accurate(self.proved[candidate.point]):
                return candidate
        best = min(fits, key=lambda f: f.error)
        self.proved[best.point] = self.proof.measured([best.point], self.sites)[0]
        return best

    @property
    def runs(self) -> int:
        """Runs of one sample through the board."""
        alone = sum(len(errors) for site in self.sites for errors in site.by_sample.values())
        points = len(self.steering.known) * len(self.steering.files) + len(self.proof.known) * len(self.proof.files)
        return alone + points


def find(job: Job, passes: Sequence[Pass], given: Mapping[str, Any], search: Search, gates: Any) -> list[Pass]:
    """The passes that give the best model, in place of the quantizations in ``passes``; adds ``record["search"]``.

    Data for calibration that the search holds back are not used by the passes either. ``gates`` are limits as well.
    """
    if job.calibration is None:
        raise DataError("A search needs calibration data", "Give some with --calibration")
    if search.max_latency is not None and given.get("target") != "onnxruntime":
        raise UsageError("Latency is measured in ONNX Runtime, which is not the target", "Add --target onnxruntime")
    before = choices.in_front(passes)
    behind = [step for step in passes if step.name == choices.LAST]
    crew = Crew(search.workers, search.cluster, job.progress)
    data, steering, proof, labels = _split(job)
    whole = job.record["model"]["bytes"]
    limits = _limits(search, gates, whole)
    graph, _ = after(job, job.graph, [*job.prepared(), *before], data)
    starts = [(before, graph)]
    if not any(step.name == _SMOOTH for step in before):
        smooth, changed = after(job, graph, [make(_SMOOTH, {})], data)
        starts += [([*before, make(_SMOOTH, {})], smooth)] if changed else []
    results, int8 = [], math.inf
    for number, (steps, start) in enumerate(starts):
        with prepared(job, start, given, data, crew) as found:
            splits = [
                Split(
                    found.board,
                    keep(found.board, part, name),
                    tuple(labels[i] for i in at) if labels else (),
                    crew=crew,
                )
                for name, (part, at) in (("steering", steering), ("proof", proof))
            ]
            error = attempt(Trial(found.board, splits[0].files, (found.all_in("int8"),))).by_sample().mean()
            if number and error > _GAIN * int8:
                continue
            int8 = float(error)
            found = found.measured(choices.groups(start, found.board))
            found = dataclasses.replace(
                found, sites=choices.priced(start, found.sites, steering[0][0], search.minimize)
            )
            written = _Files(job, found, data)
            if search.metric:
                splits = [dataclasses.replace(split, metric=_Metric(written, search.metric)) for split in splits]
            work = _Searching(
                found, splits[0], splits[1], limits, search.trials, whole - found.board.size({}), number > 0
            )
            if search.max_latency is not None:
                work.clock = functools.partial(written.latency, feed=steering[0][0])
            chosen = work.run()
            record = _record(work, chosen)
            mix = choices.recipe(steps, found.passes, start, found.board, chosen.point.chosen(work.sites))
            value = chosen.point.cost if record["met"] else chosen.error
            results.append((not record["met"], value, number, record, mix))
    *_, record, mix = min(results, key=lambda result: result[:3])
    job.record["search"] = _together(record, [other for *_, other, _ in results])
    job.calibration = data
    return [*mix, *behind]


def _limits(search: Search, gates: Any, whole: int) -> Limits:
    """The limits of a search for a model of ``whole`` bytes; those of the verdict OK where there are none."""
    size = search.max_size * whole if search.max_size is not None and search.max_size <= 1 else search.max_size
    limits = Limits(search.max_loss, gates and gates.min_snr, gates and gates.min_agreement, size, search.max_latency)
    return Limits(min_snr=DEGRADED_SNR) if limits == Limits() else limits


def _together(record: dict[str, Any], records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The record of the best start with the points of all, without those that others beat."""
    points = [p | {"chosen": p["chosen"] and other is record} for other in records for p in other["points"]]
    points.sort(key=lambda p: (p["cost"], -p["error_db"]))
    kept = [p for i, p in enumerate(points) if p["chosen"] or all(q["error_db"] < p["error_db"] for q in points[:i])]
    return record | {"points": kept[::-1], "runs": sum(other["runs"] for other in records)}


class _Files:
    """The files of points, each written once: for what only a file can tell."""

    def __init__(self, job: Job, found: Prepared, data: Data):
        self.job, self._found, self._data = job, found, data
        self._known: dict[Point, Path] = {}

    def of(self, point: Point) -> Path:
        if point not in self._known:
            found = self._found
            steps = choices.recipe([], found.passes, found.graph, found.board, point.chosen(found.sites))
            graph, _ = after(self.job, found.graph, steps, self._data)
            self._known[point] = found.board.folder / f"point.{len(self._known)}.onnx"
            files.save(graph, self._known[point])
        return self._known[point]

    def latency(self, point: Point, feed: Feed) -> float:
        """The time of a point as a share of the float model's, measured in turns."""
        sessions = {name: Session(path) for name, path in (("float", self.job.model), ("point", self.of(point)))}
        runs = {name: functools.partial(session.run, feed) for name, session in sessions.items()}
        whole, found = latencies(runs, rounds=25, warmup=3, seconds=5.0)
        return found.ms / whole.ms


class _Metric:
    """The loss of points by a function of the user's, which is called with the file of each point."""

    def __init__(self, written: _Files, where: str):
        script, colon, self._function = where.rpartition(":")
        if not (colon and Path(script).suffix == ".py"):
            raise UsageError(f"--metric is {where!r}", "Give a script and a function of it, such as metric.py:accuracy")
        if not written.job.source.allow_script:
            raise UsageError(f"{script} is a Python script, and measuring with it runs it", "Add --allow-script")
        self._files, self._script = written, Path(script)
        self._float = self._value(written.job.model)
        self._known: dict[Point, float] = {}

    def __call__(self, point: Point) -> float:
        if point not in self._known:
            value = self._value(self._files.of(point))
            self._known[point] = (self._float - value) / max(abs(self._float), 1e-12)
        return self._known[point]

    def _value(self, model: Path) -> float:
        value = call_script(self._script, self._function, str(model))
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise DataError(f"{self._function}() in {self._script} returned {value!r}", "Return a number")
        return float(value)


Part = tuple[list[dict[str, np.ndarray]], list[int]]  # samples and their places in the data


def _split(job: Job) -> tuple[Data, Part, Part, list[int]]:
    """(calibration, samples that steer, samples of the proof, labels of the data that both come from)."""
    calibration, evaluation = job.calibration, job.evaluation
    assert calibration is not None
    if evaluation is not None and len(evaluation) > 1:
        places = [list(range(start, len(evaluation), 2)) for start in (0, 1)]
        labels = _labels(job.source.evaluation, len(evaluation))
        source, data = evaluation, calibration
    else:
        count = len(calibration)
        if count < 8:
            raise DataError(f"A search needs 8 calibration samples, and there are {count}", "Give more")
        places, labels, source = [list(range(start, count, 4)) for start in (1, 3)], [], calibration
        data = calibration.at({i for i in range(count) if i % 2 == 0})
        job.warn("A half of the calibration data was held back, to measure points on; --evaluation gives other data")
    parts = []
    for own, limit in zip(places, (STEERING, PROOF), strict=True):
        own = [own[int(i)] for i in np.linspace(0, len(own) - 1, min(limit, len(own)))]
        parts.append((list(source.at(own)), own))
    return data, parts[0], parts[1], labels


def _labels(source: Any, count: int) -> list[int]:
    """The right classes in evaluation data: whole numbers under a usual name, one a sample; none without them."""
    arrays: dict[str, Any] = {}
    if isinstance(source, Mapping):
        arrays = dict(source)
    elif isinstance(source, str | Path) and Path(source).suffix == ".npz":
        headers = read_headers(Path(source))
        if any(name in headers for name in _LABELS):
            with np.load(source) as stored:
                arrays = {name: stored[name] for name in _LABELS if name in headers}
    for name in _LABELS:
        if name in arrays and np.asarray(arrays[name]).dtype.kind in "iu" and np.shape(arrays[name]) == (count,):
            return np.asarray(arrays[name]).tolist()
    return []


def _record(work: _Searching, chosen: Figures) -> dict[str, Any]:
    proved = work.proved[chosen.point]
    limits = dataclasses.asdict(work.limits)
    ratios = [f.error / f.point.predicted for f in work.measured if f.point.predicted > 0 and f.error > 0]
    return {
        "loss": work.steering.kind,
        "options": [FLOAT, *choices.OPTIONS],
        "limits": {name: limit for name, limit in limits.items() if limit is not None},
        "met": work.small(chosen.point) and work.limits.accurate(proved),
        "samples": {
            "sensitivity": len(work.found.samples),
            "steering": len(work.steering.files),
            "proof": len(work.proof.files),
        },
        "runs": work.runs,
        "kappa_db": float(10 * np.log10(np.median(ratios))) if ratios else 0.0,
        "points": [_told_point(work, figures, chosen) for figures in _shown(work.measured, chosen)],
        "sites": [_told_choice(s, o) for s, o in zip(work.sites, chosen.point.options, strict=True)],
    }


def _shown(found: Sequence[Figures], chosen: Figures) -> list[Figures]:
    """The front, with the chosen point, which others may beat where no point keeps the limits."""
    kept = undominated(found)
    return sorted(kept if chosen in kept else [*kept, chosen], key=lambda figures: -figures.point.cost)


def _told_point(work: _Searching, figures: Figures, chosen: Figures) -> dict[str, Any]:
    point = figures.point
    shares: dict[str, float] = {}
    for site, option in zip(work.sites, point.options, strict=True):
        shares[option] = shares.get(option, 0.0) + site.sizes[FLOAT] / work.found.board.size({})
    proof = work.proved.get(point)
    return {
        "bytes": work.size(point),
        "cost": point.cost,
        "smooth": work.smoothed,
        "latency": work.times.get(point),
        "options": shares,
        "predicted_db": float(decibels(point.predicted)),
        **_figures(figures),
        "proof": _figures(proof) if proof else None,
        "chosen": point == chosen.point,
    }


def _figures(found: Figures) -> dict[str, Any]:
    told = {name: getattr(found, name) for name in ("agreement", "loss", "low", "high")}
    told["agreement"] = None if math.isnan(found.agreement) else found.agreement
    return {"error_db": float(decibels(found.error)), "snr_db": found.snr, **told}


def _told_choice(site: Site, option: str) -> dict[str, Any]:
    """The option of a site, and the next better one: what it would cost, and what it would buy."""
    error = site.errors.get(option, 0.0)
    better = [o for o in site.options() if site.errors.get(o, 0.0) < error]
    following = max(better, key=lambda o: (site.errors.get(o, 0.0), -site.sizes[o]), default=None)
    told = {"nodes": list(site.nodes), "option": option, "bytes": site.sizes[option], "snr_db": float(decibels(error))}
    if following is None:
        return told | {"better": None}
    more = {"option": following, "bytes": site.sizes[following] - site.sizes[option]}
    return told | {"better": more | {"snr_db": float(decibels(site.errors.get(following, 0.0)))}}


def check(job: Job) -> None:
    """Raises GateMissed where no point keeps the limits of the search."""
    found = job.record.get("search")
    if found and not found["met"]:
        nearest = next(point for point in found["points"] if point["chosen"])
        shown = nearest["proof"] or nearest
        what = f"{found['loss']} lost {shown['loss']:.2%}, SNR {shown['snr_db']:.1f} dB, {nearest['bytes']:,} bytes"
        asked = ", ".join(f"{name.replace('_', '-')} {limit:g}" for name, limit in found["limits"].items())
        raise GateMissed(
            GateError(f"No point keeps the limits ({asked})", f"The nearest was written: {what}"), job.record
        )
