"""How much faster several workers measure sensitivities than one, on the open set.

    python benchmarks/workers.py [SUBJECT …] [--workers 2] [--pairs 3] [--dir DIR] [--json FILE] [--write]

Times of the clock, one worker and several in turns, so that the machine's speed affects both alike. The load of the
machine stands beside them: on a busy one they say nothing. Workers start before, as in ``channelfold sensitivity``,
where they do so while the board is made; ``start`` is how long that takes. Processor times are of all processes, the
start of workers included.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from harness import add_results, keep, known, parser, table, write

from channelfold.passes import recipe as recipes
from channelfold.passes.layers.output_error import SAMPLES, spread
from channelfold.passes.layers.sensitivity import Crew, Trial, attempt, measure
from channelfold.passes.layers.sensitivity import keep as keep_samples
from channelfold.passes.search import options as choices
from channelfold.runtime import jobs
from channelfold.runtime.io.workers import Pool
from channelfold.runtime.jobs.job import Job
from channelfold.runtime.jobs.sensitivity import after, prepared

SUBJECTS = {
    "crepe_tiny": ("crepe_tiny.onnx", "crepe_tiny.npz"),
    "effnet": ("effnet_lite0.bn.onnx", "effnet.npz"),
    "minilm": ("minilm.onnx", "minilm"),
}


WHO = ("one", "several")


def measured(model: Path, source: Path, workers: int, pairs: int) -> dict[str, Any]:
    """The seconds of the sensitivity step with one worker and with several, in turns; the processor time of a pair."""
    job = Job("workers", model, lambda *_: None, jobs.Source(calibration=str(source)))
    data = job.open("calibration", str(source))
    assert data is not None
    steps = [*job.prepared(), *choices.in_front(recipes.load_recipe("fold").passes)]
    graph, _ = after(job, job.graph, steps, data)
    with prepared(job, graph, choices.steps({}), data.first(16)) as found:
        samples = keep_samples(found.board, spread(data, SAMPLES), "sample")
        seconds: dict[int, list[tuple[float, float]]] = {1: [], workers: []}
        first = [Trial(found.board, samples[:1], ({},))] * workers
        for number in range(pairs):
            for count in (1, workers) if number % 2 == 0 else (workers, 1):
                before = _processors()
                with Crew(count) as crew:
                    list(crew.each("start", first))
                    started = time.perf_counter()
                    measure(found.board, samples, choices.groups(graph, found.board), crew)
                    wall = time.perf_counter() - started
                seconds[count].append((wall, _processors() - before))
    return {"one": seconds[1], "several": seconds[workers], "workers": workers, "load": os.getloadavg()[0]}


def _processors() -> float:
    """The seconds of processors that this process and those that it has ended have taken."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def start(workers: int) -> float:
    """The seconds from the start of workers to their first results."""
    started = time.perf_counter()
    with Pool(workers) as pool:
        pool.prepare(attempt)
    return time.perf_counter() - started


def line(name: str, row: dict[str, Any]) -> list[str]:
    ratios = [one / several for (one, _), (several, _) in zip(row["one"], row["several"], strict=True)]
    (one, one_all), (several, several_all) = ([statistics.median(v) for v in zip(*row[n], strict=True)] for n in WHO)
    return [
        name,
        str(row["workers"]),
        f"{one:.1f} s",
        f"{several:.1f} s",
        f"{statistics.median(ratios):.2f}",
        f"{min(ratios):.2f} to {max(ratios):.2f}",
        f"{one_all:.1f} and {several_all:.1f} s",
        f"{row['start']:.2f} s",
        f"{row['load']:.1f}",
    ]


def main() -> None:
    made = parser(__doc__)
    made.add_argument("subjects", nargs="*", metavar="SUBJECT", help=", ".join(SUBJECTS))
    made.add_argument("--workers", type=int, default=2)
    made.add_argument("--pairs", type=int, default=3)
    add_results(made, "workers.md")
    args = made.parse_args()
    rows = known(args.json)
    for name in args.subjects or SUBJECTS:
        file, data = SUBJECTS[name]
        paths = args.dir / "open" / file, args.dir / "calibration" / data
        rows[name] = measured(*paths, args.workers, args.pairs) | {"start": start(args.workers)}
        keep(args.json, rows)
        print(name, json.dumps(rows[name]), file=sys.stderr)
    header = ("network", "workers", "one", "several", "times faster", "of the pairs", "processors", "start", "load")
    text = table(header, [line(name, row) for name, row in rows.items()])
    print(text)
    if args.write:
        says = "`python benchmarks/workers.py`: times of the clock of the sensitivity step, one worker and several in "
        says += "turns; processors: the time of all processes; start: of the workers, without work; load: of the "
        says += "machine over the last minute."
        write("workers.md", "# Workers", says, text)


if __name__ == "__main__":
    main()
