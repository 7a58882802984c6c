"""Every operator that the ONNX backend suite has a float case of: what the links say may go is cut, and proven.

A case is put between a layer that writes the channels along one axis of its first input and layers that read all of its
outputs, once for every axis; its other inputs become constants. Cutting must be masking wherever a channel may go.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper, numpy_helper

from channelfold.passes.base import Refused
from channelfold.passes.channels.cut import cut, mask
from channelfold.passes.channels.links import _RULES
from channelfold.passes.operators import OPERATORS, Operator
from channelfold.runtime.errors import ModelError
from channelfold.runtime.io.files import check, import_model, infer_shapes, session
from channelfold.tests.channel_cuts import Feed, groups_of, random_keep, regions_of

UNSEEN = {  # their cases are of other types, of one channel, or of numbers that are not finite; see test_links
    "And", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Cast", "Celu", "ConstantOfShape", "Conv", "CumSum",
    "DepthToSpace", "DequantizeLinear", "Einsum", "Equal", "GlobalLpPool", "GridSample", "MaxRoiPool", "Mod", "Not",
    "Or", "Pad", "QuantizeLinear", "ReduceLogSum", "ReduceLogSumExp", "Resize", "RoiAlign", "Shrink",
    "SimplifiedLayerNormalization", "SpaceToDepth", "Upsample", "Where", "Xor",
}  # fmt: skip
CASES = 4  # that are tried of an operator and axis, until one is proven


def cases() -> Iterator[tuple[str, onnx.ModelProto, list[np.ndarray], list[np.ndarray]]]:
    """Name, model, values of the inputs and outputs of the cases whose first input is a float tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reference implementations divide by zero on purpose
        from onnx.backend.test.loader import load_node_model_tests

        found = load_node_model_tests()
    for case in found:
        model = case.model
        ((inputs, outputs),) = case.data_sets
        if not all(isinstance(value, np.ndarray) for value in (*inputs, *outputs)):
            continue
        first = inputs[0] if inputs else np.zeros(())
        if (
            first.dtype == np.float32
            and first.ndim
            and 0 < first.size < 20000
            and len(model.graph.node) == 1
            and len(inputs) == len(model.graph.input)
        ):
            yield case.name, model, inputs, outputs


def between_layers(
    model: onnx.ModelProto, inputs: list[np.ndarray], outputs: list[np.ndarray], axis: int
) -> tuple[onnx.ModelProto, Feed]:
    """The model with its first input written along ``axis`` by a layer, and all outputs read by layers."""
    rng = np.random.default_rng(0)
    new = onnx.ModelProto()
    new.CopyFrom(model)
    graph, first, shape = new.graph, model.graph.input[0].name, inputs[0].shape
    constants: dict[str, np.ndarray] = {}

    def constant(values: np.ndarray) -> str:
        name = f"case_{len(constants)}"
        constants[name] = values
        return name

    size = shape[axis]
    weight = (0.8 * np.eye(size) + 0.2 / size).astype(np.float32)  # of means: no value leaves the range of all
    perm = [*(a for a in range(len(shape)) if a != axis), axis]
    moved = [shape[a] for a in perm]
    before = [
        helper.make_node("Transpose", ["case_x"], ["case_t"], perm=perm),
        helper.make_node("Reshape", ["case_t", constant(np.array([-1, size]))], ["case_r"]),
        helper.make_node("Gemm", ["case_r", constant(weight)], ["case_g"]),
        helper.make_node("Reshape", ["case_g", constant(np.array([*moved[:-1], -1]))], ["case_s"]),
        helper.make_node("Transpose", ["case_s"], [first], perm=np.argsort(perm).tolist()),
    ]
    after = []
    for k, (value, result) in enumerate(zip(graph.output, outputs, strict=True)):
        name = value.name
        if result.dtype != np.float32:
            after.append(helper.make_node("Cast", [name], [f"case_c{k}"], to=TensorProto.FLOAT))
            name = f"case_c{k}"
        read = (rng.standard_normal((max(result.size, 1), 2)) / np.sqrt(max(result.size, 1))).astype(np.float32)
        after += [
            helper.make_node("Reshape", [name, constant(np.array([1, -1]))], [f"case_f{k}"]),
            helper.make_node("Gemm", [f"case_f{k}", constant(read)], [f"case_y{k}"]),
        ]
    nodes = [*before, *graph.node, *after]
    for k, node in enumerate(nodes):
        node.name = f"n{k}"
    for value, array in zip(model.graph.input[1:], inputs[1:], strict=True):
        constants[value.name] = array
    names = [f"case_y{k}" for k in range(len(outputs))]
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("case_x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2]) for name in names],
        [*graph.initializer, *(numpy_helper.from_array(values, name) for name, values in constants.items())],
    )
    new.graph.CopyFrom(made)
    return new, {"case_x": inputs[0]}


def verdict(model: onnx.ModelProto, feed: Feed) -> str:
    """Cuts half of what may go, and all that can; returns what came of it."""
    if all(region.free.sum() < 2 for region in regions_of(groups_of(graph_of(model), feed))):
        return "refused"
    for ratio in (0.5, 1.0):
        results = []
        for step in (cut, mask):
            graph, rng = graph_of(model), np.random.default_rng(0)
            try:
                step(graph, [(r, random_keep(r, rng, ratio)) for r in regions_of(groups_of(graph, feed))])
            except Refused:
                return "no masked form"
            check(graph)
            results.append(session(graph, optimize=False).run(feed))
        for name, sliced in results[0].items():
            masked = results[1][name]
            error, peak = np.abs(sliced - masked).max(), np.abs(masked).max()
            assert error <= 1e-5 * max(peak, 1e-3), f"{name} at {ratio}: error {error:.3g} of {peak:.3g}"
    return "proven"


def graph_of(model: onnx.ModelProto) -> gs.Graph:
    graph = import_model(model)
    infer_shapes(graph)
    return graph


def runs(model: onnx.ModelProto, feed: Feed) -> bool:
    try:
        values = session(graph_of(model), optimize=False).run(feed).values()
    except ModelError:
        return False
    return all(np.isfinite(value).all() for value in values)


def test_every_operator():
    tried, proven, failures = Counter(), set(), []
    for name, model, inputs, outputs in cases():
        for axis in (axis for axis, size in enumerate(inputs[0].shape) if size > 1):
            op = model.graph.node[0].op_type
            place = op, 0 if OPERATORS.get(("", op), Operator()).elementwise else axis  # to those all axes are alike
            tried[place] += 1
            if tried[place] > CASES or place in proven:
                continue
            made = between_layers(model, inputs, outputs, axis)
            if not runs(*made):
                continue
            try:
                came = verdict(*made)
            except Exception as error:
                failures.append(f"{name}, axis {axis}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            else:
                proven |= {place} if came == "proven" else set()
    assert not failures, "\n".join([f"{len(failures)} failed", *failures])
    followed = {op for (domain, op), row in OPERATORS.items() if not domain and row.kind in _RULES}
    unseen = followed - {op for op, _ in proven}
    assert unseen <= UNSEEN
