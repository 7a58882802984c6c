"""What a report says to do next."""

from __future__ import annotations

import json

import pytest

from channelfold.runtime import jobs
from channelfold.runtime.jobs import GateMissed, Gates
from channelfold.runtime.report.advice import lighter, next_steps, slower
from channelfold.tests.shipped import CALIBRATION, DIGITS, EVALUATION


def record(*steps, data="32 samples from c.npz", **more):
    made = [{"pass": name, "changed": [{}], "options": options} for name, options in steps]
    return {"steps": made, "data": {"calibration": data}, "command": "compress", "model": {"path": "a b.onnx"},
            "output": {"path": "out/m.onnx"}} | more  # fmt: skip


def test_the_advice_follows_what_was_done():
    explain, smooth, share, more = next_steps(record(("fold", {}), ("quantize", {"float_share": 0.0})))
    assert explain.endswith("channelfold diff 'a b.onnx' out/m.onnx --data DATA --explain")
    assert "int8-smooth" in smooth
    assert "--float-share" in share
    assert more == "Calibrate on more than 32 samples"
    again = next_steps(record(("smooth", {}), ("quantize", {"float_share": 0.1}), data="512 samples"))
    assert [step[:8] for step in again] == ["See whic"]


@pytest.mark.parametrize(
    ("step", "word"),
    [
        (("quantize-weights", {"weights": "int4", "group": 128, "rounder": "search"}), "--rounder gptq"),
        (("quantize-weights", {"weights": "int4", "group": 128, "rounder": "gptq"}), "--group 32"),
        (("prune", {}), "--keep-macs"),
        (("approximate-ffn", {}), "--keep-hidden"),
    ],
)
def test_each_pass_has_its_own(step, word):
    assert any(word in sentence for sentence in next_steps(record(step)))


def test_saturation_and_random_data_come_first():
    outputs = ([{"snr": 5.0}], [{"snr": 30.0}])
    accuracy = {"outputs": outputs[0], "exact": {"outputs": outputs[1]}}
    first, second, *_ = next_steps(record(("quantize", {}), data="8 random samples", accuracy=accuracy))
    assert "--calibration" in first
    assert "--reduce-range on" in second


def cost(kernels, least, most):
    return {"kernels": kernels, "modelled": [{"card": "L4", "least": least, "most": most}]}


def test_an_engine_that_may_be_slower_than_that_of_the_given_model():
    engine = {"path": "out/model.sm89.engine", "sm": 89, "cost": cost(21, 2.0, 50.0), "float": cost(14, 3.0, 40.0)}
    sentence = "model.sm89.engine launches 21 kernels, where one of the given model launches 14: modelled, it is "
    assert slower(engine) == sentence + "0.80 to 1.50 (L4) times as fast, so it may be slower"
    assert not slower(engine | {"float": cost(14, 3.0, 60.0)})  # faster by both bounds
    assert not slower(engine | {"float": cost(21, 3.0, 40.0)})
    assert not slower(engine | {"float": {}})
    half, search = lighter(record(("quantize", {})) | {"engines": [engine]})
    assert "--recipe fp16" in half
    assert search.endswith("--max-latency 0.9 --sm 89")
    assert list(lighter(record(("quantize", {}), ("cast", {})) | {"engines": [engine]})) == [search]


def test_a_missed_gate_says_what_to_do(run, tmp_path):
    source = jobs.Source(CALIBRATION, EVALUATION)
    with pytest.raises(GateMissed) as missed:
        jobs.compress(DIGITS, tmp_path, source=source, gates=Gates(min_snr=60))
    assert missed.value.record["next"][0].startswith("See which nodes lose most")
    line = ("compress", DIGITS, "-o", tmp_path, "--calibration", CALIBRATION, "--min-snr", "60")
    code, shown, _ = run(*line)
    assert code == 3
    assert "What to do next" in shown
    assert json.loads((tmp_path / "report.json").read_text())["next"] == missed.value.record["next"]


@pytest.mark.parametrize(
    ("options", "times", "said"),
    [
        ({"target": "onnxruntime", "profile": False}, (2.0, 3.0), True),
        ({"target": "onnxruntime", "profile": False}, (3.0, 2.0), False),
        ({"target": "onnxruntime", "profile": True}, (2.0, 3.0), False),
        ({"target": "tensorrt", "profile": False}, (), False),
    ],
)
def test_a_file_slower_than_float_may_be_profiled(options, times, said):
    latency = {"latency": [{"ms": ms} for ms in times]} if times else {}
    steps = next_steps(record(("quantize", options), **latency))
    assert any("--profile" in step for step in steps) == said
