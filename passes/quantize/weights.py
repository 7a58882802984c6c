"""INT8 weights alone: activations and arithmetic stay as they are.

    W x   becomes   DQ(W_q) x,    W_q per output channel, symmetric int8

No data are needed, the file shrinks to a quarter of float32 (half of float16), and the runtime expands the weights when
it uses them, so this saves memory and memory traffic, not arithmetic.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Outcome
from channelfold.passes.layers.linear import Linear, live_linears, usable
from channelfold.passes.quantize import QuantizeWeights
from channelfold.passes.quantize.qdq import Inserter, opset_of_scales, summary, why_not_int8
from channelfold.runtime.io import edit


class Work(QuantizeWeights):
    def least_opset(self, graph: gs.Graph) -> int:
        return opset_of_scales(graph)

    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        outcome = Outcome()
        inserter = Inserter(graph)
        kept = []
        total = len(live_linears(graph))
        for done, linear in enumerate(usable(graph, outcome, self._why_float, "stays float")):
            ctx.progress("Quantizing weights", done, total)
            inserter.weight(linear)
            outcome.change(linear.name, f"{linear.node.op}: int8 weight")
            kept.append(linear)
        if kept:
            inserter.finish()
            edit.remove_dead(graph)
        outcome.facts = summary(graph, kept)
        return outcome

    def _why_float(self, linear: Linear) -> str:
        if reason := self.patterns.why_not(linear.name):
            return reason
        if linear.node.op in self.exclude_ops:
            return f"excluded by operator type {linear.node.op}"
        if linear.node.op == "ConvTranspose" and linear.groups > 1:
            return "the output channels of a grouped ConvTranspose are not on one axis of its weight"
        return why_not_int8(linear)
