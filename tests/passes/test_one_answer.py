"""What stands between two linears is one thing to all passes: each handles it, or refuses it by name."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from channelfold.passes.base import Outcome, Refused
from channelfold.passes.channels.cut_regions import best_trace
from channelfold.passes.channels.links import LinkTable
from channelfold.passes.channels.widths import read_by
from channelfold.passes.ffn.blocks import find_ffns
from channelfold.passes.ffn.pairs import Pairs
from channelfold.passes.layers.linear import view
from channelfold.runtime.io.shapes import measured_shapes
from channelfold.tests.graphs import build

BETWEEN = {
    "Gelu": "a = Gelu(h)",
    "Selu": "a = Selu(h)",
    "Softsign": "a = Softsign(h)",
    "com.microsoft.Gelu": "a = com.microsoft.Gelu(h)",
    "QuickGelu": "a = com.microsoft.QuickGelu(h)",
    "FastGelu": "a = com.microsoft.FastGelu(h)",
    "FastGelu with bias": "a = com.microsoft.FastGelu(h, b)",
    "BiasGelu": "a = com.microsoft.BiasGelu(h, b)",
    "Where": "m = Greater(h, zero)\na = Where(m, h, zero)",
    "Shrink": "a = Shrink(h)",
    "Sum": "s = Sum(h)\na = Relu(s)",
    "Sum of one": "a = Sum(h)",
    "Sin": "a = Sin(h)",
    "Ceil": "a = Ceil(h)",
}
RESHAPED = "r = Reshape(h, wide)\ng = Gelu(r)\na = Reshape(g, flat)"
COLUMNS = ("prune", "widths", "ffns", "pairs")


def answer(graph: gs.Graph, column: str) -> str:
    """ "" where what stands in front of the last linear is handled, else why it is refused."""
    shapes = measured_shapes(graph, {"x": np.ones((6, 8), np.float32)})
    node = next(node for node in graph.nodes if node.op == "MatMul" and node.outputs[0].name == "d")
    down = view(graph, node)
    try:
        if column == "prune":
            return next(filter(None, best_trace(LinkTable(graph, shapes), down.data, 1).fixed), "")
        if column == "widths":
            read_by(graph, down, shapes)
        elif column == "ffns":
            outcome = Outcome()
            found = find_ffns(graph, shapes, outcome)
            return (
                ""
                if [ffn.down.node for ffn in found] == [node]
                else outcome.refused[0].reason
                if outcome.refused
                else "not seen"
            )
        elif Pairs(graph).at(node, plain=True) is None:
            return "not seen"
    except Refused as error:
        return str(error)
    return ""


def network(between: str) -> gs.Graph:
    body = f"u = MatMul(x, W1)\nh = Add(u, b1)\n{between}\nd = MatMul(a, W2)\ny = Add(d, b2)"
    constants = {"W1": (8, 16), "b1": 16, "W2": (16, 8), "b2": 8, "b": 16, "zero": np.array(0.0)}
    used = {name: values for name, values in constants.items() if f"{name})" in body or f"{name}," in body}
    if "wide" in body:
        used |= {"wide": np.array([2, -1, 16]), "flat": np.array([-1, 16])}
    domains = '"com.microsoft" : 1' if "com.microsoft" in body else ""
    return build("(float[6,8] x) => (float[6,8] y)", body, opset=20, kind="float", domains=domains, **used)


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("between", BETWEEN)
def test_handled_by_all(between: str, column: str):
    if (between, column) == ("Sum of one", "ffns"):
        pytest.skip("it is linear, and two linears in a row are no FFN")
    assert answer(network(BETWEEN[between]), column) == ""


@pytest.mark.parametrize("column", COLUMNS)
def test_a_reshape_is_handled_or_named(column: str):
    reason = answer(network(RESHAPED), column)
    assert not reason or "Reshape" in reason


def test_projections_behind_a_norm_are_no_ffns():
    """They are not refused either: a norm that is written out and a residual stream hold no activation."""
    body = """
        f = Relu(x0)
        l = MatMul(f, W0)
        x = Add(x0, l)
        s = Mul(x, x)
        m = ReduceMean<axes=[-1]>(s)
        e = Add(m, eps)
        r = Sqrt(e)
        i = Reciprocal(r)
        n = Mul(x, i)
        g = Mul(n, gamma)
        q = MatMul(g, W1)
        k = MatMul(g, W2)
        y = Add(q, k)
    """
    constants = {"W0": (8, 8), "W1": (8, 4), "W2": (8, 4), "gamma": 8, "eps": np.array(1e-5)}
    graph = build("(float[6,8] x0) => (float[6,4] y)", body, kind="float", **constants)
    outcome = Outcome()
    shapes = measured_shapes(graph, {"x0": np.ones((6, 8), np.float32)})
    assert not find_ffns(graph, shapes, outcome)
    assert [refusal.node for refusal in outcome.refused] == [graph.nodes[1].name]  # the one behind Relu
