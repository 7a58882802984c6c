"""Clipped weights: the limits against a direct search, what gets better, and what is left alone."""

from __future__ import annotations

import json

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from channelfold.passes.base import Context, Outcome
from channelfold.passes.layers.quantization_error import Bits
from channelfold.passes.quantize import ClipWeights
from channelfold.passes.quantize.clip import clipped_matrix, score_projections
from channelfold.runtime.data.sources import Data
from channelfold.runtime.errors import DataError, UsageError
from channelfold.runtime.io.files import check
from channelfold.runtime.io.session import TensorSpec
from channelfold.tests.graphs import build, changes, constants, data_from, feeds, listing, random, reasons, run, samples

TOKENS = "(float[N,T,32] x) => (float[] y)"


def clip(graph: gs.Graph, step: ClipWeights | None = None, data: Data | None = None) -> Outcome:
    outcome = (step or ClipWeights(group_size=16)).apply(graph, Context(calibration=data or samples(graph)))
    check(graph)
    json.dumps(outcome.facts)
    assert [site["node"] for site in outcome.facts["sites"]] == [change.node for change in outcome.changed]
    assert all(site["output_snr_db"][1] > site["output_snr_db"][0] for site in outcome.facts["sites"])
    return outcome


def planted(shape: tuple[int, int], name: str, factor: float = 6.0) -> np.ndarray:
    """A weight (in, out) in which one of 16 neighbours is an outlier."""
    weight = random(shape, name) / 8
    weight[::16] *= factor
    return weight


def error_of(weight: np.ndarray, rows: np.ndarray, bits: Bits, old: np.ndarray) -> float:
    """Of a weight (out, in) quantized, as a share of the outputs of the old one."""
    lost = rows @ (bits.format.rounded(weight.astype(np.float32)) - old.astype(np.float32)).T
    return float(np.square(lost).sum() / np.square(rows @ old.T).sum())


@pytest.mark.parametrize("group", [0, 8, 12, 64])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_limits_are_those_of_a_direct_search(bits, group):
    """Ten limits for every output row and group, tried one by one."""
    kind = Bits(0, bits, group)
    weight = (random((7, 40), "w") * np.exp(random((7, 40), "e"))).astype(np.float32)
    rows, weights = random((50, 40), "rows").astype(np.float32), np.linspace(1, 5, 50)
    found, _, _, _ = clipped_matrix(weight, rows, weights, kind)
    size = min(group, 40) or 40
    for row in range(7):
        for start in range(0, 40, size):
            part = weight[row : row + 1, start : start + size]
            inputs, peak = rows[:, start : start + size], np.abs(part).max()
            costs = []
            for i in range(10):
                limit = peak * np.float32(1 - i / 20)
                lost = Bits(0, bits, group and part.shape[1]).format.rounded(np.clip(part, -limit, limit)) - part
                costs.append(float(weights @ np.square(inputs @ lost[0])))
            limit = peak * np.float32(1 - int(np.argmin(costs)) / 20)
            expected = np.clip(part[0], -limit, limit)
            np.testing.assert_allclose(found[row, start : start + size], expected, rtol=1e-6)


@pytest.mark.parametrize("chunk", [1, 1000, 1 << 22])
def test_chunks_of_rows_change_nothing(chunk, monkeypatch):
    monkeypatch.setattr("channelfold.passes.quantize.clip._CHUNK", chunk)
    weight, rows = planted((32, 24), "w").T, random((64, 32), "rows").astype(np.float32)
    new, before, after, share = clipped_matrix(weight, rows, np.ones(64), Bits(0, 3, 16))
    assert 0 < after < before
    assert 0 < share <= 1
    monkeypatch.undo()
    whole = clipped_matrix(weight, rows, np.ones(64), Bits(0, 3, 16))
    np.testing.assert_array_equal(new, whole[0])
    assert (before, after, share) == pytest.approx(whole[1:], rel=1e-5)


@pytest.mark.parametrize("weight_bits", [3, 4])
@pytest.mark.parametrize("group", [16, 0])
def test_planted_outliers_cost_less(weight_bits, group):
    """The error of the quantized outputs on other rows: outliers read quiet channels, which is what clipping is for."""
    quiet = np.ones(32)
    quiet[::16] = 0.1
    body = "z = Mul(x, quiet)\n y = MatMul(z, W)"
    graph = build(TOKENS, body, kind="float", quiet=quiet, W=planted((32, 48), "W"))
    outcome = clip(graph, ClipWeights(weight_bits, group), samples(graph, 64))
    old, new = planted((32, 48), "W").T, constants(graph)["W"].T
    rows, bits = (random((500, 32), "others") * quiet).astype(np.float32), Bits(0, weight_bits, group)
    before, after = (error_of(weight, rows, bits, old) for weight in (old, new))
    assert after < 0.75 * before
    (site,) = outcome.facts["sites"]
    assert site["output_snr_db"] == pytest.approx([-10 * np.log10(before), -10 * np.log10(after)], abs=1.0)
    assert 0.5 < site["clipped_groups"] <= 1
    assert "of the groups clipped, output " in changes(outcome)[0]
    assert np.abs(new).max() < np.abs(old).max()
    assert (np.sign(new) == np.sign(old.astype(np.float32))).all()


def test_groups_that_gain_nothing_keep_their_values():
    """The first 16 inputs are on the grid of four bits already; the others are not."""
    weight = planted((32, 48), "W", 12.0)
    weight[:16] = np.arange(16)[:, None] - 7.0
    graph = build(TOKENS, "y = MatMul(x, W)", W=weight)
    clip(graph)
    new = constants(graph)["W"]
    np.testing.assert_array_equal(new[:16], weight[:16])
    assert not np.array_equal(new[16:], weight[16:])


def test_a_site_that_gains_nothing_is_refused_and_stays():
    weight = np.tile(np.arange(16) - 7.0, 2)[:, None].repeat(48, axis=1)
    graph = build(TOKENS, "y = MatMul(x, W)", kind="float", W=weight)
    assert reasons(clip(graph)) == ["MatMul stays as it is: clipping does not make its quantized outputs better"]
    np.testing.assert_array_equal(constants(graph)["W"], weight.astype(np.float32))


def test_inputs_that_are_always_zero_are_no_reason_to_clip():
    graph = build(TOKENS, "z = Mul(x, zero)\n y = MatMul(z, W)", kind="float", zero=0.0, W=planted((32, 48), "W"))
    assert reasons(clip(graph)) == ["MatMul stays as it is: clipping does not make its quantized outputs better"]


@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        ("y = MatMul(x, W)", {"W": (32, 48)}),
        ("V = Transpose<perm=[1,0]>(W)\n y = MatMul(x, V)", {"W": (48, 32)}),
        ("r = Reshape(x, s)\n y = Gemm<transB=1,alpha=-0.5,beta=2.0>(r, W, b)", {"W": (48, 32), "b": 48}),
        ("t = Transpose<perm=[0,2,1]>(x)\n y = Conv(t, W, b)", {"W": (48, 32, 1), "b": 48}),
    ],
)
def test_every_form_keeps_its_bias(text, shapes):
    """The outputs change by what was clipped, and by nothing else."""
    weight = planted((32, 48), "W") if shapes["W"][0] == 32 else planted((32, 48), "W").T
    graph = build(
        TOKENS, text, kind="float", s=np.array([-1, 32]), **shapes | {"W": weight.reshape(shapes["W"])}
    )  # fmt: skip
    feed = feeds(graph)
    before = run(graph, feed)["y"]
    assert len(clip(graph).changed) == 1
    new = constants(graph)
    (name,) = (name for name in new if name.startswith("W"))
    old = weight.reshape(shapes["W"]) * (-0.5 if "alpha" in text else 1.0)
    lost = (new[name] - (old.T if "Transpose<perm=[1,0]>" in text else old)).reshape(new[name].shape)
    lost = lost.reshape(lost.shape[:2])
    lost = lost if lost.shape == (48, 32) else lost.T
    expected = feed["x"].reshape(-1, 32) @ lost.T
    found = run(graph, feed)["y"] - before
    found = found.transpose(0, 2, 1) if "Conv" in text else found
    assert np.abs(found.reshape(-1, 48) - expected).max() <= 1e-5 * np.abs(before).max()


def test_float16_weights_keep_their_type():
    graph = build(TOKENS, "y = MatMul(x, W)", kind="float16", W=planted((32, 48), "W"))
    assert len(clip(graph).changed) == 1
    assert constants(graph)["W"].dtype == np.float16


# ---- what is left alone --------------------------------------------------------------------------------------------

ATTENTION = """
    q = MatMul(x, Q) k = MatMul(x, K) v = MatMul(x, V)
    q1 = Reshape(q, s) k1 = Reshape(k, s) v1 = Reshape(v, s)
    n = LayerNormalization(q1, g)
    q2 = Transpose<perm=[0,2,1,3]>(n) k2 = Transpose<perm=[0,2,3,1]>(k1) v2 = Transpose<perm=[0,2,1,3]>(v1)
    a = MatMul(q2, k2) d = Div(a, eight) m = Add(d, d) p = Softmax<axis=-1>(m) c = MatMul(p, v2)
    o1 = Transpose<perm=[0,2,1,3]>(c) o2 = Reshape(o1, t) o = MatMul(o2, O) r = Add(o, x)
    h = MatMul(r, F) e = Relu(h) f = MatMul(e, G) y = Add(f, r)
"""


def attention() -> gs.Graph:
    weights = {name: planted((32, 32), name) for name in "QKVOFG"}
    shapes = {"s": np.array([0, 0, 4, 8]), "t": np.array([0, 0, 32])}
    return build(TOKENS, ATTENTION, kind="float", g=8, eight=8.0, **weights, **shapes)


def test_projections_of_queries_and_keys_are_left_alone():
    graph = attention()
    outcome = clip(graph)
    assert reasons(outcome)[:2] == ["MatMul stays as it is: it projects queries or keys"] * 2
    assert [refusal.node for refusal in outcome.refused[:2]] == ["MatMul_0", "MatMul_1"]
    old = attention()
    for name in "QK":
        np.testing.assert_array_equal(constants(graph)[name], constants(old)[name])
    assert {change.node for change in outcome.changed} == {"MatMul_2", "MatMul_17", "MatMul_19", "MatMul_21"}
    assert listing(graph) == listing(old)


def test_a_fused_projection_is_left_alone():
    body = """
        p = MatMul(x, W) q, k, v = Split<axis=2>(p, s) t = Transpose<perm=[0,2,1]>(k)
        a = MatMul(q, t) m = Softmax<axis=-1>(a) c = MatMul(m, v) y = MatMul(c, O)
    """
    graph = build(TOKENS, body, kind="float", W=(32, 96), O=planted((32, 32), "O"), s=np.array([32, 32, 32]))
    outcome = clip(graph)
    assert reasons(outcome) == [
        "MatMul stays as it is: it projects queries or keys",
        "MatMul stays as it is: it multiplies two activations",
        "MatMul stays as it is: it multiplies two activations",
    ]


def test_what_attention_operators_read():
    body = "q = MatMul(x, Q) k = MatMul(x, K) v = MatMul(x, V) c = Attention<q_num_heads=4,kv_num_heads=4>(q, k, v)\n"
    graph = build(TOKENS, f"{body} y = MatMul(c, O)", opset=23, kind="float", **dict.fromkeys("QKVO", (32, 32)))
    names = {node.name for node in graph.nodes if id(node) in score_projections(graph)}
    assert names == {"MatMul_0", "MatMul_1"}


def test_what_has_no_product_of_activations_has_no_queries():
    graph = build(TOKENS, "h = MatMul(x, A) g = MatMul(x, B) m = Mul(h, g) y = MatMul(m, C)", kind="float",
                  A=(32, 32), B=(32, 32), C=(32, 32))  # fmt: skip
    assert score_projections(graph) == set()


def test_kernels_groups_and_patterns():
    body = "c = Conv(x, A) d = Conv<group=4>(c, B) e = Conv(d, C) y = Conv(e, D)"
    graph = build(
        "(float[N,16,6,6] x) => (float[] y)",
        body,
        kind="float",
        A=(16, 16, 3, 3),
        B=(16, 4, 1, 1),
        C=planted((16, 16), "C").reshape(16, 16, 1, 1),
        D=planted((16, 16), "D").reshape(16, 16, 1, 1),
    )
    before = constants(graph)
    outcome = clip(graph, ClipWeights(3, 16, exclude=("nothing", "*_3")))
    assert reasons(outcome)[:3] == [
        "Conv stays as it is: it has a kernel",
        "Conv stays as it is: it has groups",
        "Conv stays as it is: excluded by pattern '*_3'",
    ]
    for name in "ABD":
        assert constants(graph)[name] is before[name]


def test_a_large_tied_weight_is_refused():
    body = "e = Gather(E, i)\n n = LayerNormalization(e, g)\n W = Transpose(E)\n y = MatMul(n, W)"
    embedding = planted((64, 5000), "E").T
    graph = build("(float[1] unused, int64[N,T] i) => (float[] y)", body, kind="float", E=embedding, g=64)
    made = [{"unused": np.zeros(1, np.float32), "i": np.arange(12).reshape(3, 4) + index} for index in range(3)]
    data = data_from(*made)
    assert reasons(clip(graph, data=data)) == [
        "MatMul stays as it is: a new weight for MatMul_3 would make the file 1.3 MB larger "
        "(the old one has other readers or takes fewer bytes)"
    ]


def test_a_small_weight_that_others_read_is_copied():
    graph = build(TOKENS, "h = MatMul(x, W)\n t = Relu(h)\n u = MatMul(t, W)\n z = Add(u, W)\n y = Sigmoid(z)",
                  kind="float", W=planted((32, 32), "W"))  # fmt: skip
    graph.inputs[0].shape = [1, 32, 32]
    clip(graph)
    np.testing.assert_array_equal(constants(graph)["W"], planted((32, 32), "W").astype(np.float32))


def test_a_tensor_that_is_read_along_two_axes():
    graph = build("(float[1,32,32] x) => (float[] a, float[] b)", "a = Conv(x, W)\n b = MatMul(x, V)", kind="float",
                  W=planted((32, 32), "W")[:, :, None], V=planted((32, 32), "V"))  # fmt: skip
    outcome = clip(graph)
    assert reasons(outcome) == ["Conv stays as it is: another node reads its activation along another axis"]
    assert [change.node for change in outcome.changed] == ["MatMul_1"]


def test_what_no_sample_reached():
    graph = build("(float[N,32] x) => (float[] y)", "y = MatMul(x, W)", kind="float", W=planted((32, 32), "W"))
    empty = [{"x": np.zeros((0, 32), np.float32)}]
    data = Data([TensorSpec("x", np.dtype(np.float32), (0, 32))], 1, lambda: iter(empty), "nothing")
    assert reasons(clip(graph, data=data)) == ["MatMul stays as it is: no calibration sample reached it"]


def test_a_second_run_changes_little():
    graph = attention()
    clip(graph)
    before = constants(graph)
    clip(graph)
    for name in "VOFG":
        moved = np.abs(constants(graph)[name] - before[name]).max(initial=0)
        assert moved <= 0.25 * np.abs(before[name]).max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 1}, "'weight_bits' is 1. Expected 2 to 16"),
        ({"weight_bits": 17}, "'weight_bits' is 17. Expected 2 to 16"),
        ({"group_size": -1}, "'group_size' is -1. Expected 0 to 1048576"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UsageError, match=message):
        ClipWeights(**options)


def test_data_are_needed():
    graph = build(TOKENS, "y = MatMul(x, W)", kind="float", W=(32, 32))
    with pytest.raises(DataError, match=r"Clipping weights needs calibration data. Give some with --calibration"):
        ClipWeights().apply(graph, Context())


def test_nan_in_calibration_names_the_tensor():
    graph = build(TOKENS, "h = Log(x)\n y = MatMul(h, W)", kind="float", W=(32, 32))
    with pytest.raises(DataError, match="Activation 'h' of sample 0 cannot be used: it holds NaN"):
        clip(graph)
