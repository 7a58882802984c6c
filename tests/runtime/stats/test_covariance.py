from __future__ import annotations

import numpy as np
import pytest

from channelfold.runtime.data.sources import Data, open_data
from channelfold.runtime.errors import DataError
from channelfold.runtime.io.session import TensorSpec
from channelfold.runtime.stats import covariance as module
from channelfold.runtime.stats.covariance import CHUNK, Moments, ProductSum, bytes_of, collect
from channelfold.tests.graphs import build


def seen(axes: dict[str, int], samples: list[dict[str, np.ndarray]], limit: int = module.POSITIONS) -> Moments:
    found = Moments(axes, limit)
    for sample in samples:
        for name in axes:
            found.take(name, sample[name])
    return found


def rows(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(x (n, 3), h (n, 5)) float32, far from zero, where a variance by differences would be lost."""
    rng = np.random.default_rng(seed)
    x = (1000 + rng.standard_normal((n, 3))).astype(np.float32)
    return x, (x @ rng.standard_normal((3, 5)) + rng.standard_normal((n, 5))).astype(np.float32)


class TestMoments:
    @pytest.mark.parametrize("n", [1, 7, CHUNK, CHUNK + 1, 2 * CHUNK + 300])
    def test_mean_and_covariance_are_those_of_all_rows(self, n):
        x, h = rows(n)
        found = seen({"x": -1, "h": -1}, [{"x": x, "h": h}])
        both = np.concatenate([x, h], axis=1).astype(np.float64)
        assert found.count == n
        assert found.places == {"x": slice(0, 3), "h": slice(3, 8)}
        assert np.abs(found.mean - both.mean(axis=0)).max() < 1e-10
        expected = np.cov(both.T, bias=True)
        assert np.abs(found.covariance - expected).max() <= 1e-11 * max(1.0, expected.max())
        assert np.array_equal(found.covariance, found.covariance.T)

    def test_batching_changes_nothing_and_order_next_to_nothing(self):
        x, h = rows(3000)
        whole = seen({"x": -1, "h": -1}, [{"x": x, "h": h}])
        parts = [{"x": x[i : i + 7], "h": h[i : i + 7]} for i in range(0, 3000, 7)]
        assert np.array_equal(seen({"x": -1, "h": -1}, parts).covariance, whole.covariance)
        turned = seen({"x": -1, "h": -1}, parts[::-1])
        assert np.allclose(turned.covariance, whole.covariance, rtol=1e-10, atol=1e-10)

    def test_reading_in_between_does_not_disturb(self):
        x, h = rows(100)
        found = seen({"x": -1, "h": -1}, [{"x": x[:30], "h": h[:30]}])
        assert found.mean.shape == (8,)
        assert found.count == 30
        for name, values in (("x", x), ("h", h)):
            found.take(name, values[30:])
        assert np.allclose(found.covariance, np.cov(np.concatenate([x, h], axis=1).T, bias=True), atol=1e-9)

    def test_the_channel_axis_may_be_any(self):
        x = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
        expected = seen({"x": -1}, [{"x": x}]).covariance
        for axis in range(4):
            moved = np.moveaxis(x, -1, axis)
            assert np.allclose(seen({"x": axis}, [{"x": moved}]).covariance, expected, atol=1e-14)
            assert np.allclose(seen({"x": axis - 4}, [{"x": moved}]).covariance, expected, atol=1e-14)

    def test_many_positions_are_sampled_the_same_in_every_batch(self):
        x = np.random.default_rng(0).standard_normal((4, 3, 30, 30)).astype(np.float32)
        whole = seen({"x": 1}, [{"x": x}], limit=100)
        single = seen({"x": 1}, [{"x": image[None]} for image in x], limit=100)
        assert whole.count == 400
        assert np.array_equal(whole.covariance, single.covariance)
        assert np.allclose(whole.covariance, np.eye(3), atol=0.25)  # of 400 normal rows

    def test_tensors_of_one_sample_keep_their_positions_together(self):
        x = np.random.default_rng(0).standard_normal((2, 50, 3)).astype(np.float32)
        h = 2 * np.moveaxis(x, -1, 1)
        found = seen({"x": -1, "h": 1}, [{"x": x, "h": h}], limit=10)
        assert found.count == 20
        assert np.allclose(found.covariance[:3, 3:], 2 * found.covariance[:3, :3], atol=1e-12)

    def test_empty_samples_do_not_count(self):
        found = seen({"x": -1}, [{"x": np.zeros((0, 3), np.float32)}, {"x": np.ones((2, 3), np.float32)}])
        assert found.mean.tolist() == [1, 1, 1]
        assert found.count == 2

    @pytest.mark.parametrize(
        ("samples", "words"),
        [
            ([{"x": np.full((2, 3), np.nan, np.float32)}], "it holds NaN"),
            ([{"x": np.full((2, 3), np.inf, np.float32)}], "it holds infinities"),
            ([{"x": np.ones((2, 3), np.float32)}, {"x": np.ones((2, 4), np.float32)}], "4 channels .* had 3 before"),
        ],
    )
    def test_unusable_values(self, samples, words):
        with pytest.raises(DataError, match=words):
            seen({"x": -1}, samples)

    def test_different_positions(self):
        with pytest.raises(DataError, match="different positions: 2 of 'x', 3 of 'h'"):
            seen({"x": -1, "h": -1}, [{"x": np.ones((2, 3), np.float32), "h": np.ones((3, 3), np.float32)}])

    def test_tensors_observed_in_different_runs(self):
        found = Moments({"x": -1, "h": -1})
        found.take("x", np.ones((2, 3), np.float32))
        with pytest.raises(DataError, match="twice before 'h'; a sample is too large"):
            found.take("x", np.ones((2, 3), np.float32))

    def test_nothing_seen(self):
        with pytest.raises(DataError, match="No calibration sample reached 'x'"):
            _ = Moments({"x": -1}).mean


def samples() -> Data:
    x = np.random.default_rng(0).standard_normal((10, 3, 4)).astype(np.float32)
    return open_data([{"x": x[i : i + 2]} for i in range(0, 10, 2)], [TensorSpec("x", np.dtype("float32"), (2, 3, 4))])


class TestCollect:
    GRAPH = "h = MatMul(x, W)  a = Relu(h)  y = MatMul(a, V)"

    def test_groups_see_the_same_data(self, monkeypatch):
        graph = build("(float[2,3,4] x) => (float[2,3,2] y)", self.GRAPH, kind="float", W=(4, 6), V=(6, 2))
        runs = []
        monkeypatch.setattr(module, "observe", lambda *a, real=module.observe: (runs.append(list(a[1])), real(*a)))
        wanted = [(Moments({"x": -1, "a": -1}), 10), (Moments({"h": -1}), 6), (Moments({"x": -1}), 4)]
        (together,) = collect(graph, wanted, samples())
        alone = [
            m for group in collect(graph, [(Moments(m.axes), n) for m, n in wanted], samples(), limit=1) for m in group
        ]
        assert runs == [["x", "a", "h"], ["x", "a"], ["h"], ["x"]]
        for one, other in zip(together, alone, strict=True):
            assert one.count == 30
            assert np.array_equal(one.covariance, other.covariance)

    @pytest.mark.parametrize(("free", "runs"), [(0, 2), (8 << 30, 1)])
    def test_one_run_where_memory_is_free(self, monkeypatch, free, runs):
        """Two of 1.3 GB when full, which are never filled here."""
        graph = build("(float[2,3,4] x) => (float[2,3,2] y)", self.GRAPH, kind="float", W=(4, 6), V=(6, 2))
        monkeypatch.setattr(module.limits, "free_memory", lambda: free)
        seen = []
        monkeypatch.setattr(module, "observe", lambda *a, real=module.observe: (seen.append(list(a[1])), real(*a)))
        list(collect(graph, [(Moments({"h": -1}), 9000), (Moments({"a": -1}), 9000)], samples()))
        assert len(seen) == runs

    def test_the_activation_is_seen_beside_its_input(self):
        graph = build("(float[2,3,4] x) => (float[2,3,2] y)", self.GRAPH, kind="float", W=(4, 6), V=(6, 2))
        ((found, *_),) = collect(graph, [(Moments({"x": -1, "a": -1}), 10)], samples())
        x = np.concatenate([feed["x"].reshape(-1, 4) for feed in samples()])
        weight = np.asarray(next(n for n in graph.nodes if n.op == "MatMul").inputs[1].values)
        rows = np.concatenate([x, np.maximum(x @ weight, 0)], axis=1)
        assert np.allclose(found.covariance, np.cov(rows.T, bias=True), atol=1e-6)

    def test_bytes_bound_the_memory(self):
        assert bytes_of(1920) >= 8 * 2 * 1920**2


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_sum_of_products(monkeypatch, symmetric):
    monkeypatch.setattr(module, "_PANEL", 4)
    a, b = np.random.default_rng(0).normal(size=(2, 60, 10)).astype(np.float32)
    b = a if symmetric else b
    found = ProductSum(10, symmetric)
    for start in range(0, 60, 25):
        found.add(a[start : start + 25], b[start : start + 25])
    means = a.mean(axis=0), b.mean(axis=0)
    assert np.allclose(found.mean(60, (), ()), a.T @ b / 60, atol=1e-5)
    assert np.allclose(found.mean(60, means, ()), (a - means[0]).T @ (b - means[1]) / 60, atol=1e-5)
    assert np.allclose(found.mean(60, means, means), a.T @ b / 60, atol=1e-5)
