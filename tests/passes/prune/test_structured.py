"""Prune: budgets that hold, choices that are respected, cuts that are proven, and everything else that stays."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from channelfold.passes import pipeline, recipe
from channelfold.passes.base import Context, Refused
from channelfold.passes.channels.cut import cut
from channelfold.passes.layers.linear import linears
from channelfold.passes.prune import Prune
from channelfold.passes.prune import structured as module
from channelfold.passes.quantize import Quantize
from channelfold.runtime.errors import ChannelfoldError, UsageError, VerificationError
from channelfold.runtime.io.files import check, import_model
from channelfold.runtime.io.snapshot import Snapshot
from channelfold.runtime.jobs.inspect_model import int8_nodes
from channelfold.tests.channel_strategies import networks
from channelfold.tests.graphs import build, changes, constants, feeds, listing, random, reasons, run
from channelfold.tests.pruning import cnn, data_of, distance, ffn, kept, mlp, prune, specs, spread, written_costs

BUDGETS = {"keep_macs": "macs", "keep_params": "parameters"}
FIXED = {
    cnn: {"signature": "(float[1,3,12,12] x) => (float[1,10] y)"},
    ffn: {"signature": "(float[1,6,8] x) => (float[1,6,4] y)"},
}

# ---- how much goes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [cnn, mlp, ffn])
@pytest.mark.parametrize("allocation", ["uniform", "ranked", "knapsack"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_a_budget_is_never_exceeded(make, budget, allocation, tmp_path):
    for share in (0.45, 0.6, 0.85):
        for align in (1, 8):
            graph = make(**FIXED.get(make, {}))
            before = written_costs(graph, tmp_path)[BUDGETS[budget]]
            outcome = prune(graph, None, allocation=allocation, align=align, **{budget: share})
            after = written_costs(graph, tmp_path)[BUDGETS[budget]]
            facts = outcome.facts[BUDGETS[budget]]
            assert after <= share * before
            assert (facts["before"], facts["after"]) == (before, after)
            if align == 1 and allocation == "knapsack":
                assert after > 0.93 * share * before  # one channel of the widest layer is less than 7 %


@pytest.mark.parametrize("ratio", [0, 0.25, 0.5, 0.75])
def test_a_ratio_of_every_group(ratio):
    graph = mlp()
    outcome = prune(graph, ratio=ratio, align=1)
    assert kept(outcome) == {"Gemm_0": round(32 * (1 - ratio)), "Gemm_2": round(24 * (1 - ratio))}
    assert bool(outcome.changed) == (ratio > 0)


def test_the_last_channels_stay():
    graph = mlp()
    assert kept(prune(graph, ratio=0.99, align=1)) == {"Gemm_0": 1, "Gemm_2": 1}
    assert run(graph, feeds(graph))["y"].shape == (2, 5)


@pytest.mark.parametrize("align", [3, 8, 16])
def test_alignment(align):
    counts = kept(prune(mlp(), keep_macs=0.6, align=align))
    assert counts != {"Gemm_0": 32, "Gemm_2": 24}
    assert all(count % align == 0 or count == whole for count, whole in zip(counts.values(), (32, 24), strict=True))


def test_shapes_of_the_weights_that_are_left():
    graph = cnn()
    outcome = prune(graph, ratio=0.5, align=1)
    shapes = sorted(v.shape for v in constants(graph).values() if v.ndim > 1)
    assert shapes == [(8, 3, 3, 3), (10, 12), (12, 8, 3, 3)]
    saved = 8 * 27 + 8 + 12 * 8 * 9 + 8 * 12 * 9 + 12 * 8 * 9 + 12 + 10 * 12
    facts = outcome.facts["parameters"]
    assert facts["before"] - facts["after"] == saved
    assert changes(outcome) == [
        "Conv: 16 -> 8 channels, 1,952 parameters saved",
        "Conv: 24 -> 12 channels, 1,860 parameters saved",
    ]


def test_a_budget_that_is_met_already_changes_nothing():
    graph = mlp()
    before = Snapshot.of(graph)
    assert not prune(graph, keep_macs=1).changed
    assert before.same(Snapshot.of(graph))


@pytest.mark.parametrize("allocation", ["uniform", "ranked", "knapsack"])
def test_an_infeasible_budget_names_the_least(allocation):
    least = (8 * 16 + 8 * 8 + 8 * 5) / (32 * 16 + 24 * 32 + 5 * 24)
    with pytest.raises(UsageError, match=rf"A budget of 0\.1 cannot be reached: the least possible is {least:.4g}\."):
        prune(mlp(), keep_macs=0.1, allocation=allocation)
    prune(mlp(), keep_macs=least + 1e-6, allocation=allocation)


def test_biases_that_compensation_adds_count(tmp_path):
    """What reads the 32 channels of the FFN has no bias, and gets one of 16: 8 kept are 520 parameters and 16."""
    make = functools.partial(ffn, **FIXED[ffn])
    with pytest.raises(UsageError, match=r"A share of 0\.4 of the parameters cannot be met: .* it is 0\.409"):
        prune(make(), keep_params=0.4)
    for options, after in (({"keep_params": 0.41}, 536), ({"keep_params": 0.4, "compensate": "none"}, 520)):
        graph = make()
        assert kept(prune(graph, None, **options)) == {"MatMul_2": 8}
        assert written_costs(graph, tmp_path)["parameters"] == after


# ---- what goes -------------------------------------------------------------------------------------------------------


def test_include_and_exclude():
    assert kept(prune(mlp(), ratio=0.5, include=("*_2",))) == {"Gemm_2": 16}  # as near to 12 as to 8
    outcome = prune(mlp(), ratio=0.5, exclude=("Gemm_[2-9]",))
    assert kept(outcome) == {"Gemm_0": 16}
    assert [refusal.code for refusal in outcome.refused] == ["excluded by pattern 'Gemm_[2-9]'"] * 2
    graph = mlp()
    outcome = prune(graph, ratio=0.5, include=("nothing",))
    assert (outcome.changed, {r.code for r in outcome.refused}) == ([], {"not included by any pattern"})


def test_the_width_only_when_asked_for():
    narrow = prune(ffn(), ratio=0.5, align=1)
    assert kept(narrow) == {"MatMul_2": 16}
    assert "its 16 channels stay: LayerNormalization normalizes over it; 'width' cuts it all the same" in reasons(
        narrow
    )
    graph = ffn()
    assert kept(prune(graph, ratio=0.5, align=1, width=True)) == {"MatMul_0": 8, "MatMul_2": 16}
    assert {v.shape for v in constants(graph).values() if v.ndim == 2} == {(8, 8), (8, 16), (16, 8), (8, 4)}


def test_what_nothing_forbids_is_said_of_what_stays():
    outcome = prune(mlp(), ratio=0.5)
    assert reasons(outcome) == ["its 5 channels stay: it is the output 'y' of the model"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "found none of them"),
        ({"keep_macs": 0.5, "ratio": 0.5}, "found 'keep_macs' and 'ratio'"),
        ({"keep_macs": 0}, "'keep_macs' is 0"),
        ({"keep_params": 1.5}, "'keep_params' is 1.5"),
        ({"keep_macs": float("nan")}, "'keep_macs' is nan"),
        ({"ratio": 1}, "'ratio' is 1"),
        ({"ratio": -0.1}, "'ratio' is -0.1"),
        ({"ratio": 0.5, "align": 0}, "'align' is 0"),
        ({"ratio": 0.5, "ridge": -1}, "'ridge' is -1"),
        ({"ratio": 0.5, "ridge": float("nan")}, "'ridge' is nan"),
        ({"ratio": 0.5, "allocation": "ranked"}, "'ratio'"),
        ({"keep_latency": 0.5, "allocation": "uniform"}, "'keep_latency'"),
    ],
)
def test_options_that_make_no_sense(options, expected):
    with pytest.raises(UsageError, match=expected):
        Prune(**options)


@pytest.mark.parametrize(
    ("importance", "expected"),
    [("bn", "no group passes a BatchNormalization"), ("activation", "needs calibration data")],
)
def test_an_importance_that_nothing_is_known_of(importance, expected):
    with pytest.raises(UsageError, match=expected):
        prune(mlp(), ratio=0.5, importance=importance)


# ---- the proof -------------------------------------------------------------------------------------------------------


def wrong(name: str):
    """``cut`` with one fault: a part of the region that keeps everything, or loses other channels than the rest."""

    def broken(graph, cuts):
        made = []
        for region, keep in cuts:
            number = next(n for n, part in enumerate(region.parts) if part.labels.size == region.size)
            parts = list(region.parts)
            if name == "left out":
                del parts[number]
            else:
                parts[number] = dataclasses.replace(parts[number], labels=parts[number].labels[::-1])
            made.append((dataclasses.replace(region, parts=parts), keep))
        cut(graph, made)

    return broken


@pytest.mark.parametrize("make", [cnn, mlp, ffn])
@pytest.mark.parametrize(("fault", "error"), [("left out", ChannelfoldError), ("other channels", VerificationError)])
def test_a_broken_cut_is_caught_and_rolled_back(make, fault, error, monkeypatch):
    monkeypatch.setattr(module, "cut", wrong(fault))
    graph = make()
    before, text = Snapshot.of(graph), listing(graph)
    with pytest.raises(error):
        pipeline.run(graph, [Prune(ratio=0.25, align=1)], Context())
    assert listing(graph) == text
    assert before.same(Snapshot.of(graph))


def test_the_record_of_the_proof():
    proof = prune(mlp(), ratio=0.5).facts["slice_equals_mask"]
    assert proof["max_rel_error"] < 1e-6
    assert prune(mlp(), ratio=0.5, verify=False).facts["slice_equals_mask"] is None


@pytest.mark.parametrize(("kind", "tolerance"), [("float16", 2e-2), ("double", 1e-9)])
@pytest.mark.parametrize("with_data", [False, True])
def test_other_float_types(kind, tolerance, with_data):
    graph = mlp(kind)
    outcome = prune(graph, data_of(graph) if with_data else None, ratio=0.5)
    assert outcome.facts["slice_equals_mask"]["tolerance"] == tolerance
    assert {c.dtype for c in constants(graph).values()} == {graph.inputs[0].dtype}
    assert kept(outcome) == {"Gemm_0": 16, "Gemm_2": 16}


# ---- what stays as it is ---------------------------------------------------------------------------------------------


def test_open_sizes_stay_open():
    graph = cnn(signature="(float[N,3,H,W] x) => (float[N,10] y)")
    prune(graph, data_of(graph, size=9), keep_macs=0.5)
    assert specs(graph) == [("x", "float32", ("N", 3, "H", "W")), ("y", "float32", ("N", 10))]
    for n, h, w in ((1, 5, 8), (3, 16, 9)):
        assert run(graph, {"x": random((n, 3, h, w)).astype(np.float32)})["y"].shape == (n, 10)


def test_a_flatten_with_open_batch_and_three_outputs():
    graph = build(
        "(float[N,3,6,6] x) => (float[N,4] p, float[] q, int64[N] k)",
        """
        a = Conv(x, A)
        r = Relu(a)
        f = Reshape(r, s)
        p = Gemm<transB=1>(f, B)
        q = Conv(r, C)
        k = ArgMax<axis=1, keepdims=0>(p)
        """,
        kind="float", A=spread((8, 3, 3, 3), "A"), B=spread((4, 128), "B"), C=spread((2, 8, 1, 1), "C"),
        s=np.array([-1, 128]),
    )  # fmt: skip
    outcome = prune(graph, data_of(graph), ratio=0.5, align=1)
    assert kept(outcome) == {"Conv_0": 4}
    assert outcome.facts["slice_equals_mask"]["max_rel_error"] < 1e-6
    found = run(graph, feeds(graph, size=3))
    assert [v.shape for v in found.values()] == [(3, 4), (3, 2, 4, 4), (3,)]


def test_a_weight_shared_by_two_nodes():
    graph = build(
        "(float[N,8] u, float[N,8] v) => (float[] y)",
        "a = MatMul(u, A) r = Relu(a) b = MatMul(v, A) s = Sigmoid(b) p = MatMul(r, B) q = MatMul(s, C) y = Add(p, q)",
        kind="float", A=(8, 16), B=(16, 3), C=(16, 3),
    )  # fmt: skip
    outcome = prune(graph, data_of(graph), ratio=0.5)
    proof = outcome.facts["slice_equals_mask"]
    assert proof["max_rel_error"] < 1e-5
    assert [linear.channels for linear in linears(graph)] == [(8, 8), (8, 8), (3, 8), (3, 8)]


def test_quantize_afterwards():
    graph = mlp()
    data = data_of(graph)
    graph, steps = pipeline.run(graph, [Prune(ratio=0.5), Quantize()], Context(calibration=data))
    check(graph)
    assert [step["pass"] for step in steps] == ["prune", "quantize"]
    assert int8_nodes(graph) == ["Gemm_0", "Gemm_2"]  # as without pruning: Gemm_4 has 5 channels


def test_a_recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('[[pass]]\nname = "prune"\nkeep_macs = 0.5\nalign = 4\nexclude = ["Gemm_0"]\n')
    (step,) = recipe.load_recipe(path).passes
    assert step == Prune(keep_macs=0.5, align=4, exclude=("Gemm_0",))
    graph, (record,) = pipeline.run(mlp(), [Prune(ratio=0.5, include=("Gemm_0",))], Context())
    assert record["options"]["include"] == ["Gemm_0"]
    assert [linear.channels[0] for linear in linears(graph)] == [16, 24, 5]


def test_the_same_twice_and_in_any_order_of_samples():
    graphs = [mlp() for _ in range(3)]
    orders = [range(8), range(8), [5, 0, 7, 2, 1, 6, 4, 3]]
    outcomes = [
        prune(g, data_of(g, order=order), ratio=0.5) for g, order in zip(graphs, orders, strict=True)
    ]  # fmt: skip
    weights = [list(constants(graph).values()) for graph in graphs]
    assert Snapshot.of(graphs[0]).same(Snapshot.of(graphs[1]))
    assert changes(outcomes[0]) == changes(outcomes[2])
    for a, b in zip(weights[0], weights[2], strict=True):
        assert np.abs(a - b).max() < 1e-5 * np.abs(a).max()


# ---- what it is worth ------------------------------------------------------------------------------------------------


def test_redundant_channels_go_at_no_cost():
    """Half of the neurons are others again, scaled; the readers make up for them, and the output stays."""
    rng = np.random.default_rng(0)
    half = {"A": spread((16, 16), "A"), "a0": random(16, "a0")}
    twice = {name: np.concatenate([v, np.exp(0.3) * v]) for name, v in half.items()}
    order = rng.permutation(32)
    graph = mlp("float", **{name: v[order] for name, v in twice.items()})
    data = data_of(graph, size=2000)  # shrinkage of covariances is felt with few positions
    for options in ({"keep_macs": 0.6}, {"ratio": 0.5}):
        pruned = mlp("float", **{name: v[order] for name, v in twice.items()})
        outcome = prune(pruned, data, include=("Gemm_0",), ridge=0, **options)
        assert kept(outcome)["Gemm_0"] == 16
        assert distance(graph, pruned, data) < 5e-3


@pytest.mark.parametrize("make", [cnn, mlp])
def test_data_and_least_squares_lose_less(make):
    graph = make()
    data, held_out = data_of(graph, 32), data_of(graph, 8, seed=1)

    def lost(data, **options) -> float:
        pruned = make()
        prune(pruned, data, ratio=0.5, **options)
        return distance(graph, pruned, held_out)

    plain = lost(None, importance="l2", compensate="none")
    weights = lost(None)
    best = lost(data)
    assert best < weights < plain


@settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    networks(blocks=5),
    st.sampled_from([{"ratio": 0.3}, {"ratio": 0.6, "width": True}, {"keep_params": 0.8}, {"keep_macs": 0.7}]),
    st.sampled_from(["l1", "reconstruction"]),
    st.booleans(),
)
def test_random_networks(model, amount, importance, with_data):
    """The cut is proven inside; then the graph is valid and its outputs are finite numbers of the old shapes."""
    graph = import_model(model)
    feed = feeds(graph)
    before = run(graph, feed)
    data = data_of(graph, count=2, size=2) if with_data else None
    with contextlib.suppress(UsageError):  # a budget that too few channels are there for
        prune(graph, data, importance=importance, align=1, **amount)
    after = run(graph, feed)
    for name, values in before.items():
        assert (after[name].shape, after[name].dtype) == (values.shape, values.dtype)
        assert np.isfinite(after[name]).all()


def test_a_cut_that_cannot_be_proven_is_a_warning(monkeypatch):
    def blocked(graph, cuts):
        raise Refused("a norm that nobody knows")

    monkeypatch.setattr(module, "mask", blocked)
    graph, steps = pipeline.run(cnn(), [Prune(ratio=0.5, align=1)], Context())
    assert linears(graph)[0].channels == (8, 3)
    assert steps[0]["facts"]["slice_equals_mask"] == {"unverified": "a norm that nobody knows"}
    assert pipeline.warnings(steps) == ["prune: the cut was not proven: a norm that nobody knows"]
