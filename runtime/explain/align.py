"""Tensors that two models both compute, found by their values.

Every floating point tensor leaves a sketch on a few samples: its elements at a grid of places, the same in all
tensors of one shape. The tensors that fit best become pairs first; a name that both models use counts in favour of a
fit, and where nothing fits the name alone decides. So a tensor is found behind folds, renames and quantizers, and a
tensor that a damaged node has ruined is still found by its name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from channelfold.runtime.explain.model import Model
from channelfold.runtime.io.session import Feed

_AT_ONCE = 256  # tensors that are sketched in one run
_PLACES = 2048  # elements of a sketch
_FITS = 0.95  # from which two tensors may be the same: 1 less half their relative squared error
_TRUST = 4  # a tensor of the same name may fit as many times worse than another


@dataclass(frozen=True)
class Pair:
    """A tensor of the first model, and the tensor of the second that means the same."""

    first: str
    second: str


@dataclass
class Sketch:
    """What is known of a tensor: its shapes, and its elements at some places of each sample."""

    shapes: list[tuple[int, ...]] = field(default_factory=list)
    places: list[np.ndarray] = field(default_factory=list)

    def add(self, values: np.ndarray) -> None:
        self.shapes.append(values.shape)
        self.places.append(values[np.ix_(*_grid(values.shape))] if values.ndim else values.reshape(1))

    @property
    def flat(self) -> np.ndarray:
        return np.concatenate([part.reshape(-1) for part in self.places]).astype(np.float64)

    @property
    def bytes(self) -> int:
        return 4 * max(map(math.prod, self.shapes), default=1)


def _grid(shape: Sequence[int]) -> list[np.ndarray]:
    """Places along each axis, evenly apart, that make at most ``_PLACES`` elements."""
    limit = 64
    while math.prod(min(size, limit) for size in shape) > _PLACES and limit > 1:
        limit //= 2
    return [np.unique(np.linspace(0, size - 1, min(size, limit)).astype(int)) for size in shape]


def sketches(model: Model, feeds: Iterable[Feed]) -> dict[str, Sketch]:
    """The sketches of the tensors that a model computes. Tensors without elements have none."""
    feeds, found = list(feeds), {}
    for start in range(0, len(model.computed), _AT_ONCE):
        session = model.open(model.computed[start : start + _AT_ONCE])
        for feed in feeds:
            for name, values in session.run(feed).items():
                found.setdefault(name, Sketch()).add(values)
    return {name: sketch for name, sketch in found.items() if all(map(math.prod, sketch.shapes))}


def align(first: Mapping[str, Sketch], second: Mapping[str, Sketch]) -> list[Pair]:
    """The pairs, in the order of the second model. No tensor is in two pairs."""
    candidates = [
        ((1 - fit) / (_TRUST if a == b else 1), a != b, place, b, a)
        for place, (b, row) in enumerate(_fits(first, second).items())
        for a, fit in row.items()
        if fit >= _FITS
    ]
    alike = [b for b in second if b in first and first[b].shapes == second[b].shapes]
    pairs: dict[str, str] = {}
    taken: set[str] = set()
    for b, a in [*((b, a) for *_, b, a in sorted(candidates)), *((name, name) for name in alike)]:
        if b not in pairs and a not in taken:
            pairs[b] = a
            taken.add(a)
    return [Pair(pairs[name], name) for name in second if name in pairs]


def _fits(first: Mapping[str, Sketch], second: Mapping[str, Sketch]) -> dict[str, dict[str, float]]:
    """For each tensor of the second model, 1 less half the relative error to each of the first with its shapes."""
    groups: dict[tuple, tuple[list[str], list[str]]] = {}
    for side, tensors in enumerate((first, second)):
        for name, sketch in tensors.items():
            groups.setdefault(tuple(sketch.shapes), ([], []))[side].append(name)
    found: dict[str, dict[str, float]] = {}
    for a, b in groups.values():
        if a and b:
            rows, columns = (_finite([t[name].flat for name in names]) for t, names in ((second, b), (first, a)))
            sizes = np.maximum.outer((rows**2).sum(axis=1), (columns**2).sum(axis=1))
            apart = np.add.outer((rows**2).sum(axis=1), (columns**2).sum(axis=1)) - 2 * rows @ columns.T
            table = np.where(sizes > 0, 1 - apart / np.maximum(2 * sizes, 1e-300), 0.0)
            for row, name in zip(table, b, strict=True):
                found[name] = dict(zip(a, row.tolist(), strict=True))
    return found


def _finite(rows: list[np.ndarray]) -> np.ndarray:
    return np.nan_to_num(np.stack(rows), nan=0.0, posinf=0.0, neginf=0.0)
