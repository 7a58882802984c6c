"""How many units each channel group keeps so that no output of the model is off by more than a tolerance.

    loss_o(k)  =  1 + E ||y_o - y_o(k)||^2 / E ||y_o - E[y_o]||^2          prod_g (1 + t_g)  <=  1 + tolerance

y_o is an output on calibration samples, y_o(k) the same when the groups keep k units and what reads them is refitted.
Groups are cut one after another, the one with the most multiply-accumulates to save first, in 19 steps from 5 to 95 %,
until the loss of some output grows by more than t_g (``tolerances``, after PAGCP). Nothing is cut for that: weights
of what goes are zero, and sums without weights read zeros, in one copy of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes import allocation, edit
from channelfold.passes.base import Context, UsageError
from channelfold.passes.group_costs import Keeps
from channelfold.passes.importance import ReadAxis, Spread
from channelfold.passes.linear import view
from channelfold.passes.links import RECURRENT
from channelfold.passes.refit import Fit, ReadStatistics
from channelfold.passes.tolerances import cut_within_tolerance
from channelfold.passes.trace import Part, Read, Region
from channelfold.runtime.graph_io import constant, free_name
from channelfold.runtime.ort import Feed
from channelfold.runtime.snapshot import Snapshot

SAMPLES = 8  # of the calibration data that the outputs are compared on
_FRONT = 2  # times the tolerance of an even share that the first group has


def units_within_tolerance(
    trial: Trial,
    keeps_of: Callable[[Sequence[int]], Keeps],
    sizes: Sequence[allocation.Group],
    costs: allocation.Costs,
    tolerance: float,
    align: int,
    progress: Callable[[str, int, int], None],
) -> tuple[list[int], dict[str, float]]:
    """The units that each group keeps, and the error that is left at each output, relative to its variance.

    ``keeps_of``: what stays when the groups keep so many units. ``costs``: what cutting a group saves.
    """
    touched: set[int] = set()

    def loss(kept: Sequence[int]) -> Mapping[str, float]:
        touched.update(g for g, (group, count) in enumerate(zip(sizes, kept, strict=True)) if count < group.units)
        progress("Cutting within the tolerance", len(touched), len(sizes))
        return {name: 1 + error for name, error in trial.errors(keeps_of(kept)).items()}

    theta = 1 + tolerance
    first = _FRONT * (theta ** (1 / max(len(sizes), 2)) - 1)
    kept = cut_within_tolerance(sizes, costs, loss, theta=theta, r0=first, share=1.0, align=align)
    return kept, trial.errors(keeps_of(kept))


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

    ``fit``: ``Fit.of`` with the settings of the pass. Raises UsageError without calibration data, or for a model whose
    outputs cannot be compared.
    """

    def __init__(
        self,
        graph: gs.Graph,
        regions: Sequence[Region],
        statistics: ReadStatistics,
        fit: Callable[..., Fit],
        ctx: Context,
    ):
        if ctx.calibration is None:
            raise UsageError("A tolerance of the outputs needs calibration data", "Give some, or another budget")
        before, self._copy, self._fit = Snapshot.of(graph), gs.Graph(), fit
        before.restore(self._copy)
        self._nodes = dict(zip(map(id, graph.nodes), self._copy.nodes, strict=True))
        self._feeds: list[Feed] = list(islice(ctx.calibration, SAMPLES))
        self._expected = self._outputs(before)
        self._energies = {name: e for name in self._expected[0] if (e := _variance(self._expected, name)) > 0}
        if not self._energies:
            raise UsageError("No output of the model varies on the calibration data", "Give another budget")
        self._reads: list[tuple[ReadAxis, Spread]] = list(statistics.each())
        self._applied = [np.ones(read.size, bool) for read, _ in self._reads]
        linears = {id(linear.node) for read, _ in self._reads for linear in read.linears}
        self._masks = [
            *(
                self._before(read, region)
                for region in regions
                for read in region.reads
                if id(read.node) not in linears
            ),
            *(self._within(part, region) for region in regions for part in region.parts if _is_recurrence(part)),
        ]

    def errors(self, keeps: Keeps) -> dict[str, float]:
        """The squared error of every float output, relative to its variance, when only these labels stay."""
        for number, (read, spread) in enumerate(self._reads):
            stays = keeps[id(read.region)][1][read.labels - 1]
            if not np.array_equal(stays, self._applied[number]):
                self._refit(read, spread, stays)
                self._applied[number] = stays
        for mask in self._masks:
            mask.set(keeps[id(mask.region)][1])
        found = self._outputs(Snapshot.of(self._copy))
        return {name: _difference(self._expected, found, name) / energy for name, energy in self._energies.items()}

    def _outputs(self, snapshot: Snapshot) -> list[dict[str, np.ndarray]]:
        session = snapshot.session()
        return [session.run(feed) for feed in self._feeds]

    def _refit(self, read: ReadAxis, spread: Spread, stays: np.ndarray) -> None:
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
                self._fit(linear, stays, None, spread).silence(own, stays)
            except OverflowError:  # a cut leaves such a layer as it is, too
                Fit.of(linear, stays, None, spread, "none", 0.0).silence(own, stays)

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
    return part.node.op in RECURRENT and (part.input, part.axis) == (2, 2)


def _variance(outputs: Sequence[Mapping[str, np.ndarray]], name: str) -> float:
    """The sum of squares around the mean over all samples; 0 for what is not of floats."""
    if outputs[0][name].dtype.kind != "f":
        return 0.0
    mean = sum(float(o[name].sum(dtype=np.float64)) for o in outputs) / sum(o[name].size for o in outputs)
    return sum(float(np.square(o[name] - mean, dtype=np.float64).sum()) for o in outputs)


def _difference(expected: Sequence[Mapping[str, np.ndarray]], found: Sequence[Mapping[str, np.ndarray]], name: str):
    errors = (np.square(e[name] - f[name], dtype=np.float64).sum() for e, f in zip(expected, found, strict=True))
    total = float(sum(errors))
    return total if np.isfinite(total) else np.inf
