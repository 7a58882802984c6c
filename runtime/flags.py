"""The options of the command line that several commands have, or that belong to passes.

Imports click alone, so that help is instant; the choices that passes offer are therefore repeated here, and tests
compare them, as they do defaults.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

from channelfold.models import MODELS
from channelfold.passes.smooth_methods import METHODS
from channelfold.runtime.errors import nearest

CALIBRATORS = ("minmax", "percentile", "entropy", "mse")
TARGETS = ("tensorrt", "onnxruntime")
AIMS = ("mean", "median", "clipped")
IMPORTANCES = ("auto", "l1", "l2", "bn", "activation", "reconstruction")
ALLOCATIONS = ("auto", "uniform", "ranked", "knapsack", "greedy")
COMPENSATIONS = ("auto", "none", "bias", "lstsq", "outputs")
SCORES = ("magnitude", "wanda")
BRANCHES = ("auto", "never", "always")
RATIOS = ("uniform", "equal-slope", "ecoflap")


class _Choice(click.Choice):
    """A choice that names the nearest one for a misspelt one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value not in self.choices:
            self.fail(f"{value!r} is unknown. {nearest(value, self.choices)}", param, ctx)
        return value


SM = "GPU to build an engine for: 10 x compute capability, such as 89 for an L4."
DATA = "a .npz (keys are input names, axis 0 counts samples), a .npy, or a folder of either"

model = click.argument("model", type=click.Path())
output = click.option("-o", "--output", required=True, metavar="OUT", type=click.Path(), help="ONNX file to write.")
calibration = click.option(
    "--calibration", metavar="DATA", type=click.Path(), help=f"Samples that activation ranges come from: {DATA}."
)
evaluation = click.option(
    "--evaluation", metavar="DATA", type=click.Path(), help="Other samples, to compare the outputs on."
)
random = click.option(
    "--random",
    type=click.IntRange(min=1),
    metavar="N",
    help="Use N random samples in place of data: the result runs, its accuracy means nothing.",
)
allow_script = click.option(
    "--allow-script", is_flag=True, help="Let DATA be a Python script with a load_data() that yields feeds. Runs it."
)
shipped = click.option(
    "--model",
    type=_Choice(list(MODELS)),
    default="digits_cnn",
    show_default=True,
    help="Which of the shipped networks.",
)
seed = click.option("--seed", type=int, default=0, show_default=True, help="Seed of all that is random.")
shape = click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="NAME:MIN:OPT:MAX",
    help="Shapes that a dynamic input may take in an engine, such as image:1x3x224x224:8x3x224x224:16x3x224x224. "
    "Repeatable.  [default: as in the data]",
)


def _options(*options: Callable[..., Any]) -> Callable[..., Any]:
    """Several options as one decorator."""
    return lambda function: functools.reduce(lambda f, option: option(f), reversed(options), function)


gates = _options(
    click.option("--min-snr", type=float, metavar="DB", help="Gate: signal-to-noise ratio of every output, in dB."),
    click.option("--min-cosine", type=float, metavar="X", help="Gate: cosine similarity of every output, up to 1."),
    click.option("--min-agreement", type=float, metavar="X", help="Gate: share of equal argmaxes, 0 to 1."),
    click.option("--max-rel", type=float, metavar="X", help="Gate: relative L2 error of every output, 0 or more."),
)

quantizer = _options(
    click.option("--calibrator", type=_Choice(CALIBRATORS), help="How ranges are chosen.  [default: mse]"),
    click.option(
        "--percentile", type=float, metavar="P", help="Of the calibrator percentile, 0 to 100.  [default: 99.999]"
    ),
    click.option("--target", type=_Choice(TARGETS), help="Whose rules for QDQ nodes.  [default: tensorrt]"),
    click.option(
        "--exclude", multiple=True, metavar="PATTERN", help="Nodes to leave in float: names, * and ? match. Repeatable."
    ),
    click.option(
        "--exclude-op",
        "exclude_ops",
        multiple=True,
        metavar="OP",
        help="Operator type to leave in float, such as MatMul. Repeatable.",
    ),
    click.option(
        "--min-activation-snr",
        type=float,
        metavar="DB",
        help="Leave a node in float when 8 bits represent its input worse than this, in dB.  [default: 15]",
    ),
    click.option(
        "--float-share",
        type=float,
        metavar="X",
        help="Share of the linear nodes that may stay float because int8 changes their outputs most, 0 to 1.  "
        "[default: 0]",
    ),
    click.option(
        "--correct-bias/--no-correct-bias",
        default=None,
        help="Make up in the biases for the mean error of rounded weights.  [default: correct-bias]",
    ),
)


smoother = _options(
    click.option(
        "--method",
        type=_Choice(list(METHODS)),
        metavar="NAME",
        default="auto",
        help="One of those above.  [default: auto]",
    ),
    click.option(
        "--alpha", type=float, metavar="X", help="smoothquant: how much the weights take, 0 to 1.  [default: 0.5]"
    ),
    click.option("--search-alpha", is_flag=True, default=None, help="smoothquant: find the best alpha for each site."),
    click.option("--aim", type=_Choice(AIMS), help="repq: the range that all channels get.  [default: mean]"),
    click.option(
        "--shift/--no-shift",
        default=None,
        help="auto, os-plus, repq, outliertune: shift channels too, where biases can take it up.  [default: shift]",
    ),
    click.option(
        "--activation-bits", type=int, metavar="N", help="auto, os-plus, --search-alpha: quantizer.  [default: 8]"
    ),
    click.option(
        "--weight-bits", type=int, metavar="N", help="auto, os-plus, awq, --search-alpha: quantizer.  [default: 8]"
    ),
    click.option(
        "--group-size",
        type=int,
        metavar="N",
        help="The same: weights that share a scale, 0 for a whole row.  [default: 0]",
    ),
    click.option("--iterations", type=int, metavar="N", help="equalize: rounds at most.  [default: 100]"),
    click.option(
        "--absorb-bias",
        is_flag=True,
        default=None,
        help="equalize: then move what channels never fall below into the next biases. Needs data, approximate.",
    ),
    click.option(
        "--sigmas",
        type=float,
        metavar="X",
        help="--absorb-bias: standard deviations below the mean that are kept.  [default: 3]",
    ),
    click.option(
        "--max-extra", type=float, metavar="X", help="split-merge: channels that may be added, a share.  [default: 0.2]"
    ),
    click.option(
        "--min-gain", type=float, metavar="DB", help="split-merge: what a split must gain, in dB.  [default: 1]"
    ),
    click.option("--align", type=int, metavar="N", help="split-merge: widths become multiples of it.  [default: 16]"),
    click.option(
        "--restore-width",
        is_flag=True,
        default=None,
        help="split-merge: then merge similar channels until the width is as before. Approximate.",
    ),
    click.option(
        "--max-change",
        type=float,
        metavar="X",
        help="--restore-width: squared relative change of the outputs, at most.  [default: 0.01]",
    ),
    click.option(
        "--allow-insert",
        is_flag=True,
        default=None,
        help="Not only weights and norms may take scales up: a few nodes may be inserted.",
    ),
    click.option(
        "--include", multiple=True, metavar="PATTERN", help="Only these linear nodes: names, * and ? match. Repeatable."
    ),
    click.option("--exclude", multiple=True, metavar="PATTERN", help="Not these linear nodes. Repeatable."),
)


reparameterizer = _options(
    click.option(
        "--always",
        is_flag=True,
        default=None,
        help="Fold also where too few channels are idle for it to save anything.",
    ),
    click.option("--approximate", is_flag=True, help="Then remove hidden channels; see above."),
    click.option("--keep-hidden", type=float, metavar="X", help="--approximate: see above, 0 to 1."),
    click.option("--keep-macs", type=float, metavar="X", help="--approximate: see above, 0 to 1."),
    click.option("--max-error", type=float, metavar="X", help="--approximate: see above, 0 to 1."),
    click.option(
        "--branch",
        type=_Choice(BRANCHES),
        help="--approximate: whether a dense layer may be added: auto, where it pays.  [default: auto]",
    ),
    click.option(
        "--ridge",
        type=float,
        metavar="X",
        help="--approximate: of the fit, relative to variances.  [default: by the number of samples]",
    ),
    click.option(
        "--align", type=int, metavar="N", help="--approximate: kept channels are multiples of it.  [default: 8]"
    ),
    click.option(
        "--include",
        multiple=True,
        metavar="PATTERN",
        help="--approximate: FFNs by the linear that ends them: names, * and ? match. Repeatable.",
    ),
    click.option("--exclude", multiple=True, metavar="PATTERN", help="--approximate: not these. Repeatable."),
)

pruner = _options(
    click.option("--keep-macs", type=float, metavar="X", help="Share of the multiply-accumulates to keep, 0 to 1."),
    click.option("--keep-params", type=float, metavar="X", help="Share of the parameters to keep, 0 to 1."),
    click.option(
        "--keep-latency",
        type=float,
        metavar="X",
        help="Share of its time in ONNX Runtime on this machine that the model may take, 0 to 1.",
    ),
    click.option("--ratio", type=float, metavar="X", help="Share of every group's channels to remove, 0 to 1."),
    click.option(
        "--tolerance",
        type=float,
        metavar="X",
        help="Squared error of any output that is allowed, relative to its variance, on the calibration data.",
    ),
    click.option(
        "--dead", is_flag=True, help="Remove channels that nothing uses or that never change, which is exact."
    ),
    click.option(
        "--importance", type=_Choice(IMPORTANCES), help="How channels are ranked; see above.  [default: auto]"
    ),
    click.option(
        "--allocation",
        type=_Choice(ALLOCATIONS),
        help="How the budget is shared out: the same share everywhere, by one ranking of all channels, the best sum;"
        " greedy: how a tolerance is.  [default: auto]",
    ),
    click.option(
        "--compensate",
        type=_Choice(COMPENSATIONS),
        help="How layers make up for what they no longer read: not at all, in the bias, by least squares; outputs then "
        "corrects layer by layer what that leaves, which takes long.  [default: auto]",
    ),
    click.option("--align", type=int, metavar="N", help="Kept channels are multiples of it.  [default: 8]"),
    click.option(
        "--width",
        is_flag=True,
        default=None,
        help="Also cut channels that a norm works on: the width of a transformer.",
    ),
    click.option(
        "--include",
        multiple=True,
        metavar="PATTERN",
        help="Nodes whose channels may go: names, * and ? match. Repeatable.",
    ),
    click.option("--exclude", multiple=True, metavar="PATTERN", help="Nodes whose channels stay. Repeatable."),
    click.option(
        "--ridge", type=float, metavar="X", help="Of the least squares, relative to variances.  [default: 0.001]"
    ),
)


sparsifier = _options(
    click.option("--pattern", metavar="PATTERN", help="N:M, block or unstructured; see above.  [default: 2:4]"),
    click.option(
        "--sparsity",
        type=float,
        metavar="X",
        help="block, unstructured: share of the weights that goes.  [default: 0.5]",
    ),
    click.option("--block", type=int, metavar="N", help="block: side of a tile.  [default: 32]"),
    click.option(
        "--scores", type=_Choice(SCORES), help="What a weight is worth.  [default: wanda with data, else magnitude]"
    ),
    click.option(
        "--ratios",
        type=_Choice(RATIOS),
        help="block, unstructured: how layers share it.  [default: equal-slope for block, else uniform]",
    ),
    click.option(
        "--max-layer-sparsity",
        type=float,
        metavar="X",
        help="equal-slope, ecoflap: what a layer loses at most.  [default: 0.8]",
    ),
    click.option("--exclude", multiple=True, metavar="PATTERN", help="Nodes to leave dense. Repeatable."),
    click.option(
        "--correct-bias/--no-correct-bias",
        default=None,
        help="With data: make up in the biases for what is lost on average.  [default: correct-bias]",
    ),
)


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Only what the user gave, so that defaults stand in one place: the pass or the recipe."""
    return {name: value for name, value in options.items() if value not in (None, ())}
