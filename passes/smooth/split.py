"""Outlier channels split into several smaller channels, so that one activation range fits all channels better.

    T_j = max(1, ceil(max|x_j| / theta))     channel j becomes T_j channels x_j / T_j, each read by the same weights w_j
    y   = sum over j of w_j x_j  =  sum over j of T_j (w_j (x_j / T_j))

A split is exact and costs width. ``rescale`` moves 1 / T_j into the writers of the channels. Two ways make the copies:

    linear -> linear    the rows of the writer are repeated; with a gate in between (SwiGLU) only the scaled branch is
                        divided, and the rows of both branches are repeated. No node is added, the hidden width grows
    anything else       the writer (a norm, attention) cannot get wider. With ``allow_insert`` a Gather in front of the
                        readers repeats the channels, and a Mul divides the channels where no writer takes 1 / T_j up

theta goes in 100 steps from the largest channel down, until more than ``max_extra`` of the channels would be added; the
split with the least error of the quantized outputs on a sample of rows is taken (int8, activation per tensor, weights
per output channel), and none where no split helps. After a split many channels reach the edge of the range. Values
beyond the calibration data are then clipped in all of these channels, so calibration needs enough data.

Source: Liu et al., QLLM, ICLR 2024, section 4.1 (channel disassembly); the number of steps there depends on the unit.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Outcome, Refused
from channelfold.passes.channels.rescale import rescale
from channelfold.passes.channels.scale_regions import End, Region, reach
from channelfold.passes.channels.widths import columns_of, gathered, read_by
from channelfold.passes.layers.linear import Linear, usable, view
from channelfold.passes.layers.output_error import decibels
from channelfold.passes.layers.quantization_error import Bits, quantized_activation
from channelfold.passes.smooth import SplitChannels
from channelfold.passes.smooth.sites import Shapes, change_each
from channelfold.runtime.stats.channels import ChannelStatistics

_STEPS = 100  # of the threshold
_OUTPUTS = 1024  # the greatest number of outputs that the error is measured on
_WORTH_NODES = 3.0  # dB


class Work(SplitChannels):
    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        find, change = functools.partial(self._sites, graph), functools.partial(self._split, graph)
        return change_each(self, graph, ctx, find, change)

    def _sites(self, graph: gs.Graph, shapes: Shapes, outcome: Outcome) -> list[Linear]:
        """The first reader of each tensor whose channels can be split; refuses the others."""
        tried: set[int] = set()

        def why_not(linear: Linear) -> str | None:
            if id(linear.data) in tried:
                return None
            tried.add(id(linear.data))
            self._region(graph, linear, shapes)
            return ""

        return list(usable(graph, outcome, why_not))

    def _region(self, graph: gs.Graph, linear: Linear, shapes: Shapes) -> tuple[Region, list[End], bool]:
        """(region of the input of a linear, its readers, whether a split inserts nodes). Raises Refused."""
        region = reach(graph, linear, shapes, self.allow_insert)
        ends = region.readers()
        readers = [end for end in ends if end.linear is not None and end.linear.data is linear.data]
        if len(readers) < len(ends):
            raise Refused("linears read its channels from several tensors")
        if any(end.linear is not None and end.linear.groups > 1 for end in readers):
            raise Refused(f"{linear.node.op} reads it in groups")
        try:
            read_by(graph, linear, shapes)
        except Refused as error:
            if not self.allow_insert:
                raise Refused(f"its width cannot grow: {error} (allow_insert: a Gather repeats its channels)") from None
            return region, readers, True
        return region, readers, bool(region.cuts)

    def _split(
        self, graph: gs.Graph, linear: Linear, shapes: Shapes, seen: ChannelStatistics, outcome: Outcome
    ) -> dict[str, Any]:
        """Splits the input channels of a linear. Raises Refused, with nothing changed."""
        region, ends, inserts = self._region(graph, linear, shapes)
        tensor, index = linear.data, ends[0].index
        readers = [end.linear for end in ends if end.linear is not None]
        classes = np.abs(index) - 1
        free = region.free[classes]
        amax = np.zeros(region.size)
        np.maximum.at(amax, classes, seen.amax)
        matrix = np.concatenate([columns_of(reader) for reader in readers])
        matrix = matrix[:: -(-len(matrix) // _OUTPUTS)]
        search = _Search(amax[classes], classes, free, *seen.sample(), matrix.astype(np.float32))
        parts, snr = search.best(self.max_extra, self.align)
        needed = max(self.min_gain, _WORTH_NODES) if inserts else self.min_gain
        if not (parts > 1).any() or snr[1] - snr[0] < needed:
            raise Refused(f"no split gains {needed:g} dB")
        scale = np.ones(region.size)
        scale[classes] = np.where(index > 0, parts, 1 / parts)
        nodes, width, theta = set(map(id, graph.nodes)), len(parts), float((amax[classes] / parts).max())
        rescale(graph, region, scale)
        _complete(graph, shapes)
        _repeat(graph, readers, parts, shapes)
        extra, added = int(parts.sum()) - width, sum(id(node) not in nodes for node in graph.nodes)
        what = (
            f"{tensor.name}: {int((parts > 1).sum())} of {width} channels split, {extra} added; range "
            f"{amax.max():.3g} -> {theta:.3g}, output {snr[0]:.1f} -> {snr[1]:.1f} dB"
        )
        outcome.change(linear.name, what + (f"; {added} node(s) inserted" if added else ""))
        return {
            "node": linear.name,
            "tensor": tensor.name,
            "width": [width, width + extra],
            "largest": [float(amax.max()), theta],
            "parts": int(parts.max()),
            "output_snr_db": list(snr),
            "inserted": added,
        }


@dataclass(frozen=True)
class _Search:
    """The search of theta for one tensor.

    ``amax`` (channels,) is equal for channels of one of the ``classes``; only ``free`` channels can be split. ``rows``
    (n, channels) is a sample with ``weights`` (n,), and ``matrix`` (out, channels) the weight that reads the channels.
    """

    amax: np.ndarray
    classes: np.ndarray
    free: np.ndarray
    rows: np.ndarray
    weights: np.ndarray
    matrix: np.ndarray

    def best(self, max_extra: float, align: int) -> tuple[np.ndarray, tuple[float, float]]:
        """(T by channel, signal-to-noise ratio of the outputs before and after in dB); T = 1 where no split helps."""
        outputs, rounded = self.rows @ self.matrix.T, Bits().format.rounded(self.matrix)
        tried = parts = np.ones(len(self.amax))
        best = before = self.error(parts, outputs, rounded)
        top = float(self.amax.max(initial=0.0, where=self.free))
        for theta in np.linspace(top, 0, _STEPS, endpoint=False)[1:] if top > 0 else ():
            candidate = self.aligned(np.where(self.free, np.maximum(1, np.ceil(self.amax / theta)), 1), align)
            if candidate.sum() - len(candidate) > max_extra * len(candidate):
                break
            if np.array_equal(candidate, tried):
                continue
            tried = candidate
            if (error := self.error(candidate, outputs, rounded)) < best:
                best, parts = error, candidate
        signal = float(self.weights @ (outputs**2).sum(axis=1, dtype=np.float64))
        return parts, (decibels(before / signal), decibels(best / signal)) if signal else (0.0, 0.0)

    def aligned(self, parts: np.ndarray, align: int) -> np.ndarray:
        """``parts`` with the largest channels split once more, until their sum is a multiple of ``align``."""
        parts, counts = parts.copy(), np.bincount(self.classes)[self.classes]
        while missing := -int(parts.sum()) % align:
            load = np.where(self.free & (counts <= missing), self.amax / parts, 0.0)
            if not load.any():
                break
            parts[self.classes == self.classes[load.argmax()]] += 1
        return parts

    def error(self, parts: np.ndarray, outputs: np.ndarray, rounded: np.ndarray) -> float:
        """The squared error of the quantized outputs; one copy stands for all, because copies are rounded alike."""
        scale = parts.astype(np.float32)
        values = quantized_activation(self.rows / scale, Bits().activation) * scale
        return float(self.weights @ ((values @ rounded.T - outputs) ** 2).sum(axis=1, dtype=np.float64))


def _complete(graph: gs.Graph, shapes: Shapes) -> None:
    """Adds the shapes of the Mul nodes that ``rescale`` has inserted."""
    for node in graph.nodes:
        if node.op == "Mul" and node.outputs[0].name not in shapes:
            shapes[node.outputs[0].name] = shapes[node.inputs[0].name]


def _repeat(graph: gs.Graph, readers: list[Linear], parts: np.ndarray, shapes: Shapes) -> None:
    """Repeats each input channel of ``readers`` ``parts`` times."""
    readers = [view(graph, linear.node) for linear in readers]
    try:
        width = read_by(graph, readers[0], shapes)
    except Refused:
        width = gathered(graph, readers, shapes)
    width = width.blended(None, lambda columns: columns / parts.reshape(-1, *[1] * (columns.ndim - 1)), shapes)
    width.repeat(parts, shapes)
