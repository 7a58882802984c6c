"""Float32 models with the shapes of ResNet-50, ViT-B/16 and BERT-base and random weights, for measuring speed.

    python benchmarks/shapes.py make DIR     DIR/{resnet50,vit,bert}.onnx; beside each .calibration.npz and .test.npz

The graphs look like exported ones: batch 1, initializers for weights, BERT and ViT with decomposed attention and GELU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CALIBRATION, TEST = 64, 16
TOKENS, WORDS = 128, 30522


@dataclass
class Builder:
    """A graph under construction; every method returns the name of the tensor it made."""

    rng: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: dict[str, onnx.TensorProto] = field(default_factory=dict)

    def constant(self, value: np.ndarray) -> str:
        name = f"weight_{len(self.initializers)}"
        self.initializers[name] = numpy_helper.from_array(value, name)
        return name

    def scalar(self, value: float) -> str:
        return self.constant(np.array(value, np.float32))

    def integers(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def normal(self, *shape: int, std: float, mean: float = 0.0) -> str:
        return self.constant(np.float32(mean) + self.rng.standard_normal(shape, np.float32) * np.float32(std))

    def op(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        name = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output or name], name=f"/{name}", **attributes))
        return output or name

    def model(self, name: str, inputs: list[onnx.ValueInfoProto], width: int) -> onnx.ModelProto:
        output = helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, width])
        graph = helper.make_graph(self.nodes, name, inputs, [output], list(self.initializers.values()))
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model)
        return onnx.shape_inference.infer_shapes(model)


def image_input() -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, 224, 224])


def resnet50() -> onnx.ModelProto:
    build = Builder(np.random.default_rng(1))
    x = conv_relu(build, "input", 3, 64, 7, stride=2)
    x = build.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    channels = 64
    for width, blocks, first_stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            stride = 1 if block else first_stride
            skip = x if block else conv(build, x, channels, 4 * width, 1, stride)
            y = conv_relu(build, x, channels, width, 1)
            y = conv_relu(build, y, width, width, 3, stride)
            # A weaker branch keeps activations in a sane range through 16 blocks.
            y = conv(build, y, width, 4 * width, 1, gain=0.3)
            x = build.op("Relu", build.op("Add", y, skip))
            channels = 4 * width
    x = build.op("Flatten", build.op("GlobalAveragePool", x), axis=1)
    head, bias = build.normal(1000, 2048, std=0.02), build.normal(1000, std=0)
    build.op("Gemm", x, head, bias, output="output", transB=1)
    return build.model("resnet50", [image_input()], 1000)


def conv(build: Builder, x: str, inputs: int, outputs: int, size: int, stride: int = 1, gain: float = 1.0) -> str:
    weight = build.normal(outputs, inputs, size, size, std=gain * np.sqrt(2 / (inputs * size * size)))
    bias = build.normal(outputs, std=0.02)
    pads = [size // 2] * 4
    return build.op("Conv", x, weight, bias, kernel_shape=[size, size], strides=[stride, stride], pads=pads)


def conv_relu(build: Builder, x: str, inputs: int, outputs: int, size: int, stride: int = 1) -> str:
    return build.op("Relu", conv(build, x, inputs, outputs, size, stride))


@dataclass(frozen=True)
class Encoder:
    """Twelve transformer layers of width 768 over ``tokens`` tokens; ``mask`` is added to the attention scores."""

    build: Builder
    tokens: int
    epsilon: float
    mask: str = ""
    width: int = 768
    heads: int = 12
    hidden: int = 3072
    layers: int = 12

    def pre_norm(self, x: str) -> str:
        for _ in range(self.layers):
            x = self.build.op("Add", x, self.attention(self.norm(x)))
            x = self.build.op("Add", x, self.feed_forward(self.norm(x)))
        return self.norm(x)

    def post_norm(self, x: str) -> str:
        for _ in range(self.layers):
            x = self.norm(self.build.op("Add", x, self.attention(x)))
            x = self.norm(self.build.op("Add", x, self.feed_forward(x)))
        return x

    def norm(self, x: str) -> str:
        scale, bias = self.build.normal(self.width, std=0.1, mean=1), self.build.normal(self.width, std=0.02)
        return self.build.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=self.epsilon)

    def linear(self, x: str, inputs: int, outputs: int) -> str:
        product = self.build.op("MatMul", x, self.build.normal(inputs, outputs, std=1 / np.sqrt(inputs)))
        return self.build.op("Add", self.build.normal(outputs, std=0.02), product)

    def attention(self, x: str) -> str:
        build, size = self.build, self.width // self.heads
        split = build.integers(0, self.tokens, self.heads, size)
        query, key, value = (
            build.op("Transpose", build.op("Reshape", self.linear(x, self.width, self.width), split), perm=order)
            for order in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
        )
        scores = build.op("Mul", build.op("MatMul", query, key), build.scalar(1 / np.sqrt(size)))
        scores = build.op("Add", scores, self.mask) if self.mask else scores
        mixed = build.op("MatMul", build.op("Softmax", scores, axis=-1), value)
        joined = build.op("Transpose", mixed, perm=[0, 2, 1, 3])
        joined = build.op("Reshape", joined, build.integers(0, self.tokens, self.width))
        return self.linear(joined, self.width, self.width)

    def feed_forward(self, x: str) -> str:
        build, inner = self.build, self.linear(x, self.width, self.hidden)
        gate = build.op("Erf", build.op("Div", inner, build.scalar(np.sqrt(2))))
        gelu = build.op("Mul", inner, build.op("Add", gate, build.scalar(1)))
        return self.linear(build.op("Mul", gelu, build.scalar(0.5)), self.hidden, self.width)


def vit() -> onnx.ModelProto:
    build = Builder(np.random.default_rng(2))
    patches, bias = build.normal(768, 3, 16, 16, std=1 / np.sqrt(768)), build.normal(768, std=0)
    x = build.op("Conv", "input", patches, bias, kernel_shape=[16, 16], strides=[16, 16])
    x = build.op("Transpose", build.op("Reshape", x, build.integers(0, 768, 196)), perm=[0, 2, 1])
    x = build.op("Concat", build.normal(1, 1, 768, std=0.5), x, axis=1)
    x = build.op("Add", x, build.normal(1, 197, 768, std=0.3))
    x = Encoder(build, tokens=197, epsilon=1e-6).pre_norm(x)
    x = build.op("Gather", x, build.constant(np.array(0)), axis=1)
    build.op("Gemm", x, build.normal(768, 1000, std=0.02), build.normal(1000, std=0), output="output")
    return build.model("vit", [image_input()], 1000)


def bert() -> onnx.ModelProto:
    build = Builder(np.random.default_rng(3))
    x = build.op("Gather", build.normal(WORDS, 768, std=0.5), "input_ids", axis=0)
    x = build.op("Add", x, build.normal(1, TOKENS, 768, std=0.2))
    mask = build.op("Unsqueeze", build.op("Cast", "attention_mask", to=TensorProto.FLOAT), build.integers(1, 2))
    mask = build.op("Mul", build.op("Sub", build.scalar(1), mask), build.scalar(-10000))
    encoder = Encoder(build, tokens=TOKENS, epsilon=1e-12, mask=mask)
    x = encoder.post_norm(encoder.norm(x))
    x = build.op("Gather", x, build.constant(np.array(0)), axis=1)
    pooled = build.op("Gemm", x, build.normal(768, 768, std=0.03), build.normal(768, std=0))
    build.op("Tanh", pooled, output="output")
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, [1, TOKENS]) for name in ("input_ids", "attention_mask")
    ]
    return build.model("bert", inputs, 768)


def images(n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Coarse structure and noise, with the spread of normalised photographs."""
    coarse = rng.standard_normal((n, 3, 14, 14), np.float32).repeat(16, 2).repeat(16, 3)
    return {"input": coarse + np.float32(0.5) * rng.standard_normal((n, 3, 224, 224), np.float32)}


def token_ids(n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"input_ids": rng.integers(0, WORDS, (n, TOKENS)), "attention_mask": np.ones((n, TOKENS), np.int64)}


Samples = Callable[[int, np.random.Generator], dict[str, np.ndarray]]
SHAPES: dict[str, tuple[Callable[[], onnx.ModelProto], Samples]] = {
    "resnet50": (resnet50, images),
    "vit": (vit, images),
    "bert": (bert, token_ids),
}


def make(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (model, samples) in SHAPES.items():
        onnx.save(model(), folder / f"{name}.onnx")
        for use, n, seed in (("calibration", CALIBRATION, 10), ("test", TEST, 999)):
            np.savez(folder / f"{name}.{use}.npz", **samples(n, np.random.default_rng(seed)))  # pyright: ignore[reportArgumentType]
        print(folder / f"{name}.onnx")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["make"])
    parser.add_argument("folder", type=Path, metavar="DIR")
    make(parser.parse_args().folder)
