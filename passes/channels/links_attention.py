"""Links of attention: heads are cut whole, a key or value head with all query heads that it serves.

    MultiHeadAttention, 2 heads of 3     [(-1, 2, 0 0 0 3 3 3), (0, 2, 0 1 2 3 4 5)]  and so for keys, values and biases
    GroupQueryAttention, 2 kv heads      [(-1, 2, 0 0 3 3 6 6 9 9), (1, 2, 0 1 0 1 2 3 2 3)]
    Attention with a packed weight       [(-1, 2, 0 0 0 3 3 3), (1, 1, 0 1 2 3 4 5)]  [(-1, 2, 0 0 …), (1, 1, 6 7 …)]

Every channel is linked to the first channel of its head in the result. Where the heads have an axis of their own, the
same channel of all heads can be cut too. Queries and keys then lose the same channels, and the scale of the scores
stays; values and the result lose the same channels. A rotary embedding rotates channels in pairs: i and i + half, or
2 i and 2 i + 1.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from channelfold.passes.channels.attention import Heads, heads_of, partners, rotary
from channelfold.passes.channels.ports import Ports, Rules
from channelfold.runtime.io import edit


def _attention(p: Ports) -> None:
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


RULES: Rules = {
    "attention": _attention,
    "packed_attention": _attention,
    "rotary": _rotary,
}
