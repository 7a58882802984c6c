"""Layers: a weight with the linears that read the weight, and the score of each of its entries.

    magnitude   s_ij = |w_ij|
    wanda       s_ij = |w_ij| rms(x_j)        the norm of x_j over the calibration data, up to a common factor

The squared wanda scores add up to the energy of the outputs for uncorrelated channels, so the dropped part of the sum
estimates the error. Linears that share one weight are one layer and share the sparse weight afterwards. The error of
the layer is the sum of their errors: rms(x_j)^2 is the sum over these linears.

Source: Sun et al., Wanda, ICLR 2024, section 3.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import DoesNotFit
from channelfold.passes.layers.linear import Linear, check_growth
from channelfold.runtime.io import edit
from channelfold.runtime.stats.channels import ChannelMoments
from channelfold.runtime.stats.observe import by_name

_QUIET = (
    1e-6  # of the largest rms: the least rms of a channel, so that weights of silent channels still differ by magnitude
)
_SAMPLE = 1 << 20  # bytes of a weight that are compressed to estimate the size of the whole


@dataclass
class Layer:
    """One weight and the ``linears`` that read it in one layout; ``power`` observes the input of each linear."""

    linears: list[Linear]
    power: list[ChannelMoments] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.linears[0].name

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in / groups, *kernel)"""
        first = self.linears[0]
        outs, ins = first.channels
        return outs, ins // first.groups, *first.kernel

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def observed(self) -> bool:
        return all(seen.positions for seen in self.power)

    def check_growth(self) -> None:
        """Raises Refused where the file would have to keep the old weight beside the new one."""
        first = self.linears[0]
        if not self._alone() or first.dtype.itemsize > np.dtype(first.source.dtype).itemsize:
            check_growth(first)

    def _alone(self) -> bool:
        """Whether these linears alone read the weight."""
        first = self.linears[0]
        known = {id(node) for node in first.chain} | {id(linear.node) for linear in self.linears}
        tensors = [first.source, *(node.outputs[0] for node in first.chain)]
        readers = [reader for tensor in tensors for reader in tensor.outputs]
        return all(id(r) in known for r in readers) and not any(edit.is_output(first.graph, t) for t in tensors)

    def scores(self, wanda: bool) -> np.ndarray:
        """The score of each weight, float32 (out, in / groups, *kernel)."""
        first = self.linears[0]
        scores = np.abs(first.weight().astype(np.float32))
        if wanda:
            rms = np.sqrt(np.square([seen.rms for seen in self.power]).sum(axis=0))
            peak = rms.max(initial=0.0)
            rms = np.maximum(rms / peak, _QUIET) if peak > 0 else np.ones_like(rms)
            per_group = rms.astype(np.float32).reshape(first.groups, 1, -1, *[1] * len(first.kernel))
            scores = scores.reshape(first.groups, -1, *scores.shape[1:])
            scores *= per_group
        return scores.reshape(self.shape)

    def keep(self, mask: np.ndarray, inside: Mapping[str, np.ndarray] | None) -> None:
        """Sets the weights to zero that ``mask`` does not keep.

        A bias takes up the mean of the lost products, b' = b + (W - W') E[x]. ``inside``: by name of the linear, what
        the places of its kernel read (``borders``); None where biases stay. A ConvTranspose with a kernel keeps its
        bias, because its outputs read different places, and so does a padded Conv that ``inside`` does not know.
        """
        first, *others = self.linears
        weight = first.weight()
        if inside is not None:
            removed = np.where(mask, 0, weight)
            for linear, seen in zip(self.linears, self.power, strict=True):
                even = linear.node.op == "Conv" and not linear.padded
                if linear.name in inside or even or all(size == 1 for size in linear.kernel):
                    _add_to_bias(linear, linear.respond(removed * inside.get(linear.name, 1.0), seen.mean))
        first.set_weight(np.where(mask, weight, np.zeros((), weight.dtype)))
        for linear in others:
            edit.set_input(linear.node, linear.weight_input, first.source)
            if "alpha" in linear.node.attrs:
                linear.node.attrs["alpha"] = 1.0

    def deflated(self) -> float:
        """The bytes of the weight in a compressed archive, estimated on a part of the weight."""
        first = self.linears[0]
        stored = first.unorient(first.weight())
        rows = max(1, min(len(stored), _SAMPLE * len(stored) // max(1, stored.nbytes)))
        part = np.ascontiguousarray(stored[:: -(-len(stored) // rows)])
        return len(zlib.compress(part.tobytes(), 1)) * stored.nbytes / part.nbytes


def shared(linears: Sequence[Linear]) -> Iterator[Layer]:
    """The layers of linears, in order. Linears that read one weight in one layout are one layer."""
    layers: dict[tuple, Layer] = {}
    for linear in linears:
        node = linear.node
        layout = (
            node.op,
            linear.weight_input,
            node.attrs.get("transB", 0),
            node.attrs.get("alpha", 1.0),
            linear.groups,
        )
        key = (id(linear.source), *(id(step) for step in linear.chain), layout)
        layers.setdefault(key, Layer([])).linears.append(linear)
    yield from layers.values()


def observers(layers: Sequence[Layer]) -> dict[str, list[ChannelMoments]]:
    """The observers for ``observe``, one for each tensor and axis that layers read; sets ``power`` of the layers."""
    made: dict[tuple[str, int], ChannelMoments] = {}
    for layer in layers:
        layer.power = [made.setdefault((x.data.name, x.in_axis), ChannelMoments(x.in_axis)) for x in layer.linears]
    return by_name((name, seen) for (name, _), seen in made.items())


def _add_to_bias(linear: Linear, more: np.ndarray) -> None:
    if linear.node.op == "MatMul" and linear.bias_node is None:
        return
    old = linear.bias()
    with contextlib.suppress(DoesNotFit):  # a float16 bias at the end of its type stays as it is
        linear.set_bias((0.0 if old is None else old) + more)


def weights_of(layers: Sequence[Layer]) -> list[gs.Constant]:
    """The constant that holds the weight of each layer."""
    return [layer.linears[0].source for layer in layers]
