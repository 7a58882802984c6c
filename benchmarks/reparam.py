"""What folding idle FFN channels gains in ONNX Runtime on the CPU, beside the paper's figures, and what it costs.

    python benchmarks/reparam.py speed [NETWORK …] [--threads N] [--seconds S] [--json FILE] [--write]
    python benchmarks/reparam.py profile NETWORK [--depth N]
    python benchmarks/reparam.py fold MODEL OUT

The networks have random weights (networks.py). ``plain`` is the ordinary network, ``unfolded`` a RePaViT as PyTorch
exports it, ``folded`` what the pass ``reparameterize-ffn`` makes of that. The three take turns image by image, twice:
on ``--threads`` threads by the clock on the wall, and on one thread by the processor time they took, which other
processes on the machine disturb much less. The ratios are those of medians.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from harness import add_results, keep, known, parser, table, write
from networks import FORMS, NETWORKS, change, counts, make
from speed import measured

ROUNDS = 40
IMAGE = {"input": np.random.default_rng(0).standard_normal((1, 3, 224, 224), np.float32)}
# of the plain network's time to the folded one's, on the wall
GOALS = {"vit_l": 1.45, "vit_h14": 1.55}


@dataclass(frozen=True)
class Row:
    """One network: milliseconds an image by form, on the wall and of one thread; counts, and what the fold took.

    ``load``: processes that wanted to run in the minute before.
    """

    network: str
    wall: dict[str, float]
    thread: dict[str, float]
    load: float
    parameters: tuple[int, int]
    macs: tuple[int, int]
    attention: int
    fold_seconds: float
    fold_megabytes: float
    weight_megabytes: float

    def speed(self, times: dict[str, float]) -> tuple[str, ...]:
        (plain, folded), paper = self.macs, NETWORKS[self.network].speedup
        return (
            self.network,
            *(f"{times[form]:.1f}" for form in FORMS),
            *(f"{times[form] / times['folded']:.3f}" for form in ("plain", "unfolded")),
            f"{(plain + self.attention) / (folded + self.attention):.3f}",
            f"{paper:.3f}" if paper else "-",
        )

    def counts(self) -> tuple[str, ...]:
        network = NETWORKS[self.network]
        return (
            self.network,
            f"{network.theta:.2f}",
            change((self.parameters[0] / 1e6, self.parameters[1] / 1e6), digits=2),
            change(network.parameters),
            change((self.macs[0] / 1e9, self.macs[1] / 1e9), digits=2),
            change(network.gmacs),
            f"{self.fold_seconds:.1f}",
            f"{self.fold_megabytes:.0f}",
            f"{self.fold_megabytes / self.weight_megabytes:.2f}",
        )


SPEED = (
    *("network", "plain ms", "unfolded ms", "folded ms", "plain / folded", "unfolded / folded"),
    *("MACs allow", "paper, GPU"),
)
COUNTS = (
    *("network", "theta", "parameters, M", "paper", "GMACs", "paper"),
    *("fold s", "peak MB", "/ weights"),
)


def measure(name: str, folder: Path, threads: int, seconds: float) -> Row:
    paths = {form: folder / f"{name}.{form}.onnx" for form in FORMS}
    for form in ("plain", "unfolded"):
        make(name, form, paths[form])
    child = [sys.executable, __file__, "fold", str(paths["unfolded"]), str(paths["folded"])]
    fold_seconds, fold_megabytes = measured(child)
    load = os.getloadavg()[0]
    wall = timed(paths, threads, seconds, time.perf_counter)
    thread = timed(paths, 1, seconds, time.process_time)
    plain, folded = counts(paths["plain"]), counts(paths["folded"])
    return Row(
        name,
        wall,
        thread,
        load,
        (plain.parameters, folded.parameters),
        (plain.macs, folded.macs),
        plain.attention,
        fold_seconds,
        fold_megabytes,
        paths["unfolded"].with_name(f"{paths['unfolded'].name}.data").stat().st_size / 1e6,
    )


def timed(paths: Mapping[str, Path], threads: int, seconds: float, clock: Callable[[], float]) -> dict[str, float]:
    """Median milliseconds an image by form."""
    from channelfold.runtime.io.session import Session
    from channelfold.runtime.stats.bench import latencies

    runs = {
        form: functools.partial(Session(path, threads=threads, timed=True).run, IMAGE) for form, path in paths.items()
    }
    found = latencies(runs, rounds=ROUNDS, seconds=seconds, clock=clock)
    return {latency.name: latency.ms for latency in found}


def fold(model: Path, out: Path) -> None:
    from channelfold.passes.base import Context
    from channelfold.passes.ffn import ReparameterizeFfn
    from channelfold.runtime.io.files import load, save

    graph = load(model)
    outcome = ReparameterizeFfn().apply(graph, Context())
    if outcome.refused or not outcome.changed:
        sys.exit(f"Not every FFN was folded: {outcome.refused}")
    save(graph, out, external=True)


def profile(name: str, depth: int | None) -> str:
    """Milliseconds an image by kind of node, on one thread: of each node its fastest of ten runs."""
    columns: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for form in FORMS:
            path = make(name, form, Path(folder, f"{form}.onnx"), depth=depth)
            columns[form] = _profiled(path)
    kinds = sorted(set().union(*columns.values()), key=lambda kind: -columns["plain"].get(kind, 0))
    rows = [[kind, *(f"{columns[form].get(kind, 0):.2f}" for form in FORMS)] for kind in kinds]
    return table(("node", *FORMS), [*rows, ["all", *(f"{sum(columns[form].values()):.2f}" for form in FORMS)]])


def _profiled(path: Path) -> dict[str, float]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling = 1, True
    options.profile_file_prefix = str(path.with_suffix(""))
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    for _ in range(10):
        session.run(None, IMAGE)
    fastest: dict[tuple[str, str], float] = defaultdict(lambda: float("inf"))
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            node = event["args"]["op_name"], event["name"]
            fastest[node] = min(fastest[node], event["dur"] / 1e3)
    kinds: dict[str, float] = defaultdict(float)
    for (kind, _), duration in fastest.items():
        kinds[kind] += duration
    return dict(kinds)


def speed(options: argparse.Namespace) -> None:
    found = known(options.json)
    for name in options.networks or list(NETWORKS):
        with tempfile.TemporaryDirectory() as folder:
            found[name] = asdict(measure(name, Path(folder), options.threads, options.seconds))
        keep(options.json, found)
        print("  ".join(Row(**found[name]).speed(found[name]["thread"])), file=sys.stderr)
    rows = [Row(**found[name]) for name in NETWORKS if name in found]
    parts = (
        HOW,
        "## One thread, processor time",
        table(SPEED, [row.speed(row.thread) for row in rows]),
        f"## {options.threads} threads, wall time",
        table((*SPEED, "load"), [(*row.speed(row.wall), f"{row.load:.1f}") for row in rows]),
        "## What the fold does and takes",
        table(COUNTS, [row.counts() for row in rows]),
    )
    print("\n\n".join(parts))
    if options.write:
        write("reparam.md", "# Folding idle FFN channels", *parts)
    missed = [row.network for row in rows if row.wall["plain"] / row.wall["folded"] < GOALS.get(row.network, 0)]
    if missed:
        sys.exit(f"Slower than its goal: {', '.join(missed)}")


HOW = """Random weights, float32, one image at a time: medians of up to 40 rounds in which the three take turns.
"MACs allow" is the ratio of all multiply-accumulates of plain and folded, those of attention with them. "load" is how
many processes wanted to run in the minute before: with more than one, wall time measures them too."""


def main() -> None:
    made = parser(__doc__)
    tasks = made.add_subparsers(dest="task", required=True)
    timing = tasks.add_parser("speed")
    timing.add_argument("networks", nargs="*", choices=[*NETWORKS, []], metavar="NETWORK", help="default: all")
    timing.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    timing.add_argument("--seconds", type=float, default=60, help="for each of the two measurements of a network")
    add_results(timing, "reparam.md", folder=False)
    profiling = tasks.add_parser("profile")
    profiling.add_argument("network", choices=NETWORKS)
    profiling.add_argument("--depth", type=int, help="so many blocks of a ViT instead of all")
    folding = tasks.add_parser("fold")
    folding.add_argument("model", type=Path)
    folding.add_argument("out", type=Path)
    options = made.parse_args()
    if options.task == "speed":
        speed(options)
    elif options.task == "profile":
        print(profile(options.network, options.depth))
    else:
        fold(options.model, options.out)


if __name__ == "__main__":
    main()
