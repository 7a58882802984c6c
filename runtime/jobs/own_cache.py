"""A decoder with a cache of its own, run with the cache as the original has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from channelfold.runtime.io.session import Feed
from channelfold.runtime.stats.compare import Runner


def uncut(original: Runner, caches: Mapping[str, Mapping[str, Any]]) -> Runner:
    """The original without the presents that have lost heads, which cannot be compared."""
    lost = {cache["present"] for cache in caches.values() if any("kept" in step for step in cache["steps"])}
    return _Without(original, frozenset(lost)) if lost else original


@dataclass(frozen=True)
class _Without:
    session: Runner
    names: frozenset[str]

    def run(self, feed: Feed) -> Mapping[str, Any]:
        return {name: values for name, values in self.session.run(feed).items() if name not in self.names}


@dataclass(frozen=True)
class Owned:
    """A model that is given and returns its cache as the original has it.

    ``caches`` holds, by past, the present and the steps of ``passes.fold.own_cache``, the outermost first.
    """

    session: Runner
    caches: Mapping[str, Mapping[str, Any]]

    def run(self, feed: Feed) -> Mapping[str, Any]:
        given = dict(feed)
        for past, cache in self.caches.items():
            for step in cache["steps"]:
                given[past] = _taken(given[past], step)
        found = dict(self.session.run(given))
        for cache in self.caches.values():
            for step in reversed(cache["steps"]):
                found[cache["present"]] = _given_back(found[cache["present"]], step)
        return found


def _taken(past: np.ndarray, step: Mapping[str, Any]) -> np.ndarray:
    if "scale" in step:
        return past / np.asarray(step["scale"], past.dtype)
    return past.take(step["kept"], step["axis"])


def _given_back(present: np.ndarray, step: Mapping[str, Any]) -> np.ndarray:
    if "scale" in step:
        return present * np.asarray(step["scale"], present.dtype)
    axis = step["axis"]
    whole = np.zeros((*present.shape[:axis], step["size"], *present.shape[axis + 1 :]), present.dtype)
    whole[(*[slice(None)] * axis, step["kept"])] = present
    return whole
