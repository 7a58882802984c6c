"""Products of two activations in int8: queries and keys, probabilities and values.

    y = A B   becomes   y = DQ(Q(A)) DQ(Q(B)),    a scale for each tensor, from calibration data

TensorRT multiplies these in int8, as a rule in kernels of their own. In float16 and bfloat16 it otherwise computes an
attention in one kernel, which int8 products break up; in float32 it has no such kernel, and int8 is what saves traffic.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Outcome, Refused, TwoActivations
from channelfold.passes.layers.formats import SCALES
from channelfold.passes.layers.linear import live_linears, view
from channelfold.passes.quantize import QuantizeAttention, calibrators
from channelfold.passes.quantize.proven import in_int8, planned
from channelfold.passes.quantize.qdq import MIN_CHANNELS, Inserter, Range, excluded, opset_of_scales
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import infer_shapes
from channelfold.runtime.stats.histograms import TensorStatistics
from channelfold.runtime.stats.observe import by_name, observe

_LEVELS = 127


class Work(QuantizeAttention):
    def least_opset(self, graph: gs.Graph) -> int:
        return opset_of_scales(graph)

    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        outcome = Outcome()
        infer_shapes(graph)
        found = [node for node in live_linears(graph) if _multiplies_activations(graph, node)]
        sites = []
        for node in found:
            with outcome.refusing(node.name, f"{node.op} stays float"):
                if reason := excluded(self, node) or _why_float(node):
                    raise Refused(reason)
                sites.append(node)
        seen = {tensor.name: TensorStatistics(None) for node in sites for tensor in node.inputs}
        if sites:
            observe(graph, by_name(seen.items()), ctx.data, ctx.progress)
        limits: dict[str, dict[str, float]] = {}
        for node in sites:
            with outcome.refusing(node.name, f"{node.op} stays float"):
                limits[node.name] = {t.name: self._limit(t.name, seen[t.name]) for t in node.inputs}
        kept = [node for node in sites if node.name in limits]

        def insert(into: gs.Graph, nodes: list[gs.Node]) -> Inserter:
            inserter = Inserter(into)
            for node in nodes:
                for tensor in list(node.inputs):
                    limit = limits[node.name][tensor.name]
                    inserter.activation(tensor, Range(-limit, limit), [node])
            return inserter

        if self.verify_plan and kept:
            why_float = planned(self.verify_plan, ctx, outcome, graph)
            kept, _ = in_int8(graph, kept, outcome, insert, why_float, lambda copy: {n.name: n for n in copy.nodes})
        for node in kept:
            outcome.change(node.name, f"{node.op}: int8, activations {_listed(limits[node.name])}")
        insert(graph, kept).finish()
        outcome.facts = {"products": len(found), "quantized_products": len(kept)}
        return outcome

    def _limit(self, name: str, seen: TensorStatistics) -> float:
        """The largest magnitude that 8 bits represent of an activation. Raises Refused where 8 bits are too few."""
        if seen.total == 0 or seen.amax == 0:
            raise Refused("no calibration sample has values other than zero in its activation")
        limit = calibrators.threshold(seen, "mse", levels=_LEVELS)
        snr = calibrators.snr(seen, limit, _LEVELS)
        if snr < self.min_activation_snr:
            reason = "8 bits cannot represent its activation"
            raise Refused(f"{reason} ({name}: {snr:.2f} dB, {self.min_activation_snr:g} wanted)", reason)
        return limit


def _multiplies_activations(graph: gs.Graph, node: gs.Node) -> bool:
    try:
        view(graph, node)
    except TwoActivations:
        return True
    except Refused:
        return False
    return False


def _why_float(node: gs.Node) -> str:
    """Why a product is left in float; empty where it is not."""
    if node.op != "MatMul":
        return "TensorRT multiplies two activations in int8 in MatMul alone"
    if any(edit.dtype(tensor) not in SCALES for tensor in node.inputs):
        return "it computes neither in float32 nor in float16"
    first, second = (tensor.shape or () for tensor in node.inputs)
    sizes = [size for size in (*first[-1:], *second[-1:]) if isinstance(size, int | np.integer)]
    return f"fewer than {MIN_CHANNELS} channels" if min(sizes, default=MIN_CHANNELS) < MIN_CHANNELS else ""


def _listed(limits: Mapping[str, float]) -> str:
    return ", ".join(f"{name} up to {limit:.4g}" for name, limit in limits.items())
