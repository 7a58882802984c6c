"""Blocks of scales times quantized activations: found in the graph, and in the plan that TensorRT builds."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
import pytest

from channelfold.runtime.engine import build as tensorrt
from channelfold.runtime.engine.blocks import wrong_products
from channelfold.runtime.io.files import save
from channelfold.tests.graphs import build, random

CODES = {"int4": ml_dtypes.int4, "int8": np.int8, "fp8": ml_dtypes.float8_e4m3fn}
PLANTED = [
    (kind, axis, ins, outs, group)
    for kind in ("int4", "int8")
    for axis in (0, 1)
    for ins, outs, group in ((128, 64, 16), (96, 128, 32), (160, 240, 80))
] + [("fp8", 0, 128, 64, 32), ("fp8", 1, 64, 96, 16)]


def dequantized(name: str, kind: str, shape: tuple[int, int], axis: int, group: int) -> tuple[str, dict]:
    """The text of a DequantizeLinear in blocks, and its constants."""
    scales = list(shape)
    scales[axis] = -(-scales[axis] // group) if group else 1
    scale = np.abs(random(tuple(scales), f"{name}s")).astype(np.float16) / 100 + np.float16(0.01)
    codes = np.clip(np.rint(4 * random(shape, name)), -7, 7).astype(CODES[kind])
    block = f"<axis={axis},block_size={group or shape[axis]}>"
    return f"{name} = DequantizeLinear{block}({name}_q, {name}_s)", {f"{name}_q": codes, f"{name}_s": scale}


def planted(forms: list[tuple[str, int, int, int, int]], behind: str = "Identity") -> gs.Graph:
    """Products of one quantized input with blocked weights, one for each form."""
    texts, constants = [], {"one": np.float16(0.05), "zero": np.int8(0), "zero8": np.zeros((), CODES["fp8"])}
    inputs = []
    for index, (kind, axis, ins, outs, group) in enumerate(forms):
        text, own = dequantized(f"w{index}", kind, (ins, outs), axis, group)
        zero = "zero8" if kind == "fp8" else "zero"
        inputs.append(f"float16[8,{ins}] x{index}")
        texts += [
            f"q{index} = QuantizeLinear(x{index}, one, {zero})",
            f"d{index} = DequantizeLinear(q{index}, one, {zero})",
            f"m{index} = {behind}(d{index})",
            text,
            f"y{index} = MatMul(m{index}, w{index})",
        ]
        constants |= own
    outputs = ", ".join(f"float16[] y{index}" for index in range(len(forms)))
    graph = build(f"({', '.join(inputs)}) => ({outputs})", " ".join(texts), opset=21, **constants)
    for node in graph.nodes:
        node.name = node.outputs[0].name
    return graph


def test_every_planted_product_is_found_in_the_graph():
    expected = [f"y{index}" for index in range(len(PLANTED))]
    assert list(wrong_products(planted(PLANTED))) == expected
    assert list(wrong_products(planted(PLANTED, "Transpose<perm=[0,1]>"))) == expected


def test_what_is_right_is_not_found():
    """One block, a float operand in between, a weight without blocks, a float activation."""
    assert wrong_products(planted([("int4", 0, 128, 64, 0)])) == {}
    assert wrong_products(planted(PLANTED, "Relu")) == {}  # TensorRT multiplies in float
    text, own = dequantized("w", "int4", (64, 32), 0, 16)
    graph = build("(float16[8,64] x) => (float16[] y)", f"{text} y = MatMul(x, w)", opset=21, **own)
    assert wrong_products(graph) == {}


def test_blocks_that_do_not_fill_an_axis_are_found():
    """180 entries in blocks of 64 become blocks of 60; 190 in blocks of 64 TensorRT refuses by itself."""
    for size, reason in ((180, "its weight has 180 entries in blocks of 64, which TensorRT would make 60"), (190, "")):
        text, own = dequantized("w", "int4", (size, 32), 0, 64)
        graph = build(f"(float16[8,{size}] x) => (float16[] y)", f"{text} y = MatMul(x, w)", opset=21, **own)
        assert list(wrong_products(graph).values()) == [reason] * bool(reason)


@pytest.mark.rtx
@pytest.mark.parametrize("sm", [86, 89])
def test_every_planted_product_is_found_in_the_plan(sm, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    forms = [form for form in PLANTED if sm >= 89 or form[0] != "fp8"]
    save(planted(forms), tmp_path / "m.onnx")
    engine = tensorrt.build(tmp_path / "m.onnx", tmp_path / "m.engine", sm=sm)
    assert engine.plan.wrong == [f"y{index}" for index in range(len(forms))]
    save(planted(forms, "Relu"), tmp_path / "float.onnx")
    engine = tensorrt.build(tmp_path / "float.onnx", tmp_path / "m.engine", sm=sm)
    assert engine.plan.wrong == []
    assert {run.verdict for run in engine.plan.nodes.values()} == {"fused", "dequantized first"}


def test_build_refuses(fails, tmp_path):
    save(planted([("int4", 0, 128, 64, 16)]), tmp_path / "m.onnx")
    text = fails(1, "build", tmp_path / "m.onnx", "-o", tmp_path / "m.engine", "--sm", 89)
    assert "TensorRT would compute 1 nodes of m.onnx wrongly, without a warning: y0: an activation is quantized" in text
    assert not (tmp_path / "m.engine").exists()


@pytest.mark.rtx
def test_tensorrt_takes_no_notice_of_a_block_size(tmp_path):
    """180 entries in blocks of 64 and in blocks of 60 become the same engine."""
    pytest.importorskip("tensorrt_rtx")
    engines = []
    for group in (64, 60):
        _, own = dequantized("w", "int4", (180, 32), 0, 60)
        text = f"w = DequantizeLinear<axis=0,block_size={group}>(w_q, w_s) y = MatMul(x, w)"
        graph = build("(float16[8,180] x) => (float16[] y)", text, opset=21, **own)
        save(graph, tmp_path / "m.onnx")
        tensorrt.build(tmp_path / "m.onnx", tmp_path / "m.engine", sm=89)
        engines.append((tmp_path / "m.engine").read_bytes())
    assert engines[0] == engines[1]
