"""Joint products of queries, keys and values for TensorRT: which are taken apart, and that nothing else changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from channelfold.passes.base import Context
from channelfold.passes.quantize import Quantize, static
from channelfold.passes.quantize.joint import take_apart
from channelfold.passes.quantize.static import Work
from channelfold.runtime.engine.repair import plan_of
from channelfold.runtime.io.files import session
from channelfold.tests.graphs import build, listing, ops, random
from channelfold.tests.passes.quantize.quantized import quantize, samples

BIASED = "m = MatMul(x, W) j = Add(m, b) "
HEADS = "r = Reshape(j, s) t = Transpose<perm=[2,0,3,1,4]>(r) "
MULTIPLIED = "k = Transpose<perm=[0,1,3,2]>(k0) p = MatMul(q, k) y = MatMul(p, v)"
FIRST = HEADS + "q = Gather(t, i0) k0 = Gather(t, i1) e = Slice(t, i2, i3, axes) v = Squeeze(e, axes) " + MULTIPLIED
SPLIT = "q, k, v = Split<axis=AXIS>(j) p = Mul(q, k) y = Add(p, v)"
MODELS = {  # and the number of parts
    "heads": (BIASED + FIRST, 3),
    "without a bias": ("j = MatMul(x, W) " + FIRST, 3),
    "without moves": (BIASED + "t = Reshape(j, s) q, k, v = Split<axis=2>(t) p = Mul(q, k) y = Add(p, v)", 3),
    "split": (BIASED + SPLIT.replace("AXIS", "-1"), 3),
    "gemm": ("f = Reshape(x, rows) g = Gemm(f, W, b) j = Reshape(g, tokens) " + SPLIT.replace("AXIS", "2"), 3),
    "transposed": ("f = Reshape(x, rows) j = Gemm<transB=1>(f, V, b) " + SPLIT.replace("AXIS", "1"), 3),
    "interleaved": (BIASED + "t = Reshape(j, last) q, k, v = Split<axis=3>(t) p = Mul(q, k) y = Add(p, v)", 0),
    "other axis": (BIASED + "t = Reshape(j, s) q, k = Split<axis=3>(t) y = Mul(q, k)", 0),
    "unequal": (BIASED + "q, k = Split<axis=-1>(j, sizes) h = ReduceMax<axes=[2]>(k) y = Mul(q, h)", 0),
    "whole": (BIASED + "y = Relu(j)", 0),
    "whole as well": (
        BIASED + "z = Relu(j) " + SPLIT.replace("y =", "w =").replace("AXIS", "-1") + " y = Add(w, w)",
        0,
    ),
}


def model(text: str, width: int = 64, heads: int = 4, head: int = 8) -> gs.Graph:
    outs = 3 * heads * head
    weight = 0.1 * random((width, outs), "W")
    numbers = {"s": [0, 0, 3, heads, head], "last": [0, 0, 4, 3, 8], "rows": [10, 64], "tokens": [2, 5, 96],
               "sizes": [32, 64], "i0": 0, "i1": 1, "i2": [2], "i3": [3], "axes": [0]}  # fmt: skip
    held: dict[str, Any] = {name: np.array(value) for name, value in numbers.items() if name in text}
    held |= {"W": weight} if "W" in text else {"V": weight.T}
    held |= {"b": random(outs, "b")} if "b)" in text else {}
    held |= {"U": 0.1 * random((width, width), "U")} if "U" in text else {}
    return build(f"(float[2,5,{width}] x) => (float[] y)", text, kind="float", **held)


@pytest.mark.parametrize("name", MODELS)
def test_the_same_numbers(name, monkeypatch):
    """Whether the product is taken apart or not, the quantized model computes the same, bit by bit."""
    text, parts = MODELS[name]
    apart, joint = model(text), model(text)
    outcome = quantize(apart)
    monkeypatch.setattr(static, "take_apart", lambda *_: None)
    assert quantize(joint).facts == outcome.facts
    assert ops(apart).count("Concat") == bool(parts)
    assert ops(apart).count("DequantizeLinear") == 1 + max(parts, 1)  # of the activation, and of weights
    feed = next(iter(samples(joint)))
    assert np.array_equal(*(session(graph, optimize=False).run(feed)["y"] for graph in (apart, joint)))


def test_the_graph():
    graph = model(MODELS["heads"][0])
    quantize(graph)
    assert listing(graph).splitlines()[2:10] == [
        "W_dequantized_1 = DequantizeLinear<axis=1>(W_quantized_part, W_scale_part, W_zero_point_part)",
        "W_dequantized_2 = DequantizeLinear<axis=1>(W_quantized_part_1, W_scale_part_1, W_zero_point_part_1)",
        "W_dequantized_3 = DequantizeLinear<axis=1>(W_quantized_part_2, W_scale_part_2, W_zero_point_part_2)",
        "m_part = MatMul(x_dequantized, W_dequantized_1)",
        "m_part_1 = MatMul(x_dequantized, W_dequantized_2)",
        "m_part_2 = MatMul(x_dequantized, W_dequantized_3)",
        "m = Concat<axis=-1>(m_part, m_part_1, m_part_2)",
        "j = Add(m, b)",
    ]


def test_nodes_that_are_compared_one_by_one():
    """A search, and the measurement for --float-share, find the whole weight at the node."""
    graph = model(MODELS["split"][0])
    Work().apply(graph, Context(calibration=samples(graph), compared=True))
    assert "Concat" not in ops(graph)
    text = "n = MatMul(x, U) " + MODELS["split"][0].replace("MatMul(x", "MatMul(n")
    graph = model(text)
    outcome = quantize(graph, Quantize(float_share=0.5))
    assert len(outcome.changed) == len(outcome.refused) == 1
    assert ops(graph).count("Concat") == (outcome.changed[0].node == "MatMul_1")


@pytest.mark.rtx
def test_tensorrt_computes_all_parts_in_int8(monkeypatch):
    """The joint product it computes in float. Builds two engines of an attention, which takes 2 seconds."""
    pytest.importorskip("tensorrt_rtx")
    kinds = []
    for joint in (False, True):
        monkeypatch.setattr(static, "take_apart", (lambda *_: None) if joint else take_apart)
        graph = model(MODELS["heads"][0], width=120, heads=8, head=15)
        quantize(graph)
        nodes = plan_of(graph, 89, samples(graph)).nodes
        kinds.append([run.arithmetic for name, run in nodes.items() if name.startswith("MatMul_0")])
    assert kinds == [["int8"] * 3, ["float"]]
