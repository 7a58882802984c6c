"""Widths: the channels between the linears that write them and the linears that read them, to repeat, drop or blend.

For x = f(W u + b), with any f that treats every channel alike, and y = V x:

    repeat, drop    W' = P W,  b' = P b,  V' = V P^T      P: rows of I, which commute with any f (``renumber``)
    blend           W' = R W,  b' = R b                   where f is linear, R any matrix of rows that add up to 1
                    V' = V C

Worked example, SwiGLU, from the tensor that ``down`` reads: the trace goes back through Mul to ``up`` (a writer) and to
the activation, whose Sigmoid and Mul lead to ``gate`` (another writer). All tensors between them get the new width. A
Gather with constant indices along the channels is a writer too: its indices are its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import InBetween, Refused
from channelfold.passes.channels.cut_regions import Region, best_trace
from channelfold.passes.channels.links import LinkTable
from channelfold.passes.channels.maps import Shape
from channelfold.passes.channels.renumber import renumber
from channelfold.passes.layers.linear import Linear, cast, check_growth, view, view_beside
from channelfold.passes.operators import operator
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import constant, free_name

Blend = Callable[[np.ndarray], np.ndarray]  # maps an array (channels, …) to an array of the same shape


@dataclass
class Width:
    """Tensors with the same channels (labels 1 .. ``channels`` of a region), and the linears that use them."""

    graph: gs.Graph
    region: Region
    channels: int
    writers: list[Linear]
    readers: list[Linear]

    @property
    def linears(self) -> list[Linear]:
        """The writers and readers, each once: a linear may read the channels and write them."""
        return list({id(linear.node): linear for linear in (*self.writers, *self.readers)}.values())

    @property
    def vectors(self) -> list[tuple[gs.Node, int, int]]:
        """Constants along the channels beside the weights, as (node, input, axis from the end)."""
        parts = [part for part in self.region.parts if not part.role]
        return [(part.node, part.input, part.axis - len(part.node.inputs[part.input].shape)) for part in parts]

    @property
    def between(self) -> list[gs.Node]:
        """The nodes between the linears."""
        own = {id(node) for linear in self.linears for node in (linear.node, *linear.chain)}
        found = {id(n): n for tensor, _ in self.region.axes.values() for n in (*tensor.inputs, *tensor.outputs)}
        return [node for key, node in found.items() if key not in own]

    @property
    def linear(self) -> bool:
        """Whether every node between writers and readers commutes with sums of channels."""
        whole = all(len(part.labels) == self.channels for part in self.region.parts)
        known = [operator(node) for node in self.between]
        return whole and all(row.linear and row.kind in ("elementwise", "reshape", "transpose") for row in known)

    def rows(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All constants along the channels, except weights that read them: labels (n,) and values (n, …)."""
        for part in (part for part in self.region.parts if part.role != "in"):
            yield part.labels, np.moveaxis(np.asarray(edit.value(part.node.inputs[part.input])), part.axis, 0)

    def columns(self) -> np.ndarray:
        """The weights that read the channels, (outputs, channels); each place of a kernel counts as an output."""
        return np.concatenate([columns_of(linear) for linear in self.readers])

    def repeat(self, counts: np.ndarray, shapes: dict[str, Shape]) -> None:
        """Repeats channel c ``counts[c]`` times, (channels,); 0 drops the channel. Updates ``shapes``, by name.

        Raises Refused, with nothing changed.
        """
        renumber(self.graph, [(self.region, counts)], shapes=shapes)
        self.channels = int(counts.sum())

    def blended(self, rows: Blend | None, columns: Blend, shapes: dict[str, Shape]) -> Width:
        """Maps the weights that read the channels by ``columns``, and the constants that make them by ``rows``.

        The width must be ``linear``. Raises Refused, with nothing changed, where a value does not fit its type.
        """
        writes: list[Callable[[], object]] = []
        writers = {id(linear.node) for linear in self.writers} if rows else set()
        for linear in self.linears:
            weight, reads = linear.weight(), any(linear.node is reader.node for reader in self.readers)
            if reads:
                weight = columns(weight.swapaxes(0, 1)).swapaxes(0, 1)
            if rows and id(linear.node) in writers:
                weight = rows(weight)
            if reads or id(linear.node) in writers:
                writes.append(partial(linear.set_weight, cast(weight, linear.dtype)))
        for node, port, axis in self.vectors:
            if rows is None:
                break
            old = np.asarray(edit.value(node.inputs[port]))
            new = cast(np.moveaxis(rows(np.moveaxis(old, axis, 0)), 0, axis), old.dtype)
            writes.append(partial(edit.set_constant, self.graph, node, port, new, f"{node.inputs[port].name}_mean"))
        for write in writes:
            write()
        return read_by(self.graph, view(self.graph, self.readers[0].node), shapes)


def follow(
    graph: gs.Graph, tensor: gs.Tensor, axis: int, shapes: dict[str, Shape], kinds: Collection[str] | None = None
) -> Width:
    """The width of a tensor along ``axis``. ``shapes`` holds the shapes of all tensors for one input, by name.

    ``kinds`` names the kinds of operators that may stand between writers and readers; None allows all operators that
    treat every channel alike. Raises Refused, with the reason, where the width cannot change.
    """
    table = LinkTable(graph, shapes, single=True)
    shape = table.known_shape(tensor)
    region = best_trace(table, tensor, axis % len(shape))
    width = Width(graph, region, shape[axis], *_linears(graph, region))
    _check(width, kinds)
    for linear in width.linears:
        check_growth(linear)
    return width


def read_by(graph: gs.Graph, linear: Linear, shapes: dict[str, Shape], kinds: Collection[str] | None = None) -> Width:
    """The width of the input of a linear. Raises Refused as ``follow`` does, and where readers read several tensors."""
    width = follow(graph, linear.data, linear.in_axis, shapes, kinds)
    if any(reader.data is not linear.data for reader in width.readers):
        raise Refused("linears read its channels from several tensors")
    return width


def gathered(graph: gs.Graph, readers: list[Linear], shapes: dict[str, Shape]) -> Width:
    """Puts a Gather of all channels between a tensor and ``readers``; returns the width behind the Gather.

    The tensor must be written by a node.
    """
    tensor, channels = readers[0].data, readers[0].channels[1]
    axis = readers[0].in_axis % len(shapes[tensor.name])
    name = f"{tensor.name}_channels"
    result = gs.Variable(free_name(graph, name), tensor.dtype, tensor.shape)
    index = constant(graph, f"{name}_indices", np.arange(channels))
    node = gs.Node("Gather", name, {"axis": axis}, [tensor, index], [result])
    edit.insert_after(graph, tensor.inputs[0], node)
    shapes[result.name] = shapes[tensor.name]
    for linear in readers:
        edit.set_input(linear.node, 1 - linear.weight_input, result)
    return read_by(graph, view(graph, readers[0].node), shapes)


def columns_of(linear: Linear) -> np.ndarray:
    """The weight of a linear without groups as (outputs, inputs); every position of a kernel counts as an output."""
    weight = np.moveaxis(linear.weight(), 1, -1)
    return weight.reshape(-1, weight.shape[-1])


def _linears(graph: gs.Graph, region: Region) -> tuple[list[Linear], list[Linear]]:
    """(writers, readers) of a region. Raises Refused where another operator makes the channels or sums over them."""
    layers = {part.role: {id(p.layer): p.layer for p in region.parts if p.role == part.role} for part in region.parts}
    writers = [_view(graph, n, "writes") for n in layers.get("out", {}).values() if operator(n).weighted]
    readers: dict[int, Linear] = {}
    for read in region.reads:
        linear = _view(graph, read.node, "reads")
        if linear.weight_input != read.port:  # a Transpose or Cast of a weight is no activation
            readers[id(read.node)] = linear
    if stray := next((node for key, node in layers.get("in", {}).items() if key not in readers), None):
        raise InBetween(stray.op)
    return writers, list(readers.values())


def _view(graph: gs.Graph, node: gs.Node, verb: str) -> Linear:
    if not operator(node).weighted:
        raise InBetween(node.op)
    linear = view_beside(graph, node, verb)
    if linear.groups > 1:
        raise Refused(f"{node.op} {verb} it in groups")
    return linear


def _check(width: Width, kinds: Collection[str] | None) -> None:
    """Raises Refused where a channel of a width cannot be repeated or dropped alone."""
    for node in width.region.blocks:
        raise InBetween(node.op)
    for node in width.between:
        own = [*map(id, (*node.inputs, *node.outputs))]
        wide = {labels.max() > width.channels for (key, _), (_, labels) in width.region.axes.items() if key in own}
        if len(wide) > 1 or (kinds is not None and operator(node).kind not in kinds):
            raise InBetween(node.op)
    for tensor, _ in width.region.axes.values():
        if edit.is_output(width.graph, tensor):
            raise Refused("it is an output of the graph")
        if edit.producer(tensor) is None:
            raise Refused("an input of the graph feeds it")
    if reason := next(filter(None, width.region.fixed), ""):
        raise Refused(reason)
    if width.region.size != width.channels:
        raise Refused("its channels are bound to each other, or to others")
