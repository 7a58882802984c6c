"""One site of an exact pass is taken back where it changes the function; the other sites stay rewritten."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import onnx
import pytest

from channelfold.passes import pipeline
from channelfold.passes.base import Context, Outcome, Pass
from channelfold.passes.fold import FoldAffine
from channelfold.passes.options import option
from channelfold.runtime.errors import VerificationError
from channelfold.runtime.io.files import export, read
from channelfold.tests.graphs import build, listing, ops, random

pytestmark = pytest.mark.takes_back

SIGNS = np.where(np.arange(8) % 2, 1.0, -1.0)[:, None] * np.ones((8, 8))


def undone(graph, step: Pass = FoldAffine()):  # noqa: B008
    graph, (record,) = pipeline.run(graph, [step], Context(), on_violation="undo")
    return graph, record


def two_sites():
    """A difference that cancels, which no fold may pull apart, and a scale that can be folded."""
    text = (
        "a = MatMul(x, W) b = Sub(a, far) c = Add(b, far) d = MatMul(c, V) e = Relu(d) f = MatMul(e, U) y = Mul(f, s)"
    )
    held = {name: random((8, 8), name) for name in "WVU"}
    return build("(float[N,8] x) => (float[] y)", text, kind="float", far=np.full(8, 1e6), s=random(8, "s") + 3, **held)


def test_only_the_site_to_blame_is_taken_back():
    graph, record = undone(two_sites())
    assert ops(graph) == ["MatMul", "Sub", "Add", "MatMul", "Relu", "MatMul"]
    assert [change["node"] for change in record["changed"]] == ["Mul_6"]
    refused = {one["node"]: (one["reason"], one["code"]) for one in record["refused"]}
    reason, code = refused["Sub_1"]
    assert code == "taken back"
    assert reason.startswith("taken back, because output 'y' is off by ")
    assert record["verified"]["max_rel_error"] < 1e-5


def test_an_overflow_that_a_fold_would_cause_stays_in_place():
    """W s is finite, and so is x (W s) on no sample: terms of the sum overflow that cancel in x W."""
    text = "a = MatMul(x, W) b = Mul(a, s) y = Div(b, s)"
    graph = build("(float[N,8] x) => (float[] y)", text, kind="float", W=SIGNS * 1e19, s=np.full(8, 3e19))
    before = listing(graph)
    graph, record = undone(graph)
    assert (record["changed"] == [] and listing(graph) == before) or record["verified"]["max_rel_error"] < 1e-5


@pytest.mark.parametrize("scale", [1e19, 1e12, 1e-30, 1e30])
@pytest.mark.parametrize("factor", [3e19, 1e30, 1e-30])
def test_no_size_of_weights_ends_a_run(run, tmp_path, scale, factor):
    text = "a = MatMul(x, W) b = Mul(a, s) c = MatMul(b, V) d = Mul(c, t) y = Tanh(d)"
    graph = build("(float[N,8] x) => (float[] y)", text, kind="float", W=SIGNS * scale, s=np.full(8, factor),
                  V=random((8, 8), "V"), t=np.full(8, 1 / factor))  # fmt: skip
    onnx.save(export(graph)[0], tmp_path / "m.onnx")
    code, out, err = run("fold", tmp_path / "m.onnx", "-o", tmp_path / "f.onnx", "--json")
    assert (code, "Mend the pass" in err) == (0, False)
    assert json.loads(out)["output"]["nodes"] <= 5


@dataclass(frozen=True)
class Doubles(Pass):
    """Doubles the weight of every MatMul, which is no exact pass, and says nothing about it with ``mute``."""

    name, kind = "doubles", "exact"

    exclude: tuple[str, ...] = option((), "Not these.", metavar="PATTERN")
    named: bool = option(True, "Whether changes name their node.")

    def apply(self, graph, ctx):
        outcome = Outcome()
        for node in graph.nodes:
            if node.op == "MatMul" and not self.patterns.why_not(node.name):
                node.inputs[1].values = (read(node.inputs[1]) * (2 if "w" in node.name else 1 + 1e-7)).astype(
                    np.float32
                )
                outcome.change(node.name if self.named else "somewhere", "doubled")
        return outcome


def named():
    graph = build("(float[N,8] x) => (float[] y)", "a = MatMul(x, W) b = Relu(a) y = MatMul(b, V)", kind="float",
                  W=random((8, 8), "W"), V=random((8, 8), "V"))  # fmt: skip
    graph.nodes[0].name, graph.nodes[2].name = "right[0]", "wrong[1]"
    return graph


def test_a_pass_with_patterns_excludes_the_site():
    _, record = undone(named(), Doubles())
    assert [change["node"] for change in record["changed"]] == ["right[0]"]
    assert [one["node"] for one in record["refused"]] == ["wrong[1]"]
    assert record["options"]["exclude"] == []


def test_where_no_site_is_to_blame_all_of_the_pass_is_taken_back():
    graph, record = undone(named(), Doubles(named=False))
    assert (record["changed"], record["refused"][0]["node"]) == ([], "wrong[1]")
    assert record["warnings"][0].startswith("taken back, because output 'y' is off by ")
    np.testing.assert_array_equal(read(graph.nodes[0].inputs[1]), random((8, 8), "W").astype(np.float32))


def test_a_pass_that_fails_is_still_an_error():
    class Broken(Doubles):
        def apply(self, graph, ctx):
            raise IndexError("list index out of range")

    with pytest.raises(VerificationError, match="Mend the pass"):
        undone(named(), Broken())
