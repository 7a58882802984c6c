from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from channelfold.passes.base import Context
from channelfold.passes.fold import MergeMoves
from channelfold.tests.graphs import assert_same, build, changes, feeds, fold, listing, ops, run

IMAGE = "(float[N,3,4,5] x) => (float[] y)"
GIVEN = {
    "a0": np.array([0]), "a1": np.array([1]), "a2": np.array([2]), "a01": np.array([0, 1]), "last": np.array([-1]),
    "flat": np.array([-1, 60]), "rows": np.array([0, 3, 20]), "image": np.array([-1, 3, 4, 5]), "one": np.array([1]),
    "three": np.array([3]), "huge": np.array([2**63 - 1]),
}  # fmt: skip


def graph_of(signature, body, **options):
    used = {name: value for name, value in GIVEN.items() if name in re.findall(r"\w+", body)}
    return build(signature, f"r = Sin(x)\n {body}\n y = Exp(t)", **used, **options)


PAIRS = {  # what stands between Sin and Exp afterwards
    "Transposes that undo each other": ("a = Transpose<perm=[0,2,3,1]>(r) t = Transpose<perm=[0,3,1,2]>(a)", []),
    "Transposes": ("a = Transpose<perm=[0,2,3,1]>(r) t = Transpose<perm=[0,2,1,3]>(a)", ["Transpose"]),
    "Transposes without perm": ("a = Transpose(r) t = Transpose<perm=[3,2,1,0]>(a)", []),
    "Reshape there and back": ("a = Reshape(r, flat) t = Reshape(a, image)", []),
    "Flatten and Reshape": ("a = Flatten(r) t = Reshape(a, rows)", ["Reshape"]),
    "Unsqueeze and Squeeze": ("a = Unsqueeze(r, a1) t = Squeeze(a, a1)", []),
    "two Unsqueezes": ("a = Unsqueeze(r, a1) t = Unsqueeze(a, a1)", ["Unsqueeze"]),
    "an Unsqueeze at the end": ("a = Unsqueeze(r, a0) t = Unsqueeze(a, last)", ["Unsqueeze"]),
    "Unsqueeze and Flatten": ("a = Unsqueeze(r, a2) t = Flatten(a)", ["Reshape"]),
    "three Reshapes": ("a = Reshape(r, flat) b = Reshape(a, rows) t = Flatten(b)", ["Reshape"]),
    "Slices of two axes": ("a = Slice(r, one, huge, a1) t = Slice(a, one, three, a2)", ["Slice"]),
    "Concat in Concat": ("c = Cos(r) a = Concat<axis=1>(r, c) t = Concat<axis=1>(c, a)", ["Cos", "Concat"]),
}  # fmt: skip


@pytest.mark.parametrize("case", PAIRS)
def test_a_pair_becomes_one_or_none(case):
    body, left = PAIRS[case]
    graph = graph_of(IMAGE, body)
    fold(MergeMoves(), graph, rtol=0, size=3)
    assert ops(graph) == ["Sin", *left, "Exp"]


def test_the_axes_of_two_unsqueezes():
    graph = graph_of(
        "(float[N,M] x) => (float[] y)", "a = Unsqueeze(r, a1) b = Unsqueeze(a, last) t = Unsqueeze(b, a01)"
    )
    fold(MergeMoves(), graph, rtol=0)
    assert ops(graph) == ["Sin", "Unsqueeze", "Exp"]
    assert graph.nodes[1].inputs[1].values.tolist() == [0, 1, 3, 5]


def test_the_axes_of_two_squeezes():
    graph = graph_of("(float[N,1,M,1,1] x) => (float[] y)", "a = Squeeze(r, last) t = Squeeze(a, a1)")
    fold(MergeMoves(), graph, rtol=0)
    assert graph.nodes[1].inputs[1].values.tolist() == [1, 4]


def test_axes_are_attributes_before_opset_13():
    graph = graph_of("(float[N,M] x) => (float[] y)", "a = Unsqueeze<axes=[1]>(r) t = Unsqueeze<axes=[0]>(a)", opset=11)
    fold(MergeMoves(), graph, rtol=0)
    assert listing(graph) == "r = Sin(x)\nt = Unsqueeze<axes=[0, 2]>(r)\ny = Exp(t)"


CASTS = {  # FLOAT 1, INT32 6, INT64 7, FLOAT16 10, DOUBLE 11, BFLOAT16 16
    "float there and back": ("float", "a = Cast<to=11>(r) t = Cast<to=1>(a)", ""),
    "double there and back rounds": ("double", "a = Cast<to=1>(r) t = Cast<to=11>(a)", "Cast Cast"),
    "float by half rounds": ("float", "a = Cast<to=10>(r) t = Cast<to=1>(a)", "Cast Cast"),
    "float by bfloat16 rounds": ("float", "a = Cast<to=16>(r) t = Cast<to=1>(a)", "Cast Cast"),
    "float by int truncates": ("float", "a = Cast<to=7>(r) t = Cast<to=1>(a)", "Cast Cast"),
    "float by double to int": ("float", "a = Cast<to=11>(r) b = Cast<to=6>(a) t = Cast<to=1>(b)", "Cast Cast"),
    "bool by float to int": (
        "float", "a = Less(r, x) b = Cast<to=1>(a) c = Cast<to=7>(b) d = Neg(c) t = Cast<to=1>(d)", "Less Cast Neg Cast"
    ),
    "an int by float rounds": (
        "float", "a = Cast<to=7>(r) b = Cast<to=1>(a) c = Cast<to=7>(b) t = Cast<to=1>(c)", "Cast Cast Cast Cast"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASTS)
def test_casts_that_lose_nothing_go(case):
    kind, body, left = CASTS[case]
    graph = graph_of("(float[N,3] x) => (float[] y)", body, kind=kind)
    fold(MergeMoves(), graph, rtol=0)
    assert ops(graph) == ["Sin", *left.split(), "Exp"]


STAYS = {
    "another reader": "a = Transpose<perm=[0,2,3,1]>(r) b = Cos(a) d = Reshape(b, flat) "
    "c = Transpose<perm=[0,2,1,3]>(a) e = Reshape(c, flat) t = Add(d, e)",
    "Slices of one axis": "a = Slice(r, one, huge, a1) t = Slice(a, one, three, a1)",
    "Concats of two axes": "a = Concat<axis=1>(r, r) t = Concat<axis=2>(a, a)",
    "two open sizes that move": "a = Reshape(r, rows) t = Transpose<perm=[1,0,2]>(a)",
}


@pytest.mark.parametrize("case", STAYS)
def test_what_stays(case):
    graph = graph_of(IMAGE, STAYS[case])
    before = listing(graph)
    fold(MergeMoves(), graph, rtol=0)
    assert listing(graph) == before


def test_open_sizes_of_two_axes_are_not_mixed_up():
    body = "a = Reshape(r, merged) t = Reshape(a, split)"
    graph = graph_of("(float[N,M,4] x) => (float[] y)", body, merged=np.array([-1, 4]), split=np.array([-1, 2, 2]))
    fold(MergeMoves(), graph, rtol=0)
    assert ops(graph) == ["Sin", "Reshape", "Exp"]
    graph = graph_of("(float[N,M,4] x) => (float[] y)", "a = Unsqueeze(r, a0) t = Flatten<axis=2>(a)")
    fold(MergeMoves(), graph, rtol=0)
    assert ops(graph) == ["Sin", "Unsqueeze", "Flatten", "Exp"]  # -1 beside 0 would not do for an empty axis


def test_an_output_in_the_middle_stays():
    graph = build(
        "(float[N,3,4] x) => (float[] y, float[] a)",
        "r = Sin(x) a = Transpose<perm=[0,2,1]>(r) b = Transpose<perm=[0,2,1]>(a) y = Exp(b)",
    )
    outcome = fold(MergeMoves(), graph, rtol=0)
    assert listing(graph) == "r = Sin(x)\na = Transpose<perm=[0, 2, 1]>(r)\ny = Exp(r)"
    assert changes(outcome) == [f"Transpose cancels Transpose {graph.nodes[1].name}"]


def test_a_pair_between_an_input_and_an_output_stays():
    graph = build("(float[N,3,4] x) => (float[] y)", "a = Transpose<perm=[0,2,1]>(x) y = Transpose<perm=[0,2,1]>(a)")
    MergeMoves().apply(graph, Context())
    assert [t.name for t in graph.outputs] == ["y"]
    assert len(graph.nodes) in (1, 2)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_random_chains(data):
    """Any chain of moves computes the same for two batches."""
    shape: list = ["N", 2, 3, 4]
    lines, constants, name = [], {}, "r"
    for index in range(data.draw(st.integers(2, 5))):
        kind = data.draw(st.sampled_from(["Transpose", "Unsqueeze", "Squeeze", "Flatten", "Reshape", "Cast"]))
        new = f"t{index}"
        if kind == "Transpose":
            perm = data.draw(st.permutations(range(len(shape))))
            lines.append(f"{new} = Transpose<perm={list(perm)}>({name})")
            shape = [shape[axis] for axis in perm]
        elif kind == "Unsqueeze":
            axis = data.draw(st.integers(-len(shape) - 1, len(shape)))
            lines.append(f"{new} = Unsqueeze({name}, {new}_c)")
            constants[f"{new}_c"] = np.array([axis])
            shape.insert(axis if axis >= 0 else axis + len(shape) + 1, 1)
        elif kind == "Squeeze" and 1 in shape:
            axis = data.draw(st.sampled_from([i for i, size in enumerate(shape) if size == 1]))
            lines.append(f"{new} = Squeeze({name}, {new}_c)")
            constants[f"{new}_c"] = np.array([axis])
            shape.pop(axis)
        elif kind == "Reshape":
            wanted = [-1 if isinstance(size, str) else size for size in data.draw(st.permutations(shape))]
            lines.append(f"{new} = Reshape({name}, {new}_c)")
            constants[f"{new}_c"] = np.array(wanted)
            shape = ["?" if size == -1 else size for size in wanted]
        elif kind == "Cast":
            lines.append(
                f"{new}_d = Cast<to={data.draw(st.sampled_from([1, 11]))}>({name}) {new} = Cast<to=11>({new}_d)"
            )
        else:
            continue
        name = new
    graph = build(
        "(float[N,2,3,4] x) => (float[] y)", "\n".join(["r = Sin(x)", *lines, f"y = Exp({name})"]), **constants
    )
    before = [run(graph, feeds(graph, size=size)) for size in (1, 3)]
    nodes = len(graph.nodes)
    MergeMoves().apply(graph, Context())
    assert len(graph.nodes) <= nodes
    for size, old in zip((1, 3), before, strict=True):
        assert_same(old, run(graph, feeds(graph, size=size)), rtol=0)
    assert not MergeMoves().apply(graph, Context()).changed
