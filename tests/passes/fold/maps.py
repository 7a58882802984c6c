"""Shapes and parameters of the maps to fold."""

from __future__ import annotations

from channelfold.passes.fold import FoldAffine
from channelfold.tests.graphs import fold, positive

IMAGE = "(float[N,4,6,6] x) => (float[] y)"
ROWS = "(float[N,4] x) => (float[] y)"
TOKENS = "(float[N,5,4] x) => (float[] y)"
NORM = {"g": 4, "s": 4, "m": 4, "v": positive(4)}
BN = "BatchNormalization"


def affine(graph, **options):
    return fold(FoldAffine(), graph, **options)
