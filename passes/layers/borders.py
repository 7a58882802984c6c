"""What convolutions read on average, where zeros lie beyond the borders of their inputs.

    y[o] = Σ_t W[t] x[o s - p + t d]        E[y] = Σ_t W[t] c[t] E[x]        c[t]: the share of o for which x is inside

Bias correction needs E[y] of what was rounded away. With c = 1 everywhere the outputs of OCR lost .8 dB
(calibrated on 16 lines; 4.6 dB on 4).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.layers.linear import Linear
from channelfold.runtime.data.sources import Data
from channelfold.runtime.io.shapes import shapes_on


def inside(graph: gs.Graph, linears: Iterable[Linear], data: Data) -> dict[str, np.ndarray]:
    """By the name of every padded Conv: the shares c of the places of its kernel, (*kernel), on the first sample.

    Without those whose input has a size that nothing tells.
    """
    padded = [linear for linear in linears if linear.node.op == "Conv" and linear.padded]
    if not padded:
        return {}
    shapes = shapes_on(graph, {name: values.shape for feed in data.first(1) for name, values in feed.items()})
    return {
        conv.name: reduce(np.multiply.outer, _shares(conv.node.attrs, conv.kernel, shapes[conv.data.name][2:]))
        for conv in padded
        if conv.data.name in shapes
    }


def padding(attrs: Mapping[str, Any], kernel: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, int]]:
    """The zeros before and behind the ``sizes`` along each axis that a Conv reads."""
    rank, mode = len(kernel), attrs.get("auto_pad", "NOTSET")
    steps, gaps = (attrs.get(name, [1] * rank) for name in ("strides", "dilations"))
    pads = attrs.get("pads") or [0] * 2 * rank
    if mode not in ("SAME_UPPER", "SAME_LOWER"):
        return list(zip(pads[:rank], pads[rank:], strict=True))
    found = []
    for places, size, step, gap in zip(kernel, sizes, steps, gaps, strict=True):
        both = max(0, (-(-size // step) - 1) * step + gap * (places - 1) + 1 - size)
        before = both // 2 if mode == "SAME_UPPER" else both - both // 2
        found.append((before, both - before))
    return found


def _shares(attrs: Mapping[str, Any], kernel: Sequence[int], sizes: Sequence[int]) -> list[np.ndarray]:
    """The shares along each axis."""
    steps, gaps = (attrs.get(name, [1] * len(kernel)) for name in ("strides", "dilations"))
    found = []
    for (before, behind), places, size, step, gap in zip(
        padding(attrs, kernel, sizes), kernel, sizes, steps, gaps, strict=True
    ):
        reach = gap * (places - 1) + 1
        starts = np.arange(0, size + before + behind - reach + 1, step) - before
        at = starts[:, None] + gap * np.arange(places)
        found.append(((at >= 0) & (at < size)).mean(axis=0) if len(at) else np.ones(places))
    return found
