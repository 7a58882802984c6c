"""Nodes left by ``channelfold fold`` beside those that simplifiers leave, and what folding changes in the outputs.

    python benchmarks/simplify.py [MODEL.onnx …] [--dir DIR] [--peers PYTHON] [--write]

Without models, all of the open set. PYTHON is the interpreter of an environment with onnxsim and onnxslim; a
simplifier that is missing there or fails has no figure. Exit code 1 when a simplifier leaves fewer nodes, or outputs
change by more than 1e-5 of the largest.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from harness import channelfold, run, table, write
from open_set import DEFAULT

BOUND = 1e-5
PEERS = {
    "onnxsim": "import onnx, onnxsim; onnx.save(onnxsim.simplify(SOURCE)[0], TARGET)",
    "OnnxSlim": "import onnxslim; onnxslim.slim(SOURCE, TARGET)",
    "ONNX Runtime basic": "import onnxruntime as ort; o = ort.SessionOptions(); o.optimized_model_filepath = TARGET; "
    "o.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC; "
    "ort.InferenceSession(SOURCE, o, providers=['CPUExecutionProvider'])",
}
SIZES = (2, 1, 3)  # of the first axis, where it is open; the others follow
LENGTHS = (16, 48, 7)  # of the other open axes of integers
WIDTHS = (1024, 1024, 2048)  # and of those of floats
SHAPES = {"ocr_rec": (3, 48, 160), "plcmos": (1, 100, 257)}  # networks that take no other open sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL")
    parser.add_argument("--dir", type=Path, default=DEFAULT, help="the open set")
    parser.add_argument("--peers", default=sys.executable, metavar="PYTHON", help="who runs the simplifiers")
    parser.add_argument("--write", action="store_true", help="also write results/simplify.md")
    options = parser.parse_args()
    rows = []
    for model in options.models or sorted((options.dir / "open").glob("*.onnx")):
        with tempfile.TemporaryDirectory() as scratch:
            rows.append(measured(model, Path(scratch), options.peers))
        print(f"{model.stem} done", file=sys.stderr)
    text = table(("model", "nodes", "fold", *PEERS, "seconds", "outputs", "met"), map(line, rows))
    print(text)
    if options.write:
        said = (
            f"`outputs`: the largest change, relative to the largest output, for batches of {SIZES}; bound {BOUND:g}."
        )
        write("simplify.md", "# Nodes after `fold`, and after simplifiers", text, said)
    sys.exit(not all(map(met, rows)))


def measured(model: Path, scratch: Path, python: str) -> dict:
    started = time.perf_counter()
    folded = scratch / "folded.onnx"
    run(channelfold("fold", model, "-o", folded))
    found = {
        "model": model.stem,
        "nodes": nodes(model),
        "fold": nodes(folded),
        "seconds": time.perf_counter() - started,
    }
    for name, code in PEERS.items():
        target = scratch / "peer.onnx"
        target.unlink(missing_ok=True)
        named = f"SOURCE, TARGET = {json.dumps([str(model), str(target)])}; {code}"
        done = subprocess.run([python, "-c", named], capture_output=True, timeout=900)
        found[name] = nodes(target) if not done.returncode and target.exists() else None
        if done.returncode:
            print(f"{name} on {model.stem}: {done.stderr.decode().strip()[-200:]}", file=sys.stderr)
    found["error"] = max(changes(model, folded))
    return found


def nodes(path: Path) -> int:
    """The nodes of a model and of the bodies in it; Constant nodes, which only hold a value, do not count."""
    return _nodes(onnx.load(path, load_external_data=False).graph)


def _nodes(graph: onnx.GraphProto) -> int:
    bodies = (attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g"))
    return sum(node.op_type != "Constant" for node in graph.node) + sum(map(_nodes, bodies))


def changes(model: Path, folded: Path) -> Iterator[float]:
    """The change of the outputs for several batches and lengths."""
    before, after = session(model), session(folded)
    for seed, sizes in enumerate(zip(SIZES, LENGTHS, WIDTHS, strict=True)):
        feed = {value.name: values(value, model.stem, seed, *sizes) for value in before.get_inputs()}
        for old, new in zip(before.run(None, feed), after.run(None, feed), strict=True):
            peak = np.abs(old).max(initial=0) or 1
            yield float(np.abs(new - old).max(initial=0) / peak) if old.shape == new.shape else float("inf")


def values(value: onnxruntime.NodeArg, name: str, seed: int, batch: int, length: int, width: int) -> np.ndarray:
    rng, floats = np.random.default_rng(seed), value.type == "tensor(float)"
    wide = width if floats else length
    shape = [d if isinstance(d, int) else wide if axis else batch for axis, d in enumerate(value.shape)]
    if name in SHAPES and len(shape) == len(SHAPES[name]) + 1:
        shape = [batch, *SHAPES[name]]
    if floats:
        return rng.standard_normal(shape).astype(np.float32)
    low = int("mask" in value.name)
    return rng.integers(low, 2, shape).astype(np.int32 if value.type == "tensor(int32)" else np.int64)


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def line(row: dict) -> tuple[str, ...]:
    counts = [str(row[name]) if row[name] is not None else "–" for name in ("nodes", "fold", *PEERS)]
    return row["model"], *counts, f"{row['seconds']:.1f}", f"{row['error']:.1e}", "yes" if met(row) else "**no**"


def met(row: dict) -> bool:
    fewest = min((row[name] for name in PEERS if row[name] is not None), default=row["fold"])
    return row["fold"] <= fewest and row["error"] <= BOUND


if __name__ == "__main__":
    main()
