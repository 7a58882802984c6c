"""Einsum written as Transpose, Mul and MatMul: what is written, and that it computes the same."""

from __future__ import annotations

import onnx_graphsurgeon as gs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from channelfold.passes.base import Context
from channelfold.passes.fold import RewriteEinsum
from channelfold.passes.layers.linear import linears
from channelfold.runtime.io.files import check
from channelfold.tests.graphs import assert_same, build, feeds, listing, ops, run

SIZES = dict(zip("abcdef", (2, 3, 4, 5, 1, 6), strict=True))


def einsum(equation: str, weight: str = "", free: str = "") -> gs.Graph:
    """A graph of one Einsum; ``weight``: the operand that is a constant; ``free``: indices whose sizes are open."""
    operands = dict(zip("xyz", equation.partition("->")[0].replace(" ", "").split(","), strict=False))
    shapes = {name: [f"N{i}" if i in free else str(SIZES[i]) for i in term] for name, term in operands.items()}
    inputs = ", ".join(f"float[{','.join(shape)}] {name}" for name, shape in shapes.items() if name != weight)
    given = {weight: tuple(map(int, shapes[weight]))} if weight else {}
    return build(f"({inputs}) => (float[] out)", f'out = Einsum<equation="{equation}">({", ".join(operands)})', **given)


def rewritten(graph: gs.Graph) -> list[str]:
    """What a rewrite changes and refuses. The outputs stay what they were, and nothing is left to rewrite."""
    feed = feeds(graph, size=3)
    before = run(graph, feed)
    outcome = RewriteEinsum().apply(graph, Context())
    check(graph)
    assert_same(before, run(graph, feed))
    assert not RewriteEinsum().apply(graph, Context()).changed
    return [*(change.what for change in outcome.changed), *(refusal.reason for refusal in outcome.refused)]


@pytest.mark.parametrize(
    ("equation", "weight", "free", "nodes"),
    [
        ("abc->bca", "", "abc", "Transpose"),
        ("ab->ab", "", "ab", "Identity"),
        ("ab, ab -> ab", "", "ab", "Mul"),
        ("ab,ca->cab", "", "abc", "Unsqueeze, Unsqueeze, Mul"),
        ("abc,cd->abd", "y", "ab", "MatMul"),
        ("dc,abc->abd", "x", "ab", "Transpose, MatMul"),
        ("abc,cde->abde", "y", "ab", "Reshape, MatMul, Reshape"),
        ("abcd,cdf->abf", "y", "ab", "Reshape, Reshape, MatMul"),
        ("abc,cb", "", "abc", ""),
        ("dbac,fbac->bdf", "", "", "Transpose, Reshape, Transpose, Reshape, MatMul"),
        ("abcd,aecd->acbe", "", "abce", "Transpose, Transpose, MatMul"),
        ("acbe,aecd->abcd", "", "abce", "Transpose, MatMul, Transpose"),
    ],
)
def test_rewrites(equation, weight, free, nodes):
    graph = einsum(equation, weight, free)
    (said,) = rewritten(graph)
    if nodes:
        assert said == f"Einsum {equation!r}: {nodes}"
        assert ", ".join(ops(graph)) == nodes


def test_a_layer_with_heads_is_a_linear_as_any_other():
    graph = einsum("abc,cdf->abdf", "y", "ab")
    rewritten(graph)
    assert [line.partition(" = ")[2] for line in listing(graph).splitlines()] == [
        "Reshape(y, Einsum_0_reshape_shape)",
        "MatMul(x, Einsum_0_reshape)",
        "Reshape(Einsum_0_matmul, Einsum_0_reshape_shape_1)",
    ]
    graph = einsum("abc,cd->abd", "y", "ab")
    rewritten(graph)
    assert [(linear.name, linear.channels) for linear in linears(graph)] == [("Einsum_0", (5, 4))]


@pytest.mark.parametrize(
    ("equation", "reason"),
    [
        ("aab->ab", "Einsum with an ellipsis or a diagonal"),
        ("...b->...b", "Einsum with an ellipsis or a diagonal"),
        ("ab->a", "it sums over 'b' of one operand"),
        ("ab,ac->b", "it sums over 'c' of one operand"),
        ("ab,ab->a", "it is no product of matrices"),
        ("ab,bc,cd->ad", "it has 3 operands"),
        ("abcd,bcef->adef", "several indices of unknown size make one axis"),
    ],
)
def test_refusals(equation, reason):
    free = "abcdef" if "unknown" in reason else ""
    graph = einsum(equation, free=free) if "." not in equation and "aa" not in equation else None
    if graph is None:
        shape = "float[2,2,3]" if "aa" in equation else "float[2,3]"
        graph = build(f"({shape} x) => (float[] out)", f'out = Einsum<equation="{equation}">(x)')
    assert rewritten(graph) == [f"Einsum {equation!r}: {reason}"]


@pytest.mark.parametrize("opset", [12, 13])
def test_unsqueeze_takes_its_axes_as_the_opset_has_them(opset):
    graph = build("(float[2] x, float[3] y) => (float[2,3] z)", 'z = Einsum<equation="a,b->ab">(x, y)', opset=opset)
    assert rewritten(graph) == ["Einsum 'a,b->ab': Unsqueeze, Unsqueeze, Mul"]


@given(st.data())
def test_random_equations(data):
    letters = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4, unique=True)
    x, y = data.draw(letters), data.draw(letters)
    kept = data.draw(st.lists(st.sampled_from(sorted({*x, *y})), unique=True, min_size=1))
    weight = data.draw(st.sampled_from(["", "x", "y"]))
    assert len(rewritten(einsum(f"{''.join(x)},{''.join(y)}->{''.join(kept)}", weight))) == 1
