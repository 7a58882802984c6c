"""How well the time of a mix of options is predicted, on the open set: in ONNX Runtime, and modelled for a GPU.

    python benchmarks/latency.py [SUBJECT …] [--sm 89] [--dir DIR] [--json FILE] [--write]

For every subject, random mixes of float and int8 (with --sm also of weights in 8 bits) that no prediction has seen.
Mixes are measured twice in ONNX Runtime: what the two differ by is noise that no prediction can avoid.
Times in ONNX Runtime are processor times of one thread, in turns, because those of the clock say nothing on a busy
machine; with --sm they are upper bounds from the plans of engines. One factor corrects all predictions of a network, as
in a search; it is the median over the mixes here.
"""

from __future__ import annotations

import functools
import json
import random
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from harness import add_results, keep, known, parser, table, write

from channelfold.passes import recipe as recipes
from channelfold.passes.layers.sensitivity import Site
from channelfold.passes.layers.switchboard import FLOAT
from channelfold.passes.search import options as choices
from channelfold.passes.search.front import point
from channelfold.passes.search.latency import ORIGINAL, learned, mixes
from channelfold.passes.search.modelled import card_of, modelled
from channelfold.passes.search.profiled import profiled
from channelfold.runtime import jobs
from channelfold.runtime.jobs.job import Job
from channelfold.runtime.jobs.search_files import Files
from channelfold.runtime.jobs.sensitivity import after, prepared

SUBJECTS = {
    "crepe_tiny": ("crepe_tiny.onnx", "crepe_tiny.npz"),
    "effnet": ("effnet_lite0.bn.onnx", "effnet.npz"),
    "minilm": ("minilm.onnx", "minilm"),
}
MIXES = 8


def measured(model: Path, source: Path, sm: int | None) -> dict[str, Any]:
    """Predicted and measured shares of random mixes."""
    job = Job("latency", model, lambda *_: None, jobs.Source(calibration=str(source)))
    found_data = job.open("calibration", str(source))
    assert found_data is not None
    data = found_data.first(8)
    target = "onnxruntime" if sm is None else "tensorrt"
    before = choices.in_front(recipes.load_recipe("fold").passes)
    graph, _ = after(job, job.graph, [*job.prepared(), *before], data)
    passes = choices.steps({"target": target})
    wanted = (FLOAT, "int8") if sm is None else (FLOAT, "int8", "w8")
    passes = {name: step for name, step in passes.items() if name in wanted}
    feed = next(iter(data))
    timer = functools.partial(profiled, feed=feed, threads=1, clock=time.process_time)
    if sm is not None:
        timer = functools.partial(modelled, sm=sm, data=[feed])
    with prepared(job, graph, passes, data) as found:
        board = found.board
        sites = []
        for nodes in choices.groups(graph, board):
            sizes = {o: sum(board.slots[name].sizes[o] for name in nodes) for o in board.options(nodes[0])}
            errors = {o: 1.0 for o in sizes if o != FLOAT}
            sites.append(Site(nodes, errors, sizes, costs=dict.fromkeys(sizes, 0.0)))
        files = Files(job, found, data)
        files.choice = SimpleNamespace(sites=sites)  # pyright: ignore[reportAttributeAccessIssue]
        paths = {name: files.of(point(sites, mix)) for name, mix in mixes(sites).items()}
        timed = timer({ORIGINAL: model, **paths}, [site.nodes for site in sites])
        model_of = learned(found.graph, sites, timed, feed)
        rng = random.Random(0)
        shares = [rng.uniform(0.2, 0.8) for _ in range(MIXES)]
        chosen = [
            [rng.choice(s.options()[1:] or [FLOAT]) if rng.random() < p else FLOAT for s in sites] for p in shares
        ]
        points = [point(sites, mix) for mix in chosen]
        measured = []
        for _ in range(2 if sm is None else 1):
            times = timer({ORIGINAL: model, **{str(i): files.of(mix) for i, mix in enumerate(points)}}, [])
            measured.append([times[str(i)].whole / times[ORIGINAL].whole for i in range(MIXES)])
    pairs = [(model_of.share(mix.options), *own) for mix, *own in zip(points, *measured, strict=True)]
    borders = sum(sum(pair) / 2 for pair in model_of.borders.values()) / model_of.whole
    return {"sites": len(sites), "borders": borders, "pairs": pairs}


def line(name: str, row: dict[str, Any]) -> list[str]:
    seen = [statistics.mean(seen) for _, *seen in row["pairs"]]
    ratios = [one / predicted for one, (predicted, *_) in zip(seen, row["pairs"], strict=True)]
    factor = statistics.median(ratios)
    off = sorted(abs(ratio / factor - 1) for ratio in ratios)
    again = [abs(more[-1] / first - 1) for _, first, *more in row["pairs"] if more]
    return [
        name,
        str(row["sites"]),
        f"{min(seen):.2f} to {max(seen):.2f}",
        f"{row['borders']:.0%}",
        f"{factor:.3f}",
        f"{statistics.median(off):.1%}",
        f"{off[-1]:.1%}",
        f"{sum(one <= 0.03 for one in off)} of {len(off)}",
        f"{statistics.median(again):.1%}, {max(again):.1%}" if again else "",
    ]


def main() -> None:
    made = parser(__doc__)
    made.add_argument("subjects", nargs="*", metavar="SUBJECT", help=", ".join(SUBJECTS))
    made.add_argument("--sm", type=int)
    add_results(made, "latency.md")
    args = made.parse_args()
    rows = known(args.json)
    for name in args.subjects or SUBJECTS:
        file, data = SUBJECTS[name]
        how = "ONNX Runtime" if args.sm is None else f"{card_of(args.sm).name}, modelled"
        rows[f"{name}, {how}"] = measured(args.dir / "open" / file, args.dir / "calibration" / data, args.sm)
        keep(args.json, rows)
        print(name, json.dumps(rows[f"{name}, {how}"]), file=sys.stderr)
    header = ("network", "sites", "time of the mixes (float: 1)", "of borders, if all are", "factor", "off, median",
              "off, worst", "within 3 %", "measured again: median, worst")  # fmt: skip
    text = table(header, [line(name, row) for name, row in rows.items()])
    print(text)
    if args.write:
        says = (
            "`python benchmarks/latency.py`, `python benchmarks/latency.py --sm 89`. Processor time of one thread in "
        )
        says += "ONNX Runtime, on a busy machine; upper bounds by the model of the GPU."
        write("latency.md", "# Predicted and measured times of mixes", says, text)


if __name__ == "__main__":
    main()
