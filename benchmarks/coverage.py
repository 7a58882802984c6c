"""What every command does with what people export today: networks with random weights, from every exporter.

    python benchmarks/coverage.py DIR [PATTERN …] [--export] [--write]

DIR holds the exports, NAME.EXPORTER.onnx. ``--export`` makes those that are missing, with the torch of the open set;
``--optimum PYTHON`` and ``--genai PYTHON`` name the interpreters of environments with these exporters. Rows measured
before are kept in DIR/rows; PATTERN (``llama*``, ``*.genai*``) measures some exports anew. Exit code 1 for a crash, a
result that was not verified, or weights that were left without a reason.
"""

from __future__ import annotations

import fnmatch
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from harness import HERE, parser, table, write
from open_set import DEFAULT

ENOUGH = 0.95  # share of the weight bytes
LIMIT = 600  # seconds for one export and all commands
SAMPLES, MANY = 8, 128  # random samples; fits need as many positions as a layer has channels
TORCH = (
    "llama", "qwen3", "phi3", "gemma3", "gpt2", "gpt_neox", "mixtral", "mamba", "bert", "t5", "whisper", "clip", "detr",
    "sam", "vit", "deit", "swin", "convnext", "efficientnet", "unet", "vae",
)  # fmt: skip
OTHERS = {
    "optimum": ("llama", "gpt2", "bert", "t5", "whisper"),
    "genai-fp32": ("llama",),
    "genai-int4": ("llama",),
    "fused32": ("bert", "gpt2"),
    "fused16": ("bert", "gpt2"),
}
INTRODUCTION = """# Exports and commands

Written by `python benchmarks/coverage.py DIR --export --write`. Tiny networks with random weights; a decoder with a
cache is calibrated and compared on steps of rollouts. Quantized: share of the weight bytes, and SNR of the worst
output. fold and smooth: the sites that changed, all verified. prune (`--ratio .3`) and reparam (`--approximate
--keep-hidden .5`): the parameters that are left, and the SNR. legacy17, dynamo18 and dynamo23 are torch's exporters and
their opsets, fused32 and fused16 ONNX Runtime's transformer optimizer, genai the builder of onnxruntime-genai."""
LEFT = "biases, norms and scales stay float"
UNDONE = "taken back"  # the code of a refusal: the site changed the outputs
QUANTIZED = ("tensorrt", "onnxruntime", "int4")
Row = dict[str, Any]


def commands(jobs: Any) -> dict[str, Callable[[Path, Path], Row]]:
    """One call for each command, from the model and the file to write."""
    data, many = jobs.Source(random=SAMPLES), jobs.Source(random=MANY)
    return {
        "inspect": lambda model, _: jobs.inspect(model, idle=True, groups=True),
        "fold": lambda model, out: jobs.fold(model, out),
        "smooth": lambda model, out: jobs.smooth(model, out, source=data),
        "tensorrt": lambda model, out: jobs.quantize(model, out, source=data),
        "onnxruntime": lambda model, out: jobs.quantize(model, out, source=data, options={"target": "onnxruntime"}),
        "int4": lambda model, out: jobs.quantize(model, out, options={"weights": "int4", "group": 16}),
        "prune": lambda model, out: jobs.prune(model, out, source=data, options={"ratio": 0.3}),
        "reparam": lambda model, out: jobs.reparam(
            model, out, source=many, approximate=True, options={"keep_hidden": 0.5}
        ),
    }  # fmt: skip


def measure(model: Path, row: Path) -> None:
    """Runs every command on a model and writes what happened."""
    from channelfold.runtime import jobs
    from channelfold.runtime.errors import ChannelfoldError

    found: Row = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, call in commands(jobs).items():
            started = time.perf_counter()
            try:
                told = _told(name, call(model, Path(folder, f"{name}.onnx")))
            except ChannelfoldError as error:
                told = {"exit": error.exit_code, "error": str(error)}
            except Exception:
                told = {"exit": "crash", "error": traceback.format_exc()[-1500:]}
            found[name] = told | {"seconds": round(time.perf_counter() - started, 1)}
            row.write_text(json.dumps(found, indent=1))


def _told(command: str, record: Mapping[str, Any]) -> Row:
    """What a report says: shares, reasons with bytes, figures, warnings."""
    steps, accuracy = record["steps"], record["accuracy"]
    weights = record.get("weights", {"rows": [], "bytes": 0, "share": 0.0})
    refused = [(step, one) for step in steps for one in step["refused"]]
    left = [row for row in weights["rows"] if row["state"] == "float" and row["reason"] != LEFT]
    figures = [output["snr"] for output in accuracy["outputs"] if output["snr"] is not None] if accuracy else []
    proofs = [step["verified"] for step in steps if step["verified"]]
    return {
        "exit": 0,
        "share": weights["share"],
        "left": [[row["op"], row["place"], row["bytes"], row["reason"]] for row in left],
        "changed": sum(len(step["changed"]) for step in steps),
        "refused": [f"{step['pass']}: {one['reason']}" for step, one in refused],
        "undone": [f"{step['pass']}: {one['node']}" for step, one in refused if one.get("code") == UNDONE],
        "snr": min(map(float, figures), default=None),
        "unverified": [proof["unverified"] for proof in proofs if "unverified" in proof],
        "proofs": len(proofs),
        "parameters": [record["model"].get("parameters"), (record["output"] or {}).get("parameters")],
        "warnings": record["warnings"],
        "verdict": accuracy["verdict"] if accuracy else None,
        "compared": accuracy is not None,
    }


def faults(found: Mapping[str, Row]) -> list[str]:
    """What must not be: crashes, results without a proof, weights left without a reason, silence."""
    said = []
    for command, row in found.items():
        if row["exit"] == "crash":
            said.append(f"{command}: crash: {row['error'].strip().splitlines()[-1][:200]}")
        if row["exit"] != 0:
            continue
        said += [f"{command}: not verified: {reason[:200]}" for reason in row["unverified"][:1]]
        said += [f"{command}: taken back, a fault of the pass: {site}" for site in row["undone"]]
        if command in QUANTIZED and not row["compared"]:
            said.append(f"{command}: not compared")
        if command in QUANTIZED:
            told = " ".join(row["warnings"])
            silent = [f"{op} {size} bytes" for op, _, size, reason in row["left"] if not reason and op not in told]
            if silent and row["share"] < ENOUGH:
                said.append(f"{command}: no reason for {'; '.join(silent[:3])}")
        if command != "inspect" and not row["changed"] and not row["warnings"] and not row["refused"]:
            said.append(f"{command}: silent")
    return said


def cell(command: str, row: Row | None) -> str:
    """A row's figures of one command."""
    if row is None:
        return "-"
    if row["exit"] != 0:
        return f"exit {row['exit']}"
    verified = "" if not row["unverified"] else ", not verified"
    if command == "inspect":
        return "ok"
    if command in QUANTIZED:
        return f"{row['share']:.0%}, {_db(row['snr'])}"
    if command in ("fold", "smooth"):
        return f"{row['changed']}{verified}"
    before, after = row["parameters"]
    done = row["snr"] not in (None, float("inf"))
    return f"{after / before:.0%}, {_db(row['snr'])}{verified}" if done and before and after else f"none{verified}"


def _db(snr: float | None) -> str:
    return "not compared" if snr is None else f"{snr:.0f} dB"


def page(rows: Mapping[str, Mapping[str, Row]]) -> list[str]:
    """The table, what stays float and why, the sites that are refused, and the faults."""
    columns = ["inspect", "fold", "smooth", *QUANTIZED, "prune", "reparam"]
    cells = [[name, *(cell(column, found.get(column)) for column in columns)] for name, found in rows.items()]
    left = [
        [name, "; ".join(f"{op} {size:,} bytes ({reason or f'no weight of {op} is quantized'})"
                         for op, _, size, reason in found[command]["left"]), command]
        for name, found in rows.items()
        for command in QUANTIZED
        if found.get(command, {"exit": 1})["exit"] == 0 and found[command]["share"] < ENOUGH
    ]  # fmt: skip
    none = [
        [name, "; ".join(dict.fromkeys(found[command]["refused"])) or "; ".join(found[command]["warnings"]), command]
        for name, found in rows.items()
        for command in ("smooth", "prune", "reparam")
        if found.get(command, {"exit": 1})["exit"] == 0 and cell(command, found[command]) in ("0", "none")
    ]
    ended = [
        [name, row["error"].strip().splitlines()[-1], command]
        for name, found in rows.items()
        for command, row in found.items()
        if row["exit"] != 0
    ]
    wrong = [f"- {name}: {text}" for name, found in rows.items() for text in faults(found)]
    return [
        table(["export", *columns], cells),
        f"## Below {ENOUGH:.0%} of the weight bytes\n\n" + table(["export", "what stays float", "command"], left),
        "## Nothing to scale or to cut\n\n" + table(["export", "why", "command"], none),
        "## Ended with an error\n\n" + table(["export", "error", "command"], ended),
        "## Faults\n\n" + ("\n".join(wrong) or "None."),
    ]


def main() -> int:
    made = parser(__doc__, folder={"type": Path}, patterns={"nargs": "*"})
    made.add_argument("--export", action="store_true", help="make the exports that are missing")
    made.add_argument("--open-set", type=Path, default=DEFAULT / "venv/bin/python", metavar="PYTHON", help="has torch")
    made.add_argument("--optimum", type=Path, metavar="PYTHON", help="has optimum-onnx")
    made.add_argument("--genai", type=Path, metavar="PYTHON", help="has onnxruntime-genai")
    made.add_argument("--row", type=Path, help="measure the one model DIR and write the row here")
    made.add_argument("--write", action="store_true", help="also write results/coverage.md")
    args = made.parse_args()
    if args.row:
        measure(args.folder, args.row)
        return 0
    if args.export:
        _export(args)
    rows, said = {}, []
    (args.folder / "rows").mkdir(exist_ok=True)
    for model in sorted(args.folder.glob("*.onnx")):
        name, row = model.stem, args.folder / "rows" / f"{model.stem}.json"
        if not row.exists() or any(fnmatch.fnmatch(name, pattern) for pattern in args.patterns):
            row.write_text("{}")
            call = [sys.executable, __file__, str(model), "--row", str(row)]
            try:
                subprocess.run(call, timeout=LIMIT)
            except subprocess.TimeoutExpired:
                print(f"{name}: more than {LIMIT} s")
        rows[name] = json.loads(row.read_text())
        found = faults(rows[name])
        said += found
        print(name, *(f"\n    {text}" for text in found), flush=True)
    parts = page(rows)
    print("\n\n".join(parts))
    if args.write:
        write("coverage.md", INTRODUCTION, *parts)
    return int(bool(said))


def _export(args: Any) -> None:
    """Makes the exports that are missing; a failed one is printed, and left out."""
    wanted = [(name, exporter) for exporter in ("legacy17", "dynamo18", "dynamo23") for name in TORCH]
    wanted += [(name, exporter) for exporter, names in OTHERS.items() for name in names]
    for name, exporter in wanted:
        python = {"optimum": args.optimum, "genai-fp32": args.genai, "genai-int4": args.genai}.get(
            exporter, args.open_set
        )
        if python is None or (args.folder / f"{name}.{exporter}.onnx").exists():
            continue
        args.folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            [str(python), str(HERE / "coverage_exports.py"), str(args.folder), exporter, name],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            print(f"{name}.{exporter}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
