"""The calibrator of every tensor, chosen by what its range does to the outputs.

    c(x)  =  mse, or the calibrator under which the int8 of the readers of x changes the outputs least      alone

No calibrator is best for all tensors of a network, and neither the histogram of a tensor nor the error of the layers
that read the tensor tells which one is: chosen by the error of the layers, on a sample of rows, MiniLM and
EfficientNet-Lite0 lose 0.1 to 1 dB. What tells is a run of the network: attention leans on the huge activations of some
layers, and in others clipping them is what saves the outputs. A calibrator takes the place of mse where it is better by
more than twice the standard error over the samples: by the mean alone, CREPE loses 0.9 dB on other samples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Outcome
from channelfold.passes.layers.linear import Linear
from channelfold.passes.layers.output_error import SAMPLES, spread
from channelfold.passes.layers.sensitivity import Crew, brief, keep, measure
from channelfold.passes.layers.switchboard import Board, build
from channelfold.passes.quantize.proven import Insert, in_int8
from channelfold.passes.quantize.qdq import Range
from channelfold.runtime.io import temporary
from channelfold.runtime.stats.histograms import TensorStatistics

DEFAULT = "mse"
OTHERS = {
    "minmax": {"calibrator": "minmax"},
    **{f"percentile {share}": {"calibrator": "percentile", "percentile": share} for share in (99.999, 99.99, 99.9)},
}  # the options of the pass, by what a report calls them
_ALIKE = 0.05  # of the width of a step: two ranges that differ by less are one
_SURE = 2.0  # standard errors
_EACH = 8  # samples, on all of which every range is tried: the same for all, so that errors are compared in pairs


@dataclass
class Seen:
    """What the data tell of tensors, by name.

    ``axes``: of the channels, None for tensors between the sites. ``ranges``: as quantized in place; ``free``: those of
    inputs that may be centered. ``snr``: of rounding, in dB. ``reasons``: why 8 bits cannot represent them, or "".
    ``by``: the calibrators of ranges that are not those of the calibrator of the pass.
    """

    axes: Mapping[str, int | None]
    statistics: Mapping[str, TensorStatistics]
    ranges: dict[str, Range]
    free: dict[str, Range]
    snr: Mapping[str, float | None]
    reasons: Mapping[str, str] = field(default_factory=dict)
    by: dict[str, str] = field(default_factory=dict)

    def step(self, name: str) -> float:
        """The width of a step of a tensor, centered where that is possible."""
        return self.free.get(name, self.ranges[name]).step

    def take(self, name: str, other: Seen) -> None:
        """Gives a tensor the range that another calibrator has chosen."""
        self.ranges[name] = other.ranges[name]
        self.free.pop(name, None)
        self.free |= {name: other.free[name]} if name in other.free else {}


@contextlib.contextmanager
def measuring(
    graph: gs.Graph, sites: list[Linear], insert: Insert, ctx: Context, count: int = SAMPLES
) -> Iterator[tuple[Board, Sequence[str], Crew]]:
    """The board of a network that can be int8 at ``sites``, up to ``count`` samples, and who measures on them."""
    with temporary.folder() as folder:
        _, tried = in_int8(graph, sites, Outcome(), insert, lambda *_: {})
        board = build(graph, {"int8": tried.graph}, folder, centered=tried.centered)
        yield board, keep(board, brief(board, spread(ctx.data, count)), "sample"), Crew(progress=ctx.progress)


def choose(
    graph: gs.Graph,
    sites: list[Linear],
    seen: Seen,
    others: Mapping[str, Seen],
    insert: Callable[[Seen], Insert],
    ctx: Context,
) -> None:
    """Gives each tensor that ``sites`` read the range of the best of the calibrators; ``others`` than the default."""
    readers: dict[str, tuple[str, ...]] = {}
    for site in sites:
        readers[site.data.name] = (*readers.get(site.data.name, ()), site.name)
    tried = _different(readers, seen, others)
    usual = dict.fromkeys(name for names in tried.values() for name in names)
    usual = _errors(graph, sites, readers, usual, insert(seen), ctx)
    best: dict[str, float] = {}
    for calibrator, names in tried.items():
        errors = _errors(graph, sites, readers, names, insert(others[calibrator]), ctx)
        for name in names:
            gain = _sure_gain(np.array(usual[name]), np.array(errors[name]))
            if gain > best.get(name, 0.0):
                best[name], seen.by[name] = gain, calibrator
    for name, calibrator in seen.by.items():
        seen.take(name, others[calibrator])


def _sure_gain(usual: np.ndarray, errors: np.ndarray) -> float:
    """The mean of what errors are lower than ``usual`` on each sample; 0 where chance may have made them lower."""
    if len(errors) < 2 or not np.isfinite([usual, errors]).all():
        return 0.0
    gains = usual - errors
    return float(gains.mean()) if gains.mean() > _SURE * gains.std(ddof=1) / np.sqrt(len(gains)) else 0.0


def _different(names: Iterable[str], seen: Seen, others: Mapping[str, Seen]) -> dict[str, list[str]]:
    """The tensors by calibrator whose ranges are not those of a calibrator before."""
    found: dict[str, list[str]] = {}
    for name in names:
        steps = [seen.step(name)]
        for calibrator, other in others.items():
            if all(abs(other.step(name) - step) > _ALIKE * step for step in steps):
                steps.append(other.step(name))
                found.setdefault(calibrator, []).append(name)
    return found


def _errors(
    graph: gs.Graph,
    sites: list[Linear],
    readers: Mapping[str, tuple[str, ...]],
    names: Collection[str],
    insert: Insert,
    ctx: Context,
) -> dict[str, list[float]]:
    """The errors of the outputs on every sample when all readers of a tensor are int8, by tensor."""
    if not names:
        return {}
    with measuring(graph, sites, insert, ctx, _EACH) as (board, samples, crew):
        found = measure(board, samples, [readers[name] for name in names], crew, runs=np.inf)
    return {name: site.by_sample["int8"] for name, site in zip(names, found, strict=True)}
