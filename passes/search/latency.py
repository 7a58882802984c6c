"""The time of a mix of options, predicted from the times of a few files.

    T(mix) = rest + sum of t_l(p_l) + sum over borders of b_lm

``t_l(p)``  of the nodes of a site, in the file where all sites have the option p
``b_lm``    of quantizing, dequantizing and changing the layout where int8 meets float: a rate times the elements of the
            tensor between the sites

The rate comes from two files in which every other site is int8, in one the even, in the other the odd ones. Whatever
belongs to which site, their times add up to those of all int8 and all float, and what is over was spent on borders.
Mixes are measured then, and one factor corrects all predictions. Where the times come from is told by a ``Timer``:
``profiled`` runs files in ONNX Runtime, ``modelled`` reads the plans of TensorRT.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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
_ORIGINAL = ""


@dataclass(frozen=True)
class Timed:
    """The milliseconds of a run of a file: of all its nodes, and of those of every site."""

    whole: float
    sites: Sequence[float]


Timer = Callable[[Mapping[str, Path], Sequence[Sequence[str]]], Mapping[str, Timed]]  # of files, and nodes of sites
Edge = tuple[int, int]  # the places of two sites, the second of which reads what the first has written


@dataclass(frozen=True)
class Latency:
    """A model of the time of mixes, in milliseconds. ``times``: by option, of every site; ``whole``: of the original.

    ``borders``: the time at the edge between two sites one of which is int8. ``factor``: measured against predicted.
    """

    times: tuple[Mapping[str, float], ...]
    borders: Mapping[Edge, float]
    rest: float
    whole: float
    factor: float = 1.0

    def share(self, options: Sequence[str]) -> float:
        """The predicted time of a mix, as a share of the original's."""
        own = sum(self._time(place, option) for place, option in enumerate(options))
        met = sum(ms for (a, b), ms in self.borders.items() if _differ(options[a], options[b]))
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
        for (a, b), ms in self.borders.items():
            if place in (a, b) and _differ(option, around[b if place == a else a]):
                met += ms
        return max(self._time(place, option) + met, 0.0)


def _differ(one: str, other: str) -> bool:
    """Whether neighbours read activations in different formats."""
    first, second = (OPTIONS[option].activations if option in OPTIONS else "none" for option in (one, other))
    return first != second


def learned(
    original: Path, graph: gs.Graph, sites: Sequence[Site], file_of: Callable[[Point], Path], feed: Feed, timer: Timer
) -> Latency:
    """The model of a graph with ``sites``, from the times of files that ``file_of`` writes.

    ``original``: the model that shares relate to. ``feed``: on which sizes between sites are counted.
    """
    names = dict.fromkeys(option for site in sites for option in site.options())
    mixes = {name: [name if name in site.options() else FLOAT for site in sites] for name in names}
    acting = next((name for name in names if name in ACTING), None)
    halves = {
        f"every other {odd}": [
            acting if place % 2 == odd and acting in site.options() else FLOAT for place, site in enumerate(sites)
        ]
        for odd in ((0, 1) if acting is not None else ())
    }
    mixes |= halves
    paths = {name: file_of(point(sites, mix)) for name, mix in mixes.items()}
    timed = timer({_ORIGINAL: original, **paths}, [site.nodes for site in sites])
    rest = timed[FLOAT].whole - sum(timed[FLOAT].sites)
    times = _with_rest(timed, sites, rest)
    edges = _edges(graph, sites, feed)
    borders = dict.fromkeys(edges, 0.0)
    if acting is not None:
        met = {name: sum(n for (a, b), n in edges.items() if _differ(mix[a], mix[b])) for name, mix in mixes.items()}
        over = sum(timed[name].whole for name in halves) - timed[FLOAT].whole - timed[acting].whole
        more = sum(met[name] for name in halves) - met[acting]
        rate = max(over, 0.0) / more if more > 0 else 0.0
        borders = {edge: rate * elements for edge, elements in edges.items()}
        times = _without(times, borders, sites, acting)
    return Latency(times, borders, rest, timed[_ORIGINAL].whole)


def _with_rest(timed: Mapping[str, Timed], sites: Sequence[Site], rest: float) -> tuple[Mapping[str, float], ...]:
    """The times of the options of every site. What other nodes take more than in float is spread over the sites."""
    found = [{option: timed[option].sites[place] for option in site.options()} for place, site in enumerate(sites)]
    for option in dict.fromkeys(option for times in found for option in times):
        having = [times for times in found if option in times]
        more = timed[option].whole - rest - sum(times.get(option, times[FLOAT]) for times in found)
        for times in having:
            times[option] += more / len(having)
    return tuple(found)


def _without(
    times: Sequence[Mapping[str, float]], borders: Mapping[Edge, float], sites: Sequence[Site], acting: str
) -> tuple[Mapping[str, float], ...]:
    """The times without the borders that the file of all int8 has around sites that stay float."""
    found = [dict(time) for time in times]
    for (a, b), ms in borders.items():
        ends = [place for place in (a, b) if acting in sites[place].options()]
        if len(ends) == 1:
            found[ends[0]][acting] -= ms
    return tuple(found)


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
