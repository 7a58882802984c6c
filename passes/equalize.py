"""Cross-layer equalization: weight ranges made equal on both sides of every channel.

    y = W2 relu(W1 x + b)   becomes   y = (W2 diag(s)) relu(diag(1/s) (W1 x + b))
    r1[c] = max |W1[c, :]|,   r2[c] = max |W2[:, c]|,   s = sqrt(r1 / r2),   so that   r1 / s = s r2 = sqrt(r1 r2)

and so over all layers again and again, until nothing changes: a weight takes part on either side. What is between two
layers is a region of ``channels``: any number of writers and readers (r1 and r2 are then the largest of them), residual
Adds, reshapes, attention. In q k^T the weights of k stand in the place of the reader's.

It evens out the ranges of channels within one weight, which is what quantization with one scale per tensor suffers
from, and those of activations as far as they follow the weights. A scale per output channel of a weight is invariant to
the writer's half of it. Biases are scaled along with the rows, and a small row with a large bias makes an activation
with a wide range: ``absorb-bias`` is for that.

Exact through Relu, LeakyRelu and PRelu, pooling and whatever else a positive scale commutes with, and not through GELU,
SiLU or Clip: those regions are refused. So are those that a norm writes or a constant factor ends, whose range is that
of their data: ``smooth`` is for them.

Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019, section 4.1.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.affine import Blocked
from channelfold.passes.base import Context, DataError, ModelError, Outcome, Pass, UsageError
from channelfold.passes.channels import End, Region, Shape, trace
from channelfold.passes.linear import Linear, linears
from channelfold.passes.rescale import at, clamped, rescale
from channelfold.passes.verify import random_feeds
from channelfold.runtime.graph_io import infer_shapes
from channelfold.runtime.inspection import required_inputs
from channelfold.runtime.shapes import measured_shapes, shapes_on

SETTLED = 1e-4  # of log s: where one more round changes less, the ranges are equal
WORTHWHILE = 1e-2  # of log s: a region in which no channel is off by more stays as it is
DEAD = 1e-6  # of the largest range on its side: a channel below it does nothing, and scaled up its bias would


@dataclass(frozen=True)
class Equalize(Pass):
    """Equalizes the weight ranges of neighbouring layers channel by channel; needs no data.

    ``iterations``: at most so many rounds over the whole model. ``exclude``: patterns of node names (``*`` and ``?``)
    whose weights stay as they are. Raises UsageError for less than one round.
    """

    name: ClassVar[str] = "equalize"
    kind: ClassVar[Literal["exact", "calibrated", "lossy"]] = "exact"

    iterations: int = 100
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise UsageError(f"'iterations' is {self.iterations}", "Expected at least 1")

    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        infer_shapes(graph)
        outcome = Outcome()
        weights: dict[int, _Weight] = {}
        sites = list(self._sites(graph, shapes_of(graph, ctx), weights, outcome))
        for site in sites:
            site.leave_out_dead(weights)
        rounds, step = 0, 0.0
        while sites and rounds < self.iterations:
            step = max(site.equalize(weights) for site in sites)
            rounds += 1
            ctx.progress("Equalizing ranges", rounds, self.iterations)
            if step < SETTLED:
                break
        weights.clear()
        for site in sites:
            _write(graph, site, outcome)
        outcome.facts = {"regions": len(outcome.changed), "iterations": rounds, "last_step": step}
        return outcome

    def _sites(
        self, graph: gs.Graph, shapes: Mapping[str, Shape], weights: dict[int, _Weight], outcome: Outcome
    ) -> Iterator[_Site]:
        """The regions behind all linears, each once; refuses those without anything to equalize."""
        seen: set[int] = set()
        for linear in linears(graph):
            if id(linear.output) in seen:
                continue
            try:
                region = trace(graph, linear.output, linear.out_axis, shapes)
                seen.update(region.places)
                site = _Site(linear, region, self._usable(linear, region))
            except Blocked as error:
                outcome.refuse(linear.name, f"{linear.node.op} is not equalized with what follows: {error}", str(error))
                continue
            for end, found in site.linears():
                weights.setdefault(id(end.node), _Weight.of(found))
            yield site

    def _usable(self, linear: Linear, region: Region) -> np.ndarray:
        """Which classes have weights on both sides and nothing else, (classes,) bool. Raises Blocked for none."""
        for end in region.ends:
            for pattern in self.exclude:
                if fnmatch.fnmatchcase(end.node.name, pattern):
                    raise Blocked(f"{end.node.name} is excluded by pattern {pattern!r}")
        index = region.places[id(linear.output)][1]
        if reason := region.why_fixed(index):
            raise Blocked(reason)
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
            raise Blocked(other or "no weights read it")
        return usable


@dataclass
class _Weight:
    """The magnitudes of a weight, largest over the kernel, (groups, out / groups, in / groups), and its scales so far.

    ``rows`` (out,) and ``columns`` (in,) float64.
    """

    magnitudes: np.ndarray
    rows: np.ndarray
    columns: np.ndarray

    @classmethod
    def of(cls, linear: Linear) -> _Weight:
        outs, ins = linear.channels
        weight = linear.weight()
        weight = np.abs(weight.reshape(*weight.shape[:2], -1)).max(axis=-1)
        wide = np.float64 if weight.dtype == np.float64 else np.float32
        magnitudes = weight.astype(wide, copy=False).reshape(linear.groups, -1, weight.shape[1])
        return cls(magnitudes, np.ones(outs), np.ones(ins))

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
    """A region, the first linear that writes it, its classes that are equalized, and their scale so far."""

    first: Linear
    region: Region
    usable: np.ndarray
    scale: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
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

    def leave_out_dead(self, weights: Mapping[int, _Weight]) -> None:
        ranges = self.ranges(weights)
        self.usable &= (ranges > DEAD * ranges.max(axis=1, keepdims=True)).all(axis=0)

    def equalize(self, weights: Mapping[int, _Weight]) -> float:
        """One step for all channels at once; returns the largest change of log s."""
        above, below = self.ranges(weights)
        ratio = np.divide(above, below, out=np.ones_like(above), where=self.usable)
        new = clamped(self.scale * ratio**self._power, self.usable)
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
        """1/2, or 1/4 where a linear is on both sides: there the whole step can overshoot, back and forth for ever."""
        nodes = {role: {id(end.node) for end, _ in self.linears() if end.role == role} for role in ("out", "in")}
        return 0.25 if nodes["out"] & nodes["in"] else 0.5


def _writes(end: End) -> np.ndarray:
    """Whether each channel of a linear is divided by its scale: what writes it is, and what reads its inverse."""
    return (end.index > 0) == (end.role == "out")


def _write(graph: gs.Graph, site: _Site, outcome: Outcome) -> None:
    off = np.abs(np.log(site.scale))
    if off.max() < WORTHWHILE:
        return
    node, nodes = site.first.node, {id(end.node) for end, _ in site.linears()}
    try:
        rescale(graph, site.region, site.scale)
    except Blocked as error:
        outcome.refuse(node.name, f"{node.op} is not equalized with what follows: {error}", str(error))
        return
    scales = f"scales {site.scale.min():.3g} to {site.scale.max():.3g}"
    outcome.change(node.name, f"{node.op}: {int(site.usable.sum())} channels of {len(nodes)} weights, {scales}")


def shapes_of(graph: gs.Graph, ctx: Context) -> dict[str, Shape]:
    """The shapes of all tensors, on a calibration sample or else on the first random feed that runs.

    Where none does, what shape inference knows.
    """
    if ctx.calibration is not None and (feed := next(iter(ctx.calibration), None)) is not None:
        return measured_shapes(graph, feed)
    try:
        for feed in random_feeds(required_inputs(graph), ctx.seed):
            try:
                return measured_shapes(graph, feed)
            except ModelError:
                continue
    except DataError:  # inputs that cannot be random
        pass
    return shapes_on(graph, {})
