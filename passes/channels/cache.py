"""The cache of a decoder, as the model's own: past and present are one tensor that only the model writes and reads.

    past -> f^-1 -> x = Concat(x_past, new) -> f -> present         f: a scale by channel, or zeros for heads that go

An edit of x keeps the interface, because f and its inverse stand at the input and at the output. By induction the model
computes the same without both where every past is a present of the model, or empty: the pass ``own-cache`` drops them.
Scales are powers of two, so that dropping them changes no bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.runtime.io import edit
from channelfold.runtime.io.files import constant, free_name
from channelfold.runtime.io.meanings import cache_pairs, keeps_interface

_HINT = "--own-cache takes the cache as the model's own"


@dataclass(frozen=True)
class Caches:
    """The pasts and presents of a graph, by id; ``own``: whether the model is the only one to write and read them.

    ``inside`` holds these tensors, and what lies behind the nodes that keep their interface already.
    """

    tensors: Mapping[int, gs.Tensor] = field(default_factory=dict)
    inside: Mapping[int, gs.Tensor] = field(default_factory=dict)
    own: bool = False

    @classmethod
    def of(cls, graph: gs.Graph, own: bool) -> Caches:
        known = {tensor.name: tensor for tensor in (*graph.inputs, *graph.outputs)}
        names = [name for pair in cache_pairs(graph).items() for name in pair]
        tensors = [known[name] for name in names if edit.is_float(known[name])]
        inside = [inner for tensor in tensors for inner in _inward(graph, tensor)]
        return cls({id(tensor): tensor for tensor in tensors}, {id(tensor): tensor for tensor in inside}, own)

    def owns(self, tensor: gs.Tensor) -> bool:
        return self.own and id(tensor) in self.tensors

    def owns_inside(self, tensor: gs.Tensor) -> bool:
        return self.own and id(tensor) in self.inside

    def why(self, reason: str, *tensors: gs.Tensor) -> str:
        """A reason, with the switch that lifts the reason where one of the tensors is a cache."""
        known = any(id(tensor) in self.inside for tensor in tensors)
        return f"{reason} ({_HINT})" if known and not self.own else reason


NO_CACHES = Caches()


def _inward(graph: gs.Graph, tensor: gs.Tensor) -> Iterator[gs.Tensor]:
    """A past or a present, and the tensors behind the nodes that keep its interface."""
    feeds = any(tensor is one for one in graph.inputs)
    yield tensor
    while True:
        readers = edit.consumers(tensor) if feeds else []
        node = edit.producer(tensor) if not feeds else readers[0] if len(readers) == 1 else None
        if node is None or not keeps_interface(node) or (feeds and node.inputs[0] is not tensor):
            return
        tensor = node.outputs[0] if feeds else node.inputs[0]
        yield tensor


def at_input(graph: gs.Graph, tensor: gs.Tensor, op: str, values: np.ndarray, attrs: dict[str, Any]) -> gs.Variable:
    """Puts a node between an input of the graph and its readers; returns what these read now."""
    inner = gs.Variable(free_name(graph, f"{tensor.name}_own"), tensor.dtype, tensor.shape)
    edit.redirect(tensor, inner)
    name = free_name(graph, f"{tensor.name}_{op}")
    edit.insert(graph, gs.Node(op, name, attrs, [tensor, constant(graph, f"{name}_by", values)], [inner]))
    return inner


def at_output(graph: gs.Graph, tensor: gs.Tensor, *steps: tuple[str, np.ndarray, dict[str, Any]]) -> gs.Variable:
    """Puts nodes (operator, constant, attributes) in front of an output of the graph; returns what they start from."""
    node = edit.producer(tensor)
    assert node is not None
    inner = gs.Variable(free_name(graph, f"{tensor.name}_own"), tensor.dtype, tensor.shape)
    edit.redirect(tensor, inner)
    edit.set_output(node, next(k for k, result in enumerate(node.outputs) if result is tensor), inner)
    source: gs.Tensor = inner
    for number, (op, values, attrs) in enumerate(steps, 1):
        name = free_name(graph, f"{tensor.name}_{op}")
        last = number == len(steps)
        result = tensor if last else gs.Variable(free_name(graph, f"{name}_result"), tensor.dtype)
        step = gs.Node(op, name, attrs, [source, constant(graph, f"{name}_by", values)], [result])
        edit.insert_after(graph, node, step)
        node, source = step, result
    return inner


def select(graph: gs.Graph, tensor: gs.Tensor, axis: int, stays: np.ndarray) -> None:
    """Lets the graph work on the positions along an axis of a cache that stay; the others are zeros in the present."""
    kept, size = np.flatnonzero(stays), int(stays.sum())
    rank = edit.rank(tensor) or 4
    if any(tensor is one for one in graph.inputs):
        inner = at_input(graph, tensor, "Gather", kept, {"axis": axis})
    else:
        places = np.where(stays, np.cumsum(stays) - 1, size)
        pads = np.zeros(2 * rank, np.int64)
        pads[rank + axis] = 1
        inner = at_output(graph, tensor, ("Pad", pads, {}), ("Gather", places, {"axis": axis}))
    if tensor.shape is not None:
        inner.shape = [*tensor.shape[:axis], size, *tensor.shape[axis + 1 :]]
