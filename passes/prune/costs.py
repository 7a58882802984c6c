"""The costs of channel groups: multiply-accumulates and parameters as functions of the units that are kept.

A weight whose axes are shared out among groups, f_g of one axis to g and f_h of another to h, costs

    amount * sum_g sum_h f_g f_h (k_g / n_g) (k_h / n_h)

as terms for ``allocation.Costs``. The cost of a weight without a share of any group is constant.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.channels.groups import Group, Region
from channelfold.passes.channels.maps import Shape
from channelfold.passes.channels.ports import shape_of
from channelfold.passes.operators import operator
from channelfold.passes.prune.allocation import Term
from channelfold.runtime.io import edit

Kind = Literal["macs", "parameters"]
Keeps = dict[int, tuple[Region, np.ndarray]]  # regions and their labels that stay, (labels,) bool, by id of the region


@dataclass(frozen=True)
class _Axis:
    """An axis along which a region has its channels."""

    region: int
    labels: np.ndarray


class GroupCosts:
    """The costs of a graph. ``shapes`` holds the shapes of all tensors for one input, by name."""

    def __init__(self, graph: gs.Graph, groups: Sequence[Group], shapes: Mapping[str, Shape]):
        self._graph, self._shapes = graph, shapes
        self._owner: dict[int, np.ndarray] = {}
        self._constants: dict[tuple[int, int], dict[int, _Axis]] = {}
        self._axes: dict[tuple[int, int], _Axis] = {}
        for number, group in enumerate(groups):
            region = group.region
            if id(region) not in self._owner:
                self._owner[id(region)] = np.full(region.size + 1, -1)
                for part in region.parts:
                    axes = self._constants.setdefault((id(part.node), part.input), {})
                    axes[part.axis] = _Axis(id(region), part.labels)
                self._axes |= {place: _Axis(id(region), labels) for place, (_, labels) in region.axes.items()}
            self._owner[id(region)][group.labels] = number

    def terms(self, kind: Kind) -> list[Term]:
        """The cost by the units of the groups. All units of a group count alike."""
        found = []
        for amount, axes in self._amounts(kind):
            for combination in itertools.product(*(self._shares(axis) for axis in axes)):
                factor = math.prod(share for _, share in combination)
                found.append(Term(amount * factor, tuple(group for group, _ in combination if group >= 0)))
        return found

    def exact(self, kind: Kind, keeps: Keeps) -> float:
        """The cost when these labels alone stay."""

        def left(axis: _Axis) -> float:
            return float(keeps[axis.region][1][axis.labels - 1].mean()) if axis.region in keeps else 1.0

        return sum(amount * math.prod(map(left, axes)) for amount, axes in self._amounts(kind))

    def _shares(self, axis: _Axis) -> list[tuple[int, float]]:
        """The groups that share an axis, each with its share; -1 stands for no group."""
        numbers, counts = np.unique(self._owner[axis.region][axis.labels], return_counts=True)
        return [(int(n), c / axis.labels.size) for n, c in zip(numbers, counts, strict=True)]

    def _amounts(self, kind: Kind) -> Iterator[tuple[float, list[_Axis]]]:
        """The cost of each node or constant, and the axes to which the cost is proportional."""
        seen = set()
        for node in self._graph.nodes:
            if kind == "macs" and operator(node).weighted:
                yield from self._macs(node)
            for port, tensor in enumerate(node.inputs if kind == "parameters" else ()):
                if isinstance(tensor, gs.Constant) and id(tensor) not in seen and edit.is_float(tensor):
                    seen.add(id(tensor))
                    yield math.prod(tensor.shape), list(self._constants.get((id(node), port), {}).values())

    def _macs(self, node: gs.Node) -> Iterator[tuple[float, list[_Axis]]]:
        left, right, result = (shape_of(t, self._shapes) for t in (*node.inputs[:2], node.outputs[0]))
        if left is None or right is None or result is None:
            return
        if operator(node).kind == "conv":
            positions = math.prod((left if node.op == "ConvTranspose" else result)[2:]) * result[0]
            yield positions * math.prod(right), list(self._constants.get((id(node), 1), {}).values())
            return
        summed = 0 if node.op == "Gemm" and node.attrs.get("transA", 0) else len(left) - 1
        places = [(id(node.outputs[0]), axis) for axis in range(len(result))]
        axes = [self._axes[place] for place in places if place in self._axes]
        inner = self._axes.get((id(node.inputs[0]), summed)) or self._constants.get((id(node), 0), {}).get(summed)
        yield math.prod(result) * left[summed], [*axes, *([inner] if inner is not None else [])]
