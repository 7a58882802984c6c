"""Hypothesis strategies: random networks of the blocks that real ones are made of, for cutting channels.

A network grows block by block, in float32, with weights that keep activations near one. What a block is given is an
image (N, C, H, W), tokens (N, S, C) or a vector (N, C); the last output is a layer's, or now and then anything's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

OPSET = 17


@dataclass(frozen=True)
class Value:
    name: str
    shape: tuple[int, ...]


class _Network:
    def __init__(self, draw, seed: int):
        self.draw = draw
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}

    def pick(self, *choices):
        return self.draw(st.sampled_from(choices))

    def chance(self) -> bool:
        return self.draw(st.booleans())

    def constant(self, values) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = np.asarray(values)
        return name

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def weight(self, *shape: int, fan: int = 1) -> str:
        """A weight, now and then shared with an earlier node, or behind a Transpose or Identity."""
        values = (self.rng.standard_normal(shape) / math.sqrt(fan)).astype(np.float32)
        same = [n for n, v in self.constants.items() if v.shape == shape and v.dtype == np.float32]
        match self.pick(*["plain"] * 6, "shared", "transposed", "identity"):
            case "shared" if same:
                return self.pick(*same)
            case "transposed":
                perm = list(range(len(shape)))[::-1]
                return self.add("Transpose", [self.constant(values.transpose())], shape, perm=perm).name
            case "identity":
                return self.add("Identity", [self.constant(values)], shape).name
        return self.constant(values)

    def vector(self, size: int) -> str:
        return self.constant(self.rng.uniform(0.5, 1.5, size).astype(np.float32))

    def add(self, op: str, inputs, *shapes: tuple[int, ...], **attrs) -> Value:
        return self.several(op, inputs, *shapes, **attrs)[0]

    def several(self, op: str, inputs, *shapes: tuple[int, ...], **attrs) -> list[Value]:
        names = [i.name if isinstance(i, Value) else i for i in inputs]
        made = [Value(f"{op.lower()}{len(self.nodes)}_{k}", tuple(shape)) for k, shape in enumerate(shapes)]
        self.nodes.append(helper.make_node(op, names, [v.name for v in made], f"n{len(self.nodes)}_{op}", **attrs))
        return made

    def reshape(self, x: Value, *shape: int) -> Value:
        """To a shape written with 0 or -1 here and there, or put together at run time from the Shape of x."""
        target = list(shape)
        match self.pick("plain", "plain", "zeros", "rest", "computed"):
            case "zeros":
                target = [0 if k < len(x.shape) and x.shape[k] == n else n for k, n in enumerate(shape)]
            case "rest":
                target[self.pick(*range(len(target)))] = -1
            case "computed":
                return self.add("Reshape", [x, self.sizes(x, shape)], shape)
        return self.add("Reshape", [x, self.ints(*target)], shape)

    def sizes(self, x: Value, shape: tuple[int, ...]) -> Value:
        pieces: list = []
        whole = self.add("Shape", [x], (len(x.shape),))
        for n in shape:
            if n in x.shape and self.chance():
                index = self.constant(np.array(x.shape.index(n), np.int64))
                length = self.add("Gather", [whole, index], (), axis=0)
                pieces.append(self.add("Unsqueeze", [length, self.ints(0)], (1,)))
            else:
                pieces.append(self.ints(n))
        return self.add("Concat", pieces, (len(shape),), axis=0)


# ---- images -------------------------------------------------------------------------------------------------------


def conv(b: _Network, x: Value, outs: int | None = None) -> Value:
    n, c, h, w = x.shape
    groups = b.pick(1, 1, 1, *(g for g in (2, 3) if c % g == 0))
    if outs is not None and outs % groups:
        groups = 1
    outs = groups * b.pick(1, 2, 3, 4) if outs is None else outs
    k = b.pick(1, 3)
    inputs = [x, b.weight(outs, c // groups, k, k, fan=c // groups * k * k), *([b.vector(outs)] if b.chance() else [])]
    return b.add("Conv", inputs, (n, outs, h, w), group=groups, pads=[k // 2] * 4)


def transposed(b: _Network, x: Value) -> Value:
    n, c, h, w = x.shape
    groups = b.pick(1, c, *(g for g in (2, 3) if c % g == 0))
    outs = groups * b.pick(1, 2)
    stride = b.pick(1, 2)
    weight = b.weight(c, outs // groups, stride, stride, fan=c // groups)
    return b.add("ConvTranspose", [x, weight, *([b.vector(outs)] if b.chance() else [])],
                 (n, outs, h * stride, w * stride), group=groups, strides=[stride] * 2)  # fmt: skip


def depthwise(b: _Network, x: Value) -> Value:
    n, c, h, w = x.shape
    outs = c * b.pick(1, 1, 2)
    inputs = [x, b.weight(outs, 1, 3, 3, fan=9), *([b.vector(outs)] if b.chance() else [])]
    return b.add("Conv", inputs, (n, outs, h, w), group=c, pads=[1] * 4)


def batch_norm(b: _Network, x: Value) -> Value:
    return b.add("BatchNormalization", [x, *(b.vector(x.shape[1]) for _ in range(4))], x.shape)


def instance_norm(b: _Network, x: Value) -> Value:
    return b.add("InstanceNormalization", [x, b.vector(x.shape[1]), b.vector(x.shape[1])], x.shape, epsilon=1e-2)


def group_norm(b: _Network, x: Value) -> Value:
    n, c, h, w = x.shape
    groups = b.pick(*(g for g in range(1, c + 1) if c % g == 0))
    split = b.reshape(x, n, groups, c // groups * h * w)
    norm = b.add("InstanceNormalization", [split, b.vector(groups), b.vector(groups)], split.shape, epsilon=1e-2)
    return b.reshape(norm, *x.shape)


def pool(b: _Network, x: Value) -> Value:
    n, c, h, w = x.shape
    if b.chance():
        return b.add(b.pick("GlobalAveragePool", "GlobalMaxPool"), [x], (n, c, 1, 1))
    op = b.pick("MaxPool", "AveragePool")
    return b.add(op, [x], (n, c, h, w), kernel_shape=[3, 3], pads=[1] * 4)


def residual(b: _Network, x: Value) -> Value:
    inner = conv(b, activation(b, conv(b, x)), x.shape[1])
    return b.add(b.pick("Add", "Sub", "Mul"), [x, inner] if b.chance() else [inner, x], x.shape)


def branches(b: _Network, x: Value) -> Value:
    parts = [conv(b, x) if b.pick(True, True, False) else x for _ in range(b.pick(2, 3))]
    return joined(b, parts, 1)


def joined(b: _Network, parts: list[Value], axis: int) -> Value:
    shape = list(parts[0].shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    return b.add("Concat", parts, tuple(shape), axis=b.pick(axis, axis - len(shape)))


def parted(b: _Network, x: Value, axis: int) -> list[Value]:
    """Two parts, by Split or by Slices."""
    size = x.shape[axis]
    first = b.pick(*range(1, size)) if size > 1 and b.chance() else size // 2
    if first == 0:
        return [x]
    shapes = [tuple(n if k == axis else m for k, m in enumerate(x.shape)) for n in (first, size - first)]
    if b.chance():
        return b.several("Split", [x, b.ints(first, size - first)], *shapes, axis=axis)
    ends = [b.pick(first, first - size), b.pick(size, 2**31 - 1)]
    return [
        b.add("Slice", [x, b.ints(start), b.ints(end), b.ints(axis)], shape)
        for start, end, shape in zip((0, first), ends, shapes, strict=True)
    ]


def split(b: _Network, x: Value) -> Value:
    parts = parted(b, x, 1)
    parts = [b.pick(conv, activation, depthwise)(b, part) if b.chance() else part for part in parts]
    return joined(b, parts[::-1] if b.chance() else parts, 1)


def shuffle(b: _Network, x: Value) -> Value:
    n, c, h, w = x.shape
    groups = b.pick(*(g for g in range(1, c + 1) if c % g == 0))
    split = b.reshape(x, n, groups, c // groups, h, w)
    moved = b.add("Transpose", [split], (n, c // groups, groups, h, w), perm=[0, 2, 1, 3, 4])
    return b.reshape(moved, *x.shape)


def permute(b: _Network, x: Value) -> Value:
    c = x.shape[1]
    index = (
        b.draw(st.permutations(range(c)))
        if b.chance()
        else b.draw(st.lists(st.integers(-c, c - 1), min_size=1, max_size=c))
    )
    return b.add("Gather", [x, b.ints(*index)], (x.shape[0], len(index), *x.shape[2:]), axis=1)


def gate(b: _Network, x: Value) -> Value:
    n, c, _, _ = x.shape
    mean = b.add("GlobalAveragePool", [x], (n, c, 1, 1)) if b.chance() else b.add(
        "ReduceMean", [x], (n, c, 1, 1), axes=[2, 3])  # fmt: skip
    inner = activation(b, conv(b, mean))
    factor = b.add("Sigmoid", [conv(b, inner, c)], (n, c, 1, 1))
    return b.add("Mul", [x, factor] if b.chance() else [factor, x], x.shape)


def resize(b: _Network, x: Value) -> Value:
    n, c, h, w = x.shape
    none = b.constant(np.zeros(0, np.float32))
    if b.chance():
        scales = b.constant(np.array([1, 1, 2, 1], np.float32))
        return b.add("Resize", [x, none, scales], (n, c, 2 * h, w), mode="nearest")
    target = (n, c, h, w + 1)
    sizes = b.sizes(x, target) if b.chance() else b.ints(*target)
    return b.add("Resize", [x, none, none, sizes], target, mode=b.pick("nearest", "linear"))


def pad(b: _Network, x: Value) -> Value:
    n, c, h, w = x.shape
    grown = b.pick(0, 0, 0, 1)
    return b.add("Pad", [x, b.ints(0, 0, 1, 0, 0, grown, 0, 1)], (n, c + grown, h + 1, w + 1), mode="constant")


def depth_to_space(b: _Network, x: Value) -> Value:
    n, c, h, w = x.shape
    if c % 4 == 0:
        return b.add("DepthToSpace", [x], (n, c // 4, 2 * h, 2 * w), blocksize=2, mode=b.pick("DCR", "CRD"))
    if h % 2 or w % 2:
        return x
    return b.add("SpaceToDepth", [x], (n, 4 * c, h // 2, w // 2), blocksize=2)


def image_to_tokens(b: _Network, x: Value) -> Value:
    n, c, h, w = x.shape
    flat = b.reshape(x, n, c, h * w)
    return b.add("Transpose", [flat], (n, h * w, c), perm=[0, 2, 1])


def image_to_vector(b: _Network, x: Value) -> Value:
    n, c, h, w = x.shape
    if b.chance():
        return b.add("ReduceMean", [x], (n, c), axes=[2, 3], keepdims=0)
    return b.add("Flatten", [x], (n, c * h * w)) if b.chance() else b.reshape(x, n, c * h * w)


# ---- any rank: channels along axis 1 of images, and along the last of the others ------------------------------------


def activation(b: _Network, x: Value) -> Value:
    op = b.pick("Relu", "Sigmoid", "LeakyRelu", "PRelu", "Clip", "Tanh", "Softplus", "Abs", "Identity")
    inputs: list = [x]
    if op == "PRelu":
        inputs.append(by_channel(b, x))
    if op == "Clip":
        inputs += [b.constant(np.float32(-0.5)), b.constant(np.float32(0.5))]
    return b.add(op, inputs, x.shape)


def by_channel(b: _Network, x: Value) -> str:
    """A constant that broadcasts along all axes but the channels."""
    size = x.shape[1] if len(x.shape) == 4 else x.shape[-1]
    shape = (size, 1, 1) if len(x.shape) == 4 else (size,)
    return b.constant(b.rng.uniform(0.5, 1.5, shape).astype(np.float32))


def arithmetic(b: _Network, x: Value) -> Value:
    other = by_channel(b, x) if b.pick(True, True, False) else b.constant(np.float32(0.7))
    op = b.pick("Add", "Mul", "Sub", "Max")
    return b.add(op, [x, other] if b.chance() else [other, x], x.shape)


def softmax(b: _Network, x: Value) -> Value:
    return b.add("Softmax", [x], x.shape, axis=b.pick(*range(1, len(x.shape))))


# ---- tokens and vectors -------------------------------------------------------------------------------------------


def dense(b: _Network, x: Value, outs: int | None = None) -> Value:
    *rest, c = x.shape
    outs = outs or b.pick(2, 4, 6, 8, 12)
    if len(x.shape) == 2 and b.chance():
        flipped = b.pick(0, 1)
        weight = b.weight(*((outs, c) if flipped else (c, outs)), fan=c)
        return b.add("Gemm", [x, weight, *([b.vector(outs)] if b.chance() else [])], (*rest, outs), transB=flipped)
    made = b.add("MatMul", [x, b.weight(c, outs, fan=c)], (*rest, outs))
    return b.add("Add", [b.vector(outs), made], (*rest, outs)) if b.chance() else made


def mix_tokens(b: _Network, x: Value) -> Value:
    n, s, c = x.shape
    outs = b.pick(2, 3, 4)
    return b.add("MatMul", [b.weight(outs, s, fan=s), x], (n, outs, c))


def mlp(b: _Network, x: Value) -> Value:
    inner = activation(b, dense(b, x))
    return b.add("Add", [x, dense(b, inner, x.shape[-1])], x.shape)


def gated(b: _Network, x: Value) -> Value:
    if b.chance():
        half = b.pick(1, 2, 4, 5)
        both = dense(b, x, 2 * half)
        shape = (*x.shape[:-1], half)
        one, other = b.several("Split", [both], shape, shape, axis=-1)
    else:
        one = dense(b, x)
        other = dense(b, x, one.shape[-1])
    factor = b.add("Sigmoid", [other], other.shape)
    return b.add("Mul", [one, factor], one.shape)


def layer_norm(b: _Network, x: Value) -> Value:
    c = x.shape[-1]
    if b.chance():
        return b.add(
            "LayerNormalization", [x, b.vector(c), *([b.vector(c)] if b.chance() else [])], x.shape, epsilon=1e-2
        )
    if b.chance():
        mean = b.add("ReduceMean", [x], (*x.shape[:-1], 1), axes=[-1])
        x = b.add("Sub", [x, mean], x.shape)
    square = b.add("Mul", [x, x], x.shape)
    mean = b.add("ReduceMean", [square], (*x.shape[:-1], 1), axes=[-1])
    shifted = b.add("Add", [mean, b.constant(np.float32(0.01))], mean.shape)
    root = b.add("Sqrt", [shifted], mean.shape)
    return arithmetic(b, b.add("Div", [x, root], x.shape))


def attention(b: _Network, x: Value) -> Value:
    n, s, c = x.shape
    heads, depth = b.pick(1, 2, 3), b.pick(2, 3, 4)
    shared = b.pick(1, 1, 2)
    if b.chance() and shared == 1:
        q, k, v = fused_heads(b, x, heads, depth)
    else:
        q = head(b, x, heads * shared, depth)
        k, v = (repeated(b, head(b, x, heads, depth), shared) for _ in range(2))
    heads *= shared
    turned = b.add("Transpose", [k], (n, heads, depth, s), perm=[0, 1, 3, 2])
    scores = b.add("MatMul", [q, turned], (n, heads, s, s))
    scaled = b.add("Mul", [scores, b.constant(np.float32(0.5))], scores.shape)
    chances = b.add("Softmax", [scaled], scores.shape, axis=-1)
    mixed = b.add("MatMul", [chances, v], (n, heads, s, depth))
    back = b.add("Transpose", [mixed], (n, s, heads, depth), perm=[0, 2, 1, 3])
    out = dense(b, b.reshape(back, n, s, heads * depth), c)
    return b.add("Add", [x, out], x.shape) if b.chance() else out


def head(b: _Network, x: Value, heads: int, depth: int) -> Value:
    n, s, _ = x.shape
    split = b.reshape(dense(b, x, heads * depth), n, s, heads, depth)
    return b.add("Transpose", [split], (n, heads, s, depth), perm=[0, 2, 1, 3])


def repeated(b: _Network, x: Value, times: int) -> Value:
    if times == 1:
        return x
    n, heads, s, depth = x.shape
    wide = b.add("Unsqueeze", [x, b.ints(2)], (n, heads, 1, s, depth))
    shape = (n, heads, times, s, depth)
    target = b.ints(*(1 if b.chance() and k != 2 else size for k, size in enumerate(shape)))
    return b.reshape(b.add("Expand", [wide, target], shape), n, heads * times, s, depth)


def fused_heads(b: _Network, x: Value, heads: int, depth: int) -> list[Value]:
    n, s, _ = x.shape
    both = dense(b, x, 3 * heads * depth)
    shape = (n, heads, s, depth)
    if b.chance():
        split = b.reshape(both, n, s, 3, heads, depth)
        moved = b.add("Transpose", [split], (3, *shape), perm=[2, 0, 3, 1, 4])
        return [b.add("Gather", [moved, b.constant(np.array(k, np.int64))], shape, axis=0) for k in range(3)]
    split = b.reshape(both, n, s, heads, 3 * depth)
    moved = b.add("Transpose", [split], (n, heads, s, 3 * depth), perm=[0, 2, 1, 3])
    return b.several("Split", [moved, b.ints(depth, depth, depth)], shape, shape, shape, axis=3)


def conv_tokens(b: _Network, x: Value) -> Value:
    """A 1-d convolution along the tokens, or (as in efficient channel attention) across the channels."""
    n, s, c = x.shape
    if b.chance():
        x = b.add("Transpose", [x], (n, c, s), perm=[0, 2, 1])
    n, ins, size = x.shape
    outs = b.pick(2, 3, ins)
    made = b.add("Conv", [x, b.weight(outs, ins, 3, fan=3 * ins)], (n, outs, size), pads=[1, 1])
    return b.add("Transpose", [made], (n, size, outs), perm=[0, 2, 1])


def turn_tokens(b: _Network, x: Value) -> Value:
    n, s, c = x.shape
    return b.add("Transpose", [x], (n, c, s), perm=[0, 2, 1])


def split_last(b: _Network, x: Value) -> Value:
    parts = [activation(b, part) if b.chance() else part for part in parted(b, x, len(x.shape) - 1)]
    if len(parts) == 2 and parts[0].shape == parts[1].shape and b.chance():
        return b.add(b.pick("Add", "Mul"), parts, parts[0].shape)
    return joined(b, parts[::-1] if b.chance() else parts, len(x.shape) - 1)


def recurrent(b: _Network, x: Value) -> Value:
    n, s, c = x.shape
    op, hidden, both = b.pick("LSTM", "GRU", "RNN"), b.pick(2, 3, 5), b.pick(1, 2)
    rows = {"LSTM": 4, "GRU": 3, "RNN": 1}[op] * hidden
    inputs: list = [b.add("Transpose", [x], (s, n, c), perm=[1, 0, 2])]
    inputs += [b.weight(both, rows, c, fan=c), b.weight(both, rows, hidden, fan=hidden)]
    if b.chance():
        inputs.append(b.weight(both, 2 * rows))
    made = b.add(
        op, inputs, (s, both, n, hidden), hidden_size=hidden, direction="bidirectional" if both == 2 else "forward"
    )
    moved = b.add("Transpose", [made], (n, s, both, hidden), perm=[2, 0, 1, 3])
    return b.reshape(moved, n, s, both * hidden)


def tokens_to_vector(b: _Network, x: Value) -> Value:
    n, s, c = x.shape
    if b.chance():
        return b.add("ReduceMean", [x], (n, c), axes=[1], keepdims=0)
    if b.chance():
        return b.add("Gather", [x, b.constant(np.array(0, np.int64))], (n, c), axis=1)
    return b.add("Flatten", [x], (n, s * c), axis=1)


_IMAGE = (
    conv, conv, conv, transposed, depthwise, depthwise, batch_norm, instance_norm, group_norm, pool, residual, residual,
    branches, branches, split, split, shuffle, permute, gate, resize, pad, depth_to_space, activation, activation,
    arithmetic, softmax,
)  # fmt: skip
_TOKENS = (
    dense, dense, dense, mix_tokens, mlp, mlp, gated, layer_norm, attention, attention, conv_tokens, turn_tokens,
    split_last, recurrent, activation, arithmetic, softmax,
)  # fmt: skip
_VECTOR = (dense, dense, mlp, gated, split_last, activation, arithmetic, layer_norm)
_MAX = 20_000  # elements of an activation


@st.composite
def networks(draw, *, blocks: int = 7) -> onnx.ModelProto:
    """A random network with one input and one or two outputs."""
    b = _Network(draw, draw(st.integers(0, 2**32 - 1)))
    shape = b.pick((2, 3, 4, 4), (1, 4, 4, 5), (2, 5, 4), (1, 4, 6), (2, 6))
    x = first = Value("x", shape)
    x = {4: conv, 3: dense, 2: dense}[len(shape)](b, x)
    pool_of = [x]
    for _ in range(draw(st.integers(2, blocks))):
        kinds = {4: _IMAGE, 3: _TOKENS, 2: _VECTOR}[len(x.shape)]
        if len(x.shape) > 2 and b.pick(*[False] * 6, True):
            leave = b.pick(image_to_tokens, image_to_vector) if len(x.shape) == 4 else tokens_to_vector
            x = leave(b, x)
        else:
            made = b.pick(*kinds)(b, x)
            x = made if math.prod(made.shape) < _MAX else x
        others = [other for other in pool_of if other.shape == x.shape and other != x]
        if others and b.pick(True, False, False):
            x = b.add(b.pick("Add", "Mul"), [x, b.pick(*others)], x.shape)
        pool_of.append(x)
    if b.pick(True, True, True, False):
        x = conv(b, x, 2) if len(x.shape) == 4 else dense(b, x, 2)
    outputs = {x.name: x}
    if b.pick(True, *[False] * 4):
        other = b.pick(*pool_of)
        outputs[other.name] = other
    batch = ["N", *shape[1:]] if shape[0] == 2 and b.chance() else list(shape)
    graph = helper.make_graph(
        b.nodes,
        "g",
        [helper.make_tensor_value_info(first.name, TensorProto.FLOAT, batch)],
        [helper.make_tensor_value_info(v.name, TensorProto.FLOAT, [None] * len(v.shape)) for v in outputs.values()],
        [numpy_helper.from_array(v, n) for n, v in b.constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
