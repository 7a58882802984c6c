"""High biases absorbed by the next layer: the lower bound of a channel is subtracted from its activation.

    y = W2 relu(W1 x + b1) + b2    becomes    y = W2 relu(W1 x + b1 - c) + b2 + W2 c

The two are equal wherever W1 x + b1 >= c, because relu(u) = relu(u - c) + c for u >= c >= 0. Calibration gives c:

    c = max(0, min(minimum, mean - sigmas * deviation))

The second bound protects a channel of which calibration saw few values. The activation then starts at zero and takes
fewer steps of a range that all channels share. ``equalize`` makes channels with high biases, because equalization
scales a bias together with its row.

Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019, section 4.1.3.
There mean and deviation are beta and gamma of a BatchNormalization; here calibration measures both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Outcome, Refused
from channelfold.passes.layers.affine import Layout, readers
from channelfold.passes.layers.linear import Linear, cast, linears, view
from channelfold.passes.smooth import AbsorbBias
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import infer_shapes
from channelfold.runtime.stats.channels import ChannelMoments
from channelfold.runtime.stats.observe import by_name


class Work(AbsorbBias):
    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        infer_shapes(graph)
        outcome = Outcome()
        sites = list(self._sites(graph, outcome))
        seen = {site.activation.name: ChannelMoments(site.axis) for site in sites}
        if sites:
            ctx.observe(graph, by_name(seen.items()))
        for site in sites:
            node = site.writer.node
            with outcome.refusing(node.name, f"{node.op} keeps its bias"):
                what = _absorb(graph, site, seen[site.activation.name], self.sigmas)
                outcome.change(node.name, f"{node.op}: {what}")
        return outcome

    def _sites(self, graph: gs.Graph, outcome: Outcome) -> Iterator[_Site]:
        """The linears in front of a Relu; refuses a linear where a shift does not reach all readers of the Relu."""
        for linear in linears(graph):
            relu = edit.sole_consumer(graph, linear.output)
            if relu is None or relu.op != "Relu" or not edit.is_standard(relu):
                continue
            with outcome.refusing(linear.name, f"{linear.node.op} keeps its bias"):
                if reason := self.patterns.why_not(linear.name):
                    raise Refused(reason)
                activation, axis = relu.outputs[0], linear.out_axis
                size = edit.rank(activation)
                if axis < 0 and size is None:
                    raise Refused(f"the rank of {activation.name!r} is unknown")
                axis = axis % size if size else axis
                yield _Site(linear, activation, axis, _readers(graph, activation, axis))


@dataclass(frozen=True)
class _Site:
    """A linear ``writer``, the ``activation`` behind its Relu with the channels along ``axis``, and the readers."""

    writer: Linear
    activation: gs.Tensor
    axis: int
    readers: list[tuple[Linear, Layout]]


def _lower_bound(seen: ChannelMoments, sigmas: float) -> np.ndarray:
    """c of each channel, rounded towards zero to float32."""
    bound = np.maximum(0, np.minimum(seen.minimum, seen.mean - sigmas * np.sqrt(seen.variance)))
    return np.nextafter(bound.astype(np.float32), np.float32(0)).astype(np.float64)


def _readers(graph: gs.Graph, tensor: gs.Tensor, axis: int) -> list[tuple[Linear, Layout]]:
    """The linears that read the channels of a tensor. Raises Refused where a shift does not reach all readers."""
    found = readers(graph, tensor, Layout(axis))
    if not found:
        raise Refused("nothing reads it")
    for _, layout in found:
        if layout.no_shift:
            raise Refused(layout.no_shift)
    return found


def _absorb(graph: gs.Graph, site: _Site, seen: ChannelMoments, sigmas: float) -> str:
    """Moves c from the bias of the writer to the biases of the readers. Raises Refused, with nothing changed."""
    if not seen.positions:
        raise Refused("no calibration sample reached it")
    bound = _lower_bound(seen, sigmas)
    if not bound.any():
        raise Refused(f"no channel stays above zero by {sigmas:g} standard deviations and in every sample")
    shifts = [(site.writer, -bound)]
    for reader, layout in site.readers:
        shifts.append((reader, reader.respond(reader.weight().astype(np.float64), layout.expand(bound))))
    biases = []
    for linear, shift in shifts:
        linear = view(graph, linear.node)  # viewed anew, because a linear can be reader and writer
        old = linear.bias()
        biases.append((linear, cast(shift if old is None else old + shift, linear.dtype)))
    for linear, bias in biases:
        linear.set_bias(bias)
    before, left = np.max(seen.maximum), np.max(seen.maximum - bound)
    return f"up to {bound.max():.3g} out of {np.count_nonzero(bound)} channels; largest {before:.4g} -> {left:.4g}"
