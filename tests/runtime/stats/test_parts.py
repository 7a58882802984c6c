"""A model in parts: every node runs once for a sample, and what is seen is what the whole model computes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from channelfold.runtime.data.sources import Data
from channelfold.runtime.io.files import session
from channelfold.runtime.io.session import Session, TensorSpec
from channelfold.runtime.stats import parts
from channelfold.runtime.stats.covariance import Moments
from channelfold.runtime.stats.histograms import TensorStatistics
from channelfold.runtime.stats.observe import observe
from channelfold.runtime.stats.parts import Observed
from channelfold.tests.graphs import build


@pytest.fixture
def runs(monkeypatch) -> Counter[int]:
    """How often every session was run, by its id."""
    counted: Counter[int] = Counter()
    real = Session.run

    def run(self, *args):
        counted[id(self)] += 1
        return real(self, *args)

    monkeypatch.setattr(Session, "run", run)
    return counted


def executions(observed: Observed, runs: Counter[int]) -> Counter[str]:
    """How often every node of the model ran."""
    return Counter({name: runs[id(part.session)] for part in observed.parts for name in part.nodes})


def chain(layers: int, tokens: int) -> gs.Graph:
    """Layers that each add a product to their input, so that two tensors are alive between most nodes."""
    lines, x = [], "x"
    for i in range(layers):
        lines.append(f"h{i} = MatMul({x}, W{i % 3})  a{i} = Tanh(h{i})  s{i} = Add({x}, a{i})")
        x = f"s{i}"
    signature = f"(float[1,{tokens},4] x) => (float[1,{tokens},4] {x})"
    return build(signature, "  ".join(lines), kind="float", W0=(4, 4), W1=(4, 4), W2=(4, 4))


def sample(tokens: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal((1, tokens, 4)).astype(np.float32)}


def data(*feeds: dict[str, np.ndarray]) -> Data:
    specs = [TensorSpec(name, array.dtype, array.shape) for name, array in feeds[0].items()]
    return Data(specs, len(feeds), lambda: iter(feeds), "a test")


@pytest.mark.parametrize(("layers", "tokens", "limit"), [(1000, 8, 1 << 13), (20, 2048, 1 << 17), (40, 8, 1 << 29)])
def test_every_node_runs_once_for_a_sample(layers, tokens, limit, runs, monkeypatch):
    graph = chain(layers, tokens)
    seen = {f"h{i}": TensorStatistics(-1) for i in range(layers)} | {f"s{i}": TensorStatistics() for i in range(layers)}
    opened, real = [], parts.Observed

    def spied(*args):
        opened.append(real(*args))
        return opened[-1]

    monkeypatch.setattr(parts, "LIMIT", limit)
    monkeypatch.setattr("channelfold.runtime.stats.observe.Observed", spied)
    observe(graph, {name: [one] for name, one in seen.items()}, data(sample(tokens), sample(tokens, 1)))
    (observed,) = opened
    assert len(observed.parts) >= 10 or (limit == 1 << 29 and len(observed.parts) == 1)
    assert executions(observed, runs) == Counter({node.name: 2 for node in graph.nodes})
    assert all(one.total == 2 * tokens * 4 for one in seen.values())
    assert max(one._octaves.nbytes for one in seen.values()) < 40_000


def test_parts_see_what_the_whole_model_computes(runs):
    graph = chain(40, 16)
    names = [f"{kind}{i}" for i in range(40) for kind in "has"]
    sizes = dict.fromkeys(names, 4 * 16 * 4)
    expected = session(graph, names).run(sample(16))
    for limit in (1, 600, 3000):
        observed = Observed(graph, names, sizes, limit)
        found = observed.all(sample(16))
        assert sorted(found) == sorted(names)
        assert all(np.array_equal(found[name], expected[name]) for name in names)
    assert len(Observed(graph, names, sizes, 1).parts) == 120


def test_a_part_ends_where_little_is_alive():
    """Between two layers one tensor is alive, within a layer two are."""
    graph = chain(10, 4)
    observed = Observed(graph, [f"h{i}" for i in range(10)], dict.fromkeys(graph.tensors(), 64), 3 * 64)
    ends = [part.nodes[-1] for part in observed.parts]
    assert [graph.nodes[[n.name for n in graph.nodes].index(end)].op for end in ends[:-1]] == ["Add"] * len(ends[:-1])
    assert all(len(part.nodes) <= 9 for part in observed.parts)


def test_bodies_read_across_the_edge_and_sequences_are_not_cut():
    graph = build(
        "(float[N,4] x, bool c) => (float[] z)",
        """
        a = Relu(x)  b = MatMul(a, W)
        d = If(c) <then_branch = g () => (float[N,4] e) { e = Add(a, b) },
                   else_branch = h () => (float[N,4] f) { f = Identity(x) }>
        s = SequenceConstruct(b, d)  r = ConcatFromSequence<axis=0>(s)  z = MatMul(r, W)
        """,
        kind="float",
        W=(4, 4),
    )
    names = ["x", "a", "b", "d", "r", "z"]
    feed = {"x": np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32), "c": np.array(True)}
    observed = Observed(graph, names, dict.fromkeys(names, 48), 1)
    assert [part.nodes for part in observed.parts][-2:] == [
        (graph.nodes[3].name, graph.nodes[4].name),
        (graph.nodes[5].name,),
    ]
    expected, found = session(graph, names[1:], optimize=False).run(feed), observed.all(feed)
    assert all(np.array_equal(found[name], expected[name]) for name in names[1:])
    assert np.array_equal(found["x"], feed["x"])


def test_only_what_is_observed_is_computed():
    graph = chain(5, 4)
    assert [part.nodes for part in Observed(graph, ["h1"]).parts] == [tuple(node.name for node in graph.nodes[:4])]


def test_float16_and_integers_are_cast_in_every_part():
    graph = build(
        "(float16[N] x) => (float16[] z)", "y = Mul(x, x)  i = Cast<to=7>(y)  k = Cast<to=10>(i)  z = Add(k, y)"
    )
    feed = {"x": np.array([1.5, -3], np.float16)}
    found = Observed(graph, ["x", "y", "i", "z"], dict.fromkeys("xyiz", 8), 1).all(feed)
    assert {name: values.tolist() for name, values in found.items()} == {
        "x": [1.5, -3], "y": [2.25, 9], "i": [2, 9], "z": [4.25, 18]
    }  # fmt: skip
    assert {values.dtype for values in found.values()} == {np.dtype(np.float32)}


def test_moments_of_tensors_in_different_parts():
    graph = chain(6, 64)
    (near,), (far,) = ([Moments({"x": -1, "h5": -1})] for _ in range(2))
    feeds = data(sample(64), sample(64, 1))
    for moments, limit in ((near, 1 << 29), (far, 1)):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(parts, "LIMIT", limit)
            observe(graph, {"x": [moments], "h5": [moments], "h2": [TensorStatistics()]}, feeds)
    assert far.count == 128
    assert np.array_equal(near.covariance, far.covariance)


def test_a_large_limit_opens_the_model_as_it_is():
    graph = chain(3, 4)
    (part,) = Observed(graph, ["h2", "x"]).parts
    assert part.later == frozenset()
    assert part.shown == {"h2": "h2", "x__observed": "x"}


def test_weights_that_are_mapped_alone_give_the_same_values(monkeypatch):
    """ONNX Runtime makes no copies of the weights of a large model in the layout of its kernels."""
    graph, asked, real = chain(6, 8), [], parts.open_model
    monkeypatch.setattr(parts, "open_model", lambda *args, **how: (asked.append(how["prepack"]), real(*args, **how))[1])
    found = []
    for limit in (1 << 30, 0):
        monkeypatch.setattr(parts, "_MAPPED", limit)
        found.append(Observed(graph, ["h5", "s5"]).all(sample(8)))
    assert asked == [True, False]
    for name, values in found[0].items():
        assert np.allclose(values, found[1][name], rtol=1e-5, atol=1e-6)
