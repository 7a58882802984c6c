"""The layers that read the channels that stay, reconstructed so that they make up for the channels that go.

    W [x_K; x_S] + b   ~   (W_K + W_S R) x_K + b + W_S o,      R, o = argmin E ||x_S - R x_K - o||^2

with mean and covariance of x, the activation that a layer reads, from calibration data or implied by the weights that
write the activation. R holds at every place of a kernel. No offset is right at the border of a zero-padded convolution:
there o = 0, and R is fitted to second moments without subtraction of the mean. The mode ``bias`` has R = 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
from channelfold.runtime.stats.covariance import LIMIT, Moments, bytes_of, collect
from channelfold.runtime.stats.observe import by_name, observe

MAX_FEATURES = 8192  # of one activation; covariances of more features would take gigabytes, so their variances are used


class ReadStatistics:
    """Mean and covariance of every activation that linears read from some regions.

    ``source`` names their origin: "data", "weights" (the covariance that the weights imply for white inputs) or "".
    Memory is bounded: statistics that do not fit are collected again for every ``each``.
    """

    def __init__(self, graph: gs.Graph, regions: Sequence[Region], ctx: Context):
        self._graph, self._progress = graph, ctx.progress
        self.reads = importance.read_axes(graph, regions)
        self._implied: list[tuple[ReadAxis, MeanCovariance]] = []
        self._data: list[Data] = []
        self._held: dict[int, Moments | ChannelMoments] = {}  # by the id of a read; empty where memory is too small
        self.source = "data"
        if ctx.calibration is not None:
            self.add(ctx.calibration)
            return
        implied = ((read, importance.implied(graph, read)) for read in self.reads if read.size <= MAX_FEATURES)
        self._implied = [(read, moments) for read, moments in implied if moments is not None]
        self.source = "weights" if self._implied else ""

    def add(self, data: Data) -> None:
        """Adds data. Raises DataError as ``observe`` does."""
        self._data.append(data)
        if sum(bytes_of(read.size) for read in self.reads if read.size <= MAX_FEATURES) <= LIMIT:
            self._held = {id(read): seen for read, seen in self._observed(data)}

    def each(self) -> Iterator[tuple[ReadAxis, MeanCovariance]]:
        """The activations with known statistics, in no particular order."""
        if not self._data:
            yield from self._implied
            return
        held = ((read, self._held[id(read)]) for read in self.reads)
        for read, found in held if self._held else self._observed(_joined(self._data)):
            yield read, _mean_covariance(found)

    def new_biases(self, keeps: Keeps) -> int:
        """The most parameters that new biases of linears without a bias have when these labels alone stay."""
        return sum(
            linear.channels[0]
            for read in self.reads
            if not keeps[id(read.region)][1][read.labels - 1].all()
            for linear in read.linears
            if not linear.padded and linear.bias() is None
        )

    def _observed(self, data: Data) -> Iterator[tuple[ReadAxis, Moments | ChannelMoments]]:
        """The statistics of each read, held or new, after they have seen the data; as many at a time as fit."""
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
            while group:  # memory is free again before the next run
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


@dataclass(frozen=True)
class Reconstruction:
    """The weight (kept outputs, kept inputs / groups, *kernel) of a node after a cut, and the gain of its bias."""

    node: gs.Node
    weight: np.ndarray
    gain: np.ndarray

    @classmethod
    def of(
        cls,
        linear: Linear,
        stays: np.ndarray,
        rows: np.ndarray | None,
        moments: MeanCovariance,
        mode: Literal["none", "bias", "lstsq"],
        ridge: float,
    ) -> Reconstruction:
        """``stays`` (in,) bool marks the input channels that stay, ``rows`` (out,) bool the outputs; None: all outputs.

        Without covariances the bias alone is corrected.
        """
        weight, gain = linear.weight(), np.zeros(linear.channels[0])
        kept_weights = []
        for mine, inputs in importance.blocks(linear):
            part, kept = weight[mine], np.flatnonzero(stays[inputs])
            gone = np.flatnonzero(~stays[inputs])
            matrix, offset = np.zeros((gone.size, kept.size)), moments.mean[inputs][gone]
            if mode == "lstsq" and moments.covariance.ndim == 2:
                matrix, offset = _filled(moments, inputs, kept, gone, linear.padded, ridge)
            kept_weights.append(part[:, kept] + np.moveaxis(np.moveaxis(part[:, gone], 1, -1) @ matrix, -1, 1))
            if not linear.padded and mode != "none":
                gain[mine] = part[:, gone].reshape(len(part), gone.size, -1).sum(axis=-1, dtype=np.float64) @ offset
        found = np.concatenate(kept_weights)
        return cls(linear.node, found, gain) if rows is None else cls(linear.node, found[rows], gain[rows])

    def _bias(self, linear: Linear) -> np.ndarray | None:
        """The new bias of the linear; None where the linear has no bias and needs none."""
        old = linear.bias()
        return old + self.gain if old is not None else self.gain if self.gain.any() else None

    def silence(self, linear: Linear, stays: np.ndarray) -> None:
        """Writes weight and bias into a linear that is not cut, with zeros in the columns of the channels that go."""
        weight = np.zeros((linear.channels[0], linear.channels[1] // linear.groups, *linear.kernel))
        for mine, inputs in importance.blocks(linear):
            weight[mine, stays[inputs]] = self.weight[mine]
        self._write(linear, weight)

    def install(self, graph: gs.Graph, outcome: Outcome) -> int:
        """Writes weight and bias into the graph after the cut, or refuses where they do not fit the type.

        Returns the number of new parameters.
        """
        linear = view(graph, self.node)
        bias = self._bias(linear)
        try:
            weight = cast(self.weight, linear.dtype)
            cast(np.zeros(()) if bias is None else bias, linear.dtype)
        except DoesNotFit as error:
            outcome.refuse(linear.name, f"the layer was not reconstructed: {error}", "not reconstructed")
            return 0
        added = linear.channels[0] if bias is not None and linear.bias() is None else 0
        self._write(linear, weight)
        return added

    def _write(self, linear: Linear, weight: np.ndarray) -> None:
        bias = self._bias(linear)
        linear.set_weight(weight)
        if bias is not None:
            linear.set_bias(bias)


Reconstruct = Callable[..., Reconstruction]  # ``Reconstruction.of`` with the mode and the ridge of the pass


def _filled(
    moments: MeanCovariance, inputs: slice, kept: np.ndarray, gone: np.ndarray, padded: bool, ridge: float
) -> tuple[np.ndarray, np.ndarray]:
    mean, covariance = moments.mean[inputs], moments.covariance[inputs, inputs]
    if padded:
        covariance, mean = covariance + np.outer(mean, mean), np.zeros_like(mean)
    return least_squares.fill(covariance, mean, kept, gone, ridge)


def matters(read: ReadAxis, group: Group) -> bool:
    """Whether a read has channels of a group."""
    return read.region is group.region and bool(np.isin(read.labels, group.labels).any())
