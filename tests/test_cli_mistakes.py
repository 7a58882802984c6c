"""One clear line and an exit code for every mistake on the command line."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from channelfold.runtime import jobs
from channelfold.runtime.errors import ChannelfoldError
from channelfold.tests.shipped import CALIBRATION, DIGITS, EVALUATION


@pytest.fixture
def samples(tmp_path):
    """Writes an .npz with these arrays."""

    def samples(**arrays: np.ndarray) -> Path:
        np.savez(tmp_path / "samples.npz", allow_pickle=False, **arrays)
        return tmp_path / "samples.npz"

    return samples


# ---- wrong usage -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (("compres", "m.onnx"), "No such command 'compres'. Did you mean 'compress'? See: channelfold --help"),
        (
            ("frobnicate",),
            "Known: bench, build, cast, compress, demo, diff, fold, inspect, lint, passes, prune, quantize, reparam, "
            "report, sensitivity, smooth, sparsify",
        ),
        (("fold", "m.onnx", "--outptu", "x"), "--output"),
        (("fold", "m.onnx"), "Missing option '-o' / '--output'. See: channelfold fold --help"),
        (("fold", "-o", "x"), "Missing argument 'MODEL'"),
        (("quantize", "m.onnx", "-o", "x", "--calibrator", "msee"), "'msee' is unknown. Did you mean 'mse'?"),
        (("quantize", "m.onnx", "-o", "x", "--target", "tensorrt:89"), "compress and lint take tensorrt:89. See"),
        (("quantize", "m.onnx", "-o", "x", "--random", "0"), "0 is not in the range"),
        (("compress", DIGITS, "-o", "x", "--recipe", "in8"), "There is no recipe 'in8'. Did you mean 'int8'?"),
        (("compress", DIGITS, "-o", "x", "--recipe", "fold", "--calibrator", "mse"), "has an option 'calibrator'"),
        (("compress", DIGITS, "-o", "x", "--shape", "image:1"), "not of the form NAME:MIN:OPT:MAX"),
        (("diff", DIGITS, DIGITS), "Give --data, or --random N"),
        (("diff", DIGITS, DIGITS, "--data", EVALUATION, "--random", "1"), "Give one of them"),
        (("diff", DIGITS, DIGITS, "--data", "data.py"), "Add --allow-script"),
        (("fold", DIGITS, "-o", DIGITS), "is the model itself"),
        (("smooth", "m.onnx", "-o", "x", "--method", "smothquant"), "Did you mean 'smoothquant'? See"),
        (("smooth", "m.onnx", "-o", "x", "--method", "repq", "--aim", "media"), "Did you mean 'median'? See"),
        (("smooth", "m.onnx", "-o", "x", "--alpha", "0.3"), "Method 'auto' has no option 'alpha'. It is for: smoothq"),
        (("smooth", "m.onnx", "-o", "x", "--method", "reorder", "--no-shift"), "It is for: auto, os-plus, repq, outl"),
        (("smooth", "m.onnx", "-o", "x", "--method", "equalize", "--sigmas", "2"), "Add --absorb-bias"),
        (("smooth", "m.onnx", "-o", "x", "--weight-bits", "1"), "'weight_bits' is 1. Expected 2 to 16"),
        (("reparam", "m.onnx", "-o", "x", "--keep-hidden", "0.5"), "--keep-hidden is for networks that are not folded"),
        (("reparam", DIGITS, "-o", "x", "--approximate"), "the amount to remove is missing. Give one of"),
        (("reparam", DIGITS, "-o", "x", "--approximate", "--branch", "alway"), "Did you mean 'always'? See"),
        (("prune", "m.onnx", "-o", "x"), "The amount to prune is missing"),
        (("prune", "m.onnx", "-o", "x", "--keep-macs", "0.5", "--ratio", "0.5"), "found 'keep_macs' and 'ratio'"),
        (("prune", "m.onnx", "-o", "x", "--dead", "--width"), "'remove-dead-channels' has no option 'width'"),
        (
            ("prune", "m.onnx", "-o", "x", "--keep-macs", "0.5", "--dead"),
            "--dead knows no budget such as 'keep_macs'",
        ),
        (("prune", "m.onnx", "-o", "x", "--ratio", "0.5", "--importance", "l3"), "'l3' is unknown. Did you mean 'l"),
        (("prune", "m.onnx", "-o", "x", "--keep-macs", "50"), "'keep_macs' is 50. Expected a share: 0.5 is half"),
        (("prune", DIGITS, "-o", "x", "--keep-macs", "0.001"), "A budget of 0.001 cannot be reached: the least"),
        (("prune", DIGITS, "-o", "x", "--ratio", "0.5", "--importance", "activation"), "needs calibration data"),
        (("quantize", DIGITS, "-o", "x", "--float-share", "2"), "'float_share' is 2. Expected 0 to 1"),
    ],
    ids=lambda value: " ".join(map(str, value)).replace(str(DIGITS.parent), "") if isinstance(value, tuple) else "",
)
def test_usage_errors(line, expected, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert expected in fails(2, *line)
    assert not list(tmp_path.iterdir())


def test_an_unknown_key_of_a_recipe(fails, tmp_path):
    (tmp_path / "mine.toml").write_text('[[pass]]\nname = "quantize"\ncalibratr = "mse"\n')
    line = fails(2, "compress", DIGITS, "-o", tmp_path / "out", "--recipe", tmp_path / "mine.toml")
    assert "mine.toml: pass 1 ('quantize') has no option 'calibratr'. Did you mean 'calibrator'?" in line


# ---- broken models -----------------------------------------------------------------------------------------------


def test_a_truncated_model(fails, tmp_path):
    (tmp_path / "cut.onnx").write_bytes(DIGITS.read_bytes()[:100_000])
    assert "cut.onnx is truncated or not an ONNX file" in fails(1, "inspect", tmp_path / "cut.onnx")


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n" * 100, b"hello world\n"], ids=["empty", "png", "text"])
def test_a_file_that_is_not_onnx(content, fails, tmp_path):
    (tmp_path / "model.onnx").write_bytes(content)
    assert "model.onnx" in fails(1, "fold", tmp_path / "model.onnx", "-o", tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("path", ["absent.onnx", "."], ids=["missing", "folder"])
def test_a_model_that_is_no_file(path, fails, tmp_path):
    assert str(tmp_path / path) in fails(1, "inspect", tmp_path / path)


@pytest.fixture
def external(tmp_path):
    """The digits network with its weights in ``weights.bin``; the location that the file names can be changed."""

    def external(location: str = "weights.bin") -> Path:
        model = onnx.load(DIGITS)
        path = tmp_path / "model.onnx"
        onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
        if location != "weights.bin":
            model = onnx.load(path, load_external_data=False)
            for tensor in model.graph.initializer:
                tensor.external_data[0].value = location
            path.write_bytes(model.SerializeToString())
        return path

    return external


def test_missing_external_data(fails, external, tmp_path):
    path = external()
    (tmp_path / "weights.bin").unlink()
    line = fails(1, "fold", path, "-o", tmp_path / "out.onnx")
    assert "weights.bin" in line
    assert "missing" in line


def test_short_external_data(fails, external, tmp_path):
    path = external()
    os.truncate(tmp_path / "weights.bin", 1000)
    line = fails(1, "fold", path, "-o", tmp_path / "out.onnx")
    assert "weights.bin, which has 1000" in line


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/hostname", "a/../../weights.bin"])
def test_external_data_outside_the_folder(location, fails, external, tmp_path):
    (tmp_path.parent / "weights.bin").write_bytes(bytes(1_000_000))
    line = fails(1, "fold", external(location), "-o", tmp_path / "out.onnx")
    assert "outside the model's folder" in line
    assert location in line


# ---- broken data -------------------------------------------------------------------------------------------------

GOOD = np.zeros((4, 1, 8, 8), np.float32)
NAN = np.where(np.arange(4)[:, None, None, None] == 2, np.float32(np.nan), GOOD)


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"imgae": GOOD}, "Did you mean 'imgae'?"),
        ({}, "without a single array"),
        ({"image": GOOD[:, :, :, :7]}, "has shape (4, 1, 8, 7)"),
        ({"image": GOOD.transpose(0, 2, 3, 1)}, "image.transpose(0, 3, 1, 2)"),
        ({"image": GOOD.astype(np.uint8)}, "uint8"),
        ({"image": GOOD.astype(str)}, "image.astype('float32')"),
        ({"image": NAN}, "sample 2: 'image' holds NaN or Inf (64 of 64 values)"),
        ({"image": GOOD[:0]}, "no samples"),
    ],
    ids=["wrong name", "no arrays", "wrong shape", "channels last", "raw bytes", "text", "NaN", "empty"],
)
@pytest.mark.parametrize("role", ["--calibration", "--evaluation"])
def test_data_that_does_not_fit(arrays, expected, role, fails, samples, tmp_path):
    line = ("compress", DIGITS, "-o", tmp_path / "out", role, samples(**arrays))
    if role == "--evaluation":
        line += ("--calibration", CALIBRATION)
    assert expected in fails(1, *line)
    assert not (tmp_path / "out" / "model.onnx").exists()


@pytest.mark.parametrize("line", ["quantize", "smooth", "smooth --method equalize --absorb-bias"])
def test_no_data_at_all(line, fails, tmp_path):
    assert "Give some with --calibration" in fails(1, *line.split(), DIGITS, "-o", tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())


def test_a_damaged_data_file(fails, tmp_path):
    (tmp_path / "samples.npz").write_bytes(CALIBRATION.read_bytes()[:5000])
    assert "samples.npz" in fails(
        1, "quantize", DIGITS, "-o", tmp_path / "o.onnx", "--calibration", tmp_path / "samples.npz"
    )


def test_a_script_runs_only_when_allowed(run, tmp_path):
    script = tmp_path / "data.py"
    script.write_text(
        "import numpy as np\nprint('loading')\n"
        "def load_data():\n    yield {'image': np.ones((1, 1, 8, 8), np.float32)}\n"
    )
    code, out, err = run("diff", DIGITS, DIGITS, "--data", script, "--allow-script", "--json")
    assert (code, json.loads(out)["accuracy"]["feeds"]) == (0, 1)
    assert "loading" in err  # what a script prints does not spoil the JSON


# ---- outputs that cannot be written ------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["fold", "compress", "build"])
def test_an_output_below_a_file(command, fails, tmp_path):
    (tmp_path / "file").touch()
    line = (command, DIGITS, "-o", tmp_path / "file" / "out")
    line += ("--random", "1") if command == "compress" else ("--data", CALIBRATION) if command == "build" else ()
    assert f"Nothing can be written in {tmp_path / 'file'}" in fails(1, *line)


def test_an_output_that_is_a_folder(fails, tmp_path):
    assert "is a folder" in fails(1, "fold", DIGITS, "-o", tmp_path)


def test_a_full_disk_leaves_nothing_behind(fails, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    line = fails(1, "fold", DIGITS, "-o", tmp_path / "out.onnx")
    assert "No space left on device" in line
    assert "Free some space" in line
    assert not list(tmp_path.iterdir())


def test_a_full_disk_for_temporary_files(fails, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(jobs, "inspect", full)
    expected = "error: No space left on device. Free some space, or set TMPDIR to a larger disk\n"
    assert fails(1, "inspect", DIGITS) == expected


# ---- missing extras, bugs, interruption --------------------------------------------------------------------------


def test_onnxruntime_is_missing(fails, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    line = fails(1, "compress", DIGITS, "-o", tmp_path / "out", "--calibration", CALIBRATION)
    assert "pip install onnxruntime" in line
    assert not (tmp_path / "out").exists()  # found out before the work


def test_tensorrt_is_missing(fails, monkeypatch, tmp_path):
    monkeypatch.setattr("channelfold.runtime.engine.build._installed", lambda package: False)
    line = fails(1, "compress", DIGITS, "-o", tmp_path / "out", "--calibration", CALIBRATION, "--sm", "89")
    assert "pip install polygraphy tensorrt-rtx-cu12" in line
    assert not (tmp_path / "out").exists()


def broken(*_: object, **__: object) -> None:
    raise ZeroDivisionError("float division by zero")


def test_a_bug_is_one_line_that_says_how_to_report_it(fails, monkeypatch):
    monkeypatch.setattr(jobs, "inspect", broken)
    line = fails(1, "inspect", DIGITS)
    assert line == (
        "error: ZeroDivisionError: float division by zero. This is a bug in channelfold. "
        "Run again with --debug, and report what it shows\n"
    )


def test_debug_shows_the_traceback(run, monkeypatch):
    monkeypatch.setattr(jobs, "inspect", broken)
    code, out, err = run("inspect", DIGITS, "--debug")
    assert (code, out) == (1, "")
    assert err.startswith("Traceback (most recent call last):")
    assert "in broken" in err
    assert err.splitlines()[-1].startswith("error: ZeroDivisionError")


def test_interruption_exits_130(run, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "inspect", interrupted)
    code, out, err = run("inspect", DIGITS)
    assert (code, out) == (130, "")
    assert err.splitlines()[-1].startswith("interrupted: ")


@pytest.mark.parametrize("kind", ChannelfoldError.__subclasses__(), ids=lambda kind: kind.__name__)
def test_every_error_has_its_exit_code(kind, fails, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise kind("It went\nwrong", "Do this")

    monkeypatch.setattr(jobs, "inspect", fail)
    assert fails(kind.exit_code, "inspect", DIGITS) == "error: It went wrong. Do this\n"
