"""Norms that are spelt out in single operators: what belongs to the statistics of one, up to the division by them.

    y = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + e)

A difference of large numbers, the square of a large number or the root of a small one loses what the norm is about, so
a norm stays float32 as a whole or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_graphsurgeon as gs

from channelfold.passes.operators import operator
from channelfold.runtime.io import edit


def norms(nodes: Sequence[gs.Node]) -> Iterator[list[gs.Node]]:
    """The nodes of every norm: statistics, what they are subtracted from, and what they divide."""
    for node in nodes:
        if node.op == "Sqrt" or (node.op == "Pow" and abs(edit.scalar(node.inputs[1]) or 0) == 0.5):
            found = _Norm(node)
            if found.sums:
                yield found.nodes()


class _Norm:
    """A norm by the root of its variance. ``small`` are the nodes whose results have the size of a statistic."""

    def __init__(self, root: gs.Node):
        self.small: dict[int, gs.Node] = {}
        self.large: dict[int, gs.Node] = {}
        self.sums = False
        self._back(root)

    def nodes(self) -> list[gs.Node]:
        """The statistics, then their readers up to those that have another operand."""
        pending = list(self.small.values())
        while pending:
            for reader in (r for t in pending.pop().outputs for r in edit.consumers(t)):
                if id(reader) in self.small or id(reader) in self.large or not _passes(reader):
                    continue
                whole = all(id(source) in self.small for source in map(edit.producer, _variables(reader)) if source)
                known = whole and all(edit.producer(t) is not None for t in _variables(reader))
                (self.small if known else self.large)[id(reader)] = reader
                pending += [reader] if known else []
        return [*self.small.values(), *self.large.values()]

    def _back(self, root: gs.Node) -> None:
        """Takes in what leads to the root: sums, and what is computed from them."""
        pending: list[gs.Node | None] = [root]
        while pending:
            node = pending.pop()
            if node is None or id(node) in self.small or not _passes(node):
                continue
            self.small[id(node)] = node
            if operator(node).kind == "reduce":
                self.sums = True
                pending.append(self._mean_before(edit.producer(node.inputs[0])))
            else:
                pending += map(edit.producer, _variables(node))

    def _mean_before(self, node: gs.Node | None) -> gs.Node | None:
        """Takes in the square in front of a sum, and the difference that is squared; the mean that was subtracted."""
        if node is None or not squares(node):
            return None
        self.large[id(node)] = node
        before = edit.producer(node.inputs[0])
        if before is None or before.op != "Sub":
            return None
        self.large[id(before)] = before
        return edit.producer(before.inputs[1])


def squares(node: gs.Node) -> bool:
    """Whether a node multiplies a tensor with itself, or takes a power that may be large."""
    if node.op == "Mul":
        return node.inputs[0] is node.inputs[1]
    power = edit.scalar(node.inputs[1]) if node.op == "Pow" else None
    return node.op == "Pow" and (power is None or abs(power) > 1)


def _passes(node: gs.Node) -> bool:
    row = operator(node)
    return edit.is_standard(node) and (row.elementwise or row.moves or row.kind in ("reduce", "reshape"))


def _variables(node: gs.Node) -> list[gs.Variable]:
    """The computed inputs of a node that hold data: all but shapes and indices."""
    return [node.inputs[i] for i in operator(node).inputs(node) if isinstance(node.inputs[i], gs.Variable)]
