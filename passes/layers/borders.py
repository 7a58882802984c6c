"""What a linear answers on average where a convolution reads zeros beyond the borders of its input.

y[o] = Σ_t W[t] x[o s - p + t d]        E[y] = Σ_t W[t] c[t] E[x]        c[t]: the share of o for which x is inside
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.layers.linear import Linear
from channelfold.runtime.data.sources import Data
from channelfold.runtime.io.shapes import shapes_on


def first_shapes(graph: gs.Graph, linears: Iterable[Linear], data: Data) -> dict[str, tuple[int, ...]]:
    """The shapes that tensors have on the first sample, where one of the linears reads zeros beyond borders."""
    if not any(linear.padded for linear in linears):
        return {}
    return shapes_on(graph, {name: values.shape for feed in data.first(1) for name, values in feed.items()})


def mean_response(
    linear: Linear, weight: np.ndarray, mean: np.ndarray, shape: Sequence[int | str | None] | None
) -> np.ndarray:
    """The mean response (out,) of ``weight`` (out, in / groups, *kernel) to an input of the mean (in,) everywhere.

    ``shape``: that of the input. Along an axis of unknown size nothing is known of borders.
    """
    rank = len(linear.kernel)
    if linear.node.op == "Conv" and linear.padded and shape is not None and len(shape) == 2 + rank:
        for axis, size in enumerate(shape[2:]):
            if isinstance(size, int):
                share = _inside(linear.node.attrs, axis, linear.kernel, size)
                weight = weight * share.reshape(-1, *[1] * (rank - axis - 1)).astype(weight.dtype)
    return linear.respond(weight, mean)


def _inside(attrs: Mapping[str, Any], axis: int, kernel: Sequence[int], size: int) -> np.ndarray:
    """The share of the outputs along a spatial axis for which each place of the kernel lies inside the input."""
    rank = len(kernel)
    step, gap = (attrs.get(name, [1] * rank)[axis] for name in ("strides", "dilations"))
    reach = gap * (kernel[axis] - 1) + 1
    before, behind = (attrs.get("pads", [0] * 2 * rank)[at] for at in (axis, axis + rank))
    if attrs.get("auto_pad", "NOTSET") != "NOTSET":
        both = max(0, (-(-size // step) - 1) * step + reach - size)
        before = both // 2 if attrs["auto_pad"] == "SAME_UPPER" else both - both // 2
        behind = both - before
    starts = np.arange(0, size + before + behind - reach + 1, step) - before
    places = starts[:, None] + gap * np.arange(kernel[axis])
    return ((places >= 0) & (places < size)).mean(axis=0)
