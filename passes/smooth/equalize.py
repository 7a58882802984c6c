"""Cross-layer equalization: weight ranges made equal on both sides of every channel.

    y = W2 relu(W1 x + b)   becomes   y = (W2 diag(s)) relu(diag(1/s) (W1 x + b))
    r1[c] = max |W1[c, :]|,   r2[c] = max |W2[:, c]|,   s = sqrt(r1 / r2),   so that   r1 / s = s r2 = sqrt(r1 r2)

The pass repeats the step over all layers until nothing changes, because a weight has a layer on either side. A region
of ``scale_regions`` lies between two layers: any number of writers and readers (r1 and r2 are then the largest of
them), residual Adds, reshapes, attention. In q k^T the weights of k stand in for the weights of a reader.

Equalization evens out the ranges of the channels of one weight, which helps quantization with one scale per tensor.
Scales per output channel already make up for the half of the writer. Equalization then gains little and may cost
accuracy, because activations take over the ranges of the weights. Biases are scaled with their rows, and a small row
with a large bias makes an activation with a wide range; ``absorb-bias`` reduces this range.

Equalization is exact through Relu, LeakyRelu, PRelu, pooling and all other operators that commute with a positive
scale. Regions with GELU or SiLU are refused. Regions with a norm as writer, or with a constant factor, are refused,
because the range of such a tensor is the range of its data (see ``smooth``). ReLU6 passes where its bound may differ by
channel, which takes one more node:

    Clip(x, 0, 6)   becomes   Min(Relu(x / s), 6 / s)

Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019, section 4.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Outcome, Refused
from channelfold.passes.channels.region import End, Region
from channelfold.passes.channels.rescale import at, clamped, rescale
from channelfold.passes.channels.scale_regions import trace
from channelfold.passes.layers.linear import Linear, linears
from channelfold.passes.smooth import Equalize
from channelfold.runtime.data.probes import shapes_of
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import constant, free_name, infer_shapes
from channelfold.runtime.io.shapes import Shape

SETTLED = 1e-4  # of log s: a round that changes less is the last
WORTHWHILE = 1e-2  # of log s: a region with smaller scales stays as it is
DEAD = 1e-6  # relative to the largest range: a smaller channel does nothing, but a scaled bias would


class Work(Equalize):
    def least_opset(self, graph: gs.Graph) -> int:
        return 13 if self.allow_insert and any(_is_relu_n(node) for node in graph.nodes) else 0

    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        infer_shapes(graph)
        outcome = Outcome()
        shapes = shapes_of(graph, ctx.calibration, ctx.seed)
        clips = _opened(graph, shapes) if self.allow_insert else []
        weights: dict[int, _Weight] = {}
        sites = list(self._sites(graph, shapes, weights, outcome))
        rounds, step = 0, 0.0
        for site in sites:
            site.take_in_live(weights)
        while sites and rounds < self.iterations:
            step = max(site.equalize(weights) for site in sites)
            rounds += 1
            ctx.progress("Equalizing ranges", rounds, self.iterations)
            if step < SETTLED and not sum(site.take_in_live(weights) for site in sites):
                break
        weights.clear()
        written = [_write(graph, site, outcome) for site in sites]
        _close(graph, clips, outcome)
        outcome.facts = {"regions": len(sites), "scaled": sum(written), "iterations": rounds, "last_step": step}
        return outcome

    def _sites(
        self, graph: gs.Graph, shapes: Mapping[str, Shape], weights: dict[int, _Weight], outcome: Outcome
    ) -> Iterator[_Site]:
        """The regions behind all linears, each region once; refuses a region that cannot be equalized."""
        seen: set[int] = set()
        for linear in linears(graph):
            if id(linear.output) in seen:
                continue
            with outcome.refusing(linear.name, f"{linear.node.op} is not equalized with what follows"):
                region = trace(graph, linear.output, linear.out_axis, shapes)
                seen.update(region.places)
                site = _Site(linear, region, self._usable(linear, region))
                for end, found in site.linears():
                    if id(end.node) not in weights:
                        weights[id(end.node)] = _Weight.of(found)
                yield site

    def _usable(self, linear: Linear, region: Region) -> np.ndarray:
        """Which classes have weights on both sides and nothing else, (classes,) bool. Raises Refused where none has."""
        for end in region.ends:
            if reason := self.patterns.why_not(end.node.name):
                raise Refused(f"{end.node.name} is {reason}")
        index = region.places[id(linear.output)][1]
        if reason := region.why_fixed(index):
            raise Refused(reason)
        usable = region.free
        sides = np.zeros((2, region.size), bool)
        other = ""
        for end in region.ends:
            if end.linear is not None:
                writes = _writes(end)
                sides[0, np.abs(end.index[writes]) - 1] = True
                sides[1, np.abs(end.index[~writes]) - 1] = True
            elif end.role != "term":
                usable[np.abs(end.index).reshape(-1) - 1] = False
                other = other or f"{end.node.op} {'ends it' if end.role == 'factor' else 'writes it, too'}"
        usable &= sides.all(axis=0)
        if not usable.any():
            raise Refused(other or "no weights read it")
        return usable


@dataclass
class _Weight:
    """The ``Linear.magnitudes`` of a weight, and the scales of its rows (out,) and columns (in,) so far."""

    magnitudes: np.ndarray
    rows: np.ndarray
    columns: np.ndarray

    @classmethod
    def of(cls, linear: Linear) -> _Weight:
        magnitudes = linear.magnitudes()
        wide = np.float64 if magnitudes.dtype == np.float64 else np.float32
        outs, ins = linear.channels
        return cls(magnitudes.astype(wide, copy=False), np.ones(outs), np.ones(ins))

    def row_ranges(self) -> np.ndarray:
        groups, _, ins = self.magnitudes.shape
        columns = self.columns.reshape(groups, 1, ins).astype(self.magnitudes.dtype)
        return (self.magnitudes * columns).max(axis=2).reshape(-1) * self.rows

    def column_ranges(self) -> np.ndarray:
        groups, outs, _ = self.magnitudes.shape
        rows = self.rows.reshape(groups, outs, 1).astype(self.magnitudes.dtype)
        return (self.magnitudes * rows).max(axis=1).reshape(-1) * self.columns


@dataclass
class _Site:
    """A region, its first writer, the classes that can be equalized, the live classes, and the scale of each class.

    Dead classes are not equalized. A class is dead relative to the largest range, so that dead classes may become live
    as the largest range shrinks.
    """

    first: Linear
    region: Region
    usable: np.ndarray
    live: np.ndarray = field(init=False)
    scale: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.live = np.zeros(self.region.size, bool)
        self.scale = np.ones(self.region.size)

    def linears(self) -> Iterator[tuple[End, Linear]]:
        for end in self.region.ends:
            if end.linear is not None:
                yield end, end.linear

    def ranges(self, weights: Mapping[int, _Weight]) -> np.ndarray:
        """r1 and r2 by class, (2, classes)."""
        ranges = np.zeros((2, self.region.size))
        for end, _ in self.linears():
            weight, writes, index = weights[id(end.node)], _writes(end), np.abs(end.index) - 1
            found = weight.row_ranges() if end.role == "out" else weight.column_ranges()
            np.maximum.at(ranges[0], index[writes], found[writes])
            np.maximum.at(ranges[1], index[~writes], found[~writes])
        return ranges

    def take_in_live(self, weights: Mapping[int, _Weight]) -> bool:
        """Adds the classes that have become live; returns whether there are any."""
        ranges, before = self.ranges(weights), self.live.sum()
        self.live |= self.usable & (ranges > DEAD * ranges.max(axis=1, keepdims=True)).all(axis=0)
        return bool(self.live.sum() > before)

    def equalize(self, weights: Mapping[int, _Weight]) -> float:
        """One step for all channels; returns the largest change of log s."""
        above, below = self.ranges(weights)
        ratio = np.divide(above, below, out=np.ones_like(above), where=self.live)
        new = clamped(self.scale * ratio**self._power, self.live)
        step = new / self.scale
        self.scale = new
        for end, _ in self.linears():
            weight, factor = weights[id(end.node)], at(step, end.index)
            if end.role == "out":
                weight.rows /= factor
            else:
                weight.columns *= factor
        return float(np.abs(np.log(step)).max())

    @property
    def _power(self) -> float:
        """1/2, or 1/4 where a linear is on both sides, because a whole step can overshoot there for ever."""
        nodes = {role: {id(end.node) for end, _ in self.linears() if end.role == role} for role in ("out", "in")}
        return 0.25 if nodes["out"] & nodes["in"] else 0.5


def _writes(end: End) -> np.ndarray:
    """Whether each channel of a linear is divided by its scale: as a writer, or as a reader of the inverse."""
    return (end.index > 0) == (end.role == "out")


def _write(graph: gs.Graph, site: _Site, outcome: Outcome) -> bool:
    """Applies the scale of a region; returns whether the region was scaled."""
    if np.abs(np.log(site.scale)).max() < WORTHWHILE:
        return False
    node, nodes = site.first.node, {id(end.node) for end, _ in site.linears()}
    with outcome.refusing(node.name, f"{node.op} is not equalized with what follows"):
        rescale(graph, site.region, site.scale)
        scales = f"scales {site.scale.min():.3g} to {site.scale.max():.3g}"
        outcome.change(node.name, f"{node.op}: {int(site.live.sum())} channels of {len(nodes)} weights, {scales}")
        return True
    return False


@dataclass(frozen=True)
class _Clip:
    """A Clip that is a Min behind a ``relu`` for a while, with its former ``inputs`` and its upper bound."""

    node: gs.Node
    inputs: list[gs.Tensor]
    highest: np.ndarray
    relu: gs.Node


def _is_relu_n(node: gs.Node) -> bool:
    if node.op != "Clip" or not edit.is_standard(node) or not edit.is_float(node.inputs[0]):
        return False
    low, high = _bounds(node)
    return low == 0 and 0 < high < np.inf


def _bounds(node: gs.Node) -> tuple[float, float]:
    """The constant bounds of a Clip; NaN for a bound that is missing or computed."""
    found = [edit.argument(node, i, name) for i, name in ((1, "min"), (2, "max"))]
    low, high = (float(b[0]) if b is not None and b.size == 1 else np.nan for b in found)
    return low, high


def _opened(graph: gs.Graph, shapes: dict[str, Shape]) -> list[_Clip]:
    """Turns every Clip from 0 into a Relu and a Min for a while, and adds their shapes to ``shapes``."""
    clips = []
    for node in [node for node in graph.nodes if _is_relu_n(node)]:
        inputs, result = list(node.inputs), node.outputs[0]
        between = gs.Variable(free_name(graph, f"{node.name}_relu"), result.dtype, result.shape)
        highest = np.array(_bounds(node)[1], edit.dtype(inputs[0]) or np.dtype(np.float32))
        relu = gs.Node("Relu", between.name, inputs=[inputs[0]], outputs=[between])
        edit.rewrite(node, "Min", [between, constant(graph, f"{node.name}_max", highest)])
        edit.insert(graph, relu, before=node)
        if result.name in shapes:
            shapes[between.name] = shapes[result.name]
        clips.append(_Clip(node, inputs, highest, relu))
    return clips


def _close(graph: gs.Graph, clips: list[_Clip], outcome: Outcome) -> None:
    """Restores every Clip whose bound has not changed."""
    for clip in clips:
        bound = edit.value(clip.node.inputs[1])
        if bound is None or not np.array_equal(bound, clip.highest):
            outcome.change(clip.node.name, "Clip: a Relu and a Min by channel in its place")
            continue
        edit.detach(clip.relu)
        edit.rewrite(clip.node, "Clip", clip.inputs)
    edit.sweep(graph)
