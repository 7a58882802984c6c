"""How far a compressed model's outputs are from the original's, in one streaming pass over evaluation data.

The figures (SNR, cosine, relative L2, max and mean error) are defined in metrics.py.

Argmax agreement is the share of positions whose largest element along the last axis has the same index. It is given for
floating outputs of rank 2 and 3 with two or more elements on that axis: class scores and token logits. From rank 4 on
the last axis is a row of pixels or a head's channels, where an argmax means nothing.

Positions that the mask of a text leaves out do not count, in outputs that have (samples, tokens, channels).
"""

from __future__ import annotations

import array
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from channelfold.runtime.data.sources import Data
from channelfold.runtime.errors import GateError, UsageError, no_progress
from channelfold.runtime.io.session import Feed
from channelfold.runtime.io.weights import Scratch, out_of_memory
from channelfold.runtime.stats.metrics import ErrorSums, counted, is_float
from channelfold.runtime.stats.samples import Worst, spread

COLLAPSED_SNR, DEGRADED_SNR = 10.0, 20.0  # dB
COLLAPSED_AGREEMENT, DEGRADED_AGREEMENT = 0.5, 0.95


_HELD = 1 << 26  # bytes of outputs that are held, large ones in a file


class Runner(Protocol):
    """A model that maps a feed to outputs by name: a Session, an engine."""

    def run(self, feed: Feed, /) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class OutputComparison:
    """Figures of one output, or of one element of an output that is a sequence or a map.

    Floating outputs have the figures ``snr`` (dB) to ``agreement``, other outputs have ``equal``, the share of equal
    elements. A figure that does not apply is None.
    ``mismatches`` counts feeds that could not be compared because shape or type differ, and ``mismatch`` describes the
    first of these feeds. ``worst_sample`` is the index of the feed with the lowest SNR, and ``worst_snr`` this SNR in
    dB; both are None when all feeds are equal.
    """

    name: str
    feeds: int
    elements: int
    snr: float | None = None
    cosine: float | None = None
    relative_l2: float | None = None
    max_error: float | None = None
    mean_error: float | None = None
    max_reference: float | None = None
    agreement: float | None = None
    equal: float | None = None
    worst_sample: int | None = None
    worst_snr: float | None = None
    reference_nan: int = 0
    reference_inf: int = 0
    candidate_nan: int = 0
    candidate_inf: int = 0
    mismatches: int = 0
    mismatch: str = ""


@dataclass(frozen=True)
class Comparison:
    """The result of ``compare``. ``missing`` outputs are in the reference alone, ``extra`` ones in the candidate.

    ``spread``: how the SNR of an output is spread over the feeds, by its name, see ``samples.spread``. ``worst``: the
    feeds with the lowest SNR of any output, see ``samples.Worst``.
    """

    outputs: tuple[OutputComparison, ...]
    feeds: int
    data: str
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    spread: Mapping[str, Any] = field(default_factory=dict)
    worst: Sequence[Mapping[str, Any]] = ()

    def to_json(self) -> dict[str, Any]:
        """A plain dict, valid as JSON (infinities are the strings "inf" and "-inf"), with the verdict in it."""
        outputs = [{k: json_number(v) for k, v in dataclasses.asdict(output).items()} for output in self.outputs]
        found = verdict(self)
        return {
            "data": self.data,
            "feeds": self.feeds,
            "outputs": outputs,
            "missing": list(self.missing),
            "extra": list(self.extra),
            "spread": json_number(self.spread),
            "worst": json_number(self.worst),
            "verdict": {"level": found.level, "reasons": list(found.reasons)},
        }


def json_number(value: Any) -> Any:
    """Replaces the floats that JSON cannot write: infinities by "inf" and "-inf", NaN by None."""
    if isinstance(value, Mapping):
        return {key: json_number(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_number(item) for item in value]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if math.isnan(value) else str(value)


def compare(
    reference: Runner, candidate: Runner, data: Data, progress: Callable[[str, int, int], None] = no_progress
) -> Comparison:
    """Runs both models on every feed and compares all outputs. Memory holds one feed's outputs at a time."""
    return compare_all(reference, [candidate], data, progress)[0]


def compare_all(
    reference: Runner,
    candidates: Sequence[Runner],
    data: Data,
    progress: Callable[[str, int, int], None] = no_progress,
) -> list[Comparison]:
    """Compares several candidates with one reference, which runs once on every feed."""
    mask = next((spec.name for spec in data.inputs if spec.meaning and spec.meaning.kind == "mask"), "")
    found = [_Comparing(mask) for _ in candidates]
    for index, feed in enumerate(data):
        progress("compare", index, len(data))
        expected = _leaves(reference.run(feed))
        for candidate, comparing in zip(candidates, found, strict=True):
            comparing.add(index, feed, expected, _leaves(candidate.run(feed)))
    progress("compare", len(data), len(data))
    return [comparing.result(data) for comparing in found]


def remembered(model: Runner, data: Data) -> Runner | None:
    """The model's outputs on all feeds, in their order, so that the model can be closed; None where they are large."""
    found, files = list[Mapping[str, Any]](), Scratch()
    for feed in data:
        found.append(out_of_memory(files, model.run(feed)))
        if sum(getattr(value, "nbytes", _HELD) for value in found[0].values()) * len(data) > _HELD:
            return None
    return _Known(iter(found))


@dataclass(frozen=True)
class _Known:
    """The outputs on some feeds, which come in their order."""

    outputs: Iterator[Mapping[str, Any]]

    def run(self, _: Feed) -> Mapping[str, Any]:
        return next(self.outputs)


class _Comparing:
    """The running comparison of all outputs."""

    def __init__(self, mask: str) -> None:
        self.mask = mask
        self.trackers: dict[str, _Tracker] = {}
        self.missing: dict[str, None] = {}
        self.extra: dict[str, None] = {}
        self.worst = Worst()

    def add(self, index: int, feed: Feed, expected: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> None:
        self.missing |= dict.fromkeys(name for name in expected if name not in found)
        self.extra |= dict.fromkeys(name for name in found if name not in expected)
        both = [name for name in expected if name in found]
        mask, ratios = feed.get(self.mask), {}
        for name in both:
            pair = (counted(outputs[name], mask) for outputs in (expected, found))
            ratios[name] = self.trackers.setdefault(name, _Tracker()).add(index, *pair)
        if ratios:
            lowest = min(ratios, key=ratios.__getitem__)
            self.worst.add(index, lowest, ratios[lowest], feed)

    def result(self, data: Data) -> Comparison:
        outputs = tuple(tracker.result(name) for name, tracker in self.trackers.items())
        missing, extra = tuple(self.missing), tuple(self.extra)
        spreads = {name: found for name, one in self.trackers.items() if (found := spread(one.ratios))}
        return Comparison(outputs, len(data), data.description, missing, extra, spreads, self.worst.found)


class _Tracker:
    """The running comparison of one output."""

    def __init__(self) -> None:
        self.feeds = self.mismatches = 0
        self.mismatch = ""
        self.sums: ErrorSums | None = None
        self.ratios = array.array("d")
        self.worst: tuple[float, int | None] = math.inf, None
        self.positions = self.agreed = 0
        self.elements = self.equal = 0

    def add(self, index: int, reference: np.ndarray, candidate: np.ndarray) -> float:
        """Takes up the output of one feed; its SNR, infinite where it has none."""
        self.feeds += 1
        if mismatch := _mismatch(reference, candidate):
            self.mismatches += 1
            self.mismatch = self.mismatch or f"{mismatch} (feed {index})"
        elif is_float(reference):
            return self._add_float(index, reference, candidate)
        else:
            self.elements += reference.size
            self.equal += int(np.count_nonzero(reference == candidate))
        return math.inf

    def _add_float(self, index: int, reference: np.ndarray, candidate: np.ndarray) -> float:
        sums = ErrorSums.of(reference, candidate)
        self.ratios.append(sums.snr)
        if sums.snr < self.worst[0]:
            self.worst = sums.snr, index
        self.sums = self.sums or ErrorSums()
        self.sums.add(sums)
        if reference.ndim in (2, 3) and reference.shape[-1] >= 2:
            agreed = reference.argmax(axis=-1) == candidate.argmax(axis=-1)
            self.positions += agreed.size
            self.agreed += int(np.count_nonzero(agreed))
        return sums.snr

    def result(self, name: str) -> OutputComparison:
        common = {"mismatches": self.mismatches, "mismatch": self.mismatch}
        if self.sums is None:
            equal = self.equal / self.elements if self.elements else float(not self.mismatches)
            return OutputComparison(name, self.feeds, self.elements, equal=equal, **common)
        worst_snr, worst_sample = self.worst
        figures = {field.name for field in dataclasses.fields(OutputComparison) if hasattr(self.sums, field.name)}
        return OutputComparison(
            name,
            self.feeds,
            agreement=self.agreed / self.positions if self.positions else None,
            worst_sample=worst_sample,
            worst_snr=worst_snr if worst_sample is not None else None,
            **{figure: getattr(self.sums, figure) for figure in figures},
            **common,
        )


def _leaves(outputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """All values as arrays by name: element 2 of the sequence ``boxes`` is ``boxes[2]``. None stays, as an object."""
    leaves = {}
    for name, value in outputs.items():
        if isinstance(value, list | tuple):
            leaves |= _leaves({f"{name}[{index}]": item for index, item in enumerate(value)})
        elif isinstance(value, Mapping):
            leaves |= _leaves({f"{name}[{key}]": item for key, item in value.items()})
        else:
            leaves[name] = np.asarray(value, dtype=object if isinstance(value, str) else None)
    return leaves


def _mismatch(reference: np.ndarray, candidate: np.ndarray) -> str:
    """Why two arrays cannot be compared element by element. Floats of different width can."""
    if reference.shape != candidate.shape:
        return f"shape {reference.shape} became {candidate.shape}"
    if reference.dtype != candidate.dtype and not (is_float(reference) and is_float(candidate)):
        return f"{reference.dtype} became {candidate.dtype}"
    return ""


class Verdict(NamedTuple):
    level: Literal["ok", "degraded", "collapsed"]
    reasons: tuple[str, ...]


def verdict(comparison: Comparison) -> Verdict:
    """Whether the candidate can still stand for the reference.

    ``collapsed``: an output is missing, has NaN or Inf that the reference has not, has another shape in every feed, has
    an SNR below 10 dB, or less than half of its argmaxes (where the SNR is below 20 dB) or integers agree.
    ``degraded``: an output has an SNR below 20 dB, less than 95 % of its argmaxes or integers agree, or its shape
    differs in some feeds. Else ``ok``.

    The argmax of a flat output flips while hardly anything changed, so above 20 dB it degrades and does not collapse.
    """
    collapsed = [f"{name}: the output is missing" for name in comparison.missing]
    degraded: list[str] = []
    for output in comparison.outputs:
        for is_collapse, reason in _findings(output):
            (collapsed if is_collapse else degraded).append(f"{output.name}: {reason}")
    level = "collapsed" if collapsed else "degraded" if degraded else "ok"
    return Verdict(level, (*collapsed, *degraded))


SATURATES = 1.0  # dB between exact arithmetic and this machine; from here on the machine is the cause


def saturation(run: Comparison, exact: Comparison) -> str:
    """A sentence on the outputs that lose more to the arithmetic of this machine than to the file; "" without any."""
    pairs = [(here, there) for here in run.outputs for there in exact.outputs if here.name == there.name]
    lost = [
        f"{here.name} has {here.snr:.1f} dB as this machine runs the file, and {there.snr:.1f} dB in exact arithmetic"
        for here, there in pairs
        if here.snr is not None and there.snr is not None and here.snr < there.snr - SATURATES
    ]
    if not lost:
        return ""
    return (
        f"{'; '.join(lost)}. This processor (x86 without VNNI) adds pairs of uint8 x int8 products in 16 bits, which "
        "saturates. Weights of 7 bits (--reduce-range on) do not; processors with VNNI, and ARM, give the exact figure "
        "as it is"
    )


def _findings(output: OutputComparison) -> Iterator[tuple[bool, str]]:
    if output.mismatches:
        share = f"in {output.mismatches} of {output.feeds} feeds"
        yield output.mismatches == output.feeds, f"{output.mismatch}, {share}"
    if output.snr is not None and output.max_error == math.inf:
        here, there = (output.candidate_nan, output.candidate_inf), (output.reference_nan, output.reference_inf)
        yield True, "{} NaN and {} Inf, where the reference has {} and {}".format(*here, *there)
    elif output.snr is not None and output.snr < DEGRADED_SNR:
        yield output.snr < COLLAPSED_SNR, f"SNR {output.snr:.1f} dB"
    if output.agreement is not None and output.agreement < DEGRADED_AGREEMENT:
        flat = output.snr is not None and output.snr >= DEGRADED_SNR
        yield output.agreement < COLLAPSED_AGREEMENT and not flat, f"argmax agreement {output.agreement:.1%}"
    if output.equal is not None and output.elements and output.equal < DEGRADED_AGREEMENT:
        yield output.equal < COLLAPSED_AGREEMENT, f"{output.equal:.1%} equal"


@dataclass(frozen=True)
class Gates:
    """Bounds on every output; None is no bound. SNR in dB, the others between 0 and 1 (agreement 0.99 is 99 %).

    ``min_agreement`` holds for argmax agreement and, in outputs that are not floating, for the share of equal elements.
    ``max_rel`` bounds relative L2. Raises UsageError for a bound that nothing could meet.
    """

    min_snr: float | None = None
    min_cosine: float | None = None
    min_agreement: float | None = None
    max_rel: float | None = None

    def __post_init__(self) -> None:
        for name in ("min_cosine", "min_agreement"):
            value = getattr(self, name)
            if value is not None and value > 1:
                raise UsageError(f"{name} is {value:g}, and can be 1 at most", f"For a percentage give {value / 100:g}")
        if self.max_rel is not None and self.max_rel < 0:
            raise UsageError(f"max_rel is {self.max_rel:g}, and cannot be negative", "Give a bound such as 0.05")


@dataclass(frozen=True)
class Gate:
    """One bound on one output; ``output`` is "" where no output has the figure. ``found`` and ``wanted`` are words."""

    gate: str
    output: str
    value: float | None
    found: str
    wanted: str
    met: bool


def gates_of(comparison: Comparison, gates: Gates) -> list[Gate]:
    """Every bound on every output that has its figure."""
    return [
        *_bounded(comparison, "SNR", lambda o: o.snr, "{:.2f} dB", at_least=gates.min_snr),
        *_bounded(comparison, "cosine", lambda o: o.cosine, "{:.6f}", at_least=gates.min_cosine),
        *_bounded(comparison, "agreement", _agreement, "{:.2%}", at_least=gates.min_agreement),
        *_bounded(comparison, "relative L2", lambda o: o.relative_l2, "{:.3g}", at_most=gates.max_rel),
    ]


def check_gates(comparison: Comparison, gates: Gates) -> None:
    """Raises GateError with every missed gate. A gate is missed as well when no output has its figure."""
    if gates == Gates():
        return
    missed = [
        *(f"{name} is missing" for name in comparison.missing),
        *(f"{output.name} has {output.mismatch}" for output in comparison.outputs if output.mismatches),
        *(_why_missed(gate) for gate in gates_of(comparison, gates) if not gate.met),
    ]
    if missed:
        raise GateError(
            f"The accuracy gate was missed: {'; '.join(missed)}", "Keep more of the model in float, or lower the gate"
        )


def _agreement(output: OutputComparison) -> float | None:
    return output.equal if output.agreement is None else output.agreement


def _bounded(
    comparison: Comparison,
    gate: str,
    figure: Callable[[OutputComparison], float | None],
    form: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Iterator[Gate]:
    if at_least is None and at_most is None:
        return
    low, high = -math.inf if at_least is None else at_least, math.inf if at_most is None else at_most
    wanted = f"at least {form.format(low)}" if at_most is None else f"at most {form.format(high)}"
    measured = [(output.name, value) for output in comparison.outputs if (value := figure(output)) is not None]
    if not measured:
        yield Gate(gate, "", None, "no figure", wanted, False)
    for name, value in measured:
        yield Gate(gate, name, value, form.format(value), wanted, low <= value <= high)


def _why_missed(gate: Gate) -> str:
    if not gate.output:
        return f"no output has a figure for {gate.gate}"
    return f"{gate.output} has {gate.gate} {gate.found}, wanted {gate.wanted}"


class Difference(NamedTuple):
    """The largest relative error over all outputs, and its place in words. Outputs that do not match have inf."""

    error: float
    where: str


def difference(reference: Mapping[str, Any], candidate: Mapping[str, Any]) -> Difference:
    """The error of one run's outputs against another's: max |r - c| / max |r| of the worst output.

    The error is infinite where dtypes, shapes, the positions of NaN and Inf, or values that are not floats differ.
    """
    expected, found = _leaves(reference), _leaves(candidate)
    if expected.keys() != found.keys():
        return Difference(math.inf, f"the outputs are {', '.join(found)}, and were {', '.join(expected)}")
    worst = Difference(0.0, "nothing differs")
    for name in expected:
        error, how = _error(expected[name], found[name])
        if error > worst.error:
            worst = Difference(error, f"{name!r} {how}")
    return worst


def _error(reference: np.ndarray, candidate: np.ndarray) -> tuple[float, str]:
    if reference.dtype != candidate.dtype:
        return math.inf, f"changed: {reference.dtype} became {candidate.dtype}"
    if mismatch := _mismatch(reference, candidate):
        return math.inf, f"changed: {mismatch}"
    if not is_float(reference):
        different = np.count_nonzero(reference != candidate)
        return (math.inf, f"differs in {different} of {reference.size} elements") if different else (0.0, "")
    sums = ErrorSums.of(reference, candidate)
    if sums.differing:
        return math.inf, f"has NaN or Inf in other places ({sums.differing} of {sums.elements})"
    if sums.max_error == 0:
        return 0.0, ""
    if sums.max_reference == 0:
        return math.inf, f"was zero everywhere and reaches {sums.max_error:.2g}"
    error = sums.max_error / sums.max_reference
    return error, f"is off by {error:.2g} of its largest magnitude, {sums.max_reference:.3g}"


def same(reference: Mapping[str, Any], candidate: Mapping[str, Any], rtol: float) -> str | None:
    """None when two runs gave the same outputs (``difference`` of at most ``rtol``), else the reason in one line."""
    error, where = difference(reference, candidate)
    return None if error <= rtol else f"{where} (allowed: {rtol:.2g})" if math.isfinite(error) else where
