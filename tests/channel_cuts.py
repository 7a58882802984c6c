"""Cutting channels in tests: what may go, and whether the cut computes the same as a mask.

c1 4/4                      of the 4 units that the node writing c1 makes, 4 may go
q 2/3 x8: Gather picks it 1  a unit is 8 channels; one stays, with the reason
c1 4/4 reduced              a norm works on them: cutting is not silencing
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.channels.cut import Cut, cut, mask
from channelfold.passes.channels.cut_regions import Region
from channelfold.passes.channels.groups import Group, find_groups, regions_of
from channelfold.runtime.io.files import check, infer_shapes
from channelfold.runtime.io.shapes import measured_shapes
from channelfold.tests.graphs import assert_same, build, feeds, random, run

Make = Callable[[], gs.Graph]
Feed = dict[str, np.ndarray]
OUT = "it is the output 'y' of the model"


@dataclass
class Case:
    """``gone``: units by group; ``zeros``: what is zero in which constants when they are silent."""

    name: str
    signature: str
    body: str
    groups: str
    constants: dict = field(default_factory=dict)
    gone: dict[str, list[int]] = field(default_factory=dict)
    zeros: dict[str, Any] = field(default_factory=dict)
    options: dict = field(default_factory=dict)

    def make(self, silent: bool = False) -> gs.Graph:
        constants = {
            name: random(value, name) if isinstance(value, int | tuple) else np.array(value)
            for name, value in self.constants.items()
        }
        for name, index in self.zeros.items() if silent else ():
            for place in index if isinstance(index, list) else [index]:
                constants[name][place] = 0
        return build(self.signature, self.body, **constants, **self.options)


def named(**values) -> dict:
    return values


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def groups_of(graph: gs.Graph, feed: Feed | None = None) -> list[Group]:
    return find_groups(graph, measured_shapes(graph, feed or feeds(graph)))


def written(group: Group) -> str:
    """The name of what the first writer of a group writes."""
    return next(t.name for t in group.writers[0].layer.outputs if not t.is_empty())


def summary(groups: list[Group]) -> str:
    return "\n".join(map(_line, groups))


def _line(group: Group) -> str:
    counts = sorted(set(group.channels.tolist()))
    many = "" if counts == [1] else f" x{','.join(map(str, counts))}"
    reasons = "; ".join(f"{reason} {count}" for reason, count in group.reasons.items())
    stays = f": {reasons}" if reasons else ""
    reduced = " reduced" if group.region.reduced and group.free.any() else ""
    return f"{written(group)} {int(group.free.sum())}/{group.units}{many}{reduced}{stays}"


def random_keep(region: Region, rng: np.random.Generator, ratio: float) -> np.ndarray:
    """Labels that stay when a share of those that may go does; at 1 as many go as can."""
    keep = ~region.free | (rng.random(region.size) >= ratio)
    return region.completed(keep)


def without(groups: list[Group], gone: Mapping[str, list[int]]) -> list[Cut]:
    """The cuts that take units away from the groups of these names."""
    keeps = {id(region): (region, np.ones(region.size, bool)) for region in regions_of(groups)}
    for group in groups:
        keeps[id(group.region)][1][group.labels[gone.get(written(group), [])] - 1] = False
    assert gone.keys() <= {written(group) for group in groups}
    return list(keeps.values())


def outputs_without(make: Make, gone: Mapping[str, list[int]]) -> tuple[gs.Graph, dict[str, np.ndarray]]:
    """The graph without these units, and what it computes."""
    graph = make()
    cut(graph, without(groups_of(graph), gone))
    assert_intact(make(), graph)
    return graph, run(graph, feeds(graph))


def assert_intact(before: gs.Graph, after: gs.Graph) -> None:
    """The graph is valid, its inputs and outputs are what they were, and all shapes in it agree."""
    check(after)
    for old, new in zip((*before.inputs, *before.outputs), (*after.inputs, *after.outputs), strict=True):
        assert (old.name, old.shape, old.dtype) == (new.name, new.shape, new.dtype)
    infer_shapes(after)


def assert_slice_equals_mask(make: Make, *, seed: int = 0, ratios=(0.3, 0.7, 1.0), feed: Feed | None = None) -> int:
    """Of random cuts of all regions that no norm works on; returns how many labels could go."""
    free = 0
    for ratio in ratios:
        sliced, masked = make(), make()
        feed = feed or feeds(sliced)
        for graph, step in ((sliced, cut), (masked, mask)):
            rng = np.random.default_rng(seed)
            regions = [r for r in regions_of(groups_of(graph, feed)) if not r.reduced]
            step(graph, [(region, random_keep(region, rng, ratio)) for region in regions])
            free = sum(int(region.free.sum()) for region in regions)
        assert_intact(make(), sliced)
        assert_same(run(masked, feed), run(sliced, feed))
    return free


def assert_slice_equals_zeros(case: Case) -> gs.Graph:
    """Of the cut that a case names, by the zeros that it names; returns the cut graph."""
    silent = case.make(silent=True)
    graph, outputs = outputs_without(case.make, case.gone)
    assert_same(run(silent, feeds(silent)), outputs)
    return graph
