"""Every record is what the published schema says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from channelfold.runtime import jobs
from channelfold.runtime.report import terminal
from channelfold.tests.shipped import CALIBRATION, DIGITS, EVALUATION, needs_rtx

SCHEMA = json.loads((Path(terminal.__file__).parent / "assets/report.schema.json").read_text())
TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "null": type(None)}


def faults(value: Any, schema: dict[str, Any], place: str = "record") -> Iterator[str]:
    """Where a value is not what a schema says, for the keywords that the schema of the report uses."""
    known = {"type", "required", "properties", "items", "additionalProperties", "enum", "const", "anyOf", "$ref",
             "$schema", "$defs", "title", "description"}  # fmt: skip
    assert schema.keys() <= known, schema.keys() - known
    if reference := schema.get("$ref"):
        target = SCHEMA
        for part in reference.split("/")[1:]:
            target = target[part]
        yield from faults(value, target, place)
    choices = schema.get("anyOf", [])
    if choices and all(list(faults(value, choice)) for choice in choices):
        yield f"{place}: {value!r} is none of {choices}"
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is(value, kind) for kind in kinds):
        yield f"{place}: {value!r} is no {' or '.join(kinds)}"
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        yield f"{place}: {value!r}"
    if isinstance(value, dict):
        yield from (f"{place}: {name} is missing" for name in schema.get("required", ()) if name not in value)
        for name, item in value.items():
            inner = schema.get("properties", {}).get(name, schema.get("additionalProperties", {}))
            yield from faults(item, inner, f"{place}.{name}")
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from faults(item, schema.get("items", {}), f"{place}[{index}]")


def _is(value: Any, kind: str) -> bool:
    if kind == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    return folder, jobs.compress(DIGITS, folder, source=jobs.Source(CALIBRATION, EVALUATION), gates=jobs.Gates(10))


def test_a_compression(quantized):
    folder, _ = quantized
    record = json.loads((folder / "report.json").read_text())
    assert list(faults(record, SCHEMA)) == []
    assert record["environment"]["onnxruntime"]
    (gate,) = record["gates"]
    assert (gate["met"], gate["value"]) == (True, record["accuracy"]["outputs"][0]["snr"])
    assert set(record) <= set(SCHEMA["properties"])
    assert "onnxruntime" in (folder / "report.html").read_text()


def test_the_other_commands(quantized):
    file = quantized[0] / "model.onnx"
    data = jobs.Source(evaluation=EVALUATION)
    records = [
        jobs.diff(DIGITS, file, source=data, explain=True),
        jobs.lint(file),
        jobs.bench([DIGITS, file], rounds=1),
        jobs.prune(DIGITS, file.with_name("cut.onnx"), options={"ratio": 0.5}),
    ]
    records.append(jobs.report(quantized[0], quantized[0]))
    for record in records:
        assert list(faults(terminal.plain(record), SCHEMA)) == []


@needs_rtx
def test_engines_side_by_side(quantized, run, tmp_path):
    record = dict(quantized[1])
    shapes = ["image:1x1x8x8:4x1x8x8:8x1x8x8"]
    engines = [
        jobs.build(quantized[0] / "model.onnx", tmp_path / f"{sm}.engine", sm=sm, shapes=shapes)["engines"][0]
        for sm in (86, 89)
    ]
    record["engines"] = engines
    assert list(faults(terminal.plain(record), SCHEMA)) == []
    nodes = [{row["node"]: row["runs_as"] for row in engine["plan"]["nodes"]} for engine in engines]
    assert nodes[0].keys() == nodes[1].keys()
    page = terminal.to_html(record)
    assert "Nodes run as" in page
    assert all(f">{name}</a>" in page for name in nodes[1])


def test_a_wrong_record_is_found():
    wrong = {"schema": 2, "tool": "t", "warnings": [1], "accuracy": {"verdict": {"level": "fine", "reasons": []}}}
    places = {fault.split(":")[0] for fault in faults(wrong, SCHEMA)}
    assert places == {"record.schema", "record.warnings[0]", "record.accuracy", "record.accuracy.verdict.level"}
