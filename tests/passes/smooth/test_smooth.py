"""Smoothing on small networks: what a shift may add, options, what is left alone, and data."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from channelfold.passes.base import Context
from channelfold.passes.smooth import Smooth
from channelfold.runtime.data.sources import Data
from channelfold.runtime.errors import DataError, UsageError
from channelfold.runtime.io.session import TensorSpec
from channelfold.runtime.stats.channels import ChannelStatistics
from channelfold.runtime.stats.observe import observe
from channelfold.tests.graphs import (
    assert_same,
    build,
    changes,
    constants,
    data_from,
    feeds,
    listing,
    positive,
    random,
    reasons,
    run,
    samples,
)
from channelfold.tests.passes.smooth.blocks import (
    BLOCKS,
    METHODS,
    SEARCHED,
    TOKENS,
    block,
    int8,
    outputs,
    plant,
    smooth,
    snr,
)

# ---- what a shift may and may not add ------------------------------------------------------------------------------

NORM = "n = LayerNormalization(x, g, b)\n"


@pytest.mark.parametrize(("insert", "ops"), [(False, 2), (True, 3)])
def test_a_shift_where_a_bias_would_be_a_new_node(insert, ops):
    graph = build(TOKENS, NORM + "y = MatMul(n, W)", kind="float", g=16, b=3 * random(16, "b"), W=(16, 16))
    outcome = smooth(graph, Smooth("repq", allow_insert=insert))
    assert len(graph.nodes) == ops
    assert outcome.facts["sites"][0]["inserted"] == ops - 2
    assert changes(outcome)[0].endswith("; nodes inserted: 1") is insert


def test_a_norm_without_bias_and_a_gemm_without_one_take_a_shift():
    graph = build("(float[N,16] x) => (float[] y)", "n = LayerNormalization(x, g)\n y = Gemm(n, W)", kind="float",
                  g=16, W=(16, 16))  # fmt: skip
    data = samples(graph, make=lambda shape, rng: rng.exponential(size=shape) ** 2)
    before = outputs(graph, data)
    smooth(graph, Smooth("repq"), data)
    assert [len(node.inputs) for node in graph.nodes] == [3, 3]
    assert snr(before, outputs(graph, data)) > 100


def test_explicit_nodes_behind_gelu():
    """Outliers behind an activation function, which no weight can take: Mul(1/s) in front of the linear."""
    body = "h = MatMul(x, V)\n e = Sigmoid(h)\n s = Mul(e, h)\n y = MatMul(s, W)"
    big = np.ones(16)
    big[:2] = 60
    graph = build(TOKENS, body, kind="float", V=random((16, 16), "V") * big, W=random((16, 16), "W") / big[:, None])
    data = samples(graph)
    before, plain = outputs(graph, data), listing(graph)
    refused = smooth(graph, Smooth("smoothquant"), data)
    assert (
        "Mul of two activations is in between" in refused.refused[1].reason or "reads it" in refused.refused[1].reason
    )
    assert listing(graph) == plain
    outcome = smooth(graph, Smooth("auto", allow_insert=True), data)
    (site,) = (site for site in outcome.facts["sites"] if site["tensor"] == "s")
    assert site["inserted"] == 1
    assert [node.op for node in graph.nodes] == ["Mul", "MatMul", "Sigmoid", "Mul", "Mul", "MatMul"]
    assert snr(before, outputs(graph, data)) > 100
    assert changes(outcome)[-1].startswith("an explicit Mul -> 1 linear: ")


def test_the_shortcut_of_a_post_ln_block_gets_what_was_taken_from_the_norm():
    """Two channels of the first norm 60 times larger than the others, in a weight of q, k and v that is small there."""
    big = np.ones(16)
    big[:2] = 60
    signature, body, given = BLOCKS["post-LN"]
    given = given | {name: given[name] * big for name in ("g1", "b1")}
    given |= {name: given[name] / big[:, None] for name in "QKV"}
    graph = build(signature, body, kind="float", **given)
    data = samples(graph)
    before, plain = (
        outputs(graph, data),
        snr(outputs(graph, data), int8(build(signature, body, kind="float", **given), data)),
    )
    outcome = smooth(graph, Smooth(allow_insert=True), data)
    (site,) = (site for site in outcome.facts["sites"] if site["tensor"] == "n0")
    assert site["inserted"] >= 1
    assert site["output_snr_db"][1] > site["output_snr_db"][0] + 10
    (restored,) = (node for node in graph.nodes if node.op == "Mul" and node.inputs[0].name == "n0")
    assert any(node.op in ("Add", "Mul") for node in graph.nodes if node.inputs[0] is restored.outputs[0])
    assert snr(before, outputs(graph, data)) > 100
    assert snr(before, int8(graph, data)) > plain + 5


def test_auto_inserts_no_node_that_gains_little():
    """2 dB where 3 are wanted; the method by its own name takes them."""
    weight = random((64, 200), "W") * np.geomspace(1, 4, 64)[:, None]

    def made() -> gs.Graph:
        return build("(float[N,T,64] x) => (float[] y)", "e = Sigmoid(x)\n y = MatMul(e, W)", kind="float", W=weight)

    graph = made()
    plain = listing(graph)
    outcome = smooth(graph, Smooth("auto", allow_insert=True, shift=False))
    assert reasons(outcome) == ["e stays as it is: no scale makes its quantized outputs better by enough"]
    assert listing(graph) == plain
    (site,) = smooth(made(), Smooth("smoothquant", search_alpha=True, allow_insert=True)).facts["sites"]
    assert 0 < site["output_snr_db"][1] - site["output_snr_db"][0] < 3


# ---- options -------------------------------------------------------------------------------------------------------


def test_patterns_choose_sites():
    names = {"MatMul_1": "/attn/q", "MatMul_3": "/attn/k", "MatMul_5": "/attn/v"}

    def named() -> gs.Graph:
        graph = block("pre-LN")
        plant(graph)
        for node in graph.nodes:
            node.name = names.get(node.name, node.name)
        return graph

    step = Smooth("smoothquant")
    everything = {site["tensor"] for site in smooth(named(), step).facts["sites"]}
    assert everything == {"n1", "c", "n2"}
    only = smooth(named(), dataclasses.replace(step, include=("/attn/*",)))
    assert {site["tensor"] for site in only.facts["sites"]} == {"n1"}
    assert any(reason.endswith("not included by any pattern") for reason in reasons(only))
    others = smooth(named(), dataclasses.replace(step, exclude=("/attn/*",)))
    assert {site["tensor"] for site in others.facts["sites"]} == {"c", "n2"}
    assert any(reason.endswith("excluded by pattern '/attn/*'") for reason in reasons(others))


@pytest.mark.parametrize("name", ["MatMul_1", "MatMul_3", "MatMul_5"])
def test_a_pattern_that_excludes_one_reader_excludes_what_is_scaled_with_it(name):
    graph = block("pre-LN")
    plant(graph)
    before = constants(graph)
    outcome = smooth(graph, Smooth("smoothquant", exclude=(name,)))
    assert {site["tensor"] for site in outcome.facts["sites"]} == {"c", "n2"}
    assert f"MatMul: a linear that shares its scale is excluded by pattern {name!r}" in reasons(outcome)
    assert all(constants(graph)[weight] is before[weight] for weight in ("Q", "K", "g1"))


@pytest.mark.parametrize("name", ["MatMul_1", "MatMul_3", "MatMul_5"])
def test_a_pattern_that_includes_one_reader_includes_what_is_scaled_with_it(name):
    graph = block("pre-LN")
    plant(graph)
    (site,) = smooth(graph, Smooth("smoothquant", include=(name,))).facts["sites"]
    assert sorted(site["readers"]) == ["MatMul_1", "MatMul_3", "MatMul_5"]


def test_alpha_decides_who_pays():
    """With 1 all channels of the activation are alike afterwards, with 0 all columns of the weights."""
    for alpha in (0.0, 1.0):
        graph = build(TOKENS, NORM + "y = MatMul(n, W)", kind="float", g=positive(16, "g"), b=16, W=(16, 16))
        data = samples(graph)
        outcome = smooth(graph, Smooth("smoothquant", alpha=alpha), data)
        seen = ChannelStatistics(-1)
        observe(graph, {"n": [seen]}, data)
        columns = np.abs(constants(graph)["W"]).max(axis=1)
        assert (seen.amax if alpha else columns) == pytest.approx(np.median(seen.amax if alpha else columns), rel=1e-5)
        assert changes(outcome)[0].startswith(
            f"LayerNormalization LayerNormalization_0 -> 1 linear: smoothquant, alpha {alpha:g}; "
        )
        if alpha:
            assert outcome.facts["sites"][0]["outlier_ratio"][1] == pytest.approx(1, rel=1e-5)


def test_bits_are_those_the_search_expects():
    """Fewer bits, more error."""
    found = []
    for bits in (8, 4):
        graph = block("pre-LN")
        plant(graph)
        sites = smooth(graph, Smooth("auto", activation_bits=bits, weight_bits=bits, group_size=8)).facts["sites"]
        found.append(sites[0]["output_snr_db"][1])
    assert found[0] > found[1] + 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -0.1}, "'alpha' is -0.1. Expected 0 to 1"),
        ({"alpha": 1.5}, "'alpha' is 1.5. Expected 0 to 1"),
        ({"activation_bits": 1}, "'activation_bits' is 1. Expected 2 to 16"),
        ({"weight_bits": 17}, "'weight_bits' is 17. Expected 2 to 16"),
        ({"group_size": -1}, "'group_size' is -1. Expected 0 to 1048576"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UsageError, match=message):
        Smooth(**options)


# ---- what is left alone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("z = LayerNormalization(x, g, b)\n y = MatMul(z, W)", "it is an output of the graph"),
        (f"{NORM} t = Tanh(n)\n a = MatMul(n, W)\n y = Add(a, t)\n z = Relu(x)", "Tanh reads it"),
        ("y = MatMul(x, W)\n z = Relu(y)", "an input of the graph feeds it"),
        ("t = Sigmoid(x)\n y = MatMul(t, W)\n z = Relu(x)", "Sigmoid is in between"),
    ],
)  # fmt: skip
def test_sites_that_cannot_be_scaled(body, reason):
    graph = build("(float[N,T,16] x) => (float[] y, float[] z)", body, kind="float", g=positive(16, "g"), b=16,
                  W=(16, 16))  # fmt: skip
    plain, before = listing(graph), constants(graph)
    outcome = smooth(graph)
    (refusal,) = outcome.refused
    assert refusal.reason == f"MatMul: {refusal.code}"
    assert refusal.code == f"{reason} (allow_insert puts an explicit Mul there)"
    assert listing(graph) == plain
    assert all(constants(graph)[name] is values for name, values in before.items())


def test_a_tied_embedding_is_refused_for_what_its_copy_weighs():
    body = "e = Gather(E, i)\n n = LayerNormalization(e, g, b)\n W = Transpose(E)\n y = MatMul(n, W)"
    graph = build("(float[1] unused, int64[N,T] i) => (float[] y)", body, kind="float", E=(5000, 64), g=positive(64),
                  b=64)  # fmt: skip
    made = [{"unused": np.zeros(1, np.float32), "i": np.arange(12).reshape(3, 4) + index} for index in range(3)]
    data = data_from(*made)
    before = constants(graph)
    for method in ("auto", "smoothquant"):
        (reason,) = reasons(smooth(graph, METHODS[method], data))
        assert reason.startswith("n stays as it is: a new weight for MatMul_3 would make the file 1.3 MB larger (")
    assert all(constants(graph)[name] is values for name, values in before.items())


@pytest.mark.parametrize("method", SEARCHED)
def test_a_search_refuses_layers_with_a_kernel(method):
    outcome = smooth(block("conv"), METHODS[method])
    (refusal,) = (refusal for refusal in outcome.refused if refusal.node == "Conv_3")
    assert refusal.reason == (
        "r stays as it is: a search needs layers without a kernel; smoothquant, repq or equalize do not search"
    )


@pytest.mark.parametrize("method", ["smoothquant", "repq", "outliertune", "fp4-shift"])
def test_channels_that_are_alike_stay(method):
    """Every channel from -1 to 1, and every column of the weight with the same largest value."""
    graph = build(TOKENS, "n = Mul(x, g)\n y = MatMul(n, W)", kind="float", g=np.ones(16), W=np.ones((16, 16)))

    def make(shape, rng):
        values = rng.uniform(-1, 1, shape)
        values[:, 0], values[:, 1] = 1, -1
        return values

    assert reasons(smooth(graph, METHODS[method], samples(graph, make=make))) == [
        "n stays as it is: its channels are alike already"
    ]


def test_a_search_that_finds_nothing_better():
    """Integers that int8 holds exactly, in the activation and in the weights."""

    def make(shape, rng):
        values = rng.integers(-127, 128, shape)
        values[:, 0] = 127
        return values

    weight = np.rint(127 * np.clip(random((16, 16), "W") / 3, -1, 1))
    weight[0] = 127
    graph = build(TOKENS, "n = Mul(x, g)\n y = MatMul(n, W)", kind="float", g=np.ones(16), W=weight)
    for method in SEARCHED[:3]:
        assert reasons(smooth(graph, METHODS[method], samples(graph, make=make))) == [
            "n stays as it is: no scale makes its quantized outputs better"
        ]


def test_dead_channels_stay_dead():
    """What is always zero in calibration may not be so later: its scale is 1."""

    def make(shape, rng):
        values = rng.standard_normal(shape) * np.geomspace(0.1, 50, 16)
        values[..., [2, 9]] = 0
        return values

    for method, step in METHODS.items():
        graph = build(TOKENS, "n = Mul(x, g)\n y = MatMul(n, W)", kind="float", g=np.ones(16), W=(16, 16))
        assert len(smooth(graph, step, samples(graph, make=make)).changed) == 1, method
        assert constants(graph)["g"][[2, 9]].tolist() == [1, 1], method
        np.testing.assert_array_equal(constants(graph)["W"][[2, 9]], random((16, 16), "W").astype(np.float32)[[2, 9]])


# ---- data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", "smoothquant"])
def test_samples_of_different_lengths(method):
    graph = block("pre-LN")
    plant(graph, shifted=True)
    data = samples(graph, 5, size=lambda index: 3 + 4 * index)
    before = outputs(graph, data)
    assert len(smooth(graph, METHODS[method], data).changed) == 3
    assert snr(before, outputs(graph, data)) > 90


@pytest.mark.parametrize("method", METHODS)
def test_float16_weights_keep_their_type(method):
    graph = build(
        TOKENS, NORM + "h = MatMul(n, V)\n c = Add(h, vb)\n r = Relu(c)\n y = MatMul(r, W)", kind="float16",
        g=positive(16, "g"), b=16, V=random((16, 16), "V") / 4, vb=16, W=random((16, 16), "W") / 4,
    )  # fmt: skip
    data = samples(graph)
    before = outputs(graph, data)
    assert smooth(graph, METHODS[method], data).changed
    assert {values.dtype for values in constants(graph).values()} == {np.dtype(np.float16)}
    assert snr(before, outputs(graph, data)) > 50  # a few roundings to 11 bits


def test_data_are_needed():
    graph = block("conv")
    empty = Data([TensorSpec("x", np.dtype(np.float32), (1, 16, 6, 6))], 0, lambda: iter(()), "nothing")
    for context in (Context(), Context(calibration=empty)):
        with pytest.raises(DataError, match=r"Smoothing needs calibration data\. Give some with --calibration"):
            Smooth().apply(graph, context)


def test_nan_in_calibration_names_the_tensor_and_the_sample():
    graph = block("pre-LN")
    plain = listing(graph)

    def make(shape, rng):
        values = rng.standard_normal(shape)
        values[0, 0, 0] = np.nan if rng.integers(2) else 1
        return values

    with pytest.raises(
        DataError, match=r"Activation 'n1' of sample \d cannot be used: it holds NaN\. Check that sample"
    ):
        smooth(graph, data=samples(graph, 8, make=make))
    assert listing(graph) == plain


def test_a_tensor_that_no_sample_reached():
    graph = build("(float[N,16] x) => (float[] y)", "n = LayerNormalization(x, g)\n y = Gemm(n, W)", kind="float",
                  g=16, W=(16, 16))  # fmt: skip
    outcome = smooth(graph, Smooth("smoothquant"), samples(graph, size=0))
    assert reasons(outcome) == ["n stays as it is: no calibration sample reached it"]


@pytest.mark.parametrize("insert", [False, True])
def test_a_tensor_that_is_read_along_two_axes(insert):
    body = "n = Mul(x, g)\n a = Conv(n, W)\n m = MatMul(n, V)\n y = Add(a, m)"
    for method in METHODS.values():
        graph = build("(float[1,16,20] x) => (float[] y)", body, kind="float", g=np.ones((16, 1)), W=(16, 16, 1),
                      V=(20, 20))  # fmt: skip
        plain = listing(graph)
        outcome = smooth(graph, dataclasses.replace(method, allow_insert=insert))
        assert reasons(outcome)[0].startswith("Conv: linears read it along two axes")
        assert listing(graph) == plain


def test_a_tensor_that_is_pinned_in_one_site_and_has_nodes_of_its_own_in_another():
    """x is in the region of c, which joins it to h, but as an input of the graph it cannot be scaled there."""
    body = "a = MatMul(x, V)\n h = MatMul(x, U)\n c = Concat<axis=2>(h, x)\n b = MatMul(c, W)\n y = Add(a, b)"
    for method, step in METHODS.items():
        graph = build(TOKENS, body, kind="float", V=(16, 16), U=random((16, 16), "U") * np.geomspace(1, 90, 16),
                      W=(32, 16))  # fmt: skip
        data = samples(graph, make=lambda shape, rng: rng.standard_normal(shape) * np.geomspace(1, 90, 16))
        before = outputs(graph, data)
        outcome = smooth(graph, dataclasses.replace(step, allow_insert=True), data)
        found = {site["tensor"]: sorted(site["readers"]) for site in outcome.facts["sites"]}
        assert found.get("c", ["MatMul_3"]) == ["MatMul_3"], method
        assert found.get("x", ["MatMul_0", "MatMul_1"]) == ["MatMul_0", "MatMul_1"], method
        assert found, method
        assert snr(before, outputs(graph, data)) > 100, method


def test_one_axis_by_two_numbers():
    """Axis 1 of three is axis -2, where the weight of a MatMul is on the left."""
    body = "n = Mul(x, g)\n a = Conv(n, W)\n m = MatMul(V, n)\n y = Add(a, m)"
    graph = build("(float[1,16,20] x) => (float[] y)", body, kind="float", g=np.geomspace(1, 50, 16)[:, None],
                  W=(16, 16, 1), V=(16, 16))  # fmt: skip
    data = samples(graph)
    before = outputs(graph, data)
    (site,) = smooth(graph, data=data).facts["sites"]
    assert site["readers"] == ["Conv_1", "MatMul_2"]
    assert snr(before, outputs(graph, data)) > 100


def test_a_factor_that_is_not_by_channel_does_not_take_the_scale_of_an_insertion():
    """Mul by a number for each image: its other reader, an output of the graph, must see what it saw before."""
    body = "p = Sigmoid(x)\n z = Mul(p, c)\n y = MatMul(p, W)"
    graph = build("(float[2,5,16] x) => (float[] y, float[] z)", body, kind="float", c=positive((2, 1, 1)),
                  W=random((16, 16), "W") * np.geomspace(1, 300, 16)[:, None])  # fmt: skip
    feed = feeds(graph)
    before = run(graph, feed)
    assert smooth(graph, Smooth("smoothquant", allow_insert=True)).changed
    assert_same(before, run(graph, feed), 1e-5)
    assert [node.op for node in graph.nodes] == ["Sigmoid", "Mul", "Mul", "MatMul"]


def test_a_weight_that_two_sites_share_is_scaled_for_each():
    body = "n = Mul(x, g)\n a = MatMul(n, W)\n r = Relu(a)\n y = MatMul(r, W)"
    for method, step in METHODS.items():
        graph = build(TOKENS, body, kind="float", g=np.geomspace(1, 50, 16), W=random((16, 16), "W") / 4)
        data = samples(graph)
        before = outputs(graph, data)
        assert smooth(graph, step, data).changed, method
        assert snr(before, outputs(graph, data)) > 100, method
