"""FFN channels that bypass the activation, folded: by the graph that is left, by the numbers, on real exports."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from channelfold.passes.base import Context, Outcome
from channelfold.passes.ffn import ReparameterizeFfn
from channelfold.passes.fold import FoldAffine, FoldConstants
from channelfold.passes.pipeline import run as run_pipeline
from channelfold.runtime.data.sources import open_data
from channelfold.runtime.io.facts import required_inputs
from channelfold.runtime.io.files import check, load, session
from channelfold.tests.graphs import (
    assert_same,
    build,
    changes,
    constants,
    feeds,
    listing,
    ops,
    positive,
    random,
    reasons,
    run,
)

FOLD, ANY = ReparameterizeFfn(), ReparameterizeFfn(always=True)
TOKENS = "(float[N,5,4] x) => (float[N,5,4] y)"
WIDE = 16  # hidden channels of 4 inputs
NORMS = {f"{p}{n}": values for n, size in ((1, 4), (2, WIDE)) for p, values in
         (("g", positive(size, f"g{n}")), ("e", random(size, f"e{n}")), ("m", random(size, f"m{n}")),
          ("v", positive(size, f"v{n}")))}  # fmt: skip
WEIGHTS = {"W1": (4, WIDE), "b1": WIDE, "W2": (WIDE, 4), "b2": 4}
FC1 = "p = MatMul({0}, W1)\n h = Add(p, b1)"
FC2 = "q = MatMul({0}, W2)\n {1} = Add(q, b2)"
NORM = "{0}t = Transpose<perm=[0,2,1]>({0})\n {0}n = BatchNormalization({0}t, g{1}, e{1}, m{1}, v{1})\n" \
       "{0}b = Transpose<perm=[0,2,1]>({0}n)"  # fmt: skip
REPA = f"""
    {NORM.format("x", 1)}
    {FC1.format("xb")}
    a = Gelu(h)
    w = Where(M, a, h)
    {NORM.format("w", 2)}
    {FC2.format("wb", "z")}
    y = Add(z, x)
"""


def mask(active: int, *, of: int = WIDE, seed: int | None = None, shape: tuple[int, ...] = (1, 1)) -> np.ndarray:
    """True for so many channels, the first ones or random ones."""
    vector = np.arange(of) < active
    if seed is not None:
        vector = np.random.default_rng(seed).permutation(vector)
    return np.broadcast_to(vector, (*shape, of)).copy()


def repa(active: int = 4, **changed) -> dict:
    return {**WEIGHTS, **NORMS, "M": mask(active), **changed}


def folded(body: str, signature: str = TOKENS, *, step: ReparameterizeFfn = FOLD, opset: int = 20, **given):
    """A graph, what the pass did to it, and the constants it had."""
    graph = build(signature, body, opset=opset, **given)
    old = constants(graph)
    return graph, applied(step, graph), old


def applied(step: ReparameterizeFfn, graph: gs.Graph, rtol: float | None = None) -> Outcome:
    """Applies the pass and asserts that the graph is valid, computes the same, and has nothing left to fold.

    It may have one node more: Where and two linears become three linears and an Add.
    """
    feed = feeds(graph)
    before = run(graph, feed)
    outcome = step.apply(graph, Context())
    check(graph)
    assert_same(before, run(graph, feed), rtol)
    assert not step.apply(graph, Context()).changed
    return outcome


# ---- RePaViT, by the algebra ---------------------------------------------------------------------------------------


def test_what_is_left():
    graph, outcome, old = folded(REPA, **repa())
    assert listing(graph) == (
        "MatMul_3_product = MatMul(x, W1_active)\n"
        "MatMul_3_output = Add(MatMul_3_product, MatMul_3_bias)\n"
        "a_active = Gelu(MatMul_3_output)\n"
        "MatMul_10_output = MatMul(a_active, W2_active)\n"
        "MatMul_10_dense_product = MatMul(x, W2_dense)\n"
        "MatMul_10_dense_output = Add(MatMul_10_dense_product, MatMul_10_dense_bias)\n"
        "y = Add(MatMul_10_dense_output, MatMul_10_output)"
    )
    assert changes(outcome) == [
        "12 of 16 channels are idle, now one dense layer, with the shortcut: MACs per position 128 to 48"
    ]
    a1, a2 = (old[f"g{n}"] / np.sqrt(old[f"v{n}"] + 1e-5) for n in (1, 2))
    d1, d2 = (old[f"e{n}"] - old[f"m{n}"] * a for n, a in ((1, a1), (2, a2)))
    f1, c1 = old["W1"].T * a1, old["b1"] + old["W1"].T @ d1
    f2, c2 = old["W2"].T * a2, old["b2"] + old["W2"].T @ d2
    new = constants(graph)
    expected = {
        "W1_active": f1[:4].T, "MatMul_3_bias": c1[:4], "W2_active": f2[:, :4].T,
        "W2_dense": (np.eye(4) + f2[:, 4:] @ f1[4:]).T, "MatMul_10_dense_bias": c2 + f2[:, 4:] @ c1[4:],
    }  # fmt: skip
    assert new.keys() == expected.keys()
    for name, values in expected.items():
        assert new[name] == pytest.approx(values, rel=1e-6), name  # epsilon is a float32 in the graph


def test_no_active_channel_leaves_one_dense_layer():
    graph, outcome, _ = folded(REPA, **repa(0))
    assert listing(graph) == "MatMul_10_product = MatMul(x, W2_dense)\ny = Add(MatMul_10_product, MatMul_10_bias)"
    assert changes(outcome)[0].endswith("MACs per position 128 to 16")


def test_no_idle_channel_leaves_nothing_to_do():
    _, outcome, _ = folded(REPA, **repa(WIDE))
    assert (outcome.changed, outcome.refused) == ([], [])


@pytest.mark.parametrize(("active", "folds"), [(13, False), (14, False), (12, True)])
def test_too_few_idle_channels_save_nothing(active, folds):
    """theta > 1 / (2 rho): more than 2 of 16 channels."""
    _, outcome, _ = folded(REPA, **repa(active + 1))
    assert bool(outcome.changed) == folds
    if not folds:
        macs = (active + 1) * 8 + 16
        assert reasons(outcome) == [
            f"MatMul: folding {15 - active} idle of 16 channels would take the MACs per position from 128 to {macs}"
        ]
        _, outcome, _ = folded(REPA, step=ANY, **repa(active + 1))
        assert outcome.changed


def test_any_set_of_channels():
    graph, outcome, _ = folded(REPA, **repa(M=mask(5, seed=3)))
    assert constants(graph)["W1_active"].shape == (4, 5)
    assert "11 of 16" in changes(outcome)[0]


# ---- the same thing said otherwise ---------------------------------------------------------------------------------

INDEX = np.random.default_rng(5).permutation(WIDE)
KEPT = np.sort(INDEX[:4])
MIXES = {
    "pads": ("s = Slice(h, i0, i4, ax)\n r = Slice(h, i4, i16, ax)\n a = Relu(s)\n a0 = Pad(a, behind)\n"
             "r0 = Pad(r, before)\n w = Add(a0, r0)", {}),
    "where": ("a = Relu(h)\n w = Where(M, a, h)", {"M": mask(4, seed=1)}),
    "where, the other way": ("a = Relu(h)\n w = Where(M, h, a)", {"M": ~mask(4, seed=1)}),
    "where, a full mask": ("a = Relu(h)\n w = Where(M, a, h)", {"M": mask(4, seed=1, shape=(3, 5))}),
    "where, a vector": ("a = Relu(h)\n w = Where(M, a, h)", {"M": mask(4, seed=1)[0, 0]}),
    "slices": ("s = Slice(h, i0, i4, ax)\n r = Slice(h, i4, i16, ax)\n a = Relu(s)\n w = Concat<axis=-1>(a, r)", {}),
    "split": ("s, r = Split<axis=2>(h, sizes)\n a = Relu(s)\n w = Concat<axis=2>(a, r)", {}),
    "split, idle ones first": ("r, s = Split<axis=2>(h, back)\n a = Relu(s)\n w = Concat<axis=2>(r, a)", {}),
    "split, changing places": ("s, r = Split<axis=2>(h, sizes)\n a = Relu(s)\n w = Concat<axis=2>(r, a)", {}),
    "gather": ("o = Gather<axis=2>(h, index)\n s, r = Split<axis=2>(o, sizes)\n a = Relu(s)\n"
               "c = Concat<axis=2>(a, r)\n w = Gather<axis=2>(c, inverse)", {}),
    "scatter": ("t = Transpose<perm=[2,0,1]>(h)\n s = Gather<axis=0>(t, kept)\n a = Relu(s)\n"
                "v = ScatterND(t, places, a)\n w = Transpose<perm=[1,2,0]>(v)", {}),
    "blend": ("a = Relu(h)\n p1 = Mul(a, m)\n p2 = Mul(h, n)\n w = Add(p1, p2)", {}),
    "step": ("a = Relu(h)\n d = Sub(a, h)\n p1 = Mul(d, m)\n w = Add(h, p1)", {}),
    "masked twice": ("a = Relu(h)\n v = Where(M, a, h)\n w = Where(M, v, h)", {"M": mask(4, seed=1)}),
}  # fmt: skip
SHARED = {
    "behind": np.array([0, 0, 0, 0, 0, 12]), "before": np.array([0, 0, 4, 0, 0, 0]),
    "i0": np.array([0]), "i4": np.array([4]), "i16": np.array([16]), "ax": np.array([2]), "sizes": np.array([4, 12]),
    "back": np.array([12, 4]), "index": INDEX, "inverse": np.argsort(INDEX), "kept": KEPT, "places": KEPT[:, None],
    "m": mask(4, seed=2).astype(float), "n": 1 - mask(4, seed=2).astype(float),
}  # fmt: skip


@pytest.mark.parametrize("mix", MIXES)
def test_every_way_to_leave_channels_out(mix):
    body, given = MIXES[mix]
    body = f"{FC1.format('x')}\n {body}\n {FC2.format('w', 'y')}"
    signature = TOKENS.replace("N", "3") if "full" in mix else TOKENS
    graph, outcome, _ = folded(body, signature, **WEIGHTS, **SHARED, **given)
    assert changes(outcome) == ["12 of 16 channels are idle, now one dense layer: MACs per position 128 to 48"]
    assert "Where" not in ops(graph)
    assert len(graph.nodes) == (9 if mix == "step" else 7)


ACTIVATIONS = {
    "Relu": "a = Relu(h)",
    "Gelu, tanh": 'a = Gelu<approximate="tanh">(h)',
    "erf": "d = Div(h, root)\n e = Erf(d)\n o = Add(e, one)\n f = Mul(h, o)\n a = Mul(f, half)",
    "silu": "e = Sigmoid(h)\n a = Mul(h, e)",
    "quick": "d = Mul(h, factor)\n e = Sigmoid(d)\n a = Mul(h, e)",
    "hard": "e = HardSigmoid<alpha=0.2>(h)\n a = Mul(e, h)",
    "clip": 'a = Clip(h, "", one)',
    "leaky": "c = Greater(h, zero)\n d = Mul(h, half)\n a = Where(c, h, d)",
    "power": "d = Add(h, one)\n a = Pow(d, two)",
    "mish": "d = Softplus(h)\n e = Tanh(d)\n a = Mul(h, e)",
}
SCALARS = {"root": np.sqrt(2.0), "one": 1.0, "half": np.array([0.5]), "factor": 1.702, "zero": 0.0, "two": 2.0}


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_activation_stays_as_it_was_written(act):
    body = f"{FC1.format('x')}\n {ACTIVATIONS[act]}\n w = Where(M, a, h)\n {FC2.format('w', 'y')}"
    graph, outcome, _ = folded(body, **WEIGHTS, **SCALARS, M=mask(3, seed=7))
    assert [c[:8] for c in changes(outcome)] == ["13 of 16"]
    written = [line.split("=")[1].split("(")[0].split("<")[0].strip() for line in ACTIVATIONS[act].split("\n")]
    assert ops(graph) == ["MatMul", "Add", *written, "MatMul", "MatMul", "Add", "Add"]


LAYOUTS = {
    "Gemm": ("(float[N,4] x) => (float[] y)", "h = Gemm(x, W1, b1)",
             "y = Gemm<transB=1, alpha=0.5, beta=2.0>(w, V2, b2)", {"V2": (4, WIDE)}, (1,)),
    "Conv": ("(float[N,4,3,5] x) => (float[] y)", "h = Conv<kernel_shape=[1,1]>(x, C1, b1)", "y = Conv(w, C2)",
             {"C1": (WIDE, 4, 1, 1), "C2": (4, WIDE, 1, 1)}, (1, -1, 1, 1)),
    "weight first": ("(float[N,4,5] x) => (float[] y)", "p = MatMul(L1, x)\n h = Add(c1, p)", "y = MatMul(L2, w)",
                     {"L1": (WIDE, 4), "L2": (4, WIDE), "c1": (WIDE, 1)}, (-1, 1)),
    "no biases": (TOKENS, "h = MatMul(x, W1)", "y = MatMul(w, W2)", {}, (1, 1, -1)),
    "four axes": ("(float[N,2,5,4] x) => (float[] y)", "p = MatMul(x, W1)\n h = Add(b1, p)", "y = MatMul(w, W2)", {},
                  (1, 1, -1)),
}  # fmt: skip


@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_linear(layout, shortcut):
    signature, first, second, given, shape = LAYOUTS[layout]
    body = f"{first}\n a = Relu(h)\n w = Where(M, a, h)\n {second}"
    if shortcut:
        body = body.replace("y = ", "z = ") + "\n y = Add(x, z)"
    given = {**WEIGHTS, **given, "M": mask(3, seed=7).reshape(WIDE)}
    given["M"] = given["M"].reshape([WIDE if d == -1 or len(shape) == 1 else 1 for d in shape])
    graph, outcome, _ = folded(body, signature, **given)
    assert ("shortcut" in changes(outcome)[0]) == shortcut
    assert "Where" not in ops(graph)
    assert ops(graph)[-1] == "Add"


# ---- what is around it -----------------------------------------------------------------------------------------------

PLAIN = f"{FC1.format('x')}\n a = Relu(h)\n w = Where(M, a, h)\n {FC2.format('w', 'z')}\n"
APART = "Add: the shortcut stays apart: "


@pytest.mark.parametrize(
    ("body", "reason", "left"),
    [
        (PLAIN.replace("(x, W1)", "(n, W1)").replace("p =", "n = LayerNormalization(x, g1, e1)\n p =", 1)
         + "y = Add(z, x)", "LayerNormalization is in between", 9),
        (PLAIN + "o = Relu(x)\n y = Add(z, o)", "the input 'x' is in between", 9),
        (PLAIN + "y = Add(z, c)", "it adds something else than what the FFN reads", 8),
        (PLAIN.replace("(x, W1)", "(n, W1)").replace("p =", "n = Relu(x)\n p =", 1) + "y = Add(z, x)",
         "what is in between is not one scale and shift a channel", 9),
    ],
)  # fmt: skip
def test_a_shortcut_that_stays_apart(body, reason, left):
    graph, outcome, _ = folded(body, **WEIGHTS, **NORMS, M=mask(4), c=np.ones((5, 1)))
    assert (len(outcome.changed), reasons(outcome)) == (1, [APART + reason])
    assert len(graph.nodes) == left


def test_tokens_that_change_places_with_samples():
    """The channels are the same, and the shapes as well; the shortcut is not."""
    body = f"t = Transpose<perm=[1,0,2]>(x)\n {PLAIN.replace('(x, W1)', '(t, W1)')} y = Add(z, x)"
    _, outcome, _ = folded(body, "(float[5,5,4] x) => (float[] y)", **WEIGHTS, M=mask(4))
    assert reasons(outcome) == [APART + "something else than channels is moved or mixed"]
    body = PLAIN.replace("(w, W2)", "(u, W2)").replace("q =", "u = Transpose<perm=[1,0,2]>(w)\n q =") + "y = Add(z, x)"
    _, outcome, _ = folded(body, "(float[5,5,4] x) => (float[] y)", **WEIGHTS, M=mask(4))
    assert reasons(outcome) == ["MatMul: something else than channels is moved or mixed"]


def test_what_feeds_the_linear_itself_is_merged_without_a_norm():
    graph, outcome, _ = folded("n = LayerNormalization(i, g1, e1)\n" + PLAIN.replace("(x,", "(n,") + "y = Add(n, z)",
                               TOKENS.replace(" x", " i"), **WEIGHTS, **NORMS, M=mask(4))  # fmt: skip
    assert "with the shortcut" in changes(outcome)[0]
    assert len(graph.nodes) == 8


@pytest.mark.parametrize(
    ("tail", "merged"),
    [
        ("s = Mul(z, g1)\n y = Add(x, s)", True),
        ("r = Add(e1, z)\n s = Mul(r, half)\n t = Sub(s, g1)\n y = Add(t, x)", True),
        ("s = Mul(z, g1)\n y = Neg(s)", False),
    ],
)
def test_a_layer_scale_is_folded_too(tail, merged):
    graph, outcome, _ = folded(PLAIN + tail, **WEIGHTS, **NORMS, **SCALARS, M=mask(4))
    assert ("shortcut" in changes(outcome)[0]) == merged
    assert ops(graph) == ["MatMul", "Add", "Relu", "MatMul", "MatMul", "Add", "Add"]


def test_a_scale_over_tokens_stays():
    graph, outcome, _ = folded(PLAIN + "s = Mul(z, c)\n y = Add(x, s)", **WEIGHTS, M=mask(4), c=positive((5, 1)))
    assert ops(graph)[-2:] == ["Mul", "Add"]
    assert reasons(outcome) == []


@pytest.mark.parametrize("before", [(), (FoldAffine(),)])
def test_norms_fold_in_either_order(before):
    graph = build(TOKENS, REPA, opset=20, **repa())
    for step in (*before, FOLD, FoldAffine()):
        step.apply(graph, Context())
    assert ops(graph) == ["MatMul", "Add", "Gelu", "MatMul", "MatMul", "Add", "Add"]


def test_a_norm_that_others_read_stays_for_them():
    graph, outcome, _ = folded(REPA.replace("y =", "s =") + "r = Relu(xb)\n y = Add(s, r)", **repa())
    assert (ops(graph).count("BatchNormalization"), ops(graph).count("MatMul")) == (1, 3)
    assert "shortcut" in changes(outcome)[0]


def test_shared_weights_are_cloned():
    """Two FFNs with one set of weights, of which one goes through the activation as a whole."""
    body = PLAIN + "p2 = MatMul(z, W1)\n h2 = Relu(p2)\n y = MatMul(h2, W2)"
    graph, _, old = folded(body, **WEIGHTS, M=mask(4))
    assert all(np.array_equal(constants(graph)[name], old[name]) for name in ("W1", "W2"))
    assert constants(graph)["W1_active"].shape == (4, 4)


def test_norms_with_dead_channels():
    gammas = {f"g{n}": NORMS[f"g{n}"] * (np.arange(size) % 3 > 0) for n, size in ((1, 4), (2, WIDE))}
    graph, outcome, _ = folded(REPA, **repa(**gammas))
    assert changes(outcome)[0].startswith("8 of 16 channels are idle, now one dense layer, with the shortcut")
    assert constants(graph)["W1_active"].shape == (4, 2)


def test_names_of_outputs_stay():
    graph, _, _ = folded(PLAIN + "y = Add(z, x)", **WEIGHTS, M=mask(0))
    assert listing(graph) == "MatMul_4_product = MatMul(x, W2_dense)\ny = Add(MatMul_4_product, MatMul_4_bias)"
    graph, _, _ = folded(PLAIN.replace("z =", "y ="), **WEIGHTS, M=mask(4))
    assert graph.nodes[-1].outputs[0].name == "y"


def test_an_output_in_front_of_the_shortcut_keeps_it_apart():
    _, outcome, _ = folded(PLAIN + "y = Add(z, x)", "(float[N,5,4] x) => (float[] y, float[] z)", **WEIGHTS, M=mask(4))
    assert "shortcut" not in changes(outcome)[0]


def test_two_linears_in_a_row_are_one():
    graph, outcome, _ = folded(
        "h = Gemm(x, A, a)\n y = Gemm(h, B)", "(float[N,4] x) => (float[] y)", A=(4, 9), a=9, B=(9, 5)
    )
    assert ops(graph) == ["Gemm"]
    assert changes(outcome) == ["9 of 9 channels are idle, now one dense layer: MACs per position 81 to 20"]
    given = {"A": (8, 2), "a": 2, "B": (2, 8)}
    _, outcome, _ = folded("h = Gemm(x, A, a)\n y = Gemm(h, B)", "(float[N,8] x) => (float[] y)", **given)
    assert (outcome.changed, outcome.refused) == ([], [])  # a bottleneck on purpose


def test_a_dead_channel_goes_into_the_bias():
    body = f"{FC1.format('x')}\n a = Relu(h)\n v = Where(M, a, h)\n w = Where(D, v, c)\n {FC2.format('w', 'y')}"
    dead = np.arange(WIDE) != 7
    graph, outcome, old = folded(body, **WEIGHTS, M=mask(4), D=dead, c=3.0)
    assert changes(outcome)[0].startswith("11 of 16 channels are idle")
    moved = old["W2"][4:] * dead[4:, None]
    expected = old["b2"] + 3 * old["W2"][7] + moved.T @ old["b1"][4:]
    assert constants(graph)["MatMul_5_dense_bias"] == pytest.approx(expected, rel=1e-12)


# ---- gates -----------------------------------------------------------------------------------------------------------

GATED = "g = MatMul(x, G)\n u = MatMul(x, W1)\n {0}\n w = Mul(c, u)\n y = MatMul(w, W2)"


def test_a_gate_that_is_one_lets_its_channels_through():
    body = GATED.format("s = Sigmoid(g)\n t = Mul(g, s)\n c = Where(M, t, one)")
    graph, outcome, _ = folded(body, **WEIGHTS, G=(4, WIDE), M=mask(4, seed=2), one=1.0)
    assert changes(outcome) == ["12 of 16 channels are idle, now one dense layer: MACs per position 192 to 64"]
    assert ops(graph) == ["MatMul", "MatMul", "Sigmoid", "Mul", "Mul", "MatMul", "MatMul", "Add"]


def test_an_idle_gate_is_refused():
    body = GATED.format("s = Sigmoid(g)\n t = Mul(g, s)\n c = Where(M, t, g)")
    _, outcome, _ = folded(body, **WEIGHTS, G=(4, WIDE), M=mask(4))
    assert reasons(outcome) == ["MatMul: its gate is idle on 12 channels, but a product of two linears is not linear"]


# ---- what is refused -------------------------------------------------------------------------------------------------

SITE = f"{FC1.format('x')}\n a = Relu(h)\n w = Where(M, a, h)\n {FC2.format('w', 'y')}"
REFUSED = {
    "another reader of h": (SITE.replace("y =", "z =") + "\n r = ReduceMax(h)\n y = Add(z, r)", {},
                            "'h' is also needed elsewhere, by ReduceMax"),
    "another reader of the activation": (SITE.replace("y =", "z =") + "\n r = ReduceMax(a)\n y = Add(z, r)", {},
                                         "'a' is also needed elsewhere, by ReduceMax"),
    "its shape": (SITE.replace("y =", "z =") + "\n s = Shape(h)\n r = Cast<to=11>(s)\n r3 = ReduceMax(r)\n"
                  "y = Add(z, r3)", {}, "the shape of 'h' is also needed elsewhere, by Shape"),
    "a mask over tokens": (SITE, {"M": np.arange(5 * WIDE).reshape(1, 5, WIDE) % 3 == 0},
                           "which channels go through the activation differs along another axis"),
    "two activations": (SITE.replace("w = Where(M, a, h)", "b = Sigmoid(h)\n v = Where(M, a, b)\n w = Where(O, v, h)"),
                        {"O": mask(8)}, "its active channels have 2 different activations"),
    "an activation by channel": (SITE.replace("Relu(h)", "PRelu(h, s)"), {"s": positive(WIDE)},
                                 "its active channels each have another activation"),
    "too large": (SITE, {"W1": np.full((4, WIDE), 1e300), "W2": np.full((WIDE, 4), 1e300)},
                  "a folded value is infinite or not a number"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_folded_says_why(case):
    body, given, reason = REFUSED[case]
    graph = build(TOKENS, body, **{**WEIGHTS, "M": mask(4), **given})
    before = listing(graph)
    outcome = FOLD.apply(graph, Context())
    assert (outcome.changed, reasons(outcome)) == ([], [f"MatMul: {reason}"])
    assert listing(graph) == before


def test_a_mask_that_is_an_input():
    _, outcome, _ = folded(SITE, "(float[N,5,4] x, bool[1,1,16] M) => (float[] y)", **WEIGHTS)
    assert reasons(outcome) == ["MatMul: its mask depends on the input 'M'"]


def test_a_mask_that_depends_on_the_values_of_the_input():
    body = SITE.replace("a =", "n = LayerNormalization(h, g2)\n M = Greater(n, zero)\n a =")
    _, outcome, _ = folded(body, **WEIGHTS, g2=positive(WIDE), zero=0.0)
    assert reasons(outcome) == ["MatMul: its mask depends on LayerNormalization"]


def test_a_mask_that_depends_on_the_size_of_the_input():
    body = SITE.replace("a =", "s = Shape<start=0, end=1>(x)\n M = Less(r, s)\n a =")
    _, outcome, _ = folded(body, **WEIGHTS, r=np.arange(WIDE))
    assert reasons(outcome) == ["MatMul: which channels go through the activation depends on the size of the input"]


@pytest.mark.parametrize("tokens", [224, 7])
def test_a_size_that_is_open_in_the_file_alone(tokens):
    """The embedding of positions allows one number of tokens; where it is an unusual one, a sample tells it."""
    body = "e = Add(x, E)\n" + SITE.replace("(x, W1)", "(e, W1)")
    body = body.replace(" w =", " s = Shape(h)\n O = Expand(on, s)\n M = And(O, K)\n w =")
    given = {**WEIGHTS, "E": random((1, tokens, 4), "E"), "on": np.array(True), "K": mask(4, seed=1)}
    graph = build("(float[N,T,4] x) => (float[N,T,4] y)", body, kind="float", **given)
    data = open_data([{"x": np.zeros((1, tokens, 4), np.float32)}], required_inputs(graph))
    outcome = FOLD.apply(graph, Context(data if tokens == 7 else None))
    assert "12 of 16" in changes(outcome)[0]


def test_a_weight_that_is_not_constant():
    _, outcome, _ = folded(SITE, "(float[N,5,4] x, float[4,16] W1) => (float[] y)",
                           **{k: v for k, v in WEIGHTS.items() if k != "W1"}, M=mask(4))  # fmt: skip
    assert not outcome.changed


@pytest.mark.parametrize(
    "body",
    [
        "h = MatMul(x, W1)\n a = Relu(h)\n y = MatMul(a, W2)",
        "h = MatMul(x, W1)\n a = Softmax(h)\n y = MatMul(a, W2)",
        "h = MatMul(x, W1)\n a = LayerNormalization(h, g)\n y = MatMul(a, W2)",
        "h = MatMul(x, W1)\n r = Reshape(h, to)\n y = MatMul(r, V)",
        "h = MatMul(x, W1)\n s = Slice(h, i1, i4, i1)\n y = MatMul(s, W2)",
    ],
)
def test_ordinary_networks_are_left_alone_without_a_word(body):
    to, one, four = np.array([0, -1, 8]), np.array([1]), np.array([4])
    _, outcome, _ = folded(body, **WEIGHTS, g=positive(WIDE), to=to, V=(8, 4), i1=one, i4=four)
    assert (outcome.changed, outcome.refused) == ([], [])


# ---- types -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "rtol"), [("float", 1e-6), ("float16", 4e-3)])
def test_weights_of_other_types(kind, rtol):
    graph = build(TOKENS, SITE.replace("y =", "z =") + "\n y = Add(z, x)", kind=kind, **WEIGHTS, M=mask(4, seed=1))
    applied(FOLD, graph, rtol)
    assert {c.dtype for c in constants(graph).values()} == {
        np.dtype(kind.replace("float", "float") + ("32" if kind == "float" else ""))
    }


def test_the_pipeline_verifies_it():
    graph = build(TOKENS, REPA, opset=20, kind="float", **repa())
    _, steps = run_pipeline(graph, [FOLD], Context())
    assert steps[0]["verified"]["max_rel_error"] < 1e-6
    assert steps[0]["options"] == {"always": False}


# ---- random FFNs -----------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(st.data())
def test_random_ffns(data):
    """Any set of channels, norm, activation and spelling: right to 1e-12, with nothing left that could go."""
    pick = lambda *choices: data.draw(st.sampled_from(choices))  # noqa: E731
    width = pick(2, 3, 5)
    hidden, samples, tokens = width * pick(1, 2, 4), pick(1, 3), pick(1, 2, width)
    active = np.array(data.draw(st.lists(st.booleans(), min_size=hidden, max_size=hidden)))
    norm, scale, shortcut = pick("batch", "layer", ""), pick("batch", "factor", "dead", ""), pick(True, False)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    alive = rng.random(hidden) < 0.8 if scale == "dead" else np.ones(hidden, bool)
    idle = int(np.sum(~active & alive))
    act, mix = pick("Relu", "erf", "silu", "leaky"), pick("where", "not", "parts", "blend")
    norms = {"batch": NORM.format("x", 1), "layer": "xb = LayerNormalization(x, g1, e1)", "": "xb = Identity(x)"}
    scales = {
        "batch": NORM.format("w", 2),
        "factor": "s = Mul(w, g2)\n wb = Sub(s, e2)",
        "dead": "d0 = Where(D, w, e2)\n d1 = Mul(d0, g2)\n wb = Add(d1, e2)",
        "": "wb = Identity(w)",
    }
    on_h = ACTIVATIONS[act]
    on_part = on_h.replace("(h", "(s0").replace(" h,", " s0,").replace(" h)", " s0)")
    mixes = {
        "where": f"{on_h}\n w = Where(M, a, h)",
        "not": f"{on_h}\n w = Where(N, h, a)",
        "blend": f"{on_h}\n i = Mul(a, m)\n j = Mul(n, h)\n w = Add(j, i)",
        "parts": f"s0 = Gather<axis=2>(h, kept)\n r = Gather<axis=2>(h, left)\n {on_part}\n"
        "k = Concat<axis=2>(a, r)\n w = Gather<axis=2>(k, inverse)",
    }
    body = [norms[norm], FC1.format("xb"), mixes[mix], scales[scale], FC2.format("wb", "z")]
    kept, left = np.flatnonzero(active), np.flatnonzero(~active)
    given = {
        "W1": rng.standard_normal((width, hidden)), "b1": rng.standard_normal(hidden),
        "W2": rng.standard_normal((hidden, width)), "b2": rng.standard_normal(width), "M": active, "N": ~active,
        "D": alive, "m": active * 1.0, "n": ~active * 1.0, "kept": kept, "left": left,
        "inverse": np.argsort(np.concatenate([kept, left])), **SCALARS,
    }  # fmt: skip
    for n, size in ((1, width), (2, hidden)):
        given |= {f"{p}{n}": rng.standard_normal(size) for p in "em"}
        given |= {f"{p}{n}": rng.uniform(0.5, 2, size) for p in "gv"}
    shape = f"{pick('S', samples)},{pick('T', tokens)},{width}"
    signature = f"(float[{shape}] x) => (float[{shape}] y)"
    graph = build(signature, "\n".join([*body, "y = Add(z, x)" if shortcut else "y = Neg(z)"]), opset=20, **given)
    outcome = applied(ANY, graph)
    assert [what.split(" are")[0] for what in changes(outcome)] == [f"{idle} of {hidden} channels"] * (idle > 0)
    if idle:
        merged = shortcut and norm != "layer"
        assert ("shortcut" in changes(outcome)[0]) == merged
        assert ops(graph).count("Where") == (act == "leaky" and bool(np.any(active & alive)))
        assert ops(graph).count("BatchNormalization") == (norm == "batch" and not merged)
        assert not {"Concat", "Gather"} & set(ops(graph))


# ---- real exports ----------------------------------------------------------------------------------------------------

FIXTURES = sorted((Path(__file__).parents[1] / "fixtures").glob("*.onnx"))
NODES = {"relu": 7, "silu": 8, "quick": 9, "all": 2}  # Gelu: 7, as Erf 11, as Tanh 15


@pytest.mark.parametrize("before", [(FoldConstants(),), (FoldConstants(), FoldAffine())], ids=["raw", "folded"])
@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_real_exports(path, before):
    graph = load(path)
    feed = {"x": np.random.default_rng(0).standard_normal((2, 5, 16)).astype(np.float32)}
    expected = session(graph).run(feed)
    for step in before:
        step.apply(graph, Context())
    outcome = FOLD.apply(graph, Context())
    check(graph)
    assert_same(expected, session(graph).run(feed), 1e-5)
    (what,) = changes(outcome)
    layer, theta = "layer" in path.stem, 0.5 if "silu" in path.stem else 1 if "idle" in path.stem else 0.75
    assert what.startswith(f"{int(64 * theta)} of 64 channels are idle")
    weights = sum(c.size for c in constants(graph).values() if c.ndim == 2)
    assert weights == (1 - theta + 1 / 8) * 2048
    assert not {"BatchNormalization", "Transpose", "Where", "ScatterND", "Shape"} & set(ops(graph))
    assert ("shortcut" in what) != layer
    assert (reasons(outcome) != []) == layer
    if not layer:
        act = {"Erf": 11, "Tanh": 15}
        nodes = [count for word, count in NODES.items() if word in path.stem]
        nodes += [count for op, count in act.items() if op in ops(graph)]
        assert len(graph.nodes) == (nodes[0] if nodes else 7)
