"""Pairs of nodes that move or convert elements, merged into one node or none.

    Transpose(Transpose(x, p), q)               =  Transpose(x, p[q])
    Unsqueeze(Unsqueeze(x, 0), 1)               =  Unsqueeze(x, [0, 1])
    Squeeze(Reshape(x)), Flatten(Squeeze(x)) …  =  Reshape(x)
    Cast(Cast(x, float32), int64)               =  Cast(x, int64)           for x in float16, bfloat16, int16 …
    Concat(Concat(a, b), c)                     =  Concat(a, b, c)          along one axis
    Slice(Slice(x, 1:7), axis 2, 3:)            =  Slice(x, axes 1 and 2)   along different axes

Nothing remains of a pair that ends as it began. The first Cast of two must lose nothing: a pair that rounds stays. The
result has to have one shape for all inputs, known by ``symbolic``, or sizes that a constant Reshape can leave open.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Outcome
from channelfold.passes.fold import MergeMoves
from channelfold.passes.fold.shapes import reshape_to
from channelfold.passes.fold.symbolic import Sizes
from channelfold.passes.operators import operator
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import constant, infer_shapes


class Work(MergeMoves):
    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        infer_shapes(graph)
        outcome, sizes = Outcome(), Sizes(graph)
        for node in graph.nodes:
            while node.outputs and (before := _merged(graph, sizes, node)) is not None:
                what = "is one with" if node.outputs else "cancels"
                outcome.change(node.name, f"{node.op} {what} {before.op} {before.name}")
                if not before.outputs[0].outputs and not edit.is_output(graph, before.outputs[0]):
                    edit.detach(before)
        edit.sweep(graph)
        return outcome


def _merged(graph: gs.Graph, sizes: Sizes, node: gs.Node) -> gs.Node | None:
    """Merges a node with one in front of it, and returns that one; None where there is none to merge with."""
    for tensor in node.inputs[: len(node.inputs) if node.op == "Concat" else 1]:
        before = edit.producer(tensor)
        if before is not None and _move(before) == _move(node) != "":
            alone = edit.sole_consumer(graph, tensor) is node
            if _cancel(graph, sizes, before, node) or (alone and _merge(graph, sizes, before, node)):
                return before
    return None


def _move(node: gs.Node) -> str:
    """What kind of move a node is; nodes of one kind may merge."""
    kind = "cast" if node.op == "Cast" else operator(node).kind
    return kind if kind in ("transpose", "reshape", "slice", "concat", "cast") and edit.is_standard(node) else ""


def _cancel(graph: gs.Graph, sizes: Sizes, before: gs.Node, node: gs.Node) -> bool:
    """Removes a node that undoes what the one before does."""
    x, y = before.inputs[0], node.outputs[0]
    if node.op == "Transpose":
        perm = _perm(before, node)
        undone = perm is not None and perm == sorted(perm)
    elif node.op == "Cast":
        undone = _is_exact(before) and edit.dtype(x) == _kind(node)
    else:
        undone = operator(node).kind == "reshape" and sizes.shape(x) is not None and sizes.shape(x) == sizes.shape(y)
    return undone and not isinstance(x, gs.Constant) and edit.bypass(graph, x, [node], y)


def _merge(graph: gs.Graph, sizes: Sizes, before: gs.Node, node: gs.Node) -> bool:
    """Makes a node do what the one before does, too."""
    x = before.inputs[0]
    if node.op == "Transpose":
        perm = _perm(before, node)
        if perm is None:
            return False
        node.attrs["perm"] = perm
    elif node.op == "Cast":
        if not _is_exact(before):
            return False
    elif node.op == "Concat":
        return _join(before, node)
    elif node.op == "Slice":
        return _cut(graph, sizes, before, node)
    else:
        return _reshape(graph, sizes, before, node)
    edit.set_input(node, 0, x)
    return True


def _perm(before: gs.Node, node: gs.Node) -> list[int] | None:
    """The order of the axes after two Transpose nodes."""
    first, second = before.attrs.get("perm"), node.attrs.get("perm")
    if first is None and second is None and edit.rank(before.inputs[0]) is None:
        return None
    backwards = list(reversed(range(len(first or second or before.inputs[0].shape or ()))))
    first, second = first or backwards, second or backwards
    return [first[axis] for axis in second]


def _kind(node: gs.Node) -> np.dtype:
    to = node.attrs["to"]
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(to) if isinstance(to, int) else to)


def _is_exact(node: gs.Node) -> bool:
    """Whether a Cast keeps every value of its type."""
    kind, to = edit.dtype(node.inputs[0]), _kind(node)
    if kind is None or (kind.kind not in "biuf" and kind != ml_dtypes.bfloat16):
        return False
    if kind == ml_dtypes.bfloat16:
        return to in (np.float32, np.float64)
    if to.kind not in "biuf" or (kind.kind in "iu" and kind.itemsize == 8 and to.kind == "f"):
        return False  # 64 bits of an integer do not fit any float
    return bool(np.can_cast(kind, to, "safe"))


def _join(before: gs.Node, node: gs.Node) -> bool:
    if before.attrs.get("axis") != node.attrs.get("axis"):
        return False
    inputs = [t for other in node.inputs for t in (before.inputs if other is before.outputs[0] else [other])]
    attrs = node.attrs
    edit.rewrite(node, "Concat", inputs)
    node.attrs.update(attrs)
    return True


def _cut(graph: gs.Graph, sizes: Sizes, before: gs.Node, node: gs.Node) -> bool:
    """Lets a Slice cut along the axes of the Slice before, too."""
    x, name, shape = before.inputs[0], node.outputs[0].name, sizes.shape(before.inputs[0])
    first, second = sizes.parts(before), sizes.parts(node)
    if shape is None or not first or not second or graph.opset < 10:
        return False
    axes, starts, ends, steps = zip(*first, *second, strict=True)
    ends = [end.known for end in ends if end is not None]
    if len({axis % len(shape) for axis in axes}) < len(axes) or None in ends or len(ends) < len(axes):
        return False
    columns = {"starts": starts, "ends": ends, "axes": axes, "steps": steps}
    made = [constant(graph, f"{name}_{what}", np.array(column, np.int64)) for what, column in columns.items()]
    edit.rewrite(node, "Slice", [x, *made])
    return True


def _reshape(graph: gs.Graph, sizes: Sizes, before: gs.Node, node: gs.Node) -> bool:
    x, y = before.inputs[0], node.outputs[0]
    given, made = sizes.shape(x), sizes.shape(y)
    if given is None or made is None:
        return False
    axes = _axes(before, node, max(len(given), len(made)))
    if axes is not None:
        if graph.opset < 13:
            node.attrs["axes"] = axes
        else:
            edit.set_input(node, 1, constant(graph, f"{y.name}_axes", np.array(axes, np.int64)))
        edit.set_input(node, 0, x)
        return True
    shape = edit.argument(node, 1, "") if node.op == "Reshape" else None
    inferred = list(shape).index(-1) if shape is not None and -1 in shape else None
    wanted = reshape_to(given, made, inferred)
    if wanted is None or graph.opset < 5:
        return False
    edit.rewrite(node, "Reshape", [x, constant(graph, f"{y.name}_shape", np.array(wanted, np.int64))])
    return True


def _axes(before: gs.Node, node: gs.Node, rank: int) -> list[int] | None:
    """The axes, of ``rank``, that two Unsqueeze or two Squeeze nodes add or remove; None for other nodes."""
    if before.op != node.op or node.op not in ("Unsqueeze", "Squeeze"):
        return None
    few, all_of_them = (before, node) if node.op == "Unsqueeze" else (node, before)
    inner, outer = (edit.argument(n, 1, "axes") for n in (few, all_of_them))
    if inner is None or outer is None:
        return None
    gone = [int(axis) % rank for axis in outer]
    left = [axis for axis in range(rank) if axis not in gone]
    return sorted([*gone, *(left[int(axis)] for axis in inner)])
