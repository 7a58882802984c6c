"""The contribution of every site of a model to the error of its outputs, and what restoring sites recovers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from channelfold.runtime.data.sources import Data
from channelfold.runtime.errors import no_progress
from channelfold.runtime.explain.align import align, sketches
from channelfold.runtime.explain.cut import WEIGHTED, Cut, Site, energy
from channelfold.runtime.explain.model import Model
from channelfold.runtime.explain.strangers import without_strangers

SAMPLES = 8  # on which the sites that matter are measured
_FEW = 2  # samples on which all tensors are compared, and all sites measured
_EXACT = 1e-5  # relative error of a site that is rounding
_STEPS = (1, 2, 3, 5, 8, 12, 20)  # numbers of sites that are restored together, to see what it recovers
_MEASURED_MORE = 32  # sites with the largest contributions, which are measured on all samples

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Explanation:
    """``sites``, the largest contribution first; ``contributions``: relative squared errors of the outputs, by tensor.

    ``total``: that of the outputs; ``restored``: where the first model computes the first n sites. ``samples``: how
    many the sites that matter were measured on.
    """

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
        self.progress = progress
        self.feeds = list(data.first(SAMPLES))
        progress("align", 0, 3)
        known = sketches(first, self.feeds[:_FEW])
        progress("align", 1, 3)
        pairs = align(known, sketches(second, self.feeds[:_FEW]))
        progress("align", 2, 3)
        sizes = {name: sketch.bytes for name, sketch in known.items()}
        self.cut = without_strangers(Cut(first, second, pairs, sizes), self.feeds[0])
        self.outputs = [name for name in first.outputs if name in known and name in second.outputs]
        reference = first.open(self.outputs, optimize=True)
        self.expected = [reference.run(feed) for feed in self.feeds]
        self.signals = [{name: energy(values[name]) for name in self.outputs} for values in self.expected]

    def explain(self) -> Explanation:
        """Measures every site, the worst on more samples, then what restoring these recovers."""
        sites, second = self.cut.sites, self.cut.second
        effects = {site.pair.second: _Effect() for site in sites}
        few = min(_FEW, len(self.feeds))
        self._measure(sites, effects, range(few))
        worst = sorted(sites, key=lambda site: -self._share(effects[site.pair.second]))[:_MEASURED_MORE]
        self._measure(sorted(worst, key=sites.index), effects, range(few, len(self.feeds)))
        contributions = {name: self._share(effect) for name, effect in effects.items()}
        ranked = sorted(sites, key=lambda site: -contributions[site.pair.second])
        restored = self._restored([site for site in ranked if contributions[site.pair.second] > 0])
        linears = [node for node in second.nodes if node.op_type in WEIGHTED]
        inside = {name for site in sites for name in site.nodes}
        depth = [(site.node, site.errors.so_far) for site in sites]
        return Explanation(
            ranked, contributions, restored.pop(0), restored, len(sites), len(linears),
            sum(node.name in inside for node in linears), depth, len(self.feeds),
        )  # fmt: skip

    def _measure(self, sites: Sequence[Site], effects: Mapping[str, _Effect], places: Sequence[int]) -> None:
        """Runs sites, in their order, on some feeds: the errors of each, and what its own does to the outputs."""
        count, total = 0, len(sites) * len(places)
        for block in self.cut.blocks(sites, self.outputs):
            for feed in (self.feeds[place] for place in places):
                expected, so_far = block.expected(feed), block.so_far(feed)
                own = block.own(feed, expected)
                for site in block.sites:
                    self.progress("measure sites", count, total)
                    count += 1
                    first, second = site.pair.first, site.pair.second
                    site.errors.add(expected[first], own[second], so_far[second])
                    effects[second].samples += 1
                    if energy(own[second] - expected[first]) > _EXACT**2 * energy(expected[first]):
                        found = block.replaced(feed, site, own[second])
                        effects[second].add({name: energy(found[name] - expected[name]) for name in self.outputs})
        self.progress("measure sites", total, total)

    def _share(self, effect: _Effect) -> float:
        """The mean over the outputs of their relative squared errors."""
        signals = {name: sum(signal[name] for signal in self.signals[: effect.samples]) or 1.0 for name in self.outputs}
        return sum(error / signals[name] for name, error in effect.errors.items()) / max(len(self.outputs), 1)

    def _restored(self, ranked: Sequence[Site]) -> dict[int, float]:
        """The relative squared error of the outputs where the first model computes the first n sites of the ranking."""
        steps = [step for step in _STEPS if step <= len(ranked)]
        chosen = list(ranked[: max(steps, default=0)])
        grafts = [self.cut.graft(site) for site in chosen]
        hybrid = self.cut.second.open(self.outputs, grafts=grafts)
        found: dict[int, float] = {}
        for count in (0, *steps):
            restored = [site.pair.second for site in chosen[:count]]
            effect = _Effect(len(self.feeds))
            for feed, values in zip(self.feeds, self.expected, strict=True):
                result = hybrid.run(feed, grafts=restored)
                effect.add({name: energy(result[name] - values[name]) for name in self.outputs})
            found[count] = self._share(effect)
        return found


@dataclass
class _Effect:
    """The squared errors of the outputs, on the first so many samples."""

    samples: int = 0
    errors: dict[str, float] = field(default_factory=dict)

    def add(self, errors: Mapping[str, float]) -> None:
        for name, error in errors.items():
            self.errors[name] = self.errors.get(name, 0.0) + error


def decibels(relative: float) -> float:
    """A relative squared error as signal to noise in dB."""
    return math.inf if relative <= 0 else -10 * math.log10(relative)
