"""Where sizes in shapes come from and go, through what exporters put in between."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from channelfold.passes.channels.sizes import Implied, Length, Written, readers_of_size, source_of_size
from channelfold.tests.graphs import build, node

SIGNATURE = "(float[N,4,6] x) => (float[] y)"


def shape_of(tensor: gs.Tensor) -> tuple[int, ...] | None:
    known = tensor.shape
    if known is None or not all(isinstance(n, int) or n == "N" for n in known):
        return None
    return tuple(2 if n == "N" else n for n in known)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def sources(body: str, op: str = "Reshape", holder: int = 1, count: int = 3, **constants) -> list[str]:
    graph = build(SIGNATURE, body, **constants)
    return [_printed(source_of_size(node(graph, op), holder, element, shape_of)) for element in range(count)]


def _printed(source: object) -> str:
    match source:
        case Written(ports, element, value):
            return f"{value} at {ports}, element {element}"
        case Length(tensor, axis):
            return f"{tensor.name} {axis}"
        case Implied():
            return "implied"
    return "computed"


def test_a_constant():
    assert sources("y = Reshape(x, s)", s=ints(0, 24, -1)) == ["x 0", "24 at (1,), element 1", "implied"]


def test_a_zero_that_means_zero():
    found = sources("y = Reshape<allowzero=1>(x, s)", s=ints(0, 24, 1))
    assert found[0] == "0 at (1,), element 0"


def test_an_attribute():
    graph = build(SIGNATURE, "y = Relu(x)")
    graph.nodes[0].op, graph.nodes[0].attrs = "Reshape", {"shape": [0, -1, 6]}
    found = [_printed(source_of_size(graph.nodes[0], 1, element, shape_of)) for element in range(4)]
    assert found == ["x 0", "implied", "6 at (), element 2", "computed"]


def test_pieces_of_a_shape_and_constants():
    body = """
        s = Shape(x)
        n = Gather(s, zero)
        nu = Unsqueeze(n, zeros)
        last = Slice(s, minus, end)
        c = Concat<axis=0>(nu, last, four)
        i = Identity(c)
        y = Reshape(x, i)
    """
    found = sources(body, zero=np.array(0), zeros=ints(0), minus=ints(-1), end=ints(99), four=ints(4))
    assert found == ["x 0", "x 2", "4 at (1, 0, 2), element 0"]


def test_a_part_of_a_shape():
    body = "s = Shape<start=-2>(x) c = Concat<axis=0>(minus, s) y = Reshape(x, c)"
    assert sources(body, minus=ints(-1)) == ["implied", "x 1", "x 2"]


def test_arithmetic():
    body = "s = Shape<start=1>(x) m = Mul(s, two) c = Concat<axis=0>(minus, m) y = Reshape(x, c)"
    assert sources(body, two=ints(1), minus=ints(-1)) == ["implied", "computed", "computed"]


def test_an_expand_that_takes_minus_one_for_what_is_there():
    body = """
        s = Shape<end=1>(x)
        want = Concat<axis=0>(s, minus, six)
        open = Equal(want, minus)
        shape = Where(open, ones, want)
        y = Expand(x, shape)
    """
    found = sources(body, "Expand", minus=ints(-1), six=ints(6), ones=ints(1, 1, 1))
    assert found == ["x 0", "implied", "6 at (1, 2, 2), element 0"]


@pytest.mark.parametrize("test", ["open = Equal(want, six)", "open = Less(want, minus)"])
def test_another_condition_is_computed(test):
    body = f"want = Concat<axis=0>(minus, six, six) {test} shape = Where(open, ones, want) y = Expand(x, shape)"
    found = sources(body, "Expand", minus=ints(-1), six=ints(6), ones=ints(1, 1, 1))
    assert found == ["computed"] * 3


def readers(body: str, axis: int, *, signature: str = SIGNATURE, **constants: Any) -> list[tuple[str, int]] | None:
    graph = build(signature, body, **constants)
    shape = next(n for n in graph.nodes if n.op == "Shape")
    found = readers_of_size(graph, shape, axis, shape_of)
    return None if found is None else [(reader.outputs[0].name, element) for reader, element in found]


def test_sizes_that_end_in_shapes():
    body = """
        s = Shape(x)
        head = Slice(s, zero, two)
        c = Concat<axis=0>(head, minus)
        a = Reshape(x, c)
        b = ConstantOfShape(s)
        y = Expand(a, s)
    """
    constants: dict[str, Any] = {"zero": ints(0), "two": ints(2), "minus": ints(-1)}
    assert readers(body, 1, **constants) == [("b", 1), ("y", 1), ("a", 1)]
    assert readers(body, 2, **constants) == [("b", 2), ("y", 2)]


def test_sizes_that_are_left_out():
    assert readers("s = Shape<start=0, end=1>(x) y = Expand(x, s)", 1) == []
    assert readers("s = Shape(x) r = Shape(s) y = Expand(x, r)", 1) == []


@pytest.mark.parametrize(
    "body",
    [
        "s = Shape(x) m = Mul(s, s) y = Expand(x, m)",
        "s = Shape(x) g = Gather(s, i) y = Expand(x, g)",
        "s = Shape(x) c = Cast<to=11>(s) y = Mul(x, c)",
    ],
)
def test_sizes_that_are_computed_with(body):
    assert readers(body, 1, signature="(float[N,4,6] x, int64[1] i) => (float[] y)") is None


def test_sizes_that_are_outputs():
    assert readers("s = Shape(x) y = Expand(x, s)", 1, signature="(float[N,4,6] x) => (float[] y, int64[] s)") is None
    assert (
        readers("s = Shape<end=1>(x) y = Expand(x, s)", 1, signature="(float[N,4,6] x) => (float[] y, int64[] s)") == []
    )


def test_sizes_that_a_subgraph_reads():
    body = """
        s = Shape(x)
        y = If(c)<
            then_branch = then () => (float[] t) { t = Expand(x, s) },
            else_branch = other () => (float[] e) { e = Neg(x) }
        >
    """
    assert readers(body, 1, signature="(float[N,4,6] x, bool c) => (float[] y)") is None
