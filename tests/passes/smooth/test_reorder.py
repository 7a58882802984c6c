from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from channelfold.passes import pipeline
from channelfold.passes.base import Context
from channelfold.passes.recipe import make
from channelfold.passes.smooth import ReorderChannels
from channelfold.passes.smooth.reorder import block_floating_point
from channelfold.runtime.io.files import check
from channelfold.tests.graphs import assert_same, build, changes, constants, feeds, listing, random, reasons, run

PROJECTED = """
    q0 = MatMul(x, Q)
    q1 = Add(q0, bq)
    k0 = MatMul(x, K)
    k1 = Add(k0, bk)
    v0 = MatMul(x, V)
    v1 = Add(v0, bv)"""
FUSED = "qkv0 = MatMul(x, W)  qkv = Add(qkv0, b)  q1, k1, v1 = Split<axis=-1>(qkv, sizes)"
SPLIT_HEADS = """
    q2 = Reshape(q1, q_shape)
    k2 = Reshape(k1, k_shape)
    v2 = Reshape(v1, k_shape)
    q = Transpose<perm=[0,2,1,3]>(q2)
    v = Transpose<perm=[0,2,1,3]>(v2)
    kt = Transpose<perm=[0,2,3,1]>(k2)"""
GROUPED = """
    kt1 = Unsqueeze(kt, two)
    kt2 = Expand(kt1, k_expand)
    keys = Reshape(kt2, k_flat)
    va = Unsqueeze(v, two)
    vb = Expand(va, v_expand)
    values = Reshape(vb, v_flat)"""
WHOLE = "\n queries = Identity(q)\n keys = Identity(kt)\n values = Identity(v)"
ATTENTION = """
    l = MatMul(queries, keys)
    s = Mul(l, scale)
    p = Softmax<axis=-1>(s)
    a = MatMul(p, values)
    a1 = Transpose<perm=[0,2,1,3]>(a)
    a2 = Reshape(a1, o_shape)
    y = MatMul(a2, O)
"""
PACKED = """
    qkv0 = MatMul(x, W)
    qkv1 = Add(qkv0, b)
    qkv2 = Reshape(qkv1, packed)
    qkv = Transpose<perm=[2,0,3,1,4]>(qkv2)
    queries = Gather<axis=0>(qkv, zero)
    k = Gather<axis=0>(qkv, one)
    values = Gather<axis=0>(qkv, two)
    keys = Transpose<perm=[0,1,3,2]>(k)"""


def attention(heads=4, groups=2, size=8, *, body=None, inputs="", outputs="", **more):
    """Self-attention over x [N, 5, 16]: ``heads`` heads of queries, ``groups`` of keys and values."""
    wide, narrow = heads * size, groups * size
    if body is None:
        body = PROJECTED + SPLIT_HEADS + "\n queries = Identity(q)" + (GROUPED if groups != heads else "")
        body += "" if groups != heads else "\n keys = Identity(kt)\n values = Identity(v)"
    body += ATTENTION
    repeat = heads // groups
    given = {
        "Q": (16, wide), "K": planted((16, narrow), "K"), "V": planted((16, narrow), "V"), "O": (wide, 16),
        "W": planted((16, wide + 2 * narrow), "W"), "b": wide + 2 * narrow, "bq": wide, "bk": narrow, "bv": narrow,
        "scale": size**-0.5, "q_shape": np.array([0, 0, heads, size]), "k_shape": np.array([0, 0, groups, size]),
        "o_shape": np.array([0, 0, wide]), "sizes": np.array([wide, narrow, narrow]),
        "packed": np.array([0, 0, 3, heads, size]), "zero": np.array(0), "one": np.array(1),
        "two": np.array(2) if "Gather" in body else np.array([2]),
        "k_expand": np.array([1, 1, repeat, 1, 1]), "v_expand": np.array([1, 1, repeat, 1, 1]),
        "k_flat": np.array([0, heads, size, -1]), "v_flat": np.array([0, heads, -1, size]),
    } | more  # fmt: skip
    used = {word.strip("(), ") for word in body.replace("(", " ").split()}
    signature = f"(float[N,5,16] x{inputs}) => (float[] y{outputs})"
    kind = more.pop("kind", "double")
    return build(signature, body, kind=kind, **{k: v for k, v in given.items() if k in used})


def planted(shape, name) -> np.ndarray:
    """A random weight whose output channels have very different magnitudes."""
    return random(shape, name) * np.exp2(6 * random(shape[1], name + "sizes"))


def reorder(graph):
    """Applies the pass and asserts that the function stays, as does every node."""
    feed, text = feeds(graph), listing(graph)
    before = run(graph, feed)
    outcome = ReorderChannels().apply(graph, Context())
    check(graph)
    assert_same(before, run(graph, feed))
    assert listing(graph) == text
    assert not ReorderChannels().apply(graph, Context()).changed
    return outcome


def head_norms(weight, heads) -> np.ndarray:
    return np.linalg.norm(weight, axis=0).reshape(heads, -1)


# ---- what is sorted ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1), (6, 2)])
def test_keys_and_values_are_sorted_within_each_head(heads, groups):
    graph = attention(heads, groups)
    old = constants(graph)
    outcome = reorder(graph)
    new = constants(graph)
    for name, bias in (("K", "bk"), ("V", "bv")):
        norms = head_norms(new[name], groups)
        assert (np.diff(norms) <= 0).all()
        order = np.argsort(-head_norms(old[name], groups), axis=1) + 8 * np.arange(groups)[:, None]
        np.testing.assert_array_equal(new[name], old[name][:, order.reshape(-1)])
        np.testing.assert_array_equal(new[bias], old[bias][order.reshape(-1)])
        other = (order.reshape(groups, 1, 8) - 8 * np.arange(groups)[:, None, None]).repeat(heads // groups, axis=1)
        other = (other.reshape(heads, 8) + 8 * np.arange(heads)[:, None]).reshape(-1)
        if name == "K":
            np.testing.assert_array_equal(new["Q"], old["Q"][:, other])
            np.testing.assert_array_equal(new["bq"], old["bq"][other])
        else:
            np.testing.assert_array_equal(new["O"], old["O"][other])
    assert [what.split(";")[0] for what in changes(outcome)] == [
        f"keys, {groups} heads of 8 channels sorted", f"values, {groups} heads of 8 channels sorted"
    ]  # fmt: skip
    assert [change.node for change in outcome.changed] == [n.name for n in graph.nodes if n.outputs[0].name in "la"]


def test_logits_are_equal():
    graph = attention(outputs=", float[] l")
    reorder(graph)


@pytest.mark.parametrize("body", [FUSED + SPLIT_HEADS + "\n queries = Identity(q)" + GROUPED, PACKED])
def test_one_weight_for_queries_keys_and_values(body):
    groups = 4 if body is PACKED else 2
    graph = attention(4, groups, body=body)
    old = constants(graph)["W"]
    outcome = reorder(graph)
    new = constants(graph)["W"]
    assert len(outcome.changed) == 2
    for start in (32, 32 + 8 * groups):
        part = slice(start, start + 8 * groups)
        assert (np.diff(head_norms(new[:, part], groups)) <= 0).all()
        assert (np.diff(head_norms(old[:, part], groups)) > 0).any()


def test_a_bias_behind_the_split_into_heads():
    body = (PROJECTED + SPLIT_HEADS + WHOLE).replace("keys = Identity(kt)", "keys = Add(kt, late)")
    graph = attention(4, 4, body=body, late=(1, 4, 8, 1))
    old = constants(graph)["late"]
    assert len(reorder(graph).changed) == 2
    assert (constants(graph)["late"] != old).any()


def test_heads_that_a_gather_repeats():
    body = PROJECTED + SPLIT_HEADS + "\n queries = Identity(q)\n keys = Gather<axis=1>(kt, twice)"
    graph = attention(4, 2, body=body + "\n values = Gather<axis=1>(v, twice)", twice=np.array([0, 0, 1, 1]))
    assert len(reorder(graph).changed) == 2


@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from([2, 5, 16]))
def test_any_number_of_heads(groups, repeat, size):
    outcome = reorder(attention(groups * repeat, groups, size))
    assert not outcome.refused
    for site in outcome.facts["sites"]:
        assert site["heads"] == [groups, size]


def test_blocks_lose_less():
    outliers = np.where(np.arange(64) % 8 == 3, 30.0, 1.0)
    sites = reorder(attention(4, 2, 32, K=random((16, 64), "K") * outliers, V=random((16, 64), "V") * outliers))
    for site in sites.facts["sites"]:
        before, after = site["bfp_error"]
        assert after < before
        for largest, middle, smallest in site["norms"]:
            assert largest > 10 * middle > 10 * smallest


def test_the_pipeline_verifies_it():
    graph = attention(kind="float")
    graph, (record,) = pipeline.run(graph, [make("reorder-channels", {})], Context())
    assert len(record["changed"]) == 2
    assert record["verified"]["max_rel_error"] < 1e-5  # of sums in another order, through a softmax


def test_a_shared_weight_stays_with_its_other_reader():
    body = PROJECTED.replace("k0 = MatMul(x, K)", "k0 = MatMul(x, V)") + SPLIT_HEADS
    graph = attention(4, 4, body=body + WHOLE)
    feed = feeds(graph)
    before = run(graph, feed)
    assert len(ReorderChannels().apply(graph, Context()).changed) == 2
    assert_same(before, run(graph, feed))


def test_no_attention_is_nothing_to_do():
    graph = build("(float[N,5,16] x) => (float[] y)", "h = MatMul(x, W)\n y = Relu(h)", W=(16, 8))
    outcome = reorder(graph)
    assert (outcome.changed, outcome.refused) == ([], [])


# ---- refusals ----------------------------------------------------------------------------------------------------


def rotary(x, result):
    return f"""
    {x}_left = Slice({x}, start, middle, last)
    {x}_right = Slice({x}, middle, end, last)
    {x}_turned = Neg({x}_right)
    {x}_half = Concat<axis=-1>({x}_turned, {x}_left)
    {x}_cos = Mul({x}, cos)
    {x}_sin = Mul({x}_half, sin)
    {result} = Add({x}_cos, {x}_sin)"""


def test_rotary_tables_are_shared_by_all_heads():
    body = PROJECTED + SPLIT_HEADS.replace("kt = Transpose<perm=[0,2,3,1]>(k2)", "k = Transpose<perm=[0,2,1,3]>(k2)")
    body += rotary("q", "queries") + rotary("k", "kr")
    body += "\n keys = Transpose<perm=[0,1,3,2]>(kr)\n values = Identity(v)"
    slices: dict[str, Any] = {
        "start": np.array([0]),
        "middle": np.array([4]),
        "end": np.array([8]),
        "last": np.array([-1]),
    }
    graph = attention(4, 4, body=body, inputs=", float[1,1,5,8] cos, float[1,1,5,8] sin", **slices)
    outcome = reorder(graph)
    assert [what.split(",")[0] for what in changes(outcome)] == ["values"]
    (reason,) = reasons(outcome)
    assert reason.startswith("MatMul: Mul combines its channels with '")
    assert reason.endswith("', as rotary embeddings do")


@pytest.mark.parametrize(
    ("change", "more", "reason"),
    [
        (("queries = Identity(q)", "queries = Mul(q, per_channel)"), {"per_channel": (8,)},
         "MatMul: Mul scales the channels of its heads"),
        (("queries = Identity(q)", "queries = LayerNormalization(q, gamma)"), {"gamma": (8,)},
         "MatMul: LayerNormalization"),
        (("queries = Identity(q)", "queries = Softmax<axis=-1>(q)"), {}, "MatMul: Softmax"),
        (("queries = Identity(q)", "queries = Gather<axis=3>(q, mixed)"), {"mixed": np.arange(8)[::-1].copy()},
         "MatMul: "),
    ],
)  # fmt: skip
def test_what_has_an_order_of_its_own_is_refused(change, more, reason):
    graph = attention(4, 4, body=(PROJECTED + SPLIT_HEADS + WHOLE).replace(*change), **more)
    outcome = reorder(graph)
    assert [what.split(",")[0] for what in changes(outcome)] == ["values"]
    (found,) = reasons(outcome)
    assert found.startswith(reason), found


def test_a_cache_that_is_an_output_keeps_its_order():
    graph = attention(4, 4, body=PROJECTED + SPLIT_HEADS + WHOLE, outputs=", float[] kt, float[] v")
    assert reasons(reorder(graph)) == ["MatMul: it is an output of the graph"] * 2


# ---- block floating point ----------------------------------------------------------------------------------------


def test_block_floating_point_by_hand():
    # The exponent of 12 is 3, so that 4 bits step by 1; 15 is the largest value. A second block has steps of 1/8.
    values = np.array([12.0, 0.4, -15.9, 3.5, 1.0, -0.2])
    assert block_floating_point(values, block=4, mantissa=4).tolist() == [12, 0, -15, 4, 1, -0.25]
    assert block_floating_point(np.zeros(5)).tolist() == [0] * 5


@given(st.lists(st.floats(-1e3, 1e3).filter(lambda v: v == 0 or abs(v) > 1e-3), min_size=1, max_size=40))
def test_a_step_is_the_largest_error(values):
    values = np.array(values)
    rounded = block_floating_point(values, block=8, mantissa=4)
    for start in range(0, len(values), 8):
        block = slice(start, start + 8)
        step = np.exp2(np.floor(np.log2(np.abs(values[block]).max(initial=1e-3)))) / 8
        assert (np.abs(rounded[block] - values[block]) <= step).all()
