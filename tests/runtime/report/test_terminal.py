"""The report: a golden of the terminal view, what must hold at any width, and JSON that every reader accepts."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from channelfold.runtime.errors import OutputError
from channelfold.runtime.report.names import shorten
from channelfold.runtime.report.terminal import plain, render, to_json, write_json
from channelfold.runtime.stats.compare import Comparison, OutputComparison

LONG = "/model/layers.11/self_attn/q_proj/projection/in_proj/with_a_long_tail/MatMul"
NARROW = "8 bits leave its activation a signal-to-noise ratio"


def step(name: str, kind: str, changed: int, seconds: float, **rest: Any) -> dict[str, Any]:
    changes = [{"node": f"/node_{i}", "what": "folded"} for i in range(changed)]
    return {"pass": name, "kind": kind, "options": {}, "seconds": seconds, "changed": changes, "refused": [], **rest}


def refusal(node: str, reason: str, code: str) -> dict[str, str]:
    return {"node": node, "reason": reason, "code": code}


def record() -> dict[str, Any]:
    logits = OutputComparison(
        "logits", 128, 128000, snr=31.42, cosine=0.99964, relative_l2=0.0268, max_error=0.41, mean_error=0.02,
        max_reference=7.3, agreement=0.984, worst_sample=17, worst_snr=22.13,
    )  # fmt: skip
    masked = OutputComparison(
        "masked_scores", 128, 512, snr=float("inf"), cosine=1.0, relative_l2=0.0, max_error=0.0, mean_error=0.0,
        max_reference=1.0, reference_inf=64, candidate_inf=64,
    )  # fmt: skip
    ids = OutputComparison("class_ids", 128, 128, equal=0.9375)
    accuracy = Comparison((logits, masked, ids), 128, "128 samples from evaluation", extra=("debug",))
    return {
        "schema": 1,
        "tool": "channelfold 0.1.0",
        "command": "compress resnet50.onnx -o resnet50.int8.onnx --calibration calib.npz --build 89",
        "model": {
            "path": "models/resnet50.onnx", "bytes": 102_442_450, "nodes": 176, "opset": 13,
            "ops": {"Conv": 53, "BatchNormalization": 53, "Relu": 49, "Add": 16, "Gemm": 1},
        },
        "output": {
            "path": "out/resnet50.int8.onnx", "bytes": 25_883_112, "nodes": 283, "opset": 17,
            "ops": {"Conv": 53, "Relu": 49, "Add": 16, "Gemm": 1, "QuantizeLinear": 54, "DequantizeLinear": 107},
        },
        "data": {"calibration": "512 samples from calib.npz", "evaluation": "128 samples from evaluation"},
        "steps": [
            step("remove-identities", "exact", 1, 0.02, verified={"max_rel_error": 0.0, "probes": 1}),
            step(
                "fold-affine", "exact", 53, 0.41, verified={"max_rel_error": 2.1e-7, "probes": 4},
                refused=[refusal("/relu/Bn[0]", "Bn: its input feeds 2 nodes", "its input feeds 2 nodes")],
            ),
            step("smooth", "exact", 0, 1.2, verified={"unverified": "no calibration data"}),
            step(
                "quantize", "calibrated", 52, 31.7, verified=None,
                refused=[
                    refusal("/conv1/Conv", "Conv stays float: fewer than 16 channels", "fewer than 16 channels"),
                    *(refusal(f"/{i}/MatMul", f"{NARROW} of 1{i}.0 dB", NARROW) for i in range(3)),
                    refusal(LONG, f"{NARROW} of 9.0 dB", NARROW),
                ],
                facts={"linears": 57, "quantized": 52, "by_op": {
                    "Conv": {"quantized": 52, "total": 53}, "MatMul": {"quantized": 0, "total": 4}}},
            ),
        ],
        "accuracy": accuracy.to_json(),
        "engines": [
            {
                "sm": 89, "path": "out/resnet50.sm89.engine", "bytes": 26_100_000, "seconds": 41.2,
                "backend": "tensorrt_rtx 1.7.1",
                "plan": {"readable": True, "reason": "", "int8": 51, "total": 52,
                         "not_int8": [{"node": "/layer1/downsample/Conv", "runs_as": "float16"}]},
            },
            {
                "sm": None, "path": "out/resnet50.engine", "bytes": 940, "seconds": 3.6,
                "backend": "tensorrt_rtx 1.7.1",
                "plan": {"readable": False, "reason": "the plan's format is not known", "int8": 0, "total": 0,
                         "not_int8": []},
            },
        ],
        "latency": [
            {"name": "original", "ms": 38.21}, {"name": "compressed", "ms": 14.02}, {"name": "again", "ms": 40.0},
        ],
        "warnings": ["2 of 514 samples did not fill a batch of 4 and were dropped"],
    }  # fmt: skip


def printed(record: dict[str, Any], width: int | None = None, **options: Any) -> str:
    """What a terminal of that width shows, or with None a pipe; without the spaces at the ends of lines."""
    file = io.StringIO()
    render(
        record, Console(file=file, width=width, force_terminal=width is not None, **{"color_system": None} | options)
    )
    return "".join(f"{line.rstrip()}\n" for line in file.getvalue().splitlines())


GOLDEN = """\
channelfold 0.1.0  compress resnet50.onnx -o resnet50.int8.onnx --calibration calib.npz --build 89

Model                 before         after
  file                resnet50.onnx  resnet50.int8.onnx
  size                102.4 MB       25.9 MB             3.96x smaller
  nodes               176            283                 +107
  opset               13             17                  +4
  BatchNormalization  53             0                   -53
  QuantizeLinear      0              54                  +54
  DequantizeLinear    0              107                 +107
  4 other operator types are unchanged in number

Data
  calibration  512 samples from calib.npz
  evaluation   128 samples from evaluation

Steps                kind        changed  refused  seconds  verified rel. error
  remove-identities  exact             1        0      0.0  0, 1 probe
  fold-affine        exact            53        1      0.4  2.1e-07, 4 probes
  smooth             exact             0        0      1.2  no: no calibration data
  quantize           calibrated       52        5     31.7  –

Left as it was by fold-affine
  1 x its input feeds 2 nodes
    /relu/Bn[0]

Quantized
  Conv              52 of 53  1 left in float
  MatMul              0 of 4  4 left in float
  all linear nodes  52 of 57  5 left in float

Left as it was by quantize
  4 x 8 bits leave its activation a signal-to-noise ratio
    /0/MatMul  8 bits leave its activation a signal-to-noise ratio of 10.0 dB
    /1/MatMul  8 bits leave its activation a signal-to-noise ratio of 11.0 dB
    /2/MatMul  8 bits leave its activation a signal-to-noise ratio of 12.0 dB
    … and 1 more
  1 x fewer than 16 channels
    /conv1/Conv

Accuracy  DEGRADED  128 samples from evaluation
                 SNR dB   cosine  rel. L2  max err   agree  worst sample
  logits          31.42  0.99964  2.7e-02  4.1e-01  98.40%   #17 22.1 dB
  masked_scores     inf  1.00000        0        0       –             –
  class_ids           –        –        –        –  93.75%             –
  agree: the same argmax, or equal elements where an output is not floating
  masked_scores: 0 NaN and 64 Inf in the original
  only the new model has: debug
  degraded: class_ids: 93.8% equal

Engines                 for        size  build  runs as int8
  resnet50.sm89.engine  SM 89   26.1 MB   41 s  51 of 52 nodes
  resnet50.engine       any SM    940 B    4 s  not readable
  built with tensorrt_rtx 1.7.1
  quantized, but not run as int8 on SM 89:
    /layer1/downsample/Conv  runs as float16
  any SM: the plan's format is not known

Latency           ms
  original    38.210
  compressed  14.020  2.73x faster
  again       40.000  1.05x slower

Warnings
  ! 2 of 514 samples did not fill a batch of 4 and were dropped
"""


def test_golden():
    assert printed(record(), 100) == GOLDEN


def test_nothing_is_shortened_or_wrapped_in_a_pipe():
    example = record()
    example["steps"][3]["refused"] = [refusal(LONG, f"{NARROW} of 9.0 dB", NARROW)]
    example["warnings"] = ["word " * 100]
    text = printed(example)
    assert f"    {LONG}  {NARROW} of 9.0 dB\n" in text
    assert "  ! " + ("word " * 100).rstrip() + "\n" in text
    assert "…" not in text


@pytest.mark.parametrize("width", [40, 80, 120])
def test_lines_fit_the_terminal(width: int):
    assert max(map(len, printed(record(), width).splitlines())) <= width


@pytest.mark.parametrize("width", [80, 120])
def test_names_are_shortened_on_one_line(width: int):
    example = record()
    example["steps"][3]["refused"] = [refusal(LONG, f"{NARROW} of 9.0 dB", NARROW)]
    example["engines"][0]["plan"]["not_int8"] = [{"node": LONG, "runs_as": "float32"}]
    text = printed(example, width)
    assert text.count(shorten(LONG, width // 2)) == 2


def test_no_color(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NO_COLOR", "1")
    colors = ("\x1b[31m", "\x1b[32m", "\x1b[33m", "\x1b[1;31m", "41m")
    assert not any(color in printed(record(), 80, color_system="standard") for color in colors)
    monkeypatch.delenv("NO_COLOR")
    assert "\x1b[32m" in printed(record(), 80, color_system="standard", no_color=False)


@pytest.mark.parametrize("key", [key for key in record() if key not in ("schema", "tool")])
def test_any_part_may_be_absent(key: str):
    whole = record()
    part = {name: whole[name] for name in ("schema", "tool", key)}
    del whole[key]
    for some in (whole, part, part | {"accuracy": None, "output": None, "warnings": []}):
        assert printed(some, 80).startswith("channelfold 0.1.0")


def test_model_alone_lists_all_operators():
    text = printed({"schema": 1, "tool": "channelfold 0.1.0", "model": record()["model"]}, 80)
    assert "  Conv                53\n" in text
    assert "smaller" not in text


def test_a_collapse_cannot_be_overlooked():
    y = OutputComparison(
        "y", 2, 2, snr=-3.0, cosine=0.1, relative_l2=1.4, max_error=2.0, worst_sample=0, worst_snr=-4.0
    )
    text = printed(
        {"schema": 1, "tool": "t", "accuracy": Comparison((y,), 2, "2 samples", missing=("z",)).to_json()}, 80
    )
    assert text.startswith("t\n\nAccuracy  COLLAPSED  2 samples\n")
    assert "  collapsed: z: the output is missing\n  collapsed: y: SNR -3.0 dB\n" in text
    warned = record() | {"warnings": ["THE OUTPUTS HAVE COLLAPSED: y", "a cast"]}
    colored = printed(warned, 80, color_system="standard", no_color=False)
    assert "\x1b[1;31mTHE OUTPUTS HAVE COLLAPSED: y\x1b[0m" in colored
    assert "\x1b[33ma cast" in colored


def test_names_are_text_and_not_markup_or_control_sequences():
    example = record()
    example["steps"][1]["refused"] = [refusal("[bold]/a[/bold]\x1b[2J\n", "because\x07", "")]
    text = printed(example, 100)
    assert "    [bold]/a[/bold]?[2J?\n" in text
    assert "  1 x because?\n" in text


def test_a_larger_model():
    example = record()
    example["output"]["bytes"] = 2 * example["model"]["bytes"]
    assert "2.00x larger" in printed(example, 100)


class TestJson:
    def test_is_valid_whatever_is_in_it(self, tmp_path: Path):
        path = tmp_path / "report.json"
        write_json(
            {
                "float": np.float32(0.5), "int": np.int64(3), "bool": np.bool_(True), "array": np.array([1.0, np.nan]),
                "inf": float("inf"), "low": -np.inf, "nan": float("nan"), "path": Path("a/b"), "tuple": (1, "ü"),
                5: None,
            },
            path,
        )  # fmt: skip
        assert json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail) == {
            "float": 0.5, "int": 3, "bool": True, "array": [1.0, None], "inf": "inf", "low": "-inf", "nan": None,
            "path": str(Path("a/b")), "tuple": [1, "ü"], "5": None,
        }  # fmt: skip
        assert [file.name for file in tmp_path.iterdir()] == ["report.json"]

    def test_round_trip_renders_the_same(self, tmp_path: Path):
        write_json(record(), tmp_path / "report.json")
        assert printed(json.loads((tmp_path / "report.json").read_text(encoding="utf-8")), 100) == GOLDEN

    def test_a_failure_leaves_the_old_file(self, tmp_path: Path):
        path = tmp_path / "report.json"
        path.write_text("old")
        with pytest.raises(TypeError):
            write_json({"x": object()}, path)
        assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("report.json", "old")]

    def test_text_is_what_the_file_holds(self, tmp_path: Path):
        write_json(record(), tmp_path / "report.json")
        assert (tmp_path / "report.json").read_text(encoding="utf-8") == to_json(record()) + "\n"

    def test_errors(self, tmp_path: Path):
        with pytest.raises(
            OutputError, match=r"Cannot write .*r\.json \(No such file or directory\)\. Create the folder"
        ):
            write_json({}, tmp_path / "nowhere" / "r.json")
        (tmp_path / "folder").mkdir()
        with pytest.raises(OutputError, match=r"Cannot write .*folder: it is a folder"):
            write_json({}, tmp_path / "folder")
        assert [file.name for file in tmp_path.iterdir()] == ["folder"]

    def test_plain_keeps_what_is_plain(self):
        assert plain(record()) == record()


def test_an_engine_that_was_run_shows_its_accuracy():
    example = record()
    example["engines"][0]["accuracy"] = example["accuracy"]
    shown = printed(example, 100)
    assert f"Accuracy of {Path(example['engines'][0]['path']).name} on the GPU" in shown


def site(node: str, outliers: float, snr: float | None = None, **rest: Any) -> dict[str, Any]:
    searched = None if snr is None else [snr - 6, snr]
    return {"node": node, "tensor": "t", "readers": [node], "method": "repq, mean",
            "outlier_ratio": [540.2, outliers], "output_snr_db": searched, "inserted": 0, **rest}  # fmt: skip


def shown(*sites: dict[str, Any], name: str = "smooth", width: int | None = 80) -> list[str]:
    changed = step(name, "exact", len(sites), 0.1, verified=None, facts={"sites": list(sites)})
    text = printed({"schema": 1, "tool": "t", "steps": [changed]}, width)
    start = text.find("\nBy ") + 1
    return text[start:].splitlines() if start else []


class TestSites:
    def test_the_worst_comes_first(self):
        assert shown(site("/a", 2.0, 30.0), site("/b", 9.0, 40.0), site("/d", 1.0, 20.5)) == [
            "By smooth  method        outliers        SNR dB",
            "  /d       repq, mean  540 -> 1.0  14.5 -> 20.5",
            "  /a       repq, mean  540 -> 2.0  24.0 -> 30.0",
            "  /b       repq, mean  540 -> 9.0  34.0 -> 40.0",
            "  outliers: largest channel against the median; SNR: of int8 outputs",
        ]

    def test_without_a_search_it_is_the_largest_outlier(self):
        lines = shown(site("/a", 2.0), site("/b", 9.0), site("/c", float("inf")))
        assert [line.split()[0] for line in lines[:-1]] == ["By", "/c", "/b", "/a"]
        assert lines[1].endswith("540 -> inf")
        assert "SNR" not in lines[0]

    def test_nodes_that_were_inserted_are_told(self):
        lines = shown(site("/a", 3.0, inserted=2), site("/b", 2.0))
        assert [line.split()[-1] for line in lines[:3]] == ["nodes", "+2", "2.0"]
        assert lines[4] == "  2 nodes were inserted"
        assert shown(site("/a", 3.0, inserted=1))[-1] == "  1 node was inserted"

    def test_the_rest_is_in_the_json(self):
        lines = shown(*(site(f"/{i}", float(i)) for i in range(15)))
        assert lines[1].startswith("  /14")
        assert (len(lines), lines[13]) == (15, "  … and 3 more, with --json")

    def test_other_passes_have_other_columns(self):
        split = {"node": "/a", "tensor": "x", "width": [64, 80], "output_snr_db": [20.0, 24.0], "inserted": 0}
        assert shown(split, name="split-channels") == [
            "By split-channels  channels        SNR dB",
            "  /a               64 -> 80  20.0 -> 24.0",
            "  SNR: of int8 outputs",
        ]
        merge = {"node": "/a", "tensor": "x", "width": [80, 64], "relative_change": 0.0012, "mean": False}
        assert shown(merge, name="merge-channels")[1].split() == ["/a", "80", "->", "64", "1.2e-03"]
        order = {"node": "/a", "kind": "keys", "heads": [12, 64], "norms": [], "bfp_error": [0.0042, 0.001]}
        assert shown(order, name="reorder-channels")[1].split() == ["/a", "4.20e-03", "->", "1.00e-03"]
        assert not shown(name="smooth")

    @pytest.mark.parametrize("width", [60, 80, 120, 180])
    def test_lines_fit_the_terminal(self, width: int):
        lines = shown(site(LONG, 2.0, 30.0, method="os-plus, limit 0.261, shifted", inserted=1), width=width)
        assert max(map(len, lines)) <= width
        assert (LONG in lines[1]) == (width >= 120)
        assert ("os-plus, limit 0.261, shifted" in lines[1]) == (width == 180)  # the name is worth more
        assert "os-plus " in lines[1] or width == 180


def test_a_size_that_is_the_same_has_no_remark():
    example = record()
    example["output"]["bytes"] = example["model"]["bytes"] + 100
    text = printed(example, 100)
    assert "smaller" not in text
    assert "larger" not in text
