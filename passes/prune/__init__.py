"""Channels removed from every tensor that has them: a smaller graph, not a masked one.

prune                  y = W [x_K; x_S]  ~  (W_K + W_S R) x_K + (b + W_S o),   R, o = argmin E ||x_S - R x_K - o||^2
remove-dead-channels   y = W [x_K; x_S] + b  =  W_K x_K + (b + W_S k),   x_S unread, or k whatever the input is
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from channelfold.passes.base import Pass
from channelfold.passes.options import option
from channelfold.runtime.errors import UsageError

AMOUNTS = {  # the options that say how much goes: the allocations that fit each option, and the reason against others
    "keep_macs": (("auto", "uniform", "ranked", "knapsack"), "is a budget to share out"),
    "keep_params": (("auto", "uniform", "ranked", "knapsack"), "is a budget to share out"),
    "keep_latency": (("auto", "knapsack"), "takes the knapsack"),
    "ratio": (("auto", "uniform"), "takes the same share of every group"),
    "tolerance": (("auto", "greedy"), "is used up group by group"),
}
_SHARE = "a share: 0.5 is half"


@dataclass(frozen=True)
class Prune(Pass):
    """Removes channels until a budget is met, and reconstructs the layers that read them."""

    name, kind, does_it = "prune", "lossy", "structured"

    keep_macs: float | None = option(None, "Share of the MACs to keep.", above=0, high=1, expected=_SHARE)
    keep_params: float | None = option(None, "Share of the parameters to keep.", above=0, high=1, expected=_SHARE)
    keep_latency: float | None = option(
        None, "Share of the time in ONNX Runtime on this machine to keep.", above=0, high=1, expected=_SHARE
    )
    ratio: float | None = option(None, "Share of every group's channels to remove.", low=0, below=1, expected=_SHARE)
    tolerance: float | None = option(
        None, "Largest squared error of any output, relative to its variance; needs data.", above=0, below=math.inf
    )
    importance: Literal["auto", "l1", "l2", "bn", "activation", "reconstruction"] = option(
        "auto", "Ranking of the channels; auto is reconstruction, bn needs BatchNormalizations."
    )
    allocation: Literal["auto", "uniform", "ranked", "knapsack", "greedy"] = option(
        "auto",
        "Sharing of a budget: one share, one ranking of all channels, the largest total importance; greedy: tolerance.",
    )
    compensate: Literal["auto", "none", "bias", "lstsq", "outputs"] = option(
        "auto",
        "Reconstruction of readers: none, of biases, by least squares; outputs: corrected layer by layer, slower.",
    )
    align: int = option(8, "Number that divides the kept channels of every group.", low=1)
    width: bool = option(False, "Also cut channels that a norm works on: the width of a transformer.")
    include: tuple[str, ...] = option((), "Nodes whose channels may go: names, * and ? match.", metavar="PATTERN")
    exclude: tuple[str, ...] = option((), "Nodes whose channels stay.", metavar="PATTERN")
    ridge: float = option(1e-3, "Ridge of the least squares, relative to the variances.", low=0)
    own_cache: bool = option(False, "Cut heads from a decoder's cache too: only the model writes and reads the cache.")
    verify: bool = option(True, "Prove that the cut equals a mask of the same channels.")

    def __post_init__(self) -> None:
        given = [name for name in AMOUNTS if getattr(self, name) is not None]
        if len(given) != 1:
            found = "none of them" if not given else " and ".join(map(repr, given))
            raise UsageError(f"Expected one of {', '.join(map(repr, AMOUNTS))}, found {found}", "Give one of them")
        super().__post_init__()
        allocations, why = AMOUNTS[given[0]]
        if self.allocation not in allocations:
            known = " or ".join(map(repr, allocations))
            raise UsageError(
                f"{given[0]!r} {why}, 'allocation' is {self.allocation!r}", f"Take {known}, or another budget"
            )
        if given == ["tolerance"] and self.width:
            raise UsageError("'tolerance' cannot judge channels that a norm works on", "Leave out 'width'")


@dataclass(frozen=True)
class RemoveDeadChannels(Pass):
    """Removes channels that are never read or always have the same value."""

    name, kind, does_it = "remove-dead-channels", "exact", "dead"

    align: int = option(1, "Number that divides the kept channels of every group, where a group has more.", low=1)
