"""Snapshots: back to the very same graph, sameness, fingerprints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from channelfold.passes.base import Context
from channelfold.passes.fold import FoldConstants
from channelfold.runtime.io import edit, files
from channelfold.runtime.io.snapshot import Snapshot

TEXT = """<ir_version: 8, opset_import: ["" : 17], producer_name: "someone", doc_string: "a model">
g (float[n, 32] x, bool c) => (float[n, 32] y) <float s = {2}> {
  [mm] h = MatMul (x, W)
  [scale] k = Mul (h, s)
  [if] y = If (c) <then_branch = t () => (float[n, 32] a) { [inner] a = MatMul (k, V) },
                   else_branch = e () => (float[n, 32] b) { b = Relu (k) }>
}"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    model = onnx.parser.parse_model(TEXT)
    rng = np.random.default_rng(0)
    for name in ("W", "V"):
        model.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal((32, 32), np.float32), name))
    model.metadata_props.add(key="author", value="someone")
    onnx.save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def bits(graph: gs.Graph) -> bytes:
    model, weights = files.export(graph)
    return b"".join([model.SerializeToString(deterministic=True), *(p.name.encode() + v.tobytes() for p, v in weights)])


def test_restore_brings_back_every_bit_into_the_same_object(path):
    graph = files.load(path)
    before = bits(graph)
    snapshot = Snapshot.of(graph)
    graph.tensors()["W"].values = np.zeros((32, 32), np.float32)
    graph.nodes[2].attrs["then_branch"].nodes[0].op = "Gemm"
    graph.inputs[0].shape = [1]
    graph.nodes.clear()
    graph.opset = 9
    graph.outputs.clear()
    snapshot.restore(graph)
    assert bits(graph) == before
    assert graph.carried.path == path


def test_a_snapshot_can_be_restored_twice_and_run(path):
    graph = files.load(path)
    snapshot = Snapshot.of(graph)
    feed = {"x": np.ones((1, 32), np.float32), "c": np.array(True)}
    expected = files.session(graph).run(feed)["y"]
    for _ in range(2):
        graph.nodes.clear()
        snapshot.restore(graph)
        graph.nodes[0].op = "Gemm"
        assert np.array_equal(snapshot.session().run(feed)["y"], expected)
    inner = snapshot.session(outputs=["k", "y"]).run(feed)
    assert np.array_equal(inner["y"], expected)
    assert inner["k"].shape == (1, 32)


def test_restored_graphs_can_be_edited_on(path):
    graph = files.load(path)
    snapshot = Snapshot.of(graph)
    files.constant(graph, "W", np.zeros(4, np.float32))
    snapshot.restore(graph)
    assert files.free_name(graph, "W") == "W_1"  # names are counted anew
    big = files.constant(graph, "big", np.ones((600, 600), np.float32))
    edit.set_input(graph.nodes[0], 1, big)
    assert np.array_equal(files.read(graph.tensors()["big"]), np.ones((600, 600)))
    assert FoldConstants().apply(graph, Context()).changed == []


def test_what_counts_as_the_same(path):
    graph = files.load(path)
    first = Snapshot.of(graph)
    files.infer_shapes(graph)
    graph.tensors()["W"].values = np.array(files.read(graph.tensors()["W"]))
    assert first.same(Snapshot.of(graph))
    assert first.same(Snapshot.of(files.load(path)))
    graph.tensors()["W"].values[3, 4] += 1
    assert not first.same(Snapshot.of(graph))
    other = files.load(path)
    other.nodes[0].name = "renamed"
    assert not first.same(Snapshot.of(other))


def test_fingerprint_is_that_of_the_file_and_the_graph(path, tmp_path):
    first = Snapshot.of(files.load(path)).fingerprint()
    assert Snapshot.of(files.load(path)).fingerprint() == first
    graph = files.load(path)
    graph.nodes[1].name = "renamed"
    assert Snapshot.of(graph).fingerprint() != first

    data = bytearray(path.read_bytes())
    data[-5] ^= 1  # in the last weight
    (tmp_path / "new.onnx").write_bytes(data)
    (tmp_path / "new.onnx").replace(path)
    assert Snapshot.of(files.load(path)).fingerprint() != first


def test_fingerprint_of_weights_in_memory_is_that_of_their_values(path):
    def of(value: float) -> str:
        graph = files.load(path)
        graph.tensors()["W"].values = np.full((32, 32), value, np.float32)
        return Snapshot.of(graph).fingerprint()

    assert of(1.0) == of(1.0) != of(2.0)


def test_frozen_weights_thaw_again_and_read_only_ones_stay(path):
    graph = files.load(path)
    mine, fixed = np.ones((32, 32), np.float32), np.ones((32, 32), np.float32)
    fixed.flags.writeable = False
    graph.tensors()["W"].values = mine
    graph.nodes[2].attrs["then_branch"].nodes[0].inputs[1].values = fixed
    with Snapshot.of(graph).frozen(), pytest.raises(ValueError, match="read-only"):
        mine[0] = 0
    mine[0] = 0
    assert not fixed.flags.writeable
