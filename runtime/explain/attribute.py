"""The contribution of every site of a model to the error of its outputs, and what restoring sites recovers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from channelfold.runtime.data.sources import Data
from channelfold.runtime.errors import no_progress
from channelfold.runtime.explain.align import BLOCK, Pair, Sketch, align, sketches
from channelfold.runtime.explain.model import Graft, Model
from channelfold.runtime.io.session import Feed
from channelfold.runtime.stats.observe import within

SAMPLES = 8  # on which sites are measured
_SKETCHED = 2
_EXACT = 1e-5  # relative error of a site that is rounding
_ROUNDS = 32  # of looking for pairs that do not mean the same; a chain of them takes as many
_STRANGE, _NOTABLE = 4, 1e-4  # squared errors of a site: own against so far, and the least that is looked at
_STEPS = (1, 2, 3, 5, 8, 12, 20)  # numbers of sites that are restored together, to see what it recovers

Progress = Callable[[str, int, int], None]
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "MatMulInteger", "ConvInteger", "MatMulNBits", "FusedMatMul")


@dataclass
class Site:
    """A part of the second model between tensors that both models compute.

    ``nodes`` are those of the site, ``node`` the one that stands for it. ``own``: the relative error (squared) at its
    end where it begins with the values of the first model; ``so_far``: where it begins with its own values.
    ``output``: the relative error (squared) of the outputs that its own error causes.
    """

    pair: Pair
    node: str
    op: str
    nodes: list[str]
    given: list[str]
    sums: dict[str, float] = field(default_factory=lambda: {"own": 0.0, "so_far": 0.0, "signal": 0.0})
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def own(self) -> float:
        return self.sums["own"] / self.sums["signal"] if self.sums["signal"] else 0.0

    @property
    def so_far(self) -> float:
        return self.sums["so_far"] / self.sums["signal"] if self.sums["signal"] else 0.0


@dataclass(frozen=True)
class Explanation:
    """``sites``, the largest contribution first; ``snr`` of the outputs now and with the first n sites restored."""

    sites: list[Site]
    contributions: dict[str, float]
    total: float
    restored: dict[int, float]
    aligned: int
    linears: int
    covered: int
    depth: list[tuple[str, float]]
    samples: int


class Explainer:
    """Two models cut into sites by the tensors that both compute."""

    def __init__(self, first: Model, second: Model, data: Data, progress: Progress = no_progress):
        self.first, self.second, self.progress = first, second, progress
        self.feeds = list(data.first(SAMPLES))
        progress("align", 0, 2)
        known = sketches(first, self.feeds[:_SKETCHED])
        progress("align", 1, 2)
        self.known: Mapping[str, Sketch] = known
        self._cut(self._in_order(align(known, sketches(second, self.feeds[:_SKETCHED]))))
        self._drop_strangers()
        self.outputs = [name for name in first.outputs if name in known and name in second.outputs]

    def _in_order(self, pairs: list[Pair]) -> list[Pair]:
        """The pairs without those whose site would read, in the second model, what only comes behind it there."""
        order = {name: place for place, name in enumerate(self.second.computed)}
        while True:
            to_second = {pair.first: pair.second for pair in pairs}
            kept = []
            for pair in pairs:
                _, given = self.first.behind(pair.first, to_second.keys() - {pair.first})
                reads = (order[to_second[name]] for name in given if name in to_second)
                if all(place < order[pair.second] for place in reads):
                    kept.append(pair)
            if len(kept) == len(pairs):
                return pairs
            pairs = kept

    def _drop_strangers(self) -> None:
        """Drops pairs that do not mean the same: scaled channels that the next layers make up for, or a mistaken pair.

        From its own inputs a site behind such a pair computes what the first model does, from those of the first model
        something else.
        """
        for _ in range(_ROUNDS):
            for _, site, error, values in self.measured(self.sites, self.feeds[:1], plain=True):
                site.sums["own"] += energy(error)
                site.sums["signal"] += energy(values)
            so_far = {site.pair.second: site.so_far for site in self.sites}
            strangers = set()
            for site in self.sites:
                if site.own > max(_STRANGE * site.so_far, _NOTABLE):
                    worst = max(site.given, key=lambda name: so_far.get(name, 0.0), default="")
                    if so_far.get(worst, 0.0) > site.so_far:
                        strangers.add(worst)
            if not strangers:
                break
            self._cut([pair for pair in self.pairs if pair.second not in strangers])
        self._cut(self.pairs)

    def _cut(self, pairs: list[Pair]) -> None:
        """Cuts the second model into sites."""
        self.pairs = pairs
        self.to_first = {pair.second: pair.first for pair in pairs}
        self.sites = list(self._sites())

    def _sites(self) -> Iterator[Site]:
        for pair in self.pairs:
            places, given = self.second.behind(pair.second, self.to_first.keys() - {pair.second})
            nodes = [self.second.nodes[index] for index in places]
            main = next((node for node in reversed(nodes) if node.op_type in _WEIGHTED), nodes[-1])
            yield Site(pair, main.name, main.op_type, [node.name for node in nodes], given)

    def blocks(self, sites: Sequence[Site]) -> Iterator[list[Site]]:
        """Sites in order, in blocks whose tensors fit in memory together."""
        yield from within(BLOCK, [(site, 4 * self.known[site.pair.first].bytes) for site in sites])

    def measured(
        self, sites: Sequence[Site], feeds: Sequence[Feed], *, plain: bool = False
    ) -> Iterator[tuple[int, Site, np.ndarray, np.ndarray]]:
        """(feed, site, its own error, values of the first model) for each site and feed.

        With ``plain`` the error so far is added up in the sites as well.
        """
        for block in self.blocks(sites):
            given = list(dict.fromkeys(name for site in block for name in site.given if name in self.to_first))
            wanted = list(dict.fromkeys([*(self.to_first[n] for n in given), *(site.pair.first for site in block)]))
            ends = [site.pair.second for site in block]
            reference = self.first.open(wanted, exact=True, optimize=False)
            cut = self.second.open(ends, given=[*given, *ends], exact=True, optimize=False)
            whole = self.second.open(ends, exact=True, optimize=False) if plain else None
            for index, feed in enumerate(feeds):
                values = reference.run(feed)
                found = cut.run(feed, {name: values[self.to_first[name]] for name in given})
                real = whole.run(feed) if whole is not None else {}
                for site in block:
                    expected = values[site.pair.first]
                    if site.pair.second in real:
                        site.sums["so_far"] += energy(real[site.pair.second] - expected)
                    yield index, site, found[site.pair.second] - expected, expected

    def explain(self) -> Explanation:
        """Measures every site, then what restoring the worst recovers."""
        reference = self.first.open(self.outputs, exact=True)
        expected = [reference.run(feed) for feed in self.feeds]
        board = self.first.open(self.outputs, shifted=[site.pair.first for site in self.sites], exact=True)
        calm = [board.run(feed) for feed in self.feeds]
        total = len(self.sites) * len(self.feeds)
        for count, (index, site, error, values) in enumerate(self.measured(self.sites, self.feeds, plain=True)):
            self.progress("measure sites", count, total)
            own, signal = energy(error), energy(values)
            site.sums["own"] += own
            site.sums["signal"] += signal
            if own > _EXACT**2 * signal:
                found = board.run(self.feeds[index], shifts={site.pair.first: error})
                for name in self.outputs:
                    site.errors[name] = site.errors.get(name, 0.0) + energy(found[name] - calm[index][name])
        self.progress("measure sites", total, total)
        signals = {name: sum(energy(values[name]) for values in expected) or 1.0 for name in self.outputs}
        contributions = {site.pair.second: self._share(site.errors, signals) for site in self.sites}
        ranked = sorted(self.sites, key=lambda site: -contributions[site.pair.second])
        restored = self._restored([s for s in ranked if contributions[s.pair.second] > 0], expected, signals)
        linears = [node for node in self.second.nodes if node.op_type in _WEIGHTED]
        inside = {name for site in self.sites for name in site.nodes}
        depth = [(site.node, site.so_far) for site in self.sites]
        return Explanation(
            ranked, contributions, restored.pop(0), restored, len(self.pairs), len(linears),
            sum(node.name in inside for node in linears), depth, len(self.feeds),
        )  # fmt: skip

    def _share(self, errors: Mapping[str, float], signals: Mapping[str, float]) -> float:
        """The mean over the outputs of their relative squared errors."""
        return sum(errors.get(name, 0.0) / signals[name] for name in self.outputs) / max(len(self.outputs), 1)

    def _restored(
        self, ranked: Sequence[Site], expected: Sequence[Mapping[str, np.ndarray]], signals: Mapping[str, float]
    ) -> dict[int, float]:
        """The relative squared error of the outputs where the first model computes the first n sites of the ranking."""
        steps = [step for step in _STEPS if step <= len(ranked)]
        chosen = list(ranked[: max(steps, default=0)])
        grafts = [self._graft(site) for site in chosen]
        found: dict[int, float] = {}
        for count in (0, *steps):
            hybrid = self.second.open(self.outputs, grafts=grafts[:count], exact=True, optimize=False)
            sums = dict.fromkeys(self.outputs, 0.0)
            for feed, values in zip(self.feeds, expected, strict=True):
                result = hybrid.run(feed)
                for name in self.outputs:
                    sums[name] += energy(result[name] - values[name])
            found[count] = self._share(sums, signals)
        return found

    def _graft(self, site: Site) -> Graft:
        """What the first model computes in place of a site."""
        to_second = {pair.first: pair.second for pair in self.pairs}
        nodes, _ = self.first.behind(site.pair.first, to_second.keys() - {site.pair.first})
        return Graft(self.first, site.pair.first, nodes, to_second, site.pair.second)


def energy(values: np.ndarray) -> float:
    """The sum of the squares; infinite where a value is not finite."""
    flat = values.reshape(-1).astype(np.float64)
    result = float(flat @ flat)
    return result if math.isfinite(result) else math.inf


def decibels(relative: float) -> float:
    """A relative squared error as signal to noise in dB."""
    return math.inf if relative <= 0 else -10 * math.log10(relative)
