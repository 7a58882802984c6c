"""What channel-wise scaling is worth: INT8 accuracy, outliers planted and taken back, time and memory.

    python benchmarks/smoothing.py gain [TASK …] [--dir DIR] [--only NAME …] [--json FILE] [--write]
    python benchmarks/smoothing.py planted [TASK …] [--dir DIR] [--only NAME …] [--json FILE] [--write]
    python benchmarks/smoothing.py speed [--dir DIR] [--runs N] [--json FILE] [--write]

``gain`` quantizes the models of the open set after each method and evaluates them on their tasks. ``planted`` gives
models outlier channels that smoothing should take back. ``speed`` compares whole processes with a plain float run of
the same samples, which is loaded, run and thrown away. Each writes a section of its own into results/smoothing.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from accuracy import SUBJECTS, Goal, calibration, evaluate
from harness import RESULTS, add_results, channelfold, keep, known, machine, parser, table
from open_set import in_environment
from speed import Runs, measured

HELD_OUT = 16  # feeds of a task's evaluation that outputs are compared on
NEAR = 1.0  # dB: as far from the unspoilt network a method may stay behind that has taken outliers back

Step = tuple[str, Mapping[str, Any]]  # a pass by name, with its options


@dataclass(frozen=True)
class Variant:
    """A row: passes between folding and quantizing, and options of the latter."""

    name: str
    steps: tuple[Step, ...] = ()
    quantize: Mapping[str, Any] = field(default_factory=dict)


def smooth(name: str, method: str, quantize: Mapping[str, Any] | None = None, **options: Any) -> Variant:
    return Variant(name, (("smooth", {"method": method, **options}),), quantize or {})


METHODS = (
    Variant("none"),
    smooth("smoothquant 0.5", "smoothquant", alpha=0.5),
    smooth("smoothquant 0.8", "smoothquant", alpha=0.8),
    smooth("smoothquant, search", "smoothquant", search_alpha=True),
    smooth("os-plus", "os-plus"),
    smooth("awq", "awq"),
    smooth("repq", "repq"),
    smooth("outliertune", "outliertune"),
    smooth("fp4-shift", "fp4-shift"),
    Variant("split-channels", (("split-channels", {}),)),
    smooth("auto", "auto"),
)
INSERTING = (
    smooth("os-plus, insert", "os-plus", allow_insert=True),
    smooth("auto, insert", "auto", allow_insert=True),
)
SPARING = (
    smooth("auto, 5 % float", "auto", {"float_share": 0.05}),
    smooth("auto, 10 % float", "auto", {"float_share": 0.1}),
)
GAINS: dict[str, tuple[Goal, tuple[Variant, ...]]] = {
    "smol": (Goal("perplexity", at_most=67.5, lower_is_better=True), (*METHODS, *SPARING)),
    "minilm": (Goal("recall_at_1", at_least=0.513), (*METHODS, *INSERTING)),
    "imgfocus": (Goal("iou", at_least=0.892), (*METHODS, *INSERTING)),
}


# ---- gain --------------------------------------------------------------------------------------------------------


def held_out(folder: Path, task: str) -> Path:
    """Feeds of the task's evaluation, recorded once: a folder of one file each."""
    found = folder / "held_out" / task
    if not found.is_dir():
        command = [sys.executable, __file__, "record", task, "--dir", str(folder)]
        subprocess.run(command, check=True)
    return found


def record(folder: Path, task: str) -> None:
    """Runs a task on its float model and keeps some of what the model is fed, evenly spaced."""
    in_environment(folder)
    from tasks import TASKS, base, images, text

    feeds: list[dict[str, np.ndarray]] = []

    class Recorder:
        def __init__(self, model: Path):
            self.session = base.session(model)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.session, name)

        def run(self, names: Any, feed: dict[str, np.ndarray]) -> Any:
            feeds.append(feed)
            return self.session.run(names, feed)

    text.session = images.session = Recorder
    open_set = base.OpenSet(folder.resolve())
    TASKS[task].evaluate(open_set, open_set.models / TASKS[task].model)
    place = folder / "held_out" / task
    place.mkdir(parents=True)
    for i in np.unique(np.linspace(0, len(feeds) - 1, HELD_OUT).astype(int)):
        np.savez(place / f"{i:03}.npz", **feeds[i])  # pyright: ignore[reportArgumentType]


class Bench:
    """One model: what smoothing leaves of it, quantized."""

    def __init__(self, model: Path, data: Path, scratch: Path, first: int = 0):
        self.model, self.data, self.scratch, self.first = model, data, scratch, first
        self.smoothed: dict[str, tuple[Path, int]] = {}

    def apply(self, model: Path, steps: Iterable[Step], output: Path, first: int = 0) -> tuple[list[dict], int]:
        """Runs passes by name; the records, and how many nodes are left."""
        from channelfold.passes import pipeline, recipe
        from channelfold.passes.base import Context
        from channelfold.runtime.data.sources import open_data
        from channelfold.runtime.io import files
        from channelfold.runtime.io.facts import required_inputs

        graph = files.load(model)
        data = open_data(self.data, required_inputs(graph))
        passes = [recipe.make(name, options) for name, options in steps]
        graph, records = pipeline.run(graph, passes, Context(data.first(first or len(data))), verify=False)
        files.save(graph, output)
        return records, len(graph.nodes)

    def folded(self) -> tuple[Path, int]:
        from channelfold.passes.recipe import BUILT_IN

        if "folded" not in self.smoothed:
            output = self.scratch / "folded.onnx"
            _, nodes = self.apply(self.model, [(name, {}) for name in BUILT_IN["fold"]], output, self.first)
            self.smoothed["folded"] = output, nodes
        return self.smoothed["folded"]

    def quantized(self, variant: Variant) -> tuple[Path, dict[str, int]]:
        """The INT8 file of a variant, with the nodes it has gained and the linears it leaves in float."""
        folded, before = self.folded()
        key = repr(variant.steps)
        if variant.steps and key not in self.smoothed:
            output = self.scratch / f"smoothed{len(self.smoothed)}.onnx"
            _, nodes = self.apply(folded, variant.steps, output, self.first)
            self.smoothed[key] = output, nodes
        source, nodes = self.smoothed[key] if variant.steps else (folded, before)
        output = self.scratch / "int8.onnx"
        records, _ = self.apply(source, [("quantize", variant.quantize)], output, self.first)
        left = [r for r in records[-1]["refused"] if "two activations" not in r["reason"]]
        return output, {"added": nodes - before, "float": len(left)}


def decibels(reference: Path, candidate: Path, feeds: Path, first: int = 0) -> float:
    """The signal-to-noise ratio of the worst output."""
    from channelfold.runtime.data.sources import open_data
    from channelfold.runtime.io.session import Session
    from channelfold.runtime.stats.compare import compare

    session = Session(reference)
    data = open_data(feeds, session.inputs)
    found = compare(session, Session(candidate, exact=True), data.first(first or len(data)))
    return min(output.snr for output in found.outputs if output.snr is not None)


def gain(folder: Path, task: str, only: Sequence[str], scratch: Path) -> Iterator[dict[str, Any]]:
    goal, variants = GAINS[task]
    model = folder / "open" / SUBJECTS[task].model
    bench, feeds = Bench(model, calibration(folder, task), scratch), held_out(folder, task)
    yield {"task": task, "name": "float", "figure": evaluate(folder, task)[goal.metric]}
    for variant in variants:
        if only and variant.name not in only:
            continue
        output, facts = bench.quantized(variant)
        figure = evaluate(folder, task, output)[goal.metric]
        met = goal.met(0.0, figure)
        yield (
            {"task": task, "name": variant.name, "figure": figure, "met": met}
            | facts
            | {"snr": decibels(model, output, feeds)}
        )


def gain_table(results: Sequence[dict[str, Any]], task: str) -> str:
    goal = GAINS[task][0]
    rows, names = [], ["float", *(variant.name for variant in GAINS[task][1])]
    for r in sorted((r for r in results if r["task"] == task), key=lambda r: names.index(r["name"])):
        if r["name"] == "float":
            rows.append(("float", "-", f"{r['figure']:.4f}", "-", "-", "-"))
        else:
            figures = f"{r['snr']:.2f}", f"{r['figure']:.4f}", "yes" if r["met"] else "no"
            rows.append((r["name"], *figures, str(r["float"]), str(r["added"])))
    return table((task, "output SNR dB", goal.metric, f"{goal}", "linears in float", "nodes added"), rows)


# ---- planted -----------------------------------------------------------------------------------------------------

SHARE = 0.01  # of the channels that become outliers
FACTORS = (20.0, 200.0)  # by which they grow
SHIFTS = (1.0, 3.0)  # of their ranges, by which they move where a shift costs no node
WHATEVER = {"min_activation_snr": 0.0}  # quantize everything


@dataclass(frozen=True)
class Spoilt:
    """A model to plant outliers in: ``feeds`` at most (0: all); ``insert``: also where that costs nodes."""

    feeds: int = 0
    insert: bool = False


SPOILT = {"block": Spoilt(), "minilm": Spoilt(insert=True), "imgfocus": Spoilt(), "smol": Spoilt(4)}
CLAIMS_NO = {
    "awq": "leaves activations in float",
    "fp4-shift": "for float formats",
    "split-channels": f"may add {0.2:.0%} of the channels",
}


def plant(model: Path, data: Path, output: Path, insert: bool, first: int) -> dict[str, int]:
    """Makes outliers of some classes of every region that can be scaled; the function stays the same."""
    from channelfold.passes.base import Refused
    from channelfold.passes.channels.rescale import rescale
    from channelfold.passes.channels.scale_regions import trace
    from channelfold.passes.layers.linear import live_linears, view
    from channelfold.runtime.data.sources import open_data
    from channelfold.runtime.io import files
    from channelfold.runtime.io.facts import required_inputs
    from channelfold.runtime.io.shapes import measured_shapes
    from channelfold.runtime.stats.channels import ChannelStatistics
    from channelfold.runtime.stats.observe import by_name, observe

    graph = files.load(model)
    files.infer_shapes(graph)
    samples = open_data(data, required_inputs(graph))
    shapes = measured_shapes(graph, next(iter(samples)))
    regions, seen = [], set()
    for node in live_linears(graph):
        try:
            linear = view(graph, node)
            if id(linear.data) in seen:
                continue
            for inserted in (False, True) if insert else (False,):
                region = trace(graph, linear.data, linear.in_axis, shapes, insert=inserted)
                if not region.why_fixed(region.places[id(linear.data)][1]):
                    regions.append(region)
                    seen.update(id(end.linear.data) for end in region.readers() if end.linear is not None)
                    break
        except Refused:
            continue
    readers = [[(end, end.linear) for end in region.readers() if end.linear is not None] for region in regions]
    observers = {linear.data.name: ChannelStatistics(linear.in_axis) for ends in readers for _, linear in ends}
    observe(graph, by_name(observers.items()), samples.first(first or len(samples)))
    rng = np.random.default_rng(0)
    facts = {"regions": 0, "classes": 0, "shifted": 0}
    for region, ends in zip(regions, readers, strict=True):
        spread = np.zeros(region.size)
        for end, linear in ends:
            found = observers[linear.data.name]
            np.maximum.at(spread, np.abs(end.index) - 1, found.maximum - found.minimum)
        free = np.flatnonzero(region.free & (spread > 0))
        chosen = rng.choice(free, max(1, round(SHARE * len(free))), replace=False)
        scale, shift = np.ones(region.size), np.zeros(region.size)
        scale[chosen] = 1 / np.exp(rng.uniform(np.log(FACTORS[0]), np.log(FACTORS[1]), len(chosen)))
        moved = [end.linear for end in region.ends if end.shifted and end.linear is not None]
        if all(linear.node.op != "MatMul" or linear.bias_node is not None for linear in moved):
            signs = rng.choice((-1.0, 1.0), len(chosen))
            shift[chosen] = np.where(region.shiftable, spread, 0.0)[chosen] * signs * rng.uniform(*SHIFTS, len(chosen))
        rescale(graph, region, scale, shift)
        facts["regions"] += 1
        facts["classes"] += len(chosen)
        facts["shifted"] += int(np.count_nonzero(shift))
    files.save(graph, output)
    return facts


def planted(folder: Path, task: str, only: Sequence[str], scratch: Path) -> Iterator[dict[str, Any]]:
    setup = SPOILT[task]
    if task == "block":
        model, data, feeds = block(scratch)
    else:
        model, data = folder / "open" / SUBJECTS[task].model, calibration(folder, task)
        feeds = held_out(folder, task)
    sound = Bench(model, data, scratch, setup.feeds)
    plain, _ = sound.quantized(Variant("none", quantize=WHATEVER))
    before = decibels(model, plain, feeds, setup.feeds)
    spoilt, folded = scratch / "spoilt.onnx", sound.folded()[0]
    facts = plant(folded, data, spoilt, setup.insert, setup.feeds)
    yield {"task": task, "name": "before", "snr": before} | facts
    bench = Bench(spoilt, data, scratch, setup.feeds)
    bench.smoothed["folded"] = spoilt, 0  # folding again would take the inserted nodes away
    for variant in METHODS:
        if only and variant.name not in only:
            continue
        options = {"allow_insert": True} if setup.insert else {}
        steps = tuple((name, {**given, **options}) for name, given in variant.steps)
        output, _ = bench.quantized(Variant(variant.name, steps, WHATEVER))
        snr = decibels(model, output, feeds, setup.feeds)
        yield {"task": task, "name": variant.name, "snr": snr, "recovered": snr >= before - NEAR}


def block(scratch: Path) -> tuple[Path, Path, Path]:
    """A norm, two linears with Relu between them, a shortcut and a last linear: (model, calibration, other samples)."""
    import onnx
    from onnx import helper

    rng, float32 = np.random.default_rng(0), onnx.TensorProto.FLOAT
    width, hidden = 128, 256
    shapes = {"gamma": (width,), "beta": (width,), "w1": (width, hidden), "b1": (hidden,), "w2": (hidden, width)}
    shapes |= {"b2": (width,), "w3": (width, width), "b3": (width,)}
    weights = []
    for name, shape in shapes.items():
        values = rng.standard_normal(shape) / (np.sqrt(shape[0]) if len(shape) == 2 else 4.0) + (name == "gamma")
        weights.append(onnx.numpy_helper.from_array(values.astype(np.float32), name))
    nodes = [
        helper.make_node("LayerNormalization", ["x", "gamma", "beta"], ["n"], "norm"),
        helper.make_node("MatMul", ["n", "w1"], ["m1"], "up"),
        helper.make_node("Add", ["m1", "b1"], ["a1"], "up_bias"),
        helper.make_node("Relu", ["a1"], ["r"], "relu"),
        helper.make_node("MatMul", ["r", "w2"], ["m2"], "down"),
        helper.make_node("Add", ["m2", "b2"], ["a2"], "down_bias"),
        helper.make_node("MatMul", ["a2", "w3"], ["m3"], "last"),
        helper.make_node("Add", ["m3", "b3"], ["a3"], "last_bias"),
        helper.make_node("Add", ["a3", "x"], ["y"], "shortcut"),
    ]
    ends = [helper.make_tensor_value_info(name, float32, ["n", 64, width]) for name in "xy"]
    graph = helper.make_graph(nodes, "block", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, scratch / "block.onnx")
    samples = rng.standard_normal((2, 64, 64, width)).astype(np.float32)
    for name, values in zip(("calibration", "other"), samples, strict=True):
        np.savez(scratch / f"{name}.npz", x=values)
    return scratch / "block.onnx", scratch / "calibration.npz", scratch / "other.npz"


def planted_table(results: Sequence[dict[str, Any]], tasks: Sequence[str]) -> str:
    names = ["before", *(variant.name for variant in METHODS)]
    cells = {(r["task"], r["name"]): r for r in results}
    rows = []
    for name in names:
        row = [{"before": "before planting", "none": "planted, no smoothing"}.get(name, name)]
        for task in tasks:
            r = cells.get((task, name))
            judged = r is not None and name not in ("before", "none")
            yes = (", yes" if r["recovered"] else ", no") if judged else ""
            row.append(f"{r['snr']:.2f}{yes}" if r else "-")
        rows.append((*row, CLAIMS_NO.get(name, "")))
    return table(("output SNR dB", *tasks, "claims no recovery"), rows)


# ---- speed -------------------------------------------------------------------------------------------------------

SAMPLES, TOKENS = 64, 128
TIMES = {"smoothquant": 2.0, "os-plus": 6.0, "auto": 6.0}  # of a plain float run: closed form, searched, searched
MEMORY = 1.5


def tokens(path: Path) -> None:
    """Random token ids between the special ones, nothing padded."""
    ids = np.random.default_rng(0).integers(1000, 30000, (SAMPLES, TOKENS), dtype=np.int64)
    ids[:, 0], ids[:, -1] = 101, 102
    np.savez(path, input_ids=ids, attention_mask=np.ones_like(ids), token_type_ids=np.zeros_like(ids))


def speed(folder: Path, runs: int, scratch: Path) -> Iterator[dict[str, Any]]:
    model, data = scratch / "folded.onnx", scratch / "tokens.npz"
    tokens(data)
    measured(channelfold("fold", folder / "open" / "minilm.onnx", "-o", model))
    floor = [sys.executable, str(Path(__file__).with_name("speed.py")), "floor", str(model), str(data)]
    for flags in ((), ("--allow-insert",)):
        for method in TIMES:
            output = scratch / "smooth.onnx"
            command = channelfold("smooth", model, "-o", output, "--calibration", data, "--method", method, *flags)
            smoothed, plain = Runs(), Runs()
            for child in (command, floor):
                measured(child)
            for _ in range(runs):
                smoothed.add(command)
                plain.add(floor)
            yield {
                "name": " ".join((method, *flags)),
                "bound": TIMES[method],
                "smooth": vars(smoothed),
                "floor": vars(plain),
            }


def speed_table(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for r in results:
        smoothed, plain = Runs(**r["smooth"]), Runs(**r["floor"])
        times = np.median(smoothed.seconds) / np.median(plain.seconds)
        peaks = max(smoothed.megabytes), max(plain.megabytes)
        memory = peaks[0] / peaks[1]
        met = times <= r["bound"], memory <= MEMORY
        figures = str(smoothed), str(plain), f"{times:.2f}", f"{r['bound']:g}", f"{peaks[0]:.0f}", f"{peaks[1]:.0f}"
        rows.append((r["name"], *figures, f"{memory:.2f}", "yes" if all(met) else "**no**"))
    header = ("method", "smooth s (min / median / max)", "floor s", "ratio", "bound", "MB", "floor MB", "ratio", "met")
    return table(header, rows)


# ---- results -----------------------------------------------------------------------------------------------------


def write_section(title: str, *parts: str) -> None:
    """Puts a section into results/smoothing.md in place of the one with the same title."""
    path = RESULTS / "smoothing.md"
    old = path.read_text().split("\n## ")[1:] if path.exists() else []
    sections = {text.split("\n")[0]: text.partition("\n")[2].strip() for text in old}
    sections[title] = "\n\n".join([*parts, machine()])
    body = [f"## {name}\n\n{text}" for name, text in sorted(sections.items())]
    path.write_text("\n\n".join(["# Channel-wise scaling", *body]) + "\n")
    print(f"wrote {path}", file=sys.stderr)


def collected(path: Path | None, results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """All results with the results that a file holds; each goes to the file at once, because a row takes minutes."""
    found = {_key(result): result for result in known(path)}
    for result in results:
        found[_key(result)] = result
        print(json.dumps(result), file=sys.stderr, flush=True)
        keep(path, list(found.values()))
    return list(found.values())


def _key(result: Mapping[str, Any]) -> tuple:
    return result.get("task"), result["name"]


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if options.part == "record":
            record(options.dir, options.tasks[0])
        elif options.part == "speed":
            results = collected(options.json, speed(options.dir, options.runs, scratch))
            text = speed_table(results)
            print(text)
            if options.write:
                how = f"minilm, {SAMPLES} samples of {TOKENS} tokens; memory at most {MEMORY:g} times the floor's."
                write_section("Time and memory", how, text)
        elif options.part == "planted":
            plantings(options, scratch)
        else:
            gains(options, scratch)


def gains(options: argparse.Namespace, scratch: Path) -> None:
    tasks = options.tasks or list(GAINS)
    results = collected(options.json, (r for t in tasks for r in gain(options.dir, t, options.only, scratch)))
    for task in tasks:
        text = gain_table(results, task)
        print(text)
        if options.write:
            how = f"Weights and activations in int8, after each method; SNR on {HELD_OUT} feeds of the evaluation."
            write_section(f"Gain on {task}", how, text)


def plantings(options: argparse.Namespace, scratch: Path) -> None:
    tasks = options.tasks or list(SPOILT)
    results = collected(options.json, (r for t in tasks for r in planted(options.dir, t, options.only, scratch)))
    print(planted_table(results, tasks))
    if options.write:
        write_planted(results, tasks)


def write_planted(results: Sequence[dict[str, Any]], tasks: Sequence[str]) -> None:
    sites = [f"{r['task']} {r['classes']} in {r['regions']}" for r in results if r["name"] == "before"]
    how = (
        f"{SHARE:.0%} of the channels of every region, at least one, grow {FACTORS[0]:g} to {FACTORS[1]:g} times "
        f"and move where that costs no node ({', '.join(sites)}); then everything is quantized. yes: "
        f"within {NEAR:g} dB of the model before planting, quantized without smoothing."
    )
    write_section("Planted outliers", how, planted_table(results, tasks))


def parse() -> argparse.Namespace:
    made = parser(__doc__)
    parts = made.add_subparsers(dest="part", required=True)
    for name in ("gain", "planted", "speed", "record"):
        part = parts.add_parser(name)
        add_results(part, "smoothing.md")
        if name == "speed":
            part.add_argument("--runs", type=int, default=3)
        else:
            part.add_argument("tasks", nargs="*", metavar="TASK")
            part.add_argument("--only", nargs="+", default=[], metavar="NAME", help="some of the rows")
    return made.parse_args()


if __name__ == "__main__":
    main()
