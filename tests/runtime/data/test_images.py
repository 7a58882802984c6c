"""Images as samples: each preparation against its definition, every kind of file, the message for every bad one."""

from __future__ import annotations

import json
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import onnx.parser
import pytest

from channelfold.runtime.data.reading import Reading
from channelfold.runtime.data.sources import open_data
from channelfold.runtime.errors import DataError, DependencyError, UsageError
from channelfold.runtime.io.session import TensorSpec
from channelfold.tests.graphs import random

Image = pytest.importorskip("PIL.Image")
RNG = np.random.default_rng(0)
PLAIN = "The values of images are in 0..1, because neither --mean nor --std is given"


def spec(*shape: int | str | None, dtype: str = "float32") -> tuple[TensorSpec]:
    return (TensorSpec("image", np.dtype(dtype), shape),)


RGB = spec("n", 3, 4, 6)


def pixels(height: int, width: int, *channels: int, kind: str = "uint8", high: int = 256) -> np.ndarray:
    return RNG.integers(0, high, (height, width, *channels)).astype(kind)


def saved(path: Path, array: np.ndarray, **options: object) -> np.ndarray:
    Image.fromarray(array).save(path, **options)
    return array


def only(source: Path, inputs: tuple[TensorSpec] = RGB, **options: object) -> np.ndarray:
    """The only sample of a source."""
    (feed,) = open_data(source, inputs, Reading(**options))
    return feed["image"]


def error(source: Path, inputs: tuple[TensorSpec] = RGB, **options: object) -> str:
    with pytest.raises((DataError, UsageError)) as caught:
        list(open_data(source, inputs, Reading(**options)))
    return str(caught.value)


# ---- what becomes of pixels --------------------------------------------------------------------------------------


def test_an_image_of_the_right_size_is_scaled_alone(tmp_path):
    array = saved(tmp_path / "a.png", pixels(4, 6, 3))
    expected = (array.astype(np.float32) * np.float32(1 / 255)).transpose(2, 0, 1)[None]
    np.testing.assert_array_equal(only(tmp_path / "a.png"), expected)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"scale": 1.0}, lambda x: x),
        ({"mean": (0.5,), "std": (0.25,)}, lambda x: (x / 255 - 0.5) / 0.25),
        ({"mean": (0.1, 0.2, 0.3)}, lambda x: x / 255 - [0.1, 0.2, 0.3]),
        ({"std": (0.1, 0.2, 0.4), "scale": 0.5}, lambda x: x * 0.5 / [0.1, 0.2, 0.4]),
        ({"channel_order": "bgr", "mean": (1, 2, 3), "scale": 1.0}, lambda x: x[:, :, ::-1] - [1, 2, 3]),
    ],
)
def test_values_follow_the_options(tmp_path, options, expected):
    array = saved(tmp_path / "a.png", pixels(4, 6, 3))
    found = only(tmp_path / "a.png", **options)
    np.testing.assert_allclose(found[0].transpose(1, 2, 0), expected(array.astype(float)), rtol=1e-6, atol=1e-6)
    assert (found.dtype, found.flags.c_contiguous) == (np.float32, True)
    last = only(tmp_path / "a.png", spec(1, 4, 6, 3), layout="NHWC", **options)
    np.testing.assert_array_equal(last[0].transpose(2, 0, 1), found[0])


@pytest.mark.parametrize(
    ("size", "options", "resized", "cropped"),
    [
        ((8, 12), {}, (4, 6), (4, 6)),
        ((8, 20), {}, (4, 10), (4, 6)),  # covers the input, then the center of it
        ((30, 12), {}, (15, 6), (4, 6)),
        ((3, 3), {}, (6, 6), (4, 6)),
        ((20, 30), {"resize": (8,)}, (8, 12), (4, 6)),
        ((9, 7), {"resize": (4, 6)}, (4, 6), (4, 6)),
        ((9, 9), {"resize": (10, 11)}, (10, 11), (4, 6)),
        ((20, 30), {"crop": (4, 6)}, (4, 6), (4, 6)),
    ],
)
def test_sizes_follow_the_options_and_the_model(tmp_path, size, options, resized, cropped):
    array = saved(tmp_path / "a.png", pixels(*size, 3))
    image = Image.fromarray(array).resize(resized[::-1], Image.Resampling.BILINEAR)
    top, left = round((resized[0] - cropped[0]) / 2), round((resized[1] - cropped[1]) / 2)
    expected = np.asarray(image)[top : top + cropped[0], left : left + cropped[1]]
    found = only(tmp_path / "a.png", scale=1.0, **options)
    np.testing.assert_array_equal(found[0].transpose(1, 2, 0), expected.astype(np.float32))


def test_an_open_width_keeps_the_shape_of_the_image(tmp_path):
    saved(tmp_path / "a.png", pixels(24, 100, 3))
    saved(tmp_path / "b.png", pixels(96, 100, 3))
    data = open_data(tmp_path, spec(1, 3, 48, "w"))
    assert [feed["image"].shape for feed in data] == [(1, 3, 48, 200), (1, 3, 48, 50)]
    shapes = [feed["image"].shape for feed in open_data(tmp_path, spec(1, 3, "h", "w"), Reading(resize=(32,)))]
    assert shapes == [(1, 3, 32, 133), (1, 3, 32, 33)]


def test_integers_keep_the_values_of_pixels(tmp_path):
    array = saved(tmp_path / "a.png", pixels(4, 6, 3))
    found = only(tmp_path / "a.png", spec(1, 4, 6, 3, dtype="uint8"), layout="NHWC")
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found[0], array)
    assert "reaches from" in error(tmp_path / "a.png", spec(1, 3, 4, 6, dtype="int8"))
    assert only(tmp_path / "a.png", spec(1, 3, 4, 6, dtype="float16")).dtype == np.float16


def test_batches_are_filled_from_several_images(tmp_path):
    arrays = [saved(tmp_path / f"{index}.png", pixels(4, 6, 3)) for index in range(5)]
    data = open_data(tmp_path, spec(2, 3, 4, 6), Reading(scale=1.0))
    assert (len(data), data.description) == (2, f"4 samples in batches of 2 from {tmp_path.name}")
    assert data.notes[-1] == "1 of 5 samples did not fill a batch of 2 and were dropped"
    np.testing.assert_array_equal(next(iter(data))["image"][1], arrays[1].transpose(2, 0, 1))


# ---- kinds of files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_the_orientation_of_exif_is_heeded(tmp_path, orientation, suffix):
    upright = np.zeros((40, 60, 3), np.uint8)
    upright[:20, :30, 0], upright[:20, 30:, 1], upright[20:, :30, 2] = 255, 255, 255
    turn = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud,
            5: lambda x: x.transpose(1, 0, 2), 6: np.rot90, 7: lambda x: np.rot90(x, 2).transpose(1, 0, 2),
            8: lambda x: np.rot90(x, -1)}[orientation]  # fmt: skip
    image = Image.fromarray(np.ascontiguousarray(turn(upright)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"a.{suffix}", exif=exif, **{"quality": 95, "lossless": True} if suffix == "webp" else {})
    found = only(tmp_path / f"a.{suffix}", spec(1, 3, "h", 60))[0]
    assert found.shape == (3, 40, 60)
    corners = found[:, [5, 5, 35, 35], [5, 55, 5, 55]].T.round().astype(int).tolist()
    assert corners == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]]


def grey16(path: Path) -> float:
    saved(path, np.full((4, 6), 0x4000, np.uint16))
    return 0x4000 / 65535


def palette(path: Path) -> float:
    image = Image.new("P", (6, 4), 1)
    image.putpalette([9, 9, 9, 100, 100, 100])
    image.save(path, transparency=bytes([0, 7]))
    return 100 / 255


def with_alpha(path: Path) -> float:
    Image.new("RGBA", (6, 4), (50, 50, 50, 0)).save(path)
    return 50 / 255


def grey(path: Path) -> float:
    Image.new("L", (6, 4), 77).save(path)
    return 77 / 255


def bits(path: Path) -> float:
    Image.new("1", (6, 4), 1).save(path)
    return 1.0


@pytest.mark.parametrize("make", [grey16, palette, with_alpha, grey, bits])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_mode_becomes_what_the_model_takes(tmp_path, make, channels):
    expected = make(tmp_path / "a.png")
    found = only(tmp_path / "a.png", spec(1, channels, 4, 6))
    np.testing.assert_allclose(found[0, :3], expected, atol=1e-6)
    assert channels < 4 or (found[0, 3] == 1).all() or make in (palette, with_alpha)


def test_cmyk(tmp_path):
    Image.new("CMYK", (6, 4), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    np.testing.assert_allclose(only(tmp_path / "a.jpg")[0, :, 2, 2], [1, 0, 0], atol=0.02)


def test_a_folder_is_read_in_natural_order_with_its_classes(tmp_path):
    for name in ("b/10.png", "b/9.JPG", "a/1.png", ".cache/0.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        saved(tmp_path / name, np.full((4, 6, 3), len(name) + ord(name[0]), np.uint8), format="png")
    (tmp_path / "labels.csv").write_text("")
    data = open_data(tmp_path, RGB, Reading(scale=1.0))
    assert [feed["image"][0, 0, 0, 0] for feed in data] == [7 + 97, 7 + 98, 8 + 98]
    assert data.notes == (f"1 other file in {tmp_path.name} ignored",)


def test_the_preparation_decides_the_fingerprint_and_is_told(tmp_path):
    saved(tmp_path / "a.png", pixels(20, 30, 3))
    data = open_data(tmp_path, RGB)
    assert data.preparation == (
        "resized to cover 4x6 (bilinear), cropped to 4x6 in the center, RGB, x * 0.00392157, NCHW"
    )
    assert data.notes[0].startswith(PLAIN)
    options = {"resize": (8,), "mean": (0.5,), "std": (0.1, 0.2, 0.3), "channel_order": "bgr"}
    other = open_data(tmp_path, RGB, Reading(**options))
    assert other.preparation == (
        "resized shorter side to 8 (bilinear), cropped to 4x6 in the center, BGR, "
        "(x * 0.00392157 - 0.5) / (0.1, 0.2, 0.3), NCHW"
    )
    assert other.notes == ()
    assert len({data.fingerprint, other.fingerprint, open_data(tmp_path, RGB, Reading(crop=(4, 6))).fingerprint}) == 2


def test_one_image_is_in_memory_at_a_time(tmp_path):
    for index in range(40):
        Image.new("RGB", (300, 300), (index, 0, 0)).save(tmp_path / f"{index}.png")
    tracemalloc.start()
    data = open_data(tmp_path, spec("n", 3, 256, 256))
    assert (sum(1 for _ in data), len(data.fingerprint)) == (40, 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20  # all of them take 31 MB


# ---- what does not fit -------------------------------------------------------------------------------------------


def cut_short(path: Path) -> None:
    saved(path, pixels(90, 90, 3))
    path.write_bytes(path.read_bytes()[:9000])


def bomb(path: Path) -> None:
    """A PNG of 24 kB whose header promises 900 million pixels."""
    saved(path, pixels(90, 90, 3))
    data = bytearray(path.read_bytes())
    data[16:24] = (30_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path.write_bytes(b"hello world"), "is not an image that Pillow can read"),
        (lambda path: path.write_bytes(b""), "is not an image that Pillow can read"),
        (cut_short, "is damaged or cut short"),
        (bomb, "has too many pixels"),
        (lambda path: Image.new("F", (6, 4), 0.5).save(path, "tiff"), "its pixels are of 32 bits"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_named(tmp_path, make, says):
    saved(tmp_path / "a.png", pixels(4, 6, 3))
    make(tmp_path / "b.png")
    found = error(tmp_path)
    assert str(tmp_path / "b.png") in found
    assert says in found
    assert "\n" not in found


@pytest.mark.parametrize(
    ("inputs", "options", "says"),
    [
        (spec("n", 3, "h", "w"), {}, "The model takes images of any size (image: float32[n, 3, h, w]). Say which"),
        (spec("n", 8, 4, 6), {}, "Images have 1, 3 or 4 channels, and do not fit the input image: float32[n, 8, 4, 6]"),
        (spec("n", 64), {}, "Images do not fit the input image: float32[n, 64]"),
        (spec("n", None, None, None), {"resize": (4, 6)}, "Give --layout NCHW or NHWC"),
        (spec("n", 3, 4, 3), {}, "Give --layout NCHW or NHWC"),
        (RGB, {"layout": "NHWC"}, "Images have 1, 3 or 4 channels"),
        (RGB, {"mean": (0.1, 0.2)}, "--mean has 2 numbers, and the model has 3 channels. Give one number, or one for"),
        (RGB, {"crop": (3,)}, "--crop is 3x3, and the model takes 4x6. Leave it out"),
        (RGB, {"resize": (3, 3)}, "a.png is 3x3, smaller than 4x6. Give a larger --resize"),
        (spec("n", 3, "h", "w"), {"crop": (30,)}, "a.png is 20x30, smaller than 30x30. Give a larger --resize"),
        (RGB, {"resize": (200_000,)}, "a.png has 20x30 pixels and becomes 200000x300000. 178,956,970 are the limit"),
        (RGB, {"resize": (0,)}, "--resize is 0. Give one size such as 224, or 224x320"),
        (RGB, {"std": (0.0,)}, "--std is 0. Give the numbers of the training"),
        (RGB, {"scale": float("nan")}, "--scale is nan"),
        ((*RGB, *spec("n", 2)), {}, "Images are for models with one input, and the inputs are image: float32"),
    ],
)
def test_options_and_models_that_do_not_fit(tmp_path, inputs, options, says):
    saved(tmp_path / "a.png", pixels(20, 30, 3))
    assert says in error(tmp_path, inputs, **options)


def test_layout_decides_where_the_input_does_not(tmp_path):
    saved(tmp_path / "a.png", pixels(20, 30, 3))
    for layout, shape in (("NCHW", (1, 3, 4, 6)), ("NHWC", (1, 4, 6, 3))):
        assert only(tmp_path, spec("n", None, None, None), resize=(4, 6), layout=layout).shape == shape


def test_a_folder_with_arrays_too(tmp_path):
    saved(tmp_path / "a.png", pixels(4, 6, 3))
    np.savez(tmp_path / "b.npz", image=np.zeros((1, 3, 4, 6), np.float32))
    assert "holds both images and .npz files, and only one kind can be meant. Move one away" in error(tmp_path)


def test_pillow_is_missing(tmp_path, monkeypatch):
    saved(tmp_path / "a.png", pixels(4, 6, 3))
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(DependencyError, match=r"Images are read with Pillow .* Run: pip install pillow"):
        open_data(tmp_path, RGB)


# ---- the command line --------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path) -> Path:
    made = onnx.parser.parse_model("""<ir_version: 9, opset_import: ["": 17]>
        cnn (float[n,3,16,16] image) => (float[n,16,16,16] y)
        { a = Conv<pads = [1,1,1,1]>(image, W) b = Relu(a) y = Conv<pads = [1,1,1,1]>(b, V) }""")
    for name, shape in {"W": (16, 3, 3, 3), "V": (16, 16, 3, 3)}.items():
        made.graph.initializer.append(onnx.numpy_helper.from_array(random(shape, name).astype(np.float32), name))
    onnx.save(made, tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def test_a_newcomer_gives_a_folder_of_photos(run, model, tmp_path):
    (tmp_path / "photos").mkdir()
    for index in range(3):
        saved(tmp_path / "photos" / f"{index}.jpg", pixels(60 + index, 80, 3))
    line = ("--calibration", tmp_path / "photos", "--json")
    for command in (("compress", model, "-o", tmp_path / "out"), ("quantize", model, "-o", tmp_path / "q.onnx")):
        code, out, err = run(*command, *line)
        record = json.loads(out)
        assert (code, record["data"]["calibration"]) == (0, "3 samples from photos")
        assert record["data"]["preparation"].startswith("resized to cover 16x16 (bilinear), cropped to 16x16")
        assert PLAIN in err
    norm = ("--mean", "0.5,0.5,0.5", "--std", "0.25", "--resize", "20x24", "--crop", "16", "--channel-order", "bgr")
    code, out, err = run("diff", model, tmp_path / "q.onnx", "--data", tmp_path / "photos", *norm, "--json")
    assert (code, PLAIN in err) == (0, False)
    assert json.loads(out)["data"]["preparation"].endswith("BGR, (x * 0.00392157 - (0.5, 0.5, 0.5)) / 0.25, NCHW")
    assert run("inspect", model, *line)[0] == 0


def test_options_for_images_beside_other_data_are_named(run, fails, model, tmp_path):
    np.savez(tmp_path / "c.npz", image=np.zeros((2, 3, 16, 16), np.float32))
    code, _, err = run("quantize", model, "-o", tmp_path / "q.onnx", "--calibration", tmp_path / "c.npz", "--mean", "0")
    assert (code, "calibration data: --mean was ignored" in err) == (0, True)
    assert "'12,5' is not of the form N|HxW" in fails(2, "fold", model, "-o", "x", "--resize", "12,5")
    assert "Did you mean 'NHWC'?" in fails(2, "fold", model, "-o", "x", "--layout", "NHCW")
