"""Weight Standardization, as exporters write it, is one plain Conv after the recipe ``fold``.

w[o] = (W[o] - mean(W[o])) / (std(W[o]) + eps)        unbiased std (Qiao et al., 2019, arXiv:1903.10520)
w[o] = (W[o] - mean(W[o])) / sqrt(var(W[o]) + eps)    biased variance (BiT, timm)
"""

from __future__ import annotations

import numpy as np
import pytest

from channelfold.passes.base import Context
from channelfold.passes.pipeline import run as run_pipeline
from channelfold.passes.recipe import load_recipe
from channelfold.tests.graphs import assert_same, build, constants, feeds, listing, positive, random, run

EPS = 1e-5
SHAPE = (8, 4, 3, 3)  # above 1 KiB, from where the pipeline keeps weights beside the graph
ROWS, WHOLE = np.array([1, 8, -1]), np.array(SHAPE)

CENTRED = "m = ReduceMean<axes=[1,2,3], keepdims=1>(W)  d = Sub(W, m)"
STEPWISE = """
    m1 = ReduceMean<axes=[1], keepdims=1>(W)
    m2 = ReduceMean<axes=[2], keepdims=1>(m1)
    m = ReduceMean<axes=[3], keepdims=1>(m2)
    d = Sub(W, m)
"""
# what torch.std of the weight as rows becomes: the biased variance times n / (n - 1), with n out of the shape
UNBIASED = """
    r = Reshape(d, two)
    a = ReduceMean<axes=[1], keepdims=1>(r)
    shape = Shape(r)
    sizes = Gather<axis=0>(shape, places)
    count = ReduceProd<keepdims=0>(sizes)
    e = Sub(r, a)
    q = Mul(e, e)
    b = ReduceMean<axes=[1], keepdims=0>(q)
    n = Cast<to=1>(count)
    u = Mul(b, n)
    less = Sub(n, one)
    v = Div(u, less)
    s = Sqrt(v)
    t = Reshape(s, column)
    f = Add(t, eps)
"""
SCALARS = {"one": 1.0, "eps": EPS, "two": np.array([8, -1]), "places": np.array([1]), "column": np.array([-1, 1, 1, 1])}
BATCHNORM = "r = Reshape(W, rows)\n {stats}\n b{more} = BatchNormalization<{training}epsilon=1e-5>(r, {affine}, a, v)"
STATISTICS = """
    k = Transpose<perm=[0,2,1]>(r)
    a = ReduceMean<axes=[0,1], keepdims=0>(k)
    c = ReduceMean<axes=[0,1], keepdims=1>(k)
    d = Sub(k, c)
    q = Mul(d, d)
    v = ReduceMean<axes=[0,1], keepdims=0>(q)
"""
ONES = {"ones": np.ones(8), "zeros": np.zeros(8)}
AXES = {"axes": np.array([1, 2, 3])}
BACK = "\n shape = Shape(W)\n w = Reshape(b, shape)"

# name: (opset, nodes from W to w, constants, whether the std is unbiased)
FORMS = {
    "std of rows, + eps": (13, f"{CENTRED}{UNBIASED} w = Div(d, f)", SCALARS, True),
    "means one by one, expanded": (
        11, f"{STEPWISE}{UNBIASED} z = Shape(d)\n g = Expand(f, z)\n w = Div(d, g)", SCALARS, True
    ),
    "variance by Mul": (
        17, f"{CENTRED} q = Mul(d, d)\n v = ReduceMean<axes=[1,2,3]>(q)\n e = Add(v, eps)\n s = Sqrt(e)\n"
        "w = Div(d, s)", {"eps": EPS}, False,
    ),
    "variance by Pow, axes as input": (
        18, "m = ReduceMean(W, axes)\n d = Sub(W, m)\n q = Pow(d, two)\n v = ReduceMean(q, axes)\n e = Add(v, eps)\n"
        "s = Sqrt(e)\n w = Div(d, s)", {"two": 2.0, "eps": EPS, **AXES}, False,
    ),
    "reciprocal root": (
        18, "m = ReduceMean(W, axes)\n d = Sub(W, m)\n v = ReduceSumSquare(d, axes)\n u = Div(v, n)\n e = Add(u, eps)\n"
        "s = Sqrt(e)\n i = Reciprocal(s)\n w = Mul(d, i)", {"eps": EPS, "n": 36.0, **AXES}, False,
    ),
    "BatchNormalization in training": (
        17, BATCHNORM.format(stats=STATISTICS, more=", rm, rv", training="training_mode=1, ", affine="ones, zeros")
        + BACK, {"rows": ROWS, **ONES}, False,
    ),
    "BatchNormalization in training, other running statistics": (
        15, BATCHNORM.format(stats="a = Neg(ones)\n v = Exp(ones)", more=", rm, rv", training="training_mode=1, ",
        affine="ones, zeros") + BACK, {"rows": ROWS, **ONES}, False,
    ),
    "BatchNormalization before opset 14": (
        13, BATCHNORM.format(stats=STATISTICS, more="", training="", affine="ones, zeros") + BACK,
        {"rows": ROWS, **ONES}, False,
    ),
    "InstanceNormalization": (
        17, "r = Reshape(W, rows)\n b = InstanceNormalization<epsilon=1e-5>(r, ones, zeros)\n w = Reshape(b, whole)",
        {"rows": ROWS, "whole": WHOLE, **ONES}, False,
    ),
    "LayerNormalization": (
        17, "w = LayerNormalization<axis=1, epsilon=1e-5>(W, scale)", {"scale": np.ones(SHAPE[1:])}, False
    ),
}  # fmt: skip


def standardized(weight: np.ndarray, unbiased: bool) -> np.ndarray:
    """In float64."""
    rows = weight.astype(np.float64).reshape(len(weight), -1)
    spread = rows.std(1, ddof=1) + EPS if unbiased else np.sqrt(rows.var(1) + EPS)
    return ((rows - rows.mean(1, keepdims=True)) / spread[:, None]).reshape(weight.shape)


def folded(graph):
    """The graph after the recipe ``fold``, verified by the pipeline."""
    feed = feeds(graph)
    before = run(graph, feed)
    graph, steps = run_pipeline(graph, load_recipe("fold").passes, Context())
    assert_same(before, run(graph, feed))
    assert not any(step["refused"] for step in steps)
    return graph


@pytest.mark.parametrize("form", FORMS)
def test_the_chain_becomes_a_weight_that_takes_the_batchnorm(form):
    opset, chain, given, unbiased = FORMS[form]
    body = f"{chain}\n h = Conv<pads=[1,1,1,1]>(x, w)\n y = BatchNormalization(h, gamma, beta, mean, var)"
    norm = {"gamma": 8, "beta": 8, "mean": 8, "var": positive(8)}
    signature = "(float[2,4,5,5] x) => (float[2,8,5,5] y)"
    weights = {"W": 0.05 * random(SHAPE, "W") + 0.02}
    graph = build(signature, body, opset=opset, kind="float", **weights, **given, **norm)
    old = {name: values.astype(np.float64) for name, values in constants(graph).items()}

    graph = folded(graph)
    bias = graph.nodes[-1].inputs[2].name
    assert listing(graph) == f"y = Conv<pads=[1, 1, 1, 1]>(x, w, {bias})"
    scale = old["gamma"] / np.sqrt(old["var"] + 1e-5)
    expected = standardized(old["W"], unbiased) * scale[:, None, None, None]
    new = constants(graph)
    assert np.abs(new["w"] - expected).max() <= 1e-6 * np.abs(expected).max()
    assert new[bias] == pytest.approx(old["beta"] - old["mean"] * scale, rel=1e-6, abs=1e-6)


def test_a_gain_behind_the_standardization_goes_with_it():
    """ScaledStdConv of normalizer-free networks: gamma of the BatchNormalization is gain / sqrt(fan_in)."""
    chain = BATCHNORM.format(stats=STATISTICS, more=", rm, rv", training="training_mode=1, ", affine="gains, zeros")
    body = f"gs = Mul(gain, fan)\n gains = Reshape(gs, flat)\n {chain}{BACK}\n y = Conv(x, w, bias)"
    given = {"W": SHAPE, "gain": positive((8, 1, 1, 1), "gain"), "fan": 36**-0.5, "flat": np.array([-1]), "bias": 8}
    given |= {"rows": ROWS, "zeros": np.zeros(8)}
    graph = build("(float[2,4,5,5] x) => (float[2,8,3,3] y)", body, kind="float", **given)
    weight, gain = constants(graph)["W"], constants(graph)["gain"]
    graph = folded(graph)
    assert listing(graph) == "y = Conv(x, w, bias)"
    expected = standardized(weight, False) * gain.astype(np.float64) / 6
    assert np.abs(constants(graph)["w"] - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("shape", "axes"), [((8, 4, 9), [1, 2]), ((8, 4, 2, 3, 3), [1, 2, 3, 4]), ((8, 1, 6, 6), [1, 2, 3])]
)
def test_other_dimensions_and_groups(shape, axes):
    body = """
        m = ReduceMean(W, axes)
        d = Sub(W, m)
        q = Mul(d, d)
        v = ReduceMean(q, axes)
        e = Add(v, eps)
        s = Sqrt(e)
        w = Div(d, s)
    """
    group = 8 // shape[1] if shape[1] == 1 else 1
    inputs, size = shape[1] * group, ",".join(["9"] * len(shape[2:]))
    signature = f"(float[2,{inputs},{size}] x) => (float[] y)"
    given = {"W": shape, "axes": np.array(axes), "eps": EPS}
    graph = build(signature, f"{body}\n y = Conv<group={group}>(x, w)", opset=18, kind="float", **given)
    weight = constants(graph)["W"]
    graph = folded(graph)
    assert listing(graph) == f"y = Conv<group={group}>(x, w)"
    expected = standardized(weight, False)
    assert np.abs(constants(graph)["w"] - expected).max() <= 1e-6 * np.abs(expected).max()


def test_group_statistics_of_activations_stay():
    """Batch-Channel Normalization: its first stage folds, its second is per sample and stays."""
    body = """
        h = Conv(x, W)
        n = BatchNormalization(h, gamma, beta, mean, var)
        r = Reshape(n, groups)
        i = InstanceNormalization(r, ones, zeros)
        s = Shape(n)
        y = Reshape(i, s)
    """
    given = {"W": SHAPE, "gamma": 8, "beta": 8, "mean": 8, "var": positive(8), "groups": np.array([0, 2, -1])}
    given |= {"ones": np.ones(2), "zeros": np.zeros(2)}
    graph = build("(float[N,4,5,5] x) => (float[] y)", body, kind="float", **given)
    graph = folded(graph)
    assert [n.op for n in graph.nodes] == ["Conv", "Reshape", "InstanceNormalization", "Reshape"]


def test_a_constant_fold_leaves_weights_that_the_pipeline_can_freeze_and_thaw():
    graph = build("(float[N,600] x) => (float[] y)", "w = Neg(W)\n y = MatMul(x, w)", kind="float", W=(600, 4))
    graph = folded(graph)
    assert constants(graph)["w"].flags.writeable
