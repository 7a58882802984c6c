"""What people meet who use the command line for the first time."""

from __future__ import annotations

import json

import numpy as np
import pytest

from channelfold.passes.base import Patterns
from channelfold.runtime.io.files import save
from channelfold.runtime.report.names import shorten, shorten_all
from channelfold.tests.graphs import build
from channelfold.tests.shipped import CALIBRATION, DIGITS, EVALUATION


def test_an_error_is_json_where_json_is_asked_for(run, tmp_path):
    code, out, err = run("quantize", tmp_path / "absent.onnx", "-o", tmp_path / "q.onnx", "--json")
    found = json.loads(out)
    assert (code, found["exit_code"], found["schema"]) == (1, 1, 1)
    assert err == f"error: {found['error']}\n"
    code, out, _ = run("quantise", "--json")
    assert (code, json.loads(out)["exit_code"]) == (2, 2)


def test_a_missed_gate_is_one_report(run, tmp_path):
    line = ("quantize", DIGITS, "-o", tmp_path / "q.onnx", "--calibration", CALIBRATION, "--evaluation", EVALUATION)
    code, out, err = run(*line, "--min-snr", "200", "--json")
    record = json.loads(out)
    assert (code, record["command"], "error" in record) == (3, "quantize", False)
    assert "error: " in err
    assert run(*line, "--min-snr", "5", "--min-agreement", "0.5")[0] == 0
    assert record["data"]["evaluation"].startswith("500 samples")


def test_quiet_prints_nothing_but_errors(run, fails, tmp_path):
    line = ("quantize", DIGITS, "-o", tmp_path / "q.onnx", "--calibration", CALIBRATION)
    assert run(*line, "--quiet") == (0, "", "")
    code, out, err = run(*line, "-q", "--json")
    assert (code, json.loads(out)["command"], err) == (0, "quantize", "")
    assert "does not exist" in fails(1, "inspect", tmp_path / "m.onnx", "-q")


@pytest.mark.parametrize("mistyped", ["modle.onnx", "model.onx", "model"])
def test_a_mistyped_model_gets_the_nearest_name(mistyped, fails, tmp_path):
    (tmp_path / "model.onnx").write_bytes(DIGITS.read_bytes())
    assert f"Did you mean '{tmp_path / 'model.onnx'}'?" in fails(1, "inspect", tmp_path / mistyped)


@pytest.mark.parametrize("line", [("--calibration", "absent.npz"), ("--evaluation", "absent.npz", "--random", "2")])
def test_a_failed_compress_leaves_no_empty_folder(line, fails, tmp_path):
    fails(1, "compress", DIGITS, "-o", tmp_path / "out", *line)
    assert not (tmp_path / "out").exists()


def test_collapsed_outputs_come_with_what_may_help(run, tmp_path):
    np.savez(tmp_path / "tiny.npz", image=np.full((4, 1, 8, 8), 1e-3, np.float32))
    line = ("quantize", DIGITS, "-o", tmp_path / "q.onnx", "--evaluation", EVALUATION, "--min-activation-snr", "0")
    _, out, _ = run(*line, "--calibration", tmp_path / "tiny.npz", "--json")
    record = json.loads(out)
    assert any(text.startswith("THE OUTPUTS HAVE COLLAPSED") for text in record["warnings"])
    helps = record["next"]
    assert any("Calibrate on more than 4 samples" in text for text in helps)
    assert any("compress --recipe int8-smooth" in text for text in helps)


NAMES = [f"/model/decoder/layers.{i}/self_attn/{p}_proj/MatMul" for i in (1, 11) for p in "qk"]


@pytest.mark.parametrize("width", [20, 24, 30, 40, 60])
def test_a_shortened_name_can_be_pasted_as_a_pattern(width):
    for name, short in zip(NAMES, shorten_all(NAMES, width), strict=True):
        assert Patterns(exclude=(short,)).why_not(name)
        assert Patterns(exclude=(shorten(name, width),)).why_not(name)
    assert not Patterns(exclude=("…/q_proj",)).why_not("/model/v_proj/MatMul")


@pytest.mark.parametrize(
    ("x", "node", "weight", "macs"),
    [
        ("float[N,S,64]", "MatMul(x, W)", (64, 32), 64 * 32),
        ("float[N,3,H,V]", "Conv<pads=[1,1,1,1]>(x, W)", (16, 3, 3, 3), 16 * 27),
        ("float[N,3,H,V]", "Conv(x, W)", (16, 3, 3, 3), None),  # the kernel is larger than one pixel
        ("float[N,5,64]", "MatMul(x, W)", (64, 32), 5 * 64 * 32),
    ],
)
def test_macs_take_1_for_open_sizes_and_say_so(x, node, weight, macs, run, tmp_path):
    save(build(f"({x} x) => (float[] y)", f"y = {node}", kind="float", W=weight), tmp_path / "m.onnx")
    _, out, _ = run("inspect", tmp_path / "m.onnx", "--json")
    found = json.loads(out)["inspection"]
    assert (found["macs"], found["linears"][0]["macs"]) == (macs, macs)
    _, out, _ = run("inspect", tmp_path / "m.onnx")
    (line,) = [line for line in out.splitlines() if "MACs per sample" in line]
    assert ("with 1 for open sizes" in line) == (macs is not None and "5" not in x)
