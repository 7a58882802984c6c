from __future__ import annotations

import numpy as np
import pytest

from channelfold.passes.base import Refused
from channelfold.passes.channels.widths import follow, read_by
from channelfold.passes.layers.linear import linears
from channelfold.runtime.io.shapes import measured_shapes
from channelfold.tests.graphs import build, feeds

TOKENS = "(float[N,5,8] x) => (float[] y)"


def group(body, signature=TOKENS, **given):
    """The group of what the last linear reads."""
    graph = build(signature, body, **given)
    return read_by(graph, linears(graph)[-1], measured_shapes(graph, feeds(graph)))


def names(width) -> str:
    return " ".join(sorted(tensor.name for tensor, _ in width.region.axes.values()))


def test_a_gated_hidden_layer():
    body = "u = MatMul(x, U)\n g0 = MatMul(x, G)\n g = Add(g0, b)\n s = Sigmoid(g)\n a = Mul(g, s)\n h = Mul(a, u)\n"
    width = group(body + "y = MatMul(h, D)", U=(8, 12), G=(8, 12), b=12, D=(12, 4))
    assert width.channels == 12
    assert names(width) == "a g g0 h s u"
    assert sorted(linear.name for linear in width.writers) == ["MatMul_0", "MatMul_1"]
    assert [linear.name for linear in width.readers] == ["MatMul_6"]
    assert [(node.op, place, axis) for node, place, axis in width.vectors] == [("Add", 1, -1)]
    assert not width.linear


def test_a_gate_by_channel_reaches_back_to_its_own_weights():
    body = """
        h0 = Conv(x, W)
        m = GlobalAveragePool(h0)
        e0 = Conv(m, E)
        e = Sigmoid(e0)
        h = Mul(h0, e)
        y = Conv(h, V)
    """
    graph = build("(float[N,3,6,6] x) => (float[] y)", body, W=(6, 3, 1, 1), E=(6, 6, 1, 1), V=(2, 6, 1, 1))
    width = follow(graph, graph.tensors()["h"], 1, measured_shapes(graph, feeds(graph)))
    assert names(width) == "e e0 h h0 m"
    assert [linear.name for linear in width.writers if linear.name in {r.name for r in width.readers}] == ["Conv_2"]
    width.repeat(np.arange(6) < 4, shapes := measured_shapes(graph, feeds(graph)))
    assert {name: tuple(graph.tensors()[name].shape) for name in "WEV"} == {
        "W": (4, 3, 1, 1), "E": (4, 4, 1, 1), "V": (2, 4, 1, 1)
    }  # fmt: skip
    assert shapes["h"] == measured_shapes(graph, feeds(graph))["h"] == (2, 4, 6, 6)


def test_transposes_and_sums_leave_it_linear():
    body = "u = MatMul(x, U)\n t = Transpose<perm=[0,2,1]>(u)\n s = Add(t, c)\n h = Transpose<perm=[0,2,1]>(s)\n"
    width = group(body + "y = MatMul(h, D)", U=(8, 12), c=(12, 1), D=(12, 4))
    assert width.linear
    assert [axis for _, _, axis in width.vectors] == [-2]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("h = Relu(x)\n y = MatMul(h, U)", "an input of the graph feeds it"),
        ("u = MatMul(x, U)\n h = Softmax(u)\n y = MatMul(h, D)", "Softmax is in between"),
        ("u = MatMul(x, U)\n h = Slice(u, zero, six, two)\n y = MatMul(h, E)", "Slice is in between"),
        ("u = MatMul(x, U)\n r = Relu(u)\n h = Neg(u)\n z = MatMul(r, D)\n v = MatMul(h, D)\n y = Add(z, v)",
         "linears read its channels from several tensors"),
    ],
)  # fmt: skip
def test_reasons(body, reason):
    given = {"U": (8, 12), "D": (12, 4), "E": (6, 4), "zero": np.array([0]), "six": np.array([6]), "two": np.array([2])}
    with pytest.raises(Refused, match=reason):
        group(body, **{name: values for name, values in given.items() if f"{name})" in body or f" {name}," in body})
