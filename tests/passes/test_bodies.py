"""Passes in the bodies of If, Loop and Scan: by the graphs they leave, by the numbers, by what reaches the bodies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from onnx import TensorProto, helper

from channelfold.passes import pipeline
from channelfold.passes.base import Context, Outcome, Pass
from channelfold.passes.bodies import NEVER
from channelfold.passes.fold import FoldAffine, FoldConstants, FoldPad, RemoveIdentities, TakeBranch
from channelfold.passes.layers.account import account, share
from channelfold.passes.quantize import Quantize, QuantizeWeights
from channelfold.passes.smooth import Smooth
from channelfold.passes.verify import Violation
from channelfold.runtime.data.bodies import reaching
from channelfold.runtime.errors import ModelError
from channelfold.runtime.io.bodies import bodies, share_constants
from channelfold.runtime.io.files import check, import_model, load, save, session
from channelfold.tests import decoders, strategies
from channelfold.tests.decoders import WIDTH, node, value
from channelfold.tests.graphs import assert_same, data_from, feeds, listing, run, whole

rng = np.random.default_rng(0)


def array(*shape):
    return rng.standard_normal(shape).astype(np.float32)


LOOPED = [{"trips": np.array(3 + i), "h0": array(2, WIDTH), "x": array(2, WIDTH)} for i in range(3)]
SCANNED = [{"h0": array(2, WIDTH), "x": array(2, 3 + i, WIDTH)} for i in range(3)]
MODELS = {
    "merged": (decoders.merged, decoders.steps()),
    "merged, weights of their own": (lambda: decoders.merged(own=True), decoders.steps()),
    "loop": (decoders.loop, LOOPED),
    "scan": (decoders.scan, SCANNED),
}


def outputs(graph, samples):
    opened = session(graph, optimize=False)
    return [opened.run(feed) for feed in samples]


def snr(before, after):
    pairs = [(a[name], b[name]) for a, b in zip(before, after, strict=True) for name in a]
    noise = sum(np.square(a - b).sum(dtype=np.float64) for a, b in pairs)
    return 10 * np.log10(sum(np.square(a).sum(dtype=np.float64) for a, _ in pairs) / noise)


# ---- what reaches a body -----------------------------------------------------------------------------------------


def test_a_branch_gets_what_it_reads_when_it_is_taken():
    graph = import_model(decoders.merged())
    samples = decoders.steps(4)
    then, other = sorted(bodies(graph), key=lambda body: body.name, reverse=True)
    found = list(reaching(then, data_from(*samples)))
    assert [sorted(feed) for feed in found] == [["past", "x"]] * 2
    assert all(np.array_equal(found[1][name], samples[3][name]) for name in ("x", "past"))
    assert [feed["x"].shape[1] for feed in reaching(other, data_from(*samples))] == [6, 6]
    assert [feed["x"].shape[1] for feed in reaching(other, data_from(*samples[1:2]), always=True)] == [1]


def test_a_loop_gets_every_iteration_with_its_states():
    graph = import_model(decoders.loop())
    (body,) = bodies(graph)
    found = list(reaching(body, data_from(*LOOPED)))
    assert [int(feed["i"]) for feed in found] == [0, 1, 2, *range(4), *range(5)]
    states = [found["states"] for found in outputs(graph, LOOPED)]
    np.testing.assert_allclose(found[4]["h"], states[1][0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[-1]["h"], states[2][3], rtol=1e-5, atol=1e-6)
    assert [float(feed["count"]) for feed in found[3:7]] == [0, 0, 1, 3]
    assert not list(reaching(body, data_from({**LOOPED[0], "trips": np.array(0)})))


def test_a_scan_gets_slices_from_the_end():
    graph = import_model(decoders.scan())
    (body,) = bodies(graph)
    found = list(reaching(body, data_from(*SCANNED)))
    assert len(found) == 3 + 4 + 5
    np.testing.assert_array_equal(found[0]["x_t"], SCANNED[0]["x"][:, 2])
    np.testing.assert_array_equal(found[-1]["x_t"], SCANNED[2]["x"][:, 0])
    np.testing.assert_allclose(found[2]["h"], run(graph, SCANNED[0])["states"][:, 1], rtol=1e-5, atol=1e-6)


def test_the_elements_of_a_sequence():
    body = helper.make_graph([node("MatMul", "e W", "r")], "each", [value("e", "n", WIDTH)], [value("r", "n", WIDTH)])
    model = decoders.model(
        [
            node("SplitToSequence", "x", "parts", axis=0),
            helper.make_node("SequenceMap", ["parts"], ["mapped"], "map", body=body),
            node("ConcatFromSequence", "mapped", "y", axis=0),
        ],
        [value("x", "n", WIDTH)],
        [value("y", "n", WIDTH)],
        [decoders.weight("W", WIDTH, WIDTH)],
    )
    graph, samples = import_model(model), [{"x": array(3, WIDTH)}]
    found = list(reaching(bodies(graph)[0], data_from(*samples)))
    np.testing.assert_array_equal(np.concatenate([feed["e"] for feed in found]), samples[0]["x"])
    before = outputs(graph, samples)
    assert Quantize().apply(graph, Context(data_from(*samples))).facts["quantized"] == 1
    assert snr(before, outputs(graph, samples)) > 30


def test_a_node_that_runs_its_body_in_a_way_of_its_own_is_refused():
    graph = import_model(decoders.loop())
    graph.nodes[0].op = "Repeat"
    with pytest.raises(ModelError, match="how Repeat runs its bodies is not known"):
        list(reaching(bodies(graph)[0], data_from(*LOOPED)))
    outcome = Quantize().apply(graph, Context(data_from(*LOOPED)))
    assert {(r.node, r.code) for r in outcome.refused} == {
        (f"n_{name} in body of Repeat loop", "how Repeat runs its bodies is not known") for name in "au"
    }


def nested() -> onnx.ModelProto:
    """A loop over h = relu(h W), in odd iterations h = tanh(h W + x)."""
    branches = {
        "then_branch": [node("Add", "a x", "shifted"), node("Tanh", "shifted", "odd")],
        "else_branch": [node("Relu", "a", "even")],
    }
    made = {
        name: helper.make_graph(nodes, name, [], [value(nodes[-1].output[0], "b", WIDTH)])
        for name, nodes in branches.items()
    }
    made["then_branch"].node.insert(0, node("MatMul", "x V", "inner"))
    made["then_branch"].node[1].input[1] = "inner"
    body = helper.make_graph(
        [
            node("MatMul", "h W", "a"),
            node("Mod", "i two", "rest"),
            node("Cast", "rest", "is_odd", to=TensorProto.BOOL),
            helper.make_node("If", ["is_odd"], ["next"], "choice", **made),
            node("Identity", "going", "again"),
        ],
        "body",
        [value("i", kind=TensorProto.INT64), value("going", kind=TensorProto.BOOL), value("h", "b", WIDTH)],
        [value("again", kind=TensorProto.BOOL), value("next", "b", WIDTH)],
    )
    weights = [decoders.weight("W", WIDTH, WIDTH), decoders.weight("V", WIDTH, WIDTH)]
    return decoders.model(
        [node("Abs", "raw", "x"), helper.make_node("Loop", ["trips", "", "h0"], ["y"], "loop", body=body)],
        [value("trips", kind=TensorProto.INT64), value("h0", "b", WIDTH), value("raw", "b", WIDTH)],
        [value("y", "b", WIDTH)],
        [*weights, onnx.numpy_helper.from_array(np.array(2), "two")],
    )


def test_bodies_in_bodies():
    graph = import_model(nested())
    samples = [{"trips": np.array(3), "h0": array(2, WIDTH), "raw": array(2, WIDTH)}]
    (loop,) = bodies(graph)
    then = next(body for body in loop.bodies() if body.name == "then_branch")
    (found,) = reaching(then, reaching(loop, data_from(*samples)))
    np.testing.assert_array_equal(found["x"], np.abs(samples[0]["raw"]))
    before = outputs(graph, samples)
    outcome = Quantize().apply(graph, Context(data_from(*samples)))
    assert [change.node for change in outcome.changed] == [
        "n_a in body of Loop loop",
        "n_inner in then_branch of If choice in body of Loop loop",
    ]
    check(graph)
    assert snr(before, outputs(graph, samples)) > 30


# ---- calibration and weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("step", [QuantizeWeights(), Quantize(), Quantize(target="onnxruntime")], ids=lambda s: str(s))
def test_weights_in_bodies_are_quantized_and_stored_once(name, step, tmp_path):
    build, samples = MODELS[name]
    graph = import_model(build())
    share_constants(graph)
    before = outputs(graph, samples)
    passes = [FoldConstants(), RemoveIdentities(), FoldAffine(), step]
    graph, steps = pipeline.run(graph, passes, Context(data_from(*samples)))
    quantized = [f"{change['node']}" for change in steps[-1]["changed"]]
    assert len(quantized) == (10 if "merged" in name else 2)
    assert all(" in " in name for name in quantized)
    assert {r["code"] for r in steps[-1]["refused"]} <= {"it multiplies two activations"}
    assert snr(before, outputs(graph, samples)) > 25
    save(graph, tmp_path / "m.onnx")
    read = load(tmp_path / "m.onnx")
    assert share(account(read)) == 1
    assert sum(row.tensors for row in account(read) if row.state == "int8") == (5 if "merged" in name else 2)
    assert snr(before, outputs(read, samples)) > 25


def test_ranges_are_those_of_the_branch_that_runs():
    samples = decoders.steps(4)
    for feed in samples:
        feed["x"] *= 10 if feed["use_cache_branch"][0] else 1
    graph = import_model(decoders.merged())
    outcome = Quantize(calibrator="minmax").apply(graph, Context(data_from(*samples)))
    for body in bodies(graph):
        taken = [f["x"] for f in samples if f["use_cache_branch"][0] == (body.name == "then_branch")]
        scale = next(
            n.inputs[1].values for n in body.graph.nodes if n.op == "QuantizeLinear" and n.inputs[0].name == "x"
        )
        assert scale == pytest.approx(max(np.abs(x).max() for x in taken) / 127, rel=1e-6)
    assert (outcome.facts["linears"], outcome.facts["quantized"]) == (14, 10)
    assert outcome.facts["by_op"] == {"MatMul": {"quantized": 10, "total": 14}}


@pytest.mark.parametrize(("name", "tensor"), [("loop", "h"), ("scan", "x_t")])
def test_ranges_span_all_iterations(name, tensor):
    build, samples = MODELS[name]
    graph = import_model(build())
    (body,) = bodies(graph)
    seen = max(np.abs(feed[tensor]).max() for feed in reaching(body, data_from(*samples)))
    Quantize(calibrator="minmax").apply(graph, Context(data_from(*samples)))
    (scale,) = (n.inputs[1].values for n in body.graph.nodes if n.op == "QuantizeLinear" and n.inputs[0].name == tensor)
    assert scale == pytest.approx(seen / 127, rel=1e-6)


def test_a_branch_that_never_runs_stays_float_and_says_so():
    graph = import_model(decoders.merged())
    outcome = Quantize().apply(graph, Context(data_from(*decoders.steps(kinds=(True,)))))
    assert {r.node for r in outcome.refused if r.code == NEVER} == {
        f"n_{name}_else in else_branch of If choice" for name in ("q", "k0", "o", "h", "f")
    }
    assert outcome.refused[0].reason == f"MatMul stays as it is: {NEVER} (4,096 bytes)"
    assert outcome.facts["linears"] == 14
    then = next(body for body in bodies(graph) if body.name == "else_branch")
    assert {n.op for n in then.graph.nodes} == {"MatMul", "Identity", "Transpose", "Softmax", "Relu"}
    rows = account(graph, {r.node: r.code for r in outcome.refused})
    assert {(row.place, row.state, row.reason) for row in rows} == {
        ("then_branch of If choice", "int8", ""),
        ("else_branch of If choice", "float", NEVER),
    }


def test_smoothing_in_a_branch_is_exact():
    samples = decoders.steps(8)
    graph = import_model(decoders.merged())
    for weight in ("W1",):
        tensor = next(t for n in bodies(graph)[0].graph.nodes for t in n.inputs if t.name == weight)
        tensor.values = tensor.values * np.where(np.arange(4 * WIDTH) < 3, 40, 1).astype(np.float32)
    before = outputs(graph, samples)
    graph, (step,) = pipeline.run(graph, [Smooth()], Context(data_from(*samples)))
    assert {change["node"] for change in step["changed"]} >= {
        "n_f_else in else_branch of If choice", "n_f_then in then_branch of If choice",
    }  # fmt: skip
    assert step["verified"]["max_rel_error"] < 1e-5
    assert snr(before, outputs(graph, samples)) > 100


def test_equal_weights_of_two_branches_become_one():
    graph = import_model(decoders.merged(own=True))
    before = outputs(graph, decoders.steps())
    assert share_constants(graph) == 4 * WIDTH * WIDTH * (3 + 4 + 4)
    assert share_constants(graph) == 0
    assert len(whole(graph).graph.initializer) == 5
    assert [np.array_equal(a["y"], b["y"]) for a, b in zip(before, outputs(graph, decoders.steps()), strict=True)]


# ---- exact passes ------------------------------------------------------------------------------------------------


def test_what_changes_between_iterations_is_no_constant():
    body = helper.make_graph(
        [
            node("Mul", "two three", "six"),
            node("Mul", "h six", "scaled"),
            node("Shape", "h", "size"),
            node("ConstantOfShape", "size", "zeros"),
            node("Concat", "scaled zeros", "next", axis=0),
            node("Identity", "going", "again"),
        ],
        "body",
        [value("i", kind=TensorProto.INT64), value("going", kind=TensorProto.BOOL), value("h", None)],
        [value("again", kind=TensorProto.BOOL), value("next", None)],
        [onnx.numpy_helper.from_array(np.array([2.0], np.float32), "two")],
    )
    model = decoders.model(
        [helper.make_node("Loop", ["trips", "", "one"], ["y"], "loop", body=body)],
        [value("trips", kind=TensorProto.INT64)],
        [value("y", None)],
        [onnx.numpy_helper.from_array(np.full(1, v, np.float32), n) for n, v in (("one", 1), ("three", 3))],
    )
    graph = import_model(model)
    pipeline.run(graph, [FoldConstants(), RemoveIdentities()], Context())
    assert "\n".join(listing(bodies(graph)[0].graph).splitlines()[:2]) == "scaled = Mul(h, six)\nsize = Shape(h)"
    assert run_loop(graph, 3).tolist() == [216, 0, 0, 0, 0, 0, 0, 0]


def run_loop(graph, trips):
    return session(graph, optimize=False).run({"trips": np.array(trips)})["y"]


@dataclass(frozen=True)
class Negate(Pass):
    """Writes Abs for the Relu of a name, which is no exact rewrite."""

    name, kind = "negate", "exact"

    def work(self) -> Pass:
        return _Negate()


class _Negate(Negate):
    def apply(self, graph, ctx):
        outcome = Outcome()
        for one in graph.nodes:
            if one.name == "n_r_else":
                one.op = "Abs"
                outcome.change(one.name, "Abs")
        return outcome


@pytest.mark.parametrize("samples", [None, decoders.steps(kinds=(True,))], ids=["random", "cache only"])
def test_a_wrong_rewrite_in_a_branch_that_no_probe_takes_is_found(samples):
    """The condition holds for all values below 1e30, so that no probe reaches the other branch."""
    model = decoders.merged()
    asked = [
        node("Abs", "x", "size"),
        node("ReduceMax", "size", "largest", keepdims=0),
        node("Less", "largest huge", "usual"),
        node("Or", "use_cache_branch usual", "taken"),
    ]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(1e30, np.float32), "huge"))
    model.graph.node[0].input[0] = "taken"
    model.graph.node.extend([*asked, model.graph.node.pop(0)])
    graph = import_model(model)
    before = listing(bodies(graph)[0].graph)
    with pytest.raises(Violation, match=r"Abs 'n_r_else' writes in else_branch of If choice"):
        pipeline.run(graph, [Negate()], Context(data_from(*samples) if samples else None))
    assert listing(bodies(graph)[0].graph) == before


FOLDS = (FoldConstants(), TakeBranch(), RemoveIdentities(), FoldAffine(), FoldPad(), RemoveIdentities(), FoldAffine())


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(strategies.graphs(steps=8), strategies.graphs(steps=4))
def test_random_graphs_keep_their_outputs_in_branches(first, second):
    """Two random graphs as the branches of an If whose condition is computed."""
    inner = [whole(first).graph, whole(second).graph]
    for tag, part in zip("ab", inner, strict=True):
        _prefix(part, tag)
        del part.output[1:]
    inputs = [value(f"{tag}x", *first_or.inputs[0].shape, kind=TensorProto.DOUBLE)
              for tag, first_or in zip("ab", (first, second), strict=True)]  # fmt: skip
    for part in inner:
        del part.input[:]
    choice = helper.make_node("If", ["is"], ["y"], "choice", then_branch=inner[0], else_branch=inner[1])
    graph = helper.make_graph(
        [node("Not", "c", "is"), choice],
        "g",
        [*inputs, value("c", kind=TensorProto.BOOL)],
        [onnx.ValueInfoProto(name="y", type=onnx.TypeProto(tensor_type=onnx.TypeProto.Tensor(elem_type=11)))],
    )
    built = import_model(helper.make_model(graph, opset_imports=strategies.OPSETS, ir_version=10))
    feed = feeds(built)
    both = [feed | {"c": np.array(taken)} for taken in (True, False)]
    before = [run(built, one) for one in both]
    for step in FOLDS:
        step.apply(built, Context())
        for old, one in zip(before, both, strict=True):
            assert_same(old, run(built, one), 1e-9)


def _prefix(graph: onnx.GraphProto, tag: str) -> None:
    """Begins every name of a graph with ``tag``."""
    for one in graph.node:
        one.input[:] = [tag + name if name else "" for name in one.input]
        one.output[:] = [tag + name if name else "" for name in one.output]
    for held in (*graph.initializer, *graph.output, *graph.value_info):
        held.name = tag + held.name


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(strategies.graphs(steps=8))
def test_random_graphs_keep_their_outputs_in_loops(first):
    """A random graph of a state that is halved from one iteration to the next, its first output stacked."""
    inner, shape = whole(first).graph, [d if isinstance(d, int) else 2 for d in first.inputs[0].shape]
    del inner.output[1:]
    state = value("x", *shape, kind=TensorProto.DOUBLE)
    body = helper.make_graph(
        [*inner.node, node("Mul", "x half", "halved"), node("Identity", "going", "again")],
        "body",
        [value("i", kind=TensorProto.INT64), value("going", kind=TensorProto.BOOL), state],
        [value("again", kind=TensorProto.BOOL), value("halved", *shape, kind=TensorProto.DOUBLE), inner.output[0]],
        [*inner.initializer, onnx.numpy_helper.from_array(np.array(0.5), "half")],
    )
    loop = helper.make_node("Loop", ["trips", "yes", "x0"], ["last", "y"], "loop", body=body)
    graph = helper.make_graph(
        [loop],
        "g",
        [value("x0", *shape, kind=TensorProto.DOUBLE)],
        [
            onnx.ValueInfoProto(name=n, type=helper.make_tensor_type_proto(TensorProto.DOUBLE, None))
            for n in loop.output
        ],
        [onnx.numpy_helper.from_array(np.array(v), name) for name, v in (("trips", 3), ("yes", True))],
    )
    built = import_model(helper.make_model(graph, opset_imports=strategies.OPSETS, ir_version=10))
    before = run(built, feed := feeds(built))
    for step in FOLDS:
        step.apply(built, Context())
        assert_same(before, run(built, feed), 1e-9)
