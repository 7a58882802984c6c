"""Feed-forward networks in a graph: found by their function, and cut.

    plain      y = W2 act(W1 x + b1) + b2
    gated      y = W2 (act(W1 x + b1) * (W3 x + b3)) + b2

W1, W2, W3 are MatMul, Gemm or Conv with a kernel of one point; act is any number of nodes that treat every channel
alike. Only W2 reads the hidden channels; ``widths`` finds the tensors that hold them.

    cut        y = W2' act(W1_K x + b1_K) + M x + b2'

keeps the hidden channels K, replaces W2 and b2, and adds a dense branch M: a linear beside the FFN whose result is
added to y. Where a parallel linear already reads x and is added to y, M is added to the weight of this linear.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Outcome, Refused, TwoActivations
from channelfold.passes.channels.scale_regions import Shape
from channelfold.passes.channels.widths import Width, read_by
from channelfold.passes.layers.linear import Linear, cast, check_growth, live_linears, view
from channelfold.passes.operators import Operator, operator
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import constant, free_name


@dataclass(frozen=True)
class StandIn:
    """W2' (outputs, kept), b2' - b2 (outputs,), M (outputs, inputs) or None, and E |y' - y|^2 on the fitted data."""

    kept: np.ndarray
    matrix: np.ndarray
    offset: np.ndarray
    dense: np.ndarray | None
    error: float


@dataclass
class Ffn:
    """An FFN that ends in the linear ``down``; ``positions`` is the number of positions in the measured sample.

    The output of the linear ``parallel`` is added to the output of the FFN. ``no_branch`` gives the reason why the FFN
    can have no dense branch.
    """

    width: Width
    down: Linear
    positions: int
    parallel: Linear | None = None
    no_branch: str = ""

    @property
    def name(self) -> str:
        return self.down.name

    @property
    def ups(self) -> list[Linear]:
        return self.width.writers

    @property
    def inputs(self) -> int:
        return self.ups[0].channels[1]

    @property
    def hidden(self) -> int:
        return self.width.channels

    @property
    def outputs(self) -> int:
        return self.down.channels[0]

    def matrix(self) -> np.ndarray:
        """W2, (outputs, hidden) float64."""
        return self.down.weight().reshape(self.outputs, -1).astype(np.float64)

    def macs(self, kept: int, dense: bool = False) -> int:
        """MACs on the measured sample with ``kept`` hidden channels, and with a dense branch if ``dense``."""
        each = len(self.ups) * self.inputs + self.outputs
        branch = self.inputs * self.outputs if dense and self.parallel is None else 0
        return self.positions * (kept * each + branch)

    def cut(self, plan: StandIn, shapes: dict[str, Shape]) -> None:
        """Keeps the hidden channels of a plan and updates ``shapes``.

        Raises Refused, with nothing changed, where a value does not fit its type.
        """
        down, graph = view(self.down.graph, self.down.node), self.down.graph
        old = down.bias()
        bias = cast(plan.offset if old is None else old + plan.offset, down.dtype)
        cast(plan.matrix, down.dtype)
        branch = None if plan.dense is None else self._branch(down, plan.dense)
        self.width = read_by(graph, down, shapes)  # an FFN that ends here may have a new bias
        self.width.repeat(np.isin(np.arange(self.hidden), plan.kept), shapes)
        self.down = view(graph, self.down.node)
        self.down.set_weight(plan.matrix.reshape(*plan.matrix.shape, *[1] * len(down.kernel)))
        self.down.set_bias(bias)
        shapes[self.down.node.outputs[0].name] = shapes[self.down.output.name]
        if branch is not None and self.parallel is not None:
            view(graph, self.parallel.node).set_weight(branch)
        elif branch is not None:
            self._add_branch(branch)

    def _branch(self, down: Linear, dense: np.ndarray) -> np.ndarray:
        """The weight of the dense branch, or the sum of M and the weight of ``parallel``. Raises Refused."""
        if self.no_branch:
            raise Refused(self.no_branch)
        if self.parallel is None:
            shaped = dense.reshape(*dense.shape, *[1] * len(down.kernel))
            return cast(shaped if down.node.op in ("Conv", "Gemm") else down.unorient(shaped), down.dtype)
        parallel = view(self.parallel.graph, self.parallel.node)
        check_growth(parallel)
        weight = parallel.weight()
        return cast(weight.astype(np.float64) + dense.reshape(weight.shape), parallel.dtype)

    def _add_branch(self, weight: np.ndarray) -> None:
        """Adds a linear of the same operator as ``down`` that reads x, and an Add of both results."""
        graph, down, name = self.down.graph, self.down, f"{self.down.name}_dense"
        inputs = [self.ups[0].data, constant(graph, f"{name}_weight", weight)]
        attrs = {"transB": 1} if down.node.op == "Gemm" else {}
        if down.node.op == "MatMul" and down.weight_input == 0:
            inputs.reverse()
        result = down.output
        branch, own = (
            gs.Variable(free_name(graph, f"{name}_{part}"), result.dtype, result.shape) for part in ("output", "ffn")
        )
        last = edit.producer(result)
        assert last is not None
        linear = gs.Node(down.node.op, branch.name, attrs, inputs, [branch])
        edit.set_output(last, 0, own)
        edit.insert_after(graph, last, linear)
        edit.insert_after(graph, linear, gs.Node("Add", own.name, {}, [own, branch], [result]))


def find_ffns(graph: gs.Graph, shapes: dict[str, Shape], outcome: Outcome) -> list[Ffn]:
    """Every FFN of the graph, in order; refuses a linear behind an activation that ends no FFN.

    ``shapes`` holds the shapes of all tensors for one input, by name. In a chain of linears and activations every
    linear between two activations ends one FFN and begins another FFN.
    """
    found = []
    for node in live_linears(graph):
        if not any(map(_follows_activation, node.inputs[:2])):
            continue
        with outcome.refusing(node.name, node.op), contextlib.suppress(TwoActivations):
            down = view(graph, node)
            if all(size == 1 for size in down.kernel):
                found.append(_ffn(graph, down, shapes))
    begin = {id(up.node) for ffn in found for up in ffn.ups}
    end = {id(ffn.down.node) for ffn in found}
    for ffn in found:  # a branch would read or write hidden channels of the other FFN
        if id(ffn.down.node) in begin or any(id(up.node) in end for up in ffn.ups):
            ffn.parallel, ffn.no_branch = None, "another FFN begins where it ends, or ends where it begins"
    return found


def _follows_activation(tensor: gs.Tensor) -> bool:
    """Whether an unknown operator, or an elementwise operator that is not linear, makes a tensor.

    The search goes back through operators that move elements, through constant scales and shifts, and through both
    factors of a gate. The root of a variance is no activation.
    """
    pending, seen = [tensor], set()
    while pending:
        node = edit.producer(pending.pop())
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        known, sources = operator(node), _sources(node)
        if known == Operator():
            return True
        if known.elementwise and not known.linear and not known.arithmetic:
            if not _is_statistic(node):
                return True
        elif known.moves or known.multiplies or (known.linear and len(sources) == 1 and not known.weighted):
            pending += sources
    return False


def _is_statistic(node: gs.Node) -> bool:
    """Whether elementwise operators make the result of a node from reductions alone."""
    pending, seen = [node], set()
    while pending:
        node = pending.pop()
        if operator(node).kind == "reduce" or id(node) in seen:
            continue
        seen.add(id(node))
        sources = [edit.producer(tensor) for tensor in _sources(node)]
        before = [source for source in sources if source is not None]
        if len(before) < len(sources) or not (operator(node).elementwise or operator(node).moves):
            return False
        pending += before
    return True


def _sources(node: gs.Node) -> list[gs.Tensor]:
    """The data inputs of a node that are no constants."""
    data = [node.inputs[i] for i in operator(node).inputs(node) if edit.has_input(node, i)]
    return [tensor for tensor in data if not isinstance(tensor, gs.Constant)]


def _ffn(graph: gs.Graph, down: Linear, shapes: dict[str, Shape]) -> Ffn:
    """The FFN that ends in ``down``. Raises Refused where ``down`` ends no FFN."""
    width = read_by(graph, down, shapes, _HIDDEN)
    if len(width.readers) > 1:
        raise Refused(f"{len(width.readers)} linears read the hidden channels")
    if len({id(up.node) for up in width.writers}) not in (1, 2):
        raise Refused(f"{len(width.writers)} linears write the hidden channels, expected one, or two with a gate")
    if any(up.data is not width.writers[0].data or up.in_axis != width.writers[0].in_axis for up in width.writers):
        raise Refused("the linears that write the hidden channels read different tensors")
    if any(up.node is down.node for up in width.writers):
        raise Refused("it reads the channels that it writes")
    for linear in (*width.writers, down):
        if any(size > 1 for size in linear.kernel) or any(s > 1 for s in linear.node.attrs.get("strides") or ()):
            raise Refused(f"{linear.node.op} {linear.name} sees more than one position, or leaves some out")
        if linear.padded:
            raise Refused(f"{linear.node.op} {linear.name} pads its input")
    ffn = Ffn(width, down, math.prod(shapes[down.data.name]) // width.channels)
    ffn.no_branch = _why_no_branch(ffn, shapes)
    if not ffn.no_branch:
        ffn.parallel = _parallel(graph, ffn)
    return ffn


def _why_no_branch(ffn: Ffn, shapes: Mapping[str, Shape]) -> str:
    up, down = ffn.ups[0], ffn.down
    if up.node.op != down.node.op or up.weight_input != down.weight_input or up.in_axis != down.in_axis:
        return f"{up.node.op} begins it and {down.node.op} ends it, with their channels on different axes or ends"
    if any(node.op == "Transpose" for node in ffn.width.between):
        return "a Transpose is in between"
    axis, hidden, data = up.in_axis, shapes[down.data.name], shapes[up.data.name]
    if len(data) != len(hidden) or np.delete(data, axis).tolist() != np.delete(hidden, axis).tolist():
        return "its input has other positions than its hidden channels"
    return ""


def _parallel(graph: gs.Graph, ffn: Ffn) -> Linear | None:
    """The linear with the same input as the FFN whose output is added to the output of the FFN, and read only there."""
    add = edit.sole_consumer(graph, ffn.down.output)
    if add is None or add.op != "Add" or not edit.is_standard(add):
        return None
    for tensor in add.inputs:
        for node in (edit.producer(tensor), *(edit.producer(t) for n in tensor.inputs for t in n.inputs)):
            if node is None or node is ffn.down.node:
                continue
            with contextlib.suppress(Refused):
                linear = view(graph, node)
                same = linear.data is ffn.ups[0].data and linear.in_axis == ffn.ups[0].in_axis
                pointwise = linear.groups == 1 and all(size == 1 for size in linear.kernel) and not linear.padded
                alone = linear.output is tensor and edit.sole_consumer(graph, tensor) is add
                if same and pointwise and alone and linear.channels[0] == ffn.outputs:
                    return linear
    return None


_HIDDEN = ("elementwise", "pool", "reshape", "transpose")
