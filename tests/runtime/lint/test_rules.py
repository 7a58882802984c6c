"""Every rule finds the smallest graph that breaks it, and the product's own files break none."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest

from channelfold import models
from channelfold.runtime.io.files import import_model, load
from channelfold.runtime.lint import Finding, lint
from channelfold.runtime.lint.rules import RULES
from channelfold.tests.graphs import build
from channelfold.tests.shipped import CALIBRATION, DIGITS

S, Z = np.float32(0.1), np.int8(0)
ROW = "(float[N,32] x) => (float[] y)"
IMAGE = "(float[N,16,8,8] x) => (float[] y)"
QUANTIZED = "q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)"
WEIGHT = "w = DequantizeLinear<axis=1>(W, t, u)"
LINEAR = f"{QUANTIZED}  {WEIGHT}  y = MatMul(d, w)"
CONV = f"{QUANTIZED}  w = DequantizeLinear<axis=0>(W, t, u)  y = Conv(d, w)"


def codes(*shape: int, dtype: Any = np.int8) -> np.ndarray:
    return (np.arange(np.prod(shape)).reshape(shape) % 7).astype(dtype)


def scales(*shape: int) -> np.ndarray:
    return np.full(shape, 0.1, np.float32)


def row(body: str = LINEAR, *, opset: int = 21, kind: str = "float", **constants: Any):
    """A quantized product of 32 inputs and 16 outputs, whose constants can be replaced."""
    known = {"s": S, "z": Z, "W": codes(32, 16), "t": scales(16), "u": np.zeros(16, np.int8)} | constants
    used = {name: value for name, value in known.items() if name in re.findall(r"\w+", body)}
    return build(ROW, body, opset=opset, kind=kind, domains='"com.microsoft": 1', **used)


def image(body: str = CONV, signature: str = IMAGE, **constants: Any):
    known = {"s": S, "z": Z, "W": codes(16, 16, 1, 1), "t": scales(16), "u": np.zeros(16, np.int8)} | constants
    used = {name: value for name, value in known.items() if name in re.findall(r"\w+", body)}
    return build(signature, body, opset=21, kind="float", **used)


def blocked(dtype: Any, group: int, body: str = "", outs: int = 16, axis: int = 0, **constants: Any):
    """A product whose weight has a scale for each ``group`` inputs."""
    shape = (32 // group, outs) if axis == 0 else (32, outs // group)
    body = body or f"w = DequantizeLinear<axis={axis}, block_size={group}>(W, t, u)  y = MatMul(x, w)"
    given = {"W": codes(32, outs, dtype=dtype), "t": scales(*shape), "u": np.zeros(shape, dtype)}
    return row(body, **(given | constants))


def stale():
    text = '<ir_version: 10, opset_import: ["": 17]> g (float[N,4] x) => (float[N,4] y) { c = Relu(x) y = Neg(c) }'
    model = onnx.parser.parse_model(text)
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("c", onnx.TensorProto.FLOAT, [2, 4]))
    return import_model(model)


def defaults():
    graph = build("(float[N,4] x, float[4] b) => (float[] y)", "y = Add(x, b)", kind="float")
    vars(graph)["carried"].graph.initializer.append(onnx.numpy_helper.from_array(np.ones(4, np.float32), "b"))
    return graph


U8: dict[str, Any] = {"z": np.uint8(0)}
BROKEN: dict[str, Any] = {
    "initializer-input": defaults,
    "stale-shapes": stale,
    "not-finite": lambda: row("y = MatMul(x, W)", W=np.full((32, 16), np.inf, np.float32)),
    "mixed-types": lambda: row("h = Cast<to=10>(x)  y = MatMul(h, W)", W=np.ones((32, 16), np.float32)),
    "scale-not-positive": lambda: row(t=np.append(scales(15), np.float32(0))),
    "operator-on-codes": lambda: row(
        f"{QUANTIZED}  p = QLinearMatMul(q, s, z, W, s, z, s, z)  y = DequantizeLinear(p, s, z)"
    ),
    "operator": lambda: row("y = com.microsoft.FastGelu(x)"),
    "attention-cache": lambda: build(
        "(float[1,2,4,8] x) => (float[] y, float[] k, float[] v)", "y, k, v = Attention(x, x, x, , x, x)", opset=23
    ),
    "conv-transpose-bf16": lambda: build(
        IMAGE, "h = Cast<to=16>(x)  c = ConvTranspose(h, W)  y = Cast<to=1>(c)", opset=21, kind="float",
        W=np.ones((16, 16, 1, 1), ml_dtypes.bfloat16),
    ),
    "conv-transpose-int8": lambda: image(CONV.replace("Conv(", "ConvTranspose(").replace("axis=0", "axis=1")),
    "squeeze-axes": lambda: build("(float[N,1,4] x) => (float[] y)", "y = Squeeze(x)", kind="float"),
    "open-sizes": lambda: image("y = Relu(x)"),
    "alike-sizes": lambda: image("y = Relu(x)", "(float[1,3,S,S] x) => (float[] y)"),
    "opset": lambda: row("y = Relu(x)", opset=26),
    "uint8-activation": lambda: row(**U8),
    "no-zero-point": lambda: row("q = QuantizeLinear(x, s)  y = DequantizeLinear(q, s)"),
    "zero-point": lambda: row(z=np.int8(3)),
    "uint8-weight": lambda: row(W=codes(32, 16, dtype=np.uint8), u=np.zeros(16, np.uint8)),
    "weight-rounded-on-call": lambda: row(
        "v = QuantizeLinear<axis=1>(W, t, u)  w = DequantizeLinear<axis=1>(v, t, u)  y = MatMul(x, w)",
        W=np.ones((32, 16), np.float32),
    ),
    "type-of-codes": lambda: row(z=np.int16(0)),
    "int32-bias": lambda: row(
        "b = DequantizeLinear<axis=0>(B, t)  y = Gemm(x, V, b)", B=codes(16, dtype=np.int32), V=np.ones((32, 16))
    ),
    "scale-shape": lambda: image(s=scales(1), z=np.zeros(1, np.int8)),
    "activation-by-channel": lambda: row(
        LINEAR.replace("(x, s", "<axis=1>(x, s").replace("(q, s", "<axis=1>(q, s"), s=scales(32),
        z=np.zeros(32, np.int8),
    ),
    "weight-axis": lambda: row(LINEAR.replace("axis=1", "axis=0"), t=scales(32), u=np.zeros(32, np.int8)),
    "scale-type": lambda: row(f"{WEIGHT}  c = Cast<to=10>(w)  y = MatMul(x, c)", kind="float16"),
    "output-type": lambda: row(
        "w = DequantizeLinear<axis=1, output_dtype=10>(W, t, u)  c = Cast<to=1>(w)  y = MatMul(x, c)", opset=23
    ),
    "blocks-and-activation": lambda: blocked(
        np.int8, 16, f"{QUANTIZED}  w = DequantizeLinear<axis=0, block_size=16>(W, t, u)  y = MatMul(d, w)"
    ),
    "one-block": lambda: blocked(ml_dtypes.int4, 32),
    "int4-by-channel": lambda: row(
        f"{WEIGHT}  y = MatMul(x, w)", W=codes(32, 16, dtype=ml_dtypes.int4), u=np.zeros(16, ml_dtypes.int4)
    ),
    "blocks-of-8-bits": lambda: blocked(np.int8, 16),
    "mixed-codes": lambda: row(
        W=codes(32, 16, dtype=ml_dtypes.float8_e4m3fn), u=np.zeros(16, ml_dtypes.float8_e4m3fn)
    ),
    "gather-of-codes": lambda: build(
        "(int64[N] x) => (float[] y)", "g = Gather(E, x)  y = DequantizeLinear(g, s, z)", kind="float",
        E=codes(32, 16), s=S, z=Z,
    ),
    "narrow": lambda: row(W=codes(32, 4), t=scales(4), u=np.zeros(4, np.int8)),
    "needless-quantizer": lambda: image(f"{QUANTIZED}  y = Relu(d)"),
    "fp8-gpu": lambda: row(W=codes(32, 16, dtype=ml_dtypes.float8_e4m3fn), u=np.zeros(16, ml_dtypes.float8_e4m3fn)),
    "fp4-gpu": lambda: blocked(ml_dtypes.float4_e2m1fn, 16),
    "int4-gpu": lambda: blocked(ml_dtypes.int4, 16),
    "bf16-gpu": lambda: build(ROW, "h = Cast<to=16>(x)  y = Cast<to=1>(h)", kind="float"),
    "float-product-gpu": lambda: row("y = MatMul(x, V)", V=np.ones((32, 16))),
    "float16-conv-gpu": lambda: build(
        IMAGE, CONV, opset=21, kind="float16", s=np.float16(0.1), z=Z, W=codes(16, 16, 1, 1),
        t=scales(16).astype(np.float16), u=np.zeros(16, np.int8),
    ),
    "unknown-operator": lambda: row("y = EfficientNMS_TRT(x)"),
    "transposed-codes": lambda: row(
        "w = DequantizeLinear<axis=0>(W, t, u)  v = Transpose<perm=[1,0]>(w)  y = MatMul(x, v)", W=codes(16, 32)
    ),
    "int2-columns": lambda: row(
        f"{WEIGHT}  y = MatMul(x, w)", opset=25, W=codes(32, 6, dtype=ml_dtypes.int2), t=scales(6),
        u=np.zeros(6, ml_dtypes.int2),
    ),
    "float16-bias": lambda: build(
        ROW, f"{QUANTIZED}  {WEIGHT}  y = Gemm(d, w, b)", opset=21, kind="float16", s=np.float16(1e-3), z=Z,
        W=codes(32, 16), t=np.full(16, 1e-3, np.float16), u=np.zeros(16, np.int8), b=np.ones(16, np.float16),
    ),
    "bf16": lambda: build(
        ROW, "h = Cast<to=16>(x)  m = MatMul(h, W)  y = Cast<to=1>(m)", kind="float",
        W=np.ones((32, 16), ml_dtypes.bfloat16),
    ),
    "fp4": lambda: blocked(ml_dtypes.float4_e2m1fn, 16),
    "saturation": lambda: row(W=np.full((32, 16), 127, np.int8), **U8),
    "expanded-weight": lambda: blocked(ml_dtypes.int4, 8, axis=1),
    "expanded-table": lambda: build(
        "(int64[N] x) => (float[] y)", "t = DequantizeLinear(E, s, z)  y = Gather(t, x)", kind="float",
        E=codes(32, 16), s=S, z=Z,
    ),
    "rounded-on-call": lambda: blocked(
        ml_dtypes.int4, 16,
        "w = DequantizeLinear<axis=0, block_size=16>(W, t, u)  v = QuantizeLinear(w, s, z)"
        "  k = DequantizeLinear(v, s, z)  y = MatMul(x, k)",
    ),
    "group-index": lambda: row(
        "y = com.microsoft.MatMulNBits<K=32, N=16, bits=4, block_size=16>(x, B, C, , G)",
        B=codes(16, 2, 8, dtype=np.uint8), C=scales(32), G=codes(32, dtype=np.int32),
    ),
    "accuracy-level": lambda: row(
        "y = com.microsoft.MatMulNBits<K=32, N=16, bits=8, block_size=16>(x, B, C)",
        B=codes(16, 2, 16, dtype=np.uint8), C=scales(32),
    ),
    "float-gemm": lambda: row(LINEAR.replace("y = MatMul", "m = MatMul") + "  y = Add(m, b)", b=np.ones(16)),
    "int8-activation": row,
}  # fmt: skip


def found(graph, target: str, sm: int | None = None) -> dict[str, Finding]:
    return {finding.rule.id: finding for finding in lint(graph, RULES, target, sm)}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_a_rule_finds_the_smallest_graph_that_breaks_it(rule):
    finding = found(BROKEN[rule.id](), rule.targets[0], rule.below and rule.below - 1)[rule.id]
    assert finding.node
    assert finding.level == rule.level
    for target in rule.targets:
        assert rule.id not in found(row("y = Relu(x)", opset=21), target) or rule.id == "open-sizes"
    if rule.below:
        assert rule.id not in found(BROKEN[rule.id](), "tensorrt", 120)


def test_sound_graphs_break_no_rule():
    for graph in (row(), image(), blocked(ml_dtypes.int4, 16)):
        assert set(found(graph, "tensorrt", 89)) == {"open-sizes"}
    assert found(blocked(ml_dtypes.int4, 16), "onnxruntime") == {}


def test_every_rule_is_said_in_whole_sentences():
    assert len({rule.id for rule in RULES}) == len(RULES) == len(BROKEN)
    assert all(rule.checks.endswith(".") and not rule.fix.endswith(".") for rule in RULES)


@pytest.mark.parametrize("model", [DIGITS, models.path("digits_vit.onnx")], ids=["cnn", "vit"])
@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("tensorrt", ()),
        ("onnxruntime", ()),
        ("tensorrt", ("--weights-only", "--weights", "int4", "--group", "16")),
        ("onnxruntime", ("--weights-only", "--weights", "int4", "--group", "16")),
        ("tensorrt", ("--weights-only", "--weights", "fp8")),
    ],
    ids=["int8", "int8-onnxruntime", "int4", "int4-onnxruntime", "fp8"],
)
def test_the_products_own_files_raise_no_alarm(run, model, target, options, tmp_path):
    out = tmp_path / "out.onnx"
    run("quantize", model, "-o", out, "--calibration", CALIBRATION, "--target", target, *options)
    assert [one for one in lint(load(out), RULES, target, 89) if one.level != "note"] == []
