"""A small picture of a sample that is an image, for reports: PNG written with the standard library."""

from __future__ import annotations

import base64
import math
import struct
import zlib

import numpy as np

from channelfold.runtime.io.session import Feed

_SIDE = 48  # pixels at most
_LEAST, _LONGEST = 8, 4  # pixels of the shorter side; the longer one against it


def thumbnail(feed: Feed) -> str:
    """The image of a feed as a data URI; "" where no input, or more than one, looks like an image."""
    found = [pixels for pixels in map(_pixels, feed.values()) if pixels is not None]
    return f"data:image/png;base64,{base64.b64encode(_png(found[0])).decode()}" if len(found) == 1 else ""


def _pixels(values: np.ndarray) -> np.ndarray | None:
    """The first image of a batch, (height, width, 1 or 3) uint8 from its least to its largest value."""
    if values.ndim != 4 or not len(values) or values.dtype.kind not in "fiu":
        return None
    image = values[0] if values.shape[-1] in (1, 3) else np.moveaxis(values[0], 0, -1)
    short, long = sorted(image.shape[:2])
    if image.shape[-1] not in (1, 3) or short < _LEAST or long > _LONGEST * short:
        return None
    step = math.ceil(long / _SIDE)
    height, width = (size // step for size in image.shape[:2])
    blocks = image[: height * step, : width * step].reshape(height, step, width, step, -1)
    means = blocks.mean(axis=(1, 3), dtype=np.float64)
    means -= means.min()
    return np.round(means * (255 / (means.max() or 1.0))).astype(np.uint8)


def _png(pixels: np.ndarray) -> bytes:
    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    # a line begins with its filter
    unfiltered = np.hstack([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)])
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(unfiltered.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
