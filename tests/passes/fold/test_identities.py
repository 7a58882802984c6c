from __future__ import annotations

import re

import numpy as np
import pytest

from channelfold.passes.base import Context
from channelfold.passes.fold import RemoveIdentities
from channelfold.tests.graphs import assert_same, build, changes, feeds, fold, listing, ops, reasons, run

STATIC = "(float[2,3,4] x) => (float[] y)"
BATCH = "(float[N,3,4] x) => (float[] y)"
GIVEN = {
    "zero": 0.0, "one": 1.0, "zeros": np.zeros((2, 3, 4)), "ones": np.ones((1, 1, 1)), "wide": np.zeros((5, 1, 1, 1)),
    "row": np.zeros(4), "pads": np.zeros(6, np.int64), "some": np.array([0, 0, 1, 0, 0, 0]),
    "shape": np.array([2, 3, 4]), "first": np.array([0]), "second": np.array([1]), "two": np.array([2]),
    "three": np.array([3]), "huge": np.array([2**63 - 1]), "off": np.array(False), "on": np.array(True),
    "ratio": np.float32(0.5),
}  # fmt: skip


def graph_of(signature, body, **options):
    words = re.findall(r"\w+", body)
    used = {name: value for name, value in GIVEN.items() if name in words}
    return build(signature, f"r = Sin(x)\n {body}\n y = Exp(t)", **used, **options)


IDENTITIES = {
    "Identity": (BATCH, "t = Identity(r)"),
    "Dropout": (BATCH, "t = Dropout(r)"),
    "Dropout that is switched off": (BATCH, "t = Dropout(r, ratio, off)"),
    "Cast": (BATCH, "t = Cast<to=11>(r)"),
    "Transpose": (BATCH, "t = Transpose<perm=[0,1,2]>(r)"),
    "Reshape": (STATIC, "t = Reshape(r, shape)"),
    "Flatten": ("(float[2,3] x) => (float[] y)", "t = Flatten(r)"),
    "Expand": (STATIC, "t = Expand(r, shape)"),
    "Slice": (BATCH, "t = Slice(r, first, huge)"),
    "Slice with steps": (BATCH, "t = Slice(r, first, huge, two, second)"),
    "Pad": (BATCH, "t = Pad(r, pads)"),
    "Concat": (BATCH, "t = Concat<axis=1>(r)"),
    "Sum": (BATCH, "t = Sum(r)"),
    "Max": (BATCH, "t = Max(r)"),
    "Add": (BATCH, "t = Add(r, zero)"),
    "Add from the left": (BATCH, "t = Add(zero, r)"),
    "Add of a tensor": (STATIC, "t = Add(r, zeros)"),
    "Sub": (BATCH, "t = Sub(r, zero)"),
    "Mul": (BATCH, "t = Mul(ones, r)"),
    "Div": (BATCH, "t = Div(r, one)"),
    "Pow": (BATCH, "t = Pow(r, one)"),
}  # fmt: skip


@pytest.mark.parametrize("case", IDENTITIES)
def test_a_node_that_returns_its_input_goes(case):
    graph = graph_of(*IDENTITIES[case])
    outcome = fold(RemoveIdentities(), graph, rtol=0)
    assert listing(graph) == "r = Sin(x)\ny = Exp(r)"
    assert changes(outcome) == [f"{case.split()[0]} returns its input"]


OTHERS = {
    "Cast": (BATCH, "t = Cast<to=1>(r)"),
    "Transpose": (BATCH, "t = Transpose<perm=[0,2,1]>(r)"),
    "Transpose of everything": (BATCH, "t = Transpose(r)"),
    "Reshape": (STATIC, "u = Transpose<perm=[2,1,0]>(r)\n t = Reshape(u, shape)"),
    "Slice from the second": (BATCH, "t = Slice(r, second, huge)"),
    "Slice up to the third": (BATCH, "t = Slice(r, first, three, two)"),
    "Slice of every second": (BATCH, "t = Slice(r, first, huge, two, two)"),
    "Pad": (BATCH, "t = Pad(r, some)"),
    "Add that enlarges": (BATCH, "t = Add(r, wide)"),
    "Add of a vector that may enlarge": ("(float[N,M] x) => (float[] y)", "t = Add(r, row)"),
    "Sub from zero": (BATCH, "t = Sub(zero, r)"),
    "Div of one": (BATCH, "t = Div(one, r)"),
    "Pow of one": (BATCH, "t = Pow(one, r)"),
    "Mul by zero": (BATCH, "t = Mul(r, zero)"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_a_node_that_does_something_stays(case):
    signature, body = OTHERS[case]
    graph = graph_of(signature, body)
    before = listing(graph)
    outcome = RemoveIdentities().apply(graph, Context())
    assert (outcome.changed, outcome.refused, listing(graph)) == ([], [], before)


def test_dropout_in_training_stays():
    graph = graph_of(BATCH, "t = Dropout(r, ratio, on)")
    assert not RemoveIdentities().apply(graph, Context()).changed
    old = graph_of(BATCH, "t = Dropout(r)", opset=6)
    assert not RemoveIdentities().apply(old, Context()).changed
    test = graph_of(BATCH, "t = Dropout<is_test=1>(r)", opset=6)
    assert changes(RemoveIdentities().apply(test, Context())) == ["Dropout returns its input"]


def test_dropout_whose_mask_is_read_stays():
    graph = build(
        "(float[N,3] x) => (float[] y, bool[] m)", "r = Sin(x)\n t, m = Dropout(r)\n y = Exp(t)", kind="float"
    )
    assert not RemoveIdentities().apply(graph, Context()).changed


@pytest.mark.parametrize(
    ("body", "opset"),
    [("t = Slice<starts=[0], ends=[2147483647], axes=[1]>(r)", 9), ("t = Pad<pads=[0,0,0,0,0,0]>(r)", 9)],
)
def test_old_opsets_say_it_in_attributes(body, opset):
    graph = graph_of(BATCH, body, opset=opset)
    fold(RemoveIdentities(), graph, rtol=0)
    assert ops(graph) == ["Sin", "Exp"]


def test_broadcasting_by_attributes_is_left_alone():
    graph = graph_of(BATCH, "t = Add<broadcast=1>(r, zero)", opset=6)
    assert not RemoveIdentities().apply(graph, Context()).changed


def test_operators_of_other_domains_are_left_alone():
    graph = graph_of(BATCH, "t = my.Identity(r)", domains='"my": 1')
    assert not RemoveIdentities().apply(graph, Context()).changed


def test_chains_collapse():
    graph = graph_of(BATCH, "a = Identity(r)\n b = Add(a, zero)\n c = Mul(one, b)\n t = Cast<to=11>(c)")
    assert len(fold(RemoveIdentities(), graph, rtol=0).changed) == 4
    assert ops(graph) == ["Sin", "Exp"]


def test_the_name_of_an_output_moves_to_the_producer():
    graph = build(BATCH, "a = Sin(x)\n b = Exp(a)\n y = Identity(a)", kind="float")
    fold(RemoveIdentities(), graph, rtol=0)
    assert listing(graph) == "y = Sin(x)"


def test_an_input_that_is_an_output_keeps_its_identity():
    graph = build(BATCH, "y = Add(x, zero)", zero=0.0)
    outcome = fold(RemoveIdentities(), graph, rtol=0)
    assert reasons(outcome) == [
        "Add passes an input, a constant or an output on to an output, and all keep their names"
    ]


def test_two_outputs_of_one_value_keep_theirs():
    graph = build("(float[2] x) => (float[] y, float[] z)", "y = Sin(x)\n z = Identity(y)")
    outcome = fold(RemoveIdentities(), graph, rtol=0)
    assert listing(graph) == "y = Sin(x)\nz = Identity(y)"
    assert len(outcome.refused) == 1


def test_dead_nodes_go():
    graph = build(
        "(float[4] x) => (float[] y)", "a = Sin(x)\n b = Exp(a)\n c, d = Split(b, s)\n y = Exp(x)", s=np.array([2, 2])
    )
    outcome = fold(RemoveIdentities(), graph, rtol=0)
    assert listing(graph) == "y = Exp(x)"
    assert changes(outcome) == [f"{op} was not read by anyone" for op in ("Split", "Exp", "Sin")]


def test_a_subgraph_reads_on():
    body = """
        r = Sin(x)
        t = Identity(r)
        y = If(b) <then_branch = p () => (float[N,4] q) { q = Exp(t) }, else_branch = e () => (float[N,4] f)
                  { f = Identity(t) }>
    """
    graph = build("(float[N,4] x, bool b) => (float[] y)", body)
    feed = feeds(graph) | {"b": np.array(False)}
    before = run(graph, feed)
    assert changes(RemoveIdentities().apply(graph, Context())) == ["Identity returns its input"]
    assert_same(before, run(graph, feed), 0)


def test_a_large_constant_is_not_searched():
    graph = build("(float[300,300] x) => (float[] y)", "t = Add(x, z)\n y = Exp(t)", z=np.zeros((300, 300)))
    assert not RemoveIdentities().apply(graph, Context()).changed
