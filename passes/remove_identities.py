"""Nodes that return what they are given, and nodes nobody reads.

    Identity, Dropout at inference, Cast to the same type, Transpose in order, Reshape to the same shape, a whole Slice,
    Pad by nothing, Concat / Sum / Max / Min / Mean of one tensor, x + 0, x - 0, x * 1, x / 1, x ** 1        =  x

Where both ends carry names that callers use (an input that is passed to an output), the node stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from channelfold.passes import edit
from channelfold.passes.base import Context, Outcome, Pass
from channelfold.runtime.graph_io import infer_shapes


@dataclass(frozen=True)
class RemoveIdentities(Pass):
    """Removes nodes that return what they are given, and nodes nobody reads."""

    name: ClassVar[str] = "remove-identities"
    kind: ClassVar[Literal["exact", "calibrated", "lossy"]] = "exact"

    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        infer_shapes(graph)
        outcome = Outcome()
        for node in edit.remove_dead(graph):
            outcome.change(node.name, f"{node.op} was not read by anyone")
        for node in list(graph.nodes):
            data = _passes_on(node, graph)
            if data is None or any(t.outputs or edit.is_output(graph, t) for t in node.outputs[1:]):
                continue
            if edit.bypass(graph, data, [node], node.outputs[0]):
                outcome.change(node.name, f"{node.op} returns its input")
            else:
                outcome.refuse(
                    node.name, f"{node.op} leads from an input to an output of the graph", "named at both ends"
                )
        return outcome


def _passes_on(node: gs.Node, graph: gs.Graph) -> gs.Tensor | None:
    """The input that a node returns unchanged, if it does."""
    if node.domain not in (None, "", "ai.onnx") or not node.inputs or not node.outputs:
        return None
    x, rest = node.inputs[0], node.inputs[1:]
    shape = _static(x)
    if node.op == "Identity":
        return x
    if node.op == "Dropout":
        return x if _is_inference(node, graph) else None
    if node.op == "Cast":
        same = x.dtype is not None and not isinstance(x.dtype, int)
        return x if same and onnx.helper.np_dtype_to_tensor_dtype(np.dtype(x.dtype)) == node.attrs.get("to") else None
    if node.op == "Transpose":
        perm = node.attrs.get("perm")
        return x if perm is not None and list(perm) == sorted(perm) else None
    if node.op in ("Concat", "Sum", "Max", "Min", "Mean"):
        return x if not rest else None
    if node.op in ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand"):
        return x if shape is not None and shape == _static(node.outputs[0]) else None
    if node.op == "Slice":
        return x if _is_whole(node) else None
    if node.op == "Pad":
        pads = edit.value(rest[0]) if rest else node.attrs.get("pads")
        return x if pads is not None and not np.any(pads) else None
    return _neutral(node)


def _static(tensor: gs.Tensor) -> tuple[int, ...] | None:
    if tensor.shape is None or any(not isinstance(d, int) for d in tensor.shape):
        return None
    return tuple(tensor.shape)


def _is_inference(node: gs.Node, graph: gs.Graph) -> bool:
    if graph.opset < 7:
        return bool(node.attrs.get("is_test", 0))
    training = node.inputs[2] if len(node.inputs) > 2 and not node.inputs[2].is_empty() else None
    return training is None or (isinstance(training, gs.Constant) and not np.any(edit.value(training)))


def _is_whole(node: gs.Node) -> bool:
    """Whether a Slice starts at 0, ends past every possible end and takes every element."""
    if len(node.inputs) < 3:
        starts, ends, steps = node.attrs.get("starts"), node.attrs.get("ends"), None
    else:
        starts, ends = edit.value(node.inputs[1]), edit.value(node.inputs[2])
        if len(node.inputs) > 4:
            steps = edit.value(node.inputs[4])
            if steps is None:
                return False
        else:
            steps = None
    if starts is None or ends is None:
        return False
    endless = np.asarray(ends) >= np.iinfo(np.int32).max
    return not np.any(starts) and bool(np.all(endless)) and (steps is None or bool(np.all(np.asarray(steps) == 1)))


def _neutral(node: gs.Node) -> gs.Tensor | None:
    """x of x + 0, 0 + x, x - 0, x * 1, 1 * x, x / 1 and x ** 1, where the constant does not broaden x."""
    idle = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1, "Pow": 1}.get(node.op)
    if idle is None or node.attrs or len(node.inputs) != 2:
        return None
    for index in (1, 0) if node.op in ("Add", "Mul") else (1,):
        constant, x = node.inputs[index], node.inputs[1 - index]
        if not isinstance(constant, gs.Constant) or isinstance(x, gs.Constant):
            continue
        shape, size = tuple(constant.shape), edit.rank(x)
        narrow = not shape or (size is not None and len(shape) <= size and all(d == 1 for d in shape))
        same = x.shape is not None and shape == tuple(x.shape)
        if (narrow or same) and 0 < np.prod(shape) <= 1 << 16 and np.all(edit.value(constant) == idle):
            return x
    return None
