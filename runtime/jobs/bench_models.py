"""The job of the command bench: models and engines timed in turns, their memory, weights by type, nodes by time.

Engines are timed where there is a GPU that runs them. Without one, ``bench.unmeasured`` says why, and the costs that
their plans tell are all there is.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import multiprocessing
import sys
from collections.abc import Sequence, Set
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from channelfold.runtime.data.probes import random_data
from channelfold.runtime.data.sources import open_data
from channelfold.runtime.engine import build as tensorrt
from channelfold.runtime.engine.plan import contractions, read_plan
from channelfold.runtime.engine.run import EngineSession
from channelfold.runtime.errors import DataError, UsageError
from channelfold.runtime.io import files, temporary
from channelfold.runtime.io.convert import all_graphs
from channelfold.runtime.io.facts import model_facts
from channelfold.runtime.io.outputs import check_kind
from channelfold.runtime.io.session import Feed, Session, TensorSpec
from channelfold.runtime.io.weights import bits
from channelfold.runtime.jobs import bench_table
from channelfold.runtime.jobs import engines as engine_records
from channelfold.runtime.jobs import inspect_model as inspection
from channelfold.runtime.jobs.job import Job, Progress, Record, Source
from channelfold.runtime.stats.bench import Latency, latencies
from channelfold.runtime.stats.profile import profiles

_PACKAGE = "tensorrt_rtx"


@dataclass(frozen=True)
class Bench:
    """What to measure. ``engines``: files built from the models; ``sm``: the GPU for which one of each is built.

    ``nodes``: time the nodes of the models too. ``keep``: the file that gets the times of all nodes and layers.
    """

    batches: Sequence[int] = ()
    threads: int | None = None
    rounds: int = 50
    engines: tuple[Path, ...] = ()
    sm: int | None = None
    nodes: bool = False
    keep: Path | None = None


def run(paths: Sequence[Path], asked: Bench, source: Source, progress: Progress) -> Record:
    """The record of a measurement: see ``jobs.bench``."""
    job = Job("bench", paths[0], progress, source)
    if asked.keep is not None:
        check_kind(asked.keep, "a table of times")
    data = job.open("evaluation", source.evaluation)
    feed = next(iter(data if data is not None else random_data(job.inputs, 1, seed=source.seed)))
    bench: dict[str, Any] = {"threads": asked.threads, "rows": []}
    facts = [_facts(path) for path in paths]
    models = _named(paths)
    with temporary.folder() as folder:
        built = [] if asked.sm is None else _built(job, paths, asked.sm, feed, folder)
        job.record["engines"] += [_told(engine, paths, feed) for engine in asked.engines]
        engines, bench["unmeasured"] = _runnable(_named([*built, *asked.engines]), job.record["engines"])
        for batch in asked.batches or [0]:
            whole = _batched(feed, job.inputs, batch) if batch else feed
            timed = _timed(models, engines, whole, asked, progress)
            for number, found in enumerate(timed):
                row = {"model": found.name, "ms": found.ms, "low": found.low, "high": found.high, "runs": found.runs}
                row |= {"batch": batch or _first(whole), "memory": None}
                if number < len(paths):
                    row |= {"memory": _memory(paths[number], whole, asked.threads), **facts[number]}
                bench["rows"].append(row)
        if asked.nodes or asked.keep is not None:
            bench["nodes"] = _nodes(models, engines, feed, asked, progress)
    if asked.keep is not None:
        table = {"environment": job.record["environment"], "nodes": bench["nodes"]}
        table["files"] = [bench_table.of_model(name, path, bench["nodes"][name]) for name, path in models.items()]
        of = dict(zip(built, paths, strict=False))
        for name, path in engines.items():
            told = next(one for one in job.record["engines"] if one["path"] == str(path))
            model = of.get(path) or _closest({node for kernel in told["kernels"] for node in kernel["nodes"]}, paths)[0]
            table["files"].append(bench_table.of_engine(name, model, told, bench["nodes"][name]))
        with files.writing(asked.keep) as file:
            file.write(json.dumps({"schema": 1, **table}, indent=1).encode())
    job.record["bench"] = bench
    return job.record


def _built(job: Job, paths: Sequence[Path], sm: int, feed: Feed, folder: Path) -> list[Path]:
    """An engine of every model for the shapes of a feed; the record gets what their plans tell."""
    found = []
    for number, path in enumerate(paths):
        own = Job("bench", path, job.progress, job.source)
        own.calibration = open_data([{s.name: feed[s.name] for s in own.inputs if s.name in feed}], own.inputs)
        (folder / str(number)).mkdir()
        found.append(folder / str(number) / f"{path.stem}.sm{sm}.engine")
        own.build(path, found[-1], sm, {})
        job.record["engines"] += own.record["engines"]
        job.warn(*own.record["warnings"])
    return found


def _told(engine: Path, paths: Sequence[Path], feed: Feed) -> dict[str, Any]:
    """The record of a file that was built before, from the one of the models whose nodes it names most of."""
    try:
        size = engine.stat().st_size
    except OSError as error:
        raise UsageError(
            f"{engine} cannot be read ({error.strerror})", "Give an engine that build has written"
        ) from None
    shapes = {name: values.shape for name, values in feed.items()}
    named = {node for kernel in read_plan(engine, {}, shapes).kernels for node in kernel.nodes}
    _, graph = _closest(named, paths)
    report = read_plan(engine, contractions(graph), shapes)
    return {
        "sm": report.sm,
        "path": str(engine),
        "bytes": size,
        "seconds": None,
        "backend": _PACKAGE if report.readable else "unknown",
        **engine_records.told(report, graph, report.sm),
    }


def _closest(named: Set[str], paths: Sequence[Path]) -> tuple[Path, gs.Graph]:
    """The model that has most of some nodes."""
    models = [(path, files.load(path)) for path in paths]
    return max(models, key=lambda one: len(named & {node.name for part in all_graphs(one[1]) for node in part.nodes}))


def _named(paths: Sequence[Path]) -> dict[str, Path]:
    """Paths by their names, or by the whole path where names are alike."""
    names = [path.name for path in paths]
    return dict(zip(names if len(set(names)) == len(names) else map(str, paths), paths, strict=True))


def _runnable(engines: dict[str, Path], records: Sequence[dict[str, Any]]) -> tuple[dict[str, Path], str]:
    """The engines that the GPU of this machine runs, and why it does not run the others."""
    sm, reason = tensorrt.local_gpu()
    if sm is None:
        return {}, reason if engines else ""
    own = [record["sm"] in (None, sm) for record in records]
    found = {name: path for (name, path), fits in zip(engines.items(), own, strict=True) if fits}
    return found, "" if all(own) else f"the GPU of this machine has SM {sm}"


def _timed(
    models: dict[str, Path], engines: dict[str, Path], feed: Feed, asked: Bench, progress: Progress
) -> list[Latency]:
    """The latencies of models, then of engines, all in turns."""
    with contextlib.ExitStack() as stack:
        sessions = {name: Session(path, threads=asked.threads, timed=True) for name, path in models.items()}
        runs: dict[str, Any] = {name: functools.partial(s.run, s.accepted(feed)) for name, s in sessions.items()}
        for name, path in engines.items():
            session = stack.enter_context(EngineSession(path, _package(path)))
            runs[name] = functools.partial(session.timed, feed)
        return latencies(runs, rounds=asked.rounds, progress=progress)


def _package(engine: Path) -> str:
    """The package that has built an engine: only the plans of one of them are readable."""
    return _PACKAGE if read_plan(engine, {}).readable else "tensorrt"


def _nodes(
    models: dict[str, Path], engines: dict[str, Path], feed: Feed, asked: Bench, progress: Progress
) -> dict[str, list[dict[str, Any]]]:
    """By model and engine, the nodes or layers in the order in which they run, with their times."""
    timed = profiles(models, feed, threads=asked.threads, rounds=asked.rounds, progress=progress)
    found = {name: [{"name": n.name, "op": n.op, "ms": n.ms} for n in nodes] for name, nodes in timed.items()}
    for name, path in engines.items():
        with EngineSession(path, _package(path), layers=True) as session:
            layers = session.run(feed)
        pairs = zip(layers["names"].tolist(), layers["ms"].tolist(), strict=True)
        found[name] = [{"name": layer, "op": "layer", "ms": ms} for layer, ms in pairs]
    return found


def _facts(path: Path) -> dict[str, Any]:
    graph = files.load(path)
    return {**inspection.costs(graph), "bytes": model_facts(path, graph)["bytes"], "weights": weight_bytes(graph)}


def weight_bytes(graph: gs.Graph) -> dict[str, int]:
    """The bytes of the constants of a graph and its subgraphs, by type, the most first."""
    found: dict[str, int] = {}
    tensors = {id(t): t for part in all_graphs(graph) for t in part.tensors().values() if isinstance(t, gs.Constant)}
    for tensor in tensors.values():
        kind = np.dtype(tensor.dtype)
        if kind.kind != "O":
            size = math.prod(tensor.shape) * bits(onnx.helper.np_dtype_to_tensor_dtype(kind)) // 8
            found[str(kind)] = found.get(str(kind), 0) + size
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _batched(feed: Feed, inputs: Sequence[TensorSpec], batch: int) -> Feed:
    """The feed with its first sample repeated. Raises UsageError where the model fixes another batch."""
    for spec in inputs:
        if not spec.shape or spec.shape[0] == batch or not isinstance(spec.shape[0], int):
            continue
        raise UsageError(f"--batch {batch}: the model takes {spec}", "Export it with an open batch axis")
    open_ones = {spec.name for spec in inputs if spec.shape and not isinstance(spec.shape[0], int)}
    return {n: np.repeat(values[:1], batch, axis=0) if n in open_ones else values for n, values in feed.items()}


def _first(feed: Feed) -> int:
    return next((len(values) for values in feed.values() if values.ndim), 1)


def _memory(path: Path, feed: Feed, threads: int | None) -> int | None:
    """Peak bytes of a process that runs a model, without what Python and ONNX Runtime take by themselves."""
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(peak, str(path), feed, threads).result()
    except (OSError, RuntimeError, ImportError) as error:
        raise DataError(f"The memory of {path.name} cannot be measured ({error})") from None


def peak(path: str, feed: Feed, threads: int | None) -> int:
    """Peak bytes that opening and running a model adds to this process."""
    from channelfold.runtime.io.session import onnxruntime

    onnxruntime()
    before = _peak()
    session = Session(path, threads=threads, timed=True)
    session.run(session.accepted(feed))
    return _peak() - before


def _peak() -> int:
    """The most bytes that this process ever had in memory. On Linux getrusage counts those of its parent too."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    import resource  # which Windows lacks

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
