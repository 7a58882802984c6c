"""Points of the front, measured on samples that chose nothing, and what a user allows them to lose.

snr         of the worst output, in dB
agreement   of the argmax, of the worst output
loss        top-1 accuracy lost, where the samples have labels; else the share of argmaxes that differ, where an
            output holds class scores; else the squared error of the outputs, relative (1 % is 20 dB)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from channelfold.passes.layers.output_error import Errors, decibels
from channelfold.passes.layers.sensitivity import Crew, Site, Trial
from channelfold.passes.layers.switchboard import Board
from channelfold.passes.search.front import Point

RELATIVE = "relative squared error"
_SIGMA = 1.96  # of a two-sided interval of 95 %
_TINY = 1e-30
_NEAR = 1.01  # of the least cost: up to here a more accurate point is the better one


@dataclass(frozen=True)
class Figures:
    """A point as measured. ``loss`` lies between ``low`` and ``high`` with a confidence of 95 %."""

    point: Point
    error: float
    snr: float
    agreement: float
    loss: float
    low: float
    high: float


@dataclass(frozen=True)
class Limits:
    """What the user allows. ``max_size``: bytes of the file; ``max_latency``: relative to float."""

    max_loss: float | None = None
    min_snr: float | None = None
    min_agreement: float | None = None
    max_size: float | None = None
    max_latency: float | None = None

    def accurate(self, found: Figures) -> bool:
        agreement = 1.0 if math.isnan(found.agreement) else found.agreement
        return (
            (self.max_loss is None or found.loss <= self.max_loss)
            and (self.min_snr is None or found.snr >= self.min_snr)
            and (self.min_agreement is None or agreement >= self.min_agreement)
        )

    @property
    def of_accuracy(self) -> bool:
        return any(limit is not None for limit in (self.max_loss, self.min_snr, self.min_agreement))


@dataclass
class Split:
    """Samples to measure points on: files of the board, with a label for each or none. ``name``: what it is for.

    ``metric`` gives the loss of a point by a metric that has data of its own. ``typed``: the errors of the type of what
    stays float, which come to those of every point.
    """

    name: str
    board: Board
    files: tuple[str, ...]
    labels: tuple[int, ...] = ()
    metric: Callable[[Point], float] | None = None
    crew: Crew = field(default_factory=Crew)
    typed: Errors | None = None
    known: dict[tuple[str, ...], Figures] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """What ``loss`` is."""
        if self.metric:
            return "metric"
        if self.labels:
            return "top-1 accuracy"
        compared = any(not math.isnan(figures.agreement) for figures in self.known.values())
        return "argmax agreement" if compared else RELATIVE

    def measured(self, points: Sequence[Point], sites: Sequence[Site]) -> list[Figures]:
        """The figures of points; each point is measured once."""
        new = {point.options: point for point in points if point.options not in self.known}
        trials = [Trial(self.board, self.files, (point.chosen(sites),), labels=self.labels) for point in new.values()]
        for point, errors in zip(new.values(), self.crew.each(self.name, trials), strict=True):
            errors = errors.plus(self.typed) if self.typed else errors
            self.known[point.options] = figures(point, errors, 0, self.board.scores, bool(self.labels), self.metric)
        return [replace(self.known[point.options], point=point) for point in points]


def figures(
    point: Point,
    errors: Errors,
    place: int,
    scores: Sequence[bool],
    labelled: bool,
    metric: Callable[[Point], float] | None = None,
) -> Figures:
    """The figures of a point from the errors of the configuration in a ``place``."""
    lost, energy = errors.lost[place].sum(axis=0), errors.energy.sum(axis=0)
    snr = decibels(float(np.max(lost / np.maximum(energy, _TINY))))
    agreed = errors.agreed[place][:, list(scores)]
    agreement = float(agreed.mean(axis=0).min()) if agreed.size and np.isfinite(agreed).all() else math.nan
    error = float(errors.by_sample()[place].mean())
    if metric:
        loss = metric(point)
        return Figures(point, error, snr, agreement, loss, loss, loss)
    share = labelled or not math.isnan(agreement)
    if labelled:
        losses = errors.right[0].astype(float) - errors.right[1 + place]
    elif share:
        losses = 1 - agreed.mean(axis=1)
    else:
        losses = errors.by_sample()[place]
    return Figures(point, error, snr, agreement, *interval(losses, 1.0 if share else math.inf))


def interval(losses: np.ndarray, most: float = math.inf) -> tuple[float, float, float]:
    """The mean of losses per sample, and its interval of confidence. Where all are equal, by the rule of three.

    ``most``: what a loss is at most.
    """
    count, mean = len(losses), float(losses.mean())
    if np.ptp(losses) == 0:
        return mean, mean, min(mean + 3 / count, most)
    half = _SIGMA * float(losses.std(ddof=1)) / math.sqrt(count)
    return mean, mean - half, min(mean + half, most)


def undominated(found: Sequence[Figures]) -> list[Figures]:
    """The points that no other has at most the cost and at most the error of, from the dearest to the cheapest."""
    best: list[Figures] = []
    for figures in sorted(found, key=lambda f: (f.point.cost, f.error, f.point.size)):
        if not best or figures.error < best[-1].error:
            best.append(figures)
    return best[::-1]


def ranked(found: Sequence[Figures]) -> list[Figures]:
    """Points from the cheapest on; those of nearly the least cost come first, the most accurate of these before all."""
    most = _NEAR * min((f.point.cost for f in found), default=0.0)
    return sorted(found, key=lambda f: (0.0, f.error) if f.point.cost <= most else (1.0, f.point.cost))


def refined(
    found: list[Figures],
    limits: Limits,
    solve: Callable[[float], Point],
    measure: Callable[[Point], Figures],
    trials: int,
) -> list[Figures]:
    """``found`` and points between the cheapest that keeps the limits and the next cheaper one, by bisection.

    Losses that count samples are not monotonic: where nothing is left between the two, points are tried where the gap
    between cheaper ones is widest. ``solve`` gives the cheapest point of a predicted error.
    """
    found = list(found)
    for _ in range(trials):
        kept = [f for f in found if limits.accurate(f)]
        if not kept:
            break
        least = min(kept, key=lambda f: f.point.cost).point
        cheaper = [f.point for f in found if f.point.cost < least.cost and f.point.predicted > least.predicted]
        pairs = list(itertools.pairwise([least, *sorted(cheaper, key=lambda p: p.predicted)]))
        wide = sorted(pairs[1:], key=lambda pair: pair[1].cost - pair[0].cost)
        tried = {f.point.options for f in found}
        new = (solve(_between(pair)) for pair in [*pairs[:1], *wide])
        point = next((point for point in new if point.options not in tried), None)
        if point is None:
            break
        found.append(measure(point))
    return found


def _between(pair: tuple[Point, Point]) -> float:
    """The error between those of two points, evenly in dB."""
    low, high = sorted(point.predicted for point in pair)
    return math.sqrt(max(low, high * 1e-4, _TINY) * high)
