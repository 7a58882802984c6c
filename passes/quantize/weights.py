"""Weights alone in 8 or 4 bits: activations and arithmetic stay as they are.

    W x   becomes   DQ(W_q) x,    W_q in a format of ``layers/formats``, rounded by one of ``rounders``

The file shrinks to a quarter of float32 with 8 bits, to an eighth with 4 bits. The runtime expands the weights when it
uses them, so this saves memory and memory traffic, not arithmetic. With calibration data, biases make up for the mean
error of the rounded weights.

tensorrt      reads every format inside its product kernels, but for groups that span a whole output channel, which it
              dequantizes in front of each product: groups are halved until a channel has two.
onnxruntime   reads integers inside its kernel (MatMulNBits) where the inputs are the first axis of the weight; any
              other layout, and floats of 8 and 4 bits, would be dequantized on every call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Outcome
from channelfold.passes.layers.formats import FORMATS, Format
from channelfold.passes.layers.linear import Linear, usable
from channelfold.passes.quantize import QuantizeWeights
from channelfold.passes.quantize.cells import quantize_cells
from channelfold.passes.quantize.qdq import Inserter, excluded, opset_of_scales, summary, why_not_int8
from channelfold.passes.quantize.rounders import Rounder, by_scale, gptq, rounded
from channelfold.passes.quantize.tables import quantize_tables
from channelfold.runtime.errors import DataError
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import infer_shapes
from channelfold.runtime.io.snapshot import Snapshot
from channelfold.runtime.stats.channels import ChannelMoments
from channelfold.runtime.stats.covariance import Moments, collect
from channelfold.runtime.stats.observe import by_name, observe


class Work(QuantizeWeights):
    def least_opset(self, graph: gs.Graph) -> int:
        return max(self._format.opset, opset_of_scales(graph))

    @property
    def _format(self) -> Format:
        format = FORMATS[self.weights]
        return dataclasses.replace(format, group=self.group) if format.group else format

    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        if self.rounder == "gptq" and ctx.calibration is None:
            raise DataError("GPTQ needs calibration data", "Give some with --calibration")
        outcome = Outcome()
        cells = quantize_cells(graph, outcome, self._format, self)
        inserter = Inserter(graph)
        kept = []
        sites = list(usable(graph, outcome, self._why_float, "stays float"))
        for linear, seen in self._measured(graph, sites, ctx):
            ctx.progress("Quantizing weights", len(kept), len(sites))
            outcome.change(linear.name, f"{linear.node.op}: {self._quantize(inserter, linear, seen)}")
            kept.append(linear)
        if quantize_tables(inserter, outcome, self._format, self) or kept or cells:
            inserter.finish()
            edit.remove_dead(graph)
        outcome.facts = summary(graph, kept, cells)
        return outcome

    def _measured(
        self, graph: gs.Graph, sites: list[Linear], ctx: Context
    ) -> Iterator[tuple[Linear, Moments | ChannelMoments | None]]:
        """Every site with what the data say of its input: E[x x^T] for GPTQ, else E[x^2], None without data."""
        if ctx.calibration is None:
            yield from ((site, None) for site in sites)
            return
        infer_shapes(graph)
        whole = Snapshot.of(graph).graph()  # the weights of ``graph`` are replaced while the data run
        joint: dict[tuple[str, int], list[Linear]] = {}
        alone = []
        for site in sites:
            if id(site.source._values) in ctx.shared:
                yield site, None  # whatever the data of a part are, all parts get the same codes
            elif self.rounder == "gptq" and site.groups == 1 and all(size == 1 for size in site.kernel):
                joint.setdefault((site.data.name, site.in_axis), []).append(site)
            else:
                alone.append(site)
        moments = {(site.data.name, site.in_axis): ChannelMoments(site.in_axis) for site in alone}
        observe(whole, by_name((name, seen) for (name, _), seen in moments.items()), ctx.data, ctx.progress)
        for site in alone:
            seen = moments[site.data.name, site.in_axis]
            yield site, seen if seen.positions else None
        wanted = ((Moments({name: axis}), found[0].channels[1]) for (name, axis), found in joint.items())
        for group in collect(whole, wanted, ctx.data, ctx.progress):
            for products in group:
                yield from ((site, products) for site in joint[next(iter(products.axes.items()))])

    def _quantize(self, inserter: Inserter, linear: Linear, seen: Moments | ChannelMoments | None) -> str:
        """Stores the weight of a linear in the format; says how."""
        inputs_first = self.target == "onnxruntime"
        if inserter.shared(linear, inputs_first):
            return f"{self.weights} weight, shared"
        weight = linear.weight()
        format = self._format.fitted(weight.shape[1])
        codes, scales = rounded(weight, self._rounder(linear, weight, seen, format), format)
        mean = None if seen is None else np.asarray(seen.mean)
        inserter.store(linear, codes, scales, format, mean, inputs_first=inputs_first)
        groups = f" in groups of {format.group}" if format.group else ""
        return f"{self.weights} weight{groups}{', GPTQ' if isinstance(seen, Moments) else ''}"

    def _rounder(
        self, linear: Linear, weight: np.ndarray, seen: Moments | ChannelMoments | None, format: Format
    ) -> Rounder:
        if isinstance(seen, Moments):
            return gptq(format, linear.dtype, seen.covariance + np.outer(seen.mean, seen.mean))
        importance = None
        if seen is not None:
            power = np.square(seen.rms).astype(np.float32)
            power = (
                linear.spread_inputs(power) if linear.groups > 1 else power.reshape(1, -1, *[1] * len(linear.kernel))
            )
            importance = np.broadcast_to(power, (len(power), *weight.shape[1:])).reshape(len(power), -1)
        return by_scale(format, linear.dtype, importance, self.rounder != "nearest")

    def _why_float(self, linear: Linear) -> str:
        if reason := excluded(self, linear.node):
            return reason
        if linear.node.op == "ConvTranspose" and linear.groups > 1:
            return "the output channels of a grouped ConvTranspose are not on one axis of its weight"
        if self._format.group and linear.is_conv:
            return "no runtime reads the weight of a convolution in groups of inputs"
        if linear.weight_input == 0 and (self._format.group or self.target == "onnxruntime"):
            return "its weight is the left operand, which no kernel reads in this format"
        return why_not_int8(linear)
