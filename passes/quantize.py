"""INT8 quantization with explicit, per-channel QDQ nodes.

    y = W x + b   becomes   y = DQ(W_q) DQ(Q(x)) + b',     b' = b - (W_q - W) E[x]
    W_q per output channel, symmetric int8;  x per tensor with a calibrated range;  b' float (bias correction, DFQ)

Every Conv, Gemm and MatMul with a constant weight is a site. What is left in float is refused with the reason: what
TensorRT would run in float anyway (ConvTranspose, fewer than 16 channels), what was excluded, and what 8 bits cannot
represent: an activation whose range is so wide against its values that rounding would leave a signal-to-noise ratio
below ``min_activation_snr`` dB.

Source of the bias correction: Nagel et al., Data-Free Quantization, ICCV 2019, section 4.2, with E[x] measured.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes import edit
from channelfold.passes.base import Context, DataError, Outcome, Pass
from channelfold.passes.linear import LINEAR_OPS, Linear, NotLinear, view
from channelfold.passes.qdq import Inserter, Range, opset_of_scales, summary
from channelfold.runtime import calibrators
from channelfold.runtime.calibrators import Calibrator
from channelfold.runtime.graph_io import infer_shapes
from channelfold.runtime.statistics import TensorStatistics, collect

MIN_CHANNELS = 16  # TensorRT runs narrower operators in float, or slower than float

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
_FUSED_ACTIVATIONS = ("Relu", "Clip")


@dataclass(frozen=True)
class Quantize(Pass):
    """Inserts per-channel INT8 QDQ nodes around Conv, Gemm and MatMul, with calibrated activation ranges.

    ``exclude``: patterns of node names (``*`` and ``?``) that stay float; ``exclude_ops``: operator types that do.
    ``percentile``: of the calibrator of that name. ``min_activation_snr``: in dB; 0 quantizes whatever it costs.
    """

    name: ClassVar[str] = "quantize"
    kind: ClassVar[Literal["exact", "calibrated", "lossy"]] = "calibrated"
    needs_opset: ClassVar[int] = 13

    calibrator: Calibrator = "mse"
    target: Literal["tensorrt", "onnxruntime"] = "tensorrt"
    exclude: tuple[str, ...] = ()
    exclude_ops: tuple[str, ...] = ()
    min_activation_snr: float = 15.0
    percentile: float = 99.999
    correct_bias: bool = True

    def opset_for(self, graph: gs.Graph) -> int:
        return opset_of_scales(graph)

    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        if ctx.calibration is None:
            raise DataError("Quantization needs calibration data", "Give some with --calibration")
        outcome = Outcome()
        infer_shapes(graph)
        sites = list(self._sites(graph, outcome))
        between = _between(graph, sites) if self.target == "onnxruntime" else []
        axes: dict[str, int | None] = {tensor.name: None for tensor in between}
        axes |= {site.data.name: site.in_axis for site in sites}
        statistics = collect(graph, axes, ctx.calibration, ctx.progress)
        ranges = {name: self._range(seen) for name, seen in statistics.items()}
        facts = {name: _facts(statistics[name], seen) for name, seen in ranges.items()}
        kept = [site for site in sites if self._is_representable(site, statistics, facts, outcome)]
        for site in kept:
            limit = max(-ranges[site.data.name].low, ranges[site.data.name].high)
            outcome.change(site.name, f"{site.node.op}: int8, activation {site.data.name} up to {limit:.4g}")
        means = {name: seen.channel_mean for name, seen in statistics.items()} if self.correct_bias else {}
        _insert(graph, kept, between, ranges, means, self.target)
        outcome.facts = summary(graph, kept) | {"activations": facts}
        return outcome

    def _sites(self, graph: gs.Graph, outcome: Outcome) -> Iterator[Linear]:
        for node in graph.nodes:
            if node.op not in LINEAR_OPS:
                continue
            try:
                linear = view(graph, node)
            except NotLinear as error:
                reason = str(error)
            else:
                reason = self._why_float(linear)
                if not reason:
                    yield linear
                    continue
            outcome.refuse(node.name, f"{node.op} stays float: {reason}", reason)

    def _why_float(self, linear: Linear) -> str:
        """Why a site is left in float by the rules; empty when it is not."""
        node = linear.node
        outs, ins = linear.channels
        for pattern in self.exclude:
            if fnmatch.fnmatchcase(node.name, pattern):
                return f"excluded by pattern {pattern!r}"
        if node.op in self.exclude_ops:
            return f"excluded by operator type {node.op}"
        if node.op == "ConvTranspose":
            return "ConvTranspose runs in float anyway"
        if linear.weight_input == 0:
            return "its weight is the left operand"
        if linear.dtype not in (np.float32, np.float16):
            return f"it computes in {linear.dtype}, expected float32 or float16"
        if min(outs, ins) < MIN_CHANNELS:
            return f"fewer than {MIN_CHANNELS} channels"
        return ""

    def _range(self, seen: TensorStatistics) -> Range:
        low, high = min(seen.minimum, 0.0), max(seen.maximum, 0.0)
        if seen.total == 0:
            return Range(0.0, 0.0)
        levels = 127 if self.target == "tensorrt" else max(127, int(255 * seen.amax / (high - low or 1.0)))
        limit = calibrators.threshold(seen, self.calibrator, percentile=self.percentile, levels=levels)
        return Range(max(low, -limit), min(high, limit))

    def _is_representable(self, site: Linear, statistics: dict, facts: dict, outcome: Outcome) -> bool:
        name = site.data.name
        snr = facts[name]["snr_db"]
        if statistics[name].total == 0:
            reason = "no calibration sample reached its activation"
        elif snr is not None and snr < self.min_activation_snr:
            reason = "8 bits cannot represent its activation"
        else:
            return True
        detail = f" ({name}: {snr} dB, {self.min_activation_snr:g} wanted)" if snr is not None else f" ({name})"
        outcome.refuse(site.name, f"{site.node.op} stays float: {reason}{detail}", reason)
        return False


def _between(graph: gs.Graph, sites: list[Linear]) -> list[gs.Variable]:
    """What onnxruntime wants quantized besides what sites read: results of Conv and Gemm, and what carries them on."""
    known = {id(site.data) for site in sites}
    found: list[gs.Variable] = []
    conv = {id(site.node) for site in sites if site.node.op in ("Conv", "Gemm")}
    for node in graph.nodes:
        result = node.outputs[0] if node.outputs else None
        if result is None or edit.is_output(graph, result) or not edit.is_float(result):
            continue
        inputs = [t for t in node.inputs if not isinstance(t, gs.Constant) and not t.is_empty()]
        carried = node.op in _BETWEEN and bool(inputs) and all(id(t) in known for t in inputs)
        if id(node) in conv:
            reader = edit.sole_consumer(graph, result)
            if reader is not None and reader.op in _FUSED_ACTIVATIONS:
                result = reader.outputs[0]
                if edit.is_output(graph, result):
                    continue
        elif not carried or (node.op in ("Add", "Mul") and len(inputs) < 2):
            continue
        if id(result) not in known:
            known.add(id(result))
            found.append(result)
    return found


def _insert(
    graph: gs.Graph,
    sites: list[Linear],
    between: list[gs.Variable],
    ranges: dict[str, Range],
    means: dict[str, np.ndarray | None],
    target: str,
) -> None:
    """Puts the QDQ nodes around every site."""
    inserter = Inserter(graph, symmetric=target == "tensorrt")
    tensors = {id(tensor): tensor for tensor in [*between, *(site.data for site in sites)]}
    readers: dict[int, list[gs.Node]] = {key: [] for key in tensors}
    for site in sites:
        readers[id(site.data)].append(site.node)
        scales = inserter.weight(site, ranges[site.data.name], means.get(site.data.name))
        if target == "onnxruntime":
            inserter.bias(site, scales, ranges[site.data.name])
    for key, tensor in tensors.items():
        everyone = target == "onnxruntime"
        inserter.activation(tensor, ranges[tensor.name], edit.consumers(tensor) if everyone else readers[key])
    inserter.finish()
    edit.remove_dead(graph)


def _facts(statistics: TensorStatistics, seen: Range) -> dict[str, Any]:
    """What a report says of an activation: its range, what is covered, and what rounding leaves of it."""
    if statistics.total == 0:
        return {"minimum": None, "maximum": None, "low": 0.0, "high": 0.0, "snr_db": None, "masked": statistics.masked}
    snr = calibrators.snr(statistics, max(-seen.low, seen.high))
    return {
        "minimum": statistics.minimum,
        "maximum": statistics.maximum,
        "low": seen.low,
        "high": seen.high,
        "snr_db": round(snr, 2) if np.isfinite(snr) else None,
        "masked": statistics.masked,
    }
