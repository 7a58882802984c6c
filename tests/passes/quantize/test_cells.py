"""Recurrent cells with weights in few bits: the graph, the numbers, and what each runtime makes of it."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from channelfold.passes.base import Context
from channelfold.passes.layers import account
from channelfold.passes.quantize import Quantize, QuantizeWeights
from channelfold.runtime.engine import build as tensorrt
from channelfold.runtime.engine.build import ShapeRange
from channelfold.runtime.io.files import raise_opset, save, session
from channelfold.tests.graphs import build, constants, data_from, listing, random, reasons
from channelfold.tests.passes.quantize.quantized import optimized, snr

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
RNG = np.random.default_rng(0)
FEED = {"x": RNG.standard_normal((12, 2, 24)).astype(np.float32)}
LEAST = {"int8": 40, "int4": 17, "fp8": 28}  # dB


def cell(op: str, both: bool = False, extra: str = "", inputs: int = 24, **more: np.ndarray) -> gs.Graph:
    """A cell of 32 hidden channels; the weights of the second direction are half as large."""
    dirs, rows = 1 + both, GATES[op] * 32
    size = np.array([1.0, 0.5][:dirs])[:, None, None]
    held = {"W": random((dirs, rows, inputs), "W") * size / 4, "R": random((dirs, rows, 32), "R") * size / 6}
    attrs = 'hidden_size=32, direction="bidirectional"' if both else "hidden_size=32"
    attrs += ", linear_before_reset=1" if op == "GRU" else ""
    return build(f"(float[T,B,{inputs}] x) => (float[] y, float[] h)", f"y, h = {op}<{attrs}>(x, W, R, b{extra})",
                 kind="float", **held | {"b": 0.1 * random((dirs, 2 * rows), "b")} | more)  # fmt: skip


def apply(graph: gs.Graph, step: Quantize | QuantizeWeights):
    """The outputs before, the quantized graph, and the outcome."""
    before = session(graph).run(FEED)
    graph = raise_opset(graph, step.opset_for(graph))
    outcome = step.apply(graph, Context(calibration=data_from(FEED)))
    return before, graph, outcome


@pytest.mark.parametrize("op", ["LSTM", "RNN"])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
def test_weights_behind_dequantizelinear(op, both, name):
    before, graph, outcome = apply(cell(op, both, inputs=24), QuantizeWeights(weights=name, group=8))
    assert [change.what for change in outcome.changed] == [f"{op}: weights in {constants(graph)['W_quantized'].dtype}"]
    assert graph.nodes[-1].op == op
    assert snr(before, session(graph, optimize=False).run(FEED)) > LEAST[name]
    assert account.share(account.account(graph, {})) == 1
    assert outcome.facts["linears"] == outcome.facts["quantized"] == 1


def test_what_is_printed():
    _, graph, _ = apply(cell("LSTM", both=True), Quantize())
    assert listing(graph) == (
        "W_dequantized = DequantizeLinear<axis=1>(W_quantized, W_scale, W_zero_point)\n"
        "R_dequantized = DequantizeLinear<axis=1>(R_quantized, R_scale, R_zero_point)\n"
        "y, h = LSTM<direction=bidirectional, hidden_size=32>(x, W_dequantized, R_dequantized, b)"
    )
    shapes = {name: array.shape for name, array in constants(graph).items() if name.startswith("W_")}
    assert shapes == {"W_quantized": (2, 128, 24), "W_scale": (128,), "W_zero_point": (128,)}


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("extra", ["", ", lengths", ", lengths, h0, c0, P"])
def test_onnxruntime_computes_an_lstm_in_integers(both, extra, tmp_path):
    given = {"lengths": np.array([9, 12], np.int32), "h0": 0.1 * random((1 + both, 2, 32), "h0"),
             "c0": 0.1 * random((1 + both, 2, 32), "c0"), "P": 0.1 * random((1 + both, 96), "P")}  # fmt: skip
    held = {name: given[name] for name in extra.replace(",", "").split()}
    before, graph, outcome = apply(cell("LSTM", both, extra, **held), Quantize(target="onnxruntime"))
    assert [change.what for change in outcome.changed] == ["LSTM: weights in int8"]
    assert optimized(graph, tmp_path) == ["DynamicQuantizeLSTM"]
    for optimize in (False, True):
        after = session(graph, optimize=optimize).run(FEED)
        for direction in range(1 + both):
            sides = [{"y": found["y"][:, direction]} for found in (before, after)]
            assert snr(*sides) > 36
    (row,) = [row for row in account.account(graph, {}) if row.op == "DynamicQuantizeLSTM"]
    assert (row.state, row.bytes, row.tensors) == ("int8", (1 + both) * 4 * 128 * (24 + 32), 2)


def test_seven_bits_for_processors_that_saturate():
    before, graph, _ = apply(cell("LSTM"), Quantize(target="onnxruntime", reduce_range="on"))
    assert np.abs(constants(graph)["R_quantized"]).max() == 63
    assert snr(before, session(graph).run(FEED)) > 33


def test_float16():
    graph = build("(float16[T,B,24] x) => (float16[] y)", "y = LSTM<hidden_size=32>(x, W, R)", kind="float16",
                  W=random((1, 128, 24), "W") / 4, R=random((1, 128, 32), "R") / 6)  # fmt: skip
    step = QuantizeWeights()
    assert step.opset_for(graph) == 19
    outcome = step.apply(raise_opset(graph, 19), Context())
    assert len(outcome.changed) == 1


@pytest.mark.parametrize(
    ("graph", "step", "says"),
    [
        (cell("GRU"), Quantize(), "GRU stays float: TensorRT fails to build a GRU whose weights are"),
        (cell("GRU"), Quantize(target="onnxruntime"), "GRU stays float: ONNX Runtime would expand its weights"),
        (cell("LSTM"), QuantizeWeights(target="onnxruntime"), "LSTM stays float: ONNX Runtime would expand its"),
        (cell("LSTM"), Quantize(exclude_ops=("LSTM",)), "LSTM stays float: excluded by operator type LSTM"),
        (cell("RNN", inputs=8), Quantize(), "RNN stays float: fewer than 16 channels"),
        (cell("LSTM", W=np.full((1, 128, 24), np.nan)), Quantize(), "LSTM stays float: its weights hold infinities"),
        (cell("LSTM"), QuantizeWeights(weights="int4", group=16), None),
        (cell("LSTM", inputs=40), QuantizeWeights(weights="int4", group=16), "its inputs are no multiple of the group"),
    ],
)  # fmt: skip
def test_cells_that_stay_float(graph, step, says):
    graph = raise_opset(graph, step.opset_for(graph))
    feed = {"x": np.ones((3, 2, graph.inputs[0].shape[2]), np.float32)}
    outcome = step.apply(graph, Context(calibration=data_from(feed)))
    assert [says in reason for reason in reasons(outcome)] == ([True] if says else [])
    assert bool(outcome.changed) == (says is None)


@pytest.mark.rtx
@pytest.mark.parametrize("op", ["LSTM", "RNN"])
@pytest.mark.parametrize("both", [False, True])
def test_tensorrt_keeps_the_codes(op, both, tmp_path):
    """An engine with codes is smaller by half of what the float weights take, or more."""
    pytest.importorskip("tensorrt_rtx")
    sizes = []
    for quantized in (False, True):
        dirs, rows = 1 + both, GATES[op] * 512
        attrs = 'hidden_size=512, direction="bidirectional"' if both else "hidden_size=512"
        graph = build("(float[T,B,512] x) => (float[] y)", f"y = {op}<{attrs}>(x, W, R)", kind="float",
                      W=random((dirs, rows, 512), "W") / 16, R=random((dirs, rows, 512), "R") / 16)  # fmt: skip
        if quantized:
            assert QuantizeWeights().apply(graph, Context()).changed
        save(graph, tmp_path / "m.onnx")
        shapes = {"x": ShapeRange((1, 1, 512), (8, 1, 512), (16, 2, 512))}
        sizes.append(tensorrt.build(tmp_path / "m.onnx", tmp_path / "m.engine", sm=89, shapes=shapes).size)
    assert sizes[0] - sizes[1] > 0.5 * 2 * dirs * rows * 512 * 4
