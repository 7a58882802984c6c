"""The demo on every network that ships: each stage is what the last one promised."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from channelfold.models import MODELS
from channelfold.runtime import jobs
from channelfold.runtime.errors import UsageError
from channelfold.runtime.report.terminal import render

FOLDED = {"digits_repavit": 131, "digits_repavit_ln": 139}  # nodes
Of = Callable[[str], jobs.Record]

each_model = pytest.mark.parametrize("name", MODELS)
each_repavit = pytest.mark.parametrize("name", FOLDED)
each_transformer = pytest.mark.parametrize("name", ["digits_vit", *FOLDED])


@pytest.fixture(scope="module")
def record_of(tmp_path_factory) -> Of:
    """The record of a network's demo, which runs once."""
    return functools.cache(lambda name: jobs.demo(tmp_path_factory.mktemp("demo"), model=name, sms=()))


def stages(record: jobs.Record) -> dict[str, dict]:
    return {stage["name"]: stage for stage in record["demo"]["stages"]}


@each_model
def test_a_network_with_idle_channels_is_shown_folded_as_well(name: str, record_of: Of):
    record, folded = record_of(name), ["folded"] if name in FOLDED else []
    assert list(stages(record)) == ["float", *folded, "int8"]
    assert [entry["name"].split(",")[0] for entry in record["latency"]] == ["float", *folded, "int8"]


@each_model
def test_float_is_the_model_of_the_card(name: str, record_of: Of):
    found = stages(record_of(name))["float"]
    assert (found["accuracy"], found["agreement"], found["snr"]) == (MODELS[name].accuracy, 1.0, None)


@each_repavit
def test_folding_changes_no_class(name: str, record_of: Of):
    before, folded = stages(record_of(name))["float"], stages(record_of(name))["folded"]
    assert (folded["accuracy"], folded["agreement"]) == (before["accuracy"], 1.0)
    assert folded["snr"] > 110  # dB: float32 rounds at 150
    assert folded["nodes"] == FOLDED[name]
    # 4 FFNs on 17 tokens: two matrices of 48 x 192 become three of 48 x 48
    assert before["macs"] - folded["macs"] == 4 * 17 * (2 * 48 * 192 - 3 * 48 * 48)


@each_model
def test_int8_keeps_the_accuracy(name: str, record_of: Of):
    """Within 5 of 500 samples and at 28 dB: measured are 0 or 1 sample, and 32 to 41 dB."""
    before, after = stages(record_of(name))["float"], stages(record_of(name))["int8"]
    assert after["accuracy"] >= before["accuracy"] - 0.01
    assert after["agreement"] >= 0.99
    assert after["snr"] > 28
    assert after["snr"] == pytest.approx(record_of(name)["accuracy"]["outputs"][0]["snr"], abs=0.01)


@each_transformer
def test_every_matrix_of_a_transformer_is_int8(name: str, record_of: Of):
    """q/k/v, the projection and the FFN of 4 blocks; not 8 products in attention, nor 2 linears of few channels."""
    (facts,) = (step["facts"] for step in record_of(name)["steps"] if step["pass"] == "quantize")
    in_ffn = 3 if name in FOLDED else 2
    assert (facts["quantized"], facts["linears"] - facts["quantized"]) == (4 * (2 + in_ffn), 8 + 2)


@each_model
def test_what_is_printed(name: str, record_of: Of):
    printed = io.StringIO()
    render(record_of(name), Console(file=printed, width=200))
    lines = printed.getvalue().splitlines()
    assert lines[0] == f"{name}: {MODELS[name].description}"
    assert lines[2].split() == list(stages(record_of(name)))
    (accuracy,) = (line.split() for line in lines if line.startswith("top-1 accuracy"))
    assert accuracy[2] == f"{MODELS[name].accuracy:.1%}"
    assert any(line.startswith("MACs") for line in lines) == (name in FOLDED)


@each_model
def test_the_report_is_written(name: str, record_of: Of):
    written = Path(record_of(name)["demo"]["folder"]) / "report.json"
    assert json.loads(written.read_text(encoding="utf-8"))["demo"] == record_of(name)["demo"]


def test_a_misspelt_name_gets_its_nearest_match():
    message = r"No model 'digits_repvit' ships with channelfold\. Did you mean 'digits_repavit'\?"
    with pytest.raises(UsageError, match=message):
        jobs.demo(model="digits_repvit")
