"""Latency of `quantize --target onnxruntime` as a share of float, and the kernels that ONNX Runtime makes of it.

    python benchmarks/onnxruntime_target.py [MODEL …] [--dir DIR] [--write]

MODEL: bert (two layers of BERT-base over 128 tokens) and bert_dynamic, planted (a BERT with outliers in its norms) and
resnet50, all with random weights; or a model of the open set. Both sessions take turns on one sample, so what loads the
machine loads both; the figure is the ratio of their medians. `expanded` counts the int8 weights that a DequantizeLinear
of the optimized graph makes float on every call. SNR: of the worst output, on the calibration samples.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import shapes
from harness import table, write
from onnx import numpy_helper

from channelfold.runtime import jobs
from channelfold.runtime.data.sources import open_data
from channelfold.runtime.io.facts import required_inputs
from channelfold.runtime.io.files import load
from channelfold.runtime.io.session import Session
from channelfold.runtime.stats.bench import latencies
from channelfold.runtime.stats.fusions import EXPANDS, readers_of_integers

OPEN_SET = {"effnet_lite0": "effnet", "minilm": "minilm", "crepe_full": "crepe_full", "ocr_rec": "ocr_rec",
            "plcmos": "plcmos", "magika": "magika", "vit_s_focus": "imgfocus"}  # fmt: skip
MADE = ("bert", "bert_dynamic", "planted", "resnet50")
HEADER = ("model", "int8 / float, 1 thread", "2 threads", "quantized", "expanded", "SNR dB")
SAMPLES = 8


def encoder(width: int, heads: int, hidden: int, tokens: int, planted: bool = False) -> onnx.ModelProto:
    """Two post-norm layers over embedded words; with outliers three gains of every norm are twelve times as large."""
    build = shapes.Builder(np.random.default_rng(3))
    x = build.op("Gather", build.normal(1000, width, std=0.5), "ids", axis=0)
    x = build.op("Add", x, build.normal(1, tokens, width, std=0.2))
    layers = shapes.Encoder(build, tokens, 1e-12, width=width, heads=heads, hidden=hidden, layers=2)
    build.op("Identity", layers.post_norm(layers.norm(x)), output="output")
    output = onnx.helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, [1, tokens, width])
    ids = onnx.helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, [1, tokens])
    graph = onnx.helper.make_graph(build.nodes, "encoder", [ids], [output], list(build.initializers.values()))
    rng, constants = np.random.default_rng(7), {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type not in ("MatMul", "LayerNormalization") or node.input[1] not in constants:
            continue
        tensor = constants[node.input[1]]
        values = numpy_helper.to_array(tensor).copy()
        if node.op_type == "MatMul":
            values *= np.float32(0.02 * np.sqrt(len(values)))  # a standard deviation of 0.02, as BERT starts with
        elif planted:
            values[rng.choice(width, 3, replace=False)] *= 12
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


def made(name: str, folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A model with random weights, and samples for it."""
    rng = np.random.default_rng(1)
    if name == "resnet50":
        model, samples = shapes.resnet50(), shapes.images(SAMPLES, rng)
    else:
        sizes = (128, 4, 512, 32) if name == "planted" else (768, 12, 3072, 128)
        model, samples = encoder(*sizes, planted=name == "planted"), {"ids": rng.integers(0, 1000, (SAMPLES, sizes[3]))}
    if name == "bert_dynamic":
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.save(model, folder / f"{name}.onnx")
    return folder / f"{name}.onnx", samples


def ratio(float_model: Path, int8_model: Path, feed: Mapping[str, np.ndarray], threads: int) -> float:
    sessions = {path.name: Session(path, threads=threads, timed=True) for path in (float_model, int8_model)}
    runs = {name: lambda s=session: s.run(feed) for name, session in sessions.items()}
    first, second = latencies(runs, rounds=41, warmup=3, seconds=8)
    return second.ms / first.ms


def row(name: str, root: Path, folder: Path) -> tuple[str, ...]:
    if name in MADE:
        path, data = made(name, folder)
    else:
        path, data = root / "open" / f"{name}.onnx", root / "calibration" / OPEN_SET[name]
        data = data if data.is_dir() else data.with_suffix(".npz")
    folded, int8 = folder / f"{name}.folded.onnx", folder / f"{name}.int8.onnx"
    jobs.fold(path, folded)
    record = jobs.quantize(folded, int8, source=jobs.Source(data), options={"target": "onnxruntime"})
    feed = next(iter(open_data(data, required_inputs(load(path)))))
    facts, graph = record["steps"][-1]["facts"], load(int8)
    expanded = [
        weight for weight, ops in readers_of_integers(graph).items() if EXPANDS in ops and "_zero_point" not in weight
    ]
    figures = [f"{ratio(path, int8, feed, number):.2f}" for number in (1, 2)]
    snr = min(output["snr"] for output in record["accuracy"]["outputs"] if output["snr"] is not None)
    return name, *figures, f"{facts['quantized']} of {facts['linears']}", str(len(expanded)), f"{snr:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=([], *MADE, *OPEN_SET), default=[], metavar="MODEL")
    fallback = os.environ.get("CHANNELFOLD_OPEN_SET") or Path.home() / ".cache/channelfold-open-set"
    parser.add_argument("--dir", type=Path, default=Path(fallback), help="the open set")
    parser.add_argument("--write", action="store_true", help="also write results/onnxruntime_target.md")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models or (*MADE, *OPEN_SET):
            rows.append(row(name, options.dir, Path(folder)))
            print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    print(table(HEADER, rows))
    if options.write:
        how = "`python benchmarks/onnxruntime_target.py --write`: up to 41 rounds in turns after 3 that do not count."
        write("onnxruntime_target.md", "# INT8 for ONNX Runtime, against float", how, table(HEADER, rows))


if __name__ == "__main__":
    main()
