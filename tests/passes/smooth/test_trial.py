"""Smoothing that makes the outputs of the quantized model no better is taken back."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from channelfold.passes import pipeline
from channelfold.passes.base import Context, Outcome, Pass
from channelfold.passes.bodies import apply_everywhere
from channelfold.passes.layers.output_error import Outputs, held_out
from channelfold.passes.quantize import Quantize, QuantizeWeights
from channelfold.passes.smooth import Smooth
from channelfold.passes.smooth.trial import Judge, paying
from channelfold.passes.smooth_methods import quantizer
from channelfold.runtime.io.snapshot import Snapshot
from channelfold.tests.graphs import build, positive, random, reasons, samples
from channelfold.tests.passes.smooth.blocks import block, planted

STEP = Smooth("smoothquant", alpha=0)  # makes the columns of the weights alike, whatever the activations become
SITES = 4
LAYERS = "".join(f"n{i} = LayerNormalization(x{i}, g{i}, b{i}) y{i} = Gemm(n{i}, W{i})\n" for i in range(SITES))
INPUTS = ", ".join(f"float[N,16] x{i}" for i in range(SITES))
OUTPUTS = ", ".join(f"float[] y{i}" for i in range(SITES))


def given(hurt: int) -> dict:
    """Sites whose first column is 60 times as large for a channel 60 times as small: equal columns are what int8 wants.

    At the site ``hurt`` one single weight is large, and its activation is not small: equal columns make the activation
    60 times as large as the others, for all rows of the weight.
    """
    found = {}
    for i in range(SITES):
        gamma, weight = positive(16, f"g{i}"), random((16, 16), f"W{i}")
        if i == hurt:
            weight[0, 0] = 60 * np.abs(weight).max()
        else:
            gamma[0] /= 60
            weight[0] *= 60
        found |= {f"g{i}": gamma, f"b{i}": 0 * random(16, f"b{i}"), f"W{i}": weight}
    return found


def model(hurt: int) -> gs.Graph:
    return build(f"({INPUTS}) => ({OUTPUTS})", LAYERS, kind="float", **given(hurt))


def context(graph: gs.Graph, count: int = 20, step: Pass | None = None) -> Context:
    return Context(calibration=samples(graph, count), quantizer=step or Quantize())


def int8_error(graph: gs.Graph, original: gs.Graph, ctx: Context) -> float:
    seen, unseen = held_out(ctx.data)
    copy = Snapshot.of(graph).graph()
    Quantize().apply(copy, replace(ctx, calibration=seen))
    return Outputs(original, unseen).error(copy)


@pytest.mark.parametrize("hurt", range(SITES))
def test_the_site_that_hurts_is_taken_back(hurt):
    graph, original = model(hurt), model(hurt)
    ctx = context(graph)
    outcome = STEP.apply(graph, ctx)
    assert len(outcome.changed) == SITES - 1
    (refusal,) = outcome.refused
    assert refusal.reason.startswith(f"LayerNormalization {original.nodes[2 * hurt].name} -> 1 linear: taken back")
    assert refusal.code == "taken back, it does not pay"
    for i in range(SITES):
        (weight,) = (node.inputs[1].values for node in graph.nodes if node.outputs[0].name == f"y{i}")
        assert np.array_equal(weight, given(hurt)[f"W{i}"].astype(np.float32)) is (i == hurt)
    trial = outcome.facts["trial"]
    assert trial["kept"] > max(trial["all"], trial["none"]) + 1
    assert -10 * np.log10(int8_error(graph, original, ctx)) == pytest.approx(trial["kept"], abs=0.1)
    assert Outputs(original, ctx.data).error(graph) < 1e-10
    assert [site["node"] for site in outcome.facts["sites"]] == [change.node for change in outcome.changed]
    assert (trial["samples"], trial["taken_back"]) == (4, 1)


def test_the_reason_has_the_figures_with_and_without():
    graph = model(2)
    (refusal,), trial = (outcome := STEP.apply(graph, context(graph))).refused, outcome.facts["trial"]
    assert f"{trial['all']:.1f} dB with it, {trial['kept']:.1f} dB without" in refusal.reason


def test_all_stays_without_a_quantizer_and_on_request():
    for step, judge in ((STEP, None), (replace(STEP, roll_back=False), Quantize())):
        graph = model(1)
        outcome = step.apply(graph, replace(context(graph), quantizer=judge))
        assert (len(outcome.changed), outcome.refused, "trial" in outcome.facts) == (SITES, [], False)


def test_what_is_not_quantized_is_not_judged():
    graph = model(1)
    outcome = STEP.apply(graph, context(graph, step=Quantize(exclude=("*",))))
    assert (len(outcome.changed), "trial" in outcome.facts) == (SITES, False)


def test_where_nothing_pays_the_graph_is_as_it_was():
    graph = model(0)
    before = Snapshot.of(graph)
    names = [node.name for node in graph.nodes if node.op == "Gemm"]
    step = Smooth("smoothquant", alpha=0, include=tuple(names[:1]))
    outcome = step.apply(graph, context(graph))
    assert (len(outcome.changed), sum("taken back" in reason for reason in reasons(outcome))) == (0, 1)
    assert before.same(Snapshot.of(graph))
    trial = outcome.facts["trial"]
    assert trial["kept"] == trial["none"] > trial["all"]


@pytest.mark.parametrize("name", ["pre-LN", "post-LN", "RMS, SwiGLU, GQA", "fused qkv"])
@pytest.mark.parametrize("outliers", [False, True])
def test_never_worse_than_plain_int8(name, outliers):
    graph = planted(name)[0] if outliers else block(name)
    original = Snapshot.of(graph).graph()
    ctx = context(graph, 10)
    outcome = Smooth().apply(graph, ctx)
    assert Outputs(original, ctx.data).error(graph) < 1e-9
    if trial := outcome.facts.get("trial"):
        assert trial["kept"] >= max(trial["all"], trial["none"])
        assert trial["trials"] <= 8


def test_the_bodies_of_an_if_are_judged_each_with_its_own_data():
    layer = "n1 = LayerNormalization(x1, g1, b1) u = Gemm(n1, W1)"
    branches = f"t () => (float[N,16] u) {{ {layer} }}, else_branch = e () => (float[N,16] v) {{ v = Tanh(x1) }}"
    graph = build(
        "(float[N,16] x1, bool c) => (float[N,16] y)",
        f"y = If(c) <then_branch = {branches}>",
        kind="float",
        **{name: values for name, values in given(1).items() if name.endswith("1")},
    )
    data = samples(graph, 10, make=lambda shape, rng: rng.standard_normal(shape) if shape else True)
    outcome = apply_everywhere(STEP.work(), graph, Context(calibration=data, quantizer=Quantize()))
    assert ["taken back" in reason for reason in reasons(outcome)] == [True]
    assert not outcome.changed


# ---- the search -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [{0, 1}, {1, 2}, {0, 1, 2, 3}, {0, 1, 2, 3, 4, 5}, set(range(8))], ids=str)
def test_errors_that_add_up_are_searched_in_eight_trials(bad):
    """Each of eight sites halves its share of the error, or doubles it."""
    asked = []

    def error(sites: frozenset[int]) -> float:
        asked.append(sites)
        return sum(1 if i not in sites else (2 if i in bad else 0.5) for i in range(8)) / 1000

    verdict = paying([-1.0 if i in bad else 1.0 for i in range(8)], error)
    assert verdict is not None
    assert len(asked) == len(set(asked)) <= 8
    assert error(verdict.kept) <= min(error(frozenset()), error(frozenset(range(8))))
    assert set(verdict.taken_back) == bad
    assert {*verdict.taken_back, *verdict.kept} == set(range(8))


def test_what_rounding_alone_may_cause_decides_nothing():
    assert paying([1.0], lambda sites: 1e-14 if sites else 0.0) is None
    assert paying([1.0, 1.0], lambda sites: None) is None


def test_a_difference_that_may_be_chance_takes_no_group_back():
    verdict = paying([1.0, 2.0], lambda sites: 0.01 - 0.0001 * (sites == frozenset({1})) + 0.1 * (not sites))
    assert verdict is not None
    assert verdict.kept == {0, 1}


# ---- which quantization judges ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asks(Pass):
    """Notes the quantizer of its context."""

    name, kind = "asks", "exact"

    def apply(self, graph, ctx):
        return Outcome(facts={"quantizer": str(ctx.quantizer)})


def test_the_next_quantization_of_a_run_judges():
    graph = model(0)
    ctx = Context(calibration=samples(graph, 5))
    later = Quantize(calibrator="minmax")
    _, steps = pipeline.run(graph, [Asks(), later, Asks()], ctx)
    assert [step["facts"].get("quantizer") for step in steps] == [str(later), None, "None"]


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (Smooth(), Quantize()),
        (Smooth("outliertune"), Quantize()),
        (Smooth("awq", weight_bits=4), None),
        (Smooth(activation_bits=16), None),
        (Quantize(), None),
    ],
)
def test_alone_smoothing_is_judged_by_int8(step, expected):
    assert quantizer(step, []) == expected
    assert quantizer(step, [QuantizeWeights()]) == QuantizeWeights()


@pytest.mark.parametrize(
    ("given", "fast"),
    [
        (Quantize(gptq=True, calibrator="measured", float_share=0.5), Quantize()),
        (QuantizeWeights(weights="int4", rounder="gptq", correct_inputs=True), QuantizeWeights(weights="int4")),
    ],
)
def test_what_takes_many_runs_does_not_judge(given, fast):
    graph = block("pre-LN")
    errors = [Judge(graph, step, context(graph)).error(Snapshot.of(graph).graph()) for step in (given, fast)]
    assert errors[0] == errors[1] > 0


def test_an_output_that_is_a_constant_does_not_count():
    """As in a branch that passes on what the decoder has computed before."""
    graph = build(
        "(float[1,8] x) => (float[] y, float[] c)", "y = MatMul(x, W) c = Identity(x)", kind="float", W=(8, 8)
    )
    graph.outputs[1] = gs.Constant("c", np.ones(4, np.float32))
    graph.nodes.pop()
    assert Outputs(graph, samples(graph)).names == ["y"]
