"""Products of two activations in int8."""

from __future__ import annotations

import numpy as np
import pytest

from channelfold.passes.base import Context
from channelfold.passes.quantize import Quantize, QuantizeAttention
from channelfold.runtime.errors import UsageError
from channelfold.runtime.io.files import check, save, session
from channelfold.tests.graphs import build, ops, random, reasons
from channelfold.tests.passes.quantize.quantized import samples, snr

BODY = """
    q = MatMul(x, Q) k = MatMul(x, K) v = MatMul(x, V)
    t = Transpose<perm=[0,2,1]>(k)
    s = MatMul(q, t) a = Softmax<axis=-1>(s) m = MatMul(a, v)
    y = MatMul(m, O)
"""


def attention(width: int = 64):
    weights = {name: random((64, width), name) / 8 for name in "QKV"} | {"O": random((width, 64), "O") / 8}
    return build("(float[2,16,64] x) => (float[] y)", BODY, kind="float", **weights)


def test_both_products_of_an_attention():
    graph = attention()
    data = samples(graph, 6)
    before = [session(graph).run(feed)["y"] for feed in data]
    outcome = QuantizeAttention().apply(graph, Context(calibration=data))
    check(graph)
    assert outcome.facts == {"products": 2, "quantized_products": 2}
    assert [change.what.split(",")[0] for change in outcome.changed] == ["MatMul: int8"] * 2
    assert ops(graph).count("QuantizeLinear") == 4
    after = [session(graph).run(feed)["y"] for feed in data]
    assert snr({"y": np.stack(before)}, {"y": np.stack(after)}) > 28


def test_what_stays_float_says_why():
    graph = attention(8)
    outcome = QuantizeAttention().apply(graph, Context(calibration=samples(graph)))
    assert reasons(outcome) == ["MatMul stays float: fewer than 16 channels"] * 2
    graph = attention()
    name = graph.nodes[4].name
    outcome = QuantizeAttention(exclude=(name,), min_activation_snr=200).apply(
        graph, Context(calibration=samples(graph))
    )
    assert [r.code for r in outcome.refused] == [
        f"excluded by pattern {name!r}",
        "8 bits cannot represent its activation",
    ]
    assert "QuantizeLinear" not in ops(graph)


@pytest.mark.rtx
def test_tensorrt_multiplies_all_in_int8(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    from channelfold.runtime.engine import build as tensorrt

    graph = attention()
    for step in (QuantizeAttention(), Quantize()):
        step.apply(graph, Context(calibration=samples(graph)))
    save(graph, tmp_path / "model.onnx")
    engine = tensorrt.build(tmp_path / "model.onnx", tmp_path / "engine", sm=86)
    assert {operand for run in engine.plan.nodes.values() for operand in run.operands} == {"int8"}


def test_the_command(tmp_path):
    from channelfold.runtime import jobs

    graph = attention()
    save(graph, tmp_path / "model.onnx")
    data = {"x": np.concatenate([feed["x"] for feed in samples(graph)])}
    source = jobs.Source(data, data)
    record = jobs.quantize(tmp_path / "model.onnx", tmp_path / "int8.onnx", source=source, attention=True)
    assert [len(step["changed"]) for step in record["steps"]] == [2, 4]
    with pytest.raises(UsageError, match="--attention"):
        jobs.quantize(tmp_path / "model.onnx", tmp_path / "x.onnx", source=source, attention=True, weights_only=True)
