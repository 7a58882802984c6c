"""Outputs corrected layer by layer: an error that is linear goes, one that few samples only seem to show stays."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from channelfold.passes.prune.reconstruct_outputs import correct
from channelfold.runtime.errors import UsageError, no_progress
from channelfold.runtime.io.snapshot import Snapshot
from channelfold.tests.graphs import build, constants, data_from, run
from channelfold.tests.pruning import data_of, distance, mlp, prune

ROWS = "(float[N,12] x) => (float[] y)"
RNG = np.random.default_rng(0)
A, B = RNG.standard_normal((12, 12)) / 3, RNG.standard_normal((5, 12)) / 3
TURN = np.eye(12) + RNG.standard_normal((12, 12)) / 20


def samples(number: int, rows: int = 16, seed: int = 1, size: int = 12):
    rng = np.random.default_rng(seed)
    return data_from(*({"x": rng.standard_normal((rows, size)).astype(np.float32)} for _ in range(number)))


def copied(graph: gs.Graph) -> gs.Graph:
    twin = gs.Graph()
    Snapshot.of(graph).restore(twin)
    return twin


def two(first: np.ndarray, second: np.ndarray = B, kind: str = "float") -> gs.Graph:
    body = "h = Gemm<transB=1>(x, A) y = Gemm<transB=1>(h, B, b)"
    return build(ROWS.replace("float", kind), body, kind=kind, A=first, B=second, b=np.zeros(5))


def corrected(graph: gs.Graph, whole: gs.Graph, data, names=("y",), stays=None) -> list[str]:
    nodes = [node for node in graph.nodes if node.outputs[0].name in names]
    return correct(graph, whole, nodes, stays or {}, data, no_progress)


def test_an_error_that_is_linear_is_taken_out():
    whole, graph = two(A), two(TURN @ A)  # y = B TURN^-1 h gives the outputs back
    before = distance(whole, graph, samples(8))
    assert len(corrected(graph, whole, samples(64))) == 1
    assert distance(whole, graph, samples(8, seed=2)) < 0.15 * before  # what the least ridge, a tenth, leaves


def test_a_constant_error_becomes_the_bias():
    whole, graph = two(A), two(A)
    offset = np.arange(5.0)
    wrong = next(node for node in graph.nodes if node.outputs[0].name == "y")
    wrong.inputs[2] = gs.Constant("c", (-offset).astype(np.float32))
    corrected(graph, whole, samples(16))
    for feed in samples(2, seed=3):
        np.testing.assert_allclose(run(graph, feed)["y"], run(whole, feed)["y"], atol=1e-5)


def test_a_shortcut_brings_an_error_that_the_branch_takes_up():
    body = "h = Gemm<transB=1>(x, A) p = Gemm<transB=1>(h, B, b) y = Add(p, h)"
    make = lambda first: build(ROWS, body, kind="float", A=first, B=A.T, b=np.zeros(12))  # noqa: E731
    whole, graph = make(A), make(TURN @ A)
    before = distance(whole, graph, samples(8))
    corrected(graph, whole, samples(64), names=("p",))
    assert distance(whole, graph, samples(8, seed=2)) < 0.15 * before


@pytest.mark.parametrize("seed", range(5))
def test_few_samples_do_no_harm(seed):
    """Four rows and twelve features: what is left of an error is noise to them."""
    rng = np.random.default_rng(seed)
    body = "h = Gemm<transB=1>(x, A) r = Sin(h) y = Gemm<transB=1>(r, B, b)"
    make = lambda first: build(ROWS, body, kind="float", A=first, B=B, b=np.zeros(5))  # noqa: E731
    whole, graph = make(A), make(A + rng.standard_normal(A.shape) / 10)
    before = distance(whole, graph, samples(64, seed=9))
    corrected(graph, whole, samples(4, rows=1, seed=seed))
    assert distance(whole, graph, samples(64, seed=9)) < 1.25 * before


def test_one_sample_and_exact_outputs_change_nothing():
    graph = two(TURN @ A)
    assert corrected(graph, two(A), samples(1)) == []
    graph = two(A)
    assert corrected(graph, two(A), samples(8)) == []


def test_channels_that_are_cut_are_left_out_of_the_aim():
    whole = two(A)
    keep = np.array([True, False, True, True, False])
    graph = build(ROWS, "h = Gemm<transB=1>(x, A) y = Gemm<transB=1>(h, B, b)", kind="float",
                  A=TURN @ A, B=B[keep], b=np.zeros(3))  # fmt: skip
    corrected(graph, whole, samples(64), stays={"y": [(1, keep)]})
    (feed,) = samples(1, rows=256, seed=4)
    aim, found = run(whole, feed)["y"][:, keep], run(graph, feed)["y"]
    assert np.square(found - aim).sum() < 0.002 * np.square(aim).sum()


def test_float16_weights_that_overflow_are_left_alone():
    whole, graph = two(A, 60000 * B / np.abs(B).max(), "float16"), two(A / 4, 60000 * B / np.abs(B).max(), "float16")
    tiny = data_from(*({"x": (v["x"] / 1000).astype(np.float16)} for v in samples(8)))
    before = constants(graph)
    assert corrected(graph, whole, tiny) == []
    assert all(np.array_equal(values, before[name]) for name, values in constants(graph).items())


@pytest.mark.parametrize("attrs", ["group=2", "strides=[2,2]", "pads=[1,1,1,1]"])
def test_other_convolutions_stay(attrs):
    signature = "(float[N,4,7,7] x) => (float[] y)"
    columns = 2 if attrs == "group=2" else 4
    weights = {"A": RNG.standard_normal((4, 4, 1, 1)), "B": RNG.standard_normal((4, columns, 1, 1))}
    body = f"h = Conv(x, A) y = Conv<{attrs}>(h, B)"
    whole, graph = build(signature, body, kind="float", **weights), build(signature, body, kind="float", **weights)
    graph.nodes[0].inputs[1] = gs.Constant("D", (1.1 * weights["A"]).astype(np.float32))
    data = data_from(*({"x": RNG.standard_normal((2, 4, 7, 7)).astype(np.float32)} for _ in range(4)))
    assert corrected(graph, whole, data) == []


def test_prune_with_it_is_at_least_as_good_and_says_what_changed():
    whole = mlp()
    data = data_of(whole)
    errors = {}
    for mode in ("lstsq", "outputs"):
        graph = copied(whole)
        outcome = prune(graph, data, ratio=0.5, compensate=mode)
        errors[mode] = distance(whole, graph, data)
    assert "corrected" in outcome.facts
    assert errors["outputs"] <= errors["lstsq"] * 1.01
    with pytest.raises(UsageError, match="needs calibration data"):
        prune(copied(whole), None, ratio=0.5, compensate="outputs")
