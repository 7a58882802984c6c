"""The option verify_plan: what an engine computes in float is taken back."""

from __future__ import annotations

import numpy as np
import pytest

from channelfold.passes.base import Context
from channelfold.passes.quantize import Quantize, QuantizeAttention, proven
from channelfold.runtime.engine.kernels import Kernel
from channelfold.runtime.engine.plan import NodeRun, PlanReport
from channelfold.runtime.errors import BuildError, UsageError
from channelfold.runtime.io.files import session
from channelfold.tests.graphs import build, ops, random, reasons
from channelfold.tests.passes.quantize.quantized import network, quantize, samples, snr
from channelfold.tests.passes.quantize.test_attention import attention


def tried(monkeypatch: pytest.MonkeyPatch, *plans: PlanReport) -> list[list[str]]:
    """Lets trials answer with these plans, one after the other; the operators of the graphs that were tried."""
    seen, answers = [], iter(plans)

    def plan_of(graph, sm, data, progress):
        assert sm == 89
        assert data.description == "samples"
        seen.append(ops(graph))
        return next(answers)

    monkeypatch.setattr(proven, "plan_of", plan_of)
    return seen


def plan(**kinds: str) -> PlanReport:
    return PlanReport(True, nodes={name: NodeRun(kind) for name, kind in kinds.items()})


def test_what_the_engine_computes_in_float_is_taken_back_until_all_is_int8(monkeypatch):
    graph = network()
    names = [node.name for node in graph.nodes if node.op in ("Conv", "Gemm")]
    first, second, last = names
    seen = tried(
        monkeypatch,
        plan(**{first: "int8", second: "float", last: "int8"}),
        plan(**{first: "int8", last: "fp16"}),
        plan(**{first: "int8"}),
    )
    feeds = samples(graph)
    before = session(graph).run(next(iter(feeds)))
    outcome = quantize(graph, Quantize(verify_plan=89), feeds)
    assert [found.count("QuantizeLinear") for found in seen] == [3, 2, 1]
    assert outcome.facts["quantized_nodes"] == [first]
    assert [refusal.node for refusal in outcome.refused] == [second, last]
    assert reasons(outcome) == [
        "Conv stays float: the engine for SM 89 computes it in float behind its QDQ nodes",
        "Gemm stays float: the engine for SM 89 computes it in fp16 behind its QDQ nodes",
    ]
    assert ops(graph).count("QuantizeLinear") == 1
    assert snr(before, session(graph).run(next(iter(feeds)))) > 30


def test_a_node_that_the_plan_does_not_name_stays_int8(monkeypatch):
    graph = network()
    tried(monkeypatch, plan(Conv_0="unknown"))
    outcome = quantize(graph, Quantize(verify_plan=89))
    assert outcome.facts["quantized"] == 3


@pytest.mark.parametrize("fewer", [True, False])
def test_products_of_two_activations_may_not_cost_kernels(monkeypatch, fewer):
    graph = attention()
    first, second = (node.name for node in graph.nodes[4:7] if node.op == "MatMul")
    float_kernels = [Kernel(str(i), (), "float", 0, ()) for i in range(5)]
    tried(
        monkeypatch,
        plan(**{first: "int8", second: "float"}),
        PlanReport(True, nodes={first: NodeRun("int8")}, kernels=float_kernels * (1 if fewer else 2)),
        PlanReport(True, kernels=float_kernels),
    )
    outcome = QuantizeAttention(verify_plan=89).apply(graph, Context(calibration=samples(graph)))
    assert outcome.facts == {"products": 2, "quantized_products": int(fewer)}
    assert ops(graph).count("QuantizeLinear") == 2 * fewer
    assert reasons(outcome)[0].endswith("the engine for SM 89 computes it in float behind its QDQ nodes")
    assert fewer or reasons(outcome)[1].endswith("launches 10 kernels with int8 products, 5 without")


@pytest.mark.parametrize("unreadable", [True, False])
def test_a_plan_that_cannot_be_read_is_said(monkeypatch, unreadable):
    graph = network()
    if unreadable:
        tried(monkeypatch, PlanReport(False, "it is in an unknown form"))
    else:
        monkeypatch.setattr(proven, "plan_of", lambda *_: (_ for _ in ()).throw(BuildError("it is refused")))
    outcome = quantize(graph, Quantize(verify_plan=89))
    assert outcome.facts["quantized"] == 3
    (warning,) = outcome.warnings
    assert warning.startswith("Which nodes the engine computes in int8 is not known: it is")


def test_the_other_target_has_no_plan():
    with pytest.raises(UsageError, match="verify_plan is for the target tensorrt, not onnxruntime"):
        Quantize(target="onnxruntime", verify_plan=89)


@pytest.mark.rtx
def test_an_engine_without_int8_convolutions_gets_a_float_graph():
    """SM 75 runs float16 convolutions in float16 whatever stands around them, and matrices in int8."""
    pytest.importorskip("tensorrt_rtx")
    half = {"W": random((32, 32, 3, 3), "W").astype(np.float16), "F": random((32, 32), "F").astype(np.float16)}
    graph = build(
        "(float16[1,32,8,8] x) => (float16[] y)",
        "c = Conv(x, W) m = ReduceMean<axes=[2,3],keepdims=0>(c) y = MatMul(m, F)",
        kind="float16",
        **half,
    )
    outcome = quantize(graph, Quantize(verify_plan=75))
    assert outcome.facts["quantized_nodes"] == ["MatMul_2"]
    assert reasons(outcome) == ["Conv stays float: the engine for SM 75 computes it in fp16 behind its QDQ nodes"]
