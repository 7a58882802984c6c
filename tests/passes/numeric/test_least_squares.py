from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from channelfold.benchmarks.slopes import slopes
from channelfold.passes.numeric.least_squares import energy, fill, order, penalty, regress, residual

seeds = st.integers(0, 2**32 - 1)


def moments(rng: np.random.Generator, n: int, rank: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(covariance, mean) of features of very different sizes, as activations are."""
    rows = rng.standard_normal((4 * n, rank or n)) @ rng.standard_normal((rank or n, n))
    rows = rows * np.exp(rng.standard_normal(n)) + rng.standard_normal(n)
    centred = rows - rows.mean(axis=0)
    return centred.T @ centred / len(rows), rows.mean(axis=0)


def split(rng: np.random.Generator, n: int, removed: int) -> tuple[np.ndarray, np.ndarray]:
    """(kept, removed) feature numbers."""
    shuffled = rng.permutation(n)
    return np.sort(shuffled[removed:]), np.sort(shuffled[:removed])


def only(weights: np.ndarray, features: np.ndarray) -> np.ndarray:
    target = np.zeros_like(weights)
    target[:, features] = weights[:, features]
    return target


def direct(covariance: np.ndarray, weights: np.ndarray, removed: np.ndarray, ridge: float) -> float:
    """The error of removing features with the others refitted, penalty included, from its definition."""
    kept = np.setdiff1d(np.arange(len(covariance)), removed)
    target = only(weights, removed)
    refit = regress(covariance, target, kept, ridge) if len(kept) else np.zeros((len(weights), 0))
    change = target.copy()
    change[:, kept] -= refit
    return residual(covariance, target, kept, refit) + float(np.sum(change**2 @ penalty(covariance, ridge)))


class TestFill:
    @given(seeds)
    def test_dependent_features_are_recovered(self, seed):
        rng = np.random.default_rng(seed)
        kept, removed = split(rng, 12, 4)
        rows = np.zeros((100, 12))
        rows[:, kept] = rng.standard_normal((100, 8)) * np.exp(rng.standard_normal(8))
        mixing, shift = rng.standard_normal((4, 8)), rng.standard_normal(4)
        rows[:, removed] = rows[:, kept] @ mixing.T + shift
        covariance, mean = np.cov(rows.T, bias=True), rows.mean(axis=0)
        matrix, offset = fill(covariance, mean, kept, removed, ridge=0.0)
        assert np.abs(matrix - mixing).max() < 1e-8
        assert np.abs(offset - shift).max() < 1e-8

    def test_without_kept_features_the_mean_is_left(self):
        covariance, mean = moments(np.random.default_rng(0), 3)
        matrix, offset = fill(covariance, mean, np.array([], int), np.arange(3))
        assert matrix.shape == (3, 0)
        assert np.array_equal(offset, mean)

    def test_dependent_kept_features_are_shared_evenly(self):
        mixing = np.array([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 0, 1]])  # the first two are one
        matrix, _ = fill(mixing @ mixing.T, np.zeros(4), np.array([0, 1, 2]), np.array([3]), ridge=0.0)
        assert np.allclose(matrix, [[0.5, 0.5, 0.0]], atol=1e-4)  # as far as 1e-12 of ridge can tell

    def test_dead_features(self):
        matrix, offset = fill(np.zeros((3, 3)), np.arange(3.0), np.array([0, 1]), np.array([2]))
        assert np.array_equal(matrix, np.zeros((1, 2)))
        assert np.array_equal(offset, [2.0])

    def test_ridge_shrinks_towards_the_mean_in_any_units(self):
        for unit in (1.0, 1e6):
            covariance, mean = np.array([[2 * unit**2, 2 * unit], [2 * unit, 2]]), np.array([unit, 1.0])
            matrix, offset = fill(covariance, mean, np.array([0]), np.array([1]), ridge=0.5)
            assert np.allclose(matrix * unit, 2 / 3)  # 2 / (2 + 0.5 * 2)
            assert np.allclose(offset, 1 / 3)


class TestResidual:
    @given(seeds, st.integers(1, 12))
    def test_more_features_are_never_worse_and_errors_never_negative(self, seed, rank):
        rng = np.random.default_rng(seed)
        covariance, _ = moments(rng, 12, rank)
        inputs = np.arange(4)
        kept, removed = split(rng, 8, 4)
        kept, removed = kept + 4, removed + 4
        weights = rng.standard_normal((5, 12))
        weights[:, inputs] = 0
        target = only(weights, removed)

        def error(features: np.ndarray) -> float:
            return residual(covariance, target, features, regress(covariance, target, features, 0.0))

        idled = weights[:, removed] @ slopes(covariance, inputs, rng.standard_normal((4, 4)), removed)
        joint, refitted, plain = error(np.concatenate([inputs, kept])), error(kept), energy(covariance, target)
        slack = 1e-9 * plain  # of a ridge of 1e-12, amplified where features depend on each other
        assert 0 <= joint <= refitted + slack
        assert refitted <= plain + slack
        assert joint <= residual(covariance, target, inputs, idled) + slack

    def test_it_is_the_mean_squared_error(self):
        rng = np.random.default_rng(0)
        rows, target, matrix = rng.standard_normal((50, 6)), rng.standard_normal((3, 6)), rng.standard_normal((3, 2))
        features = np.array([1, 4])
        left = rows @ target.T - rows[:, features] @ matrix.T
        expected = np.sum((left - left.mean(axis=0)) ** 2) / 50
        found = residual(np.cov(rows.T, bias=True), target, features, matrix)
        assert found == pytest.approx(expected, rel=1e-12)


class TestSlopes:
    def test_linear_channels_get_their_slope_and_constant_ones_none(self):
        rng = np.random.default_rng(0)
        x, rows = rng.standard_normal((200, 3)), rng.standard_normal((2, 3))
        rows[1] = 0
        features = np.concatenate([x, 0.7 * x @ rows.T + 1.5], axis=1)
        found = slopes(np.cov(features.T, bias=True), np.arange(3), rows, np.array([3, 4]))
        assert np.allclose(found, 0.7 * rows, atol=1e-12)


class TestOrder:
    @given(seeds, st.sampled_from([1, 2, 3]), st.integers(0, 6))
    def test_the_curve_equals_direct_solves(self, seed, size, fixed):
        rng = np.random.default_rng(seed)
        n, ridge = 12 + fixed, 1e-3
        covariance, _ = moments(rng, n)
        units = fixed + rng.permutation(12).reshape(-1, size)
        weights = rng.standard_normal((4, n))
        weights[:, :fixed] = 0
        found = order(covariance, weights.T @ weights, units, ridge)
        assert sorted(found.order) == list(range(12 // size))
        for number in range(len(units) + 1):
            removed = units[found.order[:number]].reshape(-1)
            expected = direct(covariance, weights, removed, ridge)
            assert found.errors[number] == pytest.approx(expected, rel=1e-9, abs=1e-12 * found.errors[-1])

    @given(seeds)
    def test_each_step_adds_the_least(self, seed):
        rng = np.random.default_rng(seed)
        covariance, _ = moments(rng, 8)
        weights = rng.standard_normal((8, 8))
        found = order(covariance, weights.T @ weights, np.arange(8)[:, None], 1e-3)
        gone: list[int] = []
        for number, unit in enumerate(found.order[:4], 1):
            every = [direct(covariance, weights, np.array([*gone, j]), 1e-3) for j in range(8) if j not in gone]
            assert found.errors[number] <= min(every) * (1 + 1e-9)
            gone.append(int(unit))

    def test_blocks_of_updates_change_nothing(self):
        rng = np.random.default_rng(1)
        covariance, _ = moments(rng, 230)  # more than two blocks of columns
        weights = rng.standard_normal((20, 230))
        found = order(covariance, weights.T @ weights, np.arange(230)[:, None], 1e-3)
        for number in (95, 96, 97, 192, 230):
            assert found.errors[number] == pytest.approx(
                direct(covariance, weights, found.order[:number], 1e-3), rel=1e-9
            )

    def test_a_copy_goes_first_and_costs_nothing(self):
        rng = np.random.default_rng(0)
        rows = rng.standard_normal((100, 5))
        rows = np.concatenate([rows, 2 * rows[:, 1:2]], axis=1)
        found = order(np.cov(rows.T, bias=True), np.eye(6), np.arange(6)[:, None], 0.0)
        assert found.order[0] in (1, 5)
        assert found.errors[1] < 1e-10 * found.errors[2]

    def test_it_stops_at_the_number_asked_for(self):
        found = order(np.eye(5), np.diag([3.0, 1, 2, 5, 4]), np.arange(5)[:, None], 0.0, number=2)
        assert found.order.tolist() == [1, 2]
        assert np.allclose(found.errors, [0, 1, 3])

    def test_1536_features_take_seconds(self):
        rng = np.random.default_rng(0)
        half = rng.standard_normal((1536, 1536))
        start = time.perf_counter()
        order(half @ half.T / 1536, half[:9].T @ half[:9], np.arange(1536)[:, None])
        assert time.perf_counter() - start < 30  # 3 s on two quiet cores
