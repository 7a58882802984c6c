"""Channels scaled, shifted, split, merged, sorted and rotated, so that quantization loses less.

smooth             y = W x + b = (W diag(s)) ((x - z) / s) + (b + W z)
equalize           y = W2 relu(W1 x + b) = (W2 diag(s)) relu(diag(1/s) (W1 x + b)),   s = sqrt(r1 / r2)
absorb-bias        y = W2 relu(W1 x + b1) + b2 = W2 relu(W1 x + b1 - c) + b2 + W2 c
split-channels     w x = T (w (x / T)): an outlier channel becomes T smaller ones
merge-channels     w_i x_i + w_j x_j ~ (w_i + w_j) (x_i + x_j) / 2
reorder-channels   q . k = (P q) . (P k),   W_o v = (W_o P^T) (P v)
rotate             W n(x) = (W Q) n(Q^T x),   n(x) = x / sqrt(mean(x^2));   W_o v = (W_o Q) (Q^T v)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from channelfold.passes.base import Pass
from channelfold.passes.options import option

Aim = Literal["mean", "median", "clipped"]


@dataclass(frozen=True)
class Smooth(Pass):
    """Moves channel-wise scales and shifts of activations into the weights around them."""

    name, kind, does_it, needs_data = "smooth", "exact", "activations", "Smoothing"

    method: Literal["auto", "smoothquant", "os-plus", "awq", "repq", "outliertune", "fp4-shift"] = option(
        "auto", "How scales and shifts are chosen; auto: the best of smoothquant and os-plus at each site."
    )
    alpha: float = option(0.5, "Share of the difficulty that moves from activations to weights.", low=0, high=1)
    search_alpha: bool = option(False, "Find the best alpha for each site.")
    aim: Aim = option("mean", "How the range that all channels get is computed.")
    shift: bool = option(True, "Shift channels too, where biases can take the shift up.")
    allow_insert: bool = option(False, "Insert Mul and Add nodes where no weight or norm can take a scale up.")
    include: tuple[str, ...] = option((), "Only these linear nodes: names, * and ? match.", metavar="PATTERN")
    exclude: tuple[str, ...] = option((), "Not these linear nodes.", metavar="PATTERN")
    activation_bits: int = option(8, "Bits of the quantizer of activations that a search expects.", low=2, high=16)
    weight_bits: int = option(8, "Bits of the quantizer of weights that a search expects.", low=2, high=16)
    group_size: int = option(0, "Weights that share a scale, 0 for a whole row.", low=0, high=1 << 20)
    own_cache: bool = option(False, "Scale the cache of a decoder too: only the model writes and reads the cache.")
    roll_back: bool = option(True, "Take back, by groups of sites, what makes the quantized outputs no better.")


@dataclass(frozen=True)
class Equalize(Pass):
    """Equalizes the weight ranges of neighbouring layers channel by channel; needs no data."""

    name, kind, does_it = "equalize", "exact", "equalize"

    iterations: int = option(100, "Rounds over the whole model, at most.", low=1)
    allow_insert: bool = option(False, "Replace a Clip from 0 by a Relu and a Min with one bound for each channel.")
    exclude: tuple[str, ...] = option((), "Nodes whose weights stay as they are.", metavar="PATTERN")


@dataclass(frozen=True)
class AbsorbBias(Pass):
    """Moves the lower bound of each channel in front of a Relu into the biases of the layers behind the Relu."""

    name, kind, does_it, needs_data = "absorb-bias", "calibrated", "absorb_bias", "Absorbing biases"

    sigmas: float = option(3.0, "Standard deviations below the mean that are kept.", low=0)
    exclude: tuple[str, ...] = option((), "Nodes in front of the Relu that keep their biases.", metavar="PATTERN")


@dataclass(frozen=True)
class SplitChannels(Pass):
    """Splits outlier channels of activations into equal parts, which int8 represents better."""

    name, kind, does_it, needs_data = "split-channels", "exact", "split", "Splitting channels"

    max_extra: float = option(0.2, "Greatest share of channels to add.", above=0)
    min_gain: float = option(
        1.0, "Least gain of the quantized outputs in dB; at least 3 where nodes are inserted.", low=0, metavar="DB"
    )
    align: int = option(16, "Widths become multiples of this number.", low=1)
    allow_insert: bool = option(False, "Insert a Gather of the channels where the layer in front cannot get wider.")


@dataclass(frozen=True)
class MergeChannels(Pass):
    """Merges pairs of similar channels where channels were split, or where a width is not aligned."""

    name, kind, does_it, needs_data = "merge-channels", "calibrated", "merge", "Merging channels"

    align: int = option(0, "Merge down to a multiple of this number; 0: down to the width before a split.", low=0)
    max_change: float = option(0.01, "Greatest squared relative change of the outputs of the linears behind.", low=0)


@dataclass(frozen=True)
class ReorderChannels(Pass):
    """Sorts the channels of keys and values by magnitude inside each attention head."""

    name, kind, does_it = "reorder-channels", "exact", "reorder"


@dataclass(frozen=True)
class Rotate(Pass):
    """Rotates the residual stream of models with RMS norms, and attention heads, which spreads outlier channels."""

    name, kind, does_it = "rotate", "exact", "rotate"

    roll_back: bool = option(True, "Take back what makes the quantized outputs no better.")
