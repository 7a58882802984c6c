"""The magnitudes of all tensors on calibration data: what decides where 16 bits suffice."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context
from channelfold.passes.bodies import data_inside, runs_on
from channelfold.passes.cast.kinds import Kinds, all_bodies
from channelfold.runtime.data.sources import Data
from channelfold.runtime.errors import ModelError
from channelfold.runtime.io.front import behind_of, unknown
from channelfold.runtime.stats.observe import by_name, observe


@dataclass
class Magnitudes:
    """An observer of the finite values of a tensor: the largest magnitude, the number of elements, and of a tensor that
    ``divides`` the smallest magnitude but zero.
    """

    divides: bool = False
    largest: float = 0.0
    smallest: float = math.inf
    elements: int = 0

    def add(self, values: np.ndarray) -> None:
        self.elements = max(self.elements, values.size)
        if not values.size:
            return
        ends = float(values.min()), float(values.max())
        if not all(map(math.isfinite, ends)):
            values = values[np.isfinite(values)]
            ends = float(values.min(initial=0.0)), float(values.max(initial=0.0))
        self.largest = max(self.largest, -ends[0], ends[1])
        if self.divides:
            sizes = np.abs(values)
            self.smallest = min(self.smallest, float(sizes[sizes > 0].min(initial=math.inf)))

    def merge(self, other: Magnitudes) -> None:
        self.largest, self.smallest = max(self.largest, other.largest), min(self.smallest, other.smallest)
        self.elements = max(self.elements, other.elements)


def measured(graph: gs.Graph, kinds: Kinds, ctx: Context, divisors: set[str]) -> dict[str, Magnitudes]:
    """The magnitudes of the float32 tensors that the calibration data reach, by name; of a name in two bodies of both.

    ``divisors``: the names of the tensors whose smallest magnitude matters.
    """
    if ctx.calibration is None:
        return {}
    inside = data_inside(graph, ctx.calibration)
    found = _observed(graph, graph.inputs, kinds, ctx.calibration, ctx, divisors)
    for body in all_bodies(graph):
        if (data := runs_on(body, inside.get(id(body.graph)))) is not None:
            own = body.graph.inputs
            with body.apart() as part, contextlib.suppress(ModelError):  # a body of which nothing is known then
                for name, seen in _observed(part, own, kinds, data, ctx, divisors).items():
                    found.setdefault(name, seen).merge(seen)
    return {key: seen for key, seen in found.items() if seen.elements}


def _observed(
    graph: gs.Graph, inputs: Iterable[gs.Tensor], kinds: Kinds, data: Data, ctx: Context, divisors: set[str]
) -> dict[str, Magnitudes]:
    behind = behind_of(graph, unknown(graph))
    tensors = [*inputs, *(t for node in graph.nodes for t in node.outputs)]
    known = [t for t in tensors if kinds.is_float32(t) and id(t) not in behind]
    seen = {tensor.name: Magnitudes(tensor.name in divisors) for tensor in known}
    observe(graph, by_name(seen.items()), data, ctx.progress)
    return seen
