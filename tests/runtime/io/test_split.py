"""The two parts of a model, one behind the other, compute what the model does."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest

from channelfold.runtime.io.session import Session
from channelfold.runtime.io.split import split, typed

MODEL = """
    <ir_version: 10, opset_import: ["": 17]>
    g (float[n,2] x, bool on, float[2] s) => (float[n,2] y, float[n,2] early) <float[2] w = {2, 3}> {
        a = Mul(x, w)
        early = Neg(a)
        b = If(on) <
            then_branch = t () => (float[n,2] p) { p = Abs(a) },
            else_branch = e () => (float[n,2] q) { q = Identity(a) }
        >
        c = Add(b, s)
        y = Mul(c, w)
    }
"""
FEED = {"x": np.array([[-1, 2], [3, -4]], np.float32), "on": np.array(True), "s": np.array([1, 5], np.float32)}


@pytest.mark.parametrize(
    ("changing", "stem", "rest"),
    [
        ({"s"}, ["Mul", "Neg", "If"], ["Add", "Mul"]),
        ({"on"}, ["Mul", "Neg"], ["If", "Add", "Mul"]),
        ({"x"}, [], ["Mul", "Neg", "If", "Add", "Mul"]),
        (set(), ["Mul", "Neg", "If", "Add", "Mul"], []),
    ],
)
def test_what_does_not_change_is_in_the_stem(changing, stem, rest):
    model = onnx.parser.parse_model(MODEL)
    parts = split(model, changing)
    assert [[node.op_type for node in part.graph.node] for part in parts] == [stem, rest]
    found = dict(FEED)
    for part in parts:
        if part.graph.output:
            assert typed(part, Session(parts[0].SerializeToString()).outputs if part is parts[1] and stem else ())
            runner = Session(part.SerializeToString())
            found |= runner.run(runner.accepted(found))
    for name, expected in Session(model.SerializeToString()).run(FEED).items():
        np.testing.assert_array_equal(found[name], expected)


def test_an_output_that_no_node_writes_is_in_the_rest():
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["": 17]>
        g (float[2] x, float[2] s) => (float[2] y, float[2] w, float[2] s) <float[2] w = {2, 3}> { y = Add(x, s) }
    """)
    _, rest = split(model, {"s"})
    given = {"x": np.float32([1, 2]), "s": np.float32([3, 4])}
    assert [values.tolist() for values in Session(rest.SerializeToString()).run(given).values()] == [
        [4, 6],
        [2, 3],
        [3, 4],
    ]
