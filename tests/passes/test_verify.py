"""Verification: which probes are found, what counts as the same, and where graphs part."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from channelfold.passes.verify import Verdict, Verifier, Violation, tolerance_of
from channelfold.runtime.data.probes import random_feeds
from channelfold.runtime.data.sources import open_data
from channelfold.runtime.errors import DataError
from channelfold.runtime.io import files
from channelfold.runtime.io.session import TensorSpec
from channelfold.runtime.io.snapshot import Snapshot

HEAD = '<ir_version: 8, opset_import: ["" : 17, "other" : 1]> '


def snapshot(text: str, **weights: np.ndarray) -> Snapshot:
    model = onnx.parser.parse_model(HEAD + text)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(w, name) for name, w in weights.items())
    return Snapshot.of(files.import_model(model))


def verify(text: str, changed: str | None = None, samples: list | None = None) -> Verdict:
    before, after = snapshot(text), snapshot(changed or text)
    probes = None
    if samples is not None:
        probes = open_data(samples, before.session().inputs)
    return Verifier(probes).verify(before, after)


def feeds(monkeypatch) -> list[dict[str, tuple[int, ...]]]:
    """Records the shapes of all feeds that sessions run without an error."""
    seen = []
    real = Snapshot.session

    def session(*args, **options):
        made = real(*args, **options)
        run = made.run

        def spy(feed, *more):
            found = run(feed, *more)
            seen.append({name: np.shape(value) for name, value in feed.items()})
            return found

        made.run = spy
        return made

    monkeypatch.setattr(Snapshot, "session", session)
    return seen


# ---- probes ------------------------------------------------------------------------------------------------------


def test_open_sizes_are_tried_in_two_sizes():
    specs = (TensorSpec("x", np.dtype(np.float32), ("n", 3, "h", None)), TensorSpec("i", np.dtype(np.int64), ("n",)))
    found = random_feeds(specs, 0)
    shapes = [{name: value.shape for name, value in next(found).items()} for _ in range(3)]
    assert shapes == [
        {"x": (1, 3, 32, 32), "i": (1,)},
        {"x": (2, 3, 16, 16), "i": (2,)},
        {"x": (1, 3, 64, 64), "i": (1,)},
    ]


def test_fixed_sizes_give_two_different_feeds():
    first, second = random_feeds((TensorSpec("x", np.dtype(np.float32), (2, 4)),), 0)
    assert not np.array_equal(first["x"], second["x"])


def test_sizes_that_the_model_refuses_are_passed_over(monkeypatch):
    seen = feeds(monkeypatch)
    text = """g (float[n, w] x) => (float[n, 14, k] y) <int64[3] shape = {0, 14, -1}> { y = Reshape (x, shape) }"""
    verdict = verify(text)
    assert seen[:2] == [{"x": (1, 224)}, {"x": (1, 1024)}] or seen[:1] == [{"x": (1, 224)}]
    assert verdict.record["probes"] == len(seen) // 2


def test_real_samples_come_first_and_give_random_ones_their_shape(monkeypatch):
    seen = feeds(monkeypatch)
    samples = [{"x": np.full((1, length), 2.0, np.float32)} for length in (5, 6, 7)]
    verdict = verify("g (float[n, w] x) => (float[n, w] y) { y = Relu (x) }", samples=samples)
    assert seen[:3] == [{"x": (1, 5)}, {"x": (1, 6)}, {"x": (1, 5)}]
    assert verdict.record["probes"] == 3


def test_sizes_that_must_fit_each_other_are_taken_from_real_samples():
    text = """g (float[n, a] x, float[n, b] z) => (float[m, c] y) {
      d = Concat <axis = 1> (x, x)
      y = Concat <axis = 0> (d, z)
    }"""
    unknown = verify(text)
    assert unknown.record["unverified"].startswith("the model cannot be run on any probe: ONNX Runtime failed")
    assert unknown.record["unverified"].endswith("; calibration data would be used as probes")
    assert unknown.warning == f"not verified: {unknown.record['unverified']}"
    sample = {"x": np.ones((1, 3), np.float32), "z": np.ones((1, 6), np.float32)}
    assert verify(text, samples=[sample]).record["probes"] == 2


def test_model_without_inputs_is_run_once():
    text = "g () => (float[2] y) <float[2] c = {1, 2}> { y = Relu (c) }"
    assert verify(text).record["probes"] == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("g (float[2] x) => (float[2] y) { y = other.Custom (x) }", "ONNX Runtime cannot open the model"),
        ("g (string[2] x) => (string[2] y) { y = Identity (x) }", "takes strings, which cannot be random"),
        ("g (float[2] x) => (float[2] y) { z = Sub (x, x) y = Div (z, z) }", "its outputs hold no finite numbers"),
    ],
)
def test_what_cannot_be_verified_says_why(text, reason):
    verdict = verify(text)
    assert reason in verdict.record["unverified"]
    assert list(verdict.record) == ["unverified"]
    assert reason in verdict.warning


def test_damaged_samples_are_the_users_to_mend():
    samples = [{"x": np.array([[np.nan, 1]], np.float32)}]
    with pytest.raises(DataError, match="holds NaN or Inf"):
        verify("g (float[n, 2] x) => (float[n, 2] y) { y = Relu (x) }", samples=samples)


def test_a_model_that_is_different_every_time_is_not_held_against_the_pass():
    text = "g (float[2] x) => (float[2] y) { %s r = RandomNormalLike (x) y = Add (x, r) }"
    assert verify(text % "", text % "a = Abs (x)").record == {
        "unverified": "the model itself gives other values of 'y' every time it runs"
    }


# ---- the same or not ---------------------------------------------------------------------------------------------


def scaled(factor: float, kind: str = "float") -> str:
    to = {"double": 11, "float": 1, "float16": 10}[kind]
    return f"""g ({kind}[4] x) => ({kind}[4] y) <double f = {{{factor}}}> {{
      k = Cast <to = {to}> (f)
      [m] y = Mul (x, k)
    }}"""


@pytest.mark.parametrize(("kind", "tolerance"), [("double", 1e-9), ("float", 1e-4), ("float16", 2e-2)])
def test_tolerance_follows_the_type(kind, tolerance):
    within, past = 1 + tolerance / 2, 1 + 2 * tolerance
    verdict = verify(scaled(1, kind), scaled(within, kind))
    assert verdict.record["tolerance"] == tolerance
    # float16 numbers around 1.01 are 2^-10 apart, which is 5 % of half the tolerance, twice (the factor, the product)
    assert verdict.record["max_rel_error"] == pytest.approx(tolerance / 2, rel=0.11 if kind == "float16" else 1e-2)
    with pytest.raises(Violation, match="output 'y' is off by"):
        verify(scaled(1, kind), scaled(past, kind))


def test_tolerance_is_that_of_the_coarsest_type_inside():
    text = """g (double[4] x) => (double[4] y) {
      a = Cast <to = 10> (x)
      b = Relu (a)
      y = Cast <to = 11> (b) }"""
    model = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(HEAD + text))
    assert tolerance_of(model) == 2e-2
    assert tolerance_of(snapshot("g (int64[4] x) => (int64[4] y) { y = Abs (x) }").model) == 1e-4


def test_nan_must_stay_where_it_is():
    log = "g (float[64] x) => (float[64] y) { y = Log (x) }"  # NaN for the negative half of random numbers
    assert verify(log).record["max_rel_error"] == 0.0
    with pytest.raises(Violation, match="'y' has NaN or Inf in other places"):
        verify(log, "g (float[64] x) => (float[64] y) { a = Abs (x) y = Log (a) }")


def test_type_and_shape_of_what_comes_out_must_stay():
    flat = "g (float[n, 4] x) => (float[n, 4] y) { y = Relu (x) }"
    with pytest.raises(Violation, match=r"'y' changed: shape \(1, 4\) became \(4, 1\)"):
        verify(flat, "g (float[n, 4] x) => (float[m, k] y) { r = Relu (x) y = Transpose (r) }")


# ---- where they part ---------------------------------------------------------------------------------------------


def test_the_error_is_followed_past_what_agrees_again():
    """Both branches differ inside; one of them agrees again before the outputs, the other does not."""
    text = """g (float[4] x) => (float[4] y) <float f = {{{f}}}, float g = {{{g}}}, float k = {{{k}}}> {{
      [a1] a = Mul (x, f)
      [a2] b = Mul (a, g)
      [c1] c = Mul (x, k)
      [c2] d = Neg (c)
      [add] y = Add (b, d)
    }}"""
    with pytest.raises(Violation) as caught:
        verify(text.format(f=1, g=1, k=2), text.format(f=2, g=0.5, k=0.5))
    assert (caught.value.tensor, caught.value.node, caught.value.error) == ("c", "c1", 0.75)


def test_the_node_that_amplifies_an_error_is_not_blamed_for_it():
    """s is off by 5e-5, which would pass; what is left of it after the subtraction is off by 100 %."""
    text = """g (float[4] x) => (float[4] y) <float f = {{{f}}}, float one = {{1.00005}}> {{
      [none] z = Neg (x)
      [scale] s = Mul (z, f)
      [near] t = Mul (z, one)
      [sub] d = Sub (s, t)
      [relu] y = Abs (d)
    }}"""
    with pytest.raises(Violation) as caught:
        verify(text.format(f=1.0001), text.format(f=1.00015))
    assert (caught.value.tensor, caught.value.node) == ("s", "scale")
    assert caught.value.error == pytest.approx(5e-5, rel=0.01)


def test_errors_from_inside_a_branch_are_found_through_the_node_that_holds_it():
    text = """g (float[4] x) => (float[4] y) <bool yes = {{1}}, float f = {{{f}}}> {{
      [scale] s = Mul (x, f)
      [if] y = If (yes) <then_branch = t () => (float[4] p) {{ p = Neg (s) }},
                         else_branch = e () => (float[4] q) {{ q = Abs (x) }}>
    }}"""
    with pytest.raises(Violation) as caught:
        verify(text.format(f=1), text.format(f=2))
    assert (caught.value.tensor, caught.value.node, caught.value.error) == ("s", "scale", 1.0)


def tied(noise: float) -> str:
    """An ArgMax between two equal numbers, to the second of which ``noise`` is added."""
    bias = f"float[1, 3] bias = {{-50, 9, {9 + noise:.8f}}}"
    return f"""g (float[1, 3] x) => (int64[1] y) <{bias}, float zero = {{0}}> {{
      [none] u = Mul (x, zero)
      [near] v = Add (u, bias)
      [edge] y = ArgMax <axis = 1, keepdims = 0> (v)
    }}"""


def test_rounding_that_moves_a_value_over_an_edge_is_not_held_against_the_pass():
    verdict = verify(tied(0), tied(2e-5))
    assert verdict.record["max_rel_error"] == 0.0
    assert verdict.warning == (
        "output 'y' differs in 1 of 1 elements (allowed: 1e-04) on probe 2 of 2, because rounding moved ArgMax 'edge' "
        "over an edge; whether anything else changed is not known"
    )


def test_an_edge_is_no_excuse_for_what_goes_into_it():
    with pytest.raises(Violation) as caught:
        verify(tied(0), tied(1))
    assert (caught.value.tensor, caught.value.node) == ("v", "near")


def test_an_edge_that_was_edited_is_no_excuse():
    smaller = tied(0).replace("ArgMax", "ArgMin")
    with pytest.raises(Violation) as caught:
        verify(tied(0), smaller)
    assert (caught.value.tensor, caught.value.node) == ("y", "edge")


def test_an_edge_with_another_constant_is_no_excuse():
    text = "g (float[64] x) => (bool[64] y) <float t = {{{t}}}> {{ [edge] y = Greater (x, t) }}"
    with pytest.raises(Violation) as caught:
        verify(text.format(t=0), text.format(t=0.5))
    assert (caught.value.tensor, caught.value.node) == ("y", "edge")


AMPLIFIER = """g (float[n, 16] x) => (float[n, 16] y) <float gain = {20000.0}, float mask = {-3.4028234663852886e38}> {
    a = MatMul (x, W) b = MatMul (x, V) d = Sub (a, b) e = Mul (d, gain) f = Add (e, x) y = Max (f, mask) }"""


def test_a_model_that_amplifies_rounding_is_held_to_what_rounding_does_to_it():
    """W - V is zero, and 20,000 times the rounding of a weight written anew is not: 2e-3, where 1e-4 is allowed."""
    weight = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)
    before = snapshot(AMPLIFIER, W=weight, V=weight)
    rounded = np.nextafter(weight, np.float32(np.inf))
    verdict = Verifier().verify(before, snapshot(AMPLIFIER, W=rounded, V=weight))
    assert "when the original weights are rounded otherwise" in verdict.warning
    assert 1e-4 < verdict.record["max_rel_error"] < 1e-1
    with pytest.raises(Violation):
        Verifier().verify(before, snapshot(AMPLIFIER, W=weight * np.float32(1 + 1e-5), V=weight))


def test_rounding_is_no_excuse_where_the_model_does_not_amplify_it():
    weight = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)
    text = "g (float[n, 16] x) => (float[n, 16] y) { y = MatMul (x, W) }"
    with pytest.raises(Violation):
        Verifier().verify(snapshot(text, W=weight), snapshot(text, W=weight * np.float32(1.001)))


def test_one_graph_serves_as_the_reference_of_the_next_step(monkeypatch):
    a, b, c = (snapshot(scaled(1 + 5e-5 * step)) for step in range(3))
    verifier = Verifier()
    assert verifier.verify(a, b).record["max_rel_error"] == pytest.approx(5e-5, rel=1e-2)
    # against the graph before it, not against the first
    assert verifier.verify(b, c).record["max_rel_error"] == pytest.approx(5e-5, rel=1e-2)


def test_a_large_model_is_run_on_samples_but_not_on_random_inputs(monkeypatch):
    monkeypatch.setattr("channelfold.passes.verify.LARGE", 1000)
    text = "g (float[N,512] x) => (float[N,512] y) { y = Mul(x, w) }"
    weight = np.ones(512, np.float32)
    before = snapshot(text, w=weight)
    unverified = "a model of 0.0 GB is not run on random inputs; calibration data would be used as probes"
    assert Verifier().verify(before, snapshot(text, w=weight)).record == {"unverified": unverified}
    samples = open_data([{"x": np.ones((1, 512), np.float32)}], before.session().inputs)
    with pytest.raises(Violation):
        Verifier(samples).verify(before, snapshot(text, w=2 * weight))
