"""The second model cut into sites at the tensors that both models compute, and the sites run on given values."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from channelfold.runtime.explain.align import Pair
from channelfold.runtime.explain.model import Graft, Model
from channelfold.runtime.io.session import Feed
from channelfold.runtime.stats.observe import within

BLOCK = 1 << 26  # bytes of activations that are in memory at once
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "MatMulInteger", "ConvInteger", "MatMulNBits", "FusedMatMul")


@dataclass
class Errors:
    """Relative squared errors at the end of a site.

    ``own``: where the site begins with the values of the first model; ``so_far``: where it begins with its own values.
    """

    sums: np.ndarray = field(default_factory=lambda: np.zeros(3))

    def add(self, expected: np.ndarray, own: np.ndarray, so_far: np.ndarray) -> None:
        self.sums += energy(own - expected), energy(so_far - expected), energy(expected)

    @property
    def own(self) -> float:
        return self._relative(0)

    @property
    def so_far(self) -> float:
        return self._relative(1)

    def _relative(self, place: int) -> float:
        return float(self.sums[place] / self.sums[2]) if self.sums[2] else 0.0


@dataclass
class Site:
    """A part of the second model between tensors that both models compute.

    ``nodes`` are those of the site, ``node`` the one that stands for it, ``given`` the tensors at which it begins.
    """

    pair: Pair
    node: str
    op: str
    nodes: list[str]
    given: list[str]
    errors: Errors = field(default_factory=Errors)


class Cut:
    """Two models, and the pairs of tensors at which the second is cut. ``sizes``: bytes of the tensors of the first."""

    def __init__(self, first: Model, second: Model, pairs: Sequence[Pair], sizes: Mapping[str, int]):
        self.first, self.second, self.sizes = first, second, sizes
        self.pairs = self._in_order(pairs)
        self.to_first = {pair.second: pair.first for pair in self.pairs}
        self.to_second = {pair.first: pair.second for pair in self.pairs}
        self.sites = [self.site(pair) for pair in self.pairs]

    def _in_order(self, pairs: Sequence[Pair]) -> list[Pair]:
        """The pairs without those whose site would read, in the second model, what only comes behind it there."""
        order = {name: place for place, name in enumerate(self.second.computed)}
        while True:
            to_second = {pair.first: pair.second for pair in pairs}
            kept = []
            for pair in pairs:
                _, given = self.first.behind(pair.first, to_second)
                reads = (order[to_second[name]] for name in given if name in to_second)
                if all(place < order[pair.second] for place in reads):
                    kept.append(pair)
            if len(kept) == len(pairs):
                return kept
            pairs = kept

    def site(self, pair: Pair, opened: Collection[str] = ()) -> Site:
        """What computes the tensor of a pair from the tensors of other pairs; ``opened`` ones are computed as well."""
        places, given = self.second.behind(pair.second, self.to_first.keys() - set(opened))
        nodes = [self.second.nodes[index] for index in places]
        main = next((node for node in reversed(nodes) if node.op_type in WEIGHTED), nodes[-1])
        names = [node.name for node in nodes]
        return Site(pair, main.name, main.op_type, names, [name for name in given if name in self.to_first])

    def without(self, names: Collection[str]) -> Cut:
        """The cut without the pairs of some tensors of the second model."""
        kept = [pair for pair in self.pairs if pair.second not in names]
        return Cut(self.first, self.second, kept, self.sizes)

    def graft(self, site: Site) -> Graft:
        """What the first model computes in place of a site."""
        end = site.pair.first
        nodes, _ = self.first.behind(end, self.to_second)
        return Graft(self.first, end, nodes, self.to_second, site.pair.second)

    def blocks(self, sites: Iterable[Site], outputs: Sequence[str] = ()) -> Iterator[Block]:
        """The sites in order, in blocks whose tensors are in memory together."""
        # expected, so far, of its own, and given to the sites behind
        sized = ((site, 4 * self.sizes[site.pair.first]) for site in sites)
        return (Block(self, block, outputs) for block in within(BLOCK, sized))


class Block:
    """Some sites, and a session of each model in which their tensors are seen and replaced.

    ``outputs``: outputs of the first model that are to be seen where the end of a site is replaced.
    """

    def __init__(self, cut: Cut, sites: Sequence[Site], outputs: Sequence[str]):
        self.sites, self._to_first, self._outputs = sites, cut.to_first, outputs
        ends = dict.fromkeys(site.pair.first for site in sites)
        given = dict.fromkeys(name for site in sites for name in site.given)
        seen = dict.fromkeys([*ends, *(cut.to_first[name] for name in given), *outputs])
        self._first = cut.first.open(seen, given=ends if outputs else (), optimize=True)
        seen = dict.fromkeys(site.pair.second for site in sites)
        self._second = cut.second.open(seen, given=given, before=True)

    def expected(self, feed: Feed) -> Feed:
        """The values of the first model, by their names there."""
        return self._first.run(feed)

    def so_far(self, feed: Feed) -> Feed:
        """The values of the second model, by their names there."""
        return self._second.run(feed)

    def own(self, feed: Feed, expected: Feed, sites: Sequence[Site] | None = None) -> Feed:
        """The ends of sites, of all by default, that the second model computes from the values of the first."""
        sites = self.sites if sites is None else sites
        given = {name: expected[self._to_first[name]] for site in sites for name in site.given}
        return self._second.run(feed, given, outputs=list(dict.fromkeys(site.pair.second for site in sites)))

    def replaced(self, feed: Feed, site: Site, values: np.ndarray) -> Feed:
        """The outputs of the first model where the end of a site has other values."""
        return self._first.run(feed, {site.pair.first: values}, outputs=self._outputs)


def energy(values: np.ndarray) -> float:
    """The sum of the squares; infinite where a value is not finite."""
    flat = values.reshape(-1).astype(np.float64)
    result = float(flat @ flat)
    return result if math.isfinite(result) else math.inf
