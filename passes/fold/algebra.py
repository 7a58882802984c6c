"""Sizes of axes that are known in part: sums of products of unknown sizes.

    batch                        an unknown size
    2 * batch * length + 1       a sum of products
    (2 * batch * length) / batch = 2 * length

Two sizes that are equal are the same sum, so that ``==`` compares them. Unknown sizes are never negative.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import reduce

_Product = tuple[Hashable, ...]


@dataclass(frozen=True)
class Size:
    """A sum: (factors, number of times) of each product of unknown sizes, in order, without zeros."""

    terms: tuple[tuple[_Product, int], ...]

    @classmethod
    def number(cls, value: int) -> Size:
        return cls._of({(): int(value)})

    @classmethod
    def unknown(cls, key: Hashable) -> Size:
        """The size called ``key``; equal keys are equal sizes."""
        return cls._of({(key,): 1})

    @classmethod
    def _of(cls, terms: dict[_Product, int]) -> Size:
        return cls(tuple(sorted(((factors, times) for factors, times in terms.items() if times), key=repr)))

    @property
    def known(self) -> int | None:
        """The number that a size is, None where it depends on the input."""
        if not self.terms:
            return 0
        ((factors, times), *more) = self.terms
        return times if not factors and not more else None

    @property
    def never_negative(self) -> bool:
        return all(times > 0 for _, times in self.terms)

    def __add__(self, other: Size) -> Size:
        terms = Counter(dict(self.terms))
        for factors, times in other.terms:
            terms[factors] += times
        return self._of(terms)

    def __sub__(self, other: Size) -> Size:
        return self + other * Size.number(-1)

    def __mul__(self, other: Size) -> Size:
        terms: Counter[_Product] = Counter()
        for left, times in self.terms:
            for right, more in other.terms:
                terms[tuple(sorted((*left, *right), key=repr))] += times * more
        return self._of(terms)

    def over(self, other: Size) -> Size | None:
        """The quotient where the division by one product leaves no rest; else None."""
        if len(other.terms) != 1:
            return None
        ((divisor, number),) = other.terms
        terms = {}
        for factors, times in self.terms:
            left = Counter(factors)
            left.subtract(divisor)
            if times % number or min(left.values(), default=0) < 0:
                return None
            terms[tuple(sorted(left.elements(), key=repr))] = times // number
        return self._of(terms)

    def differs(self, other: Size) -> bool:
        """Whether two sizes are different whatever the input."""
        gap = self - other
        signs = {times > 0 for _, times in gap.terms}
        return len(signs) == 1 and any(not factors for factors, _ in gap.terms)


def product(sizes: Iterable[Size]) -> Size:
    return reduce(Size.__mul__, sizes, Size.number(1))
