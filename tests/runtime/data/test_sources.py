"""Data sources: what becomes a feed, that storage does not matter, and the message for every bad input."""

from __future__ import annotations

import gc
import io
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from channelfold.runtime.data.npz import read_headers
from channelfold.runtime.data.probes import random_data
from channelfold.runtime.data.sources import Data, load_script, open_data
from channelfold.runtime.errors import DataError, UsageError
from channelfold.runtime.io.session import TensorSpec


def spec(name: str, dtype: str | None, *shape: int | str | None) -> TensorSpec:
    return TensorSpec(name, None if dtype is None else np.dtype(dtype), shape)


IMAGE = [spec("image", "float32", "batch", 3, 4, 4)]
TOKENS = [spec("ids", "int64", "batch", "seq"), spec("mask", "int64", "batch", "seq")]
RNG = np.random.default_rng(0)
PICTURES = RNG.standard_normal((10, 3, 4, 4), dtype=np.float32)


def stacked(data: Data, name: str = "image") -> np.ndarray:
    return np.concatenate([feed[name] for feed in data])


def error(source: object, inputs: list[TensorSpec]) -> str:
    """The message of the DataError that opening and reading ``source`` ends with."""
    with pytest.raises(DataError) as caught:
        list(open_data(source, inputs))
    return str(caught.value)


class TestSplitting:
    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    @pytest.mark.parametrize("lead", ["batch", None, 1])
    def test_npz_is_cut_into_single_samples(self, tmp_path: Path, save, lead):
        save(tmp_path / "calib.npz", image=PICTURES)
        data = open_data(tmp_path / "calib.npz", [spec("image", "float32", lead, 3, 4, 4)])
        assert len(data) == 10
        assert [feed["image"].shape for feed in data] == [(1, 3, 4, 4)] * 10
        np.testing.assert_array_equal(stacked(data), PICTURES)
        assert (data.description, data.notes, data.synthetic) == ("10 samples from calib.npz", (), False)

    def test_can_be_iterated_again_and_twice_at_once(self, tmp_path: Path):
        np.savez(tmp_path / "calib.npz", image=PICTURES)
        data = open_data(tmp_path / "calib.npz", IMAGE)
        for first, second in zip(data, data, strict=True):
            np.testing.assert_array_equal(first["image"], second["image"])

    def test_static_batch_is_filled_across_files_and_the_rest_dropped(self, tmp_path: Path):
        for index, part in enumerate(np.split(PICTURES, [3, 6])):
            np.savez(tmp_path / f"{index}.npz", image=part)
        data = open_data(tmp_path, [spec("image", "float32", 4, 3, 4, 4)])
        assert len(data) == 2
        assert data.description == f"8 samples in batches of 4 from {tmp_path.name}"
        assert data.notes == ("2 of 10 samples did not fill a batch of 4 and were dropped",)
        np.testing.assert_array_equal(stacked(data), PICTURES[:8])

    def test_static_batch_is_not_filled_across_different_shapes(self):
        inputs = [spec("x", "float32", 2, "seq")]
        data = open_data([{"x": np.ones((3, 5), "f4")}, {"x": np.ones((3, 6), "f4")}], inputs)
        assert [feed["x"].shape for feed in data] == [(2, 5), (2, 6)]
        assert len(data) == 2
        assert data.notes == ("2 of 6 samples did not fill a batch of 2 and were dropped",)

    def test_inputs_without_a_shared_axis_are_run_as_stored(self):
        inputs = [spec("x", "float32", "batch", 4), spec("rate", "int64")]
        data = open_data([{"x": np.ones((8, 4), "f4"), "rate": np.array(16000)}], inputs)
        (feed,) = data
        assert (feed["x"].shape, feed["rate"].shape, int(feed["rate"])) == ((8, 4), (), 16000)
        assert data.description == "1 feed from arrays in memory"
        assert data.notes == ("The inputs share no sample axis, so each feed is run as it was stored",)

    def test_dynamic_axes_that_differ_in_length_are_run_as_stored(self):
        inputs = [spec("points", "float32", "n", 2), spec("image", "float32", 1, 8)]
        (feed,) = open_data({"points": np.ones((5, 2), "f4"), "image": np.ones((1, 8), "f4")}, inputs)
        assert feed["points"].shape == (5, 2)

    def test_stack_of_whole_feeds(self, tmp_path: Path):
        inputs = [spec("x", "float32", 1, 4), spec("state", "float32", 2, 1, 3), spec("rate", "int64")]
        arrays = {"x": PICTURES[:, 0, :1], "state": RNG.random((10, 2, 1, 3), dtype="f4"), "rate": np.arange(10)}
        np.savez(tmp_path / "stack.npz", **arrays)
        feeds = list(open_data(tmp_path / "stack.npz", inputs))
        assert [feed["x"].shape for feed in feeds] == [(1, 4)] * 10
        for name, array in arrays.items():
            np.testing.assert_array_equal(np.stack([feed[name] for feed in feeds]), array)

    def test_stack_of_batches_is_cut_into_samples(self):
        data = open_data({"image": PICTURES.reshape(5, 2, 3, 4, 4)}, IMAGE)
        assert len(data) == 10
        np.testing.assert_array_equal(stacked(data), PICTURES)

    def test_ragged_folder_keeps_natural_order(self, tmp_path: Path):
        for length in (2, 9, 10, 11):
            np.savez(tmp_path / f"part{length}.npz", ids=np.ones((2, length), "i8"), mask=np.ones((2, length), "i8"))
        shapes = [feed["ids"].shape for feed in open_data(tmp_path, TOKENS)]
        assert shapes == [(1, 2)] * 2 + [(1, 9)] * 2 + [(1, 10)] * 2 + [(1, 11)] * 2

    def test_zero_size_samples_are_feeds(self):
        feeds = list(open_data({"ids": np.ones((2, 0), "i8"), "mask": np.ones((2, 0), "i8")}, TOKENS))
        assert [feed["ids"].shape for feed in feeds] == [(1, 0), (1, 0)]

    def test_fortran_order(self, tmp_path: Path):
        np.save(tmp_path / "x.npy", np.asfortranarray(PICTURES))
        np.testing.assert_array_equal(stacked(open_data(tmp_path / "x.npy", IMAGE)), PICTURES)


class TestStorageDoesNotMatter:
    """The same samples give the same feeds and the same fingerprint, however they were stored."""

    @settings(max_examples=30, deadline=None)
    @given(
        cuts=st.lists(st.integers(1, 9), unique=True).map(sorted),
        kind=st.sampled_from(["npz", "compressed", "npy", "list", "generator", "reader", "stack"]),
        batch=st.sampled_from(["batch", 1, 2, 5]),
    )
    def test_fingerprint(self, tmp_path_factory: pytest.TempPathFactory, cuts: list[int], kind: str, batch: int | str):
        inputs = [spec("image", "float32", batch, 3, 4, 4)]
        parts = [PICTURES] if kind == "stack" else np.split(PICTURES, cuts)
        folder = tmp_path_factory.mktemp("data")
        source: object = folder
        for index, part in enumerate(parts):
            if kind == "npy":
                np.save(folder / f"{index}.npy", part)
            elif kind in ("npz", "compressed"):
                (np.savez if kind == "npz" else np.savez_compressed)(folder / f"{index}.npz", image=part)
        feeds = [{"image": part} for part in parts]
        if kind == "stack":
            source = {"image": PICTURES[:, None]}
        elif kind in ("list", "generator", "reader"):
            source = {"list": feeds, "generator": iter(feeds), "reader": Reader(feeds)}[kind]
        whole = open_data({"image": PICTURES}, inputs)
        data = open_data(source, inputs)
        assert len(data) == len(whole) == len(list(data))
        assert data.fingerprint == whole.fingerprint

    def test_fingerprint_sees_values_names_dtypes_and_order(self):
        base = {"ids": np.array([[1, 2], [3, 4]]), "mask": np.ones((2, 2), "i8")}
        variants = [
            base,
            base | {"ids": np.array([[1, 2], [3, 5]])},
            {name: array[::-1] for name, array in base.items()},
            {"ids": base["mask"], "mask": base["ids"]},
            {name: array[:1] for name, array in base.items()},
        ]
        prints = [open_data(variant, TOKENS).fingerprint for variant in variants]
        small = [spec("ids", "int32", "batch", "seq"), spec("mask", "int32", "batch", "seq")]
        assert len({*prints, open_data(base, small).fingerprint}) == 6


class Reader:
    """ONNX Runtime's CalibrationDataReader as most people write it."""

    def __init__(self, feeds: list[dict[str, np.ndarray]]):
        self.feeds = iter(feeds)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)


class RewindableReader(Reader):
    def __init__(self, feeds: list[dict[str, np.ndarray]]):
        super().__init__(feeds)
        self.all = feeds

    def rewind(self) -> None:
        self.feeds = iter(self.all)


class TestPythonSources:
    def test_reader_that_cannot_be_rewound_can_be_iterated_twice(self):
        data = open_data(Reader([{"image": PICTURES[:4]}, {"image": PICTURES[4:]}]), IMAGE)
        assert data.description == "10 samples from a data reader (Reader)"
        for _ in range(2):
            np.testing.assert_array_equal(stacked(data), PICTURES)

    def test_reader_that_was_used_before_is_rewound(self):
        reader = RewindableReader([{"image": PICTURES}])
        reader.get_next()
        assert len(open_data(reader, IMAGE)) == 10

    def test_exhausted_reader(self):
        assert error(Reader([]), IMAGE) == (
            "There are no samples in a data reader (Reader). Give some; a generator that was read before is empty"
        )

    def test_temporary_file_goes_with_the_data(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        data = open_data(({"image": PICTURES[i : i + 1]} for i in range(10)), IMAGE)
        assert len(list(tmp_path.iterdir())) == 1
        feeds = iter(data)
        next(feeds)
        del data
        gc.collect()
        np.testing.assert_array_equal(next(feeds)["image"], PICTURES[1:2])  # a running iteration keeps it
        del feeds
        gc.collect()
        assert list(tmp_path.iterdir()) == []

    def test_strings_survive_a_temporary_file(self):
        inputs = [spec("text", "object", "batch")]
        texts = np.array(["a", "größer", ""], dtype=object)
        feeds = list(open_data(iter([{"text": texts}]), inputs))
        assert [feed["text"].tolist() for feed in feeds] == [["a"], ["größer"], [""]]
        assert feeds[0]["text"].dtype == object

    def test_list_of_numbers(self):
        data = open_data([{"ids": [[1, 2, 3]], "mask": [[1, 1, 0]]}], TOKENS)
        assert next(iter(data))["ids"].dtype == np.int64

    def test_not_a_source(self):
        assert error(5, IMAGE).startswith("Data cannot be read from 'int'. Give a path, a list of feeds")

    def test_not_a_feed(self):
        assert error([PICTURES], IMAGE) == (
            "feed 0 is of type 'ndarray', not a dict of input names and arrays. Give feeds such as {'image': array}"
        )

    def test_ragged_rows(self):
        assert "feed 0: 'ids' is not an array (its rows differ in length)" in error(
            [{"ids": [[1], [1, 2]], "mask": 0}], TOKENS
        )

    def test_objects(self):
        assert "feed 0: 'image' is an array of Python objects" in error([{"image": [{}]}], IMAGE)


class TestScripts:
    def write(self, folder: Path, text: str) -> Path:
        path = folder / "load.py"
        path.write_text("import numpy as np\n" + text)
        return path

    def test_generator(self, tmp_path: Path):
        (tmp_path / "shapes_beside.py").write_text("SHAPE = (2, 3, 4, 4)\n")
        text = "from shapes_beside import SHAPE\ndef load_data():\n    yield {'image': np.ones(SHAPE, 'f4')}\n"
        data = load_script(self.write(tmp_path, text), IMAGE)
        assert (len(data), data.description) == (2, "2 samples from load_data() in load.py")

    def test_list(self, tmp_path: Path):
        script = self.write(tmp_path, "def load_data():\n    return [{'image': np.ones((1, 3, 4, 4), 'f4')}]\n")
        assert len(load_script(str(script), IMAGE)) == 1

    def test_error_names_the_line(self, tmp_path: Path):
        script = self.write(tmp_path, "def load_data():\n    yield {}['x']\n")
        with pytest.raises(DataError, match=r"load\.py, line 3: KeyError: 'x'\. Mend the script"):
            load_script(script, IMAGE)

    def test_without_load_data(self, tmp_path: Path):
        with pytest.raises(DataError, match=r"load\.py defines no load_data\(\)"):
            load_script(self.write(tmp_path, ""), IMAGE)

    def test_missing(self, tmp_path: Path):
        self.write(tmp_path, "")
        with pytest.raises(DataError, match=r"There is no .*laod\.py\. Did you mean '.*load\.py'"):
            load_script(tmp_path / "laod.py", IMAGE)

    def test_is_never_run_by_open_data(self, tmp_path: Path):
        script = self.write(tmp_path, "raise SystemExit\n")
        assert "load.py is a Python script, which is run only on request" in error(script, IMAGE)


class TestCasts:
    @pytest.mark.parametrize(
        ("stored", "wanted"),
        [("int32", "int64"), ("int64", "int32"), ("uint8", "int64"), ("float64", "float32"), ("float32", "float16")],
    )
    def test_same_kind_is_cast_with_a_note(self, stored: str, wanted: str):
        data = open_data({"x": np.array([[1, 2], [3, 4]], stored)}, [spec("x", wanted, "n", 2)])
        assert data.notes == (f"Input 'x' was cast from {stored} to {wanted}",)
        assert [feed["x"].dtype for feed in data] == [np.dtype(wanted)] * 2
        assert [feed["x"].tolist() for feed in data] == [[[1, 2]], [[3, 4]]]

    def test_byte_order_is_no_cast(self, tmp_path: Path):
        np.save(tmp_path / "x.npy", PICTURES.astype(">f4"))
        data = open_data(tmp_path / "x.npy", IMAGE)
        assert data.notes == ()
        np.testing.assert_array_equal(stacked(data), PICTURES)

    def test_integers_that_do_not_fit(self):
        message = error({"x": np.array([[0], [2**31]])}, [spec("x", "int32", "n", 1)])
        assert message == (
            "the data, sample 1: 'x' reaches from 2147483648 to 2147483648, beyond int32. Check the values"
        )

    def test_floats_that_do_not_fit(self):
        message = error({"x": np.array([[0], [1e5]], "f4")}, [spec("x", "float16", "n", 1)])
        assert message == "the data, sample 1: 'x' holds values beyond float16. Scale them as in training"

    def test_uint8_image(self, tmp_path: Path):
        np.savez(tmp_path / "calib.npz", image=np.zeros((2, 3, 4, 4), np.uint8))
        assert error(tmp_path / "calib.npz", IMAGE) == (
            f"{tmp_path / 'calib.npz'}: 'image' is uint8, and the model takes image: float32[batch, 3, 4, 4]. "
            "This looks like raw image bytes: scale and normalize them as in training, then store floats"
        )

    @pytest.mark.parametrize(
        ("stored", "wanted"), [("float32", "int64"), ("int64", "float32"), ("int64", "bool"), ("bool", "int64")]
    )
    def test_other_kinds(self, stored: str, wanted: str):
        message = error({"x": np.ones((2, 1), stored)}, [spec("x", wanted, "n", 1)])
        assert message == (
            f"the data: 'x' is {stored}, and the model takes x: {wanted}[n, 1]. "
            f"Convert it before storing: x.astype('{wanted}')"
        )


class TestBadFiles:
    def test_names(self, tmp_path: Path):
        path = tmp_path / "calib.npz"
        np.savez(path, ids=np.ones((2, 2), "i8"), attention=np.ones((2, 2), "i8"))
        inputs = [TOKENS[0], spec("attention_mask", "int64", "batch", "seq")]
        assert error(path, inputs) == (
            f"{path} lacks 'attention_mask'. The model's inputs: ids, attention_mask; found: attention, ids. "
            "Did you mean 'attention'?"
        )

    def test_extra_keys_are_ignored_with_a_note(self, tmp_path: Path):
        np.savez(tmp_path / "calib.npz", image=PICTURES, label=np.arange(10), id=np.arange(3))
        assert open_data(tmp_path / "calib.npz", IMAGE).notes == ("Not inputs of the model, not fed to it: id, label",)

    @pytest.mark.parametrize(
        ("shape", "hint"),
        [
            ((10, 3, 4), "If this is one sample, add the sample axis: image[None]"),
            ((10, 3, 4, 5), "Store 'image' with shape (N, 3, 4, 4)"),
            ((10, 4, 4, 3), "Its channels come last, so transpose it: image.transpose(0, 3, 1, 2)"),
        ],
    )
    def test_shapes(self, tmp_path: Path, shape: tuple[int, ...], hint: str):
        path = tmp_path / "calib.npy"
        np.save(path, np.zeros(shape, "f4"))
        assert error(path, IMAGE) == (
            f"{path}: 'image' has shape {shape}, and the model takes image: float32[batch, 3, 4, 4]. {hint}"
        )

    def test_channels_first_for_a_channels_last_model(self):
        message = error({"x": np.zeros((2, 3, 4, 5), "f4")}, [spec("x", "float32", 1, 4, 5, 3)])
        assert message.endswith("Its channels come first, so transpose it: x.transpose(0, 2, 3, 1)")

    def test_lengths_disagree(self):
        message = error({"ids": np.ones((4, 2), "i8"), "mask": np.ones((3, 2), "i8")}, TOKENS)
        assert (
            message == "the data: the inputs disagree on the number of samples (ids 4, mask 3). Store as many of each"
        )

    def test_too_few_for_a_static_batch(self):
        message = error({"x": np.ones((3, 1), "f4")}, [spec("x", "float32", 8, 1)])
        assert message == (
            "The model takes batches of 8, and there are only 3 samples in arrays in memory. "
            "Give more, or export the model with a dynamic batch axis"
        )

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_not_finite(self, tmp_path: Path, value: float):
        pictures = PICTURES.copy()
        pictures[7, 1, 2, 3] = value
        path = tmp_path / "calib.npz"
        np.savez(path, image=pictures)
        assert error(path, IMAGE) == (
            f"{path}, sample 7: 'image' holds NaN or Inf (1 of 48 values). "
            "Remove the sample; in an attention mask use a large negative number in place of -inf"
        )

    def test_no_samples(self, tmp_path: Path):
        np.savez(tmp_path / "calib.npz", image=PICTURES[:0])
        assert error(tmp_path / "calib.npz", IMAGE).startswith("There are no samples in calib.npz")
        assert error([], IMAGE).startswith("There are no samples in arrays in memory")

    def test_empty_folder(self, tmp_path: Path):
        assert error(tmp_path, IMAGE).startswith(f"The folder {tmp_path} holds no .npz and no .npy files")

    def test_folder_with_both_kinds(self, tmp_path: Path):
        np.save(tmp_path / "a.npy", PICTURES)
        np.savez(tmp_path / "b.npz", image=PICTURES)
        assert "holds both .npz and .npy files" in error(tmp_path, IMAGE)

    def test_other_files_in_a_folder_are_noted(self, tmp_path: Path):
        np.save(tmp_path / "a.npy", PICTURES)
        (tmp_path / "labels.csv").write_text("")
        (tmp_path / ".DS_Store").write_text("")
        assert open_data(tmp_path, IMAGE).notes == (f"1 other file in {tmp_path.name} ignored",)

    def test_npy_for_two_inputs(self, tmp_path: Path):
        np.save(tmp_path / "a.npy", np.ones((2, 2), "i8"))
        assert error(tmp_path / "a.npy", TOKENS) == (
            f"{tmp_path / 'a.npy'} holds one array, and the model has 2 inputs: ids, mask. "
            "Store them in one .npz, with the input names as keys"
        )

    def test_pickled_objects_are_never_loaded(self, tmp_path: Path):
        np.savez(tmp_path / "calib.npz", image=np.array([None, 1], dtype=object))
        np.save(tmp_path / "calib.npy", np.array([None, 1], dtype=object))
        assert error(tmp_path / "calib.npz", IMAGE).startswith(
            f"{tmp_path / 'calib.npz'}: 'image' holds pickled Python objects, which are never loaded"
        )
        assert error(tmp_path / "calib.npy", IMAGE).startswith(f"{tmp_path / 'calib.npy'} holds pickled")

    @pytest.mark.parametrize(
        ("suffix", "content", "what"),
        [
            (".npz", b"hello world", "is not an .npz file"),
            (".npy", b"hello world", "is not an .npy file"),
            (".npz", b"\x93NUMPY\x01\x00", "is not an .npz file, but an .npy file"),
            (".npy", b"PK\x03\x04rest", "is not an .npy file, but a zip archive"),
            (".npz", b"", "is empty"),
            (".npy", b"\x93NUMPY\x01\x00", "is damaged or cut short"),
            (".npy", b"\x93NUMPY\x07\x00v\x00", "is damaged or cut short (format version (7, 0) holds no plain array)"),
        ],
    )
    def test_not_what_the_name_says(self, tmp_path: Path, suffix: str, content: bytes, what: str):
        path = tmp_path / f"calib{suffix}"
        path.write_bytes(content)
        message = error(path, IMAGE)
        assert message.startswith(f"{path} {what}")
        assert message.endswith("Write it again with numpy.save or numpy.savez")

    @pytest.mark.parametrize("save", [np.save, np.savez, np.savez_compressed])
    @pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
    def test_cut_short(self, tmp_path: Path, save, kept: float):
        whole = io.BytesIO()
        save(whole, PICTURES) if save is np.save else save(whole, image=PICTURES)
        path = tmp_path / ("calib.npy" if save is np.save else "calib.npz")
        path.write_bytes(whole.getvalue()[: int(len(whole.getvalue()) * kept)])
        assert f"{path} is damaged or cut short" in error(path, IMAGE)

    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    def test_flipped_bit(self, tmp_path: Path, save):
        path = tmp_path / "calib.npz"
        save(path, image=PICTURES)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        assert error(path, IMAGE).startswith(f"{path} is damaged or cut short")

    def test_zip_without_arrays(self, tmp_path: Path):
        with zipfile.ZipFile(tmp_path / "calib.npz", "w") as archive:
            archive.writestr("data.pkl", b"")
        assert "is a zip archive without a single array" in error(tmp_path / "calib.npz", IMAGE)

    def test_file_not_found(self, tmp_path: Path):
        np.savez(tmp_path / "calibration.npz", image=PICTURES)
        near, far = tmp_path / "calibratoin.npz", tmp_path / "nowhere" / "x.npz"
        assert error(near, IMAGE) == f"There is no {near}. Did you mean '{tmp_path / 'calibration.npz'}'?"
        assert error(far, IMAGE) == f"There is no {far}. There is no folder {far.parent} either"
        assert error(tmp_path / "zzz", IMAGE).endswith(f"Check the name and the folder {tmp_path}")

    def test_unknown_suffix(self, tmp_path: Path):
        (tmp_path / "calib.csv").write_text("1,2")
        assert error(tmp_path / "calib.csv", IMAGE).startswith(f"{tmp_path / 'calib.csv'} is neither .npz nor .npy")

    def test_file_that_vanished(self, tmp_path: Path):
        np.save(tmp_path / "x.npy", PICTURES)
        data = open_data(tmp_path / "x.npy", IMAGE)
        (tmp_path / "x.npy").unlink()
        with pytest.raises(DataError, match=r"x\.npy cannot be read"):
            list(data)

    def test_models_that_cannot_be_fed(self):
        assert "Input 'x' has a type that numpy has no arrays for" in error([], [spec("x", None)])
        assert "The model has no inputs" in error([], [])


@pytest.mark.parametrize("save", [np.save, np.savez, np.savez_compressed])
def test_memory_holds_one_sample(tmp_path: Path, save):
    """A file of 64 MB is read, and hashed, with less than 6 MB (a sample has 1 MB)."""
    path = tmp_path / ("x.npy" if save is np.save else "x.npz")
    array = np.zeros((64, 1 << 18), "f4")
    save(path, array) if save is np.save else save(path, x=array)
    del array
    tracemalloc.start()
    data = open_data(path, [spec("x", "float32", "n", 1 << 18)])
    assert (sum(1 for _ in data), len(data.fingerprint)) == (64, 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 << 20


def test_headers_are_read_without_values(tmp_path: Path):
    np.savez(tmp_path / "x.npz", a=np.asfortranarray(np.zeros((3, 2), "f2")), b=np.int8(1))
    headers = read_headers(tmp_path / "x.npz")
    assert {name: (stored.dtype, stored.shape, stored.fortran) for name, stored in headers.items()} == {
        "a": (np.dtype("f2"), (3, 2), True),
        "b": (np.dtype("i1"), (), False),
    }


class TestRandom:
    INPUTS = (
        spec("x", "float16", "batch", 3, "h", "h"),
        spec("ids", "int32", "batch", "seq"),
        spec("flag", "bool", None, None),
        spec("rate", "float64"),
    )

    def test_shapes_and_values(self):
        data = random_data(self.INPUTS, 5, dims={"seq": 7})
        feeds = list(data)
        assert {name: (a.dtype.name, a.shape) for name, a in feeds[0].items()} == {
            "x": ("float16", (1, 3, 32, 32)),
            "ids": ("int32", (1, 7)),
            "flag": ("bool", (1, 32)),
            "rate": ("float64", ()),
        }
        assert set(np.concatenate([feed["ids"] for feed in feeds]).flat) == {0, 1}
        values = np.concatenate([feed["x"].ravel() for feed in feeds]).astype(float)
        assert abs(values.mean()) < 4 / values.size**0.5
        assert abs(values.std() - 1) < 4 / (2 * values.size) ** 0.5

    def test_a_name_has_one_size(self):
        inputs = [spec("x", "float32", "a", "b"), spec("y", "float32", "b", "a", None)]
        (feed,) = random_data(inputs, 1, dims={"b": 3}, size=5)
        assert (feed["x"].shape, feed["y"].shape) == ((1, 3), (3, 1, 5))

    def test_is_repeatable_and_marked(self):
        data = random_data(self.INPUTS, 2, seed=3)
        assert data.fingerprint == random_data(self.INPUTS, 2, seed=3).fingerprint
        assert data.fingerprint != random_data(self.INPUTS, 2, seed=4).fingerprint
        assert (data.synthetic, data.description) == (True, "2 random samples (seed 3)")
        assert data.notes == ("The inputs are random: neither ranges nor accuracy say anything about real data",)

    def test_more_samples_keep_the_first(self):
        three, five = random_data(self.INPUTS, 3), random_data(self.INPUTS, 5)
        for a, b in zip(three, five, strict=False):
            np.testing.assert_array_equal(a["x"], b["x"])

    def test_static_batch(self):
        data = random_data([spec("x", "float32", 4, 2)], 3)
        assert (len(data), data.description) == (3, "12 random samples in batches of 4 (seed 0)")

    def test_errors(self):
        with pytest.raises(UsageError, match=r"The model has no dimension 'sec'\. Did you mean 'seq'"):
            random_data(self.INPUTS, 1, dims={"sec": 2})
        with pytest.raises(UsageError, match="All its dimensions are fixed"):
            random_data([spec("x", "float32", 1)], 1, dims={"seq": 2})
        with pytest.raises(UsageError, match="0 random samples were asked for"):
            random_data(self.INPUTS, 0)
        with pytest.raises(DataError, match="Input 'text' takes strings"):
            random_data([spec("text", "object", 1)], 1)


def test_first_feeds():
    inputs = [TensorSpec("x", np.dtype(np.float32), ("N", 2))]
    data = open_data({"x": np.arange(8, dtype=np.float32).reshape(4, 2)}, inputs)
    head = data.first(3)
    assert (len(head), [float(feed["x"][0, 0]) for feed in head]) == (3, [0.0, 2.0, 4.0])
    assert head.description == f"the first 3 of {data.description}"
    assert data.first(4) is data
