"""Figures of merit of one array against another, from sums that can be added up over chunks and feeds.

With r the reference, c the candidate, e = r - c, and sums over all elements of an output in all feeds (float64)::

    SNR           10 log10(sum r² / sum e²)  in dB; inf when equal
    cosine        sum r c / sqrt(sum r² · sum c²)
    relative L2   sqrt(sum e² / sum r²)
    max error     max |e|        mean error    sum |e| / elements

NaN and Inf: a position where both sides hold the same NaN or Inf is left out of the sums; a position where they differ
counts as an infinite error, so that SNR is -inf.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

_CHUNK = 1 << 13  # elements: the float64 copies stay in the cache, and BLAS does not split a product between threads


def is_float(value: Any) -> bool:
    """Whether a value is an array of floats; the float types of ml_dtypes, of numpy's kind V, count as well."""
    return isinstance(value, np.ndarray) and (value.dtype.kind == "f" or "float" in value.dtype.name)


def counted(output: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """The positions of an output that take part, (n, channels), where the output has those of the mask (n, tokens).

    A mask of floats may be one that is added, where 0 takes part; it leaves nothing out.
    """
    if mask is None or mask.ndim != 2 or mask.dtype.kind == "f":
        return output
    return output[mask != 0] if output.ndim > 2 and output.shape[:2] == mask.shape else output


@dataclass
class ErrorSums:
    """Sums over pairs of float arrays, from which every figure follows.

    ``differing`` counts the positions where a side is not finite and the sides differ.
    """

    elements: int = 0
    reference2: float = 0.0
    candidate2: float = 0.0
    product: float = 0.0
    error2: float = 0.0
    error1: float = 0.0
    max_error: float = 0.0
    max_reference: float = 0.0
    differing: int = 0
    reference_nan: int = 0
    reference_inf: int = 0
    candidate_nan: int = 0
    candidate_inf: int = 0

    @classmethod
    def of(cls, reference: np.ndarray, candidate: np.ndarray) -> ErrorSums:
        total = cls()
        for r, c in _chunks(reference, candidate):
            total.add(cls._of_chunk(r, c))
        return total

    @classmethod
    def _of_chunk(cls, r: np.ndarray, c: np.ndarray) -> ErrorSums:
        sums = cls(elements=r.size)
        finite = np.isfinite(r) & np.isfinite(c)
        if not finite.all():
            alike = (r == c) | (np.isnan(r) & np.isnan(c))
            sums.differing = int(np.sum(~(finite | alike)))
            sums.reference_nan, sums.reference_inf = int(np.sum(np.isnan(r))), int(np.sum(np.isinf(r)))
            sums.candidate_nan, sums.candidate_inf = int(np.sum(np.isnan(c))), int(np.sum(np.isinf(c)))
            r, c = r[finite], c[finite]
        error = np.abs(r - c)
        sums.reference2, sums.candidate2, sums.product = float(r @ r), float(c @ c), float(r @ c)
        sums.error2, sums.error1 = float(error @ error), float(error.sum())
        sums.max_error, sums.max_reference = float(error.max(initial=0)), float(np.abs(r).max(initial=0))
        if sums.differing:
            sums.error2 = sums.error1 = sums.max_error = math.inf
        return sums

    def add(self, other: ErrorSums) -> None:
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            setattr(self, field.name, max(mine, theirs) if field.name.startswith("max") else mine + theirs)

    @property
    def mean_error(self) -> float:
        return self.error1 / self.elements if self.elements else 0.0

    @property
    def snr(self) -> float:
        if self.error2 == 0:
            return math.inf
        ratio = self.reference2 / self.error2
        return 10 * math.log10(ratio) if ratio > 0 else -math.inf

    @property
    def cosine(self) -> float:
        norm = math.sqrt(self.reference2 * self.candidate2)
        if norm == 0:
            return float(self.reference2 == self.candidate2)
        return min(1.0, max(-1.0, self.product / norm))

    @property
    def relative_l2(self) -> float:
        if self.error2 == 0:
            return 0.0
        return math.sqrt(self.error2 / self.reference2) if self.reference2 else math.inf


def _chunks(reference: np.ndarray, candidate: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    r, c = reference.reshape(-1), candidate.reshape(-1)
    for start in range(0, r.size, _CHUNK):
        yield r[start : start + _CHUNK].astype(np.float64), c[start : start + _CHUNK].astype(np.float64)
