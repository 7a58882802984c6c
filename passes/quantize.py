"""INT8 quantization with explicit, per-channel QDQ nodes.

    y = W x + b   becomes   y = DQ(W_q) DQ(Q(x)) + b
    W_q per output channel, symmetric int8;  x per tensor, symmetric int8 with a calibrated range;  b stays float

Every Conv, Gemm and MatMul with a constant weight is a site. Its activation gets one Q and one DQ, shared by all the
sites that read it. What is left in float is refused with the reason: what TensorRT would run in float anyway
(ConvTranspose, fewer than 16 channels), what was excluded, and what 8 bits cannot represent: an activation whose range
is so wide against its values that rounding would leave a signal-to-noise ratio below ``min_activation_snr`` dB.

Rules of the forms: tensorrt (explicit quantization), onnxruntime (see ``quantize_onnxruntime``).
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes import edit
from channelfold.passes.base import Context, DataError, Outcome, Pass
from channelfold.passes.linear import LINEAR_OPS, Linear, NotLinear, view
from channelfold.passes.qdq import activation_qdq, positive_scale, weight_dq
from channelfold.runtime import calibrators
from channelfold.runtime.calibrators import Calibrator
from channelfold.runtime.graph_io import infer_shapes
from channelfold.runtime.statistics import TensorStatistics, collect

MIN_CHANNELS = 16  # TensorRT runs narrower ones in float, or slower than float


@dataclass(frozen=True)
class Quantize(Pass):
    """Inserts per-channel INT8 QDQ nodes around Conv, Gemm and MatMul, with calibrated activation ranges."""

    name: ClassVar[str] = "quantize"
    kind: ClassVar[Literal["exact", "calibrated", "lossy"]] = "calibrated"
    needs_opset: ClassVar[int] = 13

    calibrator: Calibrator = "mse"
    percentile: float = 99.999
    target: Literal["tensorrt", "onnxruntime"] = "tensorrt"
    exclude: tuple[str, ...] = field(default=())
    exclude_ops: tuple[str, ...] = field(default=())
    min_activation_snr: float = 0.0

    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        if ctx.calibration is None:
            raise DataError("Quantization needs calibration data", "Give them with --calibration.")
        outcome = Outcome()
        infer_shapes(graph)
        sites = list(self._sites(graph, outcome))
        names = list(dict.fromkeys(site.data.name for site in sites))
        statistics = collect(graph, names, ctx.calibration, ctx.progress)
        limits = {name: self._limit(statistics[name]) for name in names}
        snrs = {name: calibrators.snr(statistics[name], limits[name]) for name in names}
        kept = [site for site in sites if self._is_representable(site, statistics, snrs, outcome)]
        for site in kept:
            outcome.change(
                site.name, f"{site.node.op}: int8, activation {site.data.name} ±{limits[site.data.name]:.4g}"
            )
        _insert(graph, kept, limits)
        total = sum(node.op in LINEAR_OPS for node in graph.nodes)
        outcome.facts = {
            "linears": total,
            "quantized": len(kept),
            "quantized_nodes": [site.name for site in kept],
            "activations": {name: _facts(statistics[name], limits[name], snrs[name]) for name in names},
        }
        return outcome

    def _sites(self, graph: gs.Graph, outcome: Outcome):
        for node in graph.nodes:
            if node.op not in LINEAR_OPS:
                continue
            try:
                linear = view(graph, node)
                reason = self._why_float(linear)
            except NotLinear as error:
                reason = str(error)
            if reason:
                outcome.refuse(node.name, f"{node.op} stays float: {reason}", reason)
            else:
                yield linear

    def _why_float(self, linear: Linear) -> str:
        """Why a site is left in float by the rules; empty when it is not."""
        node = linear.node
        for pattern in self.exclude:
            if fnmatch.fnmatchcase(node.name, pattern):
                return f"excluded by pattern {pattern!r}"
        if node.op in self.exclude_ops:
            return f"excluded by operator type {node.op}"
        if node.op == "ConvTranspose":
            return "TensorRT runs ConvTranspose in float"
        if linear.weight_input == 0:
            return "its weight is the left operand"
        if linear.dtype != np.float32:
            return f"its type is {linear.dtype}, expected float32"
        outs, ins = linear.channels
        if outs < MIN_CHANNELS or ins < MIN_CHANNELS:
            return f"fewer than {MIN_CHANNELS} channels"
        return ""

    def _limit(self, statistics: TensorStatistics) -> float:
        return calibrators.threshold(statistics, self.calibrator, percentile=self.percentile)

    def _is_representable(self, site: Linear, statistics: dict, snrs: dict, outcome: Outcome) -> bool:
        seen, name = statistics[site.data.name], site.data.name
        if seen.total == 0:
            reason = "no calibration sample reached it"
        elif snrs[name] < self.min_activation_snr:
            reason = f"8 bits leave its activation a signal-to-noise ratio of {snrs[name]:.1f} dB"
        else:
            return True
        outcome.refuse(site.name, f"{site.node.op} stays float: {reason} ({name})", reason.split(" of ")[0])
        return False


def _insert(graph: gs.Graph, sites: list[Linear], limits: dict[str, float]) -> None:
    """Puts the QDQ nodes in front of every site."""
    weights: dict = {}
    activations: dict[int, gs.Variable] = {}
    added: dict[int, list[gs.Node]] = {}
    for site in sites:
        data = site.data
        new = added.setdefault(id(site.node), [])
        if id(data) not in activations:
            scale = positive_scale(limits[data.name], 127, site.dtype)
            nodes, activations[id(data)] = activation_qdq(graph, data, scale, np.array(0, np.int8))
            new += nodes
        new += weight_dq(graph, site, weights)
        edit.set_input(site.node, 1 - site.weight_input, activations[id(data)])
    graph.nodes[:] = [n for node in graph.nodes for n in (*added.get(id(node), ()), node)]
    edit.remove_dead(graph)


def _facts(statistics: TensorStatistics, limit: float, snr: float) -> dict:
    return {
        "minimum": statistics.minimum if statistics.total else None,
        "maximum": statistics.maximum if statistics.total else None,
        "limit": limit,
        "snr_db": round(snr, 2) if np.isfinite(snr) else None,
        "masked": statistics.masked,
    }
