"""Channels masked and unmasked again, to measure the effect on the outputs of a model.

Nothing is cut: in one copy of the graph, the layers that read the channels are reconstructed with zeros in the columns
of the channels that go, and sums without weights (a product of activations, a recurrence) read zeros (``cut.Mask``).
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import DoesNotFit
from channelfold.passes.channels.cut import Mask, is_recurrence
from channelfold.passes.channels.groups import Copies
from channelfold.passes.layers.linear import view
from channelfold.passes.layers.output_error import Errors, Outputs
from channelfold.passes.prune.costs import Keeps
from channelfold.passes.prune.importance import MeanCovariance, RankedGroups, ReadAxis
from channelfold.passes.prune.reconstruct import ReadStatistics, Reconstruct, Reconstruction
from channelfold.runtime.data.sources import Data
from channelfold.runtime.io.files import infer_shapes


class Trial:
    """A copy of a graph in which channels can be masked and unmasked, and the outputs of the graph on some samples."""

    def __init__(
        self,
        graph: gs.Graph,
        ranked: RankedGroups,
        statistics: ReadStatistics,
        reconstruct: Reconstruct,
        data: Data,
    ):
        regions, self._reconstruct = ranked.regions, reconstruct
        self._copy, twins = Copies(graph, ranked.groups).make({id(r): (r, r.free) for r in regions})
        infer_shapes(self._copy)
        self._nodes = {node.name: node for node in self._copy.nodes}
        self.outputs = Outputs(self._copy, data)
        self._reads: list[tuple[ReadAxis, MeanCovariance]] = list(statistics.each())
        self._applied = [np.ones(read.size, bool) for read, _ in self._reads]
        linears = {linear.node.name for read, _ in self._reads for linear in read.linears}
        self._masks: list[tuple[int, Mask]] = []  # with the id of the region
        for region, (twin, _) in zip(regions, twins, strict=True):
            masks = [Mask.before(self._copy, read) for read in twin.reads if read.node.name not in linears]
            masks += [Mask.within(self._copy, part) for part in filter(is_recurrence, twin.parts)]
            self._masks += [(id(region), mask) for mask in masks]

    def errors(self, keeps: Keeps) -> Errors:
        """The errors of the outputs when these labels alone stay."""
        for number, (read, moments) in enumerate(self._reads):
            stays = keeps[id(read.region)][1][read.labels - 1]
            if not np.array_equal(stays, self._applied[number]):
                self._apply(read, moments, stays)
                self._applied[number] = stays
        for region, mask in self._masks:
            mask.set(keeps[region][1])
        return self.outputs.errors(self._copy)

    def _apply(self, read: ReadAxis, moments: MeanCovariance, stays: np.ndarray) -> None:
        """Gives the layers that read the channels their reconstructed weights."""
        for linear in read.linears:
            own = view(self._copy, self._nodes[linear.node.name])
            bias = linear.bias()
            if own.bias() is not None:
                own.set_bias(np.zeros(linear.channels[0]) if bias is None else bias)
            if stays.all():
                own.set_weight(linear.weight())
                continue
            try:
                self._reconstruct(linear, stays, None, moments).silence(own, stays)
            except DoesNotFit:  # the cut leaves such a layer as it is, too
                Reconstruction.of(linear, stays, None, moments, "none", 0.0).silence(own, stays)
