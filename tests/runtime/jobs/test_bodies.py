"""Merged decoders through the commands: both branches quantized, one of them left by --set, what reports say."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from channelfold.passes.bodies import NEVER
from channelfold.runtime import jobs
from channelfold.runtime.io.files import load, session
from channelfold.tests import decoders


@pytest.fixture
def merged(tmp_path):
    path = tmp_path / "merged.onnx"
    onnx.save(decoders.merged(own=True), path)
    return path


def stored(tmp_path, kinds):
    folder = tmp_path / "data"
    folder.mkdir()
    for index, feed in enumerate(decoders.steps(4, kinds)):
        np.savez(folder / f"{index}.npz", **feed)
    return folder


def test_both_branches_are_quantized_and_their_weights_stored_once(merged, tmp_path):
    data = stored(tmp_path, (False, True))
    record = jobs.compress(merged, tmp_path / "out", source=jobs.Source(data), require_share=0.95)
    assert record["weights"]["share"] == 1
    assert record["output"]["bytes"] < record["model"]["bytes"] / 4
    assert min(output["snr"] for output in record["accuracy"]["outputs"]) > 25
    assert any("held the same weights, which are now stored once: 45,056 bytes" in text for text in record["warnings"])
    assert not any("stay float" in text for text in record["warnings"])


def test_a_branch_without_data_is_named_with_its_bytes(merged, tmp_path):
    data = stored(tmp_path, (True,))
    with pytest.raises(jobs.GateMissed) as missed:
        jobs.compress(merged, tmp_path / "out", source=jobs.Source(data), require_share=0.95)
    (left,) = (row for row in missed.value.record["weights"]["rows"] if row["state"] == "float")
    assert (left["place"], left["reason"], left["bytes"]) == ("else_branch of If choice", NEVER, 45056)
    said = f"50% of the weight bytes stay float: 45.1 kB read by MatMul in the else_branch of If choice ({NEVER})"
    assert said in missed.value.record["warnings"]


@pytest.mark.parametrize("cached", [True, False])
def test_a_fixed_input_leaves_one_branch(cached, merged, tmp_path):
    record = jobs.fold(merged, tmp_path / "out.onnx", fixed={"use_cache_branch": str(cached)})
    assert record["accuracy"]["verdict"]["level"] == "ok"
    graph = load(tmp_path / "out.onnx")
    assert "If" not in {node.op for node in graph.nodes}
    feed = decoders.steps(1, (cached,))[0]
    before = session(load(merged)).run(feed)
    del feed["use_cache_branch"]
    np.testing.assert_allclose(session(graph).run(feed)["y"], before["y"], rtol=1e-5, atol=1e-5)


def test_data_for_a_fixed_input_may_still_be_there(merged, tmp_path):
    source = jobs.Source(stored(tmp_path, (True,)))
    record = jobs.compress(merged, tmp_path / "out", source=source, fixed={"use_cache_branch": "true"})
    assert record["steps"][-1]["facts"]["quantized"] == 5
    assert record["accuracy"]["outputs"][0]["snr"] > 25


def test_inspect_lists_linears_of_bodies(merged):
    found = jobs.inspect(merged)["inspection"]
    assert [entry["node"] for entry in found["linears"] if entry["quantizable"]] == [
        f"n_{name}_{tag} in {tag}_branch of If choice"
        for tag in ("else", "then")
        for name in ("q", "k0", "o", "h", "f")
    ]
    assert found["macs"] is None
