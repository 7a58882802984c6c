"""The open set quantized to INT8 by other tools and by channelfold: same model, same calibration data, one machine.

    python benchmarks/peers.py --python PEERS/bin/python [TASK …] [--tools TOOL …] [--dir DIR] [--json FILE] [--write]
    python benchmarks/peers.py --python PEERS/bin/python --cost MODEL CALIBRATION

Other tools need an environment of their own, in which ``peer_tools`` runs:

    python -m venv PEERS
    PEERS/bin/pip install torch --index-url https://download.pytorch.org/whl/cpu
    PEERS/bin/pip install onnxruntime nncf amd-quark
    PEERS/bin/pip install --no-deps nvidia-modelopt lief onnx_graphsurgeon onnxconverter-common polygraphy omegaconf \\
        antlr4-python3-runtime PuLP cppimport Mako pybind11 nvidia-ml-py regex

(ModelOpt without its own dependencies, which bring a build of ONNX Runtime for GPUs and CuPy.) A figure of accuracy is
that of the task, and the SNR of the first output, in exact arithmetic. Cost is the processor time (user and system) and
the peak memory of the whole process. With --cost one model is quantized by ONNX Runtime and channelfold, cost alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accuracy import SUBJECTS, calibration, evaluate
from harness import HERE, add_results, channelfold, keep, known, parser, table, write

from channelfold.runtime import jobs

OURS = "channelfold"
TOOLS = (OURS, "onnxruntime", "nncf", "modelopt", "quark")
TASKS = ("crepe_tiny", "minilm", "effnet")
COSTS = (OURS, "onnxruntime", "onnxruntime_percentile")
LIMIT = 900  # seconds of a tool on a model


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
    if tool == OURS:
        return child([*channelfold("compress", model, "-o", out.with_suffix(""), "--recipe", "int8"),
                      "--calibration", data])  # fmt: skip
    return child([python, HERE / "peer_tools.py", tool, model, data, out])


def measured(python: Path, folder: Path, task: str, tool: str, scratch: Path) -> dict[str, Any]:
    """The row of a tool on the model of a task."""
    subject, data = SUBJECTS[task], calibration(folder, task)
    model, out = folder / "open" / subject.model, scratch / f"{task}_{tool}.onnx"
    cost = quantized(python, tool, model, data, out)
    out = out.with_suffix("") / "model.onnx" if tool == OURS else out
    row: dict[str, Any] = {"task": task, "tool": tool, **asdict(cost)}
    if cost.failed:
        return row
    metric = subject.goals[0].metric
    row |= {"metric": metric, "bytes": out.stat().st_size}
    try:
        accuracy = jobs.diff(model, out, source=jobs.Source(evaluation=str(data)))["accuracy"]
        row["snr"] = (accuracy.get("exact") or accuracy)["outputs"][0]["snr"]
        row["figure"] = evaluate(folder, task, out)[metric]
    except (Exception, SystemExit) as error:  # a file that does not run is a row of the table
        row["failed"] = str(error).splitlines()[-1][:120]
    return row


def report(rows: dict[str, dict[str, Any]]) -> str:
    cells = []
    for row in rows.values():
        snr, figure = row.get("snr"), row.get("figure")
        cells.append((
            row["task"], row["tool"], "" if figure is None else f"{figure:.4f}",
            f"{snr:.1f}" if isinstance(snr, float) else "", f"{row.get('bytes', 0) / 1e6:.1f}",
            f"{row['seconds']:.1f}", f"{row['megabytes']:.0f}", row["failed"],
        ))  # fmt: skip
    return table(("task", "tool", "figure", "SNR dB", "MB", "CPU s", "peak MB", "why not"), cells)


def costs(python: Path, model: Path, data: Path) -> str:
    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        for tool in COSTS:
            rows[tool] = quantized(python, tool, model, data, Path(scratch, f"{tool}.onnx"))
    own = rows[OURS]
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
    made.add_argument("--cost", nargs=2, type=Path, metavar=("MODEL", "CALIBRATION"))
    add_results(made, "peers.md")
    options = made.parse_args()
    rows = known(options.json)
    if options.cost:
        rows["cost"] = costs(options.python, *options.cost)
        keep(options.json, rows)
    with tempfile.TemporaryDirectory() as scratch:
        for task in () if options.cost else options.tasks:
            for tool in options.tools:
                if f"{task} {tool}" not in rows:
                    rows[f"{task} {tool}"] = measured(options.python, options.dir, task, tool, Path(scratch))
                    keep(options.json, rows)
                    print(f"{task} {tool} done", file=sys.stderr)
    parts = [
        report({name: row for name, row in rows.items() if name != "cost"}),
        *([rows["cost"]] if "cost" in rows else []),
    ]
    print(*parts, sep="\n\n")
    if options.write:
        write("peers.md", "# The open set in INT8 by other tools", *parts)


if __name__ == "__main__":
    main()
