"""What structured pruning costs and gains, without retraining.

    python benchmarks/pruning.py slice [MODEL …]        slicing equals masking, and how many channels can go
    python benchmarks/pruning.py quality [TASK …]       error of the outputs against the share of channels that goes
    python benchmarks/pruning.py speed [NETWORK …]      latency and engines at half the multiply-accumulates

with --dir DIR (the open set), --json FILE (keeps finished rows for the next call) and --write, which writes
results/pruning.md, and for ``quality`` a chart a task, from all rows in FILE.

``quality`` calibrates on every other sample of DIR/calibration and measures on those between. Latencies are processor
time of one thread, original and pruned in turns, so that other work on the machine weighs on both alike.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from harness import RESULTS, add_results, channelfold, keep, known, parser, run, table, write

from channelfold.passes.base import Context
from channelfold.passes.channels.cut import cut, mask
from channelfold.passes.channels.groups import find_groups
from channelfold.passes.prune import Prune
from channelfold.passes.recipe import load_recipe
from channelfold.runtime.data.probes import random_feeds, shapes_of
from channelfold.runtime.data.sources import Data, open_data
from channelfold.runtime.io.facts import required_inputs
from channelfold.runtime.io.files import infer_shapes, load, save, session
from channelfold.runtime.io.session import Feed
from channelfold.runtime.io.snapshot import Snapshot
from channelfold.runtime.jobs.inspect_model import costs
from channelfold.runtime.stats.bench import latencies
from channelfold.tests.channel_cuts import random_keep, regions_of
from channelfold.tests.passes.prune.topologies import COUNTS, NORMED, counts, graph_of, image, logits, random_weights

OPEN = (
    "crepe_tiny",
    "crepe_full",
    "effnet_lite0.bn",
    "vit_s_focus",
    "minilm",
    "ocr_rec",
    "plcmos",
    "magika",
    "smollm2",
)
MODELS = {"crepe_full": "crepe_full", "minilm": "minilm", "effnet": "effnet_lite0.bn"}
RATIOS = (0.1, 0.3, 0.5, 0.7)
WAYS: dict[str, dict[str, Any]] = {
    "magnitude": {"importance": "l2", "compensate": "none"},
    "magnitude, bias": {"importance": "l2", "compensate": "bias"},
    "magnitude, least squares": {"importance": "l2", "compensate": "lstsq"},
    "reconstruction, least squares": {"importance": "reconstruction", "compensate": "lstsq"},
    "no data": {"importance": "reconstruction", "compensate": "lstsq"},
}
COLORS = ("#888888", "#d08c00", "#0072b2", "#009e73", "#cc3377")
INCLUDE = {"minilm": ("*intermediate*",)}
SPEED = {"crepe_full": 1.6, "resnet50": 1.6, "vgg19": 1.6}  # the least that half the MACs must gain
SM = "89"


def folded(graph: gs.Graph) -> gs.Graph:
    for step in load_recipe("fold").passes:
        step.apply(graph, Context())
    infer_shapes(graph)
    return graph


# ---- slice -----------------------------------------------------------------------------------------------------------


def slice_row(folder: Path, name: str) -> dict[str, Any]:
    """Channels that may go, and the largest error of a cut against the mask at all ratios, relative to the output."""
    light = name in COUNTS
    original = (
        graph_of(name, random_weights(1 if name in NORMED else 2)) if light else folded(load(folder / f"{name}.onnx"))
    )
    before, output = Snapshot.of(original), logits(original) if light else original.outputs[0].name
    feed = image(original) if light else next(iter(random_feeds(required_inputs(original), 0)))
    shapes, worst = shapes_of(original), 0.0
    began = time.perf_counter()
    groups = find_groups(original, shapes)
    seconds = time.perf_counter() - began
    free, stay = counts(groups)
    for ratio in RATIOS:
        found = []
        for step in (cut, mask):
            graph = gs.Graph()
            before.restore(graph)
            infer_shapes(graph)
            rng = np.random.default_rng(0)
            regions = [r for r in regions_of(find_groups(graph, shapes)) if not r.reduced]
            step(graph, [(region, random_keep(region, rng, ratio)) for region in regions])
            found.append(session(graph, [output], optimize=False, threads=2).run(feed)[output].astype(np.float64))
        worst = max(worst, float(np.abs(found[0] - found[1]).max() / np.abs(found[1]).max()))
    return {"free": free, "stay": stay, "error": worst, "seconds": seconds, "nodes": len(original.nodes)}


def slice_table(found: dict[str, Any]) -> str:
    rows = []
    for name, row in found.items():
        whole = row["free"] + sum(row["stay"].values())
        reasons = "; ".join(f"{count} {reason}" for reason, count in row["stay"].items())
        share = f"{row['free']:,} of {whole:,}, {row['free'] / whole:.1%}"
        rows.append((name, f"{row['nodes']}", f"{row['seconds']:.2f}", share, f"{row['error']:.1e}", reasons))
    return table(("model", "nodes", "s to group", "channels that may go", "slice - mask", "the others stay"), rows)


# ---- quality ---------------------------------------------------------------------------------------------------------


def halves(folder: Path, task: str, graph: gs.Graph) -> tuple[Data, list[Feed]]:
    """Every other sample to calibrate on, and those between."""
    path = folder / "calibration" / task
    feeds = list(open_data(path if path.is_dir() else path.with_suffix(".npz"), required_inputs(graph)))
    mine = feeds[::2]
    return Data(required_inputs(graph), len(mine), lambda: iter(mine), "every other sample"), feeds[1::2]


def snr(graph: gs.Graph, feeds: list[Feed], expected: list[np.ndarray]) -> float:
    """Of the first output, in dB."""
    name = graph.outputs[0].name
    runner = session(graph, [name], threads=2)
    found = [runner.run(feed)[name] for feed in feeds]
    noise = sum(float(np.square(a - b, dtype=np.float64).sum()) for a, b in zip(expected, found, strict=True))
    return 10 * float(np.log10(sum(float(np.square(a, dtype=np.float64).sum()) for a in expected) / noise))


def quality_rows(folder: Path, task: str) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Key and measurement of every way and ratio."""
    original = folded(load(folder / "open" / f"{MODELS[task]}.onnx"))
    before = Snapshot.of(original)
    data, held_out = halves(folder, task, original)
    expected: list[np.ndarray] = []

    def measure(way: str, ratio: float) -> dict[str, Any]:
        name = original.outputs[0].name
        if not expected:
            runner = session(original, [name], threads=2)
            expected.extend(runner.run(feed)[name] for feed in held_out)
        graph = gs.Graph()
        before.restore(graph)
        step = Prune(ratio=ratio, include=INCLUDE.get(task, ()), verify=False, **WAYS[way])
        outcome = step.apply(graph, Context(calibration=None if way == "no data" else data))
        facts = {kind: outcome.facts[kind]["after"] / outcome.facts[kind]["before"] for kind in ("macs", "parameters")}
        return {"task": task, "way": way, "ratio": ratio, "snr": snr(graph, held_out, expected), **facts}

    for ratio in RATIOS:
        for way in WAYS:
            yield f"{task} {way} {ratio:g}", lambda way=way, ratio=ratio: measure(way, ratio)


def quality_tables(results: dict[str, Any]) -> list[str]:
    parts = []
    for task in MODELS:
        rows = [row for row in results.values() if row["task"] == task]
        if not rows:
            continue
        ratios = sorted({row["ratio"] for row in rows})
        cells = []
        for ratio in ratios:
            found = {row["way"]: row for row in rows if row["ratio"] == ratio}
            some = next(iter(found.values()))
            figures = (f"{found[way]['snr']:.1f}" if way in found else "" for way in WAYS)
            cells.append((f"{ratio:.0%}", f"{some['macs']:.0%}", f"{some['parameters']:.0%}", *figures))
        header = ("channels gone", "MACs left", "parameters left", *WAYS)
        parts += [f"### {task}", table(header, cells), f"![{task}](pruning_{task}.svg)"]
    return parts


def chart(rows: list[dict[str, Any]], title: str) -> str:
    """An SVG of SNR against the ratio, a line a way."""
    width, height, left, top, bottom = 560, 300, 50, 30, 260
    low, high = min(0.0, *(row["snr"] for row in rows)), max(row["snr"] for row in rows) * 1.05

    def place(ratio: float, value: float) -> tuple[float, float]:
        return left + ratio / 0.8 * 300, bottom - (value - low) / (high - low) * (bottom - top)

    def text(x: float, y: float, words: str, **style: str) -> str:
        extra = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in style.items())
        return f'<text x="{x:.0f}" y="{y:.0f}" font-size="12" font-family="sans-serif"{extra}>{words}</text>'

    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">']
    lines += [
        '<rect width="100%" height="100%" fill="white"/>',
        text(left, 18, f"{title}: SNR in dB, held-out samples"),
    ]
    for value in np.arange(0, high, 10):
        y = place(0, value)[1]
        lines.append(f'<line x1="{left}" y1="{y:.1f}" x2="350" y2="{y:.1f}" stroke="#dddddd"/>')
        lines.append(text(left - 6, y + 4, f"{value:.0f}", text_anchor="end"))
    for ratio in sorted({row["ratio"] for row in rows}):
        lines.append(text(place(ratio, 0)[0], bottom + 18, f"{ratio:.0%}", text_anchor="middle"))
    for index, (way, color) in enumerate(zip(WAYS, COLORS, strict=True)):
        points = [
            place(row["ratio"], row["snr"]) for row in sorted(rows, key=lambda r: r["ratio"]) if row["way"] == way
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        lines.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        lines.append(text(362, 50 + 20 * index, way, fill=color))
    return "\n".join([*lines, "</svg>"]) + "\n"


# ---- speed -----------------------------------------------------------------------------------------------------------


def network(folder: Path, name: str) -> gs.Graph:
    if name in MODELS:
        return folded(load(folder / "open" / f"{MODELS[name]}.onnx"))
    rng = np.random.default_rng(0)

    def weights(shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1:
            return rng.uniform(0.5, 1.5, shape).astype(np.float32)
        return rng.standard_normal(shape, np.float32) * np.float32(np.sqrt(2 / np.prod(shape[1:])))

    return folded(graph_of(name, weights))


def speed_row(folder: Path, name: str) -> dict[str, Any]:
    """Latency before and after, interleaved, what the engines weigh, and what pruning itself takes."""
    original = network(folder, name)
    inputs = required_inputs(original)
    shapes = {spec.name: [size if isinstance(size, int) else 1 for size in spec.shape] for spec in inputs}
    feed = {name: np.random.default_rng(0).standard_normal(shape, np.float32) for name, shape in shapes.items()}
    sizes = [":".join([name, *["x".join(map(str, shape))] * 3]) for name, shape in shapes.items()]
    dynamic = any(not isinstance(size, int) for spec in inputs for size in spec.shape)
    ranges = [part for size in sizes if dynamic for part in ("--shape", size)]
    with tempfile.TemporaryDirectory() as scratch:
        paths = {"before": Path(scratch, "before.onnx"), "after": Path(scratch, "after.onnx")}
        save(original, paths["before"])
        known_shapes = shapes_of(original)
        began = time.process_time()
        find_groups(original, known_shapes)
        grouped = time.process_time() - began
        began = time.process_time()
        Prune(keep_macs=0.5, importance="auto" if name in MODELS else "l2").apply(original, Context())
        pruned = time.process_time() - began
        save(original, paths["after"])
        found: dict[str, Any] = {"grouping_s": grouped, "pruning_s": pruned}
        runs = {}
        for when, path in paths.items():
            graph = load(path)
            found[when] = {"bytes": path.stat().st_size, **costs(graph)}
            runner = session(graph, threads=1)
            runs[when] = lambda runner=runner: runner.run(feed)
        for latency in latencies(runs, rounds=40, seconds=20, clock=time.process_time):
            found[latency.name] |= {"ms": latency.ms, "low": latency.low}
        for when, path in paths.items():
            engine = Path(scratch, f"{when}.engine")
            began = time.perf_counter()
            run(channelfold("build", path, "-o", engine, "--sm", SM, *ranges))
            found[when] |= {"engine": engine.stat().st_size, "build_s": time.perf_counter() - began}
    return found


def speed_table(found: dict[str, Any]) -> str:
    header = ("network", "GMACs", "M parameters", "ms median", "lower quartile", "faster", f"engine, MB (SM {SM})",
              "grouping s", "pruning s")  # fmt: skip
    rows = []
    for name, row in found.items():
        pair = row["before"], row["after"]
        rows.append(
            (
                name,
                " -> ".join(f"{p['macs'] / 1e9:.2f}" for p in pair),
                " -> ".join(f"{p['parameters'] / 1e6:.1f}" for p in pair),
                " -> ".join(f"{p['ms']:.1f}" for p in pair),
                " -> ".join(f"{p['low']:.1f}" for p in pair),
                f"{pair[0]['ms'] / pair[1]['ms']:.2f}x",
                " -> ".join(f"{p['engine'] / 1e6:.1f}" for p in pair),
                f"{row['grouping_s']:.2f}",
                f"{row['pruning_s']:.1f}",
            )
        )
    return table(header, rows)


# ---- all -------------------------------------------------------------------------------------------------------------


def measured(done: dict[str, Any], kind: str, names: list[str], folder: Path) -> Iterator[tuple[str, Any]]:
    """Key and measurement of what is asked for and not done yet."""
    todo: Iterator[tuple[str, Callable[[], dict[str, Any]]]]
    if kind == "slice":
        todo = ((n, lambda n=n: slice_row(folder / "open", n)) for n in names or (*COUNTS, *OPEN))
    elif kind == "speed":
        todo = ((n, lambda n=n: speed_row(folder, n)) for n in names or SPEED)
    else:
        todo = (pair for task in names or MODELS for pair in quality_rows(folder, task))
    for key, measure in todo:
        if key not in done:
            yield key, measure()


ABOUT = {
    "slice": """Random channels, 10 to 70 %, channels that norms work on counted but not cut: the largest difference of
the output between the cut graph and the one with the same channels masked, relative to the output's largest value.
Layers of 4096 neurons have 64 here.""",
    "quality": """SNR of the first output in dB, on samples that calibration has not seen; the same share of every group
goes, to multiples of 8. minilm: hidden channels of the FFNs alone.""",
    "speed": """Without data; networks with random weights are pruned by magnitude. Batch 1, ONNX Runtime, processor
time of one thread, the two in turns; "grouping" and "pruning" are processor time as well, of up to two threads.""",
}


def report(results: dict[str, dict[str, Any]]) -> None:
    parts = []
    if results.get("slice"):
        parts += ["## Slicing is masking", ABOUT["slice"], slice_table(results["slice"])]
    if results.get("quality"):
        parts += ["## Quality without retraining", ABOUT["quality"], *quality_tables(results["quality"])]
        for task in MODELS:
            if rows := [row for row in results["quality"].values() if row["task"] == task]:
                RESULTS.joinpath(f"pruning_{task}.svg").write_text(chart(rows, task))
    if results.get("speed"):
        parts += ["## Speed at half the multiply-accumulates", ABOUT["speed"], speed_table(results["speed"])]
    write("pruning.md", "# Structured pruning", *parts)


def main() -> None:
    made = parser(__doc__, kind={"choices": ("slice", "quality", "speed")}, names={"nargs": "*", "metavar": "NAME"})
    add_results(made, "pruning.md")
    options = made.parse_args()
    rows = known(options.json)
    mine = rows.setdefault(options.kind, {})
    for key, row in measured(mine, options.kind, options.names, options.dir):
        mine[key] = row
        print(key, json.dumps(row), file=sys.stderr)
        keep(options.json, rows)
    if options.write:
        report(rows)
    slow = [n for n, row in rows.get("speed", {}).items() if row["before"]["ms"] / row["after"]["ms"] < SPEED.get(n, 0)]
    if options.kind == "speed" and slow:
        sys.exit(f"Slower than its goal: {', '.join(slow)}")


if __name__ == "__main__":
    main()
