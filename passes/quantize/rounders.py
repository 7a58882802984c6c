"""Rounders: how the codes and scales of a weight are chosen, in any format of ``layers/formats``.

    nearest    s = max |w| / levels
    search     s = argmin  sum_i E[x_i^2] (w_i - w'_i)^2      over factors of the scale of nearest
    gptq       codes = argmin ||(W - W') R||^2,  R R^T = E[x x^T] + damping I,  one input after the other

GPTQ rounds the inputs of an output channel in the order of falling E[x^2]. With R upper triangular, the best code of
input i makes up for the errors e_j = w_j - w'_j of the inputs before:

    w'_i = round(w_i + sum_{j<i} e_j R_ji / R_ii)

One Cholesky factor is all this needs, no inverse; the codes are those of the textbook. The scales are found by search
before any code is rounded (static groups), so that the order of rounding leaves no trace in the file.

Sources: Frantar et al., GPTQ, ICLR 2023 (equation 2 and "act-order"); the search as in AWQ's clipping, Lin et al. 2023.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from channelfold.passes.layers.formats import Format, chunks

_FACTORS = (1.0, 1.05, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
_POWERS = (1.0, 2.0, 0.5)
_FLOATS = (1.5, 1.35, 1.2)  # E2M1 has large steps from 4 to 6: the largest weight may do better near 4
DAMPING = 0.01  # of the mean of the diagonal of E[x x^T]
_PANEL = 192  # columns of a Cholesky factor made at once
_WIDE = 8  # times the usual number of channels that GPTQ rounds at once
_BLOCK, _STEP = 128, 16  # inputs between which errors travel by one product of matrices

Rounder = Callable[[np.ndarray, slice], tuple[np.ndarray, np.ndarray]]
"""From the weights (n, in) of a slice of the output channels to their codes and scales (n, groups)."""


def by_scale(
    format: Format,
    dtype: np.dtype,
    importance: np.ndarray | None = None,
    search: bool = True,
    base: np.ndarray | None = None,
) -> Rounder:
    """Rounds every weight to the nearest code. ``importance``, E[x^2], (1, in) or (out, in), weighs the errors.

    ``base``: the units of the grid of the scales, see ``Format.base``.
    """

    def round_rows(weight: np.ndarray, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        own = _of_rows(importance, rows)
        scales = _scales(weight, format, dtype, own, search, _of_rows(base, rows))
        steps = format.spread(scales.astype(np.float32), weight.shape[1])
        return format.typed(format.snap(weight / steps)), scales

    return round_rows


class Factored:
    """Products of inputs, E[x x^T] (in, in), made ready for GPTQ once for all linears that read the inputs."""

    def __init__(self, products: np.ndarray):
        self.importance = np.diagonal(products).astype(np.float32)
        self.order = np.argsort(-self.importance, kind="stable")
        self.ratio = _ratio(products, self.order)


def gptq(format: Format, dtype: np.dtype, products: np.ndarray | Factored, base: np.ndarray | None = None) -> Rounder:
    """Rounds with ``products``, E[x x^T] (in, in), so that the errors of the inputs of a channel cancel."""
    made = products if isinstance(products, Factored) else Factored(products)
    importance, order = made.importance, made.order

    def round_rows(weight: np.ndarray, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        scales = _scales(weight, format, dtype, importance, True, _of_rows(base, rows))
        steps = scales.T.astype(np.float32)[order // format.group if format.group else np.zeros_like(order)]
        codes = np.empty(weight.T.shape, np.float32)
        codes[order] = _in_order(weight.T[order], steps, made.ratio, format)
        return format.typed(codes).T, scales

    return round_rows


def rounded(weight: np.ndarray, rounder: Rounder, format: Format, wide: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(codes like ``weight``, scales (out, groups)) of a weight (out, ...), a part of its channels at a time.

    ``wide``: for GPTQ, whose products of matrices want many channels at once, and spread over the cores by themselves.
    """
    codes = np.empty_like(weight, format.dtype, subok=False)  # in the order in which the file holds the weight

    def round_part(rows: slice) -> np.ndarray:
        part = np.asarray(weight[rows], np.float32)
        found, steps = rounder(part.reshape(part.shape[0], -1), rows)
        codes[rows] = found.reshape(part.shape)
        return steps

    parts = chunks(weight, _WIDE if wide else 1)
    with ThreadPoolExecutor(1 if wide else os.cpu_count()) as pool:  # work on arrays lets other threads run
        scales = list(pool.map(round_part, parts))
    return codes, np.concatenate(scales)


def _of_rows(values: np.ndarray | None, rows: slice) -> np.ndarray | None:
    """The part of values (out, n) for some output channels; values (1, n) are those of all."""
    return values if values is None or len(values) == 1 else values[rows]


def _scales(
    weight: np.ndarray,
    format: Format,
    dtype: np.dtype,
    importance: np.ndarray | None,
    search: bool,
    base: np.ndarray | None,
) -> np.ndarray:
    parts = format.grouped(weight)
    peak = np.abs(parts).max(axis=2, keepdims=True)
    best = format.scales(peak, dtype, base)
    if not search:
        return best[..., 0]
    weights = 1.0 if importance is None else format.grouped(np.broadcast_to(importance, weight.shape))
    least = np.full(peak.shape, np.inf, np.float32)
    factors = _FACTORS + (_FLOATS if format.floating and format.bits == 4 else ())
    for factor in _POWERS if format.grid == "2" else factors:
        scale = format.scales(peak * factor, dtype, base)
        step = scale.astype(np.float32)
        error = np.square(format.snap(parts / step) * step - parts)
        error = (error * weights).sum(axis=2, keepdims=True)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return best[..., 0]


def _ratio(products: np.ndarray, order: np.ndarray) -> np.ndarray:
    """R_ji / R_ii, float32, above the diagonal; R upper triangular, with R R^T the ordered products and the damping."""
    mean = float(np.mean(np.diagonal(products)))
    if not mean > 0:
        return np.zeros(products.shape, np.float32)
    last_first = order[::-1]
    damped = products[np.ix_(last_first, last_first)].astype(np.float32, copy=False)
    damped /= np.float32(mean)
    damped[np.diag_indices_from(damped)] += np.float32(DAMPING)
    _factorize(damped)
    ratio = np.ascontiguousarray(damped[::-1, ::-1])
    ratio /= np.diagonal(ratio).copy()
    return ratio


def _factorize(matrix: np.ndarray) -> None:
    """Puts the lower Cholesky factor, float32, in the lower half of a matrix, whose upper half becomes meaningless.

    Block by block: products of matrices take a third of LAPACK's time.
    """
    for start in range(0, len(matrix), _PANEL):
        end = start + _PANEL
        matrix[start:, start:end] -= matrix[start:, :start] @ matrix[start:end, :start].T
        corner = np.linalg.cholesky(matrix[start:end, start:end].astype(np.float64))
        matrix[end:, start:end] = matrix[end:, start:end] @ np.linalg.inv(corner).T.astype(np.float32)
        matrix[start:end, start:end] = corner


def _in_order(weight: np.ndarray, steps: np.ndarray, ratio: np.ndarray, format: Format) -> np.ndarray:
    """The codes, as float32, of ``weight`` (in, out), whose inputs are rounded one after the other."""
    count = len(weight)
    errors, codes = np.zeros_like(weight), np.empty_like(weight)
    for start in range(0, count, _BLOCK):
        end = min(start + _BLOCK, count)
        wanted = weight[start:end] + ratio[:start, start:end].T @ errors[:start]
        for first in range(start, end, _STEP):
            last = min(first + _STEP, end)
            for i in range(first, last):
                codes[i] = format.snap(wanted[i - start] / steps[i])
                errors[i] = weight[i] - codes[i] * steps[i]
                wanted[i + 1 - start : last - start] += np.outer(ratio[i, i + 1 : last], errors[i])
            wanted[last - start :] += ratio[first:last, last:end].T @ errors[first:last]
    return codes
