"""Turns are orthogonal, and spread one channel over all of them where a Hadamard matrix is known."""

from __future__ import annotations

import numpy as np
import pytest

from channelfold.passes.numeric.hadamard import Turn


@pytest.mark.parametrize("size", [1, 2, 7, 12, 20, 28, 36, 48, 64, 84, 176, 576, 896])
def test_a_turn_is_orthogonal(size):
    turn = Turn(size, seed=size)
    matrix = turn(np.eye(size))
    assert np.allclose(matrix @ matrix.T, np.eye(size), atol=1e-12)
    rows = np.random.default_rng(0).normal(size=(3, 2, size))
    assert np.allclose(turn(rows), rows @ matrix, atol=1e-12)
    if size not in (7,):
        assert np.allclose(np.abs(matrix), size**-0.5, atol=1e-12)
