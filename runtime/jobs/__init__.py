"""One Python call per command: load, transform, prove, build, and return the report record.

::

    from channelfold.runtime import jobs

    record = jobs.compress("model.onnx", "out", source=jobs.Source("calibration.npz", "evaluation.npz"), sms=[89])
    record["accuracy"]["outputs"][0]["snr"]  # dB, original against compressed

Every call that writes a model opens the written file again and compares its outputs with those of the original: on the
evaluation data if there are any, else on the calibration data, else on a few random samples;
``record["data"]["evaluation"]`` names them. Exact steps are verified one by one; where all steps are exact, outputs are
compared only on evaluation data or for a gate. Data are a path, a Python object (see ``sources.open_data``) or a
``Data``. All calls raise the subclasses of ChannelfoldError in ``runtime.errors``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from channelfold.passes import PASSES
from channelfold.passes import recipe as recipes
from channelfold.passes import smooth_methods as methods
from channelfold.passes.base import Pass
from channelfold.passes.checkpoint import clear
from channelfold.passes.fold import OwnCache
from channelfold.passes.layers import account
from channelfold.passes.options import options as options_of
from channelfold.passes.prune import AMOUNTS
from channelfold.passes.search import options as choices
from channelfold.passes.sparsify import zeros
from channelfold.runtime.data.reading import Reading as Reading
from channelfold.runtime.engine import build as tensorrt
from channelfold.runtime.engine.build import ShapeRange
from channelfold.runtime.errors import UsageError, nearest, no_progress
from channelfold.runtime.io import files
from channelfold.runtime.io.facts import computes_as_written, fuses_rightly, model_facts
from channelfold.runtime.io.outputs import check_folder, check_kind
from channelfold.runtime.io.session import onnxruntime
from channelfold.runtime.jobs import bench_models as benching
from channelfold.runtime.jobs import engines as engine_records
from channelfold.runtime.jobs import explain_diff as explaining
from channelfold.runtime.jobs import inspect_ffns as idle_channels
from channelfold.runtime.jobs import inspect_groups as channel_groups
from channelfold.runtime.jobs import inspect_model as inspection
from channelfold.runtime.jobs import lint_model as linting
from channelfold.runtime.jobs import search as searching
from channelfold.runtime.jobs import sensitivity as sensitivities
from channelfold.runtime.jobs.cast import cast as cast
from channelfold.runtime.jobs.job import GateMissed as GateMissed
from channelfold.runtime.jobs.job import Job, Progress, Record, Source
from channelfold.runtime.jobs.search import Search as Search
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
    search: Search | None = None,
    command: str = "compress",
    progress: Progress = no_progress,
) -> Record:
    """Runs a recipe; writes ``out_dir``/model.onnx, model.smNN.engine for each of ``sms``, report.json and report.html.

    ``recipe``: a name or the path of a TOML file. ``overrides``: pass options by name (``calibrator``, ``exclude`` …),
    set on every pass of the recipe that has them. ``shapes``: ranges of dynamic inputs for the engines, by default from
    the calibration data. ``require_share``: a gate, the least quantized share of the weight bytes. ``fixed``: inputs
    that become constants, and their values as texts. ``search``: search for the best option of every node, in place of
    the quantizations of the recipe, and write the recipe of the best point as ``out_dir``/recipe.toml; the gates of SNR
    and agreement are limits of the search then. ``command``: the command line for the report. A repeated call continues
    where an interrupted one stopped.

    Raises GateMissed after all files are written.
    """
    model, out_dir = Path(model), Path(out_dir)
    loaded = recipes.load_recipe(recipe)
    passes = list(loaded.passes) if search else _with_own_cache(_overridden(loaded.passes, overrides or {}))
    ranges = _parsed(shapes)
    onnxruntime()
    for sm in sms:
        for step in passes:
            step.check_for(sm)
        tensorrt.backend(sm)
    check_folder(out_dir, make=False)
    out = out_dir / "model.onnx"
    job = Job(command, model, progress, source, fixed)
    job.warn(*loaded.warnings)
    job.sources.append(Path(recipe))
    job.open_both()
    job.check_output(out_dir / "report.json", "a report")
    found = _searched(job, passes, overrides or {}, search, gates, sms, out_dir) if search else None
    gated = gates is not None and gates != Gates()
    job.transform(found.passes if found else passes, out, out_dir / "checkpoint", gated, counted=True)
    terminal.write_both(job.record, out_dir)
    for sm in sms:
        job.build(out, out_dir / f"model.sm{sm}.engine", sm, ranges)
    engine_records.weigh(job, ranges)
    clear(out_dir / "checkpoint")
    try:
        if found:
            found.check(out)
        job.check_share(require_share)
        job.check(gates)
    finally:
        terminal.write_both(job.record, out_dir)
    return job.record


def _searched(
    job: Job,
    passes: Sequence[Pass],
    overrides: Mapping[str, Any],
    search: Search,
    gates: Gates | None,
    sms: Sequence[int],
    out_dir: Path,
) -> searching.Found:
    """The result of a search, whose recipe is written."""
    job.check_output(out_dir / "recipe.toml", "a recipe")
    found = searching.find(job, passes, overrides, search, gates, sms, keep_in=out_dir / "checkpoint")
    with files.writing(out_dir / "recipe.toml") as file:
        file.write(recipes.dumps(recipes.Recipe("search", tuple(found.passes))).encode())
    return found


def fold(
    model: PathLike,
    out: PathLike,
    *,
    source: Source = Source(),
    fixed: Mapping[str, str] | None = None,
    progress: Progress = no_progress,
) -> Record:
    """Applies the exact folds: the same function in fewer nodes. Writes ``out``. Data serve the proof alone.

    ``fixed``: as for ``compress``.
    """
    job = Job("fold", Path(model), progress, source, fixed)
    job.open_both()
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

    ``passes.smooth_methods`` has the methods and their ``options``. equalize, reorder and rotate need no data.
    """
    passes = _with_own_cache(methods.passes_of(method, options or {}))
    return _transformed("smooth", model, out, passes, source, progress, nothing="No channel was changed").record


def prune(
    model: PathLike,
    out: PathLike,
    *,
    source: Source = Source(),
    dead: bool = False,
    options: Mapping[str, Any] | None = None,
    progress: Progress = no_progress,
) -> Record:
    """Folds, then removes channels: the ``dead`` ones, or by the ``options`` of the pass ``prune``. Writes ``out``.

    The record counts ``parameters`` and ``macs`` (per sample, None where a size is open) in ``model`` and ``output``.
    """
    options = dict(options or {})
    budgets = [name for name in AMOUNTS if options.get(name) is not None]
    if dead and budgets:
        raise UsageError(f"--dead knows no budget such as {budgets[0]!r}", "Give one of the two, or run prune twice")
    if not dead and not budgets:
        raise UsageError(
            "The amount to prune is missing",
            "Give --keep-macs 0.5, --keep-params 0.5, --keep-latency 0.5, --ratio 0.3, --tolerance 0.05 or --dead",
        )
    last = recipes.make("remove-dead-channels" if dead else "prune", options)
    passes = _with_own_cache([*recipes.load_recipe("fold").passes, last])
    job = _transformed("prune", model, out, passes, source, progress, counted=True)
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
    job = _transformed("sparsify", model, out, [step], source, progress)
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
    ``reparameterize-ffn`` and ``approximate-ffn``. The record counts ``parameters`` and ``macs`` as for ``prune``.
    """
    given = dict(options or {})
    own = {name: given.pop(name) for name in given.keys() & {"always"}}
    passes = _overridden(recipes.load_recipe("reparam").passes, own)
    if given and not approximate:
        name = min(given).replace("_", "-")
        raise UsageError(f"--{name} is for networks that are not folded exactly", "Add --approximate")
    if approximate:
        passes.append(recipes.make("approximate-ffn", given))
    job = _transformed("reparam", model, out, passes, source, progress, counted=True)
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
    attention: bool = False,
    options: Mapping[str, Any] | None = None,
    gates: Gates | None = None,
    require_share: float | None = None,
    progress: Progress = no_progress,
) -> Record:
    """Quantizes without folding first. Writes ``out``. ``gates``, ``require_share``: as for ``compress``.

    ``options`` are those of the pass: ``quantize``, or ``quantize-weights`` with ``weights_only``, which needs no data
    and which options that ``quantize`` does not have imply. ``attention``: products of two activations become int8 too.
    """
    own = set(options_of(PASSES["quantize-weights"])) - set(options_of(PASSES["quantize"]))
    alone = weights_only or not own.isdisjoint(options or {})
    step = recipes.make("quantize-weights" if alone else "quantize", options or {})
    if attention and (alone or step.options()["target"] != "tensorrt"):
        raise UsageError("--attention is for int8 products of TensorRT", "Leave it out")
    shared = ("exclude", "exclude_ops", "verify_plan") if attention else ()
    first = [recipes.make("quantize-attention", {name: step.options()[name] for name in shared})] if attention else []
    job = _transformed("quantize", model, out, [*first, step], source, progress)
    job.check_share(require_share)
    job.check(gates)
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

    ``sm``: 10 x compute capability, by default that of the GPU of this machine. Dynamic inputs need ``shapes`` or data.
    ``sparse_weights``: weights in which 2 of 4 inputs are zero may run on sparse tensor cores.
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
    explain: bool = False,
    progress: Progress = no_progress,
) -> Record:
    """Compares the outputs of two models on the same data; ``explain`` finds the nodes that the error comes from.

    Raises GateMissed.
    """
    job = Job("diff", Path(a), progress, source)
    job.evaluation = job.open("evaluation", source.evaluation, source.random)
    if job.evaluation is None:
        raise UsageError("There is nothing to compare the models on", "Give --data, or --random N")
    other = files.load(b)
    job.record["output"] = model_facts(Path(b), other)
    job.prove(Path(b), computes_as_written(other), fuses_rightly(other))
    if explain:
        with job.or_warning("The error was not explained"):
            job.record["explanation"] = explaining.explain(Path(a), Path(b), job.evaluation, progress)
    job.check(gates)
    return job.record


def sensitivity(
    model: PathLike,
    *,
    source: Source = Source(),
    recipe: PathLike = "fold",
    workers: int = 1,
    cluster: str = "",
    options: Mapping[str, Any] | None = None,
    progress: Progress = no_progress,
) -> Record:
    """What every option of every node does to the outputs: ``record["sensitivity"]``, described there.

    ``recipe``: the passes that run before, without its quantizations. ``options``: those of the pass ``quantize``.
    ``workers``: the number of processes, ``cluster``: the address of a Dask scheduler in their place.
    """
    job = Job("sensitivity", Path(model), progress, source)
    job.calibration = job.open("calibration", source.calibration, source.random)
    passes = choices.in_front(recipes.load_recipe(recipe).passes)
    with job.blaming(), sensitivities.Crew(workers, cluster, progress) as crew:
        sensitivities.sensitivity(job, passes, options or {}, crew)
    return job.record


def inspect(
    model: PathLike,
    *,
    source: Source = Source(),
    idle: bool = False,
    groups: bool = False,
    progress: Progress = no_progress,
) -> Record:
    """The contents of a model: ``record["inspection"]``, described in ``inspect_model.inspect``.

    ``idle`` adds ``record["ffns"]``, described in ``inspect_ffns.idle``; ``groups`` adds ``record["groups"]``,
    described in ``inspect_groups.describe``.
    """
    job = Job("inspect", Path(model), progress, source)
    data = job.open("calibration", source.calibration)
    with job.blaming():
        job.record["inspection"] = inspection.inspect(job.model, job.graph, data, progress)
        job.record["weights"] = account.to_json(account.account(job.graph))
        if idle:
            job.record["ffns"] = idle_channels.idle(job.graph, data, progress)
        if groups:
            job.record["groups"] = channel_groups.describe(job.graph, source.seed)
    return job.record


def bench(
    models: Sequence[PathLike],
    *,
    engines: Sequence[PathLike] = (),
    keep: PathLike | None = None,
    source: Source = Source(),
    progress: Progress = no_progress,
    **asked: Any,
) -> Record:
    """Times models and ``engines`` of them in turns, on a sample of the evaluation data, else a random one.

    ``keep``: a file for the times of all nodes. ``asked``: the other fields of ``bench_models.Bench``.
    """
    if not models:
        raise UsageError("There is no model to measure", "Give one or more")
    given = benching.Bench(engines=tuple(map(Path, engines)), keep=None if keep is None else Path(keep), **asked)
    return benching.run(list(map(Path, models)), given, source, progress)


def lint(
    model: PathLike,
    *,
    target: str = "tensorrt",
    sm: int | None = None,
    out: PathLike | None = None,
    sarif: PathLike | None = None,
    junit: PathLike | None = None,
    source: Source = Source(),
    progress: Progress = no_progress,
) -> Record:
    """Finds what a model breaks of the rules of ``target``; with ``out`` repairs what is safe to repair, and writes it.

    ``sm``: a GPU, 10 x its compute capability. ``sarif``, ``junit``: files for the findings in these forms. Raises
    GateMissed where an error is left.
    """
    reports = {kind: Path(path) for kind, path in (("sarif", sarif), ("junit", junit)) if path is not None}
    return linting.run(Path(model), target, sm, None if out is None else Path(out), reports, source, progress)


def report(first: PathLike, second: PathLike | None = None, *, progress: Progress = no_progress) -> Record:
    """The record in a report.json or in a folder that holds one; with ``second``, the figures of both side by side.

    Raises UsageError for what is no report.
    """
    records = [_record_in(Path(path)) for path in (first, second) if path is not None]
    if second is None:
        return records[0]
    return {"schema": 1, "tool": records[0]["tool"], "command": f"report {first} {second}", "runs": records,
            "warnings": []}  # fmt: skip


def page_beside(record: Record, path: PathLike) -> Path:
    """Writes the web page of a record beside the report in ``path``; the path of the page."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    page = folder / ("comparison.html" if "runs" in record else "report.html")
    check_kind(page, "a web page")
    terminal.write_html(record, page)
    return page


def _record_in(path: Path) -> Record:
    path = path / "report.json" if path.is_dir() else path
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        hint = "Give a report.json, or the folder of compress that holds one"
        raise UsageError(f"{path} cannot be read ({error.strerror})", hint) from None
    except ValueError as error:
        raise UsageError(f"{path} is not JSON ({error})", "Give a report.json") from None
    if not isinstance(record, dict) or record.get("schema") != 1 or "tool" not in record:
        raise UsageError(f"{path} is no report of channelfold", "Give a report.json")
    return record | {"warnings": record.get("warnings", [])}


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


def _transformed(
    command: str, model: PathLike, out: PathLike, passes: Sequence[Pass], source: Source, progress: Progress, **how: Any
) -> Job:
    """The job of a command after its passes; ``how`` as for ``Job.transform``."""
    job = Job(command, Path(model), progress, source)
    job.open_both()
    job.transform(passes, Path(out), **how)
    return job


def _with_own_cache(passes: Sequence[Pass]) -> list[Pass]:
    """The passes, and at their end the one that gives the model a cache of its own, where one of them asks for it."""
    asked = any(step.options().get("own_cache") for step in passes)
    return [*passes, OwnCache()] if asked and not any(step.moves_cache for step in passes) else list(passes)


def _overridden(passes: Sequence[Pass], overrides: Mapping[str, Any]) -> list[Pass]:
    """The passes with new values for the options of these names."""
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
