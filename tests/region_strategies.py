"""Random graphs of what a region can meet: heads, gates, norms in pieces, joins and moves of channels."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from channelfold.runtime.io.files import import_model
from channelfold.tests import strategies

SHAPES = [(2, 4, 3, 4), (1, 4, 4, 3), (2, 3, 4), (1, 5, 4), (2, 2, 2), (2, 4), (1, 2, 6)]


class Builder(strategies.Builder):
    def add(self, op, inputs, outputs=1, **attrs):
        """As before; None where one of the inputs could not be made."""
        made = all(name == "" or name in self.constants or name in self.values for name in inputs)
        return super().add(op, inputs, outputs, **attrs) if made else None

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def vectors(self, *shape: int) -> str:
        return self.constant(self.rng.uniform(-1, 1, shape))

    def among(self, fits) -> str | None:
        """A tensor of the pool whose shape ``fits``."""
        found = [name for name in self.pool if fits(self.values[name].shape)]
        return self.pick(*found) if found else None

    def slice(self, x, start, stop, axis, step=1):
        return self.add("Slice", [x, *(self.ints(n) for n in (start, stop, axis, step))])


def linear(b: Builder, x: str):
    return b.pick(strategies.matmul, strategies.matmul, strategies.conv, strategies.gemm)(b, x)


def product(b: Builder, x: str):
    """softmax(x y^T) z, or without the softmax, or without the z."""
    shape = b.values[x].shape
    y = b.among(lambda s: len(s) >= 2 and s[-1] == shape[-1])
    if y is None:
        return None
    axes = list(range(b.values[y].ndim))
    scores = b.add("MatMul", [x, b.add("Transpose", [y], perm=[*axes[:-2], axes[-1], axes[-2]])])
    if b.chance():
        scores = b.add(b.pick("Mul", "Div"), [scores, b.constant(np.array(0.7))])
    weights = b.add("Softmax", [scores], axis=-1) if b.pick(True, True, False) else scores
    if weights is None:
        return None
    z = b.among(lambda s: len(s) >= 2 and s[-2] == b.values[weights].shape[-1])
    return b.add("MatMul", [weights, z]) or weights


def attention(b: Builder, x: str):
    """Heads of queries, and as many or fewer of keys and values, perhaps with a rotary embedding."""
    if b.values[x].ndim != 3:
        return None
    (heads, kv_heads), size, width = b.pick((2, 2), (2, 1), (4, 2)), b.pick(1, 2), b.values[x].shape[2]

    def split(made: str, count: int):
        made = b.add("Reshape", [made, b.ints(0, -1, count, size)])
        made = b.add("Transpose", [made], perm=[0, 2, 1, 3])
        if count == heads:
            return made
        made = b.add("Unsqueeze", [made, b.ints(2)])
        made = b.add("Expand", [made, b.ints(1, 1, heads // count, 1, 1)])
        return b.add("Reshape", [made, b.ints(0, heads, -1, size)])

    def rotated(made: str):
        turned = b.add("Concat", [b.add("Neg", [b.slice(made, 1, 2, 3)]), b.slice(made, 0, 1, 3)], axis=3)
        angle = b.add("Unsqueeze", [b.add("ReduceMean", [x, b.ints(0, 2)], keepdims=0), b.ints(1)])
        along = b.add("Mul", [made, angle] if b.chance() else [angle, made])
        return b.add("Add", [along, b.add("Mul", [turned, b.add("Sin", [angle])])])

    counts = (heads, kv_heads, kv_heads)
    if b.chance():
        fused = b.add("MatMul", [x, b.weight(width, sum(counts) * size)])
        first = b.add("Split", [fused, b.ints(*(n * size for n in counts))], outputs=3, axis=2)
        parts = [first, f"{first}_1", f"{first}_2"]
    else:
        parts = [b.add("MatMul", [x, b.weight(width, n * size)]) for n in counts]
        parts = [b.add("Add", [part, b.vectors(n * size)]) for part, n in zip(parts, counts, strict=True)]
    q, k, v = (split(part, n) for part, n in zip(parts, counts, strict=True))
    if size == 2 and b.chance():
        q, k = rotated(q), rotated(k)
    scores = b.add("MatMul", [q, b.add("Transpose", [k], perm=[0, 1, 3, 2])])
    out = b.add("MatMul", [b.add("Softmax", [scores], axis=-1), v])
    out = b.add("Reshape", [b.add("Transpose", [out], perm=[0, 2, 1, 3]), b.ints(0, 0, heads * size)])
    return b.add("MatMul", [out, b.weight(heads * size, width)])


def gated(b: Builder, x: str):
    """act(gate) * up, with weights of their own or one for both."""
    n, width = b.pick(2, 3), b.values[x].shape[-1]
    match b.pick("separate", "Split", "Slice"):
        case "separate":
            gate, up = (b.add("MatMul", [x, b.weight(width, n)]) for _ in range(2))
        case "Split":
            fused = b.add("MatMul", [x, b.weight(width, 2 * n)])
            gate = b.add("Split", [fused, b.ints(n, n)], outputs=2, axis=-1)
            up = gate and f"{gate}_1"
        case _:
            fused = b.add("MatMul", [x, b.weight(width, 2 * n)])
            gate, up = b.slice(fused, 0, n, -1), b.slice(fused, n, 2 * n, -1)
    act = b.pick("Sigmoid", "Relu", "SiLU", "Identity")
    made = b.add("Mul", [gate, b.add("Sigmoid", [gate])]) if act == "SiLU" else b.add(act, [gate])
    both = b.add(b.pick("Mul", "Mul", "Mul", "Div"), [made, up] if b.chance() else [up, made])
    return b.add("MatMul", [both, b.weight(n, width)])


def squeeze_and_excite(b: Builder, x: str):
    rank, c = b.values[x].ndim, b.values[x].shape[1]
    if rank < 3:
        return None
    gate = b.add("Sigmoid", [b.add("Conv", [b.add("GlobalAveragePool", [x]), b.vectors(c, c, *[1] * (rank - 2))])])
    return b.add("Mul", [x, gate] if b.chance() else [gate, x])


def unfused_norm(b: Builder, x: str):
    """x (gamma / sigma) + (beta - mean (gamma / sigma))"""
    c = b.values[x].shape[-1]
    mean = b.add("ReduceMean", [x, b.ints(-1)])
    centered = b.add("Sub", [x, mean])
    variance = b.add("ReduceMean", [b.add("Mul", [centered, centered]), b.ints(-1)])
    sigma = b.add("Sqrt", [b.add("Add", [variance, b.constant(np.array(0.01))])])
    factor = b.add("Mul", [b.add("Reciprocal", [sigma]), b.vectors(c)])
    scaled = b.add("Mul", [x, factor] if b.chance() else [factor, x])
    return b.add("Add", [scaled, b.add("Sub", [b.vectors(c), b.add("Mul", [mean, factor])])])


def split(b: Builder, x: str):
    shape = b.values[x].shape
    axis = b.pick(*range(len(shape)), len(shape) - 1, 1)
    if axis >= len(shape) or shape[axis] < 2:
        return None
    n = b.pick(*range(1, shape[axis]))
    made = b.add("Split", [x, b.ints(n, shape[axis] - n)], outputs=2, axis=axis)
    if made is not None:
        b.pool.append(f"{made}_1")
    return made


def concat(b: Builder, x: str):
    shape = b.values[x].shape
    axis = b.pick(*range(len(shape)), len(shape) - 1, 1)
    cut = lambda s: (*s[:axis], 0, *s[axis + 1 :])  # noqa: E731
    parts = [x, b.among(lambda s: len(s) == len(shape) and cut(s) == cut(shape))]
    if b.pick(True, False, False):
        parts.append(b.vectors(*shape))
    return b.add("Concat", parts[::-1] if b.chance() else parts, axis=axis)


def gather(b: Builder, x: str):
    axis = b.pick(*range(b.values[x].ndim))
    n = b.values[x].shape[axis]
    picked = b.pick(b.rng.integers(n), b.rng.integers(-n, n, 3), b.rng.integers(0, n, (2, 2)), np.arange(n)[::-1])
    return b.add("Gather", [x, b.constant(np.array(picked, np.int64))], axis=axis)


def expand(b: Builder, x: str):
    new = [b.pick(1, 2) if n == 1 else b.pick(1, n) for n in b.values[x].shape]
    return b.add("Expand", [x, b.ints(*([2] if b.pick(True, False, False) else []), *new)])


def resize(b: Builder, x: str):
    axes = b.values[x].ndim - 2
    scales = b.pick([1, 1, *[2] * axes], [1, 1.3, *[1] * axes])
    return b.add("Resize", [x, "", b.constant(np.array(scales, np.float32))], mode=b.pick("nearest", "linear"))


def reduce(b: Builder, x: str):
    axes = b.draw(st.lists(st.sampled_from(range(b.values[x].ndim)), min_size=1, max_size=2, unique=True))
    return b.add(b.pick("ReduceMean", "ReduceMax"), [x, b.ints(*axes)], keepdims=b.pick(0, 1))


def bounded(b: Builder, x: str):
    operands = [x, b.vectors(*b.pick((), (b.values[x].shape[-1],)))]
    return b.add(b.pick("Max", "Min"), operands[::-1] if b.chance() else operands)


def binary(b: Builder, x: str):
    """x and another tensor, or x itself, broadcast to each other."""
    shape = b.values[x].shape
    fits = lambda s: all(m in (1, n) or n == 1 for m, n in zip(s[::-1], shape[::-1], strict=False))  # noqa: E731
    operands = [x, b.among(fits)]
    op = b.pick("Add", "Add", "Sub", "Mul", "Mul", "Div", "Max", "Min")
    return b.add(op, operands[::-1] if b.chance() else operands)


AFFINE = (strategies.arithmetic, strategies.arithmetic, strategies.batchnorm, strategies.norm, unfused_norm)
BETWEEN = (strategies.pool, strategies.pad, strategies.elementwise, bounded, resize, reduce)
MOVES = (strategies.rearrange, split, concat, gather, expand)
JOINS = (binary, binary, binary, product, gated, attention, squeeze_and_excite)
STEPS = st.lists(
    st.sampled_from([(linear,)] * 4 + [AFFINE, BETWEEN, MOVES, MOVES, JOINS, JOINS]), min_size=2, max_size=8
)


@st.composite
def graphs(draw):
    """(graph in float64, its input ``x``), beginning and ending with a linear."""
    b = Builder(draw, draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.sampled_from(SHAPES))
    b.values["x"] = b.rng.standard_normal(shape)
    b.pool.append("x")
    for step in [(linear,), *draw(STEPS), (linear,)]:
        recent = b.pool[-1] if b.pick(True, True, True, False) else b.pick(*b.pool[-4:])
        made = b.pick(*step)(b, recent)
        if made is not None:
            b.pool.append(made)
    outputs = {b.pool[-1], *([b.pick(*b.pool)] if b.pick(True, False, False, False) else [])} - {"x"}
    outputs = sorted(outputs) or [b.add("Identity", ["x"])]
    live, nodes = set(outputs), []
    for node in reversed(b.nodes):
        if live & set(node.output):
            live.update(node.input)
            nodes.insert(0, node)
    open_axes = ("N", "T") if len(shape) == 3 else ("N",)
    dims = [name if draw(st.booleans()) else n for name, n in zip(open_axes, shape, strict=False)]
    model = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.DOUBLE, [*dims, *shape[len(dims) :]])],
        [helper.make_tensor_value_info(name, TensorProto.DOUBLE, [None] * b.values[name].ndim) for name in outputs],
        [numpy_helper.from_array(values, name) for name, values in b.constants.items() if name in live],
    )
    return import_model(helper.make_model(model, opset_imports=strategies.OPSETS, ir_version=10)), b.values


def difference(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> float:
    """The largest difference, relative to the largest value of an output."""
    assert {name: values.shape for name, values in before.items()} == {n: v.shape for n, v in after.items()}
    return max(np.abs(after[n] - v).max(initial=0) / max(np.abs(v).max(initial=0), 1e-6) for n, v in before.items())
