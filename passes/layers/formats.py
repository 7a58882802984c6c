"""Formats of stored weights: the codes, the weights that share a scale, and the rounding of a weight to the codes.

    q = clip(round(w / s) + z, low, high)          w' = (q - z) s

Scale s and zero point z belong to an output channel, or to ``group`` neighbouring inputs of an output channel.
Symmetric formats have z = 0 and leave out the lowest code, so that -w is rounded as w is. A new format is a row here;
``quantize/qdq`` writes the nodes that a target expects around the format.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_CHUNK = 1 << 22  # weight values rounded at once
_SMALLEST = {  # scale of each type; 2^-17 is subnormal in float16, but the error of 127 s is still s / 2 at most
    np.dtype(np.float16): 2.0**-17,
    np.dtype(np.float32): 2.0**-126,
}
SCALES = tuple(_SMALLEST)  # the types of scales


def positive_scale(limit: np.ndarray | float, levels: int, dtype: np.dtype) -> np.ndarray:
    """The scale limit / levels in ``dtype`` (float32 or float16); never zero."""
    return np.maximum(np.asarray(limit, np.float64) / levels, _SMALLEST[np.dtype(dtype)]).astype(dtype)


@dataclass(frozen=True)
class Format:
    """A code has ``bits`` bits; ``group`` inputs share a scale (0: all inputs of an output channel)."""

    bits: int = 8
    group: int = 0
    symmetric: bool = True

    @property
    def levels(self) -> int:
        """Steps from zero to the largest code; from the lowest to the largest code of an asymmetric format."""
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    def codes(
        self, weight: np.ndarray, dtype: np.dtype, floor: np.ndarray | float = 0.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """(codes int8, scales (out,) in ``dtype``) of a weight (out, ...), for a symmetric format without groups.

        Every scale is at least ``floor``, (out,) or a scalar.
        """
        limits = np.broadcast_to(np.asarray(floor, np.float64) * self.levels, weight.shape[:1])
        outs = weight.shape[0]
        rows = max(1, _CHUNK // max(1, weight[0].size if outs else 1))
        values = np.empty(weight.shape, np.int8)
        scales = np.empty(outs, dtype)
        for start in range(0, outs, rows):
            part = np.asarray(weight[start : start + rows], np.float32)
            peak = np.abs(part.reshape(part.shape[0], -1)).max(axis=1, initial=0.0)
            scale = positive_scale(np.maximum(peak, limits[start : start + rows]), self.levels, dtype)
            scales[start : start + rows] = scale
            steps = np.asarray(scale, np.float32).reshape(-1, *[1] * (part.ndim - 1))
            values[start : start + rows] = np.clip(np.rint(part / steps), -self.levels, self.levels)
        return values, scales

    def rounded(self, matrix: np.ndarray) -> np.ndarray:
        """A float32 matrix (out, in) rounded to the values that this format can store."""
        outs, ins = matrix.shape
        size = self.group or max(ins, 1)
        padded = matrix if ins % size == 0 else np.pad(matrix, ((0, 0), (0, -ins % size)))
        parts = padded.reshape(outs, -1, size)
        if self.symmetric:
            step = np.maximum(np.abs(parts).max(axis=2, keepdims=True) / self.levels, np.float32(1e-30))
            found = np.rint(parts / step) * step
        else:
            low, high = np.minimum(parts.min(axis=2), 0)[..., None], np.maximum(parts.max(axis=2), 0)[..., None]
            step = np.maximum((high - low) / self.levels, np.float32(1e-30))
            zero = np.rint(-low / step)
            found = (np.clip(np.rint(parts / step) + zero, 0, self.levels) - zero) * step
        return found.reshape(outs, -1)[:, :ins]


INT8 = Format()
