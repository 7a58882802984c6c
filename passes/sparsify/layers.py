"""Layers as sparsity sees them: a weight with the linears that read it, and what each of its entries is worth.

    magnitude   s_ij = |w_ij|
    wanda       s_ij = |w_ij| rms(x_j)        the norm of x_j over the calibration data, up to a common factor

The squares of the latter add up to the energy of the outputs as if channels were uncorrelated, so the part of it that
is dropped estimates the error. Linears that share one weight are one layer: its error is the sum of theirs, so that
rms(x_j)^2 is the sum over all of them, and they share the sparse weight afterwards as well.

Source: Sun et al., Wanda, ICLR 2024, section 3.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import DoesNotFit
from channelfold.passes.layers.linear import Linear, check_growth
from channelfold.runtime.io import edit
from channelfold.runtime.stats.channels import ChannelMoments
from channelfold.runtime.stats.observe import by_name

_QUIET = 1e-6  # of the loudest channel: what a silent one counts as, so that its weights still differ by magnitude
_SAMPLE = 1 << 20  # bytes of a weight that are compressed to tell how well it does


@dataclass
class Layer:
    """One weight and the ``linears`` that read it in one layout; ``power``: of what each reads, once observed."""

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
        """Whether nothing but these linears reads the weight."""
        first = self.linears[0]
        known = {id(node) for node in first.chain} | {id(linear.node) for linear in self.linears}
        tensors = [first.source, *(node.outputs[0] for node in first.chain)]
        readers = [reader for tensor in tensors for reader in tensor.outputs]
        return all(id(r) in known for r in readers) and not any(edit.is_output(first.graph, t) for t in tensors)

    def scores(self, wanda: bool) -> np.ndarray:
        """What each weight is worth, float32 (out, in / groups, *kernel)."""
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

    def keep(self, mask: np.ndarray, correct_bias: bool) -> None:
        """Sets to zero what ``mask`` does not keep.

        With ``correct_bias`` the bias takes up what the dropped weights have given on average, b' = b + (W - W') E[x],
        where there is one or a place for it. A kernel has none of this: what it sees at the border, or of a signal
        shorter than itself, has another mean than in the middle.
        """
        first, *others = self.linears
        weight = first.weight()
        if correct_bias:
            removed = np.where(mask, 0, weight)
            for linear, seen in zip(self.linears, self.power, strict=True):
                if all(size == 1 for size in linear.kernel):
                    _add_to_bias(linear, linear.respond(removed, seen.mean))
        first.set_weight(np.where(mask, weight, np.zeros((), weight.dtype)))
        for linear in others:
            edit.set_input(linear.node, linear.weight_input, first.source)
            if "alpha" in linear.node.attrs:
                linear.node.attrs["alpha"] = 1.0

    def deflated(self) -> float:
        """Bytes that the weight takes in a compressed archive, estimated on a part of it."""
        first = self.linears[0]
        stored = first.unorient(first.weight())
        rows = max(1, min(len(stored), _SAMPLE * len(stored) // max(1, stored.nbytes)))
        part = np.ascontiguousarray(stored[:: -(-len(stored) // rows)])
        return len(zlib.compress(part.tobytes(), 1)) * stored.nbytes / part.nbytes


def shared(linears: Sequence[Linear]) -> Iterator[Layer]:
    """The linears as layers, in order: those that read one weight in one layout are together."""
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
    """What to show ``observe``: an observer for each tensor and axis that the layers read, which they then know."""
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
    """The constant that each layer's weight is made from."""
    return [layer.linears[0].source for layer in layers]
