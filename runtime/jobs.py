"""One Python call per command: load, transform, prove, build, and return the report record.

::

    from channelfold.runtime import jobs

    record = jobs.compress("model.onnx", "out", calibration="calibration.npz", evaluation="evaluation.npz", sms=[89])
    record["accuracy"]["outputs"][0]["snr"]  # dB, original against compressed

Every call that writes a model opens the written file again and compares its outputs with the original's: on evaluation
data where given, else on the calibration data, else on a few random probes; ``record["data"]["evaluation"]`` says on
which. Steps that are all exact have been verified one by one, and are compared only on evaluation data, or for a gate.
Data is a path, a Python object (see ``calibration.open_data``) or a ``Data``; ``random=N`` asks for N random
samples in its place. Models, recipes and data raise the ChannelfoldError subclasses of ``passes.base``.
"""

from __future__ import annotations

import contextlib
import gc
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs

import channelfold
from channelfold.passes import methods, pipeline, verify
from channelfold.passes import recipe as recipes
from channelfold.passes import sparsify as sparsify_pass
from channelfold.passes.base import (
    Context,
    DataError,
    GateError,
    ModelError,
    OutputError,
    Pass,
    UsageError,
    nearest,
    no_progress,
)
from channelfold.runtime import compare, graph_io, inspection, report, tensorrt
from channelfold.runtime import groups as channel_groups
from channelfold.runtime import idle as idle_channels
from channelfold.runtime.calibration import Data, load_script, open_data, random_data
from channelfold.runtime.checkpoint import clear
from channelfold.runtime.compare import Gates
from channelfold.runtime.ort import Session, onnxruntime
from channelfold.runtime.shapes import name_squeezed_axes, squeezes_without_axes
from channelfold.runtime.tensorrt import ShapeRange
from channelfold.runtime.tensorrt_run import EngineSession

Record = dict[str, Any]
Progress = Callable[[str, int, int], None]
PathLike = str | Path
Shapes = Mapping[str, ShapeRange] | Sequence[str]

SEEN = 16  # samples compared when there are only those of the calibration, which flatter a result anyway
PROBES = 4  # random samples an exact rewrite is checked on when there is no data


class GateMissed(GateError):
    """A gate was missed. All files are written; ``record`` is the report."""

    def __init__(self, error: GateError, record: Record):
        super().__init__(str(error))
        self.record = record


def compress(
    model: PathLike,
    out_dir: PathLike,
    recipe: PathLike = "int8",
    *,
    calibration: Any = None,
    evaluation: Any = None,
    random: int | None = None,
    allow_script: bool = False,
    overrides: Mapping[str, Any] | None = None,
    sms: Sequence[int] = (),
    shapes: Shapes = (),
    gates: Gates | None = None,
    seed: int = 0,
    command: str = "compress",
    progress: Progress = no_progress,
) -> Record:
    """Runs a recipe; writes ``out_dir``/model.onnx, model.smNN.engine for each of ``sms``, and report.json.

    ``recipe``: a name or the path of a TOML file. ``overrides``: pass options by name (``calibrator``, ``exclude`` …),
    set on every pass of the recipe that has them. ``shapes``: ranges of dynamic inputs for the engines; by default
    those of the calibration data. An interrupted call goes on where it stopped when it is repeated. ``command``: the
    command line, for the report.

    Raises GateMissed after everything is written.
    """
    model, out_dir = Path(model), Path(out_dir)
    loaded = recipes.load_recipe(recipe)
    passes = _overridden(loaded.passes, overrides or {})
    ranges = _parsed(shapes)
    onnxruntime()
    for sm in sms:
        tensorrt.backend(sm)
    _check_folder(out_dir)
    out = out_dir / "model.onnx"
    job = _Job(command, model, progress, seed, allow_script)
    job.warn(*loaded.warnings)
    job.calibration = job.open("calibration", calibration, random)
    job.evaluation = job.open_evaluation(evaluation)
    job.transform(passes, out, checkpoint=out_dir / "checkpoint", gated=gates is not None and gates != Gates())
    report.write_json(job.record, out_dir / "report.json")
    for sm in sms:
        job.build(out, out_dir / f"model.sm{sm}.engine", sm, ranges)
    report.write_json(job.record, out_dir / "report.json")
    clear(out_dir / "checkpoint")
    job.check(gates)
    return job.record


def fold(model: PathLike, out: PathLike, *, seed: int = 0, progress: Progress = no_progress) -> Record:
    """Applies the exact folds: the same function in fewer nodes. Writes ``out``."""
    job = _Job("fold", Path(model), progress, seed)
    job.transform(recipes.load_recipe("fold").passes, Path(out))
    return job.record


def smooth(
    model: PathLike,
    out: PathLike,
    method: str = "auto",
    *,
    calibration: Any = None,
    evaluation: Any = None,
    random: int | None = None,
    allow_script: bool = False,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Record:
    """Scales the channels of activations for quantization, without quantizing. Writes ``out``.

    ``method`` and the ``options`` it heeds: see ``passes.methods``. equalize and reorder need no data.
    """
    passes = methods.passes_of(method, options or {})
    job = _Job("smooth", Path(model), progress, seed, allow_script)
    job.calibration = job.open("calibration", calibration, random)
    job.evaluation = job.open_evaluation(evaluation)
    job.transform(passes, Path(out))
    if not any(step["changed"] for step in job.record["steps"]):
        job.warn("No channel was changed: the result computes with the weights that the model had")
    return job.record


def prune(
    model: PathLike,
    out: PathLike,
    *,
    calibration: Any = None,
    evaluation: Any = None,
    random: int | None = None,
    allow_script: bool = False,
    dead: bool = False,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Record:
    """Folds, then removes channels: with the ``options`` of the pass ``prune``, or the ``dead`` ones. Writes ``out``.

    The record counts ``parameters`` and ``macs`` (per sample, None where a size is open) in ``model`` and ``output``.
    """
    options = dict(options or {})
    budgets = [name for name in ("keep_macs", "keep_params", "ratio") if options.get(name) is not None]
    if dead and budgets:
        raise UsageError(f"Dead channels go whatever {budgets[0]!r} is", "Give one of the two, or run prune twice")
    if not dead and not budgets:
        raise UsageError(
            "How much to prune is not said", "Give --keep-macs 0.5, --keep-params 0.5, --ratio 0.3 or --dead"
        )
    wanted = {k: v for k, v in options.items() if not dead or k == "align"}
    last = recipes.make("remove-dead-channels" if dead else "prune", wanted)
    job = _Job("prune", Path(model), progress, seed, allow_script)
    job.calibration = job.open("calibration", calibration, random)
    job.evaluation = job.open_evaluation(evaluation)
    job.record["model"] |= inspection.costs(job.graph)
    job.transform([*recipes.load_recipe("fold").passes, last], Path(out))
    job.record["output"] |= inspection.costs(graph_io.load(out))
    if not job.record["steps"][-1]["changed"]:
        job.warn("No channel was removed: channelfold inspect --groups shows what could be, and why not")
    return job.record


def sparsify(
    model: PathLike,
    out: PathLike,
    *,
    calibration: Any = None,
    evaluation: Any = None,
    random: int | None = None,
    allow_script: bool = False,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Record:
    """Sets weights to zero in a pattern, with the ``options`` of the pass ``sparsify``. Writes ``out``."""
    step = recipes.make("sparsify", options or {})
    job = _Job("sparsify", Path(model), progress, seed, allow_script)
    job.calibration = job.open("calibration", calibration, random)
    job.evaluation = job.open_evaluation(evaluation)
    job.transform([step], Path(out))
    job.warn(*sparsify_pass.worth(job.record["steps"][-1]["facts"], job.record["steps"][-1]["options"]["pattern"]))
    return job.record


def reparam(
    model: PathLike,
    out: PathLike,
    *,
    calibration: Any = None,
    evaluation: Any = None,
    random: int | None = None,
    allow_script: bool = False,
    approximate: bool = False,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Record:
    """Folds, then makes one dense layer of FFN channels that bypass the activation. Writes ``out``.

    With ``approximate`` hidden channels are removed then, which needs data. ``options`` are those of the passes
    ``reparameterize-ffn`` and ``approximate-ffn``. The record counts ``parameters`` and ``macs`` (per sample, None
    where a size is open) in ``model`` and ``output``.
    """
    given = dict(options or {})
    own = {name: given.pop(name) for name in given.keys() & {"always"}}
    passes = _overridden(recipes.load_recipe("reparam").passes, own)
    if given and not approximate:
        name = min(given).replace("_", "-")
        raise UsageError(f"--{name} is for networks that are not folded exactly", "Add --approximate")
    if approximate:
        passes.append(recipes.make("approximate-ffn", given))
    job = _Job("reparam", Path(model), progress, seed, allow_script)
    job.calibration = job.open("calibration", calibration, random)
    job.evaluation = job.open_evaluation(evaluation)
    job.record["model"] |= inspection.costs(job.graph)
    job.transform(passes, Path(out))
    job.record["output"] |= inspection.costs(graph_io.load(out))
    folded = any(step["changed"] for step in job.record["steps"] if step["pass"] == "reparameterize-ffn")
    if not folded and not approximate:
        job.warn("No FFN has channels that bypass the activation: channelfold inspect --idle shows what there is")
    return job.record


def quantize(
    model: PathLike,
    out: PathLike,
    *,
    calibration: Any = None,
    random: int | None = None,
    allow_script: bool = False,
    weights_only: bool = False,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Record:
    """Quantizes to int8, without folding first. Writes ``out``.

    ``options`` are those of the pass: ``quantize``, or ``quantize-weights`` with ``weights_only``, which needs no data.
    """
    step = recipes.make("quantize-weights" if weights_only else "quantize", options or {})
    job = _Job("quantize", Path(model), progress, seed, allow_script)
    job.calibration = job.open("calibration", calibration, random)
    job.transform([step], Path(out))
    return job.record


def build(
    model: PathLike,
    engine: PathLike,
    *,
    sm: int | None = None,
    shapes: Shapes = (),
    data: Any = None,
    allow_script: bool = False,
    sparse_weights: bool = False,
    progress: Progress = no_progress,
) -> Record:
    """Builds a TensorRT engine and reads back in which arithmetic its nodes run. Writes ``engine``.

    ``sm``: 10 x compute capability, by default that of this machine's GPU. Dynamic inputs need ``shapes``, or ``data``
    whose shapes are taken. ``sparse_weights``: weights in which 2 of 4 inputs are zero may run on sparse tensor cores.
    """
    job = _Job("build", Path(model), progress, 0, allow_script)
    job.calibration = job.open("shapes", data)
    job.build(job.model, Path(engine), sm, _parsed(shapes), sparse_weights)
    return job.record


def diff(
    a: PathLike,
    b: PathLike,
    *,
    data: Any = None,
    random: int | None = None,
    allow_script: bool = False,
    gates: Gates | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Record:
    """Compares the outputs of two models on the same data. Raises GateMissed."""
    job = _Job("diff", Path(a), progress, seed, allow_script)
    job.evaluation = job.open("evaluation", data, random)
    if job.evaluation is None:
        raise UsageError("There is nothing to compare the models on", "Give --data, or --random N")
    job.record["output"] = inspection.model_facts(Path(b), graph_io.load(b))
    job.prove(Path(b))
    job.check(gates)
    return job.record


def inspect(
    model: PathLike,
    *,
    calibration: Any = None,
    allow_script: bool = False,
    idle: bool = False,
    groups: bool = False,
    progress: Progress = no_progress,
) -> Record:
    """What is in a model: ``record["inspection"]``, described in ``inspection.inspect``.

    With ``idle`` also ``record["ffns"]``, described in ``idle.idle``; with ``groups`` also ``record["groups"]``,
    described in ``groups.describe``.
    """
    job = _Job("inspect", Path(model), progress, 0, allow_script)
    data = job.open("calibration", calibration)
    job.record["inspection"] = inspection.inspect(job.model, job.graph, data, progress)
    if idle:
        job.record["ffns"] = idle_channels.idle(job.graph, data, progress)
    if groups:
        job.record["groups"] = channel_groups.describe(job.graph, job.seed)
    return job.record


def demo(
    out_dir: PathLike | None = None,
    *,
    model: str = "digits_cnn",
    sms: Sequence[int] = (86, 89),
    progress: Progress = no_progress,
) -> Record:
    """Compresses a shipped network into ``out_dir`` (by default a temporary folder); see ``runtime.demo``.

    ``model``: a name in ``channelfold.models.MODELS``.
    """
    from channelfold.runtime import demo as shipped

    return shipped.run(model, None if out_dir is None else Path(out_dir), sms, progress)


class _Job:
    """A record in the making, and what fills it."""

    def __init__(self, command: str, model: Path, progress: Progress, seed: int = 0, allow_script: bool = False):
        self.model, self.progress, self.seed, self.allow_script = model, progress, seed, allow_script
        progress("load", 0, 0)
        self.graph: gs.Graph = graph_io.load(model)
        self.inputs = inspection.required_inputs(self.graph)
        self.calibration: Data | None = None
        self.evaluation: Data | None = None
        self.comparison: compare.Comparison | None = None
        self.record: Record = {
            "schema": 1,
            "tool": f"channelfold {channelfold.__version__}",
            "command": command,
            "model": inspection.model_facts(model, self.graph),
            "output": None,
            "data": {},
            "steps": [],
            "accuracy": None,
            "engines": [],
            "latency": [],
            "warnings": [],
        }

    def open(self, role: str, source: Any, random: int | None = None) -> Data | None:
        """The data for a role, from a source or ``random`` samples; None when there is neither."""
        if random and source is not None:
            raise UsageError(f"Both {role} data and --random were given", "Give one of them")
        data = random_data(self.inputs, random, seed=self.seed) if random else self._opened(source)
        if data is not None:
            self.record["data"][role] = data.description
            self.warn(*(f"{role} data: {note}" for note in data.notes))
        return data

    def open_evaluation(self, source: Any) -> Data | None:
        """The evaluation data, read once: what is wrong with a sample has to be known before the work, not after it."""
        data = self.open("evaluation", source)
        for _ in data or ():
            pass
        return data

    def transform(self, passes: Sequence[Pass], out: Path, checkpoint: Path | None = None, gated: bool = False) -> None:
        """Runs the passes, writes the model, opens it again and compares it with the original.

        Exact steps have been verified one by one: for them the calibration data are run again only if a gate needs it.
        """
        _check_output(out, self.model)
        context = Context(self.calibration, self.progress, self.seed)
        graph, steps = pipeline.run(self.graph, passes, context, checkpoint=checkpoint)
        self.record["steps"] = steps
        if resumed := sum(step.get("resumed", False) for step in steps):
            self.warn(f"{resumed} of {len(steps)} steps were done by an earlier, interrupted call")
        self.warn(*pipeline.warnings(steps))
        self.progress("save", 0, 0)
        graph_io.save(graph, out)
        del graph, self.graph
        gc.collect()  # nodes and tensors refer to each other, and their mapped weights count as memory while they live
        self.record["output"] = inspection.model_facts(out, graph_io.load(out))
        exact = all(step["kind"] == "exact" for step in steps)
        if self.evaluation or not exact or (gated and self.calibration):
            self.prove(out)

    def prove(self, candidate: Path) -> None:
        """Compares the original's outputs with the candidate's."""
        data = self.evaluation or self.calibration
        if data is None:
            data = self._probes()
            if data is None:
                return
        elif data is self.calibration and not data.synthetic:
            data = data.first(SEEN)
            self.warn("The outputs were compared on the calibration data; --evaluation compares them on unseen data")
        self.record["data"]["evaluation"] = data.description
        self.comparison = compare.compare(Session(self.model), Session(candidate), data, self.progress)
        self.record["accuracy"] = self.comparison.to_json()
        level, reasons = compare.verdict(self.comparison)
        if level != "ok":
            self.warn(f"THE OUTPUTS HAVE {level.upper()} on {data.description}: {'; '.join(reasons)}")

    def build(
        self,
        model: Path,
        engine: Path,
        sm: int | None,
        shapes: Mapping[str, ShapeRange],
        sparse_weights: bool = False,
    ) -> None:
        """Builds an engine and reads its plan."""
        _check_output(engine, model)
        unknown = sorted(shapes.keys() - {spec.name for spec in self.inputs})
        if unknown:
            raise UsageError(
                f"--shape names {unknown[0]!r}, which is no input",
                nearest(unknown[0], {spec.name for spec in self.inputs}),
            )
        open_inputs = [spec for spec in self.inputs if spec.name not in shapes]
        ranges = {**tensorrt.default_shapes(open_inputs, self.calibration), **shapes}
        with self._repaired(model, ranges) as source:
            built = tensorrt.build(
                source, engine, sm=sm, shapes=ranges, sparse_weights=sparse_weights, progress=self.progress
            )
        entry = _engine_entry(built, inspection.int8_nodes(graph_io.load(model)))
        entry["accuracy"] = self._proved_engine(built)
        self.record["engines"].append(entry)
        self.warn(*(f"{engine.name}: {text}" for text in built.warnings))

    def _proved_engine(self, built: tensorrt.Engine) -> Record | None:
        """The engine's outputs against the original's; None without data or without a GPU of its kind."""
        data = self.evaluation or self.calibration
        if data is None or tensorrt.local_gpu()[0] is None or built.sm not in (None, tensorrt.local_gpu()[0]):
            return None
        with EngineSession(built.path, built.backend) as engine:
            found = compare.compare(Session(self.model), engine, data, self.progress)
        level, reasons = compare.verdict(found)
        if level != "ok":
            self.warn(f"THE ENGINE'S OUTPUTS HAVE {level.upper()} on {data.description}: {'; '.join(reasons)}")
        return found.to_json()

    @contextlib.contextmanager
    def _repaired(self, model: Path, ranges: Mapping[str, ShapeRange]) -> Iterator[Path]:
        """The model as TensorRT can take it: itself, or a temporary copy in which every Squeeze names its axes."""
        graph = graph_io.load(model)
        sentences: list[str] = []
        if squeezes_without_axes(graph):
            fixed = {
                s.name: tuple(d for d in s.shape if isinstance(d, int)) for s in self.inputs if s.name not in ranges
            }
            low = fixed | {name: tuple(seen.min) for name, seen in ranges.items()}
            high = fixed | {name: tuple(seen.max) for name, seen in ranges.items()}
            sentences = name_squeezed_axes(graph, low, high)
        if not sentences:
            yield model
            return
        self.warn(*(f"engine: {sentence}" for sentence in sentences))
        with tempfile.TemporaryDirectory(prefix="channelfold-") as folder:
            copy = Path(folder, model.name)
            graph_io.save(graph, copy)
            yield copy

    def check(self, gates: Gates | None) -> None:
        """Raises GateMissed when the comparison is worse than the gates allow."""
        if gates is None or gates == Gates():
            return
        if self.comparison is None:
            raise GateMissed(
                GateError("The outputs were not compared, so no gate holds", "Give --evaluation"), self.record
            )
        try:
            compare.check_gates(self.comparison, gates)
        except GateError as error:
            raise GateMissed(error, self.record) from None

    def _opened(self, source: Any) -> Data | None:
        if source is None or isinstance(source, Data):
            return source
        if isinstance(source, str | Path) and Path(source).suffix == ".py":
            if not self.allow_script:
                raise UsageError(f"{source} is a Python script, and reading data from it runs it", "Add --allow-script")
            return load_script(source, self.inputs)
        return open_data(source, self.inputs)

    def _probes(self) -> Data | None:
        """Random samples to compare on when there is no data; None, with a warning, when the original refuses them."""
        hint = "Give --calibration or --evaluation to have them compared"
        if self.record["model"]["bytes"] > verify.LARGE:
            self.warn(f"The outputs were not compared, for there are no data and the model is large. {hint}")
            return None
        try:
            probes = random_data(self.inputs, PROBES, seed=self.seed)
            Session(self.model).run(next(iter(probes)))
        except (DataError, ModelError) as error:
            self.warn(f"The outputs were not compared, for the model does not run on random inputs: {error} {hint}")
            return None
        self.warn(f"The outputs were compared on {probes.description} only, which says nothing about accuracy. {hint}")
        return probes

    def warn(self, *texts: str) -> None:
        self.record["warnings"] += [text for text in texts if text not in self.record["warnings"]]


def _engine_entry(engine: tensorrt.Engine, int8: Sequence[str]) -> Record:
    """``total`` counts the nodes that the file asks to be run as int8."""
    runs = {node: engine.plan.nodes[node].arithmetic for node in int8 if node in engine.plan.nodes}
    others = [{"node": node, "runs_as": runs_as} for node, runs_as in runs.items() if runs_as != "int8"]
    plan = {
        "readable": engine.plan.readable,
        "reason": engine.plan.reason,
        "int8": len(runs) - len(others),
        "total": len(runs),
        "not_int8": others,
    }
    return {
        "sm": engine.sm,
        "path": engine.path,
        "bytes": engine.size,
        "seconds": engine.seconds,
        "backend": f"{engine.backend} {engine.version}",
        "plan": plan,
    }


def _overridden(passes: Sequence[Pass], overrides: Mapping[str, Any]) -> list[Pass]:
    """The passes with options replaced wherever a pass has an option of that name."""
    known = {name for step in passes for name in step.options()}
    for name in overrides:
        if name not in known:
            raise UsageError(f"No pass of the recipe has an option {name!r}", nearest(name, known))
    return [
        recipes.make(step.name, options | {name: overrides[name] for name in overrides.keys() & options})
        for step, options in ((step, step.options()) for step in passes)
    ]


def _parsed(shapes: Shapes) -> dict[str, ShapeRange]:
    return dict(shapes) if isinstance(shapes, Mapping) else dict(map(tensorrt.parse_shape, shapes))


def _check_output(out: Path, model: Path) -> None:
    """Raises before hours of work what would make writing the result fail at their end."""
    if out.is_dir():
        raise OutputError(f"{out} is a folder", "Give the name of a file")
    if out.exists() and model.exists() and out.samefile(model):
        raise UsageError(f"{out} is the model itself, and is needed to compare with", "Give another output")
    _check_folder(out.parent)


def _check_folder(folder: Path) -> None:
    """Makes the folder if need be, and writes a file in it. Raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"Nothing can be written in {folder} ({error.strerror})", "Give another output") from None
