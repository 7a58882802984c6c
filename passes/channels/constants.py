"""Channels that hold one value for every input of the model, and that value, from the weights alone.

    a zero row             W[j] = 0                       b_j
    a row of constants     W[j, i] = 0 where x_i varies   b_j + sum_i W[j, i] c_i
    a scale of zero        gamma_j = 0                    beta_j      (Mul, BatchNormalization, InstanceNormalization)
    elementwise            all operands constant          f(c), the node run on one value a channel
    what moves or pools    all sources the same           c

Zero padding mixes zeros with c, so that only c = 0 stays constant. All inputs are assumed finite: 0 * x is 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Refused
from channelfold.passes.channels.links import LinkTable
from channelfold.passes.channels.ports import Link, Links, Member, joins
from channelfold.passes.layers.affine import counts_padding, padded_value
from channelfold.passes.layers.linear import blocks, view
from channelfold.passes.operators import operator
from channelfold.runtime.errors import ModelError
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import export, session


@dataclass(frozen=True)
class ConstantPositions:
    """The positions along one axis that hold one value for every input.

    ``where`` (n,) bool marks these positions, and ``values`` (n,) holds their values. The values of all other positions
    are finite and mean nothing.
    """

    where: np.ndarray
    values: np.ndarray

    def zero(self) -> np.ndarray:
        """Which positions are known to hold zero, (n,) bool."""
        return self.where & (self.values == 0)


class ConstantChannels:
    """The constant channels of a graph; ``table`` holds the links of the graph."""

    def __init__(self, graph: gs.Graph, table: LinkTable):
        self._graph, self._table = graph, table
        self._found: dict[int, dict[int, ConstantPositions]] = {}
        for node in graph.nodes:
            try:
                self._visit(node)
            except Refused:
                continue

    def along(self, tensor: gs.Tensor, axis: int) -> ConstantPositions:
        """The constant positions along an axis of a tensor. Raises Refused where the shape is unknown."""
        shape = self._table.known_shape(tensor)
        axis %= len(shape)
        values = edit.value(tensor)
        if values is None:
            return self._found.get(id(tensor), {}).get(axis) or _unknown(shape[axis], edit.dtype(tensor))
        rows = np.moveaxis(values, axis, 0).reshape(shape[axis], -1)
        return ConstantPositions((rows == rows[:, :1]).all(axis=1), rows[:, 0])

    def met_by_zeros(self, node: gs.Node, port: int, axis: int) -> np.ndarray:
        """Which positions along a summed axis of an input are multiplied by zeros alone, (n,) bool."""
        shape = self._table.known_shape(node.inputs[port])
        axis, met = axis % len(shape), np.zeros(shape[axis], bool)
        for link in self._table.of(node).summed:
            if any((m.port, m.axis) == (port, axis) and m.at is None for m in link):
                for other in (m for m in link if m.port >= 0 and m.port != port):
                    met |= _taken(self.along(node.inputs[other.port], other.axis), other.at).zero()
        return met

    def _visit(self, node: gs.Node) -> None:
        """Notes the constant channels of the outputs of a node. Raises Refused where the links are unknown."""
        known = operator(node)
        if known.weighted:
            self._linear(node)
            return
        sources = [t for t in node.inputs if id(t) in self._found]
        table = known.kind == "gather" and isinstance(node.inputs[0], gs.Constant)
        if not (sources or table or _deciding(node)) or not edit.is_float(node.outputs[0]):
            return
        links = self._table.of(node)
        if known.moves or (known.kind not in ("attention", "elementwise") and (known.scale or known.sums)):
            for port in range(len(node.outputs)):
                self._move(node, links, port)
        elif known.gamma and _deciding(node):
            self._compute(node, links, [1])
        elif known.elementwise:
            self._compute(node, links, range(len(self._table.shape(node.outputs[0]) or ())))

    def _note(self, tensor: gs.Tensor, axis: int, known: ConstantPositions) -> None:
        where = known.where & np.isfinite(known.values.astype(np.float64))
        if where.any():
            values = np.where(where, known.values, np.ones((), known.values.dtype))
            self._found.setdefault(id(tensor), {})[axis] = ConstantPositions(where, values)

    # ---- weights -----------------------------------------------------------------------------------------------------

    def _linear(self, node: gs.Node) -> None:
        linear, rank = view(self._graph, node), len(self._table.known_shape(node.outputs[0]))
        given, weight = self.along(linear.data, linear.in_axis), linear.weight()
        used = (weight != 0).reshape(*weight.shape[:2], -1).any(axis=-1)
        varies = ~(given.zero() if linear.padded else given.where)
        where = np.concatenate([~used[rows][:, varies[columns]].any(axis=1) for rows, columns in blocks(linear)])
        if not where.any():
            return
        bias = None if node.op == "MatMul" else linear.bias()  # the bias of a MatMul is a node of its own
        values = linear.respond(weight, np.where(varies, 0.0, given.values.astype(np.float64)))
        with np.errstate(over="ignore"):
            values = (values if bias is None else values + bias).astype(linear.dtype)
        self._note(node.outputs[0], linear.out_axis % rank, ConstantPositions(where, values))

    # ---- what only moves values --------------------------------------------------------------------------------------

    def _move(self, node: gs.Node, links: Links, port: int) -> None:
        """An output channel is constant where all of its sources hold the same constant."""
        only = _surviving(node)
        shape = self._table.shape(node.outputs[port])
        for axis in range(len(shape or ())):
            found = self._moved(node, links, Member(-1 - port, axis))
            if found is not None:
                where = found.where if only is None else found.where & (found.values == only)
                self._note(node.outputs[port], axis, ConstantPositions(where, found.values))

    def _moved(self, node: gs.Node, links: Links, out: Member) -> ConstantPositions | None:
        result = node.outputs[-1 - out.port]
        known = _unknown(self._table.known_shape(result)[out.axis], edit.dtype(result))
        where, values = known.where, known.values
        data = operator(node).inputs(node)
        for link in (*links.links, *(link for choice in links.choices for link in choice)):
            sources = [m for m in link if m.port in data]
            for member in link:
                if not sources or (member.port, member.axis) != (out.port, out.axis):
                    continue
                given = _all_same([_taken(self.along(node.inputs[m.port], m.axis), m.at) for m in sources])
                at = np.arange(len(where)) if member.at is None else member.at
                varies = np.bincount(at, ~given.where, minlength=len(where)) > 0
                reached = np.bincount(at, minlength=len(where)) > 0
                chosen = np.array(values)
                chosen[at] = given.values
                varies |= np.bincount(at, chosen[at] != given.values, minlength=len(where)) > 0
                new = reached & ~varies & ~where
                where, values = where | new, np.where(new, chosen, values)
        return ConstantPositions(where, values) if where.any() else None

    # ---- what is computed channel by channel -------------------------------------------------------------------------

    def _compute(self, node: gs.Node, links: Links, axes: Sequence[int] | range) -> None:
        """Runs a node on one value a channel."""
        shape = self._table.known_shape(node.outputs[0])
        for axis in (axis for axis in axes if shape[axis] > 1):
            link = next((link for link in links.links if joins(link, -1, axis)), ())
            operands = dict(self._operands(node, link))
            where = np.logical_and.reduce([np.broadcast_to(o.where, shape[axis]) for o in operands.values()])
            for port in _deciding(node):
                where = where | operands[port].zero()
            if where.any():
                members = {m.port: m.axis for m in link}
                feed = {k: self._spread(node.inputs[k], o.values, members.get(k)) for k, o in operands.items()}
                values = self._run(node, feed)
                if values is not None and values.size == shape[axis]:
                    self._note(node.outputs[0], axis, ConstantPositions(where, values.reshape(-1)))

    def _operands(self, node: gs.Node, link: Link) -> Iterator[tuple[int, ConstantPositions]]:
        """The constant positions of every input along the axis of a link; an input without the axis is one position."""
        axes = {m.port: m.axis for m in link}
        for port, tensor in enumerate(node.inputs):
            if tensor.is_empty():
                continue
            if port in axes:
                yield port, self.along(tensor, axes[port])
            else:
                values = edit.value(tensor)
                one = values is not None and values.size > 0 and bool((values == values.flat[0]).all())
                filler = np.ones(1, edit.dtype(tensor) or np.float32)
                yield (
                    port,
                    ConstantPositions(
                        np.array([one]), values.reshape(-1)[:1] if one and values is not None else filler
                    ),
                )

    def _spread(self, tensor: gs.Tensor, values: np.ndarray, axis: int | None) -> np.ndarray:
        """Values along one axis of an array that has the rank of ``tensor``."""
        rank = len(self._table.known_shape(tensor))
        return values.reshape([-1 if a == axis else 1 for a in range(rank)])

    def _run(self, node: gs.Node, feed: dict[int, np.ndarray]) -> np.ndarray | None:
        """The first output of a node for the inputs in ``feed``, None where nothing can run the node."""
        kind = node.outputs[0].dtype or next(iter(feed.values())).dtype
        part, named = edit.alone(self._graph, node, feed, [kind])
        try:
            return np.asarray(session(part, optimize=False).run(named)["o0"])
        except ModelError:  # ONNX Runtime has no kernel for this type
            return _evaluated(part, named)


def _evaluated(part: gs.Graph, feed: dict[str, np.ndarray]) -> np.ndarray | None:
    from onnx.reference import ReferenceEvaluator

    model, _ = export(part)
    try:
        found: Any = ReferenceEvaluator(model).run(None, feed)
    except Exception:  # the evaluator raises errors of many types for operators that it lacks
        return None
    return np.asarray(found[0])


def _unknown(size: int, kind: np.dtype | None) -> ConstantPositions:
    return ConstantPositions(np.zeros(size, bool), np.ones(size, kind or np.float32))


def _taken(known: ConstantPositions, at: np.ndarray | None) -> ConstantPositions:
    return known if at is None else ConstantPositions(known.where[at], known.values[at])


def _all_same(sources: Sequence[ConstantPositions]) -> ConstantPositions:
    first, *others = sources
    where = first.where
    for other in others:
        where = where & other.where & (other.values == first.values)
    return ConstantPositions(where, first.values)


def _deciding(node: gs.Node) -> tuple[int, ...]:
    """The inputs of a node whose zeros make the result zero, or a bias, for all values of the other inputs."""
    known = operator(node)
    if known.kind in ("batch_norm", "instance_norm"):
        return (known.gamma,)
    return known.inputs(node) if node.op == "Mul" and known.elementwise else ()


def _surviving(node: gs.Node) -> float | None:
    """The only value that a node passes unchanged; None where every value passes, NaN where no value passes."""
    known = operator(node)
    if known.random:
        return np.nan if edit.has_input(node, 2) else None
    if node.op == "AveragePool":
        return 0.0 if counts_padding(node) else None
    if known.kind == "pad":
        return padded_value(node) if node.attrs.get("mode", "constant") == "constant" else None
    return None if known.shift else 0.0
