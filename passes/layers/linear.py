"""One view over every linear node: y = W x + b, with W as (out, in / groups, *kernel).

    Conv            W[o, i, *k] as stored
    ConvTranspose   stored [i, o / groups, *k]
    Gemm            stored [i, o], or [o, i] with transB; alpha belongs to W, beta to b
    MatMul          X W: stored [i, o]; W X: stored [o, i]; b is the constant Add that follows

The weight may lie behind Transpose, Cast, Identity, Reshape, Squeeze and Unsqueeze nodes. Reading applies this chain of
nodes. Writing puts a new constant at the linear node itself where the old constant has other readers (copy on write) or
lies behind a chain, so that a shared weight never changes for another reader.

Worked example: ``Transpose(E) -> MatMul(x, ·)`` with the embedding E [vocabulary, width] also read by a Gather. The
view's weight is E itself, (out=vocabulary, in=width); ``set_weight`` gives the MatMul a constant of its own, and the
Gather keeps E.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs

from channelfold.passes.base import DoesNotFit, Outcome, Refused, TwoActivations
from channelfold.passes.layers.expansion import codes_behind
from channelfold.passes.operators import operator
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import constant, free_name, read


@dataclass
class Linear:
    """A linear node with a constant weight.

    ``data`` is the activation that the node reads, ``in_axis`` the axis of its channels. ``output`` is the tensor after
    the bias, ``out_axis`` the axis of its channels. Negative axes count from the end.
    """

    graph: gs.Graph
    node: gs.Node
    weight_input: int
    source: gs.Constant
    chain: list[gs.Node]
    groups: int = 1
    in_axis: int = 1
    out_axis: int = 1
    bias_node: gs.Node | None = None

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def data(self) -> gs.Variable:
        return self.node.inputs[1 - self.weight_input]

    @property
    def output(self) -> gs.Tensor:
        return (self.bias_node or self.node).outputs[0]

    @property
    def is_conv(self) -> bool:
        return operator(self.node).kind == "conv"

    @property
    def dtype(self) -> np.dtype:
        """The type the node computes in."""
        for node in reversed(self.chain):
            if node.op == "Cast":
                return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(node.attrs["to"]))
        return np.dtype(self.source.dtype)

    @property
    def channels(self) -> tuple[int, int]:
        """The numbers of output channels and input channels."""
        shape = self._oriented_shape()
        return shape[0], shape[1] * self.groups

    @property
    def kernel(self) -> tuple[int, ...]:
        return self._oriented_shape()[2:]

    @property
    def depthwise(self) -> bool:
        return self.groups > 1 and self.groups == self.channels[1]

    @property
    def padded(self) -> bool:
        """Whether outputs at the border read zero padding, so that a shift of the input changes them differently."""
        attrs = self.node.attrs
        if self.node.op == "ConvTranspose":
            return True
        if self.node.op != "Conv":
            return False
        return any(attrs.get("pads") or ()) or attrs.get("auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER")

    @property
    def growth(self) -> int:
        """Bytes that ``set_weight`` adds to the model: the old weight may have other readers or a smaller type."""
        tensors = [self.source, *(node.outputs[0] for node in self.chain)]
        alone = all(len(t.outputs) == 1 and not edit.is_output(self.graph, t) for t in tensors)
        freed = np.dtype(self.source.dtype).itemsize if alone else 0
        return math.prod(self.source.shape) * (self.dtype.itemsize - freed)

    def weight(self) -> np.ndarray:
        """The effective weight (alpha included), (out, in / groups, *kernel), in the type of the node. Read-only."""
        weight, alpha = self.unorient(self.stored_weight()), self.factor("alpha")
        return weight if alpha == 1 else (weight.astype(np.float64) * alpha).astype(weight.dtype)

    def magnitudes(self) -> np.ndarray:
        """The largest |W| over the kernel, (groups, out / groups, in / groups)."""
        weight = np.abs(self.weight())
        return weight.reshape(*weight.shape[:2], -1).max(axis=-1).reshape(self.groups, -1, weight.shape[1])

    def stored_weight(self) -> np.ndarray:
        """The weight at the input of the node: after the chain, before alpha."""
        values = read(self.source)
        for node in self.chain:
            values = _apply(node, values)
        return values

    def set_weight(self, weight: np.ndarray) -> None:
        """Replaces the effective weight by an array (out, in / groups, *kernel), cast once to the type of the node.

        Raises DoesNotFit, with nothing changed, where a value is not finite in this type.
        """
        values = np.ascontiguousarray(cast(self.unorient(weight), self.dtype))
        name = f"{self.source.name}_folded"
        self.source = edit.set_constant(self.graph, self.node, self.weight_input, values, name)
        unread = [n for n in reversed(self.chain) if _drop_unread(self.graph, n)]
        self.chain = []
        if unread:
            edit.sweep(self.graph)
        if "alpha" in self.node.attrs:
            self.node.attrs["alpha"] = 1.0

    def bias(self) -> np.ndarray | None:
        """The effective bias (beta included), (out,) in float64; None where the linear has no bias."""
        if self.bias_place is None:
            return None
        node, port = self.bias_place
        values = np.asarray(edit.value(node.inputs[port]), np.float64) * self.factor("beta")
        return np.broadcast_to(values.reshape(-1), (self.channels[0],)).copy()

    def set_bias(self, bias: np.ndarray) -> None:
        """Replaces the effective bias by a vector (out,), or adds a bias. Raises DoesNotFit."""
        values, name = self.shaped_bias(cast(np.asarray(bias), self.dtype)), f"{self.name}_bias"
        if self.takes_bias:
            edit.set_constant(self.graph, *(self.bias_place or (self.node, 2)), values, name)
            if "beta" in self.node.attrs:
                self.node.attrs["beta"] = 1.0
            return
        old = self.node.outputs[0]
        fresh = gs.Variable(free_name(self.graph, f"{old.name}_unbiased"), old.dtype, old.shape)
        edit.set_output(self.node, 0, fresh)
        inputs = [fresh, constant(self.graph, name, values)]
        self.bias_node = gs.Node("Add", name, inputs=inputs, outputs=[old])
        edit.insert_after(self.graph, self.node, self.bias_node)

    def places(self, role: str) -> list[tuple[gs.Node, int, int]]:
        """The constants along the output channels ("out") or input channels ("in"), as (node, input, axis).

        The linear must have no groups. A weight behind a chain first becomes a constant at the node.
        """
        if self.chain:
            self.set_weight(self.weight())
        found = [(self.node, self.weight_input, int(self._stored_as_out_in() != (role == "out")))]
        if role == "out" and self.bias_place is not None:
            node, port = self.bias_place
            shape = node.inputs[port].shape
            if math.prod(shape) > 1:
                found.append((node, port, len(shape) + (self.out_axis if node is self.bias_node else -1)))
        return found

    def rescaled(
        self,
        *,
        out_scale: np.ndarray | float = 1.0,
        out_shift: np.ndarray | float = 0.0,
        in_scale: np.ndarray | float = 1.0,
        in_shift: np.ndarray | float = 0.0,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Weight and bias of out_scale * (W (in_scale * x + in_shift) + b) + out_shift, for ``install``.

        W' = diag(out_scale) W diag(in_scale);  b' = out_scale * (b + W in_shift) + out_shift, computed in float64 and
        cast once. Scales and shifts are vectors over the channels or scalars. The bias is None where the linear has no
        bias and needs none. Raises Refused for an ``in_shift`` on a node that is ``padded``, and DoesNotFit where a
        value is not finite in the type of the node or the whole weight is subnormal in this type.
        """
        outs, ins = self.channels
        alpha, weight = self.factor("alpha"), self.unorient(self.stored_weight())
        a = np.broadcast_to(np.asarray(out_scale, np.float64), (outs,))
        d = np.broadcast_to(np.asarray(in_shift, np.float64), (ins,))
        old = self.bias()
        bias = np.zeros(outs) if old is None else old
        if np.any(d) and self.padded:
            raise Refused(f"a shift does not pass the zero padding of {self.node.op}")
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused
            if np.any(d):
                bias = bias + alpha * self.respond(weight.astype(np.float64), d)
            bias = cast(a * bias + out_shift, self.dtype)
            weight = weight * self.spread_inputs(np.broadcast_to(np.asarray(in_scale, np.float64), (ins,)))
            weight *= (alpha * a).reshape(-1, *[1] * (weight.ndim - 1))
        return cast_weight(weight, self.dtype), bias if old is not None or np.any(bias) else None

    def respond(self, weight: np.ndarray, x: np.ndarray) -> np.ndarray:
        """The response (out,) of ``weight`` (out, in / groups, *kernel) to an input that is x (in,) everywhere."""
        summed = weight.reshape(*weight.shape[:2], -1).sum(axis=-1, dtype=np.float64)
        return (summed * self.spread_inputs(x).reshape(weight.shape[0], -1)).sum(axis=1)

    def install(self, weight: np.ndarray, bias: np.ndarray | None) -> None:
        """Writes the weight and the bias that ``rescaled`` computed."""
        self.set_weight(weight)
        if bias is not None:
            self.set_bias(bias)
        elif "beta" in self.node.attrs:
            self.node.attrs["beta"] = 1.0

    def spread_inputs(self, vector: np.ndarray) -> np.ndarray:
        """A vector over all input channels as an array that broadcasts against (out, in / groups, *kernel)."""
        outs, ins = self.channels
        per_out = np.repeat(vector.reshape(self.groups, ins // self.groups), outs // self.groups, axis=0)
        return per_out.reshape(outs, ins // self.groups, *[1] * len(self.kernel))

    def factor(self, name: str) -> float:
        """The factor "alpha" of the weight or "beta" of the bias."""
        return self.node.attrs.get(name, 1.0) if self.node.op == "Gemm" else 1.0

    def shaped_bias(self, bias: np.ndarray) -> np.ndarray:
        """A vector over the output channels in the shape that the node or the Add behind the node reads."""
        return bias[:, None] if self.out_axis == -2 else bias

    @property
    def takes_bias(self) -> bool:
        """Whether the linear has a bias, or a place for one without a new node."""
        return self.node.op != "MatMul" or self.bias_node is not None

    @property
    def bias_place(self) -> tuple[gs.Node, int] | None:
        """The node that reads the bias, and the input; None where the linear has no bias."""
        if self.bias_node is not None:
            return self.bias_node, edit.constant_input(self.bias_node)
        return (self.node, 2) if self.node.op != "MatMul" and edit.has_input(self.node, 2) else None

    def _stored_shape(self) -> tuple[int, ...]:
        shape = tuple(self.source.shape)
        for node in self.chain:
            if node.op != "Cast":
                shape = _apply(node, np.empty(shape, np.int8)).shape
        return shape

    def _oriented_shape(self) -> tuple[int, ...]:
        shape = self._stored_shape()
        if self.node.op == "ConvTranspose":
            return (shape[1] * self.groups, shape[0] // self.groups, *shape[2:])
        return shape if self._stored_as_out_in() else tuple(reversed(shape))

    def _stored_as_out_in(self) -> bool:
        if self.node.op == "MatMul":
            return self.weight_input == 0
        return self.node.op == "Conv" or bool(self.node.attrs.get("transB", 0))

    def unorient(self, values: np.ndarray) -> np.ndarray:
        """An array (out, in / groups, *kernel) in the layout of the node, or back: the step is its own inverse."""
        if self.node.op != "ConvTranspose":
            return values if self._stored_as_out_in() else values.T
        rows, columns, *kernel = values.shape
        grouped = values.reshape(self.groups, rows // self.groups, columns, *kernel)
        return grouped.swapaxes(1, 2).reshape(self.groups * columns, rows // self.groups, *kernel)


def view(graph: gs.Graph, node: gs.Node) -> Linear:
    """The view of a linear node of ``graph``. Raises Refused with the reason where the node has no view."""
    if not operator(node).weighted:
        own = f"its weight has a form that only {node.op} reads"
        raise Refused(own if operator(node).weights else f"{node.op} is not a linear operator")
    index = 1
    if node.op == "MatMul" and _resolve(node.inputs[0]) and not _resolve(node.inputs[1]):
        index = 0
    resolved = _resolve(node.inputs[index])
    if resolved is None:
        raise _why_not_constant(node, node.inputs[index])
    linear = Linear(graph, node, index, *resolved)
    if not edit.is_float_type(linear.dtype):
        raise Refused(f"its weight is {linear.dtype}, not floating point")
    axes = len(linear._stored_shape())
    if linear.is_conv:
        if axes < 3:
            raise Refused(f"its weight has {axes} axes, expected at least 3")
        linear.groups = int(node.attrs.get("group", 1))
    elif axes != 2:
        raise Refused(f"its weight has {axes} axes, expected 2")
    elif node.op == "Gemm":
        linear.in_axis, linear.out_axis = -2 if node.attrs.get("transA", 0) else -1, -1
    else:
        _complete_matmul(linear)
    if node.op != "MatMul" and edit.has_input(node, 2):
        bias = node.inputs[2]
        if not isinstance(bias, gs.Constant) or not _is_row(bias.shape, linear.channels[0]):
            raise Refused("its bias is not a constant vector over the output channels")
    return linear


def view_beside(graph: gs.Graph, node: gs.Node, verb: str) -> Linear:
    """``view`` for a site beside the node: the reason says that the node "reads", "follows" … the site."""
    try:
        return view(graph, node)
    except Refused as error:
        raise type(error)(f"{node.op} {verb} it, but {error}") from None


def linears(graph: gs.Graph) -> list[Linear]:
    """Every linear node of the graph that has a view, in order."""
    found = []
    for node in graph.nodes:
        with contextlib.suppress(Refused):
            found.append(view(graph, node))
    return found


def cast(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """``values`` in ``dtype``. Raises DoesNotFit where a result is infinite or not a number."""
    with np.errstate(over="ignore", invalid="ignore"):
        out = values.astype(dtype, copy=False)
    if not np.isfinite(out).all():
        finite = values[np.isfinite(values)]
        if finite.size < values.size:
            raise DoesNotFit("a folded value is infinite or not a number")
        raise DoesNotFit(f"a folded value of {np.abs(finite).max():.3g} does not fit {dtype}")
    return out


def cast_weight(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """``cast`` for a weight. Raises DoesNotFit also where the whole weight is subnormal in ``dtype``."""
    peak = max(values.max(initial=0), -values.min(initial=0))
    if 0 < peak < float(ml_dtypes.finfo(dtype).smallest_normal):
        raise DoesNotFit(f"the folded weight, {peak:.3g} at most, is too small for {dtype}")
    return cast(values, dtype)


def _complete_matmul(linear: Linear) -> None:
    size = edit.rank(linear.data)
    if linear.weight_input == 0 and size is None:
        raise Refused("the rank of its input is unknown")
    linear.in_axis = linear.out_axis = -2 if linear.weight_input == 0 and size != 1 else -1
    add = edit.sole_consumer(linear.graph, linear.node.outputs[0])
    if add is not None and add.op == "Add" and edit.is_standard(add) and _is_bias(linear, add):
        linear.bias_node = add


def _is_bias(linear: Linear, add: gs.Node) -> bool:
    """Whether an Add adds a constant vector over the output channels that does not broadcast the result."""
    if add.attrs or not any(isinstance(t, gs.Constant) for t in add.inputs):
        return False
    shape = tuple(add.inputs[edit.constant_input(add)].shape)
    size, channels = edit.rank(linear.data), linear.channels[0]
    if len(shape) > (1 if size is None else size):
        return False
    if linear.out_axis == -2:
        return shape[-2:] == (channels, 1) and _is_row(shape[:-1], channels)
    return shape[-1:] == (channels,) and _is_row(shape, channels)


def _is_row(shape, channels: int) -> bool:
    """Whether an array of this shape holds one value, or one value for each channel along its last axis."""
    return all(d == 1 for d in shape[:-1]) and (not shape or shape[-1] in (1, channels))


def _resolve(tensor: gs.Tensor) -> tuple[gs.Constant, list[gs.Node]] | None:
    """The constant that a tensor is made from, and the nodes in between; None where the tensor is not constant."""
    chain: list[gs.Node] = []
    while not isinstance(tensor, gs.Constant):
        node = edit.producer(tensor)
        if node is None or not (operator(node).copies or operator(node).kind == "transpose"):
            return None
        if not all(isinstance(t, gs.Constant) for t in node.inputs[1:]) or operator(node).random:
            return None
        chain.append(node)
        tensor = node.inputs[0]
    return tensor, chain[::-1]


def _why_not_constant(node: gs.Node, tensor: gs.Tensor) -> Refused:
    source = edit.producer(tensor)
    if (source is not None and source.op == "DequantizeLinear") or codes_behind(source) is not None:
        return Refused("its weight is quantized already")
    if source is not None and source.inputs and all(isinstance(t, gs.Constant) for t in source.inputs):
        return Refused(f"its weight is made at run time by {source.op}, from constants")
    if node.op == "MatMul":
        return TwoActivations("it multiplies two activations")
    return Refused("its weight is computed at run time")


def _apply(node: gs.Node, values: np.ndarray) -> np.ndarray:
    if node.op == "Transpose":
        return values.transpose(node.attrs.get("perm"))
    if node.op == "Cast":
        return values.astype(onnx.helper.tensor_dtype_to_np_dtype(node.attrs["to"]))
    if operator(node).elementwise:
        return values
    if node.op == "Flatten":
        axis = node.attrs.get("axis", 1)
        return values.reshape(math.prod(values.shape[:axis]), math.prod(values.shape[axis:]))
    given = edit.argument(node, 1, "shape" if node.op == "Reshape" else "axes")
    if node.op == "Squeeze":
        return values.squeeze(None if given is None else tuple(map(int, given)))
    sizes = [] if given is None else given.tolist()
    if node.op == "Reshape":
        kept = not node.attrs.get("allowzero", 0)
        return values.reshape([values.shape[i] if d == 0 and kept else d for i, d in enumerate(sizes)])
    return np.expand_dims(values, tuple(sizes))


def _drop_unread(graph: gs.Graph, node: gs.Node) -> bool:
    """Detaches a node whose result has no readers; returns whether it did."""
    if node.outputs[0].outputs or edit.is_output(graph, node.outputs[0]):
        return False
    edit.detach(node)
    return True


def live_linears(graph: gs.Graph) -> list[gs.Node]:
    """The nodes, in order, that multiply by a weight and that an output depends on; some of them have no view."""
    dead: set[int] = set()
    for node in reversed(graph.nodes):
        readers = [reader for tensor in node.outputs for reader in tensor.outputs]
        if all(id(reader) in dead for reader in readers) and not any(edit.is_output(graph, t) for t in node.outputs):
            dead.add(id(node))
    return [node for node in graph.nodes if id(node) not in dead and (operator(node).weighted or _holds_weight(node))]


def _holds_weight(node: gs.Node) -> bool:
    """Whether an operator without a view multiplies by a constant, such as a recurrent cell or packed attention."""
    known = operator(node)
    held = (node.inputs[i] for i in known.weights if edit.has_input(node, i))
    return known.kind != "embedding" and any(isinstance(tensor, gs.Constant) for tensor in held)


def usable(
    graph: gs.Graph, outcome: Outcome, why_not: Callable[[Linear], str | None], says: str = ""
) -> Iterator[Linear]:
    """The live linears for which ``why_not`` gives no reason; refuses all others with ``says`` and the reason.

    ``why_not`` may also raise Refused, or return None for a linear that is left out without a refusal. Nodes that
    ``outcome`` refuses already are left out.
    """
    refused = {one.node for one in outcome.refused}
    for node in live_linears(graph):
        if node.name in refused:
            continue
        with outcome.refusing(node.name, f"{node.op} {says}".strip()):
            linear = view(graph, node)
            if reason := why_not(linear):
                raise Refused(reason)
            if reason is not None:
                yield linear


def blocks(linear: Linear) -> list[tuple[slice, slice]]:
    """(outputs, inputs) of every group of a linear."""
    outs, ins = linear.channels
    a, b = outs // linear.groups, ins // linear.groups
    return [(slice(g * a, g * a + a), slice(g * b, g * b + b)) for g in range(linear.groups)]


GROWTH_LIMIT = 1 << 20  # bytes


def check_growth(linear: Linear) -> None:
    """Raises Refused where a new weight would make the file more than ``GROWTH_LIMIT`` larger."""
    if linear.growth > GROWTH_LIMIT:
        size, cause = f"{linear.growth / 1e6:.1f} MB", "the old one has other readers or takes fewer bytes"
        raise Refused(f"a new weight for {linear.name} would make the file {size} larger ({cause})")


def norm_parameters(node: gs.Node, scale: np.ndarray, shift: np.ndarray) -> list[tuple[int, np.ndarray, str]]:
    """The gamma and beta of a norm whose result is scaled and shifted by (channels,): (input, values, new name).

    The list has a beta where the norm has a beta, or where a shift needs one. Raises DoesNotFit.
    """
    known = operator(node)
    first = known.gamma
    gamma = np.asarray(edit.value(node.inputs[first]))
    changed = [(first, gamma.astype(np.float64) * scale)]
    if known.beta:
        beta = edit.value(node.inputs[first + 1]) if edit.has_input(node, first + 1) else None
        if beta is not None or np.any(shift):
            changed.append((first + 1, (0.0 if beta is None else beta.astype(np.float64)) * scale + shift))
    names = [node.inputs[i].name if edit.has_input(node, i) else f"{node.name}_beta" for i, _ in changed]
    return [(i, cast(values, gamma.dtype), f"{name}_folded") for (i, values), name in zip(changed, names, strict=True)]
