"""Formats of stored weights: the codes, the weights that share a scale, and the rounding of a weight to the codes.

    q = nearest code to w / s + z          w' = (q - z) s

Scale s and zero point z belong to an output channel, or to ``group`` neighbouring inputs of an output channel. Codes
are the integers of ``bits`` bits, or the floating point numbers of the type ``floating``. Symmetric formats have z = 0;
with more than 4 bits they leave out the lowest integer, so that -w is rounded as w is.

Scales may lie on a ``grid``, in units of a base:

    fp8     s = base * an E4M3 number, one base for a weight (NVFP4)
    2       s = a power of two (the MX formats)
    int8    s = base * 1 … 18, one base for an output channel, so that q s / base is an integer of 8 bits (DGQ)
    int7    s = base * 1 … 9, for kernels whose sums of two products of 8 bits would leave 16 bits

A new format is a row of ``FORMATS``; which target runs it, and how, stands in ``targets``. Rounders
(``quantize/rounders``) know only codes and scales, and ``quantize/qdq`` writes any row.

Sources: NVIDIA's NVFP4; OCP Microscaling Formats v1.0 (the exponent of the largest weight, less that of the largest
code); Zhang et al., Dual Grained Quantization, 2023.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import ml_dtypes
import numpy as np

_FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
_STEPS = {"int8": 18, "int7": 9}  # the largest factors: 18 * 7 fits 8 bits
_CHUNK = 1 << 19  # weight values rounded at once: their float32 copies stay in the cache
_SMALLEST = {  # scale of each type; 2^-17 is subnormal in float16, but the error of 127 s is still s / 2 at most
    np.dtype(np.float16): 2.0**-17,
    np.dtype(np.float32): 2.0**-126,
}
SCALES = tuple(_SMALLEST)  # the types of scales
FLOAT = np.dtype(np.float32)


def positive_scale(limit: np.ndarray | float, levels: float, dtype: np.dtype) -> np.ndarray:
    """The scale limit / levels in ``dtype`` (float32 or float16); never zero."""
    return np.maximum(np.asarray(limit, np.float64) / levels, _SMALLEST[np.dtype(dtype)]).astype(dtype)


def spread(values: np.ndarray, shape: Sequence[int], attrs: Mapping[str, Any]) -> np.ndarray:
    """Scales or zero points so that they broadcast to codes of ``shape``; ``attrs`` are those of the quantizer."""
    axis, block = int(attrs.get("axis", 1)), int(attrs.get("block_size", 0))
    if values.size == 1:
        return values.reshape(())
    if block:
        return np.repeat(values, block, axis).take(range(shape[axis]), axis)
    return values.reshape([-1 if place == axis % len(shape) else 1 for place in range(len(shape))])


@dataclass(frozen=True)
class Format:
    """A code has ``bits`` bits; ``group`` inputs share a scale (0: all inputs of an output channel).

    ``opset``: the lowest opset whose DequantizeLinear reads the codes. ``grid``: what values scales have, "" for any.
    """

    bits: int = 8
    group: int = 0
    symmetric: bool = True
    floating: str = ""
    opset: int = 13
    grid: Literal["", "fp8", "2", "int8", "int7"] = ""

    @property
    def dtype(self) -> np.dtype:
        """The type of the stored codes."""
        own = self.floating or ("" if self.symmetric else "u") + f"int{self.bits}"
        return np.dtype(getattr(ml_dtypes, own, np.int8 if self.symmetric else np.uint8))

    @property
    def levels(self) -> float:
        """The largest code; steps from the lowest to the largest code of an asymmetric format."""
        if self.floating:
            return float(ml_dtypes.finfo(self.dtype).max)
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    @property
    def lowest(self) -> float:
        """The lowest code."""
        if not self.symmetric:
            return 0
        return -self.levels - (1 if self.bits <= 4 and not self.floating and self.grid not in _STEPS else 0)

    def base(self, weight: np.ndarray) -> np.ndarray | None:
        """The units of the grid, (1, 1) or (out, 1) in float32, for a weight (out, ...); None without units."""
        if self.grid in ("", "2"):
            return None
        peak = np.abs(weight.reshape(len(weight), -1)).max(axis=1, keepdims=True, initial=0.0)
        if self.grid == "fp8":
            return positive_scale(peak.max(initial=0.0), self.levels * float(ml_dtypes.finfo(_FP8).max), FLOAT)[
                None, None
            ]
        return positive_scale(peak, self.levels * _STEPS[self.grid], FLOAT)

    def scales(self, limit: np.ndarray, dtype: np.dtype, base: np.ndarray | None = None) -> np.ndarray:
        """The scales (out, groups, 1) in ``dtype`` whose largest code is about ``limit``; never zero."""
        wanted = positive_scale(limit, self.levels, np.dtype(dtype) if not self.grid else FLOAT)
        if self.grid == "2":
            exponents = np.floor(np.log2(wanted * self.levels)) - np.floor(np.log2(self.levels))
            return np.maximum(np.exp2(exponents), _SMALLEST[np.dtype(dtype)]).astype(dtype)
        if base is None:
            return wanted
        unit = base[..., None]
        steps = wanted / unit
        return positive_scale(self._on_grid(steps) * unit, 1, dtype)

    def steps(self, scales: np.ndarray, base: np.ndarray) -> np.ndarray:
        """The scales (out, groups) in units of the grid, in the type in which a file holds them."""
        found = scales.astype(np.float64) / base
        return self._on_grid(found).astype(_FP8 if self.grid == "fp8" else np.int8)

    def _on_grid(self, steps: np.ndarray) -> np.ndarray:
        """The nearest values of the grid, in its units; never zero."""
        if self.grid != "fp8":
            return np.clip(np.rint(steps), 1, _STEPS[self.grid])
        limits = ml_dtypes.finfo(_FP8)
        return np.clip(steps, float(limits.smallest_subnormal), float(limits.max)).astype(_FP8).astype(np.float32)

    def limits(self, parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The lowest and the highest value, (out, groups, 1), that codes of the ``grouped`` weights have to reach."""
        if self.symmetric:
            peak = np.abs(parts).max(axis=2, keepdims=True)
            return -peak, peak
        return np.minimum(parts.min(axis=2, keepdims=True), 0), np.maximum(parts.max(axis=2, keepdims=True), 0)

    def covering(
        self, low: np.ndarray, high: np.ndarray, dtype: np.dtype, base: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scales in ``dtype`` and zero points in float32, (out, groups, 1), with which the codes reach two limits."""
        if self.symmetric:
            return self.scales(high, dtype, base), np.zeros(high.shape, np.float32)
        scales = positive_scale(high - low, self.levels, dtype)
        return scales, np.clip(np.rint(-low / scales.astype(np.float32)), 0, self.levels)

    def snap(self, values: np.ndarray, zeros: np.ndarray | float = 0.0) -> np.ndarray:
        """The codes less the zero points, as float32, that are nearest to ``values`` in units of the scale."""
        limited = np.clip(values, self.lowest - zeros, self.levels - zeros)
        return limited.astype(self.dtype).astype(np.float32) if self.floating else np.rint(limited)

    def typed(self, codes: np.ndarray) -> np.ndarray:
        """Codes given as float32 in the type of the codes."""
        if self.floating:
            return codes.astype(self.dtype)
        return codes.astype(np.int8).view(self.dtype)  # a sixth of the time that numpy takes for types of 4 bits

    def grouped(self, matrix: np.ndarray) -> np.ndarray:
        """A matrix (out, in) as (out, groups, inputs that share a scale), with zeros behind the last input."""
        outs, ins = matrix.shape
        size = self.group or max(ins, 1)
        padded = matrix if ins % size == 0 else np.pad(matrix, ((0, 0), (0, -ins % size)))
        return padded.reshape(outs, -1, size)

    def spread(self, scales: np.ndarray, ins: int) -> np.ndarray:
        """Scales (out, groups) for every weight: (out, in), or (out, 1) where an output channel has one scale."""
        return np.repeat(scales, self.group, axis=1)[:, :ins] if self.group else scales

    def restored(self, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None = None) -> np.ndarray:
        """The float32 weight (out, in, ...) of codes, their scales and zero points (out, groups)."""
        behind = [1] * (codes.ndim - 2)
        steps = self.spread(scales.astype(np.float32), codes.shape[1])
        values = codes.astype(np.float32)
        if zeros is not None:
            starts = self.spread(zeros.astype(np.float32), codes.shape[1])
            values -= starts.reshape(*starts.shape, *behind)
        return values * steps.reshape(*steps.shape, *behind)

    def fitted(self, ins: int, whole: bool = False) -> Format:
        """The format with groups for ``ins`` inputs: halved until an output channel has at least two groups.

        One group that spans a channel is what TensorRT dequantizes in front of every product. With ``whole`` the groups
        divide the inputs, if there is such a number from 8 on: TensorRT spreads the scales evenly, whatever the groups.
        """
        group = self.group
        while self.grid not in ("fp8", "2") and group > 8 and group * 2 > ins:
            group //= 2
        if whole and group and ins % group and self.grid not in ("fp8", "2"):
            group = next((size for size in range(group, 7, -1) if ins % size == 0), group)
        return replace(self, group=group)

    def why_not(self, ins: int, outs: int) -> str:
        """Why TensorRT cannot read a weight of this size in the format, once fitted; empty where it can."""
        if self.group and (ins % self.group or ins == self.group):
            return f"its {ins} inputs do not divide into groups" + (f" of {self.group}" if self.grid else "")
        return "both of its sizes are odd, and two codes share a byte" if self.bits < 8 and ins * outs % 2 else ""

    def codes(
        self, weight: np.ndarray, dtype: np.dtype, floor: np.ndarray | float = 0.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """(codes, scales (out,) in ``dtype``) of a weight (out, ...), for a symmetric format without groups.

        The largest weight of an output channel gets the largest code. Every scale is at least ``floor``, (out,) or a
        scalar.
        """
        limits = np.broadcast_to(np.asarray(floor, np.float64) * self.levels, weight.shape[:1])
        values = np.empty(weight.shape, self.dtype)
        scales = np.empty(weight.shape[0], dtype)
        for rows in chunks(weight):
            part = np.asarray(weight[rows], np.float32)
            peak = np.abs(part.reshape(part.shape[0], -1)).max(axis=1, initial=0.0)
            scales[rows] = positive_scale(np.maximum(peak, limits[rows]), self.levels, dtype)
            steps = np.asarray(scales[rows], np.float32).reshape(-1, *[1] * (part.ndim - 1))
            values[rows] = self.snap(part / steps)
        return values, scales

    def rounded(self, matrix: np.ndarray) -> np.ndarray:
        """A float32 matrix (out, in) rounded to the values that this format can store."""
        outs, ins = matrix.shape
        parts = self.grouped(matrix)
        steps, zeros = self.covering(*self.limits(parts), FLOAT)
        return (self.snap(parts / steps, zeros) * steps).reshape(outs, -1)[:, :ins]


def all_finite(values: np.ndarray) -> bool:
    """Whether no value is NaN or infinite. The bits of float16 tell it in a fifth of the time."""
    if values.dtype != np.float16:
        return bool(np.isfinite(values).all())
    return not values.size or int((values.view(np.uint16) & 0x7FFF).max()) < 0x7C00


def chunks(weight: np.ndarray, times: int = 1) -> list[slice]:
    """Slices of the output channels of a weight (out, ...), so that the float32 copy of a slice stays small.

    ``times``: how many times the usual size a slice has.
    """
    outs = weight.shape[0]
    rows = max(1, times * _CHUNK // max(1, weight[0].size if outs else 1))
    return [slice(start, min(start + rows, outs)) for start in range(0, outs, rows)]


INT8 = Format()
INT7 = Format(7)  # stored as int8
FORMATS = {
    "int8": INT8,
    "int4": Format(4, 128, opset=21),
    "uint4": Format(4, 128, symmetric=False, opset=21),
    "int2": Format(2, 32, opset=25),
    "fp8": Format(8, floating="float8_e4m3fn", opset=19),
    "fp4": Format(4, 32, floating="float4_e2m1fn", opset=23),
    "nvfp4": Format(4, 16, floating="float4_e2m1fn", opset=23, grid="fp8"),
    "mxfp4": Format(4, 32, floating="float4_e2m1fn", opset=23, grid="2"),
    "mxfp8": Format(8, 32, floating="float8_e4m3fn", opset=21, grid="2"),
    "dgq": Format(4, 128, opset=21, grid="int8"),
}
