"""Sums of float64 that are exact, so that neither the order of the terms nor how they were split changes a bit.

    x = d0 2^(32 (t-1)) + d1 2^(32 (t-2)) + d2 2^(32 (t-3))        |d| < 2^32 integers, |x| < 2^(32 t)

The places of the digits are absolute: a digit depends on its term alone, and integers add up in any order. Three digits
below the leading one of the largest term are kept, which is every bit of that term and at least 2^-64 of it for all
others. What lies below is cut off each term at the same place, whenever the largest term comes (J. Demmel,
H. D. Nguyen, Parallel Reproducible Summation, IEEE Transactions on Computers 64, 2015, section IV, where the digits are
floating-point numbers). Python's integers would be as exact, at a hundred times the time; partial sums kept by a hash
of their sample would take memory with every sample.

A term is the partial sum of one channel in one sample, not a single value: NumPy's ordinary sum within a sample depends
on the sample alone. So exactness costs microseconds a sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_BITS = 32  # of a digit; int64 then holds the sums of 2^31 terms
_DIGITS = 3
_LOWEST = -34  # the place of zero: below every float64


@dataclass
class ExactSum:
    """A sum of finite float64 arrays of one shape. It takes 32 bytes for every element of that shape."""

    _top: np.ndarray | None = None  # t of each element
    _digits: np.ndarray | None = None

    @property
    def value(self) -> np.ndarray:
        """The sum, rounded to float64; 0.0 of nothing."""
        if self._top is None or self._digits is None:
            return np.zeros(())
        value = np.zeros(self._top.shape)
        for place in reversed(range(_DIGITS)):
            value += np.ldexp(self._digits[place].astype(np.float64), _BITS * (self._top - 1 - place))
        return value

    @property
    def size(self) -> int:
        """The number of elements; 0 where nothing was added."""
        return self._top.size if self._top is not None else 0

    def add(self, values: np.ndarray) -> None:
        values = np.asarray(values, np.float64)
        top = np.where(values == 0, _LOWEST, -(-np.frexp(values)[1] // _BITS))
        top = top if self._top is None else np.maximum(self._top, top)
        rest, digits = np.ldexp(values, -_BITS * top), np.empty((_DIGITS, *values.shape), np.int64)
        for place in range(_DIGITS):
            rest = rest * 2.0**_BITS
            digits[place] = whole = np.trunc(rest)
            rest -= whole
        self._take(top, digits)

    def merge(self, other: ExactSum) -> None:
        """Adds the terms of another sum."""
        if other._top is not None and other._digits is not None:
            self._take(other._top, other._digits)

    def _take(self, top: np.ndarray, digits: np.ndarray) -> None:
        if self._top is None or self._digits is None:
            self._top, self._digits = top, digits
            return
        highest = np.maximum(self._top, top)
        self._digits = _lowered(self._digits, highest - self._top) + _lowered(digits, highest - top)
        self._top = highest


def _lowered(digits: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Digits, (digits, …), moved down by ``steps`` (…) places. The lowest digits are dropped."""
    if not steps.any():
        return digits
    source = np.arange(_DIGITS).reshape(-1, *[1] * steps.ndim) - steps
    return np.where(source >= 0, np.take_along_axis(digits, np.maximum(source, 0), axis=0), 0)
