"""Orthogonal matrices with entries of nearly one size, as Kronecker products of small matrices.

    Q = diag(+-1) (H_1 x H_2 x …) / sqrt(n)

H are Hadamard matrices: Sylvester's of a power of two, and Paley's of an order q + 1 (q a prime, 3 modulo 4) or
2 q + 2 (q a prime, 1 modulo 4), such as 12, 20, 28, 36. Sizes that have none get a random orthogonal matrix for their
odd part. A vector is turned in n log n steps instead of n^2.
"""

from __future__ import annotations

import math

import numpy as np

_LARGEST = 64  # of the powers of two that are multiplied at once


class Turn:
    """Q for vectors of ``size`` channels; ``seed``: of the signs."""

    def __init__(self, size: int, seed: int = 0):
        generator = np.random.default_rng(seed)
        self.size = size
        self._signs = generator.choice([-1.0, 1.0], size)
        self._factors = _factors(size, generator)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Rows (…, size) times Q, float64."""
        found = rows * self._signs
        for axis, factor in enumerate(self._factors):
            shape = [len(other) for other in self._factors]
            parts = found.reshape(-1, *shape)
            found = np.moveaxis(np.moveaxis(parts, axis + 1, -1) @ factor, -1, axis + 1)
        return found.reshape(rows.shape)


def _factors(size: int, generator: np.random.Generator) -> list[np.ndarray]:
    """Orthogonal matrices whose Kronecker product has ``size`` rows."""
    power = size & -size
    odd, found = size // power, []
    if odd > 1:
        orders = (odd << shift for shift in range(2, power.bit_length()))
        made = next((matrix for order in orders if (matrix := _paley(order)) is not None), None)
        if made is None:
            made, _ = np.linalg.qr(generator.standard_normal((odd, odd)))
        found.append(made)
        power = size // len(made)
    while power > 1:
        order = min(power, _LARGEST)
        found.append(_sylvester(order))
        power //= order
    return found or [np.eye(1)]


def _sylvester(order: int) -> np.ndarray:
    matrix = np.eye(1)
    while len(matrix) < order:
        matrix = np.kron(matrix, [[1.0, 1.0], [1.0, -1.0]])
    return matrix / math.sqrt(order)


def _paley(order: int) -> np.ndarray | None:
    """A Hadamard matrix over sqrt(order), where one of Paley's constructions with a prime has this order."""
    if _is_prime(order - 1) and order % 4 == 0:
        matrix = np.eye(order) + _bordered(order - 1, -1.0)
    elif _is_prime(half := order // 2 - 1) and half % 4 == 1:
        symmetric = _bordered(half, 1.0)
        matrix = np.kron(symmetric, [[1.0, 1.0], [1.0, -1.0]]) + np.kron(np.eye(half + 1), [[1.0, -1.0], [-1.0, -1.0]])
    else:
        return None
    return matrix / math.sqrt(order)


def _bordered(prime: int, sign: float) -> np.ndarray:
    """Quadratic residues of i - j (1, others -1, zero 0), with a border of ones; ``sign``: of its first column."""
    residue = np.full(prime, -1.0)
    residue[np.square(np.arange(prime, dtype=np.int64)) % prime] = 1.0
    residue[0] = 0.0
    places = np.arange(prime)
    matrix = np.zeros((prime + 1, prime + 1))
    matrix[0, 1:], matrix[1:, 0] = 1.0, sign
    matrix[1:, 1:] = residue[(places[:, None] - places) % prime]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
