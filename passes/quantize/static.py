"""INT8 quantization with explicit, per-channel QDQ nodes.

    y = W x + b   becomes   y = DQ(W_q) DQ(Q(x)) + b',     b' = b - (W_q - W) E[x]
    W_q per output channel, symmetric int8;  x per tensor with a calibrated range;  b' float (bias correction, DFQ)

W_q is rounded to the nearest code, or by GPTQ (``rounders``), which takes one more run of the data.

Every Conv, Gemm and MatMul with a constant weight is a site. What is left in float is refused with the reason: what
TensorRT would run in float anyway (ConvTranspose, fewer than 16 channels), what was excluded, what was always zero in
calibration, and what 8 bits cannot represent: an activation whose range is so wide against its values that rounding
would leave a signal-to-noise ratio below ``min_activation_snr`` dB, over the whole tensor or for its median row.

Source of the bias correction: Nagel et al., Data-Free Quantization, ICCV 2019, section 4.2, with E[x] measured.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Outcome
from channelfold.passes.layers.borders import inside
from channelfold.passes.layers.formats import INT7, INT8, Format
from channelfold.passes.layers.linear import Linear, linears, live_linears, usable
from channelfold.passes.layers.output_error import decibels
from channelfold.passes.layers.sensitivity import measure, worst
from channelfold.passes.quantize import Quantize, calibrators, center
from channelfold.passes.quantize.cells import quantize_cells
from channelfold.passes.quantize.done import Done
from channelfold.passes.quantize.inputs import Inputs, Products, joint
from channelfold.passes.quantize.joint import take_apart
from channelfold.passes.quantize.measured import DEFAULT, OTHERS, Seen, choose, measuring
from channelfold.passes.quantize.proven import Insert, expanded, in_int8, planned
from channelfold.passes.quantize.qdq import (
    MIN_CHANNELS,
    Codes,
    Inserter,
    Range,
    excluded,
    opset_of_scales,
    range_facts,
    summary,
    why_not_int8,
)
from channelfold.passes.quantize.rounders import gptq, rounded
from channelfold.passes.quantize.storage import store_rest
from channelfold.passes.quantize.tables import quantize_tables
from channelfold.passes.quantize.timed import without_slow
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import infer_shapes
from channelfold.runtime.io.snapshot import Snapshot
from channelfold.runtime.stats import saturation
from channelfold.runtime.stats.histograms import TensorStatistics, counted
from channelfold.runtime.stats.observe import by_name

# What onnxruntime computes in int8 between convolutions when what it reads and writes is quantized.
_BETWEEN = (
    "Add",
    "Mul",
    "MaxPool",
    "AveragePool",
    "GlobalAveragePool",
    "Concat",
    "Relu",
    "Clip",
    "LeakyRelu",
    "Sigmoid",
)
_REQUANTIZED = ("Conv", "ConvTranspose", "Gemm")  # by onnxruntime itself, where they read a DequantizeLinear
_FUSED_ACTIVATIONS = ("Relu", "Clip")  # by onnxruntime, into what precedes them
# What onnxruntime carries out on int8 as it is, where the scale before and behind is the same.
_MOVING = ("MaxPool", "Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze")


class Work(Quantize):
    def least_opset(self, graph: gs.Graph) -> int:
        return opset_of_scales(graph)

    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        outcome = Outcome()
        infer_shapes(graph)
        integers = self.target == "onnxruntime"
        short = self.reduce_range == "on" or (self.reduce_range == "auto" and integers and saturation.saturates())
        cells = quantize_cells(graph, outcome, INT7 if short else INT8, self)
        sites = list(self.sites(graph, outcome))
        seen = self._observed(graph, sites, ctx, integers)
        of_sites = {site.name: range_facts(site) for site in sites}
        kept = self._representable(sites, seen, outcome)
        says = {site.name: f"{site.node.op}: int8, activation {site.data.name}" for site in kept}
        kept, inserter = self._placed(graph, kept, seen, ctx, outcome)
        read = inserter.centered["read"]
        centered = {of_sites[name]["tensor"] for name in read}
        ranges = seen.ranges | {name: seen.free[name] for name in centered}
        for site in kept:
            tensor = of_sites[site.name]["tensor"]
            more = ", centered" if site.name in read else ""
            more += f", by {seen.by[tensor]}" if tensor in seen.by else ""
            outcome.change(site.name, f"{says[site.name]} up to {ranges[tensor].limit:.4g}{more}")
        outcome.facts = summary(graph, kept, cells)
        if quantize_tables(inserter, outcome, lambda _: INT8, self) or kept or cells:
            inserter.finish()
            edit.remove_dead(graph)
        if not ctx.compared:
            store_rest(graph, outcome, self)
        outcome.facts["activations"] = {name: self._facts(seen.statistics[name], own) for name, own in ranges.items()}
        outcome.facts["weight_bits"] = inserter.format.bits
        outcome.facts["centered"] = inserter.centered
        outcome.facts["ranges"] = _with_clipped(of_sites.values(), seen.statistics, ranges)
        return outcome

    def _observed(self, graph: gs.Graph, sites: list[Linear], ctx: Context, integers: bool) -> Seen:
        """Runs the data, and chooses the ranges of all tensors that may be quantized."""
        axes: dict[str, int | None] = {tensor.name: None for tensor in _integers(graph, sites)[0]} if integers else {}
        axes |= {site.data.name: site.in_axis for site in sites}
        enough = None if self.calibrator == "entropy" else counted(len(ctx.data))  # entropy weighs every single bin
        statistics = {name: TensorStatistics(axis, enough) for name, axis in axes.items()}
        ctx.observe(graph, by_name(statistics.items()))
        return self._seen(graph, sites, axes, statistics)

    def _seen(
        self,
        graph: gs.Graph,
        sites: list[Linear],
        axes: Mapping[str, int | None],
        statistics: Mapping[str, TensorStatistics],
    ) -> Seen:
        """The ranges that the calibrator chooses."""
        integers = self.target == "onnxruntime"
        ranges = {name: self._range(seen, integers) for name, seen in statistics.items()}
        ranges = _unified(graph, ranges) if integers else ranges
        movable = set() if integers or not self.center else center.movable(sites)
        free = {name: self._range(statistics[name], True) for name in movable}
        free = {name: seen for name, seen in free.items() if seen.step < center.GAIN * ranges[name].step}
        snr = {name: _lower_snr(self._facts(statistics[name], seen)) for name, seen in ranges.items()}
        # What cannot be centered in the end keeps the threshold for finer steps: by mse, that for its own lies lower,
        # and what is clipped more costs outputs more than the rounding costs that the lower threshold saves.
        ranges |= {name: replace(seen, free=False) for name, seen in free.items()}
        return Seen(axes, statistics, ranges, free, snr)

    def _representable(self, sites: list[Linear], seen: Seen, outcome: Outcome) -> list[Linear]:
        """The sites whose inputs 8 bits can represent; refuses the others."""
        seen.reasons = {name: self._why_beyond_int8(seen.statistics[name], seen.snr[name]) for name in seen.axes}
        for site in (site for site in sites if seen.reasons[site.data.name]):
            name, reason, snr = site.data.name, seen.reasons[site.data.name], seen.snr[site.data.name]
            detail = name if snr is None else f"{name}: {snr} dB, {self.min_activation_snr:g} wanted"
            outcome.refuse(site.name, f"{site.node.op} stays float: {reason} ({detail})", reason)
        return [site for site in sites if not seen.reasons[site.data.name]]

    def _placed(
        self, graph: gs.Graph, kept: list[Linear], seen: Seen, ctx: Context, outcome: Outcome
    ) -> tuple[list[Linear], Inserter]:
        """The sites that gain by int8 where the target runs them, and what has inserted their QDQ nodes."""
        integers = self.target == "onnxruntime"
        poor = {name for name, reason in seen.reasons.items() if reason or seen.statistics[name].masked}
        of_channels = seen.axes.items() if self.correct_bias else ()
        means = {(name, axis): seen.statistics[name].channel_mean for name, axis in of_channels}
        borders = inside(graph, kept, ctx.data)
        format = INT7 if self.reduce_range == "on" else INT8
        codes = self._codes(graph, kept, ctx, format)

        def insert(into: gs.Graph, sites: list[Linear], by: Seen = seen) -> Inserter:
            inserter = Inserter(into, not integers, codes, format)
            inserter.inside = borders
            _insert(inserter, sites, poor, by.ranges, by.free, means)
            return inserter

        def insert_apart(into: gs.Graph, sites: list[Linear]) -> Inserter:
            inserter = insert(into, sites)
            for site in () if integers or ctx.compared else sites:
                take_apart(inserter, site)
            return inserter

        if self.calibrator == "measured":
            ways = {name: replace(self, **options) for name, options in OTHERS.items()}
            others = {name: way._seen(graph, kept, seen.axes, seen.statistics) for name, way in ways.items()}
            choose(graph, kept, seen, others, lambda by: functools.partial(insert, by=by), ctx)
            seen.ranges = _unified(graph, seen.ranges) if integers else seen.ranges
        if self.float_share:
            float_nodes = self._worst(graph, kept, insert, ctx, outcome)
            for site in (site for site in kept if site.name in float_nodes):
                reason = "int8 of this node changes the outputs most"
                lost = float_nodes[site.name]
                outcome.refuse(site.name, f"{site.node.op} stays float: {reason} ({lost:.1f} dB)", reason)
            kept = [site for site in kept if site.name not in float_nodes]
        if integers:
            kept, tried = in_int8(graph, kept, outcome, insert, expanded(outcome))
            if self.profile and kept:
                kept, tried = without_slow(graph, kept, tried, outcome, insert, ctx)
            if self.reduce_range == "auto" and kept and (lost := saturation.lost(graph, tried.graph, ctx.data)):
                format, codes = INT7, self._codes(graph, kept, ctx, INT7)
                outcome.warnings.append(f"Weights have 7 bits, for with 8 {lost}")
        elif self.verify_plan:
            kept, _ = in_int8(graph, kept, outcome, insert_apart, planned(self.verify_plan, ctx, outcome))
        return kept, insert_apart(graph, kept)

    def _codes(self, graph: gs.Graph, sites: list[Linear], ctx: Context, format: Format) -> Codes:
        """The codes and scales of the weights that are not rounded to the nearest code.

        A weight with several readers is not among them: the inputs of each of them want other codes.
        """
        if not self.gptq:
            return {}
        readers = Counter(id(site.source._values) for site in sites)
        alone = [site for site in sites if readers[id(site.source._values)] == 1 and joint(site)]
        alone = [site for site in alone if id(site.source._values) not in ctx.shared]
        how = replace(self, reduce_range="on" if format == INT7 else "off")  # what else tells them apart in the folder
        done = Done(ctx.keep, Snapshot.of(graph), ctx.data, how)
        codes = {}
        for number, (site, seen) in enumerate(Inputs(graph, alone, ctx.data, False).run(done.find)):
            ctx.progress("Rounding weights", number, len(alone))
            if isinstance(seen, Products):
                seen = rounded(site.weight(), gptq(format, site.dtype, seen.factored), format, wide=True)
                done.keep(site, seen)
            codes[site.name] = seen.codes, seen.scales[:, 0]
        return codes

    def left(self, graph: gs.Graph) -> dict[str, Any]:
        return summary(graph, [])

    def sites(self, graph: gs.Graph, outcome: Outcome) -> Iterator[Linear]:
        return usable(graph, outcome, self._why_float, "stays float")

    def _why_float(self, linear: Linear) -> str:
        """Why a site is left in float by the rules; empty when it is not."""
        node = linear.node
        outs, ins = linear.channels
        if reason := excluded(self, node):
            return reason
        if node.op == "ConvTranspose":
            return "ConvTranspose runs in float anyway"
        if linear.weight_input == 0:
            return "its weight is the left operand"
        if min(outs, ins) < MIN_CHANNELS:
            return f"fewer than {MIN_CHANNELS} channels"
        if self.target == "onnxruntime" and linear.dtype == np.float16:
            return "ONNX Runtime has no integer kernels for float16"
        return why_not_int8(linear)

    def _worst(
        self, graph: gs.Graph, sites: list[Linear], insert: Insert, ctx: Context, outcome: Outcome
    ) -> dict[str, float]:
        """The nodes that ``float_share`` leaves in float, with the error of the outputs in dB that each one saves."""
        live = {id(node) for node in live_linears(graph)}
        total = sum(id(linear.node) in live for linear in linears(graph))
        count = int(self.float_share * total) - (total - len(sites))
        if count <= 0:
            return {}
        with measuring(graph, sites, insert, ctx) as (board, samples, crew):
            chosen = worst(board, samples, measure(board, samples, crew=crew), "int8", count, crew)
        if not chosen:
            outcome.warnings.append("No more nodes stay float: those whose int8 changes the outputs most gain nothing")
        return {site.nodes[0]: decibels(site.errors["int8"]) for site in chosen}

    def _range(self, seen: TensorStatistics, free: bool) -> Range:
        """The range to quantize, whose threshold the calibrator chooses for its steps; a free one has zero anywhere."""
        if seen.total == 0:
            return Range(0.0, 0.0, free)
        low, high = min(seen.minimum, 0.0), max(seen.maximum, 0.0)
        levels = _levels(Range(low, high, free))
        calibrator = DEFAULT if self.calibrator == "measured" else self.calibrator
        limit = calibrators.threshold(seen, calibrator, percentile=self.percentile, levels=levels)
        return Range(max(low, -limit), min(high, limit), free)

    def _facts(self, statistics: TensorStatistics, seen: Range) -> dict[str, Any]:
        """What a report says of an activation: its range, what is covered, and what rounding leaves of it."""
        empty = statistics.total == 0
        limit, levels = seen.limit, _levels(seen)
        snr = np.inf if empty else calibrators.snr(statistics, limit, levels)
        row_snr = np.inf if empty else calibrators.row_snr(statistics, limit, levels)
        return {
            "minimum": None if empty else statistics.minimum,
            "maximum": None if empty else statistics.maximum,
            "low": seen.low,
            "high": seen.high,
            "snr_db": round(snr, 2) if np.isfinite(snr) else None,
            "row_snr_db": round(row_snr, 2) if np.isfinite(row_snr) else None,
            "masked": statistics.masked,
        }

    def _why_beyond_int8(self, seen: TensorStatistics, snr: float | None) -> str:
        """Why 8 bits cannot represent an activation; empty when they can."""
        if seen.total == 0:
            return "no calibration sample reached its activation"
        if seen.amax == 0:
            return "its activation is zero in every calibration sample"
        if snr is not None and self.min_activation_snr > 0 and snr < self.min_activation_snr:
            return "8 bits cannot represent its activation"
        return ""


def _with_clipped(
    of_sites: Iterable[dict[str, Any]], statistics: Mapping[str, TensorStatistics], ranges: Mapping[str, Range]
) -> list[dict[str, Any]]:
    """What a report says of sites, with the share of what they read that is clipped."""
    shares = {name: calibrators.clipped(seen, ranges[name].low, ranges[name].high) for name, seen in statistics.items()}
    return [facts | {"clipped": shares[facts["tensor"]]} for facts in of_sites]


def _levels(seen: Range) -> int:
    """The steps between zero and the end of a range that is farther from it."""
    if not seen.free or seen.high == seen.low:
        return 127
    return max(127, round(255 * max(-seen.low, seen.high) / (seen.high - seen.low)))


def _lower_snr(facts: Mapping[str, Any]) -> float | None:
    """The signal-to-noise ratio of a tensor or of its median row, whichever is lower; None where there is no noise."""
    known = [facts[key] for key in ("snr_db", "row_snr_db") if facts[key] is not None]
    return min(known, default=None)


def _integers(graph: gs.Graph, sites: list[Linear], poor: Set[str] = frozenset()) -> tuple[list[gs.Variable], set[int]]:
    """What onnxruntime wants in uint8 around convolutions: (results to quantize, ids of what all read as uint8).

    The results are those of Conv and of the operators that carry these on; tensors named in ``poor`` stay float. A
    product of matrices (MatMul, Gemm) writes float, so what is read by products alone is uint8 for them alone: the
    shortcut around the layers of a transformer stays float.
    """
    read = {id(site.data) for site in sites}
    convs = {id(site.node) for site in sites if site.is_conv}
    everywhere = {id(site.data) for site in sites if site.is_conv}
    found: list[gs.Variable] = []
    for node in graph.nodes:
        result = node.outputs[0] if node.outputs else None
        if result is None or edit.is_output(graph, result) or edit.dtype(result) not in (np.float32, np.float16):
            continue
        inputs = [t for t in node.inputs if not isinstance(t, gs.Constant) and not t.is_empty()]
        carries = node.op in _BETWEEN and (len(inputs) > 1 or node.op not in ("Add", "Mul"))
        ids = {id(t) for t in inputs}
        if id(node) not in convs and not (carries and ids & everywhere and ids <= read | everywhere):
            continue
        if id(node) in convs or node.op == "Add":
            reader = edit.sole_consumer(graph, result)
            if reader is not None and reader.op in _FUSED_ACTIVATIONS:
                result = reader.outputs[0]
                if edit.is_output(graph, result):
                    continue
        everywhere |= ids
        if result.name not in poor and id(result) not in everywhere:
            everywhere.add(id(result))
            found.append(result)
    return found, everywhere


def _insert(
    inserter: Inserter,
    sites: list[Linear],
    poor: Set[str],
    ranges: Mapping[str, Range],
    free: Mapping[str, Range],
    means: Mapping[tuple[str, int | None], np.ndarray | None],
) -> None:
    """Makes the QDQ nodes around every site. Tensors named in ``poor`` stay float.

    ``free``: the ranges of the tensors that are read centered where that is possible. ``means`` by tensor and axis:
    where a Conv and a MatMul read one tensor their channels are not the same.
    """
    graph, integers = inserter.graph, not inserter.symmetric
    if free:
        ranges, means = _centered(inserter, sites, ranges, free, means)
    between, everywhere = _integers(graph, sites, poor) if integers else ([], set())
    tensors = {id(tensor): tensor for tensor in [*between, *(site.data for site in sites)]}
    readers: dict[int, list[gs.Node]] = {key: [] for key in tensors}
    for site in sites:
        readers[id(site.data)].append(site.node)
        site.data.dtype = site.dtype  # where shape inference could not tell
        seen = ranges[site.data.name]
        offset = 0.0 if integers else seen.offset(site.dtype)
        scales = inserter.weight(site, seen, means.get((site.data.name, site.in_axis)), offset)
        if integers:
            inserter.fusable(site)
            inserter.bias(site, scales, seen)
    quantized = {id(site.node) for site in sites}
    products = {id(site.node) for site in sites if integers and not site.is_conv}
    pools = [node for node in graph.nodes if integers and node.op == "MaxPool" and id(node.inputs[0]) not in tensors]
    floats = {id(node) for node in pools}
    for key, tensor in tensors.items():
        own = [node for node in edit.consumers(tensor) if edit.in_graph(graph, node)]  # a body has pairs of its own
        chosen = own if key in everywhere else readers[key]
        others = edit.is_output(graph, tensor) or len(edit.consumers(tensor)) > len(chosen)
        source = id(edit.producer(tensor))
        if source in floats or (others and source in products):
            inserter.keep_apart(tensor)
        inserter.activation(tensor, ranges[tensor.name], chosen)
        for node in chosen if integers else ():
            if node.op in _REQUANTIZED and id(node) not in quantized:
                inserter.keep_float(node)


def _centered(
    inserter: Inserter,
    sites: list[Linear],
    ranges: Mapping[str, Range],
    free: Mapping[str, Range],
    means: Mapping[tuple[str, int | None], Any],
) -> tuple[dict[str, Range], dict[tuple[str, int | None], Any]]:
    """Centers the inputs that have a free range; ranges and means by the names that the sites read then."""
    ranges, means = dict(ranges), dict(means)
    readers: dict[str, list[Linear]] = {}
    for site in sites:
        if site.data.name in free:
            readers.setdefault(site.data.name, []).append(site)
    views = {id(one.output): one for one in (*linears(inserter.graph), *sites)}
    for name, own in readers.items():
        if read := center.center(inserter, own[0].data, free[name], own, views):
            ranges[read.name] = free[name]
            means |= {(read.name, site.in_axis): means.get((name, site.in_axis)) for site in own}
    return ranges, means


def _unified(graph: gs.Graph, ranges: Mapping[str, Range]) -> dict[str, Range]:
    """The ranges, with that of its input for the result of an operator that only moves values."""
    unified = dict(ranges)
    for node in graph.nodes:
        if node.op in _MOVING and node.inputs[0].name in unified and node.outputs[0].name in unified:
            unified[node.outputs[0].name] = unified[node.inputs[0].name]
    return unified
