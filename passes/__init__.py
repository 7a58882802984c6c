"""Rewrite passes: graph in, graph out, one idea per file.

Each family has its passes and their options in its ``__init__.py``, its face, which imports nothing heavy.
"""

from __future__ import annotations

from channelfold.passes.base import Pass
from channelfold.passes.ffn import ApproximateFfn, ReparameterizeFfn
from channelfold.passes.fold import (
    FoldAffine,
    FoldConstants,
    FoldPad,
    InlineFunctions,
    MergeConvs,
    RemoveIdentities,
    RewriteEinsum,
    TakeBranch,
)
from channelfold.passes.prune import Prune, RemoveDeadChannels
from channelfold.passes.quantize import ClipWeights, Quantize, QuantizeWeights
from channelfold.passes.smooth import AbsorbBias, Equalize, MergeChannels, ReorderChannels, Smooth, SplitChannels
from channelfold.passes.sparsify import Sparsify

PASSES: dict[str, type[Pass]] = {
    cls.name: cls
    for cls in (
        *(FoldConstants, TakeBranch, InlineFunctions, RewriteEinsum, RemoveIdentities, FoldPad, FoldAffine),
        *(ReparameterizeFfn, Equalize, AbsorbBias, Smooth, MergeConvs, SplitChannels, MergeChannels),
        *(ReorderChannels, ClipWeights, RemoveDeadChannels, Prune, Sparsify, ApproximateFfn, Quantize),
        QuantizeWeights,
    )
}

_FOLD = ("rewrite-einsum", "fold-constants", "take-branch", "remove-identities", "fold-pad", "fold-affine")
_REPARAM = (*_FOLD[:4], "reparameterize-ffn", *_FOLD[4:])
BUILT_IN: dict[str, tuple[str, ...]] = {
    "fold": _FOLD,
    "reparam": _REPARAM,
    "int8": (*_FOLD, "quantize"),
    "int8-reparam": (*_REPARAM, "quantize"),
    "int8-smooth": (*_FOLD, "smooth", "quantize"),
    "int8-weights": (*_FOLD, "quantize-weights"),
}
