"""Sparse weights: the pattern in every layout, what data gain, shared weights, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from channelfold.passes import pipeline, recipe
from channelfold.passes.base import Context, Outcome
from channelfold.passes.layers.linear import Linear, linears
from channelfold.passes.quantize import Quantize
from channelfold.passes.sparsify import Sparsify
from channelfold.passes.sparsify.masks import Tiles
from channelfold.passes.sparsify.zeros import worth
from channelfold.runtime.data.sources import Data
from channelfold.runtime.errors import DataError, UsageError
from channelfold.runtime.io.files import check
from channelfold.runtime.io.session import TensorSpec
from channelfold.runtime.stats.channels import ChannelMoments
from channelfold.tests.graphs import build, changes, constants, data_from, feeds, listing, random, reasons, run, samples

TOKENS = "(float[N,T,32] x) => (float[] y)"
MLP = "h = MatMul(x, A)  r = Relu(h)  y = MatMul(r, B)"


def data_of(graph: gs.Graph, count: int = 4, size: int = 8, skew: float = 0.0) -> Data:
    """Random samples; with ``skew`` the channels, on the last axis, differ in size and have a mean."""
    return samples(
        graph, count, size=size,
        make=lambda shape, rng: (rng.standard_normal(shape) + skew) * np.exp(skew * random(shape[-1], "skew")),
    )  # fmt: skip


def sparsify(graph: gs.Graph, data: Data | None = None, **options) -> Outcome:
    outcome = Sparsify(**options).apply(graph, Context(calibration=data))
    check(graph)
    json.dumps(outcome.facts)
    return outcome


def groups_of(linear: Linear, m: int = 4) -> np.ndarray:
    """How many of each m consecutive inputs are not zero."""
    moved = np.moveaxis(linear.weight() != 0, 1, -1)
    return moved.reshape(*moved.shape[:-1], -1, m).sum(axis=-1)


def error(graph: gs.Graph, before: list[dict], data: Data) -> float:
    return sum(float(np.square(run(graph, f)["y"] - b["y"]).sum()) for f, b in zip(data, before, strict=True))


# ---- the patterns ------------------------------------------------------------------------------------------------

LAYOUTS = {
    "MatMul": (TOKENS, "y = MatMul(x, W)", {"W": (32, 24)}),
    "left MatMul": ("(float[N,32,5] x) => (float[] y)", "y = MatMul(W, x)", {"W": (24, 32)}),
    "transposed": (TOKENS, "T = Transpose(W)  y = MatMul(x, T)", {"W": (24, 32)}),
    "Gemm": ("(float[N,32] x) => (float[] y)", "y = Gemm<alpha=0.5>(x, W, b)", {"W": (32, 24), "b": 24}),
    "Gemm B": ("(float[N,32] x) => (float[] y)", "y = Gemm<transB=1>(x, W)", {"W": (24, 32)}),
    "Conv": ("(float[N,32,6,6] x) => (float[] y)", "y = Conv(x, W, b)", {"W": (24, 32, 3, 3), "b": 24}),
    "grouped": ("(float[N,32,6,6] x) => (float[] y)", "y = Conv<group=2>(x, W)", {"W": (24, 16, 3, 3)}),
}


@pytest.mark.parametrize("with_data", [False, True])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_n_of_m_inputs_in_every_layout(layout, pattern, with_data):
    signature, body, weights = LAYOUTS[layout]
    graph = build(signature, body, kind="float", **weights)
    old = linears(graph)[0].weight().copy()
    outcome = sparsify(graph, data_of(graph) if with_data else None, pattern=pattern)
    n, m = map(int, pattern.split(":"))
    (linear,) = linears(graph)
    assert (groups_of(linear, m) == n).all()
    kept = linear.weight() != 0
    assert np.array_equal(linear.weight()[kept], old[kept])
    assert outcome.facts["sparsity"] == 1 - n / m
    assert outcome.facts["scores"] == ("wanda" if with_data else "magnitude")
    energy = np.square(old[kept].astype(np.float64)).sum() / np.square(old.astype(np.float64)).sum()
    if not with_data:
        assert outcome.facts["sites"][0]["energy_kept"] == pytest.approx(energy, rel=1e-5)
        assert changes(outcome) == [f"{linear.node.op}: {1 - n / m:.1%} zeros, {energy:.2%} of the energy kept"]


def test_float16_keeps_its_type_and_its_values():
    graph = build("(float16[N,32] x) => (float16[] y)", "y = MatMul(x, W)", W=(32, 24))
    old = constants(graph)["W"].copy()
    sparsify(graph, data_of(graph))
    new = constants(graph)["W"]
    assert new.dtype == np.float16
    assert (groups_of(linears(graph)[0]) == 2).all()
    assert np.array_equal(new[new != 0], old[new != 0])


@pytest.mark.parametrize("ratios", ["uniform", "equal-slope", "ecoflap"])
def test_blocks_are_aligned_and_as_many_as_asked_for(ratios):
    graph = build(TOKENS, MLP, kind="float", A=(32, 100), B=(100, 24))
    outcome = sparsify(graph, data_of(graph), pattern="block", block=8, sparsity=0.4, ratios=ratios)
    zero = total = 0
    for linear in linears(graph):
        tiles = Tiles(linear.weight().shape, 8)
        shares = tiles.sums(linear.weight() != 0) / tiles.sizes()
        assert set(shares.reshape(-1)) == {0.0, 1.0}
        zero, total = zero + int((shares == 0).sum()), total + tiles.count
    assert zero == round(0.4 * total)
    assert outcome.facts["sparsity"] == pytest.approx(0.4, abs=0.03)  # tiles at the ends are smaller


def test_equal_slopes_take_more_where_less_is_lost():
    """In A all is in a quarter of the tiles, in B it is spread evenly."""
    A = random((32, 64), "A") * 1e-3
    A[:16, :32] *= 1e3
    graph = build(TOKENS, MLP, kind="float", A=A, B=(64, 32))
    outcome = sparsify(graph, pattern="block", block=8, sparsity=0.4)
    assert [site["sparsity"] for site in outcome.facts["sites"]] == [24 / 32, 2 / 32]


def test_a_layer_of_one_tile_stays():
    graph = build(TOKENS, MLP, kind="float", A=(32, 16), B=(16, 16))
    outcome = sparsify(graph, pattern="block", ratios="uniform", sparsity=0.9)
    assert (outcome.changed, outcome.facts["zeros"]) == ([], 0)
    assert {refusal.code for refusal in outcome.refused} == {"nothing has to go, or is zero already"}
    assert worth(outcome.facts, "block")[0].startswith("No weight was set to zero")


@pytest.mark.parametrize("ratios", ["uniform", "ecoflap"])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.77])
def test_unstructured_meets_the_total(ratios, sparsity):
    graph = build(TOKENS, MLP, kind="float", A=(32, 100), B=(100, 24))
    outcome = sparsify(graph, data_of(graph), pattern="unstructured", sparsity=sparsity, ratios=ratios)
    assert sum(np.count_nonzero(linear.weight() == 0) for linear in linears(graph)) == outcome.facts["zeros"]
    assert outcome.facts["sparsity"] == pytest.approx(sparsity, abs=1e-3)
    sites = [site["sparsity"] for site in outcome.facts["sites"]]
    assert max(sites) <= 0.8
    if ratios == "uniform":
        assert sites == pytest.approx([sparsity] * 2, abs=1e-3)


def test_a_layer_that_hardly_matters_loses_most():
    body = "a = MatMul(x, A)  b = MatMul(x, B)  s = Mul(b, small)  c = MatMul(x, C)  u = Add(a, s)  y = Add(u, c)"
    graph = build(TOKENS, body, kind="float", A=(32, 32), B=(32, 32), C=(32, 32), small=np.float64(1e-4))
    outcome = sparsify(graph, data_of(graph), pattern="unstructured", sparsity=0.5, ratios="ecoflap")
    a, b, c = (site["sparsity"] for site in outcome.facts["sites"])
    assert b == pytest.approx(0.8, abs=1e-3)
    assert max(a, c) < 0.45


# ---- data --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_wanda_loses_less_than_magnitude_on_skewed_inputs(pattern):
    errors = {}
    for scores in ("magnitude", "wanda"):
        graph = build(TOKENS, "y = MatMul(x, W)", kind="float", W=(32, 24))
        data = data_of(graph, skew=1.0)
        before = [run(graph, feed) for feed in data]
        sparsify(graph, data, pattern=pattern, scores=scores, correct_bias=False)
        errors[scores] = error(graph, before, data)
    assert errors["wanda"] < 0.5 * errors["magnitude"]


def test_the_bias_takes_up_the_mean():
    for body in ("y = Gemm<transB=1>(x, W)", "h = MatMul(x, V)  y = Add(h, b)"):
        graph = build("(float[N,32] x) => (float[] y)", body, kind="float", W=(24, 32), V=(32, 24), b=24)
        data = data_of(graph, skew=1.0)
        before = [run(graph, feed) for feed in data]
        sparsify(graph, data)
        after = [run(graph, feed) for feed in data]
        gap = np.mean([a["y"] - b["y"] for a, b in zip(after, before, strict=True)], axis=(0, 1))
        assert np.abs(gap).max() < 1e-5 * np.abs([b["y"] for b in before]).max()


@pytest.mark.parametrize(
    "conv", ["Conv", "Conv<pads=[2,2]>", "Conv<pads=[4,0], strides=[2]>", 'Conv<auto_pad="SAME_UPPER">']
)
def test_the_bias_behind_a_kernel_takes_up_the_mean_of_what_lies_inside_the_borders(conv):
    text = f"y = {conv}(x, W, b)"
    graph = build("(float[N,8,L] x) => (float[] y)", text, kind="float", W=(4, 8, 5), b=4)
    data = samples(graph, size=12, make=lambda shape, rng: np.ones(shape) * random(8, "level")[:, None])
    before = [run(graph, feed)["y"] for feed in data]
    sparsify(graph, data)
    gap = np.mean([run(graph, feed)["y"] - old for feed, old in zip(data, before, strict=True)], axis=(0, 1, 3))
    assert np.abs(gap).max() < 1e-5 * np.abs(before).max()


def test_the_bias_behind_a_transposed_kernel_stays():
    text = "y = ConvTranspose(x, W, b)"
    graph = build("(float[N,8,L] x) => (float[] y)", text, kind="float", W=(8, 4, 5), b=4)
    sparsify(graph, data_of(graph, size=12, skew=1.0), pattern="unstructured")
    assert np.array_equal(constants(graph)["b"], random(4, "b").astype(np.float32))


def test_silent_channels_are_ranked_by_magnitude():
    graph = build("(float[N,8] x) => (float[] y)", "y = Gemm<transB=1>(x, W)", kind="float",
                  W=np.array([[1, 4, 3, 2, 4, 1, 2, 3.0]]))  # fmt: skip
    feed = {"x": np.array([[0, 0, 0, 0, 1, 1, 1, 1]], np.float32)}
    data = data_from(feed)
    sparsify(graph, data, correct_bias=False)
    assert linears(graph)[0].weight().tolist() == [[0, 4, 3, 0, 4, 0, 0, 3]]


@pytest.mark.parametrize(("axis", "positions"), [(1, 45), (-1, 27)])
def test_power_of_channels_by_axis(axis, positions):
    first, second = random((2, 3, 5), "a").astype(np.float32), random((7, 3, 5), "b").astype(np.float32)
    seen = ChannelMoments(axis)
    for values in (first, second, first[:0]):
        seen.add(values)
    rows = np.moveaxis(np.concatenate([first, second]).astype(np.float64), axis, -1)
    assert seen.positions == positions
    np.testing.assert_allclose(seen.rms, np.sqrt(np.square(rows).mean(axis=(0, 1))), rtol=1e-6)
    np.testing.assert_allclose(seen.mean, rows.mean(axis=(0, 1)), rtol=1e-5, atol=1e-7)
    with pytest.raises(DataError, match=f"4 channels on axis {axis}, and had {rows.shape[-1]} before"):
        seen.add(np.zeros((1, 4, 4), np.float32))


@pytest.mark.parametrize(("bad", "message"), [(np.nan, "it holds NaN"), (np.inf, "it holds infinities")])
def test_values_that_are_no_numbers_are_named(bad, message):
    graph = build(TOKENS, MLP, kind="float", A=(32, 16), B=(16, 16))
    feed = {"x": np.full((1, 2, 32), bad, np.float32)}
    data = data_from(feed)
    with pytest.raises(DataError, match=f"Activation 'x' of sample 0 cannot be used: {message}"):
        sparsify(graph, data)


@pytest.mark.parametrize("options", [{"scores": "wanda"}, {"pattern": "unstructured", "ratios": "ecoflap"}])
def test_what_needs_data_says_so(options):
    graph = build(TOKENS, MLP, kind="float", A=(32, 16), B=(16, 16))
    old = listing(graph)
    with pytest.raises(DataError, match="needs calibration data"):
        sparsify(graph, **options)
    assert listing(graph) == old


# ---- shared weights ----------------------------------------------------------------------------------------------

SHARED = "h = MatMul(x, W)  r = Relu(h)  y = MatMul(r, W)"


def test_two_readers_keep_one_weight():
    """What counts is the sum over both: the loud channels are 0 and 1 of the first, 2 and 3 of the second."""
    graph = build("(float[N,4] x, float[N,4] z) => (float[] u, float[] v)", "u = MatMul(x, W)  v = MatMul(z, W)",
                  kind="float", W=np.ones((4, 2)))  # fmt: skip
    feed = {"x": np.array([[3, 9, 0, 0]], np.float32), "z": np.array([[0, 0, 5, 4]], np.float32)}
    data = data_from(feed)
    outcome = sparsify(graph, data)
    first, second = linears(graph)
    assert first.source is second.source
    assert first.weight()[0].tolist() == [0, 1, 1, 0]
    assert [change.node for change in outcome.changed] == [first.name, second.name]
    assert outcome.facts["weights"] == 8
    assert len(constants(graph)) == 1


@pytest.mark.parametrize("body", [SHARED, "T = Transpose(W)  h = MatMul(x, T)  r = Relu(h)  y = MatMul(r, T)"])
def test_shared_weights_stay_shared(body):
    graph = build(TOKENS, body, kind="float", W=(32, 32))
    sparsify(graph)
    assert [values.shape for values in constants(graph).values()] == [(32, 32)]
    assert all((groups_of(linear) == 2).all() for linear in linears(graph))


def test_two_layouts_get_a_copy_each():
    body = "h = MatMul(x, W)  r = Relu(h)  T = Transpose(W)  y = MatMul(r, T)"
    graph = build(TOKENS, body, kind="float", W=(32, 32))
    sparsify(graph)
    assert all((groups_of(linear) == 2).all() for linear in linears(graph))


def test_a_large_weight_with_another_reader_is_refused():
    signature, body = "(float[N,32] x, int64[N] i) => (float[] y, float[] e)", "e = Gather(W, i)"
    graph = build(signature, f"T = Transpose(W)  y = MatMul(x, T)  {body}", kind="float", W=np.ones((70_000, 32)))
    outcome = sparsify(graph)
    assert not outcome.changed
    assert "would make the file 9.0 MB larger" in reasons(outcome)[0]
    assert outcome.refused[0].code == "its weight has other readers"


# ---- what follows, and what is refused ----------------------------------------------------------------------------


def test_quantization_keeps_the_zeros():
    graph = build(TOKENS, MLP, kind="float", A=(32, 64), B=(64, 32))
    data = data_of(graph)
    graph, steps = pipeline.run(graph, [Sparsify(), Quantize()], Context(data))
    assert [len(step["changed"]) for step in steps] == [2, 2]
    stored = [values for values in constants(graph).values() if values.dtype == np.int8 and values.ndim == 2]
    assert len(stored) == 2
    for values in stored:  # (in, out)
        assert ((values != 0).reshape(-1, 4, values.shape[1]).sum(axis=1) <= 2).all()


def test_refusals():
    body = """
        a = Conv(x, W3)
        b = Conv<group=8>(a, Wd)
        c = Conv<group=2>(b, Wg)
        d = ConvTranspose(c, Wt)
        e = Conv(d, Wi)
        y = Conv(e, W)
    """
    graph = build(
        "(float[N,3,9,9] x) => (float[] y)", body, kind="float", W3=(8, 3, 1, 1), Wd=(8, 1, 1, 1), Wg=(8, 4, 1, 1),
        Wt=(8, 8, 1, 1), Wi=np.full((8, 8, 1, 1), np.inf), W=(8, 8, 1, 1),
    )  # fmt: skip
    *_, last = (node.name for node in graph.nodes)
    outcome = sparsify(graph, exclude=(last,))
    assert [refusal.code for refusal in outcome.refused] == [
        "4 does not divide its 3 input channels",
        "it is depthwise, so that an output has one input channel",
        "no runtime has a sparse ConvTranspose",
        "its weight holds infinities or NaN",
        f"excluded by pattern {last!r}",
    ]
    assert reasons(outcome)[0] == "Conv stays dense: 4 does not divide its 3 input channels"
    assert len(outcome.changed) == 1
    assert "it has groups" in [refusal.code for refusal in sparsify(graph, pattern="block", block=2).refused]


@pytest.mark.parametrize("options", [{}, {"pattern": "block", "block": 8}, {"pattern": "unstructured"}])
def test_a_second_time_there_is_nothing_to_do(options):
    graph = build(TOKENS, MLP, kind="float", A=(32, 64), B=(64, 32))
    data = data_of(graph)
    graph, steps = pipeline.run(graph, [Sparsify(**options), Sparsify(**options)], Context(data))
    assert [len(step["changed"]) for step in steps] == [2, 0]


def test_a_graph_without_weights_is_left_as_it_was():
    graph = build("(float[N,4] x) => (float[] y)", "dead = Neg(x)  y = Relu(x)", kind="float")
    old = listing(graph)
    graph, (step,) = pipeline.run(graph, [Sparsify()], Context())
    assert (step["changed"], step["facts"]["sparsity"], listing(graph)) == ([], 0.0, old)


def test_a_layer_that_no_sample_reaches_stays():
    graph = build(TOKENS, MLP, kind="float", A=(32, 16), B=(16, 16))
    feed = {"x": np.zeros((0, 2, 32), np.float32)}
    data = Data([TensorSpec("x", feed["x"].dtype, (0, 2, 32))], 1, lambda: iter([feed]), "empty")
    outcome = sparsify(graph, data)
    assert {refusal.code for refusal in outcome.refused} == {"no calibration sample reached it"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "2-4"}, "'pattern' is '2-4', expected N:M such as 2:4, 'block' or 'unstructured'. Write 2:4"),
        ({"pattern": "blok"}, "Did you mean 'block'?"),
        ({"pattern": "4:4"}, "Expected N:M with 1 <= N < M <= 64"),
        ({"pattern": "0:4"}, "Expected N:M with 1 <= N < M <= 64"),
        ({"pattern": "2:4", "sparsity": 0.6}, "'sparsity' is 0.6, and 2:4 has one of 0.5. Leave it out"),
        ({"pattern": "2:4", "ratios": "ecoflap"}, "2:4 is the same in every layer"),
        ({"pattern": "block", "block": 1}, "'block' is 1. Expected 2 to 4096"),
        ({"pattern": "block", "sparsity": 1.0}, "'sparsity' is 1. Expected more than 0 and less than 1"),
        ({"pattern": "block", "sparsity": float("nan")}, "'sparsity' is nan"),
        ({"pattern": "block", "max_layer_sparsity": 0.0}, "'max_layer_sparsity' is 0"),
        ({"pattern": "block", "sparsity": 0.9}, "no layer may pass 0.8. Raise 'max_layer_sparsity'"),
        ({"pattern": "unstructured", "ratios": "equal-slope"}, "Equal slopes are for blocks"),
        ({"scores": "wandaa"}, "Did you mean 'wanda'?"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UsageError) as error:
        recipe.make("sparsify", options)
    assert message in str(error.value)


def test_good_options():
    assert Sparsify(sparsity=0.5).group == (2, 4)
    assert Sparsify(pattern="unstructured", sparsity=0.95).sparsity == 0.95
    made = recipe.loads('[[pass]]\nname = "sparsify"\npattern = "block"\nratios = "ecoflap"\n').passes[0]
    assert made == Sparsify(pattern="block", ratios="ecoflap")
    assert recipe.loads(recipe.dumps(recipe.Recipe("x", (Sparsify(),)))).passes == (Sparsify(),)


def test_what_it_is_worth_is_said():
    graph = build(TOKENS, MLP, kind="float", A=(32, 64), B=(64, 32))
    facts = sparsify(graph).facts
    dense, sparse = facts["deflated_bytes"].values()
    assert dense > 0.85 * 4 * facts["weights"]
    assert sparse < 0.75 * dense
    (sentence,) = worth(facts, "2:4")
    assert sentence.startswith("Zeros save no time in ONNX Runtime. TensorRT can use them from SM 80 on")
    assert "TensorRT has no kernels for block" in worth(facts, "block")[0]
    assert feeds(graph)["x"].shape == run(graph, feeds(graph))["y"].shape


def test_the_share_of_zeros_counts_layers_left_dense():
    """B has few tiles, each of them a larger part of it: none goes."""
    graph = build(TOKENS, MLP, kind="float", A=random((32, 64), "A"), B=np.ones((64, 8)))
    outcome = sparsify(graph, pattern="block", block=8, sparsity=0.3)
    assert len(outcome.changed) == 1
    assert outcome.facts["weights"] == 32 * 64 + 64 * 8
    assert outcome.facts["zeros"] == sum(np.count_nonzero(linear.weight() == 0) for linear in linears(graph))
    assert outcome.facts["sparsity"] == pytest.approx(0.3, abs=0.01)
