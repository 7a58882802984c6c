"""What an option of a node does to the outputs of a network, measured: the one currency of all choices.

    E_l(p) = mean over outputs and samples s of  |y_lp(s) - y(s)|^2 / |y(s)|^2        node l alone has the option p

Errors of different nodes add up at a linear output, within 1 dB from 4 dB upwards:  E(mix) = sum of E_l(p_l).

Neither the error of the output of a node nor its energy predicts E: the factor between them differs by 100 and more
between the nodes of one network. The energies of every sample are kept, because one sample can hold most of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from channelfold.passes.layers.switchboard import FLOAT, Board, Configuration
from channelfold.runtime.data.sources import Data
from channelfold.runtime.errors import no_progress
from channelfold.runtime.io import workers as pool
from channelfold.runtime.io.session import Feed

SAMPLES = 16  # on which sensitivities are measured
FEW = 4  # of them, on which every site is measured
_MANY = 96  # sites
_HEAD = 0.9  # share of the error that is measured on all samples
_BLOCK = 8  # nodes that one session tries: few, for only constants have the fast layouts of ONNX Runtime
_BYTES = 1 << 28  # of outputs that are kept
_SMALLEST = 1e-30
_QUIET = 10  # a sample counts as if its output had at least the mean energy divided by this


@dataclass(frozen=True)
class Trial:
    """A unit of work: ``tried`` configurations on ``samples``, which are files in the folder of the board.

    ``open``: the nodes in which they differ from float; without any, every configuration gets a session of its own.
    ``labels``: the right class of every sample.
    """

    board: Board
    samples: tuple[str, ...]
    tried: tuple[Configuration, ...]
    open: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()


@dataclass
class Errors:
    """Of every sample and output: ``energy`` of the float output, and for every configuration what is ``lost`` of it.

    ``agreed``: the share of positions whose largest element is the same, NaN where that means nothing. ``energy``
    (samples, outputs), the others (configurations, samples, outputs). ``right``: whether the class is right, of float
    and then of every configuration, (1 + configurations, samples).
    """

    energy: np.ndarray
    lost: np.ndarray
    agreed: np.ndarray
    right: np.ndarray

    def relative(self) -> np.ndarray:
        """The error of every configuration, (configurations,)."""
        return (self.lost.sum(axis=1) / np.maximum(self.energy.sum(axis=0), _SMALLEST)).mean(axis=-1)

    def by_sample(self) -> np.ndarray:
        """The error of every configuration on every sample, (configurations, samples)."""
        return (self.lost / np.maximum(self.energy, self.energy.mean(axis=0) / _QUIET + _SMALLEST)).mean(axis=-1)


def decibels(error: np.ndarray | float) -> np.ndarray:
    """The signal-to-noise ratio of relative squared errors, at most 300."""
    return -10 * np.log10(np.maximum(error, _SMALLEST))


def spread(data: Data, count: int) -> list[Feed]:
    """Up to ``count`` feeds, evenly spread."""
    chosen = set(np.linspace(0, len(data) - 1, min(count, len(data))).astype(int).tolist())
    return [feed for index, feed in enumerate(data) if index in chosen]


def keep(board: Board, feeds: Iterable[Feed], name: str) -> tuple[str, ...]:
    """Writes samples into the folder of the board; their files."""
    files = []
    for index, feed in enumerate(feeds):
        files.append(f"{name}.{index}.npz")
        np.savez(board.folder / files[-1], **feed)  # pyright: ignore[reportArgumentType]
    return tuple(files)


def attempt(trial: Trial) -> Errors:
    """Does one unit of work."""
    board = trial.board
    feeds = []
    for file in trial.samples:
        with np.load(board.folder / file) as stored:
            feeds.append(dict(stored))
    shared = board.player(open=trial.open)
    references, size = [], 0
    for feed in feeds:
        references.append(shared.run(feed))
        size += sum(output.nbytes for output in references[-1])
        if size > _BYTES:
            break
    shape, tried = (len(references), len(board.outputs)), len(trial.tried)
    each = tried, *shape
    found = Errors(np.zeros(shape), np.zeros(each), np.zeros(each), np.zeros((1 + tried, len(references)), bool))
    for s, reference in enumerate(references):
        found.energy[s] = [_energy(_counted(board, feeds[s], output)) for output in reference]
        found.right[0, s] = _right(board, reference, trial.labels[s : s + 1])
    for c, chosen in enumerate(trial.tried):
        player = shared if trial.open else board.player(chosen)
        for s, reference in enumerate(references):
            outputs = player.run(feeds[s], chosen)
            found.right[1 + c, s] = _right(board, outputs, trial.labels[s : s + 1])
            for o, pair in enumerate(zip(reference, outputs, strict=True)):
                old, new = (_counted(board, feeds[s], output) for output in pair)
                found.lost[c, s, o], found.agreed[c, s, o] = _lost(old, new), _agreed(old, new)
    return found


def _counted(board: Board, feed: Feed, output: np.ndarray) -> np.ndarray:
    """The positions of an output that take part, (n, channels), where the output has those of the mask."""
    mask = feed.get(board.mask)
    if mask is None or mask.ndim != 2 or output.ndim < 3 or output.shape[: mask.ndim] != mask.shape:
        return output
    return output[mask != 0]


def _right(board: Board, outputs: Sequence[np.ndarray], label: Sequence[int]) -> bool:
    scores = next((o for o, holds in zip(outputs, board.scores, strict=True) if holds), outputs[0])
    return bool(label) and int(scores.reshape(-1, scores.shape[-1])[0].argmax()) == label[0]


def _energy(values: np.ndarray) -> float:
    values = values[np.isfinite(values)].astype(np.float64)
    return float(values @ values)


def _lost(old: np.ndarray, new: np.ndarray) -> float:
    if old.shape != new.shape:
        return np.inf
    error = new[finite := np.isfinite(old)].astype(np.float64) - old[finite]
    return float(error @ error) if np.isfinite(error).all() else np.inf


def _agreed(old: np.ndarray, new: np.ndarray) -> float:
    if old.shape != new.shape or old.ndim not in (2, 3) or old.shape[-1] < 2 or not old.size:
        return np.nan
    return float(np.mean(old.argmax(axis=-1) == new.argmax(axis=-1)))


@dataclass(frozen=True)
class Site:
    """Nodes that get one option together, with the ``errors``, bytes (``sizes``) and ``costs`` by option.

    ``by_sample``: the error on each of the samples that it was measured on, of which ``errors`` is the mean.
    """

    nodes: tuple[str, ...]
    errors: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    by_sample: dict[str, list[float]] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)

    def chosen(self, option: str) -> dict[str, str]:
        return dict.fromkeys(self.nodes, option)

    def options(self) -> list[str]:
        return [FLOAT, *self.errors]


@dataclass(frozen=True)
class Crew:
    """How to measure: with ``workers`` processes or on a Dask ``cluster``; the result does not depend on either."""

    workers: int = 1
    cluster: str = ""
    progress: Callable[[str, int, int], None] = no_progress


def measure(
    board: Board, samples: Sequence[str], groups: Sequence[tuple[str, ...]] | None = None, crew: Crew = Crew()
) -> list[Site]:
    """The error of every option of every site, alone: on ``FEW`` of the samples, where it is large on all of them.

    Networks of many sites are large, and are measured on half of the samples. ``samples``: files that ``keep`` has
    written. ``groups``: the nodes of each site, by default each node by itself.
    """
    groups = [(name,) for name in board.slots] if groups is None else groups
    samples = _some(samples, SAMPLES if len(groups) <= _MANY else SAMPLES // 2)
    few = _some(samples, FEW if len(groups) <= _MANY else FEW // 2)
    own = {group: [o for o in board.options(group[0]) if all(o in board.options(n) for n in group)] for group in groups}
    pairs = [(group, option) for group in groups for option in own[group] if option != FLOAT]
    found = _measured(board, few, pairs, crew)
    if len(samples) > len(few):
        found |= _measured(board, samples, _head(found), crew)
    sites = []
    for group in groups:
        sizes = {o: sum(board.slots[name].sizes[o] for name in group) for o in own[group]}
        by_sample = {o: found[group, o] for o in own[group] if o != FLOAT}
        sites.append(Site(group, {o: float(np.mean(e)) for o, e in by_sample.items()}, sizes, by_sample))
    return sites


def _some(samples: Sequence[str], count: int) -> list[str]:
    return [samples[int(i)] for i in np.linspace(0, len(samples) - 1, min(count, len(samples)))]


Pair = tuple[tuple[str, ...], str]  # the nodes of a site, and an option


def _measured(board: Board, samples: Sequence[str], pairs: Sequence[Pair], crew: Crew) -> dict[Pair, list[float]]:
    """The errors on every sample."""
    groups = list(dict.fromkeys(group for group, _ in pairs))
    blocks = [set(groups[start : start + _BLOCK]) for start in range(0, len(groups), _BLOCK)]
    parts = [[pair for pair in pairs if pair[0] in block] for block in blocks]
    trials = [
        Trial(
            board,
            tuple(samples),
            tuple(dict.fromkeys(group, option) for group, option in part),
            tuple(dict.fromkeys(name for group, _ in part for name in group)),
        )
        for part in parts
    ]
    found: dict[Pair, list[float]] = {}
    for number, errors in enumerate(pool.each(attempt, trials, crew.workers, crew.cluster)):
        crew.progress("Measuring sensitivities", number, len(trials))
        found |= zip(parts[number], errors.by_sample().tolist(), strict=True)
    return found


def _head(found: Mapping[Pair, Sequence[float]]) -> list[Pair]:
    """The sites and options that hold nearly all of the error of their option."""
    head = set()
    for option in dict.fromkeys(option for _, option in found):
        errors = {pair: float(np.mean(e)) for pair, e in found.items() if pair[1] == option}
        whole, held = sum(errors.values()), 0.0
        for pair in sorted(errors, key=errors.__getitem__, reverse=True):
            if held < _HEAD * whole:
                head.add(pair)
            held += errors[pair]
    return [pair for pair in found if pair in head]
