"""What reads the channels that stay, refitted so that it makes up for those that go.

    W [x_K; x_S] + b   ~   (W_K + W_S R) x_K + b + W_S o,      R, o = argmin E ||x_S - R x_K - o||^2

with mean and covariance of x, the activation that is read, from calibration data or implied by the weights that write
it. R holds at every place of a kernel. At the border of a zero-padded convolution an offset would be wrong: there o = 0
and R is fitted to second moments without the mean taken out. ``bias`` is R = 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, DoesNotFit, Outcome
from channelfold.passes.channels.groups import Group, Region
from channelfold.passes.layers.linear import Linear, cast, view
from channelfold.passes.numeric import least_squares
from channelfold.passes.prune import importance
from channelfold.passes.prune.costs import Keeps
from channelfold.passes.prune.importance import MeanCovariance, ReadAxis
from channelfold.runtime.data.sources import Data
from channelfold.runtime.errors import DataError
from channelfold.runtime.stats.channels import ChannelMoments
from channelfold.runtime.stats.moments import LIMIT, Moments, bytes_of, collect
from channelfold.runtime.stats.observe import by_name, observe

MAX_FEATURES = 8192  # of one activation; of more, covariances would take gigabytes, and variances have to do


class ReadStatistics:
    """Mean and covariance of every activation that linears read from some regions.

    ``source``: "data", "weights" (what they imply for white inputs) or "". Memory is bounded: what does not fit is
    collected again every time it is asked for.
    """

    def __init__(self, graph: gs.Graph, regions: Sequence[Region], ctx: Context):
        self._graph, self._progress = graph, ctx.progress
        self.reads = importance.read_axes(graph, regions)
        self._implied: list[tuple[ReadAxis, MeanCovariance]] = []
        self._data: list[Data] = []
        self._held: dict[int, Moments | ChannelMoments] = {}  # by the id of a read, where all of them fit into memory
        self.source = "data"
        if ctx.calibration is not None:
            self.add(ctx.calibration)
            return
        implied = ((read, importance.implied(graph, read)) for read in self.reads if read.size <= MAX_FEATURES)
        self._implied = [(read, moments) for read, moments in implied if moments is not None]
        self.source = "weights" if self._implied else ""

    def add(self, data: Data) -> None:
        """Takes up more data. Raises DataError as ``observe`` does."""
        self._data.append(data)
        if sum(bytes_of(read.size) for read in self.reads if read.size <= MAX_FEATURES) <= LIMIT:
            self._held = {id(read): seen for read, seen in self._observed(data)}

    def each(self) -> Iterator[tuple[ReadAxis, MeanCovariance]]:
        """In no particular order; activations of which nothing is known are left out."""
        if not self._data:
            yield from self._implied
            return
        held = ((read, self._held[id(read)]) for read in self.reads)
        for read, found in held if self._held else self._observed(_joined(self._data)):
            yield read, _mean_covariance(found)

    def new_biases(self, keeps: Keeps) -> int:
        """How many parameters, at most, the biases have that linears without one get when just these labels stay."""
        return sum(
            linear.channels[0]
            for read in self.reads
            if not keeps[id(read.region)][1][read.labels - 1].all()
            for linear in read.linears
            if not linear.padded and linear.bias() is None
        )

    def _observed(self, data: Data) -> Iterator[tuple[ReadAxis, Moments | ChannelMoments]]:
        """What is held of each read, or new, once it has seen the data; as many at a time as there is room for."""
        large = [read for read in self.reads if read.size > MAX_FEATURES]
        small = [read for read in self.reads if read.size <= MAX_FEATURES]
        variances = [self._held.get(id(read)) or ChannelMoments(read.axis) for read in large]
        if large:
            named = zip((read.tensor.name for read in large), variances, strict=True)
            observe(self._graph, by_name(named), data, self._progress)
        yield from zip(large, variances, strict=True)
        wanted = ((self._moments(read), read.size) for read in small)
        reads = iter(small)
        for group in collect(self._graph, wanted, data, self._progress):
            while group:  # each is let go before the next run
                yield next(reads), group.pop(0)

    def _moments(self, read: ReadAxis) -> Moments:
        held = self._held.get(id(read))
        return held if isinstance(held, Moments) else Moments({read.tensor.name: read.axis})


def _joined(parts: Sequence[Data]) -> Data:
    """All feeds of several data for the same model."""
    first, *others = parts
    if not others:
        return first
    number = sum(map(len, parts))
    return Data(first.inputs, number, lambda: itertools.chain.from_iterable(parts), first.description)


def _mean_covariance(seen: Moments | ChannelMoments) -> MeanCovariance:
    if isinstance(seen, Moments):
        return MeanCovariance(seen.mean, importance.shrunk(seen.covariance, seen.count))
    if not seen.positions:
        raise DataError("No calibration sample reached an activation", "Check the data")
    return MeanCovariance(seen.mean, seen.variance)


@dataclass
class Fit:
    """The weight (kept outputs, kept inputs / groups, *kernel) of a node after a cut, and what its bias gains."""

    node: gs.Node
    weight: np.ndarray
    gain: np.ndarray | None = field(default=None)

    @classmethod
    def of(
        cls,
        linear: Linear,
        stays: np.ndarray,
        rows: np.ndarray | None,
        moments: MeanCovariance,
        mode: Literal["none", "bias", "lstsq"],
        ridge: float,
    ) -> Fit:
        """``stays``: which input channels do, (in,) bool. ``rows``: which outputs do, None for all.

        Without covariances only the bias is corrected.
        """
        weight, outs = linear.weight(), linear.channels[0]
        gain = np.zeros(outs)
        kept_weights = []
        for mine, inputs in importance.blocks(linear):
            part, kept = weight[mine], np.flatnonzero(stays[inputs])
            gone = np.flatnonzero(~stays[inputs])
            matrix, offset = np.zeros((gone.size, kept.size)), moments.mean[inputs][gone]
            if mode == "lstsq" and moments.covariance.ndim == 2:
                matrix, offset = _filled(moments, inputs, kept, gone, linear.padded, ridge)
            new = part[:, kept] + np.moveaxis(np.moveaxis(part[:, gone], 1, -1) @ matrix, -1, 1)
            if not linear.padded and mode != "none":
                gain[mine] = part[:, gone].reshape(len(part), gone.size, -1).sum(axis=-1, dtype=np.float64) @ offset
            kept_weights.append(new)
        found = np.concatenate(kept_weights)
        return cls(linear.node, found, gain) if rows is None else cls(linear.node, found[rows], gain[rows])

    def silence(self, linear: Linear, stays: np.ndarray) -> None:
        """Writes it into a node that is not cut, with zeros in the columns of what goes."""
        weight = np.zeros((linear.channels[0], linear.channels[1] // linear.groups, *linear.kernel))
        for mine, inputs in importance.blocks(linear):
            weight[mine, stays[inputs]] = self.weight[mine]
        linear.set_weight(weight)
        if self.gain is not None and self.gain.any():
            old = linear.bias()
            linear.set_bias(self.gain if old is None else old + self.gain)

    def install(self, graph: gs.Graph, outcome: Outcome) -> int:
        """Writes the weight and the bias into the graph after the cut, or refuses when they do not fit the type.

        Returns how many parameters it has added.
        """
        linear = view(graph, self.node)
        old = linear.bias()
        bias = self.gain if old is None else old + self.gain
        try:
            weight = cast(self.weight, linear.dtype)
            cast(np.asarray(bias), linear.dtype)
        except DoesNotFit as error:
            outcome.refuse(linear.name, f"what reads the rest was not refitted: {error}", "not refitted")
            return 0
        linear.set_weight(weight)
        if old is not None or (self.gain is not None and self.gain.any()):
            linear.set_bias(np.asarray(bias))
            return linear.channels[0] if old is None else 0
        return 0


def _filled(
    moments: MeanCovariance, inputs: slice, kept: np.ndarray, gone: np.ndarray, padded: bool, ridge: float
) -> tuple[np.ndarray, np.ndarray]:
    mean, covariance = moments.mean[inputs], moments.covariance[inputs, inputs]
    if padded:
        covariance, mean = covariance + np.outer(mean, mean), np.zeros_like(mean)
    return least_squares.fill(covariance, mean, kept, gone, ridge)


def matters(read: ReadAxis, group: Group) -> bool:
    """Whether a group has a part in what is read."""
    return read.region is group.region and bool(np.isin(read.labels, group.labels).any())
