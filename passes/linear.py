"""One view over every linear node: y = W x + b, with W as (out, in / groups, *kernel).

    Conv            W[o, i, *k] as stored
    ConvTranspose   stored [i, o / groups, *k]
    Gemm            stored [i, o], or [o, i] with transB; alpha belongs to W, beta to b
    MatMul          X W: stored [i, o]; W X: stored [o, i]; b is the constant Add that follows

The weight may lie behind Transpose, Cast, Identity, Reshape, Squeeze and Unsqueeze nodes. Reading applies them; writing
puts a new constant at the node itself whenever someone else also uses the old one (copy on write) or a chain is in
between, so a shared weight is never changed under another reader.

Worked example: ``Transpose(E) -> MatMul(x, ·)`` with the embedding E [vocabulary, width] also read by a Gather. The
view's weight is E itself, (out=vocabulary, in=width); ``set_weight`` gives the MatMul a constant of its own, and the
Gather keeps E.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from channelfold.passes import edit
from channelfold.runtime.graph_io import constant, free_name, stored

LINEAR_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_SEEN_THROUGH = ("Transpose", "Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze")


class NotLinear(ValueError):
    """Why a node has no view; the text is the reason of a refusal."""


@dataclass
class Linear:
    """A linear node with a constant weight.

    ``data`` is the activation it reads, ``in_axis`` the axis of its channels; ``output`` is the tensor after the bias
    and ``out_axis`` the axis of its channels (negative axes count from the end).
    """

    graph: gs.Graph
    node: gs.Node
    weight_input: int
    source: gs.Constant
    chain: list[gs.Node]
    groups: int
    in_axis: int
    out_axis: int
    bias_node: gs.Node | None

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def data(self) -> gs.Tensor:
        return self.node.inputs[1 - self.weight_input]

    @property
    def output(self) -> gs.Tensor:
        return (self.bias_node or self.node).outputs[0]

    @property
    def is_conv(self) -> bool:
        return self.node.op in ("Conv", "ConvTranspose")

    @property
    def dtype(self) -> np.dtype:
        """The type the node computes in."""
        for cast in reversed(self.chain):
            if cast.op == "Cast":
                return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(cast.attrs["to"]))
        return np.dtype(self.source.dtype)

    @property
    def channels(self) -> tuple[int, int]:
        """(output channels, input channels)."""
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
        """Whether the node reads zeros beyond the edge of its input, so that a constant shift changes its border."""
        attrs = self.node.attrs
        if self.node.op == "ConvTranspose":
            return True
        if self.node.op != "Conv":
            return False
        return any(attrs.get("pads") or ()) or attrs.get("auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER")

    def weight(self) -> np.ndarray:
        """The effective weight (alpha included), (out, in / groups, *kernel), in the type it is stored in."""
        return self._orient(self.stored_weight()) * self._factor("alpha")

    def stored_weight(self) -> np.ndarray:
        """The weight as the node's input sees it: after the chain, before alpha."""
        values = edit.read(self.source)
        for node in self.chain:
            values = _apply(node, values)
        return values

    def set_weight(self, weight: np.ndarray) -> None:
        """Replaces the effective weight by an array (out, in / groups, *kernel), cast once to the node's type.

        Raises OverflowError, with nothing changed, when a finite value does not fit that type.
        """
        values = cast(self._unorient(weight), self.dtype)
        tensor = self.node.inputs[self.weight_input]
        if self.chain or len(tensor.outputs) != 1 or edit.is_output(self.graph, tensor):
            tensor = constant(self.graph, f"{self.source.name}_folded", values)
            edit.set_input(self.node, self.weight_input, tensor)
            self.source, self.chain = tensor, []
        else:
            tensor.values = stored(self.graph, values, tensor.name)
        if "alpha" in self.node.attrs:
            self.node.attrs["alpha"] = 1.0

    def bias(self) -> np.ndarray | None:
        """The effective bias (beta included), (out,); None when there is none."""
        tensor = self._bias_tensor()
        if tensor is None:
            return None
        values = np.asarray(edit.read(tensor), np.float64) * self._factor("beta")
        return np.broadcast_to(values.reshape(-1), (self.channels[0],)).copy()

    def set_bias(self, bias: np.ndarray) -> None:
        """Replaces the effective bias by a vector (out,), adding one where there was none. Raises OverflowError."""
        values = cast(np.asarray(bias), self.dtype)
        name = f"{self.name}_bias"
        if self.node.op != "MatMul":
            edit.set_input(self.node, 2, constant(self.graph, name, values))
            if "beta" in self.node.attrs:
                self.node.attrs["beta"] = 1.0
            return
        if self.out_axis == -2:
            values = values[:, None]
        tensor = constant(self.graph, name, values)
        if self.bias_node is not None:
            edit.set_input(self.bias_node, _constant_index(self.bias_node), tensor)
            return
        old = self.node.outputs[0]
        fresh = gs.Variable(free_name(self.graph, f"{old.name}_unbiased"), old.dtype, old.shape)
        edit.set_output(self.node, 0, fresh)
        self.bias_node = gs.Node("Add", f"{self.name}_bias", inputs=[fresh, tensor], outputs=[old])
        edit.insert_after(self.graph, self.node, self.bias_node)

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
        cast once. Scales and shifts are vectors over the channels or scalars. Raises NotLinear for an ``in_shift`` on a
        node that is ``padded``, OverflowError when a value does not fit the node's type.
        """
        outs, ins = self.channels
        weight = self.weight().astype(np.float64)
        a = np.broadcast_to(np.asarray(out_scale, np.float64), (outs,))
        d = np.broadcast_to(np.asarray(in_shift, np.float64), (ins,))
        old = self.bias()
        bias = np.zeros(outs) if old is None else old
        if np.any(d):
            if self.padded:
                raise NotLinear("a shift does not pass zero padding")
            bias = bias + (weight * self._spread_inputs(d)).reshape(outs, -1).sum(1)
        bias = a * bias + out_shift
        weight *= self._spread_inputs(np.broadcast_to(np.asarray(in_scale, np.float64), (ins,)))
        weight *= a.reshape(-1, *[1] * (weight.ndim - 1))
        needed = old is not None or np.any(bias)
        return cast(weight, self.dtype), cast(bias, self.dtype) if needed else None

    def install(self, weight: np.ndarray, bias: np.ndarray | None) -> None:
        """Writes what ``rescaled`` computed."""
        self.set_weight(weight)
        if bias is not None:
            self.set_bias(bias)

    def _spread_inputs(self, vector: np.ndarray) -> np.ndarray:
        """A vector over all input channels as an array that broadcasts against (out, in / groups, *kernel)."""
        outs, ins = self.channels
        per_out = np.repeat(vector.reshape(self.groups, ins // self.groups), outs // self.groups, axis=0)
        return per_out.reshape(outs, ins // self.groups, *[1] * len(self.kernel))

    def _factor(self, name: str) -> float:
        return self.node.attrs.get(name, 1.0) if self.node.op == "Gemm" else 1

    def _bias_tensor(self) -> gs.Constant | None:
        if self.bias_node is not None:
            return self.bias_node.inputs[_constant_index(self.bias_node)]
        if self.node.op == "MatMul" or len(self.node.inputs) < 3 or self.node.inputs[2].is_empty():
            return None
        return self.node.inputs[2]

    def _oriented_shape(self) -> tuple[int, ...]:
        shape = tuple(self.source.shape)
        for node in self.chain:
            shape = _apply(node, np.lib.stride_tricks.as_strided(np.empty(1, np.int8), shape, [0] * len(shape))).shape
        if self.node.op == "ConvTranspose":
            return (shape[1] * self.groups, shape[0] // self.groups, *shape[2:])
        return shape if self._stored_as_out_in() else tuple(reversed(shape))

    def _stored_as_out_in(self) -> bool:
        if self.node.op == "MatMul":
            return self.weight_input == 0
        return self.node.op == "Conv" or bool(self.node.attrs.get("transB", 0))

    def _orient(self, values: np.ndarray) -> np.ndarray:
        if self.node.op == "ConvTranspose":
            ins, outs, *kernel = values.shape
            grouped = values.reshape(self.groups, ins // self.groups, outs, *kernel)
            return grouped.swapaxes(1, 2).reshape(self.groups * outs, ins // self.groups, *kernel)
        return values if self._stored_as_out_in() else values.T

    def _unorient(self, values: np.ndarray) -> np.ndarray:
        if self.node.op == "ConvTranspose":
            outs, ins, *kernel = values.shape
            grouped = values.reshape(self.groups, outs // self.groups, ins, *kernel)
            return grouped.swapaxes(1, 2).reshape(self.groups * ins, outs // self.groups, *kernel)
        return values if self._stored_as_out_in() else values.T


def view(graph: gs.Graph, node: gs.Node) -> Linear:
    """The view of a linear node of ``graph``. Raises NotLinear with the reason when it has none."""
    if node.op not in LINEAR_OPS or node.domain not in (None, "", "ai.onnx"):
        raise NotLinear(f"{node.op} is not a linear operator")
    index = 1
    if node.op == "MatMul" and _resolve(node.inputs[0]) and not _resolve(node.inputs[1]):
        index = 0
    resolved = _resolve(node.inputs[index])
    if resolved is None:
        raise NotLinear(_why_not_constant(node.inputs[index]))
    source, chain = resolved
    linear = Linear(graph, node, index, source, chain, int(node.attrs.get("group", 1)), 1, 1, None)
    if not edit.is_float(source) and linear.dtype.kind != "f":
        raise NotLinear(f"its weight is {source.dtype}, not floating point")
    stored_rank = len(linear.stored_weight().shape) if chain else len(source.shape)
    if node.op in ("Gemm", "MatMul"):
        _complete_matmul(linear, stored_rank)
    elif stored_rank < 3:
        raise NotLinear(f"its weight has {stored_rank} axes, expected at least 3")
    bias = linear._bias_tensor()
    if bias is not None and (
        not isinstance(bias, gs.Constant) or int(np.prod(bias.shape)) not in (1, linear.channels[0])
    ):
        raise NotLinear("its bias is not a constant vector over the output channels")
    return linear


def linears(graph: gs.Graph) -> list[Linear]:
    """Every linear node of the graph that has a view, in order."""
    found = []
    for node in graph.nodes:
        try:
            found.append(view(graph, node))
        except NotLinear:
            continue
    return found


def cast(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """``values`` in ``dtype``. Raises OverflowError when a finite value becomes infinite."""
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore"):
        out = values.astype(dtype)
    if np.isinf(out).any() and not np.isinf(values).any():
        raise OverflowError(f"a folded value of {np.abs(values).max():.3g} does not fit {dtype}")
    return out


def _complete_matmul(linear: Linear, stored_rank: int) -> None:
    node = linear.node
    if stored_rank != 2:
        raise NotLinear(f"its weight has {stored_rank} axes, expected 2")
    if node.op == "Gemm":
        linear.in_axis = -2 if node.attrs.get("transA", 0) else -1
        linear.out_axis = -1
        return
    linear.in_axis = linear.out_axis = -1 if linear.weight_input == 1 else -2
    add = edit.sole_consumer(linear.graph, node.outputs[0])
    if add is not None and add.op == "Add" and any(add is n for n in linear.graph.nodes) and _is_bias(linear, add):
        linear.bias_node = add


def _is_bias(linear: Linear, add: gs.Node) -> bool:
    """Whether an Add adds a constant vector over the output channels and nothing larger."""
    if add.attrs or not any(isinstance(t, gs.Constant) for t in add.inputs):
        return False
    shape = tuple(add.inputs[_constant_index(add)].shape)
    outs = linear.channels[0]
    data_rank = edit.rank(linear.data)
    if data_rank is not None and len(shape) > data_rank:
        return False
    if linear.out_axis == -2:
        return len(shape) >= 2 and shape[-2:] == (outs, 1) and all(d == 1 for d in shape[:-2])
    return (
        len(shape) >= 1
        and shape[-1] == outs
        and all(d == 1 for d in shape[:-1])
        and (len(shape) == 1 or data_rank is not None)
    )


def _constant_index(node: gs.Node) -> int:
    return next(i for i, t in enumerate(node.inputs) if isinstance(t, gs.Constant))


def _resolve(tensor: gs.Tensor) -> tuple[gs.Constant, list[gs.Node]] | None:
    """The constant a tensor is made from, and the nodes from it to the tensor; None when it is not constant."""
    chain: list[gs.Node] = []
    while not isinstance(tensor, gs.Constant):
        node = edit.producer(tensor)
        if node is None or node.op not in _SEEN_THROUGH or not node.inputs:
            return None
        if not all(isinstance(t, gs.Constant) for t in node.inputs[1:]):
            return None
        chain.append(node)
        tensor = node.inputs[0]
    return tensor, chain[::-1]


def _why_not_constant(tensor: gs.Tensor) -> str:
    node = edit.producer(tensor)
    if node is not None and node.op == "DequantizeLinear":
        return "its weight is quantized already"
    return "its weight is computed at run time"


def _apply(node: gs.Node, values: np.ndarray) -> np.ndarray:
    if node.op == "Transpose":
        return values.transpose(node.attrs.get("perm"))
    if node.op == "Cast":
        return values.astype(onnx.helper.tensor_dtype_to_np_dtype(node.attrs["to"]))
    if node.op == "Identity":
        return values
    arguments = edit.value(node.inputs[1]) if len(node.inputs) > 1 else node.attrs.get("axes")
    if node.op == "Reshape":
        shape = [
            values.shape[i] if d == 0 and not node.attrs.get("allowzero") else int(d) for i, d in enumerate(arguments)
        ]
        return values.reshape(shape)
    axes = None if arguments is None else tuple(int(a) for a in np.asarray(arguments).reshape(-1))
    return values.squeeze(axes) if node.op == "Squeeze" else np.expand_dims(values, axes)
