"""What the weights of large decoders cost to quantize, and what stored weights gain in ONNX Runtime.

    python benchmarks/large.py make DIR SHAPE [--layers N] [--half]      DIR/SHAPE.onnx, its weights and DIR/SHAPE.npz
    python benchmarks/large.py run MODEL -- FLAG …                       channelfold quantize MODEL FLAG …
    python benchmarks/large.py gptq MODEL                                GPTQ of its layers, without any comparison
    python benchmarks/large.py products [--width K] [--layers N]         int4, DGQ and int8 against float, one thread

Decoders have the shapes of TinyLlama (1.1 B) and Llama 2 (7 B), random weights in a file of external data, and no mask,
which changes nothing in what is measured. ``--layers`` makes a few layers of a shape, from which to extrapolate. Every
figure is processor time, in seconds; products run in turns, and the medians are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from harness import channelfold
from onnx import TensorProto, helper, numpy_helper

from channelfold.passes.base import Context
from channelfold.passes.quantize import QuantizeWeights
from channelfold.runtime.data.sources import open_data
from channelfold.runtime.io import files
from channelfold.runtime.io.session import TensorSpec

_PAGE, _BLOCK = 4096, 1 << 22
TOKENS, SAMPLES = 512, 8


@dataclass(frozen=True)
class Shape:
    layers: int
    width: int
    hidden: int
    heads: int
    pairs: int  # heads of keys and values
    words: int = 32000


SHAPES = {"1b": Shape(22, 2048, 5632, 32, 4), "7b": Shape(32, 4096, 11008, 32, 32), "tiny": Shape(2, 64, 176, 4, 2, 99)}


class Builder:
    """Nodes, and weights that are written as they come: each a piece of one block of random numbers."""

    def __init__(self, data: Path, half: bool):
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self._type, self._kind = (np.float16, TensorProto.FLOAT16) if half else (np.float32, TensorProto.FLOAT)
        self._block = np.random.default_rng(0).standard_normal(_BLOCK, np.float32).astype(self._type)
        self._file = data.open("wb")

    def weight(self, *shape: int) -> str:
        name, count = f"w{len(self.tensors)}", int(np.prod(shape))
        place = self._file.seek(-(-self._file.tell() // _PAGE) * _PAGE)
        for start in range(0, count, _BLOCK):
            part = np.roll(self._block, 7919 * len(self.tensors) + start)[: count - start] / self._type(shape[0] ** 0.5)
            part.astype(self._type).tofile(self._file)
        proto = TensorProto(name=name, data_type=self._kind, dims=shape, data_location=TensorProto.EXTERNAL)
        size = count * np.dtype(self._type).itemsize
        for key, value in (("location", Path(self._file.name).name), ("offset", place), ("length", size)):
            proto.external_data.add(key=key, value=str(value))
        self.tensors.append(proto)
        return name

    def constant(self, values: np.ndarray | float) -> str:
        array = np.asarray(values) if isinstance(values, np.ndarray) else np.array(values, self._type)
        self.tensors.append(numpy_helper.from_array(array, f"w{len(self.tensors)}"))
        return self.tensors[-1].name

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=f"/{name}", **attributes))
        return name

    def linear(self, x: str, inputs: int, outputs: int) -> str:
        return self.op("MatMul", x, self.weight(inputs, outputs))

    def norm(self, x: str, width: int) -> str:
        power = self.op("ReduceMean", self.op("Mul", x, x), axes=[-1])
        root = self.op("Sqrt", self.op("Add", power, self.constant(1e-5)))
        gain = self.constant(np.linspace(0.5, 2, width).astype(self._type))
        return self.op("Mul", self.op("Div", x, root), gain)

    def heads(self, x: str, *shape: int, perm: list[int]) -> str:
        return self.op("Transpose", self.op("Reshape", x, self.constant(np.array(shape))), perm=perm)

    def layer(self, x: str, of: Shape) -> str:
        size, times = of.width // of.heads, of.heads // of.pairs
        h = self.norm(x, of.width)
        q = self.heads(self.linear(h, of.width, of.width), -1, of.pairs, times, size, perm=[1, 2, 0, 3])
        k = self.heads(self.linear(h, of.width, of.pairs * size), -1, of.pairs, 1, size, perm=[1, 2, 3, 0])
        v = self.heads(self.linear(h, of.width, of.pairs * size), -1, of.pairs, 1, size, perm=[1, 2, 0, 3])
        scores = self.op("Softmax", self.op("Mul", self.op("MatMul", q, k), self.constant(size**-0.5)), axis=-1)
        mixed = self.op("Transpose", self.op("MatMul", scores, v), perm=[2, 0, 1, 3])
        mixed = self.op("Reshape", mixed, self.constant(np.array([-1, of.width])))
        x = self.op("Add", x, self.linear(mixed, of.width, of.width))
        h = self.norm(x, of.width)
        gate = self.linear(h, of.width, of.hidden)
        gate = self.op("Mul", gate, self.op("Sigmoid", gate))
        h = self.op("Mul", gate, self.linear(h, of.width, of.hidden))
        return self.op("Add", x, self.linear(h, of.hidden, of.width))


def make(folder: Path, name: str, layers: int | None, half: bool) -> Path:
    """Writes the model, and samples of tokens."""
    shape, path = SHAPES[name], folder / f"{name}.onnx"
    build = Builder(path.with_suffix(".onnx.data"), half)
    tokens = build.op("Reshape", "tokens", build.constant(np.array([-1])))
    x = build.op("Gather", build.weight(shape.words, shape.width), tokens)
    for _ in range(layers or shape.layers):
        x = build.layer(x, shape)
    x = build.linear(build.norm(x, shape.width), shape.width, shape.words)
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    graph = helper.make_graph(
        build.nodes,
        name,
        [helper.make_tensor_value_info("tokens", TensorProto.INT64, [1, "n"])],
        [helper.make_tensor_value_info(x, kind, ["n", shape.words])],
        build.tensors,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    tokens = np.random.default_rng(1).integers(shape.words, size=(SAMPLES, TOKENS))
    np.savez(path.with_suffix(".npz"), tokens=tokens)
    return path


def run(model: Path, flags: list[str]) -> dict[str, float]:
    """Core-seconds, seconds and the peak of anonymous memory in MB of ``channelfold quantize``."""
    with tempfile.TemporaryDirectory(dir=model.parent) as scratch:
        environment = os.environ | {"TMPDIR": scratch}
        started = time.monotonic()
        command = channelfold("quantize", model, "-o", Path(scratch, "out.onnx"), *flags)
        process = subprocess.Popen(command, env=environment)
        peak = _Peak(process.pid)
        _, code, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(code)
        return {
            "core_s": round(used.ru_utime + used.ru_stime, 1),
            "s": round(time.monotonic() - started, 1),
            "peak_mb": peak.stop(),
            "code": process.returncode,
        }


def gptq(model: Path) -> dict[str, float]:
    """Core-seconds, seconds and the peak of anonymous memory in MB of GPTQ in int4; head and embeddings stay float."""
    data = open_data(str(model.with_suffix(".npz")), [TensorSpec("tokens", np.dtype(np.int64), (1, "n"))])
    graph = files.raise_opset(files.load(model), 21)
    head = [node.name for node in graph.nodes if node.op == "MatMul"][-1]
    step = QuantizeWeights(weights="int4", rounder="gptq", embeddings=False, exclude=(head,), target="onnxruntime")
    peak, begin, started = _Peak(os.getpid()), time.process_time(), time.monotonic()
    step.apply(graph, Context(data))
    return {
        "core_s": round(time.process_time() - begin, 1),
        "s": round(time.monotonic() - started, 1),
        "peak_mb": peak.stop(),
    }


def products(width: int, layers: int, rows: int = 64, rounds: int = 15) -> dict[str, dict[str, float]]:
    """Milliseconds of a chain of products, of 1 row and of many, by the format of the weights; one thread."""
    rng = np.random.default_rng(0)
    nodes = [helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"x{i + 1}"], name=f"/{i}") for i in range(layers)]
    ends = [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, ["n", width]) for i in (0, layers)]
    made = (rng.standard_normal((width, width), np.float32) / width**0.5 for _ in range(layers))
    weights = [numpy_helper.from_array(weight, f"w{i}") for i, weight in enumerate(made)]
    graph = helper.make_graph(nodes, "products", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    spec = TensorSpec("x0", np.dtype(np.float32), (1, width))
    data = open_data({"x0": rng.standard_normal((16, width), np.float32)}, [spec])
    sessions = {"float": files.session(files.import_model(model), threads=1)}
    for name in ("int4", "dgq", "int8"):
        own = files.import_model(model)
        step = QuantizeWeights(weights=name, target="onnxruntime", rounder="nearest")  # pyright: ignore[reportArgumentType]
        step.apply(own, Context(data))
        sessions[name] = files.session(own, threads=1)
    found: dict[str, dict[str, float]] = {}
    for count in (1, rows):
        feed = {"x0": rng.standard_normal((count, width), np.float32)}
        times: dict[str, list[float]] = {name: [] for name in sessions}
        for _ in range(rounds):
            for name, session in sessions.items():
                begin = time.process_time()
                session.run(feed)
                times[name].append(time.process_time() - begin)
        found[f"{count} rows"] = {name: round(1e3 * statistics.median(seen[1:]), 2) for name, seen in times.items()}
    return found


class _Peak:
    """The peak of the anonymous memory of a process, looked at ten times a second."""

    def __init__(self, process: int):
        self._process, self._bytes, self._ended = process, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """In MB."""
        self._ended.set()
        self._thread.join()
        return round(self._bytes / 1e6)

    def _watch(self) -> None:
        while not self._ended.wait(0.1):
            with contextlib.suppress(OSError):
                lines = Path(f"/proc/{self._process}/smaps_rollup").read_text().splitlines()
                found = sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) * 1024
                self._bytes = max(self._bytes, found)


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(dest="command", required=True)
    maker, runner, rounder, multiplier = (commands.add_parser(name) for name in ("make", "run", "gptq", "products"))
    maker.add_argument("dir", type=Path)
    maker.add_argument("shape", choices=SHAPES)
    maker.add_argument("--layers", type=int)
    maker.add_argument("--half", action="store_true")
    for parser in (runner, rounder):
        parser.add_argument("model", type=Path)
    runner.add_argument("flags", nargs="*")
    multiplier.add_argument("--width", type=int, default=2048)
    multiplier.add_argument("--layers", type=int, default=12)
    options = made.parse_args()
    if options.command == "make":
        print(make(options.dir, options.shape, options.layers, options.half))
    elif options.command == "run":
        print(json.dumps(run(options.model, options.flags)))
    elif options.command == "gptq":
        print(json.dumps(gptq(options.model)))
    else:
        print(json.dumps(products(options.width, options.layers), indent=1))


if __name__ == "__main__":
    main()
