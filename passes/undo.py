"""Taking back one site of a pass: the site whose rewriting changes the outputs of the graph.

A legitimate fold can change a function: weights of 1e30 overflow in another order, and a sum that cancels loses digits.
The site to blame is the changed site nearest, in the graph before the pass, to where both graphs part. The pass then
runs again on the graph as it was, with the node of the site left out: by the option ``exclude`` of the pass, or, where
the pass has none, by making the node an operator that nobody knows for as long as the pass runs.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import glob
from collections.abc import Iterator, Set

import onnx_graphsurgeon as gs

from channelfold.passes.base import Pass
from channelfold.passes.verify import Violation
from channelfold.runtime.io.convert import all_graphs
from channelfold.runtime.io.files import infer_shapes
from channelfold.runtime.io.names import reads
from channelfold.runtime.io.snapshot import Snapshot

SITES = 8  # of one pass; with more to take back, all of the pass is taken back


def to_blame(before: Snapshot, sites: Set[str], error: Violation) -> str | None:
    """The site, by name of its node, that is nearest to where two graphs part; None where none of the sites is known.

    Nodes are near that share a tensor.
    """
    nodes = list(before.model.graph.node)
    touching: dict[str, list[int]] = {}
    for place, node in enumerate(nodes):
        for name in {*reads(node), *node.output} - {""}:
            touching.setdefault(name, []).append(place)
    pending = collections.deque(place for place, node in enumerate(nodes) if node.name == error.node)
    pending.extend(touching.get(error.tensor, ()))
    seen = set(pending)
    while pending:
        node = nodes[pending.popleft()]
        if node.name in sites:
            return node.name
        near = {place for name in {*reads(node), *node.output} for place in touching.get(name, ())} - seen
        seen |= near
        pending.extend(sorted(near))
    return None


@contextlib.contextmanager
def leaving(step: Pass, graph: gs.Graph, sites: Set[str]) -> Iterator[Pass]:
    """A pass that leaves the sites alone, for as long as this is open."""
    if sites and "exclude" in step.options():
        patterns = (*step.patterns.exclude, *map(glob.escape, sorted(sites)))
        yield dataclasses.replace(step, **{"exclude": patterns})
        return
    if sites:
        infer_shapes(graph)  # nothing is inferred across a node that nobody knows
    hidden = [(node, node.op, node.domain) for part in all_graphs(graph) for node in part.nodes if node.name in sites]
    for node, op, _ in hidden:
        node.op, node.domain = f"{op}Left", "channelfold.left"
    try:
        yield step
    finally:
        for node, op, domain in hidden:
            node.op, node.domain = op, domain
