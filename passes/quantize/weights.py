"""Weights in 8 to 2 bits, with float activations or with activations in a format that multiplies with them.

    W x   becomes   DQ(W_q) x          W_q in a format of ``layers/formats``, rounded by one of ``rounders``
                    DQ(W_q) DQ(Q(x))   with activations in int8, fp8 or fp4

The file shrinks to a quarter of float32 with 8 bits, to an eighth with 4 bits. With float activations the runtime
expands the weights when it uses them, so this saves memory and memory traffic, not arithmetic. With calibration data,
biases make up for the mean error of the rounded weights. ``layers/targets`` knows which target runs which pair.

tensorrt      reads every format inside its product kernels, but for groups that span a whole output channel, which it
              dequantizes in front of each product: groups are halved until a channel has two.
onnxruntime   reads integers inside its kernel (MatMulNBits) where the inputs are the first axis of the weight; any
              other layout, and floats of 8 and 4 bits, would be dequantized on every call. ``nbits`` writes the
              operator of the kernel itself where two nodes read one weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Outcome, Patterns
from channelfold.passes.layers.borders import inside
from channelfold.passes.layers.formats import FORMATS, Format
from channelfold.passes.layers.linear import Linear, usable
from channelfold.passes.quantize import QuantizeWeights, calibrators
from channelfold.passes.quantize.cells import quantize_cells
from channelfold.passes.quantize.done import Done
from channelfold.passes.quantize.inputs import Inputs, Products, joint
from channelfold.passes.quantize.integers import multiply_integers, why_not_integers
from channelfold.passes.quantize.nbits import FAST, many_readers, multiply_nbits, why_not_nbits
from channelfold.passes.quantize.qdq import (
    MIN_CHANNELS,
    Inserter,
    Range,
    excluded,
    opset_of_scales,
    range_facts,
    summary,
    why_not_int8,
)
from channelfold.passes.quantize.rounders import Rounded, Rounder, by_scale, gptq, rounded
from channelfold.passes.quantize.storage import store_rest
from channelfold.passes.quantize.tables import quantize_tables
from channelfold.runtime.errors import DataError
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import infer_shapes
from channelfold.runtime.io.snapshot import Snapshot
from channelfold.runtime.stats.channels import ChannelMoments
from channelfold.runtime.stats.histograms import TensorStatistics
from channelfold.runtime.stats.observe import by_name

Seen = Products | Rounded | ChannelMoments | None
_UNSEEN = "no calibration sample has values other than zero in its activation"
_OF_TABLES = {"int8": "int8", "fp8": "fp8", "mxfp8": "fp8"}  # all others int4, which every target takes rows of
_JOINT = ("gptq", "descent")
_KEPT = {"none": ("int8", "none"), "int8": ("int8", "int8"), "fp8": ("fp8", "fp8"), "fp4": ("fp8", "fp8")}


class Work(QuantizeWeights):
    def least_opset(self, graph: gs.Graph) -> int:
        return max(self._format.opset, opset_of_scales(graph))

    @property
    def _format(self) -> Format:
        return self._of(self.weights)

    def _of(self, name: str) -> Format:
        format = FORMATS[name]
        if name == "dgq" and self.target == "onnxruntime":
            format = dataclasses.replace(format, grid="int7")
        free = format.group and format.grid not in ("fp8", "2")
        return dataclasses.replace(format, group=self.group) if free and self.group else format

    def _fitted(self, name: str, ins: int) -> Format:
        """A format with groups for a weight with ``ins`` inputs."""
        return self._of(name).fitted(ins, whole=self.target == "tensorrt" or name == "dgq")

    def _formats(self, node: gs.Node) -> tuple[str, str]:
        """The formats of the weight and of the activation of a node."""
        if Patterns(self.keep_8bit).include and not Patterns(self.keep_8bit).why_not(node.name):
            return _KEPT[self.activations]
        return self.weights, self.activations

    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        if self.rounder in _JOINT and ctx.calibration is None:
            raise DataError("GPTQ needs calibration data", "Give some with --calibration")
        outcome = Outcome()
        cells = quantize_cells(graph, outcome, self._of(_OF_TABLES.get(self.weights, "int4")), self)
        inserter = Inserter(graph)
        kept = []
        sites = list(usable(graph, outcome, self._why_float, "stays float"))
        if ctx.calibration is not None:
            inserter.inside = inside(graph, sites, ctx.data)
        limits = self._limits(graph, sites, ctx) if self.activations != "none" else {}
        for site in [site for site in sites if not limits.get(site.data.name, 1.0)]:
            outcome.refuse(site.name, f"{site.node.op} stays float: {_UNSEEN} ({site.data.name})", _UNSEEN)
        sites = [site for site in sites if limits.get(site.data.name, 1.0)]
        ranges: dict[str, object] = {site.name: None for site in sites}
        made: dict[str, Rounded] = {}
        for linear, seen in self._measured(graph, sites, ctx, made):
            made.clear()
            ctx.progress("Quantizing weights", len(kept), len(sites))
            ranges[linear.name] = range_facts(linear)
            what = self._quantize(inserter, linear, seen, limits, made)
            outcome.change(linear.name, f"{linear.node.op}: {what}")
            kept.append(linear)
        if quantize_tables(inserter, outcome, self._of_table, self) or kept or cells:
            inserter.finish()
            edit.remove_dead(graph)
        outcome.facts = summary(graph, kept, cells) | {"ranges": list(ranges.values())}
        if not ctx.compared:
            store_rest(graph, outcome, self)
        return outcome

    def _of_table(self, node: gs.Node) -> Format:
        return self._of(_OF_TABLES.get(self._formats(node)[0], "int4"))

    def _limits(self, graph: gs.Graph, sites: list[Linear], ctx: Context) -> dict[str, float]:
        """The largest magnitude to represent of every activation; 0 where no sample reached it or all was zero."""
        infer_shapes(graph)
        statistics = {site.data.name: TensorStatistics(site.in_axis) for site in sites}
        ctx.observe(graph, by_name(statistics.items()))
        calibrator = "mse" if self.activations == "int8" else "minmax"
        return {
            name: calibrators.threshold(seen, calibrator) if seen.total else 0.0 for name, seen in statistics.items()
        }

    def _measured(
        self, graph: gs.Graph, sites: list[Linear], ctx: Context, made: dict[str, Rounded]
    ) -> Iterator[tuple[Linear, Seen]]:
        """Every site with what the data say of its input: E[x x^T] for GPTQ, else E[x^2], None without data.

        A site that an interrupted run has rounded comes with its codes. Before it asks for the next site, the caller
        leaves in ``made`` what became of the site.
        """
        if ctx.calibration is None:
            yield from ((site, None) for site in sites)
            return
        infer_shapes(graph)
        before = Snapshot.of(graph)
        whole = before.graph()  # the weights of ``graph`` are replaced while the data run
        together: list[Linear] = []
        alone = []
        for site in sites:
            if id(site.source._values) in ctx.shared:
                yield site, None  # whatever the data of a part are, all parts get the same codes
            elif self.rounder in _JOINT and joint(site):
                together.append(site)
            else:
                alone.append(site)
        moments = {(site.data.name, site.in_axis): ChannelMoments(site.in_axis) for site in alone}
        ctx.observe(whole, by_name((name, seen) for (name, _), seen in moments.items()))
        for site in alone:
            seen = moments[site.data.name, site.in_axis]
            yield site, seen if seen.positions else None
        if not together:
            return
        done = Done(ctx.keep, before, ctx.data, self)
        inputs = Inputs(whole, together, ctx.data, self.correct_inputs)
        for site, seen in inputs.run(done.find):
            yield site, seen
            if (layer := made.get(site.name)) is None:
                continue  # it shares the codes of another
            if isinstance(seen, Products):
                done.keep(site, layer)
            if self.correct_inputs:
                format = self._fitted(self._formats(site.node)[0], site.channels[1])
                inputs.take(site, layer.restored(format))

    def _quantize(
        self,
        inserter: Inserter,
        linear: Linear,
        seen: Seen,
        limits: dict[str, float],
        made: dict[str, Rounded],
    ) -> str:
        """Stores the weight of a linear in its format, and lets it read its activation in another; says how."""
        name, activations = self._formats(linear.node)
        inputs_first = self.target == "onnxruntime"
        says = f"{name} weight"
        integers = inputs_first and activations == "int8"
        format = self._fitted(name, linear.channels[1] // linear.groups)
        own = "nbits", inserter.key(linear, name)
        if shared := own in inserter.stored and not why_not_nbits(linear, format):
            multiply_nbits(inserter, linear, own, None, format, self.accuracy_level or FAST)
        elif not (shared := not integers and inserter.shared(linear, inputs_first, name)):
            layer = seen if isinstance(seen, Rounded) else self._rounded(linear, seen, format)
            made[linear.name] = layer
            if integers:
                multiply_integers(inserter, linear, layer, format)
            elif self._as_operator(linear, format, activations):
                multiply_nbits(inserter, linear, own, layer, format, self.accuracy_level or FAST)
            else:
                inserter.store(linear, layer, format, name, inputs_first)
            says += f" in groups of {format.group}" if format.group else ""
            says += ", GPTQ" if isinstance(seen, Products | Rounded) else ""
        linear.data.dtype = linear.dtype if activations != "none" else linear.data.dtype
        limit = limits.get(linear.data.name, 0.0)
        if activations == "fp4":
            inserter.activation_fp4(linear.data, limit, [linear.node])
        elif activations != "none" and not integers:
            floating = FORMATS[activations].floating
            inserter.activation(linear.data, Range(-limit, limit), [linear.node], floating)
        return says + (", shared" if shared else "") + ("" if activations == "none" else f", {activations} activation")

    def _as_operator(self, linear: Linear, format: Format, activations: str) -> bool:
        """Whether ONNX Runtime gets its own operator of a linear."""
        if self.target != "onnxruntime" or activations != "none" or why_not_nbits(linear, format):
            return False
        return self.accuracy_level is not None or many_readers(linear)

    def _rounded(self, linear: Linear, seen: Products | ChannelMoments | None, format: Format) -> Rounded:
        weight = linear.weight()
        if isinstance(seen, Products):
            weight = seen.wanted(weight.reshape(weight.shape[:2])).reshape(weight.shape)
            base = format.base(weight)
            rounder = gptq(format, linear.dtype, seen.factored, base, self.rounder == "descent")
            layer = rounded(weight, rounder, format, wide=True)
            return dataclasses.replace(layer, base=base, mean=seen.mean, later=seen.later)
        base = format.base(weight)
        layer = rounded(weight, self._by_scale(linear, seen, format, base), format)
        return dataclasses.replace(layer, base=base, mean=None if seen is None else seen.mean)

    def _by_scale(
        self, linear: Linear, seen: ChannelMoments | None, format: Format, base: np.ndarray | None
    ) -> Rounder:
        importance = None
        if seen is not None:
            power = (seen.variance if linear.takes_bias else np.square(seen.rms)).astype(np.float32)
            kernel = [1] * len(linear.kernel)
            power = linear.spread_inputs(power) if linear.groups > 1 else power.reshape(1, -1, *kernel)
            ins = linear.channels[1] // linear.groups
            importance = np.broadcast_to(power, (len(power), ins, *linear.kernel)).reshape(len(power), -1)
        return by_scale(format, linear.dtype, importance, self.rounder != "nearest", base)

    def _why_float(self, linear: Linear) -> str:
        if reason := excluded(self, linear.node):
            return reason
        name, activations = self._formats(linear.node)
        outs, ins = linear.channels
        format = self._fitted(name, ins)
        if linear.node.op == "ConvTranspose" and linear.groups > 1:
            return "the output channels of a grouped ConvTranspose are not on one axis of its weight"
        if format.group and linear.is_conv:
            return "no runtime reads the weight of a convolution in groups of inputs"
        if linear.weight_input == 0 and (format.group or self.target == "onnxruntime" or activations != "none"):
            return "its weight is the left operand, which no kernel reads in this format"
        if activations != "none" and linear.node.op == "ConvTranspose":
            return "ConvTranspose runs in float anyway"
        if activations != "none" and min(outs, ins) < MIN_CHANNELS:
            return f"fewer than {MIN_CHANNELS} channels"
        if name == "int2" and outs % 4:
            return "ONNX Runtime computes something else where the output channels are not a multiple of 4"
        if reason := format.why_not(ins, outs) if self.target == "tensorrt" else "":
            return reason
        if self.accuracy_level is not None and not linear.is_conv and (reason := why_not_nbits(linear, format)):
            return reason
        integers = self.target == "onnxruntime" and activations == "int8"
        return (why_not_integers(linear, format) if integers else "") or why_not_int8(linear)
