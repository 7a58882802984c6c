"""Graphs quantized for ONNX Runtime, by the kernels that it makes of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from channelfold.passes.quantize import Quantize
from channelfold.runtime.io.files import session
from channelfold.runtime.io.session import Session
from channelfold.runtime.stats import saturation
from channelfold.tests.graphs import build, constants, node, ops, random, reasons, run
from channelfold.tests.passes.quantize.quantized import network, optimized, quantize, samples, snr

TARGET = Quantize(target="onnxruntime")
EXPANDED = "stays float: ONNX Runtime would expand its int8 weight to float on every call"


def test_onnxruntime_runs_in_integers(tmp_path):
    graph = network()
    quantize(graph, Quantize(target="onnxruntime"))
    stored = constants(graph)
    assert stored["x_zero_point"].dtype == np.uint8
    assert stored["Conv_0_bias_quantized"].dtype == np.int32
    assert stored["Conv_0_bias_scale"] == pytest.approx(stored["x_scale"] * stored["W1_scale"], rel=1e-6)
    kinds = optimized(graph, tmp_path)
    assert (kinds.count("QLinearConv"), kinds.count("QLinearAdd"), kinds.count("QGemm")) == (2, 1, 1)
    assert kinds.count("QLinearGlobalAveragePool") == 1
    assert {"Conv", "FusedConv", "Gemm", "Add", "MaxPool", "Relu"}.isdisjoint(kinds)
    assert kinds.count("QuantizeLinear") == 1


def test_onnxruntime_multiplies_matrices_in_integers(tmp_path):
    graph = build("(float[N,4,32] x) => (float[] y)", "h = MatMul(x, W) g = Relu(h) y = MatMul(g, V)", kind="float",
                  W=(32, 32), V=(32, 16))  # fmt: skip
    quantize(graph, Quantize(target="onnxruntime"))
    kinds = optimized(graph, tmp_path)
    assert "MatMul" not in kinds
    assert kinds == ["QuantizeLinear", "QLinearMatMul", "MatMulIntegerToFloat"]


def test_what_is_refused_leaves_its_result_float_for_onnxruntime():
    graph = network()
    outcome = quantize(graph, Quantize(target="onnxruntime", exclude=("Conv_3",)))
    assert outcome.facts["quantized"] == 2
    quantized = [n.inputs[0].name for n in graph.nodes if n.op == "QuantizeLinear"]
    assert quantized == ["x", "r1", "p", "f"]


def encoder(shape: str, planted: bool = False, layers: int = 2) -> gs.Graph:
    """Post-norm transformer layers without attention: q, a bias, a shortcut, a norm, an FFN."""
    body, constants = [], {}
    for i in range(layers):
        source = "x" if i == 0 else f"n{i - 1}"
        body += [
            f"q{i} = MatMul({source}, Q{i})",
            f"p{i} = Add(q{i}, c{i})",
            f"s{i} = Add(p{i}, {source})",
            f"l{i} = LayerNormalization<axis=-1>(s{i}, g{i}, h{i})",
            f"u{i} = MatMul(l{i}, U{i})",
            f"v{i} = Add(d{i}, u{i})",
            f"r{i} = Relu(v{i})",
            f"w{i} = MatMul(r{i}, W{i})",
            f"b{i} = Add(w{i}, e{i})",
            f"t{i} = Add(l{i}, b{i})",
            f"n{i} = LayerNormalization<axis=-1>(t{i}, k{i}, h{i})",
        ]
        gains = {name: 1 + 0.1 * random(64, f"{name}{i}") for name in "gk"}
        for gain in gains.values():
            gain[[3, 20, 41]] *= 12 if planted else 1
        constants |= {f"{name}{i}": gain for name, gain in gains.items()}
        constants |= {
            f"{name}{i}": 0.02 * random(size, f"{name}{i}") for name, size in zip("cde", (64, 128, 64), strict=True)
        }
        constants |= {
            f"{name}{i}": 0.02 * random(size, f"{name}{i}")
            for name, size in zip("QUW", ((64, 64), (64, 128), (128, 64)), strict=True)
        }
        constants[f"h{i}"] = 0.02 * random(64, f"h{i}")
    body.append(f"y = Identity(n{layers - 1})")
    return build(f"(float[{shape},64] x) => (float[] y)", "\n".join(body), kind="float", **constants)


@pytest.mark.parametrize("shape", ["1,8", "N,8", "N,T", "8", "N"])
def test_every_product_of_a_transformer_fuses_and_shortcuts_stay_float(shape, tmp_path):
    """At fixed shapes ONNX Runtime makes Gemm of MatMul and Add before it looks for QDQ."""
    graph = encoder(shape)
    data = samples(graph)
    assert quantize(graph, TARGET, data).facts["quantized"] == 6
    counts = Counter(optimized(graph, tmp_path))
    flat = len(shape.split(",")) == 1
    assert counts["QGemm"] == (6 if flat else 0)
    assert counts["MatMulIntegerToFloat"] == (0 if flat else 6)
    assert counts["DequantizeLinear"] == 0
    assert counts["QuantizeLinear"] == (4 if flat else 6)  # a QGemm in front of Relu writes uint8 itself
    assert not {"MatMul", "Gemm", "FusedGemm", "QLinearAdd"} & counts.keys()


def test_outliers_of_a_norm_do_not_reach_the_shortcut():
    """With shortcuts through uint8 these are 16 dB."""
    graph = encoder("N,8", planted=True)
    data = samples(graph, 4)
    before = [run(graph, feed)["y"] for feed in data]
    quantize(graph, TARGET, data)
    after = [run(graph, feed)["y"] for feed in data]
    assert snr({"y": np.stack(before)}, {"y": np.stack(after)}) > 40


@pytest.mark.parametrize("shape", ["N", "2,8"])
@pytest.mark.parametrize("readers", ["y = MatMul(h, V) z = Exp(h)", "y = MatMul(h, V) z = Identity(h)"])
@pytest.mark.parametrize("product", ["h = MatMul(x, W)", "m = MatMul(x, W) h = Add(m, b)"])
def test_a_product_that_others_read_beside_its_pair(shape, readers, product, tmp_path):
    graph = build(f"(float[{shape},16] x) => (float[] y, float[] z)", f"{product} {readers}", kind="float",
                  W=(16, 16), V=(16, 16), b=16)  # fmt: skip
    assert quantize(graph, TARGET).facts["quantized"] == 2
    counts = Counter(optimized(graph, tmp_path))
    assert counts["QGemm"] + counts["MatMulIntegerToFloat"] == 2
    assert counts["DequantizeLinear"] == 0


@pytest.mark.parametrize("bias", [(24,), (1, 24), (1, 1, 24)])
def test_the_form_of_a_bias(bias, tmp_path):
    graph = build("(float[2,8,16] x) => (float[] y)", "m = MatMul(x, W) y = Add(m, b)", kind="float",
                  W=(16, 24), b=random(bias, "b"))  # fmt: skip
    before = run(graph, next(iter(samples(graph))))
    quantize(graph, TARGET)
    assert node(graph, "Add").inputs[1].shape == (1, 1, 24)
    assert optimized(graph, tmp_path) == ["QuantizeLinear", "MatMulIntegerToFloat", "Add"]
    assert snr(before, run(graph, next(iter(samples(graph))))) > 35


def test_a_matrix_and_its_bias_become_a_gemm_with_an_int32_bias(tmp_path):
    graph = build("(float[N,16] x, float[N,24] r) => (float[] y, float[] z)",
                  "m = MatMul(x, W) y = Add(b, m) k = MatMul(x, V) z = Add(k, r)",
                  kind="float", W=(16, 24), V=(16, 24), b=24)  # fmt: skip
    data = samples(graph)
    before = run(graph, next(iter(data)))
    quantize(graph, TARGET, data)
    assert ops(graph).count("Gemm") == 2
    assert constants(graph)["MatMul_0_bias_quantized"].dtype == np.int32
    assert Counter(optimized(graph, tmp_path)) == {"QuantizeLinear": 1, "QGemm": 2, "Add": 1}
    assert [t.name for t in graph.outputs] == ["y", "z"]
    assert snr(before, run(graph, next(iter(data)))) > 35


def test_what_onnxruntime_does_not_fuse_stays_float(tmp_path):
    """QLinearConv writes uint8 only, and the last convolution writes an output of the graph."""
    graph = build("(float[N,16,6,6] x) => (float[] y)", "c = Conv(x, W) r = Relu(c) y = Conv(r, V, b)", kind="float",
                  W=(16, 16, 3, 3), V=(24, 16, 1, 1), b=24)  # fmt: skip
    outcome = quantize(graph, TARGET)
    assert reasons(outcome) == [f"Conv {EXPANDED}"]
    assert outcome.facts["quantized_nodes"] == ["Conv_0"]
    assert np.array_equal(constants(graph)["V"], random((24, 16, 1, 1), "V").astype(np.float32))
    assert np.array_equal(constants(graph)["b"], random(24, "b").astype(np.float32))
    kinds = Counter(optimized(graph, tmp_path))
    assert (kinds["QLinearConv"], kinds["Conv"], kinds["DequantizeLinear"]) == (1, 1, 1)


def test_a_pool_behind_a_float_convolution_stays_float(tmp_path):
    """ONNX Runtime would move QuantizeLinear in front of the pool, which is slow in uint8 where channels lead."""
    body = "c = Conv(x, W) p = MaxPool<kernel_shape=[2,2]>(c) d = Conv(p, V) y = Tanh(d)"
    graph = build("(float[1,3,8,8] x) => (float[] y)", body, kind="float", W=(16, 3, 3, 3), V=(16, 16, 3, 3))
    assert quantize(graph, TARGET).facts["quantized_nodes"] == ["Conv_2"]
    kinds = optimized(graph, tmp_path)
    assert kinds.index("MaxPool") < kinds.index("QuantizeLinear") < kinds.index("QLinearConv")


def test_float16_has_no_integer_kernels():
    graph = build("(float16[N,16] x) => (float16[] y)", "y = MatMul(x, W)", opset=19, kind="float16",
                  W=random((16, 16), "W").astype(np.float16))  # fmt: skip
    assert reasons(quantize(graph, TARGET)) == ["MatMul stays float: ONNX Runtime has no integer kernels for float16"]
    assert ops(graph) == ["MatMul"]


class Saturating(Session):
    """A session on a processor that saturates: unless it is told to be exact, outputs of large codes are cut off."""

    def __init__(self, model, *args, exact: bool = False, **options):
        super().__init__(model, *args, exact=exact, **options)
        stored = [t for t in onnx.load_from_string(model).graph.initializer if t.data_type == onnx.TensorProto.INT8]
        self.saturates = not exact and any(np.abs(onnx.numpy_helper.to_array(t)).max() > 63 for t in stored)

    def run(self, feed, outputs=None):
        return {name: np.clip(v, -1, 1) if self.saturates else v for name, v in super().run(feed, outputs).items()}


@pytest.mark.parametrize(
    ("reduce_range", "saturates", "target", "bits"),
    [
        ("auto", True, "onnxruntime", 7),
        ("auto", False, "onnxruntime", 8),
        ("off", True, "onnxruntime", 8),
        ("on", False, "onnxruntime", 7),
        ("auto", True, "tensorrt", 8),
        ("on", True, "tensorrt", 7),
    ],
)
def test_weights_have_7_bits_where_8_saturate(reduce_range, saturates, target, bits, monkeypatch):
    monkeypatch.setattr(saturation, "saturates", lambda: saturates)
    monkeypatch.setattr("channelfold.runtime.io.files.Session", Saturating)
    graph = build("(float[N,2,16] x) => (float[] y)", "h = MatMul(x, W) r = Relu(h) y = MatMul(r, V)", kind="float",
                  W=(16, 32), V=(32, 16))  # fmt: skip
    data = samples(graph)
    before = session(graph).run(next(iter(data)))
    outcome = quantize(graph, Quantize(target=target, reduce_range=reduce_range), data)
    assert outcome.facts["weight_bits"] == bits
    assert np.abs(constants(graph)["W_quantized"]).max() == (127 if bits == 8 else 63)
    named = [text for text in outcome.warnings if "7 bits" in text and "saturates" in text]
    assert len(named) == (reduce_range == "auto" and bits == 7)
    assert snr(before, session(graph, exact=True).run(next(iter(data)))) > 30


def test_what_this_machine_does_is_measured():
    found = saturation.saturates()
    assert found is saturation.saturates.__wrapped__()
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if "vnni" in flags:
        assert not found
