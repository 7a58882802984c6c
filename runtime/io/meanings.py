"""What the values of a model's inputs mean, found in the graph: token ids, masks, positions, the cache of a decoder.

A *cache pair* is an input that holds what the model returned for the tokens before, and the output that returns the
same with the new tokens:

    present = Concat(past, new)                         grows by the new tokens along an axis
    GroupQueryAttention, MultiHeadAttention, Attention  the operator does the same inside
    present = TensorScatter(past, new, positions)       keeps its width; ScatterND and ScatterElements likewise

Identity, Cast and If may stand in between, and the nodes that keep the interface of a cache (``channels.cache``): Mul,
Gather and Pad by constants. Names decide where the graph does not: ``past.0.key`` becomes
``present.0.key``, and ``attention_mask`` is a mask even where the model computes with it in an unusual way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import onnx_graphsurgeon as gs

from channelfold.runtime.io import edit
from channelfold.runtime.io.session import Meaning

# operator: (its input that is the past, its output that is the present, the axis of the tokens)
_CACHED = {
    ("", "Attention"): ((4, 1, 2), (5, 2, 2)),
    ("com.microsoft", "Attention"): ((4, 1, 3),),
    ("com.microsoft", "GroupQueryAttention"): ((3, 1, 2), (4, 2, 2)),
    ("com.microsoft", "MultiHeadAttention"): ((6, 1, 2), (7, 2, 2)),
}
# operator: its input, the table that the input indexes (None: none), and what the input means
_READ: dict[tuple[str, str], tuple[tuple[int, int | None, str], ...]] = {
    ("", "Gather"): ((1, 0, "ids"),),
    ("com.microsoft", "GatherBlockQuantized"): ((1, 0, "ids"),),
    ("com.microsoft", "EmbedLayerNormalization"): ((0, 2, "ids"), (1, 4, "zeros"), (7, None, "mask")),
    ("", "RotaryEmbedding"): ((3, 1, "position"),),
    ("com.microsoft", "RotaryEmbedding"): ((1, 2, "position"),),
    ("", "Cos"): ((0, None, "position"),),
    ("", "If"): ((0, None, "branch"),),
    ("", "TensorScatter"): ((2, None, "past_length"),),
    ("", "Attention"): ((3, None, "mask"), (6, None, "total_length")),
    ("", "Softmax"): ((0, None, "mask"),),
    ("com.microsoft", "Attention"): ((3, None, "mask"),),
    ("com.microsoft", "MultiHeadAttention"): ((4, None, "mask"), (5, None, "mask")),
    ("com.microsoft", "GroupQueryAttention"): (
        (5, None, "last_position"), (6, None, "total_length"), (9, None, "position"),
    ),
}  # fmt: skip
_SAME = {"Identity", "Cast", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Expand", "Transpose", "Slice", "Clip"}
_COMPUTED = _SAME | {
    "Add", "And", "Concat", "CumSum", "Div", "Equal", "Gather", "GatherND", "Greater", "GreaterOrEqual", "Less",
    "LessOrEqual", "MatMul", "Max", "Min", "Mul", "Neg", "Not", "Or", "Pad", "ReduceSum", "ScatterND", "Sub", "Trilu",
    "Where",
}  # fmt: skip
_EXACT = ("ids", "branch", "past_length", "total_length", "last_position")  # said only of the values themselves
_NAMES = (
    (r"token_type|segment_ids", "zeros"),
    (r"position", "position"),
    (r"use_cache_branch", "branch"),
    (r"seqlens_k", "last_position"),
    (r"total_seq", "total_length"),
    (r"past_(seq|len)", "past_length"),
    (r"mask", "mask"),
)
_FLOAT_MASK = r"(^|_)(attention|attn|head|padding)_mask"


def meanings(graph: gs.Graph) -> dict[str, Meaning]:
    """What the inputs of a graph mean, by name; inputs of which nothing is known are left out."""
    found = _caches(graph)
    for tensor in graph.inputs:
        kind = edit.dtype(tensor)
        if tensor.name in found or kind is None or tensor.type != "tensor_type":
            continue
        if kind.kind not in "iub":
            if re.search(_FLOAT_MASK, tensor.name):
                found[tensor.name] = Meaning("mask")
        elif meaning := _meaning(tensor):
            found[tensor.name] = meaning
    return found


def _meaning(tensor: gs.Tensor) -> Meaning | None:
    """What an input of integers or bools means: by its nearest readers, then by its name."""
    uses = list(_uses(tensor))
    tables = [rows for _, rows in uses if rows]
    below = min(tables, default=2)
    named = next((meaning for pattern, meaning in _NAMES if re.search(pattern, tensor.name)), "")
    kinds = {kind for kind, _ in uses}
    if "ids" in kinds and named in ("position", "zeros"):  # they index tables as well
        return Meaning(named, below)
    for kind in (*_EXACT, "position", "mask"):
        if kind in kinds:
            return Meaning(kind, below)
    return Meaning(named, below) if named else None


def _uses(tensor: gs.Tensor) -> Iterator[tuple[str, int]]:
    """(meaning, rows of the table that is indexed or 0) for each reader that says what a tensor means."""
    pending, seen = [(tensor, True)], {id(tensor)}
    while pending:
        here, same = pending.pop()
        for node in edit.consumers(here):
            uses = _READ.get((_domain(node), node.op), ())
            for index, table, kind in uses:
                if len(node.inputs) > index and node.inputs[index] is here and (same or kind not in _EXACT):
                    rows = _rows(node, table) if table is not None else 0
                    if table is None or rows:
                        yield kind, rows
            indexes = node.op == "Gather" and node.inputs[1] is here
            if edit.is_standard(node) and node.op in _COMPUTED and not indexes:
                kept = same and node.op in _SAME and node.inputs[0] is here
                fresh = [out for out in node.outputs if id(out) not in seen]
                seen |= {id(out) for out in fresh}
                pending += [(out, kept) for out in fresh]


def _rows(node: gs.Node, index: int) -> int:
    """The rows of a constant table that a node looks things up in; 0 where there is no such table."""
    axis = int(node.attrs.get("axis", node.attrs.get("gather_axis", 0)))
    if len(node.inputs) <= index or axis:
        return 0
    table = node.inputs[index]
    while (before := edit.producer(table)) is not None and before.op in ("Identity", "Cast", "DequantizeLinear"):
        table = before.inputs[0]
    return int(table.shape[0]) if isinstance(table, gs.Constant) and len(table.shape) > 1 else 0


def cache_pairs(graph: gs.Graph) -> dict[str, str]:
    """The present of every past of which the graph itself says that the one continues the other, by name."""
    return {name: meaning.present for name, meaning in _continued(graph).items()}


def _continued(graph: gs.Graph) -> dict[str, Meaning]:
    inputs = {id(tensor): tensor for tensor in graph.inputs}
    found: dict[str, Meaning] = {}
    for output in graph.outputs:
        for past, axis, width in _pasts(output):
            if id(past) in inputs and past.name not in found and _may_grow(past, axis):
                found[past.name] = Meaning("past", present=output.name, axis=axis, width=width)
    return found


def _caches(graph: gs.Graph) -> dict[str, Meaning]:
    """The meaning of the inputs that are the past of a cache pair."""
    found = _continued(graph)
    presents = {meaning.present for meaning in found.values()}
    others = {t.name: t for t in graph.outputs if t.name not in presents}
    for tensor in graph.inputs:
        name = tensor.name
        if name not in found and "past" in name and edit.is_float(tensor) and tensor.dtype is not None:
            other = next((others[n] for n in _present_names(name) if n in others), None)
            found[name] = Meaning("past", present=other.name if other is not None else "", axis=_unlike(tensor, other))
    return found


def _pasts(tensor: gs.Tensor) -> Iterator[tuple[gs.Tensor, int | None, int | None]]:
    """(tensor, the axis along which it grows or None, its width or None) for each that an output continues."""
    node = edit.producer(tensor)
    if node is None:
        return
    place = next(i for i, out in enumerate(node.outputs) if out is tensor)
    domain = _domain(node)
    if (domain, node.op) in _CACHED:
        for past, present, axis in _CACHED[domain, node.op]:
            if place == present and edit.has_input(node, past):
                yield _source(node.inputs[past]), axis, _head_width(node)
    elif domain:
        return
    elif keeps_interface(node):
        yield from _pasts(node.inputs[0])
    elif node.op == "If":
        for body in (node.attrs["then_branch"], node.attrs["else_branch"]):
            yield from _pasts(body.outputs[place])
    elif node.op == "Concat":
        yield _source(node.inputs[0]), int(node.attrs["axis"]), None
    elif node.op in ("TensorScatter", "ScatterND", "ScatterElements"):
        yield _source(node.inputs[0]), None, None


def _head_width(node: gs.Node) -> int | None:
    """The channels of a head of an attention operator of Microsoft, from those of its queries or of all it packs."""
    heads = int(node.attrs.get("num_heads", 0))
    if not heads or node.op == "Attention":
        return None
    if not edit.has_input(node, 1):
        heads += 2 * int(node.attrs.get("kv_num_heads", heads))
    query = node.inputs[0]
    before = edit.producer(query)
    weights = [t for t in before.inputs if isinstance(t, gs.Constant) and t.shape] if before is not None else []
    known = [query.shape[-1]] if query.shape else [weight.shape[-1] for weight in weights]
    return next((size // heads for size in known if isinstance(size, int)), None)


def _may_grow(past: gs.Tensor, axis: int | None) -> bool:
    """Whether an input can be the past of a cache: its axis is open or its name says so, and not any joined feature."""
    if axis is None or "past" in past.name:
        return True
    return past.shape is not None and len(past.shape) > 2 and not isinstance(past.shape[axis], int)


def _source(tensor: gs.Tensor) -> gs.Tensor:
    while (node := edit.producer(tensor)) is not None and keeps_interface(node):
        tensor = node.inputs[0]
    return tensor


def keeps_interface(node: gs.Node) -> bool:
    """Whether a node may stand between a cache as the model has it and the past or present of the interface."""
    scaled = node.op in ("Mul", "Gather", "Pad") and len(node.inputs) > 1 and isinstance(node.inputs[1], gs.Constant)
    alone = node.op == "Concat" and len(node.inputs) == 1  # of an empty cache, as transformers writes it
    return node.op in ("Identity", "Cast") or scaled or alone


def _present_names(past: str) -> list[str]:
    return [re.sub("past_key_values|past", "present", past), past.replace("past", "present")]


def _unlike(past: gs.Tensor, present: gs.Tensor | None) -> int | None:
    """The axis along which a cache grows by the names of its sizes: the first where past and present differ."""
    if present is None or past.shape is None or present.shape is None or len(past.shape) != len(present.shape):
        return None
    pairs = enumerate(zip(past.shape, present.shape, strict=True))
    return next((axis for axis, (a, b) in pairs if axis and a != b and not isinstance(a, int)), None)


def _domain(node: gs.Node) -> str:
    return "" if edit.is_standard(node) else str(node.domain)
