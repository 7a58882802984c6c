"""The time of a mix of options in ONNX Runtime, predicted from profiles of a few files.

    T(mix) = rest + sum of t_l(p_l) + sum over borders of b_lm

``t_l(p)``  the nodes that ONNX Runtime makes of a site, in the file where all sites have the option p
``b_lm``    quantizing, dequantizing and changing the layout where int8 meets float: a rate times the elements of the
            tensor between the sites

A profile tells the shares of the nodes, and a run without the profiler the time of all together. The rate comes from
two files in which every other site is int8, in one the even, in the other the odd ones. Whatever belongs to which site,
their times add up to those of all int8 and all float, and what is over was spent on borders. Mixes are measured then,
and one factor corrects all predictions.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from channelfold.passes.layers.sensitivity import Site
from channelfold.passes.layers.switchboard import FLOAT
from channelfold.passes.operators import operator
from channelfold.passes.search.front import Point, most_accurate, point
from channelfold.passes.search.options import ACTING
from channelfold.runtime.io import edit, files
from channelfold.runtime.io.session import Feed, Session
from channelfold.runtime.io.shapes import measured_shapes
from channelfold.runtime.stats.bench import latencies
from channelfold.runtime.stats.profile import NodeTime, profiles

_ROUNDS = 6  # of neighbours that settle
_UNIT = 1e6  # of a millisecond, in which knapsacks count
_MADE = re.compile(r"(_nchwc|_token_\d+|_q|_dq|/duplicated|/\w+Fusion\w*|_kernel)+_*$")  # ends of names of ONNX Runtime
_PRODUCTS = re.compile(r"Conv|MatMul|Gemm")  # in the names of operators, fused and quantized ones too
_IN_FRONT = ("QuantizeLinear", "DynamicQuantizeLinear")  # belong to what reads their results

Edge = tuple[int, int]  # the places of two sites, the second of which reads what the first has written


_CORRECTIONS = 3  # mixes that are measured in search of one within a limit


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
    return (one in ACTING) != (other in ACTING)


def learned(
    original: Path,
    graph: gs.Graph,
    sites: Sequence[Site],
    file_of: Callable[[Point], Path],
    feed: Feed,
    *,
    threads: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Latency:
    """The model of a graph with ``sites``, from profiles and runs in turns of files that ``file_of`` writes.

    ``original``: the model that shares relate to. All run on one feed. ``clock`` gives the time of runs in seconds.
    """
    names = dict.fromkeys(option for site in sites for option in site.options())
    mixes = {name: [name if name in site.options() else FLOAT for site in sites] for name in names}
    acting = next((name for name in names if name in ACTING), None)
    if acting is not None:
        for odd in (0, 1):
            mixes[f"every other {odd}"] = [
                acting if place % 2 == odd and acting in site.options() else FLOAT for place, site in enumerate(sites)
            ]
    paths = {name: file_of(point(sites, mix)) for name, mix in mixes.items()}
    timed = profiles(paths, feed, threads=threads)
    whole = shortest({"": original, **paths}, feed, threads=threads, clock=clock)
    owned = {name: owners(paths[name], timed[name], [site.nodes for site in sites]) for name in names}
    scales = {name: whole[name] / max(sum(node.ms for node in timed[name]), 1e-9) for name in names}
    times = tuple({o: scales[o] * owned[o][place] for o in site.options()} for place, site in enumerate(sites))
    edges = _edges(graph, sites, feed)
    rate, inside = 0.0, 0.0
    if acting is not None:
        met = {name: sum(n for (a, b), n in edges.items() if _differ(mix[a], mix[b])) for name, mix in mixes.items()}
        halves = [name for name in mixes if name not in names]
        over = sum(whole[name] for name in halves) - whole[FLOAT] - whole[acting]
        more = sum(met[name] for name in halves) - met[acting]
        rate, inside = (max(over, 0.0) / more if more > 0 else 0.0), met[acting]
    rest = whole[FLOAT] - sum(time[FLOAT] for time in times)
    borders = {edge: rate * elements for edge, elements in edges.items()}
    times = _without(times, borders, sites, acting) if inside else times
    return Latency(times, borders, rest, whole[""])


def shortest(
    models: Mapping[str, Path], feed: Feed, *, threads: int | None, clock: Callable[[], float]
) -> dict[str, float]:
    """The milliseconds of a run of every model, in turns: the lower quartile, for interruptions make runs longer."""
    sessions = {name: Session(path, threads=threads) for name, path in models.items()}
    runs = {name: functools.partial(s.run, s.accepted(feed)) for name, s in sessions.items()}
    return {found.name: found.low for found in latencies(runs, rounds=25, seconds=10.0, clock=clock)}


def _without(
    times: Sequence[Mapping[str, float]], borders: Mapping[Edge, float], sites: Sequence[Site], acting: str | None
) -> tuple[Mapping[str, float], ...]:
    """The times without the borders that the file of all int8 has around sites that stay float."""
    found = [dict(time) for time in times]
    for (a, b), ms in borders.items():
        ends = [place for place in (a, b) if acting in sites[place].options()]
        if len(ends) == 1 and acting is not None:
            found[ends[0]][acting] -= ms
    return tuple(found)


# ---- which nodes of ONNX Runtime belong to which site ------------------------------------------------------------


def owners(path: Path, nodes: Sequence[NodeTime], sites: Sequence[Sequence[str]]) -> list[float]:
    """The time of the nodes of every site, as ONNX Runtime runs them.

    A product belongs to the site whose result it writes, maybe after nodes that were fused into it. A quantizer, and
    what expands a constant, belongs to the product that reads it, another node to the product in front of it.
    """
    with tempfile.TemporaryDirectory(prefix="channelfold-") as folder:
        optimized = Path(folder, "optimized.onnx")
        Session(path, optimized=optimized)
        model = onnx.load(optimized, load_external_data=False).graph
    tails = _tails(files.load(path), sites)
    constants = {tensor.name for tensor in model.initializer}
    writers = {name: node for node in model.node for name in node.output if name}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    known = {id(node): place for node in model.node if (place := _product(node, tails)) is not None}

    def nearest(node: onnx.NodeProto, forward: bool) -> int | None:
        queue, seen = deque([node]), {id(node)}
        while queue:
            here = queue.popleft()
            if id(here) in known:
                return known[id(here)]
            if forward:
                following = [reader for name in here.output for reader in readers.get(name, ())]
            else:
                following = [writers[name] for name in here.input if name in writers]
            for other in following:
                if id(other) not in seen:
                    seen.add(id(other))
                    queue.append(other)
        return None

    places: dict[str, int | None] = {}
    for node in model.node:
        expands = all(name in constants for name in node.input if name)
        first = node.op_type in _IN_FRONT or expands
        place = nearest(node, first)
        places[node.name] = nearest(node, not first) if place is None else place
    times = [0.0] * len(sites)
    for node in nodes:
        if (place := places.get(node.name)) is not None:
            times[place] += node.ms
    return times


def _product(node: onnx.NodeProto, tails: Mapping[str, int]) -> int | None:
    if not _PRODUCTS.search(node.op_type):
        return None
    for name in (*node.output, node.name):
        for found in (name, _MADE.sub("", name)):
            if found in tails:
                return tails[found]
    return None


def _tails(graph: gs.Graph, sites: Sequence[Sequence[str]]) -> dict[str, int]:
    """Which site a name is of: nodes and tensors from a linear of the site to the next ones, the linear first."""
    places = {name: place for place, names in enumerate(sites) for name in names}
    found: dict[str, int] = {}
    queue = deque((node, places[node.name]) for node in graph.nodes if node.name in places)
    while queue:
        node, place = queue.popleft()
        if node.name in found and node.name not in places:
            continue
        found.setdefault(node.name, place)
        for tensor in node.outputs:
            found.setdefault(tensor.name, place)
            queue.extend((reader, place) for reader in edit.consumers(tensor) if not operator(reader).weighted)
    return found


def _edges(graph: gs.Graph, sites: Sequence[Site], feed: Feed) -> dict[Edge, int]:
    """The elements of the tensor between each two sites one of which reads the other's result."""
    places = {name: place for place, site in enumerate(sites) for name in site.nodes}
    shapes = measured_shapes(graph, feed)
    found: dict[Edge, int] = {}
    for node in graph.nodes:
        if node.name not in places:
            continue
        elements = int(np.prod(shapes.get(node.inputs[0].name, (0,))))
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
