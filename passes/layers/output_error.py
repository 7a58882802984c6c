"""The error at the outputs of a network that a change in the middle of the network causes: the one measure of it.

    E = mean over outputs and samples s of  |y'(s) - y(s)|^2 / |y(s)|^2

``y`` is what a closing Softmax or Sigmoid reads; padded positions of a sequence, the caches of a decoder and constants
have no part in it. A small error of a layer reaches the outputs multiplied by a factor. The factor hardly depends on
the size of the error (5 % between 12 and 50 % of the channels of an FFN of a BERT removed) but strongly on the layer
(0.5 to 9 in this BERT). The errors of several layers add up: predicted 14.7 and 9.8 dB, measured 14.4 and 9.4. The
factor must be measured, because neither the energy of the output of a layer nor that of the residual stream predicts
it. The energies of every sample are kept, because one sample can hold most of them.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.layers.linear import Linear, cast
from channelfold.passes.operators import operator
from channelfold.runtime.data.sources import Data
from channelfold.runtime.io import edit
from channelfold.runtime.io.facts import required_inputs
from channelfold.runtime.io.files import free_name, session
from channelfold.runtime.io.meanings import meanings
from channelfold.runtime.io.session import Feed, Session
from channelfold.runtime.stats.metrics import counted

SAMPLES = 16  # evenly spaced, that outputs are compared on, or that are held out; fewer where outputs are large
BYTES = 1 << 28  # of the outputs of samples
_CLOSING = ("Softmax", "LogSoftmax", "Sigmoid", "HardSigmoid", "ArgMax", "ArgMin")
_ROUNDING = ("Cast", "QuantizeLinear", "DequantizeLinear")
_CONSTANT = 1e-12  # share of the energy of an output; a smaller variance is due to rounding
_SMALLEST = 1e-30
_QUIET = 10  # a sample counts as if its output had at least the mean energy divided by this
_SHARE = 5  # at most one sample in five is held out


@dataclass
class Errors:
    """Of every sample and output: ``energy`` of the float output, and for every configuration what is ``lost`` of it.

    ``agreed``: the share of positions whose largest element is the same, NaN where that means nothing. ``energy``
    (samples, outputs), the others (configurations, samples, outputs). ``right``: whether the class is right, of float
    and then of every configuration, (1 + configurations, samples). ``runs``: of the whole network on one sample.
    """

    energy: np.ndarray
    lost: np.ndarray
    agreed: np.ndarray
    right: np.ndarray
    runs: float = 0.0

    def plus(self, other: Errors) -> Errors:
        """With the errors of the one configuration of ``other``, of another cause, in every configuration.

        Squared errors add up; a position agrees at most where it does in both, and a class is right likewise.
        """
        right = np.concatenate([self.right[:1], self.right[1:] & other.right[1:]])
        return replace(
            self, lost=self.lost + other.lost, agreed=np.maximum(self.agreed + other.agreed - 1, 0), right=right
        )

    def relative(self) -> np.ndarray:
        """The error of every configuration, sample and output; 0 of an output without energy."""
        least = np.maximum(self.energy, self.energy.mean(axis=0) / _QUIET)
        return np.divide(self.lost, least, out=np.zeros_like(self.lost), where=least > 0)

    def by_sample(self) -> np.ndarray:
        """The error of every configuration on every sample, (configurations, samples); 0 where nothing is measured."""
        found = self.relative()
        return found.sum(axis=-1) / max(1, found.shape[-1])


def decibels(error: float) -> float:
    """The signal-to-noise ratio of a relative squared error, at most 300."""
    return -10 * math.log10(max(error, _SMALLEST))


def spread(data: Data, count: int) -> list[Feed]:
    """Up to ``count`` feeds, evenly spread."""
    chosen = set(np.linspace(0, len(data) - 1, min(count, len(data))).astype(int).tolist())
    return [feed for index, feed in enumerate(data) if index in chosen]


class Meter:
    """Compares outputs with those that are right, on some feeds: ``errors`` of a number of configurations.

    ``scores``: which outputs hold class scores. ``mask``: the input that tells which positions take part, or empty.
    """

    def __init__(self, samples: int, scores: Sequence[bool], tried: int, labels: Sequence[int] = (), mask: str = ""):
        self._labels, self._scores, self._mask = labels, list(scores), mask
        shape = samples, len(scores)
        self.errors = Errors(
            np.zeros(shape), np.zeros((tried, *shape)), np.zeros((tried, *shape)), np.zeros((1 + tried, samples), bool)
        )

    def see(self, sample: int, feed: Feed, right: Sequence[np.ndarray], found: Iterable[Sequence[np.ndarray]]) -> None:
        """Takes the outputs on a sample: those that are right, and those of every configuration."""
        mask = feed.get(self._mask)
        self.errors.energy[sample] = [_energy(counted(output, mask)) for output in right]
        self.errors.right[0, sample] = self._classed(sample, right)
        for number, outputs in enumerate(found):
            self.errors.right[1 + number, sample] = self._classed(sample, outputs)
            for place, pair in enumerate(zip(right, outputs, strict=True)):
                old, new = (counted(output, mask) for output in pair)
                self.errors.lost[number, sample, place] = _lost(old, new)
                self.errors.agreed[number, sample, place] = _agreed(old, new)

    def _classed(self, sample: int, outputs: Sequence[np.ndarray]) -> bool:
        if not self._labels:
            return False
        scores = np.atleast_1d(next((o for o, holds in zip(outputs, self._scores, strict=True) if holds), outputs[0]))
        return int(scores.reshape(-1, scores.shape[-1])[0].argmax()) == self._labels[sample]


def _energy(values: np.ndarray) -> float:
    values = values[np.isfinite(values)].astype(np.float64)
    return _square(values)


def _lost(old: np.ndarray, new: np.ndarray) -> float:
    if old.shape != new.shape:
        return np.inf
    error = new[finite := np.isfinite(old)].astype(np.float64) - old[finite]
    return _square(error) if np.isfinite(error).all() else np.inf


def _square(values: np.ndarray) -> float:
    return float(np.einsum("i,i->", values, values))  # whose order of sums does not depend on the number of threads


def _agreed(old: np.ndarray, new: np.ndarray) -> float:
    if old.shape != new.shape or old.ndim not in (2, 3) or old.shape[-1] < 2 or not old.size:
        return np.nan
    return float(np.mean(old.argmax(axis=-1) == new.argmax(axis=-1)))


def compared(graph: gs.Graph) -> list[tuple[gs.Tensor, str, bool]]:
    """The tensors to compare: each with the floating output that it stands for, and whether it holds class scores.

    The caches that a decoder hands on are left out where there are other outputs.
    """
    found: dict[int, tuple[gs.Tensor, str, bool]] = {}
    for output in graph.outputs:
        tensor, scores = _open_end(output)
        if isinstance(tensor, gs.Variable) and tensor.type == "tensor_type" and edit.is_float(tensor):
            found[id(tensor)] = tensor, output.name, scores
    caches = {meaning.present for meaning in meanings(graph).values()}
    return [one for one in found.values() if one[1] not in caches] or list(found.values())


def _open_end(output: gs.Tensor) -> tuple[gs.Tensor, bool]:
    """What a closing Softmax, Sigmoid or ArgMax reads, or else the output; whether that holds class scores.

    Behind such operators errors do not add up: where one position flips, it counts as much as all others together.
    """
    tensor, node = output, edit.producer(output)
    while node is not None and (operator(node).copies or node.op in _ROUNDING):
        node = edit.producer(node.inputs[0])
    closed = node is not None and node.op in _CLOSING
    if node is not None and closed:
        tensor = node.inputs[0]
        node = edit.producer(tensor)
    while node is not None and node.op == "Add":  # of a bias
        node = next(filter(None, map(edit.producer, node.inputs)), None)
    return tensor, closed or (node is not None and operator(node).weighted)


def mask_of(graph: gs.Graph) -> str:
    """The input of a graph that tells which positions of a sequence take part, or nothing."""
    return next((s.name for s in required_inputs(graph) if s.meaning and s.meaning.kind == "mask"), "")


class Outputs:
    """The outputs of a graph for some feeds of ``data``, kept as the reference. Raises ModelError.

    ``names``: of the outputs that are compared, none where the graph has no floating output. int8 products do not
    saturate, whatever the machine.
    """

    def __init__(self, graph: gs.Graph, data: Data):
        ends = compared(graph)
        self.names, self._scores = [name for _, name, _ in ends], [scores for *_, scores in ends]
        self._mask, self.kept = mask_of(graph), list[tuple[Feed, list[np.ndarray]]]()
        if not ends:
            return
        runner, size = self._runner(graph), 0
        for feed in spread(data, SAMPLES):
            feed = runner.accepted(feed)
            self.kept.append((feed, list(runner.run(feed).values())))
            size += sum(values.nbytes for values in self.kept[-1][1])
            if size > BYTES:
                break

    def _runner(self, graph: gs.Graph, **how: bool) -> Session:
        ends = {output.name: _open_end(output)[0].name for output in graph.outputs}
        return session(graph, [ends[name] for name in self.names], **how)

    def errors(self, graph: gs.Graph) -> Errors:
        """The errors of a changed graph. Raises ModelError."""
        meter = Meter(len(self.kept), self._scores, 1, mask=self._mask)
        if self.kept:
            runner = self._runner(graph, exact=True)
            for place, (feed, right) in enumerate(self.kept):
                meter.see(place, feed, right, [list(runner.run(runner.accepted(feed)).values())])
        return meter.errors

    def error(self, graph: gs.Graph) -> float:
        """The mean error of a changed graph over outputs and samples; 0 without any. Raises ModelError."""
        return float(self.errors(graph).by_sample()[0].mean()) if self.kept else 0.0

    @functools.cached_property
    def variances(self) -> dict[str, float]:
        """The sum of squares of every output around its mean, over all samples; 0 of a constant."""
        found = {}
        for place, name in enumerate(self.names):
            values = np.concatenate([right[place].ravel() for _, right in self.kept]).astype(np.float64)
            values = values[np.isfinite(values)]
            whole = float(np.square(values - values.mean()).sum()) if values.size else 0.0
            found[name] = whole if whole >= _CONSTANT * float(np.square(values).sum()) else 0.0
        return found


def held_out(data: Data) -> tuple[Data, Data]:
    """(seen, unseen): up to ``SAMPLES`` samples spread evenly over ``data`` are unseen, all other samples are seen.

    Both are all of the data where the data have too few samples to hold one out.
    """
    number = min(SAMPLES, len(data) // _SHARE)
    places = frozenset((2 * i + 1) * len(data) // (2 * number) for i in range(number))
    return (data.at(set(range(len(data))) - places), data.at(places)) if places else (data, data)


@contextlib.contextmanager
def replaced(linear: Linear, weight: np.ndarray, bias: np.ndarray | None) -> Iterator[None]:
    """Gives a linear another effective weight (out, in, *kernel) and bias (out,) inside a ``with`` block.

    The linear keeps its bias where ``bias`` is None or the linear has no bias.
    """
    places = [(linear.node, linear.weight_input, linear.unorient(weight / linear.factor("alpha")))]
    if bias is not None and linear.bias_place is not None:
        places.append((*linear.bias_place, linear.shaped_bias(bias) / linear.factor("beta")))
    before = [(holder, place, holder.inputs[place]) for holder, place, _ in places]
    for holder, place, values in places:
        values = np.ascontiguousarray(cast(values, linear.dtype))
        edit.set_input(holder, place, gs.Constant(free_name(linear.graph, f"{linear.name}_trial"), values))
    try:
        yield
    finally:
        for holder, place, tensor in before:
            edit.set_input(holder, place, tensor)
