"""What FFNs of ordinary networks lose when part of their channels goes: calibration error, held-out error, task figure.

    python benchmarks/approximate_ffn.py [TASK …] [--dir DIR] [--share S …] [--only METHOD …] [--errors-only]
                                         [--json FILE] [--write]

All methods remove the same channels, in the order that ``approximate-ffn`` removes them, at the same share in every
FFN: plain pruning (the mean goes into the bias), a slope for each channel by itself, least squares on what is kept, and
that together with a dense branch on the input: once with the same channels, once with as many fewer as the branch costs
multiplications. ``pass`` is the pass itself, with shares of its own for every FFN. Errors are those of the FFNs' own
outputs on the original activations, the mean of their decibels; ``output`` compares the model's outputs.

Results are added to the JSON file, so that a run may measure some rows only; the table shows all of them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from accuracy import SUBJECTS, calibration, evaluate
from harness import add_results, keep, known, parser, table, write
from open_set import in_environment
from slopes import slopes
from smoothing import decibels, held_out

TASKS = {"minilm": "recall_at_1", "imgfocus": "iou", "smol": "perplexity"}
METHODS = ("plain", "slopes", "least squares", "joint", "joint, equal MACs", "pass")
SENTENCES, DEFINED = 200, 1200  # texts for MiniLM: sentences, nouns with their definitions; 33 k tokens
HEADER = ("task", "MACs", "method", "calibration dB", "held-out dB", "output dB", "figure")


def samples(folder: Path, task: str) -> Path:
    """Calibration data; for MiniLM more than other passes need, in batches of equal length, without padding."""
    if task != "minilm":
        return calibration(folder, task)
    place = folder / "calibration_ffn" / task
    if not place.is_dir():
        import subprocess

        subprocess.run([sys.executable, __file__, "--record", task, "--dir", str(folder)], check=True)
    return place


def record(folder: Path, task: str) -> None:
    in_environment(folder)
    from tasks.base import OpenSet
    from tasks.text import PAIRS, definitions, sentences, tokenized

    open_set = OpenSet(folder.resolve())
    corpus, rng = sentences(open_set), np.random.default_rng(7)
    texts = [corpus[i] for i in rng.choice(len(corpus), SENTENCES, replace=False)]
    texts += [side for pair in definitions(open_set)[PAIRS : PAIRS + DEFINED] for side in pair]
    feed = tokenized(open_set, texts)
    lengths = feed["attention_mask"].sum(axis=1)
    place = folder / "calibration_ffn" / task
    place.mkdir(parents=True)
    number = 0
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        for batch in np.split(rows, range(32, len(rows), 32)):
            arrays = {name: values[batch, :length] for name, values in feed.items()}
            np.savez(place / f"{number:04}.npz", **arrays)  # pyright: ignore[reportArgumentType]
            number += 1


@dataclass
class Bench:
    """The FFNs of one model with their moments on calibration and on held-out data, and the order of their channels."""

    folder: Path
    task: str

    def __post_init__(self) -> None:
        self.model = self.folder / "open" / SUBJECTS[self.task].model
        self.load()

    @cached_property
    def seen(self) -> list[Any]:
        return self.moments(samples(self.folder, self.task))

    @cached_property
    def unseen(self) -> list[Any]:
        return self.moments(held_out(self.folder, self.task))

    @cached_property
    def orders(self) -> list[np.ndarray]:
        from channelfold.passes.numeric.least_squares import order

        found = []
        for ffn, moments in zip(self.ffns, self.seen, strict=True):
            matrix, first = ffn.matrix(), ffn.inputs
            covariance, units = moments.covariance[first:, first:], np.arange(ffn.hidden)[:, None]
            found.append(order(covariance, matrix.T @ matrix, units, self.ridge(ffn, moments)).order)
        return found

    def load(self) -> None:
        """The graph as it was, to be cut again."""
        from channelfold.passes.base import Outcome
        from channelfold.passes.ffn.blocks import find_ffns
        from channelfold.runtime.data.sources import open_data
        from channelfold.runtime.io import files
        from channelfold.runtime.io.facts import required_inputs
        from channelfold.runtime.io.shapes import measured_shapes

        self.graph = files.load(self.model)
        files.infer_shapes(self.graph)
        data = open_data(calibration(self.folder, self.task), required_inputs(self.graph))
        self.shapes = measured_shapes(self.graph, next(iter(data)))
        self.ffns = find_ffns(self.graph, self.shapes, Outcome())

    def moments(self, source: Path) -> list[Any]:
        from channelfold.runtime.data.sources import open_data
        from channelfold.runtime.io.facts import required_inputs
        from channelfold.runtime.stats.covariance import Moments, collect

        data = open_data(source, required_inputs(self.graph))
        axes = [{f.ups[0].data.name: f.ups[0].in_axis, f.down.data.name: f.down.in_axis} for f in self.ffns]
        wanted = [(Moments(a), f.inputs + f.hidden) for a, f in zip(axes, self.ffns, strict=True)]
        return [moments for group in collect(self.graph, wanted, data) for moments in group]

    def ridge(self, ffn: Any, moments: Any) -> float:
        from channelfold.passes.ffn.approximate import RIDGE

        return RIDGE * (ffn.inputs + ffn.hidden) / moments.count

    def plans(self, method: str, share: float) -> list[Any]:
        """What stands in for the removed channels of every FFN."""
        from channelfold.passes.ffn.approximate import stand_in

        made = []
        for ffn, moments, order in zip(self.ffns, self.seen, self.orders, strict=True):
            whole, ridge = ffn.macs(ffn.hidden), self.ridge(ffn, moments)
            kept = round(share * ffn.hidden)
            if method == "joint, equal MACs":
                kept = max(8, round((share * whole - ffn.macs(0, True)) / whole * ffn.hidden))
            gone = order[: ffn.hidden - kept]
            plan = stand_in(moments, ffn.matrix(), gone, method.startswith("joint"), ridge)
            made.append(simpler(ffn, moments, gone, plan, method))
        return made

    def errors(self, plans: Sequence[Any]) -> tuple[float, float]:
        """(calibration, held-out): the mean over FFNs of the decibels of their outputs."""
        found = []
        for ffn, plan, seen, unseen in zip(self.ffns, plans, self.seen, self.unseen, strict=True):
            weight = np.concatenate([np.zeros((ffn.outputs, ffn.inputs)), ffn.matrix()], axis=1)
            left = weight.copy()
            left[:, ffn.inputs + plan.kept] -= plan.matrix
            if plan.dense is not None:
                left[:, : ffn.inputs] -= plan.dense
            found.append([_decibels(left, weight, moments, plan.offset) for moments in (seen, unseen)])
        calibrated, other = np.mean(found, axis=0)
        return float(calibrated), float(other)

    def cut(self, plans: Sequence[Any], output: Path) -> None:
        from channelfold.runtime.io import files

        self.load()
        for ffn, plan in zip(self.ffns, plans, strict=True):
            ffn.cut(plan.kept, plan.matrix, plan.offset, plan.dense, self.shapes)
        files.save(self.graph, output)
        self.load()

    def passed(self, share: float, output: Path) -> None:
        from channelfold.passes.base import Context
        from channelfold.passes.ffn import ApproximateFfn
        from channelfold.runtime.data.sources import open_data
        from channelfold.runtime.io import files
        from channelfold.runtime.io.facts import required_inputs

        self.load()
        data = open_data(samples(self.folder, self.task), required_inputs(self.graph))
        outcome = ApproximateFfn(keep_macs=share).apply(self.graph, Context(data))
        print(json.dumps(outcome.facts), file=sys.stderr)
        files.save(self.graph, output)
        self.load()


def simpler(ffn: Any, moments: Any, gone: np.ndarray, plan: Any, method: str) -> Any:
    """The plan of a method without reconstruction, for the same channels; any other plan as it is."""
    if method not in ("plain", "slopes") or (method == "slopes" and len(ffn.ups) > 1):
        return plan
    matrix, first, mean = ffn.matrix(), ffn.inputs, moments.mean
    offset, dense = matrix[:, gone] @ mean[first + gone], None
    if method == "slopes":
        up = ffn.ups[0].weight().reshape(ffn.hidden, first).astype(np.float64)
        dense = matrix[:, gone] @ slopes(moments.covariance, np.arange(first), up[gone], first + gone)
        offset = offset - dense @ mean[:first]
    return replace(plan, matrix=matrix[:, plan.kept], offset=offset, dense=dense)


def _decibels(left: np.ndarray, weight: np.ndarray, moments: Any, offset: np.ndarray) -> float:
    from channelfold.passes.numeric.least_squares import energy

    shift = left @ moments.mean - offset
    return float(10 * np.log10(energy(moments.covariance, weight) / (energy(moments.covariance, left) + shift @ shift)))


def measure(bench: Bench, method: str, share: float, scratch: Path, errors_only: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"task": bench.task, "share": share, "method": method}
    output = scratch / "cut.onnx"
    if method != "pass":
        plans = bench.plans(method, share)
        row["calibration"], row["held_out"] = bench.errors(plans)
        if errors_only or method == "joint":
            return row
        bench.cut(plans, output)
    elif errors_only:
        return row
    else:
        bench.passed(share, output)
    row["output"] = decibels(bench.model, output, held_out(bench.folder, bench.task))
    row["figure"] = evaluate(bench.folder, bench.task, output)[TASKS[bench.task]]
    return row


def text(rows: Sequence[dict[str, Any]]) -> str:
    def cells(row: dict[str, Any]) -> tuple[str, ...]:
        numbers = (row.get(key) for key in ("calibration", "held_out", "output"))
        figure = f"{row['figure']:.4f}" if "figure" in row else "-"
        share = f"{row['share']:.0%}"
        return row["task"], share, row["method"], *("-" if n is None else f"{n:.1f}" for n in numbers), figure

    rank = {name: i for i, name in enumerate(("float", *METHODS))}
    return table(HEADER, map(cells, sorted(rows, key=lambda r: (r["task"], -r["share"], rank[r["method"]]))))


def main() -> None:
    options = parse()
    if options.record:
        record(options.dir, options.record)
        return
    rows = {(r["task"], r["share"], r["method"]): r for r in known(options.json)}
    for task in options.tasks or TASKS:
        bench = Bench(options.dir, task)
        if not options.errors_only and (task, 1.0, "float") not in rows:
            rows[task, 1.0, "float"] = {"task": task, "share": 1.0, "method": "float"} | {
                "figure": evaluate(options.dir, task)[TASKS[task]]
            }
        with tempfile.TemporaryDirectory() as scratch:
            for share in options.share:
                for method in options.only or METHODS:
                    new = measure(bench, method, share, Path(scratch), options.errors_only)
                    rows[task, share, method] = rows.get((task, share, method), {}) | new
                    print(json.dumps(new), file=sys.stderr)
                    keep(options.json, list(rows.values()))
    found = text(list(rows.values()))
    print(found)
    if options.write:
        write("approximate_ffn.md", "# FFNs of ordinary networks with fewer channels", found)


def parse() -> argparse.Namespace:
    made = parser(__doc__, tasks={"nargs": "*", "metavar": "TASK", "choices": [*TASKS, []]})
    made.add_argument("--share", type=float, nargs="+", default=[0.75, 0.5], help="of the multiplications that stay")
    made.add_argument("--only", nargs="+", choices=METHODS, metavar="METHOD")
    made.add_argument("--errors-only", action="store_true", help="no models, no tasks")
    made.add_argument("--record", choices=["minilm"], help=argparse.SUPPRESS)
    add_results(made, "approximate_ffn.md")
    return made.parse_args()


if __name__ == "__main__":
    main()
