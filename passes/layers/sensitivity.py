"""What an option of a node does to the outputs of a network, measured (``output_error``).

    E_l(p)  where node l alone has the option p

Errors of different nodes add up at a linear output, within 1 dB from 4 dB upwards:  E(mix) = sum of E_l(p_l).

Neither the error of the output of a node nor its energy predicts E: the factor between them differs by 100 and more
between the nodes of one network. Between two options of one node that change its weight alone, the factor is nearly
the same:

    E_l(p) / E_l(q) = |W_p - W|^2 / |W_q - W|^2                                     a guess, in place of a measurement
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from channelfold import __version__
from channelfold.passes.layers.output_error import BYTES, SAMPLES, Errors, Meter
from channelfold.passes.layers.switchboard import FLOAT, Board, Configuration
from channelfold.runtime.errors import no_progress
from channelfold.runtime.io.files import writing
from channelfold.runtime.io.session import Feed
from channelfold.runtime.io.workers import Pool

RUNS = 256  # of the whole network on one sample, for the sensitivities of a network: four passes over 64 samples
_FEWEST = 2  # samples on which every site is measured, whatever that takes
_TOKENS = 64  # of a text, for sensitivities
_HEAD = 0.9  # share of the error that is measured on as many samples as the runs pay for
_BLOCK = 4  # sites that one session tries: few, for only constants have the fast layouts of ONNX Runtime
_RIGHT = "channelfold.right."  # in files of samples
_SMALLEST = 1e-30


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

    @property
    def key(self) -> str:
        """The hash of everything that the errors depend on."""
        samples = [hashlib.sha256((self.board.folder / file).read_bytes()).hexdigest() for file in self.samples]
        tried = [dict(chosen) for chosen in self.tried]
        told = json.dumps([__version__, self.board.digest, samples, tried, self.open, self.labels])
        return hashlib.sha256(told.encode()).hexdigest()


def brief(board: Board, feeds: Iterable[Feed]) -> list[Feed]:
    """The feeds with texts cut to their first tokens; to their last ones where a mask leaves the first ones out."""
    found = []
    for feed in feeds:
        padded = bool(board.mask) and not feed[board.mask][0, 0]
        part = np.s_[:, -_TOKENS:] if padded else np.s_[:, :_TOKENS]
        found.append({name: values[part] for name, values in feed.items()} if board.texts else feed)
    return found


def keep(board: Board, feeds: Iterable[Feed], name: str, whole: Board | None = None) -> tuple[str, ...]:
    """Writes samples into the folder of the board, with the outputs that are right; their files.

    ``whole``: the board of the network whose outputs are right, where that is another one. There are fewer samples
    where outputs are large.
    """
    files, size = [], 0
    player = (whole or board).player()
    for index, feed in enumerate(feeds):
        right = {f"{_RIGHT}{place}": output for place, output in enumerate(player.run(feed))}
        files.append(f"{name}.{index}.npz")
        np.savez(board.folder / files[-1], **feed, **right)  # pyright: ignore[reportArgumentType]
        size += sum(output.nbytes for output in right.values())
        if size > BYTES:
            break
    return tuple(files)


def _read(path: Path) -> tuple[Feed, list[np.ndarray]]:
    """A sample, and its outputs that are right."""
    with np.load(path) as stored:
        found = dict(stored)
    names = sorted((name for name in found if name.startswith(_RIGHT)), key=lambda name: int(name[len(_RIGHT) :]))
    right = [found.pop(name) for name in names]
    return found, right


def attempt(trial: Trial) -> Errors:
    """Does one unit of work."""
    board = trial.board
    meter = Meter(len(trial.samples), board.scores, len(trial.tried), trial.labels, board.mask)
    shared = [board.player(open=trial.open)] if trial.open else []
    players = shared * len(trial.tried) or [board.player(chosen) for chosen in trial.tried]
    for place, file in enumerate(trial.samples):
        feed, right = _read(board.folder / file)
        runs = (player.run(feed, chosen) for player, chosen in zip(players, trial.tried, strict=True))
        meter.see(place, feed, right, runs)
    again = sum(player.share for player in players) + sum(1 - player.share for player in shared)
    return replace(meter.errors, runs=len(trial.samples) * again)


@dataclass(frozen=True)
class Site:
    """Nodes that get one option together, with the ``errors``, bytes (``sizes``) and ``costs`` by option.

    ``by_sample``: the error on each of the samples that it was measured on, and ``errors`` their mean, both as on all
    samples; those of ``guessed`` options were not measured. A site without nodes stands for what no option changes.
    """

    nodes: tuple[str, ...]
    errors: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    by_sample: dict[str, list[float]] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)
    guessed: frozenset[str] = frozenset()

    def chosen(self, option: str) -> dict[str, str]:
        return dict.fromkeys(self.nodes, option)

    def options(self) -> list[str]:
        return list(dict.fromkeys([FLOAT, *self.errors]))


@dataclass
class Crew:
    """How to measure: with ``workers`` processes or on a Dask ``cluster``; the result does not depend on either.

    A crew is a context, at the end of which its processes end.
    ``kept``: a folder in which errors wait for a call that goes on where this one stops. ``runs``: what was measured
    so far, by what for, in runs of the whole network on one sample, and ``resumed``: what an earlier call has done.
    """

    workers: int = 1
    cluster: str = ""
    progress: Callable[[str, int, int], None] = no_progress
    kept: Path | None = None
    runs: dict[str, float] = field(default_factory=dict)
    resumed: float = 0.0

    def __post_init__(self) -> None:
        self._pool = Pool(self.workers, self.cluster)

    def __enter__(self) -> Crew:
        self._pool.prepare(attempt)
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.__exit__()

    def each(self, what: str, trials: Sequence[Trial]) -> Iterator[Errors]:
        """The errors of every trial, in order; ``what`` they are for."""
        files = [self.kept / f"trial-{trial.key}.npz" if self.kept else None for trial in trials]
        known = [_known(file) for file in files]
        left = [trial for trial, errors in zip(trials, known, strict=True) if errors is None]
        new = self._pool.each(attempt, left)
        for number, (file, errors) in enumerate(zip(files, known, strict=True)):
            self.progress(f"Measuring {what}", number, len(trials))
            if errors is not None:
                self.resumed += errors.runs
            else:
                errors = next(new)
                if file:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    with writing(file) as out:
                        np.savez(out, **vars(errors))
            self.count(what, errors.runs)
            yield errors
        self.progress(f"Measuring {what}", len(trials), len(trials))

    def count(self, what: str, runs: float) -> None:
        self.runs[what] = self.runs.get(what, 0.0) + runs


def _known(file: Path | None) -> Errors | None:
    """The errors in a file; None where there is none, or a damaged one."""
    if file is None or not file.exists():
        return None
    try:
        with np.load(file) as stored:
            found = Errors(**stored)
    except (OSError, ValueError, TypeError, LookupError, zipfile.BadZipFile):
        return None
    return replace(found, runs=float(found.runs))


Group = tuple[str, ...]  # the nodes of a site
Pair = tuple[Group, str]  # and an option


def measure(
    board: Board,
    samples: Sequence[str],
    groups: Sequence[Group] | None = None,
    crew: Crew | None = None,
    guess: bool = False,
    runs: float = RUNS,
) -> list[Site]:
    """The error of every option of every site, alone.

    A half of the ``runs`` measures all of them on few samples, two at least; the other half measures those that hold
    nearly all of the error on more, which tell how much more the others lose there as well. ``samples``: files that
    ``keep`` has written. ``groups``: the nodes of each site, by default each node by itself. ``guess``: of the options
    that change weights alone, the coarsest is measured, and the others are guessed.
    """
    groups = [(name,) for name in board.slots] if groups is None else groups
    crew = crew or Crew()
    own = {group: [o for o in board.options(group[0]) if all(o in board.options(n) for n in group)] for group in groups}
    pairs = [(group, option) for group in groups for option in own[group] if option != FLOAT]
    guesses = {pair: source for pair in pairs if (source := _coarsest(board, own, pair)) != pair} if guess else {}
    measured = [pair for pair in pairs if pair not in guesses]
    few = _paid(board, samples, measured, runs / 2)
    found = _measured(board, few, measured, crew)
    rest = [sample for sample in _some(samples, SAMPLES) if sample not in few]
    head, left = _head(found), runs - len(few) * _runs(board, measured)
    rest = _some(rest, int(min(left / max(_runs(board, head), _SMALLEST), SAMPLES)))
    more = _measured(board, rest, head, crew) if rest else {}
    found = {pair: [*errors, *more.get(pair, [])] for pair, errors in _fitted(found, more).items()}
    for pair, source in guesses.items():
        factor = _rounding(board, pair) / max(_rounding(board, source), _SMALLEST)
        found[pair] = [factor * error for error in found[source]]
    sites = []
    for group in groups:
        sizes = {o: sum(board.slots[name].sizes[o] for name in group) for o in own[group]}
        site = Site(group, sizes=sizes, guessed=frozenset(o for other, o in guesses if other == group))
        sites.append(_with(site, {o: found[group, o] for o in own[group] if o != FLOAT}))
    return sites


def worst(
    board: Board, samples: Sequence[str], sites: Sequence[Site], option: str, count: int, crew: Crew
) -> list[Site]:
    """Up to ``count`` sites that stay float where all others have an option; none where none of the choices pays.

    Largest errors first: of the mean of the samples, or of their median, for a few of the samples can hold most of the
    error, and where these are the same sites, or errors do not add up, a choice can be worse than none. Each choice is
    measured, and the best one is taken.
    """
    ranks: list[Callable[[Site], float]] = [
        lambda site: site.errors[option],
        lambda site: float(np.median(site.by_sample[option])),
    ]
    choices = [sorted(sites, key=rank, reverse=True)[:count] for rank in ranks]
    every = {name: option for site in sites for name in site.nodes}
    mixes = [every | {name: FLOAT for site in chosen for name in site.nodes} for chosen in [[], *choices]]
    (errors,) = crew.each("choices", [Trial(board, tuple(_some(samples, SAMPLES)), tuple(mixes))])
    return [[], *choices][int(errors.by_sample().mean(axis=1).argmin())]


def checked(
    board: Board, samples: Sequence[str], sites: Sequence[Site], used: Collection[Pair], crew: Crew
) -> list[Site]:
    """The sites with the errors of guessed options measured where they are ``used``."""
    pairs = [
        (s.nodes, option) for s in sites for option in s.errors if option in s.guessed and (s.nodes, option) in used
    ]
    found = _measured(board, _paid(board, samples, pairs, RUNS / 8), pairs, crew)
    return [
        replace(_with(site, own), guessed=site.guessed - own.keys())
        for site in sites
        for own in [{option: errors for (group, option), errors in found.items() if group == site.nodes}]
    ]


def _with(site: Site, found: dict[str, list[float]]) -> Site:
    errors = {option: float(np.mean(by_sample)) for option, by_sample in found.items()}
    return replace(site, errors=site.errors | errors, by_sample=site.by_sample | found)


def _paid(board: Board, samples: Sequence[str], pairs: Sequence[Pair], runs: float) -> list[str]:
    """As many of the samples as ``runs`` pay for, two at least."""
    count = runs / max(_runs(board, pairs), _SMALLEST)
    return _some(samples, int(min(max(count, _FEWEST), SAMPLES)))


def _runs(board: Board, pairs: Sequence[Pair]) -> float:
    """About the runs of the whole network on one sample: what lies in front of a block runs once for all options."""
    work = [board.macs.get(name, 0) if board.macs else 1 for name in board.slots]
    left = dict(zip(board.slots, np.cumsum(work[::-1])[::-1] / max(sum(work), 1), strict=True))
    return sum(len(part) * max(left[name] for group, _ in part for name in group) for part in _blocks(pairs))


def _blocks(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """The sites and options that share a session."""
    groups = list(dict.fromkeys(group for group, _ in pairs))
    blocks = [set(groups[start : start + _BLOCK]) for start in range(0, len(groups), _BLOCK)]
    return [[pair for pair in pairs if pair[0] in block] for block in blocks]


def _some(samples: Sequence[str], count: int) -> list[str]:
    return [samples[int(i)] for i in np.linspace(0, len(samples) - 1, max(0, min(count, len(samples))))]


def _coarsest(board: Board, own: Mapping[Group, Sequence[str]], pair: Pair) -> Pair:
    """The option to guess the error of an option from: the coarsest of those that change the same weights alone."""
    group, option = pair
    if option in board.acting:
        return pair
    alike = [(group, other) for other in own[group] if other != FLOAT and other not in board.acting]
    return max(alike, key=lambda other: _rounding(board, other))


def _rounding(board: Board, pair: Pair) -> float:
    return sum(board.slots[name].rounding[pair[1]] for name in pair[0])


def _measured(board: Board, samples: Sequence[str], pairs: Sequence[Pair], crew: Crew) -> dict[Pair, list[float]]:
    """The errors on every sample."""
    parts = _blocks(pairs)
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
    for part, errors in zip(parts, crew.each("sensitivities", trials), strict=True):
        found |= zip(part, errors.by_sample().tolist(), strict=True)
    return found


def _fitted(few: Mapping[Pair, list[float]], more: Mapping[Pair, list[float]]) -> dict[Pair, list[float]]:
    """The errors on few samples; of sites without ``more``, as they would be on all samples.

    What a sample multiplies errors by is nearly the same for all sites: that of the sites that were measured on all.
    """
    fitted = dict(few)
    for option in dict.fromkeys(option for _, option in more):
        head = [pair for pair in more if pair[1] == option]
        alone = sum(np.mean(few[pair]) for pair in head)
        gain = sum(np.mean([*few[pair], *more[pair]]) for pair in head) / max(alone, _SMALLEST)
        fitted |= {p: [float(gain * e) for e in few[p]] for p in few if p[1] == option and p not in more}
    return fitted


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
