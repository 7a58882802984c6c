"""What reads the channels that stay makes up for those that go: as well as can be, and never in the wrong place."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from channelfold.passes.base import Context
from channelfold.passes.layers.linear import view
from channelfold.passes.prune.reconstruct import ReadStatistics
from channelfold.runtime.errors import DataError
from channelfold.tests.graphs import build, constants, data_from, node, random, run
from channelfold.tests.pruning import data_of, distance, groups_of, kept, mlp, prune, spread

WRITES = "a = Conv(x, A, a0) r = Relu(a) "
IMAGE = "(float[N,4,7,7] x) => (float[] y)"
ROWS = "(float[N,12] x) => (float[] y)"
FORMS = {
    "conv": (IMAGE, WRITES + "y = Conv(r, B, b0)", {"B": (5, 16, 3, 3)}),
    "padded conv": (IMAGE, WRITES + "y = Conv<pads=[1,1,1,1]>(r, B, b0)", {"B": (5, 16, 3, 3)}),
    "strided conv": (IMAGE, WRITES + "y = Conv<strides=[2,2]>(r, B)", {"B": (5, 16, 2, 2)}),
    "grouped conv": (IMAGE, WRITES + "y = Conv<group=2>(r, B)", {"B": (6, 8, 3, 3)}),
    "transposed conv": (IMAGE, WRITES + "y = ConvTranspose<strides=[2,2]>(r, B)", {"B": (16, 5, 2, 2)}),
    "gemm": (ROWS, "a = Gemm<transB=1>(x, A, a0) r = Relu(a) y = Gemm<transB=1>(r, B, b0)", {"B": (5, 16)}),
    "gemm alpha": (ROWS, "a = Gemm<transB=1>(x, A, a0) r = Relu(a) y = Gemm<alpha=0.5>(r, B)", {"B": (16, 5)}),
    "matmul": (ROWS, "a = Gemm<transB=1>(x, A, a0) r = Relu(a) y = MatMul(r, B)", {"B": (16, 5)}),
    "two readers": (
        ROWS,
        "a = Gemm<transB=1>(x, A, a0) r = Relu(a) p = MatMul(r, B) q = MatMul(r, C) y = Mul(p, q)",
        {"B": (16, 5), "C": (16, 5)},
    ),
    "through a flatten": (
        IMAGE, WRITES + "m = GlobalAveragePool(r) f = Flatten(m) y = Gemm<transB=1>(f, B, b0)", {"B": (5, 16)}
    ),
}  # fmt: skip


def make(form: str, seed: int = 0, **changed):
    """A layer of 16 channels, correlated ones, and what reads it."""
    signature, body, weights = FORMS[form]
    rng = np.random.default_rng(seed)
    inputs = 12 if signature == ROWS else 4
    rows = rng.standard_normal((16, 6)) @ rng.standard_normal((6, inputs)) / np.sqrt(6 * inputs)
    given = {"A": rows if signature == ROWS else rows[..., None, None], "a0": rng.standard_normal(16) / 2}
    given |= {name: rng.standard_normal(shape) for name, shape in weights.items()} | {"b0": rng.standard_normal(5)}
    return build(signature, body, kind="float", **{k: v for k, v in (given | changed).items() if f"{k}" in body})


def left(form: str, data, seed: int = 0, held_out=None, **options) -> float:
    """The error that removing half of the channels leaves."""
    graph = make(form, seed)
    outcome = prune(graph, data, ratio=0.5, **options)
    assert list(kept(outcome).values()) == [8], outcome.refused
    return distance(make(form, seed), graph, held_out or data)


# ---- how well --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_least_squares_beats_a_bias_beats_nothing(form):
    data = data_of(make(form), count=4, size=100)
    none, bias, lstsq = (left(form, data, importance="l2", compensate=how) for how in ("none", "bias", "lstsq"))
    assert lstsq < 0.8 * none
    if form in ("padded conv", "transposed conv"):
        assert bias == none  # no bias is right at the border and inside, or at every step
    else:
        assert lstsq < 0.9 * bias < 0.9 * none


@settings(max_examples=15)
@given(st.sampled_from(sorted(FORMS.keys() - {"two readers"})), st.integers(0, 2**16))
def test_on_random_networks(form, seed):
    data = data_of(make(form), count=4, size=60)
    none, bias, lstsq = (left(form, data, seed, importance="l2", compensate=how) for how in ("none", "bias", "lstsq"))
    assert lstsq <= bias * 1.01 + 1e-6  # of the covariances, and with a ridge
    assert bias <= none * (1 + 1e-6)


@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("padded conv", "grouped conv")])
def test_duplicates_are_made_up_for(form):
    """Eight channels and the same again, twice as large: nothing is lost, with data or without."""

    def doubled():
        half = {"A": spread((8, 12), "A") if FORMS[form][0] == ROWS else spread((8, 4, 1, 1), "A"), "a0": random(8)}
        return make(form, 0, **{name: np.concatenate([v, 2 * v]) for name, v in half.items()})

    data = data_of(doubled(), count=4, size=600)
    graph = doubled()
    prune(graph, data, ratio=0.5, ridge=0)
    assert distance(doubled(), graph, data) < 0.01
    graph = doubled()
    prune(graph, data, ratio=0.5, importance="l1", compensate="none")
    assert distance(doubled(), graph, data) > 0.1


@pytest.mark.parametrize("form", ["conv", "gemm", "matmul", "padded conv"])
def test_without_data_what_the_weights_imply_is_better_than_nothing(form):
    held_out = data_of(make(form), count=4, size=100)
    wins = 0
    for seed in range(6):
        none, implied = (left(form, None, seed, held_out, importance="l2", compensate=how) for how in ("none", "lstsq"))
        wins += implied < 0.9 * none
    assert wins >= 5


# ---- where -----------------------------------------------------------------------------------------------------------


def test_a_padded_convolution_gets_no_offset():
    graph = make("padded conv")
    prune(graph, data_of(graph, size=50), ratio=0.5)
    (conv, *_) = [n for n in graph.nodes if n.outputs[0].name == "y"]
    bias = view(graph, conv).bias()
    assert bias is not None
    assert np.array_equal(bias, make("padded conv").tensors()["b0"].values)


def test_a_bias_where_there_was_none_and_none_without_need():
    graph = make("matmul")
    assert prune(graph, data_of(graph, size=50), ratio=0.5).facts["parameters"]["after"] == 8 * 13 + 8 * 5 + 5
    assert [n.op for n in graph.nodes] == ["Gemm", "Relu", "MatMul", "Add"]
    graph = make("matmul")
    prune(graph, data_of(graph, size=50), ratio=0.5, compensate="none")
    assert [n.op for n in graph.nodes] == ["Gemm", "Relu", "MatMul"]
    half = np.array(np.split(random((16, 5), "B").astype(np.float32), 2))
    assert constants(graph)[node(graph, "MatMul").inputs[1].name].shape == half[0].shape


def test_no_bias_of_a_layer_whose_outputs_are_cut_as_well():
    """What makes up for lost inputs is computed for the outputs that stay, in their order."""
    graph, data = mlp(), data_of(mlp(), count=4, size=100)
    outcome = prune(graph, data, ratio=0.5, align=1)
    assert kept(outcome) == {"Gemm_0": 16, "Gemm_2": 12}
    none = mlp()
    prune(none, data, ratio=0.5, align=1, compensate="none")
    assert distance(mlp(), graph, data) < 0.7 * distance(mlp(), none, data)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_weights_past_the_range_of_float16_are_refused():
    body = "a = Gemm<transB=1>(x, A) r = Relu(a) y = Gemm<transB=1>(r, B)"
    a, b = spread((16, 12), "A"), np.full((4, 16), 60000.0)
    a[8:], b[:, 8:] = 8 * a[:8], 30000.0  # 60000 + 8 * 30000 would make up for the others
    graph = build(ROWS, body, kind="float16", A=a, B=b)
    outcome = prune(graph, data_of(graph, size=50), ratio=0.5, importance="l1", verify=False)
    assert [r.code for r in outcome.refused] == ["it is the output 'y' of the model", "not reconstructed"]
    assert "float16" in outcome.refused[1].reason
    assert {values.max() for values in constants(graph).values() if values.shape == (4, 8)} == {60000}


def test_nan_in_the_data_names_the_tensor():
    graph = mlp()
    samples = list(data_of(graph))
    samples[3]["x"][1, 2] = np.nan
    with pytest.raises(DataError, match="Activation 'r' of sample 3 cannot be used: it holds NaN"):
        prune(graph, data_from(*samples), ratio=0.5)


def test_where_statistics_come_from():
    graph = mlp()
    regions = [groups_of(graph)[0].region]
    assert ReadStatistics(graph, regions, Context()).source == "weights"
    assert ReadStatistics(graph, regions, Context(calibration=data_of(graph))).source == "data"
    lstm = build(
        "(float[5,N,4] x) => (float[] y)",
        "h = LSTM<hidden_size=8>(x, W, R) s = Squeeze(h, axes) y = MatMul(s, B)",
        kind="float", W=(1, 32, 4), R=(1, 32, 8), B=(8, 3), axes=np.array([1]),
    )  # fmt: skip
    assert ReadStatistics(lstm, [groups_of(lstm)[0].region], Context()).source == ""
    assert run(lstm, {"x": np.zeros((5, 2, 4), np.float32)})["y"].shape == (5, 2, 3)
