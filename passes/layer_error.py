"""What quantization costs the outputs of linear layers that read one tensor, measured on a sample of its rows.

    error(s, z)  =  sum over rows of weight * || Q(W diag(s)) Q((x - z) / s)  -  W (x - z) ||^2

Q of the activation is symmetric, per tensor, with the range of least squared error; Q of the weight symmetric per
output channel, or asymmetric in groups of inputs. With the bias that takes up W z exactly, W (x - z) is the same output
as W x. Layers of more than 1,024 output channels are measured on 1,024 of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from channelfold.passes.linear import Linear

ROWS = 512  # of the sample that errors are measured on
_OUTPUTS = 1024
_CLIPS = np.geomspace(1.0, 1 / 32, 24)  # of the largest magnitude; see calibrators


@dataclass(frozen=True)
class Bits:
    """The types of a quantized layer: bits of activations (0: float) and of weights, ``group`` inputs to a scale."""

    activation: int = 8
    weight: int = 8
    group: int = 0


@dataclass(frozen=True)
class LayerError:
    """``rows`` (n, channels) float32, each standing for ``weights``; ``matrix`` (out, channels) float32."""

    rows: np.ndarray
    weights: np.ndarray
    matrix: np.ndarray
    bits: Bits = Bits()

    @classmethod
    def of(cls, linears: Sequence[Linear], sample: tuple[np.ndarray, np.ndarray], bits: Bits) -> LayerError:
        """Of linears without a kernel that read the tensor sampled."""
        return cls(*sample, np.concatenate([_some(matrix(linear)) for linear in linears]), bits)

    @property
    def signal(self) -> float:
        """The squared outputs, in the units of ``error``; to be divided by it."""
        return _total((self.rows @ self.matrix.T) ** 2, self.weights)

    def error(self, scale: np.ndarray | float = 1.0, shift: np.ndarray | float = 0.0) -> float:
        """The squared error of the outputs when channels are scaled and shifted by (channels,) vectors."""
        centered = self.rows - np.asarray(shift, np.float32)
        moved = centered / np.asarray(scale, np.float32)
        weight = self.matrix * np.asarray(scale, np.float32)
        rounded = quantized_activation(moved, self.weights, self.bits.activation)
        outputs = rounded @ quantized_matrix(weight, self.bits).T
        outputs -= centered @ self.matrix.T
        return _total(outputs**2, self.weights)


def matrix(linear: Linear) -> np.ndarray:
    """The weight of a linear whose kernel is a point, (out, in) float32, with zeros between its groups."""
    weight = linear.weight()
    weight = weight.reshape(weight.shape[:2]).astype(np.float32)
    if linear.groups == 1:
        return weight
    outs, ins = linear.channels
    full = np.zeros((outs, ins), np.float32)
    step_out, step_in = outs // linear.groups, ins // linear.groups
    for group in range(linear.groups):
        rows = slice(group * step_out, (group + 1) * step_out)
        full[rows, group * step_in : (group + 1) * step_in] = weight[rows]
    return full


def quantized_activation(values: np.ndarray, weights: np.ndarray, bits: int) -> np.ndarray:
    """Symmetric, per tensor, with the range of least squared error; ``bits`` 0 leaves the values alone."""
    peak = float(np.abs(values).max(initial=0.0))
    if bits == 0 or peak == 0:
        return values
    levels = 2 ** (bits - 1) - 1
    best = min(_CLIPS * peak, key=_noise_of(values, weights, levels))
    step = np.float32(best / levels)
    return np.clip(np.rint(values / step), -levels, levels) * step


def quantized_matrix(matrix: np.ndarray, bits: Bits) -> np.ndarray:
    """Symmetric per output channel, or asymmetric round-to-nearest in groups of ``bits.group`` inputs."""
    if not bits.group:
        levels = 2 ** (bits.weight - 1) - 1
        step = np.maximum(np.abs(matrix).max(axis=1, keepdims=True) / levels, np.float32(1e-30))
        return np.rint(matrix / step) * step
    outs, ins = matrix.shape
    groups = -(-ins // bits.group)
    padded = np.zeros((outs, groups * bits.group), np.float32)
    padded[:, :ins] = matrix
    parts = padded.reshape(outs, groups, bits.group)
    low, high = np.minimum(parts.min(axis=2), 0)[..., None], np.maximum(parts.max(axis=2), 0)[..., None]
    levels = 2**bits.weight - 1
    step = np.maximum((high - low) / levels, np.float32(1e-30))
    zero = np.rint(-low / step)
    rounded = (np.clip(np.rint(parts / step) + zero, 0, levels) - zero) * step
    return rounded.reshape(outs, -1)[:, :ins]


def _noise_of(values: np.ndarray, weights: np.ndarray, levels: int):
    """Squared rounding and clipping error by range, from a histogram of the magnitudes (eighths of octaves)."""
    magnitudes = np.abs(values)
    peak = float(magnitudes.max())
    with np.errstate(divide="ignore"):
        place = np.log2(magnitudes / np.float32(peak)) * 8
    index = np.clip(np.rint(place), -160, 0).astype(np.int64) + 160
    counts = np.bincount(index.reshape(-1), np.repeat(weights, values.shape[1]), minlength=161)
    centers = peak * 2.0 ** (np.arange(-160, 1) / 8)
    widths = centers * (2 ** (1 / 16) - 2 ** (-1 / 16))

    def noise(limit: float) -> float:
        step = limit / levels
        clipped = np.minimum(centers, limit)
        exact = (clipped - np.rint(clipped / step) * step) ** 2
        rounding = np.where(widths >= step / 2, step**2 / 12, exact)
        return float((counts * np.where(centers > limit * (1 + 1e-6), (centers - limit) ** 2, rounding)).sum())

    return noise


def _some(matrix: np.ndarray) -> np.ndarray:
    return matrix if len(matrix) <= _OUTPUTS else matrix[:: -(-len(matrix) // _OUTPUTS)]


def _total(squares: np.ndarray, weights: np.ndarray) -> float:
    return float(weights @ squares.sum(axis=1, dtype=np.float64))
