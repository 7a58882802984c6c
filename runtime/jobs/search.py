"""The search of ``compress``: networks to choose on, the front, the proof and the choice.

The options of the nodes are chosen on the network that the recipe's own passes make, and on variants of it: smoothed,
with FFNs reparameterized, with fewer channels. What is right are always the outputs of the first. What stays float is
float16 for TensorRT, where that keeps the limits, or what the user wants. All points lie in one front;
``search_record`` has its record.

Smoothing is a choice for the network, where the pass takes back what does not pay. Chosen for each site by the error in
int8 with and without, it gains nothing: 46.9 dB were predicted for a small ViT in int8 and 44.3 dB measured, 46.0 dB
without any; along the front of MiniLM 0.2 dB at most were predicted. With inserted nodes MiniLM gains 7 dB at 28 % of
the cost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Pass
from channelfold.passes.layers.output_error import Errors, Meter, compared
from channelfold.passes.layers.sensitivity import Crew, Trial, brief, keep, measure
from channelfold.passes.layers.switchboard import FLOAT, Board
from channelfold.passes.recipe import BEHIND_REPARAM, make
from channelfold.passes.search import options as choices
from channelfold.passes.search.choice import Choice
from channelfold.passes.search.front import Point
from channelfold.passes.search.proof import RELATIVE, Figures, Limits, Split, figures, ranked
from channelfold.runtime.data.npz import read_headers
from channelfold.runtime.data.sources import Data
from channelfold.runtime.errors import ChannelfoldError, DataError, GateError, UsageError
from channelfold.runtime.io import files
from channelfold.runtime.io.session import Feed
from channelfold.runtime.io.snapshot import Snapshot
from channelfold.runtime.jobs import search_record as telling
from channelfold.runtime.jobs.job import GateMissed, Job
from channelfold.runtime.jobs.search_files import Files, Metric
from channelfold.runtime.jobs.search_times import Clock, clock_of
from channelfold.runtime.jobs.sensitivity import Prepared, after, prepared
from channelfold.runtime.stats.compare import DEGRADED_SNR

STEERING, PROOF = 32, 256  # samples at most on which points are compared, and on which the best is proved
_LABELS = ("label", "labels", "target", "targets", "y", "class", "classes")
_SMOOTH, _REPARAM = "smooth", "reparameterize-ffn"
_GAIN = 0.8  # of the error of all nodes in 8 bits: where a variant leaves more, it is not searched


@dataclass(frozen=True)
class Search:
    """What to search for. ``max_size``: bytes of the file, or a share of the model's where it is 1 at most.

    ``max_latency``: share of the float model's time in ONNX Runtime on this machine; of its engine's, modelled, where
    the target is tensorrt for a GPU. ``latency_table``: a record of ``bench`` that tells times in their place.
    ``metric``: a script and a function of it, which takes the path of a model and returns a number, higher is better;
    its loss is relative to that of the float model. ``minimize``: "size", "arithmetic" or "both". Without a limit the
    outputs must have the SNR of the verdict OK. ``prune_to``: shares of the MACs; variants that keep these are searched
    as well. ``float_type``: the type of what stays float, float32, float16 or bfloat16; auto: that of the recipe, or
    float16 for TensorRT, where it alone keeps the limits.
    """

    max_loss: float | None = None
    max_size: float | None = None
    max_latency: float | None = None
    latency_table: str = ""
    metric: str = ""
    minimize: str = "both"
    trials: int = 12
    prune_to: tuple[float, ...] = ()
    float_type: str = choices.AUTO
    workers: int = 1
    cluster: str = ""


@dataclass(frozen=True)
class _Start:
    """A network to choose on, made by ``steps``.

    ``exact``: it computes what the given model computes. ``finer``: it is worth a search where it makes 8 bits finer.
    """

    name: str
    steps: list[Pass]
    graph: gs.Graph
    exact: bool = True
    finer: bool = False


@dataclass(frozen=True)
class _Result:
    """What a search on one network has found, and the passes that make the chosen model."""

    choice: Choice
    chosen: Figures
    record: dict[str, Any]
    passes: list[Pass]


@dataclass(frozen=True)
class _Rest:
    """What stays float in the models of a network: ``bytes`` of the file where all does, ``widths`` of its weights.

    ``behind``: the passes that give the type, and ``error``: what all in the type loses. ``splits`` know of that loss.
    ``missed``: all in another type, where that misses the limits.
    """

    bytes: int
    splits: Sequence[Split]
    widths: Mapping[str, int] = field(default_factory=dict)
    behind: Sequence[Pass] = ()
    error: float = 0.0
    missed: dict[str, Any] | None = None

    @property
    def type(self) -> str:
        return self.behind[0].options()["type"] if self.behind else "float32"


Part = tuple[list[Feed], list[int]]  # samples, and the right class of each or none


class _Hunt:
    """A search at work: what all starts share, and what was found so far."""

    def __init__(
        self, job: Job, given: Mapping[str, Any], search: Search, limits: Limits, sms: Sequence[int], keep_in: Path
    ):
        self.job, self.given, self.search, self.limits, self.sms = job, given, search, limits, sms
        self.keep_in = job.source.cache or keep_in
        self.crew = Crew(search.workers, search.cluster, job.progress, keep_in)
        self.metric = Metric(job, search.metric) if search.metric else None
        self.data, self.steering, self.proof = _split(job)
        self.clock = None
        if search.max_latency is not None:
            target, table = given.get("target", "tensorrt"), search.latency_table
            self.clock = clock_of(job.model, self.steering[0][0], target, sms, Path(table) if table else None)
        self.results: list[_Result] = []
        self._cast: Pass | None = None  # what stays float gets its type from it
        self._least = np.inf  # error of all nodes in 8 bits

    def run(self, passes: Sequence[Pass]) -> _Result:
        """The best result of the network that the passes in front of quantizations make, and of its variants."""
        before, self._cast = choices.in_front(passes), choices.cast(passes, self.given, self.search.float_type)
        graph, records = self._after(self.job.graph, [*self.job.prepared(), *before])
        self._asked, self._base = before, _Start("", choices.settled(before, records), graph)
        with self._prepared(self._base) as found:
            macs, size = sum(found.board.macs.values()), self.job.record["model"]["bytes"]
            self._whole, self._costs = found, choices.Whole(size, macs, self.search.minimize)
            self._search(self._base, found)
            for start in self._variants():
                with self._prepared(start) as found:
                    self._search(start, found)
        return self._best()

    def _best(self) -> _Result:
        """The best of the results that keep the limits; where none does, the most accurate one."""
        met = [result for result in self.results if result.record["met"]]
        if not met:
            return min(self.results, key=lambda result: result.chosen.error)
        first = ranked([result.chosen for result in met])[0]
        return next(result for result in met if result.chosen is first)

    def _variants(self) -> Iterator[_Start]:
        """The other networks. Each starts from the last exact one that paid."""
        yield from self._reparameterized()
        if not any(step.name == _SMOOTH for step in self._asked):
            yield from self._with(_SMOOTH, make(_SMOOTH, {"allow_insert": True}), finer=True)
        for share in self.search.prune_to:
            for name in ("prune", "approximate-ffn"):
                yield from self._with(f"{name} {share:.0%}", make(name, {"keep_macs": share}), exact=False)

    def _reparameterized(self) -> Iterator[_Start]:
        steps = self._asked
        if not any(step.name == _REPARAM for step in steps):
            place = next((i for i, step in enumerate(steps) if step.name in BEHIND_REPARAM), len(steps))
            steps = [*steps[:place], make(_REPARAM, {}), *steps[place:]]
            _, records = self._after(self.job.graph, [*self.job.prepared(), *steps[: place + 1]])
            if records[-1]["changed"]:
                graph, records = self._after(self.job.graph, [*self.job.prepared(), *steps])
                yield _Start("reparam", choices.settled(steps, records), graph)

    def _with(self, name: str, step: Pass, **how: bool) -> Iterator[_Start]:
        """The base behind one more pass, where the pass changes it."""
        try:
            graph, records = self._after(self._base.graph, [step])
        except ChannelfoldError as error:
            self.job.warn(f"The search has left out {name}: {error}")
            return
        if records[-1]["changed"]:
            yield _Start(name, [*self._base.steps, *choices.settled([step], records)], graph, **how)

    def _after(self, graph: gs.Graph, passes: Sequence[Pass]) -> tuple[gs.Graph, list[dict[str, Any]]]:
        quantizer = choices.steps(self.given)["int8"]
        return after(self.job, graph, passes, self.data, self.keep_in, quantizer)

    def _prepared(self, start: _Start) -> contextlib.AbstractContextManager[Prepared]:
        passes = choices.steps(self.given, self.sms)
        if self._cast and self._cast.options()["type"] == "bfloat16" and passes.pop(choices.TYPED, None):
            self.job.warn("The search has left out nvfp4, which is written beside float32 and float16 alone")
        return prepared(self.job, start.graph, passes, self.data, self.keep_in)

    def _search(self, start: _Start, found: Prepared) -> None:
        """Searches one network, where that is worth it."""
        written = Files(self.job, found, self.data)
        steering = self._split(found, written, self.steering, "points")
        error = self._worth(start, found, steering)
        if error is None:
            return
        proof = self._split(found, written, self.proof, "proof")
        samples = steering.files
        if not start.exact or found.board.texts:  # what is right for its sites is its own float
            samples = keep(found.board, brief(found.board, self.steering[0]), "sites")
            self.crew.count("sensitivities", len(samples))
        sites = measure(found.board, samples, choices.groups(start.graph, found.board), self.crew, guess=True)
        rest = self._rest(start, found.board, (steering, proof))
        (steering, proof), written.behind = rest.splits, rest.behind
        sites = self._costs.priced(found.board, sites, rest.bytes, error + rest.error, rest.widths)
        choice = Choice(sites, samples, steering, proof, self.limits, self.search.trials)
        written.choice = choice
        if self.clock:
            written.learn_times(self.clock, rest.type)
        chosen = choice.run()
        mix = choices.recipe(
            start.steps, found.passes, start.graph, found.board, chosen.point.chosen(choice.sites), rest.behind
        )
        told = telling.told(choice, chosen, start.name, rest.type)
        told["points"] += [rest.missed] if rest.missed else []
        self.results.append(_Result(choice, chosen, told, mix))

    def _rest(self, start: _Start, board: Board, splits: Sequence[Split]) -> _Rest:
        """The type of what stays float: what the user wants; else the recipe or the target, where it keeps limits."""
        plain = _Rest(_bytes(start.graph), splits)
        if self._cast is None:
            return plain
        wanted, graph = self.search.float_type != choices.AUTO, Snapshot.of(start.graph).graph()
        files.infer_shapes(graph)
        graph.outputs = [tensor for tensor, *_ in compared(graph)]
        try:
            graph, records = self._after(graph, [self._cast])
        except ChannelfoldError as error:
            if wanted:
                raise
            self.job.warn(f"What stays float is float32 in the search: {error}")
            return plain
        if not records[-1]["changed"]:
            return plain
        path = board.folder / "typed.onnx"
        files.save(graph, path)
        player, (_, runner) = board.player(), self.job.runners(path)
        read = _reader(runner, [tensor.name for tensor in graph.outputs])

        def typed(split: Split, feeds: list[Feed], labels: list[int]) -> tuple[Split, Errors]:
            feeds = feeds[: len(split.files)]
            self.crew.count(split.name, 2 * len(feeds))
            errors = _errors(board, (feeds, labels), player.run, read)
            return dataclasses.replace(split, typed=errors), errors

        steering, errors = typed(splits[0], *self.steering)
        if not wanted and not self._keeps(board, errors, steering):
            self.job.warn("What stays float is float32, for with 16 bits the float network itself misses the limits")
            (whole,) = self._costs.priced(board, [], _bytes(graph), 0.0, choices.widths(graph))
            lost = self._of_float(board, errors, steering, _bytes(graph), whole.costs[FLOAT])
            return dataclasses.replace(plain, missed=telling.told_float(lost, start.name, self._cast.options()["type"]))
        proof, _ = typed(splits[1], *self.proof)
        error = float(errors.by_sample().mean())
        return _Rest(_bytes(graph), (steering, proof), choices.widths(graph), [self._cast], error)

    def _split(self, found: Prepared, written: Files, part: Part, name: str) -> Split:
        board, (feeds, labels) = found.board, part
        metric = functools.partial(self.metric.loss, written) if self.metric else None
        files = keep(board, feeds, name, self._whole.board)
        self.crew.count(name, len(files))
        return Split(name, board, files, tuple(labels[: len(files)]), metric, self.crew)

    def _worth(self, start: _Start, found: Prepared, steering: Split) -> float | None:
        """The error of a network in float; None where a search on it is not worth its time."""
        mixes = {}, found.all_in("int8")
        trial = Trial(found.board, steering.files, mixes, labels=steering.labels)
        (errors,) = self.crew.each("networks", [trial])
        alone, acting = errors.by_sample().mean(axis=1).tolist()
        if start.finer and acting > _GAIN * self._least:
            return None
        if start.exact:
            self._least = min(self._least, acting)
            self._base = dataclasses.replace(start, finer=False)
            return 0.0
        return alone if self._keeps(found.board, errors, steering) else None

    def _keeps(self, board: Board, errors: Errors, split: Split) -> bool:
        """Whether the errors of a network without quantization keep the limits, as far as they tell."""
        lost = self._of_float(board, errors, split)
        return not self.limits.of_accuracy or bool(self.search.metric) or self.limits.accurate(lost)

    def _of_float(self, board: Board, errors: Errors, split: Split, size: int = 0, cost: float = 0.0) -> Figures:
        """The figures of a network without quantization."""
        return figures(Point((), size, cost, 0.0), errors, 0, board.scores, bool(split.labels))


Run = Callable[[Feed], Sequence[np.ndarray]]  # the outputs of a network on a feed


def _reader(runner: Any, names: Sequence[str]) -> Run:
    def run(feed: Feed) -> list[np.ndarray]:
        outputs = runner.run(feed)
        return [outputs[name] for name in names]

    return run


def _errors(board: Board, part: Part, right: Run, found: Run) -> Errors:
    """The errors of a network on samples."""
    feeds, labels = part
    meter = Meter(len(feeds), board.scores, 1, labels, board.mask)
    for place, feed in enumerate(feeds):
        meter.see(place, feed, right(feed), [found(feed)])
    return meter.errors


def _bytes(graph: gs.Graph) -> int:
    """Bytes of the file of a graph."""
    model, weights = files.export(graph)
    return model.ByteSize() + sum(values.nbytes for _, values in weights)


@dataclass(frozen=True)
class Found:
    """The passes that give the best model, and how to check the file that they make."""

    passes: list[Pass]
    job: Job
    result: _Result
    proof: Part
    metric: Metric | None
    clock: Clock | None

    def check(self, out: Path) -> None:
        """Measures the written file on the samples of the proof; raises GateMissed where it misses a limit.

        Outputs behind a closing Softmax, Sigmoid or ArgMax have no part in SNR: errors there are another quantity.
        """
        record, choice = self.job.record["search"], self.result.choice
        found = self._figures(out)
        board, limits = choice.proof.board, choice.limits
        if board.ends != board.outputs:
            limits = dataclasses.replace(limits, min_snr=None)
            limits = dataclasses.replace(limits, max_loss=None) if record["loss"] == RELATIVE else limits
        size = self.job.record["output"]["bytes"]
        met = limits.accurate(found) and (limits.max_size is None or size <= limits.max_size)
        record["file"] = telling.shown(found) | {"bytes": size, "latency": None}
        if self.clock and limits.max_latency is not None:
            assert choice.latency is not None
            predicted = choice.latency.share(self.result.chosen.point.options)
            time = self.clock.proved(out, self.job.record["engines"], predicted)
            met = met and time.low <= limits.max_latency  # a time above by less than its noise is within it
            record["file"]["latency"] = {**dataclasses.asdict(time), "how": self.clock.how}
        record["file"]["met"] = met
        record["met"] = record["met"] and met
        if not record["met"]:
            what = f"{record['loss']} lost {found.loss:.2%}, SNR {found.snr:.1f} dB, {size:,} bytes"
            if time := record["file"]["latency"]:
                what += f", {time['value']:.1%} of the time ({time['low']:.1%} to {time['high']:.1%}, {time['how']})"
            asked = ", ".join(f"{name.replace('_', '-')} {limit:g}" for name, limit in record["limits"].items())
            missed = f"No point keeps the limits ({asked})"
            raise GateMissed(GateError(missed, f"The nearest was written: {what}"), self.job.record)

    def _figures(self, out: Path) -> Figures:
        board, own = self.result.choice.proof.board, self.metric
        right, found = (_reader(runner, board.ends) for runner in self.job.runners(out))
        errors = _errors(board, self.proof, right, found)
        metric = (lambda _: own.of(out)) if own else None
        return figures(self.result.chosen.point, errors, 0, board.scores, bool(self.proof[1]), metric)


def find(
    job: Job,
    passes: Sequence[Pass],
    given: Mapping[str, Any],
    search: Search,
    gates: Any,
    sms: Sequence[int] = (),
    *,
    keep_in: Path,
) -> Found:
    """The passes that give the best model, in place of the quantizations in ``passes``; adds ``record["search"]``.

    Data for calibration that the search holds back are not used by the passes either. ``gates`` are limits as well.
    ``sms``: the GPUs that have to run the result. ``keep_in``: a folder for what a later call need not measure again.
    """
    if job.calibration is None:
        raise DataError("A search needs calibration data", "Give some with --calibration")
    if search.latency_table and search.max_latency is None:
        raise UsageError("A table of times was given, and no limit of time", "Add --max-latency")
    choices.steps(given)
    choices.cast(passes, given, search.float_type)
    limits = _limits(search, gates, job.record["model"]["bytes"])
    hunt = _Hunt(job, given, search, limits, sms, keep_in)
    if hunt.clock and hunt.clock.warning:
        job.warn(hunt.clock.warning)
    with hunt.crew:
        best = hunt.run(passes)
    if hunt.crew.resumed:
        job.warn(f"{hunt.crew.resumed:.0f} of {sum(hunt.crew.runs.values()):.0f} runs were done by an earlier call")
    job.record["search"] = telling.together(best.record, [result.record for result in hunt.results], hunt.crew)
    job.calibration = hunt.data
    return Found(best.passes, job, best, hunt.proof, hunt.metric, hunt.clock)


def _limits(search: Search, gates: Any, whole: int) -> Limits:
    """The limits of a search for a model of ``whole`` bytes; those of the verdict OK where there are none."""
    size = search.max_size * whole if search.max_size is not None and search.max_size <= 1 else search.max_size
    limits = Limits(search.max_loss, gates and gates.min_snr, gates and gates.min_agreement, size, search.max_latency)
    return Limits(min_snr=DEGRADED_SNR) if limits == Limits() else limits


def _split(job: Job) -> tuple[Data, Part, Part]:
    """(calibration, samples that steer, samples of the proof)."""
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
        parts.append((list(source.at(own)), [labels[i] for i in own] if labels else []))
    return data, parts[0], parts[1]


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
