"""The ONNX backend suite: every model that ships with onnx goes through load, a transform and save, unharmed.

How a case is judged depends on who can run it, and the counts are asserted, so that no case drops out unnoticed:

    reference       ONNX Runtime computes the reference outputs, before and after
    own values      ONNX Runtime computes something else, and the same before and after
    evaluator       only onnx.reference can run the model; it computes the reference outputs, before and after
    structure       nobody here can run the model: it is the same message before and after
    untouched       the transform has nothing to do
    refused         the transform says that it cannot work on this model
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from onnx import numpy_helper
from onnx.backend.test.runner import Runner
from onnx.reference import ReferenceEvaluator

from channelfold.passes.base import Context
from channelfold.passes.cast import Cast
from channelfold.passes.fold import (
    FoldAffine,
    FoldConstants,
    FoldPad,
    FoldShapes,
    MergeEqual,
    MergeMoves,
    RemoveIdentities,
)
from channelfold.passes.operators import operator
from channelfold.passes.quantize import Quantize
from channelfold.runtime.data.sources import open_data
from channelfold.runtime.errors import DataError, ModelError
from channelfold.runtime.io.files import check, load, raise_opset, save
from channelfold.runtime.io.session import Session

EXACT = (FoldConstants(), FoldShapes(), RemoveIdentities(), FoldPad(), FoldAffine(), MergeMoves(), MergeEqual())
# The condition of their If becomes constant, and ONNX Runtime, which then takes the branch in, finds its Range invalid.
BREAKS_RUNTIME = {"test_affine_grid_2d_expanded", "test_affine_grid_2d_align_corners_expanded"}


def folded(graph: gs.Graph) -> gs.Graph | None:
    """The graph after all exact passes; None when there was nothing to do."""
    changes = [step.apply(graph, Context()).changed for step in EXACT if step.opset_for(graph) <= graph.opset]
    return graph if any(changes) else None


TRANSFORMS: list[tuple[str, Callable[[gs.Graph], gs.Graph | None]]] = [  # None: nothing to do
    ("nothing", lambda graph: graph),
    ("opset 21", lambda graph: raise_opset(graph, 21) if graph.opset < 21 else None),
    ("folds", folded),
]
COUNTS = {  # (onnx, onnxruntime): transform: cases by how they were proven
    ("1.23.2", "1.31.1"): {
        "nothing": {"reference": 1455, "evaluator": 539, "own values": 18, "structure": 21},
        "opset 21": {
            "reference": 915, "evaluator": 102, "own values": 14, "structure": 11, "untouched": 990, "refused": 1,
        },
        "folds": {"untouched": 1714, "reference": 264, "evaluator": 52, "structure": 1},
        "quantized": {"no linear node": 1834, "refused": 150, "not run": 21, "quantized": 28},
    }
}  # fmt: skip
DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    model: onnx.ModelProto
    feed: dict
    expected: list
    rtol: float
    atol: float


def _value(item):
    kinds = {
        onnx.TensorProto: numpy_helper.to_array,
        onnx.SequenceProto: numpy_helper.to_list,
        onnx.OptionalProto: numpy_helper.to_optional,
    }
    return kinds[type(item)](item) if type(item) in kinds else item


def _stored(file: Path, kind: onnx.TypeProto):
    classes = {"sequence_type": onnx.SequenceProto, "optional_type": onnx.OptionalProto}
    message = classes.get(kind.WhichOneof("value"), onnx.TensorProto)()
    message.ParseFromString(file.read_bytes())
    return _value(message)


def _inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    given = {tensor.name for tensor in model.graph.initializer} if model.ir_version < 4 else set()
    return [value for value in model.graph.input if value.name not in given]


def _node_cases() -> Iterator[Case]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reference implementations divide by zero on purpose
        from onnx.backend.test.loader import load_node_model_tests

        for case in load_node_model_tests():
            ((inputs, outputs),) = case.data_sets
            names = (value.name for value in _inputs(case.model))
            feed = dict(zip(names, map(_value, inputs), strict=False))
            yield Case(case.name, case.model, feed, [_value(item) for item in outputs], case.rtol, case.atol)


def _stored_cases() -> Iterator[Case]:
    for kind in ("simple", "pytorch-converted", "pytorch-operator"):
        for folder in sorted((DATA / kind).glob("test_*")):
            model = onnx.load(folder / "model.onnx")
            data = folder / "test_data_set_0"
            files = ((value, data / f"input_{i}.pb") for i, value in enumerate(_inputs(model)))
            feed = {value.name: _stored(file, value.type) for value, file in files if file.exists()}
            expected = [_stored(data / f"output_{i}.pb", v.type) for i, v in enumerate(model.graph.output)]
            yield Case(f"{kind}/{folder.name}", model, feed, expected, 1e-3, 1e-7)


def _light_cases() -> Iterator[Case]:
    for file in sorted((DATA / "light").glob("*.onnx")):
        model = onnx.load(file)
        feed = {value.name: Runner.generate_dummy_data(value) for value in _inputs(model)}
        expected = [_stored(file.with_name(f"{file.stem}_output_0.pb"), model.graph.output[0].type)]
        yield Case(f"light/{file.stem}", model, feed, expected, 1e-3, 1e-7)


class Suite:
    """The cases, each with what can be said about it before anything happens to its model."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.cases = [*_node_cases(), *_stored_cases(), *_light_cases()]
        self.judged = [self._judge(case) for case in self.cases]

    def _judge(self, case: Case) -> tuple[str, list]:
        path = self.folder / "before.onnx"
        path.write_bytes(case.model.SerializeToString())
        try:
            values = _run(path, case)
        except ModelError:
            return self._judge_without_runtime(case)
        return ("reference" if _agree(case.expected, values, case) else "own values"), values

    def _judge_without_runtime(self, case: Case) -> tuple[str, list]:
        try:
            values = _evaluate(case.model, case)
        except Exception:  # the evaluator says in many ways that it cannot
            return "structure", []
        return ("evaluator" if _agree(case.expected, values, case) else "structure"), values


def _run(path: Path, case: Case) -> list:
    onnxruntime.set_seed(0)
    return list(Session(path, threads=1).run(case.feed).values())


def _evaluate(model: onnx.ModelProto, case: Case) -> list:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ReferenceEvaluator(model).run(None, case.feed)


def _agree(expected, value, case: Case) -> bool:
    """The suite's own measure: the same type and shape, and values within the tolerances of the case."""
    if isinstance(expected, list | tuple):
        both = zip(expected, value, strict=False)
        return (
            isinstance(value, list | tuple) and len(value) == len(expected) and all(_agree(e, v, case) for e, v in both)
        )
    if expected is None or value is None:
        return expected is value
    expected, value = np.asarray(expected), np.asarray(value)
    if expected.shape != value.shape or expected.dtype.kind in "OUS":
        return np.array_equal(expected, value)
    if (
        expected.dtype.kind == "V" and expected.dtype == value.dtype
    ):  # bfloat16 and smaller; two units in the last place
        expected, value = expected.astype(np.float32), value.astype(np.float32)
        return np.allclose(value, expected, max(case.rtol, 2**-6), case.atol, equal_nan=True)
    return expected.dtype == value.dtype and np.allclose(value, expected, case.rtol, case.atol, equal_nan=True)


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Suite:
    return Suite(tmp_path_factory.mktemp("suite"))


def _verdict(suite: Suite, case: Case, judge: str, before: list, transform: Callable, same_message: Callable) -> str:
    """How the case was proven; raises AssertionError when it no longer is what it was."""
    source, target = suite.folder / "source.onnx", suite.folder / "target.onnx"
    source.write_bytes(case.model.SerializeToString())
    graph = load(source)
    try:
        changed = transform(graph)
    except ModelError:
        return "refused"
    if changed is None:
        return "untouched"
    save(changed, target)
    assert same_message(target, case.model), "the message changed"
    if judge in ("reference", "own values"):
        after = _run(target, case)
    elif judge == "evaluator":
        after = _evaluate(onnx.load(target), case)
    else:
        check(changed)
        return judge
    assert _agree(before if judge == "own values" else case.expected, after, case), f"{judge}: outputs changed"
    return judge


def _counted(name: str, suite: Suite, verdict: Callable, skipped: Container[str] = ()) -> Counter[str]:
    """How many cases got which verdict, which has to be what is known of these versions; no case may fail."""
    counts, failures = Counter(), []
    for case, (judge, before) in zip(suite.cases, suite.judged, strict=True):
        if case.name in skipped:
            continue
        try:
            counts[verdict(case, judge, before)] += 1
        except Exception as error:
            failures.append(f"{case.name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    assert not failures, "\n".join([f"{len(failures)} cases failed", *failures[:40]])
    print(f"{name}: {dict(counts)}")
    known = COUNTS.get((onnx.__version__, onnxruntime.__version__), {})
    if name in known:
        assert counts == known[name]
    return counts


@pytest.mark.parametrize(("name", "transform"), TRANSFORMS, ids=[name for name, _ in TRANSFORMS])
def test_suite(name, transform, suite, canonical, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # two thousand small files need not outlive a power cut

    def same_message(path, model):
        return name != "nothing" or canonical(onnx.load(path)) == canonical(model)

    skipped = BREAKS_RUNTIME if name == "folds" else ()
    counts = _counted(name, suite, lambda *judged: _verdict(suite, *judged, transform, same_message), skipped)
    assert counts["refused"] + counts["structure"] <= 0.02 * len(suite.cases)


def _quantized(suite: Suite, case: Case, judge: str, before: list) -> str:
    """What became of a case that is quantized on its own input; raises when it no longer runs, or runs far off."""
    source, target = suite.folder / "source.onnx", suite.folder / "target.onnx"
    source.write_bytes(case.model.SerializeToString())
    step = Quantize(min_activation_snr=0)
    graph = load(source)
    if not any(operator(node).weighted for node in graph.nodes):
        return "no linear node"
    if judge not in ("reference", "own values"):
        return "not run"
    try:
        graph = raise_opset(graph, step.opset_for(graph))
    except ModelError:
        return "refused"
    try:
        data = open_data([case.feed], Session(source).inputs)
        outcome = step.apply(graph, Context(calibration=data))
    except DataError:  # inputs that hold infinities on purpose
        return "refused"
    if not outcome.changed:
        return "refused"
    check(graph)
    save(graph, target)
    for expected, value in zip(before, _run(target, case), strict=True):
        assert (expected.shape, expected.dtype) == (value.shape, value.dtype)
        error = np.linalg.norm((value - expected).astype(np.float64)) / np.linalg.norm(expected.astype(np.float64))
        assert error < 0.05, f"relative error {error:.3f}"
    return "quantized"


def test_suite_quantized(suite, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr("channelfold.passes.quantize.static.MIN_CHANNELS", 1)  # the suite's operators are tiny
    _counted("quantized", suite, lambda *judged: _quantized(suite, *judged))


def _cast(suite: Suite, case: Case, judge: str, before: list) -> str:
    """What became of a case in float16, with the ranges of its own input; raises when it no longer is near itself."""
    source, target = suite.folder / "source.onnx", suite.folder / "target.onnx"
    source.write_bytes(case.model.SerializeToString())
    step, graph = Cast(), load(source)
    runs = judge in ("reference", "own values")
    try:
        graph = raise_opset(graph, step.opset_for(graph))
        outcome = step.apply(graph, Context(open_data([case.feed], Session(source).inputs) if runs else None))
    except (ModelError, DataError):  # inputs that hold infinities on purpose
        return "refused"
    if not outcome.changed:
        return "float32" if outcome.refused else "nothing to cast"
    save(graph, target)
    onnx.checker.check_model(target)
    onnx.shape_inference.infer_shapes(onnx.load(target), check_type=True, strict_mode=True)
    if not runs:
        return "structure"
    for expected, value in zip(before, _run(target, case), strict=True):
        _assert_near(expected, value)
    return "float16"


def _assert_near(expected, value) -> None:
    """The same type, shape and infinities; floats to 1 %, codes to one step."""
    if not isinstance(expected, np.ndarray) or expected.dtype.kind not in "fiu":
        assert not isinstance(expected, np.ndarray) or np.array_equal(expected, value)
        return
    assert (expected.shape, expected.dtype) == (value.shape, value.dtype)
    finite = np.isfinite(expected)
    assert np.array_equal(finite, np.isfinite(value))
    off = value[finite].astype(np.float64) - expected[finite].astype(np.float64)
    if expected.dtype.kind == "f":
        error = np.linalg.norm(off) / max(np.linalg.norm(expected[finite].astype(np.float64)), 1e-30)
        assert error < 0.01, f"relative error {error:.3f}"
    else:
        assert np.abs(off).max(initial=0) <= 1


def test_suite_cast(suite, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    counts = _counted("cast", suite, lambda *judged: _cast(suite, *judged))
    assert counts["float16"] > 500


def test_suite_is_whole(suite):
    kinds = Counter(case.name.partition("/")[0] if "/" in case.name else "node" for case in suite.cases)
    assert kinds["node"] >= 1500
    if onnx.__version__ == "1.23.2":
        assert kinds == {"node": 1884, "simple": 23, "pytorch-converted": 82, "pytorch-operator": 35, "light": 9}
