"""MatMulNBits as the file has it: a weight with two readers is in the file once; how exact products are."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from channelfold.passes.base import Context
from channelfold.passes.quantize import QuantizeWeights
from channelfold.runtime.errors import UsageError
from channelfold.runtime.io.files import check, raise_opset, session
from channelfold.tests.graphs import build, constants, feeds, random, reasons, run
from channelfold.tests.passes.quantize.quantized import samples, snr


def quantized(graph: gs.Graph, **options) -> gs.Graph:
    step = QuantizeWeights(target="onnxruntime", **options)
    graph = raise_opset(graph.copy(), step.opset_for(graph))
    outcome = step.apply(graph, Context(calibration=samples(graph)))
    assert not outcome.refused, reasons(outcome)
    check(graph)
    return graph


@settings(max_examples=25)
@given(
    st.sampled_from(["int4", "uint4", "int2", "int8"]),
    st.integers(33, 150),
    st.integers(3, 20),
    st.sampled_from([16, 32, 128]),
    st.sampled_from(["float", "float16"]),
    st.booleans(),
    st.integers(0, 99),
)
def test_level_1_computes_what_dequantizelinear_says(name, ins, outs, group, kind, gemm, seed):
    outs *= 4 if name == "int2" else 1
    body = "y = Gemm<transB=1,alpha=0.5,beta=2.0>(x, W, b)" if gemm else "h = MatMul(x, W) y = Add(h, b)"
    rows = "N" if gemm else "2,N"
    shape = (outs, ins) if gemm else (ins, outs)
    weight = random(shape, str(seed)) + 0.5
    graph = build(f"({kind}[{rows},{ins}] x) => ({kind}[] y)", body, kind=kind, W=weight, b=outs)
    group = None if name == "int8" else group
    plain = quantized(graph, weights=name, group=group)
    own = quantized(graph, weights=name, group=group, accuracy_level=1)
    assert [node.op for node in own.nodes if "Mat" in node.op or "Gemm" in node.op] == ["MatMulNBits"]
    feed = feeds(graph, size=5)
    wanted, found = session(plain, optimize=False).run(feed), session(own).run(feed)
    assert snr(wanted, found) > (90 if kind == "float" else 50)


def test_a_weight_with_two_readers_is_stored_once():
    graph = build("(float[N,64] x) => (float[] y)", "h = MatMul(x, W) y = MatMul(h, W)", kind="float", W=(64, 64))
    for name in ("int4", "uint4", "int8"):
        made = quantized(graph, weights=name)
        assert [node.op for node in made.nodes] == ["MatMulNBits"] * 2
        assert sum(name.startswith("W_quantized") for name in constants(made)) == 1
        feed = feeds(graph)
        assert snr(run(graph, feed), session(made).run(feed)) > 14


def test_a_second_reader_that_the_operator_does_not_fit():
    graph = build(
        "(float[N,64] x, float[64] v) => (float[] y, float[] z)", "y = MatMul(x, W) z = MatMul(v, W)",
        kind="float", W=(64, 64),
    )  # fmt: skip
    made = quantized(graph, weights="int4")
    assert [node.op for node in made.nodes if "MatMul" in node.op] == ["MatMulNBits", "MatMul"]
    feed = feeds(graph)
    assert snr(run(graph, feed), session(made).run(feed)) > 17


def test_what_a_level_changes():
    """Level 4 rounds the activation to 8 bits; level 1 does not."""
    graph = build("(float[N,256] x) => (float[] y)", "y = MatMul(x, W)", kind="float", W=(256, 64))
    feed = feeds(graph)
    wanted = session(quantized(graph, weights="int4"), optimize=False).run(feed)
    exact, fast = (session(quantized(graph, weights="int4", accuracy_level=level)).run(feed) for level in (1, 4))
    assert snr(wanted, exact) > 100
    assert 30 < snr(wanted, fast) < 60
    assert np.array_equal(fast["y"], session(quantized(graph, weights="int4")).run(feed)["y"])


def test_what_the_operator_has_no_place_for():
    with pytest.raises(UsageError, match="accuracy_level is for float activations and the target onnxruntime"):
        QuantizeWeights(weights="int4", accuracy_level=1)
    graph = build("(float[N,96] x) => (float[] y)", "y = MatMul(x, W)", kind="float", opset=21, W=(96, 64))
    step = QuantizeWeights(weights="int4", target="onnxruntime", group=24, accuracy_level=1)
    assert reasons(step.apply(graph, Context())) == [
        "MatMul stays float: MatMulNBits has no groups of 24, but of 16, 32, 64 …"
    ]
