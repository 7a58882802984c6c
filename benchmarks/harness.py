"""The common parts of the measuring scripts: the command under test, their options, tables, results, the machine."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from open_set import DEFAULT

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def channelfold(*arguments: str | Path) -> list[str]:
    """The command line of this environment's ``channelfold``."""
    return [str(Path(sys.executable).with_name("channelfold")), *map(str, arguments)]


def run(command: Sequence[str]) -> str:
    """What the command printed to stdout. Ends the script with its last lines when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        sys.exit(f"Cannot run {command[0]} ({error.strerror}). Install channelfold in this environment")
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nended with exit code {done.returncode}:\n{done.stderr.strip()[-2000:]}")
    return done.stdout


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with columns as wide as their cells; every column but the first is right-aligned."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [[row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, len(row)))] for row in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def machine() -> str:
    """One line: processor, cores, memory, versions, date."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {_version(name)}" for name in ("channelfold", "onnxruntime", "onnx", "numpy"))
    return (
        f"{_processor()}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB; "
        f"Python {platform.python_version()}, {versions}; {date.today()}."
    )


def parser(doc: str | None, **positional: Any) -> argparse.ArgumentParser:
    """A parser with the help ``doc``; ``positional`` arguments of ``add_argument`` by name."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, settings in positional.items():
        made.add_argument(name, **settings)
    return made


def add_results(made: argparse.ArgumentParser, page: str, folder: bool = True) -> None:
    """Adds --json and --write, and --dir for scripts that measure the open set."""
    if folder:
        made.add_argument("--dir", type=Path, default=DEFAULT, help="the open set")
    made.add_argument("--json", type=Path, metavar="FILE", help="rows measured so far; new rows are added")
    made.add_argument("--write", action="store_true", help=f"also write results/{page}")


def known(path: Path | None) -> Any:
    """The rows that a JSON file holds; an empty dict without the file."""
    return json.loads(path.read_text()) if path and path.exists() else {}


def keep(path: Path | None, rows: Any) -> None:
    """Writes rows to a JSON file, if one is given."""
    if path:
        path.write_text(json.dumps(rows, indent=1))


def write(name: str, *parts: str) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text("\n\n".join([*parts, machine()]) + "\n")
    print(f"wrote {RESULTS / name}", file=sys.stderr)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
