"""What ``channelfold compress --recipe int8`` costs the models of the open set, in the figures of their own tasks.

    python benchmarks/accuracy.py [TASK …] [--dir DIR] [--keep FOLDER] [--json FILE] [--write]
    python benchmarks/accuracy.py --fold-only [TASK …] [--dir DIR] [--json FILE] [--write]

The first calibrates on DIR/calibration and evaluates both models on data the calibration never touches. The second
measures what folding alone changes in the outputs, beside what ONNX Runtime's own optimizations change in the original:
1e-5 of an output's largest value is allowed. Exit code 1 when a bound is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from harness import HERE, add_results, channelfold, keep, parser, run, table, write

FOLD_BOUND = 1e-5


@dataclass(frozen=True)
class Goal:
    """A figure of a task and the worst it may be: an absolute value, or a loss against the float model."""

    metric: str
    at_least: float | None = None
    at_most: float | None = None
    loss: float | None = None
    lower_is_better: bool = False

    def lost(self, float_value: float, value: float) -> float:
        return value - float_value if self.lower_is_better else float_value - value

    def met(self, float_value: float, value: float) -> bool:
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            # Figures are rounded to four digits, and so is their difference.
            and (self.loss is None or round(self.lost(float_value, value), 4) <= self.loss)
        )

    def __str__(self) -> str:
        if self.at_least is not None:
            return f">= {self.at_least}"
        if self.at_most is not None:
            return f"<= {self.at_most}"
        return f"loss <= {self.loss}" if self.loss is not None else "-"


@dataclass(frozen=True)
class Subject:
    """A model, the flags it needs beside the recipe, and what is expected of it."""

    model: str
    goals: tuple[Goal, ...]
    flags: tuple[str, ...] = ()


SUBJECTS = {
    "crepe_tiny": Subject("crepe_tiny.onnx", (Goal("pitch_accuracy_50_cents", loss=0.01),)),
    "crepe_full": Subject("crepe_full.onnx", (Goal("pitch_accuracy_50_cents", loss=0.01),)),
    "effnet": Subject("effnet_lite0.bn.onnx", (Goal("top1_agreement", at_least=0.85), Goal("digits_probe", loss=0.01))),
    "imgfocus": Subject("vit_s_focus.onnx", (Goal("iou", loss=0.01), Goal("pointing", loss=0.01))),
    "minilm": Subject("minilm.onnx", (Goal("recall_at_1", at_least=0.46), Goal("spam_probe", loss=0.01))),
    "smol": Subject("smollm2.onnx", (Goal("perplexity", lower_is_better=True),)),
    "ocr_rec": Subject("ocr_rec.onnx", (Goal("characters", at_least=0.988),)),
    "plcmos": Subject("plcmos.onnx", (Goal("spearman", at_most=-0.965, lower_is_better=True),)),
    "magika": Subject("magika.onnx", (Goal("accuracy", loss=0.01),)),
}


@dataclass(frozen=True)
class Result:
    """One line of the report; ``loss`` is positive when compression made it worse."""

    task: str
    metric: str
    before: float
    after: float
    loss: float
    bound: str
    met: bool

    def row(self) -> tuple[str, ...]:
        figures = (f"{value:.4f}" for value in (self.before, self.after, self.loss))
        return self.task, self.metric, *figures, self.bound, "yes" if self.met else "**no**"


def evaluate(folder: Path, task: str, model: Path | None = None) -> dict[str, Any]:
    arguments = [sys.executable, str(HERE / "open_set.py"), "--dir", str(folder), "task", task]
    return json.loads(run([*arguments, *([str(model)] if model else [])]))


def calibration(folder: Path, task: str) -> Path:
    """The task's calibration data, made when it is not there."""
    data = folder / "calibration"
    if not (data / f"{task}.npz").exists() and not (data / task).is_dir():
        run([sys.executable, str(HERE / "open_set.py"), "--dir", str(folder), "calibrate", task])
    return data / task if (data / task).is_dir() else data / f"{task}.npz"


def compressed(folder: Path, task: str, output: Path) -> Path:
    """The model that the int8 recipe leaves in ``output``."""
    subject, data = SUBJECTS[task], calibration(folder, task)
    model = folder / "open" / subject.model
    run(channelfold("compress", model, "-o", output, "--recipe", "int8", "--calibration", data, *subject.flags))
    return output / "model.onnx"


def int8_results(folder: Path, task: str, output: Path) -> list[Result]:
    after = evaluate(folder, task, compressed(folder, task, output))
    before = evaluate(folder, task)
    return [compare(task, goal, before, after) for goal in SUBJECTS[task].goals]


def compare(task: str, goal: Goal, before: Mapping[str, float], after: Mapping[str, float]) -> Result:
    a, b = before[goal.metric], after[goal.metric]
    return Result(task, goal.metric, a, b, round(goal.lost(a, b), 4), str(goal), goal.met(a, b))


def fold_results(folder: Path, task: str, output: Path) -> list[Result]:
    """The largest difference of each output over the calibration samples, relative to its largest value.

    ``before`` is that of the original run without ONNX Runtime's optimizations: rounding in another order, no more.
    """
    from channelfold.runtime.data.sources import open_data
    from channelfold.runtime.io.session import Session

    model, folded = folder / "open" / SUBJECTS[task].model, output / "folded.onnx"
    output.mkdir(parents=True, exist_ok=True)
    run(channelfold("fold", model, "-o", folded))
    original, plain, changed = Session(model), Session(model, optimize=False), Session(folded)
    names = [spec.name for spec in original.outputs]
    extremes = []
    for feed in open_data(calibration(folder, task), original.inputs):
        a, b, c = original.run(feed), plain.run(feed), changed.run(feed)
        extremes.append([(np.abs(a[n]).max(), np.abs(a[n] - b[n]).max(), np.abs(a[n] - c[n]).max()) for n in names])
    largest, rounding, folding = np.max(extremes, axis=0).T.astype(float)
    figures = zip(names, (rounding / largest).tolist(), (folding / largest).tolist(), strict=True)
    return [_fold_result(task, name, own, error) for name, own, error in figures]


def _fold_result(task: str, output: str, own: float, error: float) -> Result:
    return Result(task, output, own, error, error, f"<= {FOLD_BOUND:.1e}", error <= FOLD_BOUND)


def main() -> None:
    options = parse()
    measure = fold_results if options.fold_only else int8_results
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as scratch:
        for task in options.tasks or SUBJECTS:
            results += measure(options.dir, task, (options.keep or Path(scratch)) / task)
            print(f"{task} done", file=sys.stderr)
    if options.fold_only:
        header = ("task", "output", "folding", "ONNX Runtime's own", "bound", "met")
        rows = [(r.task, r.metric, f"{r.after:.1e}", f"{r.before:.1e}", *r.row()[-2:]) for r in results]
        name, title = "fold.md", "# What folding changes: max |a - b| / max |a| over all calibration samples"
    else:
        header = ("task", "figure", "float", "int8", "loss", "bound", "met")
        rows = [result.row() for result in results]
        name, title = "accuracy.md", "# Accuracy of the open set after `compress --recipe int8`"
    text = table(header, rows)
    print(text)
    keep(options.json, [asdict(result) for result in results])
    if options.write:
        write(name, title, text)
    sys.exit(not all(result.met for result in results))


def parse() -> argparse.Namespace:
    made = parser(__doc__, tasks={"nargs": "*", "metavar": "TASK", "choices": [*SUBJECTS, []]})
    made.add_argument("--fold-only", action="store_true")
    made.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the compressed models there")
    add_results(made, "*.md")
    return made.parse_args()


if __name__ == "__main__":
    main()
