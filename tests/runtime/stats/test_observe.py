"""Statistics of tensors inside a graph against the tensors themselves."""

from __future__ import annotations

import numpy as np
import pytest

from channelfold.runtime.data.sources import Data, open_data
from channelfold.runtime.errors import DataError
from channelfold.runtime.io.files import session
from channelfold.runtime.io.session import TensorSpec
from channelfold.runtime.stats import observe as module
from channelfold.runtime.stats import parts
from channelfold.runtime.stats.channels import ChannelStatistics
from channelfold.runtime.stats.histograms import TensorStatistics
from channelfold.runtime.stats.observe import by_name, observe
from channelfold.tests.graphs import build


def collect(graph, axes, *args) -> dict[str, TensorStatistics]:
    statistics = {name: TensorStatistics(axis) for name, axis in axes.items()}
    observe(graph, by_name(statistics.items()), *args)
    return statistics


def means(statistics: TensorStatistics) -> np.ndarray:
    assert statistics.channel_mean is not None
    return statistics.channel_mean


def data(*feeds: dict[str, np.ndarray]) -> Data:
    specs = [TensorSpec(name, array.dtype, (None,) * array.ndim) for name, array in feeds[0].items()]
    return Data(specs, len(feeds), lambda: iter(feeds), "a test")


def test_inputs_and_inner_tensors_are_observed_in_the_graph():
    graph = build("(float[N,3] x) => (float[] z)", "y = MatMul(x, W) z = Relu(y)", kind="float", W=(3, 4))
    feeds = [{"x": np.random.default_rng(i).standard_normal((2, 3)).astype(np.float32)} for i in range(3)]
    found = collect(graph, {"x": None, "y": 1, "z": None}, data(*feeds))
    runner = session(graph, ["x", "y", "z"], optimize=False)
    runs = [runner.run(feed) for feed in feeds]
    for name in "xyz":
        expected = TensorStatistics(1 if name == "y" else None)
        for run in runs:
            expected.add(run[name])
        assert np.array_equal(found[name].counts, expected.counts), name
        assert (found[name].minimum, found[name].maximum) == (expected.minimum, expected.maximum)
    assert found["x"].channel_mean is None
    assert found["y"].channel_mean == pytest.approx(np.mean([r["y"] for r in runs], axis=(0, 1), dtype=float), rel=1e-9)
    assert [t.name for t in graph.outputs] == ["z"]


def test_float16_activations_are_cast():
    graph = build("(float16[N,3] x) => (float16[] y)", "y = Mul(x, two)", two=np.array(2, np.float16))
    found = collect(graph, {"y": None}, data({"x": np.array([[-3, 0, 0.1]], np.float16)}))
    assert (found["y"].minimum, found["y"].maximum) == (-6.0, float(np.float16(0.2)))


def test_integer_inputs():
    graph = build("(int64[N] ids) => (float[] y)", "y = Gather(E, ids)", E=np.arange(8, dtype=np.float32).reshape(4, 2))
    found = collect(graph, {"y": 1, "ids": None}, data({"ids": np.array([3, 1])}))
    assert (found["y"].minimum, found["y"].maximum, found["ids"].maximum) == (2.0, 7.0, 3.0)
    assert np.array_equal(means(found["y"]), [4.0, 5.0])


def test_a_small_limit_observes_in_parts_and_finds_the_same(monkeypatch):
    graph = build("(float[N,8] x) => (float[] z)", "y = MatMul(x, W) z = Relu(y)", kind="float", W=(8, 64))
    source = data(*({"x": np.random.default_rng(i).standard_normal((2, 8)).astype(np.float32)} for i in range(3)))
    tensors = {"x": None, "y": 1, "z": None}
    whole = collect(graph, tensors, source)
    monkeypatch.setattr(parts, "LIMIT", 600)  # x has 64 bytes, y and z 512 each
    steps = []
    cut = collect(graph, tensors, source, lambda stage, done, total: steps.append((done, total)))
    assert steps == [(i, 3) for i in range(4)]
    for name in tensors:
        assert np.array_equal(cut[name].counts, whole[name].counts)
    assert np.array_equal(means(cut["y"]), means(whole["y"]))


def test_what_a_sample_weighs_is_measured_on_the_sample():
    graph = build("(float[N,L,8] x) => (float[] y)", "y = MatMul(x, W)", kind="float", W=(8, 64))
    feed = {"x": np.zeros((2, 5, 8), np.float32)}
    sizes = module._sizes(graph, data({"x": np.zeros((1, 2, 8), np.float32)}, feed))
    assert (sizes["x"], sizes["y"]) == (4 * 2 * 5 * 8, 4 * 2 * 5 * 64)


def test_nan_names_the_tensor_and_the_sample():
    graph = build("(float[N] x) => (float[] y)", "y = Log(x)", kind="float")
    feeds = [{"x": np.array([1.0], np.float32)}, {"x": np.array([-1.0], np.float32)}]
    with pytest.raises(DataError, match=r"Activation 'y' of sample 1 cannot be used: it holds NaN\. Check that sample"):
        collect(graph, {"y": None}, data(*feeds))


def test_samples_that_are_read_from_data_in_batches(tmp_path):
    graph = build("(float[N,3] x) => (float[] y)", "y = Relu(x)", kind="float")
    values = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    specs = [TensorSpec("x", np.dtype(np.float32), ("N", 3))]
    found = [collect(graph, {"y": 1}, open_data({"x": part}, specs))["y"] for part in (values, values[::-1])]
    direct = TensorStatistics(1)
    direct.add(np.maximum(values, 0))
    for statistics in found:
        assert np.array_equal(statistics.counts, direct.counts)
        assert statistics.channel_mean == pytest.approx(direct.channel_mean, rel=1e-12)


def test_no_samples_leave_everything_unseen():
    graph = build("(float[N] x) => (float[] y)", "y = Relu(x)", kind="float")
    empty = Data([TensorSpec("x", np.dtype(np.float32), (1,))], 0, lambda: iter(()), "nothing")
    assert collect(graph, {"y": None}, empty)["y"].total == 0
    assert collect(graph, {}, empty) == {}


@pytest.mark.parametrize(("bad", "what"), [(np.nan, "it holds NaN"), (np.inf, "infinities"), (-np.inf, "infinities")])
def test_a_value_that_is_no_number_names_tensor_and_sample(bad, what):
    graph = build("(float[N,3] x) => (float[] y)", "y = Relu(x)", kind="float")
    feeds = [{"x": np.ones((2, 3), np.float32)} for _ in range(3)]
    feeds[2]["x"][1, 2] = bad
    with pytest.raises(DataError, match=f"Activation 'x' of sample 2 cannot be used: .*{what}"):
        observe(graph, {"x": [ChannelStatistics(-1)]}, data(*feeds))


def test_channels_that_change_name_tensor_and_sample():
    graph = build("(float[N,M] x) => (float[] y)", "y = Relu(x)", kind="float")
    feeds = [{"x": np.ones((2, width), np.float32)} for width in (3, 4)]
    with pytest.raises(DataError, match=r"Activation 'y' of sample 1 .*it has 4 channels on axis -1, and had 3 before"):
        observe(graph, {"y": [ChannelStatistics(-1, 8)]}, data(*feeds))
