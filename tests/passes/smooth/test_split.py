from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from channelfold.passes import pipeline
from channelfold.passes.base import Context
from channelfold.passes.recipe import make
from channelfold.passes.smooth import SplitChannels
from channelfold.runtime.data.probes import random_data
from channelfold.runtime.data.sources import Data
from channelfold.runtime.errors import DataError, UsageError
from channelfold.runtime.io.facts import required_inputs
from channelfold.runtime.stats.channels import ChannelStatistics
from channelfold.runtime.stats.observe import observe
from channelfold.tests.graphs import assert_same, build, changes, constants, feeds, listing, ops, random, reasons, run

TOKENS = "(float[N,5,16] x) => (float[] y)"
FFN = "u0 = MatMul(x, U)\n u = Add(u0, b)\n h = Relu(u)\n y = MatMul(h, D)"
SWIGLU = "u = MatMul(x, U)\n g = MatMul(x, G)\n s = Sigmoid(g)\n a = Mul(g, s)\n h = Mul(a, u)\n y = MatMul(h, D)"
NORM = "h = LayerNormalization(x, g, e)\n q = MatMul(h, Q)\n k = MatMul(h, K)\n y = Mul(q, k)"
IMAGE = "(float[N,3,6,6] x) => (float[] y)"


def data(graph, n=4) -> Data:
    return random_data(required_inputs(graph), n, size=8)


def planted(shape, name, outliers, axis=-1) -> np.ndarray:
    """A random weight with some channels, {channel: factor}, larger than the others."""
    factors = np.ones(shape[axis])
    factors[list(outliers)] = list(outliers.values())
    return random(shape, name) * np.moveaxis(factors.reshape(-1, *[1] * (len(shape) - 1)), 0, axis)


def ffn(outliers, **options):
    return build(TOKENS, FFN, U=planted((16, 40), "U", outliers), b=40, D=(40, 8), **options)


def split(graph, rtol=None, samples=None, **options):
    """Applies the pass and asserts that the function stays."""
    feed = feeds(graph)
    before = run(graph, feed)
    outcome = SplitChannels(**{"align": 1, **options}).apply(graph, Context(samples or data(graph)))
    assert_same(before, run(graph, feed), rtol)
    return outcome


def largest(graph, name) -> float:
    statistics = ChannelStatistics(-1)
    observe(graph, {name: [statistics]}, data(graph))
    return float(statistics.amax.max())


# ---- where the width grows ---------------------------------------------------------------------------------------


def test_rows_are_repeated_and_divided_and_columns_repeated():
    graph = ffn({3: 60.0})
    text, old = listing(graph), constants(graph)
    outcome = split(graph)
    (site,) = outcome.facts["sites"]
    parts = site["parts"]
    assert parts > 1
    assert site["width"] == [40, 39 + parts]
    assert site["inserted"] == 0
    assert listing(graph) == text
    index = [*range(3), *[3] * parts, *range(4, 40)]
    factors = np.where(np.array(index) == 3, parts, 1)
    new = constants(graph)
    np.testing.assert_allclose(new["U"], old["U"][:, index] / factors, rtol=1e-15)
    np.testing.assert_allclose(new["b"], old["b"][index] / factors, rtol=1e-15)
    np.testing.assert_allclose(new["D"], old["D"][index], rtol=1e-15)
    assert graph.tensors()["h"].shape[-1] == 39 + parts
    assert "h: 1 of 40 channels split" in changes(outcome)[0]


def test_no_channel_is_larger_than_the_threshold():
    graph = ffn({3: 60.0, 8: 20.0})
    (site,) = split(graph).facts["sites"]
    before, theta = site["largest"]
    assert theta < before / 3
    assert largest(graph, "h") == pytest.approx(theta, rel=1e-6)  # statistics are float32


def test_a_gate_is_repeated_but_not_divided():
    graph = build(TOKENS, SWIGLU, U=planted((16, 40), "U", {3: 60.0}), G=(16, 40), D=(40, 8))
    text, old = listing(graph), constants(graph)
    (site,) = split(graph).facts["sites"]
    parts = site["parts"]
    index = [*range(3), *[3] * parts, *range(4, 40)]
    new = constants(graph)
    np.testing.assert_array_equal(new["G"], old["G"][:, index])
    np.testing.assert_allclose(new["U"][:, 3], old["U"][:, 3] / parts, rtol=1e-15)
    assert listing(graph) == text


def test_quantized_outputs_recover():
    graph = ffn({3: 100.0})
    before = [graph.tensors()[name].values for name in ("U", "b", "D")]
    (site,) = split(graph).facts["sites"]
    after = [constants(graph)[name] for name in ("U", "b", "D")]
    x = random((400, 16), "rows")
    snr = [_snr(x, *weights) for weights in (before, after)]
    assert snr[1] > snr[0] + 10
    assert site["output_snr_db"][1] > site["output_snr_db"][0] + 6  # with ranges that may clip


def _snr(x, up, bias, down) -> float:
    """Of W8A8 with the full range, in dB."""
    hidden = np.maximum(x @ up + bias, 0)
    step, steps = np.abs(hidden).max() / 127, np.abs(down).max(axis=0) / 127
    error = (np.rint(hidden / step) * step) @ (np.rint(down / steps) * steps) - hidden @ down
    return 10 * np.log10(((hidden @ down) ** 2).sum() / (error**2).sum())


def test_convolutions_with_what_stands_between_them():
    body = "c = Conv<pads=[1,1,1,1]>(x, W, b)\n r = PRelu(c, s)\n h = MaxPool<kernel_shape=[2,2]>(r)\n y = Conv(h, V)"
    up = planted((24, 3, 3, 3), "W", {5: 50.0}, axis=0)
    graph = build(IMAGE, body, kind="float", W=up, b=24, s=(24, 1, 1), V=(8, 24, 2, 2))
    text = listing(graph)
    (site,) = split(graph).facts["sites"]
    assert listing(graph) == text
    width = site["width"][1]
    shapes = {name: values.shape for name, values in constants(graph).items()}
    assert width > 24
    assert shapes == {"W": (width, 3, 3, 3), "b": (width,), "s": (width, 1, 1), "V": (8, width, 2, 2)}


def test_gemm_with_its_factors_and_a_transposed_weight():
    body = "u = Gemm<alpha=0.5, beta=2.0>(x, U, b)\n h = Relu(u)\n y = Gemm<transB=1>(h, D)"
    graph = build("(float[N,16] x) => (float[] y)", body, U=planted((16, 40), "U", {3: 60.0}), b=40, D=(8, 40))
    (site,) = split(graph, samples=data(graph, 64)).facts["sites"]
    assert constants(graph)["D"].shape == (8, site["width"][1])


def test_a_shared_weight_stays_with_its_other_reader():
    body = "u = MatMul(x, U)\n h = Relu(u)\n a = MatMul(h, D)\n z = Sigmoid(u2)\n c = MatMul(z, D)\n y = Add(a, c)"
    graph = build(TOKENS, "u2 = MatMul(x, V)\n" + body, U=planted((16, 40), "U", {3: 60.0}), V=(16, 40), D=(40, 8))
    (site,) = split(graph).facts["sites"]
    assert sorted(v.shape for n, v in constants(graph).items() if n[0] == "D") == [(40, 8), (site["width"][1], 8)]


def test_a_chain_in_front_of_a_weight_that_goes_is_no_negative_insertion():
    body = "u = MatMul(x, U)\n h = Relu(u)\n t = Transpose(D)\n y = MatMul(h, t)"
    graph = build(TOKENS, body, U=planted((16, 40), "U", {3: 60.0}), D=(8, 40))
    (site,) = split(graph).facts["sites"]
    assert ops(graph) == ["MatMul", "Relu", "MatMul"]
    assert site["inserted"] == 0


def test_a_reshape_that_leaves_the_channels_alone():
    body = "u = MatMul(x, U)\n h = Relu(u)\n f = Reshape(h, n)\n y = MatMul(f, D)"
    graph = build(TOKENS, body, U=planted((16, 40), "U", {3: 60.0}), n=np.array([0, 5, 40]), D=(40, 8))
    (site,) = split(graph).facts["sites"]
    assert constants(graph)["n"].tolist() == [0, 5, site["width"][1]]


@given(st.data())
def test_any_outliers(drawn):
    channels = drawn.draw(st.integers(4, 48))
    outliers = drawn.draw(st.dictionaries(st.integers(0, channels - 1), st.floats(2, 1e3), max_size=4))
    gated, share = drawn.draw(st.booleans()), drawn.draw(st.sampled_from([0.1, 0.3, 1.0]))
    align = drawn.draw(st.sampled_from([1, 2, 5]))
    up = planted((16, channels), "U", outliers)
    more: dict[str, Any] = {"G": (16, channels)} if gated else {"b": channels}
    graph = build(TOKENS, SWIGLU if gated else FFN, U=up, D=(channels, 4), **more)
    outcome = split(graph, max_extra=share, align=align)
    for site in outcome.facts["sites"]:
        old, new = site["width"]
        assert old == channels
        assert channels < new <= channels * (1 + share)
        assert new % align == 0
        assert site["output_snr_db"][1] >= site["output_snr_db"][0] + 1
        assert largest(graph, "h") <= site["largest"][1] * (1 + 1e-6)  # statistics are float32
    assert len(outcome.facts["sites"]) + len(outcome.refused) == 2  # what reads x, and what reads h


def test_a_width_that_suits_hardware():
    graph = ffn({3: 60.0})
    (site,) = split(graph, align=16).facts["sites"]
    assert site["width"] == [40, 48]
    assert largest(graph, "h") == pytest.approx(site["largest"][1], rel=1e-6)


# ---- where nodes are needed --------------------------------------------------------------------------------------


def norm():
    gamma = random(16, "g")
    gamma[2] *= 60
    return build(TOKENS, NORM, g=gamma, e=16, Q=(16, 4), K=(16, 4))


def test_behind_a_norm_one_gather_repeats_the_channels():
    graph = norm()
    (site,) = split(graph, allow_insert=True).facts["sites"]
    assert site["inserted"] == 1
    assert ops(graph) == ["LayerNormalization", "Gather", "MatMul", "MatMul", "Mul"]
    index = constants(graph)["h_channels_indices"]
    assert index.tolist() == [0, 1, *[2] * site["parts"], *range(3, 16)]
    assert constants(graph)["Q"].shape == constants(graph)["K"].shape == (site["width"][1], 4)
    assert constants(graph)["g"].shape == (16,)


def test_not_without_leave():
    graph = norm()
    text = listing(graph)
    outcome = split(graph)
    assert reasons(outcome) == [
        "MatMul: its width cannot grow: LayerNormalization is in between (allow_insert: a Gather repeats its channels)"
    ]
    assert listing(graph) == text


def test_behind_an_activation_one_mul_divides_and_the_width_grows():
    body = FFN.replace("Relu", "Elu")
    graph = build(TOKENS, body, kind="float", U=planted((16, 40), "U", {3: 60.0}), b=40, D=(40, 8))
    outcome = split(graph, allow_insert=True)
    (site,) = outcome.facts["sites"]
    assert reasons(outcome) == ["x stays as it is: no split gains 3 dB"]
    assert ops(graph) == ["MatMul", "Add", "Elu", "Mul", "MatMul"]
    assert constants(graph)["U"].shape == (16, site["width"][1])
    assert site["inserted"] == 1


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "given", "reason"),
    [
        ("h = MatMul(x, U)\n a = MatMul(h, D)\n y = Concat<axis=2>(a, h)", {}, "it is an output of the graph"),
        ("u = MatMul(x, U)\n h = Elu(u)\n y = MatMul(h, D)", {}, "Elu is in between"),
        ("u = MatMul(x, U)\n h = Relu(u)\n z = MatMul(h, D)\n t = Shape(h)\n s = Cast<to=11>(t)\n v = ReduceMax(s)\n"
         " y = Mul(z, v)", {}, "its width cannot grow: Shape is in between"),
        ("u = MatMul(x, U)\n h = Relu(u)\n f = Reshape(h, n)\n y = MatMul(f, E)",
         {"n": np.array([0, 5, 4, 10]), "E": (10, 8)}, "its width cannot grow: Reshape is in between"),
        ("u = MatMul(x, U)\n h = Relu(u)\n r = Neg(h)\n z = MatMul(r, D)\n t = MatMul(h, D)\n y = Add(z, t)", {},
         "linears read its channels from several tensors"),
    ],
)  # fmt: skip
def test_what_cannot_be_split_is_refused(body, given, reason):
    graph = build(TOKENS, body, U=planted((16, 40), "U", {3: 60.0}), D=(40, 8), **given)
    text = listing(graph)
    outcome = split(graph)
    assert any(reason in found for found in reasons(outcome)), reasons(outcome)
    assert listing(graph) == text


def test_channels_that_are_alike_stay():
    graph = build(TOKENS, FFN.replace("Relu", "Neg"), U=(16, 40), b=40, D=(40, 8))
    assert "h stays as it is: no split gains 6 dB" in reasons(split(graph, min_gain=6.0))


def test_grouped_convolutions_are_refused():
    body = "c = Conv(x, W)\n h = Relu(c)\n y = Conv<group=4>(h, V)"
    graph = build(IMAGE, body, W=planted((24, 3, 1, 1), "W", {5: 50.0}, axis=0), V=(8, 6, 1, 1))
    assert "Conv: Conv reads it in groups" in reasons(split(graph))


def test_a_value_past_its_type_is_refused():
    up = planted((16, 40), "U", {3: 60.0}) / 1000
    down = 8000 * random((40, 8), "D")  # times T, that is past float16
    graph = build(TOKENS, FFN, kind="float16", U=up, b=np.zeros(40), D=down)
    text, old = listing(graph), constants(graph)
    outcome = split(graph)
    assert any("does not fit float16" in reason for reason in reasons(outcome))
    assert listing(graph) == text
    assert all(np.array_equal(values, old[name]) for name, values in constants(graph).items())


# ---- the pass ----------------------------------------------------------------------------------------------------


def test_the_pipeline_verifies_it():
    graph = ffn({3: 60.0}, kind="float")
    samples = data(graph)
    graph, (record,) = pipeline.run(graph, [make("split-channels", {"align": 8})], Context(samples))
    assert record["facts"]["sites"][0]["width"] == [40, 48]
    assert record["verified"]["max_rel_error"] < 1e-6  # a few roundings of float32


def test_it_needs_data():
    with pytest.raises(DataError, match="needs calibration data"):
        SplitChannels().apply(ffn({}), Context())


@pytest.mark.parametrize(("option", "value"), [("max_extra", 0.0), ("min_gain", -1.0), ("align", 0)])
def test_options_out_of_range(option, value):
    with pytest.raises(UsageError, match=option):
        SplitChannels(**{option: value})
