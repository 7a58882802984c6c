"""A search ends with a model that keeps the limits on samples that chose nothing, or says so."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest

from channelfold import models
from channelfold.passes.search import modelled
from channelfold.runtime import jobs
from channelfold.runtime.engine.kernels import Kernel
from channelfold.runtime.engine.plan import PlanReport
from channelfold.runtime.errors import ChannelfoldError, DataError, UsageError
from channelfold.runtime.io.convert import all_graphs
from channelfold.runtime.io.files import load
from channelfold.runtime.io.session import Session
from channelfold.runtime.stats.compare import Gates
from channelfold.tests.graphs import random

DIGITS = models.path("digits_cnn.onnx")
CALIBRATION = {name: values[:48] for name, values in np.load(models.path("digits_calibration.npz")).items()}
EVALUATION = dict(np.load(models.path("digits_evaluation.npz")))
SOURCE = jobs.Source(CALIBRATION, {name: values[:60] for name, values in EVALUATION.items()})


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    search = jobs.Search(max_loss=0.02, trials=6, prune_to=(0.8,))
    return folder, jobs.compress(DIGITS, folder, source=SOURCE, search=search)


@pytest.fixture(scope="module")
def for_onnxruntime(tmp_path_factory):
    return jobs.compress(
        DIGITS, tmp_path_factory.mktemp("onnxruntime"), source=SOURCE, overrides={"target": "onnxruntime"},
        gates=Gates(min_snr=25), search=jobs.Search(max_latency=50.0, trials=2)
    )  # fmt: skip


MLP = """
    <ir_version: 10, opset_import: ["": 17]>
    mlp (float[n,16] x) => (float[n,4] y) {
        a = MatMul(x, A) b = Relu(a) c = MatMul(b, B) d = Relu(c) y = MatMul(d, C)
    }
"""


@pytest.fixture(scope="module")
def mlp(tmp_path_factory):
    """The path of a small network, and its data: what most tests need costs a tenth of the digits there."""
    path = tmp_path_factory.mktemp("mlp") / "mlp.onnx"
    feeds = {"x": random((32, 16), "x").astype(np.float32)}
    return written(MLP, path, A=(16, 64), B=(64, 64), C=(64, 4)), jobs.Source(feeds, feeds)


def written(text, path, **shapes):
    model = onnx.parser.parse_model(text)
    for name, shape in shapes.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(random(shape, name).astype(np.float32), name))
    onnx.save(model, path)
    return path


def chosen(record):
    return next(point for point in record["search"]["points"] if point["chosen"])


def test_the_model_is_smaller_and_loses_no_more_than_allowed(searched):
    folder, record = searched
    assert record["search"]["met"]
    assert record["search"]["loss"] == "top-1 accuracy"
    assert chosen(record)["proof"]["loss"] <= 0.02
    assert chosen(record)["proof"]["low"] <= chosen(record)["proof"]["loss"] <= chosen(record)["proof"]["high"]
    assert record["output"]["bytes"] < 0.4 * record["model"]["bytes"]
    assert chosen(record)["bytes"] == pytest.approx(record["output"]["bytes"], rel=0.3)
    assert (folder / "model.onnx").stat().st_size == record["output"]["bytes"]
    assert json.loads((folder / "report.json").read_text())["search"]["met"]


def test_what_the_board_measured_is_what_the_file_does(searched):
    _, record = searched
    (output,) = record["accuracy"]["outputs"]
    assert output["snr"] == pytest.approx(chosen(record)["proof"]["snr_db"], abs=1.5)  # on other samples
    for point in record["search"]["points"][1:]:
        assert point["error_db"] == pytest.approx(point["predicted_db"], abs=2)


def test_the_front_has_no_point_that_another_beats(searched):
    points = searched[1]["search"]["points"]
    assert [p["cost"] for p in points] == sorted((p["cost"] for p in points), reverse=True)
    assert [p["error_db"] for p in points] == sorted((p["error_db"] for p in points), reverse=True)


def test_fewer_channels_and_fewer_bits_together_cost_less_than_either_alone(searched):
    _, record = searched
    both = chosen(record)
    assert (both["start"], [step["pass"] for step in record["steps"]].count("prune")) == ("prune 80%", 1)
    assert both["options"]["int8"] > 0.5
    for point in record["search"]["points"]:
        if point["start"] == "" or point["options"].keys() == {"float"}:
            assert both["cost"] < 0.9 * point["cost"]


def test_the_recipe_makes_the_same_model_again(searched, tmp_path):
    folder, _ = searched
    jobs.compress(DIGITS, tmp_path, folder / "recipe.toml", source=SOURCE)
    assert (tmp_path / "model.onnx").read_bytes() == (folder / "model.onnx").read_bytes()


def test_what_no_model_can_keep_ends_with_the_nearest(mlp, tmp_path):
    model, source = mlp
    with pytest.raises(jobs.GateMissed, match="No point keeps the limits"):
        jobs.compress(model, tmp_path, source=source, search=jobs.Search(max_size=0.05, trials=4))
    assert (tmp_path / "model.onnx").exists()
    record = json.loads((tmp_path / "report.json").read_text())
    assert not record["search"]["met"]


def test_an_interrupted_search_goes_on_where_it_stopped(mlp, tmp_path, monkeypatch):
    model, source = mlp
    search = jobs.Search(trials=4)
    whole = jobs.compress(model, tmp_path / "whole", source=source, search=search)["search"]

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(jobs.Job, "transform", interrupted)
        with pytest.raises(KeyboardInterrupt):
            jobs.compress(model, tmp_path / "out", source=source, search=search)
    again = jobs.compress(model, tmp_path / "out", source=source, search=search)["search"]
    assert again == whole | {"resumed": again["resumed"]}
    assert again["resumed"] > 0.5 * sum(again["runs"].values()) > 0 == whole["resumed"]
    assert not list((tmp_path / "out").glob("**/trial-*"))


def test_what_the_written_file_does_is_measured_on_the_samples_of_the_proof(searched, mlp, tmp_path, monkeypatch):
    record = searched[1]
    assert record["search"]["file"]["snr_db"] == pytest.approx(chosen(record)["proof"]["snr_db"], abs=0.5)
    assert record["search"]["file"]["bytes"] == record["output"]["bytes"]

    class Negative(Session):
        def run(self, *args):
            return {name: -values for name, values in super().run(*args).items()}

    monkeypatch.setattr(jobs.Job, "runners", lambda job, path: (Session(job.model), Negative(path)))
    with pytest.raises(jobs.GateMissed, match="No point keeps the limits") as missed:
        jobs.compress(mlp[0], tmp_path, source=mlp[1], search=jobs.Search(trials=2))
    found = missed.value.record["search"]
    assert not found["met"]
    assert found["file"]["snr_db"] == pytest.approx(-10 * np.log10(4), abs=1)
    assert chosen(missed.value.record)["proof"]["snr_db"] > 20


def test_a_size_is_not_exceeded_by_the_file(mlp, tmp_path):
    model, source = mlp
    record = jobs.compress(model, tmp_path, source=source, search=jobs.Search(max_size=15_000, trials=4))
    assert record["output"]["bytes"] <= 15_000 < record["model"]["bytes"]
    assert set(chosen(record)["options"]) <= {"float", "w8", "w4"}  # activations of 8 bits save no bytes


def test_a_latency_is_measured_and_kept(for_onnxruntime, mlp, tmp_path):
    found = for_onnxruntime["search"]
    assert found["met"]
    assert all(0 < point["latency"] < 50 for point in found["points"])
    assert all(0 < point["latency_predicted"] < 50 for point in found["points"])
    told = found["file"]["latency"]
    assert 0 < told["low"] <= told["value"] <= told["high"] < 50
    assert told["how"] == "measured in ONNX Runtime"
    model, source = mlp
    with pytest.raises(jobs.GateMissed, match="max-latency") as missed:
        jobs.compress(model, tmp_path, source=source, overrides={"target": "onnxruntime"},
                      search=jobs.Search(max_latency=1e-6, trials=2))  # fmt: skip
    assert "of the time" in str(missed.value)


def test_a_latency_is_of_onnxruntime(mlp, tmp_path):
    with pytest.raises(UsageError, match="Add --target onnxruntime"):
        jobs.compress(mlp[0], tmp_path, source=mlp[1], search=jobs.Search(max_latency=0.5))


@pytest.mark.rtx
def test_a_latency_of_a_gpu_is_modelled(mlp, tmp_path, monkeypatch):
    """With a stand-in for the plans of a dozen mixes. The one of the result is built."""
    pytest.importorskip("tensorrt_rtx")

    def plan_of(graph, sm, data):
        assert (sm, [feed["x"].shape for feed in data]) == (89, [(1, 16)])
        kernels = []
        for node in (node for node in graph.nodes if node.op in ("MatMul", "QuantizeLinear")):
            before = node.inputs[0].inputs[0].op if node.inputs[0].inputs else ""
            arithmetic = "int8" if before == "DequantizeLinear" else "float"
            macs = 10**10 if node.op == "MatMul" else 0
            kernels.append(Kernel(node.name, (node.name,), arithmetic if macs else "", macs, ()))
        return PlanReport(True, kernels=kernels)

    monkeypatch.setattr(modelled, "plan_of", plan_of)
    limit = jobs.Search(max_latency=0.6, trials=2)
    record = jobs.compress(mlp[0], tmp_path, source=mlp[1], search=limit, sms=[89])
    assert any("not measured" in warning for warning in record["warnings"])
    assert record["search"]["met"]
    assert record["search"]["limits"] == {"max_latency": 0.6}
    found = chosen(record)
    assert 0.3 < found["latency"] <= 0.6  # one of three products of equal time may stay float; int8 is 4 times as fast
    assert found["latency"] == pytest.approx(found["latency_predicted"], rel=0.03)
    assert record["search"]["file"]["latency"]["how"] == "modelled for L4"  # of the engine that was built


def test_gates_are_limits_of_a_search(mlp, tmp_path):
    record = jobs.compress(mlp[0], tmp_path, source=mlp[1], gates=Gates(min_snr=40), search=jobs.Search(trials=6))
    assert record["search"]["limits"] == {"min_snr": 40}
    assert chosen(record)["proof"]["snr_db"] >= 40


METRIC = """
from pathlib import Path

def kilobytes_saved(model):
    return 1000 - Path(model).stat().st_size / 1000

def text(model):
    return "good"
"""


def test_a_metric_of_the_user_is_the_loss(mlp, tmp_path):
    (tmp_path / "own.py").write_text(METRIC)
    source = dataclasses.replace(mlp[1], allow_script=True)
    search = jobs.Search(max_loss=0.01, trials=4, metric=f"{tmp_path / 'own.py'}:kilobytes_saved")
    record = jobs.compress(mlp[0], tmp_path / "out", source=source, search=search)
    assert record["search"]["loss"] == "metric"
    whole = record["model"]["bytes"] / 1000
    for point in record["search"]["points"]:
        saved = (whole - point["bytes"] / 1000) / (1000 - whole)
        assert point["loss"] == pytest.approx(-saved, abs=0.004)


@pytest.mark.parametrize(
    ("metric", "allowed", "says"),
    [
        ("own.py:kilobytes_saved", False, "Add --allow-script"),
        ("own.py:text", True, "returned 'good'"),
        ("own.py:texts", True, "defines no texts"),
        ("own.py", True, "such as metric.py:accuracy"),
    ],
)
def test_a_metric_that_cannot_be_used(metric, allowed, says, mlp, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(METRIC)
    source = dataclasses.replace(mlp[1], allow_script=allowed)
    with pytest.raises(ChannelfoldError, match=says):
        jobs.compress(mlp[0], "out", source=source, search=jobs.Search(max_loss=0.1, trials=2, metric=metric))


@pytest.mark.parametrize("given", [{"float_share": 0.1}, {"profile": True, "target": "onnxruntime"}])
def test_other_choices_of_float_nodes_and_a_search_exclude_each_other(mlp, tmp_path, given):
    with pytest.raises(UsageError, match="the search chooses the nodes"):
        jobs.compress(mlp[0], tmp_path, source=mlp[1], overrides=given, search=jobs.Search())


def test_a_search_without_data_is_told_what_to_give(mlp, tmp_path):
    with pytest.raises(DataError, match="A search needs calibration data"):
        jobs.compress(mlp[0], tmp_path, search=jobs.Search())


def test_without_evaluation_a_part_of_the_calibration_data_is_held_back(mlp, tmp_path):
    source = jobs.Source({"x": random((128, 16), "x").astype(np.float32)})
    record = jobs.compress(mlp[0], tmp_path, source=source, search=jobs.Search(trials=4))
    assert record["search"]["samples"] == {"sensitivity": 16, "steering": 32, "proof": 32}
    assert any("held back" in warning for warning in record["warnings"])


LOUD = """
    <ir_version: 10, opset_import: ["": 20]>
    ffn (float[n,32] x) => (float[n,32] y) {
        a = MatMul(x, A) b = Add(a, p) c = Gelu(b) d = MatMul(c, B) e = Add(d, x) y = MatMul(e, C)
    }
"""


def test_smoothing_is_judged_by_the_int8_of_the_search_and_stays(tmp_path):
    """Behind GELU, where a Mul has to be inserted, 8 bits are too coarse without; no node may stay float for that."""
    model = onnx.load(written(LOUD, tmp_path / "m.onnx", A=(32, 64), B=(64, 32), C=(32, 32), p=(64,)))
    loud = np.where(np.arange(64) == 5, 60, 1).astype(np.float32)
    for tensor, factor in zip(model.graph.initializer[:2], (loud, 1 / loud[:, None]), strict=True):
        weight = onnx.numpy_helper.to_array(tensor) * factor / 8
        tensor.CopyFrom(onnx.numpy_helper.from_array(weight.astype(np.float32), tensor.name))
    onnx.save(model, tmp_path / "m.onnx")
    feeds = {"x": random((64, 32), "x").astype(np.float32)}
    source = jobs.Source(feeds, feeds)
    record = jobs.compress(tmp_path / "m.onnx", tmp_path / "out", source=source, search=jobs.Search(trials=2))
    points = record["search"]["points"]
    coarse, fine = (next(p["error_db"] for p in points if p["options"].get("int8") == 1 and p["start"] == start)
                    for start in ("", "smooth"))  # fmt: skip
    assert fine > coarse + 10
    assert chosen(record)["start"] == "smooth"
    assert record["search"]["file"]["snr_db"] == pytest.approx(chosen(record)["proof"]["snr_db"], abs=1)
    jobs.compress(tmp_path / "m.onnx", tmp_path / "again", tmp_path / "out" / "recipe.toml", source=source)
    assert (tmp_path / "again" / "model.onnx").read_bytes() == (tmp_path / "out" / "model.onnx").read_bytes()


BODY = """
    <ir_version: 10, opset_import: ["": 17]>
    g (float[n,16] x, bool c) => (float[n,16] y) {
        a = MatMul(x, A)
        b = If(c) <
            then_branch = t () => (float[n,16] p) { p = MatMul(a, B) },
            else_branch = e () => (float[n,16] q) { q = Identity(a) }
        >
        y = MatMul(b, C)
    }
"""


def test_the_type_of_what_stays_float_comes_last(mlp, tmp_path):
    record = jobs.compress(mlp[0], tmp_path, "int8-fp16", source=mlp[1], search=jobs.Search(trials=2))
    assert [step["pass"] for step in record["steps"] if step["changed"]][-1] == "cast"


@pytest.fixture(scope="module")
def front(mlp, tmp_path_factory):
    record = jobs.compress(mlp[0], tmp_path_factory.mktemp("front"), source=mlp[1], search=jobs.Search(trials=6))
    return record["search"]


@pytest.mark.parametrize(
    ("recipe", "arithmetic"), [("fp16", 0.5), ("int8", 0.25), ("int8-fp16", 0.25), ("int8-weights", 1), ("int4", 1)]
)
def test_no_recipe_beats_the_front(recipe, arithmetic, front, mlp, tmp_path):
    steering = {"x": mlp[1].calibration["x"][::2]}
    record = jobs.compress(mlp[0], tmp_path, recipe, source=dataclasses.replace(mlp[1], evaluation=steering))
    cost = (record["output"]["bytes"] / record["model"]["bytes"] + arithmetic) / 2
    cost += 0.05  # the bytes of quantizers are guessed, and are a tenth of so small a file
    error = record["accuracy"]["outputs"][0]["snr"]
    assert any(point["cost"] <= cost and point["snr_db"] > error - 0.5 for point in front["points"])


def test_what_stays_float_is_float16_where_that_keeps_the_limits(front, mlp, tmp_path):
    """The point without quantization loses what the cast does, on samples as it was written."""
    assert {point["type"] for point in front["points"]} == {"float16"}
    alone, samples = front["points"][0], {"x": mlp[1].calibration["x"][::2]}
    assert alone["options"] == {"float": 1}
    jobs.cast(mlp[0], tmp_path / "half.onnx", source=jobs.Source(mlp[1].calibration))
    runs = [Session(path).run(samples)["y"] for path in (mlp[0], tmp_path / "half.onnx")]
    error = np.sum((runs[0] - runs[1]) ** 2) / np.sum(runs[0] ** 2)
    assert alone["snr_db"] == pytest.approx(-10 * np.log10(error), abs=1)
    assert alone["cost"] == pytest.approx(0.5, abs=0.05)
    gates = Gates(min_snr=100)
    record = jobs.compress(mlp[0], tmp_path / "fine", source=mlp[1], gates=gates, search=jobs.Search(trials=2))
    points = record["search"]["points"]
    assert {point["type"] for point in points if point["snr_db"] >= 100} == {"float32"}
    (half,) = [point for point in points if point["type"] == "float16"]  # below the limit, and still on the front
    assert half["cost"] == pytest.approx(0.5, abs=0.05)
    assert half["snr_db"] == pytest.approx(-10 * np.log10(error), abs=1)
    assert any("with 16 bits the float network itself misses the limits" in warning for warning in record["warnings"])


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_the_type_of_what_stays_float_is_what_the_user_wants(kind, mlp, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs.Job, "build", lambda *_: None)
    record = jobs.compress(mlp[0], tmp_path / "out", "int8-fp16", source=mlp[1], sms=[120], gates=Gates(min_snr=10),
                           search=jobs.Search(float_type=kind, trials=2))  # fmt: skip
    without = kind == "bfloat16"  # in which NVFP4 is not written
    assert any("left out nvfp4" in warning for warning in record["warnings"]) == without
    assert ("nvfp4" in chosen(record)["options"]) != without
    assert {point["type"] for point in record["search"]["points"]} == {kind}
    types = [step["options"]["type"] for step in record["steps"] if step["pass"] == "cast"]
    assert types == ([] if kind == "float32" else [kind])
    jobs.compress(mlp[0], tmp_path / "again", tmp_path / "out" / "recipe.toml", source=mlp[1])
    assert (tmp_path / "again" / "model.onnx").read_bytes() == (tmp_path / "out" / "model.onnx").read_bytes()


def test_bfloat16_is_not_for_onnxruntime(mlp, tmp_path):
    with pytest.raises(UsageError, match="almost nothing in bfloat16"):
        jobs.compress(mlp[0], tmp_path, source=mlp[1], overrides={"target": "onnxruntime"},
                      search=jobs.Search(float_type="bfloat16"))  # fmt: skip


@pytest.mark.parametrize("name", ["inside", "MatMul_0"])
def test_nodes_in_bodies_stay_float(name, tmp_path):
    model = onnx.load(written(BODY, tmp_path / "model.onnx", A=(16, 16), B=(16, 16), C=(16, 16)))
    model.graph.node[1].attribute[0].g.node[0].name = name
    onnx.save(model, tmp_path / "model.onnx")
    feeds = [{"x": random((1, 16), f"{i}").astype(np.float32), "c": np.array(i % 4 < 2)} for i in range(64)]
    record = jobs.compress(tmp_path / "model.onnx", tmp_path / "out", source=jobs.Source(feeds, feeds),
                           search=jobs.Search(trials=4))  # fmt: skip
    assert {name for site in record["search"]["sites"] for name in site["nodes"]} == {"MatMul_0", "MatMul_2"}
    graph = load(tmp_path / "out" / "model.onnx")
    inner = [node for part in list(all_graphs(graph))[1:] for node in part.nodes if node.op == "MatMul"]
    assert [type(node.inputs[1]) for node in inner] == [gs.Constant]
    (output,) = record["accuracy"]["outputs"]
    assert output["snr"] == pytest.approx(chosen(record)["proof"]["snr_db"], abs=1)


def test_fp8_is_chosen_for_gpus_that_have_it_where_int8_is_too_coarse(tmp_path):
    """One channel is loud, in front of a kernel, which smoothing does not scale."""
    text = """<ir_version: 10, opset_import: ["": 17]> cnn (float[n,16,6,6] x) => (float[n,16,2,2] y)
              { a = Conv(x, A) b = Relu(a) y = Conv(b, B) }"""
    model = onnx.load(written(text, tmp_path / "loud.onnx", A=(32, 16, 3, 3), B=(16, 32, 3, 3)))
    loud = np.where(np.arange(16) == 3, 100, 1).astype(np.float32).reshape(-1, 1, 1)
    weight = onnx.numpy_helper.to_array(model.graph.initializer[0]) / loud
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "A"))
    onnx.save(model, tmp_path / "loud.onnx")
    feeds = {"x": random((32, 16, 6, 6), "x").astype(np.float32) * loud}
    for sms, option in (([86], "int8"), ([89], "fp8")):
        record = jobs.compress(tmp_path / "loud.onnx", tmp_path / option, source=jobs.Source(feeds, feeds), sms=sms,
                               search=jobs.Search(trials=2, minimize="arithmetic"))  # fmt: skip
        assert option in chosen(record)["options"]


def test_the_recipe_of_a_mix_of_all_formats_makes_the_same_model_again(mlp, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs.Job, "build", lambda *_: None)
    search, gates = jobs.Search(trials=6), Gates(min_snr=14)
    record = jobs.compress(mlp[0], tmp_path / "out", source=mlp[1], sms=[120], search=search, gates=gates)
    found = chosen(record)
    assert {"nvfp4", "w4"} <= found["options"].keys()
    assert record["search"]["met"]
    assert record["search"]["file"]["snr_db"] == pytest.approx(found["proof"]["snr_db"], abs=1)
    assert found["bytes"] == pytest.approx(record["output"]["bytes"], rel=0.2)
    assert [step["options"].get("weights") for step in record["steps"] if step["changed"]][-1] == "nvfp4"
    jobs.compress(mlp[0], tmp_path / "again", tmp_path / "out" / "recipe.toml", source=mlp[1])
    assert (tmp_path / "again" / "model.onnx").read_bytes() == (tmp_path / "out" / "model.onnx").read_bytes()


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_a_search_knows_the_target(target, searched, for_onnxruntime):
    record = {"tensorrt": searched[1], "onnxruntime": for_onnxruntime}[target]
    accuracy = record["accuracy"].get("exact", record["accuracy"])
    assert accuracy["outputs"][0]["snr"] == pytest.approx(chosen(record)["proof"]["snr_db"], abs=2)
    assert {step["options"]["target"] for step in record["steps"] if "target" in step["options"]} == {target}


def test_sensitivities_are_ranked_and_add_up():
    record = jobs.sensitivity(DIGITS, source=jobs.Source(CALIBRATION))["sensitivity"]
    errors = [site["options"].get("int8", {"snr_db": 300})["snr_db"] for site in record["sites"]]
    assert errors == sorted(errors)
    for pair in record["additive"].values():
        assert pair["sum_db"] == pytest.approx(pair["measured_db"], abs=1.5)
    shares = [site["options"]["int8"]["share"] for site in record["sites"] if "int8" in site["options"]]
    assert sum(shares) == pytest.approx(1)


@pytest.fixture(scope="module")
def alone(mlp):
    return jobs.sensitivity(mlp[0], source=mlp[1])["sensitivity"]


@pytest.mark.parametrize("workers", [2, 4])
def test_the_number_of_workers_changes_no_bit(workers, alone, mlp):
    assert jobs.sensitivity(mlp[0], source=mlp[1], workers=workers)["sensitivity"] == alone


def test_rows_that_a_gathernd_takes_are_those_of_a_table(tmp_path):
    text = """<ir_version: 10, opset_import: ["": 17]> g (int64[n,4,1] ids) => (float[n,4,32] y)
              { e = GatherND(T, ids) y = MatMul(e, W) }"""
    model = written(text, tmp_path / "m.onnx", T=(50, 64), W=(64, 32))
    source = jobs.Source({"ids": np.random.default_rng(0).integers(0, 50, (16, 4, 1))})
    found = jobs.compress(model, tmp_path / "out", source=source, search=jobs.Search(trials=2))
    assert [site["nodes"] for site in found["search"]["sites"]] == [["GatherND_0"], ["MatMul_1"]]
