"""The common steps of the commands: open the data, transform the model, compare outputs, build engines."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs

import channelfold
from channelfold.passes import pipeline, verify
from channelfold.passes.base import Context, Pass
from channelfold.passes.fold import InlineFunctions
from channelfold.passes.layers import account
from channelfold.runtime.data.probes import STEPS, random_data, rolls
from channelfold.runtime.data.reading import IMAGE_OPTIONS, TEXT_OPTIONS, Reading
from channelfold.runtime.data.sources import Data, load_script, open_data
from channelfold.runtime.data.text import open_text
from channelfold.runtime.engine import build as tensorrt
from channelfold.runtime.engine.blocks import FIRST_SCALES, refusal, wrong_products
from channelfold.runtime.engine.build import ShapeRange
from channelfold.runtime.engine.repair import repaired
from channelfold.runtime.engine.run import EngineSession
from channelfold.runtime.errors import (
    ChannelfoldError,
    DataError,
    DependencyError,
    GateError,
    ModelError,
    UsageError,
    VerificationError,
    nearest,
)
from channelfold.runtime.io import bfloat16, files
from channelfold.runtime.io.bodies import share_constants, tell_apart
from channelfold.runtime.io.convert import carried
from channelfold.runtime.io.edit import fix_inputs, see_through_identities, take_defaults
from channelfold.runtime.io.emulate import emulate
from channelfold.runtime.io.facts import (
    computes_as_written,
    environment,
    external_files,
    fuses_rightly,
    model_facts,
    required_inputs,
)
from channelfold.runtime.io.front import Front, unknown
from channelfold.runtime.io.outputs import check_folder, check_kind
from channelfold.runtime.io.session import Feed, Session
from channelfold.runtime.io.shapes import check_sizes, squeeze_weights
from channelfold.runtime.jobs import engines
from channelfold.runtime.jobs import inspect_model as inspection
from channelfold.runtime.jobs.own_cache import Owned, uncut
from channelfold.runtime.report import advice
from channelfold.runtime.stats import compare
from channelfold.runtime.stats.bench import latencies
from channelfold.runtime.stats.compare import Gates, Runner

Record = dict[str, Any]
Progress = Callable[[str, int, int], None]

SEEN = 16  # calibration samples on which outputs are compared without evaluation data; they flatter the result anyway …
_COSTLY = 1 << 26  # … bytes of a model from which on half of them must do
PROBES = 4  # random samples on which outputs are compared without any data


class GateMissed(GateError):
    """A gate was missed. All files are written; ``record`` is the report."""

    def __init__(self, error: GateError, record: Record):
        super().__init__(str(error))
        self.record = record


@dataclass(frozen=True)
class Source:
    """The sources of the data: paths, Python objects (``open_data``) or ``Data``.

    ``random``: the number of random samples in place of calibration data (in ``diff``, of evaluation data).
    ``allow_script``: a path may be a Python script, which is run. ``seed``: the seed of all random numbers.
    ``reading``: how images and texts become samples. ``cache``: a folder that keeps statistics of the calibration data,
    and layers that GPTQ has rounded, which later calls with the same model and data find there.
    """

    calibration: Any = None
    evaluation: Any = None
    random: int | None = None
    allow_script: bool = False
    seed: int = 0
    reading: Reading = Reading()
    cache: Path | None = None


@dataclass(frozen=True)
class _Fixed:
    """A model some inputs of which have the same values on every feed."""

    session: Runner
    values: Mapping[str, Any]

    def run(self, feed: Feed) -> Mapping[str, Any]:
        return self.session.run({**feed, **self.values})


class Job:
    """A command at work. ``record`` is the report so far."""

    def __init__(
        self, command: str, model: Path, progress: Progress, source: Source, fixed: Mapping[str, str] | None = None
    ):
        self.model, self.progress, self.source = model, progress, source
        progress("load", 0, 0)
        self.graph: gs.Graph = files.load(model, strict=True)
        self.fixed = fix_inputs(self.graph, fixed or {})
        self.inputs = required_inputs(self.graph)
        external = external_files(model)
        self.sources = [model, *external]  # files that the command reads and must not overwrite
        self.calibration: Data | None = None
        self._caches: dict[str, Any] = {}
        self.evaluation: Data | None = None
        # the data of the comparison, and the original's outputs where they are held
        self._reference: tuple[Data, Runner | None] | None = None
        self.comparison: compare.Comparison | None = None
        self.record: Record = {
            "schema": 1,
            "tool": f"channelfold {channelfold.__version__}",
            "command": command,
            "model": model_facts(model, self.graph, external),
            "output": None,
            "data": {},
            "steps": [],
            "accuracy": None,
            "gates": [],
            "engines": [],
            "latency": [],
            "warnings": [],
            "environment": environment(),
        }
        check_sizes(self.graph, self.record["model"]["bytes"])
        if stale := files.drop_stale_shapes(self.graph):
            self.warn(f"The file contradicts itself, so the shapes that its value_info names were not used: {stale}")

    def open(self, role: str, source: Any, random: int | None = None) -> Data | None:
        """The data for a role, from a source or ``random`` samples; None without both."""
        if random and source is not None:
            raise UsageError(f"Both {role} data and --random were given", "Give one of them")
        data = self._random(random) if random else self._opened(source)
        if data is not None:
            self.record["data"][role] = data.description
            self.record["data"] |= {"preparation": data.preparation} if data.preparation else {}
            self.warn(*(f"{role} data: {note}" for note in data.notes))
            if unused := self.source.reading.given([*{*IMAGE_OPTIONS, *TEXT_OPTIONS} - {*data.heeds}]):
                self.warn(f"{role} data: {', '.join(sorted(unused))} was ignored: the data are of another kind")
        return data

    def open_both(self) -> None:
        """Opens the calibration and evaluation data. Reads all evaluation data, so that errors show before the work."""
        self.calibration = self.open("calibration", self.source.calibration, self.source.random)
        self.evaluation = self.open("evaluation", self.source.evaluation)
        for _ in self.evaluation or ():
            pass

    def transform(
        self,
        passes: Sequence[Pass],
        out: Path,
        checkpoint: Path | None = None,
        gated: bool = False,
        counted: bool = False,
        nothing: str = "Nothing was changed",
    ) -> None:
        """Runs the passes, writes the model, opens it again and compares it with the original.

        ``counted``: the record counts the parameters and multiply-accumulates of both models. ``nothing``: the start of
        the warning for the case that no pass has changed anything. ``gated``: a gate needs the comparison.
        """
        self.check_output(out, "an ONNX file")
        if self.source.cache is not None:
            check_folder(self.source.cache)
        exact = all(step.kind == "exact" for step in passes)
        proved = bool(self.evaluation or not exact or self.fixed or (gated and self.calibration))
        if proved and self.record["model"]["bytes"] <= verify.LARGE:
            self._refer()  # a model that cannot be compared must show before the work
        if counted:
            self.record["model"] |= inspection.costs(self.graph)
        passes = [*self.prepared(), *passes]
        context = Context(self.calibration, self.progress, self.source.seed, keep=self.source.cache or checkpoint)
        with self.blaming():
            graph, steps = pipeline.run(self.graph, passes, context, checkpoint=checkpoint, on_violation="undo")
        self.record["steps"] = steps
        for step in steps:
            self._caches |= step["facts"].pop("cache", {})
        if resumed := sum(step.get("resumed", False) for step in steps):
            self.warn(f"{resumed} of {len(steps)} steps were done by an earlier, interrupted call")
        self.warn(*pipeline.warnings(steps))
        self.progress("save", 0, 0)
        with files.saving(graph, out) as candidate:
            del graph, self.graph
            gc.collect()  # nodes and tensors refer to each other; their mapped weights count as memory while they live
            written = files.load(candidate)
            facts = inspection.costs(written) if counted else {}
            self.record["output"] = model_facts(candidate, written) | {"path": str(out)} | facts
            self._account(written, nothing)
            as_written, fuse = computes_as_written(written), fuses_rightly(written)
            del written
            timed = any(step["changed"] and step["options"].get("target") == "onnxruntime" for step in steps)
            if proved:
                self.prove(candidate, as_written, fuse, timed)

    @contextlib.contextmanager
    def blaming(self) -> Iterator[None]:
        """Where work on a model that ONNX Runtime cannot run goes wrong, the error is that of ONNX Runtime."""
        try:
            yield
        except Exception as error:
            if isinstance(error, ChannelfoldError) and not isinstance(error, VerificationError):
                raise
            with contextlib.suppress(DependencyError, DataError):
                session = self._session(self.model, optimize=False)
                session.run(next(iter(random_data(self.inputs, 1, seed=self.source.seed))))
            raise

    def _time(self, feed: Feed, candidate: Runner) -> None:
        """Measures the latency of both models, in turns, on one sample; warns of a slower candidate."""
        sessions = {"float": self._original(timed=True), "quantized": candidate}
        runs = {name: functools.partial(session.run, feed) for name, session in sessions.items()}
        found = latencies(runs, rounds=9, warmup=1, seconds=1.0)
        self.record["latency"] = [{"name": f"{t.name}, ONNX Runtime on this machine", "ms": t.ms} for t in found]
        ratio = found[1].ms / found[0].ms
        if round(ratio, 2) > 1:
            self.warn(f"The quantized file is {ratio:.2f}x as slow as float on this machine")
            self.record["next"] = list(dict.fromkeys([*self.record.get("next", ()), *advice.faster(self.record)]))

    def prepared(self) -> list[Pass]:
        """Passes that show all weights to the others: makes inputs with defaults constants, and inlines functions."""
        if names := take_defaults(self.graph):
            some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            self.warn(f"Inputs with default values were taken as constants, which no caller can override: {some}")
        see_through_identities(self.graph)
        squeeze_weights(self.graph)
        tell_apart(self.graph)
        if saved := share_constants(self.graph):
            self.warn(f"Parts of the model held the same weights, which are now stored once: {saved:,} bytes less")
        own = carried(self.graph)
        return [InlineFunctions()] if own is not None and own.header.functions else []

    def _account(self, graph: gs.Graph, nothing: str) -> None:
        """Records the account of the weight bytes; warns where many stay float, or where nothing was changed."""
        steps = self.record["steps"]
        quantized = [step for step in steps if "quantized" in step["facts"]]
        reasons = {r["node"]: r["code"] or r["reason"] for step in quantized for r in step["refused"]}
        rows = account.account(graph, reasons if quantized else None)
        self.record["weights"] = account.to_json(rows)
        if not any(step["changed"] for step in steps):
            self.warn(f"{nothing}: the result computes with the weights that the model had")
        if quantized and (left := account.unasked(rows)):
            self.warn(left)

    def check_share(self, least: float | None) -> None:
        """Raises GateMissed where less than the share ``least`` of the weight bytes is quantized."""
        found = self.record["weights"]["share"]
        if least is None:
            return
        gate = compare.Gate("quantized weights", "", found, f"{found:.1%}", f"at least {least:.1%}", found >= least)
        self.record["gates"].append(dataclasses.asdict(gate))
        if not gate.met:
            reason = f"{gate.found} of the weight bytes are quantized, {least:.1%} are required"
            raise GateMissed(GateError(reason, "The table of weights says what the others are"), self.record)

    def check_output(self, out: Path, kind: str) -> None:
        """Raises an error, before the work, where the result could not be written or would destroy another file."""
        for source in filter(Path.exists, self.sources if out.exists() else ()):
            if out.samefile(source):
                what = "the model itself, which the result is compared with" if source == self.model else "an input"
                raise UsageError(f"{out} is {what}", "Give another output")
            if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
                raise UsageError(f"{out} is one of the files in {source}, which are read", "Give another output")
        check_kind(out, kind)

    def _refer(self) -> None:
        """Chooses the data of the comparison and runs the original on them, so that one model is open at a time."""
        data = self.evaluation or self.calibration
        if data is None:
            data = self._probes()
            if data is None:
                return
        elif data is self.calibration and not data.synthetic:
            data = data.first(SEEN if self.record["model"]["bytes"] < _COSTLY else SEEN // 2)
            self.warn("The outputs were compared on the calibration data; --evaluation compares them on unseen data")
        self.record["data"]["evaluation"] = data.description
        self._reference = data, compare.remembered(self._original(exact=True), data)

    def prove(self, candidate: Path, as_written: bool, fuse: bool = True, timed: bool = False) -> None:
        """Compares the outputs of the candidate with those of the original.

        ``as_written``: the file is not quantized for ONNX Runtime (``computes_as_written``). ``fuse``: see
        ``fuses_rightly``. ``timed``: the latencies of both are measured as well.
        """
        if self._reference is None:
            self._refer()
        if self._reference is None:
            return
        data, held = self._reference
        reference = uncut(held or self._original(exact=True), self._caches)
        exact = self._candidate(candidate, exact=True, fuse=fuse)
        here = exact if as_written else self._candidate(candidate, timed=timed)
        if as_written:
            self.comparison = compare.compare(reference, exact, data, self.progress)
            self.record["accuracy"] = self.comparison.to_json()
        else:  # the file is for ONNX Runtime, so its results on this machine count as well
            found = compare.compare_all(reference, [here, exact], data, self.progress)
            self.comparison = found[0]
            self.record["accuracy"] = found[0].to_json() | {"exact": found[1].to_json()}
            if lost := compare.saturation(*found):
                self.warn(lost)
        level, reasons = compare.verdict(self.comparison)
        if level != "ok":
            self.warn(f"THE OUTPUTS HAVE {level.upper()} on {data.description}: {'; '.join(reasons)}")
            self.record["next"] = advice.next_steps(self.record)
        if timed:
            self._time(next(iter(data)), here)

    def runners(self, path: Path) -> tuple[Runner, Runner]:
        """The original and a result of it, whose outputs can be compared."""
        return self._original(exact=True), self._candidate(path, exact=True, fuse=fuses_rightly(files.load(path)))

    def _original(self, **options: Any) -> Runner:
        """The original, which is given the values of the inputs that are fixed."""
        return _Fixed(self._session(self.model, **options), self.fixed)

    def _candidate(self, path: Path, **options: Any) -> Runner:
        """The result, which is given and returns its cache as the original has it."""
        session = self._session(path, **options)
        return Owned(session, self._caches) if self._caches else session

    def _session(self, path: Path, **options: Any) -> Session | Front:
        """The model in ONNX Runtime, its twin that rounds to bfloat16, or the part in front of unknown operators."""
        try:
            return Session(path, **options)
        except ModelError:
            graph = files.load(path)
            if bfloat16.computes(graph):
                how = "in float32, with the result of every node rounded to bfloat16"
                self.warn(f"ONNX Runtime has no bfloat16 kernels on a CPU: the outputs were compared {how}")
                return bfloat16.twin_session(path, **options)
            if emulate(graph):
                self.warn("ONNX Runtime has no 4-bit floating point numbers: their rounding was computed in float32")
                return files.session(graph, **options)
            if not unknown(graph):
                raise
        front = Front(path, **options)
        said = f"ONNX Runtime does not know {', '.join(front.operators)}: the outputs were compared in front of it"
        self.warn(f"{said}, the results behind it were not")
        return front

    def build(
        self,
        model: Path,
        engine: Path,
        sm: int | None,
        shapes: Mapping[str, ShapeRange],
        sparse_weights: bool = False,
    ) -> None:
        """Builds an engine, reads its plan and compares its outputs."""
        self.check_output(engine, "an engine")
        unknown = sorted(shapes.keys() - {spec.name for spec in self.inputs})
        if unknown:
            raise UsageError(
                f"--shape names {unknown[0]!r}, which is no input",
                nearest(unknown[0], {spec.name for spec in self.inputs}),
            )
        open_inputs = [spec for spec in self.inputs if spec.name not in shapes]
        ranges = {**tensorrt.default_shapes(open_inputs, self.calibration), **shapes}
        with repaired(model, self.inputs, ranges) as (source, sentences):
            self.warn(*(f"engine: {sentence}" for sentence in sentences))
            if nodes := wrong_products(files.load(source)):
                raise refusal(model.name, nodes)
            built = tensorrt.build(
                source,
                engine,
                sm=sm,
                shapes=ranges,
                values=tensorrt.default_values(open_inputs, self.calibration),
                sparse_weights=sparse_weights,
                progress=self.progress,
            )
            entry = engines.entry(built, files.load(source))
            if built.plan.wrong:
                engine.unlink()
                raise refusal(model.name, dict.fromkeys(built.plan.wrong, FIRST_SCALES))
        entry["accuracy"] = self._proved_engine(built)
        self.record["engines"].append(entry)
        self.warn(*(f"{engine.name}: {text}" for text in built.warnings))

    def _proved_engine(self, built: tensorrt.Engine) -> Record | None:
        """The comparison of the engine's outputs with the original; None without data or a GPU of its kind."""
        data = self.evaluation or self.calibration
        if data is None or tensorrt.local_gpu()[0] is None or built.sm not in (None, tensorrt.local_gpu()[0]):
            return None
        with EngineSession(built.path, built.backend) as engine:
            found = compare.compare(self._original(exact=True), engine, data, self.progress)
        level, reasons = compare.verdict(found)
        if level != "ok":
            self.warn(f"THE ENGINE'S OUTPUTS HAVE {level.upper()} on {data.description}: {'; '.join(reasons)}")
        return found.to_json()

    def check(self, gates: Gates | None) -> None:
        """Raises GateMissed where the comparison misses a gate."""
        if gates is None or gates == Gates():
            return
        if self.comparison is None:
            raise GateMissed(
                GateError("The outputs were not compared, so every gate is missed", "Give --evaluation"), self.record
            )
        self.record["gates"] += map(dataclasses.asdict, compare.gates_of(self.comparison, gates))
        try:
            compare.check_gates(self.comparison, gates)
        except GateError as error:
            self.record["next"] = advice.next_steps(self.record)
            raise GateMissed(error, self.record) from None

    def _opened(self, source: Any) -> Data | None:
        if source is None or isinstance(source, Data):
            return source
        if isinstance(source, str | Path):
            if not str(source):
                raise UsageError("The path of the data is empty", "Is the variable that should hold it set?")
            self.sources.append(Path(source))
        if isinstance(source, str | Path) and Path(source).suffix == ".py":
            if not self.source.allow_script:
                raise UsageError(f"{source} is a Python script, and reading data from it runs it", "Add --allow-script")
            return load_script(source, self.inputs)
        if isinstance(source, str | Path) and Path(source).suffix.lower() == ".txt":
            run, reading = self._runs(), self.source.reading
            self.sources += [Path(reading.tokenizer)] if reading.tokenizer else []
            return open_text(Path(source), self.inputs, reading, self.model.parent, run)
        return open_data(source, self.inputs, self.source.reading)

    def _random(self, n: int) -> Data:
        """Random samples; the steps of rollouts of the original where the model is a decoder."""
        return random_data(self.inputs, n, seed=self.source.seed, run=self._runs())

    def _runs(self) -> Callable[[Feed], Mapping[str, Any]]:
        """Runs the original, which is opened with the first feed."""
        opened = functools.cache(self._original)
        return lambda feed: opened().run(feed)

    def _probes(self) -> Data | None:
        """Random samples for the comparison; None, with a warning, where the original does not run on them."""
        hint = "Give --calibration or --evaluation to have them compared"
        if self.record["model"]["bytes"] > verify.LARGE:
            self.warn(f"The outputs were not compared, because there are no data and the model is large. {hint}")
            return None
        try:
            probes = self._random(1 + STEPS if rolls(self.inputs) else PROBES)
            self._original().run(next(iter(probes)))
        except (DataError, ModelError) as error:
            self.warn(f"The outputs were not compared, because the model does not run on random inputs: {error} {hint}")
            return None
        self.warn(f"The outputs were compared on {probes.description} only, which says nothing about accuracy. {hint}")
        return probes

    @contextlib.contextmanager
    def or_warning(self, failed: str) -> Iterator[None]:
        """Makes a warning of an error in a part of a command that is not its result."""
        try:
            yield
        except (ModelError, DataError) as error:
            self.warn(f"{failed}: {error}")

    def warn(self, *texts: str) -> None:
        self.record["warnings"] += [text for text in texts if text not in self.record["warnings"]]
