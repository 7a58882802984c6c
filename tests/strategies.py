"""Hypothesis strategies: random graphs in float64 on which exact passes must not change a number.

A graph grows node by node. Every node is run as it is added, so that its shape is known and a node that cannot run, or
whose values leave the range in which 1e-9 means anything, is left out.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from channelfold.runtime.io.files import import_model
from channelfold.tests.graphs import evaluator

OPSET = 18
OPSETS = [helper.make_opsetid("", OPSET)]


class Builder:
    def __init__(self, draw, seed: int):
        self.draw = draw
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.values: dict[str, np.ndarray] = {}
        self.pool: list[str] = []  # activations that may be read

    def pick(self, *choices):
        return self.draw(st.sampled_from(choices))

    def chance(self) -> bool:
        return self.draw(st.booleans())

    def constant(self, values) -> str:
        """A new constant, or now and then an old one with the same shape, so that weights are shared."""
        values = np.asarray(values)
        same = [n for n, v in self.constants.items() if v.shape == values.shape and v.dtype == values.dtype]
        if same and values.dtype.kind == "f" and self.pick(True, False, False):
            return self.pick(*same)
        name = f"c{len(self.constants)}"
        self.constants[name] = values
        return name

    def weight(self, *shape: int) -> str:
        """A weight, perhaps behind nodes that make it from another constant."""
        values = self.rng.uniform(-1, 1, shape)
        match self.pick("plain", "plain", "plain", "transposed", "identity", "standardized"):
            case "transposed":
                perm = list(range(len(shape)))[::-1]
                return self.add("Transpose", [self.constant(values.transpose())], perm=perm) or self.constant(values)
            case "identity":
                return self.add("Identity", [self.constant(values)]) or self.constant(values)
            case "standardized":
                raw = self.constant(values)
                mean = self.add("ReduceMean", [raw, self.constant(np.array([1]))], keepdims=1)
                return (mean and self.add("Sub", [raw, mean])) or raw
        return self.constant(values)

    def vector(self, size: int) -> np.ndarray:
        kind = self.pick("positive", "positive", "any", "zeros", "ones")
        values = self.rng.uniform(0.5, 2, size)
        if kind == "any":
            values *= self.rng.choice([-1, 1], size)
        if kind == "zeros":
            values *= self.rng.choice([0, 1], size)
        return np.ones(size) if kind == "ones" else values

    def add(self, op: str, inputs: list[str], outputs: int = 1, **attrs) -> str | None:
        """Adds a node and returns its first output; None when it cannot run."""
        names = [f"{op.lower()}{len(self.nodes)}{'' if i == 0 else f'_{i}'}" for i in range(outputs)]
        node = helper.make_node(op, inputs, names, f"n{len(self.nodes)}_{op}", **attrs)
        known = self.constants | self.values
        feed = {n: known[n] for n in inputs if n}
        types = [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for n, v in feed.items()
        ]
        graph = helper.make_graph([node], "g", types, [onnx.ValueInfoProto(name=n) for n in names])
        try:
            model = helper.make_model(graph, opset_imports=OPSETS, ir_version=10)
            inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
            with np.errstate(all="ignore"):
                made = evaluator(model).run(None, feed)
        except Exception:
            return None
        if not all(isinstance(v, np.ndarray) and v.ndim and 0 < v.size < 4096 and np.abs(v).max() < 1e4 for v in made):
            return None
        for value, array in zip(
            inferred.graph.output, made, strict=True
        ):  # the reference evaluator is not always right
            dims = [d.dim_value for d in value.type.tensor_type.shape.dim]
            if len(dims) != array.ndim or any(d not in (0, n) for d, n in zip(dims, array.shape, strict=True)):
                return None
        self.nodes.append(node)
        self.values.update(zip(names, made, strict=True))
        return names[0]


def arithmetic(b: Builder, x: str) -> str | None:
    shape = b.values[x].shape
    op = b.pick("Mul", "Add", "Sub", "Div")
    kind = b.pick("axis", "axis", "axis", "axis", "scalar", "neutral", "wide", "full")
    if kind == "axis" and shape:
        axis = b.pick(*range(len(shape)), min(1, len(shape) - 1), len(shape) - 1)
        values = b.vector(shape[axis]).reshape([-1] + [1] * (len(shape) - 1 - axis))
        if b.chance():
            values = values.reshape([1] * (len(shape) - values.ndim) + list(values.shape))
    elif kind == "wide":
        values = b.vector(b.pick(2, 3)).reshape(b.pick((-1,), (-1, 1), (1, -1, 1), [-1] + [1] * len(shape)))
    elif kind == "full":
        values = b.rng.uniform(0.5, 2, shape)
    else:
        values = (
            b.vector(1).reshape(b.pick((), (1,), (1, 1)))
            if kind == "scalar"
            else np.array(1.0 * (op in ("Mul", "Div")))
        )
    if op == "Div" and not values.all():
        return None
    inputs = [x, b.constant(values)]
    return b.add(op, inputs[::-1] if b.chance() and op != "Div" else inputs)


def batchnorm(b: Builder, x: str) -> str | None:
    shape = b.values[x].shape
    if len(shape) < 2:
        return None
    c = shape[1]
    parameters = [b.vector(c), b.rng.uniform(-1, 1, c), b.rng.uniform(-1, 1, c), b.rng.uniform(0.5, 2, c)]
    return b.add("BatchNormalization", [x, *map(b.constant, parameters)], epsilon=1e-3)


def conv(b: Builder, x: str) -> str | None:
    shape = b.values[x].shape
    if len(shape) not in (3, 4):
        return None
    c, axes = shape[1], len(shape) - 2
    groups = b.pick(1, 1, c, *(g for g in (2, 3) if c % g == 0))
    kernel = [b.pick(1, 1, 2, 3) for _ in range(axes)]
    outs = groups * b.pick(1, 2, 3)
    attrs = {"group": groups, "kernel_shape": kernel, "strides": [b.pick(1, 1, 2) for _ in kernel]}
    padding = b.pick("none", "pads", "VALID", "SAME_UPPER")
    if padding == "pads":
        attrs["pads"] = [b.pick(0, 1, 2) for _ in range(2 * axes)]
    op, ins = "Conv", (outs, c // groups)
    if b.pick(True, False, False):
        op, ins, padding = "ConvTranspose", (c, outs // groups), "none"
    if padding in ("VALID", "SAME_UPPER"):
        attrs["auto_pad"] = padding
    inputs = [x, b.weight(*ins, *kernel)]
    if b.chance():
        inputs.append(b.constant(b.rng.uniform(-1, 1, outs)))
    return b.add(op, inputs, **attrs)


def _padded_conv(b: Builder, x: str) -> str | None:
    size = len(b.values[x].shape)
    padded = b.add("Pad", [x, b.constant(np.array([b.pick(0, 1, 2) if i % size > 1 else 0 for i in range(2 * size)]))])
    return (padded and conv(b, padded)) or padded


def matmul(b: Builder, x: str) -> str | None:
    shape = b.values[x].shape
    n = b.pick(1, 2, 3, 4)
    if b.pick(True, True, False):
        out = b.add("MatMul", [x, b.weight(shape[-1], n)])
        bias = b.pick((n,), (1, n), (1,), (n, 1), None)
    else:
        out = b.add("MatMul", [b.weight(n, shape[-2 if len(shape) > 1 else -1]), x])
        bias = b.pick((n, 1), (n,), None)
    if out is None or bias is None:
        return out
    inputs = [out, b.constant(b.rng.uniform(-1, 1, bias))]
    return b.add("Add", inputs[::-1] if b.chance() else inputs) or out


def gemm(b: Builder, x: str) -> str | None:
    shape = b.values[x].shape
    if len(shape) != 2:
        return None
    trans_a, trans_b = b.pick(0, 0, 1), b.pick(0, 1)
    m, k = shape[::-1] if trans_a else shape
    n = b.pick(1, 2, 3, m)
    inputs = [x, b.weight(*((n, k) if trans_b else (k, n)))]
    if b.chance():
        inputs.append(b.constant(b.rng.uniform(-1, 1, b.pick((n,), (1,), (1, n), (m, 1), (m, n), ()))))
    return b.add(
        "Gemm", inputs, transA=trans_a, transB=trans_b, alpha=b.pick(1.0, 0.5, -2.0), beta=b.pick(1.0, 1.0, 0.5)
    )


def norm(b: Builder, x: str) -> str | None:
    shape = b.values[x].shape
    if b.chance() and len(shape) > 2:
        return b.add(
            "InstanceNormalization", [x, *(b.constant(b.rng.uniform(-1, 1, shape[1])) for _ in range(2))], epsilon=1e-2
        )
    axis = b.pick(-1, -1, len(shape) - 1, 1)
    size = shape[axis % len(shape) :] if b.chance() else shape[-1:]
    parameters = [b.constant(b.rng.uniform(-1, 1, size)) for _ in range(b.pick(1, 2, 2))]
    return b.add("LayerNormalization", [x, *parameters], axis=axis, epsilon=1e-2)


def pool(b: Builder, x: str) -> str | None:
    axes = len(b.values[x].shape) - 2
    if not 1 <= axes <= 3:  # ONNX Runtime pools up to three
        return None
    op = b.pick("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
    if op.startswith("Global"):
        return b.add(op, [x])
    attrs = {"kernel_shape": [b.pick(1, 2, 3)] * axes, "strides": [b.pick(1, 2)] * axes}
    if attrs["kernel_shape"][0] > 1 and b.chance():
        attrs["pads"] = [b.pick(0, 1) for _ in range(2 * axes)]
    if op == "AveragePool":
        attrs["count_include_pad"] = b.pick(0, 1)
    return b.add(op, [x], outputs=b.pick(1, 1, 2) if op == "MaxPool" else 1, **attrs)


def pad(b: Builder, x: str) -> str | None:
    size = len(b.values[x].shape)
    pads = [b.pick(0, 0, 1, -1) if i % size > 1 or b.pick(*[False] * 5, True) else 0 for i in range(2 * size)]
    inputs = [x, b.constant(np.array(pads)), *([b.constant(np.array(b.pick(0.0, 0.0, 1.0)))] if b.chance() else [])]
    return b.add("Pad", inputs, mode=b.pick("constant", "constant", "constant", "edge"))


def rearrange(b: Builder, x: str) -> str | None:
    shape = b.values[x].shape
    match b.pick(
        "Transpose", "Transpose", "Reshape", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice", "ReduceMean"
    ):
        case "Transpose":
            return b.add("Transpose", [x], perm=list(b.draw(st.permutations(range(len(shape))))))
        case "Reshape":
            return b.add("Reshape", [x, b.constant(np.array(_new_shape(b, shape)))])
        case "Flatten":
            return b.add("Flatten", [x], axis=b.pick(1, 1, 2, 0, -1))
        case "Squeeze":
            ones = [i for i, d in enumerate(shape) if d == 1]
            return b.add("Squeeze", [x, b.constant(np.array([b.pick(*ones)]))]) if ones else None
        case "Unsqueeze":
            return b.add("Unsqueeze", [x, b.constant(np.array([b.pick(*range(-len(shape) - 1, len(shape) + 1))]))])
        case "Slice":
            arguments = [[b.pick(0, 0, 1)], [b.pick(2**31 - 1, 2, -1)], [b.pick(*range(-len(shape), len(shape)))]]
            return b.add("Slice", [x, *(b.constant(np.array(a)) for a in arguments)])
    axes = b.draw(st.lists(st.sampled_from(range(len(shape))), min_size=1, max_size=2, unique=True))
    return b.add("ReduceMean", [x, b.constant(np.array(axes))], keepdims=b.pick(0, 1))


def _new_shape(b: Builder, shape: tuple[int, ...]) -> list[int]:
    """A shape of the same volume: axes merged, or one split, perhaps with a 0 or -1 in it."""
    new = list(shape)
    place = b.pick(*range(len(new)))
    if b.chance() and place + 1 < len(new):
        new[place : place + 2] = [new[place] * new[place + 1]]
    elif new[place] % 2 == 0:
        new[place : place + 1] = b.pick([2, new[place] // 2], [new[place] // 2, 2])
    if b.chance():
        new[b.pick(*range(len(new)))] = -1
    elif new[0] == shape[0] and b.chance():
        new[0] = 0
    return new


def elementwise(b: Builder, x: str) -> str | None:
    op = b.pick("Relu", "Relu", "LeakyRelu", "PRelu", "Sigmoid", "Neg", "Identity", "Dropout", "Clip", "Cast")
    if op == "LeakyRelu":
        return b.add(op, [x], alpha=b.pick(0.1, -0.5, 1.5))
    if op == "PRelu":
        shape = b.values[x].shape
        slope = b.rng.uniform(-2, 2, shape[1] if len(shape) > 1 else 1).reshape([-1] + [1] * max(0, len(shape) - 2))
        return b.add(op, [x, b.constant(slope)])
    if op == "Clip":
        return b.add(op, [x, b.constant(np.array(0.0)), b.constant(np.array(6.0))])
    return b.add(op, [x], **({"to": TensorProto.DOUBLE} if op == "Cast" else {}))


def _combine(b: Builder, x: str) -> str | None:
    others = [n for n in b.pool if b.values[n].shape == b.values[x].shape]
    op, other = b.pick("Add", "Mul", "Concat"), b.pick(*others)
    return b.add(op, [x, other], **({"axis": b.pick(0, 1)} if op == "Concat" else {}))


def _decomposed_norm(b: Builder, x: str) -> str | None:
    axes = b.constant(np.array([-1]))
    mean = b.add("ReduceMean", [x, axes])
    centered = mean and b.add("Sub", [x, mean])
    square = centered and b.add("Mul", [centered, centered])
    variance = square and b.add("ReduceMean", [square, axes])
    shifted = variance and b.add("Add", [variance, b.constant(np.array(0.01))])
    root = shifted and b.add("Sqrt", [shifted])
    out = root and b.add("Div", [centered, root])
    scaled = out and b.add("Mul", [out, b.constant(b.vector(b.values[x].shape[-1]))])
    return scaled and b.add("Add", [scaled, b.constant(b.vector(b.values[x].shape[-1]))])


_AFFINE = (arithmetic, arithmetic, batchnorm)
_LINEAR = (conv, conv, _padded_conv, matmul, matmul, gemm, norm)
_BETWEEN = (pool, pad, rearrange, rearrange, elementwise)
_OTHER = (_combine, _decomposed_norm)


@st.composite
def graphs(draw, *, steps: int = 10) -> gs.Graph:
    """A random graph of convolutions, products, norms and what stands between them, with one input and some outputs."""
    b = Builder(draw, draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.sampled_from([(2, 3, 4, 4), (2, 4, 5, 3), (1, 2, 6), (2, 6, 4), (2, 4), (3, 3), (3, 3, 3), (4,)]))
    b.values["x"] = b.rng.standard_normal(shape)
    b.pool.append("x")
    kinds_of_step = st.sampled_from([_AFFINE, _AFFINE, _LINEAR, _LINEAR, _BETWEEN, _OTHER])
    for kinds in draw(st.lists(kinds_of_step, min_size=steps // 2, max_size=steps)):
        recent = b.pool[-1] if b.pick(*[True] * 7, False) else b.pick(*b.pool)
        made = b.pick(*kinds)(b, recent)
        if made is not None:
            b.pool.append(made)
    outputs = dict.fromkeys([b.pool[-1], *([b.pick(*b.pool)] if b.pick(True, False, False) else [])])
    outputs = [name for name in outputs if name != "x"] or [b.add("Identity", ["x"])]
    if shape[0] == 2 and draw(st.booleans()):
        shape = ("N", *shape[1:])
    graph = helper.make_graph(
        b.nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.DOUBLE, shape)],
        [helper.make_tensor_value_info(n, TensorProto.DOUBLE, [None] * b.values[n].ndim) for n in outputs],
        [numpy_helper.from_array(v, n) for n, v in b.constants.items()],
    )
    return import_model(helper.make_model(graph, opset_imports=OPSETS, ir_version=10))
