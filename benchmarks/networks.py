"""Vision transformers of the sizes in the RePaViT paper with random weights: plain, with idle channels, and folded.

    python benchmarks/networks.py check                                   counts against the paper's table
    python benchmarks/networks.py make DIR NETWORK … [--form plain unfolded folded]     DIR/NETWORK.FORM.onnx

``plain`` is the ordinary network: LayerNormalization, then fc1, GELU, fc2 of every channel. ``unfolded`` is what
RePaViT trains, the way PyTorch exports it: a BatchNormalization before fc1, a Where that lets the idle channels around
the GELU, another BatchNormalization before fc2. ``folded`` is what it is deployed as: one dense layer on the residual
stream beside the active channels. Here it is written directly; ``channelfold reparam`` makes it of ``unfolded``.

Weights are streamed to one file of external data, ViT-H's 2.5 GB too, so a network needs the memory of one layer. With
``weights=False`` that file is a hole in the disk: the network has its shapes, and zeros.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Form = Literal["plain", "unfolded", "folded"]
FORMS: tuple[Form, ...] = get_args(Form)
RHO, CLASSES, IMAGE, WINDOW = 4, 1000, 224, 7
_INLINE, _PAGE = 1024, 4096  # bytes: smaller constants stay in the model; larger ones begin on a page of their own


@dataclass(frozen=True)
class Vit:
    """A ViT or DeiT of ``depth`` blocks for 224 x 224 images; heads are 64 channels wide unless ``heads`` is given."""

    width: int
    depth: int
    patch: int = 16
    heads: int = 0


@dataclass(frozen=True)
class Swin:
    """A Swin transformer with windows of 7 x 7 for 224 x 224 images; heads are 32 channels wide."""

    width: int
    depths: tuple[int, ...]


@dataclass(frozen=True)
class Network:
    """A network, its share of idle FFN channels, and what the paper gives for it.

    M parameters and GMACs before and after the fold; images per second of the folded network against the plain one's.
    """

    shape: Vit | Swin
    theta: float
    parameters: tuple[float, float] | None = None
    gmacs: tuple[float, float] | None = None
    speedup: float | None = None


# Table 1 of the paper, its speeds on an A6000 with batches of 128. Its MACs leave out the two products of activations
# in attention. Its ViT-H has patches of 16: with those of 14 (vit_h14) it takes 161.9 GMACs and has 632.0 M parameters.
NETWORKS = {
    "deit_t": Network(Vit(192, 12), 0.50, (5.7, 4.4), (1.1, 0.8), 1.165),
    "deit_s": Network(Vit(384, 12), 0.50, (22.1, 16.7), (4.3, 3.2), 1.230),
    "deit_b": Network(Vit(768, 12), 0.75, (86.6, 51.1), (16.9, 9.9), 1.578),
    "vit_l": Network(Vit(1024, 24), 0.75, (304.3, 178.4), (59.7, 34.9), 1.668),
    "vit_h": Network(Vit(1280, 32, heads=16), 0.75, (632.2, 369.9), (124.3, 72.6), 1.687),
    "vit_h14": Network(Vit(1280, 32, patch=14, heads=16), 0.75),
    "swin_t": Network(Swin(96, (2, 2, 6, 2)), 0.75, (28.3, 17.5), (4.4, 2.6), 1.269),
    "swin_s": Network(Swin(96, (2, 2, 18, 2)), 0.75, (49.6, 29.9), (8.6, 5.1), 1.331),
    "swin_b": Network(Swin(128, (2, 2, 18, 2)), 0.75, (87.8, 52.8), (15.2, 9.0), 1.432),
}


@dataclass
class Builder:
    """A graph under construction whose large weights go to ``data`` at once; every method names the tensor it made."""

    data: Any
    random: np.random.Generator | None
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)

    def constant(self, value: np.ndarray) -> str:
        """A small constant, or a large one whose values are not random."""
        name = f"constant_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(value, name))
        return name

    def integers(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def weight(self, *shape: int, std: float = 0.02, mean: float = 0.0, identity: bool = False) -> str:
        """float32 random numbers, on top of an identity if asked for; zeros in a network without weights."""
        name, size = f"weight_{len(self.initializers)}", 4 * int(np.prod(shape))
        if size < _INLINE:
            self.initializers.append(numpy_helper.from_array(self._values(shape, std, mean, identity), name))
            return name
        offset = self.data.seek(-(-self.data.tell() // _PAGE) * _PAGE)
        if self.random is not None:
            self._values(shape, std, mean, identity).tofile(self.data)
        else:
            self.data.truncate(self.data.seek(offset + size))
        proto = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", Path(self.data.name).name), ("offset", offset), ("length", size)):
            proto.external_data.add(key=key, value=str(value))
        self.initializers.append(proto)
        return name

    def _values(self, shape: Sequence[int], std: float, mean: float, identity: bool) -> np.ndarray:
        if self.random is None:
            return np.zeros(shape, np.float32)
        values = self.random.standard_normal(shape, np.float32)
        values *= np.float32(std)
        values += np.eye(*shape, dtype=np.float32) if identity else np.float32(mean)
        return values

    def op(self, kind: str, *inputs: str, output: str = "", outputs: int = 1, **attributes: Any) -> Any:
        name = output or f"{kind.lower()}_{len(self.nodes)}"
        names = [name] if outputs == 1 else [f"{name}_{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, name=f"/{name}", **attributes))
        return name if outputs == 1 else names

    def linear(self, x: str, inputs: int, outputs: int, *, bias: bool = True, gain: float = 1.0, **how: Any) -> str:
        product = self.op("MatMul", x, self.weight(inputs, outputs, std=gain / np.sqrt(inputs), **how))
        return self.op("Add", product, self.weight(outputs)) if bias else product

    def layer_norm(self, x: str, width: int) -> str:
        scale, bias = self.weight(width, std=0.1, mean=1), self.weight(width)
        return self.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=1e-6)

    def batch_norm(self, x: str, width: int) -> str:
        """Over the last axis, which PyTorch moves to the place of channels and back."""
        scale, bias, mean = self.weight(width, std=0.1, mean=1), self.weight(width), self.weight(width)
        variance = self.weight(width, std=0.05, mean=1)
        channels_first = self.op("Transpose", x, perm=[0, 2, 1])
        normed = self.op("BatchNormalization", channels_first, scale, bias, mean, variance, epsilon=1e-5)
        return self.op("Transpose", normed, perm=[0, 2, 1])

    def split_heads(self, x: str, groups: int, tokens: int, heads: int, size: int) -> list[str]:
        """q, k and v as [groups, heads, tokens, size] from one product [groups, tokens, 3 * heads * size]."""
        apart = self.op("Reshape", x, self.integers(groups, tokens, 3, heads, size))
        apart = self.op("Transpose", apart, perm=[2, 0, 3, 1, 4])
        parts = self.op("Split", apart, axis=0, num_outputs=3, outputs=3)
        axis = self.integers(0)
        return [self.op("Squeeze", part, axis) for part in parts]

    def attention(self, x: str, width: int, *, groups: int, tokens: int, heads: int, bias: str = "") -> str:
        """Self-attention in ``groups`` separate groups of tokens; ``bias`` is added to its scores."""
        size = width // heads
        query, key, value = self.split_heads(self.linear(x, width, 3 * width), groups, tokens, heads, size)
        query = self.op("Mul", query, self.constant(np.array(size**-0.5, np.float32)))
        scores = self.op("MatMul", query, self.op("Transpose", key, perm=[0, 1, 3, 2]))
        scores = self.op("Add", scores, bias) if bias else scores
        mixed = self.op("MatMul", self.op("Softmax", scores, axis=-1), value)
        mixed = self.op("Transpose", mixed, perm=[0, 2, 1, 3])
        return self.linear(self.op("Reshape", mixed, self.integers(groups, tokens, width)), width, width, gain=0.5)

    def feed_forward(self, x: str, width: int, tokens: int, theta: float, form: Form) -> str:
        """The pre-norm FFN with its shortcut, x float32[1, tokens, width]."""
        hidden = RHO * width
        active = int(np.ceil(hidden * (1 - theta)))
        if form == "plain":
            h = self.op("Gelu", self.linear(self.layer_norm(x, width), width, hidden))
            return self.op("Add", x, self.linear(h, hidden, width, gain=0.5))
        if form == "unfolded":
            h = self.linear(self.batch_norm(x, width), width, hidden, gain=0.5)
            mask = np.broadcast_to(np.arange(hidden) < active, (1, tokens, hidden))
            h = self.op("Where", self.constant(np.ascontiguousarray(mask)), self.op("Gelu", h), h)
            return self.op("Add", x, self.linear(self.batch_norm(h, hidden), hidden, width, gain=0.5))
        h = self.op("Gelu", self.linear(x, width, active, gain=0.5))
        out = self.linear(h, active, width, gain=0.5, bias=False)
        return self.op("Add", out, self.linear(x, width, width, gain=0.3, identity=True))


def vit(build: Builder, shape: Vit, theta: float, form: Form) -> None:
    width, side = shape.width, IMAGE // shape.patch
    tokens = side * side + 1
    x = patches(build, width, shape.patch)
    x = build.op("Concat", build.weight(1, 1, width, std=0.5), x, axis=1)
    x = build.op("Add", x, build.weight(1, tokens, width, std=0.3))
    for _ in range(shape.depth):
        normed = build.layer_norm(x, width)
        heads = shape.heads or width // 64
        x = build.op("Add", x, build.attention(normed, width, groups=1, tokens=tokens, heads=heads))
        x = build.feed_forward(x, width, tokens, theta, form)
    x = build.op("Gather", build.layer_norm(x, width), build.constant(np.array(0)), axis=1)
    head(build, x, width)


def patches(build: Builder, width: int, size: int) -> str:
    """float32[1, tokens, width] from the image."""
    weight, bias = build.weight(width, 3, size, size, std=1 / (size * np.sqrt(3))), build.weight(width)
    x = build.op("Conv", "input", weight, bias, kernel_shape=[size, size], strides=[size, size])
    tokens = (IMAGE // size) ** 2
    return build.op("Transpose", build.op("Reshape", x, build.integers(1, width, tokens)), perm=[0, 2, 1])


def head(build: Builder, x: str, width: int) -> None:
    build.op("Gemm", x, build.weight(CLASSES, width), build.weight(CLASSES), output="output", transB=1)


def swin(build: Builder, shape: Swin, theta: float, form: Form) -> None:
    width, side = shape.width, IMAGE // 4
    x = build.layer_norm(patches(build, width, 4), width)
    index = build.constant(_relative_positions())
    for stage, depth in enumerate(shape.depths):
        if stage:
            x = merge_patches(build, x, width, side)
            width, side = 2 * width, side // 2
        for block in range(depth):
            shift = WINDOW // 2 if block % 2 and side > WINDOW else 0
            x = build.op("Add", x, window_attention(build, build.layer_norm(x, width), width, side, shift, index))
            x = build.feed_forward(x, width, side * side, theta, form)
    x = build.op("ReduceMean", build.layer_norm(x, width), build.integers(1), keepdims=0)
    head(build, x, width)


def merge_patches(build: Builder, x: str, width: int, side: int) -> str:
    """Four neighbours become one token of twice the width."""
    half = side // 2
    x = build.op("Reshape", x, build.integers(1, half, 2, half, 2, width))
    x = build.op("Transpose", x, perm=[0, 1, 3, 4, 2, 5])
    x = build.layer_norm(build.op("Reshape", x, build.integers(1, half * half, 4 * width)), 4 * width)
    return build.linear(x, 4 * width, 2 * width, bias=False)


def window_attention(build: Builder, x: str, width: int, side: int, shift: int, index: str) -> str:
    """Attention within windows of 7 x 7 tokens, of the image moved by ``shift``; x float32[1, side * side, width]."""
    across, tokens, heads = side // WINDOW, WINDOW * WINDOW, width // 32
    x = roll(build, build.op("Reshape", x, build.integers(1, side, side, width)), shift)
    x = build.op("Reshape", x, build.integers(1, across, WINDOW, across, WINDOW, width))
    x = build.op("Transpose", x, perm=[0, 1, 3, 2, 4, 5])
    x = build.op("Reshape", x, build.integers(across * across, tokens, width))
    bias = build.op("Gather", build.weight((2 * WINDOW - 1) ** 2, heads), index, axis=0)
    bias = build.op("Transpose", build.op("Reshape", bias, build.integers(tokens, tokens, heads)), perm=[2, 0, 1])
    bias = build.op("Unsqueeze", bias, build.integers(0))
    if shift:
        apart = build.op("Cast", build.constant(_across_the_edge(side, shift)), to=TensorProto.FLOAT)
        bias = build.op("Add", bias, build.op("Mul", apart, build.constant(np.array(-100, np.float32))))
    x = build.attention(x, width, groups=across * across, tokens=tokens, heads=heads, bias=bias)
    x = build.op("Reshape", x, build.integers(1, across, across, WINDOW, WINDOW, width))
    x = build.op("Transpose", x, perm=[0, 1, 3, 2, 4, 5])
    x = roll(build, build.op("Reshape", x, build.integers(1, side, side, width)), side - shift if shift else 0)
    return build.op("Reshape", x, build.integers(1, side * side, width))


def roll(build: Builder, x: str, shift: int) -> str:
    """Both axes of x[1, side, side, width] moved to the front by ``shift``."""
    for axis in (1, 2) if shift else ():
        at, end, start, axes = (build.integers(n) for n in (shift, np.iinfo(np.int64).max, 0, axis))
        x = build.op("Concat", build.op("Slice", x, at, end, axes), build.op("Slice", x, start, at, axes), axis=axis)
    return x


def _relative_positions() -> np.ndarray:
    """int64[49 * 49]: the row of the table of biases that belongs to each pair of places in a window."""
    y, x = np.divmod(np.arange(WINDOW * WINDOW), WINDOW)
    return ((y[:, None] - y + WINDOW - 1) * (2 * WINDOW - 1) + x[:, None] - x + WINDOW - 1).ravel()


def _across_the_edge(side: int, shift: int) -> np.ndarray:
    """bool[windows, 1, 49, 49]: the pairs that only the roll has made neighbours."""
    part = np.digitize(np.arange(side), [side - WINDOW, side - shift])
    parts = (3 * part[:, None] + part).reshape(side // WINDOW, WINDOW, side // WINDOW, WINDOW)
    parts = parts.transpose(0, 2, 1, 3).reshape(-1, 1, WINDOW * WINDOW)
    return parts[..., None] != parts[:, :, None, :]


def make(name: str, form: Form, path: Path, *, weights: bool = True, depth: int | None = None) -> Path:
    """Writes a network to ``path`` and ``path.data``. ``depth``: so many blocks of a ViT instead of all."""
    network = NETWORKS[name]
    shape = network.shape
    with path.with_name(f"{path.name}.data").open("wb") as data:
        build = Builder(data, np.random.default_rng(0) if weights else None)
        if isinstance(shape, Swin):
            swin(build, shape, network.theta, form)
        else:
            vit(build, Vit(shape.width, depth or shape.depth, shape.patch, shape.heads), network.theta, form)
    image = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, IMAGE, IMAGE])
    scores = helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, CLASSES])
    graph = helper.make_graph(build.nodes, name, [image], [scores], build.initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


@dataclass(frozen=True)
class Counts:
    """Parameters, and MACs of an image: of the layers, and of the products of two activations in attention."""

    parameters: int
    macs: int
    attention: int


def counts(path: Path) -> Counts:
    """Of a network in a file, as ``channelfold inspect`` counts them."""
    from channelfold.runtime.io.files import load
    from channelfold.runtime.jobs.inspect_model import inspect

    found = inspect(path, load(path))
    layers = sum(node["macs"] for node in found["linears"] if node["shape"] is not None)
    return Counts(found["parameters"], layers, found["macs"] - layers)


def agrees(network: Network, plain: Counts, folded: Counts) -> bool:
    """Whether the counts are the paper's, which rounds to 0.1 M and 0.1 G; true of a network that it does not have.

    It seems to count half a percent more MACs, for norms and biases, which no layer's product contains.
    """
    if network.parameters is None or network.gmacs is None:
        return True
    return all(
        abs(found.parameters / 1e6 - parameters) < 0.06 and 0.995 * gmacs - 0.05 < found.macs / 1e9 < gmacs + 0.05
        for found, parameters, gmacs in zip((plain, folded), network.parameters, network.gmacs, strict=True)
    )


def change(pair: tuple[float, float] | None, digits: int = 1) -> str:
    return "-" if pair is None else f"{pair[0]:.{digits}f} -> {pair[1]:.{digits}f}"


def check() -> bool:
    """Prints the counts of every network, plain and folded, beside the paper's; whether all of them agree."""
    import tempfile

    from harness import table

    rows, agreed = [], True
    for name, network in NETWORKS.items():
        with tempfile.TemporaryDirectory() as folder:
            plain, folded = (counts(make(name, f, Path(folder, f), weights=False)) for f in ("plain", "folded"))
        agreed &= agrees(network, plain, folded)
        rows.append(
            (
                name,
                change((plain.parameters / 1e6, folded.parameters / 1e6), digits=2),
                change(network.parameters),
                change((plain.macs / 1e9, folded.macs / 1e9), digits=2),
                change(network.gmacs),
            )
        )
    print(table(("network", "parameters, M", "paper", "GMACs", "paper"), rows))
    return agreed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check")
    making = commands.add_parser("make")
    making.add_argument("folder", type=Path, metavar="DIR")
    making.add_argument("networks", nargs="+", choices=NETWORKS, metavar="NETWORK")
    making.add_argument("--form", nargs="+", choices=FORMS, default=FORMS)
    arguments = parser.parse_args()
    if arguments.command == "check":
        sys.exit(None if check() else "These are not the paper's networks")
    else:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        for network_name in arguments.networks:
            for form_name in arguments.form:
                print(make(network_name, form_name, arguments.folder / f"{network_name}.{form_name}.onnx"))
