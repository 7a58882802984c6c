from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from channelfold.passes import pipeline
from channelfold.passes.base import Context
from channelfold.passes.layers.linear import linears
from channelfold.passes.smooth import AbsorbBias, Equalize
from channelfold.runtime.data.sources import Data, open_data
from channelfold.runtime.errors import DataError, UsageError
from channelfold.runtime.io.facts import required_inputs
from channelfold.tests.graphs import assert_same, build, changes, listing, ops, random, reasons, run

IMAGE = "(float[N,3,6,6] x) => (float[] y)"
ROWS = "(float[N,4] x) => (float[] y)"
HIGH = np.array([9.0, 0.0, 7.0, -4.0])  # of what random inputs and weights make, 0 and 2 never fall to zero
SMALL = 0.1 * random((4, 3, 1, 1), "A")


def build_image(body, kind="float", **given_: Any):
    """A float32 graph: ONNX Runtime, which observes activations, has no convolution in float64."""
    return build(IMAGE, body, kind=kind, **given_)


def samples(graph, count=8, scale=1.0):
    """``count`` random feeds, float32, which float64 graphs read without rounding."""
    (spec,) = required_inputs(graph)
    shape = [d if isinstance(d, int) else 2 for d in spec.shape]
    rng = np.random.default_rng(0)
    batches = [
        {spec.name: (scale * rng.normal(size=shape)).astype(np.float32).astype(spec.dtype)} for _ in range(count)
    ]
    return open_data(batches, (spec,))


def absorb(graph, data: Data | None = None, **options):
    """Applies the pass and asserts that it changes nothing on the calibration data.

    In float32 what moves is up to ten times what stays, so the rounding is, too.
    """
    data = data or samples(graph)
    before = [run(graph, feed) for feed in data]
    old = listing(graph)
    outcome = AbsorbBias(**options).apply(graph, Context(calibration=data))
    for feed, outputs in zip(data, before, strict=True):
        assert_same(outputs, run(graph, feed), None if graph.inputs[0].dtype == np.float64 else 1e-5)
    assert outcome.changed or listing(graph) == old
    return outcome


def bias(graph, index):
    found = linears(graph)[index].bias()
    return np.zeros(linears(graph)[index].channels[0]) if found is None else found


READERS: dict[str, tuple[str, dict[str, Any]]] = {
    "conv": ("y = Conv(r, B, b)", {"B": (5, 4, 3, 3), "b": 5}),
    "conv without bias": ("y = Conv(r, B)", {"B": (5, 4, 3, 3)}),
    "grouped conv": ("y = Conv<group=2, strides=[2,2]>(r, B, b)", {"B": (6, 2, 2, 2), "b": 6}),
    "depthwise conv": ("y = Conv<group=4>(r, B, b)", {"B": (4, 1, 3, 3), "b": 4}),
    "max pool": ("p = MaxPool<kernel_shape=[2,2]>(r)\n y = Conv(p, B, b)", {"B": (5, 4, 1, 1), "b": 5}),
    "head": ("p = GlobalAveragePool(r)\n f = Flatten(p)\n y = Gemm<alpha=2.0>(f, B, b)", {"B": (4, 3), "b": 3}),
    "pixels": ("f = Flatten(r)\n y = Gemm<transB=1>(f, B)", {"B": (3, 144)}),
    "matmul": ("t = Transpose<perm=[0,2,3,1]>(r)\n m = MatMul(t, B)\n y = Add(m, b)", {"B": (4, 3), "b": 3}),
    "two": (
        "p = Conv(r, B, b)\n q = Conv(r, C)\n y = Concat<axis=1>(p, q)",
        {"B": (5, 4, 3, 3), "b": 5, "C": (2, 4, 3, 3)},
    ),
}


@pytest.mark.parametrize("case", READERS)
def test_high_biases_move_into_what_follows(case):
    body, given_ = READERS[case]
    graph = build_image(f"a = Conv(x, A, a0)\n r = Relu(a)\n {body}", A=SMALL, a0=HIGH, **given_)
    before = ops(graph)
    lowest = np.min([run_to(graph, "a", feed).min(axis=(0, 2, 3)) for feed in samples(graph)], axis=0)
    outcome = absorb(graph, sigmas=0)
    taken = HIGH - bias(graph, 0)
    np.testing.assert_allclose(taken, np.maximum(lowest, 0), rtol=1e-6)
    assert np.count_nonzero(taken) == 2
    assert ops(graph) == before
    assert len(outcome.changed) == 1
    assert "out of 2 channels" in changes(outcome)[0]


def run_to(graph, name, feed):
    """A tensor inside a graph."""
    tensor, outputs = graph.tensors()[name], list(graph.outputs)
    tensor.dtype = graph.outputs[0].dtype
    graph.outputs[:] = [*outputs, tensor]
    try:
        return run(graph, feed)[name]
    finally:
        graph.outputs[:] = outputs


def test_the_numbers_of_one_channel():
    body = "a = Gemm(x, A, a0)\n r = Relu(a)\n y = Gemm(r, B, b)"
    graph = build("(float[N,1] x) => (float[] y)", body, A=np.array([[2.0]]), a0=np.array([10.0]),
                  B=np.array([[3.0, -1.0]]), b=np.array([1.0, 2.0]))  # fmt: skip
    data = open_data([{"x": np.array([[-1.0], [1.0]])}, {"x": np.array([[0.5], [-0.5]])}], required_inputs(graph))
    outcome = absorb(graph, data, sigmas=0)  # a is 8, 12, 11, 9
    assert bias(graph, 0) == pytest.approx(2, rel=1e-6)
    assert bias(graph, 1) == pytest.approx([1 + 3 * 8, 2 - 8], rel=1e-6)
    assert changes(outcome) == ["Gemm: up to 8 out of 1 channels; largest 12 -> 4"]


def test_some_deviations_stay_below_the_mean():
    body = "a = Gemm(x, A, a0)\n r = Relu(a)\n y = Gemm(r, B, b)"
    given_: dict[str, Any] = {"A": np.array([[2.0]]), "a0": np.array([10.0]), "B": (1, 1), "b": 1}
    graph = build("(float[N,1] x) => (float[] y)", body, **given_)
    data = open_data([{"x": np.array([[-1.0], [1.0]])}], required_inputs(graph))
    absorb(graph, data, sigmas=3)  # mean 10, deviation 2
    assert bias(graph, 0) == pytest.approx(10 - 4, rel=1e-6)


def test_an_unbiased_matmul_gets_a_bias():
    graph = build(ROWS, "m = MatMul(x, A)\n a = Add(m, a0)\n r = Relu(a)\n y = MatMul(r, B)",
                  A=0.1 * random((4, 4), "A"), a0=HIGH, B=(4, 3))  # fmt: skip
    absorb(graph)
    assert ops(graph) == ["MatMul", "Add", "Relu", "MatMul", "Add"]


def test_a_chain_passes_it_on():
    body = "a = Gemm(x, A, a0)\n r = Relu(a)\n c = Gemm(r, B, b0)\n d = Relu(c)\n y = Gemm(d, C)"
    graph = build(ROWS, body, A=0.1 * random((4, 4), "A"), a0=HIGH, B=0.1 * random((4, 4), "B"), b0=HIGH, C=(4, 2))
    outcome = absorb(graph)
    assert [change.node for change in outcome.changed] == ["Gemm_0", "Gemm_2"]
    again = AbsorbBias().apply(graph, Context(calibration=samples(graph)))
    left = [float(what.split()[3]) for what in changes(again)]
    assert all(value < 1e-5 for value in left)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = Conv<pads=[1,1,1,1]>(r, B)", "a shift does not pass the zero padding of Conv"),
        ("y = Conv<auto_pad=\"SAME_UPPER\">(r, B)", "a shift does not pass the zero padding of Conv"),
        ("s = Add(r, a)\n y = Conv(s, B)", ""),
        ("s = Sigmoid(r)\n y = Conv(s, B)", "Sigmoid follows it"),
        ("s = Relu(r)\n y = Conv(s, B)", "a shift does not pass Relu"),
        ("y = Identity(r)\n z = Conv(y, B)", "its result is an output of the graph"),
        ("s = Mul(r, r)\n y = Conv(s, B)", "Mul follows it"),
        ("y = ConvTranspose(r, T)", "a shift does not pass the zero padding of ConvTranspose"),
        ("y = MatMul(r, M)", "its channels lie along axis 1, not along the channel axis of MatMul"),
        ("t = Transpose(r)\n y = MatMul(r, t)", "MatMul follows it, but it multiplies two activations"),
    ],
)  # fmt: skip
def test_where_a_shift_does_not_pass_it_stays(body, reason):
    named = {"B": (2, 4, 3, 3), "T": (4, 2, 2, 2), "M": (6, 3)}
    used: dict[str, Any] = {name: value for name, value in named.items() if f", {name})" in body}
    graph = build_image(f"a = Conv(x, A, a0)\n r = Relu(a)\n {body}", A=SMALL, a0=HIGH, **used)
    outcome = AbsorbBias().apply(graph, Context(calibration=samples(graph)))
    assert not outcome.changed
    assert reasons(outcome) == ([f"Conv keeps its bias: {reason}"] if reason else [])


def test_channels_that_reach_zero_keep_their_bias():
    graph = build_image("a = Conv(x, A)\n r = Relu(a)\n y = Conv(r, B)", A=(4, 3, 1, 1), B=(2, 4, 1, 1))
    outcome = absorb(graph)
    assert reasons(outcome) == [
        "Conv keeps its bias: no channel stays above zero by 3 standard deviations and in every sample"
    ]


def test_what_is_excluded_stays():
    graph = build_image("a = Conv(x, A, a0)\n r = Relu(a)\n y = Conv(r, B)", A=SMALL, a0=HIGH, B=(2, 4, 1, 1))
    outcome = absorb(graph, exclude=("Conv_*",))
    assert reasons(outcome) == ["Conv keeps its bias: excluded by pattern 'Conv_*'"]


def test_float16_keeps_a_bias_that_would_not_fit():
    graph = build_image("a = Conv(x, A, a0)\n r = Relu(a)\n y = Conv(r, B)", kind="float16", A=SMALL, a0=4000 + HIGH,
                  B=np.full((2, 4, 1, 1), 5.0))  # fmt: skip
    outcome = AbsorbBias().apply(graph, Context(calibration=samples(graph)))
    assert not outcome.changed
    assert "does not fit float16" in reasons(outcome)[0]


def test_it_takes_back_the_range_that_equalizing_costs():
    """A channel of small weights and a large bias: equalize scales both up, absorbing takes the bias out again."""
    first = random((4, 3, 1, 1), "A")
    first[0] *= 0.001
    body = "a = Conv(x, A, a0)\n r = Relu(a)\n y = Conv(r, B)"
    graph = build_image(body, A=first, a0=np.array([1.0, 0, 0, 0]), B=(4, 4, 1, 1))
    data = samples(graph)
    peak = lambda: max(run_to(graph, "r", feed).max() for feed in data)  # noqa: E731
    plain = peak()
    Equalize().apply(graph, Context(calibration=data))
    equalized = peak()
    absorb(graph, data)
    assert equalized > 1.5 * plain
    assert peak() < plain


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), sigmas=st.floats(0, 4))
def test_nothing_changes_on_the_calibration_data(seed, sigmas):
    rng = np.random.default_rng(seed)
    body = "a = Gemm(x, A, a0)\n r = Relu(a)\n c = Gemm(r, B)\n d = Relu(c)\n y = Gemm(d, C)"
    graph = build(ROWS, body, A=rng.normal(size=(4, 5)), a0=rng.normal(size=5) * 5, B=rng.normal(size=(5, 6)),
                  C=rng.normal(size=(6, 2)))  # fmt: skip
    absorb(graph, sigmas=sigmas)


def test_it_keeps_the_contract_of_a_pass():
    graph = build_image("a = Conv(x, A, a0)\n r = Relu(a)\n y = Conv(r, B)", A=SMALL, a0=HIGH,
                  B=(2, 4, 1, 1))  # fmt: skip
    _, (record,) = pipeline.run(graph, [AbsorbBias()], Context(calibration=samples(graph)))
    assert record["kind"] == "calibrated"
    assert len(record["changed"]) == 1


def test_it_needs_data_and_deviations_that_make_sense():
    graph = build_image("y = Conv(x, A)", A=SMALL)
    with pytest.raises(DataError, match="needs calibration data"):
        AbsorbBias().apply(graph, Context())
    for sigmas in (-1.0, float("nan")):
        with pytest.raises(UsageError, match="'sigmas' is"):
            AbsorbBias(sigmas=sigmas)
