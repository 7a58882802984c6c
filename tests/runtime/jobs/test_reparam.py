"""The job reparam, and what comes after it: int8 and an engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from channelfold import models
from channelfold.runtime import jobs
from channelfold.runtime.errors import UsageError
from channelfold.runtime.io import files
from channelfold.runtime.io.session import Session
from channelfold.tests.shipped import CALIBRATION, EVALUATION, needs_rtx

REPAVIT = models.path("digits_repavit.onnx")
LEGACY = Path(__file__).parents[2] / "passes" / "fixtures" / "legacy_17_shuffled.onnx"


def logits(path: Path) -> np.ndarray:
    with np.load(EVALUATION) as data:
        return Session(path).run({"image": data["image"]})["logits"]


def test_the_record_counts_what_is_saved(tmp_path):
    record = jobs.reparam(REPAVIT, tmp_path / "out.onnx")
    steps = {step["pass"]: step for step in record["steps"]}
    assert [site["macs"] for site in steps["reparameterize-ffn"]["facts"]["sites"]] == 4 * [[18432, 6912]]
    assert all(step["kind"] == "exact" for step in steps.values())
    before, after = record["model"], record["output"]
    tokens = 17  # 16 patches and the class token
    assert before["macs"] - after["macs"] == 4 * tokens * (18432 - 6912)
    # of each FFN the biases of 144 hidden channels go, and the 4 C of one norm and 4 H of the other; and the mean and
    # the deviation of the pixels
    assert before["parameters"] - after["parameters"] == 4 * (18432 - 6912 + 144 + 4 * 48 + 4 * 192) + 2
    expected, found = logits(REPAVIT), logits(tmp_path / "out.onnx")
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    assert np.array_equal(found.argmax(axis=1), expected.argmax(axis=1))


def test_open_sizes_stay_open(tmp_path):
    jobs.reparam(LEGACY, tmp_path / "out.onnx")
    assert [str(spec) for spec in Session(tmp_path / "out.onnx").inputs] == ["x: float32[batch, 5, 16]"]
    assert "Where" not in {node.op for node in files.load(tmp_path / "out.onnx").nodes}


def test_options_for_the_approximate_pass_alone(tmp_path):
    with pytest.raises(
        UsageError, match=r"--max-error is for networks that are not folded exactly\. Add --approximate"
    ):
        jobs.reparam(REPAVIT, tmp_path / "out.onnx", options={"max_error": 0.1})


@needs_rtx
@pytest.mark.rtx
def test_every_matrix_of_a_folded_ffn_is_int8_in_the_engine(tmp_path):
    """They read the residual stream, without a norm in front. Each of four products of q, k, v becomes three."""
    record = jobs.compress(
        REPAVIT, tmp_path, "int8-reparam", source=jobs.Source(CALIBRATION, evaluation=EVALUATION), sms=[89]
    )
    (engine,) = record["engines"]
    del engine["plan"]["nodes"]
    assert engine["plan"] == {"readable": True, "reason": "", "int8": 28, "total": 28, "not_int8": []}
    quantized = next(step for step in record["steps"] if step["pass"] == "quantize")["facts"]["by_op"]["MatMul"]
    assert quantized == {"quantized": 20, "total": 28}  # 4 x (q k v, o, and 3 of the FFN); 8 multiply two activations
