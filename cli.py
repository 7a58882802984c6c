"""The command line: parse, call the job of the same name in ``runtime.jobs``, which ``runtime.shell`` runs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import click

from channelfold import __version__
from channelfold.passes import BUILT_IN, PASSES
from channelfold.passes import recipe as recipes
from channelfold.runtime import flags as opt
from channelfold.runtime import shell
from channelfold.runtime.errors import nearest

DEMO_SMS = (86, 89)


@click.group(cls=shell.Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="channelfold", message="%(prog)s %(version)s")
def cli() -> None:
    """Compress ONNX models by working on their channels, build TensorRT engines, prove the result.

    \b
    See it work:  channelfold demo
    Main job:     channelfold compress model.onnx -o out --calibration samples.npz

    The report goes to stdout, progress and warnings to stderr.

    \b
    Exit codes:   0  done
                  1  failed
                  2  wrong usage
                  3  an accuracy gate was missed, or lint found errors (all files are written)
    """


def _command(example: str) -> Callable[[Callable[..., Any]], click.Command]:
    return shell.command(cli, example)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """The console script: ends the process with the exit code of the command, and never with a traceback."""
    shell.main(cli, args)


def _source(jobs: Any, options: dict[str, Any]) -> Any:
    """The data of a command. Removes their options from ``options``."""
    names = ("calibration", "evaluation", "random", "allow_script", "seed", "cache")
    given = {name: value for name in opt.READING if (value := options.pop(name, None)) is not None}
    found = {name: options.pop(name) for name in names if name in options}
    return jobs.Source(**found, reading=jobs.Reading(**given))


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that the user gave. Defaults stand in one place, the pass or the recipe."""
    return {name: value for name, value in options.items() if value not in (None, ())}


def _settings(jobs: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a job from the options of its command: ``source``, and ``options`` of its passes."""
    return {"source": _source(jobs, options), "options": _given(options)}


def _search(jobs: Any, options: dict[str, Any]) -> Any:
    """What to search for, or None. Removes the options of a search from ``options``."""
    names = ("max_loss", "max_size", "max_latency", "latency_table", "metric", "minimize", "trials", "prune_to")
    names += ("float_type", "workers", "cluster")
    found = {name: options.pop(name) for name in names}
    limits = (found[name] for name in ("max_loss", "max_size", "max_latency"))
    asked = options.pop("searches") or any(limit is not None for limit in limits)
    return jobs.Search(**found) if asked else None


def _gates(jobs: Any, options: dict[str, Any]) -> Any:
    names = ("min_snr", "min_cosine", "min_agreement", "max_rel")
    return jobs.Gates(*(options.pop(name) for name in names))


# ---- commands ----------------------------------------------------------------------------------------------------


@_command("channelfold compress model.onnx -o out --calibration train.npz --min-snr 20")
@opt.model
@click.option("-o", "--output", required=True, metavar="DIR", type=click.Path(), help="Folder to write to.")
@click.option(
    "--recipe",
    default="int8",
    show_default=True,
    metavar="RECIPE",
    help=f"{', '.join(BUILT_IN)}, or the path of a TOML file.",
)
@opt.source
@click.option("--sm", "sms", multiple=True, type=int, metavar="SM", help=f"{opt.SM} Repeatable.")
@opt.shape
@opt.gates
@opt.require_share
@opt.fixed
@opt.search
@opt.own_cache
@opt.of("quantize")
def compress(jobs: Any, progress: Any, model: str, output: str, recipe: str, **options: Any) -> Any:
    """Run a recipe on MODEL, compare with the original, build engines.

    Writes DIR/model.onnx, DIR/model.sm89.engine for --sm 89, and DIR/report.json. A repeated command continues where
    an interrupted one stopped. Options of passes replace those in the recipe; --target tensorrt:89 is short for
    --target tensorrt --sm 89.

    With --max-loss, --max-size, --max-latency or --search, searches for the best option of every node (float, int8,
    weights alone in 8 or 4 bits; fp8, dgq and nvfp4 where each --sm has them) in place of the recipe's quantization, by
    what reaches the outputs, also of smoothed and, with --prune-to, of smaller networks. For TensorRT, what stays float
    is float16 where that keeps the limits, or of --float-type. Writes DIR/recipe.toml too. Exit code 3 where no model
    keeps the limits: the nearest is written.
    """
    settings = {"search": _search(jobs, options)}
    settings |= {name: options.pop(name) for name in ("sms", "shapes", "require_share", "fixed")}
    settings |= {"source": _source(jobs, options), "gates": _gates(jobs, options), "overrides": _given(options)}
    command = shlex.join(click.get_current_context().obj)
    return jobs.compress(model, output, recipe, command=command, progress=progress, **settings)


@_command("channelfold fold model.onnx -o folded.onnx")
@opt.model
@opt.output
@opt.fixed
@opt.source
def fold(jobs: Any, progress: Any, model: str, output: str, fixed: dict[str, str], **options: Any) -> Any:
    """Fold normalizations and channel-wise scales into weights.

    The result computes the same function, with fewer nodes; every step is checked by running it, on data where there
    are any.
    """
    return jobs.fold(model, output, source=_source(jobs, options), fixed=fixed, progress=progress)


@_command("channelfold smooth model.onnx -o smooth.onnx --calibration samples.npz")
@opt.model
@opt.output
@opt.source
@opt.of_methods()
def smooth(jobs: Any, progress: Any, model: str, output: str, method: str, **options: Any) -> Any:
    """Scale the channels of activations, so that quantizing MODEL loses less.

    The scales go into the weights and norms around the activations: the result computes the same function, which is
    checked by running it. Fold first, quantize afterwards; the recipe int8-smooth of compress does all three.

    \b
    Methods:
      auto         the best of smoothquant and os-plus at each site, by trial
      smoothquant  moves a share of the activations' ranges to the weights
      os-plus      centers channels, shrinks those past a limit, found by trial
      awq          scales by mean magnitude, for weights that are quantized alone
      repq         gives all channels one range and one zero point
      outliertune  gives all channels one range, symmetric
      fp4-shift    scales by powers of two, so that exponents are close together
      equalize     makes weight ranges equal across layers; needs no data
      split-merge  splits channels that stand out into several
      reorder      sorts channels in attention heads; needs no data
      rotate       rotates the residual stream and heads; needs no data
    """
    return jobs.smooth(model, output, method, progress=progress, **_settings(jobs, options))


@_command("channelfold prune model.onnx -o cut.onnx --keep-macs 0.5 --calibration x.npz")
@opt.model
@opt.output
@opt.source
@click.option("--dead", is_flag=True, help="Remove channels that nothing uses or that never change; exact.")
@opt.of("prune", without=["verify"])
def prune(jobs: Any, progress: Any, model: str, output: str, dead: bool, **options: Any) -> Any:
    """Remove channels from MODEL: a smaller graph, not a masked one.

    Give one of --keep-macs, --keep-params, --keep-latency, --ratio, --tolerance and --dead. With data the result is
    more accurate: channels are ranked by the error of the layers that read them, and these layers are reconstructed.
    The command folds first, as the command fold does, and proves the cut: it runs the cut model and the model with the
    same channels masked. Quantize afterwards.

    \b
    Importance of channels:
      reconstruction  error of the layers that read a channel, after reconstruction; without data from weights
      activation      error of the layers that read a channel, each channel alone; needs data
      l1, l2          magnitude of all weights that write and read a channel
      bn              gamma of the BatchNormalizations that a channel passes
    """
    return jobs.prune(model, output, dead=dead, progress=progress, **_settings(jobs, options))


@_command("channelfold sparsify model.onnx -o sparse.onnx --calibration samples.npz")
@opt.model
@opt.output
@opt.source
@opt.of("sparsify")
def sparsify(jobs: Any, progress: Any, model: str, output: str, **options: Any) -> Any:
    """Set weights of MODEL to zero, without removing channels.

    With data the result is more accurate: weights are ranked by their magnitude times that of their inputs, and biases
    take up the mean of the lost products. Fold first, quantize afterwards. To remove whole channels, which saves time
    everywhere, use prune.

    \b
    Patterns:
      N:M           N of every M consecutive input channels are kept. TensorRT has kernels for 2:4,
                    for GPUs from SM 80 on; see build --sparse-weights
      block         square tiles of a weight go as a whole
      unstructured  weights go one by one

    \b
    Ratios, which distribute the zeros among the layers:
      uniform       the same share of every layer
      equal-slope   tile by tile, where the next tile has the least energy
      ecoflap       by the change of the outputs when the weights of a layer change; needs data
    """
    return jobs.sparsify(model, output, progress=progress, **_settings(jobs, options))


@_command("channelfold reparam repavit.onnx -o folded.onnx")
@opt.model
@opt.output
@opt.source
@opt.of("reparameterize-ffn")
@click.option("--approximate", is_flag=True, help="Then remove hidden channels; see above.")
@opt.of("approximate-ffn", before="--approximate")
def reparam(jobs: Any, progress: Any, model: str, output: str, approximate: bool, **options: Any) -> Any:
    """Make one dense layer of FFN channels that bypass the activation.

    For networks that were trained for this, such as RePaViT: before it they are slower than plain networks. The result
    computes the same function, which is checked by running it. The command folds first, as the command fold does.

    \b
    With --approximate, for any network: removes hidden channels too. The channels that stay, and a
    dense layer where it pays, are fitted to replace them on the calibration data. Choose an amount:
      --keep-hidden  share of the hidden channels
      --keep-macs    share of the FFNs' multiply-accumulates
      --max-error    relative error of the outputs
    """
    return jobs.reparam(model, output, approximate=approximate, progress=progress, **_settings(jobs, options))


@_command("channelfold quantize folded.onnx -o int8.onnx --calibration samples.npz")
@opt.model
@opt.output
@opt.source
@click.option("--weights-only", is_flag=True, help="Quantize weights and compute in float; needs no data.")
@click.option(
    "--attention", is_flag=True, help="Also multiply queries with keys, and probabilities with values, in int8."
)
@opt.of("quantize-weights", "Of weights only, which it implies", opt.names("quantize"))
@opt.gates
@opt.require_share
@opt.of("quantize")
def quantize(
    jobs: Any,
    progress: Any,
    model: str,
    output: str,
    weights_only: bool,
    attention: bool,
    require_share: float | None,
    **options: Any,
) -> Any:
    """Quantize MODEL with QDQ nodes.

    By default weights become int8 by output channel and activations int8 by tensor, with ranges from calibration data.
    For the best accuracy fold first, or use compress, which does both.
    """
    settings = {
        "weights_only": weights_only,
        "attention": attention,
        "require_share": require_share,
        "gates": _gates(jobs, options),
        **_settings(jobs, options),
    }
    return jobs.quantize(model, output, progress=progress, **settings)


@_command("channelfold cast folded.onnx -o fp16.onnx --calibration samples.npz")
@opt.model
@opt.output
@opt.source
@opt.of("cast")
def cast(jobs: Any, progress: Any, model: str, output: str, **options: Any) -> Any:
    """Make weights and activations of MODEL float16 or bfloat16.

    Inputs and outputs keep their types. Nodes that 16 bits would break stay float32, and the report names them: with
    data these are the nodes whose values overflow, without data all that might. A quantized model can be cast as well.
    """
    return jobs.cast(model, output, progress=progress, **_settings(jobs, options))


@_command("channelfold build int8.onnx -o int8.engine --sm 89 --shape x:1x64:8x64:16x64")
@opt.model
@click.option("-o", "--output", required=True, metavar="ENGINE", type=click.Path(), help="Engine file to write.")
@click.option("--sm", type=int, metavar="SM", help=f"{opt.SM}  [default: the GPU of this machine]")
@opt.shape
@opt.data("data", "calibration", f"Samples to take the shapes from: {opt.DATA}.")
@opt.reading
@click.option(
    "--sparse-weights", is_flag=True, help="Let 2:4 sparse weights run on sparse tensor cores where these are faster."
)
def build(jobs: Any, progress: Any, model: str, output: str, **options: Any) -> Any:
    """Build a TensorRT engine from MODEL.

    The report names the nodes that run as int8, read from the engine. The extra rtx (TensorRT-RTX) needs no GPU.
    """
    return jobs.build(model, output, source=_source(jobs, options), progress=progress, **options)


@_command("channelfold diff model.onnx out/model.onnx --data test.npz --min-snr 20")
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@opt.data("data", "evaluation", f"Samples to run both models on: {opt.DATA}.")
@opt.random
@opt.reading
@opt.gates
@opt.seed
@click.option("--explain", is_flag=True, help="Find the nodes of B that the error comes from.")
def diff(jobs: Any, progress: Any, a: str, b: str, explain: bool, **options: Any) -> Any:
    """Compare the outputs of B with those of A on the same samples.

    With --explain, tensors that both models compute are found by their values, also where B was folded, renamed or
    quantized by another tool. Each part of B in between is run on the values of A, and what its error alone does to the
    outputs is measured. The list ends with the nodes to leave in float, and what this recovers.
    """
    settings = {"source": _source(jobs, options), "gates": _gates(jobs, options), "explain": explain}
    return jobs.diff(a, b, progress=progress, **settings)


@_command("channelfold report out --open")
@click.argument("first", metavar="DIR", type=click.Path())
@click.argument("second", metavar="[DIR2]", required=False, type=click.Path())
@click.option("--open", "show", is_flag=True, help="Write the web page beside the report, and show it in a browser.")
def report(jobs: Any, progress: Any, first: str, second: str | None, show: bool) -> Any:
    """Show the report in DIR again, or the figures of DIR and DIR2 side by side.

    DIR is a folder that compress has written, or a report.json.
    """
    record = jobs.report(first, second, progress=progress)
    if show:
        click.launch(str(jobs.page_beside(record, first)))
    return record


@_command("channelfold bench model.onnx out/model.onnx --threads 1 --batch 1 --batch 8")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True, type=click.Path())
@opt.data("data", "evaluation", f"The first sample is run: {opt.DATA}.  [default: a random one]")
@opt.reading
@click.option(
    "--batch",
    "batches",
    multiple=True,
    type=click.IntRange(min=1),
    metavar="N",
    help="Batch size, where the model leaves it open. Repeatable.  [default: as in the data]",
)
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Threads of ONNX Runtime.  [default: all]")
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    metavar="N",
    default=50,
    show_default=True,
    help="Runs of each model, in turns; ends after 10 seconds.",
)
@click.option(
    "--engine", "engines", multiple=True, metavar="ENGINE", type=click.Path(), help="An engine of a model. Repeatable."
)
@click.option("--sm", type=int, metavar="SM", help=f"Build an engine of every model for the sample. {opt.SM}")
@click.option("--nodes", is_flag=True, help="Show which nodes and operators take the time.")
@click.option("--record", "keep", metavar="FILE", type=click.Path(), help="Write the times of all nodes, as JSON.")
@opt.seed
def bench(jobs: Any, progress: Any, models: tuple[str, ...], **options: Any) -> Any:
    """Time models in turns in ONNX Runtime, on this machine; engines as well, where it has a GPU.

    Shows medians and the middle half, peak memory, multiply-accumulates, parameters and weight bytes by type. Runs in
    turns make a change of the machine's speed affect all models alike.

    Of engines, also what their plans tell without a GPU: kernels, products by type, traffic in bytes, and how the
    times of two engines compare by a model of the GPU.
    """
    return jobs.bench(models, source=_source(jobs, options), progress=progress, **options)


@_command("channelfold lint int8.onnx --target tensorrt --sm 89")
@opt.model
@click.option(
    "--target",
    type=click.Choice(["tensorrt", "onnxruntime"]),
    default="tensorrt",
    show_default=True,
    help="Whose rules.",
)
@click.option("--sm", type=int, metavar="SM", help=opt.SM)
@click.option("--fix", is_flag=True, help="Repair what can be repaired safely, and write OUT.")
@click.option("-o", "--output", metavar="OUT", type=click.Path(), help="Of --fix: the ONNX file to write.")
@opt.data("data", "evaluation", f"Of --fix: samples on which both files are compared: {opt.DATA}.")
@opt.reading
@click.option("--sarif", metavar="FILE", type=click.Path(), help="Also write the findings as SARIF.")
@click.option("--junit", metavar="FILE", type=click.Path(), help="Also write the findings as a JUnit report.")
def lint(jobs: Any, progress: Any, model: str, fix: bool, output: str | None, **options: Any) -> Any:
    """Find what TensorRT or ONNX Runtime refuse in MODEL, compute wrongly without a word, or run slowly.

    Nothing is run. Models of other tools are welcome: --fix makes files that TensorRT builds of quantized files that
    were made for ONNX Runtime. The exit code is 3 where errors are found.
    """
    if fix != (output is not None):
        raise click.UsageError("--fix and -o go together", click.get_current_context())
    return jobs.lint(model, out=output, source=_source(jobs, options), progress=progress, **options)


@_command("channelfold sensitivity model.onnx --calibration samples.npz")
@opt.model
@opt.source
@click.option("--recipe", default="fold", show_default=True, metavar="RECIPE", help="Passes that run before.")
@opt.workers
@opt.of("quantize", without=["float_share", "min_activation_snr", "profile"])
def sensitivity(jobs: Any, progress: Any, model: str, recipe: str, workers: int, cluster: str, **options: Any) -> Any:
    """Measure what quantizing each node of MODEL does to its outputs.

    Each node by itself, in int8 and with weights alone in 8 and 4 bits. The errors add up, which the report shows: so
    the table says which nodes to leave in float.
    """
    settings = _settings(jobs, options) | {"recipe": recipe, "workers": workers, "cluster": cluster}
    return jobs.sensitivity(model, progress=progress, **settings)


@_command("channelfold inspect model.onnx")
@opt.model
@opt.data(
    "calibration",
    "calibration",
    f"Samples on which outlier channels are measured, largest against median. {opt.DATA}.",
)
@opt.reading
@click.option(
    "--idle", is_flag=True, help="List the FFNs and their channels that bypass the activation or could do so."
)
@click.option(
    "--groups", is_flag=True, help="List the channels that can be cut together, and the reasons why others stay."
)
def inspect(jobs: Any, progress: Any, model: str, **options: Any) -> Any:
    """Show the contents of MODEL and the linear nodes that could be int8."""
    return jobs.inspect(model, source=_source(jobs, options), progress=progress, **options)


@cli.command(name="passes", epilog="\b\nExample:\n  channelfold passes quantize")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the passes as JSON.")
@click.option("--markdown", is_flag=True, help="Print the page passes/README.md.")
def list_passes(name: str | None, as_json: bool, markdown: bool) -> None:
    """List the passes of recipes, or show the options of the pass NAME."""
    if name and name not in PASSES:
        raise click.UsageError(f"There is no pass {name!r}. {nearest(name, PASSES)}", click.get_current_context())
    names = [name] if name else [*PASSES]
    if as_json:
        click.echo(json.dumps([recipes.describe(one) for one in names], indent=2))
    elif markdown or name:
        title = "# Passes and their options\n\nPrinted by `channelfold passes --markdown`.\n\n" if markdown else ""
        click.echo(title + "\n".join(map(recipes.reference, names)), nl=False)
    else:
        formatter = click.HelpFormatter(max_width=100)
        formatter.write_dl([(one, f"{cls.kind}: {recipes.describe(one)['summary']}") for one, cls in PASSES.items()])
        click.echo(formatter.getvalue(), nl=False)


@_command("channelfold demo --model digits_repavit")
@opt.shipped
@click.option(
    "-o", "--output", metavar="DIR", type=click.Path(), help="Folder to write to.  [default: a temporary one]"
)
@click.option(
    "--sm",
    "sms",
    multiple=True,
    type=int,
    metavar="SM",
    default=DEMO_SMS,
    show_default=True,
    help=f"{opt.SM} Repeatable.",
)
def demo(jobs: Any, progress: Any, output: str | None, **options: Any) -> Any:
    """Compress a small network that ships with channelfold.

    The networks read handwritten digits; their accuracy is measured before and after. Takes under a minute.
    """
    return jobs.demo(output, progress=progress, **options)
