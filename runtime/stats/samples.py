"""The signal-to-noise ratios of single samples: how they are spread, and the samples with the lowest ones."""

from __future__ import annotations

import bisect
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from channelfold.runtime.data.picture import thumbnail
from channelfold.runtime.io.session import Feed

_WORST = 6
_BINS = 20


def spread(ratios: Sequence[float]) -> dict[str, Any] | None:
    """The ``quartiles`` of ratios, from the lowest to the highest, and how many lie in every ``step`` from ``low`` on.

    None for less than two ratios. The ``counts`` are those of the finite ratios.
    """
    if len(ratios) < 2:
        return None
    ordered = sorted(ratios)
    quartiles = [ordered[round(quarter * (len(ordered) - 1) / 4)] for quarter in range(5)]
    finite = [ratio for ratio in ordered if math.isfinite(ratio)]
    if not finite:
        return {"quartiles": quartiles, "low": 0, "step": 1, "counts": []}
    step = max(1, math.ceil((finite[-1] - finite[0]) / _BINS))
    low = math.floor(finite[0] / step) * step
    counts = [0] * (int((finite[-1] - low) // step) + 1)
    for ratio in finite:
        counts[int((ratio - low) // step)] += 1
    return {"quartiles": quartiles, "low": low, "step": step, "counts": counts}


@dataclass
class Worst:
    """The samples with the lowest ratios so far, the lowest first, with pictures of those that are images."""

    found: list[dict[str, Any]] = field(default_factory=list)

    def add(self, sample: int, output: str, ratio: float, feed: Feed) -> None:
        """Takes up the lowest ratio of the outputs of a sample."""
        if ratio == math.inf or (len(self.found) == _WORST and ratio >= self.found[-1]["snr"]):
            return
        entry = {"sample": sample, "output": output, "snr": ratio, "picture": thumbnail(feed)}
        bisect.insort(self.found, entry, key=operator.itemgetter("snr"))
        del self.found[_WORST:]
