"""The links of single operators, printed: (port, axis) for an axis as it is, (port, axis, places) for some of it."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from channelfold.passes.base import Refused
from channelfold.passes.channels.links import LinkTable
from channelfold.passes.channels.ports import Link, Links, Member
from channelfold.runtime.io.shapes import measured_shapes
from channelfold.tests.graphs import build, feeds


def links(signature: str, body: str, **constants) -> Links:
    """Those of the last node."""
    graph = build(signature, body, kind="float", **constants)
    return LinkTable(graph, measured_shapes(graph, feeds(graph))).of(graph.nodes[-1])


def printed(found: list[Link]) -> list[str]:
    return ["".join(map(_member, link)) for link in found]


def _member(member: Member) -> str:
    places = "" if member.at is None else f" {','.join(map(str, member.at))}"
    return f"({member.port} {member.axis}{places})"


def test_convolutions():
    found = links("(float[N,3,6,6] x) => (float[] y)", "y = Conv(x, W, B)", W=(4, 3, 1, 1), B=4)
    assert printed(found.summed) == ["(0 1)(1 1)"]
    assert printed(found.links) == ["(-1 1)(1 0)(2 0)", "(0 0)(-1 0)"]
    assert found.blocked == dict.fromkeys([(0, 2), (0, 3), (-1, 2), (-1, 3)], "Conv works along it")
    assert not found.edits


def test_depthwise_convolutions():
    found = links("(float[N,2,6,6] x) => (float[] y)", "y = Conv<group=2>(x, W)", W=(4, 1, 1, 1))
    assert not found.summed
    assert printed(found.links)[0] == "(0 1 0,0,1,1)(-1 1)(1 0)"
    assert found.edits == [("group", 0, 0, 1)]


def test_grouped_convolutions():
    found = links("(float[N,4,6,6] x) => (float[] y)", "y = Conv<group=2>(x, W)", W=(6, 2, 1, 1))
    assert printed(found.summed) == ["(0 1)(1 1 0,1,0,1)"]
    assert printed(found.links)[:3] == ["(-1 1)(1 0)", "(0 1)(0 1 0,1,0,1)", "(-1 1)(-1 1 0,1,2,0,1,2)"]


def test_products():
    found = links("(float[2,5,4] x, float[4,3] z) => (float[] y)", "y = MatMul(x, z)")
    assert printed(found.summed) == ["(0 2)(1 0)"]
    assert printed(found.links) == ["(0 1)(-1 1)", "(1 1)(-1 2)", "(-1 0)(0 0)"]
    found = links("(float[4,5] x) => (float[] y)", "y = Gemm<transA=1, transB=1>(x, W, B)", W=(3, 4), B=(5, 1))
    assert printed(found.summed) == ["(0 0)(1 1)"]
    assert printed(found.links) == ["(-1 0)(0 1)(2 0)", "(-1 1)(1 0)"]


def test_broadcasting():
    found = links("(float[2,3,4] x) => (float[] y)", "y = Where(c, x, z)", c=np.array([[True], [False], [True]]), z=4)
    assert printed(found.links) == ["(1 0)(-1 0)", "(0 0)(1 1)(-1 1)", "(1 2)(2 0)(-1 2)"]


def test_concat_and_split():
    found = links("(float[2,3] x) => (float[] y)", "y = Concat<axis=-1>(x, W)", W=(2, 2))
    assert printed(found.links) == ["(0 1)(-1 1 0,1,2)", "(1 1)(-1 1 3,4)", "(-1 0)(0 0)(1 0)"]
    found = links("(float[2,5] x) => (float[] y, float[] z)", "y, z = Split<axis=1>(x, s)", s=np.array([2, 3]))
    assert printed(found.links) == ["(-1 1)(0 1 0,1)", "(0 0)(-1 0)", "(-2 1)(0 1 2,3,4)", "(0 0)(-2 0)"]


def test_reshapes_leave_a_choice_where_an_axis_is_split():
    found = links("(float[N,5,6] x) => (float[] y)", "y = Reshape(x, s)", s=np.array([0, 0, 3, 2]))
    assert printed(found.links) == ["(0 0)(-1 0)", "(0 1)(-1 1)"]
    assert [printed(choice) for choice in found.choices] == [["(0 2)(-1 2 0,0,1,1,2,2)", "(0 2)(-1 3 0,1,0,1,0,1)"]]
    assert found.edits == [("size", 1, -1, axis) for axis in range(4)]


def test_reshapes_that_mix_axes_agree_in_what_first_and_last_axes_count_in_common():
    found = links("(float[4,3,6] x) => (float[] y)", "y = Reshape(x, s)", s=np.array([2, 9, 4]))
    assert printed(found.links) == [
        "(0 0 0,1,2,3)(-1 0 0,0,1,1)",
        "(0 2 0,1,2,3,4,5,0,1,2,3,4,5)(-1 2 0,1,2,3,0,1,2,3,0,1,2,3)",
    ]
    assert found.blocked == {(0, 1): "Reshape mixes it with other axes", (-1, 1): "Reshape mixes it with other axes"}


def test_a_zero_in_a_shape_holds_an_axis_that_does_not_stay_in_place():
    found = links("(float[1,6,6] x) => (float[] y)", "y = Reshape(x, s)", s=np.array([6, 0]))
    assert found.blocked == {(0, 1): "Reshape copies its length", (-1, 1): "Reshape copies its length"}


def test_space_and_depth():
    x = "(float[1,8,2,2] x) => (float[] y)"
    assert printed(links(x, "y = DepthToSpace<blocksize=2>(x)").links)[0] == "(0 1)(-1 1 0,1,0,1,0,1,0,1)"
    assert printed(links(x, 'y = DepthToSpace<blocksize=2, mode="CRD">(x)').links)[0] == "(0 1)(-1 1 0,0,0,0,1,1,1,1)"
    found = links("(float[1,2,2,2] x) => (float[] y)", "y = SpaceToDepth<blocksize=2>(x)")
    assert printed(found.links)[0] == "(-1 1)(0 1 0,1,0,1,0,1,0,1)"


def test_what_works_along_an_axis():
    x = "(float[2,3,4] x) => (float[] y, int64[] i)"
    found = links(x, "y, i = TopK<axis=1>(x, k)", k=np.array([2]))
    assert found.blocked == {(0, 1): "TopK works along it"}
    assert printed(found.links) == ["(0 0)(-1 0)(-2 0)", "(0 2)(-1 2)(-2 2)"]
    found = links("(float[2,3,4] x) => (int64[] y)", "y = ArgMax<axis=1, keepdims=0>(x)")
    assert printed(found.links) == ["(0 0)(-1 0)", "(0 2)(-1 1)"]
    found = links("(float[2,3,4] x) => (float[] y)", "y = CumSum(x, a)", a=np.array(-1))
    assert found.blocked == {(0, 2): "CumSum works along it"}


def test_norms_over_the_channels_are_noted():
    found = links("(float[2,3,4] x) => (float[] y)", "y = LayerNormalization<axis=1>(x, g)", g=(3, 4))
    assert printed(found.links) == ["(0 0)(-1 0)", "(0 1)(-1 1)(1 0)", "(0 2)(-1 2)(1 1)"]
    assert set(found.reduced) == {(0, 1), (0, 2), (-1, 1), (-1, 2)}
    found = links("(float[2,3,4] x) => (float[] y)", "y = InstanceNormalization(x, g, b)", g=3, b=3)
    assert set(found.reduced) == {(0, 2), (-1, 2)}


def test_places_in_front_of_a_resize_are_told_by_its_scales():
    found = links(
        "(float[1,4,4,3] x) => (float[] y)",
        "y = Resize(x, , s)",
        s=np.array([1, 2, 2, 1], np.float32),
    )
    assert printed(found.links) == ["(0 0)(-1 0)", "(0 3)(-1 3)"]


@pytest.mark.parametrize(
    ("signature", "body", "reason", "constants"),
    [
        ("(float[2,3] x) => (float[] y)", "y = Trilu(x)", "Trilu reads or writes it", {}),
        ("(float[2,3] x, int64[2] s) => (float[] y)", "y = MatMul(x, v)", "MatMul with a vector", {"v": 3}),
        ("(float[1,1,4,4] x) => (float[] y, int64[] i)", "y, i = MaxPool<kernel_shape=[2,2]>(x)", "places across", {}),
        ("(float[2,1,3] x) => (float[] y)", "y = Squeeze(x)", "Squeeze without axes", {}),
        ("(float[2,3] x, int64[1] a) => (float[] y)", "y = ReduceMean(x, a)", "names no constant axes", {"opset": 18}),
    ],
)
def test_what_is_refused_says_why(signature, body, reason, constants):
    with pytest.raises(Refused, match=reason):
        links(signature, body.replace("'", '"'), **constants)


def test_an_operator_of_another_domain_is_not_known_by_its_name():
    graph = gs.Graph(
        [gs.Node("Relu", "r", domain="my", inputs=[gs.Variable("x")], outputs=[gs.Variable("y")])], opset=17
    )
    with pytest.raises(Refused, match="Relu reads or writes it"):
        LinkTable(graph, {"x": (2, 3), "y": (2, 3)}).of(graph.nodes[0])
