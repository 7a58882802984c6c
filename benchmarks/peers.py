"""The open set quantized to INT8 by other tools and by channelfold: same model, same calibration data, one machine.

    python benchmarks/peers.py --python PEERS/bin/python [TASK …] [--tools TOOL …] [--figures TASK …] [--dir DIR]
                               [--json FILE] [--write]
    python benchmarks/peers.py --python PEERS/bin/python --cost MODEL CALIBRATION [--json FILE] [--write]

Other tools need an environment of their own, in which ``peer_tools`` runs:

    python -m venv PEERS
    PEERS/bin/pip install torch --index-url https://download.pytorch.org/whl/cpu
    PEERS/bin/pip install onnxruntime nncf amd-quark
    PEERS/bin/pip install --no-deps nvidia-modelopt lief onnx_graphsurgeon onnxconverter-common polygraphy omegaconf \\
        antlr4-python3-runtime PuLP cppimport Mako pybind11 nvidia-ml-py regex

    python -m venv AIMET
    AIMET/bin/pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu
    AIMET/bin/pip install aimet_onnx

AIMET is run with --python AIMET/bin/python --tools aimet, and the --json of the others. ModelOpt comes without its own
dependencies, which bring a build of ONNX Runtime for GPUs and CuPy. All tools calibrate on every second sample of the
task's calibration data, 64 at most. Outputs are compared on the samples between these, in exact arithmetic. Every tool
reads a copy of the model. Cost is the processor time (user and system) and the peak memory of the whole process;
``compress`` also compares its result with the original there. With --cost one model is quantized by ONNX Runtime and
channelfold, cost alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accuracy import SUBJECTS, calibration, evaluate
from harness import HERE, add_results, channelfold, keep, known, parser, table, write

from channelfold.runtime import jobs

OURS = {
    "channelfold quantize": ("quantize",),
    "channelfold quantize minmax": ("quantize", "--calibrator", "minmax"),
    "channelfold quantize percentile": ("quantize", "--calibrator", "percentile"),
    "channelfold quantize measured": ("quantize", "--calibrator", "measured"),
    "channelfold quantize gptq": ("quantize", "--gptq"),
    "channelfold int8": ("compress", "--recipe", "int8"),
    "channelfold int8-smooth": ("compress", "--recipe", "int8-smooth"),
}
TOOLS = (
    "channelfold quantize", "channelfold int8", "channelfold int8-smooth",
    "onnxruntime", "onnxruntime_entropy", "onnxruntime_products", "nncf", "modelopt", "quark", "aimet",
)  # fmt: skip
TASKS = ("crepe_tiny", "minilm", "effnet")
TRANSFORMERS = {"minilm": ("channelfold int8-smooth", "onnxruntime_products")}  # tools for transformers alone
COSTS = (
    "channelfold quantize", "channelfold quantize minmax", "channelfold quantize percentile", "onnxruntime",
    "onnxruntime_percentile",
)  # fmt: skip
LIMIT = 900  # seconds of a tool on a model
SAMPLES = 64  # to calibrate on, at most, and as many to compare on


@dataclass(frozen=True)
class Cost:
    seconds: float
    megabytes: float
    failed: str = ""


def child(command: Sequence[str | Path]) -> Cost:
    """Processor time and peak memory of a command, and its last line where it fails."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(["timeout", str(LIMIT), *map(str, command)], stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        lines = [line.strip() for line in log if line.strip()]
    failed = (lines[-1] if lines else f"exit code {process.returncode}")[:120] if process.returncode else ""
    return Cost(round(usage.ru_utime + usage.ru_stime, 1), round(usage.ru_maxrss / 1e3), failed)


def quantized(python: Path, tool: str, model: Path, data: Path, out: Path) -> Cost:
    """Quantizes a copy of a model, by the rules of TensorRT where the tool has several."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = shutil.copy(model, scratch)
        if tool not in OURS:
            return child([python, HERE / "peer_tools.py", tool, copy, data, out])
        command, *flags = OURS[tool]
        result = Path(scratch, "result") if command == "compress" else out
        cost = child([*channelfold(command, copy, "-o", result, *flags), "--calibration", data])
        if result != out and not cost.failed:
            shutil.copy(result / "model.onnx", out)
        return cost


def halves(data: Path, scratch: Path) -> tuple[Path, Path]:
    """The samples to calibrate on, and those between, to compare on. A folder holds a file for each batch."""
    parts = scratch / "calibration", scratch / "evaluation"
    for start, part in enumerate(parts):
        if data.is_dir():
            part.mkdir()
            for file in sorted(data.glob("*.npz"))[start : 2 * SAMPLES : 2]:
                shutil.copy(file, part)
        else:
            np.savez(part, **{name: values[start : 2 * SAMPLES : 2] for name, values in np.load(data).items()})
    return parts if data.is_dir() else (parts[0].with_suffix(".npz"), parts[1].with_suffix(".npz"))


def measured(python: Path, folder: Path, task: str, tool: str, figures: Sequence[str]) -> dict[str, Any]:
    """The row of a tool on the model of a task."""
    subject, data = SUBJECTS[task], calibration(folder, task)
    model = folder / "open" / subject.model
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        seen, unseen = halves(data, scratch)
        out = scratch / "out.onnx"
        cost = quantized(python, tool, model, seen, out)
        row: dict[str, Any] = {"task": task, "tool": tool, **asdict(cost)}
        if cost.failed:
            return row
        row["bytes"] = sum(file.stat().st_size for file in scratch.glob("out.onnx*"))
        try:
            accuracy = jobs.diff(model, out, source=jobs.Source(evaluation=str(unseen)))["accuracy"]
            row["outputs"] = (accuracy.get("exact") or accuracy)["outputs"]
            if task in figures:
                row["figure"] = evaluate(folder, task, out)[subject.goals[0].metric]
        except (Exception, SystemExit) as error:  # a file that does not run is a row of the table
            row["failed"] = str(error).splitlines()[-1][:120]
    return row


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = []
    for row in rows:
        outputs, figure = row.get("outputs", ()), row.get("figure")
        cells.append((
            row["task"], row["tool"], " / ".join(f"{float(output['snr']):.1f}" for output in outputs),
            " / ".join(f"{output['agreement']:.3f}" for output in outputs if output["agreement"] is not None),
            "" if figure is None else f"{figure:.4f}",
            f"{row.get('bytes', 0) / 1e6:.1f}", f"{row['seconds']:.1f}", f"{row['megabytes']:.0f}", row["failed"],
        ))  # fmt: skip
    header = ("task", "tool", "SNR dB", "agreement", "task figure", "MB", "CPU s", "peak MB", "why not")
    return table(header, cells)


def costs(python: Path, model: Path, data: Path) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        rows = {tool: quantized(python, tool, model, data, Path(scratch, f"{tool}.onnx")) for tool in COSTS}
    own = rows[COSTS[0]]
    cells = [
        (tool, f"{one.seconds:.1f}", f"{one.megabytes:.0f}", f"{one.seconds / own.seconds:.1f}",
         f"{one.megabytes / own.megabytes:.1f}", one.failed)
        for tool, one in rows.items()
    ]  # fmt: skip
    return table((model.stem, "CPU s", "peak MB", "time / ours", "memory / ours", "why not"), cells)


def main() -> None:
    made = parser(__doc__, tasks={"nargs": "*", "metavar": "TASK", "default": TASKS})
    made.add_argument("--python", type=Path, required=True, help="the interpreter of the other tools")
    made.add_argument("--tools", nargs="*", default=TOOLS, metavar="TOOL")
    made.add_argument("--figures", nargs="*", default=TASKS, metavar="TASK", help="the tasks to evaluate (minutes)")
    made.add_argument("--cost", nargs=2, type=Path, metavar=("MODEL", "CALIBRATION"))
    add_results(made, "peers.md")
    options = made.parse_args()
    rows = known(options.json)
    if options.cost:
        rows["cost"] = costs(options.python, *options.cost)
        keep(options.json, rows)
    for task in () if options.cost else options.tasks:
        for tool in options.tools:
            fits = tool in TRANSFORMERS.get(task, ()) or tool not in sum(TRANSFORMERS.values(), ())
            if fits and f"{task} {tool}" not in rows:
                rows[f"{task} {tool}"] = measured(options.python, options.dir, task, tool, options.figures)
                keep(options.json, rows)
                print(f"{task} {tool} done", file=sys.stderr)
    parts = [
        report([rows[name] for task in TASKS for tool in TOOLS if (name := f"{task} {tool}") in rows]),
        *([rows["cost"]] if "cost" in rows else []),
    ]
    print(*parts, sep="\n\n")
    if options.write:
        write("peers.md", "# The open set in INT8 by other tools", *parts)


if __name__ == "__main__":
    main()
