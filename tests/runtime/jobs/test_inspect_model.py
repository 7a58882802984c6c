"""What inspect measures of channels: how far the largest one stands out."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from channelfold import models
from channelfold.runtime import jobs
from channelfold.runtime.data.sources import open_data
from channelfold.runtime.errors import DataError
from channelfold.runtime.io import files
from channelfold.runtime.io.facts import required_inputs
from channelfold.runtime.jobs.inspect_model import inspect
from channelfold.runtime.stats.channels import outlier_ratio
from channelfold.tests.graphs import build

DIGITS = models.path("digits_cnn.onnx")
CALIBRATION = models.path("digits_calibration.npz")


@pytest.mark.parametrize(
    ("amax", "expected"),
    [([1, 2, 8], 4.0), ([3, 3], 1.0), ([0, 0, 5], math.inf), ([0, 0], None)],
)
def test_outlier_ratio(amax, expected):
    assert outlier_ratio(np.array(amax, float)) == expected


def measured(tmp_path: Path, image: np.ndarray) -> dict[str, float | None]:
    """Outlier ratios of a Conv and a MatMul that read one tensor along different axes, and of their product."""
    graph = build(
        "(float[1,3,4,4] image) => (float[] y)",
        """
        c = Conv(image, W)
        m = MatMul(image, V)
        y = MatMul(c, m)
        """,
        kind="float", W=(3, 3, 1, 1), V=(4, 4),
    )  # fmt: skip
    path = tmp_path / "m.onnx"
    files.save(graph, path)
    data = open_data([{"image": image}, {"image": -image}], required_inputs(graph))
    return {entry["op"] + entry["node"]: entry["outlier_ratio"] for entry in inspect(path, graph, data)["linears"]}


def test_the_axis_is_that_of_the_channels(tmp_path):
    image = np.ones((1, 3, 4, 4), np.float32)
    image[:, 2] = 10  # the third channel of the Conv
    image[:, :, :, 1] *= 3  # the second of the MatMul, whose other channels reach 10 as well
    conv, matmul, product = measured(tmp_path, image).values()
    assert (conv, matmul, product) == (10.0, 3.0, None)


def test_an_input_that_is_always_zero(tmp_path):
    assert list(measured(tmp_path, np.zeros((1, 3, 4, 4), np.float32)).values()) == [None, None, None]


def test_only_data_bring_the_column():
    assert all("outlier_ratio" not in entry for entry in jobs.inspect(DIGITS)["inspection"]["linears"])
    record = jobs.inspect(DIGITS, source=jobs.Source(CALIBRATION))
    ratios = {entry["node"]: entry["outlier_ratio"] for entry in record["inspection"]["linears"]}
    assert record["data"] == {"calibration": "128 samples from digits_calibration.npz"}
    assert ratios["/stem/conv/Conv"] == 1.0  # it reads one channel
    assert ratios["/depthwise/conv/Conv"] == pytest.approx(8.1, abs=0.05)


def test_data_that_do_not_fit():
    with pytest.raises(DataError, match="imgae"):
        jobs.inspect(DIGITS, source=jobs.Source({"imgae": np.zeros((1, 1, 8, 8), np.float32)}))
