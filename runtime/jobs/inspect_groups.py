"""Channel groups as a record: the channels that ``prune`` could cut from a graph, and why the others stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import onnx_graphsurgeon as gs

from channelfold.passes.base import Context
from channelfold.passes.channels.groups import Group, find_groups
from channelfold.passes.prune.costs import GroupCosts
from channelfold.passes.recipe import load_recipe
from channelfold.runtime.data.probes import shapes_of
from channelfold.runtime.io.files import infer_shapes


def describe(graph: gs.Graph, seed: int = 0) -> list[dict[str, Any]]:
    """One entry a channel group, in order. The exact folds run first, because ``prune`` cuts the folded graph.

    ``channels``: those of the first weight. ``units``: the number of parts that are removed as a whole. ``prunable``:
    the channels that can be removed. ``writers`` and ``readers``: nodes. ``macs`` and ``parameters``: the costs that
    the whole group saves. ``reduced``: the norm that works on the channels. ``stay``: for each reason, the number of
    channels that stay.
    """
    for step in load_recipe("fold").passes:
        step.apply(graph, Context())
    infer_shapes(graph)
    shapes = shapes_of(graph, seed=seed)
    groups = find_groups(graph, shapes)
    costs = GroupCosts(graph, groups, shapes)
    macs, parameters = (_alone(costs, kind, len(groups)) for kind in ("macs", "parameters"))
    return [_entry(group) | {"macs": m, "parameters": p} for group, m, p in zip(groups, macs, parameters, strict=True)]


def _entry(group: Group) -> dict[str, Any]:
    stay: Counter[str] = Counter()
    for label, size in zip(group.labels, group.channels, strict=True):
        if reason := group.region.fixed[label - 1]:
            stay[reason] += int(size)
    return {
        "node": group.name,
        "channels": int(group.channels.sum()),
        "units": group.units,
        "prunable": int(group.channels[group.free].sum()),
        "writers": _nodes(part.node for part in group.writers),
        "readers": _nodes(read.node for read in group.region.reads if not read.reduced),
        "reduced": group.region.reduced,
        "stay": dict(stay),
    }


def _nodes(nodes: Iterable[gs.Node]) -> list[str]:
    return list(dict.fromkeys(node.name for node in nodes))


def _alone(costs: GroupCosts, kind: Any, groups: int) -> list[int]:
    """For each group, the costs that removing this group alone saves."""
    terms = costs.terms(kind)
    return [round(sum(term.amount for term in terms if number in term.groups)) for number in range(groups)]
