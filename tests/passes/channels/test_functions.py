"""What channels are, as functions of channels: read from small cones."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from channelfold.passes.base import Refused
from channelfold.passes.channels.cones import Cone, cone
from channelfold.passes.channels.functions import CONSTANT, MIXED, Reader
from channelfold.runtime.io.shapes import LazyShapes
from channelfold.tests.graphs import build

TOKENS = "(float[N,3,4] h) => (float[] y)"


def reading(body: str, signature: str = TOKENS, roots: tuple[str, ...] = ("h",), **given) -> tuple[np.ndarray, Reader]:
    """The channels of y along the last axis, as functions of those of the roots, and what has read them."""
    graph = build(signature, body, opset=20, **given)
    found = behind(graph, roots)
    feed = {t.name: np.zeros([d if isinstance(d, int) else 2 for d in t.shape]) for t in graph.inputs}
    reader = Reader(graph, LazyShapes(graph, feed))
    return reader.read(found, {id(root): -1 for root in found.roots}, -1), reader


def behind(graph: gs.Graph, roots: tuple[str, ...]) -> Cone:
    return cone(graph, graph.outputs[0], lambda tensor: tensor.name in roots, len(roots))


def written(reader: Reader, number: int) -> str:
    """A function as text, of the channel h."""
    if number in (CONSTANT, MIXED):
        return ("constant", "mixed")[number]

    def text(function) -> str:
        if isinstance(function, gs.Constant):
            return f"{float(function.values.reshape(())):g}"
        if function.root is not None:
            return "hgu"[function.root]
        return f"{function.node.op}({', '.join(text(a) for a in function.arguments if a is not None)})"

    return text(reader.functions.items[number])


def test_the_worked_example():
    body = "s = Shape(h)\n o = ConstantOfShape<value=bool[1] {0}>(s)\n p = Transpose<perm=[2,0,1]>(o)\n" \
           "n = ScatterND(p, two, T)\n m = Transpose<perm=[1,2,0]>(n)\n a = Gelu(h)\n y = Where(m, a, h)"  # fmt: skip
    channels, reader = reading(body, two=np.array([[0], [1]]), T=np.ones((2, 2, 3), bool))
    assert channels["channel"].tolist() == [0, 1, 2, 3]
    assert [written(reader, f) for f in channels["function"]] == ["Gelu(h)", "Gelu(h)", "h", "h"]
    assert [reader.functions.items[f].affine for f in channels["function"]] == [None, None, (0, 1, 0), (0, 1, 0)]


@pytest.mark.parametrize(
    ("body", "functions", "channel", "scale", "shift"),
    [
        ("a = Mul(h, v)\n y = Add(v, a)", ["h"] * 4, [0, 1, 2, 3], [2, 0.5, -1, 4], [2, 0.5, -1, 4]),
        ("a = Mul(h, z)\n y = Add(a, v)", ["h", "constant", "h", "h"], [0, -1, 2, 3], [1, 0, 3, 5], [2, 0.5, -1, 4]),
        ("a = Mul(h, z)\n b = Add(a, v)\n y = Mul(b, v)", ["h", "constant", "h", "h"], [0, -1, 2, 3],
         [2, 0, -3, 20], [4, 0.25, 1, 16]),
        ("a = Div(h, two)\n y = Sub(one, a)", ["Sub(1, Div(h, 2))"] * 4, [0, 1, 2, 3], [1] * 4, [0] * 4),
        ("y = Gather<axis=2>(h, order)", ["h"] * 4, [3, 0, 0, 1], [1] * 4, [0] * 4),
        ("a = Relu(h)\n y = Sub(a, h)", ["Sub(Relu(h), h)"] * 4, [0, 1, 2, 3], [1] * 4, [0] * 4),
        ("a = Gather<axis=2>(h, order)\n y = Mul(a, h)", ["mixed"] * 4, None, [1] * 4, [0] * 4),
        ("a = Mul(h, v)\n y = Relu(a)", ["mixed"] * 4, None, [1] * 4, [0] * 4),
        ("a = Relu(h)\n y = Mul(a, v)", ["Relu(h)"] * 4, [0, 1, 2, 3], [2, 0.5, -1, 4], [0] * 4),
    ],
)  # fmt: skip
def test_scales_shifts_and_functions(body, functions, channel, scale, shift):
    given = {"v": np.array([2, 0.5, -1, 4]), "z": np.array([1.0, 0, 3, 5]), "order": np.array([3, 0, 0, 1])}
    channels, reader = reading(body, **given, one=1.0, two=2.0)
    assert [written(reader, f) for f in channels["function"]] == functions
    assert channel is None or channels["channel"].tolist() == channel
    assert (channels["scale"].tolist(), channels["shift"].tolist()) == (scale, shift)


def test_the_affine_map_of_a_written_function():
    channels, reader = reading("a = Div(h, two)\n b = Sub(one, a)\n y = Neg(b)", one=1.0, two=2.0)
    assert reader.functions.items[channels["function"][0]].affine == (0, 0.5, -1.0)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = Transpose<perm=[1,0,2]>(h)", "its channels are on another axis, or its shape is another one"),
        ("y = Slice(h, one, four, one)", "its channels are on another axis, or its shape is another one"),
        ("y = Gather<axis=1>(h, order)", "something else than channels is moved or mixed"),
        ("a = Gather<axis=1>(h, order)\n y = Add(h, a)", "tensors that are laid out differently meet"),
        ("y = Mul(h, tokens)", "which channels go through the activation differs along another axis"),
        ("y = ScatterElements<axis=2, reduction=\"add\">(h, index, h)", "ScatterElements does more than to move chan"),
        ("y = Softmax(h)", "Softmax is in between"),
        ("y = ReduceSum(h)", "ReduceSum is in between"),
    ],
)  # fmt: skip
def test_what_is_no_function_of_channels(body, reason):
    given = {
        "one": np.array([1]),
        "four": np.array([4]),
        "order": np.array([2, 1, 0]),
        "index": np.zeros((2, 3, 4), int),
    }
    with pytest.raises(Refused, match=reason):
        reading(body, **given, tokens=np.array([[1.0], [2], [3]]))


def test_a_cone_ends_somewhere():
    body = "a0 = Relu(h)\n" + "\n".join(f"a{i + 1} = Relu(a{i})" for i in range(300)) + "\n y = Relu(a300)"
    with pytest.raises(Refused, match="too many nodes are in between"):
        reading(body)
