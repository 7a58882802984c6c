"""Feed-forward networks made of fewer hidden channels and a dense layer.

reparameterize-ffn   y = W2 h' + b2,  h' affine on idle channels  =  Wd x + bd + W2_i act(W1_i x + b1_i)
approximate-ffn      y = W2 act(W1 x + b1) + b2  ~  (W2_K + N) act(W1_K x + b1_K) + M x + (b2 + m)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from channelfold.passes.base import Pass
from channelfold.passes.options import option
from channelfold.runtime.errors import UsageError


@dataclass(frozen=True)
class ReparameterizeFfn(Pass):
    """Folds FFN channels that bypass the activation into one dense layer beside the others."""

    name, kind, does_it = "reparameterize-ffn", "exact", "reparameterize"
    needs_opset = 7  # earlier opsets broadcast by attributes, and norms are in training by default

    always: bool = option(False, "Fold also where too few channels are idle for it to save anything.")


@dataclass(frozen=True)
class ApproximateFfn(Pass):
    """Removes hidden channels of FFNs and lets the others, and a dense branch where it pays, stand in for them."""

    name, kind, does_it, needs_data = "approximate-ffn", "calibrated", "approximate", "Approximating FFNs"

    keep_hidden: float | None = option(None, "Share of all hidden channels to keep.", above=0, high=1)
    keep_macs: float | None = option(None, "Share of the FFNs' multiply-accumulates to keep.", above=0, high=1)
    max_error: float | None = option(None, "Predicted relative error (RMS) of the outputs at most.", above=0, high=1)
    branch: Literal["auto", "never", "always"] = option("auto", "May a dense layer be added; auto: where it pays.")
    ridge: float | None = option(
        None, "Of the fit, relative to variances.", low=0, below=math.inf, means="by the number of samples"
    )
    align: int = option(8, "Kept channels are multiples of it.", low=1)
    include: tuple[str, ...] = option((), "FFNs by the linear that ends them: names, * and ? match.", metavar="PATTERN")
    exclude: tuple[str, ...] = option((), "Not these FFNs.", metavar="PATTERN")

    def __post_init__(self) -> None:
        goals = ("keep_hidden", "keep_macs", "max_error")
        given = [name for name in goals if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(map(repr, given)) + " are given" if given else "the amount to remove is missing"
            raise UsageError(found, "Give one of 'keep_hidden', 'keep_macs' and 'max_error'")
        super().__post_init__()
