"""The front between cost and error, from the errors of the sites alone: they add up.

along the front      p_l = argmin_p  E_l(p) + price * cost_l(p)      for every price
within a budget      an exact knapsack: least error within bytes, or least cost within an error
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from channelfold.passes.layers.sensitivity import Site
from channelfold.passes.layers.switchboard import FLOAT
from channelfold.passes.numeric.knapsack import knapsack
from channelfold.runtime.errors import UsageError

_PRICES = 200


@dataclass(frozen=True)
class Point:
    """An option for every site, with the bytes of the weights, the cost and the error that the sum predicts."""

    options: tuple[str, ...]
    size: int
    cost: float
    predicted: float

    def chosen(self, sites: Sequence[Site]) -> dict[str, str]:
        """The option of every node."""
        return {name: option for site, option in zip(sites, self.options, strict=True) for name in site.nodes}


def point(sites: Sequence[Site], options: Sequence[str]) -> Point:
    pairs = list(zip(sites, options, strict=True))
    return Point(
        tuple(options),
        sum(site.sizes[option] for site, option in pairs),
        float(sum(site.costs[option] for site, option in pairs)),
        float(sum(site.errors.get(option, 0.0) for site, option in pairs)),
    )


def uniform(sites: Sequence[Site]) -> list[Point]:
    """One option for all sites that have it, as recipes have; the other sites stay float."""
    names = dict.fromkeys(option for site in sites for option in site.options())
    return [point(sites, [name if name in site.options() else FLOAT for site in sites]) for name in names]


def scaled(sites: Sequence[Site], measure: Callable[[Sequence[Point]], Sequence[float]]) -> list[Site]:
    """The sites with the errors of every option nearer to what ``measure`` finds where all of them have the option.

    Half of the difference, in dB: where errors do not add up, that may be due to a few of the sites, and others have
    fewer samples than ``measure``.
    """
    points = uniform(sites)
    floor, *found = measure(points)
    factors = {
        next(o for o in p.options if o != FLOAT): math.sqrt((error - floor) / (p.predicted - points[0].predicted))
        for p, error in zip(points[1:], found, strict=True)
        if error > floor and p.predicted > points[0].predicted
    }
    return [replace(s, errors={o: e * factors.get(o, 1.0) for o, e in s.errors.items()}) for s in sites]


def front(sites: Sequence[Site], count: int) -> list[Point]:
    """Up to ``count`` points of the convex front, from the dearest to the cheapest, evenly spread in dB."""
    saved = [(e, site.costs[FLOAT] - site.costs[o]) for site in sites for o, e in site.errors.items()]
    rates = [error / cost for error, cost in saved if 0 < error < np.inf and cost > 0]
    if not rates:
        return [point(sites, [FLOAT] * len(sites))]
    prices = np.geomspace(min(rates) / 10, max(rates) * 10, _PRICES)
    found = dict.fromkeys(point(sites, [_best(site, price) for site in sites]) for price in prices)
    points = sorted(found, key=lambda p: -p.cost)
    levels = np.log(np.maximum([p.predicted for p in points], min(error for error, _ in saved if error > 0)))
    wanted = np.linspace(levels[0], levels[-1], count)
    return [points[i] for i in sorted({int(np.argmin(np.abs(levels - level))) for level in wanted})]


def _best(site: Site, price: float) -> str:
    return min(site.options(), key=lambda o: (site.errors.get(o, 0.0) + price * site.costs[o], site.costs[o]))


def cheapest(sites: Sequence[Site], error: float) -> Point:
    """The least cost whose predicted error is at most ``error``."""
    return _solved(
        sites, [[(-site.costs[o], site.errors.get(o, 0.0)) for o in site.options()] for site in sites], error
    )


def most_accurate(sites: Sequence[Site], size: float) -> Point:
    """The least predicted error within ``size`` bytes; the fewest bytes where these are more."""
    costs = [[(-site.errors.get(o, 0.0), float(site.sizes[o])) for o in site.options()] for site in sites]
    try:
        return _solved(sites, costs, size)
    except UsageError:
        return point(sites, [min(site.options(), key=site.sizes.__getitem__) for site in sites])


def _solved(sites: Sequence[Site], options: list[list[tuple[float, float]]], budget: float) -> Point:
    finite = [[(i, pair) for i, pair in enumerate(own) if np.isfinite(pair).all()] for own in options]
    picks = knapsack([[pair for _, pair in own] for own in finite], budget)
    places = [own[pick][0] for own, pick in zip(finite, picks, strict=True)]
    return point(sites, [site.options()[place] for site, place in zip(sites, places, strict=True)])
