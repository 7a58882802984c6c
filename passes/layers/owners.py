"""Which site each node belongs to that ONNX Runtime runs: it fuses nodes and names them anew."""

from __future__ import annotations

import re
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs

from channelfold.passes.operators import operator
from channelfold.runtime.io import edit, files
from channelfold.runtime.io.session import Session
from channelfold.runtime.stats.profile import NodeTime

_MADE = re.compile(r"(_nchwc|_token_\d+|_q|_dq|/duplicated|/\w+Fusion\w*|_kernel)+_*$")  # ends of names of ONNX Runtime
_WEIGHTED = re.compile(r"Conv|MatMul|Gemm|Gather")  # in the names of operators, fused and quantized ones too
_IN_FRONT = ("QuantizeLinear", "DynamicQuantizeLinear")  # belong to what reads their results


def owners(path: Path, nodes: Sequence[NodeTime], sites: Sequence[Sequence[str]]) -> list[float]:
    """The time of the nodes of every site, as ONNX Runtime runs them.

    A product or a table belongs to the site whose result it writes, maybe after nodes that were fused into it. A
    quantizer, and what expands a constant, belongs to the one that reads it, another node to the one in front of it.
    """
    with tempfile.TemporaryDirectory(prefix="channelfold-") as folder:
        optimized = Path(folder, "optimized.onnx")
        Session(path, optimized=optimized)
        model = onnx.load(optimized, load_external_data=False).graph
    made = list(model.node)
    tails = _tails(files.load(path), sites)
    constants = {tensor.name for tensor in model.initializer}
    writers = {name: node for node in made for name in node.output if name}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in made:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    known = {id(node): place for node in made if (place := _place(node, tails)) is not None}

    def nearest(node: onnx.NodeProto, forward: bool) -> int | None:
        queue, seen = deque([node]), {id(node)}
        while queue:
            here = queue.popleft()
            if id(here) in known:
                return known[id(here)]
            if forward:
                following = [reader for name in here.output for reader in readers.get(name, ())]
            else:
                following = [writers[name] for name in here.input if name in writers]
            for other in following:
                if id(other) not in seen:
                    seen.add(id(other))
                    queue.append(other)
        return None

    places: dict[str, int | None] = {}
    for node in made:
        expands = all(name in constants for name in node.input if name)
        first = node.op_type in _IN_FRONT or expands
        place = nearest(node, first)
        places[node.name] = nearest(node, not first) if place is None else place
    times = [0.0] * len(sites)
    for node in nodes:
        if (place := places.get(node.name)) is not None:
            times[place] += node.ms
    return times


def nearest(graph: gs.Graph, places: Mapping[str, int]) -> dict[str, int]:
    """The site of every node of a graph: of a quantizer the one that reads it, of another node the one in front of it.

    ``places``: the sites of their own nodes.
    """

    def found(node: gs.Node, forward: bool) -> int | None:
        queue, seen = deque([node]), {id(node)}
        while queue:
            here = queue.popleft()
            if here.name in places:
                return places[here.name]
            around = (edit.consumers(t) for t in here.outputs) if forward else ([edit.producer(t)] for t in here.inputs)
            for other in (other for others in around for other in others if other is not None):
                if id(other) not in seen:
                    seen.add(id(other))
                    queue.append(other)
        return None

    sites = {}
    for node in graph.nodes:
        first = node.op in _IN_FRONT
        place = found(node, first)
        sites[node.name] = found(node, not first) if place is None else place
    return {name: place for name, place in sites.items() if place is not None}


def _place(node: onnx.NodeProto, tails: Mapping[str, int]) -> int | None:
    """The site of a product or a table, by the name of its result or its own; None for other nodes."""
    if not _WEIGHTED.search(node.op_type):
        return None
    for name in (*node.output, node.name):
        for found in (name, _MADE.sub("", name)):
            if found in tails:
                return tails[found]
    return None


def _tails(graph: gs.Graph, sites: Sequence[Sequence[str]]) -> dict[str, int]:
    """Which site a name is of: nodes and tensors from a linear of the site to the next ones, the linear first."""
    places = {name: place for place, names in enumerate(sites) for name in names}
    found: dict[str, int] = {}
    queue = deque((node, places[node.name]) for node in graph.nodes if node.name in places)
    while queue:
        node, place = queue.popleft()
        if node.name in found and node.name not in places:
            continue
        found.setdefault(node.name, place)
        for tensor in node.outputs:
            found.setdefault(tensor.name, place)
            queue.extend((reader, place) for reader in edit.consumers(tensor) if not operator(reader).weighted)
    return found
