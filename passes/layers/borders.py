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


def _shares(attrs: Mapping[str, Any], kernel: Sequence[int], sizes: Sequence[int]) -> list[np.ndarray]:
    """The shares along each axis."""
    rank, mode = len(kernel), attrs.get("auto_pad", "NOTSET")
    steps, gaps = (attrs.get(name, [1] * rank) for name in ("strides", "dilations"))
    pads = attrs.get("pads") or [0] * 2 * rank
    found = []
    for axis, (places, size, step, gap) in enumerate(zip(kernel, sizes, steps, gaps, strict=True)):
        reach = gap * (places - 1) + 1
        before, behind = pads[axis], pads[axis + rank]
        if mode != "NOTSET":
            both = max(0, (-(-size // step) - 1) * step + reach - size)
            before = both // 2 if mode == "SAME_UPPER" else both - both // 2
            behind = both - before
        starts = np.arange(0, size + before + behind - reach + 1, step) - before
        at = starts[:, None] + gap * np.arange(places)
        found.append(((at >= 0) & (at < size)).mean(axis=0) if len(at) else np.ones(places))
    return found
