"""Exact folds: the same function in fewer nodes, or in operators that other passes understand.

rewrite-einsum      Einsum = Transpose, Mul or MatMul
inline-functions    y = f(x)  ->  the nodes of f
fold-constants      f(c1, c2, …) = c
take-branch         If(true) {then: f(x), else: g(x)} = f(x)
fold-shapes         Reshape(x, Concat(Shape(x)[0], 6, 64)) = Reshape(x, [0, 6, 64])
remove-identities   Identity(x), x + 0, x * 1, … = x
merge-moves         Transpose(Transpose(x, p), q) = Transpose(x, p[q])
merge-equal         f(x), f(x)  ->  y = f(x), y
fold-pad            Conv(pads=p)(Pad(q)(x)) = Conv(pads=p + q)(x)
fold-affine         s (W x + b) + t = (diag(s) W) x + (s b + t),   W (s x + t) + b = (W diag(s)) x + (b + W t)
merge-convs         V (W x + b) + c = (V W) x + (V b + c)
own-cache           past / s -> Concat -> s present  =  past -> Concat -> present, for a cache that is the model's own
"""

from __future__ import annotations

from dataclasses import dataclass

from channelfold.passes.base import Pass
from channelfold.passes.options import option


@dataclass(frozen=True)
class RewriteEinsum(Pass):
    """Replaces Einsum by the Transpose, Mul or MatMul that computes the same."""

    name, kind, does_it = "rewrite-einsum", "exact", "einsum"


@dataclass(frozen=True)
class InlineFunctions(Pass):
    """Replaces calls of the model's own functions by the nodes of their bodies."""

    name, kind, does_it, inside = "inline-functions", "exact", "inline", False


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Replaces nodes that depend on constants alone by their values."""

    name, kind, does_it = "fold-constants", "exact", "constants"


@dataclass(frozen=True)
class TakeBranch(Pass):
    """Replaces an If whose condition is constant by the nodes of the branch that it takes."""

    name, kind, does_it = "take-branch", "exact", "branches"


@dataclass(frozen=True)
class FoldShapes(Pass):
    """Folds shapes of which parts are known through the nodes that compute with them."""

    name, kind, does_it = "fold-shapes", "exact", "shapes"
    needs_opset = 5  # before it, the shape of a Reshape is an attribute


@dataclass(frozen=True)
class RemoveIdentities(Pass):
    """Removes nodes that return their input unchanged, and nodes whose results have no readers."""

    name, kind, does_it = "remove-identities", "exact", "identities"


@dataclass(frozen=True)
class MergeMoves(Pass):
    """Merges pairs of Transpose, of Reshape, Squeeze and Unsqueeze, of Slice, Cast or Concat, or removes them."""

    name, kind, does_it = "merge-moves", "exact", "moves"


@dataclass(frozen=True)
class MergeEqual(Pass):
    """Computes equal subexpressions once."""

    name, kind, does_it = "merge-equal", "exact", "equal"


@dataclass(frozen=True)
class FoldPad(Pass):
    """Adds the zeros of a Pad to the padding of the Conv nodes that read it."""

    name, kind, does_it = "fold-pad", "exact", "pad"


@dataclass(frozen=True)
class FoldAffine(Pass):
    """Folds BatchNormalization and other constant channel-wise scales and shifts into neighbouring weights."""

    name, kind, does_it = "fold-affine", "exact", "affine"
    needs_opset = 7  # earlier opsets broadcast by attributes, and BatchNormalization is in training by default


@dataclass(frozen=True)
class MergeConvs(Pass):
    """Merges a Conv into the Conv behind it where the merge is exact and not slower."""

    name, kind, does_it = "merge-convs", "exact", "convs"

    max_macs_growth: float = option(1.0, "Greatest MACs of the merged Conv, relative to the MACs of both.", above=0)


@dataclass(frozen=True)
class OwnCache(Pass):
    """Drops what keeps the values and the heads of a cache for others than the model itself; behind own_cache."""

    name, kind, does_it, inside, moves_cache = "own-cache", "exact", "own_cache", False, True
