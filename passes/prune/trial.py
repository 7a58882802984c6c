"""Channels silenced and had back, to see what that does to the outputs of a model.

Nothing is cut for that: in one copy of the graph the weights of what goes are zero and what reads the rest is refitted,
and sums without weights (a product of activations, a recurrence) read zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import starmap

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import DoesNotFit
from channelfold.passes.channels.cut_regions import Part, Read, Region
from channelfold.passes.layers.linear import view
from channelfold.passes.layers.output_error import Outputs
from channelfold.passes.operators import operator
from channelfold.passes.prune.costs import Keeps
from channelfold.passes.prune.importance import MeanCovariance, ReadAxis
from channelfold.passes.prune.refit import Fit, ReadStatistics
from channelfold.runtime.data.sources import Data
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import constant, free_name, infer_shapes
from channelfold.runtime.io.snapshot import Snapshot


@dataclass(frozen=True)
class _Mask:
    """A constant of the copy that silences channels: ones times what a sum reads, or columns of a recurrent cell."""

    factor: gs.Constant
    whole: np.ndarray
    region: Region
    labels: np.ndarray
    axis: int

    def set(self, keep: np.ndarray) -> None:
        shape = [1] * self.whole.ndim
        shape[self.axis] = self.labels.size
        self.factor.values = self.whole * keep[self.labels - 1].reshape(shape).astype(self.whole.dtype)


class Trial:
    """A copy of a graph in which channels can be silenced and had back, with what it then makes of some samples.

    ``fit``: ``Fit.of`` with the settings of the pass.
    """

    def __init__(
        self,
        graph: gs.Graph,
        regions: Sequence[Region],
        statistics: ReadStatistics,
        fit: Callable[..., Fit],
        data: Data,
    ):
        self._copy, self._fit = gs.Graph(), fit
        Snapshot.of(graph).restore(self._copy)
        infer_shapes(self._copy)
        self._nodes = dict(zip(map(id, graph.nodes), self._copy.nodes, strict=True))
        self._outputs = Outputs(self._copy, data)
        self._reads: list[tuple[ReadAxis, MeanCovariance]] = list(statistics.each())
        self._applied = [np.ones(read.size, bool) for read, _ in self._reads]
        linears = {id(linear.node) for read, _ in self._reads for linear in read.linears}
        sums = [(read, region) for region in regions for read in region.reads if id(read.node) not in linears]
        parts = [(part, region) for region in regions for part in region.parts if _is_recurrence(part)]
        self._masks = [*starmap(self._before, sums), *starmap(self._within, parts)]

    def errors(self, keeps: Keeps) -> dict[str, float]:
        """The squared error of every output that varies, relative to its variance, when only these labels stay."""
        for number, (read, moments) in enumerate(self._reads):
            stays = keeps[id(read.region)][1][read.labels - 1]
            if not np.array_equal(stays, self._applied[number]):
                self._refit(read, moments, stays)
                self._applied[number] = stays
        for mask in self._masks:
            mask.set(keeps[id(mask.region)][1])
        lost = self._outputs.lost(self._copy)
        return {name: lost[name] / whole for name, whole in self._outputs.variances.items() if whole > 0}

    def _refit(self, read: ReadAxis, moments: MeanCovariance, stays: np.ndarray) -> None:
        """Gives what reads the channels the weights that make up for those that do not stay."""
        for linear in read.linears:
            own = view(self._copy, self._nodes[id(linear.node)])
            bias = linear.bias()
            if own.bias() is not None:
                own.set_bias(np.zeros(linear.channels[0]) if bias is None else bias)
            if stays.all():
                own.set_weight(linear.weight())
                continue
            try:
                self._fit(linear, stays, None, moments).silence(own, stays)
            except DoesNotFit:  # a cut leaves such a layer as it is, too
                Fit.of(linear, stays, None, moments, "none", 0.0).silence(own, stays)

    def _before(self, read: Read, region: Region) -> _Mask:
        """In front of a node without weights that sums over channels."""
        node, tensor = self._nodes[id(read.node)], self._nodes[id(read.node)].inputs[read.port]
        whole = np.ones((read.labels.size, *[1] * (-1 - read.axis)), edit.dtype(tensor) or np.float32)
        factor = constant(self._copy, f"{tensor.name}_mask", whole)
        masked = gs.Variable(free_name(self._copy, f"{tensor.name}_masked"), tensor.dtype)
        name = free_name(self._copy, f"{node.name}_mask")
        position = next(i for i, other in enumerate(self._copy.nodes) if other is node)
        self._copy.nodes.insert(position, gs.Node("Mul", name, inputs=[tensor, factor], outputs=[masked]))
        edit.set_input(node, read.port, masked)
        return _Mask(factor, whole, region, read.labels, 0)

    def _within(self, part: Part, region: Region) -> _Mask:
        """In the recurrence weights of a cell, which sums over its own channels."""
        node, whole = self._nodes[id(part.node)], edit.value(part.node.inputs[part.input])
        assert whole is not None
        factor = constant(self._copy, f"{node.name}_recurrence", whole)
        edit.set_input(node, part.input, factor)
        return _Mask(factor, whole, region, part.labels, part.axis)


def _is_recurrence(part: Part) -> bool:
    return operator(part.node).gates > 0 and (part.input, part.axis) == (2, 2)
