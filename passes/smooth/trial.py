"""Smoothing that does not pay at the outputs of the model is taken back.

A scale that makes the quantized outputs of one site better may make those of the model worse. The judge is the
quantization that follows, but for options that take many runs, on a copy of the graph; its ranges come from some
samples, the errors from others:

    e(S)            error of the quantized outputs when the sites S are smoothed
    S = all or none, whichever is better;  then  S <- S xor G  where e(S xor G) < e(S)

for groups G of the sites in the order of their own gain: the halves, then the quarters. Every e(S) is the quantization
and a run of a copy, so there are at most eight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Pass
from channelfold.passes.channels.region import Region
from channelfold.passes.channels.rescale import rescale
from channelfold.passes.layers.output_error import Outputs, decibels, held_out
from channelfold.runtime.io.files import infer_shapes, raise_opset

Sites = frozenset[int]

_PARTS = (2, 4)  # into how many groups the sites are divided, one division after another
_CALIBRATED = 32  # samples that ranges come from
_NOISE = 1e-9  # an error that rounding alone may cause
_ONCE: dict[str, Any] = {
    "gptq": False,
    "verify_plan": None,
    "profile": False,
    "float_share": 0.0,
    "correct_inputs": False,
}
_FAST = {"calibrator": {"measured": "mse"}, "rounder": {"gptq": "search", "descent": "search"}}
_WORTH = 0.98  # a group changes sides where at most this share of the error is left: less may be chance


@dataclass(frozen=True)
class Move:
    """A scale and a shift of a region, as facts and in words.

    ``node`` names the site, ``site`` describes the site and ``tensor`` names what is scaled. ``gain`` is what the site
    itself gains, in a unit that all sites share.
    """

    node: str
    site: str
    tensor: str
    region: Region
    scale: np.ndarray
    shift: np.ndarray
    what: str
    facts: dict[str, Any]
    gain: float = 0.0

    def make(self, graph: gs.Graph) -> None:
        """Makes the move on a copy of the graph of the region."""
        rescale(graph, self.region.on(graph), self.scale, self.shift)


@dataclass
class Verdict:
    """The sites that stay smoothed. ``errors`` holds e(S) of every set that was tried.

    ``taken_back`` holds, for every other site, the error with the site's group and the error without the group.
    """

    kept: Sites
    errors: dict[Sites, float] = field(default_factory=dict)
    taken_back: dict[int, tuple[float, float]] = field(default_factory=dict)

    def facts(self, count: int, samples: int) -> dict[str, Any]:
        """What a report says: the quantized outputs in dB with all sites, with none and with those that stay."""
        sets = {"all": frozenset(range(count)), "none": frozenset(), "kept": self.kept}
        found = {name: round(decibels(self.errors[sites]), 2) for name, sites in sets.items()}
        return found | {"samples": samples, "trials": len(self.errors), "taken_back": len(self.taken_back)}


def _fast(quantizer: Pass) -> Pass:
    """The quantization without what takes many runs, and is worth them once, when the smoothing stands."""
    known = quantizer.options()
    found = {name: value for name, value in _ONCE.items() if name in known}
    found |= {name: faster.get(known[name], known[name]) for name, faster in _FAST.items() if name in known}
    return dataclasses.replace(quantizer, **found)


class Judge:
    """The error of the quantized outputs of changed copies of a graph. Raises ModelError where the graph cannot run."""

    def __init__(self, graph: gs.Graph, quantizer: Pass, ctx: Context):
        seen, unseen = held_out(ctx.data)
        self._quantizer, self._ctx = _fast(quantizer), dataclasses.replace(ctx, calibration=seen.first(_CALIBRATED))
        self._outputs = Outputs(graph, unseen)

    @property
    def samples(self) -> int:
        return len(self._outputs.kept)

    def error(self, graph: gs.Graph) -> float | None:
        """The error of a copy, which is quantized for it; None where nothing is quantized."""
        needed = self._quantizer.opset_for(graph)
        graph = raise_opset(graph, needed) if needed > graph.opset else graph
        infer_shapes(graph)
        changed = self._quantizer.apply(graph, self._ctx).changed
        return self._outputs.error(graph) if changed else None


def paying(gains: Sequence[float], error: Callable[[Sites], float | None]) -> Verdict | None:
    """The sites that pay, by their own gains and the errors of sets of sites; None where nothing can be told."""
    every, none = frozenset(range(len(gains))), Sites()
    errors: dict[Sites, float] = {}
    for sites in (every, none):
        found = error(sites)
        if found is None:
            return None
        errors[sites] = found
    if max(errors.values()) < _NOISE:
        return None
    best = every if errors[every] <= errors[none] else none
    taken_back = dict.fromkeys(every - best, (errors[every], errors[none]))
    order = np.argsort(gains, kind="stable")
    for parts in _PARTS:
        for group in np.array_split(order, parts):
            other = best ^ Sites(group.tolist())
            if other not in errors:
                found = error(other)
                errors[other] = np.inf if found is None else found
            if errors[other] < _WORTH * errors[best]:
                taken_back |= dict.fromkeys(best - other, (errors[best], errors[other]))
                best = other
    return Verdict(best, errors, {site: told for site, told in taken_back.items() if site not in best})
