"""Engines of the open set's INT8 files, built without a GPU, and how many of their quantized nodes run as int8.

    python benchmarks/engines.py [TASK …] [--dir DIR] [--sm 86 --sm 89 --sm 120] [--json FILE] [--write]

Exit code 1 when an engine runs less than 95 % of its quantized nodes as int8.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from accuracy import SUBJECTS, calibration
from harness import add_results, channelfold, keep, parser, run, table, write

BOUND = 0.95


def engines(folder: Path, task: str, sms: list[int], output: Path) -> list[dict]:
    """The report's entry of each engine of a task's model, with the task."""
    subject = SUBJECTS[task]
    flags = [flag for sm in sms for flag in ("--sm", str(sm))]
    command = ["compress", folder / "open" / subject.model, "-o", output, "--calibration", calibration(folder, task)]
    record = json.loads(run(channelfold(*command, *flags, *subject.flags, "--json")))
    return [{"task": task} | engine for engine in record["engines"]]


def row(engine: dict) -> tuple[str, ...]:
    plan = engine["plan"]
    missing = ", ".join(f"{node['node']} ({node['runs_as']})" for node in plan["not_int8"])
    return (
        engine["task"],
        str(engine["sm"]),
        f"{engine['seconds']:.1f}",
        f"{engine['bytes'] / 1e6:.1f}",
        f"{plan['int8']} of {plan['total']}",
        missing,
    )


def main() -> None:
    made = parser(__doc__, tasks={"nargs": "*", "metavar": "TASK", "choices": [*SUBJECTS, []]})
    made.add_argument("--sm", type=int, action="append")
    add_results(made, "engines.md")
    options = made.parse_args()
    found: list[dict] = []
    with tempfile.TemporaryDirectory() as scratch:
        for task in options.tasks or SUBJECTS:
            found += engines(options.dir, task, options.sm or [86, 89, 120], Path(scratch, task))
            print(f"{task} done", file=sys.stderr)
    text = table(("task", "SM", "build s", "engine MB", "run as int8", "quantized, but run as"), map(row, found))
    print(text)
    keep(options.json, found)
    if options.write:
        backends = ", ".join(dict.fromkeys(engine["backend"] for engine in found))
        write("engines.md", "# Engines of the open set's INT8 files", text, f"Built with {backends}.")
    sys.exit(any(engine["plan"]["int8"] < BOUND * engine["plan"]["total"] for engine in found))


if __name__ == "__main__":
    main()
