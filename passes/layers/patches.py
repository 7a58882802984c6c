"""What a linear reads at one position: the channels of its input, those of a whole kernel for a Conv, and E[z z^T].

    z = [x_1 … x_n, 1]        E[z z^T] = [[E[x x^T], E[x]], [E[x]^T, 1]]

The bias is the weight of the input that is always 1. Zeros beyond the border count as the Conv reads them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from channelfold.passes.layers.borders import padding
from channelfold.passes.layers.linear import Linear
from channelfold.runtime.stats.observe import check_finite, rows

_POSITIONS = 1024  # of one entry along the first axis that are taken
_ATTRIBUTES = ("auto_pad", "dilations", "pads", "strides")


@dataclass
class Patches:
    """An observer of the input of a linear: ``sums`` of z z^T, (groups, n + 1, n + 1), over ``count`` positions.

    ``attrs``: those of a Conv that tell what it reads.
    """

    axis: int
    kernel: tuple[int, ...] = ()
    groups: int = 1
    attrs: dict[str, Any] = field(default_factory=dict)
    count: int = 0
    sums: np.ndarray = field(default_factory=lambda: np.zeros(()))

    @classmethod
    def of(cls, linear: Linear) -> Patches | None:
        """The observer of a linear; None where what it reads at a position is not known, as of a ConvTranspose."""
        if linear.node.op not in ("Conv", "Gemm", "MatMul"):
            return None
        attrs = {name: linear.node.attrs[name] for name in _ATTRIBUTES if name in linear.node.attrs}
        return cls(linear.in_axis, linear.kernel, linear.groups, attrs)

    def add(self, values: np.ndarray) -> None:
        check_finite(values)
        if not values.size:
            return
        found = self._rows(values) if self.kernel else rows(values, self.axis % values.ndim, _POSITIONS)[None]
        found = np.concatenate([found, np.ones((*found.shape[:2], 1), np.float32)], axis=2)
        self.sums = self.sums + (found.swapaxes(1, 2) @ found).astype(np.float64)
        self.count += found.shape[1]

    def merge(self, other: Patches) -> None:
        self.sums, self.count = self.sums + other.sums, self.count + other.count

    def products(self) -> np.ndarray:
        """E[z z^T], (groups, n + 1, n + 1)."""
        return self.sums / self.count

    def _rows(self, values: np.ndarray) -> np.ndarray:
        """What the groups of a Conv read, (groups, positions, inputs)."""
        rank = len(self.kernel)
        steps, gaps = (self.attrs.get(name, [1] * rank) for name in ("strides", "dilations"))
        values = np.pad(values, [(0, 0), (0, 0), *padding(self.attrs, self.kernel, values.shape[2:])])
        reach = [gap * (places - 1) + 1 for gap, places in zip(gaps, self.kernel, strict=True)]
        windows = np.lib.stride_tricks.sliding_window_view(values, reach, tuple(range(2, 2 + rank)))
        windows = windows[(slice(None),) * 2 + tuple(slice(None, None, n) for n in (*steps, *gaps))]
        places = windows.shape[2 : 2 + rank]
        chosen = rows(np.arange(math.prod(places))[None, :, None], -1, _POSITIONS)[:, 0]
        found = windows[(slice(None),) * 2 + np.unravel_index(chosen, places)]  # (n, channels, positions, *kernel)
        inputs = values.shape[1] // self.groups * math.prod(self.kernel)
        found = np.moveaxis(found, 1, 2).reshape(-1, self.groups, inputs)
        return np.ascontiguousarray(found.swapaxes(0, 1), np.float32)


def moments_size(linear: Linear) -> int:
    """The bytes that the products of what a linear reads take, with those of one sample."""
    inputs = linear.channels[1] // linear.groups * math.prod(linear.kernel)
    return 16 * linear.groups * (inputs + 1) ** 2
