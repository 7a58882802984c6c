"""The report record, schema 1.1, and its view in the terminal.

The record is a plain dict that JSON can hold. All keys except ``schema`` and ``tool`` may be absent or empty; such keys
are not shown. Sizes are bytes, times seconds (latencies milliseconds)::

    schema      1
    tool        "channelfold 0.1.0"
    command     the command, of compress with its arguments; of others line: the command line
    model       {path, bytes, nodes, ops: {op: count}, opset}     of the input; parameters and macs where they change
    output      the same of the result
    data        {calibration, evaluation}                         Data.description of each
    steps       [{pass, kind, options: {}, seconds,
                  changed: [{node, what}], refused: [{node, reason, code}],
                  verified: {max_rel_error, probes} | {unverified: reason} | null,
                  facts: {}}]        facts of a pass that quantizes: {linears: all, quantized: count,
                                     by_op: {op: {quantized, total}}, and ranges: [{node, op, tensor it reads,
                                     clipped: share of its values, weight: its largest value, weight_outliers}]};
                                     of one that changes channels
                                     {sites: [{node, tensor, readers, method, inserted: nodes; pairs of before and
                                     after: width, macs, outlier_ratio, output_snr_db, bfp_error; relative_change,
                                     sparsity, energy_kept}]}, each key where it applies to the pass; of
                                     approximate-ffn {ffns: [{node, branch, error; pairs of before and after: hidden,
                                     macs}]}
    weights     {share: of the bytes that is quantized, bytes,
                 rows: [{place, op, state, reason, bytes, tensors, largest}]}     of the result; bytes as in the type
                                       that the model computes in
    accuracy    Comparison.to_json()   in exact arithmetic; of a file for ONNX Runtime as this machine runs it, and
                                       under ``exact`` in exact arithmetic
    gates       [{gate, output, value, found, wanted: both in words, met}]
    explanation {samples, aligned: tensors, linears: products, covered: of them; snr of the outputs; sites: [{node, op,
                 tensor, original, nodes, products, share of the sum; snr of the outputs alone, own_snr, so_far_snr at
                 its end}]; restored: [{sites: the first n, snr}], depth: [{node, snr}],
                 advice: {sites, nodes, gain in dB, command} or null}
    engines     [{sm (null: any), path, bytes, seconds, backend, accuracy (null without its GPU; as above),
                  verdicts: {how linear nodes run: count}, dequantized_first: [node],
                  plan: {readable, reason, int8, total, not_int8: [{node, runs_as, because: rules broken, likely}],
                         nodes: [{node, runs_as, kernel, operands: types}]},
                  cost, kernels, float: see jobs/engines.py}]
    latency     [{name, ms}]         the others are compared with the first
    bench       {threads: null for all, rows: [{model, batch, ms, low, high: the middle half, runs, memory (null for
                 engines), bytes, parameters, macs, weights: {type: bytes}}], unmeasured: why engines were not timed,
                 nodes: {model: [{name, op, ms}]}}
    lint        {target, sm, errors, warnings, notes: counts of findings, findings: [{rule, level, node, detail,
                 checks, consequence, fix, repairable}]}; of a repair also before: the counts,
                 fixed: [{rule, fix, nodes}]
    search      the front of a search; sensitivity: the errors of all nodes      see jobs/search.py
    next        [str]                what to do where the verdict is not ok or a gate was missed
    warnings    [str]
    environment {system, python, onnxruntime …: versions}
    runs        [record, record]     of a comparison of two runs

A number that JSON cannot hold is the string "inf" or "-inf", or null for NaN.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from channelfold.runtime.io.files import writing
from channelfold.runtime.report import (
    accuracy,
    advice,
    benching,
    costs,
    demo,
    explanation,
    inspection,
    linting,
    runs,
    search,
    steps,
    summary,
    web,
)
from channelfold.runtime.report.tables import UNKNOWN, Page, number, size, times
from channelfold.runtime.stats.compare import json_number

_EXCEPTIONS = 12
_LEAST = 0.002  # share of all weight bytes below which a row is not shown in a terminal


def write_json(record: Mapping[str, Any], path: str | Path) -> None:
    """Writes the record as JSON, whole or not at all. Numpy scalars and arrays, paths and tuples are accepted.

    Raises OutputError when the file cannot be written.
    """
    _write(to_json(record) + "\n", path)


def write_html(record: Mapping[str, Any], path: str | Path) -> None:
    """Writes the record as a web page, see ``web``, whole or not at all. Raises OutputError."""
    _write(to_html(record), path)


def write_both(record: Mapping[str, Any], folder: Path) -> None:
    """Writes report.json and report.html into a folder. Raises OutputError."""
    write_json(record, folder / "report.json")
    write_html(record, folder / "report.html")


def _write(text: str, path: str | Path) -> None:
    with writing(path) as file:
        file.writelines([text.encode()])


def to_json(record: Mapping[str, Any]) -> str:
    """The record as JSON text."""
    return json.dumps(plain(record), indent=2, ensure_ascii=False, allow_nan=False)


def to_html(record: Mapping[str, Any]) -> str:
    """The record as a web page that needs no other file."""
    record, body = plain(record), web.Web()
    summary.show(record, body)
    for key, (title, show) in _PAGE.items():
        if record.get(key):
            body.section(key, title)
            show(record, body)
    body.section("command", "How to reproduce it")
    body.say(f"channelfold {record.get('line') or record.get('command', '')}", wrap=False)
    body.table("Versions", ("<version",), [("tool", record["tool"]), *record.get("environment", {}).items()])
    return web.page(*summary.title(record), body)


def plain(value: Any) -> Any:
    """``value`` in the types JSON has; infinities and NaN as in ``compare.json_number``."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else json_number(value)


def render(record: Mapping[str, Any], console: Console) -> None:
    """Prints the record as tables, see ``tables.Page``."""
    record, page = plain(record), Page(console)
    if "demo" in record:
        demo.show(record, page)
        return
    page.say((record["tool"], "bold"), "  ", record.get("command", ""), indent=0)
    for key, show in _SECTIONS.items():
        if record.get(key):
            page.blank()
            show(record, page)


def _model(record: Mapping[str, Any], page: Page) -> None:
    before, after = record["model"], record.get("output") or {}
    sides = [side for side in (before, after) if side]
    rows = [
        ("file", *(page.name(Path(side["path"]).name, taken=40) for side in sides)),
        ("size", *(size(side["bytes"]) for side in sides), _smaller(before, after)),
        *((key, *_change(before.get(key), after.get(key))) for key in ("nodes", "opset")),
    ]
    for key, label in (("parameters", "parameters"), ("macs", "MACs per sample")):
        if before.get(key) and after.get(key):
            share = f"{after[key] / before[key]:.1%}"
            rows.append((label, f"{before[key]:,}", f"{after[key]:,}", share if share != "100.0%" else ""))
    ops, new_ops = before.get("ops", {}), after.get("ops", before.get("ops", {}))
    changed = [op for op in {**ops, **new_ops} if ops.get(op, 0) != new_ops.get(op, 0)]
    for op in changed if after else ops:
        rows.append((op, *_change(ops.get(op, 0), new_ops.get(op, 0) if after else None)))
    page.table("Model", ("<before", "<after", "<") if after else ("<",), rows)
    if after and (same := len(ops) - sum(op in ops for op in changed)):
        page.note(f"{same} other operator types are unchanged in number")


def _smaller(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    told = times(before["bytes"], after["bytes"], "smaller", "larger") if after.get("bytes") else ""
    return "" if told.startswith("1.00x") else told


def _change(before: Any, after: Any) -> tuple[str, str, str]:
    if before is None or after is None:
        return str(before if before is not None else ""), "", ""
    return str(before), str(after), f"{after - before:+d}" if after != before else ""


def _data(record: Mapping[str, Any], page: Page) -> None:
    page.table("Data", ("<",), [(key, description or "none") for key, description in record["data"].items()])


def _weights(record: Mapping[str, Any], page: Page) -> None:
    found = record["weights"]
    rows = [
        (row["largest"], row["op"], row["place"], row["state"], size(row["bytes"]), row["reason"])
        for row in found["rows"]
        if page.whole or row["bytes"] > _LEAST * found["bytes"]
    ]
    page.fill("Weights", ("<read by", "<in", "<stored as", ">bytes", "<because"), rows)
    page.note("the name is the largest of each kind; bytes as in the type that the model computes in")


def _engines(record: Mapping[str, Any], page: Page) -> None:
    rows = []
    for engine in record["engines"]:
        plan = engine["plan"]
        int8 = f"{plan['int8']} of {plan['total']} nodes" if plan["readable"] else "not readable"
        style = "green" if plan["readable"] and plan["int8"] == plan["total"] else "yellow"
        cost = size(engine["bytes"]), number(engine["seconds"], "{:.0f} s")
        rows.append((Path(engine["path"]).name, _sm(engine), *cost, (int8, style)))
    page.fill("Engines", ("<for", ">size", ">build", "<runs as int8"), rows)
    page.note(f"built with {', '.join(dict.fromkeys(engine['backend'] for engine in record['engines']))}")
    for engine in record["engines"]:
        plan = engine["plan"]
        runs = engine.get("verdicts", {})
        if runs.keys() & {"fused", "fp8", "fp4", "dequantized first"}:
            page.say(f"{_sm(engine)}: {', '.join(f'{count} nodes {verdict}' for verdict, count in runs.items())}")
        if not plan["readable"]:
            page.say((f"{_sm(engine)}: {plan['reason']}", "yellow"))
        elif plan["not_int8"]:
            page.say((f"quantized, but not run as int8 on {_sm(engine)}:", "yellow"))
            page.nodes([(node["node"], _told(node)) for node in plan["not_int8"]], _EXCEPTIONS)
        if nodes := engine.get("dequantized_first"):
            page.say((f"written out in front of every product, no faster than float on {_sm(engine)}:", "yellow"))
            page.nodes([(node, "dequantized first") for node in nodes], _EXCEPTIONS)
    _kernels(record["engines"], page)
    costs.show(record["engines"], page)
    for engine in record["engines"]:
        if engine.get("accuracy"):
            accuracy.comparison(f"Accuracy of {Path(engine['path']).name} on the GPU", engine["accuracy"], page)


def _told(node: Mapping[str, Any]) -> str:
    broken = f"; likely because it breaks: {node['because']}" if node.get("because") else ""
    return f"runs as {node['runs_as']}{broken}"


def _kernels(engines: Sequence[Mapping[str, Any]], page: Page) -> None:
    """Prints how each node runs in each engine; in a terminal only the nodes that run in different ways."""
    readable = [engine for engine in engines if engine["plan"].get("nodes")]
    runs = {id(engine): {row["node"]: row for row in engine["plan"]["nodes"]} for engine in readable}
    names = dict.fromkeys(name for engine in readable for name in runs[id(engine)])
    rows = []
    for name in names:
        found = [runs[id(engine)].get(name) for engine in readable]
        told = [row["runs_as"] if row else UNKNOWN for row in found]
        if page.whole or len(set(told)) > 1:
            kernels = dict.fromkeys(row["kernel"] for row in found if row and row["kernel"])
            rows.append((name, *told, ", ".join(kernels)))
    if rows:
        apart = len({engine["sm"] for engine in readable}) == len(readable)
        headings = [_sm(engine) if apart else page.name(Path(engine["path"]).name, taken=60) for engine in readable]
        page.blank()
        page.fill("Nodes run as", (*(f"<{heading}" for heading in headings), "<kernel"), rows)


def _sm(engine: Mapping[str, Any]) -> str:
    return "any SM" if engine["sm"] is None else f"SM {engine['sm']}"


def _latency(record: Mapping[str, Any], page: Page) -> None:
    first, rows = record["latency"][0], []
    for row in record["latency"]:
        faster = "" if row is first else times(first["ms"], row["ms"], "faster", "slower")
        rows.append((row["name"], f"{row['ms']:.3f}", (faster, "green" if row["ms"] <= first["ms"] else "yellow")))
    page.fill("Latency", (">ms", "<"), rows)


def _warnings(record: Mapping[str, Any], page: Page) -> None:
    page.say(("Warnings", "bold yellow"), indent=0)
    for warning in record["warnings"]:
        style = "bold red" if "COLLAPSED" in warning else "yellow"
        page.grid([(("!", style), (warning, style))], gap=1)


_SECTIONS = {
    "runs": runs.show,
    "model": _model,
    "lint": linting.show,
    "data": _data,
    "search": search.show,
    "steps": steps.show,
    "sensitivity": search.show_sensitivity,
    "inspection": inspection.show,
    "weights": _weights,
    "accuracy": accuracy.show,
    "gates": accuracy.gates,
    "next": advice.show,
    "explanation": explanation.show,
    "engines": _engines,
    "latency": _latency,
    "bench": benching.show,
    "warnings": _warnings,
}
_PAGE = {
    "demo": ("Stages", demo.show),
    "next": ("What to do next", advice.show),
    "runs": ("Two runs", runs.show),
    "accuracy": ("Accuracy", accuracy.show),
    "gates": ("Gates", accuracy.gates),
    "explanation": ("Where the error comes from", explanation.show),
    "search": ("Search", search.show),
    "sensitivity": ("Sensitivity", search.show_sensitivity),
    "lint": ("Lint", linting.show),
    "model": ("Model", _model),
    "weights": ("Weights", _weights),
    "steps": ("Passes", steps.show),
    "inspection": ("Contents", inspection.show),
    "engines": ("Engines", _engines),
    "latency": ("Latency", _latency),
    "bench": ("Bench", benching.show),
    "data": ("Data", _data),
    "warnings": ("Warnings", _warnings),
}  # the sections of the web page, with their titles
