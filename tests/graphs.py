"""Small graphs for tests: written as text, printed as text, run.

    graph = build("(float[N,3,8,8] x) => (float[] y)", '''
        c = Conv<pads=[1,1,1,1]>(x, W)
        y = BatchNormalization(c, g, b, m, v)
    ''', W=(4, 3, 3, 3), g=4, b=4, m=4, v=positive(4))

A constant is a float, an array (float64 becomes ``kind``), or a shape that is filled with random numbers, the same in
every run. ``float`` in the text stands for ``kind``: most tests run in float64 on the ONNX reference evaluator, where a
fold is right to 1e-12 or wrong.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
from onnx.reference import ReferenceEvaluator
from onnx.reference.ops.op_conv_transpose import ConvTranspose as _ConvTranspose

from channelfold.passes.base import Context, Outcome, Pass
from channelfold.runtime.data.sources import Data
from channelfold.runtime.io.files import check, export, import_model, infer_shapes, session
from channelfold.runtime.io.session import Feed, TensorSpec
from channelfold.runtime.io.weights import tensor_proto

RTOL = {"double": 1e-12, "float": 1e-6}  # of the largest output; a few times the rounding of one small convolution


def build(
    signature: str, body: str, *, opset: int = 17, kind: str = "double", domains: str = "", **constants
) -> gs.Graph:
    """A graph from ONNX text, with the constants as initializers and shapes inferred (``float[]`` is an open one)."""
    imports = f'"" : {opset}' + (f", {domains}" if domains else "")
    text = f"<ir_version: 10, opset_import: [{imports}]> g {signature} {{{body}}}"
    model = onnx.parser.parse_model(text.replace("float[", f"{kind}["))
    dtype = onnx.helper.tensor_dtype_to_np_dtype(model.graph.input[0].type.tensor_type.elem_type)
    for name, values in constants.items():
        if isinstance(values, int | tuple):
            values = random(values, name)
        values = np.asarray(values)
        if values.dtype == np.float64:
            values = values.astype(dtype)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    graph = import_model(model)
    infer_shapes(graph)
    return graph


def random(shape: int | tuple[int, ...], name: str = "") -> np.ndarray:
    """Normal random numbers that depend on the name alone."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)


def positive(shape: int | tuple[int, ...], name: str = "") -> np.ndarray:
    return np.abs(random(shape, name)) + 0.5


def listing(graph: gs.Graph) -> str:
    """The nodes in order, one a line: ``y = Op<attribute=value>(input, input)``."""
    return "\n".join(map(_line, graph.nodes))


def _line(node: gs.Node) -> str:
    attrs = ", ".join(f"{k}={v}" for k, v in sorted(node.attrs.items()) if not isinstance(v, gs.Graph))
    inputs = ", ".join(t.name for t in node.inputs)
    outputs = ", ".join(t.name for t in node.outputs)
    return f"{outputs} = {node.op}{f'<{attrs}>' if attrs else ''}({inputs})"


def ops(graph: gs.Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def node(graph: gs.Graph, op: str) -> gs.Node:
    """The only node of an operator."""
    (found,) = (node for node in graph.nodes if node.op == op)
    return found


def constants(graph: gs.Graph) -> dict[str, np.ndarray]:
    return {name: t.values for name, t in graph.tensors().items() if isinstance(t, gs.Constant)}


def feeds(graph: gs.Graph, *, size: int = 2) -> dict[str, np.ndarray]:
    """Random values for the inputs; an open dimension gets ``size``."""
    made = {}
    for tensor in graph.inputs:
        shape = [d if isinstance(d, int) else size for d in tensor.shape]
        made[tensor.name] = random(tuple(shape), tensor.name).astype(tensor.dtype)
    return made


def data_from(*feeds: Feed) -> Data:
    specs = [TensorSpec(name, values.dtype, values.shape) for name, values in feeds[0].items()]
    return Data(specs, len(feeds), lambda: iter(feeds), "samples")


def samples(graph: gs.Graph, count: int = 4, *, size: int | Callable[[int], int] = 8, make=None) -> Data:
    """Normal random feeds; ``make(shape, rng)`` for other ones. Open dimensions get ``size``, or ``size(index)``."""
    make = make or (lambda shape, rng: rng.standard_normal(shape))
    made = []
    for index in range(count):
        rng = np.random.default_rng(index)
        wide = size(index) if callable(size) else size
        shapes = {t.name: [d if isinstance(d, int) else wide for d in t.shape] for t in graph.inputs}
        made.append({t.name: np.asarray(make(shapes[t.name], rng), t.dtype) for t in graph.inputs})
    return data_from(*made)


class ConvTranspose(_ConvTranspose):
    """With groups, for which the reference evaluator mixes up weights and biases."""

    op_domain = ""

    def _run(self, X, W, B=None, group=None, **attrs):
        parts = [np.split(X, group, axis=1), np.split(W, group), [None] * group if B is None else np.split(B, group)]
        made = [super(ConvTranspose, self)._run(*part, group=1, **attrs)[0] for part in zip(*parts, strict=True)]
        return (np.concatenate(made, axis=1),)


def evaluator(model: onnx.ModelProto) -> ReferenceEvaluator:
    return ReferenceEvaluator(model, new_ops=[ConvTranspose])


def whole(graph: gs.Graph) -> onnx.ModelProto:
    """The model of a graph, with its large weights inside."""
    model, large = export(graph)
    model.graph.initializer.extend(tensor_proto(values, proto.name) for proto, values in large)
    return model


def run(graph: gs.Graph, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs: float32 and float16 graphs in ONNX Runtime, others on the reference evaluator."""
    if graph.inputs[0].dtype in ("float32", "float16"):
        return session(graph, optimize=False).run(feed)
    model = whole(graph)
    names = [t.name for t in graph.outputs]
    return dict(zip(names, evaluator(model).run(None, dict(feed)), strict=True))


def fold(step: Pass, graph: gs.Graph, *, rtol: float | None = None, size: int = 2) -> Outcome:
    """Applies an exact pass and asserts what all of them promise.

    The graph is valid, has no more nodes than before and computes the same outputs (``rtol`` of the largest value),
    what changed is reported, and a second time there is nothing to do.
    """
    feed, nodes, old = feeds(graph, size=size), len(graph.nodes), listing(graph)
    before = run(graph, feed)
    outcome = step.apply(graph, Context())
    check(graph)
    assert len(graph.nodes) <= nodes, f"{nodes} nodes became {len(graph.nodes)}:\n{listing(graph)}"
    assert outcome.changed or listing(graph) == old
    assert_same(before, run(graph, feed), rtol)
    new = listing(graph)
    again = step.apply(graph, Context())
    assert not again.changed, f"a second time: {again.changed}"
    assert listing(graph) == new
    return outcome


def assert_same(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray], rtol: float | None = None) -> None:
    assert list(before) == list(after)
    for name, old in before.items():
        new = after[name]
        assert (new.dtype, new.shape) == (old.dtype, old.shape)
        if old.dtype.kind == "f":
            limit = RTOL.get({"f8": "double", "f4": "float"}.get(old.dtype.str[1:], ""), 0) if rtol is None else rtol
            peak = np.abs(old).max(initial=0)
            error = np.abs(new.astype(np.float64) - old).max(initial=0)
            assert error <= limit * peak, f"{name}: error {error:.3g} of {peak:.3g}"
        else:
            assert np.array_equal(new, old), name


def reasons(outcome: Outcome) -> list[str]:
    return [refusal.reason for refusal in outcome.refused]


def changes(outcome: Outcome) -> list[str]:
    return [change.what for change in outcome.changed]
