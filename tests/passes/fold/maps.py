"""Shapes and parameters of the maps to fold."""

from __future__ import annotations

from channelfold.passes.fold import FoldAffine
from channelfold.tests.graphs import build, changes, fold, listing, ops, positive, reasons

IMAGE = "(float[N,4,6,6] x) => (float[] y)"
ROWS = "(float[N,4] x) => (float[] y)"
TOKENS = "(float[N,5,4] x) => (float[] y)"
NORM = {"g": 4, "s": 4, "m": 4, "v": positive(4)}
BN = "BatchNormalization"


def affine(graph, **options):
    return fold(FoldAffine(), graph, **options)


def left_after_a_fold(inputs: str, body: str, given: dict, left: str | list[str], said: str | None) -> None:
    """Folds a graph, whose outputs stay, and compares its listing (or its operators) and the one change or refusal."""
    options = {"rtol": given["rtol"]} if "rtol" in given else {}
    graph = build(inputs, body, **{name: value for name, value in given.items() if name != "rtol"})
    outcome = affine(graph, **options)
    assert (listing(graph) if isinstance(left, str) else ops(graph)) == left
    assert said is None or [said] in (changes(outcome), reasons(outcome))
