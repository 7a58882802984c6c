"""What goes first, where it is known what should: planted duplicates, dead channels, scales; and data-free moments."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from channelfold.passes.base import Context
from channelfold.passes.channels.groups import Group
from channelfold.passes.prune.importance import (
    MeanCovariance,
    Ranking,
    ReadAxis,
    energies,
    gammas,
    implied,
    magnitudes,
    ranked,
    read_axes,
    reconstruction,
    rectified,
    shrunk,
)
from channelfold.passes.prune.reconstruct import ReadStatistics
from channelfold.tests.graphs import build, positive, random
from channelfold.tests.pruning import data_of, groups_of

X = "(float[N,6] x) => (float[] y)"
MLP = "a = Gemm<transB=1>(x, A, a0) r = Relu(a) y = Gemm<transB=1>(r, B)"
seeds = st.integers(0, 2**32 - 1)


def one(graph) -> tuple[Group, ReadAxis]:
    """The first group of a graph, and the only activation of it that is read."""
    group = groups_of(graph)[0]
    (read,) = read_axes(graph, [group.region])
    return group, read


def mlp(**constants):
    given = {"A": (8, 6), "a0": 8, "B": (4, 8)}
    return build(X, MLP, kind="float", **given | constants)


def measured(graph, size: int = 400) -> tuple[Group, ReadAxis, MeanCovariance]:
    group, read = one(graph)
    statistics = ReadStatistics(graph, [group.region], Context(calibration=data_of(graph, size=size)))
    ((_, found),) = statistics.each()
    return group, read, found


def channels(group: Group, ranking: Ranking) -> list[int]:
    """The rows of the first writer, in the order in which they go."""
    return [int(np.flatnonzero(group.writers[0].labels == group.labels[unit])[0]) for unit in ranking.order]


# ---- magnitudes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [1, 2])
def test_magnitude_is_of_what_writes_and_reads_a_channel(power):
    graph = build(
        "(float[N,3,5,5] x) => (float[] y)",
        "a = Conv(x, A, a0) d = Conv<group=8>(a, D, d0) r = Relu(d) y = Conv(r, B)",
        kind="float", A=(8, 3, 1, 1), a0=8, D=(8, 1, 3, 3), d0=8, B=(2, 8, 3, 3),
    )  # fmt: skip
    written, read = (np.abs(random(shape, name)) ** power for name, shape in (("A", (8, 3)), ("B", (2, 8, 3, 3))))
    weights = written.sum(axis=1) + read.sum(axis=(0, 2, 3))
    assert np.allclose(magnitudes(groups_of(graph)[0], power), weights / weights.mean(), rtol=1e-6)


def test_gammas():
    body = "a = Conv(x, A) n = BatchNormalization(a, g, b, m, v) r = Relu(n) y = Conv(r, B)"
    gamma = np.array([0.5, -2, 0, 1, 3, -0.1])
    graph = build(
        "(float[N,3,5,5] x) => (float[] y)", body, kind="float",
        A=(6, 3, 1, 1), g=gamma, b=6, m=6, v=positive(6), B=(2, 6, 1, 1),
    )  # fmt: skip
    group = groups_of(graph)[0]
    found = gammas(group)
    assert found is not None
    assert np.allclose(found, np.abs(gamma) / np.abs(gamma).mean())
    assert ranked(group, np.abs(gamma)).order.tolist() == [2, 5, 0, 3, 1, 4]
    assert gammas(groups_of(mlp())[0]) is None


def test_values_are_what_the_last_are_worth():
    group, _ = one(mlp())
    found = ranked(group, np.array([5.0, 1, 4, 2, 8, 3, 7, 6]))
    assert found.order.tolist() == [1, 3, 5, 2, 0, 7, 6, 4]
    assert found.values.tolist() == [0, 8, 15, 21, 26, 30, 33, 35, 36]


def test_what_must_stay_goes_last():
    body = "a = Gemm<transB=1>(x, A) u, y = Split<axis=1>(a, s) r = Relu(u) z = Gemm<transB=1>(r, B)"
    graph = build(
        "(float[N,6] x) => (float[] z, float[] y)", body, kind="float", A=(8, 6), B=(4, 6), s=np.array([6, 2])
    )
    (group, *_) = [g for g in groups_of(graph) if g.free.any()]
    stay = np.flatnonzero(~group.free)
    order = ranked(group, -np.arange(group.units, dtype=float)).order
    assert set(order[group.units - len(stay) :]) == set(stay)


# ---- activation and reconstruction -----------------------------------------------------------------------------------


def test_activation_is_the_error_of_removing_one_alone():
    """By definition, from the samples: E (x - E x)^2 times the square of the column, over the energy of the outputs."""
    graph = mlp()
    group, read, _ = measured(graph)
    rows = np.maximum(random((500, 6)) @ random((8, 6), "A").T + random(8, "a0"), 0)
    centred = rows - rows.mean(axis=0)
    covariance = centred.T @ centred / len(rows)
    weight = random((4, 8), "B").astype(np.float32)
    whole = np.square(centred @ weight.T).sum() / len(rows)
    alone = [np.square(np.outer(centred[:, c], weight[:, c])).sum() / len(rows) / whole for c in range(8)]
    found = energies(group, read, MeanCovariance(rows.mean(axis=0), covariance))
    assert np.allclose(found, alone, rtol=1e-5)


def test_a_duplicate_goes_first_and_costs_nothing():
    a, a0 = random((8, 6), "A"), random(8, "a0")
    a[5], a0[5] = a[2], a0[2]
    group, read, found = measured(mlp(A=a, a0=a0), size=4000)
    ranking = reconstruction(group, read, found, 1e-6)
    assert channels(group, ranking)[0] in (2, 5)
    lost = ranking.values[-1] - ranking.values
    assert lost[7] < 1e-3
    assert lost[6] > 10 * lost[7]  # the other one has to do the work of both
    by_energy = energies(group, read, found)
    assert by_energy[channels(group, ranking)[0]] > 0  # which sees each channel alone, and none of this


@pytest.mark.parametrize("importance", ["reconstruction", "activation"])
def test_a_dead_channel_goes_first(importance):
    a0 = random(8, "a0")
    a0[3] = -100
    group, read, found = measured(mlp(a0=a0))
    ranking = (
        ranked(group, energies(group, read, found))
        if importance == "activation"
        else reconstruction(group, read, found, 1e-3)
    )
    assert channels(group, ranking)[0] == 3
    assert ranking.values[-1] - ranking.values[-2] < 1e-12


def test_the_scale_of_a_channel_does_not_matter():
    """A channel ten times as large, read with a tenth: the same function, and the same order at the same errors."""
    scale = np.where(np.arange(8) % 3 == 0, 10, 1)
    plain, scaled = (
        measured(mlp(A=random((8, 6), "A") * s[:, None], a0=random(8, "a0") * s, B=random((4, 8), "B") / s))
        for s in (np.ones(8), scale)
    )
    one, other = (reconstruction(*found, 1e-3) for found in (plain, scaled))
    assert np.array_equal(one.order, other.order)
    assert np.allclose(one.values, other.values, rtol=1e-4, atol=1e-6)


def test_reconstruction_is_the_share_of_the_error():
    group, read, found = measured(mlp())
    ranking = reconstruction(group, read, found, 1e-3)
    assert ranking.values[-1] == pytest.approx(0)
    assert ranking.values[0] == pytest.approx(-1, abs=0.02)  # with nothing left all of the energy is error
    assert (np.diff(ranking.values) >= 0).all()


def test_gram_of_two_readers_and_of_groups():
    body = "a = Conv(x, A) r = Relu(a) p = Conv<group=2>(r, B) q = Conv(r, C) y = Concat<axis=1>(p, q)"
    graph = build(
        "(float[N,3,5,5] x) => (float[] y)", body, kind="float", A=(8, 3, 1, 1), B=(4, 4, 3, 3), C=(3, 8, 3, 3)
    )
    region = groups_of(graph)[0].region
    (read,) = read_axes(graph, [region])
    b, c = random((4, 4, 3, 3), "B").astype(np.float32), random((3, 8, 3, 3), "C").astype(np.float32)
    dense = np.zeros((4, 8, 3, 3))
    dense[:2, :4], dense[2:, 4:] = b[:2], b[2:]
    expected = np.einsum("oihw,ojhw->ij", dense, dense) + np.einsum("oihw,ojhw->ij", c.astype(float), c.astype(float))
    assert np.allclose(read.gram(), expected, rtol=1e-5, atol=1e-5)
    assert np.allclose(read.norms(), np.diagonal(expected), rtol=1e-5)


# ---- moments without data, and of few data ---------------------------------------------------------------------------


@pytest.mark.parametrize("rectifier", ["Relu", ""])
def test_implied_moments_are_those_of_white_inputs(rectifier):
    """Without biases the inputs of the rectifier are just what the formula takes them for."""
    body = MLP.replace(", a0", "") if rectifier else "a = Gemm<transB=1>(x, A) r = Identity(a) y = Gemm<transB=1>(r, B)"
    graph = build(X, body, kind="float", A=(8, 6), B=(4, 8))
    _, read = one(graph)
    found = implied(graph, read)
    assert found is not None
    rows = np.random.default_rng(0).standard_normal((400_000, 6)) @ random((8, 6), "A").T
    rows = np.maximum(rows, 0) if rectifier else rows
    tolerance = 0.01 * rows.var(axis=0).max()  # of 400,000 samples
    assert np.abs(found.mean - rows.mean(axis=0)).max() < tolerance
    assert np.abs(found.covariance - np.cov(rows.T, bias=True)).max() < tolerance


def test_nothing_is_implied_of_what_no_weight_writes():
    body = "a = Gemm<transB=1>(x, A) c = Concat<axis=1>(a, x) y = Gemm<transB=1>(c, B)"
    graph = build(X, body, kind="float", A=(8, 6), B=(4, 14))
    (read,) = (read for read in read_axes(graph, [groups_of(graph)[0].region]) if read.size == 14)
    assert implied(graph, read) is None


@settings(max_examples=20)
@given(seeds)
def test_rectified_moments(seed):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((3, 4)) * np.exp(rng.standard_normal((3, 1)))
    rows = np.maximum(rng.standard_normal((100_000, 4)) @ weight.T, 0)
    found = rectified(weight @ weight.T)
    deviation = rows.std(axis=0)
    assert np.allclose(found.mean / deviation, rows.mean(axis=0) / deviation, atol=0.02)
    assert np.allclose(found.covariance / np.outer(deviation, deviation), np.corrcoef(rows.T), atol=0.05)


class TestShrunk:
    @staticmethod
    def sample(n: int, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """A covariance, and its estimate from ``count`` positions."""
        rng = np.random.default_rng(seed)
        factor = rng.standard_normal((n, n)) * np.exp(rng.standard_normal((n, 1)))
        rows = rng.standard_normal((count, n)) @ factor.T
        return factor @ factor.T, np.cov(rows.T, bias=True)

    def test_many_positions_leave_it(self):
        _, found = self.sample(16, 100_000)
        assert np.abs(shrunk(found, 100_000) - found).max() < 1e-3 * np.abs(found).max()

    @pytest.mark.parametrize("count", [4, 16, 64])
    def test_few_positions_bring_it_nearer_to_the_truth(self, count):
        truth, found = self.sample(32, count)
        scale = np.sqrt(np.outer(np.diagonal(truth), np.diagonal(truth)))
        before, after = (np.linalg.norm((c - truth) / scale) for c in (found, shrunk(found, count)))
        assert after < before

    @pytest.mark.parametrize("count", [1, 2, 5, 40])
    def test_variances_stay_and_it_can_be_inverted(self, count):
        _, found = self.sample(32, max(count, 2))
        after = shrunk(found, count)
        assert np.array_equal(np.diagonal(after), np.diagonal(found))
        assert np.linalg.eigvalsh(after / np.sqrt(np.outer(np.diagonal(found), np.diagonal(found)))).min() > 0

    def test_less_and_less_with_more_positions(self):
        _, found = self.sample(32, 1000)
        left = [np.abs(shrunk(found, count) - found).max() for count in (2, 8, 32, 128, 1024)]
        assert left == sorted(left, reverse=True)

    def test_dead_channels_and_a_single_one(self):
        _, found = self.sample(6, 10)
        found[2] = found[:, 2] = 0
        after = shrunk(found, 10)
        assert np.isfinite(after).all()
        assert not after[2].any()
        assert shrunk(np.array([[4.0]]), 1) == [[4.0]]
