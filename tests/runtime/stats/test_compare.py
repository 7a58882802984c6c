"""Comparison of two models: figures computed by hand, everything odd an output can be, verdicts and gates."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper

from channelfold.runtime.data.sources import Data, open_data
from channelfold.runtime.errors import GateError, UsageError
from channelfold.runtime.io.session import Meaning, Session, TensorSpec
from channelfold.runtime.stats import compare as comparing
from channelfold.runtime.stats import metrics
from channelfold.runtime.stats.compare import (
    Comparison,
    Gates,
    OutputComparison,
    check_gates,
    compare,
    difference,
    remembered,
    same,
    verdict,
)
from channelfold.runtime.stats.metrics import ErrorSums

NAN, INF = math.nan, math.inf


class Fake:
    """A runner whose outputs are a function of the feed's index."""

    def __init__(self, outputs: Callable[[int], Mapping[str, Any]]):
        self.outputs = outputs

    def run(self, feed: Mapping[str, np.ndarray]) -> Mapping[str, Any]:
        return self.outputs(int(feed["index"][0]))


def indices(count: int) -> Data:
    return open_data({"index": np.arange(count)}, [TensorSpec("index", np.dtype("int64"), ("n",))])


def compared(reference: list[Any], candidate: list[Any]) -> OutputComparison:
    """The comparison of an output ``y`` that had these values in successive feeds."""
    pair = Fake(lambda i: {"y": reference[i]}), Fake(lambda i: {"y": candidate[i]})
    (output,) = compare(*pair, indices(len(reference))).outputs
    return output


def rows(*values: list[float]) -> list[np.ndarray]:
    return [np.array([row], "f4") for row in values]


class TestFigures:
    def test_by_hand(self):
        # sum r² = 25, sum c² = 29.25, sum rc = 27, e = (0, -0.5)
        y = compared(rows([3, 4]), rows([3, 4.5]))
        assert y.snr == 20.0
        assert y.cosine == pytest.approx(27 / math.sqrt(25 * 29.25), rel=1e-15)
        assert y.relative_l2 == 0.1
        assert (y.max_error, y.mean_error, y.max_reference) == (0.5, 0.25, 4.0)
        assert (y.agreement, y.equal, y.feeds, y.elements) == (1.0, None, 1, 2)

    def test_sums_run_over_all_feeds(self):
        # sum r² = 9 + 16 and sum e² = 0.25: the same as in one feed; per feed SNR is inf and 10 log10(16 / 0.25)
        y = compared(rows([3, 0], [0, 4]), rows([3, 0], [0, 4.5]))
        assert y.snr == 20.0
        assert (y.worst_sample, y.worst_snr) == (1, pytest.approx(10 * math.log10(64), rel=1e-15))

    def test_equal(self):
        y = compared(rows([1, 2]), rows([1, 2]))
        assert (y.snr, y.cosine, y.relative_l2, y.max_error) == (INF, 1.0, 0.0, 0.0)
        assert (y.worst_sample, y.worst_snr) == (None, None)

    def test_zero_reference(self):
        y = compared(rows([0, 0]), rows([0, 1]))
        assert (y.snr, y.cosine, y.relative_l2, y.max_error) == (-INF, 0.0, INF, 1.0)

    def test_both_zero(self):
        y = compared(rows([0, 0]), rows([0, 0]))
        assert (y.snr, y.cosine, y.relative_l2) == (INF, 1.0, 0.0)

    def test_opposite(self):
        assert compared(rows([1, 2]), rows([-1, -2])).cosine == -1.0

    def test_double_accumulation(self):
        # float32 would lose the error of 1e-5 beside 1e4, and the ones in a sum beyond 2^24.
        reference = np.ones((1, 2**21), "f8")
        reference[0, 0] = 1e4
        candidate = reference.copy()
        candidate[0, 0] += 2**-17
        expected = 10 * math.log10((1e8 + 2**21 - 1) / 2**-34)
        assert compared([reference], [candidate]).snr == pytest.approx(expected, rel=1e-14)

    def test_half_against_float(self):
        y = compared([np.array([[3, 4]], "f4")], [np.array([[3, 4.5]], "f2")])
        assert (y.snr, y.mismatches) == (20.0, 0)

    @settings(max_examples=60, deadline=None)
    @given(
        arrays=st.integers(1, 40).flatmap(
            lambda n: st.tuples(*[hnp.arrays(np.float32, n, elements=st.floats(-1e3, 1e3, width=32))] * 2)
        ),
        chunk=st.integers(1, 50),
    )
    def test_chunks_do_not_matter(self, arrays: tuple[np.ndarray, np.ndarray], chunk: int):
        whole = ErrorSums.of(*arrays)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(metrics, "_CHUNK", chunk)
            parts = ErrorSums.of(*arrays)
        for name, value in vars(whole).items():
            assert getattr(parts, name) == pytest.approx(value, rel=1e-12, abs=1e-12), name
        r, c = (a.astype(np.float64) for a in arrays)
        assert whole.relative_l2 == pytest.approx(
            np.linalg.norm(r - c) / np.linalg.norm(r) if r.any() else (INF if c.any() else 0), rel=1e-12
        )


class TestAgreement:
    def test_rank_2(self):
        y = compared(rows([1, 2, 3], [3, 2, 1], [1, 2, 3]), rows([1, 2, 3], [3, 2, 1], [3, 2, 1]))
        assert y.agreement == pytest.approx(2 / 3, rel=1e-15)

    def test_rank_3_counts_positions(self):
        reference = np.array([[[0, 1], [1, 0], [0, 1], [1, 0]]], "f4")
        candidate = np.array([[[0, 1], [1, 0], [0, 1], [0, 1]]], "f4")
        assert compared([reference], [candidate]).agreement == 0.75

    @pytest.mark.parametrize("shape", [(), (5,), (5, 1), (1, 2, 3, 4)])
    def test_where_an_argmax_means_nothing(self, shape: tuple[int, ...]):
        array = np.ones(shape, "f4")
        assert compared([array], [array]).agreement is None


class TestNotFinite:
    def test_same_places_are_left_out(self):
        y = compared(rows([3, -INF, NAN, 4]), rows([3, -INF, NAN, 4.5]))
        assert (y.snr, y.max_error) == (20.0, 0.5)
        assert (y.reference_nan, y.reference_inf, y.candidate_nan, y.candidate_inf) == (1, 1, 1, 1)

    @pytest.mark.parametrize(
        ("reference", "candidate"), [([1, 2], [1, NAN]), ([1, NAN], [1, 2]), ([1, 2], [1, INF]), ([1, INF], [1, -INF])]
    )
    def test_a_difference_is_an_infinite_error(self, reference: list[float], candidate: list[float]):
        y = compared(rows(reference), rows(candidate))
        assert (y.snr, y.relative_l2, y.max_error, y.worst_snr) == (-INF, INF, INF, -INF)


class TestOtherOutputs:
    def test_integers(self):
        y = compared([np.array([[1, 2, 3, 4]])], [np.array([[1, 2, 3, 5]])])
        assert (y.equal, y.snr, y.elements) == (0.75, None, 4)

    def test_bools(self):
        assert compared([np.array([True, False])], [np.array([True, True])]).equal == 0.5

    def test_strings(self):
        reference, candidate = np.array(["ab", "c"], object), np.array(["ab", "cd"], object)
        assert compared([reference], [candidate]).equal == 0.5

    def test_absent_optionals(self):
        assert compared([None], [None]).equal == 1.0

    def test_sequences_are_compared_by_element(self):
        reference = {"boxes": [np.array([3.0, 4.0]), np.array([1.0])]}
        candidate = {"boxes": [np.array([3.0, 4.5])]}
        found = compare(Fake(lambda i: reference), Fake(lambda i: candidate), indices(1))
        assert [(y.name, y.snr) for y in found.outputs] == [("boxes[0]", 20.0)]
        assert (found.missing, found.extra) == (("boxes[1]",), ())

    def test_maps_are_compared_by_key(self):
        reference, candidate = {"p": [{"cat": 3.0, "dog": 4.0}]}, {"p": [{"cat": 3.0, "dog": 4.5}]}
        found = compare(Fake(lambda i: reference), Fake(lambda i: candidate), indices(1))
        assert {y.name: y.max_error for y in found.outputs} == {"p[0][cat]": 0.0, "p[0][dog]": 0.5}

    def test_shapes_that_differ_are_a_finding(self):
        y = compared(rows([3, 4], [3, 4]), [np.ones((1, 3), "f4"), np.array([[3, 4.5]], "f4")])
        assert (y.feeds, y.mismatches, y.mismatch) == (2, 1, "shape (1, 2) became (1, 3) (feed 0)")
        assert (y.snr, y.worst_sample) == (20.0, 1)

    def test_types_that_differ_are_a_finding(self):
        y = compared([np.array([1.0])], [np.array([1])])
        assert (y.mismatch, y.equal) == ("float64 became int64 (feed 0)", 0.0)

    def test_empty_outputs(self):
        y = compared([np.zeros((0, 4), "f4")], [np.zeros((0, 4), "f4")])
        assert (y.elements, y.snr, y.mean_error, y.agreement) == (0, INF, 0.0, None)
        assert compared([np.zeros(0, "i8")], [np.zeros(0, "i8")]).equal == 1.0

    def test_outputs_on_one_side(self):
        one = {"a": np.ones(1), "b": np.ones(1)}, {"b": np.ones(1), "c": np.ones(1)}
        found = compare(Fake(lambda i: one[0]), Fake(lambda i: one[1]), indices(2))
        assert ([y.name for y in found.outputs], found.missing, found.extra) == (["b"], ("a",), ("c",))


def scaled(path: Path, weight: list[float]) -> Session:
    """y = x * weight, its argmax, and y once more as a sequence of its columns."""
    nodes = [
        helper.make_node("Mul", ["x", "w"], ["y"]),
        helper.make_node("ArgMax", ["y"], ["top"], axis=1),
        helper.make_node("SplitToSequence", ["y"], ["columns"], axis=1),
    ]
    outputs = [
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2]),
        helper.make_tensor_value_info("top", TensorProto.INT64, ["n", 1]),
        helper.make_tensor_sequence_value_info("columns", TensorProto.FLOAT, None),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])]
    weights = [helper.make_tensor("w", TensorProto.FLOAT, [2], weight)]
    graph = helper.make_graph(nodes, "scaled", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return Session(path, threads=1)


def test_sessions(tmp_path: Path):
    one, other = scaled(tmp_path / "one.onnx", [1, 1]), scaled(tmp_path / "other.onnx", [1, 1.125])
    data = open_data({"x": np.array([[3, 4], [4, 3.75]], "f4")}, one.inputs)
    outputs = {output.name: output for output in compare(one, other, data).outputs}
    assert list(outputs) == ["y", "top", "columns[0]", "columns[1]"]
    # per feed sum r² / sum e² is 25 / 0.5² and 30.0625 / 0.46875²
    assert outputs["y"].snr == pytest.approx(10 * math.log10((25 + 30.0625) / (0.5**2 + 0.46875**2)), rel=1e-14)
    assert (outputs["y"].worst_sample, outputs["y"].worst_snr) == (0, 20.0)
    assert (outputs["y"].agreement, outputs["top"].equal) == (0.5, 0.5)
    assert (outputs["columns[0]"].max_error, outputs["columns[1]"].max_error) == (0.0, 0.5)


@pytest.mark.parametrize(("kind", "snr"), [("mask", math.inf), ("ids", 10 * math.log10(24 / (12 * 81)))])
def test_positions_that_a_mask_leaves_out_do_not_count(kind: str, snr: float):
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    data = open_data({"index": mask}, [TensorSpec("index", mask.dtype, (2, 3), Meaning(kind))])
    hidden = np.ones((2, 3, 4), np.float32)
    padded = np.where(mask[..., None] == 0, 10 * hidden, hidden)

    class Always(Fake):
        def run(self, feed: Mapping[str, np.ndarray]) -> Mapping[str, Any]:
            return self.outputs(0)

    (output,) = compare(Always(lambda _: {"y": hidden}), Always(lambda _: {"y": padded}), data).outputs
    assert output.snr == pytest.approx(snr)


def test_progress_counts_feeds():
    seen = []
    runner = Fake(lambda i: {})
    compare(runner, runner, indices(2), lambda *call: seen.append(call))
    assert seen == [("compare", 0, 2), ("compare", 1, 2), ("compare", 2, 2)]


def test_json_is_valid_and_complete():
    outputs = rows([3, 4]), rows([3, NAN])
    found = compare(Fake(lambda i: {"y": outputs[0][i]}), Fake(lambda i: {"y": outputs[1][i]}), indices(1)).to_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["outputs"][0] == {
        "name": "y", "feeds": 1, "elements": 2, "snr": "-inf", "cosine": 1.0, "relative_l2": "inf", "max_error": "inf",
        "mean_error": "inf", "max_reference": 3.0, "agreement": 1.0, "equal": None, "worst_sample": 0,
        "worst_snr": "-inf", "reference_nan": 0, "reference_inf": 0, "candidate_nan": 1, "candidate_inf": 0,
        "mismatches": 0, "mismatch": "",
    }  # fmt: skip
    assert found["verdict"] == {
        "level": "collapsed", "reasons": ["y: 1 NaN and 0 Inf, where the reference has 0 and 0"],
    }  # fmt: skip
    assert (found["data"], found["feeds"], found["missing"], found["extra"]) == (
        "1 sample from arrays in memory",
        1,
        [],
        [],
    )


def comparison(*outputs: OutputComparison, missing: tuple[str, ...] = ()) -> Comparison:
    return Comparison(outputs, 4, "4 samples", missing)


def logits(**figures: Any) -> OutputComparison:
    defaults = {"snr": 40.0, "cosine": 0.9999, "relative_l2": 0.01, "max_error": 0.1, "agreement": 1.0}
    return OutputComparison("logits", 4, 400, **(defaults | figures))


class TestVerdict:
    @pytest.mark.parametrize(
        ("figures", "level", "reason"),
        [
            ({}, "ok", None),
            ({"snr": INF}, "ok", None),
            ({"snr": 20.0}, "ok", None),
            ({"snr": 19.9}, "degraded", "logits: SNR 19.9 dB"),
            ({"snr": 10.0}, "degraded", "logits: SNR 10.0 dB"),
            ({"snr": 9.9}, "collapsed", "logits: SNR 9.9 dB"),
            ({"snr": -INF}, "collapsed", "logits: SNR -inf dB"),
            ({"agreement": 0.95}, "ok", None),
            ({"agreement": 0.9}, "degraded", "logits: argmax agreement 90.0%"),
            ({"agreement": 0.4}, "degraded", "logits: argmax agreement 40.0%"),
            ({"agreement": 0.4, "snr": 15.0}, "collapsed", "logits: argmax agreement 40.0%"),
            ({"snr": None, "agreement": None, "equal": 0.9}, "degraded", "logits: 90.0% equal"),
            ({"snr": None, "agreement": None, "equal": 0.4}, "collapsed", "logits: 40.0% equal"),
            ({"mismatches": 1, "mismatch": "shape"}, "degraded", "logits: shape, in 1 of 4 feeds"),
            ({"mismatches": 4, "mismatch": "shape"}, "collapsed", "logits: shape, in 4 of 4 feeds"),
        ],
    )
    def test_levels(self, figures: dict[str, Any], level: str, reason: str | None):
        found = verdict(comparison(logits(**figures)))
        assert found.level == level
        assert reason in found.reasons if reason else found.reasons == ()

    def test_missing_output(self):
        assert verdict(comparison(missing=("boxes",))) == ("collapsed", ("boxes: the output is missing",))


class TestGates:
    def test_met(self):
        check_gates(comparison(logits()), Gates(min_snr=40, min_cosine=0.9999, min_agreement=1, max_rel=0.01))
        check_gates(comparison(missing=("boxes",)), Gates())

    def test_every_missed_gate_is_listed(self):
        boxes = OutputComparison("boxes", 4, 400, snr=-INF, cosine=NAN, relative_l2=INF, equal=None)
        with pytest.raises(GateError) as caught:
            check_gates(comparison(logits(), boxes), Gates(50, 0.99, 0.99, 0.1))
        assert str(caught.value) == (
            "The accuracy gate was missed: logits has SNR 40.00 dB, wanted at least 50.00 dB; "
            "boxes has SNR -inf dB, wanted at least 50.00 dB; boxes has cosine nan, wanted at least 0.990000; "
            "boxes has relative L2 inf, wanted at most 0.1. Keep more of the model in float, or lower the gate"
        )
        assert caught.value.exit_code == 3

    def test_agreement_holds_for_integers(self):
        ids = OutputComparison("ids", 4, 4, equal=0.5)
        with pytest.raises(GateError, match=r"ids has agreement 50\.00%, wanted at least 90\.00%"):
            check_gates(comparison(ids), Gates(min_agreement=0.9))

    def test_a_gate_on_nothing_is_missed(self):
        ids = OutputComparison("ids", 4, 4, equal=1.0)
        with pytest.raises(GateError, match="no output has a figure for SNR"):
            check_gates(comparison(ids), Gates(min_snr=10))

    def test_what_cannot_be_compared_misses_every_gate(self):
        broken = logits(mismatches=1, mismatch="shape (2,) became (3,) (feed 0)")
        with pytest.raises(GateError, match=r"boxes is missing; logits has shape \(2,\) became \(3,\) \(feed 0\)\. "):
            check_gates(comparison(broken, missing=("boxes",)), Gates(min_snr=0))

    @pytest.mark.parametrize(
        ("bound", "hint"), [("min_agreement", "For a percentage give 0.99"), ("min_cosine", "For a percentage")]
    )
    def test_percentages(self, bound: str, hint: str):
        with pytest.raises(UsageError, match=hint):
            Gates(**{bound: 99})

    def test_negative_bound(self):
        with pytest.raises(UsageError, match="max_rel is -1, and cannot be negative"):
            Gates(max_rel=-1)


def y(*values: Any, dtype: str = "f4") -> dict[str, Any]:
    return {"y": np.array(values, dtype)}


class TestSame:
    @pytest.mark.parametrize(
        ("reference", "candidate", "reason"),
        [
            (y(1, 2), y(1, 2), None),
            (y(1, 2), y(1, 2.0000001), None),
            (y(1, -1024), y(1.5, -1024), "'y' is off by 0.00049 of its largest magnitude, 1.02e+03 (allowed: 1e-06)"),
            (y(1, NAN, INF), y(1, NAN, INF), None),
            (y(1, NAN), y(1, 2), "'y' has NaN or Inf in other places (1 of 2)"),
            (y(1, INF), y(1, -INF), "'y' has NaN or Inf in other places (1 of 2)"),
            (y(0, 0), y(0, 1e-9), "'y' was zero everywhere and reaches 1e-09"),
            (y(1), y(1, dtype="f2"), "'y' changed: float32 became float16"),
            (y(1), y(1, 1), "'y' changed: shape (1,) became (2,)"),
            (y(1, 2, dtype="i8"), y(1, 3, dtype="i8"), "'y' differs in 1 of 2 elements"),
            (y(1, 0, dtype="?"), y(1, 0, dtype="?"), None),
            (y(1) | {"z": 1}, y(1), "the outputs are y, and were y, z"),
            (y(), y(), None),
            ({"s": ["a", np.array([1.0])]}, {"s": ["a", np.array([1.0])]}, None),
            ({"s": ["a"]}, {"s": ["b"]}, "'s[0]' differs in 1 of 1 elements"),
        ],
    )
    def test_reasons(self, reference: dict[str, Any], candidate: dict[str, Any], reason: str | None):
        assert same(reference, candidate, rtol=1e-6) == reason

    def test_the_worst_output_is_named(self):
        reference = {"a": np.array([1.0]), "b": np.array([1.0]), "c": np.array([1.0])}
        candidate = {"a": np.array([1.25]), "b": np.array([1.5]), "c": np.array([1.0])}
        assert difference(reference, candidate) == (0.5, "'b' is off by 0.5 of its largest magnitude, 1")
        assert difference(reference, reference) == (0.0, "nothing differs")

    @given(
        hnp.arrays(np.float32, hnp.array_shapes(max_dims=3), elements=st.floats(-100, 100, width=32)),
        st.floats(0, 0.5),
    )
    def test_error_is_relative_to_the_largest_magnitude(self, array: np.ndarray, scale: float):
        reference = {"y": array.astype(np.float64) + 200}
        candidate = {"y": reference["y"] * (1 + scale)}
        assert difference(reference, candidate).error == pytest.approx(scale, rel=1e-9, abs=1e-15)


def test_ml_dtypes_are_floats():
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    assert compared([np.array([[3, 4]], bfloat16)], [np.array([[3, 4.5]], bfloat16)]).snr == 20.0


def test_outputs_are_remembered_unless_they_are_large(monkeypatch):
    data = indices(3)
    model = Fake(lambda index: {"y": np.full(4, index, np.float32)})
    held = remembered(model, data)
    assert held is not None
    assert [held.run({})["y"].tolist() for _ in data] == [[index] * 4 for index in range(3)]
    monkeypatch.setattr(comparing, "_HELD", 100)
    assert remembered(Fake(lambda _: {"y": np.zeros(8, np.float32)}), data) is not None
    assert remembered(Fake(lambda _: {"y": np.zeros(9, np.float32)}), data) is None
