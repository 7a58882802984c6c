"""What 8 and 4 bits of weights cost the transformers of the open set, by format and rounder.

    python benchmarks/weights.py [TASK …] [--dir DIR] [--json FILE] [--write]

Only weights are quantized (embeddings too). The error is that of the outputs on calibration data; the figure of the
task is taken on data that the calibration never touches. ``size`` is that of the file against the float file.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from accuracy import SUBJECTS, calibration, evaluate
from harness import add_results, channelfold, keep, known, parser, run, table, write

TASKS = ("minilm", "smol")
SETTINGS = {
    "int8": (),
    "fp8": ("--weights", "fp8"),
    "int4 g128 nearest": ("--weights", "int4", "--rounder", "nearest"),
    "int4 g128 search": ("--weights", "int4"),
    "int4 g128 gptq": ("--weights", "int4", "--rounder", "gptq"),
    "int4 g128 gptq, corrected": ("--weights", "int4", "--rounder", "gptq", "--correct-inputs"),
    "int4 g32 search": ("--weights", "int4", "--group", "32"),
    "int4 g32 gptq": ("--weights", "int4", "--group", "32", "--rounder", "gptq"),
    "dgq g32 gptq, int8": ("--weights", "dgq", "--group", "32", "--rounder", "gptq"),
    "fp8, fp8": ("--weights", "fp8", "--activations", "fp8"),
}


def measure(folder: Path, task: str, flags: tuple[str, ...], output: Path) -> dict[str, float]:
    """SNR of the worst output in dB, size against float, and the figures of the task."""
    model = folder / "open" / SUBJECTS[task].model
    data = ("--calibration", calibration(folder, task), "--weights-only")
    record = json.loads(run(channelfold("quantize", model, "-o", output, *data, *flags, "--json")))
    found = evaluate(folder, task, output)
    figures = {goal.metric: found[goal.metric] for goal in SUBJECTS[task].goals}
    snr = min(entry["snr_db"] for entry in record["accuracy"]["outputs"])
    return {"snr_db": snr, "size": output.stat().st_size / model.stat().st_size} | figures


def main() -> None:
    made = parser(__doc__, tasks={"nargs": "*", "metavar": "TASK", "choices": [*TASKS, []]})
    add_results(made, "weights.md")
    options = made.parse_args()
    rows = known(options.json)
    for task in options.tasks or TASKS:
        float_figures = evaluate(options.dir, task)
        rows.setdefault(f"{task}: float", {g.metric: float_figures[g.metric] for g in SUBJECTS[task].goals})
        for name, flags in SETTINGS.items():
            with tempfile.TemporaryDirectory() as scratch:
                if f"{task}: {name}" not in rows:
                    rows[f"{task}: {name}"] = measure(options.dir, task, flags, Path(scratch, "model.onnx"))
                    keep(options.json, rows)
                    print(f"{task}: {name} done", file=sys.stderr)
    text = table(("model and weights", "SNR dB", "size", "figures of the task"), [row(*item) for item in rows.items()])
    print(text)
    if options.write:
        write("weights.md", "# Weights in 8 and 4 bits", text)


def row(name: str, found: dict[str, float]) -> tuple[str, ...]:
    figures = ", ".join(f"{key} {value:.4f}" for key, value in found.items() if key not in ("snr_db", "size"))
    error = f"{found['snr_db']:.1f}" if "snr_db" in found else ""
    return name, error, f"{found['size']:.3f}" if "size" in found else "", figures


if __name__ == "__main__":
    main()
