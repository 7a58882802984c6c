"""What statistics and ``channelfold quantize`` cost, as multiples of a plain float run of the same samples.

    python benchmarks/calibration.py run DIR [--model M …] [--samples N] [--json FILE] [--write]
    python benchmarks/calibration.py thresholds DIR [--model M …] [--samples N] [--json FILE] [--write]
    python benchmarks/calibration.py one WHAT MODEL DATA N

DIR is what ``shapes.py make DIR`` filled. Every measurement is a process of its own, in turn with the plain run that it
is divided by. Cost is processor time, of all threads, user and system: on a busy machine seconds on the clock mean
little. ``floor`` opens the model and runs the samples in a plain session, ``floor asleep`` in one whose threads sleep
while they wait for each other, as ours do; ``statistics`` opens the model and observes the input of every layer that
``quantize`` quantizes, all values of it for ``entropy``; ``quantize CALIBRATOR`` is the whole command, and
``onnxruntime METHOD`` the calibrator of ONNX Runtime on the same operators. Memory is the most that the process held of
its own: pages of mapped files, which the system drops when it needs the room, do not count.

``thresholds``: ``quantize`` counts a part of the values of large tensors (``histograms.COUNTED``), and all of their
largest magnitudes; for the calibrator entropy it counts all values. How far the ranges are from those by all values,
and what that costs: the signal-to-noise ratio of the tensor, of all values, in dB.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from harness import add_results, keep, known, parser, table, write

MODELS = ("resnet50", "vit", "bert")
CALIBRATORS = ("minmax", "percentile", "entropy", "mse")
OURS = ("statistics", "statistics entropy", *(f"quantize {name}" for name in CALIBRATORS))
PEERS = ("onnxruntime minmax", "onnxruntime percentile")
ASLEEP = "floor asleep"
LOOK = 0.05  # seconds between two looks at the memory of a process
HEADER = ("model", "what", "samples", "runs", "CPU s", "of the floor", "MB", "of the floor")


@dataclass
class Cost:
    """Processor seconds and peak memory in MB of repeated runs, each beside those of a plain run."""

    model: str
    what: str
    samples: int
    seconds: list[float] = field(default_factory=list)
    floors: list[float] = field(default_factory=list)
    megabytes: float = 0.0
    floor_megabytes: float = 0.0

    @property
    def ratio(self) -> float:
        pairs = zip(self.seconds, self.floors, strict=True)
        return statistics.median(mine / plain for mine, plain in pairs)

    def row(self) -> tuple[str, ...]:
        more = self.megabytes / self.floor_megabytes
        seconds = statistics.median(self.seconds)
        counts = str(self.samples), str(len(self.seconds))
        return (
            self.model,
            self.what,
            *counts,
            f"{seconds:.2f}",
            f"{self.ratio:.2f}",
            f"{self.megabytes:.0f}",
            f"{more:.2f}",
        )


def measured(what: str, model: Path, data: Path, samples: int) -> tuple[float, float]:
    """Processor seconds and peak memory in MB of a child process. Ends the script when the child fails."""
    command = [sys.executable, __file__, "one", what, str(model), str(data), str(samples)]
    with tempfile.TemporaryFile() as output:
        child, peak = subprocess.Popen(command, stdout=output, stderr=output), 0.0
        while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            peak = max(peak, anonymous(child.pid))
            time.sleep(LOOK)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            output.seek(0)
            sys.exit(f"{what} {model.name} ended with {child.returncode}:\n{output.read().decode()[-2000:]}")
    return usage.ru_utime + usage.ru_stime, peak


def anonymous(process: int) -> float:
    """MB of memory that a process holds of its own."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has just ended
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) * 1024 / 1e6


def feeds(data: Path, samples: int) -> list[dict[str, np.ndarray]]:
    """So many samples, from the first again where there are fewer."""
    with np.load(data) as arrays:
        columns = {name: arrays[name] for name in arrays.files}
    stored = len(next(iter(columns.values())))
    return [{name: column[i % stored][None] for name, column in columns.items()} for i in range(samples)]


def one(what: str, model: Path, data: Path, samples: int) -> None:
    """Does one of the things that are measured."""
    kind, _, how = what.partition(" ")
    {"floor": floor, "statistics": observe, "quantize": quantize, "onnxruntime": peer, "start": lambda *_: None}[kind](
        model, feeds(data, samples), how
    )


def floor(model: Path, samples: list[dict[str, np.ndarray]], how: str) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if how:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    for feed in samples:
        session.run(None, feed)


def opened(model: Path, samples: list[dict[str, np.ndarray]]) -> tuple[Any, dict[str, int], Any]:
    """(graph, axis of the channels of each tensor that ``quantize`` observes, context with the samples)."""
    from channelfold.passes.base import Context, Outcome
    from channelfold.passes.quantize.static import Work
    from channelfold.runtime.data.sources import open_data
    from channelfold.runtime.io import files
    from channelfold.runtime.io.facts import required_inputs

    graph = files.load(model)
    files.infer_shapes(graph)
    axes = {site.data.name: site.in_axis for site in Work().sites(graph, Outcome())}
    return graph, axes, Context(open_data(samples, required_inputs(graph)))


def observe(model: Path, samples: list[dict[str, np.ndarray]], calibrator: str) -> None:
    from channelfold.runtime.stats.histograms import TensorStatistics, counted

    graph, axes, context = opened(model, samples)
    enough = None if calibrator == "entropy" else counted(len(samples))
    context.observe(graph, {name: [TensorStatistics(axis, enough)] for name, axis in axes.items()})


def thresholds(model: Path, samples: list[dict[str, np.ndarray]]) -> list[tuple[str, ...]]:
    """A row for each calibrator: tensors, ranges that differ, the largest difference, the largest loss in dB."""
    from channelfold.passes.quantize import calibrators
    from channelfold.runtime.stats.histograms import TensorStatistics, counted

    graph, axes, context = opened(model, samples)
    enough = counted(len(samples))
    seen = {name: [TensorStatistics(axis), TensorStatistics(axis, enough)] for name, axis in axes.items()}
    context.observe(graph, seen)
    rows = []
    for calibrator in (name for name in CALIBRATORS if name != "entropy"):
        found = [[calibrators.threshold(one, calibrator) for one in pair] for pair in seen.values()]
        exact = [pair[0] for pair in seen.values()]
        lost = [calibrators.snr(s, a) - calibrators.snr(s, b) for s, (a, b) in zip(exact, found, strict=True)]
        apart = [abs(b / a - 1) for a, b in found]
        differ = sum(distance > 0 for distance in apart)
        rows.append((model.stem, calibrator, f"{differ} of {len(found)}", f"{max(apart):.2%}", f"{max(lost):.3f}"))
    return rows


def quantize(model: Path, samples: list[dict[str, np.ndarray]], calibrator: str) -> None:
    from channelfold.runtime import jobs

    with tempfile.TemporaryDirectory() as folder:
        source = jobs.Source(calibration=samples)
        jobs.quantize(model, Path(folder, "int8.onnx"), source=source, options={"calibrator": calibrator})


def peer(model: Path, samples: list[dict[str, np.ndarray]], method: str) -> None:
    """ONNX Runtime's own calibrator, on the operators that ``quantize`` quantizes."""
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization.calibrate import CalibrationDataReader, create_calibrator

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(samples)

        def get_next(self) -> Any:
            return next(self.left, None)

    methods = {"minmax": CalibrationMethod.MinMax, "percentile": CalibrationMethod.Percentile}
    with tempfile.TemporaryDirectory() as folder:
        augmented = str(Path(folder, "augmented.onnx"))
        made = create_calibrator(model, ["Conv", "MatMul", "Gemm"], augmented, methods[method])
        made.collect_data(Reader())
        made.compute_data()


def main() -> None:
    options = parse()
    if options.task == "one":
        one(options.what, options.model, options.data, options.samples)
        return
    if options.task == "thresholds":
        write_thresholds(options)
        return
    costs = {(row["model"], row["what"], row["samples"]): Cost(**row) for row in known(options.json) or []}
    for model in options.model:
        path, data = options.folder / f"{model}.onnx", options.folder / f"{model}.calibration.npz"
        for what in options.what:
            cost = costs[model, what, options.samples] = Cost(model, what, options.samples)
            for _ in range(options.runs):
                seconds, cost.megabytes = measured(what, path, data, options.samples)
                plain, cost.floor_megabytes = measured("floor", path, data, options.samples)
                cost.seconds.append(round(seconds, 3))
                cost.floors.append(round(plain, 3))
            print(f"{model} {what}: {cost.ratio:.2f} x the floor", file=sys.stderr)
            keep(options.json, [asdict(cost) for cost in costs.values()])
    text = table(HEADER, [cost.row() for cost in costs.values()])
    print(text)
    if options.write:
        how = "Runs of each in turn with the floor, the same samples in a plain float session; medians of the ratios."
        write("calibration.md", "# Processor time and memory of calibration", how, text)


def write_thresholds(options: argparse.Namespace) -> None:
    rows = known(options.json) or []
    for model in options.model:
        samples = feeds(options.folder / f"{model}.calibration.npz", options.samples)
        rows = [row for row in rows if row[0] != model] + thresholds(options.folder / f"{model}.onnx", samples)
        keep(options.json, rows)
    text = table(("model", "calibrator", "ranges that differ", "at most", "lost, dB"), rows)
    print(text)
    if options.write:
        how = f"{options.samples} samples. Ranges by a part of the values against ranges by all values."
        write("calibration_thresholds.md", "# What counting a part of the values changes", how, text)


def parse() -> argparse.Namespace:
    made = parser(__doc__)
    tasks = made.add_subparsers(dest="task", required=True)
    run, ranges = tasks.add_parser("run"), tasks.add_parser("thresholds")
    for task, page in ((run, "calibration.md"), (ranges, "calibration_thresholds.md")):
        task.add_argument("folder", type=Path, metavar="DIR")
        task.add_argument("--model", nargs="+", choices=MODELS, default=MODELS)
        task.add_argument("--samples", type=int, default=64)
        add_results(task, page, folder=False)
    run.add_argument("--what", nargs="+", choices=(*OURS, *PEERS, ASLEEP), default=(*OURS, *PEERS))
    run.add_argument("--runs", type=int, default=3)
    single = tasks.add_parser("one")
    single.add_argument("what")
    single.add_argument("model", type=Path)
    single.add_argument("data", type=Path)
    single.add_argument("samples", type=int)
    return made.parse_args()


if __name__ == "__main__":
    main()
