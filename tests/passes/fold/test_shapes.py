from __future__ import annotations

import re

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from channelfold.passes.base import Context
from channelfold.passes.fold import FoldShapes
from channelfold.runtime.io.files import check
from channelfold.tests.graphs import assert_same, build, changes, listing, ops, random, run

GIVEN = {
    "zero": np.array(0), "one": np.array(1), "two": np.array(2), "first": np.array([0]), "second": np.array([1]),
    "third": np.array([2]), "minus": np.array([-1]), "six": np.array([6]), "four": np.array([4]),
    "huge": np.array([2**63 - 1]),
}  # fmt: skip
SEQUENCE = "(float[b,s,24] x) => (float[] y)"
SIZES = ({"b": 2, "s": 3}, {"b": 5, "s": 4}, {"b": 1, "s": 1})


def graph_of(signature: str, body: str, **options):
    used = {name: value for name, value in GIVEN.items() if name in re.findall(r"\w+", body)}
    return build(signature, body, **used, **options)


def feeds(graph, sizes):
    shapes = {t.name: [d if isinstance(d, int) else sizes[d] for d in t.shape] for t in graph.inputs}
    kinds = {t.name: t.dtype for t in graph.inputs}
    return {name: (3 * random(tuple(shape), name)).astype(kinds[name]) for name, shape in shapes.items()}


def folded(graph, sizes=SIZES):
    """Folds a graph; the outputs are what they were for all sizes, and a second time there is nothing to do."""
    nodes = len(graph.nodes)
    before = [run(graph, feeds(graph, each)) for each in sizes]
    outcome = FoldShapes().apply(graph, Context())
    check(graph)
    assert len(graph.nodes) <= nodes
    for each, old in zip(sizes, before, strict=True):
        assert_same(old, run(graph, feeds(graph, each)), rtol=0)
    again = FoldShapes().apply(graph, Context())
    assert not again.changed, changes(again)
    return outcome


def values(graph, node: int, place: int) -> list:
    return graph.nodes[node].inputs[place].values.tolist()


HEADS = """
    shape = Shape(x)  b = Gather<axis=0>(shape, zero)  b1 = Unsqueeze(b, first)
    again = Shape(x)  s = Gather<axis=0>(again, one)  s1 = Unsqueeze(s, first)
    wanted = Concat<axis=0>(b1, s1, six, four)
    y = Reshape(x, wanted)
"""


def test_the_heads_of_attention_are_a_constant_reshape():
    graph = graph_of(SEQUENCE, HEADS)
    outcome = folded(graph)
    assert listing(graph) == "y = Reshape(x, y_shape)"
    assert values(graph, 0, 1) == [0, 0, 6, 4]
    assert changes(outcome)[-1] == "Reshape: its shape is [0, 0, 6, 4] for every input"


def test_a_size_is_followed_through_computation():
    graph = graph_of(
        SEQUENCE,
        """
        h = Relu(x)  m = MatMul(h, W)
        shape = Shape(m)  b = Slice(shape, first, second)  c = Slice(shape, third, huge)
        heads = Div(c, four)
        wanted = Concat<axis=0>(b, minus, four, heads)
        y = Reshape(m, wanted)
        """,
        W=(24, 32),
    )
    folded(graph)
    assert ops(graph) == ["Relu", "MatMul", "Reshape"]
    assert values(graph, 2, 1) == [0, 0, 4, 8]


def test_an_only_open_size_is_inferred():
    graph = graph_of(
        "(float[b,24] x) => (float[] y)",
        "shape = Shape(x)  b = Gather(shape, first)  wanted = Concat<axis=0>(six, four, b)  y = Reshape(x, wanted)",
    )
    folded(graph, [{"b": 2}, {"b": 7}])
    assert values(graph, 0, 1) == [6, 4, -1]


def test_two_open_sizes_that_moved_stay():
    graph = graph_of(
        SEQUENCE,
        """
        t = Transpose<perm=[1,0,2]>(x)
        shape = Shape(x)  b = Gather(shape, first)  s = Gather(shape, second)
        wanted = Concat<axis=0>(b, s, six, four)
        y = Reshape(t, wanted)
        """,
    )
    folded(graph)
    assert ops(graph) == ["Transpose", "Shape", "Gather", "Gather", "Concat", "Reshape"]


def test_an_empty_batch_is_not_broken_by_an_inferred_size():
    graph = graph_of(
        SEQUENCE,
        "shape = Shape(x)  b = Gather(shape, first)  wanted = Concat<axis=0>(b, n, six, four)  y = Reshape(x, wanted)",
        n=np.array([3]),
    )
    folded(graph, [{"b": 2, "s": 3}, {"b": 0, "s": 3}])
    assert values(graph, 0, 1) == [0, 3, 6, 4]


def test_allowzero_goes_with_the_computed_shape():
    graph = graph_of(SEQUENCE, HEADS.replace("Reshape(", "Reshape<allowzero=1>("))
    folded(graph)
    assert listing(graph) == "y = Reshape(x, y_shape)"


def test_expand_to_what_is_there_goes():
    body = """
        shape = Shape(x)  b = Gather(shape, first)  s = Gather(shape, second)
        wanted = Concat<axis=0>(b, s, width)
        y1 = Expand(x, wanted)  y = Relu(y1)
    """
    graph = graph_of(SEQUENCE, body, width=np.array([24]))
    folded(graph)
    assert listing(graph) == "y = Relu(x)"


def test_expand_of_a_known_axis_is_constant():
    body = """
        h = Unsqueeze(x, second)
        shape = Shape(x)  b = Gather(shape, first)  s = Gather(shape, second)
        wanted = Concat<axis=0>(b, six, s, minus)
        asked = Equal(wanted, m)  kept = Where(asked, o, wanted)
        y = Expand(h, kept)
    """
    graph = graph_of(SEQUENCE, body, m=-np.ones(4, np.int64), o=np.ones(4, np.int64))
    folded(graph)
    assert ops(graph) == ["Unsqueeze", "Expand"]
    assert values(graph, 1, 1) == [1, 6, 1, 1]


def test_open_sizes_are_asked_of_the_input_once():
    graph = graph_of(
        "(float[b,s,24] x) => (float[] y, float[] z)",
        """
        h = Relu(x)  t = Exp(h)
        s1 = Shape(h)  b = Gather(s1, first)  s2 = Shape(t)  b2 = Gather(s2, zero)  b3 = Unsqueeze(b2, first)
        y = ConstantOfShape(b)  z1 = ConstantOfShape(b3)  z = Mul(z1, z1)
        """,
        kind="float",
    )
    folded(graph)
    assert listing(graph) == (
        "s1 = Shape(x)\nb = Gather<axis=0>(s1, b_axes)\ny = ConstantOfShape(b)\n"
        "z1 = ConstantOfShape(b)\nz = Mul(z1, z1)"
    )


def test_names_of_outputs_stay():
    graph = graph_of(
        "(float[b,4] x) => (int64[] y, int64[] z)",
        "y = Shape(x)  s = Shape(x)  c = Gather(s, second)  z = Identity(c)",
    )
    folded(graph, [{"b": 2}, {"b": 3}])
    assert [t.name for t in graph.outputs] == ["y", "z"]
    assert ops(graph)[0] == "Shape"


def test_a_slice_of_all_goes():
    graph = graph_of(
        "(float[b,4] x) => (float[] y)",
        "r = Sin(x)  c = Slice(r, zeros, ends)  y = Cos(c)",
        zeros=np.array([0, 0]), ends=np.array([2**62, 4]),
    )  # fmt: skip
    folded(graph, [{"b": 2}, {"b": 3}])
    assert ops(graph) == ["Sin", "Cos"]


def test_a_slice_whose_end_may_lie_inside_stays():
    graph = graph_of(
        "(float[b,4] x) => (float[] y)",
        "r = Sin(x)  c = Slice(r, zeros, ends)  y = Cos(c)",
        zeros=np.array([0, 0]), ends=np.array([3, 4]),
    )  # fmt: skip
    folded(graph, [{"b": 2}, {"b": 5}])
    assert ops(graph) == ["Sin", "Slice", "Cos"]


def test_sizes_of_inputs_that_only_share_a_name_are_not_taken_as_equal():
    body = "shape = Shape(m)  b = Gather(shape, first)  w = Concat<axis=0>(b, six, four)  y = Reshape(x, w)"
    graph = graph_of("(float[b,s] x, float[b] m) => (float[] y)", body)
    feed = {"x": random((4, 6), "x"), "m": random((1,), "m")}
    before = run(graph, feed)
    FoldShapes().apply(graph, Context())
    assert_same(before, run(graph, feed), rtol=0)


def test_values_that_the_input_holds_stay():
    body = "w = Concat<axis=0>(n, six, four)  y = Reshape(x, w)  z = Expand(x, n)"
    graph = graph_of("(float[b,24] x, int64[1] n) => (float[] y, float[] z)", body)
    FoldShapes().apply(graph, Context())
    assert listing(graph) == "y = Reshape(x, y_shape)\nz = Expand(x, n)"
    assert values(graph, 0, 1) == [-1, 6, 4]


NUMBERS = st.integers(-1, 5)


@st.composite
def chains(draw):
    """Text of nodes that compute with the shapes of x and of Relu(x), and the names of the last results."""
    lines, vectors, scalars = ["h = Relu(x)", "v0 = Shape(x)", "v1 = Shape(h)"], ["v0", "v1"], []
    lengths, constants = {"v0": 3, "v1": 3}, {}
    for index in range(draw(st.integers(3, 10))):
        kind = draw(
            st.sampled_from(["gather", "scalar", "unsqueeze", "concat", "arithmetic", "slice", "where", "cast"])
        )
        name, source = f"n{index}", draw(st.sampled_from(vectors))
        if kind == "gather":
            places = draw(st.lists(st.integers(0, lengths[source] - 1), min_size=1, max_size=3))
            constants[f"c{index}"] = np.array(places)
            lines.append(f"{name} = Gather({source}, c{index})")
            lengths[name] = len(places)
        elif kind == "scalar":
            constants[f"c{index}"] = np.array(draw(st.integers(-lengths[source], lengths[source] - 1)))
            lines.append(f"{name} = Gather({source}, c{index})")
            scalars.append(name)
            continue
        elif kind == "unsqueeze" and scalars:
            constants[f"c{index}"] = np.array([0])
            lines.append(f"{name} = Unsqueeze({draw(st.sampled_from(scalars))}, c{index})")
            lengths[name] = 1
        elif kind == "concat":
            other = draw(st.sampled_from(vectors))
            constants[f"c{index}"] = np.array([draw(NUMBERS)])
            lines.append(f"{name} = Concat<axis=0>({source}, c{index}, {other})")
            lengths[name] = lengths[source] + lengths[other] + 1
        elif kind == "arithmetic":
            op = draw(st.sampled_from(["Add", "Sub", "Mul", "Div"]))
            constants[f"c{index}"] = np.array([draw(st.integers(1, 4))])
            lines.append(f"{name} = {op}({source}, c{index})")
            lengths[name] = lengths[source]
        elif kind == "slice" and lengths[source] > 1:
            constants |= {f"c{index}": np.array([draw(st.integers(0, 1))]), f"e{index}": np.array([2**31 - 1])}
            lines.append(f"{name} = Slice({source}, c{index}, e{index})")
            lengths[name] = lengths[source] - int(constants[f"c{index}"][0])
        elif kind == "where":
            constants |= {f"c{index}": np.array([draw(NUMBERS)]), f"e{index}": np.array([draw(NUMBERS)])}
            lines += [f"q{index} = Equal({source}, c{index})", f"{name} = Where(q{index}, e{index}, {source})"]
            lengths[name] = lengths[source]
        elif kind == "cast":
            lines += [f"i{index} = Cast<to=6>({source})", f"{name} = Cast<to=7>(i{index})"]
            lengths[name] = lengths[source]
        else:
            continue
        vectors.append(name)
    lines.append(f"y = Neg({vectors[-1]})")
    lines.append(f"z = Concat<axis=0>({vectors[-1]}, {vectors[-2]})")
    return "\n".join(lines), constants


@settings(max_examples=150, deadline=None)
@given(chains())
def test_random_arithmetic_of_shapes(chain):
    body, constants = chain
    folded(build("(float[b,s,24] x) => (int64[] y, int64[] z, float[] h)", body, **constants))


@settings(max_examples=150, deadline=None)
@given(
    st.permutations(["b", "s", "n8", "n3"]),
    st.permutations(["b", "s", "n8", "n3"]),
    st.lists(st.sampled_from([0, 1, 2, 3]), max_size=2, unique=True),
    st.integers(0, 1),
)
def test_random_reshapes(axes, order, merged, allowzero):
    """Axes in any order, some of them merged or inferred, at run time."""
    names = {"b": "first", "s": "second", "n8": "third", "n3": "fourth"}
    signature = f"(float[{','.join({'n8': '8', 'n3': '3'}.get(a, a) for a in axes)}] x) => (float[] y)"
    lines = ["shape = Shape(x)", *(f"{n} = Gather(shape, at_{n})" for n in axes)]
    parts = list(order)
    if len(merged) == 2:
        low, high = sorted(merged)
        lines.append(f"both = Mul({parts[low]}, {parts[high]})")
        parts = [*parts[:low], "both", *parts[low + 1 : high], *parts[high + 1 :]]
    elif merged:
        parts[merged[0]] = "minus"
    lines.append(f"wanted = Concat<axis=0>({', '.join(parts)})")
    lines.append(f"y = Reshape<allowzero={allowzero}>(x, wanted)")
    constants = {f"at_{n}": np.array([axes.index(n)]) for n in names}
    folded(build(signature, "\n".join(lines), minus=np.array([-1]), **constants))
