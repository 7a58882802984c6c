"""From the sensitivities of a network to the cheapest point that keeps what a user allows.

1   points of the front are measured on the samples that sensitivities were measured on, which steer, and those of
    recipes, which correct the sensitivities
2   bisection between the cheapest that keeps the limits and the next cheaper one
3   the cheapest one that keeps the limits, or a more accurate one of nearly its cost, is proved on samples that chose
    nothing; where it misses the limits there, the next one
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from channelfold.passes.layers import sensitivity
from channelfold.passes.layers.sensitivity import Site
from channelfold.passes.search.front import Point, cheapest, front, most_accurate, scaled, uniform
from channelfold.passes.search.latency import Latency
from channelfold.passes.search.proof import Figures, Limits, Split, ranked, refined, undominated

_MATTERS = 0.02  # share of the error of a point from which on a guess in it is measured


@dataclass
class Choice:
    """A choice at work. ``samples``: files that sensitivities are measured on.

    ``clock``: the time of a point; ``latency`` predicts the time, to find mixes within a limit.
    """

    sites: list[Site]
    samples: Sequence[str]
    steering: Split
    proof: Split
    limits: Limits
    trials: int
    clock: Callable[[Point], float] | None = None
    latency: Latency | None = None
    times: dict[Point, float] = field(default_factory=dict)
    measured: list[Figures] = field(default_factory=list)
    proved: dict[Point, Figures] = field(default_factory=dict)

    def run(self) -> Figures:
        """The chosen point."""
        steering, used = self.steering, self._guesses(self._first())
        sites = sensitivity.checked(steering.board, self.samples, self.sites, used, steering.crew)
        self.sites = scaled(sites, lambda points: [f.error for f in self.steering.measured(points, sites)])
        if self.clock and self.latency and self.limits.max_latency is not None:
            self.times = self.latency.search(self.sites, self.limits.max_latency, self.clock)
            self.latency = self.latency.corrected(self.times)
        self.measured = self.steering.measured([*self._first(), *self.times], self.sites)
        if self.limits.of_accuracy:
            self.measured = refined(
                self.measured,
                self.limits,
                lambda error: cheapest(self.sites, error),
                lambda point: self.steering.measured([point], self.sites)[0],
                max(2, self.trials - self.trials // 2),
            )
        if self.clock:
            left = (f.point for f in undominated(self.measured) if f.point not in self.times)
            self.times |= {point: self.clock(point) for point in left}
        return self._proved()

    def met(self, chosen: Figures) -> bool:
        return self.small(chosen.point) and self.limits.accurate(self.proved[chosen.point])

    def small(self, point: Point) -> bool:
        """Whether a point keeps the limits of size and time."""
        limits = self.limits
        fast = limits.max_latency is None or self.times.get(point, math.inf) <= limits.max_latency
        return fast and (limits.max_size is None or point.size <= limits.max_size)

    def _first(self) -> list[Point]:
        points = [*uniform(self.sites), *front(self.sites, max(4, self.trials // 2))]
        if self.limits.max_size is not None:
            points.append(most_accurate(self.sites, self.limits.max_size))
        return points

    def _guesses(self, points: Sequence[Point]) -> set[tuple[tuple[str, ...], str]]:
        """The sites and options of points that hold a part of the error of theirs."""
        return {
            (site.nodes, option)
            for point in points
            for site, option in zip(self.sites, point.options, strict=True)
            if site.errors.get(option, 0.0) > _MATTERS * point.predicted
        }

    def _proved(self) -> Figures:
        """The best point that keeps the limits on the samples of the proof as well; else the nearest one."""
        fits = [f for f in self.measured if self.small(f.point)]
        fits = fits or [min(self.measured, key=lambda f: (self.times.get(f.point, math.inf), f.point.size))]
        best = min(fits, key=lambda f: f.error)
        kept = ranked([f for f in undominated(fits) if self.limits.accurate(f)])
        for candidate in kept[: self.trials] if self.limits.of_accuracy else [best]:
            self.proved[candidate.point] = self.proof.measured([candidate.point], self.sites)[0]
            if self.limits.accurate(self.proved[candidate.point]):
                return candidate
        self.proved[best.point] = self.proof.measured([best.point], self.sites)[0]
        return best
