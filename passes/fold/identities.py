"""Removal of nodes that return their input unchanged, and of nodes whose results are not read.

    Identity, Dropout at inference, Cast to the same type, Transpose in order, Reshape to the same shape, a whole Slice,
    Pad by nothing, Concat / Sum / Max / Min / Mean of one tensor, x + 0, x - 0, x * 1, x / 1, x ** 1,
    x and True, x or False, x xor False        =  x

A node stays where callers use the names of both its input and its output (an input passed to an output). So do gamma
and beta of a norm that are one and zero: runtimes fuse norms that have both.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Outcome
from channelfold.passes.fold import RemoveIdentities
from channelfold.passes.fold.affine import is_normalized
from channelfold.passes.operators import EVERY, operator
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import infer_shapes

_SIZE_LIMIT = 1 << 16  # elements; larger constants are not compared with the neutral value


class Work(RemoveIdentities):
    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        infer_shapes(graph)
        outcome = Outcome()
        for node in edit.remove_dead(graph):
            outcome.change(node.name, f"{node.op} was not read by anyone")
        for node in graph.nodes:
            data = _passed_on(node, graph)
            if data is None or any(t.outputs or edit.is_output(graph, t) for t in node.outputs[1:]):
                continue
            if edit.bypass(graph, data, [node], node.outputs[0]):
                outcome.change(node.name, f"{node.op} returns its input")
            else:
                reason = f"{node.op} passes an input, a constant or an output on to an output, and all keep their names"
                outcome.refuse(node.name, reason, "names at both ends")
        edit.sweep(graph)
        return outcome


def _passed_on(node: gs.Node, graph: gs.Graph) -> gs.Tensor | None:
    """The input that a node returns unchanged, or None."""
    if not edit.is_standard(node) or not node.inputs or not node.outputs:
        return None
    x, op, known = node.inputs[0], node.op, operator(node)
    if op == "Identity":
        same = True
    elif op == "Dropout":
        same = _is_inference(node, graph)
    elif op == "Cast":
        kind = edit.dtype(x)
        same = kind is not None and onnx.helper.np_dtype_to_tensor_dtype(kind) == node.attrs.get("to")
    elif op == "Transpose":
        perm = node.attrs.get("perm")
        same = perm is not None and list(perm) == sorted(perm)
    elif len(node.inputs) == 1 and known.data == EVERY and known.scale:
        same = True
    elif known.kind in ("expand", "reshape"):
        same = _static(x) is not None and _static(x) == _static(node.outputs[0])
    elif op == "Slice":
        same = _is_whole(node)
    elif op == "Pad":
        pads = edit.argument(node, 1, "pads")
        same = pads is not None and not np.any(pads)
    else:
        return _beside_neutral(node)
    return x if same else None


def _static(tensor: gs.Tensor) -> tuple[int, ...] | None:
    shape = tensor.shape
    return tuple(shape) if shape is not None and all(isinstance(d, int) for d in shape) else None


def _is_inference(node: gs.Node, graph: gs.Graph) -> bool:
    if graph.opset < 7:
        return bool(node.attrs.get("is_test", 0))
    return not edit.has_input(node, 2) or edit.scalar(node.inputs[2]) == 0


def _is_whole(node: gs.Node) -> bool:
    """Whether a Slice starts at 0, ends behind every possible end and has steps of 1."""
    starts, ends = edit.argument(node, 1, "starts"), edit.argument(node, 2, "ends")
    if starts is None or ends is None or np.any(starts) or np.any(ends < np.iinfo(np.int32).max):
        return False
    steps = edit.argument(node, 4, "") if edit.has_input(node, 4) else np.ones(1)
    return steps is not None and bool(np.all(steps == 1))


def _beside_neutral(node: gs.Node) -> gs.Tensor | None:
    """x of x + 0, 0 + x, x - 0, x * 1, 1 * x, x / 1, x ** 1, x and True …, where the constant does not broaden x."""
    neutral = operator(node).neutral
    if neutral is None or node.attrs:
        return None
    for index in (1, 0) if node.op in ("Add", "Mul", "And", "Or", "Xor") else (1,):
        constant, x = node.inputs[index], node.inputs[1 - index]
        if not isinstance(constant, gs.Constant) or isinstance(x, gs.Constant):
            continue
        shape, wide = tuple(constant.shape), x.shape or ()
        fits = len(shape) <= len(wide) and all(d in (1, w) for d, w in zip(shape[::-1], wide[::-1], strict=False))
        if (not shape or fits) and 0 < np.prod(shape) <= _SIZE_LIMIT and not (np.prod(shape) > 1 and _is_of_norm(x)):
            return x if np.all(edit.value(constant) == neutral) else None
    return None


def _is_of_norm(x: gs.Tensor) -> bool:
    """Whether what follows a tensor is the gamma or beta of a norm, without which runtimes do not fuse the norm."""
    node = edit.producer(x)
    return is_normalized(x) or (node is not None and node.op == "Mul" and any(map(is_normalized, node.inputs)))
