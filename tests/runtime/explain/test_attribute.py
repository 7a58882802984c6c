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
    data = data or open_data(EVALUATION, required_inputs(first)).first(2)
    return Explainer(Model(first), Model(second), data).explain()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Some of the images of the calibration and of the evaluation."""
    folder = tmp_path_factory.mktemp("images")
    for source, name, count in ((CALIBRATION, "calibration", 24), (EVALUATION, "evaluation", 16)):
        np.savez(folder / f"{name}.npz", image=np.load(source)["image"][:count])
    return folder


@pytest.fixture(scope="module")
def int8(tmp_path_factory, images):
    """The shipped transformer, quantized."""
    out = tmp_path_factory.mktemp("int8") / "model.onnx"
    jobs.quantize(VIT, out, source=jobs.Source(images / "calibration.npz"))
    return out


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


def test_every_product_of_a_quantized_file_is_covered(int8):
    found = explain(load(VIT), load(int8))
    assert (found.linears, found.covered) == (34, 34)  # of four joint products three parts each
    assert decibels(found.restored[20]) > decibels(found.total) + 10
    assert all(site.errors.own == 0 for site in found.sites if "MatMul" in site.op and site.node.endswith("_61"))


def test_contributions_of_branches_add_up_to_the_error():
    """Errors of different elements of an output add up exactly, and so do the contributions."""
    signature, body = "(float[N,16] x) => (float[] y)", "a = MatMul(x, W)  b = MatMul(x, V)  y = Concat<axis=1>(a, b)"
    first = build(signature, body, kind="float", W=(16, 8), V=(16, 24))
    old = {name: first.tensors()[name].values for name in "WV"}
    new = {"W": old["W"] + np.float32(0.01), "V": old["V"] * np.float32(0.9)}
    found = explain(first, build(signature, body, kind="float", **new), samples(first, 4))
    assert sum(found.contributions.values()) == pytest.approx(found.total, rel=1e-5)
    assert found.contributions["y"] == 0
    for weight, end in (("W", "a"), ("V", "b")):
        alone = build(signature, body, kind="float", **old | {weight: new[weight]})
        total = explain(first, alone, samples(first, 4)).total
        assert found.contributions[end] == pytest.approx(total, rel=1e-5)


def test_contributions_along_a_chain_are_sides_of_a_triangle():
    """What follows is linear, so the error of the output is the sum of what both errors become, in first order."""
    body = "a = MatMul(x, W)  y = MatMul(a, V)"
    first = build(MLP, body, kind="float", W=(16, 32), V=(32, 4))
    constants = {name: first.tensors()[name].values for name in "WV"}
    small = {name: values + np.float32(1e-4) * np.sign(values) for name, values in constants.items()}
    found = explain(first, build(MLP, body, kind="float", **small), samples(first, 4))
    one, other = (np.sqrt(found.contributions[name]) for name in "ay")
    assert abs(one - other) * 0.999 < np.sqrt(found.total) < (one + other) * 1.001


def test_scaled_channels_are_no_error(images, tmp_path):
    jobs.compress(VIT, tmp_path, "int8-smooth", source=jobs.Source(images / "calibration.npz"))
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


def test_the_advice_recovers_what_it_says(run, int8, images, tmp_path):
    damaged = load(int8)
    scaled(damaged, [site for site in weights(damaged) if quantized(site.activation)][5])
    save(damaged, tmp_path / "damaged.onnx")
    page = tmp_path / "page.html"
    code, out, _ = run(
        "diff",
        VIT,
        tmp_path / "damaged.onnx",
        "--data",
        images / "evaluation.npz",
        "--explain",
        "--json",
        "--html",
        page,
    )
    assert code == 0
    found = json.loads(out)["explanation"]
    assert found["advice"]["sites"] == 1
    name = found["advice"]["nodes"][0]
    assert f"--exclude {name}" in found["advice"]["command"]
    again = tmp_path / "again.onnx"
    jobs.quantize(VIT, again, options={"exclude": (name,)}, source=jobs.Source(images / "calibration.npz"))
    record = jobs.diff(VIT, again, source=jobs.Source(evaluation=images / "evaluation.npz"), explain=True)
    gained = record["explanation"]["snr"] - found["snr"]
    assert gained >= 0.8 * found["advice"]["gain"]
    html = page.read_text()
    assert "<polyline" in html
    assert all(f"{site['snr']:.1f}" in html for site in found["sites"])
    onnx.checker.check_model(onnx.load(again))


def test_a_part_that_does_not_run_is_a_warning(monkeypatch):
    from channelfold.runtime.errors import ModelError
    from channelfold.runtime.jobs import explain_diff

    def fails(*_):
        raise ModelError("no kernel")

    monkeypatch.setattr(explain_diff, "Explainer", fails)
    record = jobs.diff(DIGITS, DIGITS, source=jobs.Source(evaluation=EVALUATION), explain=True)
    assert "explanation" not in record
    assert any("not explained: no kernel" in warning for warning in record["warnings"])


def test_sites_are_restored_in_a_file_of_half_precision():
    """Some tools leave what they do not quantize in float16."""
    first = build(MLP, "a = MatMul(x, W)  r = Relu(a)  y = MatMul(r, V)", kind="float", W=(16, 32), V=(32, 4))
    half = {name: first.tensors()[name].values.astype(np.float16) for name in "WV"}
    body = "h = Cast<to=10>(x)  a = MatMul(h, W)  r = Relu(a)  p = MatMul(r, V)  y = Cast<to=1>(p)"
    half["W"] = half["W"] * np.float16(1.25)
    found = explain(first, build(MLP, body, kind="float", **half), samples(first, 4))
    assert found.sites[0].op == "MatMul"
    assert decibels(found.restored[1]) > decibels(found.total) + 30


def test_a_stranger_is_known_behind_a_damaged_node():
    """The bias of the second model takes back a shift, and its product is damaged: one site, not two."""
    body = "a = MatMul(x, W)  u = Add(a, b)  y = Relu(u)"
    first = build(MLP, body, kind="float", W=(16, 32), b=np.full(32, 0.5))
    weight, bias = (first.tensors()[name].values for name in "Wb")
    moved = "m = Sub(x, c)  k = Mul(m, f)  a = MatMul(k, W)  u = Add(a, b)  y = Relu(u)"
    shift, damage = np.float32(2.0), np.float32(0.9)
    second = build(MLP, moved, kind="float", W=weight, b=bias + shift * weight.sum(axis=0), c=shift, f=damage)
    found = explain(first, second, samples(first, 4))
    assert found.contributions.keys() == {"u", "y"}
    assert {"MatMul", "Add"} <= {node.op for node in second.nodes if node.name in found.sites[0].nodes}


def test_sites_with_branches_are_restored():
    """Branches read tensors and constants from around them; a result of theirs has the name of that of the If."""
    body = """
        h = MatMul(x, W)  m = ReduceMax<keepdims=0>(h)  c = Greater(m, limit)
        a = If(c) <
            then_branch = g () => (float[] a) { k = Mul(h, S)  a = Relu(k) },
            else_branch = e () => (float[] t) { k = Mul(h, S)  t = Tanh(k) }
        >
        y = MatMul(a, V)"""
    constants = {"limit": np.float32(2.0), "S": np.linspace(0.5, 1.5, 16, dtype=np.float32)}
    first = build(MLP, body, kind="float", W=(16, 16), V=(16, 4), **constants)
    weights = {name: first.tensors()[name].values for name in "WV"}
    second = build(MLP, body, kind="float", **weights, **constants | {"S": constants["S"] * np.float32(0.9)})
    found = explain(first, second, samples(first, 6))
    assert found.sites[0].op == "If"
    assert decibels(found.restored[1]) > decibels(found.total) + 80
