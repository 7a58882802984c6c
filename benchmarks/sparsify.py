"""What sparse weights cost: task figures of open-set models after ``channelfold sparsify``, without retraining.

    python benchmarks/sparsify.py [TASK …] [--dir DIR] [--json FILE] [--write]

Calibrates on DIR/calibration; the tasks run on data that calibration never touches. Rows that FILE has already are not
measured again, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from accuracy import SUBJECTS, calibration, evaluate
from harness import add_results, channelfold, keep, known, parser, run, table, write

FIGURES = {"minilm": ("recall_at_1", "spam_probe"), "crepe_full": ("pitch_accuracy_25_cents", "median_cents")}
MAIN = "2:4"  # the ways on which tasks are run; the others are compared by their outputs, on minilm
DATA = "--calibration"  # stands for the option and the task's data
WAYS: dict[str, tuple[str, ...]] = {
    "2:4 magnitude, no data": (),
    "2:4 magnitude, biases corrected": (DATA, "--scores", "magnitude"),
    "2:4 wanda, biases as they were": (DATA, "--no-correct-bias"),
    "2:4 wanda": (DATA,),
    "4:8 wanda": (DATA, "--pattern", "4:8"),
    "unstructured 50 %, uniform": (DATA, "--pattern", "unstructured"),
    "unstructured 50 %, ecoflap": (DATA, "--pattern", "unstructured", "--ratios", "ecoflap"),
    "blocks 20 %, uniform": (DATA, "--pattern", "block", "--sparsity", "0.2", "--ratios", "uniform"),
    "blocks 20 %, equal slope": (DATA, "--pattern", "block", "--sparsity", "0.2"),
}


def measure(folder: Path, task: str, way: str) -> dict[str, Any]:
    """The figures of a task on the sparse model, with what the pass says of it."""
    data = calibration(folder, task)
    options = [part for option in WAYS[way] for part in ((option, data) if option == DATA else (option,))]
    model = folder / "open" / SUBJECTS[task].model
    with tempfile.TemporaryDirectory() as scratch:
        sparse = Path(scratch) / "sparse.onnx"
        command = channelfold("sparsify", model, "-o", sparse, "--evaluation", data, "--json", *options)
        report = json.loads(run(command))
        (step,) = report["steps"]
        facts = {key: step["facts"][key] for key in ("sparsity", "weights", "deflated_bytes")}
        facts["snr_db"] = report["accuracy"]["outputs"][0]["snr"]
        return {**(evaluate(folder, task, sparse) if way.startswith(MAIN) else {}), **facts}


def row(task: str, way: str, found: dict[str, Any]) -> tuple[str, ...]:
    figures = ", ".join(f"{found[figure]:.3f}" for figure in FIGURES[task] if figure in found)
    if "sparsity" not in found:
        return task, way, "", "", "", figures
    dense, sparse = (size / 1e6 for size in found["deflated_bytes"])
    return (
        task,
        way,
        f"{found['sparsity']:.1%} of {found['weights'] / 1e6:.1f} M",
        f"{dense:.1f} -> {sparse:.1f} MB",
        f"{found['snr_db']:.1f}",
        figures,
    )


def main() -> None:
    made = parser(__doc__, tasks={"nargs": "*", "metavar": "TASK", "choices": [*FIGURES, []]})
    add_results(made, "sparsify.md")
    options = made.parse_args()
    measured = known(options.json)
    rows = []
    for task in options.tasks or FIGURES:
        for way in ("float", *(way for way in WAYS if task == "minilm" or way.startswith(MAIN))):
            key = f"{task}: {way}"
            if key not in measured:
                measured[key] = evaluate(options.dir, task) if way == "float" else measure(options.dir, task, way)
                keep(options.json, measured)
            rows.append(row(task, way, measured[key]))
            print(" | ".join(rows[-1]), file=sys.stderr)
    figures = "; ".join(f"{task}: {', '.join(FIGURES[task])}" for task in options.tasks or FIGURES)
    text = table(("task", "pattern", "zeros", "compressed", "SNR dB", "figures"), rows)
    print(text)
    if options.write:
        note = (
            f"Figures: {figures}. SNR: of the first output, on the calibration data. `compressed`: what zlib makes of "
            "the layers that lost weights. Nothing was retrained, and nothing runs faster in ONNX Runtime; "
            "TensorRT-RTX 1.7 builds the same plan with and without its flag for sparse weights."
        )
        write("sparsify.md", "# Sparse weights without retraining", text, note)


if __name__ == "__main__":
    main()
