"""The proof that an exact pass is exact: the outputs of the graph before and after the pass, on probe inputs.

Probes are up to two samples of the available data and one random feed of the same shapes. Without data, probes are two
random feeds, of two sizes where the model leaves sizes open; a model of more than 1 GB then has no probes. In place of
random feeds a decoder with a cache has the nine steps of a rollout (``runtime.data.probes``). ONNX Runtime runs both
graphs without optimization, node by node, so that its own fusions neither hide nor cause a difference.

The error of an output is max |before - after| / max |before|. The limit is the tolerance of the coarsest float type in
the graph. Integers, and the places of NaN and Inf, must be the same.

Where an output exceeds the tolerance, the verifier compares every tensor that both graphs know by name. It follows the
error back from the output, through tensors that differ, to the first such tensor whose writer the pass has changed. A
tensor that a fold rewrites on purpose, as in Conv -> BatchNormalization, is not on this path, because the tensors after
it agree again. Where the path ends at an unchanged node, that node has amplified a smaller error, and the search goes
on with a smaller threshold.

A model can amplify rounding past the tolerance (a decoder does on a random sequence of two tokens). An output may also
differ by four times the change that one unit in the last place of every original weight makes.

Rounding alone can move a value over an edge (ArgMax, Greater, Round ...). An output does not count as an error of the
pass where every path ends at such an unchanged node whose inputs agree within the tolerance.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import onnx

from channelfold.runtime.data.probes import SAMPLES, STEPS, random_feeds, rollout_results, rolls
from channelfold.runtime.data.sources import Data
from channelfold.runtime.errors import DataError, ModelError, VerificationError
from channelfold.runtime.io.facts import with_meanings
from channelfold.runtime.io.names import reads
from channelfold.runtime.io.session import Feed, Session
from channelfold.runtime.io.snapshot import Snapshot
from channelfold.runtime.io.weights import packed_nbytes
from channelfold.runtime.stats.compare import Difference, difference

LARGE = 1_000_000_000  # bytes of weights; running such a model takes minutes and many times its size in memory

# Folds of trained networks reach 2e-5 in float32 and 5e-3 in float16 (BatchNormalization into Conv, layer scale into
# MatMul), and 1e-6 and 5e-4 in most. bfloat16 has an eighth of float16's resolution.
_TYPE = onnx.TensorProto
TOLERANCES: dict[int, float] = {_TYPE.DOUBLE: 1e-9, _TYPE.FLOAT: 1e-4, _TYPE.FLOAT16: 2e-2, _TYPE.BFLOAT16: 1e-1}

# Where a rounding error becomes a step. How two runs are compared decides this, not the table of operators.
_EDGES = {
    "ArgMax", "ArgMin", "BitShift", "Cast", "CastLike", "Ceil", "DynamicQuantizeLinear", "Equal", "Floor", "Greater",
    "GreaterOrEqual", "Hardmax", "Less", "LessOrEqual", "Mod", "NonMaxSuppression", "NonZero", "QuantizeLinear",
    "Round", "Sign", "TopK", "Unique",
}  # fmt: skip
AMPLIFIED = 4  # an output may differ by this multiple of the change that rounding the weights causes
_FETCHED = 256  # tensors that are fetched in one run
_COMPARABLE = {
    _TYPE.UNDEFINED, _TYPE.FLOAT, _TYPE.DOUBLE, _TYPE.FLOAT16, _TYPE.BOOL, _TYPE.INT8, _TYPE.INT16, _TYPE.INT32,
    _TYPE.INT64, _TYPE.UINT8, _TYPE.UINT16, _TYPE.UINT32, _TYPE.UINT64,
}  # fmt: skip

_WANTED = "calibration data would be used as probes"

Outputs = dict[str, Any]


class Violation(VerificationError):
    """The graphs differ. ``tensor`` is the first that does, ``node`` writes it, ``error`` is its relative error."""

    def __init__(self, message: str, tensor: str, node: str, error: float):
        super().__init__(message)
        self.tensor, self.node, self.error = tensor, node, error


@dataclass(frozen=True)
class Verdict:
    """The record of the verification of a step for the report, and a warning or ""."""

    record: dict[str, Any]
    warning: str = ""


class _NoProbe(Exception):
    """The reason why a model cannot be verified."""


class Verifier:
    """Verifies one step after another. The outputs of a graph are kept as the reference of the next step."""

    def __init__(self, probes: Data | None = None, seed: int = 0):
        self._probes = probes
        self._seed = seed
        self._feeds: list[Feed] = []
        self._reference: list[Outputs] = []
        self._of: Snapshot | None = None
        self._hopeless = ""

    @property
    def feeds(self) -> Data:
        """The probes on which the model runs."""
        return Data([], len(self._feeds), lambda: iter(self._feeds), "probes")

    def verify(self, before: Snapshot, after: Snapshot) -> Verdict:
        """Raises Violation where ``after`` computes another function than ``before``, or cannot run."""
        started = time.perf_counter()
        try:
            self._refer_to(before)
            try:
                found = _run(after.session(), self._feeds)
            except ModelError as error:
                raise Violation(f"ONNX Runtime cannot run the graph any more: {error}", "", "", math.inf) from None
            tolerance = tolerance_of(before.model, before.weights)
            compared = [self._compare(index, before, after, outputs, tolerance) for index, outputs in enumerate(found)]
        except _NoProbe as reason:
            return Verdict({"unverified": str(reason)}, f"not verified: {reason}")
        self._reference, self._of = found, after
        seconds, worst = time.perf_counter() - started, max(error for error, _ in compared)
        record = {"max_rel_error": worst, "tolerance": tolerance, "probes": len(found), "seconds": seconds}
        return Verdict(record, next((warning for _, warning in reversed(compared) if warning), ""))

    def _compare(
        self, index: int, before: Snapshot, after: Snapshot, outputs: Outputs, tolerance: float
    ) -> tuple[float, str]:
        """(the largest error on a probe that counts as rounding, a warning or ""). Raises Violation."""
        errors = _errors(self._reference[index], outputs)
        off = [name for name, (error, _) in errors.items() if error > tolerance]
        worst = max((error for name, (error, _) in errors.items() if name not in off), default=0.0)
        if not off:
            return worst, ""
        said = f"output {errors[off[0]].where} (allowed: {tolerance:.0e}) on probe {index + 1} of {len(self._feeds)}"
        noise = self._noise(before, index)
        if all(math.isfinite(n := noise.get(name, 0.0)) and errors[name][0] <= AMPLIFIED * n for name in off):
            changes = f"it changes by {noise[off[0]]:.2g} when the original weights are rounded otherwise"
            return max(worst, *(errors[name][0] for name in off)), f"{said}; there {changes}"
        edge = _trace(before, after, self._feeds[index], off, tolerance, said)
        return worst, f"{said}, because rounding moved {edge} over an edge; whether anything else changed is not known"

    def _noise(self, graph: Snapshot, index: int) -> dict[str, float]:
        """The error of each output on a probe where every weight of ``graph`` is off by a unit in the last place."""
        if _size(graph) > LARGE:
            return {}
        try:
            (found,) = _run(graph.rounded_otherwise(self._seed), [self._feeds[index]])
        except ModelError:
            return {}
        return {name: error for name, (error, _) in _errors(self._reference[index], found).items()}

    def _refer_to(self, graph: Snapshot) -> None:
        """Runs ``graph`` on the probes, unless its outputs are known. Raises _NoProbe."""
        if self._hopeless:
            raise _NoProbe(self._hopeless)
        if self._of is graph:
            return
        size = _size(graph)
        if self._probes is None and size > LARGE:
            self._hopeless = f"a model of {size / 1e9:.1f} GB is not run on random inputs; {_WANTED}"
            raise _NoProbe(self._hopeless)
        try:
            session = graph.session()
            if self._feeds:
                self._reference = _run(session, self._feeds)
            else:
                self._feeds, self._reference = self._choose(graph, session)
        except (ModelError, _NoProbe) as error:
            hint = "" if self._probes is not None else f"; {_WANTED}"
            self._hopeless = f"the model cannot be run on any probe: {error}{hint}"
            raise _NoProbe(self._hopeless) from None
        self._of = graph

    def _choose(self, graph: Snapshot, session: Session) -> tuple[list[Feed], list[Outputs]]:
        """(feeds on which the model runs and gives finite numbers, the outputs for these feeds)."""
        inputs = with_meanings(graph.graph(), session.inputs)
        reasons: list[str] = []
        samples = list(_running(session, islice(self._probes or (), SAMPLES), SAMPLES, reasons))
        shapes = samples[0][0] if samples else None
        wanted = 1 + STEPS if rolls(inputs) else 1 if samples else SAMPLES
        try:
            samples += _running(session, random_feeds(inputs, self._seed, shapes, session.run), wanted, reasons)
        except DataError as error:
            reasons.append(str(error))
        if not samples:
            raise _NoProbe(reasons[0] if reasons else "its outputs hold no finite numbers")
        return [feed for feed, _ in samples], [outputs for _, outputs in samples]


def verify_rollout(before: Snapshot, after: Snapshot) -> Verdict:
    """The comparison of two decoders on a rollout, each with the cache that the decoder itself returned.

    The caches themselves are not compared. Raises Violation.
    """
    started, runs = time.perf_counter(), []
    if _size(before) > LARGE:
        return Verdict({"unverified": "the model is large"}, "not verified: the model is large")
    for graph in (before, after):
        session = graph.session()
        inputs = with_meanings(graph.graph(), session.inputs)
        runs.append(list(rollout_results(inputs, session.run)))
    presents = {spec.meaning.present for spec in inputs if spec.meaning}
    if len(runs[0]) != len(runs[1]):
        raise Violation(f"step {len(runs[1]) + 1} of a rollout does not run any more", "", "", math.inf)
    if len(runs[0]) <= STEPS:
        return Verdict({"unverified": "no rollout runs"}, "not verified: the model does not run a rollout")
    tolerance = TOLERANCES[_TYPE.FLOAT] / 10 if tolerance_of(before.model, before.weights) <= 1e-4 else 2e-2
    worst = 0.0
    for number, (reference, found) in enumerate(zip(*runs, strict=True), 1):
        kept = {name: values for name, values in reference.items() if name not in presents}
        for name, (error, where) in _errors(kept, found).items():
            worst = max(worst, error)
            if error > tolerance:
                said = f"output {where} (allowed: {tolerance:.0e}) in step {number} of a rollout"
                raise Violation(said, name, "", error)
    seconds = time.perf_counter() - started
    return Verdict({"max_rel_error": worst, "tolerance": tolerance, "probes": len(runs[0]), "seconds": seconds})


def tolerance_of(model: onnx.ModelProto, weights: tuple[onnx.TensorProto, ...] = ()) -> float:
    """The tolerance of the coarsest float type in a graph; that of float32 where the graph has no float type."""
    graph = model.graph
    types = {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)}
    types |= {proto.data_type for proto in (*graph.initializer, *weights)}
    return max((TOLERANCES[t] for t in types if t in TOLERANCES), default=TOLERANCES[_TYPE.FLOAT])


def _running(
    session: Session, feeds: Iterable[Feed], wanted: int, reasons: list[str]
) -> Iterator[tuple[Feed, Outputs]]:
    pending = iter(feeds)
    while wanted:
        try:
            feed = next(pending)
        except StopIteration:
            return
        except ModelError as error:  # what reaches a body cannot be known
            reasons.append(str(error))
            return
        try:
            outputs = session.run(feed)
        except ModelError as error:
            reasons.append(str(error))
            continue
        if _has_numbers(outputs):
            wanted -= 1
            yield feed, outputs


def _run(session: Session, feeds: list[Feed]) -> list[Outputs]:
    return [session.run(feed) for feed in feeds]


def _size(graph: Snapshot) -> int:
    """Bytes of the weights."""
    return sum(packed_nbytes(proto) for proto in graph.weights)


def _errors(reference: Outputs, outputs: Outputs) -> dict[str, Difference]:
    """The error of each output."""
    return {name: difference({name: values}, {name: outputs[name]}) for name, values in reference.items()}


def _has_numbers(outputs: Outputs) -> bool:
    """Whether a comparison of the outputs means anything: they hold finite numbers, or no floats at all."""
    floats = [v for v in outputs.values() if isinstance(v, np.ndarray) and v.dtype.kind == "f"]
    return not floats or any(np.isfinite(v).any() for v in floats)


# ---- where two graphs part ---------------------------------------------------------------------------------------


def _trace(before: Snapshot, after: Snapshot, feed: Feed, off: list[str], tolerance: float, said: str) -> str:
    """The node at whose edge rounding matters for the outputs ``off``.

    Raises Violation, ``said`` first, where the pass has changed the first wrong tensor on the path to the outputs, and
    _NoProbe where ``before`` gives other outputs every time.
    """
    first, second = _run(before.session(), [feed, feed])
    if any(error > tolerance for name, (error, _) in _errors(first, second).items() if name in off):
        raise _NoProbe(f"the model itself gives other values of {off[0]!r} every time it runs")
    try:
        errors = _tensor_errors(before, after, feed)
    except ModelError:  # not every tensor can be made an output
        errors = {}
    errors |= dict.fromkeys(off, math.inf) | {name: errors[name] for name in off if name in errors}
    writers = {name: node for node in after.model.graph.node for name in node.output if name}
    old = {name: node for node in before.model.graph.node for name in node.output}
    culprit, by = off[0], onnx.NodeProto()
    for threshold in (tolerance, tolerance / 10, tolerance / 100, tolerance / 1000, 0.0):
        roots = _roots(after.model.graph, writers, _differing(writers, off, errors, threshold), errors)
        changed = [(name, node) for node, name in roots if not _unchanged(node, old.get(name), before, after)]
        if changed:
            culprit, by = changed[0]
            break
        if threshold == tolerance and roots and all(node.op_type in _EDGES for node, _ in roots):
            return f"{roots[0][0].op_type} {roots[0][0].name!r}"
    size = f"by {errors[culprit]:.2g}" if math.isfinite(errors[culprit]) else "beyond comparison"
    writer = f", which {by.op_type} {by.name!r} writes" if by.op_type else ""
    message = f"{said}; the first tensor that differs is {culprit!r} ({size}){writer}"
    raise Violation(message, culprit, by.name, errors[culprit])


def _roots(
    graph: onnx.GraphProto, writers: Mapping[str, onnx.NodeProto], differing: set[str], errors: Mapping[str, float]
) -> list[tuple[onnx.NodeProto, str]]:
    """(node, tensor) for the nodes, in order, that write a differing tensor and read no differing tensor."""
    found = []
    for node in graph.node:
        wrong = [name for name in node.output if name in differing]
        if wrong and not differing & _sources(node, writers, errors):
            found.append((node, wrong[0]))
    return found


def _tensor_errors(before: Snapshot, after: Snapshot, feed: Feed) -> dict[str, float]:
    """Relative errors of all tensors that both graphs compute, by name. One session at a time; values wait on disk."""
    kinds = {
        v.name: v.type.tensor_type.elem_type for v in before.model.graph.value_info if v.type.HasField("tensor_type")
    }
    there = {name for node in after.model.graph.node for name in node.output}
    common = [n for node in before.model.graph.node for n in node.output if n in there and n]
    common = [name for name in common if kinds.get(name, _TYPE.UNDEFINED) in _COMPARABLE]
    errors: dict[str, float] = {}
    with tempfile.TemporaryFile(prefix="channelfold-") as file:
        kept = []
        for name, value in _fetch(before, common, feed):
            if isinstance(value, np.ndarray) and not value.dtype.hasobject:
                np.save(file, value)
                kept.append(name)
        file.seek(0)
        for name, value in _fetch(after, kept, feed):
            errors[name] = difference({name: np.load(file)}, {name: value}).error
    return errors


def _fetch(graph: Snapshot, names: list[str], feed: Feed) -> Iterator[tuple[str, Any]]:
    session = graph.session(outputs=names)
    for start in range(0, len(names), _FETCHED):
        yield from session.run(feed, names[start : start + _FETCHED]).items()


def _differing(
    writers: Mapping[str, onnx.NodeProto], outputs: list[str], errors: Mapping[str, float], tolerance: float
) -> set[str]:
    """The tensors past the tolerance with a path to an output on which every tensor is past the tolerance."""
    found, pending = set(outputs), list(outputs)
    while pending:
        node = writers.get(pending.pop())
        sources = _sources(node, writers, errors) if node is not None else []
        fresh = {name for name in sources if errors[name] > tolerance} - found
        found |= fresh
        pending += fresh
    return found


def _sources(node: onnx.NodeProto, writers: Mapping[str, onnx.NodeProto], errors: Mapping[str, float]) -> set[str]:
    """The nearest tensors with a known error that a node depends on, also through subgraphs."""
    found, seen, pending = set(), set(), [node]
    while pending:
        for name in reads(pending.pop()):
            if name in errors:
                found.add(name)
            elif name in writers and name not in seen:
                seen.add(name)
                pending.append(writers[name])
    return found


def _unchanged(node: onnx.NodeProto, old: onnx.NodeProto | None, before: Snapshot, after: Snapshot) -> bool:
    """Whether a node has the same attributes, inputs and constants in both graphs, and so causes no error itself."""
    if old is None or (node.op_type, list(node.input)) != (old.op_type, list(old.input)):
        return False
    names = [name for name in reads(node) if name]
    return list(node.attribute) == list(old.attribute) and all(before.same_constant(after, name) for name in names)
