"""The shipped networks and their data are what their cards say."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from channelfold.models import MODELS, Model, path, train_digits_cnn
from channelfold.runtime.errors import UsageError
from channelfold.runtime.io.session import Session

DIGITS = MODELS["digits_cnn"]
ROOT = Path(__file__).parents[2]

each_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


def samples(file: str) -> dict[str, np.ndarray]:
    with np.load(path(file)) as arrays:
        return dict(arrays)


def rows(images: np.ndarray) -> set[bytes]:
    return {image.tobytes() for image in images}


@each_model
def test_files_ship_and_are_small(model: Model):
    assert MODELS[model.name] is model
    for file in model.files:
        assert 0 < path(file).stat().st_size < 2e6


@each_model
def test_checker_accepts_the_file_and_its_origin_is_stated(model: Model):
    proto = onnx.load(path(model.onnx))
    onnx.checker.check_model(proto, full_check=True)
    assert [value.name for value in proto.graph.input] == [model.input]
    assert [value.name for value in proto.graph.output] == [model.output]
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"
    stated = {entry.key: entry.value for entry in proto.metadata_props}
    assert stated.keys() == {"license", "source", "dataset"}
    assert (ROOT / stated["source"].removeprefix("channelfold/")).is_file()
    assert Path(stated["source"]).stem in path(model.card).read_text(encoding="utf-8")


@each_model
def test_accuracy_is_exactly_the_stated_one(model: Model):
    evaluation = samples(model.evaluation)
    logits = Session(path(model.onnx), threads=2).run({model.input: evaluation[model.input]})[model.output]
    correct = int((logits.argmax(axis=1) == evaluation[model.label]).sum())
    assert (correct, len(logits)) == (model.correct, model.samples)
    stated = re.search(r"^\| accuracy \| (\d+) of (\d+) ", path(model.card).read_text(encoding="utf-8"), re.MULTILINE)
    assert stated is not None
    assert (int(stated[1]), int(stated[2])) == (model.correct, model.samples)
    # the count holds on other processors too: the closest decision is a thousand times wider than float rounding
    lowest, highest = np.sort(logits, axis=1)[:, -2:].T
    assert (highest - lowest).min() > 0.01


@each_model
def test_calibration_and_evaluation_are_disjoint(model: Model):
    calibration, evaluation = samples(model.calibration), samples(model.evaluation)
    assert calibration.keys() == {model.input}
    assert evaluation.keys() == {model.input, model.label}
    assert not rows(calibration[model.input]) & rows(evaluation[model.input])


def test_accuracy_of_digits_cnn():
    assert DIGITS.accuracy == 0.998


def test_digits_are_raw_pixels_of_balanced_classes():
    calibration, evaluation = samples(DIGITS.calibration), samples(DIGITS.evaluation)
    assert calibration["image"].shape == (128, 1, 8, 8)
    assert evaluation["image"].shape == (500, 1, 8, 8)
    for images in (calibration["image"], evaluation["image"]):
        assert images.dtype == np.float32
        assert set(np.unique(images)) == set(range(17))
        assert len(rows(images)) == len(images)
    assert evaluation["label"].dtype == np.int64
    assert np.bincount(evaluation["label"]).tolist() == [50] * 10


def test_digits_cnn_graph_is_unfused():
    proto = onnx.load(path(DIGITS.onnx))
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 17)]
    assert Counter(node.op_type for node in proto.graph.node) == {
        "Sub": 1, "Div": 1, "Conv": 6, "BatchNormalization": 6, "Relu": 6, "Add": 1, "MaxPool": 1,
        "GlobalAveragePool": 1, "Flatten": 1, "Gemm": 1,
    }  # fmt: skip


def test_digits_cnn_batch_normalization_is_trained():
    proto = onnx.load(path(DIGITS.onnx))
    value = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    blocks = [node.input[1].removesuffix(".bn.weight") for node in proto.graph.node if "BatchNorm" in node.op_type]
    idle, spread = {}, {}
    for block in blocks:
        gamma, variance = value[f"{block}.bn.weight"], value[f"{block}.bn.running_var"]
        weight = np.abs(value[f"{block}.conv.weight"]).reshape(len(gamma), -1).max(axis=1)
        live = np.abs(gamma) >= 1e-3
        folded = (weight * np.abs(gamma) / np.sqrt(variance + 1e-5))[live]
        idle[block] = int((~live).sum())
        spread[block] = round(float(folded.max() / folded.min()))
    # the two columns of the card's table
    assert idle == {
        "stem": 4, "residual.first": 0, "residual.second": 0, "widen": 30, "depthwise": 28, "pointwise": 17,
    }  # fmt: skip
    assert spread == {
        "stem": 8, "residual.first": 5, "residual.second": 7, "widen": 13, "depthwise": 31, "pointwise": 24,
    }  # fmt: skip


def test_misspelt_file_gets_its_nearest_match():
    with pytest.raises(UsageError, match=r"No file 'digit_cnn\.onnx' ships.*Did you mean 'digits_cnn\.onnx'\?"):
        path("digit_cnn.onnx")
    with pytest.raises(UsageError, match=r"No file '\.\./LICENSE' ships"):
        path("../LICENSE")


def test_split_covers_everything_once():
    labels = np.arange(1797) % 10
    split = train_digits_cnn.split(labels)
    assert np.array_equal(np.sort(np.concatenate([split.train, split.evaluation])), np.arange(1797))
    assert np.bincount(labels[split.evaluation]).tolist() == [50] * 10
    assert len(split.calibration) == 128
    assert np.isin(split.calibration, split.train).all()
    assert split.evaluation[:5].tolist() == [1, 4, 5, 6, 9]
    assert split.calibration[:5].tolist() == [2, 22, 29, 35, 40]


def test_split_needs_neither_torch_nor_sklearn():
    code = """
import sys
import numpy as np
from channelfold.models import train_digits_cnn
train_digits_cnn.split(np.arange(1000) % 10)
print(sorted({"torch", "sklearn", "onnxruntime"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_split_reproduces_the_shipped_samples():
    pytest.importorskip("sklearn", reason="scikit-learn holds the digits (extra: train)")
    images, labels = train_digits_cnn.load()
    split = train_digits_cnn.split(labels)
    calibration, evaluation = samples(DIGITS.calibration), samples(DIGITS.evaluation)
    assert np.array_equal(calibration["image"], images[split.calibration])
    assert np.array_equal(evaluation["image"], images[split.evaluation])
    assert np.array_equal(evaluation["label"], labels[split.evaluation])

    value = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path(DIGITS.onnx)).graph.initializer}
    assert value["normalize.mean"].item() == pytest.approx(images[split.train].mean(), rel=1e-6)
    assert value["normalize.std"].item() == pytest.approx(images[split.train].std(), rel=1e-6)
