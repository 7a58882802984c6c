"""The account of weight bytes: what the record, the warnings and the gate of the share say."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from channelfold import models
from channelfold.passes.layers import account
from channelfold.runtime import jobs
from channelfold.runtime.io.files import load
from channelfold.tests.graphs import random

DIGITS, CALIBRATION = models.path("digits_cnn.onnx"), models.path("digits_calibration.npz")


def embedding(path, rows=64):
    """A Gather of a large table, which has an axis too many to be quantized, then a MatMul of a small weight."""
    weights = {"E": random((rows, 32, 1), "E"), "W": random((32, 32), "W")}
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["E", "ids"], ["r"]),
            helper.make_node("Reshape", ["r", "s"], ["e"]),
            helper.make_node("MatMul", ["e", "W"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4, 32])],
        [numpy_helper.from_array(values.astype(np.float32), name) for name, values in weights.items()]
        + [numpy_helper.from_array(np.array([-1, 4, 32]), "s")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    ids = path.with_suffix(".npz")
    np.savez(ids, ids=np.random.default_rng(0).integers(rows, size=(8, 4)))
    return path, jobs.Source(ids)


def test_bytes_that_stay_float_without_being_asked_for_are_named(tmp_path):
    model, source = embedding(tmp_path / "m.onnx")
    record = jobs.quantize(model, tmp_path / "q.onnx", source=source)
    assert record["weights"]["share"] == pytest.approx(1 / 3)
    (said,) = (text for text in record["warnings"] if "weight bytes" in text)
    assert said.startswith("67% of the weight bytes stay float: 8.2 kB read by Gather such as E (its table has")


def test_what_was_excluded_is_not_warned_of(tmp_path):
    source = jobs.Source(CALIBRATION)
    record = jobs.quantize(DIGITS, tmp_path / "q.onnx", source=source, options={"exclude": ["*widen*"]})
    assert not any("weight bytes" in text for text in record["warnings"])
    reasons = {row["largest"]: row["reason"] for row in record["weights"]["rows"]}
    assert reasons["widen.conv.weight"].startswith("excluded by pattern")


def test_a_share_that_is_required_is_a_gate(tmp_path):
    model, source = embedding(tmp_path / "m.onnx")
    jobs.quantize(model, tmp_path / "q.onnx", source=source, require_share=0.3)
    with pytest.raises(
        jobs.GateMissed, match=r"33\.3% of the weight bytes are quantized, 95\.0% are required"
    ) as missed:
        jobs.compress(model, tmp_path / "out", source=source, require_share=0.95)
    assert missed.value.exit_code == 3
    assert (tmp_path / "out" / "report.json").exists()


def test_no_change_at_all_is_a_warning(tmp_path):
    model, _ = embedding(tmp_path / "m.onnx")
    assert any("Nothing was changed" in text for text in jobs.fold(model, tmp_path / "f.onnx")["warnings"])
    assert not any("Nothing" in text for text in jobs.fold(DIGITS, tmp_path / "f.onnx")["warnings"])


def test_inspect_shows_the_account_before_anything_is_done():
    record = jobs.inspect(DIGITS)
    assert record["weights"] == account.to_json(account.account(load(DIGITS)))
    assert record["weights"]["share"] == 0
