"""Times that bench has recorded, read by a search: which of them are usable, and why others are not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from channelfold.passes.layers.sensitivity import Site
from channelfold.passes.search.latency import learned
from channelfold.passes.search.tabled import ONNXRUNTIME, Table, digest, float_type, gpu, options_in
from channelfold.runtime import jobs
from channelfold.runtime.errors import DataError, UsageError
from channelfold.runtime.io import files
from channelfold.runtime.io.files import infer_shapes
from channelfold.runtime.jobs.bench_table import of_engine
from channelfold.tests.graphs import build, random


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A network, its data, the files of its options for ONNX Runtime, and the record of their times here."""
    folder = tmp_path_factory.mktemp("table")
    feeds = {"x": random((32, 16), "x").astype(np.float32)}
    body = "a = MatMul(x, A) b = Relu(a) c = MatMul(b, B) d = Relu(c) y = MatMul(d, C)"
    model = folder / "mlp.onnx"
    files.save(build("(float[n,16] x) => (float[n,4] y)", body, kind="float", A=(16, 64), B=(64, 64), C=(64, 4)), model)
    source, paths = jobs.Source(feeds, feeds), [model, folder / "w8.onnx", folder / "fold.onnx"]
    jobs.fold(model, paths[2])
    jobs.quantize(paths[2], paths[1], weights_only=True, options={"target": "onnxruntime", "weights": "int8"})
    table = folder / "times.json"
    jobs.bench(paths, rounds=3, threads=1, source=jobs.Source(evaluation=feeds), keep=table)
    return model, source, table


def test_a_record_has_the_option_and_the_time_of_every_node(recorded):
    model, _, path = recorded
    table = Table.read(path).on(ONNXRUNTIME)
    assert table.original(model).name == "mlp.onnx"
    options = [{option for _, option in file.nodes.values()} for file in table.files]
    assert options == [{"float"}, {"w8"}, {"float"}]
    for file in table.files:
        assert len(file.nodes) == 3
        assert 0 < sum(ms for ms, _ in file.nodes.values()) <= file.ms * (1 + 1e-9)


def test_a_search_within_a_limit_of_recorded_times(recorded, tmp_path):
    model, source, path = recorded
    limit = jobs.Search(max_latency=40.0, latency_table=str(path), trials=2)
    record = jobs.compress(model, tmp_path, source=source, overrides={"target": "onnxruntime"}, search=limit)
    found = record["search"]
    assert any("no times of w4" in warning for warning in record["warnings"])
    assert all(point["latency"] == point["latency_predicted"] for point in found["points"])
    whole = Table.read(path).original(model).ms
    plain = next(point for point in found["points"] if point["options"] == {"float": 1.0})
    times = {file.name: file.ms / whole for file in Table.read(path).files}
    assert plain["latency"] == pytest.approx(times["fold.onnx"])
    assert found["file"]["latency"]["how"] == "measured in ONNX Runtime"  # for the machine is that of the table
    other = json.loads(path.read_text())
    other["environment"]["system"] = "another machine"
    (tmp_path / "other.json").write_text(json.dumps(other))
    limit = jobs.Search(max_latency=1e-3, latency_table=str(tmp_path / "other.json"), trials=2)
    with pytest.raises(jobs.GateMissed, match="predicted from other") as missed:
        jobs.compress(model, tmp_path, source=source, overrides={"target": "onnxruntime"}, search=limit)
    assert any("predicted, not measured" in warning for warning in missed.value.record["warnings"])


NODES = ("n0", "n1", "n2")
SITES = [Site((name,), {"int8": 1.0, "w8": 0.5}, {"float": 4, "int8": 1, "w8": 1}) for name in NODES]


def engines(model: Path, path: Path, **changes) -> Path:
    """A record of engines on a GPU: int8 takes a quarter of the time of float16, 1 ms is beside the nodes."""
    found = []
    for name, kind, ms, option in (
        ("model.engine", "float32", 8.0, "float"), ("half.engine", "float16", 4.0, "float"),
        ("int8.engine", "float16", 1.0, "int8"),
    ):  # fmt: skip
        hashed = digest(model) if name == "model.engine" else "0"
        nodes = dict.fromkeys(NODES, (ms, option))
        found.append({"name": name, "model": hashed, "device": gpu(89), "type": kind, "ms": 3 * ms + 1, "nodes": nodes})
    for number, more in changes.items():
        found[int(number[1:])] |= more
    path.write_text(json.dumps({"schema": 1, "environment": {"system": "a GPU"}, "files": found}))
    return path


def test_a_record_of_engines_predicts_mixes(recorded, tmp_path):
    model = recorded[0]
    table = Table.read(engines(model, tmp_path / "gpu.json")).on(gpu(89))
    graph = files.load(model)
    for name, node in zip(NODES, [node for node in graph.nodes if node.op == "MatMul"], strict=True):
        node.name = name
    timed = table.timed(model, SITES, "float16")
    assert timed.keys() == {"", "float", "int8"}
    found = learned(graph, SITES, timed, {"x": np.zeros((1, 16), np.float32)})
    assert found.share(["float"] * 3) == pytest.approx(13 / 25)
    assert found.share(["int8", "float", "int8"]) == pytest.approx(7 / 25)
    assert found.share(["w8"] * 3) == found.share(["float"] * 3)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"f0": {"model": "another"}}, "has no times of mlp.onnx"),
        ({"f1": {"nodes": dict.fromkeys(NODES[:2], (4.0, "float"))}}, "no file has all nodes in float16, but for"),
        ({f"f{i}": {"nodes": {"other": (4.0, "float")}} for i in range(3)}, "no file has the node n0"),
        ({"f1": {"type": "bfloat16"}}, r"but for model.engine \(float32\), half.engine \(bfloat16\)"),
        ({f"f{i}": {"device": gpu(80)} for i in range(3)}, "has times of SM 80, and the target is SM 89"),
    ],
    ids=["model", "some nodes", "nodes", "type", "device"],
)
def test_what_is_not_usable_is_refused_by_name(changes, reason, recorded, tmp_path):
    path = engines(recorded[0], tmp_path / "gpu.json", **changes)
    with pytest.raises(UsageError, match=reason):
        Table.read(path).on(gpu(89)).timed(recorded[0], SITES, "float16")


def test_another_file_is_no_table(recorded, tmp_path):
    (tmp_path / "other.json").write_text('{"nodes": {}}')
    limit = jobs.Search(max_latency=0.5, latency_table=str(tmp_path / "other.json"))
    with pytest.raises(DataError, match="is no table of times"):
        jobs.compress(recorded[0], tmp_path, source=recorded[1], overrides={"target": "onnxruntime"}, search=limit)
    with pytest.raises(UsageError, match="Add --max-latency"):
        jobs.compress(recorded[0], tmp_path, source=recorded[1], search=jobs.Search(0.1, latency_table="times.json"))


def test_layers_of_an_engine_belong_to_their_first_linear_node(recorded):
    model = recorded[0]
    names = [node.name for node in files.load(model).nodes if node.op == "MatMul"]
    told = {"sm": 89, "kernels": [{"name": "fused_0", "nodes": ["Relu_1", names[0], names[1]]}]}
    ran = [{"name": "fused_0", "op": "layer", "ms": 2.0}, {"name": f"copy + {names[2]}", "op": "layer", "ms": 1.0}]
    entry = of_engine("m.engine", model, told, [*ran, {"name": "copy", "op": "layer", "ms": 0.5}])
    assert (entry["device"], entry["type"], entry["ms"]) == ("SM 89", "float32", 3.5)
    assert entry["nodes"] == {names[0]: [2.0, "float"], names[1]: [0.0, "float"], names[2]: [1.0, "float"]}


@pytest.mark.parametrize(
    ("given", "option"),
    [
        ({"target": "tensorrt", "weights": "int8"}, "w8"), ({"target": "onnxruntime", "weights": "int8"}, "w8"),
        ({"target": "tensorrt", "weights": "int4"}, "w4"), ({"target": "onnxruntime", "weights": "int4"}, "w4"),
        ({"weights": "fp8", "activations": "fp8"}, "fp8"), ({"weights": "nvfp4", "activations": "fp4"}, "nvfp4"),
    ],
)  # fmt: skip
def test_the_options_of_a_file_are_those_of_its_passes(given, option, recorded, tmp_path):
    out = tmp_path / "weights.onnx"
    jobs.quantize(recorded[0], out, weights_only=True, source=recorded[1], options=given)
    graph = files.load(out)
    infer_shapes(graph)
    found = list(options_in(graph).values())
    assert option in found  # products of few channels may stay float
    assert set(found) <= {option, "float"}


def test_int8_is_found_by_what_both_operands_read(recorded, tmp_path):
    jobs.quantize(recorded[0], tmp_path / "int8.onnx", source=recorded[1], options={"min_activation_snr": 0.0})
    graph = files.load(tmp_path / "int8.onnx")
    infer_shapes(graph)
    assert list(options_in(graph).values()).count("int8") == 2  # one has too few channels
    assert float_type(graph) == "float32"
