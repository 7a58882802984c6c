"""The README tells the truth: its commands parse, its code runs, its figures are reproduced."""

from __future__ import annotations

import importlib.util
import io
import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest
from rich.console import Console

from channelfold import cli
from channelfold.passes import recipe
from channelfold.runtime import errors, jobs
from channelfold.runtime.report.terminal import render

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [text for found, text in BLOCKS if found == language]


COMMANDS = [line for text in blocks("bash") for line in text.splitlines()]


@pytest.mark.parametrize("line", [part for line in COMMANDS for part in line.split(" && ")])
def test_every_command_exists_and_so_do_its_options(line):
    program, *args = shlex.split(line)
    if program == "channelfold":
        command = cli.cli.commands[args[0]]
        assert isinstance(command.make_context(args[0], args[1:]), click.Context)
    elif program == "pip":
        (extras,) = re.findall(r"^\.\[(.+)\]$", args[-1])
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert args[0] == "install"
        assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    else:
        assert line in ("python3 -m venv .venv", ". .venv/bin/activate", "pytest -n 2")


def test_two_commands_do_all_set_up():
    environment = "python3 -m venv .venv && . .venv/bin/activate && "
    assert f"{environment}pip install '.[cpu,rtx]' && channelfold demo" in COMMANDS
    assert f"{environment}pip install '.[cpu,rtx,test]' && pytest -n 2" in COMMANDS


def test_every_command_is_shown():
    parts = [shlex.split(part) for line in COMMANDS for part in line.split(" && ")]
    assert {part[1] for part in parts if part[0] == "channelfold"} == cli.cli.commands.keys()


@pytest.mark.parametrize("code", blocks("python"))
def test_python_examples_run(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert capsys.readouterr().out


def test_recipes_load():
    assert [recipe.loads(text).name for text in blocks("toml")] == ["int8-careful"]


def test_the_table_of_passes_is_complete():
    rows = re.findall(r"^\| `([\w-]+)` \| (exact|calibrated|lossy) \|", README, re.MULTILINE)
    assert rows == [(name, cls.kind) for name, cls in recipe.PASSES.items()]


def test_the_exit_codes_are_those_of_the_errors():
    codes = {int(code) for code in re.findall(r"^\| (\d) \|", README, re.MULTILINE)}
    assert codes == {0, errors.ChannelfoldError.exit_code, errors.UsageError.exit_code, errors.GateError.exit_code}


def rows(text: str) -> dict[str, list[str]]:
    """The lines of the demo's table by their label: figures, then the remark."""
    split = (re.split(r"  +", line.strip()) for line in text.splitlines())
    return {cells[0]: cells[1:] for cells in split if len(cells) > 1}


def test_the_figures_of_the_demo_are_reproduced(tmp_path):
    """Counts and sizes exactly. ONNX Runtime's int8 kernels differ between processors, and times between moments."""
    (shown,) = [rows(text) for text in blocks("text") if "top-1 accuracy" in text]
    has_rtx = importlib.util.find_spec("tensorrt_rtx") is not None
    printed = io.StringIO()
    render(jobs.demo(tmp_path, sms=(86, 89) if has_rtx else ()), Console(file=printed, width=200))
    found = rows(printed.getvalue())
    assert [label for label in shown if has_rtx or "engine" not in label] == list(found)
    for label, cells in found.items():
        expected = shown[label]
        if label in ("top-1 accuracy", "same class as float"):
            assert [number(cell) for cell in cells] == pytest.approx([number(cell) for cell in expected], abs=0.4)
        elif label == "signal to noise":
            assert number(cells[0]) == pytest.approx(number(expected[0]), abs=1.5)
        elif label.startswith("engine"):
            assert re.findall(r"\d+ of \d+ nodes run as int8", cells[1]) == re.findall(
                r"\d+ of \d+ nodes run as int8", expected[1]
            )
        elif "latency" not in label:
            assert cells == expected


def number(cell: str) -> float:
    return float(re.findall(r"[\d.]+", cell)[0])
