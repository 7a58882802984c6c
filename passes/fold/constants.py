"""Nodes that depend on constants alone replaced by their values.

    f(c1, c2, …)  =  c        for every deterministic f

The pass computes Weight Standardization (W - mean(W)) / std(W), the arithmetic of pads and shapes, masks, and weights
behind Cast or Transpose. ONNX Runtime runs the nodes of the model without fusing them. The shape of a tensor counts as
a constant where the shape is the same for every input.

The pass leaves alone: random operators, QuantizeLinear, DequantizeLinear and what expands a weight that is stored in 8
bits (folding them would undo a quantization), nodes with subgraphs, nodes that write a graph output, and connected
nodes whose result would make the file more than 1 MB larger (a tied embedding behind a Transpose, a weight that
ConstantOfShape makes).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Outcome
from channelfold.passes.fold import FoldConstants
from channelfold.passes.layers.expansion import codes_behind
from channelfold.passes.layers.linear import GROWTH_LIMIT
from channelfold.passes.operators import operator
from channelfold.runtime.errors import ModelError
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import infer_shapes, session, stored

_BATCH = 1 << 26  # bytes of values that are computed in one session


class Work(FoldConstants):
    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        infer_shapes(graph)
        outcome = Outcome()
        small = [group for group in map(_Group.of, _groups(graph)) if not _is_too_large(group, group.nbytes, outcome)]
        try:
            for batch in _batches(small):
                for group, values in _computed(graph, batch):
                    _replace(graph, group, values, outcome)
        finally:
            edit.sweep(graph)
        return outcome


@dataclass(frozen=True)
class _Group:
    """Connected nodes that are folded together.

    ``results`` are their outputs that other nodes read, and ``freed`` the bytes of the constants that only they read.
    """

    nodes: list[gs.Node]
    results: list[gs.Tensor]
    freed: int

    @classmethod
    def of(cls, nodes: list[gs.Node]) -> _Group:
        inside = {id(node) for node in nodes}
        results = [t for node in nodes for t in node.outputs if any(id(reader) not in inside for reader in t.outputs)]
        sources = {id(t): t for node in nodes for t in node.inputs if isinstance(t, gs.Constant)}
        freed = [_nbytes(t) for t in sources.values() if all(id(reader) in inside for reader in t.outputs)]
        return cls(nodes, results, sum(freed))

    @property
    def name(self) -> str:
        return self.nodes[-1].name

    @property
    def nbytes(self) -> int:
        """Bytes of the results with known shapes."""
        return sum(map(_nbytes, self.results))

    def __str__(self) -> str:
        last = self.nodes[-1].op
        return last if len(self.nodes) == 1 else f"{len(self.nodes)} nodes up to {last}"


def _groups(graph: gs.Graph) -> list[list[gs.Node]]:
    """The nodes that depend on constants alone, as connected groups in the order of the graph."""
    foldable: dict[int, gs.Node] = {}
    for node in graph.nodes:
        if _is_foldable(graph, node) and all(id(source) in foldable for source in _sources(node)):
            foldable[id(node)] = node
    position = {key: place for place, key in enumerate(foldable)}
    groups = []
    while foldable:
        group, pending = [], [foldable.popitem()[1]]
        while pending:
            node = pending.pop()
            group.append(node)
            for other in [*_sources(node), *(reader for t in node.outputs for reader in t.outputs)]:
                if foldable.pop(id(other), None) is not None:
                    pending.append(other)
        groups.append(sorted(group, key=lambda node: position[id(node)]))
    return sorted(groups, key=lambda group: position[id(group[0])])


def _sources(node: gs.Node) -> list[gs.Node | None]:
    """The nodes that the result of a node depends on; None for an input of the graph."""
    if _known_shape(node) is not None:
        return []
    return [edit.producer(t) for t in node.inputs if not isinstance(t, gs.Constant) and not t.is_empty()]


def _is_foldable(graph: gs.Graph, node: gs.Node) -> bool:
    known = operator(node)
    if known.random or known.kind in ("dynamic_quantize", "quantize") or not edit.is_standard(node) or not node.inputs:
        return False
    if any(isinstance(value, gs.Graph) for value in node.attrs.values()):
        return False
    return not any(edit.is_output(graph, t) for t in node.outputs) and codes_behind(node) is None


def _known_shape(node: gs.Node) -> np.ndarray | None:
    """The result of a Shape or Size node; None where the result depends on the input, and for other nodes."""
    if not operator(node).asks_shape or node.inputs[0].shape is None:
        return None
    shape = node.inputs[0].shape
    if not all(isinstance(d, int) and d >= 0 for d in shape):
        return None
    if node.op == "Size":
        return np.array(math.prod(shape), np.int64)
    return np.array(shape[node.attrs.get("start", 0) : node.attrs.get("end")], np.int64)


def _nbytes(tensor: gs.Tensor) -> int:
    """Bytes of the values of a tensor; 0 where its shape is unknown."""
    if tensor.shape is None or not all(isinstance(d, int) for d in tensor.shape):
        return 0
    kind = edit.dtype(tensor)
    return math.prod(tensor.shape) * (kind.itemsize if kind is not None else 4)


def _is_too_large(group: _Group, nbytes: int, outcome: Outcome) -> bool:
    """Refuses a group whose results, ``nbytes`` in sum, would make the file much larger; returns whether it did."""
    grown = nbytes - group.freed
    if grown > GROWTH_LIMIT:
        outcome.refuse(group.name, f"{group}: its value would make the file {grown / 1e6:.1f} MB larger", "size")
    return grown > GROWTH_LIMIT


def _batches(groups: list[_Group]) -> Iterator[list[_Group]]:
    """Lists of groups, each computed in one session."""
    while groups:
        total = itertools.accumulate(group.nbytes for group in groups)
        count = next((n for n, size in enumerate(total, 1) if size > _BATCH), len(groups))
        yield groups[:count]
        groups = groups[count:]


def _computed(graph: gs.Graph, groups: list[_Group]) -> Iterator[tuple[_Group, list[np.ndarray] | ModelError]]:
    """Every group with the values of its results, or with an error of ONNX Runtime."""
    try:
        values = iter(_compute(graph, [n for g in groups for n in g.nodes], [t for g in groups for t in g.results]))
    except ModelError as error:
        if len(groups) == 1:
            yield groups[0], error
            return
        middle = len(groups) // 2  # finds the group that fails by halves, because a session costs more than most nodes
        yield from _computed(graph, groups[:middle])
        yield from _computed(graph, groups[middle:])
    else:
        for group in groups:
            yield group, [next(values) for _ in group.results]


def _compute(graph: gs.Graph, nodes: list[gs.Node], wanted: list[gs.Tensor]) -> list[np.ndarray]:
    """The values of ``wanted``, which ``nodes`` compute from constants. Raises ModelError."""
    known = {node.outputs[0].name: shape for node in nodes if (shape := _known_shape(node)) is not None}
    nodes = [node for node in nodes if node.outputs[0].name not in known]
    outputs = [t for t in wanted if t.name not in known]
    if outputs:
        inputs = list({t.name: t for node in nodes for t in node.inputs if t.name in known}.values())
        part = gs.Graph(nodes, inputs, outputs, opset=graph.opset, import_domains=graph.import_domains)
        known |= session(part, optimize=False).run({t.name: known[t.name] for t in inputs})
    return [known[t.name] for t in wanted]


def _replace(graph: gs.Graph, group: _Group, values: list[np.ndarray] | ModelError, outcome: Outcome) -> None:
    """Replaces a group by constants, or refuses the group."""
    if isinstance(values, ModelError):
        outcome.refuse(group.name, f"{group}: {values}", "ONNX Runtime cannot compute it")
        return
    if not all(isinstance(value, np.ndarray) for value in values):
        outcome.refuse(group.name, f"{group}: its value is not a tensor", "not a tensor")
        return
    if _is_too_large(group, sum(value.nbytes for value in values), outcome):
        return
    constants: list[Any] = [stored(graph, value, t.name) for value, t in zip(values, group.results, strict=True)]
    for node in group.nodes:
        edit.detach(node)
    for tensor, value in zip(group.results, constants, strict=True):
        borrowed = isinstance(value, np.ndarray) and not value.flags.owndata  # and could never be made writeable again
        tensor.to_constant(value.copy() if borrowed else value)
    outcome.change(group.name, f"{group} computed")
