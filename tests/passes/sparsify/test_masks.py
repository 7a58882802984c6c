"""Masks: what each pattern promises, against a direct search."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from channelfold.passes.sparsify.masks import Tiles, by_row, n_of_m
from channelfold.tests.graphs import random


@given(n=st.integers(1, 3), m=st.integers(4, 6), outs=st.integers(1, 4), groups=st.integers(1, 4), kernel=st.booleans())
def test_the_best_n_of_every_m_inputs(n, m, outs, groups, kernel):
    scores = np.abs(random((outs, groups * m, *((2, 3) if kernel else ())), "scores"))
    mask = n_of_m(scores, n, m)
    assert mask.shape == scores.shape
    for out, group, *place in itertools.product(range(outs), range(groups), *map(range, scores.shape[2:])):
        at = (out, slice(group * m, group * m + m), *place)
        assert set(np.flatnonzero(mask[at])) == set(np.argsort(scores[at])[-n:])


def test_of_equal_scores_the_first_stay():
    assert n_of_m(np.zeros((1, 4)), 2, 4).tolist() == [[True, True, False, False]]
    assert by_row(np.zeros((2, 3)), 3).tolist() == [[True, True, False], [True, False, False]]
    assert Tiles((4, 4), 2).best(np.zeros((4, 4)), 1).sum(axis=1).tolist() == [2, 2, 0, 0]


@pytest.mark.parametrize("count", [0, 1, 6, 7, 11, 27, 30])
def test_rows_share_what_is_kept(count):
    scores = np.abs(random((3, 5, 2), "rows"))
    kept = by_row(scores, count).reshape(3, -1)
    assert kept.sum() == count
    assert kept.sum(axis=1).max() - kept.sum(axis=1).min() <= 1
    for row, mask in zip(scores.reshape(3, -1), kept, strict=True):
        assert row[mask].min(initial=np.inf) >= row[~mask].max(initial=0)


def test_a_row_more_where_it_is_worth_most():
    assert by_row(np.array([[1.0, 0.5], [9.0, 8.0], [1.0, 0.6]]), 4).tolist() == [[1, 0], [1, 1], [1, 0]]


@pytest.mark.parametrize("shape", [(8, 12), (7, 9), (3, 50), (6, 10, 2, 3)])
def test_tiles_are_aligned_and_whole(shape):
    tiles = Tiles(shape, 4)
    values = np.abs(random(shape, "tiles"))
    assert tiles.sizes().sum() == values.size
    assert tiles.sums(values).sum() == pytest.approx(values.sum(), rel=1e-12)
    for count in (1, 2, tiles.count // 2, tiles.count):
        mask = tiles.best(values, count)
        shares = tiles.sums(mask.astype(float)) / tiles.sizes()
        assert sorted(set(shares.reshape(-1))) == ([1.0] if count == tiles.count else [0.0, 1.0])
        assert shares.sum() == count
        means = tiles.sums(values) / tiles.sizes()
        assert means[shares == 1].min() >= means[shares == 0].max(initial=0)
