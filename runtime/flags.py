"""The flags of the command line: flags that several commands share, and the flags of passes, made from their options.

The module imports click and the faces of the passes alone, so that help is instant.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from channelfold.models import MODELS
from channelfold.passes import PASSES
from channelfold.passes.options import Option, options
from channelfold.passes.smooth_methods import METHODS
from channelfold.runtime.data.reading import IMAGE_OPTIONS, TEXT_OPTIONS
from channelfold.runtime.errors import nearest

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

SWITCHES = {  # flags of methods that add a pass
    "absorb_bias": "equalize: then move the minimum of each channel into the next biases; needs data, approximate.",
    "restore_width": "split-merge: then merge similar channels down to the width before; approximate.",
}
SM = "GPU that the engine is for: 10 x compute capability, such as 89 for an L4."
DATA = "a .npz (keys are input names, axis 0 counts samples), a .npy, images, or a folder of one of these, or a .txt"
READING = (*IMAGE_OPTIONS, *TEXT_OPTIONS)


class _Choice(click.Choice):
    """A choice that names the nearest word for a misspelt one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value not in self.choices:
            self.fail(f"{value!r} is unknown. {nearest(value, self.choices)}", param, ctx)
        return value


def together(*decorators: Decorator) -> Decorator:
    """Several options as one decorator, in the order of the help."""
    return lambda function: functools.reduce(lambda f, decorator: decorator(f), reversed(decorators), function)


def flag(option: Option, before: str = "") -> Decorator:
    """The flag of an option of a pass; None where the user does not give the flag. The help starts with ``before``."""
    name = _spelt(option.name.removesuffix("s" if option.many else ""))
    notes = "; ".join(filter(None, (option.bounds, f"default: {option.usual}" if option.usual else "")))
    text = f"{before}: {option.help[0].lower()}{option.help[1:]}" if before else option.help
    text += (" Repeatable." if option.many else "") + (f"  [{notes}]" if notes else "")
    if option.item is bool:
        names = f"{name}/--no-{name[2:]}" if option.default else name
        return click.option(names, option.name, is_flag=True, default=None, help=text)
    kind = _Choice(option.choices) if option.choices else option.item
    metavar = option.metavar or (None if option.choices else "X" if option.item is float else "N")
    return click.option(name, option.name, type=kind, multiple=option.many, metavar=metavar, help=text)


def of(name: str, before: str = "", without: Iterable[str] = ()) -> Decorator:
    """The flags of a pass."""
    return together(*(flag(one, before) for key, one in options(PASSES[name]).items() if key not in without))


def names(name: str) -> set[str]:
    """The names of the options of a pass."""
    return set(options(PASSES[name]))


def of_methods() -> Decorator:
    """The flags of the command smooth: the options of all methods, each once, with the methods where these are few."""
    heeded: dict[str, tuple[Option, list[str]]] = {}
    for name, method in METHODS.items():
        own = (method.step, (*method.options, method.switch), name)
        for step, keys, who in (own, (method.then or method.step, method.switched, _spelt(method.switch))):
            known = options(PASSES[step])
            for key in keys:
                if key in known:
                    heeded.setdefault(key, (known[key], []))[1].append(who)
    few = len(METHODS) / 2
    found = (flag(option, ", ".join(who) if len(who) <= few else "") for option, who in heeded.values())
    return together(
        click.option("--method", type=_Choice(list(METHODS)), metavar="NAME", default="auto", show_default=True,
                     help="One of the methods above."),
        *found,
        *(click.option(_spelt(key), is_flag=True, default=None, help=text) for key, text in SWITCHES.items()),
    )  # fmt: skip


def _spelt(name: str) -> str:
    return f"--{name.replace('_', '-')}"


model = click.argument("model", type=click.Path())
output = click.option("-o", "--output", required=True, metavar="OUT", type=click.Path(), help="ONNX file to write.")
random = click.option(
    "--random",
    type=click.IntRange(min=1),
    metavar="N",
    help="Use N random samples in place of data: the result runs, but its accuracy means nothing.",
)
allow_script = click.option(
    "--allow-script", is_flag=True, help="Let DATA be a Python script whose load_data() yields feeds. Runs the script."
)
seed = click.option("--seed", type=int, default=0, show_default=True, help="Seed of all random numbers.")


def data(name: str, role: str, help: str) -> Decorator:
    """A flag for the data that a command uses as ``role``."""
    return click.option(f"--{name}", role, metavar="DATA", type=click.Path(), help=help)


class _Numbers(click.ParamType):
    """Numbers in a row, such as 224x320 or 0.5,0.4,0.3."""

    def __init__(self, kind: type[int | float], between: str):
        self.kind, self.between, self.name = kind, between, "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return value if isinstance(value, tuple) else tuple(map(self.kind, value.lower().split(self.between)))
        except ValueError:
            self.fail(f"{value!r} is not of the form {param.metavar if param else self.name}", param, ctx)


_SIZE, _EACH = _Numbers(int, "x"), _Numbers(float, ",")
reading = together(
    allow_script,
    click.option("--resize", type=_SIZE, metavar="N|HxW",
                 help="Images: size of the shorter side, or both.  [default: covers the model's input]"),
    click.option("--crop", type=_SIZE, metavar="N|HxW",
                 help="Images: size that is cut out of the center.  [default: the model's input]"),
    click.option("--scale", type=float, metavar="X",
                 help="Images: factor of the values 0 to 255.  [default: 1/255; 1 where the input is of integers]"),
    click.option("--mean", type=_EACH, metavar="X[,X,X]",
                 help="Images: subtracted after --scale, one number or one for each channel."),
    click.option("--std", type=_EACH, metavar="X[,X,X]", help="Images: divides after --mean."),
    click.option("--layout", type=_Choice(["NCHW", "NHWC"]),
                 help="Images: where the channels are.  [default: as the input says]"),
    click.option("--channel-order", type=_Choice(["rgb", "bgr"]),
                 help="Images: order of the channels.  [default: rgb]"),
    click.option("--tokenizer", type=click.Path(), metavar="FILE",
                 help="Text, one a line of a .txt: the tokenizer.json.  [default: the one beside the model]"),
    click.option("--max-length", type=int, metavar="N",
                 help="Text: tokens at most.  [default: what the model takes, up to 512]"),
)  # fmt: skip
source = together(
    data("calibration", "calibration", f"Samples for statistics such as activation ranges: {DATA}."),
    data("evaluation", "evaluation", "Other samples, on which the outputs are compared."),
    random,
    reading,
    seed,
    click.option(
        "--cache",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Keep statistics of the calibration data there, and layers that GPTQ has rounded. The same model and data "
        "then take no further run.",
    ),
)
shipped = click.option(
    "--model", type=_Choice(list(MODELS)), default="digits_cnn", show_default=True, help="The shipped network."
)
shape = click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="NAME:MIN:OPT:MAX",
    help="Shapes of a dynamic input in an engine, such as image:1x3x224x224:8x3x224x224:16x3x224x224. "
    "Repeatable.  [default: as in the data]",
)


def _pairs(ctx: click.Context, param: click.Parameter, given: Iterable[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in given]
    if wrong := next((name for name, equals, value in pairs if not (name and equals and value)), None):
        raise click.BadParameter(f"{wrong!r} is not of the form NAME=VALUE", ctx, param)
    return {name: value for name, _, value in pairs}


fixed = click.option(
    "--set",
    "fixed",
    multiple=True,
    metavar="NAME=VALUE",
    callback=_pairs,
    help="Make an input a constant, such as use_cache_branch=true, which leaves of an If one branch. Repeatable.",
)
own_cache = flag(options(PASSES["smooth"])["own_cache"])
require_share = click.option(
    "--require-share",
    type=click.FloatRange(0, 1),
    metavar="X",
    help="Gate: quantized share of the weight bytes, 0 to 1. Biases and norms do not count.",
)
gates = together(
    click.option("--min-snr", type=float, metavar="DB", help="Gate: signal-to-noise ratio of every output, in dB."),
    click.option("--min-cosine", type=float, metavar="X", help="Gate: cosine similarity of every output, up to 1."),
    click.option("--min-agreement", type=float, metavar="X", help="Gate: share of equal argmaxes, 0 to 1."),
    click.option("--max-rel", type=float, metavar="X", help="Gate: relative L2 error of every output, 0 or more."),
)


class _Amount(click.ParamType):
    """A share, such as 1% or 0.01; with ``size`` also a number of bytes, such as 5MB."""

    name = "amount"

    def __init__(self, size: bool = False):
        self.units = {"%": 0.01} | ({"KB": 1e3, "MB": 1e6, "GB": 1e9} if size else {})
        self.most, self.wanted = (math.inf, "a size such as 5MB or 30%") if size else (1.0, "a share such as 30%")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value).strip().upper()
        unit = next((unit for unit in self.units if text.endswith(unit)), "")
        try:
            amount = float(text.removesuffix(unit)) * self.units.get(unit, 1.0)
        except ValueError:
            amount = -1.0
        if not 0 <= amount <= self.most:
            self.fail(f"{value!r} is not {self.wanted}", param, ctx)
        return amount


workers = together(
    click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
                 help="Processes that measure; the result does not depend on their number."),
    click.option("--cluster", default="", metavar="URL", help="Dask scheduler that measures, such as tcp://host:8786."),
)  # fmt: skip
search = together(
    click.option(
        "--max-loss",
        type=_Amount(),
        metavar="X",
        help="Search: lose at most X, such as 1%, of top-1 accuracy where the evaluation data have labels, else of the "
        "argmaxes of class scores, or of the energy of other outputs.",
    ),
    click.option(
        "--max-size",
        type=_Amount(size=True),
        metavar="X",
        help="Search: a file of at most X, such as 5MB or 30%.",
    ),
    click.option(
        "--max-latency",
        type=_Amount(),
        metavar="X",
        help="Search: at most X, such as 60%, of the float model's time in ONNX Runtime on this machine; with --sm and "
        "the target tensorrt, of its engine's on such a GPU, modelled.",
    ),
    click.option(
        "--latency-table",
        default="",
        metavar="FILE",
        type=click.Path(),
        help="Search: the times that --max-latency is of, which bench --record has written, maybe on another machine.",
    ),
    click.option(
        "--search",
        "searches",
        is_flag=True,
        help="Search without these limits, for 20 dB. In a search --min-snr and --min-agreement are limits.",
    ),
    click.option(
        "--metric",
        default="",
        metavar="FILE.py:FUNCTION",
        help="Search: what --max-loss is of. The function takes the path of a model and returns a number, higher is "
        "better; the loss is relative. Runs the script, with --allow-script.",
    ),
    click.option(
        "--minimize",
        type=_Choice(["both", "size", "arithmetic"]),
        default="both",
        show_default=True,
        metavar="WHAT",
        help="What a search saves: size (bytes of the file), arithmetic (products times bits) or both.",
    ),
    click.option(
        "--prune-to",
        multiple=True,
        type=_Amount(),
        metavar="X",
        help="Search: variants with fewer channels as well, which keep X, such as 75%, of the MACs. Repeatable.",
    ),
    click.option(
        "--float-type",
        type=_Choice(["auto", "float32", "float16", "bfloat16"]),
        default="auto",
        show_default=True,
        metavar="TYPE",
        help="Search: the type of what stays float. auto: that of the recipe, or float16 for TensorRT, where it alone "
        "keeps the limits; float32, float16, bfloat16: this one.",
    ),
    click.option(
        "--trials", type=click.IntRange(min=2), default=12, show_default=True, metavar="N", help="Points to measure."
    ),
    workers,
)
