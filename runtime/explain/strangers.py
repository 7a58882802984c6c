"""Pairs of tensors that do not mean the same: of one name, or alike by chance, in the middle of what differs.

    first     x ──► MatMul ──► t  ──► Add ──► u          second    x - c ──► MatMul ──► t' ──► Add ──► u

Here the Add of the second model makes up for what t' lacks. It computes u from the value of x, and something else from
that of t. Channels that are scaled between two layers are such a case, too. So a stranger is known by what gets better
without it, whatever errors come from farther up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from channelfold.runtime.explain.cut import Cut, Errors, Site
from channelfold.runtime.io.session import Feed

_ROUNDS = 32  # of looking for strangers; a chain of them may take as many
_BETTER = 1.25  # times, in squared errors, that a site gets better without a stranger: errors of their own would add up
_NOTABLE, _LARGE = 1e-4, 1e-2  # squared errors from which a site is looked at: if its own is the larger one, and anyway
_DEPTHS = (1, 2, 4, 8)  # sites up to which strangers are looked for


@dataclass(frozen=True)
class _Trial:
    """A site that begins farther up than at its own beginnings: ``opened`` tensors are computed, and not given."""

    site: Site
    opened: frozenset[str]

    @classmethod
    def of(cls, cut: Cut, site: Site, opened: frozenset[str]) -> _Trial:
        return cls(cut.site(site.pair, opened), opened)

    def disturbs(self, other: _Trial) -> bool:
        """Whether what is given to one of two trials is computed in the other."""
        return not (self.opened.isdisjoint(other.site.given) and other.opened.isdisjoint(self.site.given))


def without_strangers(cut: Cut, feed: Feed) -> Cut:
    """The cut without pairs that do not mean the same."""
    for _ in range(_ROUNDS):
        strangers = _strangers(cut, feed)
        if not strangers:
            break
        cut = cut.without(strangers)
    return cut


def _strangers(cut: Cut, feed: Feed) -> set[str]:
    errors = {site.pair.second: error for site, error in _errors(cut, feed)}
    suspects = [site for site in cut.sites if _is_suspect(errors[site.pair.second])]
    given = {site.pair.second: site.given for site in cut.sites}
    deeper = [_Trial.of(cut, site, opened) for site in suspects for opened in _opened(given, site)]
    best: dict[str, tuple[_Trial, float]] = {}
    for trial, error in zip(deeper, _tried(cut, deeper, feed), strict=True):
        end = trial.site.pair.second
        if error * _BETTER < errors[end].own and end not in best:
            best[end] = trial, error
    without = {
        (end, name): _Trial.of(cut, trial.site, trial.opened - {name})
        for end, (trial, _) in best.items()
        for name in trial.opened
    }
    found = {
        name
        for (end, name), error in zip(without, _tried(cut, list(without.values()), feed), strict=True)
        if error > best[end][1] * _BETTER
    }
    for site in suspects:
        own = errors[site.pair.second]
        if site.pair.second not in best and own.own > own.so_far * _BETTER:
            worst = max(site.given, key=lambda name: errors[name].so_far, default="")
            if worst and errors[worst].so_far > own.so_far:
                found.add(worst)
    return found


def _is_suspect(error: Errors) -> bool:
    return error.own > _LARGE or error.own > max(_BETTER * error.so_far, _NOTABLE)


def _opened(given: Mapping[str, Sequence[str]], site: Site) -> Iterator[frozenset[str]]:
    """The tensors of pairs up to some sites in front of a site. ``given``: where each site begins, by its end."""
    reached: set[str] = set()
    edge = set(site.given)
    for depth in range(1, max(_DEPTHS) + 1):
        edge -= reached
        if not edge:
            break
        reached |= edge
        edge = {name for end in edge for name in given[end]}
        if depth in _DEPTHS:
            yield frozenset(reached)


def _errors(cut: Cut, feed: Feed) -> Iterator[tuple[Site, Errors]]:
    for block in cut.blocks(cut.sites):
        expected, so_far = block.expected(feed), block.so_far(feed)
        own = block.own(feed, expected)
        for site in block.sites:
            error = Errors()
            error.add(expected[site.pair.first], own[site.pair.second], so_far[site.pair.second])
            yield site, error


def _tried(cut: Cut, trials: Sequence[_Trial], feed: Feed) -> list[float]:
    """The relative squared error at the end of each trial. Those that do not disturb each other run at once."""
    found: dict[int, float] = {}
    by_site = {id(trial.site): trial for trial in trials}
    for block in cut.blocks([trial.site for trial in trials]):
        expected = block.expected(feed)
        groups: list[list[_Trial]] = []
        for trial in (by_site[id(site)] for site in block.sites):
            group = next((group for group in groups if not any(map(trial.disturbs, group))), None)
            if group is None:
                groups.append(group := [])
            group.append(trial)
        for group in groups:
            own = block.own(feed, expected, [trial.site for trial in group])
            for trial in group:
                error, pair = Errors(), trial.site.pair
                error.add(expected[pair.first], own[pair.second], own[pair.second])
                found[id(trial)] = error.own
    return [found[id(trial)] for trial in trials]
