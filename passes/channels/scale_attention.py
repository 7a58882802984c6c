"""Scales at attention: values pass their scale on to the result, and queries take the inverse scale of their keys.

    softmax(q k^T) v        v' = v / s: the result is divided by s      k' = k / s: q' = q s

Every channel of every head has its own scale. A key or value head shares the scale of a channel with all query heads
that the head serves. A rotary embedding rotates channels in pairs; the two channels of a pair share one scale.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Refused
from channelfold.passes.channels.attention import heads_of, partners, rotary
from channelfold.passes.channels.maps import Classes
from channelfold.passes.channels.ports import Ports


def attended(classes: Classes, p: Ports, tensor: gs.Tensor, index: np.ndarray) -> list[tuple[gs.Tensor, np.ndarray]]:
    """The maps of the tensors that an attention operator ties to one of its inputs or to its result. Raises Refused."""
    heads, result = heads_of(p), p.node.outputs[0]
    queries, keys, values = heads.queries, heads.keys, heads.values
    if heads.held or queries is None or keys is None or values is None:
        raise Refused(heads.held or f"{p.node.op} reads it")
    if any(size > 1 for axis, size in enumerate(index.shape) if axis in (0, index.ndim - 2)):
        raise Refused(f"{p.node.op} does not keep its channels apart")
    ends = {id(p.tensor(part.port)): part for part in (queries, keys, values, heads.result)}
    if id(tensor) not in ends:
        later = any(tensor is other for other in p.node.outputs)
        raise Refused(f"it is a second output of {p.node.op}" if later else f"{p.node.op} reads it")
    moves: list[tuple[gs.Tensor, np.ndarray]] = []
    maps = {id(tensor): index}
    port = values.port if tensor is result else keys.port
    source, shape = p.tensor(port), p.shape(port)
    if tensor is result or tensor is p.tensor(queries.port) is not source:
        wide = [1 if axis in (0, len(shape) - 2) else size for axis, size in enumerate(shape)]
        maps[id(source)] = classes.fresh(wide)
        moves.append((source, maps[id(source)]))
    for before, after, sign in ((keys, queries, -1), (values, heads.result, 1)):
        if id(p.tensor(before.port)) not in maps:
            continue
        rows = before.take(maps[id(p.tensor(before.port))], p.shape(before.port))
        if heads.rotary and sign < 0:
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
