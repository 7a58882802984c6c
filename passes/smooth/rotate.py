"""The channels of the residual stream turned by an orthogonal matrix, which spreads outliers over all channels.

    x' = Q^T x        W' = Q^T W  for every W that writes x,       W' = W Q  for every W that reads x
    n(Q^T x) = Q^T n(x),   n(x) = x / sqrt(mean(x^2) + e)          V g n(x) = (V diag(g) Q) n(x')

The gain g of a norm goes into the weights behind the norm first, and the norm keeps ones. Q is a Hadamard matrix with
random signs (``numeric.hadamard``), so one large channel becomes many of its size over sqrt(n).

Heads are turned within themselves too: see ``rotate_heads``.

The stream is followed from every embedding and linear in both directions. What it may pass: sums, norms without a mean
in any form (one operator, or x / sqrt(mean(x^2) + e) in single ones), factors that all channels share, moves that leave
the channels in place. Where anything else reads or writes the stream, all of it is refused. Streams without a norm are
left alone: what lies between their layers is not linear. An embedding that is the weight of the head too becomes two
tables, because the gain of the last norm is in one of them alone.

The judge is the quantization that follows (see ``trial``); without one, or without data, the turn is made.

Source: Ashkboos et al., QuaRot, NeurIPS 2024.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Outcome, Refused
from channelfold.passes.layers.formats import chunks
from channelfold.passes.layers.linear import Linear, cast, linears, view
from channelfold.passes.layers.output_error import decibels
from channelfold.passes.numeric.hadamard import Turn
from channelfold.passes.operators import operator
from channelfold.passes.smooth import Rotate
from channelfold.passes.smooth.rotate_heads import HeadTurn, head_turns
from channelfold.passes.smooth.trial import Judge, Sites, paying
from channelfold.runtime.data.probes import random_data
from channelfold.runtime.errors import ModelError
from channelfold.runtime.io import edit
from channelfold.runtime.io.facts import required_inputs
from channelfold.runtime.io.shapes import Shape, measured_shapes
from channelfold.runtime.io.snapshot import Snapshot

_SQUARES = ("ReduceL2", "ReduceSumSquare")


class Work(Rotate):
    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        outcome = Outcome()
        known = ctx.calibration is not None
        feed = self.feed(ctx) if known else next(iter(random_data(required_inputs(graph), 1)))
        shapes = measured_shapes(graph, feed)
        names = list(_sites(graph, shapes, outcome))
        kept, outcome.facts = self._paying(graph, names, shapes, ctx, outcome)
        _turn(graph, shapes, kept, ctx.seed, outcome)
        return outcome

    def _paying(
        self, graph: gs.Graph, names: list[str], shapes: Mapping[str, Shape], ctx: Context, outcome: Outcome
    ) -> tuple[list[str], dict[str, Any]]:
        """(the sites whose turn pays at the outputs of the quantized model, facts). Refuses the others."""
        if not (names and self.roll_back and ctx.quantizer is not None and ctx.calibration is not None):
            return names, {}
        before = Snapshot.of(graph)

        def error(sites: Sites) -> float | None:
            copy = before.graph()
            _turn(copy, shapes, [names[number] for number in sorted(sites)], ctx.seed, Outcome())
            ctx.progress("Trying what pays", 0, 0)
            return judge.error(copy)

        try:
            judge = Judge(graph, ctx.quantizer, ctx)
            verdict = paying([0.0] * len(names), error)
        except ModelError as unknown:
            outcome.warnings.append(f"Whether rotating pays at the outputs is not known: {unknown}")
            return names, {}
        if verdict is None:
            return names, {}
        for number, (with_it, without) in verdict.taken_back.items():
            found = f"the quantized outputs have {decibels(with_it):.1f} dB with it, {decibels(without):.1f} dB without"
            outcome.refuse(names[number], f"it stays as it is: {found}", "taken back, it does not pay")
        return [names[number] for number in sorted(verdict.kept)], {"trial": verdict.facts(len(names), judge.samples)}


def _sites(graph: gs.Graph, shapes: Mapping[str, Shape], outcome: Outcome) -> dict[str, Stream | HeadTurn]:
    """What can be turned, by name; refuses the rest."""
    return {site.name: site for site in (*streams(graph, shapes, outcome), *head_turns(graph, shapes, outcome))}


def _turn(graph: gs.Graph, shapes: Mapping[str, Shape], names: Sequence[str], seed: int, outcome: Outcome) -> None:
    """Turns the sites of some names; refuses a site whose new weights do not fit their type."""
    sites = _sites(graph, shapes, Outcome())
    for name in names:
        before = Snapshot.of(graph)
        with outcome.refusing(name, "it stays as it is"):
            try:
                sites[name].turn(seed)
            except Refused:
                before.restore(graph)
                sites = _sites(graph, shapes, Outcome())
                raise
            outcome.change(name, sites[name].what)


@dataclass
class Stream:
    """What holds the channels of one residual stream. ``name`` is the node that writes it first.

    Constants are (node, input). ``writers`` and ``readers`` by the id of their node; a reader with the gains between
    the stream and its input, (channels,) or 1. ``gains`` are what these gains come from.
    """

    graph: gs.Graph
    width: int
    name: str = ""
    writers: dict[int, Linear] = field(default_factory=dict)
    readers: dict[int, tuple[Linear, np.ndarray]] = field(default_factory=dict)
    tables: list[gs.Node] = field(default_factory=list)
    terms: list[tuple[gs.Node, int]] = field(default_factory=list)
    gains: list[tuple[gs.Node, int]] = field(default_factory=list)
    norms: int = 0

    @property
    def what(self) -> str:
        read = f"{len(self.writers) + len(self.tables)} weights write it, {len(self.readers)} read it"
        return f"{self.width} channels of the residual stream rotated, {read}"

    def turn(self, seed: int) -> None:
        """Turns the stream. Raises DoesNotFit where a weight does not fit its type."""
        turn = Turn(self.width, seed)
        nodes = {**self.writers, **{key: linear for key, (linear, _) in self.readers.items()}}
        for key, found in nodes.items():
            linear = view(self.graph, found.node)  # anew, because other sites may have changed the weight
            weight, bias = linear.weight(), linear.bias()
            if key in self.readers:
                weight = _turned(weight, turn, self.readers[key][1])
            if key in self.writers:
                weight = _turned(weight.T, turn).T
                bias = None if bias is None else turn(bias)
            linear.install(weight, bias)
        for node in self.tables:
            self._set(node, 0, _turned(np.asarray(edit.value(node.inputs[0])), turn))
        for node, place in self.terms:
            term = np.asarray(edit.value(node.inputs[place]))
            self._set(node, place, turn(np.broadcast_to(term, (*term.shape[:-1], self.width))))
        for node, place in self.gains:
            self._set(node, place, np.ones(self.width))

    def _set(self, node: gs.Node, place: int, values: np.ndarray) -> None:
        old = node.inputs[place]
        edit.set_constant(self.graph, node, place, cast(values, np.dtype(old.dtype)), f"{old.name}_rotated")


def _turned(matrix: np.ndarray, turn: Turn, gain: np.ndarray | float = 1.0) -> np.ndarray:
    """The rows of a matrix times the gain, turned, in the type of the matrix."""
    found = np.empty(matrix.shape, matrix.dtype)
    for rows in chunks(matrix):
        found[rows] = turn(matrix[rows].astype(np.float64) * gain)
    return found


def streams(graph: gs.Graph, shapes: Mapping[str, Shape], outcome: Outcome) -> Iterator[Stream]:
    """Every stream with a norm that can be turned, in order; refuses the others."""
    found = {id(linear.node): linear for linear in linears(graph)}
    seen: set[int] = set()
    for node in graph.nodes:
        linear = found.get(id(node))
        if linear is not None:
            start, width = linear.output, linear.channels[0]
        elif _is_table(node):
            start, width = node.outputs[0], node.inputs[0].shape[-1]
        else:
            continue
        if id(start) in seen:
            continue
        tracer = _Tracer(Stream(graph, width), shapes, found)
        try:
            tracer.run(start)
        except Refused as error:
            if tracer.stream.norms:
                outcome.refuse(node.name, f"the stream that {node.op} writes stays as it is: {error}", error.code)
            continue
        finally:
            seen |= tracer.seen.keys()
        if tracer.stream.norms:
            tracer.stream.name = node.name
            yield tracer.stream


def _is_table(node: gs.Node) -> bool:
    """Whether a node takes rows of a constant matrix."""
    known = operator(node).kind == "gather" and isinstance(node.inputs[0], gs.Constant)
    return known and len(node.inputs[0].shape) == 2 and node.attrs.get("axis", 0) in (0, -2)


class _Tracer:
    """Follows a stream from one tensor. ``seen``: the tensors of the stream, each with the gain that it has."""

    def __init__(self, stream: Stream, shapes: Mapping[str, Shape], found: dict[int, Linear]):
        self.stream, self.seen = stream, dict[int, np.ndarray | None]()
        self._graph, self._linears, self._shapes = stream.graph, found, shapes
        self._written = {id(linear.output): linear for linear in found.values()}
        self._pending: list[gs.Variable] = []

    def run(self, start: gs.Tensor) -> None:
        """Follows all of the stream; raises Refused where the stream cannot be turned."""
        refused: list[Refused] = []
        self._add(start)
        while self._pending:
            tensor = self._pending.pop()
            for node in [None, *edit.consumers(tensor)]:
                try:
                    if node is None:
                        self._write(tensor)
                    else:
                        self._read(node, tensor)
                except Refused as error:
                    refused.append(error)
        if refused:
            raise refused[0]

    def _add(self, tensor: gs.Tensor, gain: np.ndarray | None = None) -> None:
        """Takes up a tensor. ``gain``: what scales it, None within the stream itself."""
        if not isinstance(tensor, gs.Variable) or self._last(tensor) != self.stream.width:
            raise Refused(f"{tensor.name!r} does not have its {self.stream.width} channels along the last axis")
        if id(tensor) in self.seen:
            if (self.seen[id(tensor)] is None) != (gain is None):
                raise Refused(f"{tensor.name!r} has a gain on one way and none on another")
            return
        self.seen[id(tensor)] = gain
        self._pending.append(tensor)

    def _write(self, tensor: gs.Variable) -> None:
        """Follows what writes a tensor, unless the tensor is a result of what the stream goes through."""
        node, stream = edit.producer(tensor), self.stream
        if edit.is_output(self._graph, tensor):
            raise Refused(f"{tensor.name!r} is an output of the graph")
        if self.seen[id(tensor)] is not None:
            return
        linear = self._written.get(id(tensor))
        if node is None:
            raise Refused(f"{tensor.name!r} is an input of the graph")
        if linear is not None:
            if linear.is_conv or linear.out_axis != -1:
                raise Refused(f"{linear.node.op} writes its channels along another axis")
            stream.writers[id(linear.node)] = linear
        elif _is_table(node):
            stream.tables.append(node)
        else:
            self._pass(node, tensor)

    def _read(self, node: gs.Node, tensor: gs.Variable) -> None:
        """Follows what a node makes of a tensor."""
        linear, gain = self._linears.get(id(node)), self.seen[id(tensor)]
        if not edit.in_graph(self._graph, node):
            raise Refused(f"a node of a body reads {tensor.name!r}")
        if linear is not None and tensor is linear.data:
            if linear.is_conv or linear.in_axis != -1:
                raise Refused(f"{node.op} reads its channels along another axis")
            factor = np.ones(1) if gain is None else gain
            self.stream.readers[id(node)] = linear, factor
        elif not operator(node).asks_shape:
            self._pass(node, tensor)

    def _pass(self, node: gs.Node, tensor: gs.Variable) -> None:
        """Takes up the other tensors of a node that the stream passes. Raises Refused for any other node."""
        known, gain = operator(node), self.seen[id(tensor)]
        if known.kind == "norm":
            self.stream.norms += 1
            if known.beta:
                raise Refused(f"{node.op} takes the mean of its channels away", what=node.op)
            self._norm(node, tensor, known.gamma)
        elif known.adds and known.elementwise and gain is None:
            self._sum(node)
        elif known.multiplies and len({id(t) for t in node.inputs}) > 1:
            self._factor(node, tensor)
        elif self._is_square(node, tensor) and gain is None:
            return
        elif known.copies or (known.kind in ("gather", "slice", "transpose") and self._keeps_channels(node)):
            self._add(node.inputs[0], gain)
            self._add(node.outputs[0], gain)
        else:
            raise Refused(f"{node.op} is not linear in its channels", what=node.op)

    def _norm(self, node: gs.Node, tensor: gs.Variable, gamma: int) -> None:
        """A norm without a mean, with what it adds in front."""
        values = edit.value(node.inputs[gamma])
        inner = [t for t in (*node.inputs[:gamma], *node.outputs[3:]) if not t.is_empty()]
        if not any(tensor is t for t in inner):  # its result, which is followed from in front
            raise Refused(f"{node.op} writes the stream")
        if self.seen[id(tensor)] is not None or node.attrs.get("axis", -1) not in (-1, self._rank(tensor) - 1):
            raise Refused(f"{node.op} is not over the channels alone")
        if values is None or values.shape != (self.stream.width,):
            raise Refused(f"the gain of {node.op} is not a constant vector over its channels")
        if any(t.outputs or edit.is_output(self._graph, t) for t in node.outputs[1:3]):
            raise Refused(f"more than the result of {node.op} is read")
        if any(node is seen for seen, _ in self.stream.gains):
            return
        self.stream.gains.append((node, gamma))
        if edit.has_input(node, gamma + 1):
            self.stream.terms.append((node, gamma + 1))
        for other in inner:
            self._add(other)
        self._add(node.outputs[0], values.astype(np.float64))

    def _sum(self, node: gs.Node) -> None:
        for place, other in enumerate(node.inputs):
            if not isinstance(other, gs.Constant):
                self._add(other)
            elif not any(node is seen for seen, _ in self.stream.terms):
                self.stream.terms.append((node, place))
        self._add(node.outputs[0])

    def _factor(self, node: gs.Node, tensor: gs.Variable) -> None:
        """A product with what all channels share, or with a gain."""
        result, gain = node.outputs[0], self.seen[id(tensor)]
        wide = [isinstance(t, gs.Variable) and self._last(t) == self.stream.width for t in node.inputs]
        place = wide.index(True) if any(wide) else None
        if place is None or len(wide) != 2 or (node.op == "Div" and place):
            raise Refused(f"{node.op} is not linear in its channels", what=node.op)
        data, other = node.inputs[place], node.inputs[1 - place]
        if self._last(other) == 1:
            self._add(data, gain)
            self._add(result, gain)
            return
        values = edit.value(other)
        if values is None or values.size != self.stream.width or tensor is not data:
            raise Refused(f"{node.op} multiplies its channels with {other.name!r}")
        values = values.reshape(-1).astype(np.float64)
        values = 1 / values if node.op == "Div" else values
        self.stream.gains.append((node, 1 - place))
        self._add(result, values if gain is None else values * gain)

    def _is_square(self, node: gs.Node, tensor: gs.Variable) -> bool:
        """Whether a node makes sums of the squares of the channels, which a turn leaves as they are.

        Counts a norm for all that reduces or squares the channels, so that a stream refused for the node is reported.
        """
        if operator(node).kind == "reduce":
            self.stream.norms += self._over_channels(node, tensor)
            return node.op in _SQUARES and self._over_channels(node, tensor)
        alike = node.op == "Mul" and all(t is tensor for t in node.inputs)
        if not alike and not (node.op == "Pow" and node.inputs[0] is tensor and edit.scalar(node.inputs[1]) == 2):
            return False
        squares = node.outputs[0]
        readers = edit.consumers(squares)
        summed = all(n.op in ("ReduceMean", "ReduceSum") and self._over_channels(n, tensor) for n in readers)
        self.stream.norms += 1
        return summed and not edit.is_output(self._graph, squares)

    def _over_channels(self, node: gs.Node, tensor: gs.Variable) -> bool:
        axes = edit.argument(node, 1, "axes")
        return axes is not None and axes.tolist() in ([-1], [self._rank(tensor) - 1])

    def _keeps_channels(self, node: gs.Node) -> bool:
        """Whether a move leaves the last axis alone."""
        rank = self._rank(node.inputs[0])
        if operator(node).kind == "transpose":
            perm = node.attrs.get("perm")
            return perm is not None and perm[-1] == rank - 1
        axes = [node.attrs.get("axis", 0)] if node.op == "Gather" else edit.argument(node, 3, "axes")
        return axes is not None and rank > 0 and all(int(axis) % rank != rank - 1 for axis in axes)

    def _last(self, tensor: gs.Tensor) -> int:
        """The size of the last axis of a tensor: 1 for a single value, 0 where it is not known."""
        shape = tensor.shape if isinstance(tensor, gs.Constant) else self._shapes.get(tensor.name)
        return 0 if shape is None else shape[-1] if shape else 1

    def _rank(self, tensor: gs.Tensor) -> int:
        return len(self._shapes.get(tensor.name) or ())
