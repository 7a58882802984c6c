from __future__ import annotations

import math

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from channelfold.passes.fold.algebra import Size, product
from channelfold.passes.fold.symbolic import Sizes
from channelfold.runtime.io.files import import_model, infer_shapes
from channelfold.runtime.io.shapes import measured_shapes
from channelfold.tests.channel_strategies import networks
from channelfold.tests.graphs import build, feeds

B, S, ONE = Size.unknown("b"), Size.unknown("s"), Size.number(1)


def n(number: int) -> Size:
    return Size.number(number)


def evaluate(size: Size, known: dict) -> int:
    """The number that a size is. Raises KeyError where it depends on anything but ``known``."""

    def factor(key) -> int:
        if isinstance(key, tuple) and key[0] == "least":
            return min(evaluate(key[1], known), key[2])
        if isinstance(key, tuple) and key[0] == "floor":
            return evaluate(key[1], known) // key[2]
        return known[key]

    return sum(times * math.prod(map(factor, factors)) for factors, times in size.terms)


def test_equal_sums_are_equal():
    assert (B + S) * (B + ONE) == B * B + S + B + S * B
    assert Size.number(0) == B - B
    assert (B - B).known == 0
    assert product([n(3), B, n(4)]) == n(12) * B


def test_division_without_rest():
    assert (n(6) * B * S).over(n(3) * S) == n(2) * B
    assert (n(6) * B + n(3)).over(n(3)) == n(2) * B + ONE
    assert (n(6) * B).over(n(4)) is None
    assert B.over(S) is None
    assert B.over(B + S) is None


def test_what_differs_whatever_the_input():
    assert B.differs(n(-1))
    assert (B + ONE).differs(Size.number(0))
    assert (B + n(2)).differs(B)
    assert not B.differs(n(3))
    assert not B.differs(S)
    assert not (B + ONE).differs(S)


TERMS = st.lists(st.tuples(st.lists(st.sampled_from("bsk"), max_size=2), st.integers(-3, 3)), max_size=3)


@settings(max_examples=200, deadline=None)
@given(TERMS, TERMS, st.tuples(*[st.integers(0, 6)] * 3))
def test_arithmetic_is_that_of_numbers(left, right, numbers):
    known = dict(zip("bsk", numbers, strict=True))

    def made(terms) -> Size:
        parts = [product([Size.number(times), *map(Size.unknown, factors)]) for factors, times in terms]
        return sum(parts, Size.number(0))

    one, other = made(left), made(right)
    a, b = evaluate(one, known), evaluate(other, known)
    assert evaluate(one + other, known) == a + b
    assert evaluate(one - other, known) == a - b
    assert evaluate(one * other, known) == a * b
    assert not one.differs(other) or a != b
    assert not one.never_negative or a >= 0
    assert one.known in (None, a)
    if (quotient := one.over(other)) is not None and b:
        assert evaluate(quotient, known) == a / b


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(networks())
def test_shapes_of_random_networks_are_those_of_a_run(model):
    graph = import_model(model)
    infer_shapes(graph)
    sizes, feed = Sizes(graph), feeds(graph)
    known = {(name, axis): size for name, values in feed.items() for axis, size in enumerate(values.shape)}
    shapes = measured_shapes(graph, feed)
    for node in graph.nodes:
        for tensor in node.outputs:
            found = sizes.shape(tensor)
            if found is None or tensor.name not in shapes:
                continue
            assert len(found) == len(shapes[tensor.name]), tensor.name
            for axis, size in enumerate(found):
                key = (tensor.name, axis)
                if size == Size.unknown(key):
                    known[key] = shapes[tensor.name][axis]
                assert evaluate(size, known) == shapes[tensor.name][axis], (tensor.name, axis)


def value_of(body: str, name: str = "t", **constants) -> list:
    graph = build("(float[b,s,24] x) => (int64[] y)", f"{body} y = Neg(t)", **constants)
    found = Sizes(graph).value(graph.tensors()[name])
    assert found is not None
    known = {("x", 0): 5, ("x", 1): 7}
    return [None if size is None else evaluate(size, known) for size in found.reshape(-1)]


def test_values_of_shapes():
    assert value_of("t = Shape(x)") == [5, 7, 24]
    assert value_of("t = Shape<start=1, end=-1>(x)") == [7]
    assert value_of("t = Size(x)") == [5 * 7 * 24]
    assert value_of("s = Shape(x) t = ReduceProd(s)") == [5 * 7 * 24]
    assert value_of("s = Shape(x) t = Div(s, two)", two=np.array(2)) == [2, 3, 12]
    assert value_of("s = Shape(x) t = Sub(s, two)", two=np.array(2)) == [3, 5, 22]
    assert value_of("s = Shape(x) q = Equal(s, n) t = Where(q, m, s)", n=np.array(24), m=np.array(1)) == [None, None, 1]
    assert value_of("s = Shape(x) q = Equal(s, n) t = Where(q, n, s)", n=np.array(-1)) == [5, 7, 24]


def test_a_value_that_does_not_fit_its_type_is_not_known():
    assert value_of("c = Cast<to=6>(big) t = Cast<to=7>(c)", big=np.array([2**40, 3])) == [None, 3]


def test_positions_cut_to_the_length_broadcast_to_it():
    """The position embeddings of BERT: a table of 512 rows, cut to the length of the input."""
    body = """
        shape = Shape(x)  n = Gather(shape, second)
        rows = Slice(table, first, n, first)
        y = Add(x, rows)
    """
    graph = build("(float[b,s] x) => (float[] y)", body, first=np.array([0]), second=np.array([1]), table=(512,))
    found = Sizes(graph).shape(graph.outputs[0])
    assert found == (Size.unknown(("x", 0)), Size.unknown(("x", 1)))
