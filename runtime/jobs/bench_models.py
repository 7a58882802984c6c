"""The job of the command bench: models timed in turns in ONNX Runtime, their memory, their weights by type."""

from __future__ import annotations

import functools
import math
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from channelfold.runtime.data.probes import random_data
from channelfold.runtime.errors import DataError, UsageError
from channelfold.runtime.io import files
from channelfold.runtime.io.convert import all_graphs
from channelfold.runtime.io.facts import model_facts
from channelfold.runtime.io.session import Feed, Session, TensorSpec
from channelfold.runtime.io.weights import bits
from channelfold.runtime.jobs import inspect_model as inspection
from channelfold.runtime.jobs.job import Job, Progress, Record, Source
from channelfold.runtime.stats.bench import latencies


def run(
    paths: Sequence[Path], batches: Sequence[int], threads: int | None, rounds: int, source: Source, progress: Progress
) -> Record:
    """The record of a measurement: see ``jobs.bench``."""
    job = Job("bench", paths[0], progress, source)
    data = job.open("evaluation", source.evaluation)
    feed = next(iter(data if data is not None else random_data(job.inputs, 1, seed=source.seed)))
    rows: list[dict[str, Any]] = []
    facts = [_facts(path) for path in paths]
    names = list(map(str, paths)) if len({path.name for path in paths}) < len(paths) else [path.name for path in paths]
    for batch in batches or [0]:
        whole = _batched(feed, job.inputs, batch) if batch else feed
        sessions = {name: Session(path, threads=threads) for name, path in zip(names, paths, strict=True)}
        runs = {name: functools.partial(s.run, s.accepted(whole)) for name, s in sessions.items()}
        timed = latencies(runs, rounds=rounds, progress=progress)
        del runs, sessions
        for found, path, fact in zip(timed, paths, facts, strict=True):
            size = {"batch": batch or _first(whole), "memory": _memory(path, whole, threads)}
            rows.append({"model": found.name, "ms": found.ms, "low": found.low, "high": found.high, **size, **fact})
            rows[-1]["runs"] = found.runs
    job.record["bench"] = {"threads": threads, "rows": rows}
    return job.record


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
    session = Session(path, threads=threads)
    session.run(session.accepted(feed))
    return _peak() - before


def _peak() -> int:
    """The most bytes that this process ever had in memory. On Linux getrusage counts those of its parent too."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    import resource  # which Windows lacks

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
