"""What the search of ``channelfold compress`` finds on the open set, beside recipes, and what ``--float-share`` keeps.

    python benchmarks/search.py [SUBJECT …] [--part PART …] [--dir DIR] [--json FILE] [--write]

search    a search: what it predicts and measures along the front, the file, the samples that it runs (as passes over 64
          samples), its processor time and peak memory
recipes   the built-in recipes on the samples that steer the search: which of them is off its front, at less cost and a
          smaller error than every point
shares    the SNR of the worst output with 0, 5, 10 and 20 % of the linear nodes in float
ranks     the rank correlation of the scores of nodes with the error of one node at a time on the other samples

Measured on samples that nothing was calibrated on: for EfficientNet-Lite0 the first 40 crops of its accuracy task, else
every third sample of the calibration data, which is then left out of the calibration.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from harness import add_results, channelfold, keep, known, parser, table, write


class Subject(NamedTuple):
    """A model of the open set, its calibration data, the recipe of its search and of its shares, and its limit."""

    file: str
    data: str
    recipe: str = "int8"
    limit: tuple[str, ...] = ("--max-loss", "1%")
    shares: str = "int8"


SUBJECTS = {
    "crepe_tiny": Subject("crepe_tiny.onnx", "crepe_tiny.npz"),
    "effnet": Subject("effnet_lite0.bn.onnx", "effnet.npz"),
    "effnet 28 dB": Subject("effnet_lite0.bn.onnx", "effnet.npz", limit=("--search", "--min-snr", "28")),
    "minilm": Subject("minilm.onnx", "minilm", shares="int8-smooth"),
    "imgfocus": Subject("vit_s_focus.onnx", "imgfocus.npz"),
    "ocr_rec": Subject("ocr_rec.onnx", "ocr_rec"),
    "smollm2": Subject("smollm2.onnx", "smol.npz"),
}
PARTS = ("search", "recipes", "shares", "ranks")
SHARES = (0.0, 0.05, 0.1, 0.2)
RECIPES = ("fp16", "int8", "int8-smooth", "int8-fp16", "int8-weights", "int4")
CROPS = 40
NEAR = 0.005, 0.5  # of the cost, and dB: the bytes of the quantizers of a point are guessed


def samples(source: Path) -> Iterator[dict[str, np.ndarray]]:
    """The samples of a file, or of a folder of files, one by one."""
    for file in sorted(source.iterdir()) if source.is_dir() else [source]:
        with np.load(file) as stored:
            arrays = dict(stored)
        for i in range(len(next(iter(arrays.values())))):
            yield {name: values[i : i + 1] for name, values in arrays.items()}


def split(source: Path, folder: Path, name: str) -> dict[str, Path]:
    """Folders of samples: calibration, evaluation, and those of the evaluation that steer a search."""
    found = list(samples(source))
    parts = {"calibration": [s for i, s in enumerate(found) if i % 3], "evaluation": found[::3]}
    if name.startswith("effnet"):
        from tasks.images import crop, lite_input, random_windows
        from tasks.sources import photos

        views = list(photos().values())
        windows = list(random_windows(views, 200, np.random.default_rng(0)))[:CROPS]
        crops = [{"image": lite_input(crop(views, window)[None])} for window in windows]
        parts = {"calibration": found, "evaluation": crops}
    parts["steering"] = parts["evaluation"][::2]
    for part, feeds in parts.items():
        (folder / part).mkdir()
        for i, feed in enumerate(feeds):
            np.savez(folder / part / f"{i:03}.npz", **feed)  # pyright: ignore[reportArgumentType]
    return {part: folder / part for part in parts}


class Run(NamedTuple):
    """The record of a command, its processor time in seconds, and its peak memory in bytes, without mapped files."""

    record: dict[str, Any]
    cpu: float
    memory: int


def compressed(model: Path, data: Mapping[str, Path], out: Path, *flags: str, measured: str = "evaluation") -> Run:
    command = channelfold("compress", model, "-o", out, "--calibration", data["calibration"])
    with tempfile.TemporaryFile() as printed, tempfile.TemporaryFile() as told:
        process = subprocess.Popen(
            [*command, "--evaluation", data[measured], *flags, "--json"], stdout=printed, stderr=told
        )
        ended, memory = 0, 0
        while not ended:
            memory = max(memory, _anonymous(process.pid))
            time.sleep(0.2)
            ended, status, used = os.wait4(process.pid, os.WNOHANG)
        process.returncode = os.waitstatus_to_exitcode(status)
        printed.seek(0), told.seek(0)
        if process.returncode not in (0, 3):
            sys.exit(told.read().decode()[-2000:])
        return Run(json.loads(printed.read()), used.ru_utime, memory)


def _anonymous(pid: int) -> int:
    """Bytes of a process that lie in no file: statistics and weights lie in files, which the system can drop."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return 1024 * int(found[1]) if found else 0


# ---- what is measured --------------------------------------------------------------------------------------------


def search(subject: Subject, model: Path, data: Mapping[str, Path], folder: Path) -> dict[str, Any]:
    run = compressed(model, data, folder / "search", "--recipe", subject.recipe, *subject.limit)
    record, found = run.record, run.record["search"]
    mixed = [p for p in found["points"] if p["cost"] < 1 and len(p["options"]) > 1 and p["predicted_db"] < 200]
    return {
        "met": found["met"], "what": found["loss"], "runs": found["runs"], "points": found["points"],
        "gaps": [p["error_db"] - p["predicted_db"] for p in mixed], "kappa": found["kappa_db"], "file": found["file"],
        "bytes": record["output"]["bytes"] / record["model"]["bytes"], "cpu": run.cpu,
        "memory": run.memory, "model": record["model"]["bytes"],
    }  # fmt: skip


def recipes(subject: Subject, model: Path, data: Mapping[str, Path], folder: Path) -> dict[str, Any]:
    """The cost of every recipe, as a search counts, and its SNR."""
    from channelfold.passes.search.options import multiplications
    from channelfold.runtime.data.sources import open_data
    from channelfold.runtime.io import files
    from channelfold.runtime.io.facts import required_inputs

    graph, found = files.load(model), {}
    macs = multiplications(graph, next(iter(open_data(data["steering"], required_inputs(graph)))))
    for recipe in RECIPES:
        record, *_ = compressed(model, data, folder / recipe, "--recipe", recipe, measured="steering")
        changed = {s["pass"]: {c["node"] for c in s["changed"]} for s in record["steps"]}
        bits = 0.5 if changed.get("cast") else 1.0
        quantized = changed.get("quantize", set())
        work = sum(count * (0.25 if name in quantized else bits) for name, count in macs.items()) / sum(macs.values())
        cost = (record["output"]["bytes"] / record["model"]["bytes"] + work) / 2
        found[recipe] = {"cost": cost, "snr": snr(model, folder / recipe / "model.onnx", data["steering"], folder)}
    return found


def shares(subject: Subject, model: Path, data: Mapping[str, Path], folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for share in SHARES:
        flags = ("--recipe", subject.shares, "--float-share", str(share))
        record, cpu, _ = compressed(model, data, folder / "share", *flags)
        agreed = [o["agreement"] for o in record["accuracy"]["outputs"] if o["agreement"] is not None]
        found[f"{share:.0%}"] = {
            "snr": snr(model, folder / "share" / "model.onnx", data["evaluation"], folder),
            "agreement": min(agreed, default=None), "cpu": cpu,
        }  # fmt: skip
    return found


def snr(model: Path, candidate: Path, samples: Path, folder: Path) -> float:
    """The SNR of the worst output of a file, in front of a closing Softmax or Sigmoid, as it is written."""
    from channelfold.passes.layers.output_error import compared
    from channelfold.runtime.data.sources import open_data
    from channelfold.runtime.io import edit, files
    from channelfold.runtime.io.facts import required_inputs
    from channelfold.runtime.io.session import Session
    from channelfold.runtime.stats.metrics import ErrorSums, counted

    sessions, inputs = [], required_inputs(files.load(model))
    for number, path in enumerate((model, candidate)):
        graph = files.load(path)
        ends = map(edit.producer, graph.outputs)
        graph.outputs = [n.inputs[0] if n and n.op == "Cast" else t for n, t in zip(ends, graph.outputs, strict=True)]
        graph.outputs = [tensor for tensor, *_ in compared(graph)]
        for place, tensor in enumerate(graph.outputs):
            tensor.name = f"compared.{place}"
        files.save(graph, folder / f"compared.{number}.onnx")
        sessions.append(Session(folder / f"compared.{number}.onnx", fuse=False))
    mask = next((spec.name for spec in inputs if spec.meaning and spec.meaning.kind == "mask"), "")
    sums: dict[str, ErrorSums] = {}
    for feed in open_data(samples, inputs):
        right, found = (session.run(feed) for session in sessions)
        for name, output in right.items():  # a file may flatten the tokens of a product
            pair = (counted(values, feed.get(mask)) for values in (output, found[name].reshape(output.shape)))
            sums.setdefault(name, ErrorSums()).add(ErrorSums.of(*pair))
    return min(own.snr for own in sums.values())


def ranks(subject: Subject, model: Path, data: Mapping[str, Path], folder: Path) -> dict[str, Any]:
    from channelfold.passes.layers.output_error import SAMPLES, spread
    from channelfold.passes.layers.sensitivity import Crew, brief, keep, measure
    from channelfold.passes.recipe import load_recipe
    from channelfold.passes.search import options as choices
    from channelfold.runtime.data.sources import open_data
    from channelfold.runtime.jobs.job import Job, Source
    from channelfold.runtime.jobs.sensitivity import after, prepared

    job = Job("sensitivity", model, lambda *_: None, Source(data["calibration"]))
    calibration, others = (open_data(data[part], job.inputs) for part in ("calibration", "evaluation"))
    passes = [*job.prepared(), *choices.in_front(load_recipe(subject.recipe).passes)]
    graph, _ = after(job, job.graph, passes, calibration)
    with prepared(job, graph, choices.steps({}), calibration) as found:
        board, groups, crew = found.board, choices.groups(graph, found.board), Crew()
        scored, true = (
            keep(board, brief(board, spread(d, SAMPLES)), n) for n, d in (("s", calibration), ("t", others))
        )
        scores = measure(board, scored, groups, crew, guess=True)
        runs = sum(crew.runs.values())
        truth = measure(board, true, groups, runs=math.inf)
        options = [o for o in ("int8", "w4") if any(o in site.errors for site in scores)]
        return {"runs": runs, "samples": len(true)} | {o: _rank(scores, truth, o) for o in options}


def _rank(scores: Sequence[Any], truth: Sequence[Any], option: str) -> tuple[float, int]:
    """Spearman's correlation, and the number of sites."""
    errors = [[site.errors[option] for site in sites if option in site.errors] for sites in (scores, truth)]
    first, second = (np.argsort(np.argsort(own)) for own in errors)
    return float(np.corrcoef(first, second)[0, 1]), len(first)


# ---- the page ----------------------------------------------------------------------------------------------------


def beaten(points: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> list[str]:
    """The recipes at less cost and a higher SNR than every point of a front."""
    cost, db = NEAR
    return [
        recipe
        for recipe, own in found.items()
        if not any(p["cost"] <= own["cost"] + cost and p["snr_db"] >= own["snr"] - db for p in points)
    ]


def of_search(name: str, row: dict[str, Any]) -> list[str]:
    chosen = next(p for p in row["points"] if p["chosen"])
    gaps, runs = [abs(gap + row["kappa"]) for gap in row["gaps"]], row["runs"]
    parts = [sum(runs.get(key, 0) for key in keys) / 64 for keys in (("networks",), ("sensitivities",), ("points",))]
    return [
        name,
        chosen["start"] or "as it is",
        f"{row['bytes']:.0%}",
        f"{chosen['cost']:.0%}",
        f"{row['file']['snr_db']:.1f}",
        f"{row['file']['loss']:.2%} (to {row['file']['high']:.2%})" + ("" if row["met"] else " missed"),
        f"{sum(gap <= 1 for gap in gaps)}, {sum(gap <= 3 for gap in gaps)} of {len(gaps)}",
        " + ".join(f"{part:.1f}" for part in parts) + f" = {sum(parts):.1f}",
        f"{runs['proof'] / 64:.1f}",
        f"{row['cpu']:.0f} s",
        f"{row['memory'] / 1e6:.0f} of {row['model'] / 1e6:.0f} MB",
    ]


def of_recipes(name: str, row: dict[str, Any], points: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = [f"{own['cost']:.0%}, {own['snr']:.1f} dB" for own in row.values()]
    return [name, *cells, ", ".join(beaten(points, row)) or "none"]


def of_shares(name: str, row: dict[str, Any]) -> list[str]:
    agreed = [own["agreement"] for own in row.values()]
    told = "" if None in agreed else ", ".join(f"{a:.2f}" for a in agreed)
    return [name, *(f"{own['snr']:.1f}" for own in row.values()), told, f"{row['20%']['cpu']:.0f} s"]


def of_ranks(name: str, row: dict[str, Any]) -> list[str]:
    cells = [f"{row[o][0]:.3f} ({row[o][1]})" if o in row else "" for o in ("int8", "w4")]
    return [name, *cells, str(row["samples"]), f"{row['runs'] / 64:.1f}"]


def page(rows: Mapping[str, Any]) -> str:
    """All tables."""
    headers = {
        "search": ("model", "network", "bytes", "cost", "dB", "loss of the file", "within 1, 3 dB",
                   "passes: networks, sensitivities, points", "proof", "user CPU", "memory, model"),
        "recipes": ("model", *RECIPES, "off the front"),
        "shares": ("model", *(f"{share:.0%} float" for share in SHARES), "argmax agreement", "user CPU at 20 %"),
        "ranks": ("model", "int8 (sites)", "w4 (sites)", "samples of the truth", "passes"),
    }  # fmt: skip
    tables = {
        "search": [of_search(name, own["search"]) for name, own in rows.items() if "search" in own],
        "recipes": [
            of_recipes(name, own["recipes"], own["search"]["points"])
            for name, own in rows.items()
            if {"recipes", "search"} <= own.keys()
        ],
        "shares": [of_shares(name, own["shares"]) for name, own in rows.items() if "shares" in own],
        "ranks": [of_ranks(name, own["ranks"]) for name, own in rows.items() if "ranks" in own],
    }
    return "\n\n".join(f"## {part.title()}\n\n{table(headers[part], tables[part])}" for part in PARTS if tables[part])


def main() -> None:
    made = parser(__doc__)
    made.add_argument("subjects", nargs="*", metavar="SUBJECT", help=", ".join(SUBJECTS))
    made.add_argument("--part", action="append", choices=PARTS, help="what to measure (default: all)")
    add_results(made, "search.md")
    args = made.parse_args()
    rows = known(args.json)
    measures = {"search": search, "recipes": recipes, "shares": shares, "ranks": ranks}
    for name in args.subjects or SUBJECTS:
        subject = SUBJECTS[name]
        model = args.dir / "open" / subject.file
        for part in args.part or PARTS:
            with tempfile.TemporaryDirectory() as folder:
                data = split(args.dir / "calibration" / subject.data, Path(folder), name)
                rows.setdefault(name, {})[part] = measures[part](subject, model, data, Path(folder))
            keep(args.json, rows)
            print(name, part, json.dumps(rows[name][part]), file=sys.stderr)
    text = page(rows)
    print(text)
    if args.write:
        write("search.md", "# Search and float share\n\n`python benchmarks/search.py --write`", text, __doc__ or "")


if __name__ == "__main__":
    main()
