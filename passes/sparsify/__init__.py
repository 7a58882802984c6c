"""Zeros in patterns, with the shape of the graph as it was.

sparsify   W' = M * W,   M of zeros and ones;   b' = b + (W - W') E[x] with data
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from channelfold.passes.base import Pass
from channelfold.passes.options import option
from channelfold.runtime.errors import UsageError, nearest

_WORDS = ("block", "unstructured")
_LIMIT = 64  # the largest M


@dataclass(frozen=True)
class Sparsify(Pass):
    """Sets weights of Conv, ConvTranspose, Gemm and MatMul to zero: N of M inputs, blocks, or anywhere."""

    name, kind, does_it = "sparsify", "lossy", "zeros"

    pattern: str = option("2:4", "N:M, block or unstructured.", metavar="PATTERN")
    sparsity: float | None = option(
        None, "block, unstructured: share of the weights to set to zero.", above=0, below=1, means="0.5"
    )
    block: int = option(32, "block: side of a tile.", low=2, high=4096)
    scores: Literal["magnitude", "wanda"] | None = option(
        None, "Importance of a weight.", means="wanda with data, else magnitude"
    )
    ratios: Literal["uniform", "equal-slope", "ecoflap"] | None = option(
        None,
        "block, unstructured: distribution of the zeros among layers.",
        means="equal-slope for block, else uniform",
    )
    max_layer_sparsity: float = option(
        0.8, "equal-slope, ecoflap: largest share of zeros in a layer.", above=0, below=1
    )
    exclude: tuple[str, ...] = option((), "Nodes to leave dense: names, * and ? match.", metavar="PATTERN")
    correct_bias: bool = option(True, "With data: add the mean of the lost products to the biases.")

    def __post_init__(self) -> None:
        if self.pattern not in _WORDS:
            self._check_group()
        super().__post_init__()
        if self.ratios == "equal-slope" and self.pattern != "block":
            raise UsageError(
                f"Equal slopes are for blocks, and 'pattern' is {self.pattern!r}", "Use uniform or ecoflap"
            )
        if self.shared_by != "uniform" and self.share > self.max_layer_sparsity:
            raise UsageError(
                f"'sparsity' is {self.share:g}, and no layer may pass {self.max_layer_sparsity:g}",
                "Raise 'max_layer_sparsity', or use uniform ratios",
            )

    def _check_group(self) -> None:
        """Raises UsageError where the pattern is no N:M, or other options contradict it."""
        found = re.fullmatch(r"(\d{1,3}):(\d{1,3})", self.pattern)
        if found is None:
            raise UsageError(
                f"'pattern' is {self.pattern!r}, expected N:M such as 2:4, 'block' or 'unstructured'",
                nearest(self.pattern, _WORDS) if self.pattern.isalpha() else "Write 2:4",
            )
        n, m = map(int, found.groups())
        if not 1 <= n < m <= _LIMIT:
            raise UsageError(f"'pattern' is {self.pattern!r}", f"Expected N:M with 1 <= N < M <= {_LIMIT}")
        if self.sparsity is not None and not math.isclose(self.sparsity, 1 - n / m):
            raise UsageError(
                f"'sparsity' is {self.sparsity:g}, and {self.pattern} has one of {1 - n / m:g}", "Leave it out"
            )
        if self.ratios not in (None, "uniform"):
            raise UsageError(f"{self.pattern} is the same in every layer", "Leave 'ratios' out")

    @property
    def group(self) -> tuple[int, int] | None:
        """(N, M); None for the other patterns."""
        if self.pattern in _WORDS:
            return None
        n, m = self.pattern.split(":")
        return int(n), int(m)

    @property
    def share(self) -> float:
        """The share of the weights that a block or unstructured pattern sets to zero."""
        return 0.5 if self.sparsity is None else self.sparsity

    @property
    def shared_by(self) -> str:
        """The distribution of the zeros among the layers."""
        return self.ratios or ("equal-slope" if self.pattern == "block" else "uniform")
