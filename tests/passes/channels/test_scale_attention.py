"""Scales across attention operators: values to the result, queries against keys, pairs of a rotary embedding."""

from __future__ import annotations

import numpy as np
import pytest

from channelfold.passes import PASSES
from channelfold.passes.base import Context, Refused
from channelfold.passes.channels.rescale import rescale
from channelfold.passes.channels.scale_regions import reach, trace
from channelfold.passes.layers.linear import linears
from channelfold.runtime.data.probes import random_data
from channelfold.runtime.io.facts import required_inputs
from channelfold.runtime.io.shapes import measured_shapes
from channelfold.tests.graphs import assert_same, build, feeds, positive, run

TOKENS = "(float[1,5,8] x) => (float[1,5,3] y)"
QKV = "q = MatMul(x, Wq) k = MatMul(x, Wk) v = MatMul(x, Wv) "
LENGTHS = {"e": np.array([4], np.int32), "n": np.array(5, np.int32)}
GROUPED = "com.microsoft.GroupQueryAttention<num_heads=4, kv_num_heads=2"
TURNED = {"W": (8, 128), "cos": (9, 8), "sin": (9, 8), "Wo": (64, 3)} | LENGTHS


VENDOR = {"opset": 23, "kind": "float", "domains": '"com.microsoft" : 1'}


def make(body, **given):
    return build(TOKENS, body, **VENDOR, **given)


def moved(graph, start: str, feed: dict[str, np.ndarray] | None = None) -> str:
    """Moves a random scale through the region of a tensor; returns its writers and readers, and its classes."""
    feed = feed or feeds(graph)
    region = trace(graph, graph.tensors()[start], -1, measured_shapes(graph, feed))
    before = run(graph, feed)
    assert region.free.all(), region.fixed
    rescale(graph, region, np.exp(np.random.default_rng(0).normal(size=region.size)))
    assert_same(before, run(graph, feed), 1e-5)
    found = sorted(f"{end.role} {end.node.outputs[0].name}" for end in region.ends)
    return f"{', '.join(found)}: {region.size}"


@pytest.mark.parametrize(
    ("node", "values", "scores"),
    [
        ("com.microsoft.MultiHeadAttention<num_heads=2>(q, k, v)", "in y, out v: 32", "out k, out q: 32"),
        (GROUPED + ">(q, k, v, , , e, n)", "in y, out v: 16", "out k, out q: 16"),
        ("Attention<q_num_heads=4, kv_num_heads=2>(q, k, v)", "in y, out v: 16", "out k, out q: 16"),
    ],
)
def test_values_scale_the_result_and_keys_the_queries(node, values, scores):
    narrow = 32 if "Multi" in node else 16
    given = {"Wq": (8, 32), "Wk": (8, narrow), "Wv": (8, narrow), "Wo": (32, 3)} | LENGTHS
    graph = make(f"{QKV} o = {node} y = MatMul(o, Wo)", **given)
    assert (moved(graph, "o"), moved(graph, "k")) == (values, scores)
    assert moved(graph, "q") == scores


@pytest.mark.parametrize("interleaved", [0, 1])
def test_pairs_of_packed_and_turned_keys_have_one_scale(interleaved):
    node = f"{GROUPED}, do_rotary=1, rotary_interleaved={interleaved}>(p, , , , , e, n, cos, sin)"
    graph = make(f"p = MatMul(x, W) o = {node} y = MatMul(o, Wo)", **TURNED)
    pairs, values = 2 * 16 // 2, 2 * 16
    assert moved(graph, "o") == moved(graph, "p") == f"in y, out p: {pairs + values}"


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("turned", [4, 8])
def test_a_rotary_embedding_mixes_pairs(interleaved, turned):
    options = f"interleaved={interleaved}, num_heads=2, rotary_embedding_dim={turned % 8}"
    body = QKV + "a = Reshape(q, s) b = Transpose<perm=[0,2,1,3]>(a) c = Reshape(k, s) d = Transpose<perm=[0,2,1,3]>(c)"
    body += f"g = RotaryEmbedding<{options}>(b, cos, sin) h = RotaryEmbedding<{options}>(d, cos, sin)"
    body += "i = Reshape(v, s) j = Transpose<perm=[0,2,1,3]>(i) o4 = Attention(g, h, j)"
    body += "ot = Transpose<perm=[0,2,1,3]>(o4) o = Reshape(ot, back) y = MatMul(o, Wo)"
    half = turned // 2
    given = {"s": np.array([0, 0, 2, 8]), "back": np.array([0, 0, 16]), "Wo": (16, 3)}
    graph = make(body, Wq=(8, 16), Wk=(8, 16), Wv=(8, 16), cos=(1, 5, half), sin=(1, 5, half), **given)
    assert moved(graph, "k") == moved(graph, "q") == f"out k, out q: {16 - turned}"


def test_an_embedding_with_a_norm_takes_a_scale():
    body = "i = Cast<to=6>(x) e, z = com.microsoft.EmbedLayerNormalization(i, , words, places, , g, b)"
    body += " y = MatMul(e, Wo)"
    given = {"words": (9, 8), "places": (4, 8), "g": positive(8), "b": 8, "Wo": (8, 3)}
    graph = build("(float[1,4] x) => (float[1,4,3] y)", body, **VENDOR, **given)
    assert moved(graph, "e", {"x": np.array([[1, 4, 0, 8]], np.float32)}) == "in y, norm e: 8"


@pytest.mark.parametrize("op", ["quantize", "smooth", "sparsify"])
def test_a_weight_inside_attention_is_refused_by_name(op):
    graph = make("o = com.microsoft.Attention<num_heads=2>(x, W, b) y = MatMul(o, Wo)", W=(8, 96), b=96, Wo=(32, 3))
    outcome = PASSES[op]().apply(graph, Context(calibration=random_data(required_inputs(graph), 2)))
    (refused,) = (refusal for refusal in outcome.refused if refusal.node == graph.nodes[0].name)
    assert refused.reason.endswith("its weight has a form that only Attention reads")


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        ("com.microsoft.MultiHeadAttention<num_heads=2>(q, k, v, b)", "MultiHeadAttention has a cache or a bias"),
        (
            "com.microsoft.Attention<num_heads=2>(x, W, b)",
            "Attention holds the weights of its queries, keys and values",
        ),
    ],
)
def test_what_cannot_take_a_scale_is_refused_by_name(node, reason):
    given = {"Wq": (8, 32), "Wk": (8, 32), "Wv": (8, 32), "Wo": (32, 3), "W": (8, 96), "b": 96}
    graph = make(f"{QKV} o = {node} y = MatMul(o, Wo)", **given)
    with pytest.raises(Refused, match=reason):
        reach(graph, linears(graph)[-1], measured_shapes(graph, feeds(graph)), allow_insert=False)
