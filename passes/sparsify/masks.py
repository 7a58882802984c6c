"""Masks over a weight (out, in / groups, *kernel): True for the entries that are kept.

    n_of_m      the best n of every m consecutive input channels, for each output channel and place of the kernel
    Tiles       squares of outputs x inputs, for each place of the kernel, kept or dropped as a whole
    by_row      the best of each output channel's weights

Scores are not negative. Of equal scores the first is kept, so that a mask depends on the scores alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


def n_of_m(scores: np.ndarray, n: int, m: int) -> np.ndarray:
    """The mask of exactly ``n`` entries of each aligned group of ``m`` along axis 1; ``m`` divides the axis."""
    groups = np.moveaxis(scores, 1, -1)
    groups = groups.reshape(*groups.shape[:-1], -1, m)
    kept = np.zeros(groups.shape, bool)
    np.put_along_axis(kept, np.argsort(-groups, axis=-1, kind="stable")[..., :n], True, axis=-1)
    return np.moveaxis(kept.reshape(*groups.shape[:-2], -1), -1, 1)


def by_row(scores: np.ndarray, count: int) -> np.ndarray:
    """The mask of ``count`` weights, as many of every output channel (axis 0), up to one more or less."""
    rows = scores.reshape(len(scores), -1)
    kept = np.zeros(rows.shape, bool)
    each, more = divmod(count, len(rows))
    order = np.argsort(-rows, axis=1, kind="stable")
    np.put_along_axis(kept, order[:, :each], True, axis=1)
    if more:
        # The next best weight of a row goes to the rows in which it is best.
        following = order[:, each]
        best = np.argsort(-rows[np.arange(len(rows)), following], kind="stable")[:more]
        kept[best, following[best]] = True
    return kept.reshape(scores.shape)


@dataclass(frozen=True)
class Tiles:
    """The tiles of a weight of ``shape``: ``block`` x ``block``, smaller at the ends of the axes."""

    shape: tuple[int, ...]
    block: int

    @property
    def grid(self) -> tuple[int, ...]:
        """The number of tiles along each axis."""
        outs, ins, *kernel = self.shape
        return -(-outs // self.block), -(-ins // self.block), *kernel

    @property
    def count(self) -> int:
        return math.prod(self.grid)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """The sum of the values in each tile, float64 of the shape of ``grid``."""
        starts = [np.arange(0, size, self.block) for size in self.shape[:2]]
        return np.add.reduceat(np.add.reduceat(values, starts[0], axis=0, dtype=np.float64), starts[1], axis=1)

    def sizes(self) -> np.ndarray:
        """The number of weights in each tile, in the shape of ``grid``."""
        rows, columns = ([min(self.block, n - i) for i in range(0, n, self.block)] for n in self.shape[:2])
        return np.broadcast_to(np.outer(rows, columns).reshape(self.grid[:2] + (1,) * len(self.grid[2:])), self.grid)

    def best(self, values: np.ndarray, count: int) -> np.ndarray:
        """The mask of the ``count`` tiles with the largest mean of ``values``, which has one value a weight."""
        means = (self.sums(values) / self.sizes()).reshape(-1)
        kept = np.zeros(means.size, bool)
        kept[np.argsort(-means, kind="stable")[:count]] = True
        wide = kept.reshape(self.grid).repeat(self.block, axis=0).repeat(self.block, axis=1)
        return wide[: self.shape[0], : self.shape[1]]
