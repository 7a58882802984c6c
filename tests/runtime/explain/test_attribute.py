"""Which node an error comes from: planted faults, folds, renames, files of other tools, the worth of the advice."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from channelfold import models
from channelfold.runtime import jobs
from channelfold.runtime.data.sources import Data, open_data
from channelfold.runtime.explain.align import align, sketches
from channelfold.runtime.explain.attribute import Explainer, Explanation, decibels
from channelfold.runtime.explain.model import Model
from channelfold.runtime.io import edit
from channelfold.runtime.io.facts import required_inputs
from channelfold.runtime.io.files import load, save
from channelfold.runtime.lint.reading import quantized, weights
from channelfold.runtime.lint.unfuse import unfuse
from channelfold.tests.graphs import build, samples
from channelfold.tests.shipped import CALIBRATION, DIGITS, EVALUATION

VIT = models.path("digits_vit.onnx")
MLP = "(float[N,16] x) => (float[] y)"


def explain(first: gs.Graph, second: gs.Graph, data: Data | None = None) -> Explanation:
    data = data or open_data(EVALUATION, required_inputs(first))
    return Explainer(Model(first), Model(second), data).explain()


@pytest.fixture(scope="module")
def int8(tmp_path_factory):
    """The shipped transformer, folded and quantized."""
    out = tmp_path_factory.mktemp("int8")
    jobs.compress(VIT, out, source=jobs.Source(CALIBRATION))
    return out / "model.onnx"


def scaled(graph, site):
    return change(site.node, 1, lambda scale: scale * np.where(np.arange(scale.size) % 2, 1.5, 1.0))


def turned(graph, site):
    return change(site.node, 0, lambda codes: codes.T.reshape(codes.shape))


def clipped(graph, site):
    restore: Any = quantized(site.activation)
    change(edit.producer(restore.inputs[0]), 1, lambda scale: scale / 8)
    return change(restore, 1, lambda scale: scale / 8)


def shifted(graph, site):
    return change(quantized(site.activation), 2, lambda zero: zero + 25)


def change(node: Any, place: int, how: Any) -> Any:
    old = node.inputs[place].values
    new = gs.Constant(f"{node.name}_damaged{place}", np.asarray(how(old), old.dtype))
    edit.set_input(node, place, new)
    return node


@pytest.mark.parametrize("fault", [scaled, turned, clipped, shifted])
@pytest.mark.parametrize("place", [1, 12])
def test_the_damaged_node_is_named_first(int8, fault, place):
    damaged = load(int8)
    node = fault(damaged, [site for site in weights(damaged) if quantized(site.activation)][place])
    found = explain(load(VIT), damaged)
    assert node.name in found.sites[0].nodes
    assert decibels(found.restored[1]) > decibels(found.total) + 3


def test_the_contributions_add_up_to_the_error(int8):
    found = explain(load(VIT), load(int8))
    assert (found.linears, found.covered) == (26, 26)
    assert abs(decibels(sum(found.contributions.values())) - decibels(found.total)) < 4
    assert decibels(found.restored[20]) > decibels(found.total) + 10
    assert all(site.errors.own == 0 for site in found.sites if "MatMul" in site.op and site.node.endswith("_61"))


def test_scaled_channels_are_no_error(tmp_path):
    jobs.compress(VIT, tmp_path, "int8-smooth", source=jobs.Source(CALIBRATION))
    found = explain(load(VIT), load(tmp_path / "model.onnx"))
    assert found.covered == found.linears
    assert min(decibels(one) for one in found.contributions.values()) > decibels(found.total) - 3


@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
def test_files_of_onnxruntime_are_explained(form, tmp_path):
    from onnxruntime import quantization

    images = iter([{"image": image[None]} for image in np.load(CALIBRATION)["image"][:16]])

    class Reader(quantization.CalibrationDataReader):
        def get_next(self):
            return next(images, None)

    path, kind = tmp_path / "foreign.onnx", quantization.QuantFormat[form]
    quantization.quantize_static(DIGITS, path, Reader(), quant_format=kind, per_channel=True)
    graph = load(path)
    unfuse(graph)
    found = explain(load(DIGITS), graph)
    assert (found.linears, found.covered) == (7, 7)
    assert found.aligned >= 20
    assert decibels(max(found.restored.items())[1]) > decibels(found.total) + 10


def test_renamed_and_folded_tensors_are_found():
    first = build(
        MLP, "h = MatMul(x, W)  b = Add(h, B)  r = Relu(b)  m = Mul(r, s)  y = MatMul(m, V)", kind="float",
        W=(16, 32), B=32, s=np.float32(2.0), V=(32, 4),
    )  # fmt: skip
    tensors = first.tensors()
    second = build(
        MLP, "p = Gemm(x, W, B)  q = Relu(p)  y = MatMul(q, V)", kind="float",
        W=tensors["W"].values, B=tensors["B"].values, V=tensors["V"].values * 2,
    )  # fmt: skip
    feeds = list(samples(first, 2))
    pairs = align(*(sketches(Model(graph), feeds) for graph in (first, second)))
    assert {(pair.first, pair.second) for pair in pairs} <= {("b", "p"), ("r", "q"), ("m", "q"), ("y", "y")}
    found = explain(first, second, samples(first, 4))
    assert all(decibels(error) > 100 for error in found.contributions.values())


def test_names_that_mean_something_else_do_not_mislead():
    body = "a = MatMul(x, W)  b = Relu(a)  c = MatMul(b, V)  y = Tanh(c)"
    first = build(MLP, body, kind="float", W=(16, 16), V=(16, 16))
    renamed = "c = MatMul(x, W)  a = Relu(c)  b = MatMul(a, V)  y = Tanh(b)"
    second = build(MLP, renamed, kind="float", W=(16, 16), V=(16, 16))
    feeds = list(samples(first, 2))
    pairs = align(*(sketches(Model(graph), feeds) for graph in (first, second)))
    assert {(pair.first, pair.second) for pair in pairs} == {("a", "c"), ("b", "a"), ("c", "b"), ("y", "y")}


def test_open_sizes_and_several_outputs():
    body = "h = MatMul(x, W)  y = Relu(h)  z = ReduceSum<keepdims=0>(h)"
    first = build("(float[N,16] x) => (float[] y, float[] z)", body, kind="float", W=(16, 32))
    second = build("(float[N,16] x) => (float[] y, float[] z)", body, kind="float", W=first.tensors()["W"].values + 0.1)
    found = explain(first, second, samples(first, 4, size=lambda index: index + 1))
    assert found.sites[0].op == "MatMul"
    assert found.contributions["h"] > 0
    assert all(found.contributions[name] == 0 for name in ("y", "z"))


def test_the_advice_recovers_what_it_says(run, int8, tmp_path):
    damaged = load(int8)
    scaled(damaged, [site for site in weights(damaged) if quantized(site.activation)][5])
    save(damaged, tmp_path / "damaged.onnx")
    page = tmp_path / "page.html"
    code, out, _ = run(
        "diff", VIT, tmp_path / "damaged.onnx", "--data", EVALUATION, "--explain", "--json", "--html", page
    )
    assert code == 0
    found = json.loads(out)["explanation"]
    assert found["advice"]["sites"] == 1
    name = found["advice"]["nodes"][0]
    assert f"--exclude {name}" in found["advice"]["command"]
    jobs.compress(VIT, tmp_path / "again", overrides={"exclude": (name,)}, source=jobs.Source(CALIBRATION))
    again = jobs.diff(VIT, tmp_path / "again/model.onnx", source=jobs.Source(evaluation=EVALUATION), explain=True)
    gained = again["explanation"]["snr"] - found["snr"]
    assert gained >= 0.8 * found["advice"]["gain"]
    html = page.read_text()
    assert "<polyline" in html
    assert all(f"{site['snr']:.1f}" in html for site in found["sites"])
    onnx.checker.check_model(onnx.load(tmp_path / "again/model.onnx"))


def test_a_part_that_does_not_run_is_a_warning(monkeypatch):
    from channelfold.runtime.errors import ModelError
    from channelfold.runtime.jobs import explain_diff

    def fails(*_):
        raise ModelError("no kernel")

    monkeypatch.setattr(explain_diff, "Explainer", fails)
    record = jobs.diff(DIGITS, DIGITS, source=jobs.Source(evaluation=EVALUATION), explain=True)
    assert "explanation" not in record
    assert any("not explained: no kernel" in warning for warning in record["warnings"])
