"""The time of a mix of options, predicted from the times of a few files.

    T(mix) = rest + sum of t_l(p_l) + sum over borders of b_lm

``t_l(p)``  of the nodes of a site, in the file where all sites have the option p
``b_lm``    of quantizing, dequantizing and changing the layout where int8 meets float: what the two sites take more by
            that for an element, times the elements of the tensor between them

What a site takes more comes from two files in which every other site is int8, in one the even, in the other the odd
ones: each site is among neighbours of the other option there, once in int8 and once in float. What no site of a file
takes is spread over those that are not float. Mixes are measured then, and one factor corrects all predictions.

``profiled`` has the times of files in ONNX Runtime, ``modelled`` those of engines, by their plans, and ``tabled`` those
that ``bench`` has recorded.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.layers.sensitivity import Site
from channelfold.passes.layers.switchboard import FLOAT
from channelfold.passes.search.front import Point, most_accurate, point
from channelfold.passes.search.options import ACTING, OPTIONS
from channelfold.runtime.io import edit
from channelfold.runtime.io.session import Feed
from channelfold.runtime.io.shapes import measured_shapes

_ROUNDS = 6  # of neighbours that settle
_UNIT = 1e6  # of a millisecond, in which knapsacks count
_CORRECTIONS = 3  # mixes that are measured in search of one within a limit
ORIGINAL = ""
_HALVES = ("even sites", "odd sites")


@dataclass(frozen=True)
class Timed:
    """The milliseconds of a run of a file: of all its nodes, and of those of every site."""

    whole: float
    sites: Sequence[float]


Edge = tuple[int, int]  # the places of two sites, the second of which reads what the first has written


@dataclass(frozen=True)
class Latency:
    """A model of the time of mixes, in milliseconds. ``times``: by option, of every site; ``whole``: of the original.

    ``borders``: the times at the edge between two sites, where the first alone is int8, and where the second is.
    ``factor``: measured against predicted.
    """

    times: tuple[Mapping[str, float], ...]
    borders: Mapping[Edge, tuple[float, float]]
    rest: float
    whole: float
    factor: float = 1.0

    def share(self, options: Sequence[str]) -> float:
        """The predicted time of a mix, as a share of the original's."""
        own = sum(self._time(place, option) for place, option in enumerate(options))
        met = sum(_met(pair, options[a], options[b]) for (a, b), pair in self.borders.items())
        return self.factor * (self.rest + own + met) / self.whole

    def within(self, sites: Sequence[Site], share: float) -> Point:
        """The mix of the least predicted error whose predicted time is at most ``share``; else the fastest one known.

        What a border costs depends on the neighbours, so that the choice is made again with the neighbours chosen last.
        """
        room = share * self.whole / self.factor - self.rest
        found: list[Point] = []
        for start in (FLOAT, *ACTING):
            around = [start if start in site.options() else FLOAT for site in sites]
            for _ in range(_ROUNDS):
                priced = [
                    dataclasses.replace(
                        site, sizes={o: int(_UNIT * self._near(place, o, around)) for o in site.options()}
                    )
                    for place, site in enumerate(sites)
                ]
                new = list(most_accurate(priced, max(room, 0.0) * _UNIT).options)
                found.append(point(sites, new))
                if new == around:
                    break
                around = new
        fits = [one for one in found if self.share(one.options) <= share]
        return min(fits, key=lambda p: p.predicted) if fits else min(found, key=lambda p: self.share(p.options))

    def search(self, sites: Sequence[Site], share: float, clock: Callable[[Point], float]) -> dict[Point, float]:
        """The measured shares of mixes within a limit: predicted, measured, and predicted again with what that tells.

        ``clock`` measures the share of a mix.
        """
        model, found = self, {}
        for _ in range(_CORRECTIONS):
            mix = model.within(sites, share)
            if mix in found:
                break
            found[mix] = clock(mix)
            model = self.corrected(found)
        return found

    def corrected(self, measured: Mapping[Point, float]) -> Latency:
        """The model whose factor fits the measured shares of mixes."""
        ratios = [share / self.share(mix.options) for mix, share in measured.items()]
        return dataclasses.replace(self, factor=self.factor * statistics.median(ratios))

    def _time(self, place: int, option: str) -> float:
        times = self.times[place]
        return times.get(option, times[FLOAT])

    def _near(self, place: int, option: str, around: Sequence[str]) -> float:
        """The time of an option of a site among neighbours, which bear half of every border."""
        met = 0.0
        for (a, b), pair in self.borders.items():
            if place in (a, b):
                met += _met(pair, option if place == a else around[a], option if place == b else around[b])
        return max(self._time(place, option) + met, 0.0)


def _met(pair: tuple[float, float], first: str, second: str) -> float:
    """The time at the edge between two sites with options."""
    return pair[second in ACTING] if _differ(first, second) else 0.0


def _differ(one: str, other: str) -> bool:
    """Whether neighbours read activations in different formats."""
    first, second = (OPTIONS[option].activations if option in OPTIONS else "none" for option in (one, other))
    return first != second


def mixes(sites: Sequence[Site]) -> dict[str, list[str]]:
    """The mixes whose times tell those of all others: each option for all sites that have it, and the halves."""
    names = dict.fromkeys(option for site in sites for option in site.options())
    found = {name: [name if name in site.options() else FLOAT for site in sites] for name in names}
    acting = next((name for name in names if name in ACTING), FLOAT)
    for half in _HALVES if acting != FLOAT else ():
        found[half] = [o if place % 2 == _HALVES.index(half) else FLOAT for place, o in enumerate(found[acting])]
    return found


def learned(graph: gs.Graph, sites: Sequence[Site], timed: Mapping[str, Timed], feed: Feed) -> Latency:
    """The model of a graph with ``sites``, from the times of the original and of ``mixes``.

    An option without times counts like float, and borders cost nothing where there are no halves. ``feed``: on which
    sizes between sites are counted.
    """
    rest = timed[FLOAT].whole - sum(timed[FLOAT].sites)
    known = {name: mix for name, mix in mixes(sites).items() if name in timed}
    times = _with_rest(timed, known, rest)
    edges = _edges(graph, sites, feed)
    borders = dict.fromkeys(edges, (0.0, 0.0))
    acting = next((name for name in known if name in ACTING), None)
    own = [{option: times[name][place] for name in known for option in [known[name][place]] if name == option}
           for place in range(len(sites))]  # fmt: skip
    if acting is not None and all(half in known for half in _HALVES):
        rates = _rates(known, times, edges, acting)
        borders = {
            (a, b): (n * (rates[1, a] + rates[0, b]), n * (rates[0, a] + rates[1, b])) for (a, b), n in edges.items()
        }
        for (a, b), pair in borders.items():  # the file of all int8 has borders around sites that stay float
            met = _met(pair, known[acting][a], known[acting][b])
            if met:
                own[a if known[acting][a] == acting else b][acting] -= met
    return Latency(tuple(own), borders, rest, timed[ORIGINAL].whole)


def _rates(
    known: Mapping[str, Sequence[str]], times: Mapping[str, Sequence[float]], edges: Mapping[Edge, int], acting: str
) -> np.ndarray:
    """What every site takes more for an element at a border, where it is float and where it is int8, (2, sites).

    The mean of its own rate and that of all sites: the profile of a site is noisy, and sites differ.
    """
    more, met = np.zeros((2, len(known[FLOAT]))), np.zeros((2, len(known[FLOAT])))
    for half in _HALVES:
        for place, option in enumerate(known[half]):
            side = int(option == acting)
            more[side, place] += times[half][place] - times[option][place]
            for (a, b), elements in edges.items():
                other = b if place == a else a
                if place in (a, b):
                    new = _differ(option, known[half][other]) - _differ(option, known[option][other])
                    met[side, place] += elements * new
    own = np.divide(more, met, out=np.zeros_like(more), where=met > 0)
    every = (more * (met > 0)).sum(axis=1) / np.maximum((met * (met > 0)).sum(axis=1), 1)
    return (own + every[:, None]) / 2


def _with_rest(
    timed: Mapping[str, Timed], known: Mapping[str, Sequence[str]], rest: float
) -> dict[str, Sequence[float]]:
    """The times of all sites in every mix. What other nodes take more than in float is spread over those not float."""
    found = {}
    for name, mix in known.items():
        times = list(timed[name].sites)
        having = [place for place, option in enumerate(mix) if option != FLOAT]
        more = timed[name].whole - rest - sum(times)
        for place in having:
            times[place] += more / len(having)
        found[name] = times
    return found


def _edges(graph: gs.Graph, sites: Sequence[Site], feed: Feed) -> dict[Edge, int]:
    """The elements of the tensor between each two sites one of which reads the other's result."""
    places = {name: place for place, site in enumerate(sites) for name in site.nodes}
    shapes = measured_shapes(graph, feed)
    found: dict[Edge, int] = {}
    for node in graph.nodes:
        if node.name not in places:
            continue
        elements = math.prod(shapes.get(node.inputs[0].name, (0,)))
        for place in _before(node, places):
            if place != places[node.name]:
                edge = place, places[node.name]
                found[edge] = max(found.get(edge, 0), elements)
    return found


def _before(node: gs.Node, places: Mapping[str, int]) -> Iterable[int]:
    """The nearest sites in front of a node."""
    queue, seen, found = deque([edit.producer(node.inputs[0])]), set(), {}
    while queue:
        here = queue.popleft()
        if here is None or id(here) in seen:
            continue
        seen.add(id(here))
        if here.name in places:
            found[places[here.name]] = None
        else:
            queue.extend(edit.producer(tensor) for tensor in here.inputs)
    return found
