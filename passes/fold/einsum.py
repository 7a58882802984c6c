"""Einsum replaced by MatMul, Mul or Transpose, which all other passes understand.

    bhk->bkh                  Transpose
    bi,bj->bij                Mul(Unsqueeze(x), Unsqueeze(y))
    btd,dhk->bthk             Reshape(MatMul(x, Reshape(W, [d, h k])))          a layer with heads
    bqhk,bthk->bhqt           MatMul(Transpose(x), Transpose(y))                the scores of attention
    bthk,hkd->btd             MatMul(Reshape(x, [b, t, h k]), Reshape(W, [h k, d]))

An index of two operands is batch (in both operands and the result), summed (in both operands alone), left or right (in
one operand and the result). The first operand gets the order batch, left, summed, the second batch, summed, right.
Several summed or right indices become one axis where their sizes are known. ``fold-constants`` computes the new nodes
on weights once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, InBetween, Outcome, Refused
from channelfold.passes.channels.links import einsum_terms
from channelfold.passes.fold import RewriteEinsum
from channelfold.passes.operators import operator
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import constant, free_name, infer_shapes

_HELD = {"Reshape": "shape", "Unsqueeze": "axes"}


class Work(RewriteEinsum):
    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        outcome = Outcome()
        found = [node for node in graph.nodes if operator(node).kind == "einsum"]
        if found:
            infer_shapes(graph)
        for node in found:
            said = f"Einsum {node.attrs['equation']!r}"
            with outcome.refusing(node.name, said):
                outcome.change(node.name, f"{said}: {', '.join(_write(graph, node, _plan(node)))}")
        return outcome


Step = tuple[str, list[int]]  # Transpose, Reshape or Unsqueeze, and its perm, shape or axes


@dataclass(frozen=True)
class _Plan:
    """The nodes that replace an Einsum: the steps of each operand, ``op`` on all of them, the steps of ``result``."""

    operands: list[tuple[gs.Tensor, list[Step]]]
    op: str
    result: list[Step]


def _plan(node: gs.Node) -> _Plan:
    """The plan for an Einsum. Raises Refused where the Einsum is no Transpose, Mul or MatMul."""
    try:
        *terms, result = einsum_terms(node)
    except InBetween as error:
        raise Refused(error.what) from None
    parts = list(zip(terms, node.inputs, strict=True))
    alone = next((i for i in "".join(terms) if i not in result and "".join(terms).count(i) == 1), "")
    if alone or len(parts) > 2:
        raise Refused(f"it sums over {alone!r} of one operand" if alone else f"it has {len(parts)} operands")
    if len(parts) == 1:
        return _Plan([(node.inputs[0], _ordered(terms[0], result))], "Identity", [])
    sizes = _sizes(parts)
    if isinstance(node.inputs[0], gs.Constant):
        parts.reverse()
    (x, left_data), (y, right_data) = parts
    batch, summed = [i for i in result if i in x and i in y], [i for i in x if i not in result]
    left, right = [i for i in result if i not in y], [i for i in result if i not in x]
    if not summed:
        return _Plan([(tensor, _ordered(term, result)) for term, tensor in parts], "Mul", [])
    if not left or not right or (batch and len(left) > 1):
        raise Refused("it is no product of matrices")
    rows, outer = [0] * len(batch + left), _volume(right, sizes)
    inner = _volume(summed, sizes) if len(summed) > 1 else 0  # 0: the size stays
    before, behind = _ordered(x, batch + left + summed), _ordered(y, batch + summed + right)
    after = _ordered("".join(batch + left + right), result)
    if len(summed) > 1:
        before.append(("Reshape", [*rows, -1]))
    if len(summed) > 1 or len(right) > 1:
        if inner < 0 and outer < 0:
            raise Refused("several indices of unknown size make one axis")
        behind.append(("Reshape", [*[0] * len(batch), inner, -1 if inner >= 0 else outer]))
    if len(right) > 1:
        wide = [sizes.get(i, -1) for i in right]
        if wide.count(-1) > 1:
            raise Refused("several indices of unknown size make one axis")
        after.insert(0, ("Reshape", [*rows, *wide]))
    return _Plan([(left_data, before), (right_data, behind)], "MatMul", after)


def _ordered(term: str, order: Iterable[str]) -> list[Step]:
    """The steps that bring a tensor with the indices ``term`` into ``order``, which may hold further indices."""
    perm = [term.index(i) for i in order if i in term]
    missing = [axis for axis, i in enumerate(order) if i not in term]
    moved: list[Step] = [("Transpose", perm)] if perm != sorted(perm) else []
    return [*moved, ("Unsqueeze", missing)] if missing else moved


def _sizes(parts: list[tuple[str, gs.Tensor]]) -> dict[str, int]:
    """The known sizes of the indices. Raises Refused where two operands give one index different sizes."""
    found: dict[str, int] = {}
    for term, tensor in parts:
        for i, size in zip(term, tensor.shape or (), strict=False):
            if isinstance(size, int) and found.setdefault(i, size) != size:
                raise Refused(f"it broadcasts {i!r}")
    return found


def _volume(indices: list[str], sizes: dict[str, int]) -> int:
    """The size of one axis for several indices; -1 where the size is unknown."""
    return math.prod(sizes[i] for i in indices) if all(i in sizes for i in indices) else -1


def _write(graph: gs.Graph, node: gs.Node, plan: _Plan) -> list[str]:
    """Replaces a node by the nodes of a plan; returns their operators. The node of ``plan.op`` keeps the name."""
    output, made = node.outputs[0], []

    def add(op: str, inputs: list[gs.Tensor], values: list[int] | None = None) -> gs.Variable:
        name = f"{node.name}_{op.lower()}"
        attrs = {"perm": values} if op == "Transpose" else {}
        if op == "Unsqueeze" and graph.opset < 13:
            attrs = {"axes": values}
        if values is not None and not attrs:
            inputs = [*inputs, constant(graph, f"{name}_{_HELD[op]}", np.array(values, np.int64))]
        result = gs.Variable(free_name(graph, name), output.dtype)
        made.append(gs.Node(op, result.name, attrs, inputs, [result]))
        edit.insert(graph, made[-1], before=node)
        return result

    operands = []
    for tensor, steps in plan.operands:
        for op, values in steps:
            tensor = add(op, [tensor], values)
        operands.append(tensor)
    last: gs.Tensor = operands[0]
    if plan.op != "Identity" or not made:
        last = add(plan.op, operands)
    for op, values in plan.result:
        last = add(op, [last], values)
    edit.detach(node)
    edit.set_output(made[-1], 0, output)
    edit.sweep(graph)
    next((new for new in made if new.op == plan.op), made[0]).name = node.name
    return [new.op for new in made]
