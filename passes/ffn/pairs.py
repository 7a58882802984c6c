"""Pairs of linears with functions of single channels between them, and the idle channels among these.

    h = W1 x + b1        y = W2 [scale_j * f_j(h[channel_j]) + shift_j]_j + b2

``Pairs.at`` finds the pair that ends at a node, with any nodes between the linears (see ``functions``). A gate gives a
pair two inner linears, and f_j is a function of both: silu(gate_j) * up_j. A channel is *idle* where f_j is affine,
*dead* where f_j is constant, and otherwise *active*. An FFN is a pair with active channels.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Refused
from channelfold.passes.channels.cones import Cone, cone
from channelfold.passes.channels.functions import CONSTANT, Function, Functions, Reader, UnknownShape
from channelfold.passes.layers.linear import Linear, view
from channelfold.passes.operators import operator
from channelfold.runtime.data.sources import Data, random_data
from channelfold.runtime.errors import DataError
from channelfold.runtime.io import edit
from channelfold.runtime.io.facts import required_inputs
from channelfold.runtime.io.session import Feed, TensorSpec
from channelfold.runtime.io.shapes import LazyShapes

_SIZES = ((2, 32), (3, 64), (2, 224), (3, 448))  # of open leading axes, and of other open axes
_READINGS = 2  # sizes of the input that must agree, where a size is open


@dataclass(frozen=True)
class Pair:
    """Two linears in a row, or three with a gate.

    ``channels`` gives for each input channel of ``outer`` its function (a place in ``functions``), its channel of
    ``inner``, its scale and its shift. ``tensors`` lists the tensors in between that depend on these channels.
    """

    inner: tuple[Linear, ...]
    outer: Linear
    cone: Cone
    channels: np.ndarray
    functions: list[Function]
    tensors: list[gs.Tensor]

    @property
    def slopes(self) -> np.ndarray:
        """The function of each channel as (root, slope, intercept), NaN where it is not affine, (hidden, 3) float64."""
        table = np.array([f.affine or (np.nan, np.nan, np.nan) for f in self.functions])
        return table[self.channels["function"]]

    @property
    def idle(self) -> np.ndarray:
        """Which channels are affine in a channel of an inner linear, (hidden,) bool."""
        return ~np.isnan(self.slopes[:, 0])

    @property
    def dead(self) -> np.ndarray:
        """Which channels are constant, (hidden,) bool."""
        return self.channels["function"] == CONSTANT

    @property
    def active(self) -> np.ndarray:
        return ~self.idle & ~self.dead

    @property
    def activated(self) -> bool:
        """Whether an activation of some or all channels stands between the linears."""
        return self.cone.mixed or not self.cone.linear

    @property
    def macs(self) -> int:
        """Multiply-accumulates per position."""
        return sum(outs * ins for outs, ins in (linear.channels for linear in (*self.inner, self.outer)))

    @property
    def folded_macs(self) -> int:
        """MACs per position after the idle channels have become one dense layer."""
        return self.macs_with(int(self.active.sum()))

    def macs_with(self, active: int) -> int:
        """MACs per position of a dense layer beside ``active`` channels."""
        ins, outs = self.inner[0].channels[1], self.outer.channels[0]
        return active * (len(self.inner) * ins + outs) + ins * outs


class Pairs:
    """Finds the pairs of a graph. Between two calls the graph may change, except for the shapes of remaining tensors.

    Masks are computed for several sizes of the input: the size of a sample of ``data``, if given, and others.
    """

    def __init__(self, graph: gs.Graph, data: Data | None = None):
        self.graph = graph
        self._feeds = _feeds(graph, data)
        self._opened: list[Reader] = []

    def at(self, node: gs.Node, plain: bool = False) -> Pair | None:
        """The pair that a node ends, or None; with ``plain`` also a pair that treats all channels alike.

        Raises Refused where some channels may bypass the activation, but cannot be told apart.
        """
        outer = self._pointwise(node)
        inner: dict[int, Linear] = {}

        def is_root(tensor: gs.Tensor) -> bool:
            linear = self._writer(tensor)
            if linear is not None:
                inner[id(tensor)] = linear
            return linear is not None

        if outer is None:
            return None
        try:
            found = cone(self.graph, outer.data, is_root, roots=2)
        except Refused:
            return None
        linears = tuple(inner[id(root)] for root in found.roots)
        if not (plain or found.varied) or any(self._pointwise(linear.node) is None for linear in linears):
            return None
        axes = {id(root): linear.out_axis for root, linear in zip(found.roots, linears, strict=True)}
        functions = Functions()
        try:
            channels, tensors = self.read(found, axes, outer.in_axis, functions)
        except Refused:
            if found.mixed:
                raise
            return None
        return Pair(linears, outer, found, channels, functions.items, [*found.roots, *tensors])

    def read(
        self, found: Cone, axes: Mapping[int, int], axis: int, functions: Functions
    ) -> tuple[np.ndarray, list[gs.Tensor]]:
        """``Reader.read`` for several sizes of the input, and the tensors of the cone that depend on the roots.

        Raises Refused, also where the sizes differ.
        """
        seen: list[np.ndarray] = []
        unknown = Refused("its shape is unknown")
        outputs = [tensor for node in found.nodes for tensor in node.outputs]
        tensors: list[gs.Tensor] = []
        for reader in self._readers():
            reader.functions = functions
            try:
                seen.append(reader.read(found, axes, axis))
            except UnknownShape as error:
                unknown = error
                continue
            tensors = [tensor for tensor in outputs if id(tensor) in reader.elements]
            if not np.array_equal(seen[0], seen[-1]):
                raise Refused("which channels go through the activation depends on the size of the input")
            if len(seen) == _READINGS:
                break
        if not seen:
            raise unknown
        return seen[0], tensors

    def _readers(self) -> Iterator[Reader]:
        """A reader for each size, opened when it is needed, because the last sizes are large."""
        yield from self._opened
        for feed in self._feeds:
            self._opened.append(Reader(self.graph, LazyShapes(self.graph, feed)))
            yield self._opened[-1]

    def _pointwise(self, node: gs.Node) -> Linear | None:
        """The view of a linear that treats every position alike, or None."""
        if not operator(node).weighted or not node.outputs:
            return None
        try:
            linear = view(self.graph, node)
        except Refused:
            return None
        attrs = node.attrs
        if linear.is_conv:
            plain = node.op == "Conv" and linear.groups == 1 and not linear.padded
            plain &= all(k == 1 for k in linear.kernel) and all(s == 1 for s in attrs.get("strides") or ())
            return linear if plain else None
        return None if attrs.get("transA", 0) else linear

    def _writer(self, tensor: gs.Tensor) -> Linear | None:
        """The linear whose result, with the bias, is a tensor; or None."""
        node = edit.producer(tensor)
        for source in () if node is None else (node, *map(edit.producer, node.inputs if node.op == "Add" else ())):
            if source is not None and operator(source).weighted:
                with contextlib.suppress(Refused):
                    linear = view(self.graph, source)
                    if linear.output is tensor:
                        return linear
        return None


def _feeds(graph: gs.Graph, data: Data | None) -> Iterator[Feed]:
    """Feeds of several sizes, or of one size where no size is open; the first feed is two copies of a sample."""
    inputs = [_named(spec) for spec in required_inputs(graph)]
    leading = {spec.shape[0] for spec in inputs if spec.shape and isinstance(spec.shape[0], str)}
    sample = next(iter(data), None) if data is not None else None
    if sample is not None:
        copies = {spec.name: 2 if {*spec.shape[:1]} & leading else 1 for spec in inputs}
        yield {name: np.concatenate([values] * copies.get(name, 1)) if values.ndim else values
               for name, values in sample.items()}  # fmt: skip
    fixed = all(isinstance(size, int) for spec in inputs for size in spec.shape)
    try:
        for lead, size in _SIZES[:1] if fixed else _SIZES:
            yield from random_data(inputs, 1, dims=dict.fromkeys(leading, lead), size=size)
    except DataError:  # there are no inputs, or random values do not suit them
        if sample is None:
            yield {}


def _named(spec: TensorSpec) -> TensorSpec:
    """The input with a name for its leading axis where that axis is open."""
    lead = "batch" if spec.shape[:1] == (None,) else None
    return dataclasses.replace(spec, shape=(lead, *spec.shape[1:])) if lead else spec
