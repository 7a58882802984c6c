"""What ONNX Runtime and TensorRT compute of quantized graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from channelfold.passes.quantize import Quantize
from channelfold.runtime.io.files import import_model, load, raise_opset, save, session
from channelfold.runtime.io.session import Session
from channelfold.tests import strategies
from channelfold.tests.graphs import build, random, reasons, whole
from channelfold.tests.passes.quantize.quantized import network, quantize, samples, snr


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
@pytest.mark.parametrize("calibrator", ["minmax", "mse"])
def test_accuracy_of_a_network(target, calibrator, tmp_path):
    """30 dB is a noise of 3 % of the signal; these reach 35 or more."""
    graph = network()
    data = samples(graph, 8)
    before = [session(graph).run(feed) for feed in data]
    quantize(graph, Quantize(target=target, calibrator=calibrator), data)
    save(graph, tmp_path / "quantized.onnx")
    onnx.checker.check_model(tmp_path / "quantized.onnx", full_check=True)
    runner = Session(tmp_path / "quantized.onnx")
    found = [runner.run(feed) for feed in data]
    assert snr({"y": np.stack([b["y"] for b in before])}, {"y": np.stack([f["y"] for f in found])}) > 32


def test_old_models_whose_weights_are_computed_are_refused(tmp_path):
    """The large models of ONNX's backend suite: opset 9, every weight made at run time by ConstantOfShape."""
    for file in sorted(Path(onnx.__file__).parent.glob("backend/test/data/light/*.onnx")):
        graph = raise_opset(load(file), 13)
        outcome = quantize(graph)
        assert outcome.facts["quantized"] == 0, file.name
        assert outcome.refused
        assert all("ConstantOfShape" in reason or "computed" in reason for reason in reasons(outcome)), reasons(outcome)


@given(
    data=st.data(), target=st.sampled_from(["tensorrt", "onnxruntime"]), calibrator=st.sampled_from(["minmax", "mse"])
)
@settings(max_examples=25, deadline=None, suppress_health_check=(HealthCheck.too_slow,))
def test_random_networks(data, target, calibrator):
    """Whatever the graph: no crash, a model that runs, and outputs that stay near the float ones."""
    graph = data.draw(strategies.graphs())
    floats = _as_float32(graph)
    feeds = samples(floats, 6)
    before = [session(floats).run(feed) for feed in feeds]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("channelfold.passes.quantize.static.MIN_CHANNELS", 1)
        quantize(floats, Quantize(target=target, calibrator=calibrator), feeds)
    after = [session(floats).run(feed) for feed in feeds]
    for name in before[0]:
        old, new = (np.stack([run[name] for run in runs]) for runs in (before, after))
        assert np.isfinite(new).all()
        assert snr({name: old}, {name: new}) > 10 or np.square(old - new).sum() < 1e-10


def _as_float32(graph: gs.Graph) -> gs.Graph:
    model = whole(graph)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    del model.graph.value_info[:]
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.DOUBLE:
            tensor.CopyFrom(
                onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.float32), tensor.name)
            )
    for member in model.graph.node:
        for attribute in member.attribute:
            if member.op_type == "Cast" and attribute.i == onnx.TensorProto.DOUBLE:
                attribute.i = onnx.TensorProto.FLOAT
    return import_model(model)


@pytest.mark.rtx
def test_tensorrt_runs_every_quantized_node_in_int8(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    from channelfold.runtime.engine import build as tensorrt

    weights: dict[str, Any] = {name: random((64, 64), name) / 8 for name in "QKVOF"}
    attention = build(
        "(float[2,16,64] x) => (float[] y)",
        """
        q = MatMul(x, Q) k = MatMul(x, K) v = MatMul(x, V)
        t = Transpose<perm=[0,2,1]>(k)
        s = MatMul(q, t) a = Softmax<axis=-1>(s) m = MatMul(a, v)
        o = MatMul(m, O) r = Add(o, x) y = MatMul(r, F)
        """,
        kind="float", **weights,
    )  # fmt: skip
    cnn = network()
    for name, graph in (("cnn", cnn), ("attention", attention)):
        graph.inputs[0].shape = [2, *graph.inputs[0].shape[1:]]
        outcome = quantize(graph)
        save(graph, tmp_path / f"{name}.onnx")
        engine = tensorrt.build(tmp_path / f"{name}.onnx", tmp_path / f"{name}.engine", sm=89)
        assert engine.plan.readable, engine.plan.reason
        runs = {n: engine.plan.nodes[n].arithmetic for n in outcome.facts["quantized_nodes"]}
        assert set(runs.values()) == {"int8"}, (name, runs)
