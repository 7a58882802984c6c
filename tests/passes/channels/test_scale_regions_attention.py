"""Regions of attention and of gated products: heads, rotary embeddings, queries in groups."""

from __future__ import annotations

import numpy as np
import pytest

from channelfold.passes.channels.region import Region
from channelfold.passes.channels.rescale import rescale
from channelfold.passes.channels.scale_regions import trace
from channelfold.passes.layers.linear import linears
from channelfold.tests.graphs import assert_same, build, feeds, positive, run
from channelfold.tests.passes.channels.scaled import TOKENS, ends, moved, region_of

# ---- attention -----------------------------------------------------------------------------------------------------

SCORES = "kt = Transpose<perm=[0,1,3,2]>(kh)  s0 = MatMul(qh, kt)  s1 = Mul(s0, half)  p = Softmax<axis=-1>(s1)"
OUT = "o0 = MatMul(p, vh)  o1 = Transpose<perm=[0,2,1,3]>(o0)  o2 = Reshape(o1, joined)  y = MatMul(o2, Wo)"
HEADS = "\n".join(
    f"{n} = MatMul(x, W{n})\n {n}r = Reshape({n}, by_head)\n {n}h = Transpose<perm=[0,2,1,3]>({n}r)" for n in "qkv"
)
SHAPES = {"half": 0.5, "by_head": np.array([0, 0, 2, 2]), "joined": np.array([0, 0, 4]), "Wo": (4, 5)}
SEPARATE = {"Wq": (4, 4), "Wk": (4, 4), "Wv": (4, 4)}
FUSED = {
    "Split": (
        "qkv = MatMul(x, W)\n q, k, v = Split<axis=-1>(qkv, thirds)\n"
        + "\n".join(f"{n}r = Reshape({n}, by_head)\n {n}h = Transpose<perm=[0,2,1,3]>({n}r)" for n in "qkv"),
        {"W": (4, 12), "thirds": np.array([4, 4, 4])},
    ),
    "Slice": (
        "qkv = MatMul(x, W)\n q = Slice(qkv, i0, i4, i2)\n k = Slice(qkv, i4, i8, i2)\n v = Slice(qkv, i8, i12, i2)\n"
        + "\n".join(f"{n}r = Reshape({n}, by_head)\n {n}h = Transpose<perm=[0,2,1,3]>({n}r)" for n in "qkv"),
        {"W": (4, 12)} | {f"i{n}": np.array([n]) for n in (0, 2, 4, 8, 12)},
    ),
    "Gather": (
        "qkv = MatMul(x, W)\n r = Reshape(qkv, five)\n t = Transpose<perm=[2,0,3,1,4]>(r)\n"
        + "\n".join(f"{n}h = Gather<axis=0>(t, j{i})" for i, n in enumerate("qkv")),
        {"W": (4, 12), "five": np.array([0, 0, 3, 2, 2])} | {f"j{i}": np.array(i) for i in range(3)},
    ),
    "Slice and Squeeze": (
        "qkv = MatMul(x, W)\n r = Reshape(qkv, five)\n t = Transpose<perm=[2,0,3,1,4]>(r)\n"
        + "\n".join(f"{n}s = Slice(t, i{i}, i{i + 1}, i0)\n {n}h = Squeeze({n}s, i0)" for i, n in enumerate("qkv")),
        {"W": (4, 12), "five": np.array([0, 0, 3, 2, 2])} | {f"i{i}": np.array([i]) for i in range(4)},
    ),
}


def free_classes(region: Region, name: str) -> list[int]:
    """The classes of a tensor, flat, 0 where pinned."""
    (index,) = (index for tensor, index in region.places.values() if tensor.name == name)
    return [int(c) if not region.fixed[abs(c) - 1] else 0 for c in index.reshape(-1)]


def test_v_and_o_of_attention_take_a_scale_and_a_shift():
    region = moved(build(TOKENS, HEADS + SCORES + OUT, **SHAPES, **SEPARATE))
    assert (ends(region), region.size, region.no_shift) == ("in y, out v", 4, "")
    assert free_classes(region, "v") == free_classes(region, "o2") == [1, 2, 3, 4]


@pytest.mark.parametrize("case", FUSED)
def test_v_and_o_of_attention_with_one_weight_for_q_k_and_v(case):
    body, given = FUSED[case]
    region = moved(build(TOKENS, body + SCORES + OUT, **SHAPES, **given))
    assert ends(region) == "in y, out qkv"
    assert free_classes(region, "qkv")[8:] == [1, 2, 3, 4]
    q, k, v = np.split(np.array(free_classes(region, "qkv")), 3)
    assert region.shiftable[v - 1].all()
    assert region.no_shift == ""
    assert (-q).tolist() == k.tolist() == [5, 6, 7, 8] or q.tolist() == (-k).tolist() == [5, 6, 7, 8]
    assert {region.unshifted[abs(c) - 1] for c in q} == {"a shift does not pass MatMul"}


def test_a_shift_needs_rows_that_sum_to_one():
    body = (HEADS + SCORES + OUT).replace("p = Softmax<axis=-1>(s1)", "p = Sigmoid(s1)")
    region = moved(build(TOKENS, body, **SHAPES, **SEPARATE))
    assert (ends(region), region.no_shift) == ("in y, out v", "a shift does not pass MatMul")


@pytest.mark.parametrize(
    ("opset", "axis", "passes"), [(11, "", False), (11, "<axis=3>", True), (13, "", True), (13, "<axis=2>", False)]
)
def test_softmax_sums_to_one_along_its_axis(opset, axis, passes):
    body = (HEADS + SCORES + OUT).replace("<axis=-1>", axis)
    region = region_of(build(TOKENS, body, opset=opset, **SHAPES, **SEPARATE))
    assert (region.no_shift == "") is passes


def test_grouped_queries_by_expand():
    repeat = "{n}u = Unsqueeze({n}h, axis)\n {n}e = Expand({n}u, five)\n {n}x = Reshape({n}e, four)\n"
    body = (
        HEADS
        + "\n"
        + "".join(repeat.format(n=n) for n in "kv")
        + (SCORES + OUT).replace("kh", "kx").replace("vh", "vx")
    )
    given = {
        **SHAPES, "by_head": np.array([0, 0, -1, 2]), "Wq": (4, 8), "Wk": (4, 4), "Wv": (4, 4), "axis": np.array([2]),
        "five": np.array([1, 1, 2, 1, 1]), "four": np.array([0, 4, -1, 2]), "joined": np.array([0, 0, 8]), "Wo": (8, 5),
    }  # fmt: skip
    graph = build(TOKENS, body, **given)
    region = moved(graph)
    assert ends(region) == "in y, out v"
    assert free_classes(region, "o2") == [1, 2, 1, 2, 3, 4, 3, 4]
    region = moved(graph, start="q")
    assert ends(region) == "out k, out q"
    assert free_classes(region, "q") == [1, 2, 1, 2, 3, 4, 3, 4]
    assert free_classes(region, "k") == [-1, -2, -3, -4]


def test_grouped_queries_by_broadcasting():
    body = """
        q = MatMul(x, Wq)
        qr = Reshape(q, heads)
        qh = Transpose<perm=[0,2,3,1,4]>(qr)
        k = MatMul(x, Wk)
        kr = Reshape(k, kv_heads)
        kh = Transpose<perm=[0,2,3,4,1]>(kr)
        v = MatMul(x, Wv)
        vr = Reshape(v, kv_heads)
        vh = Transpose<perm=[0,2,3,1,4]>(vr)
        s = MatMul(qh, kh)
        p = Softmax(s)
        o0 = MatMul(p, vh)
        o1 = Transpose<perm=[0,3,1,2,4]>(o0)
        o2 = Reshape(o1, joined)
        y = MatMul(o2, Wo)
    """
    given = {
        "heads": np.array([0, 0, 2, 2, 2]), "kv_heads": np.array([0, 0, 2, 1, 2]), "joined": np.array([0, 0, 8]),
        "Wq": (4, 8), "Wk": (4, 4), "Wv": (4, 4), "Wo": (8, 5),
    }  # fmt: skip
    graph = build(TOKENS, body, **given)
    region = moved(graph)
    assert (ends(region), free_classes(region, "o2")) == ("in y, out v", [1, 2, 1, 2, 3, 4, 3, 4])
    region = moved(graph, start="k")
    assert (ends(region), free_classes(region, "q")) == ("out k, out q", [-1, -2, -1, -2, -3, -4, -3, -4])


def test_one_head_of_keys_and_values_for_all_queries():
    body = """
        q = MatMul(x, Wq)
        qr = Reshape(q, by_head)
        qh = Transpose<perm=[0,2,1,3]>(qr)
        k = MatMul(x, Wk)
        kt = Transpose<perm=[0,2,1]>(k)
        ku = Unsqueeze(kt, one)
        v = MatMul(x, Wv)
        vh = Unsqueeze(v, one)
        s = MatMul(qh, ku)
        p = Softmax(s)
    """
    given = {**SHAPES, "Wq": (4, 4), "Wk": (4, 2), "Wv": (4, 2), "one": np.array([1])}
    graph = build(TOKENS, body + OUT, **{k: v for k, v in given.items() if k != "half"})
    region = moved(graph)
    assert (ends(region), region.no_shift, free_classes(region, "o2")) == ("in y, out v", "", [1, 2, 1, 2])
    region = moved(graph, start="q")
    assert (free_classes(region, "q"), free_classes(region, "k")) == ([1, 2, 1, 2], [-1, -2])


ROTARY = {
    "halves": (
        "{n}a = Slice({n}h, i0, i2, i3)\n {n}b = Slice({n}h, i2, i4, i3)\n {n}c = Neg({n}b)\n"
        "{n}d = Concat<axis=-1>({n}c, {n}a)",
        [1, 2, 1, 2, 3, 4, 3, 4],
    ),
    "interleaved": (
        "{n}a = Slice({n}h, i0, i4, i3, i2)\n {n}b = Slice({n}h, i1, i4, i3, i2)\n {n}c = Neg({n}b)\n"
        "{n}u = Unsqueeze({n}a, i4)\n {n}v = Unsqueeze({n}c, i4)\n {n}w = Concat<axis=-1>({n}v, {n}u)\n"
        "{n}d = Reshape({n}w, back)",
        [1, 1, 2, 2, 3, 3, 4, 4],
    ),
}


@pytest.mark.parametrize("case", ROTARY)
def test_a_rotary_embedding_ties_pairs_of_channels_of_q_and_k(case):
    form, expected = ROTARY[case]
    rotated = "".join(
        f"\n{form}\n {{n}}e = Mul({{n}}h, cos)\n {{n}}f = Mul({{n}}d, sin)\n {{n}}g = Add({{n}}e, {{n}}f)".format(n=n)
        for n in "qk"
    )
    body = HEADS + rotated + (SCORES + OUT).replace("(kh)", "(kg)").replace("(qh,", "(qg,")
    given = {
        **SHAPES, "by_head": np.array([0, 0, 2, 4]), "joined": np.array([0, 0, 8]), "Wo": (8, 5),
        "Wq": (4, 8), "Wk": (4, 8), "Wv": (4, 8), **{f"i{n}": np.array([n]) for n in range(5)},
    }  # fmt: skip
    if case == "interleaved":
        given["back"] = np.array([0, 2, -1, 4])
    unused = {"halves": "i1", "interleaved": ""}[case]
    given.pop(unused, None)
    signature = "(float[N,T,4] x, float[N,1,T,4] cos, float[N,1,T,4] sin) => (float[] y)"
    graph = build(signature, body, **given)
    region = moved(graph, start="q")
    assert ends(region) == "out k, out q"
    assert free_classes(region, "q") == expected
    assert free_classes(region, "k") == [-c for c in expected]
    assert ends(moved(graph)) == "in y, out v"


def test_a_tensor_times_its_own_transpose_is_scaled_against_itself():
    body = HEADS.replace("k = MatMul(x, Wk)", "k = Identity(q)") + SCORES + OUT
    region = region_of(build(TOKENS, body, **SHAPES, Wq=(4, 4), Wv=(4, 4)), start="q")
    assert set(region.fixed) == {"it is scaled against itself"}


@pytest.mark.parametrize("rank", [3, 4])
def test_the_attention_operator_is_linear_in_its_values(rank):
    body = "q = MatMul(x, Wq)\n k = MatMul(x, Wk)\n v = MatMul(x, Wv)\n"
    given = {"Wq": (4, 8), "Wk": (4, 4), "Wv": (4, 6), "Wo": (12, 5)}
    if rank == 3:
        body += "o = Attention<q_num_heads=4, kv_num_heads=2>(q, k, v)\n y = MatMul(o, Wo)"
    else:
        for n, heads in (("q", 4), ("k", 2), ("v", 2)):
            body += f"{n}r = Reshape({n}, h{heads})\n {n}h = Transpose<perm=[0,2,1,3]>({n}r)\n"
        body += "o0 = Attention(qh, kh, vh)\n o1 = Transpose<perm=[0,2,1,3]>(o0)\n o = Reshape(o1, back)\n"
        body += "y = MatMul(o, Wo)"
        given |= {"h4": np.array([0, 0, 4, -1]), "h2": np.array([0, 0, 2, -1]), "back": np.array([0, 0, 12])}
    graph = build(TOKENS, body, opset=23, **given)
    region = moved(graph)
    assert (ends(region), region.no_shift) == ("in y, out v", "a shift does not pass Attention")
    assert free_classes(region, "o") == [1, 2, 3, 1, 2, 3, 4, 5, 6, 4, 5, 6]
    scores = region_of(graph, start="q")
    assert (ends(scores), scores.fixed) == ("out k, out q", [""] * 4)


def test_multi_head_attention_is_linear_in_its_values():
    body = "q = MatMul(x, Wq)\n v = MatMul(x, Wv)\n o = com.microsoft.MultiHeadAttention<num_heads=2>(q, q, v)\n"
    body += "y = MatMul(o, Wo)"
    graph = build(TOKENS, body, kind="float", domains='"com.microsoft" : 1', Wq=(4, 4), Wv=(4, 4), Wo=(4, 5))
    shapes = dict.fromkeys("xqvo", (2, 2, 4)) | {"y": (2, 2, 5)}
    linear = linears(graph)[-1]
    region = trace(graph, linear.data, -1, shapes)
    assert (ends(region), region.fixed) == ("in y, out v", [""] * 4)
    before = run(graph, feeds(graph))
    rescale(graph, region, positive(4))
    assert_same(before, run(graph, feeds(graph)), 1e-5)


# ---- gated products ------------------------------------------------------------------------------------------------

GATED = {
    "separate": ("g = MatMul(x, Wg)\n u = MatMul(x, Wu)", {"Wg": (4, 6), "Wu": (4, 6)}, "in y, out u"),
    "Split": (
        "f = MatMul(x, W)\n g, u = Split<axis=-1>(f, h)", {"W": (4, 12), "h": np.array([6, 6])}, "in y, out f"
    ),
    "Slice": (
        "f = MatMul(x, W)\n g = Slice(f, a, b, c)\n u = Slice(f, b, e, c)",
        {"W": (4, 12), "a": np.array([0]), "b": np.array([6]), "c": np.array([2]), "e": np.array([12])}, "in y, out f",
    ),
}  # fmt: skip


@pytest.mark.parametrize("product", ["Mul(s, u)", "Mul(u, s)"])
@pytest.mark.parametrize("case", GATED)
def test_up_and_down_around_a_gate(case, product):
    body, given, expected = GATED[case]
    graph = build(
        TOKENS, f"{body}\n z = Sigmoid(g)\n s = Mul(g, z)\n t = {product}\n y = MatMul(t, V)", V=(6, 5), **given
    )
    region = moved(graph)
    assert (ends(region), region.no_shift) == (expected, "a shift does not pass Mul")
    assert free_classes(region, "u") == free_classes(region, "t") == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("product", ["Mul(g, u)", "Mul(u, g)"])
@pytest.mark.parametrize("blocked", ["g", "u"])
def test_where_both_sides_come_from_weights_the_one_that_can_takes_the_scale(product, blocked):
    body = "f = MatMul(x, Wf)\n e = MatMul(x, We)\n g, i = Split<axis=-1>(f, h)\n u, j = Split<axis=-1>(e, h)\n"
    body += f"t = {product}\n z = Sigmoid({blocked})\n w = MatMul(z, V)\n y = MatMul(t, V)"
    graph = build(TOKENS.replace("y", "y, float[] w"), body, Wf=(4, 9), We=(4, 9), h=np.array([6, 3]), V=(6, 5))
    region = moved(graph)
    assert ends(region) == ("in y, out e" if blocked == "g" else "in y, out f")
