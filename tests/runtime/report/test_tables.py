"""No name can steer the terminal: control characters planted wherever a name can stand reach neither stream."""

from __future__ import annotations

import ast
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from rich.console import Console

from channelfold import cli, models
from channelfold.runtime import jobs, report, shell
from channelfold.runtime.report.names import one_line
from channelfold.runtime.report.progress import Progress
from channelfold.runtime.report.tables import Page
from channelfold.runtime.report.terminal import render
from channelfold.tests.runtime.report.test_terminal import record

EVIL = "\x1b]0;owned\x07\x1b[31m\nerror: forged"
NAMES_AS_KEYS = ("ops", "norms", "by_op", "stay", "output_error", "data")
COMMANDS = {
    "fold": "-o {out}",
    "smooth": "-o {out} --calibration {data}",
    "quantize": "-o {out} --calibration {data}",
    "prune": "-o {out} --ratio 0.3 --calibration {data}",
    "reparam": "-o {out} --always --evaluation {data}",
    "sparsify": "-o {out} --calibration {data}",
    "inspect": "--idle --groups --calibration {data}",
    "diff": "{model} --data {data}",
    "compress": "-o {folder} --calibration {data}",
}


def assert_harmless(*texts: str) -> None:
    for text in texts:
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text), text
        assert not re.search("^error: forged", text, re.MULTILINE), text


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> dict[str, Path]:
    """A shipped network and its data, with ``EVIL`` in all their names and in those of the files."""
    model = onnx.load(models.path("digits_repavit.onnx"))
    graph = model.graph
    named = (*graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info)
    for node in graph.node:
        node.input[:] = [name and name + EVIL for name in node.input]
        node.output[:] = [name + EVIL for name in node.output]
    for entry in named:
        entry.name += EVIL
    folder = tmp_path_factory.mktemp("planted")
    paths = {name: folder / f"{name}{EVIL}{suffix}" for name, suffix in (("model", ".onnx"), ("data", ".npz"))}
    onnx.save(model, paths["model"])
    data = np.load(models.path("digits_calibration.npz"))
    np.savez(paths["data"], **{name + EVIL: data[name][:16] for name in data.files})
    return paths | {"out": folder / f"out{EVIL}.onnx", "folder": folder / f"out{EVIL}"}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command: str, planted: dict[str, Path], capfd):
    options = [str(planted[part[1:-1]]) if part[0] == "{" else part for part in COMMANDS[command].split()]
    assert shell.run(cli.cli, [command, str(planted["model"]), *options]) == 0
    out, err = capfd.readouterr()
    assert "?]0;owned??[31m?error: forged" in out
    assert_harmless(out, err)


@pytest.mark.parametrize(
    "args",
    [
        ["inspect", f"missing{EVIL}.onnx"],
        ["inspect", "{model}", "--calibration", f"missing{EVIL}.npz"],
        ["quantize", "{model}", "-o", "{out}", "--calibration", str(models.path("digits_calibration.npz"))],
        ["quantize", str(models.path("digits_repavit.onnx")), "-o", "{out}", "--calibration", "{data}"],
        ["quantize", "{model}", "-o", "{out}", "--calibration", "{data}", "--calibrator", f"none{EVIL}"],
        ["fold", "{data}", "-o", "{out}", "--debug"],
        ["compress", "{model}", "-o", "{folder}", "--recipe", f"recipe{EVIL}", "--debug"],
        ["inspect", "{model}", f"--option{EVIL}"],
        [f"command{EVIL}"],
    ],
)
def test_errors(args: list[str], planted: dict[str, Path], capfd):
    assert shell.run(cli.cli, [str(planted.get(arg.strip("{}"), arg)) for arg in args]) in (1, 2)
    assert_harmless(*capfd.readouterr())


def test_an_error_that_nobody_expected(capfd, monkeypatch):
    monkeypatch.setattr(jobs, "fold", lambda *_, **__: (_ for _ in ()).throw(OSError(5, f"why{EVIL}", f"file{EVIL}")))
    assert shell.run(cli.cli, ["fold", "x", "-o", "y"]) == 1
    monkeypatch.setattr(jobs, "fold", lambda *_, **__: (_ for _ in ()).throw(KeyError(f"why{EVIL}" * 100)))
    assert shell.run(cli.cli, ["fold", "x", "-o", "y", "--debug"]) == 1
    out, err = capfd.readouterr()
    assert_harmless(out, err)
    assert len(err.splitlines()[-1]) == 500
    assert err.startswith("error: ")
    assert err.endswith("Report it with the traceback above\n")


def test_both_ends_of_a_long_line_are_kept():
    assert one_line("first\n" + "word " * 50 + "\tlast", 30) == "first word…word word word last"


def evil(value: Any, key: str = "") -> Any:
    """The record with ``EVIL`` at the end of every text and of every name that is a key."""
    if isinstance(value, dict):
        return {name + EVIL * (key in NAMES_AS_KEYS): evil(item, name) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [evil(item, key) for item in value]
    return value + EVIL if isinstance(value, str) and key != "level" and value not in ("inf", "-inf") else value


@pytest.mark.parametrize("width", [60, 80, None])
def test_every_text_of_a_record(width: int | None):
    stage = {"accuracy": 1.0, "agreement": 1.0, "snr": 1.0, "bytes": 1, "nodes": 1}
    stages = [{"name": name} | stage for name in ("a", "b")]
    demo = {"model": "m", "description": "d", "samples": 1, "folder": "f", "no_engines": "why", "stages": stages}
    for shown in (record(), record() | {"demo": demo}):
        file = io.StringIO()
        render(evil(shown), Console(file=file, width=width, force_terminal=width is not None, color_system=None))
        assert_harmless(file.getvalue())


def test_progress(monkeypatch):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with Progress() as progress:
        progress(f"stage{EVIL}", 0, 1)
        progress._start()
        assert_harmless(*(task.description for task in progress._display.tasks))


def test_only_tables_prints():
    """Whoever else holds a console could leave out ``safe``."""
    for path in Path(report.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rich"):
                assert path.stem in ("tables", "progress") or [name.name for name in node.names] == ["Console"]
            if isinstance(node, ast.Attribute) and node.attr in ("print", "write"):
                assert path.stem == "tables", f"{path.name}:{node.lineno}"


def test_shortened_names_say_how_to_see_them_whole():
    name = "/model/" + "layer/" * 20 + "MatMul"

    def shown(terminal: bool) -> str:
        page = Page(Console(file=io.StringIO(), width=80, force_terminal=terminal, color_system=None))
        page.fill("Nodes", (">n",), [(name, "1"), ("/b", "2")])
        page.nodes([(name, "")] * 4, 3)
        return page._console.file.getvalue()

    assert shown(True).count("whole names: --json, or pipe the output") == 2
    assert name not in shown(True)
    assert (shown(False).count(name), shown(False).count("whole names")) == (4, 0)
