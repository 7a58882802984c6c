"""Rounders: how the codes and scales of a weight are chosen, in any format of ``layers/formats``.

    nearest    s = max |w| / levels
    search     s = argmin  sum_i E[x_i^2] (w_i - w'_i)^2      over factors of the scale of nearest
    gptq       codes = argmin ||(W - W') R||^2,  R R^T = E[x x^T] + damping I,  one input after the other
    descent    gptq; then scales by least squares, and each code again with all others as they are, in turns

GPTQ rounds the inputs of an output channel in the order of falling E[x^2]. With R upper triangular, the best code of
input i makes up for the errors e_j = w_j - w'_j of the inputs before:

    w'_i = round(w_i + sum_{j<i} e_j R_ji / R_ii)

One Cholesky factor is all this needs, no inverse; the codes are those of the textbook. The scales are found by search
before any code is rounded (static groups), so that the order of rounding leaves no trace in the file. The search weighs
the error of input i by R_ii^2, what is left of it once all later inputs have made up for it. A round of descent takes
the same way with H = R R^T in place of R, and all other inputs in place of those before. No round makes the error on
the calibration data larger.

Sources: Frantar et al., GPTQ, ICLR 2023 (equation 2 and "act-order"); the search as in AWQ's clipping, Lin et al. 2023;
coordinate descent as in Behdin et al., QuantEase, 2023.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from channelfold.passes.layers.formats import Format, chunks

_FACTORS = (1.0, 1.05, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
_POWERS = (1.0, 2.0, 0.5)
_FLOATS = (1.5, 1.35, 1.2)  # E2M1 has large steps from 4 to 6: the largest weight may do better near 4
DAMPING = 0.03  # of the mean of the diagonal of E[x x^T]; on unseen data 0.01 and 0.1 do as well, 0.3 does worse
_PANEL = 192  # columns of a Cholesky factor made at once
_WIDE = 8  # times the usual number of channels that GPTQ rounds at once
_BLOCK, _STEP = 128, 16  # inputs between which errors travel by one product of matrices
_ROUNDS = 2  # of descent


@dataclass
class Rounded:
    """``codes`` (out, in, ...), ``scales`` (out, groups) of a weight, and ``zeros`` where its format is not symmetric.

    ``base``: the units of the grid of the scales. ``mean`` of the input of the linear, ``later`` once the layers before
    are rounded; None where it is not known.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None = None
    base: np.ndarray | None = None
    mean: np.ndarray | None = None
    later: np.ndarray | None = None

    def restored(self, format: Format) -> np.ndarray:
        """The float32 weight."""
        return format.restored(self.codes, self.scales, self.zeros)


Rounder = Callable[[np.ndarray, slice], Rounded]
"""From the weights (n, in) of a slice of the output channels to what is stored of them."""


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

    def round_rows(weight: np.ndarray, rows: slice) -> Rounded:
        own = _of_rows(importance, rows)
        grid = _Grid.of(weight, format, dtype, own, search, _of_rows(base, rows))
        return grid.stored(format.snap(weight / grid.steps, grid.starts))

    return round_rows


class Factored:
    """Products of inputs, E[x x^T] (in, in), made ready for GPTQ once for all linears that read the inputs."""

    def __init__(self, products: np.ndarray):
        self.products = products
        power = np.diagonal(products).astype(np.float32)
        self.order = np.argsort(-power, kind="stable")
        self.ratio, left = _ratio(products, self.order)
        self.importance = np.where(power > 0, left, 0)

    def damped(self) -> np.ndarray:
        """H in the order of rounding, float32."""
        matrix = self.products[np.ix_(self.order, self.order)].astype(np.float32)
        matrix[np.diag_indices_from(matrix)] += DAMPING * float(np.mean(np.diagonal(matrix))) or 1.0
        return matrix


def gptq(
    format: Format,
    dtype: np.dtype,
    products: np.ndarray | Factored,
    base: np.ndarray | None = None,
    descent: bool = False,
) -> Rounder:
    """Rounds with ``products``, E[x x^T] (in, in), so that the errors of the inputs of a channel cancel."""
    made = products if isinstance(products, Factored) else Factored(products)
    order = made.order

    def round_rows(weight: np.ndarray, rows: slice) -> Rounded:
        grid = _Grid.of(weight, format, dtype, made.importance, True, _of_rows(base, rows))
        found = _in_order(weight, grid, order, made.ratio)
        return grid.stored(_descend(weight, grid, found, made) if descent else found)

    return round_rows


def rounded(weight: np.ndarray, rounder: Rounder, format: Format, wide: bool = False) -> Rounded:
    """What is stored of a weight (out, ...), made of a part of its channels at a time.

    ``wide``: for GPTQ, whose products of matrices want many channels at once, and spread over the cores by themselves.
    """
    codes = np.empty_like(weight, format.dtype, subok=False)  # in the order in which the file holds the weight

    def round_part(rows: slice) -> Rounded:
        part = np.asarray(weight[rows], np.float32)
        found = rounder(part.reshape(part.shape[0], -1), rows)
        codes[rows] = found.codes.reshape(part.shape)
        return found

    parts = chunks(weight, _WIDE if wide else 1)
    with ThreadPoolExecutor(1 if wide else os.cpu_count()) as pool:  # work on arrays lets other threads run
        found = [(part.scales, part.zeros) for part in pool.map(round_part, parts)]
    scales, zeros = zip(*found, strict=True)
    return Rounded(codes, np.concatenate(scales), None if format.symmetric else np.concatenate(zeros))


def _of_rows(values: np.ndarray | None, rows: slice) -> np.ndarray | None:
    """The part of values (out, n) for some output channels; values (1, n) are those of all."""
    return values if values is None or len(values) == 1 else values[rows]


@dataclass
class _Grid:
    """The scales and zero points, (n, groups), of weights (n, in) in a format."""

    format: Format
    ins: int
    scales: np.ndarray
    zeros: np.ndarray

    @classmethod
    def of(
        cls,
        weight: np.ndarray,
        format: Format,
        dtype: np.dtype,
        importance: np.ndarray | None,
        search: bool,
        base: np.ndarray | None,
    ) -> _Grid:
        parts = format.grouped(weight)
        low, high = format.limits(parts)
        best, zeros = format.covering(low, high, dtype, base)
        weights = 1.0 if importance is None else format.grouped(np.broadcast_to(importance, weight.shape))
        least = np.full(best.shape, np.inf, np.float32)
        factors = _FACTORS + (_FLOATS if format.floating and format.bits == 4 else ())
        for factor in (_POWERS if format.grid == "2" else factors) if search else ():
            scale, zero = format.covering(low * factor, high * factor, dtype, base)
            step = scale.astype(np.float32)
            error = np.square(format.snap(parts / step, zero) * step - parts)
            error = (error * weights).sum(axis=2, keepdims=True)
            better, least = error < least, np.minimum(error, least)
            best, zeros = np.where(better, scale, best), np.where(better, zero, zeros)
        return cls(format, weight.shape[1], best[..., 0], zeros[..., 0])

    @property
    def steps(self) -> np.ndarray:
        """The scale of every weight, float32, (n, in); (n, 1) where a channel has one."""
        return self.format.spread(self.scales.astype(np.float32), self.ins)

    @property
    def starts(self) -> np.ndarray:
        """The zero point of every weight; (1, 1) where all are zero."""
        return np.zeros((1, 1), np.float32) if self.format.symmetric else self.format.spread(self.zeros, self.ins)

    def stored(self, values: np.ndarray) -> Rounded:
        """Of codes less their zero points."""
        zeros = None if self.format.symmetric else self.zeros.astype(np.uint8)
        return Rounded(self.format.typed(values + self.starts), self.scales, zeros)


def _ratio(products: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """R_ji / R_ii above the diagonal, in the order of rounding, and R_ii^2 of every input; float32.

    R is upper triangular, with R R^T the products and the damping.
    """
    mean, left = float(np.mean(np.diagonal(products))), np.zeros(len(products), np.float32)
    if not mean > 0:
        return np.zeros(products.shape, np.float32), left
    last_first = order[::-1]
    damped = products[np.ix_(last_first, last_first)].astype(np.float32, copy=False)
    damped /= np.float32(mean)
    damped[np.diag_indices_from(damped)] += np.float32(DAMPING)
    _factorize(damped)
    ratio = np.ascontiguousarray(damped[::-1, ::-1])
    left[order] = np.square(np.diagonal(ratio))
    ratio /= np.diagonal(ratio).copy()
    return ratio, left


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


def _in_order(
    weight: np.ndarray, grid: _Grid, order: np.ndarray, ratio: np.ndarray, codes: np.ndarray | None = None
) -> np.ndarray:
    """The codes less their zero points, float32, of ``weight`` (out, in), whose inputs are rounded in ``order``.

    Input i makes up for the errors e_j of the inputs before by e_j ``ratio``_ji; where there are ``codes`` already, for
    those of all other inputs.
    """
    format, count = grid.format, len(order)
    weight, steps, starts = (
        np.broadcast_to(v, (len(v), count))[:, order].T.copy() for v in (weight, grid.steps, grid.starts)
    )
    found = np.empty_like(weight) if codes is None else codes[:, order].T.copy()
    errors = np.zeros_like(weight) if codes is None else weight - found * steps
    changes = np.empty((_STEP, weight.shape[1]), np.float32)
    for start in range(0, count, _BLOCK):
        end = min(start + _BLOCK, count)
        seen = start if codes is None else count
        wanted = weight[start:end] + ratio[:seen, start:end].T @ errors[:seen]
        for first in range(start, end, _STEP):
            last = min(first + _STEP, end)
            for i in range(first, last):
                found[i] = format.snap(wanted[i - start] / steps[i], starts[i])
                change = changes[i - first]
                np.subtract(weight[i] - found[i] * steps[i], errors[i], out=change)
                errors[i] += change
                wanted[i + 1 - start : last - start] += np.outer(ratio[i, i + 1 : last], change)
            wanted[last - start :] += ratio[first:last, last:end].T @ changes[: last - first]
    result = np.empty(found.shape[::-1], np.float32)
    result[:, order] = found.T
    return result


def _descend(weight: np.ndarray, grid: _Grid, codes: np.ndarray, made: Factored) -> np.ndarray:
    """Better codes than ``codes``; scales that lie on no grid become better too."""
    products = made.damped()
    ratio = products / np.diagonal(products)
    ratio[np.diag_indices_from(ratio)] = 0
    for _ in range(_ROUNDS):
        if not grid.format.grid:
            _refit(weight, grid, codes, made.order, products)
        codes = _in_order(weight, grid, made.order, ratio, codes)
    return codes


def _refit(weight: np.ndarray, grid: _Grid, codes: np.ndarray, order: np.ndarray, products: np.ndarray) -> None:
    """Gives each channel the scales of the least error with its codes, where there are such, and positive ones."""
    groups = grid.scales.shape[1]
    member = np.repeat(np.arange(groups), grid.format.group or grid.ins)[: grid.ins][order]
    places = [np.flatnonzero(member == group) for group in range(groups)]
    weight, codes = weight[:, order], codes[:, order]
    wanted = weight @ products
    inner, outer = np.empty((len(weight), groups, groups)), np.empty((len(weight), groups))
    for a, own in enumerate(places):
        outer[:, a] = (wanted[:, own] * codes[:, own]).sum(axis=1)
        reached = codes[:, own] @ products[own]
        for b, other in enumerate(places):
            inner[:, a, b] = (reached[:, other] * codes[:, other]).sum(axis=1)
    empty = inner[:, np.arange(groups), np.arange(groups)] <= 0  # all codes are zero
    inner[:, np.arange(groups), np.arange(groups)] += np.where(empty, 1.0, 0.0)
    try:
        found = np.linalg.solve(inner, outer[..., None])[..., 0].astype(grid.scales.dtype)
    except np.linalg.LinAlgError:
        return
    found = np.where(empty, grid.scales, found)
    before, after = (weight - codes * scales.astype(np.float32)[:, member] for scales in (grid.scales, found))
    worse = ((after @ products) * after).sum(axis=1) > ((before @ products) * before).sum(axis=1)
    grid.scales = np.where((worse | (found <= 0).any(axis=1))[:, None], grid.scales, found)
