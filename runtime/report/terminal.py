"""The report record, schema 1, and its view in the terminal.

The record is a plain dict that JSON can hold. Every key but ``schema`` and ``tool`` may be absent or empty, and is
not shown then. Sizes are bytes, times seconds (latencies milliseconds)::

    schema      1
    tool        "channelfold 0.1.0"
    command     the command line, as one string
    model       {path, bytes, nodes, ops: {op: count}, opset}     what came in; parameters and macs where they change
    output      the same of what came out
    data        {calibration, evaluation}                         Data.description of each
    steps       [{pass, kind, options: {}, seconds,
                  changed: [{node, what}], refused: [{node, reason, code}],
                  verified: {max_rel_error, probes} | {unverified: reason} | null,
                  facts: {}}]        facts of a pass that quantizes: {linears: all, quantized: count,
                                     by_op: {op: {quantized, total}}}; of one that changes channels
                                     {sites: [{node, tensor, readers, method, inserted: nodes; pairs of before and
                                     after: width, macs, outlier_ratio, output_snr_db, bfp_error; relative_change,
                                     sparsity, energy_kept}]}, each key where it applies to the pass; of
                                     approximate-ffn {ffns: [{node, branch, error; pairs of before and after: hidden,
                                     macs}]}
    accuracy    Comparison.to_json()   in exact arithmetic; of a file for ONNX Runtime as this machine runs it, and
                                       under ``exact`` in exact arithmetic
    engines     [{sm (null: any), path, bytes, seconds, backend, accuracy (null without its GPU; as above),
                  plan: {readable, reason, int8, total, not_int8: [{node, runs_as}]}}]
    latency     [{name, ms}]         the first one is what the others are measured against
    warnings    [str]

A number that JSON cannot hold is the string "inf" or "-inf", or null for NaN.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from channelfold.runtime.errors import OutputError
from channelfold.runtime.report.names import shorten, shorten_all
from channelfold.runtime.stats.compare import json_number

SCHEMA = 1
UNKNOWN = "–"  # in the place of a figure
_EXAMPLES, _EXCEPTIONS, _SITES = 3, 12, 12
_LEVELS = {"ok": "green", "degraded": "yellow", "collapsed": "bold red"}


def write_json(record: Mapping[str, Any], path: str | Path) -> None:
    """Writes the record as JSON, whole or not at all. Numpy scalars and arrays, paths and tuples are accepted.

    Raises OutputError when the file cannot be written.
    """
    path = Path(os.path.realpath(path))
    text = to_json(record) + "\n"
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror})", "Choose another file") from None
    finally:
        beside.unlink(missing_ok=True)


def to_json(record: Mapping[str, Any]) -> str:
    """The record as JSON text."""
    return json.dumps(plain(record), indent=2, ensure_ascii=False, allow_nan=False)


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
    """Prints the record as tables. In a terminal they fit its width (names are shortened in the middle, between their
    parts); in a file or a pipe nothing is shortened or wrapped."""
    record = plain(record)
    with _natural_width(console):
        _print(console, Text.assemble((record["tool"], "bold"), "  ", _safe(record.get("command", ""))), indent=0)
        for key, show in _SECTIONS.items():
            if record.get(key):
                console.print()
                show(record, console)


@contextmanager
def _natural_width(console: Console) -> Iterator[None]:
    width = console.width
    if not console.is_terminal:
        console.width = 10_000
    try:
        yield
    finally:
        console.width = width


def _model(record: Mapping[str, Any], console: Console) -> None:
    before, after = record["model"], record.get("output")
    table = _table("Model", "<before" if after else "<", "<after" if after else "<", "<")
    after = after or {}
    width = (console.width - 40) // 2
    _add(table, "file", *(_name(Path(side["path"]).name, width) for side in (before, after) if side))
    _add(table, "size", *(_bytes(side["bytes"]) for side in (before, after) if side), _smaller(before, after))
    for key in ("nodes", "opset"):
        _add(table, key, *_change(before.get(key), after.get(key)))
    for key, label in (("parameters", "parameters"), ("macs", "MACs per sample")):
        if before.get(key) and after.get(key):
            share = f"{after[key] / before[key]:.1%}"
            _add(table, label, f"{before[key]:,}", f"{after[key]:,}", share if share != "100.0%" else "")
    ops, new_ops = before.get("ops", {}), after.get("ops", before.get("ops", {}))
    changed = [op for op in {**ops, **new_ops} if ops.get(op, 0) != new_ops.get(op, 0)]
    for op in changed if after else ops:
        _add(table, op, *_change(ops.get(op, 0), new_ops.get(op, 0) if after else None))
    _print(console, table)
    if after and (same := len(ops) - sum(op in ops for op in changed)):
        _print(console, Text(f"{same} other operator types are unchanged in number", "dim"))


def _smaller(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    times = before["bytes"] / after["bytes"] if after.get("bytes") else 1.0
    if abs(times - 1) < 0.005:
        return ""
    return f"{times:.2f}x smaller" if times > 1 else f"{1 / times:.2f}x larger"


def _change(before: Any, after: Any) -> tuple[str, str, str]:
    if before is None or after is None:
        return str(before if before is not None else ""), "", ""
    return str(before), str(after), f"{after - before:+d}" if after != before else ""


def _data(record: Mapping[str, Any], console: Console) -> None:
    table = _table("Data", "<")
    for key, description in record["data"].items():
        _add(table, key, _safe(description or "none"))
    _print(console, table)


def _steps(record: Mapping[str, Any], console: Console) -> None:
    table = _table("Steps", "<kind", ">changed", ">refused", ">seconds", "<verified rel. error")
    for step in record["steps"]:
        _add(
            table,
            step["pass"],
            step["kind"],
            str(len(step["changed"])),
            str(len(step["refused"])),
            f"{step['seconds']:.1f}",
            _verified(step.get("verified")),
        )
    _print(console, table)
    for step in record["steps"]:
        _quantized(step, console)
        _sites(step, console)
        _refused(step, console)


def _verified(verified: Mapping[str, Any] | None) -> Text:
    if not verified:
        return Text("–", "dim")
    if "unverified" in verified:
        return Text(f"no: {_safe(verified['unverified'])}", "yellow")
    probes = verified["probes"]
    return Text(f"{_number(verified['max_rel_error'], '{:.2g}')}, {probes} probe{'s' * (probes != 1)}", "green")


def _quantized(step: Mapping[str, Any], console: Console) -> None:
    facts = step.get("facts", {})
    if "quantized" not in facts or "linears" not in facts:
        return
    table = _table("Quantized", ">", "<")
    for op, counts in sorted(facts.get("by_op", {}).items()):
        _add(table, op, *_share(counts["quantized"], counts["total"]))
    _add(table, "all linear nodes", *_share(facts["quantized"], facts["linears"]))
    console.print()
    _print(console, table)


def _share(count: int, total: int) -> tuple[str, str]:
    return f"{count} of {total}", f"{total - count} left in float" if count < total else ""


def _sites(step: Mapping[str, Any], console: Console) -> None:
    """What a pass has done to the channels of each site, those first that are worst now."""
    facts = step.get("facts", {})
    sites = sorted(facts.get("sites") or map(_ffn_site, facts.get("ffns", ())), key=_badness, reverse=True)
    if not sites:
        return
    columns = {key: column for key, column in _SITE.items() if any(site.get(key) for site in sites)}
    table = _table(f"By {step['pass']}", *(heading for heading, _ in columns.values()))
    rows = [
        (site["node"], *(form(site[key]) if site.get(key) else "" for key, (_, form) in columns.items()))
        for site in sites[:_SITES]
    ]
    if "method" in columns and _room(table, rows, console) < max(len(name) for name, *_ in rows):
        rows = [(name, method.partition(",")[0], *cells) for name, method, *cells in rows]  # the JSON has its details
    console.print()
    _fill(table, rows, console)
    if len(sites) > _SITES:
        _print(console, Text(f"… and {len(sites) - _SITES} more, with --json", "dim"))
    if legend := [words for key, words in _LEGEND.items() if key in columns]:
        _print(console, Text("; ".join(legend), "dim"))
    if inserted := sum(site.get("inserted", 0) for site in sites):
        _print(console, Text(f"{inserted} node{'s were' if inserted > 1 else ' was'} inserted", "yellow"))


def _ffn_site(ffn: Mapping[str, Any]) -> dict[str, Any]:
    """What approximate-ffn says of an FFN, as a site."""
    method = "with a dense branch" if ffn["branch"] else ""
    return {"node": ffn["node"], "method": method, "width": ffn["hidden"], "macs": ffn["macs"],
            "relative_change": ffn["error"]}  # fmt: skip


def _badness(site: Mapping[str, Any]) -> float:
    """What is left to be desired of a site: the noise of its quantized outputs, or else how its channels differ."""
    if "energy_kept" in site:
        return 1 - float(site["energy_kept"])
    for key, sign in (("output_snr_db", -1), ("outlier_ratio", 1), ("bfp_error", 1)):
        if site.get(key):
            return sign * float(np.inf if site[key][1] is None else site[key][1])
    return float(site.get("relative_change", 0.0))


def ratio(value: Any) -> str:
    """How many times as large something is: a number, infinite or "inf", or None."""
    return _number(value, "{:.1f}" if value is None or float(value) < 100 else "{:.0f}")


def _pair(form: Callable[[Any], str]) -> Callable[[Any], str]:
    return lambda pair: " -> ".join(map(form, pair))


_SITE: dict[str, tuple[str, Callable[[Any], str]]] = {
    "method": ("<method", lambda text: _safe(text)),
    "width": (">channels", _pair(str)),
    "outlier_ratio": (">outliers", _pair(ratio)),
    "output_snr_db": (">SNR dB", _pair(lambda value: _number(value, "{:.1f}"))),
    "bfp_error": (">block error", _pair(lambda value: _number(value, "{:.2e}"))),
    "relative_change": (">change", lambda value: _number(value, "{:.1e}")),
    "macs": (">MACs", _pair(lambda value: f"{value:,}")),
    "inserted": (">nodes", "{:+d}".format),
    "sparsity": (">zeros", "{:.1%}".format),
    "energy_kept": (">energy kept", "{:.2%}".format),
}  # a key of a site: the heading of its column, and how it is written

_LEGEND = {
    "outlier_ratio": "outliers: largest channel against the median",
    "output_snr_db": "SNR: of int8 outputs",
    "bfp_error": "error in blocks that share an exponent",
    "energy_kept": "energy: sum of the squared weights, times those of their inputs where there are data",
}


def _refused(step: Mapping[str, Any], console: Console) -> None:
    if not step["refused"]:
        return
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for refusal in step["refused"]:
        groups.setdefault(refusal.get("code") or refusal["reason"], []).append(refusal)
    console.print()
    _print(console, Text(f"Left as it was by {step['pass']}", "bold"), indent=0)
    for code, group in sorted(groups.items(), key=lambda item: -len(item[1])):
        _print(console, Text.assemble((f"{len(group)} x ", "bold"), _safe(code)))
        rows = [(refusal["node"], "" if refusal["reason"].endswith(code) else refusal["reason"]) for refusal in group]
        _nodes(rows, _EXAMPLES, console)


def _nodes(rows: Sequence[tuple[str, str]], limit: int, console: Console) -> None:
    """Names of nodes with a remark each, the first ``limit`` of them."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(style="dim")
    for node, remark in rows[:limit]:
        table.add_row(_name(node, console.width // 2), _safe(remark))
    _print(console, table, indent=4)
    if len(rows) > limit:
        _print(console, Text(f"… and {len(rows) - limit} more", "dim"), indent=4)


def _accuracy(record: Mapping[str, Any], console: Console) -> None:
    _comparison("Accuracy", record["accuracy"], console)


def _comparison(heading: str, accuracy: Mapping[str, Any], console: Console) -> None:
    level, reasons = accuracy["verdict"]["level"], accuracy["verdict"]["reasons"]
    title = Text.assemble((heading, "bold"), "  ", (level.upper(), _LEVELS[level]), f"  {_safe(accuracy['data'])}")
    _print(console, title, indent=0)
    table = _table("", ">SNR dB", ">cosine", ">rel. L2", ">max err", ">agree", ">worst sample")
    _fill(table, [(output["name"], *_figures(output)) for output in accuracy["outputs"]], console)
    _print(console, Text("agree: the same argmax, or equal elements where an output is not floating", "dim"))
    for output in accuracy["outputs"]:
        if output["reference_nan"] or output["reference_inf"]:
            found = f"{output['reference_nan']} NaN and {output['reference_inf']} Inf in the original"
            _print(console, Text(f"{_safe(output['name'])}: {found}", "yellow"))
    if accuracy["extra"]:
        _print(console, Text(f"only the new model has: {_safe(', '.join(accuracy['extra']))}", "yellow"))
    for reason in reasons:
        _print(console, Text.assemble((f"{level}: ", _LEVELS[level]), _safe(reason)))


def _figures(output: Mapping[str, Any]) -> Iterator[str]:
    yield _number(output["snr"], "{:.2f}")
    yield _number(output["cosine"], "{:.5f}")
    yield _number(output["relative_l2"], "{:.1e}")
    yield _number(output["max_error"], "{:.1e}")
    agreement = output["equal"] if output["agreement"] is None else output["agreement"]
    yield _number(agreement, "{:.2%}")
    worst = output["worst_sample"]
    yield "–" if worst is None else f"#{worst} {_number(output['worst_snr'], '{:.1f} dB')}"


def _engines(record: Mapping[str, Any], console: Console) -> None:
    table = _table("Engines", "<for", ">size", ">build", "<runs as int8")
    rows = []
    for engine in record["engines"]:
        plan = engine["plan"]
        int8 = f"{plan['int8']} of {plan['total']} nodes" if plan["readable"] else "not readable"
        complete = plan["readable"] and plan["int8"] == plan["total"]
        size, seconds = _bytes(engine["bytes"]), f"{engine['seconds']:.0f} s"
        rows.append(
            (Path(engine["path"]).name, _sm(engine), size, seconds, Text(int8, "green" if complete else "yellow"))
        )
    _fill(table, rows, console)
    backends = dict.fromkeys(engine["backend"] for engine in record["engines"])
    _print(console, Text(f"built with {_safe(', '.join(backends))}", "dim"))
    for engine in record["engines"]:
        plan = engine["plan"]
        if not plan["readable"]:
            _print(console, Text(f"{_sm(engine)}: {_safe(plan['reason'])}", "yellow"))
        elif plan["not_int8"]:
            _print(console, Text(f"quantized, but not run as int8 on {_sm(engine)}:", "yellow"))
            _nodes([(node["node"], f"runs as {node['runs_as']}") for node in plan["not_int8"]], _EXCEPTIONS, console)
    for engine in record["engines"]:
        if engine.get("accuracy"):
            _comparison(f"Accuracy of {Path(engine['path']).name} on the GPU", engine["accuracy"], console)


def _sm(engine: Mapping[str, Any]) -> str:
    return "any SM" if engine["sm"] is None else f"SM {engine['sm']}"


def _latency(record: Mapping[str, Any], console: Console) -> None:
    rows = record["latency"]
    table = _table("Latency", ">ms", "<")
    cells = []
    for row in rows:
        ratio = rows[0]["ms"] / row["ms"]
        faster = "" if row is rows[0] else f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"
        cells.append((row["name"], f"{row['ms']:.3f}", Text(faster, "green" if ratio >= 1 else "yellow")))
    _fill(table, cells, console)


def _warnings(record: Mapping[str, Any], console: Console) -> None:
    _print(console, Text("Warnings", "bold yellow"), indent=0)
    table = Table.grid(padding=(0, 1))
    for warning in record["warnings"]:
        style = "bold red" if "COLLAPSED" in warning else "yellow"
        table.add_row(Text("!", style), Text(_safe(warning), style))
    _print(console, table)


_SECTIONS = {
    "model": _model,
    "data": _data,
    "steps": _steps,
    "accuracy": _accuracy,
    "engines": _engines,
    "latency": _latency,
    "warnings": _warnings,
}


def _table(title: str, *columns: str) -> Table:
    """A borderless table; a column is its alignment (``<`` or ``>``) and its heading. The title heads the first."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(Text(title, "bold not dim"), no_wrap=True)
    for column in columns:
        # rich measures a table with a column of no width too narrow
        table.add_column(column[1:], justify="right" if column[0] == ">" else "left", min_width=1)
    return table


def _add(table: Table, label: str | Text, *cells: str | Text) -> None:
    table.add_row(Text("  ").append(label), *cells)


def _fill(table: Table, rows: Sequence[tuple[str, *tuple[str | Text, ...]]], console: Console) -> None:
    """Adds rows that begin with a name and prints the table; the name gets the width that the other columns leave."""
    names = shorten_all([_safe(name) for name, *_ in rows], max(12, _room(table, rows, console)))
    for name, (_, *cells) in zip(names, rows, strict=True):
        _add(table, Text(name, no_wrap=True), *cells)
    _print(console, table)


def _room(table: Table, rows: Sequence[tuple[str, *tuple[str | Text, ...]]], console: Console) -> int:
    """The width that the other columns leave to the names."""
    headings = [str(column.header) for column in table.columns[1:]]
    others = zip(headings, *(cells for _, *cells in rows), strict=True)
    return console.width - 2 - sum(2 + max(map(len, column)) for column in others)


def _print(console: Console, content: Table | Text, indent: int = 2) -> None:
    # Text alone, never markup: names may hold brackets.
    indent = 0 if isinstance(content, Table) and content.show_header else indent
    console.print(Padding(content, (0, 0, 0, indent), expand=False), highlight=False)


def _safe(text: str) -> str:
    """Without control characters: names and messages come from files, and must not steer the terminal."""
    return "".join(char if char.isprintable() else "?" for char in str(text))


def _name(name: str, width: int) -> Text:
    return Text(shorten(_safe(name), max(width, 12)), no_wrap=True)


def _bytes(size: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"


def _number(value: Any, form: str) -> str:
    """A figure of the record: a number, "inf" or "-inf", or None."""
    if value is None:
        return UNKNOWN
    if value == 0:
        return "0"
    return value if isinstance(value, str) else form.format(value)
