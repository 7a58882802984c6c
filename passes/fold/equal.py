"""Equal subexpressions computed once.

    f(x) ... f(x)        becomes        y = f(x)  ... y

Two nodes are equal where operator, attributes and inputs are the same. Small constants are compared by value, so that
two copies of an index or an epsilon count as one input.

Left as they are: random operators; QuantizeLinear and DequantizeLinear, of which each reader may need its own;
operators that ONNX does not define; nodes with subgraphs; nodes whose results both have names that callers use.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Outcome
from channelfold.passes.fold import MergeEqual
from channelfold.passes.operators import operator
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import is_known

_SMALL = 4096  # bytes of the largest constant that is compared by value


class Work(MergeEqual):
    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        outcome, first = Outcome(), {}
        for node in graph.nodes:
            key = _key(node)
            earlier = first.setdefault(key, node) if key is not None else node
            if earlier is node:
                continue
            if _replace(graph, earlier, node):
                outcome.change(node.name, f"{node.op} computes what {earlier.name} does")
            else:
                reason = f"{node.op} computes what {earlier.name} does, and both results are outputs of the graph"
                outcome.refuse(node.name, reason, "names at both ends")
        edit.sweep(graph)
        return outcome


def _key(node: gs.Node) -> Hashable | None:
    """What a node computes, equal for equal nodes; None for a node that stays."""
    known = operator(node)
    if not edit.is_standard(node) or not is_known(node.domain, node.op) or not node.outputs:
        return None
    if known.random or known.kind in ("quantize", "dynamic_quantize"):
        return None
    attributes = tuple((name, _frozen(value)) for name, value in sorted(node.attrs.items()))
    carried = tuple(a.SerializeToString() for a in node.carried.attribute) if "carried" in vars(node) else ()
    if any(value is None for _, value in attributes):
        return None
    return node.op, attributes, carried, tuple(map(_source, node.inputs)), tuple(t.is_empty() for t in node.outputs)


def _frozen(value: Any) -> Hashable | None:
    """An attribute as a key, None for one that is not compared."""
    if isinstance(value, gs.Constant):
        return _contents(value)
    if isinstance(value, list | tuple | np.ndarray):
        return tuple(np.asarray(value).dtype.str + repr(item) for item in value)
    return (type(value).__name__, value) if isinstance(value, int | float | str | bytes) else None


def _source(tensor: gs.Tensor) -> Hashable:
    contents = _contents(tensor) if isinstance(tensor, gs.Constant) else None
    return ("nothing",) if tensor.is_empty() else contents or id(tensor)


def _contents(tensor: gs.Constant) -> Hashable | None:
    kind, count = edit.dtype(tensor), int(np.prod(tensor.shape))
    if kind is None or kind.hasobject or count * kind.itemsize > _SMALL:
        return None
    return kind.name, tuple(tensor.shape), np.asarray(edit.value(tensor)).tobytes()


def _replace(graph: gs.Graph, earlier: gs.Node, node: gs.Node) -> bool:
    """Lets the readers of a node read an equal one before. False where outputs of the graph would lose their names."""
    pairs = [(a, b) for a, b in zip(earlier.outputs, node.outputs, strict=True) if not a.is_empty()]
    if any(edit.is_output(graph, a) and edit.is_output(graph, b) for a, b in pairs):
        return False
    edit.detach(node)
    for place, (a, b) in enumerate(pairs):
        if edit.is_output(graph, b):
            edit.replace_uses(graph, a, b)
            edit.set_output(earlier, place, b)
        else:
            edit.replace_uses(graph, b, a)
    return True
