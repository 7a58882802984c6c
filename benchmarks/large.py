"""What the weights of large decoders cost to quantize: processor time, wall time and the largest anonymous memory.

    python benchmarks/large.py make DIR SHAPE [--layers N] [--half]      DIR/SHAPE.onnx, its weights and DIR/SHAPE.npz
    python benchmarks/large.py run MODEL [--json FILE] -- FLAG …         channelfold quantize MODEL FLAG …

Decoders have the shapes of TinyLlama (1.1 B) and Llama 2 (7 B), random weights in a file of external data, and no mask,
which changes nothing in what is measured. ``--layers`` makes a few layers of a shape, from which to extrapolate.
"""

from __future__ import annotations

import argparse
import json
import os
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
        process = subprocess.Popen(
            channelfold("quantize", model, "-o", Path(scratch, "out.onnx"), *flags), env=environment
        )
        peak = [0]
        watcher = threading.Thread(target=_watch, args=(process, peak))
        watcher.start()
        _, code, used = os.wait4(process.pid, 0)
        process.returncode = code
        watcher.join()
        return {
            "core_s": round(used.ru_utime + used.ru_stime, 1),
            "s": round(time.monotonic() - started, 1),
            "peak_mb": round(peak[0] / 1e6),
            "code": os.waitstatus_to_exitcode(code),
        }


def _watch(process: subprocess.Popen, peak: list[int]) -> None:
    while process.returncode is None:
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
            found = sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) * 1024
            peak[0] = max(peak[0], found)
        except (OSError, IndexError):
            pass
        time.sleep(0.1)


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(dest="command", required=True)
    maker = commands.add_parser("make")
    maker.add_argument("dir", type=Path)
    maker.add_argument("shape", choices=SHAPES)
    maker.add_argument("--layers", type=int)
    maker.add_argument("--half", action="store_true")
    runner = commands.add_parser("run")
    runner.add_argument("model", type=Path)
    runner.add_argument("flags", nargs="*")
    options = made.parse_args()
    if options.command == "make":
        print(make(options.dir, options.shape, options.layers, options.half))
    else:
        print(json.dumps(run(options.model, options.flags)))


if __name__ == "__main__":
    main()
