"""Channels that nothing depends on, or that never change, cut exactly.

    unread      W[:, c] = 0                       y = W_K x_K + b
    constant    x_c = k whatever the input is     y = W_K x_K + b + k sum_places W[:, c]

Training with a sparsity penalty leaves such channels: a BatchNormalization with gamma = 0 emits beta, a Relu makes
max(beta, 0) of it, and a convolution with a row of zeros emits its bias. ``channels.constants`` finds them from the
weights alone. Their constants go into the bias of every linear that sums over them, and then they are cut as ``prune``
cuts channels. A zero-padded convolution reads zeros instead of k at the border, so there k must be 0.

Channels that only unread channels read are unread as well, and a cut may make more channels dead: the cut is repeated
until no channel is dead. Every tensor keeps at least one channel.

Sources: Liu et al., Network Slimming, ICCV 2017 (gamma = 0); Ye et al., Rethinking the Smaller-Norm-Less-Informative
Assumption, ICLR 2018 (the constant goes into the next bias).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, DoesNotFit, Outcome, Refused
from channelfold.passes.channels.constants import ConstantChannels, ConstantPositions
from channelfold.passes.channels.cut import Cut, cut
from channelfold.passes.channels.cut_regions import Read, Region
from channelfold.passes.channels.groups import Group, find_groups
from channelfold.passes.channels.links import LinkTable
from channelfold.passes.channels.maps import Shape
from channelfold.passes.layers.linear import Linear, blocks, cast, view
from channelfold.passes.operators import operator
from channelfold.passes.prune import RemoveDeadChannels, allocation
from channelfold.passes.prune.costs import GroupCosts, Kind
from channelfold.runtime.data.probes import shapes_of
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import infer_shapes

_KINDS: tuple[Kind, ...] = ("macs", "parameters")


class Work(RemoveDeadChannels):
    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        infer_shapes(graph)
        sizes: list[Counter[str]] = []
        costs: list[dict[str, float]] = []
        while True:
            shapes = shapes_of(graph, ctx.calibration, ctx.seed)
            groups = find_groups(graph, shapes)
            constants = ConstantChannels(graph, LinkTable(graph, shapes))
            regions = {id(g.region): g.region for g in groups}
            usages = {key: _Usage.of(graph, region, constants, shapes) for key, region in regions.items()}
            _follow_unread(list(usages.values()), shapes)
            totals = GroupCosts(graph, groups, shapes)
            costs.append({kind: totals.exact(kind, {}) for kind in _KINDS})
            sizes.append(_channels(groups))
            cuts = self._cuts(groups, usages)
            if not cuts:
                break
            _remove(graph, shapes, usages, cuts)
            infer_shapes(graph)
        outcome = Outcome()
        for name, before in sizes[0].items():
            if sizes[-1][name] < before:
                outcome.change(name, f"{before} -> {sizes[-1][name]} channels, the others were dead")
        for group in groups:
            self._refuse(group, usages[id(group.region)], outcome)
        outcome.facts = {kind: {"before": costs[0][kind], "after": costs[-1][kind]} for kind in _KINDS}
        return outcome

    def _cuts(self, groups: Sequence[Group], usages: dict[int, _Usage]) -> dict[int, Cut]:
        """The labels to cut, by the id of their region, such that no bias overflows."""
        while True:
            cuts = {key: (one.region, np.ones(one.region.size, bool)) for key, one in usages.items()}
            for group in groups:
                dead = np.flatnonzero(usages[id(group.region)].dead[group.labels - 1])
                gone = group.units - self._least(group, len(dead))
                cuts[id(group.region)][1][group.labels[dead[len(dead) - gone :]] - 1] = False
            cuts = {key: (region, region.completed(keep)) for key, (region, keep) in cuts.items() if not keep.all()}
            sums = [one for key, (_, keep) in cuts.items() for one in usages[key].sums if one.overflows(keep)]
            if not sums:
                return {key: (region, keep) for key, (region, keep) in cuts.items() if not keep.all()}
            for one in sums:
                one.reason = f"its constant does not fit the type of the bias of {one.read.node.name!r}"

    def _least(self, group: Group, dead: int) -> int:
        """The number of units that stay when ``dead`` units are dead."""
        counts = allocation.Group(group.name, group.units, 1, int(np.median(group.channels))).counts(self.align)
        return int(counts[np.searchsorted(counts, group.units - dead)])

    def _refuse(self, group: Group, usage: _Usage, outcome: Outcome) -> None:
        """Reports the dead channels that a group still has, and the reasons."""
        last = "a tensor keeps one" if self.align == 1 else f"a multiple of {self.align} channels is kept"
        reasons = usage.reasons
        stay = Counter(reasons[label - 1] or last for label in group.labels[usage.constant[group.labels - 1]])
        for reason, units in stay.items():
            what = "channels" if (group.channels == 1).all() else "units of channels"
            said = "is dead and stays" if units == 1 else "are dead and stay"
            outcome.refuse(group.name, f"{units} of {group.units} {what} {said}: {reason}", reason)


def _channels(groups: Sequence[Group]) -> Counter[str]:
    """The number of channels by the node that writes them."""
    found: Counter[str] = Counter()
    for group in groups:
        found[group.name] += int(group.channels.sum())
    return found


def _remove(graph: gs.Graph, shapes: Mapping[str, Shape], usages: dict[int, _Usage], cuts: dict[int, Cut]) -> None:
    """Cuts the graph, and adds the constants of the lost channels to the biases."""
    rows = {place: keep[labels - 1] for region, keep in cuts.values() for place, (_, labels) in region.axes.items()}
    gains = []
    for key, (_, keep) in cuts.items():
        for one in usages[key].sums:
            gain = one.gain(keep)
            if gain is not None and one.linear is not None:
                result = one.linear.node.outputs[0]
                stays = rows.get((id(result), one.linear.out_axis % len(shapes[result.name])))
                gains.append((one.linear.node, gain if stays is None else gain[stays]))
    cut(graph, list(cuts.values()))
    for node, gain in gains:
        linear = view(graph, node)
        linear.set_bias(_plus(linear.bias(), gain))


def _plus(bias: np.ndarray | None, gain: np.ndarray) -> np.ndarray:
    return gain if bias is None else bias + gain


@dataclass
class _Sum:
    """A node that sums over the channels of a region; all arrays are by position along the axis, (n,).

    ``unused`` marks the positions whose weights are zero, or only in rows that nobody reads. ``reason`` says why no
    bias can take the constants that the node reads.
    """

    read: Read
    linear: Linear | None
    known: ConstantPositions
    unused: np.ndarray
    reason: str = ""

    @classmethod
    def of(cls, graph: gs.Graph, read: Read, constants: ConstantChannels) -> _Sum:
        node, tensor = read.node, read.node.inputs[read.port]
        known = constants.along(tensor, read.axis)
        if read.reduced:
            return cls(read, None, known, np.zeros(read.labels.size, bool), read.reduced)
        try:
            linear = view(graph, node)
        except Refused:
            linear = None
        if linear is None or linear.data is not tensor:
            unused = constants.met_by_zeros(node, read.port, read.axis)
            return cls(read, None, known, unused, f"{node.op} {node.name!r} has no bias for its constant")
        padded = f"{node.op} {node.name!r} pads with zeros, and its constant is not zero"
        return cls(read, linear, known, ~_used(linear), padded if linear.padded else "")

    @property
    def adds(self) -> np.ndarray:
        """The positions that add a constant to every result, (n,) bool; in a norm zeros count as well."""
        return self.known.where & ~self.unused & ~(self.known.zero() & (not self.read.reduced))

    @property
    def varies(self) -> np.ndarray:
        return ~self.known.where & ~self.unused

    def gain(self, keep: np.ndarray) -> np.ndarray | None:
        """The constants that the lost channels add to the outputs, (out,); None for nothing. ``keep`` is by label."""
        gone = self.adds & ~keep[self.read.labels - 1]
        if self.linear is None or not gone.any():
            return None
        return self.linear.respond(self.linear.weight(), np.where(gone, self.known.values.astype(np.float64), 0.0))

    def overflows(self, keep: np.ndarray) -> bool:
        gain = self.gain(keep)
        if gain is None or self.linear is None:
            return False
        try:
            cast(_plus(self.linear.bias(), gain), self.linear.dtype)
        except DoesNotFit:
            return True
        return False


@dataclass
class _Usage:
    """The nodes that use the channels of a region; all arrays are by label - 1.

    ``held`` marks the channels that a recurrent cell reads from itself.
    """

    region: Region
    sums: list[_Sum]
    held: np.ndarray

    @classmethod
    def of(cls, graph: gs.Graph, region: Region, constants: ConstantChannels, shapes: Mapping[str, Shape]) -> _Usage:
        held = np.zeros(region.size, bool)
        for (_, axis), (tensor, labels) in region.axes.items():
            cell = edit.producer(tensor)
            if cell is not None and operator(cell).gates and axis == len(shapes[tensor.name]) - 1:
                held[labels[~constants.along(cell.inputs[2], 2).zero()] - 1] = True
        return cls(region, [_Sum.of(graph, read, constants) for read in region.reads], held)

    @property
    def unread(self) -> np.ndarray:
        """The channels that nothing reads, (size,) bool."""
        return self.region.free & ~self.held & ~self._any(lambda one: ~one.unused)

    @property
    def constant(self) -> np.ndarray:
        """The channels that only bring constants to their readers, (size,) bool; no unread outputs of the model."""
        arrives = ~self.held & ~self._any(lambda one: one.varies)
        return arrives & (self.region.free | self._any(lambda one: one.adds))

    @property
    def dead(self) -> np.ndarray:
        return self.constant & np.array([not reason for reason in self.reasons])

    @property
    def reasons(self) -> list[str]:
        """The reason why each label must stay, even a constant one; "" for a free label."""
        found = list(self.region.fixed)
        for one in self.sums:
            for label in one.read.labels[one.adds] if one.reason else ():
                found[label - 1] = found[label - 1] or one.reason
        return found

    def _any(self, positions: Callable[[_Sum], np.ndarray]) -> np.ndarray:
        """The labels at the given positions of any sum."""
        found = np.zeros(self.region.size, bool)
        for one in self.sums:
            found[one.read.labels[positions(one)] - 1] = True
        return found


def _follow_unread(usages: Sequence[_Usage], shapes: Mapping[str, Shape]) -> None:
    """Marks positions as unused where only rows of weights that nobody reads use them."""
    rows = {place: (one, labels) for one in usages for place, (_, labels) in one.region.axes.items()}
    linear_sums = [one for region in usages for one in region.sums if one.linear is not None]
    count = -1
    while count != (count := sum(int(one.unused.sum()) for one in linear_sums)):
        unread = {id(one): one.unread for one in usages}
        for one in linear_sums:
            assert one.linear is not None
            result = one.linear.node.outputs[0]
            found = rows.get((id(result), one.linear.out_axis % len(shapes[result.name])))
            if found is not None and (dead := unread[id(found[0])][found[1] - 1]).any():
                one.unused = ~_used(one.linear, ~dead)


def _used(linear: Linear, alive: np.ndarray | None = None) -> np.ndarray:
    """The input channels with a weight other than zero, (in,) bool; only rows in ``alive`` (out,) bool count."""
    weight = linear.weight()
    used = (weight != 0).reshape(*weight.shape[:2], -1).any(axis=-1)
    if alive is not None:
        used &= alive[:, None]
    return np.concatenate([used[rows].any(axis=0) for rows, _ in blocks(linear)])
