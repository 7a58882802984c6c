"""Faces of families: each pass finds its work, and says which patterns find nothing."""

from __future__ import annotations

import pytest

from channelfold.passes import PASSES
from channelfold.passes.base import Context
from channelfold.passes.quantize import QuantizeWeights
from channelfold.passes.recipe import make
from channelfold.tests.graphs import build


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_has_its_work(name):
    options = {"keep_macs": 0.5} if name in ("prune", "approximate-ffn") else {}
    step = make(name, options)
    work = step.work()
    assert isinstance(work, PASSES[name])
    assert (type(work).__name__, work.options()) == ("Work", step.options())
    assert type(work).apply is not PASSES[name].apply


def test_patterns_that_find_nothing_are_named():
    graph = build("(float[N,32] x) => (float[] y)", "h = MatMul(x, A)  y = MatMul(h, B)", A=(32, 32), B=(32, 32))
    known, unknown = graph.nodes[0].name, "/head/*"
    outcome = QuantizeWeights(exclude=(known, unknown), exclude_ops=("MatMul", "Conf")).apply(graph, Context())
    assert outcome.warnings == [
        f"no node is called {unknown!r}, which include or exclude asks for",
        "there is no 'Conf' node, which include or exclude asks for",
    ]
