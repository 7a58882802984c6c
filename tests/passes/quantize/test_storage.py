"""Weights of float nodes in 8 bits: the graph, the numbers, and what runtimes make of it."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from channelfold.passes.base import Context, Outcome
from channelfold.passes.fold import FoldConstants
from channelfold.passes.layers import account
from channelfold.passes.layers.linear import linears
from channelfold.passes.quantize import Quantize, QuantizeWeights
from channelfold.passes.quantize.storage import store_rest
from channelfold.runtime.engine import build as tensorrt
from channelfold.runtime.io.files import import_model, save, session
from channelfold.tests.graphs import build, changes, constants, listing, random, reasons, whole
from channelfold.tests.passes.quantize.quantized import optimized, quantize, samples, snr

READERS = {  # of a weight W: the input, the shapes of the weight, of its codes and of its scales
    "y = Conv(x, W)": ("1,4,8,8", (256, 4, 3, 2), (256, 1, 24), (256, 1, 1)),
    "y = Conv<group=2>(x, W)": ("1,64,8,8", (64, 32, 3, 3), (64, 6, 48), (64, 6, 1)),
    "y = ConvTranspose(x, W)": ("1,4,8,8", (4, 96, 5, 5), (4, 40, 60), (4, 40, 1)),
    "y = MatMul(x, W)": ("2,16,128", (128, 64), (2, 64, 64), (2, 1, 64)),
    "y = MatMul(x, W) ": ("4,16,32", (4, 32, 64), (4, 1, 32, 64), (4, 1, 1, 64)),
    "y = MatMul(W, x)": ("2,128,16", (64, 128), (64, 2, 64), (64, 2, 1)),
    "y = Gemm(x, W)": ("16,128", (128, 64), (2, 64, 64), (2, 1, 64)),
    "y = Gemm<transB=1>(x, W)": ("16,127", (64, 127), (64, 1, 127), (64, 1, 1)),
    "y = GRU<hidden_size=128>(x, K, W)": ("5,1,24", (1, 384, 128), (1, 384, 2, 64), (1, 384, 2, 1)),
    "i = Cast<to=7>(x) y = Gather(W, i)": ("3", (1000, 8), (1000, 1, 8), (1000, 1, 1)),
}


def changed() -> Outcome:
    """What a pass has done before it stores the rest."""
    outcome = Outcome()
    outcome.change("other", "int8")
    return outcome


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["float", "float16"])
def test_every_layout(reader, kind, tmp_path):
    """Inputs that share a scale, wherever a node has them in its weight; runtimes see the float graph."""
    size, *shapes = READERS[reader]
    held: dict[str, Any] = {"W": 0.1 * random(shapes[0], "W"), "K": 0.1 * random((1, 384, 24), "K")}
    graph = build(f"({kind}[{size}] x) => ({kind}[] y)", reader, kind=kind, **held)
    ops, weight = optimized(graph, tmp_path), constants(graph)["W"]
    before = session(graph).run(feed := next(iter(samples(graph))))
    store_rest(graph, outcome := changed(), Quantize())
    assert outcome.facts["expanded"] == [graph.nodes[-1].name]
    stored = constants(graph)
    assert [weight.shape, stored["W_codes"].shape, stored["W_scales"].shape] == shapes
    expanded = (stored["W_codes"].astype(np.float32) - 128) * stored["W_scales"]
    assert snr({"W": weight}, {"W": expanded.reshape(weight.shape)}) > 42
    assert snr(before, session(graph).run(feed)) > 40
    assert optimized(graph, tmp_path) == ops


def network(**more: Any) -> gs.Graph:
    """A filter of one channel, which stays float, and a product in int8."""
    values: dict[str, Any] = {"W": 0.1 * random((64, 1, 1, 128), "W"), "V": 0.1 * random((64, 32), "V")}
    text = "c = Conv<strides=[1,64]>(x, W) m = ReduceMax<axes=[2,3],keepdims=0>(c) y = MatMul(m, V)"
    return build("(float[2,1,1,512] x) => (float[] y)", text, kind="float", **values | more)


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_a_node_that_stays_float(target):
    graph = network()
    before = session(graph).run(feed := next(iter(samples(graph))))
    outcome = quantize(graph, Quantize(target=target))
    assert reasons(outcome) == ["Conv stays float: fewer than 16 channels"]
    assert listing(graph).splitlines()[:5] == [
        "W_Cast_output = Cast<to=1>(W_codes)",
        "W_Sub_output = Sub(W_Cast_output, W_middle)",
        "W_Mul_output = Mul(W_Sub_output, W_scales)",
        "W_Reshape_output = Reshape(W_Mul_output, W_shape)",
        "c = Conv<strides=[1, 64]>(x, W_Reshape_output)",
    ]
    assert snr(before, session(graph).run(feed)) > 35
    rows = [row for row in account.account(graph, {}) if row.reason != account.VECTOR]
    assert {(row.op, row.state, row.reason, row.bytes) for row in rows} == {
        ("Conv", "uint8", account.EXPANDED, 4 * 64 * 128),
        ("MatMul", "int8", "", 4 * 64 * 32),
    }
    assert account.share(rows) == 1


def test_later_passes_leave_it():
    """What is stored in 8 bits is neither folded to float again nor taken for a product of two activations."""
    graph = network()
    quantize(graph)
    assert not FoldConstants().apply(graph, Context()).changed
    assert not linears(graph)
    again = Quantize().apply(graph, Context(calibration=samples(graph)))
    assert reasons(again) == [
        "Conv stays float: its weight is quantized already",
        "MatMul stays float: its weight is quantized already",
    ]


@pytest.mark.parametrize(
    ("step", "more"),
    [
        (Quantize(exclude=("Conv_0",)), {}),
        (Quantize(exclude_ops=("Conv",)), {}),
        (QuantizeWeights(exclude=("Conv_0",)), {}),
        (Quantize(), {"W": random((64, 1, 1, 90), "W")}),
    ],
    ids=["name", "operator", "weights", "small"],
)
def test_what_stays_float_as_well(step, more):
    graph = network(**more)
    outcome = step.apply(graph, Context(calibration=samples(network())))
    assert len(changes(outcome)) == 1
    assert outcome.facts["expanded"] == []
    assert "W" in constants(graph)


def test_other_weights():
    """A table that an option leaves in float, a weight of bfloat16 or with NaN, and one that an Add reads too."""
    table = build("(int64[2] i) => (float[] y)", "y = Gather(E, i)", kind="float", E=random((1000, 8), "E"))
    store_rest(table, outcome := changed(), Quantize(embeddings=False))
    wide = random((96, 96), "W").astype(ml_dtypes.bfloat16)
    brain = build("(bfloat16[2,96] x) => (bfloat16[] y)", "y = MatMul(x, W)", kind="bfloat16", W=wide)
    store_rest(brain, outcome, Quantize())
    lost = build("(float[2,96] x) => (float[] y)", "y = MatMul(x, W)", kind="float", W=np.full((96, 96), np.nan))
    store_rest(lost, outcome, Quantize())
    both = build("(float[2,96] x) => (float[] y)", "s = Add(x, W) y = MatMul(s, W)", kind="float",
                 W=random((2, 96, 96), "W"))  # fmt: skip
    store_rest(both, outcome, Quantize())
    assert outcome.facts["expanded"] == []
    assert [graph.nodes[0].op for graph in (table, brain, lost, both)] == ["Gather", "MatMul", "MatMul", "Add"]


def test_notes_of_the_exporter():
    """They are left out where they are a large part of the file, and kept where nothing was quantized."""
    model = whole(network())
    for node in model.graph.node:
        node.doc_string = f"a stack trace of {node.name} " * 200
        node.metadata_props.add(key="namespace", value="encoder/layer")
    graph = import_model(model)
    store_rest(graph, Outcome(), Quantize())
    assert [node.doc_string for node in whole(graph).graph.node] == [node.doc_string for node in model.graph.node]
    outcome = quantize(graph)
    (warning,) = outcome.warnings
    assert warning.startswith("What the exporter had noted at the nodes was left out: ")
    assert not any(node.doc_string or node.metadata_props for node in whole(graph).graph.node)


@pytest.mark.rtx
def test_tensorrt_builds_the_float_engine(tmp_path):
    """Behind DequantizeLinear the weight would take a kernel of its own. Two engines take 2.5 seconds."""
    pytest.importorskip("tensorrt_rtx")
    text = "c = Conv(x, W) y = Relu(c)"
    graph = build("(float[1,1,1,512] x) => (float[] y)", text, kind="float", W=random((64, 1, 1, 128), "W"))
    found = []
    for _ in range(2):
        save(graph, tmp_path / "m.onnx")
        built = tensorrt.build(tmp_path / "m.onnx", tmp_path / "m.engine", sm=89)
        assert not built.warnings
        found.append([(kernel.name, kernel.arithmetic) for kernel in built.plan.kernels])
        store_rest(graph, changed(), Quantize())
    assert onnx.load(tmp_path / "m.onnx").graph.node[0].op_type == "Cast"
    assert found[0] == found[1]
