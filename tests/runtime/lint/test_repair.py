"""Repairs of quantized files of other tools: what they build of, and what they compute."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest

from channelfold.runtime import jobs
from channelfold.runtime.io.files import load
from channelfold.runtime.io.session import Session
from channelfold.runtime.lint import fix, lint, repair
from channelfold.runtime.lint.rules import RULES
from channelfold.tests.graphs import build, listing, run
from channelfold.tests.shipped import CALIBRATION, DIGITS, EVALUATION, needs_rtx


@pytest.fixture(scope="module", params=["QDQ", "QOperator"])
def foreign(request, tmp_path_factory):
    """A file that ONNX Runtime has quantized: zero points of all values, biases in int32, uint8 in the second form."""
    from onnxruntime import quantization

    path = tmp_path_factory.mktemp("foreign") / f"{request.param}.onnx"
    images = np.load(CALIBRATION)["image"]
    feeds = iter([{"image": image[None]} for image in images[:32]])

    class Reader(quantization.CalibrationDataReader):
        def get_next(self):
            return next(feeds, None)

    form = quantization.QuantFormat[request.param]
    kind = quantization.QuantType.QInt8 if request.param == "QDQ" else quantization.QuantType.QUInt8
    how = {"quant_format": form, "activation_type": kind, "per_channel": True}
    quantization.quantize_static(DIGITS, path, Reader(), **how)
    return path


def snr(path) -> float:
    record = jobs.diff(DIGITS, path, source=jobs.Source(evaluation=EVALUATION))
    return record["accuracy"]["outputs"][0]["snr"]


def test_a_foreign_file_is_repaired(foreign, tmp_path):
    out = tmp_path / "fixed.onnx"
    before = {one.rule.id for one in lint(load(foreign), RULES, "tensorrt")}
    assert "zero-point" in before
    assert before & {"int32-bias", "operator-on-codes"}
    record = jobs.lint(foreign, out=out)
    assert (record["lint"]["errors"], record["lint"]["warnings"]) == (0, 0)
    assert record["lint"]["before"]["errors"] > 20
    kinds = {node.inputs[2].dtype for node in load(out).nodes if node.op == "QuantizeLinear"}
    assert kinds == {np.dtype(np.int8)}
    assert snr(out) > snr(foreign) - 0.5


@needs_rtx
def test_a_repaired_file_runs_as_int8(foreign, tmp_path):
    out = tmp_path / "fixed.onnx"
    jobs.lint(foreign, out=out)
    record = jobs.build(out, tmp_path / "m.engine", sm=89, shapes=["image:1x1x8x8:4x1x8x8:8x1x8x8"])
    plan = record["engines"][0]["plan"]
    assert (plan["int8"], plan["total"]) == (7, 7)


def test_a_quantizer_that_stood_for_a_relu_leaves_one_behind():
    graph = build(
        "(float[N,16] x) => (float[] y)",
        "r = Neg(x)  q = QuantizeLinear(r, s, z)  d = DequantizeLinear(q, s, z)  y = MatMul(d, W)",
        kind="float", s=np.float32(0.02), z=np.uint8(0), W=(16, 16),
    )  # fmt: skip
    feed = {"x": np.linspace(-4, 4, 32, dtype=np.float32).reshape(2, 16)}
    before = run(graph, feed)["y"]
    assert [rule.id for rule, _ in fix(graph, RULES, "tensorrt")] == ["uint8-activation"]
    assert "Relu(r)" in listing(graph)
    assert np.abs(run(graph, feed)["y"] - before).max() < 0.02 * 2 * 16


def test_an_activation_keeps_its_range():
    graph = build(
        "(float[N,16] x) => (float[] y)",
        "q = QuantizeLinear(x, s, z)  m = Reshape(q, k)  d = DequantizeLinear(m, s, z)  y = MatMul(d, W)",
        kind="float", s=np.float32(0.1), z=np.uint8(100), W=(16, 16), k=np.array([-1, 16]),
    )  # fmt: skip
    assert len(repair.symmetric_activations(graph)) == 2
    scales = {node.op: node.inputs[1].values for node in graph.nodes if "Quantize" in node.op or "quantize" in node.op}
    assert scales["QuantizeLinear"] == scales["DequantizeLinear"] == pytest.approx(0.1 * 155 / 127)
    assert repair.symmetric_activations(graph) == []


def test_codes_that_others_read_stay():
    graph = build(
        "(float[N,16] x) => (float[] y, uint8[] q)",
        "q = QuantizeLinear(x, s, z)  y = DequantizeLinear(q, s, z)",
        kind="float", s=np.float32(0.1), z=np.uint8(100),
    )  # fmt: skip
    before = listing(graph)
    assert fix(graph, RULES, "tensorrt") == []
    assert listing(graph) == before


@pytest.mark.parametrize("zero", [128, 3])
def test_unsigned_weights_become_signed(zero):
    codes = np.random.default_rng(0).integers(0, 256, (16, 16)).astype(np.uint8)
    graph = build(
        "(float[N,16] x) => (float[] y)", "w = DequantizeLinear<axis=1>(W, t, u)  y = MatMul(x, w)", kind="float",
        W=codes, t=np.linspace(0.1, 0.2, 16).astype(np.float32), u=np.full(16, zero, np.uint8),
    )  # fmt: skip
    feed = {"x": np.eye(16, dtype=np.float32)}
    before = run(graph, feed)["y"]
    assert len(repair.signed_weights(graph)) == 1
    steps = 0.0 if zero == 128 else np.linspace(0.1, 0.2, 16) * 253 / 127 / 2
    assert np.all(np.abs(run(graph, feed)["y"] - before) <= steps + 1e-5)


def test_a_transposed_weight_loads_again(tmp_path):
    graph = build(
        "(float[N,16] x) => (float[] y)",
        "w = DequantizeLinear<axis=0>(W, t, u)  v = Transpose<perm=[1,0]>(w)  y = MatMul(x, v)",
        opset=21, kind="float", W=np.arange(256).reshape(16, 16).astype(np.int8),
        t=np.linspace(0.1, 0.2, 16).astype(np.float32), u=np.zeros(16, np.int8),
    )  # fmt: skip
    feed = {"x": np.eye(16, dtype=np.float32)}
    before = run(graph, feed)["y"]
    assert [rule.id for rule, _ in fix(graph, RULES, "onnxruntime")] == ["transposed-codes"]
    assert [node.op for node in graph.nodes] == ["DequantizeLinear", "MatMul"]
    assert np.array_equal(run(graph, feed)["y"], before)


def test_the_command_ends_with_3_and_writes_reports(run, foreign, tmp_path):
    sarif, junit = tmp_path / "found.sarif", tmp_path / "found.xml"
    code, out, err = run("lint", foreign, "--sarif", sarif, "--junit", junit, "--json")
    assert (code, err.count("error:")) == (3, 1)
    findings = json.loads(out)["lint"]["findings"]
    log = json.loads(sarif.read_text())["runs"][0]
    assert [result["ruleId"] for result in log["results"]] == [one["rule"] for one in findings]
    rules = log["tool"]["driver"]["rules"]
    assert all(rules[result["ruleIndex"]]["id"] == result["ruleId"] for result in log["results"])
    suite = ElementTree.parse(junit).getroot()
    failed = {case.get("name") for case in suite if case.find("failure") is not None}
    assert failed == {one["rule"] for one in findings if one["level"] != "note"}
    assert int(suite.get("failures", 0)) == len(failed)


def test_the_command_repairs(run, foreign, tmp_path):
    out = tmp_path / "fixed.onnx"
    code, shown, _ = run("lint", foreign, "--fix", "-o", out, "--data", EVALUATION)
    assert code == 0
    assert "repaired" in shown
    assert "Accuracy  OK" in shown
    onnx.checker.check_model(onnx.load(out), full_check=True)
    assert Session(out).outputs[0].name == "logits"
    assert run("lint", foreign, "--fix")[0] == run("lint", foreign, "-o", out)[0] == 2
