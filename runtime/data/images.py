"""Images as samples of a model with one image-like input: float[n, 3, h, w], say, or uint8[n, h, w, 1].

An image is turned as its EXIF orientation says, converted to the channels of the model, resized, cropped in the center,
and becomes (value * scale - mean) / std. Where the model fixes the size, images are by default made as small as they
may be to cover that size, and cropped to it. Resizing is bilinear with antialiasing, sizes are rounded as torchvision
does. Only headers are read when data are opened; an image is decoded when its sample is read.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from channelfold.runtime.data.feeds import Batch
from channelfold.runtime.data.npz import Deferred
from channelfold.runtime.data.reading import Reading
from channelfold.runtime.errors import ChannelfoldError, DataError, DependencyError, UsageError
from channelfold.runtime.io.session import TensorSpec

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".avif"}
PIXELS = 178_956_970  # of one image, before and after it is resized: where Pillow refuses an image
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_ORIENTATION = 0x0112  # the tag of EXIF
_ON_SIDE = range(5, 9)  # the orientations that swap height and width
_WITHOUT = (
    "The values of images are in 0..1, because neither --mean nor --std is given: give those of the training, "
    "such as --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 of ImageNet"
)

Size = tuple[int, int]  # height, width


def read(files: Sequence[Path], inputs: Sequence[TensorSpec], reading: Reading) -> tuple[list[Batch], list[str], str]:
    """One batch for each image, notes, and what is done to the images in words.

    Raises DataError for a file that is no image or does not fit, UsageError for options that do not fit the model, and
    DependencyError without Pillow.
    """
    _pillow()
    prepare = Preparation.of(inputs, reading)
    batches = []
    for file in files:
        with _failures(file), _opened(file) as image:
            height, width = image.height, image.width
            if image.getexif().get(_ORIENTATION) in _ON_SIDE and image.format != "TIFF":  # TIFF says the turned size
                height, width = width, height
        shape = prepare.shape((height, width), file)
        deferred = Deferred(shape, prepare.stored, partial(_values, file, prepare, shape))
        batches.append(Batch(str(file), {inputs[0].name: deferred}))
    plain = prepare.dtype.kind == "f" and not reading.given(("mean", "std", "scale"))
    return batches, [_WITHOUT] if plain else [], str(prepare)


@dataclass(frozen=True)
class Preparation:
    """What is done to every image. ``target`` is the size that the model takes, None along an axis it leaves open."""

    channels: int
    last: bool
    target: tuple[int | None, int | None]
    resize: tuple[int, ...]
    crop: tuple[int | None, int | None]
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bgr: bool
    dtype: np.dtype

    @classmethod
    def of(cls, inputs: Sequence[TensorSpec], reading: Reading) -> Preparation:
        """Options and model together. Raises UsageError where they do not fit, DataError for other models."""
        if len(inputs) != 1 or inputs[0].dtype is None or inputs[0].dtype.kind not in "fiu":
            names = ", ".join(map(str, inputs))
            raise DataError(f"Images are for models with one input, and the inputs are {names}", _NPZ)
        channels, last, target = _layout(inputs[0], reading.layout)
        for name, values in (("mean", reading.mean), ("std", reading.std)):
            if len(values) not in (0, 1, channels):
                raise UsageError(f"--{name} has {len(values)} numbers, and the model has {channels} channels", _EACH)
        crop = tuple(reading.crop) * 2 if len(reading.crop) == 1 else tuple(reading.crop)
        if crop and any(fixed not in (None, size) for fixed, size in zip(target, crop, strict=True)):
            raise UsageError(f"--crop is {_by(crop)}, and the model takes {_by(target)}", "Leave it out")
        if not reading.resize and not crop and target == (None, None):
            raise UsageError(
                f"The model takes images of any size ({inputs[0]})", "Say which: --resize 256 --crop 224, for instance"
            )
        dtype = np.dtype(inputs[0].dtype)
        usual = 1 / 255 if dtype.kind == "f" else 1.0
        return cls(channels, last, target, tuple(reading.resize), (crop[0], crop[1]) if crop else target,
                   usual if reading.scale is None else reading.scale, tuple(reading.mean), tuple(reading.std),
                   reading.channel_order == "bgr", dtype)  # fmt: skip

    @property
    def stored(self) -> np.dtype:
        """The type of prepared values, from which the data are cast to that of the model."""
        return np.dtype(np.float32 if self.dtype.kind == "f" else np.int32)

    def shape(self, size: Size, file: Path) -> tuple[int, int, int, int]:
        """The shape of the sample that an image of a size becomes. Raises DataError where the image is too small."""
        resized = self.resized(size)
        if max(size[0] * size[1], resized[0] * resized[1]) > PIXELS:
            raise DataError(f"{file} has {_by(size)} pixels and becomes {_by(resized)}", f"{PIXELS:,} are the limit")
        height, width = (full if cut is None else cut for cut, full in zip(self.crop, resized, strict=True))
        if height > resized[0] or width > resized[1]:
            raise DataError(f"{file} is {_by(resized)}, smaller than {_by((height, width))}", "Give a larger --resize")
        return (1, height, width, self.channels) if self.last else (1, self.channels, height, width)

    def resized(self, size: Size) -> Size:
        height, width = size
        match self.resize:
            case (rows, columns):
                return rows, columns
            case (side,):
                short, long = min(size), int(side * max(size) / min(size))
                return (side, long) if height == short else (long, side)
        wanted = [fixed / full for fixed, full in zip(self.target, size, strict=True) if fixed]
        if not wanted:
            return size
        share = max(wanted)
        return max(1, round(height * share)), max(1, round(width * share))

    def apply(self, image: Any) -> np.ndarray:
        """The sample that an image becomes, without its first axis."""
        from PIL import Image, ImageOps

        deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
        if not deep and image.mode in ("I", "F"):
            raise DataError(f"its pixels are of 32 bits ({image.mode}), whose range is unknown", "Save it with 8 or 16")
        image = ImageOps.exif_transpose(image)
        if deep:  # what Pillow makes of 16 bits when asked for 8 is cut off, not scaled
            image = Image.fromarray(np.asarray(image).astype(np.float32) * np.float32(255 / 65535))
        else:
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            image = image.convert(_MODES[self.channels])
        rows, columns = self.resized((image.height, image.width))
        if (columns, rows) != image.size:
            image = image.resize((columns, rows), Image.Resampling.BILINEAR)
        height, width = (full if cut is None else cut for cut, full in zip(self.crop, (rows, columns), strict=True))
        top, left = round((rows - height) / 2), round((columns - width) / 2)
        values = np.asarray(image.crop((left, top, left + width, top + height)), np.float32)
        if values.ndim == 2:
            values = np.repeat(values[:, :, None], self.channels, axis=2)
            values[:, :, 3:] = 255
        if self.bgr and self.channels > 1:
            values = values[:, :, [2, 1, 0, *range(3, self.channels)]]
        values = values * np.float32(self.scale)
        if self.mean:
            values = values - np.asarray(self.mean, np.float32)
        if self.std:
            values = values / np.asarray(self.std, np.float32)
        values = values if self.last else values.transpose(2, 0, 1)
        return np.ascontiguousarray(values if self.dtype.kind == "f" else np.rint(values), self.stored)

    def __str__(self) -> str:
        """What is done, in the order in which it is done."""
        size = f"to {_by(self.resize)}" if len(self.resize) == 2 else f"shorter side to {_by(self.resize)}"
        if not self.resize:
            size = f"to cover {_by(self.target)}" if self.target != (None, None) else ""
        value = "x" if self.scale == 1 else f"x * {self.scale:.6g}"
        value = f"({value} - {_numbers(self.mean)})" if self.mean else value
        value += f" / {_numbers(self.std)}" if self.std else ""
        order = ("BGR" if self.bgr else "RGB") if self.channels > 1 else "grey"
        parts = [
            size and f"resized {size} (bilinear)",
            self.crop != (None, None) and f"cropped to {_by(self.crop)} in the center",
            {4: f"{order} and alpha"}.get(self.channels, order),
            value,
            "NHWC" if self.last else "NCHW",
        ]
        return ", ".join(part for part in parts if part)


_NPZ = "Prepare the samples as in training, and write them with numpy.savez, input names as keys"
_EACH = "Give one number, or one for each channel"


def _layout(spec: TensorSpec, asked: str | None) -> tuple[int, bool, tuple[int | None, int | None]]:
    """(channels, whether these come last, height and width where fixed) of an image-like input."""
    shape = spec.shape
    if len(shape) != 4:
        raise DataError(f"Images do not fit the input {spec}", _NPZ)
    places = {"NCHW": shape[1], "NHWC": shape[3]}
    sure = [name for name, dim in places.items() if dim in _MODES]
    unknown = [name for name, dim in places.items() if not isinstance(dim, int)]
    possible = sure or unknown
    if asked is not None:
        possible = [asked] if asked in sure + unknown else []
    if not possible:
        raise DataError(f"Images have 1, 3 or 4 channels, and do not fit the input {spec}", _NPZ)
    if len(possible) > 1:
        raise UsageError(f"Which axis of {spec} are the channels is not clear", "Give --layout NCHW or NHWC")
    last = possible[0] == "NHWC"
    found, (height, width) = places[possible[0]], shape[1:3] if last else shape[2:]
    fixed = (height if isinstance(height, int) else None, width if isinstance(width, int) else None)
    return found if isinstance(found, int) else 3, last, fixed


def _values(file: Path, prepare: Preparation, shape: tuple[int, ...]) -> np.ndarray:
    with _failures(file), _opened(file) as image:
        values = prepare.apply(image)[None]
        if values.shape != shape:
            raise DataError(f"it becomes {values.shape[1:]}, and its header promises {shape[1:]}", "Save it again")
    return values


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of large images, and of what is odd about the metadata of a file
        with Image.open(file) as image:
            yield image


@contextlib.contextmanager
def _failures(file: Path) -> Iterator[None]:
    """Turns what Pillow raises for a bad file into a DataError that names the file."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{file}: {error}") from None
    except (ChannelfoldError, MemoryError):
        raise
    except Exception as error:  # a file can be wrong in more ways than Pillow has exceptions for
        kind = type(error).__name__
        if kind == "UnidentifiedImageError":
            raise DataError(f"{file} is not an image that Pillow can read", "Remove it, or save it as PNG") from None
        if kind == "DecompressionBombError":
            raise DataError(f"{file} has too many pixels ({error})", "Make it smaller") from None
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{file} is damaged or cut short ({reason})", "Remove it, or save it again") from None


def _pillow() -> None:
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise DependencyError(f"Images are read with Pillow ({error})", "Run: pip install pillow") from None


def _by(size: Sequence[int | None]) -> str:
    return "x".join("?" if side is None else str(side) for side in size)


def _numbers(values: Sequence[float]) -> str:
    numbers = [f"{value:g}" for value in values]
    return numbers[0] if len(numbers) == 1 else f"({', '.join(numbers)})"
