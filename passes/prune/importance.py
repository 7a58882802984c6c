"""The importance of each unit of a channel group, and of the best k units together.

    l1, l2           sum |w|, sum w^2 over everything that writes a unit and reads it
    bn               sum |gamma| of the BatchNormalizations it passes through (network slimming, Liu et al., 2017)
    activation       E (x - E[x])^2 * ||column||^2 at every reader: the error of removing the unit alone
    reconstruction   the least error of removing units one by one, readers reconstructed (``least_squares.order``)

The first two are divided by the mean of the group, so that layers of any scale can be ranked together. The last two are
comparable without that: both are shares of the energy of the readers' outputs, E ||W (x - E[x])||^2 = tr(W C W^T).

Covariances C come from calibration data. Without data, reconstruction uses the covariance that the writer's weights
imply for white inputs: C = W W^T + bias bias^T, and behind a rectifier the covariance of the rectified normal variables
(the arc-cosine kernel: Cho and Saul, Kernel Methods for Deep Learning, NeurIPS 2009).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Refused
from channelfold.passes.channels.groups import Group, Part, Region, regions_of
from channelfold.passes.layers.linear import Linear, blocks, view
from channelfold.passes.numeric import least_squares
from channelfold.passes.operators import operator
from channelfold.passes.prune import allocation
from channelfold.passes.prune.costs import Keeps
from channelfold.runtime.io import edit


@dataclass(frozen=True)
class Ranking:
    """The order in which the units of a group are removed.

    ``order``: unit numbers, the first to be removed at the front. ``values`` (units + 1,): the importance that the last
    k units hold together, for every k.
    """

    order: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class RankedGroups:
    """The groups that may be cut, each with its ranking."""

    groups: Sequence[Group]
    rankings: Sequence[Ranking]

    @property
    def regions(self) -> list[Region]:
        return regions_of(self.groups)

    @property
    def sizes(self) -> list[allocation.Group]:
        """The sizes of the groups. At least the units that must stay are kept."""
        return [
            allocation.Group(g.name, g.units, max(1, int((~g.free).sum())), int(np.median(g.channels)))
            for g in self.groups
        ]

    @property
    def values(self) -> list[np.ndarray]:
        return [ranking.values for ranking in self.rankings]

    def keeps(self, counts: Sequence[int]) -> Keeps:
        """The labels that stay when each group keeps so many of its units, the last units of its ranking."""
        keeps: Keeps = {}
        for group, ranking, count in zip(self.groups, self.rankings, counts, strict=True):
            _, keep = keeps.setdefault(id(group.region), (group.region, np.ones(group.region.size, bool)))
            keep[group.labels[ranking.order[: group.units - count]] - 1] = False
        return {key: (region, region.completed(keep)) for key, (region, keep) in keeps.items()}


@dataclass(frozen=True)
class ReadAxis:
    """An activation of a region, the axis (from the end) that linears sum over, and those linears."""

    tensor: gs.Tensor
    axis: int
    region: Region
    labels: np.ndarray
    linears: tuple[Linear, ...]

    @property
    def size(self) -> int:
        return self.labels.size

    def gram(self) -> np.ndarray:
        """W^T W over all readers and places of their kernels, (n, n); zero between the groups of a grouped Conv."""
        n = self.labels.size
        total = np.zeros((n, n))
        for linear in self.linears:
            for rows, columns in blocks(linear):
                weight = np.moveaxis(_weight(linear)[rows], 1, -1).reshape(-1, columns.stop - columns.start)
                total[columns, columns] += weight.T @ weight
        return total

    def norms(self) -> np.ndarray:
        """The squares of the columns, (n,): the diagonal of ``gram``."""
        total = np.zeros(self.labels.size)
        for linear in self.linears:
            for rows, columns in blocks(linear):
                total[columns] += np.square(np.moveaxis(_weight(linear)[rows], 1, 0)).sum(
                    axis=tuple(range(1, 2 + len(linear.kernel)))
                )
        return total


@dataclass(frozen=True)
class MeanCovariance:
    """Mean (n,) and covariance (n, n) of the channels of an activation; a covariance (n,) is a diagonal."""

    mean: np.ndarray
    covariance: np.ndarray

    @property
    def variance(self) -> np.ndarray:
        return self.covariance if self.covariance.ndim == 1 else np.diagonal(self.covariance)


def _weight(linear: Linear) -> np.ndarray:
    """The weight in a type that can hold the sums of its squares."""
    weight = linear.weight()
    return weight if weight.dtype == np.float64 else weight.astype(np.float32, copy=False)


def read_axes(graph: gs.Graph, regions: Iterable[Region]) -> list[ReadAxis]:
    """Every activation that linears with constant weights sum over, in order."""
    found: dict[tuple[int, int], tuple[Region, gs.Tensor, np.ndarray, list[Linear]]] = {}
    for region in regions:
        for read in region.reads:
            if read.reduced:
                continue
            try:
                linear = view(graph, read.node)
            except Refused:
                continue
            tensor = read.node.inputs[read.port]
            if linear.data is not tensor:
                continue
            entry = found.setdefault((id(tensor), read.axis), (region, tensor, read.labels, []))
            entry[3].append(linear)
    return [
        ReadAxis(tensor, axis, region, labels, tuple(linears))
        for (_, axis), (region, tensor, labels, linears) in found.items()
    ]


def magnitudes(group: Group, power: int) -> np.ndarray:
    """l1 (``power`` 1) or l2 (2) of each unit, (units,), divided by their mean."""
    total = np.zeros(group.region.size + 1)
    for part in group.region.parts:
        if part.role and np.isin(part.labels, group.labels).any():
            total += _sums(part, power, total.size)
    return _normalized(total[group.labels])


def gammas(group: Group) -> np.ndarray | None:
    """The sum of |gamma| of each unit, (units,), divided by their mean; None where no BatchNormalization has it."""
    parts = [p for p in group.region.parts if operator(p.node).kind == "batch_norm" and p.input == 1]
    parts = [p for p in parts if np.isin(p.labels, group.labels).any()]
    if not parts:
        return None
    total = np.sum([_sums(part, 1, group.region.size + 1) for part in parts], axis=0)
    return _normalized(total[group.labels])


def _sums(part: Part, power: int, size: int) -> np.ndarray:
    """The sum of |w|^power over all entries of a constant with each label, (size,)."""
    values = edit.value(part.node.inputs[part.input])
    assert values is not None
    others = tuple(axis for axis in range(values.ndim) if axis != part.axis)
    return np.bincount(part.labels, (np.abs(values.astype(np.float64)) ** power).sum(axis=others), minlength=size)


def _normalized(scores: np.ndarray) -> np.ndarray:
    mean = scores.mean()
    return scores / mean if mean > 0 else scores


def ranked(group: Group, scores: np.ndarray) -> Ranking:
    """Units in the order of their scores, (units,); units that must stay come last."""
    order = np.lexsort((scores, ~group.free))
    kept_last = scores[order][::-1]
    return Ranking(order, np.concatenate([[0.0], np.cumsum(kept_last)]))


def energies(group: Group, read: ReadAxis, moments: MeanCovariance) -> np.ndarray:
    """``activation`` of each unit at one reader, (units,)."""
    added = moments.variance * read.norms()
    whole = added.sum() if moments.covariance.ndim == 1 else float(np.vdot(moments.covariance, read.gram()))
    if whole <= 0:
        return np.zeros(group.units)
    return np.bincount(read.labels, added / whole, minlength=group.region.size + 1)[group.labels]


def reconstruction(group: Group, read: ReadAxis, moments: MeanCovariance, ridge: float) -> Ranking:
    """The order of least reconstruction error at one reader; ``values[k]`` is minus the error with k units kept."""
    gram = read.gram()
    whole = float(np.vdot(moments.covariance, gram))
    units = group.labels[group.free]
    places = [np.flatnonzero(read.labels == label) for label in units]
    if whole <= 0 or len({p.size for p in places}) != 1 or not places[0].size:
        return ranked(group, energies(group, read, moments))
    removal = least_squares.order(moments.covariance, gram / whole, np.array(places), ridge)
    numbers = np.flatnonzero(group.free)[removal.order]
    order = np.concatenate([numbers, np.flatnonzero(~group.free)])
    values = np.full(group.units + 1, -removal.errors[-1])
    values[group.units - np.arange(removal.errors.size)] = -removal.errors
    return Ranking(order, values)


def implied(graph: gs.Graph, read: ReadAxis) -> MeanCovariance | None:
    """Mean and covariance that the writers' weights imply for white inputs; None where a channel has no such writer."""
    size = read.labels.size
    covariance, seen = np.zeros((size, size)), np.zeros(size, bool)
    for part in read.region.parts:
        if part.role != "out" or not operator(part.node).weighted:
            continue
        rows, places = _matched(part.labels, read.labels)
        if seen[places].any():
            return None
        linear = view(graph, part.node)
        weight = _weight(linear).reshape(linear.channels[0], -1)[rows]
        bias = linear.bias()
        if bias is not None:
            weight = np.concatenate([weight, bias[rows, None]], axis=1)
        covariance[np.ix_(places, places)] = weight @ weight.T
        seen[places] = True
    if not seen.all():
        return None
    through = any(operator(node).rectifies for tensor, _ in read.region.axes.values() for node in tensor.inputs)
    return rectified(covariance) if through else MeanCovariance(np.zeros(size), covariance)


def _matched(rows: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a writer and the positions at a reader that are the same channels, from the labels of both."""
    shared = np.intersect1d(rows, places)
    found = [np.argsort(labels, kind="stable") for labels in (rows, places)]
    found = [order[np.isin(labels[order], shared)] for order, labels in zip(found, (rows, places), strict=True)]
    return (found[0], found[1]) if len(found[0]) == len(found[1]) else (np.empty(0, np.int64), np.empty(0, np.int64))


def shrunk(covariance: np.ndarray, count: int) -> np.ndarray:
    """A covariance estimated from ``count`` positions, with its correlations shrunk towards zero.

    With fewer positions than channels every channel is a linear combination of the others on these positions, so the
    correlations are too large. They are reduced by oracle approximating shrinkage of the correlation matrix towards the
    identity (Chen et al., IEEE Trans. Signal Process. 58, 2010).
    """
    n, deviation = len(covariance), np.sqrt(np.maximum(np.diagonal(covariance), 0.0))
    if n < 2:
        return covariance
    inverse = np.divide(1.0, deviation, out=np.zeros(n), where=deviation > 0)
    squares = float(np.square(covariance * inverse[:, None] * inverse).sum())
    whole = float((deviation > 0).sum())
    excess = (count + 1 - 2 / n) * (squares - whole * whole / n)
    share = min(1.0, ((1 - 2 / n) * squares + whole * whole) / excess) if excess > 0 else 1.0
    found = covariance * (1 - share)
    found[np.diag_indices(n)] = np.diagonal(covariance)
    return found


def rectified(covariance: np.ndarray) -> MeanCovariance:
    """Mean and covariance of max(z, 0) for z normal with mean 0."""
    deviation = np.sqrt(np.maximum(np.diagonal(covariance), 1e-30))
    scale = np.outer(deviation, deviation)
    angle = np.arccos(np.clip(covariance / scale, -1.0, 1.0))
    second = scale / (2 * np.pi) * (np.sin(angle) + (np.pi - angle) * np.cos(angle))
    mean = deviation / np.sqrt(2 * np.pi)
    return MeanCovariance(mean, second - np.outer(mean, mean))
