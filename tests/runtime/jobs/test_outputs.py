"""What a command writes never destroys what it reads, nor a file of another kind."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from channelfold import models
from channelfold.runtime import jobs
from channelfold.runtime.errors import ChannelfoldError, OutputError, UsageError

DIGITS = models.path("digits_cnn.onnx")
SAMPLES = {"image": np.load(models.path("digits_calibration.npz"))["image"][:8]}
RECIPE = '[[pass]]\nname = "fold-constants"\n'


@pytest.fixture
def folder(tmp_path) -> Path:
    np.savez(tmp_path / "c.npz", **SAMPLES)
    (tmp_path / "data").mkdir()
    shutil.copy(tmp_path / "c.npz", tmp_path / "data" / "0.npz")
    onnx.save(onnx.load(DIGITS), tmp_path / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=0)
    (tmp_path / "report.json").write_text(RECIPE)
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff\xe0 a photo\0")
    (tmp_path / "notes.txt").write_text("what nobody wrote down elsewhere")
    return tmp_path


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "run",
    [
        lambda f: jobs.quantize(f / "m.onnx", f / "c.npz", source=jobs.Source(f / "c.npz")),
        lambda f: jobs.quantize(f / "m.onnx", f / "data/0.npz", source=jobs.Source(f / "data")),
        lambda f: jobs.quantize(f / "m.onnx", f / "m.bin", source=jobs.Source(f / "c.npz")),
        lambda f: jobs.sparsify(f / "m.onnx", f / "c.npz", source=jobs.Source(evaluation=f / "c.npz")),
        lambda f: jobs.build(f / "m.onnx", f / "c.npz", sm=89, source=jobs.Source(f / "c.npz")),
        lambda f: jobs.compress(f / "m.onnx", f, f / "report.json"),
        lambda f: jobs.fold(f / "m.onnx", f / "m.onnx"),
        lambda f: jobs.fold(f / "m.onnx", f / "photo.jpg"),
        lambda f: jobs.fold(f / "m.onnx", f / "notes.txt"),
        lambda f: jobs.build(f / "m.onnx", f / "photo.jpg", sm=89),
        lambda f: jobs.build(f / "m.onnx", f / "notes.txt", sm=89),
        lambda f: jobs.compress(f / "m.onnx", f, "fold"),  # report.json is no report
    ],
)
def test_nothing_is_destroyed(run, folder):
    before = _bytes(folder)
    with pytest.raises((UsageError, OutputError)):
        run(folder)
    assert _bytes(folder) == before


def test_links_are_followed(folder):
    (folder / "real").mkdir()
    (folder / "link.onnx").symlink_to(folder / "real" / "target.onnx")
    for _ in range(2):
        jobs.fold(DIGITS, folder / "link.onnx")
        assert (folder / "link.onnx").is_symlink()
        assert onnx.load(folder / "real" / "target.onnx").graph.node


def test_devices_are_refused(folder, monkeypatch):
    for path in ("/dev/null", "/dev/stdout"):
        with pytest.raises(ChannelfoldError):
            jobs.fold(DIGITS, path)
    assert Path("/dev/stdout").is_symlink() or not Path("/dev/stdout").exists()


def test_an_empty_path_of_data(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(UsageError, match="empty"):
        jobs.quantize(DIGITS, "q.onnx", source=jobs.Source(""))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda f: (f / "d.py").write_text("import sys\ndef load_data():\n    sys.exit(0)\n") and f / "d.py", "line 3"),
        (lambda f: (f / "image.png").write_bytes(b"x") and f, r"image\.png is not an image"),
        (lambda f: f / "samples.npz", "Did you mean .*sample.npz"),
        (lambda f: f / "negative.npy", "announces the shape"),
    ],
)
def test_data_that_cannot_be_read(make, says, tmp_path):
    (tmp_path / "only").mkdir()
    np.savez(tmp_path / "sample.npz", **SAMPLES) if "sample" in says else None
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 1, 8, 8), }"
    head = b"\x93NUMPY\x01\x00" + (len(header) + 1).to_bytes(2, "little") + header + b"\n"
    if "shape" in says:
        (tmp_path / "negative.npy").write_bytes(head)
    with pytest.raises(ChannelfoldError, match=says):
        jobs.quantize(DIGITS, tmp_path / "only" / "q.onnx", source=jobs.Source(make(tmp_path), allow_script=True))


def test_an_array_without_a_name_is_that_of_the_only_input(tmp_path):
    np.savez(tmp_path / "c.npz", SAMPLES["image"])
    assert jobs.quantize(DIGITS, tmp_path / "q.onnx", source=jobs.Source(tmp_path / "c.npz"))["steps"][-1]["changed"]


def test_models_that_are_none(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"x")
    (tmp_path / "model.pt").write_bytes(b"PK")
    with pytest.raises(ChannelfoldError, match=r"Did you mean .*model\.onnx"):
        jobs.inspect(tmp_path / "modle.onnx")
    with pytest.raises(ChannelfoldError, match="Export the network first"):
        jobs.inspect(tmp_path / "model.pt")


def test_a_recipe_nested_too_deep(tmp_path):
    (tmp_path / "r.toml").write_text(f"a = {'[' * 3000}{']' * 3000}")
    with pytest.raises(UsageError):
        jobs.compress(DIGITS, tmp_path / "out", tmp_path / "r.toml")


def test_a_command_that_fails_leaves_the_old_output(tmp_path):
    """Rounding to the nearest code reads no data, so only the proof finds that they are broken."""
    out = tmp_path / "q.onnx"
    out.write_bytes(DIGITS.read_bytes())
    np.savez(tmp_path / "bad.npz", image=np.where(np.arange(4)[:, None, None, None] == 3, np.nan, SAMPLES["image"][:4]))
    with pytest.raises(ChannelfoldError, match="NaN"):
        jobs.quantize(DIGITS, out, source=jobs.Source(tmp_path / "bad.npz"), options={"rounder": "nearest"})
    assert out.read_bytes() == DIGITS.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.npz", "q.onnx"]
