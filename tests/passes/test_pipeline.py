"""The pipeline: what it records, what it refuses, and that a refused pass leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from channelfold.passes import pipeline
from channelfold.passes.base import Change, Context, Outcome, Pass, Refusal
from channelfold.passes.fold import FoldAffine, FoldConstants, RemoveIdentities
from channelfold.passes.verify import Violation
from channelfold.runtime.errors import DataError, ModelError, UsageError, VerificationError
from channelfold.runtime.io import files
from channelfold.runtime.io.snapshot import Snapshot

MLP = """<ir_version: 8, opset_import: ["" : 17]>
mlp (float[n, 32] x) => (float[n, 8] y) {
  [mm1] h1 = MatMul (x, W1)
  [relu] r = Relu (h1)
  [mm2] h2 = MatMul (r, W2)
  [sigmoid] s = Sigmoid (h2)
  [mm3] y = MatMul (s, W3)
}"""

CONV_BN = """<ir_version: 8, opset_import: ["" : 17]>
net (float[n, 3, 8, 8] x) => (float[n, 16, 6, 6] y) {
  [conv] c = Conv (x, W)
  [bn] b = BatchNormalization (c, gamma, beta, mean, var)
  [id] i = Identity (b)
  [relu] y = Relu (i)
}"""


def load(text: str, **weights: np.ndarray) -> gs.Graph:
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(w, name) for name, w in weights.items())
    return files.import_model(model)


def mlp() -> gs.Graph:
    rng = np.random.default_rng(0)
    sizes = {"W1": (32, 16), "W2": (16, 64), "W3": (64, 8)}
    return load(MLP, **{name: rng.standard_normal(shape, np.float32) for name, shape in sizes.items()})


def conv_bn() -> gs.Graph:
    rng = np.random.default_rng(0)
    vectors = {name: rng.uniform(0.5, 2, 16).astype(np.float32) for name in ("gamma", "beta", "mean", "var")}
    return load(CONV_BN, W=rng.standard_normal((16, 3, 3, 3), np.float32), **vectors)


def bits(graph: gs.Graph) -> bytes:
    """The whole graph as bytes, weights too."""
    model, weights = files.export(graph)
    parts = [model.SerializeToString(deterministic=True)]
    return b"".join(parts + [p.SerializeToString() + np.ascontiguousarray(v).tobytes() for p, v in weights])


def node(graph: gs.Graph, name: str) -> gs.Node:
    return next(n for n in graph.nodes if n.name == name)


def weight(graph: gs.Graph, name: str) -> gs.Constant:
    return graph.tensors()[name]


def scale(graph: gs.Graph, name: str, factor: float) -> None:
    constant = weight(graph, name)
    constant.values = (files.read(constant) * factor).astype(np.float32)


@dataclass(frozen=True)
class Fake(Pass):
    """Does what it is told and reports one change."""

    name: ClassVar[str] = "fake"
    kind: ClassVar[Any] = "exact"

    edit: Callable[[gs.Graph], Any] = lambda graph: None

    def apply(self, graph: gs.Graph, ctx: Context) -> Any:
        result = self.edit(graph)
        return result if result is not None else Outcome([Change("mm1", "edited")])

    def options(self) -> dict[str, Any]:
        return {}


class Lossy(Fake):
    name = "lossy"
    kind = "lossy"


def halve_and_double(graph: gs.Graph) -> None:
    """The same function, but h1 and r are twice what they were (exact in binary floating point)."""
    scale(graph, "W1", 2)
    scale(graph, "W2", 0.5)


def run(graph: gs.Graph, *passes: Pass, **options: Any) -> tuple[gs.Graph, list[dict[str, Any]]]:
    return pipeline.run(graph, passes, Context(), **options)


def refused(graph: gs.Graph, broken: Pass) -> VerificationError:
    """The error of a pass that breaks its contract, after a check that the graph is what it was."""
    before = bits(graph)
    with pytest.raises(VerificationError) as caught:
        run(graph, broken)
    assert bits(graph) == before
    return caught.value


# ---- what is recorded --------------------------------------------------------------------------------------------


def test_real_passes_fold_a_convolution():
    graph = conv_bn()
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 3, 8, 8), np.float32)
    before = files.session(graph).run({"x": x})["y"]

    returned, steps = run(graph, FoldConstants(), RemoveIdentities(), FoldAffine())

    assert returned is graph
    assert [n.op for n in graph.nodes] == ["Conv", "Relu"]
    assert np.allclose(files.session(graph).run({"x": x})["y"], before, rtol=0, atol=1e-5 * np.abs(before).max())
    assert [(s["pass"], s["kind"], s["options"]) for s in steps] == [
        ("fold-constants", "exact", {}), ("remove-identities", "exact", {}), ("fold-affine", "exact", {})
    ]  # fmt: skip
    assert [len(s["changed"]) for s in steps] == [0, 1, 1]
    assert steps[1]["changed"] == [{"node": "id", "what": "Identity returns its input"}]
    assert steps[0]["verified"] is None
    for step in steps[1:]:
        assert step["verified"]["max_rel_error"] < 1e-6
        assert (step["verified"]["probes"], step["verified"]["tolerance"]) == (2, 1e-4)
    assert pipeline.warnings(steps) == []


def test_record_is_json_with_the_agreed_keys():
    @dataclass(frozen=True)
    class WithOptions(Lossy):
        exclude: tuple[str, ...] = ("a", "b")

        def options(self):
            return {"exclude": self.exclude}

    def edit(graph):
        scale(graph, "W1", 3)
        return Outcome([Change("mm1", "tripled")], [Refusal("mm2", "too small", "size")], {"factor": 3})

    _, [step] = run(mlp(), WithOptions(edit))
    assert step.pop("seconds") >= 0
    assert step == {
        "pass": "lossy",
        "kind": "lossy",
        "options": {"exclude": ["a", "b"]},
        "changed": [{"node": "mm1", "what": "tripled"}],
        "refused": [{"node": "mm2", "reason": "too small", "code": "size"}],
        "verified": None,
        "facts": {"factor": 3},
    }


def test_sessions_one_at_a_time_and_none_for_a_pass_that_changes_nothing(monkeypatch):
    alive, made = [0], [0]

    class Counted:
        def __init__(self, session):
            alive[0] += 1
            made[0] += 1
            assert alive[0] == 1
            self._session, self.inputs = session, session.inputs

        def run(self, *args):
            return self._session.run(*args)

        def __del__(self):
            alive[0] -= 1

    real = Snapshot.session
    monkeypatch.setattr(Snapshot, "session", lambda *args, **options: Counted(real(*args, **options)))
    idle = Fake(lambda graph: Outcome())
    run(mlp(), idle, Fake(halve_and_double), idle, Fake(halve_and_double), Fake(halve_and_double), idle)
    assert (made[0], alive[0]) == (4, 0)  # the original and three changed graphs


def test_an_exact_pass_after_a_lossy_one_is_held_to_the_lossy_graph():
    _, steps = run(mlp(), Lossy(lambda graph: scale(graph, "W1", 3)), Fake(halve_and_double))
    assert steps[0]["verified"] is None
    assert steps[1]["verified"]["max_rel_error"] == 0.0


def test_verification_can_be_switched_off():
    _, [step] = run(mlp(), Fake(lambda graph: scale(graph, "W1", 3)), verify=False)
    assert step["verified"] is None


def test_progress_names_every_pass():
    said = []
    ctx = Context(progress=lambda *args: said.append(args))
    pipeline.run(mlp(), [FoldConstants(), RemoveIdentities()], ctx)
    assert said == [("fold-constants", 0, 2), ("remove-identities", 1, 2)]


# ---- the opset ---------------------------------------------------------------------------------------------------


class Needs13(Fake):
    needs_opset = 13


SQUEEZE = """<ir_version: 6, opset_import: ["" : 11]>
net (float[n, 1, 4] x) => (float[n, 4] y) { [sq] s = Squeeze <axes = [1]> (x) [relu] y = Relu (s) }"""


def test_opset_is_raised_for_a_pass_that_needs_it_and_recorded():
    seen = []
    graph, steps = run(load(SQUEEZE), Needs13(lambda graph: seen.append(graph.opset) or Outcome()))
    assert (seen, graph.opset) == ([13], 13)
    assert [s["pass"] for s in steps] == ["raise-opset", "fake"]
    assert steps[0]["changed"] == [{"node": "(whole graph)", "what": "opset 11 -> 13"}]
    assert steps[0]["facts"] == {"from": 11, "to": 13}
    assert steps[0]["verified"]["max_rel_error"] == 0.0
    assert [(n.op, len(n.inputs)) for n in graph.nodes] == [("Squeeze", 2), ("Relu", 1)]  # axes became an input


def test_the_opset_a_pass_needs_may_depend_on_the_graph():
    class Deep(Fake):
        def opset_for(self, graph):
            return 13 if len(graph.nodes) == 2 else 0

    graph, steps = run(load(SQUEEZE), Deep(lambda graph: Outcome()))
    assert (graph.opset, steps[0]["pass"]) == (13, "raise-opset")
    graph = mlp()
    graph.opset = 11
    assert [s["pass"] for s in run(graph, Deep(lambda graph: Outcome()))[1]] == ["fake"]


def wrong_opset(graph: gs.Graph, opset: int) -> gs.Graph:
    raised = mlp()
    scale(raised, "W3", 2)
    raised.opset = opset
    return raised


def test_wrong_opset_conversion_is_rolled_back(monkeypatch):
    monkeypatch.setattr(pipeline, "raise_opset", wrong_opset)
    graph = mlp()
    graph.opset = 11
    error = refused(graph, Needs13())
    assert "Pass 'raise-opset' broke its contract" in str(error)
    assert str(error).endswith("export the model again with opset_version=13.")


def test_wrong_opset_conversion_skips_the_pass_that_needed_it(monkeypatch):
    monkeypatch.setattr(pipeline, "raise_opset", wrong_opset)
    graph = mlp()
    graph.opset = 11
    before = bits(graph)
    graph, steps = run(graph, Needs13(halve_and_double), on_violation="skip")
    assert bits(graph) == before
    assert [[r["code"] for r in s["refused"]] for s in steps] == [["rolled back"], ["rolled back"]]
    assert steps[1]["refused"][0]["reason"] == "it needs opset 13, and raising the graph to it was rolled back"


def test_opset_that_cannot_be_reached_is_the_models_error(monkeypatch):
    def fail(graph, opset):
        raise ModelError("The model cannot be raised")

    monkeypatch.setattr(pipeline, "raise_opset", fail)
    graph = load(SQUEEZE)
    with pytest.raises(ModelError, match="cannot be raised"):
        run(graph, Needs13(), on_violation="skip")


# ---- broken promises ---------------------------------------------------------------------------------------------


def test_wrong_numbers_name_the_first_differing_tensor_and_its_node():
    error = refused(mlp(), Fake(lambda graph: scale(graph, "W2", 1.01)))
    assert isinstance(error, Violation)
    assert (error.tensor, error.node) == ("h2", "mm2")
    assert error.error == pytest.approx(0.01, rel=1e-4)
    assert str(error).startswith(
        "Pass 'fake' broke its contract and was rolled back: it declares itself exact, but output 'y' is off by "
    )
    assert "the first tensor that differs is 'h2' (by 0.01), which MatMul 'mm2' writes" in str(error)
    assert "leave 'fake' out of the recipe, or go on without it with on_violation='skip'" in str(error)


def test_tensors_rewritten_on_purpose_are_not_blamed():
    def edit(graph):
        halve_and_double(graph)
        scale(graph, "W3", 0.5)

    error = refused(mlp(), Fake(edit))
    assert (error.tensor, error.node) == ("y", "mm3")
    assert error.error == pytest.approx(0.5, rel=1e-6)


def test_errors_pass_through_tensors_that_only_one_graph_has():
    def edit(graph):
        mm1, relu = node(graph, "mm1"), node(graph, "relu")
        renamed = gs.Variable("renamed", np.float32)
        mm1.outputs, relu.inputs = [renamed], [renamed]
        scale(graph, "W1", 1.5)

    error = refused(mlp(), Fake(edit))
    assert (error.tensor, error.node) == ("r", "relu")


def test_invalid_graph():
    def edit(graph):
        node(graph, "relu").attrs["alpha"] = 1.0

    message = str(refused(mlp(), Fake(edit)))
    assert "The graph is no longer valid ONNX" in message
    assert "alpha" in message


def test_model_that_was_invalid_before_is_not_blamed_on_the_pass():
    graph = mlp()
    node(graph, "relu").attrs["alpha"] = 1.0
    _, [step] = run(graph, Lossy(lambda graph: scale(graph, "W1", 2)))
    assert step["changed"] == [{"node": "mm1", "what": "edited"}]
    assert pipeline.warnings([step]) == []  # it is invalid in the way that it was

    def edit(graph):
        node(graph, "relu").attrs["beta"] = node(graph, "relu").attrs.pop("alpha")

    _, [step] = run(graph, Lossy(edit))
    assert "It was not before the step either, for another reason" in pipeline.warnings([step])[0]


def test_graph_that_cannot_run_any_more():
    def edit(graph):
        graph.nodes.insert(0, gs.Node("Missing", "missing", domain="nowhere", inputs=[graph.inputs[0]],
                                      outputs=[gs.Variable("m", np.float32)]))  # fmt: skip

    assert "ONNX Runtime cannot run the graph any more" in str(refused(mlp(), Fake(edit)))


def test_pass_that_raises():
    def edit(graph):
        scale(graph, "W1", 3)
        raise IndexError("list index out of range")

    message = str(refused(mlp(), Fake(edit)))
    assert "it failed with IndexError: list index out of range (test_pipeline.py, line " in message


def test_errors_for_the_user_pass_unchanged_and_are_never_skipped():
    def edit(graph):
        scale(graph, "W1", 3)
        raise DataError("Quantization needs calibration data")

    graph = mlp()
    before = bits(graph)
    with pytest.raises(DataError, match=r"^Quantization needs calibration data$"):
        run(graph, Fake(edit), on_violation="skip")
    assert bits(graph) == before


def rename_output(graph):
    graph.outputs[0].name = "z"


def retype_input(graph):
    graph.inputs[0].dtype = np.dtype(np.float64)


def fix_batch(graph):
    graph.inputs[0].shape = [1, 32]


def open_channels(graph):
    graph.outputs[0].shape = ["n", None]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (rename_output, "outputs from y: float['n', 8] to z: float['n', 8]"),
        (retype_input, "inputs from x: float['n', 32] to x: double['n', 32]"),
        (fix_batch, "inputs from x: float['n', 32] to x: float[1, 32]"),
        (open_channels, "outputs from y: float['n', 8] to y: float['n', '?']"),
    ],
)
def test_changed_interface(edit, said):
    assert f"it changed the model's {said}" in str(refused(mlp(), Fake(edit)))


def test_output_sizes_may_become_known():
    graph = mlp()
    graph.outputs[0].shape = ["a", None]
    _, [step] = run(graph, Fake(lambda graph: setattr(graph.outputs[0], "shape", ["a", 8]) or halve_and_double(graph)))
    assert step["verified"]["max_rel_error"] == 0.0


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (lambda: 3, "apply() returned 'int', expected an Outcome"),
        (lambda: Outcome([Change("", "edited")]), "without the name of a node"),
        (lambda: Outcome([], [Refusal("", "no")]), "without the name of a node"),
        (lambda: Outcome([Change("mm1", "edited")], facts={"scale": np.float32(1)}), "its facts are not JSON"),
        (lambda: Outcome([Change("mm1", "edited")]), "it reports changes, but the graph is the same"),
    ],
)
def test_outcomes_that_break_the_contract(result, said):
    assert said in str(refused(mlp(), Fake(lambda graph: result())))


def test_change_that_is_not_reported():
    def weights(graph):
        scale(graph, "W3", 2)
        return Outcome()

    def names(graph):
        node(graph, "relu").name = "other"
        return Outcome()

    for edit in (weights, names):
        assert "it reports no change, but made one" in str(refused(mlp(), Fake(edit)))


def test_shapes_found_on_the_way_and_equal_weights_are_no_change():
    def edit(graph):
        files.infer_shapes(graph)
        weight(graph, "W1").values = files.read(weight(graph, "W1")).copy()
        return Outcome()

    _, [step] = run(mlp(), Fake(edit))
    assert step["verified"] is None


def test_weights_cannot_be_written_into():
    def edit(graph):
        files.read(weight(graph, "W1"))[:] = 0

    assert "ValueError: assignment destination is read-only" in str(refused(mlp(), Fake(edit)))
    graph = mlp()
    run(graph, Fake(halve_and_double))
    files.read(weight(graph, "W1"))[:] = 0  # allowed again afterwards


def test_skipping_goes_on_without_the_pass():
    wrong = Fake(lambda graph: scale(graph, "W2", 1.01))
    graph, steps = run(mlp(), Fake(halve_and_double), wrong, Fake(halve_and_double), on_violation="skip")
    expected, _ = run(mlp(), Fake(halve_and_double), Fake(halve_and_double))
    assert bits(graph) == bits(expected)
    assert [len(s["changed"]) for s in steps] == [1, 0, 1]
    [refusal] = steps[1]["refused"]
    assert (refusal["node"], refusal["code"]) == ("mm2", "rolled back")
    assert pipeline.warnings(steps) == [f"fake: {refusal['reason']}"]


def test_unknown_reaction_is_a_usage_error():
    with pytest.raises(UsageError, match="on_violation is 'ignore'"):
        run(mlp(), on_violation="ignore")
