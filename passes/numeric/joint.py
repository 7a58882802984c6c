"""Rounding of the inputs of a weight one after the other, so that their errors cancel in the output.

    argmin  sum_rows (w - w') H (w - w')^T      H = E[x x^T] + damping,     w' on a grid

With R upper triangular and R R^T = H, the best value of input i makes up for the errors e_j = w_j - w'_j of the inputs
before:

    w'_i = round(w_i + sum_{j<i} e_j R_ji / R_ii)

One Cholesky factor is all this needs. A round of descent takes the same way with H in place of R, and all other inputs
in place of those before.

Sources: Frantar et al., GPTQ, ICLR 2023 (equation 2); coordinate descent as in Behdin et al., QuantEase, 2023.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_BLOCK, _STEP = 128, 16  # inputs between which errors travel by one product of matrices
_ROUNDS = 2  # of descent

Snap = Callable[[np.ndarray], np.ndarray]


def rounded(weight: np.ndarray, products: np.ndarray, snap: Snap, fixed: np.ndarray) -> np.ndarray:
    """Values on the grid of ``snap`` for a weight (groups, out, in), given the damped products (groups, in, in).

    What is ``fixed`` stays as it is: a zero of a sparse weight, for instance.
    """
    order = np.argsort(-np.diagonal(products, axis1=1, axis2=2).mean(axis=0), kind="stable")
    products = products[:, order[:, None], order]
    factor = np.linalg.cholesky(products[:, ::-1, ::-1])[:, ::-1, ::-1]
    wanted, held = (np.ascontiguousarray(v[:, :, order].swapaxes(1, 2)) for v in (weight, fixed))
    found = _in_order(wanted, _by_diagonal(factor), snap, held)
    others = _by_diagonal(products)
    others[:, np.arange(len(order)), np.arange(len(order))] = 0
    for _ in range(_ROUNDS):
        found = _in_order(wanted, others, snap, held, found)
    result = np.empty_like(weight)
    result[:, :, order] = found.swapaxes(1, 2)
    return result


def _by_diagonal(matrices: np.ndarray) -> np.ndarray:
    return (matrices / np.diagonal(matrices, axis1=1, axis2=2)[:, None, :]).astype(np.float32)


def _in_order(
    weight: np.ndarray, ratio: np.ndarray, snap: Snap, fixed: np.ndarray, before: np.ndarray | None = None
) -> np.ndarray:
    """Rounds the inputs of a weight (groups, in, out) in order.

    Input i makes up for the errors e_j of the inputs before by e_j ``ratio``_ji; where there are values from
    ``before``, for those of all other inputs.
    """
    groups, count, outs = weight.shape
    errors = np.zeros_like(weight) if before is None else weight - before
    found = np.empty_like(weight)
    changes = np.empty((groups, _STEP, outs), weight.dtype)
    for start in range(0, count, _BLOCK):
        end = min(start + _BLOCK, count)
        seen = start if before is None else count
        wanted = weight[:, start:end] + ratio[:, :seen, start:end].swapaxes(1, 2) @ errors[:, :seen]
        for first in range(start, end, _STEP):
            last = min(first + _STEP, end)
            for i in range(first, last):
                found[:, i] = np.where(fixed[:, i], weight[:, i], snap(wanted[:, i - start]))
                change = changes[:, i - first]
                np.subtract(weight[:, i] - found[:, i], errors[:, i], out=change)
                errors[:, i] += change
                wanted[:, i + 1 - start : last - start] += ratio[:, i, i + 1 : last, None] * change[:, None]
            passed = ratio[:, first:last, last:end].swapaxes(1, 2) @ changes[:, : last - first]
            wanted[:, last - start :] += passed
    return found
