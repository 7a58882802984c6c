"""Reconstruction of the output of a layer from the input channels that are kept, by least squares.

z = [x; a] holds the features at one position: a the channels that a layer reads, x features that can replace them, such
as the input of an FFN. C is the covariance of z, and W the weights (outputs, features) that read z. For target = A z
and kept features F, ridge regression gives

    B = A C_:F (C_FF + r_F)^-1,   offset = A E[z] - B E[z_F],   r = ridge * diag C
    error = E || A z - B z_F - offset ||^2 = tr(D C D^T),   D = A - B at F

Special cases: plain pruning (B = 0), pruning with reconstruction (F the kept channels), a linear replacement (F = x),
both (F = x and the kept channels). A larger F is never worse when r -> 0. The ridge is relative to the variance of each
feature, so that the result does not depend on the units of a channel, and a channel of huge variance hides no other.

A unit is one channel, or several channels that are removed together. The next unit to remove is the unit that adds the
least error. With P = (C + r)^-1 over all features that are left and W as reconstructed so far, removing unit u

    adds   tr(W_u P_uu^-1 W_u^T)
    W  <-  W - W_u P_uu^-1 P_u:        P  <-  P - P_:u P_uu^-1 P_u:

Every step is exact: afterwards P is the inverse for the features left, and W is the result of regression on them (the
optimal brain surgeon: Hassibi et al., 1993; in blocks as in Kurtic et al., ZipLM, NeurIPS 2023). The updates are
collected and multiplied in blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RIDGE = 1e-4
_FLOOR = 1e-12  # the least ridge, relative to the variance
_DEAD = 1e-15  # the least penalty, relative to the mean variance
_BLOCK = 96  # columns of updates that are multiplied together


@dataclass(frozen=True)
class Removal:
    """Units in the order of removal: numbers ``order`` (n,), and ``errors`` (n + 1,) after removing 0 … n units.

    An error is E || change of the outputs ||^2 after reconstruction, plus the ``penalty`` of the weights.
    """

    order: np.ndarray
    errors: np.ndarray


def fill(
    covariance: np.ndarray, mean: np.ndarray, kept: np.ndarray, removed: np.ndarray, ridge: float = RIDGE
) -> tuple[np.ndarray, np.ndarray]:
    """(R (removed, kept), offset (removed,)) that predict the removed features as R z_kept + offset."""
    target = np.zeros((len(removed), len(mean)))
    target[np.arange(len(removed)), removed] = 1.0
    matrix = regress(covariance, target, kept, ridge)
    return matrix, mean[removed] - matrix @ mean[kept]


def regress(covariance: np.ndarray, target: np.ndarray, features: np.ndarray, ridge: float = RIDGE) -> np.ndarray:
    """B (t, features) of the regression of target z, ``target`` (t, n), on the ``features`` of z."""
    if not len(features):
        return np.zeros((len(target), 0))
    inner = covariance[np.ix_(features, features)]
    inner[np.diag_indices_from(inner)] += penalty(covariance, ridge)[features]
    return np.linalg.solve(inner, covariance[features] @ target.T).T


def residual(covariance: np.ndarray, target: np.ndarray, features: np.ndarray, matrix: np.ndarray) -> float:
    """E || target z - matrix z_features - offset ||^2 with the offset that matches the mean; never negative."""
    left = np.array(target, np.float64)
    left[:, features] -= matrix
    return energy(covariance, left)


def energy(covariance: np.ndarray, weights: np.ndarray) -> float:
    """E || W (z - E[z]) ||^2 = tr(W C W^T) of ``weights`` (outputs, n)."""
    used = np.flatnonzero(weights.any(axis=0))
    part = weights[:, used]
    return max(0.0, float(np.vdot(part @ covariance[np.ix_(used, used)], part)))


def penalty(covariance: np.ndarray, ridge: float) -> np.ndarray:
    """r (n,), the penalty on the square of a weight of each feature.

    The penalty is always positive, so that the covariance of dead or dependent features can be inverted.
    """
    variance = np.diagonal(covariance)
    return np.maximum(max(ridge, _FLOOR) * variance, _DEAD * float(variance.mean()) or 1.0)


def order(
    covariance: np.ndarray,
    gram: np.ndarray,
    units: np.ndarray,
    ridge: float = RIDGE,
    number: int | None = None,
) -> Removal:
    """Removes the unit that adds the least error, until ``number`` units (default: all) are removed.

    ``gram`` is W^T W (n, n), summed over all readers of the features and all positions of a kernel. ``units``
    (units, size) holds the features of every unit. Features in no unit stay and help to reconstruct the others.
    """
    units = np.asarray(units)
    inverse, candidates = _inverse(covariance, ridge), units.reshape(-1)
    chosen = np.ix_(candidates, candidates)  # the inverse already accounts for features that are never removed
    greedy = _Greedy(inverse[chosen], np.array(gram[chosen], np.float64), np.arange(units.size).reshape(units.shape))
    number = len(units) if number is None else min(number, len(units))
    chosen, errors = [], [0.0]
    while len(chosen) < number:
        unit, added = greedy.remove()
        chosen.append(unit)
        errors.append(errors[-1] + added)
    return Removal(np.array(chosen, np.int64), np.array(errors))


class _Greedy:
    """P and G = W^T W of the features left, with up to ``_BLOCK`` columns of pending updates.

    P = base - v v^T and W = W0 - u v^T. The object keeps products alone: gram = W0^T W0, t = W0^T u, uu = u^T u.
    """

    def __init__(self, inverse: np.ndarray, gram: np.ndarray, units: np.ndarray):
        self.base, self.gram, self.units = inverse, gram, units
        self.alive = np.arange(len(units))
        self.gone: list[int] = []  # places in ``alive``
        self._refresh()

    def remove(self) -> tuple[int, float]:
        """Removes the unit that adds the least error; returns the unit and the added error."""
        added = self._costs()
        added[self.gone] = np.inf
        place = int(np.argmin(added))
        features = self.units[place]
        v, t, uu = self.v[:, : self.columns], self.t[:, : self.columns], self.uu[: self.columns, : self.columns]
        mine = v[features].T  # (columns, size)
        column = self.base[features].T - v @ mine
        root = np.linalg.inv(np.linalg.cholesky(column[features])).T
        new_v = column @ root
        new_t = (self.gram[features].T - t @ mine) @ root  # W0^T u
        old_u = (t[features].T - uu @ mine) @ root  # u^T of the columns before, times u
        own_u = root.T @ (self.gram[np.ix_(features, features)] @ root - t[features] @ mine @ root - mine.T @ old_u)
        unit = int(self.alive[place])
        self._update(new_v, new_t, old_u, own_u)
        self.gone.append(place)
        self.blocks[place] = np.eye(len(features))  # zero by now; ``_costs`` divides by the blocks
        if self.columns + len(features) > self.v.shape[1]:
            self._multiply()
        return unit, max(0.0, float(np.trace(own_u)))

    def _costs(self) -> np.ndarray:
        if self.units.shape[1] == 1:
            return self.grams[:, 0, 0] / self.blocks[:, 0, 0]
        return np.trace(np.linalg.solve(self.blocks, self.grams), axis1=1, axis2=2)

    def _update(self, v: np.ndarray, t: np.ndarray, old_u: np.ndarray, own_u: np.ndarray) -> None:
        """Adds columns to v and t, and updates the blocks of P and G of every unit."""
        shared = t - self.v[:, : self.columns] @ old_u  # W^T u
        mine = v[self.units]  # (units, size, size)
        turned = mine.swapaxes(1, 2)
        cross = shared[self.units] @ turned
        self.blocks -= mine @ turned
        self.grams += mine @ own_u @ turned - cross - cross.swapaxes(1, 2)
        before, after = slice(0, self.columns), slice(self.columns, self.columns + v.shape[1])
        self.v[:, after], self.t[:, after] = v, t
        self.uu[before, after], self.uu[after, before], self.uu[after, after] = old_u, old_u.T, own_u
        self.columns += v.shape[1]

    def _multiply(self) -> None:
        """Applies the pending updates to P and G, and drops the features that are removed."""
        used = slice(0, self.columns)
        left = np.delete(np.arange(len(self.base)), self.units[self.gone].reshape(-1))
        place = np.zeros(len(self.base), np.int64)
        place[left] = np.arange(len(left))
        v, t = self.v[left, used], self.t[left, used]
        self.base = self.base[np.ix_(left, left)]
        self.base -= v @ v.T
        cross = (t - v @ (self.uu[used, used] / 2)) @ v.T
        self.gram = self.gram[np.ix_(left, left)]
        self.gram -= cross
        self.gram -= cross.T
        self.units = place[np.delete(self.units, self.gone, axis=0)]
        self.alive, self.gone = np.delete(self.alive, self.gone), []
        self._refresh()

    def _refresh(self) -> None:
        columns = max(_BLOCK, self.units.shape[1])
        self.columns = 0
        self.v, self.t = np.zeros((len(self.base), columns)), np.zeros((len(self.base), columns))
        self.uu = np.zeros((columns, columns))
        self.blocks = self.base[self.units[:, :, None], self.units[:, None, :]]
        self.grams = self.gram[self.units[:, :, None], self.units[:, None, :]]


def _inverse(covariance: np.ndarray, ridge: float) -> np.ndarray:
    inner = covariance + np.diag(penalty(covariance, ridge))
    inverse = np.linalg.inv(inner)
    return (inverse + inverse.T) / 2
