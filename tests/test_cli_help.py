"""The help of the command line: fast, complete, and with the options of the passes."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click
import pytest

import channelfold
from channelfold import cli
from channelfold.passes import recipe
from channelfold.passes import smooth_methods as methods
from channelfold.passes.base import Pass
from channelfold.passes.options import option, options
from channelfold.runtime import flags
from channelfold.runtime.errors import UsageError
from channelfold.tests.shipped import COMMANDS

HEAVY = {"numpy", "onnx", "onnx_graphsurgeon", "rich", "onnxruntime", "polygraphy", "tensorrt", "ml_dtypes"}
BARE = """
import sys

class Bare:
    allowed = {"click", "channelfold", *sys.stdlib_module_names}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in self.allowed and not name.startswith("__editable__"):
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Bare())
from channelfold.cli import main
main(sys.argv[1:])
"""


def bare(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", BARE, *args], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=" ".join)
def test_help_needs_click_alone(command):
    done = bare(*command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: channelfold {' '.join(command)}".rstrip())


def test_a_command_says_what_is_missing_where_only_click_is_installed():
    done = bare("inspect", "model.onnx")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: channelfold is not fully installed (")
    assert done.stderr.endswith("In its folder, run: pip install '.[cpu]'\n")


def imported(*args: str) -> set[str]:
    """The modules that an interpreter loads with these arguments."""
    done = subprocess.run([sys.executable, "-X", "importtime", *args], capture_output=True, text=True, check=True)
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}


def test_help_loads_click_and_little_else():
    """The modules that are loaded are what help takes its time for; half of the bound are modules of Python."""
    loaded = imported("-m", "channelfold", "--help")
    assert {name.partition(".")[0] for name in loaded}.isdisjoint(HEAVY)
    assert {"click", "channelfold.cli"} <= loaded
    assert len(loaded - imported("-c", "import click")) <= 70


def test_the_package_itself_is_light():
    assert imported("-c", "import channelfold").isdisjoint(HEAVY | {"click"})


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_ends_with_an_example_that_parses(name, run):
    _, out, _ = run(name, "--help")
    example = out.splitlines()[-1]
    assert example.startswith(f"    channelfold {name}")
    assert len(example) <= 80
    parse(example)


def parse(line: str) -> click.Context:
    """Parses a command line without running it; raises click.UsageError for anything it does not know."""
    program, name, *args = shlex.split(line)
    assert program == "channelfold"
    return cli.cli.commands[name].make_context(name, args)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name):
    for flag in cli.cli.commands[name].params:
        assert isinstance(flag, click.Argument) or (flag.help and flag.help[-1] in ".]"), flag.name


@dataclass(frozen=True)
class Sample(Pass):
    """Has an option of every kind."""

    share: float | None = option(None, "How much goes.", above=0, high=1, expected="a share: 0.5 is half", means="all")
    mode: Literal["fast", "exact"] = option("fast", "How.")
    rounds: int = option(3, "How often.", low=1)
    on: bool = option(True, "Whether.")
    off: bool = option(False, "Whether not.")
    node_names: tuple[str, ...] = option((), "Which ones.", metavar="PATTERN")


def sample(before: str = "") -> dict[str, click.Option]:
    """The flags of Sample by name."""
    command = flags.together(*(flags.flag(one, before) for one in options(Sample).values()))(lambda: None)
    return {flag.name: flag for flag in click.command()(command).params}


def test_a_flag_is_derived_from_its_field():
    found = {name: (flag.opts + flag.secondary_opts, flag.multiple) for name, flag in sample().items()}
    assert found == {
        "share": (["--share"], False),
        "mode": (["--mode"], False),
        "rounds": (["--rounds"], False),
        "on": (["--on", "--no-on"], False),
        "off": (["--off"], False),
        "node_names": (["--node-name"], True),
    }
    assert [flag.type.name for flag in sample().values()] == ["float", "choice", "integer", *["boolean"] * 2, "text"]
    assert list(sample()["mode"].type.choices) == ["fast", "exact"]
    assert [flag.metavar for flag in sample().values()] == ["X", None, "N", None, None, "PATTERN"]


def test_its_help_says_bounds_and_default():
    assert {name: flag.help for name, flag in sample().items()} == {
        "share": "How much goes.  [more than 0 and at most 1; default: all]",
        "mode": "How.  [default: fast]",
        "rounds": "How often.  [at least 1; default: 3]",
        "on": "Whether.  [default: on]",
        "off": "Whether not.",
        "node_names": "Which ones. Repeatable.",
    }
    assert sample("--much")["rounds"].help == "--much: how often.  [at least 1; default: 3]"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share": 2.0}, "'share' is 2. Expected a share: 0.5 is half"),
        ({"share": math.nan}, "'share' is nan. Expected a share: 0.5 is half"),
        ({"rounds": 0}, "'rounds' is 0. Expected at least 1"),
        ({"mode": "exat"}, "'mode' is \"exat\", expected one of 'fast', 'exact'. Did you mean 'exact'?"),
    ],
)
def test_a_wrong_value_is_refused(values, message):
    with pytest.raises(UsageError) as caught:
        Sample(**values)
    assert str(caught.value) == message


@pytest.mark.parametrize("name", recipe.PASSES)
def test_every_option_of_every_pass_has_help_and_a_schema(name):
    known = options(recipe.PASSES[name])
    assert [one["help"][-1] for one in recipe.describe(name)["options"]] == ["."] * len(known)
    assert all("description" in one.schema() for one in known.values())
    number = options(Sample)["share"].schema()
    assert number == {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "description": "How much goes."}


def test_a_wrong_value_is_told_alike_everywhere(fails, tmp_path):
    message = "'percentile' is 101. Expected more than 0 and at most 100"
    with pytest.raises(UsageError, match=message):
        recipe.PASSES["quantize"](percentile=101.0)
    (tmp_path / "r.toml").write_text('[[pass]]\nname = "quantize"\npercentile = 101\n')
    with pytest.raises(UsageError, match=message):
        recipe.load_recipe(tmp_path / "r.toml")
    assert message in fails(2, "quantize", "m.onnx", "-o", "x", "--percentile", "101")


@pytest.mark.parametrize("command", [*COMMANDS])
def test_every_flag_of_a_pass_is_that_of_its_option(command):
    """Of the commands that take options of passes: all of them, and none that is of no pass."""
    named = {"compress": ["quantize"], "quantize": ["quantize"], "sparsify": ["sparsify"], "prune": ["prune"],
             "reparam": ["reparameterize-ffn", "approximate-ffn"]}.get(command, [])  # fmt: skip
    found = {flag.name for flag in cli.cli.commands[command].params}
    assert found >= {key for name in named for key in options(recipe.PASSES[name])} - {"verify"}


def test_smooth_has_a_flag_for_all_that_its_methods_heed():
    heeded = set()
    for method in methods.METHODS.values():
        heeded |= {*method.options, *method.switched, *([method.switch] if method.switch else [])}
    others = {flag.name for flag in cli.cli.commands["sparsify"].params} - {*options(recipe.PASSES["sparsify"])}
    assert heeded == {flag.name for flag in cli.cli.commands["smooth"].params} - others - {"method"}


# ---- passes ------------------------------------------------------------------------------------------------------


def test_the_page_of_passes_is_what_they_say(run):
    code, out, _ = run("passes", "--markdown")
    assert (code, out) == (0, (Path(channelfold.__file__).parent / "passes" / "README.md").read_text())


def test_passes_are_listed_and_shown(run, fails):
    _, out, _ = run("passes")
    assert [line.split()[0] for line in out.splitlines() if not line.startswith(" ")] == [*recipe.PASSES]
    _, out, _ = run("passes", "quantize")
    assert (
        "- `percentile`: Of the calibrator percentile. [a number; more than 0 and at most 100; default: 99.999]" in out
    )
    _, out, _ = run("passes", "quantize", "--json")
    assert json.loads(out) == json.loads(json.dumps([recipe.describe("quantize")]))
    assert "There is no pass 'quantise'. Did you mean 'quantize'?" in fails(2, "passes", "quantise")


def test_the_help_of_compress_names_the_built_in_recipes(run):
    _, out, _ = run("compress", "--help")
    assert all(f"{name}," in out for name in recipe.BUILT_IN)


def test_version(run):
    assert run("--version") == (0, f"channelfold {channelfold.__version__}\n", "")


@pytest.mark.parametrize("short", [["--target", "tensorrt:89"], ["--target=tensorrt:89"]])
@pytest.mark.parametrize(("name", "key", "sms"), [("compress", "sms", (86, 89)), ("lint", "sm", 89)])
def test_the_target_takes_an_sm(short, name, key, sms):
    more = ["-o", "x", "--sm", "86"] if name == "compress" else []
    context = cli.cli.commands[name].make_context(name, ["tensorrt:89", *more, *short])
    assert (context.params["model"], context.params["target"], context.params[key]) == ("tensorrt:89", "tensorrt", sms)
