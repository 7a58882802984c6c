"""The shipped vision transformers: what is in their graphs, and what folding their idle channels makes of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_graphsurgeon as gs
import pytest

from channelfold.models import MODELS, path, train_digits_vits
from channelfold.runtime import jobs
from channelfold.runtime.io import files
from channelfold.runtime.io.session import Session

C, HIDDEN, ACTIVE, DEPTH = 48, 192, 48, 4

REPAVITS = ("digits_repavit", "digits_repavit_ln")
each_repavit = pytest.mark.parametrize("name", REPAVITS)


def operators(graph: gs.Graph) -> Counter[str]:
    return Counter(node.op for node in graph.nodes)


def ffn_weights(graph: gs.Graph) -> int:
    """Elements of the matrices that are not in attention."""
    constants = [tensor for node in graph.nodes if node.op == "MatMul" for tensor in node.inputs[1:]]
    shapes = [tensor.shape for tensor in constants if isinstance(tensor, gs.Constant)]
    attention = DEPTH * (3 * C * C + C * C)
    return sum(int(np.prod(shape)) for shape in shapes) - attention


@pytest.fixture(scope="module")
def folded(tmp_path_factory) -> dict[str, Path]:
    """Both RePaViTs without idle channels, each step verified."""
    folder = tmp_path_factory.mktemp("folded")
    for name in REPAVITS:
        jobs.reparam(path(f"{name}.onnx"), folder / f"{name}.onnx")
    return {name: folder / f"{name}.onnx" for name in REPAVITS}


def test_the_script_and_the_models_agree():
    assert (C, HIDDEN, ACTIVE, DEPTH) == (
        train_digits_vits.CHANNELS,
        train_digits_vits.HIDDEN,
        train_digits_vits.ACTIVE,
        train_digits_vits.DEPTH,
    )
    assert set(train_digits_vits.NAMES) == MODELS.keys() - {"digits_cnn"}
    assert 1 - ACTIVE / HIDDEN == 0.75


def test_all_share_the_data_of_digits_cnn():
    for name in train_digits_vits.NAMES:
        model, cnn = MODELS[name], MODELS["digits_cnn"]
        assert (model.calibration, model.evaluation) == (cnn.calibration, cnn.evaluation)


@pytest.mark.parametrize("name", train_digits_vits.NAMES)
def test_graphs_are_what_the_exporter_made(name):
    proto = onnx.load(path(f"{name}.onnx"))
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 20)]
    ops = operators(gs.import_onnx(proto))
    batch_norms = {"digits_vit": 0, "digits_repavit": 2 * DEPTH, "digits_repavit_ln": 0}[name]
    layer_norms = {"digits_vit": 2 * DEPTH + 1, "digits_repavit": DEPTH + 1, "digits_repavit_ln": 2 * DEPTH + 1}[name]
    masks = 0 if name == "digits_vit" else DEPTH
    assert (ops["BatchNormalization"], ops["LayerNormalization"]) == (batch_norms, layer_norms)
    assert (ops["ScatterND"], ops["Range"], ops["Gelu"]) == (masks, masks, DEPTH)
    assert ffn_weights(gs.import_onnx(proto)) == DEPTH * 2 * C * HIDDEN


@each_repavit
def test_folded_equals_unfolded_on_every_evaluation_sample(name, folded):
    with np.load(path(MODELS[name].evaluation)) as arrays:
        feed = {"image": arrays["image"]}
    before = Session(path(f"{name}.onnx"), threads=2).run(feed)["logits"]
    after = Session(folded[name], threads=2).run(feed)["logits"]
    assert len(before) == 500
    assert np.abs(after - before).max() < 1e-4  # of logits up to 5: rounding in float32 through four blocks
    assert np.array_equal(after.argmax(axis=1), before.argmax(axis=1))


@each_repavit
def test_the_folded_ffn_is_what_the_paper_leaves(name, folded):
    """Three matrices of C x C where there were two of 4 C x C, and none of the nodes that mask and normalize."""
    after, plain = files.load(folded[name]), files.load(path("digits_vit.onnx"))
    expected = operators(plain) - Counter(Sub=1, Div=1)  # the normalization of the input
    expected -= Counter(Shape=DEPTH, Concat=2 * DEPTH, Squeeze=DEPTH, Slice=3 * DEPTH)  # the shapes of the heads
    assert ffn_weights(after) == 0.375 * DEPTH * 2 * C * HIDDEN
    if name == "digits_repavit":  # MatMul, Add, Gelu, MatMul beside MatMul, Add; Add: 7 nodes, with the shortcut merged
        assert operators(after) == expected + Counter(MatMul=DEPTH) - Counter(LayerNormalization=DEPTH)
    else:
        assert operators(after) == expected + Counter(MatMul=DEPTH, Add=DEPTH)


@each_repavit
def test_the_active_channels_are_the_first(name, folded):
    """The matrix in front of each Gelu is the first columns of fc1, behind the scale of the norm in front."""

    def before_gelu(graph: gs.Graph) -> list[np.ndarray]:
        adds = [node.i(0) for node in graph.nodes if node.op == "Gelu"]
        return [next(t.values for t in add.i(0).inputs if isinstance(t, gs.Constant)) for add in adds]

    proto = onnx.load(path(f"{name}.onnx"))
    value = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    linears = [node for node in proto.graph.node if node.op_type == "MatMul"]
    wide = [value[n.input[1]] for n in linears if n.input[1] in value and value[n.input[1]].shape == (C, HIDDEN)]
    narrow = before_gelu(files.load(folded[name]))
    assert len(wide) == len(narrow) == DEPTH
    for block, (fc1, active) in enumerate(zip(wide, narrow, strict=True)):
        scale = np.ones(C)
        if name == "digits_repavit":
            gamma, variance = value[f"ffn.{block}.norm.weight"], value[f"ffn.{block}.norm.running_var"]
            scale = gamma / np.sqrt(variance + 1e-5)
        np.testing.assert_allclose(active, scale[:, None] * fc1[:, :ACTIVE], rtol=1e-5, atol=1e-7)
