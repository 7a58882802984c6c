"""Tensors inside a model on every feed, each node run once, however much there is to see.

ONNX Runtime returns all outputs of a run at once, and runs the whole graph whatever outputs are asked for. So a model
with more to see than memory should hold is cut into consecutive parts, each a session of its own:

    part 1: nodes 0 … i     part 2: nodes i + 1 … j     part 3: …
    a part reads the feed and what earlier parts wrote, and returns what is observed in it and what later parts read

A feed runs through all parts, one after the other: memory holds what is observed in one part, and what later parts
still read. The weights that parts share are mapped from one file. A part ends where the fewest bytes are alive, which
in a deep network is between two blocks. ONNX Runtime fuses no nodes over that edge, so values behind it may be rounded
otherwise than in the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from channelfold.runtime.io import edit
from channelfold.runtime.io.files import export, inferred, open_model, weightless
from channelfold.runtime.io.names import in_order, reads
from channelfold.runtime.io.session import Feed, Session

LIMIT = 1 << 26  # bytes that are observed in one part; cutting costs no time that can be measured
_MAPPED = 1 << 30  # bytes of weights from which on ONNX Runtime makes no copies of them, which cost it little time
_NO_ARRAYS = (onnx.TensorProto.UNDEFINED, onnx.TensorProto.BFLOAT16)  # of which a session cannot give its values


@dataclass(frozen=True)
class Part:
    """``shown``: the observed tensors by the names of the outputs; ``later``: what later parts read."""

    session: Session
    nodes: tuple[str, ...]
    shown: Mapping[str, str]
    later: frozenset[str]


class Observed:
    """Sessions that show tensors of a graph, cast to float32 where they are of another type.

    ``sizes``: the bytes of every tensor, as far as known; at most ``limit`` of them are observed in one part, unless a
    single tensor takes more or the graph cannot be cut there (what is alive is no plain tensor, or of unknown type).
    """

    def __init__(
        self, graph: gs.Graph, tensors: Sequence[str], sizes: Mapping[str, int] | None = None, limit: int | None = None
    ):
        limit = LIMIT if limit is None else limit
        model, weights = export(graph)
        nodes = _needed([model.graph.node[index] for index in in_order(model.graph.node)], set(tensors))
        plain = {t.name for n in graph.nodes for t in n.outputs if edit.dtype(t) == np.float32}
        chain = _Chain(nodes, dict.fromkeys(tensors), sizes or {})
        types = _types(graph) if chain.total > limit else {}
        stops = chain.stops(limit, types)
        prepack = sum(values.nbytes for _, values in weights) < _MAPPED
        self.parts = list[Part]()
        for start, stop in zip((0, *stops), stops, strict=False):
            inner, later = nodes[start:stop], chain.passed(stop)
            written = {name for node in inner for name in node.output if name}
            mine = [name for name in tensors if name in written or (not start and name not in chain.written)]
            shown = {name if name in plain else f"{name}__observed": name for name in mine}
            casts = [_cast(name, output) for output, name in shown.items() if output != name]
            passed = sorted(name for name in written & later if name not in shown)
            names = tuple(node.name for node in inner)
            session = _session(model, weights, [*inner, *casts], [*shown, *passed], types, len(stops) == 1, prepack)
            self.parts.append(Part(session, names, shown, frozenset(later)))

    def run(self, feed: Feed) -> Iterator[dict[str, np.ndarray]]:
        """The tensors by name, of one part after the other."""
        known = dict(feed)
        for part in self.parts:
            found = part.session.run(part.session.accepted(known))
            known = {name: values for name, values in (known | found).items() if name in part.later}
            yield {name: found.pop(output).astype(np.float32, copy=False) for output, name in part.shown.items()}

    def all(self, feed: Feed) -> dict[str, np.ndarray]:
        """The tensors of all parts by name."""
        return {name: values for found in self.run(feed) for name, values in found.items()}


class _Chain:
    """Nodes in order, with what of them is observed and how many bytes are alive between them."""

    def __init__(self, nodes: Sequence[onnx.NodeProto], observed: Mapping[str, None], sizes: Mapping[str, int]):
        self.nodes, self.sizes = nodes, sizes
        self.written = {name: index for index, node in enumerate(nodes) for name in node.output if name}
        self.last = {name: index for index, node in enumerate(nodes) for name in reads(node)}
        self.weights = [sum(sizes.get(n, 0) for n in set(node.output) if n in observed) for node in nodes]
        self.total = sum(self.weights)

    def passed(self, stop: int) -> set[str]:
        """What nodes from ``stop`` on read of what was there before: results of earlier nodes, inputs of the model."""
        return {name for name, last in self.last.items() if last >= stop and self.written.get(name, -1) < stop}

    def stops(self, limit: int, types: Mapping[str, onnx.TypeProto]) -> list[int]:
        """Where the parts end, one behind the last node of each."""
        if self.total <= limit:
            return [len(self.nodes)]
        alive, blocked = self._alive(types)
        filled = [0, *accumulate(self.weights)]  # bytes in front of each place
        stops, start = [], 0
        while filled[-1] - filled[start] > limit:
            places = [place for place in range(start + 1, len(self.nodes)) if not blocked[place]]
            full = filled[start] + limit
            near = [place for place in places if filled[place] <= full and filled[place] > filled[start]]
            near = [place for place in near if 2 * (filled[place] - filled[start]) >= limit] or near[-1:]
            near = near or [place for place in places if filled[place] > full][:1]
            if not near:
                break
            start = min(near, key=lambda place: (alive[place], -place))
            stops.append(start)
        return [*stops, len(self.nodes)]

    def _alive(self, types: Mapping[str, onnx.TypeProto]) -> tuple[list[int], list[int]]:
        """In front of each node: the bytes that were written and are still read, and how many cannot be passed on."""
        alive, blocked = ([0] * (len(self.nodes) + 1) for _ in range(2))
        for name in self.written.keys() & self.last.keys():
            last = self.last[name]
            kind = types.get(name, onnx.TypeProto()).tensor_type.elem_type
            for steps, size in ((alive, self.sizes.get(name, 0)), (blocked, int(kind in _NO_ARRAYS))):
                steps[self.written[name] + 1] += size
                steps[last + 1] -= size
        return list(accumulate(alive)), list(accumulate(blocked))


def _types(graph: gs.Graph) -> dict[str, onnx.TypeProto]:
    """The types of all tensors that ONNX shape inference knows, with their open sizes."""
    found = inferred(weightless(graph))
    return {value.name: value.type for value in (*found.input, *found.value_info, *found.output)}


def _needed(nodes: Sequence[onnx.NodeProto], tensors: Set[str]) -> list[onnx.NodeProto]:
    """The nodes, in order, that some tensors depend on."""
    wanted, found = set(tensors), []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            found.append(node)
            wanted.update(reads(node))
    return found[::-1]


def _cast(name: str, output: str) -> onnx.NodeProto:
    return onnx.helper.make_node("Cast", [name], [output], to=onnx.TensorProto.FLOAT, name=output)


def _session(
    model: onnx.ModelProto,
    weights: list[tuple[onnx.TensorProto, np.ndarray]],
    nodes: Sequence[onnx.NodeProto],
    outputs: Sequence[str],
    types: Mapping[str, onnx.TypeProto],
    whole: bool,
    prepack: bool,
) -> Session:
    """A session of some nodes of a model. What they read and do not write, and is no constant, are inputs.

    ``whole``: the nodes are all that the outputs need. Of several sessions each would hold on to an arena of its own.
    """
    part = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    part.graph.name = model.graph.name
    part.graph.node.extend(nodes)
    written = {name for node in nodes for name in node.output}
    outside = {name for node in nodes for name in reads(node)} - written
    part.graph.value_info.extend(value for value in model.graph.value_info if value.name in written)
    part.graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in outside)
    sparse = [tensor for tensor in model.graph.sparse_initializer if tensor.values.name in outside]
    part.graph.sparse_initializer.extend(sparse)
    own = [(proto, values) for proto, values in weights if proto.name in outside]
    constant = {tensor.name for tensor in (*part.graph.initializer, *(t.values for t in sparse), *(p for p, _ in own))}
    given = {value.name: value.type for value in model.graph.input} | (
        {} if whole else {name: kind for name, kind in types.items() if name not in constant}
    )
    for name in sorted(outside & given.keys()):
        part.graph.input.append(onnx.ValueInfoProto(name=name, type=given[name]))
    return open_model(part, own, outputs, arena=whole, prepack=prepack)
