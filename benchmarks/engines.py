"""Engines of the open set's INT8 files, built without a GPU, and how many of their quantized nodes run as int8.

    python benchmarks/engines.py [TASK …] [--dir DIR] [--sm 86 --sm 89 --sm 120] [--json FILE] [--write]
    python benchmarks/engines.py --costs [TASK …] [--sm 89] [--write]

With --costs: what the engines of the float and of the INT8 file do, side by side, from their plans.
Exit code 1 when an engine runs less than 98 % of its quantized nodes as int8.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from accuracy import SUBJECTS, calibration, compressed
from harness import add_results, channelfold, keep, parser, run, table, write

BOUND = 0.98


def engines(folder: Path, task: str, sms: list[int], output: Path) -> list[dict]:
    """The entry of each engine of a task's model in the report, with the task and the share of the file in float."""
    subject = SUBJECTS[task]
    flags = [flag for sm in sms for flag in ("--sm", str(sm))]
    model = folder / "open" / subject.model
    command = ["compress", model, "-o", output, "--calibration", calibration(folder, task)]
    record = json.loads(run(channelfold(*command, *flags, *subject.flags, "--json")))
    share = sum(file.stat().st_size for file in output.glob("model.onnx*")) / model.stat().st_size
    return [{"task": task, "file": share} | engine for engine in record["engines"]]


def costs(folder: Path, task: str, sm: int, output: Path) -> list[tuple[str, ...]]:
    """Kernels, products and traffic of the engines of a task's float and INT8 model, and their ratios by a model."""
    model = folder / "open" / SUBJECTS[task].model
    int8 = compressed(folder, task, output)
    line = channelfold("bench", model, int8, "--sm", str(sm), "--data", calibration(folder, task), "--rounds", "1")
    pair = json.loads(run([*line, "--json"]))["engines"]
    plain = {row["card"]: row for row in pair[0]["cost"]["modelled"]}
    rows = []
    for name, engine in zip(("float", "int8"), pair, strict=True):
        cost = engine["cost"]
        told = []
        for card in cost["modelled"] if name == "int8" else ():
            low, high = sorted(plain[card["card"]][bound] / card[bound] for bound in ("least", "most"))
            told.append(f"{card['card']} {low:.2f} to {high:.2f}")
        rows.append(
            (
                f"{task}, {name}",
                str(cost["kernels"]),
                str(cost["quantizing"]),
                f"{sum(cost['macs'].values()) / 1e9:.3f}",
                f"{cost['macs'].get('int8', 0) / max(sum(cost['macs'].values()), 1):.0%}",
                f"{cost['traffic'] / 1e6:.1f}",
                f"{cost['constants'] / 1e6:.1f}",
                f"{cost['activations'].get('float', 0) / 1e6:.1f}",
                "; ".join(told),
            )
        )
    return rows


def row(engine: dict) -> tuple[str, ...]:
    plan = engine["plan"]
    missing = ", ".join(f"{node['node']} ({node['runs_as']})" for node in plan["not_int8"])
    return (
        engine["task"],
        str(engine["sm"]),
        f"{engine['seconds']:.1f}",
        f"{engine['bytes'] / 1e6:.1f}",
        f"{engine['file']:.3f}",
        f"{plan['int8']} of {plan['total']}",
        missing,
    )


def show_costs(options: argparse.Namespace) -> None:
    sm = (options.sm or [89])[0]
    header = ("engine", "kernels", "only quantize", "GMACs", "in int8", "traffic MB", "of constants",
              "of float activations", "modelled: int8 is times as fast")  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for task in options.tasks or SUBJECTS:
            rows += costs(options.dir, task, sm, Path(scratch, task))
            print(f"{task} done", file=sys.stderr)
    text = table(header, rows)
    print(text)
    if options.write:
        says = f"`python benchmarks/engines.py --costs`, SM {sm}, for the first calibration sample. Modelled, not "
        says += "measured: a roofline with all data in the cache, and with all data in memory and 2 µs a kernel."
        write("engines_costs.md", "# What engines do, float and int8", says, text)


def main() -> None:
    made = parser(__doc__, tasks={"nargs": "*", "metavar": "TASK", "choices": [*SUBJECTS, []]})
    made.add_argument("--sm", type=int, action="append")
    made.add_argument("--costs", action="store_true")
    add_results(made, "engines.md")
    options = made.parse_args()
    if options.costs:
        show_costs(options)
        return
    found: list[dict] = []
    with tempfile.TemporaryDirectory() as scratch:
        for task in options.tasks or SUBJECTS:
            found += engines(options.dir, task, options.sm or [86, 89, 120], Path(scratch, task))
            print(f"{task} done", file=sys.stderr)
    text = table(
        ("task", "SM", "build s", "engine MB", "file / float", "run as int8", "quantized, but run as"), map(row, found)
    )
    print(text)
    keep(options.json, found)
    if options.write:
        backends = ", ".join(dict.fromkeys(engine["backend"] for engine in found))
        write("engines.md", "# Engines of the open set's INT8 files", text, f"Built with {backends}.")
    sys.exit(any(engine["plan"]["int8"] < BOUND * engine["plan"]["total"] for engine in found))


if __name__ == "__main__":
    main()
