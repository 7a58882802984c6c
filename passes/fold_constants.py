"""Constant folding: whatever depends on constants alone is computed once.

    f(c1, c2, …)  =  c        for every deterministic f

This is what materializes Weight Standardization chains (W - mean(W)) / std(W), pad and reshape arithmetic, masks, and
weights behind Cast or Transpose. The values come from ONNX Runtime, node by node as the model would have computed them.

Left as they are: random operators, QuantizeLinear and DequantizeLinear (folding them would undo a quantization), nodes
with subgraphs, nodes that write a graph output, and groups of nodes whose result would make the file more than 1 MB
larger (a tied embedding behind a Transpose, a weight that ConstantOfShape makes).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx
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
        outcome = Outcome()
        infer_shapes(graph)
        for group in _groups(graph):
            grown = _growth(group)
            if grown > GROWTH_LIMIT:
                outcome.refuse(group[-1].name, f"its value would make the file {grown / 1e6:.1f} MB larger", "size")
                continue
            _fold(graph, group, outcome)
        return outcome


def _groups(graph: gs.Graph) -> list[list[gs.Node]]:
    """The foldable nodes, grouped by the tensors that lead from one to another; each group in order."""
    owner: dict[int, int] = {}
    groups: dict[int, list[gs.Node]] = {}
    for node in graph.nodes:
        if not _is_foldable(graph, node):
            continue
        sources = [edit.producer(t) for t in node.inputs if not isinstance(t, gs.Constant) and not t.is_empty()]
        if _is_static_shape(node):
            sources = []
        if any(s is None or id(s) not in owner for s in sources):
            continue
        keys = sorted({owner[id(s)] for s in sources if s is not None}) or [id(node)]
        merged = [n for key in keys for n in groups.pop(key, [])] + [node]
        groups[keys[0]] = merged
        owner.update({id(n): keys[0] for n in merged})
    return [_in_order(graph, group) for group in groups.values()]


def _in_order(graph: gs.Graph, group: list[gs.Node]) -> list[gs.Node]:
    if len(group) < 2:
        return group
    wanted = {id(n) for n in group}
    return [n for n in graph.nodes if id(n) in wanted]


def _is_foldable(graph: gs.Graph, node: gs.Node) -> bool:
    if node.op in _KEPT or node.domain not in (None, "", "ai.onnx") or not node.outputs:
        return False
    if (
        any(isinstance(value, gs.Graph) for value in node.attrs.values())
        or vars(node).get("carried", _NOTHING).attribute
    ):
        return False
    if any(edit.is_output(graph, t) for t in node.outputs):
        return False
    return bool(node.inputs) and all(t.dtype is not None for t in node.outputs if t.outputs)


_NOTHING = onnx.NodeProto()


def _is_static_shape(node: gs.Node) -> bool:
    """Whether a node asks for a shape that is known whatever the input."""
    if node.op not in ("Shape", "Size") or isinstance(node.inputs[0], gs.Constant):
        return False
    shape = node.inputs[0].shape
    return shape is not None and all(isinstance(d, int) and d >= 0 for d in shape)


def _frontier(group: list[gs.Node]) -> list[gs.Tensor]:
    """The tensors of a group that nodes outside it read."""
    inside = {id(node) for node in group}
    return [t for node in group for t in node.outputs if any(id(reader) not in inside for reader in t.outputs)]


def _growth(group: list[gs.Node]) -> int:
    """Bytes that folding adds to the file, as far as shapes are known."""
    inside = {id(node) for node in group}
    added = sum(_nbytes(t) for t in _frontier(group))
    sources = {id(t): t for node in group for t in node.inputs if isinstance(t, gs.Constant)}
    freed = sum(_nbytes(t) for t in sources.values() if all(id(reader) in inside for reader in t.outputs))
    return added - freed


def _nbytes(tensor: gs.Tensor) -> int:
    if tensor.shape is None or any(not isinstance(d, int) for d in tensor.shape):
        return 0
    itemsize = 4 if tensor.dtype is None or isinstance(tensor.dtype, int) else np.dtype(tensor.dtype).itemsize
    return int(np.prod(tensor.shape, dtype=np.int64)) * itemsize


def _fold(graph: gs.Graph, group: list[gs.Node], outcome: Outcome) -> None:
    outputs = _frontier(group)
    names = [node.name for node in group]
    computed = {
        t.name: np.array(node.inputs[0].shape, np.int64)
        for node in group
        if _is_static_shape(node)
        for t in node.outputs
    }
    if any(node.op == "Size" or node.attrs for node in group if _is_static_shape(node)):
        return
    nodes = [node for node in group if not _is_static_shape(node)]
    if nodes:
        try:
            computed |= _compute(graph, nodes, computed, [t.name for t in outputs if t.name not in computed])
        except ModelError as error:
            outcome.refuse(names[-1], str(error), "ONNX Runtime cannot compute it")
            return
    values = {t.name: computed[t.name] for t in outputs}
    if not all(isinstance(v, np.ndarray) for v in values.values()):
        outcome.refuse(names[-1], "its value is not a tensor", "not a tensor")
        return
    edit.remove(graph, group)
    for tensor in outputs:
        tensor.to_constant(stored(graph, values[tensor.name], tensor.name))
    outcome.change(names[-1], f"{len(names)} node(s) computed" if len(names) > 1 else f"{group[0].op} computed")


def _compute(graph: gs.Graph, nodes: list[gs.Node], known: dict[str, np.ndarray], wanted: list[str]) -> dict:
    """Runs nodes that depend on constants (and on ``known`` values) alone, in ONNX Runtime."""
    if not wanted:
        return {}
    inputs = [t for node in nodes for t in node.inputs if t.name in known]
    inputs = list({t.name: t for t in inputs}.values())
    tensors = {t.name: t for node in nodes for t in node.outputs}
    part = gs.Graph(nodes, inputs, [tensors[n] for n in wanted], opset=graph.opset, import_domains=graph.import_domains)
    return session(part, optimize=False).run({t.name: known[t.name] for t in inputs})
