"""A decoder's cache as the model's own: scaled, cut, dropped from the interface, and the same in every rollout."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from channelfold.passes import pipeline
from channelfold.passes.base import Context, Pass
from channelfold.passes.channels.cache import Caches
from channelfold.passes.channels.rescale import rescale
from channelfold.passes.channels.scale_regions import trace
from channelfold.passes.fold import OwnCache
from channelfold.passes.prune import Prune
from channelfold.passes.recipe import loads
from channelfold.passes.smooth import Smooth
from channelfold.passes.verify import verify_rollout
from channelfold.runtime import jobs
from channelfold.runtime.data.probes import random_data, rollout_results
from channelfold.runtime.data.sources import Data
from channelfold.runtime.errors import UsageError, VerificationError
from channelfold.runtime.io import files
from channelfold.runtime.io.facts import required_inputs
from channelfold.runtime.io.shapes import measured_shapes
from channelfold.runtime.io.snapshot import Snapshot
from channelfold.runtime.jobs.own_cache import Owned
from channelfold.tests.graphs import build, random, reasons

CACHED = (
    "(float[B,T,64] x, float[B,2,P,16] past_k, float[B,2,P,16] past_v) => (float[] y, float[] new_k, float[] new_v)"
)
WEIGHTS = {name: random((64, 32 if name in "KV" else 64), name) / 8 for name in "QKVO"}
QKV = "q = MatMul(x, Q) k = MatMul(x, K) v = MatMul(x, V)"
HEADS = f"""
    {QKV} qh = Reshape(q, four) kh = Reshape(k, two) vh = Reshape(v, two) qt = Transpose<perm=[0,2,1,3]>(qh)
    kt = Transpose<perm=[0,2,1,3]>(kh) vt = Transpose<perm=[0,2,1,3]>(vh)
"""
BACK = "c1 = Transpose<perm=[0,2,1,3]>(c) o = Reshape(c1, wide) y = MatMul(o, O)"
SHAPES = {"four": np.array([0, 0, 4, 16]), "two": np.array([0, 0, 2, 16]), "wide": np.array([0, 0, 64])}
REPEATED = {"at2": np.array([2]), "twice": np.array([1, 1, 2, 1, 1]), "apart": np.array([0, 4, -1, 16])}
DOMAIN = '"com.microsoft" : 1'
COSINES = {"cos": np.cos(random((64, 8), "angle")), "sin": np.sin(random((64, 8), "angle"))}
FORMS = {
    "Concat": (
        17,
        f"""{HEADS} new_k = Concat<axis=2>(past_k, kt) new_v = Concat<axis=2>(past_v, vt)
        ku = Unsqueeze(new_k, at2) ke = Expand(ku, twice) kr = Reshape(ke, apart)
        vu = Unsqueeze(new_v, at2) ve = Expand(vu, twice) vr = Reshape(ve, apart)
        kq = Transpose<perm=[0,1,3,2]>(kr) s = MatMul(qt, kq) p = Softmax<axis=-1>(s) c = MatMul(p, vr) {BACK}""",
        SHAPES | REPEATED,
    ),
    "TensorScatter": (
        24,
        f"""{HEADS} new_k = TensorScatter<axis=2>(past_k, kt, length) new_v = TensorScatter<axis=2>(past_v, vt, length)
        ku = Unsqueeze(new_k, at2) ke = Expand(ku, twice) kr = Reshape(ke, apart)
        vu = Unsqueeze(new_v, at2) ve = Expand(vu, twice) vr = Reshape(ve, apart)
        kq = Transpose<perm=[0,1,3,2]>(kr) s = MatMul(qt, kq) p = Softmax<axis=-1>(s) c = MatMul(p, vr) {BACK}""",
        SHAPES | REPEATED,
    ),
    "Attention": (
        23,
        f"{HEADS} c, new_k, new_v = Attention(qt, kt, vt, , past_k, past_v) {BACK}",
        SHAPES,
    ),
    "GroupQueryAttention": (
        17,
        f"""{QKV}
        o, new_k, new_v = com.microsoft.GroupQueryAttention<num_heads=4, kv_num_heads=2, do_rotary=1>
            (q, k, v, past_k, past_v, seqlens_k, total_sequence_length, cos, sin) y = MatMul(o, O)""",
        COSINES,
    ),
}  # fmt: skip
STATIC = CACHED.replace("2,P,16", "2,24,16").replace("float[B,T,64] x,", "float[B,T,64] x, int64[B] length,")
GROUPED = CACHED.replace("float[B,T,64] x,", "float[B,T,64] x, int32[B] seqlens_k, int32 total_sequence_length,")


def decoder(form: str, planted: bool = False) -> gs.Graph:
    """Four query heads, two heads of keys and values. Planted: channel 3 of head 1 is large in both caches."""
    opset, body, given = FORMS[form]
    signature = {"GroupQueryAttention": GROUPED, "TensorScatter": STATIC}.get(form, CACHED)
    graph = build(signature, body, kind="float", opset=opset, domains=DOMAIN, **WEIGHTS, **given)
    if planted:
        for name, factor in (("new_k", 16.0), ("new_v", 8.0)):
            plant(graph, name, factor)
        OwnCache().apply(graph, Context())
    return graph


def plant(graph: gs.Graph, name: str, factor: float) -> None:
    tensor = graph.tensors()[name]
    region = trace(graph, tensor, (1, 3), shapes_of(graph), caches=Caches.of(graph, own=True))
    scale, index = np.ones(region.size), region.places[id(tensor)][1]
    label = index[0, 1, 0, 3]
    scale[abs(label) - 1] = factor ** -np.sign(label)
    rescale(graph, region, scale)


def data_of(graph: gs.Graph, count: int = 9) -> Data:
    session = Snapshot.of(graph).session()
    return random_data(required_inputs(graph), count, run=session.run)


def shapes_of(graph: gs.Graph) -> dict:
    return measured_shapes(graph, list(data_of(graph, 3))[2])


def rolled(graph: gs.Graph) -> list[dict]:
    found = [dict(step) for step in rollout_results(required_inputs(graph), Snapshot.of(graph).session().run)]
    assert len(found) == 9
    return found


def ran(graph: gs.Graph, *steps: Pass) -> list[dict]:
    _, records = pipeline.run(graph, [*steps], Context(calibration=data_of(graph)))
    return records


def spread(values: np.ndarray) -> float:
    """The largest channel of a cache against the median."""
    amax = np.abs(values).max(axis=(0, 2)).reshape(-1)
    return float(amax.max() / np.median(amax))


def heads(graph: gs.Graph) -> set[int]:
    """The heads of the caches, as the interface declares them and as a rollout has them."""
    declared = {t.shape[1] for t in (*graph.inputs[-2:], *graph.outputs[1:]) if t.shape is not None}
    return declared | {values.shape[1] for name, values in rolled(graph)[-1].items() if name != "y"}


@pytest.mark.parametrize("form", FORMS)
def test_both_caches_are_scaled_and_every_rollout_is_the_same(form):
    graph = decoder(form, planted=True)
    before, nodes = rolled(graph), len(graph.nodes)
    smoothed, owned = ran(graph, Smooth(own_cache=True, roll_back=False), OwnCache())
    assert {site["tensor"] for site in smoothed["facts"]["sites"]} >= {"new_k", "o"}
    assert smoothed["verified"]["max_rel_error"] < 1e-5
    assert (owned["verified"]["max_rel_error"], owned["verified"]["probes"]) == (0.0, 9)
    assert len(owned["changed"]) == 2
    assert len(graph.nodes) == nodes
    after = rolled(graph)
    for old, new in zip(before, after, strict=True):
        np.testing.assert_allclose(old["y"], new["y"], atol=1e-5 * np.abs(old["y"]).max())
    for name, large in (("new_k", 8), ("new_v", 4)):
        assert spread(before[-1][name]) > large
        assert spread(after[-1][name]) < 3


@pytest.mark.parametrize("form", FORMS)
def test_without_the_switch_the_reason_names_it(form):
    (step,) = ran(decoder(form, planted=True), Smooth())
    (reason,) = (one["reason"] for one in step["refused"] if "cache" in one["reason"])
    assert "(--own-cache takes the cache as the model's own)" in reason
    (step,) = ran(decoder(form), Prune(ratio=0.5, align=1))
    assert [one["reason"] for one in step["refused"] if "(--own-cache takes" in one["reason"]]
    assert not step["changed"]


@pytest.mark.parametrize("form", FORMS)
def test_heads_are_cut_from_the_caches_too(form):
    graph = decoder(form)
    cut, owned = ran(graph, Prune(ratio=0.5, align=1, own_cache=True), OwnCache())
    assert cut["changed"]
    assert cut["facts"]["slice_equals_mask"]["max_rel_error"] < 1e-5
    assert owned["verified"]["max_rel_error"] == 0.0
    assert heads(graph) == {1}
    assert not any(node.op in ("Gather", "Pad") for node in graph.nodes)


@pytest.mark.parametrize("step", [Smooth(own_cache=True, roll_back=False), Prune(ratio=0.5, align=1, own_cache=True)])
def test_the_interface_is_kept_until_the_end(step):
    """Whatever the past is, and not in rollouts alone: the other outputs and the caches are what they were."""
    graph = decoder("Concat", planted=True)
    original, rng = Snapshot.of(graph), np.random.default_rng(0)
    ran(graph, step)
    shape = (2, 2, 5, 16)
    feed = {name: rng.standard_normal(shape, np.float32) for name in ("past_k", "past_v")}
    feed["x"] = rng.standard_normal((2, 3, 64), np.float32)
    expected, found = (snapshot.session().run(feed) for snapshot in (original, Snapshot.of(graph)))
    assert {name: values.shape for name, values in expected.items()} == {n: v.shape for n, v in found.items()}
    if isinstance(step, Smooth):
        for name, values in expected.items():
            np.testing.assert_allclose(values, found[name], atol=1e-5 * np.abs(values).max())
    else:
        gone = [head for head in range(2) if not found["new_k"][:, head].any()]
        np.testing.assert_array_equal(np.delete(expected["new_k"], gone, 1), np.delete(found["new_k"], gone, 1))
    caches = OwnCache().apply(owned := Snapshot.of(graph).graph(), Context()).facts["cache"]
    again = Owned(Snapshot.of(owned).session(), caches).run(feed)
    for name, values in found.items():
        np.testing.assert_array_equal(values, again[name])


def test_smoothing_twice_and_cutting_what_was_scaled():
    graph = decoder("GroupQueryAttention", planted=True)
    before = rolled(graph)
    steps = (Smooth(own_cache=True, roll_back=False), Smooth("outliertune", own_cache=True, roll_back=False))
    *_, owned = ran(graph, *steps, OwnCache())
    assert owned["verified"]["max_rel_error"] == 0.0
    np.testing.assert_allclose(rolled(graph)[-1]["y"], before[-1]["y"], atol=1e-5 * np.abs(before[-1]["y"]).max())
    graph = decoder("Concat", planted=True)
    *_, owned = ran(graph, steps[0], Prune(ratio=0.5, align=1, own_cache=True), OwnCache())
    assert "scaled by channel" in owned["changed"][0]["what"]
    assert "1 of 2 positions of axis 1 are left" in owned["changed"][0]["what"]
    assert heads(graph) == {1}


# ---- what is no pair ------------------------------------------------------------------------------------------------

ENDS = "(float[B,T,4] x, float[B,P,4] past) => (float[] y, float[] present)"


@pytest.mark.parametrize(
    ("body", "given", "reason"),
    [
        ("p = Mul(past, a) z = Concat<axis=1>(p, x) present = Mul(z, b)", {"a": 0.5, "b": 4.0}, "are not inverse"),
        ("p = Mul(past, a) z = Concat<axis=1>(p, x) present = Mul(z, b)", {"a": 1 / 3, "b": 3.0}, ""),
        ("p = Mul(past, a) present = Concat<axis=1>(p, x) z = Identity(present)", {"a": 0.5}, "is not the same"),
        ("z = Concat<axis=1>(past, x) present = Mul(z, b)", {"b": 4.0}, "is not the same"),
    ],
)
def test_ends_that_do_not_fit_stay(body, given, reason):
    graph = build(ENDS, f"{body} y = ReduceSum<keepdims=0>(z)", kind="float", **given)
    before = Snapshot.of(graph)
    outcome = OwnCache().apply(graph, Context())
    assert not outcome.changed
    assert len(reasons(outcome)) == 1
    assert reason in reasons(outcome)[0]
    assert before.same(Snapshot.of(graph))


def test_a_graph_without_a_cache_stays():
    graph = build("(float[N,4] x) => (float[N,4] y)", "y = Relu(x)", kind="float")
    outcome = OwnCache().apply(graph, Context())
    assert (outcome.changed, outcome.refused) == ([], [])


def test_a_rollout_that_differs_is_a_violation():
    graph = decoder("Concat")
    before = Snapshot.of(graph)
    tensor = graph.tensors()["past_k"]
    (reader,) = tensor.outputs
    doubled = gs.Variable("doubled", np.float32)
    node = gs.Node("Add", "add", {}, [tensor, tensor], [doubled])
    reader.inputs[0] = doubled
    graph.nodes.insert(0, node)
    with pytest.raises(VerificationError, match="in step 2 of a rollout"):
        verify_rollout(before, Snapshot.of(graph))


def test_a_recipe_ends_with_it():
    with pytest.raises(UsageError, match="is not the last one"):
        loads('[[pass]]\nname = "own-cache"\n[[pass]]\nname = "quantize"\n')


# ---- commands -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_compress_with_a_cache_of_its_own(form, tmp_path):
    files.save(decoder(form, planted=True), tmp_path / "model.onnx")
    given, folds = {"source": jobs.Source(random=9)}, {"allow_insert": False}
    cached = folds | {"own_cache": True}
    plain = jobs.compress(tmp_path / "model.onnx", tmp_path / "a", "int8-smooth", overrides=folds, **given)
    own = jobs.compress(tmp_path / "model.onnx", tmp_path / "b", "int8-smooth", overrides=cached, **given)
    assert own["steps"][-1]["pass"] == "own-cache"
    assert "cache" not in own["steps"][-1]["facts"]  # a long list
    worst = [min(float(one["snr"]) for one in record["accuracy"]["outputs"]) for record in (plain, own)]
    assert worst[1] > worst[0] + 3
    with pytest.raises(UsageError, match="own_cache"):
        jobs.compress(tmp_path / "model.onnx", tmp_path / "c", "int8", overrides={"own_cache": True}, **given)
