"""Small pictures of samples: what counts as an image, and a PNG that others read as it was meant."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from channelfold.runtime.data.picture import thumbnail


def opened(uri: str) -> np.ndarray:
    kind, _, code = uri.partition(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(code))))


def test_a_small_image_keeps_its_pixels():
    image = np.arange(96, dtype=np.float32).reshape(1, 1, 8, 12)
    assert np.array_equal(opened(thumbnail({"x": image})), np.round(np.arange(96) * 255 / 95).reshape(8, 12))


@pytest.mark.parametrize("first", [True, False], ids=["channels first", "channels last"])
def test_blocks_of_a_large_image_are_averaged(first):
    channels = [np.kron(np.array([[0, 1], [2, 3]]), np.ones((50, 100))) + 4 * channel for channel in range(3)]
    image = np.stack(channels, 0 if first else -1)[None].astype(np.float32)
    found = opened(thumbnail({"image": image}))
    assert found.shape == (20, 40, 3)
    assert found[0, 0].tolist() == [0, 93, 185]  # 0, 4 and 8 of 11
    assert found[-1, -1].tolist() == [70, 162, 255]


def test_a_picture_of_one_colour_is_black():
    assert not opened(thumbnail({"x": np.full((1, 8, 8, 3), 7, np.uint8)})).any()


@pytest.mark.parametrize(
    "shape", [(1, 3, 224), (1, 4, 16, 16), (0, 3, 16, 16), (1, 3, 4, 4), (1, 1, 8, 64)],
    ids=["rank", "channels", "empty", "tiny", "long"],
)  # fmt: skip
def test_other_tensors_are_no_images(shape):
    assert thumbnail({"x": np.zeros(shape, np.float32)}) == ""


def test_two_candidates_are_none():
    image = np.zeros((1, 3, 16, 16), np.float32)
    assert thumbnail({"key": image, "value": image}) == ""
    assert thumbnail({"image": image, "ids": np.zeros((1, 4), np.int64)})
