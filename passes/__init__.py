"""Rewrite passes: graph in, graph out, one idea per file.

Each family has its passes and their options in its ``__init__.py``, its face, which imports nothing heavy.
"""

from __future__ import annotations

from typing import Any

from channelfold.passes.base import Pass
from channelfold.passes.cast import Cast
from channelfold.passes.ffn import ApproximateFfn, ReparameterizeFfn
from channelfold.passes.fold import (
    FoldAffine,
    FoldConstants,
    FoldPad,
    FoldShapes,
    InlineFunctions,
    MergeConvs,
    MergeEqual,
    MergeMoves,
    OwnCache,
    RemoveIdentities,
    RewriteEinsum,
    TakeBranch,
)
from channelfold.passes.prune import Prune, RemoveDeadChannels
from channelfold.passes.quantize import ClipWeights, Quantize, QuantizeAttention, QuantizeWeights
from channelfold.passes.smooth import (
    AbsorbBias,
    Equalize,
    MergeChannels,
    ReorderChannels,
    Rotate,
    Smooth,
    SplitChannels,
)
from channelfold.passes.sparsify import Sparsify

PASSES: dict[str, type[Pass]] = {
    cls.name: cls
    for cls in (
        *(FoldConstants, TakeBranch, InlineFunctions, RewriteEinsum, FoldShapes, RemoveIdentities, MergeMoves),
        *(MergeEqual, FoldPad, FoldAffine, ReparameterizeFfn, Equalize, AbsorbBias, Smooth, MergeConvs),
        *(SplitChannels, MergeChannels, ReorderChannels, Rotate, ClipWeights, RemoveDeadChannels, Prune, Sparsify),
        *(ApproximateFfn, QuantizeAttention, Quantize, QuantizeWeights, Cast, OwnCache),
    )
}

_FIRST = ("rewrite-einsum", "fold-constants", "take-branch", "fold-shapes", "remove-identities")
_LAST = ("fold-pad", "fold-affine", "merge-moves", "merge-equal")
_FOLD = (*_FIRST, *_LAST)
_REPARAM = (*_FIRST, "reparameterize-ffn", *_LAST)
BUILT_IN: dict[str, tuple[str, ...]] = {
    "fold": _FOLD,
    "reparam": _REPARAM,
    "int8": (*_FOLD, "quantize"),
    "int8-reparam": (*_REPARAM, "quantize"),
    "int8-smooth": (*_FOLD, "smooth", "quantize"),
    "int8-weights": (*_FOLD, "quantize-weights"),
    "int8-dynamic": (*_FOLD, "quantize-weights"),
    "int4": (*_FOLD, "quantize-weights"),
    "int4-gptq": (*_FOLD, "quantize-weights"),
    "fp16": (*_FOLD, "cast"),
    "bf16": (*_FOLD, "cast"),
    "int8-fp16": (*_FOLD, "quantize", "cast"),
    "dgq": (*_FOLD, "quantize-weights"),
    "fp8": (*_FOLD, "quantize-weights"),
    "nvfp4": (*_FOLD, "quantize-weights"),
}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {  # of passes of built-in recipes: options that differ from defaults
    "int8-smooth": {"smooth": {"allow_insert": True}},
    "int8-dynamic": {"quantize-weights": {"activations": "int8-per-token"}},
    "int4": {"quantize-weights": {"weights": "int4"}},
    "int4-gptq": {"quantize-weights": {"weights": "int4", "rounder": "gptq"}},
    "bf16": {"cast": {"type": "bfloat16"}},
    "dgq": {"quantize-weights": {"weights": "dgq", "activations": "int8"}},
    "fp8": {"quantize-weights": {"weights": "fp8", "activations": "fp8"}},
    "nvfp4": {"quantize-weights": {"weights": "nvfp4", "activations": "fp4"}},
}
