"""Constant folding: whatever depends on constants alone is computed once.

    f(c1, c2, …)  =  c        for every deterministic f

This is what materializes Weight Standardization chains (W - mean(W)) / std(W), pad and reshape arithmetic, masks, and
weights behind Cast or Transpose. The values come from ONNX Runtime, node by node as the model would have computed them.
The shape of a tensor that is known whatever the input counts as a constant.

Left as they are: random operators, QuantizeLinear and DequantizeLinear (folding them would undo a quantization), nodes
with subgraphs, nodes that write a graph output, and connected nodes whose result would make the file more than 1 MB
larger (a tied embedding behind a Transpose, a weight that ConstantOfShape makes).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes import edit
from channelfold.passes.base import Context, ModelError, Outcome, Pass
from channelfold.runtime.graph_io import infer_shapes, session, stored

GROWTH_LIMIT = 1 << 20  # bytes

_KEPT = {
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "RandomNormal", "RandomNormalLike", "RandomUniform",
    "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout",
}  # fmt: skip


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Computes everything that depends on constants alone, once."""

    name: ClassVar[str] = "fold-constants"
    kind: ClassVar[Literal["exact", "calibrated", "lossy"]] = "exact"

    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        infer_shapes(graph)
        outcome = Outcome()
        try:
            for group in _groups(graph):
                _fold(graph, group, outcome)
        finally:
            edit.sweep(graph)
        return outcome


def _groups(graph: gs.Graph) -> list[list[gs.Node]]:
    """The nodes that depend on constants alone, those that are connected together, each group in order."""
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
    """The nodes (None for an input of the graph) that a node's result depends on."""
    if _known_shape(node) is not None:
        return []
    return [edit.producer(t) for t in node.inputs if not isinstance(t, gs.Constant) and not t.is_empty()]


def _is_foldable(graph: gs.Graph, node: gs.Node) -> bool:
    if node.op in _KEPT or not edit.is_standard(node) or not node.inputs:
        return False
    if any(isinstance(value, gs.Graph) for value in node.attrs.values()):
        return False
    return not any(edit.is_output(graph, t) for t in node.outputs)


def _known_shape(node: gs.Node) -> np.ndarray | None:
    """What a Shape or Size node returns, where that is known whatever the input."""
    if node.op not in ("Shape", "Size") or node.inputs[0].shape is None:
        return None
    shape = node.inputs[0].shape
    if not all(isinstance(d, int) and d >= 0 for d in shape):
        return None
    if node.op == "Size":
        return np.array(math.prod(shape), np.int64)
    return np.array(shape[node.attrs.get("start", 0) : node.attrs.get("end")], np.int64)


def _fold(graph: gs.Graph, group: list[gs.Node], outcome: Outcome) -> None:
    """Computes a group and puts constants in its place, or refuses it."""
    inside = {id(node) for node in group}
    results = [t for node in group for t in node.outputs if any(id(reader) not in inside for reader in t.outputs)]
    sources = {id(t): t for node in group for t in node.inputs if isinstance(t, gs.Constant)}
    freed = sum(_nbytes(t) for t in sources.values() if all(id(reader) in inside for reader in t.outputs))
    name = group[-1].name
    if (grown := sum(map(_nbytes, results)) - freed) > GROWTH_LIMIT:
        outcome.refuse(name, f"{_ops(group)}: its value would make the file {grown / 1e6:.1f} MB larger", "size")
        return
    try:
        values = _compute(graph, group, results)
    except ModelError as error:
        outcome.refuse(name, f"{_ops(group)}: {error}", "ONNX Runtime cannot compute it")
        return
    if not all(isinstance(value, np.ndarray) for value in values):
        outcome.refuse(name, f"{_ops(group)}: its value is not a tensor", "not a tensor")
        return
    constants = [stored(graph, value, t.name) for value, t in zip(values, results, strict=True)]
    for node in group:
        edit.detach(node)
    for tensor, value in zip(results, constants, strict=True):
        tensor.to_constant(value)
    outcome.change(name, f"{_ops(group)} computed")


def _ops(group: list[gs.Node]) -> str:
    return group[0].op if len(group) == 1 else f"{len(group)} nodes up to {group[-1].op}"


def _nbytes(tensor: gs.Tensor) -> int:
    """Bytes of a tensor's values, 0 where its shape is not known."""
    if tensor.shape is None or not all(isinstance(d, int) for d in tensor.shape):
        return 0
    kind = edit.dtype(tensor)
    return math.prod(tensor.shape) * (kind.itemsize if kind is not None else 4)


def _compute(graph: gs.Graph, group: list[gs.Node], wanted: list[gs.Tensor]) -> list[np.ndarray]:
    """The values of tensors that a group of nodes makes out of constants. Raises ModelError."""
    known = {node.outputs[0].name: shape for node in group if (shape := _known_shape(node)) is not None}
    nodes = [node for node in group if node.outputs[0].name not in known]
    names = [t.name for t in wanted if t.name not in known]
    if names:
        inputs = list({t.name: t for node in nodes for t in node.inputs if t.name in known}.values())
        outputs = [t for t in wanted if t.name in names]
        part = gs.Graph(nodes, inputs, outputs, opset=graph.opset, import_domains=graph.import_domains)
        known |= session(part, optimize=False).run({t.name: known[t.name] for t in inputs})
    return [known[t.name] for t in wanted]
