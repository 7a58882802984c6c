"""Time and peak memory of ``channelfold quantize``, against the least it could cost: running the samples once in float.

    python benchmarks/speed.py run DIR [--model M …] [--calibrator C …] [--runs N] [--json FILE] [--write]
    python benchmarks/speed.py floor MODEL DATA

DIR is what ``shapes.py make DIR`` filled. Both commands are whole processes, run in turn (A B A B …) in one go on one
machine, so that what slows the machine down slows both: the ratio of their medians is the figure to compare.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from harness import add_results, channelfold, keep, parser, table, write

QUANTIZE = "quantize {model} -o {output} --calibration {data} --calibrator {calibrator}"
MODELS = ("resnet50", "vit", "bert")
CALIBRATORS = ("minmax", "percentile", "entropy", "mse")
HEADER = ("model, calibrator", "quantize s (min / median / max)", "floor s", "ratio", "quantize MB", "floor MB")


@dataclass
class Runs:
    """Wall-clock seconds and peak resident memory (MB) of repeated runs of one command."""

    seconds: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)

    def add(self, command: Sequence[str]) -> None:
        seconds, megabytes = measured(command)
        self.seconds.append(round(seconds, 3))
        self.megabytes.append(round(megabytes, 1))

    def __str__(self) -> str:
        low, middle, high = min(self.seconds), statistics.median(self.seconds), max(self.seconds)
        return f"{low:.2f} / {middle:.2f} / {high:.2f}"


@dataclass
class Pair:
    model: str
    calibrator: str
    quantize: Runs = field(default_factory=Runs)
    floor: Runs = field(default_factory=Runs)

    @property
    def ratio(self) -> float:
        return statistics.median(self.quantize.seconds) / statistics.median(self.floor.seconds)

    def row(self) -> tuple[str, ...]:
        peaks = [f"{max(runs.megabytes):.0f}" for runs in (self.quantize, self.floor)]
        return f"{self.model}, {self.calibrator}", str(self.quantize), str(self.floor), f"{self.ratio:.2f}", *peaks


def measured(command: Sequence[str]) -> tuple[float, float]:
    """Seconds and peak memory in MB of a child process. Ends the script when the child fails."""
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=output, stderr=output)
        # wait4 gives the usage of this child alone, getrusage only the largest of all so far.
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            output.seek(0)
            sys.exit(f"{shlex.join(command)}\nended with {child.returncode}:\n{output.read().decode()[-2000:]}")
    return seconds, usage.ru_maxrss / 1000


def measure(folder: Path, model: str, calibrator: str, runs: int, command: str) -> Pair:
    """Alternates the two commands ``runs`` times, after one run of each that only warms the page cache."""
    pair = Pair(model, calibrator)
    path, data = folder / f"{model}.onnx", folder / f"{model}.calibration.npz"
    floor = [sys.executable, __file__, "floor", str(path), str(data)]
    with tempfile.TemporaryDirectory() as outputs:
        places = {"model": path, "data": data, "calibrator": calibrator, "output": Path(outputs, "out.onnx")}
        quantize = [part.format(**places) for part in shlex.split(command)]
        for child in (quantize, floor):
            measured(child)
        for _ in range(runs):
            pair.quantize.add(quantize)
            pair.floor.add(floor)
    return pair


def floor(model: Path, data: Path) -> None:
    """Every sample once through a plain float session."""
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    with np.load(data) as arrays:
        columns = {name: arrays[name] for name in arrays.files}
    for i in range(len(next(iter(columns.values())))):
        session.run(None, {name: column[i : i + 1] for name, column in columns.items()})


def main() -> None:
    options = parse()
    if options.task == "floor":
        floor(options.model, options.data)
        return
    pairs = []
    for model in options.model:
        for calibrator in options.calibrator:
            pairs.append(measure(options.folder, model, calibrator, options.runs, options.command))
            print(f"{model} {calibrator}: {pairs[-1].quantize} s, {pairs[-1].ratio:.2f} x the floor", file=sys.stderr)
    text = table(HEADER, [pair.row() for pair in pairs])
    print(text)
    keep(options.json, [asdict(pair) | {"ratio": pair.ratio} for pair in pairs])
    if options.write:
        command = options.command.replace(shlex.join(channelfold()), "channelfold")
        how = f"`{command}`, 64 samples, {options.runs} runs in turn with the floor after one warm-up each."
        write("speed.md", "# Time and memory of INT8 calibration", how, text)


def parse() -> argparse.Namespace:
    made = parser(__doc__)
    tasks = made.add_subparsers(dest="task", required=True)
    run = tasks.add_parser("run")
    run.add_argument("folder", type=Path, metavar="DIR")
    run.add_argument("--model", nargs="+", choices=MODELS, default=MODELS)
    run.add_argument("--calibrator", nargs="+", default=CALIBRATORS)
    run.add_argument("--runs", type=int, default=5)
    run.add_argument(
        "--command", default=shlex.join(channelfold()) + " " + QUANTIZE, help="another tool's command line"
    )
    add_results(run, "speed.md", folder=False)
    plain = tasks.add_parser("floor")
    plain.add_argument("model", type=Path)
    plain.add_argument("data", type=Path)
    return made.parse_args()


if __name__ == "__main__":
    main()
