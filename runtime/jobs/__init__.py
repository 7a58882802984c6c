"""One Python call per command: load, transform, prove, build, and return the report record.

::

    from channelfold.runtime import jobs

    record = jobs.compress("model.onnx", "out", source=jobs.Source("calibration.npz", "evaluation.npz"), sms=[89])
    record["accuracy"]["outputs"][0]["snr"]  # dB, original against compressed

Every call that writes a model opens the written file again and compares its outputs with the original's: on evaluation
data where given, else on the calibration data, else on a few random probes; ``record["data"]["evaluation"]`` says on
which. Steps that are all exact have been verified one by one, and are compared only on evaluation data, or for a gate.
Data is a path, a Python object (see ``sources.open_data``) or a ``Data``. Models, recipes and data raise the
ChannelfoldError subclasses of ``runtime.errors``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from channelfold.passes import recipe as recipes
from channelfold.passes import smooth_methods as methods
from channelfold.passes.base import Pass
from channelfold.passes.checkpoint import clear
from channelfold.passes.layers import account
from channelfold.passes.prune import AMOUNTS
from channelfold.passes.sparsify import zeros
from channelfold.runtime.engine import build as tensorrt
from channelfold.runtime.engine.build import ShapeRange
from channelfold.runtime.errors import UsageError, nearest, no_progress
from channelfold.runtime.io import files
from channelfold.runtime.io.facts import model_facts
from channelfold.runtime.io.session import onnxruntime
from channelfold.runtime.jobs import inspect_ffns as idle_channels
from channelfold.runtime.jobs import inspect_groups as channel_groups
from channelfold.runtime.jobs import inspect_model as inspection
from channelfold.runtime.jobs.job import GateMissed as GateMissed
from channelfold.runtime.jobs.job import Job, Progress, Record, Source, check_folder
from channelfold.runtime.report import terminal
from channelfold.runtime.stats.compare import Gates

PathLike = str | Path
Shapes = Mapping[str, ShapeRange] | Sequence[str]


def compress(
    model: PathLike,
    out_dir: PathLike,
    recipe: PathLike = "int8",
    *,
    source: Source = Source(),
    overrides: Mapping[str, Any] | None = None,
    sms: Sequence[int] = (),
    shapes: Shapes = (),
    gates: Gates | None = None,
    require_share: float | None = None,
    fixed: Mapping[str, str] | None = None,
    command: str = "compress",
    progress: Progress = no_progress,
) -> Record:
    """Runs a recipe; writes ``out_dir``/model.onnx, model.smNN.engine for each of ``sms``, and report.json.

    ``recipe``: a name or the path of a TOML file. ``overrides``: pass options by name (``calibrator``, ``exclude`` …),
    set on every pass of the recipe that has them. ``shapes``: ranges of dynamic inputs for the engines; by default
    those of the calibration data. An interrupted call goes on where it stopped when it is repeated. ``require_share``:
    a gate as well, the least share of the weight bytes that is to be quantized. ``fixed``: inputs that become
    constants, and their values as texts. ``command``: the command line, for the report.

    Raises GateMissed after everything is written.
    """
    model, out_dir = Path(model), Path(out_dir)
    loaded = recipes.load_recipe(recipe)
    passes = _overridden(loaded.passes, overrides or {})
    ranges = _parsed(shapes)
    onnxruntime()
    for sm in sms:
        tensorrt.backend(sm)
    check_folder(out_dir)
    out = out_dir / "model.onnx"
    job = Job(command, model, progress, source, fixed)
    job.warn(*loaded.warnings)
    job.sources.append(Path(recipe))
    job.open_both()
    job.check_output(out_dir / "report.json", "a report")
    job.transform(passes, out, checkpoint=out_dir / "checkpoint", gated=gates is not None and gates != Gates())
    terminal.write_json(job.record, out_dir / "report.json")
    for sm in sms:
        job.build(out, out_dir / f"model.sm{sm}.engine", sm, ranges)
    terminal.write_json(job.record, out_dir / "report.json")
    clear(out_dir / "checkpoint")
    job.check_share(require_share)
    job.check(gates)
    return job.record


def fold(
    model: PathLike,
    out: PathLike,
    *,
    source: Source = Source(),
    fixed: Mapping[str, str] | None = None,
    progress: Progress = no_progress,
) -> Record:
    """Applies the exact folds: the same function in fewer nodes. Writes ``out``. ``fixed``: as for ``compress``."""
    job = Job("fold", Path(model), progress, source, fixed)
    job.transform(recipes.load_recipe("fold").passes, Path(out))
    return job.record


def smooth(
    model: PathLike,
    out: PathLike,
    method: str = "auto",
    *,
    source: Source = Source(),
    options: Mapping[str, Any] | None = None,
    progress: Progress = no_progress,
) -> Record:
    """Scales the channels of activations for quantization, without quantizing. Writes ``out``.

    ``method`` and the ``options`` it heeds: see ``passes.methods``. equalize and reorder need no data.
    """
    passes = methods.passes_of(method, options or {})
    job = Job("smooth", Path(model), progress, source)
    job.open_both()
    job.transform(passes, Path(out), nothing="No channel was changed")
    return job.record


def prune(
    model: PathLike,
    out: PathLike,
    *,
    source: Source = Source(),
    dead: bool = False,
    options: Mapping[str, Any] | None = None,
    progress: Progress = no_progress,
) -> Record:
    """Folds, then removes channels: with the ``options`` of the pass ``prune``, or the ``dead`` ones. Writes ``out``.

    The record counts ``parameters`` and ``macs`` (per sample, None where a size is open) in ``model`` and ``output``.
    """
    options = dict(options or {})
    budgets = [name for name in AMOUNTS if options.get(name) is not None]
    if dead and budgets:
        raise UsageError(f"Dead channels go whatever {budgets[0]!r} is", "Give one of the two, or run prune twice")
    if not dead and not budgets:
        raise UsageError(
            "The amount to prune is missing",
            "Give --keep-macs 0.5, --keep-params 0.5, --keep-latency 0.5, --ratio 0.3, --tolerance 0.05 or --dead",
        )
    last = recipes.make("remove-dead-channels" if dead else "prune", options)
    job = Job("prune", Path(model), progress, source)
    job.open_both()
    job.transform([*recipes.load_recipe("fold").passes, last], Path(out), counted=True)
    if not job.record["steps"][-1]["changed"]:
        job.warn("No channel was removed: channelfold inspect --groups shows what could be, and why not")
    return job.record


def sparsify(
    model: PathLike,
    out: PathLike,
    *,
    source: Source = Source(),
    options: Mapping[str, Any] | None = None,
    progress: Progress = no_progress,
) -> Record:
    """Sets weights to zero in a pattern, with the ``options`` of the pass ``sparsify``. Writes ``out``."""
    step = recipes.make("sparsify", options or {})
    job = Job("sparsify", Path(model), progress, source)
    job.open_both()
    job.transform([step], Path(out))
    job.warn(*zeros.worth(job.record["steps"][-1]["facts"], job.record["steps"][-1]["options"]["pattern"]))
    return job.record


def reparam(
    model: PathLike,
    out: PathLike,
    *,
    source: Source = Source(),
    approximate: bool = False,
    options: Mapping[str, Any] | None = None,
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
    job = Job("reparam", Path(model), progress, source)
    job.open_both()
    job.transform(passes, Path(out), counted=True)
    folded = any(step["changed"] for step in job.record["steps"] if step["pass"] == "reparameterize-ffn")
    if not folded and not approximate:
        job.warn("No FFN has channels that bypass the activation: channelfold inspect --idle shows what there is")
    return job.record


def quantize(
    model: PathLike,
    out: PathLike,
    *,
    source: Source = Source(),
    weights_only: bool = False,
    options: Mapping[str, Any] | None = None,
    require_share: float | None = None,
    progress: Progress = no_progress,
) -> Record:
    """Quantizes to int8, without folding first. Writes ``out``. ``require_share``: as for ``compress``.

    ``options`` are those of the pass: ``quantize``, or ``quantize-weights`` with ``weights_only``, which needs no data.
    """
    step = recipes.make("quantize-weights" if weights_only else "quantize", options or {})
    job = Job("quantize", Path(model), progress, source)
    job.open_both()
    job.transform([step], Path(out))
    job.check_share(require_share)
    return job.record


def build(
    model: PathLike,
    engine: PathLike,
    *,
    sm: int | None = None,
    shapes: Shapes = (),
    source: Source = Source(),
    sparse_weights: bool = False,
    progress: Progress = no_progress,
) -> Record:
    """Builds a TensorRT engine and reads back in which arithmetic its nodes run. Writes ``engine``.

    ``sm``: 10 x compute capability, by default that of this machine's GPU. Dynamic inputs need ``shapes``, or ``data``
    whose shapes are taken. ``sparse_weights``: weights in which 2 of 4 inputs are zero may run on sparse tensor cores.
    """
    job = Job("build", Path(model), progress, source)
    job.calibration = job.open("shapes", source.calibration)
    job.build(job.model, Path(engine), sm, _parsed(shapes), sparse_weights)
    return job.record


def diff(
    a: PathLike,
    b: PathLike,
    *,
    source: Source = Source(),
    gates: Gates | None = None,
    progress: Progress = no_progress,
) -> Record:
    """Compares the outputs of two models on the same data. Raises GateMissed."""
    job = Job("diff", Path(a), progress, source)
    job.evaluation = job.open("evaluation", source.evaluation, source.random)
    if job.evaluation is None:
        raise UsageError("There is nothing to compare the models on", "Give --data, or --random N")
    job.record["output"] = model_facts(Path(b), files.load(b))
    job.prove(Path(b))
    job.check(gates)
    return job.record


def inspect(
    model: PathLike,
    *,
    source: Source = Source(),
    idle: bool = False,
    groups: bool = False,
    progress: Progress = no_progress,
) -> Record:
    """What is in a model: ``record["inspection"]``, described in ``inspection.inspect``.

    With ``idle`` also ``record["ffns"]``, described in ``idle.idle``; with ``groups`` also ``record["groups"]``,
    described in ``groups.describe``.
    """
    job = Job("inspect", Path(model), progress, source)
    data = job.open("calibration", source.calibration)
    job.record["inspection"] = inspection.inspect(job.model, job.graph, data, progress)
    job.record["weights"] = account.to_json(account.account(job.graph))
    if idle:
        job.record["ffns"] = idle_channels.idle(job.graph, data, progress)
    if groups:
        job.record["groups"] = channel_groups.describe(job.graph, source.seed)
    return job.record


def demo(
    out_dir: PathLike | None = None,
    *,
    model: str = "digits_cnn",
    sms: Sequence[int] = (86, 89),
    progress: Progress = no_progress,
) -> Record:
    """Compresses a shipped network into ``out_dir`` (by default a temporary folder); see ``shipped.run``.

    ``model``: a name in ``channelfold.models.MODELS``.
    """
    from channelfold.runtime.jobs import shipped

    return shipped.run(model, None if out_dir is None else Path(out_dir), sms, progress)


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
