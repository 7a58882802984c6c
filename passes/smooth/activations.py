"""Channel-wise scales and shifts of activations, folded into the weights around them, so that quantization loses less.

    y = W x + b  =  (W diag(s)) ((x - z) / s)  +  (b + W z)

W diag(s) goes into the linears that read x, and (x - z) / s into the norm or the linears that write x (``rescale``).
The pass adds no node. The method (``scales``, with sources) chooses s and z, either in closed form from the ranges of
the channels, or by a search for the least quantization error on a sample of rows (``quantization_error``). The method
``auto`` tries the scales of smoothquant and os-plus at each site and takes the best, or none.

A site gets a shift only where every linear has a bias to take up the shift, or room for a bias. With ``allow_insert`` a
site gets an explicit Mul, and an Add for the shift, where no weight in front can take up the scale (behind GELU) or a
reader cannot (the shortcut of a post-LN transformer).

Where the quantization that follows is known, the scales that do not pay at the outputs are taken back (``trial``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Outcome, Patterns, Refused, TwoActivations
from channelfold.passes.channels.cache import Caches
from channelfold.passes.channels.rescale import fitted, rescale
from channelfold.passes.channels.scale_regions import Region, Shape, reach
from channelfold.passes.layers.linear import Linear, live_linears, view
from channelfold.passes.layers.output_error import decibels
from channelfold.passes.layers.quantization_error import ROWS, Bits, LayerError
from channelfold.passes.smooth import Smooth, scales
from channelfold.passes.smooth.cached import key_moves
from channelfold.passes.smooth.scales import ClassStatistics
from channelfold.passes.smooth.trial import Judge, Move, Sites, paying
from channelfold.runtime.errors import ModelError
from channelfold.runtime.io.files import infer_shapes
from channelfold.runtime.io.shapes import measured_shapes
from channelfold.runtime.io.snapshot import Snapshot
from channelfold.runtime.stats.channels import ChannelStatistics, outlier_ratio
from channelfold.runtime.stats.observe import by_name

Candidate = tuple[str, np.ndarray, np.ndarray]  # description, scale and shift by class

_ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_RATIOS = tuple(np.arange(0.05, 1.0, 0.1))
_LIMITS = 16  # steps of os-plus from the largest channel down to the first decile
_WORTH_NODES = 0.5  # ``auto`` inserts nodes where less than this share of the error is left


class Work(Smooth):
    @property
    def searches(self) -> bool:
        return self.method in ("auto", "os-plus", "awq") or (self.method == "smoothquant" and self.search_alpha)

    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        outcome = Outcome()
        infer_shapes(graph)
        judged = self.roll_back and ctx.quantizer is not None
        work = Snapshot.of(graph).graph() if judged else graph
        shapes, caches = measured_shapes(graph, self.feed(ctx)), Caches.of(work, self.own_cache)
        sites = list(self._sites(work, shapes, caches, outcome))
        keys = list(key_moves(work, caches, shapes, ctx, outcome))
        rows = ROWS if self.searches else 0
        observers = {r.data.name: ChannelStatistics(r.in_axis, rows) for site in sites for r in site.linears}
        ctx.observe(graph, by_name(observers.items()))
        moves = []
        for number, site in enumerate(sites):
            ctx.progress("Smoothing", number, len(sites))
            with outcome.refusing(site.name, f"{site.tensor.name} stays as it is"):
                moves.append(self._smooth(work, site, observers))
        if judged:
            moves, outcome.facts = self._kept(graph, moves, ctx, outcome)
        for move in keys:  # which no weight feels
            move.make(graph)
        moves += keys
        for move in moves:
            outcome.change(move.node, f"{move.site}: {move.what}")
        outcome.facts |= {"sites": [move.facts for move in moves]}
        return outcome

    def _kept(
        self, graph: gs.Graph, moves: list[Move], ctx: Context, outcome: Outcome
    ) -> tuple[list[Move], dict[str, Any]]:
        """Makes the moves that pay at the outputs of the quantized model; (these moves, facts). Refuses the others."""
        assert ctx.quantizer is not None
        before, verdict, facts = Snapshot.of(graph), None, {}

        def error(sites: Sites) -> float | None:
            copy = before.graph()
            for number in sorted(sites):
                moves[number].make(copy)
            ctx.progress("Trying what pays", 0, 0)
            return judge.error(copy)

        try:
            judge = Judge(graph, ctx.quantizer, ctx)
            verdict = paying([move.gain for move in moves], error) if moves else None
            facts = {"trial": verdict.facts(len(moves), judge.samples)} if verdict is not None else {}
        except ModelError as unknown:
            outcome.warnings.append(f"Whether smoothing pays at the outputs is not known: {unknown}")
        kept = []
        for number, move in enumerate(moves):
            if verdict is not None and number not in verdict.kept:
                with_it, without = map(decibels, verdict.taken_back[number])
                what = f"the quantized outputs have {with_it:.1f} dB with it, {without:.1f} dB without"
                outcome.refuse(move.node, f"{move.site}: taken back, {what}", "taken back, it does not pay")
                continue
            with outcome.refusing(move.node, f"{move.tensor} stays as it is"):
                move.make(graph)
                kept.append(move)
        return kept, facts

    def _sites(self, graph: gs.Graph, shapes: Mapping[str, Shape], caches: Caches, outcome: Outcome) -> Iterator[_Site]:
        """One site for each region that can be scaled; refuses the other regions."""
        seen: set[int] = set()
        scaled: set[int] = set()
        for node in live_linears(graph):
            with outcome.refusing(node.name, node.op), contextlib.suppress(TwoActivations):
                linear = view(graph, node)
                if id(linear.data) in seen:
                    continue
                if reason := self.patterns.why_not(linear.name):
                    raise Refused(reason)
                seen.add(id(linear.data))
                site = _Site.of(self._region(graph, linear, shapes, caches))
                if reason := Patterns(exclude=self.exclude).why_not(*(linear.name for linear in site.linears)):
                    raise Refused(f"a linear that shares its scale is {reason}")
                if any(id(linear.data) in scaled for linear in site.linears):  # perhaps by inserted nodes
                    raise Refused("it reads a tensor that another site scales")
                scaled.update(id(linear.data) for linear in site.linears)
                seen |= scaled
                yield site

    def _region(self, graph: gs.Graph, linear: Linear, shapes: Mapping[str, Shape], caches: Caches) -> Region:
        try:
            return reach(graph, linear, shapes, self.allow_insert, caches)
        except Refused as error:
            if self.allow_insert:
                raise
            raise Refused(f"{error} (allow_insert puts an explicit Mul there)") from None

    def _smooth(self, graph: gs.Graph, site: _Site, observers: Mapping[str, ChannelStatistics]) -> Move:
        seen = site.seen(observers)
        shifted = self.shift and (self.allow_insert or site.takes_a_shift)
        if self.searches:
            label, scale, shift, decibels = self._best(site, seen, observers, shifted)
        else:
            label, scale, shift = self._closed_form(seen, shifted)
            decibels = None
        scale = fitted(scale, site.region)
        nodes, tensor = {id(node) for node in graph.nodes}, site.tensor.name
        ratio = [outlier_ratio(seen.amax()), outlier_ratio(seen.amax(shift) / scale)]
        if np.ptp(scale) == 0 and not np.any(shift):
            raise Refused("its channels are alike already")
        rescale(graph, site.region, scale, shift)
        added = sum(id(node) not in nodes and not _at_a_cache(site.region, node) for node in graph.nodes)
        what = label if None in ratio else f"{label}; outlier ratio {ratio[0]:.3g} -> {ratio[1]:.3g}"
        if decibels:
            what += f", output {decibels[0]:.1f} -> {decibels[1]:.1f} dB"
        what += f"; nodes inserted: {added}" if added else ""
        gain = decibels[1] - decibels[0] if decibels else (ratio[0] or 1.0) / (ratio[1] or 1.0)
        facts = {
            "node": site.name,
            "tensor": tensor,
            "readers": [linear.name for linear in site.linears],
            "method": label,
            "outlier_ratio": ratio,
            "output_snr_db": decibels,
            "scale": [float(scale.min()), float(scale.max())],
            "inserted": added,
        }
        return Move(site.name, str(site), tensor, site.region, scale, shift, what, facts, gain)

    def _closed_form(self, seen: ClassStatistics, shifted: bool) -> Candidate:
        zero = np.zeros_like(seen.minimum)
        if self.method == "smoothquant":
            return f"smoothquant, alpha {self.alpha:g}", scales.smoothquant(seen, self.alpha), zero
        if self.method == "repq":
            return f"repq, {self.aim}", *scales.repq(seen, self.aim, shifted)
        if self.method == "outliertune":
            shift = np.where(seen.shiftable & shifted, seen.middle, 0.0)
            return "outliertune", scales.outliertune(seen, shift), shift
        return "fp4-shift", scales.fp4_shift(seen), zero

    def _best(
        self, site: _Site, seen: ClassStatistics, observers: Mapping[str, ChannelStatistics], shifted: bool
    ) -> tuple[str, np.ndarray, np.ndarray, list[float]]:
        """The candidate of least error, and the signal-to-noise ratio before and after in dB.

        Raises Refused where no candidate reduces the error.
        """
        bits = Bits(0 if self.method == "awq" else self.activation_bits, self.weight_bits, self.group_size)
        errors = [
            (classes, LayerError.of(linears, observers[name].sample(), bits))
            for name, classes, linears in site.layers()
        ]

        def cost(scale: np.ndarray, shift: np.ndarray) -> float:
            scale = fitted(scale, site.region)
            return sum(error.error(scale[classes], shift[classes]) for classes, error in errors) / len(errors)

        zero = np.zeros_like(seen.minimum)
        before = cost(np.ones_like(zero), zero)
        best, after = None, before
        for candidate in self._candidates(seen, shifted):
            if (error := cost(*candidate[1:])) < after:
                best, after = candidate, error
        if best is None or (site.region.cuts and self.method == "auto" and after > _WORTH_NODES * before):
            raise Refused("no scale makes its quantized outputs better" + (" by enough" if best is not None else ""))
        return *best, [decibels(before), decibels(after)]

    def _candidates(self, seen: ClassStatistics, shifted: bool) -> Iterator[Candidate]:
        zero = np.zeros_like(seen.minimum)
        if self.method in ("auto", "smoothquant"):
            for alpha in _ALPHAS:
                yield f"smoothquant, alpha {alpha:g}", scales.smoothquant(seen, alpha), zero
        if self.method in ("auto", "os-plus"):
            shift = np.where(seen.shiftable & shifted, seen.center, 0.0)
            amax = seen.amax(shift)[seen.free]
            floor = max(float(np.percentile(amax, 10)), 1e-3 * float(amax.max(initial=0.0)))
            for limit in np.geomspace(amax.max(), floor, _LIMITS) if floor > 0 else ():
                words = f"os-plus, limit {limit:.3g}{', shifted' if np.any(shift) else ''}"
                yield words, scales.os_plus(seen, limit, shift), shift
        if self.method == "awq":
            for ratio in _RATIOS:
                yield f"awq, ratio {ratio:.2f}", scales.awq(seen, ratio), zero


def _at_a_cache(region: Region, node: gs.Node) -> bool:
    """Whether a node stands at the interface of a cache of a region."""
    return any(tensor is cache for tensor in (*node.inputs, *node.outputs) for cache, _ in region.caches)


@dataclass(frozen=True)
class _Site:
    """A region with the linears that read it; ``classes`` gives the class of each input channel of each linear."""

    region: Region
    linears: tuple[Linear, ...]
    classes: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, region: Region) -> _Site:
        free = region.free  # a reader with pinned channels alone may belong to another site, with nodes of its own
        ends = [end for end in region.readers() if free[np.abs(end.index) - 1].any()]
        found = [(end.linear, end.index) for end in ends if end.linear is not None]
        if any(np.any(index < 0) for _, index in found):
            raise Refused("it is scaled against another tensor that linears read")
        axes = {(id(linear.data), linear.in_axis % region.places[id(linear.data)][1].ndim) for linear, _ in found}
        if len(axes) > len({tensor for tensor, _ in axes}):
            raise Refused("linears read it along two axes")
        return cls(region, tuple(linear for linear, _ in found), tuple(index - 1 for _, index in found))

    @property
    def name(self) -> str:
        return self.linears[0].name

    @property
    def tensor(self) -> gs.Variable:
        return self.linears[0].data

    def __str__(self) -> str:
        writers = [end.node for end in self.region.ends if end.role in ("out", "norm", "factor")]
        into = f"{writers[0].op} {writers[0].name}" if writers else "an explicit Mul"
        more = f" and {len(writers) - 1} more" if len(writers) > 1 else ""
        return f"{into}{more} -> {len(self.linears)} linear{'s' if len(self.linears) > 1 else ''}"

    @property
    def takes_a_shift(self) -> bool:
        """Whether a shift adds no node: every linear that the shift reaches has a bias, or room for a bias."""
        linears = [end.linear for end in self.region.ends if end.shifted and end.linear is not None]
        return all(linear.node.op != "MatMul" or linear.bias_node is not None for linear in linears)

    def seen(self, observers: Mapping[str, ChannelStatistics]) -> ClassStatistics:
        """The statistics by class. Raises Refused where no sample reached a tensor."""
        size = self.region.size
        low, high, columns = np.full(size, np.inf), np.full(size, -np.inf), np.zeros(size)
        mean, middle, count = np.zeros(size), np.zeros(size), np.zeros(size)
        for linear, index in zip(self.linears, self.classes, strict=True):
            found = observers[linear.data.name]
            if not found.positions:
                raise Refused("no calibration sample reached it")
            np.minimum.at(low, index, found.minimum)
            np.maximum.at(high, index, found.maximum)
            np.maximum.at(columns, index, linear.magnitudes().max(axis=1).reshape(-1).astype(np.float64))
            np.add.at(mean, index, found.absolute_mean)
            np.add.at(middle, index, found.middle)
            np.add.at(count, index, 1)
        unread = count == 0  # channels that no linear reads
        low[unread] = high[unread] = 0.0
        count[unread] = 1
        free = self.region.free & ~unread
        return ClassStatistics(low, high, mean / count, middle / count, columns, free, free & self.region.shiftable)

    def layers(self) -> Iterator[tuple[str, np.ndarray, list[Linear]]]:
        """(tensor, classes of its channels, its linears). Raises Refused where the error cannot be measured."""
        by_tensor: dict[str, tuple[np.ndarray, list[Linear]]] = {}
        for linear, classes in zip(self.linears, self.classes, strict=True):
            if any(size > 1 for size in linear.kernel):
                raise Refused("a search needs layers without a kernel; smoothquant, repq or equalize do not search")
            by_tensor.setdefault(linear.data.name, (classes, []))[1].append(linear)
        for name, (classes, linears) in by_tensor.items():
            yield name, classes, linears
