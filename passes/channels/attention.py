"""Attention operators: the heads in their inputs and outputs, the links of the heads, and the scales that pass them.

    Attention, RotaryEmbedding (opset 23)       (batch, heads, tokens, channels), or (batch, tokens, heads * channels)
    com.microsoft MultiHeadAttention            the latter; or packed as (batch, tokens, heads, 2 or 3, channels)
    com.microsoft Attention                     one weight for all three, (inputs, 3 * heads * channels)
    com.microsoft GroupQueryAttention           queries, keys and values side by side in one tensor, or three tensors

With n times as many query heads as key heads, each key or value head serves n consecutive query heads. A rotary
embedding rotates channels in pairs: i and i + half, or 2 i and 2 i + 1.

*Links.* Heads are cut whole, a key or value head with all query heads that it serves: every channel is linked to the
first channel of its head in the result.

    MultiHeadAttention, 2 heads of 3     [(-1, 2, 0 0 0 3 3 3), (0, 2, 0 1 2 3 4 5)]  and so for keys, values and biases
    GroupQueryAttention, 2 kv heads      [(-1, 2, 0 0 3 3 6 6 9 9), (1, 2, 0 1 0 1 2 3 2 3)]
    Attention with a packed weight       [(-1, 2, 0 0 0 3 3 3), (1, 1, 0 1 2 3 4 5)]  [(-1, 2, 0 0 …), (1, 1, 6 7 …)]

Where the heads have an axis of their own, the same channel of all heads can be cut too. Queries and keys then lose the
same channels, and the scale of the scores stays; values and the result lose the same channels.

*Scales.* Every channel of every head has its own scale; a key or value head shares the scale of a channel with all
query heads that it serves, and the two channels of a rotated pair share one scale.

    softmax(q k^T) v        v' = v / s: the result is divided by s      k' = k / s: q' = q s
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import InBetween, Refused
from channelfold.passes.channels.cache import Caches
from channelfold.passes.channels.maps import Classes, Shape
from channelfold.passes.channels.ports import Ports, Rules
from channelfold.passes.operators import operator
from channelfold.runtime.io import edit


@dataclass(frozen=True)
class Piece:
    """Heads along ``axis`` of ``port``: position ``at[h, c]`` is channel c of head h; (heads, 1) for whole heads."""

    port: int
    axis: int
    at: np.ndarray

    def take(self, index: np.ndarray, shape: Shape) -> np.ndarray:
        """The classes (heads, channels) in an index map of a tensor of this shape."""
        if len(shape) == 4:
            return np.broadcast_to(index, (1, shape[1], 1, shape[3]))[0, :, 0]
        return np.broadcast_to(index, (1, 1, shape[2]))[0, 0][self.at]


@dataclass
class Heads:
    """The heads of an attention operator; ``result`` holds the heads of the first output.

    ``others`` are cut together with the heads and never scaled. ``held`` is the reason why queries, keys and values
    cannot be scaled, or "". The node rotates the first ``rotary`` channels of every query and key head in pairs.
    ``key_caches`` and ``value_caches`` are the pasts and presents, (batch, heads, tokens, channels).
    """

    result: Piece
    queries: Piece | None = None
    keys: Piece | None = None
    values: Piece | None = None
    others: list[Piece] = field(default_factory=list)
    held: str = ""
    rotary: int = 0
    key_caches: list[Piece] = field(default_factory=list)
    value_caches: list[Piece] = field(default_factory=list)

    def pieces(self) -> list[Piece]:
        found = (self.result, self.queries, self.keys, self.values)
        return [*(piece for piece in found if piece is not None), *self.others, *self.key_caches, *self.value_caches]


def heads_of(p: Ports) -> Heads:
    """The heads of an attention operator. Raises Refused, with the reason, where they are not known."""
    if edit.is_standard(p.node):
        return _attention(p)
    rule = {"Attention": _packed_weight, "MultiHeadAttention": _multi_head, "GroupQueryAttention": _grouped}
    return rule[p.node.op](p)


def is_attention(node: gs.Node) -> bool:
    return operator(node).kind in ("attention", "packed_attention")


def rotary(p: Ports) -> tuple[Piece, int, int]:
    """(heads, rotated channels of each head, input that holds the cosines) of a RotaryEmbedding.

    The inputs after x are the cosines, the sines and the positions; com.microsoft has the positions first.
    """
    shape, cosines = p.shape(0), 1 if edit.is_standard(p.node) else 2
    turned = 2 * p.shape(cosines)[-1]
    heads = shape[1] if len(shape) == 4 else p.attribute("num_heads", 0) or shape[2] // turned
    return piece(p, -1, heads), turned, cosines


def partners(p: Ports, channels: int, turned: int) -> np.ndarray:
    """The partner of every channel of a head in a rotary embedding of the first ``turned`` channels."""
    interleaved = p.attribute("interleaved", 0) or p.attribute("rotary_interleaved", 0)
    found = np.arange(channels)
    first = found[:turned]
    found[:turned] = first ^ 1 if interleaved else (first + turned // 2) % turned
    return found


def piece(p: Ports, port: int, heads: int) -> Piece:
    """The heads of a tensor of rank 3 (within its last axis), 4 or 5."""
    shape = p.shape(port)
    if len(shape) == 3:
        return _within(port, 2, heads, 0, shape[2])
    return Piece(port, 2 if len(shape) == 5 else 1, np.arange(heads)[:, None])


def _within(port: int, axis: int, heads: int, start: int, size: int) -> Piece:
    if not heads or size % heads:
        raise Refused("the number of its heads does not divide its channels")
    return Piece(port, axis, np.arange(start, start + size).reshape(heads, -1))


def _present(p: Ports, *found: tuple[int, int]) -> list[Piece]:
    return [piece(p, port, heads) for port, heads in found if p.has(port)]


def _scores(p: Ports, port: int, heads: int) -> list[Piece]:
    """The heads of an input that broadcasts to (batch, heads, tokens, tokens); none where all heads share the input."""
    shape = p.shape(port) if p.has(port) else ()
    return [Piece(port, len(shape) - 3, np.arange(heads)[:, None])] if len(shape) > 2 and shape[-3] > 1 else []


def _held(p: Ports, *ports: int) -> str:
    """Why keys and values cannot be scaled: biases, and the scores as a result, would need the same scale."""
    return f"{p.node.op} has a cache or a bias" if any(map(p.has, (*ports, -4))) else ""


def _attention(p: Ports) -> Heads:
    apart = len(p.shape(0)) == 4
    heads = p.shape(0)[1] if apart else p.attribute("q_num_heads", 0)
    kv = p.shape(1)[1] if apart else p.attribute("kv_num_heads", 0)
    others = _present(p, (-4, heads)) + _scores(p, 3, heads)
    caches = _present(p, (4, kv), (-2, kv)), _present(p, (5, kv), (-3, kv))
    found = piece(p, -1, heads), piece(p, 0, heads), piece(p, 1, kv), piece(p, 2, kv)
    return Heads(*found, others, _held(p), 0, *caches)


def _multi_head(p: Ports) -> Heads:
    heads = p.attribute("num_heads", 0)
    others = _present(p, (-4, heads)) + _scores(p, 5, heads)
    caches = _present(p, (6, heads), (-2, heads)), _present(p, (7, heads), (-3, heads))
    if p.has(3):
        (size,), values = p.shape(3), p.shape(-1)[2]
        keys = (size - values) // 2
        others += [_within(3, 0, heads, *part) for part in ((0, keys), (keys, keys), (2 * keys, values))]
    queries, keys, values = (piece(p, port, heads) if p.has(port) else None for port in range(3))
    packed = any(p.has(port) and len(p.shape(port)) != 3 for port in range(3))
    held = f"{p.node.op} packs its inputs" if packed else _held(p, 3)
    return Heads(piece(p, -1, heads), queries, keys, values, others, held, 0, *caches)


def _packed_weight(p: Ports) -> Heads:
    heads, width = p.attribute("num_heads", 0), p.shape(1)[1]
    sizes = p.node.attrs.get("qkv_hidden_sizes") or [width // 3] * 3
    others = _present(p, (4, heads), (-2, heads)) + _scores(p, 5, heads)
    for port, axis in ((1, 1), (2, 0)):
        starts = np.cumsum([0, *sizes]).tolist()
        found = (_within(port, axis, heads, *part) for part in zip(starts, sizes, strict=False))
        others += found if p.has(port) else ()
    held = f"{p.node.op} holds the weights of its queries, keys and values"
    return Heads(piece(p, -1, heads), others=others, held=held)


def _grouped(p: Ports) -> Heads:
    heads, kv = p.attribute("num_heads", 0), p.attribute("kv_num_heads", 0)
    if p.has(12) or p.has(13):
        raise InBetween(f"{p.node.op} with a quantized cache")
    others = _present(p, (-4, heads)) + _scores(p, 10, heads)
    caches = _present(p, (3, kv), (-2, kv)), _present(p, (4, kv), (-3, kv))
    if p.has(11):
        others.append(Piece(11, 0, np.arange(heads)[:, None]))
    if p.has(1):
        queries, keys, values = piece(p, 0, heads), piece(p, 1, kv), piece(p, 2, kv)
    else:
        each = p.shape(0)[2] // (heads + 2 * kv)
        placed = ((0, heads), (heads, kv), (heads + kv, kv))
        queries, keys, values = (_within(0, 2, n, each * start, each * n) for start, n in placed)
    turned = 2 * p.shape(7)[-1] if p.attribute("do_rotary", 0) else 0
    held = _held(p) or (f"{p.node.op} norms its queries and keys" if p.has(14) or p.has(15) else "")
    return Heads(piece(p, -1, heads), queries, keys, values, others, held, turned, *caches)


# ---- links -----------------------------------------------------------------------------------------------------------


def _links(p: Ports) -> None:
    _whole_heads(p, heads_of(p))
    if edit.is_standard(p.node):
        if len(p.shape(0)) == 4:
            p.link((0, 3), (1, 3), summed=True)
            p.link((1, 3), (4, 3), (-2, 3))
            p.link((2, 3), (-1, 3), (5, 3), (-3, 3))
            p.edit("scale", 0, 0, 3)
    elif p.node.op == "Attention":
        p.link((0, 2), (1, 0), summed=True)


def _whole_heads(p: Ports, heads: Heads) -> None:
    result = heads.result
    for part in heads.pieces():
        at = part.at.repeat(len(result.at) // len(part.at), axis=0)
        first = np.broadcast_to(result.at[:, :1], at.shape)
        p.link((result.port, result.axis, first.reshape(-1)), (part.port, part.axis, at.reshape(-1)))
    p.edit("heads", 0, result.port, result.axis)


def _rotary(p: Ports) -> None:
    result, turned, cosines = rotary(p)
    shape = p.shape(0)
    _whole_heads(p, Heads(result, replace(result, port=0)))
    if len(shape) == 4:
        pairs = partners(p, shape[3], turned)
        p.link((0, 3), (-1, 3))
        p.link((0, 3), (0, 3, pairs))
        if turned < shape[3] or p.attribute("rotary_embedding_dim", 0):
            p.block(3, f"{p.node.op} says how many channels it turns")
            return
        half = np.unique(np.minimum(np.arange(turned), pairs), return_inverse=True)[1]
        for port in (cosines, cosines + 1):
            p.link((-1, 3), (port, -1, half))


RULES: Rules = {"attention": _links, "packed_attention": _links, "rotary": _rotary}


# ---- scales ----------------------------------------------------------------------------------------------------------


def ties_scores(p: Ports, tensor: gs.Tensor) -> bool:
    """Whether an attention operator ties a tensor to its queries and keys, and not to its values."""
    heads = heads_of(p)
    found = [piece for piece in (heads.queries, heads.keys, *heads.key_caches) if piece is not None]
    return (
        heads.values is not None
        and tensor is not p.tensor(heads.values.port)
        and any(p.tensor(piece.port) is tensor for piece in found)
    )


def attended(
    classes: Classes, p: Ports, tensor: gs.Tensor, index: np.ndarray, caches: Caches
) -> list[tuple[gs.Tensor, np.ndarray]]:
    """The maps of the tensors that an attention operator ties to one of its inputs or to its result. Raises Refused."""
    heads, result = heads_of(p), p.node.outputs[0]
    queries, keys, values = heads.queries, heads.keys, heads.values
    if heads.held or queries is None or keys is None or values is None:
        raise Refused(heads.held or f"{p.node.op} reads it")
    cached = {id(p.tensor(part.port)): p.tensor(part.port) for part in (*heads.key_caches, *heads.value_caches)}
    if not all(map(caches.owns_inside, cached.values())):
        raise Refused(caches.why(f"{p.node.op} has a cache or a bias", *cached.values()))
    if any(size > 1 for axis, size in enumerate(index.shape) if axis in (0, index.ndim - 2)):
        raise Refused(f"{p.node.op} does not keep its channels apart")
    ends = {id(p.tensor(part.port)): part for part in (queries, keys, values, heads.result)}
    if id(tensor) not in ends | cached:
        later = any(tensor is other for other in p.node.outputs)
        raise Refused(f"it is a second output of {p.node.op}" if later else f"{p.node.op} reads it")
    moves: list[tuple[gs.Tensor, np.ndarray]] = []
    maps = {id(tensor): index}
    of_values = tensor is result or any(p.tensor(part.port) is tensor for part in heads.value_caches)
    port = values.port if of_values else keys.port
    source, shape = p.tensor(port), p.shape(port)
    if of_values or id(tensor) in cached or tensor is p.tensor(queries.port) is not source:
        wide = [1 if axis in (0, len(shape) - 2) else size for axis, size in enumerate(shape)]
        maps[id(source)] = classes.fresh(wide)
        moves.append((source, maps[id(source)]))
    tied = [(keys, part, 1) for part in heads.key_caches] + [(keys, queries, -1)]
    tied += [(values, part, 1) for part in (*heads.value_caches, heads.result)]
    for before, after, sign in tied:
        if id(p.tensor(before.port)) not in maps:
            continue
        rows = before.take(maps[id(p.tensor(before.port))], p.shape(before.port))
        if heads.rotary and before is keys:
            classes.merge(rows, rows[:, partners(p, rows.shape[1], heads.rotary)])
        rows = sign * rows.repeat(len(after.at) // len(before.at), axis=0)
        target, shape = p.tensor(after.port), p.shape(after.port)
        if id(target) in maps:
            classes.merge(after.take(maps[id(target)], shape), rows)
        else:
            moves.append((target, rows[None, :, None] if len(shape) == 4 else rows.reshape(1, 1, -1)))
    return moves


def turned(classes: Classes, p: Ports, index: np.ndarray) -> None:
    """Merges the classes of the two channels of each pair of a RotaryEmbedding."""
    result, channels, _ = rotary(p)
    if any(size > 1 for axis, size in enumerate(index.shape) if axis in (0, index.ndim - 2)):
        raise Refused(f"{p.node.op} does not keep its channels apart")
    rows = result.take(index, p.shape(0))
    classes.merge(rows, rows[:, partners(p, rows.shape[1], channels)])
