"""Smoothing on small networks: exact in float64, better in int8, and what is left alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from channelfold.passes.base import Context, Outcome
from channelfold.passes.channels.rescale import rescale
from channelfold.passes.channels.scale_regions import Region, trace
from channelfold.passes.layers.linear import linears
from channelfold.passes.layers.quantization_error import Bits, LayerError, quantized_matrix
from channelfold.passes.quantize.static import Quantize
from channelfold.passes.smooth.smooth import Smooth
from channelfold.runtime.data.sources import Data
from channelfold.runtime.errors import DataError, UsageError
from channelfold.runtime.io.files import check, export
from channelfold.runtime.io.session import TensorSpec
from channelfold.runtime.io.shapes import shapes_on
from channelfold.runtime.io.weights import tensor_proto
from channelfold.runtime.stats.channels import ChannelStatistics
from channelfold.runtime.stats.observe import by_name, observe
from channelfold.tests import strategies
from channelfold.tests.graphs import (
    assert_same,
    build,
    changes,
    constants,
    evaluator,
    feeds,
    listing,
    positive,
    random,
    reasons,
    run,
)
from channelfold.tests.passes.channels.test_random_regions import difference, graphs

TOKENS = "(float[N,T,16] x) => (float[] y)"
HEADS = """
    qh = Reshape(q, heads) kh = Reshape(k, heads) vh = Reshape(v, heads)
    qt = Transpose<perm=[0,2,1,3]>(qh) kt = Transpose<perm=[0,2,3,1]>(kh) vt = Transpose<perm=[0,2,1,3]>(vh)
    s0 = MatMul(qt, kt) s1 = Div(s0, root) p = Softmax<axis=-1>(s1) c0 = MatMul(p, vt)
    c1 = Transpose<perm=[0,2,1,3]>(c0) c = Reshape(c1, whole)
"""
QKV = "q0 = MatMul({0}, Q) q = Add(q0, qb) k0 = MatMul({0}, K) k = Add(k0, kb) v0 = MatMul({0}, V) v = Add(v0, vb)"
OUT = "o0 = MatMul(c, O) o = Add(o0, ob)"
FFN = """
    h0 = MatMul({0}, F) h = Add(h0, fb)
    e0 = Div(h, two) e1 = Erf(e0) e2 = Add(e1, one) e3 = Mul(h, e2) e = Mul(e3, half)
    f0 = MatMul(e, G) f = Add(f0, gb)
"""
GAMMAS = {"g1": positive(16, "g1"), "b1": 16, "g2": positive(16, "g2"), "b2": 16}
ATTENTION = {
    "heads": np.array([0, 0, 2, 8]),
    "whole": np.array([0, 0, 16]),
    "root": 2.8,
    **{name: random((16, 16), name) / 4 for name in "QKVO"},
    **dict.fromkeys(("qb", "kb", "vb", "ob"), 16),
}
GELU = {"F": random((16, 64), "F") / 4, "fb": 64, "G": random((64, 16), "G") / 8, "gb": 16}
GELU |= {"two": 2**0.5, "one": 1.0, "half": 0.5}
RMS = "{1}p = Mul({0}, {0}) {1}m = ReduceMean<axes=[-1]>({1}p) {1}a = Add({1}m, eps) {1}s = Sqrt({1}a)\n"
RMS += "{1}d = Div({0}, {1}s) {1} = Mul({1}d, {1}g)\n"
REPEATED = """
    qh = Reshape(q, heads) kh = Reshape(k, pair) vh = Reshape(v, pair)
    ke = Expand(kh, both) ve = Expand(vh, both) kg = Reshape(ke, heads) vg = Reshape(ve, heads)
    qt = Transpose<perm=[0,2,1,3]>(qh) kt = Transpose<perm=[0,2,3,1]>(kg) vt = Transpose<perm=[0,2,1,3]>(vg)
    s0 = MatMul(qt, kt) p = Softmax<axis=-1>(s0) c0 = MatMul(p, vt)
    c1 = Transpose<perm=[0,2,1,3]>(c0) c = Reshape(c1, whole) o = MatMul(c, O)
"""
SWIGLU = "u = MatMul({0}, U) w = MatMul({0}, W) a0 = Sigmoid(w) a = Mul(a0, w) m = Mul(a, u) f = MatMul(m, D)"

BLOCKS: dict[str, tuple[str, str, dict]] = {
    "pre-LN": (
        TOKENS,
        f"n1 = LayerNormalization(x, g1, b1) {QKV.format('n1')} {HEADS} {OUT} r = Add(o, x)"
        f" n2 = LayerNormalization(r, g2, b2) {FFN.format('n2')} y = Add(f, r)",
        {**GAMMAS, **ATTENTION, **GELU},
    ),
    "post-LN": (
        TOKENS,
        f"n0 = LayerNormalization(x, g1, b1) {QKV.format('n0')} {HEADS} {OUT} r = Add(o, n0)"
        f" n1 = LayerNormalization(r, g2, b2) {FFN.format('n1')} t = Add(f, n1)"
        " y = LayerNormalization(t, g3, b3)",
        {**GAMMAS, **ATTENTION, **GELU, "g3": positive(16, "g3"), "b3": 16},
    ),
    "RMS, SwiGLU, GQA": (
        TOKENS,
        RMS.format("x", "n") + f"q = MatMul(n, Q) k = MatMul(n, K) v = MatMul(n, V) {REPEATED} r = Add(o, x)\n"
        + RMS.format("r", "l") + f"{SWIGLU.format('l')} y = Add(f, r)",
        {
            "ng": positive(16, "ng"), "lg": positive(16, "lg"), "eps": 1e-6, "heads": np.array([0, 0, 4, 4]),
            "pair": np.array([0, 0, 2, 1, 4]), "both": np.array([1, 1, 1, 2, 1]), "whole": np.array([0, 0, 16]),
            **{name: random((16, 8 if name in "KV" else 16), name) / 4 for name in "QKVO"},
            "U": random((16, 32), "U") / 4, "W": random((16, 32), "W") / 4, "D": random((32, 16), "D") / 4,
        },
    ),
    "conv": (
        "(float[N,16,6,6] x) => (float[] y)",
        """
            n = BatchNormalization(x, g, b, m, v) a = Conv(n, A, ab) r = Relu(a) c = Conv<pads=[1,1,1,1]>(r, C, cb)
            s = Relu(c) t = MaxPool<kernel_shape=[2,2]>(s) y = Conv(t, D, db)
        """,
        {
            "g": positive(16, "g"), "b": 16, "m": 16, "v": positive(16, "v"), "A": random((24, 16, 1, 1), "A") / 4,
            "ab": 24, "C": random((32, 24, 3, 3), "C") / 12, "cb": 32, "D": random((16, 32, 1, 1), "D") / 6, "db": 16,
        },
    ),
    "fused qkv": (
        TOKENS,
        "n1 = LayerNormalization(x, g1, b1) z0 = MatMul(n1, Z) z = Add(z0, zb) q, k, v = Split<axis=2>(z, parts)"
        f" {HEADS} {OUT} y = Add(o, x)",
        {**GAMMAS, **ATTENTION, "Z": random((16, 48), "Z") / 4, "zb": 48, "parts": np.array([16, 16, 16])},
    ),
}  # fmt: skip
METHODS = {
    "auto": Smooth(),
    "smoothquant": Smooth("smoothquant", alpha=0.7),
    "smoothquant, searched": Smooth("smoothquant", search_alpha=True),
    "os-plus": Smooth("os-plus"),
    "awq": Smooth("awq", weight_bits=4, group_size=8),
    "repq": Smooth("repq"),
    "repq, median": Smooth("repq", aim="median"),
    "outliertune": Smooth("outliertune"),
    "fp4-shift": Smooth("fp4-shift"),
}
SEARCHED = ("auto", "smoothquant, searched", "os-plus", "awq")


def block(name: str, kind: str = "float") -> gs.Graph:
    signature, body, given = BLOCKS[name]
    return build(signature, body, kind=kind, **given)


def samples(graph: gs.Graph, count: int = 4, *, size: int = 8, make: Callable | None = None) -> Data:
    """Normal random feeds; ``make(shape, rng)`` for other ones. Open dimensions get ``size``, or ``size(index)``."""
    make = make or (lambda shape, rng: rng.standard_normal(shape))
    made = []
    for index in range(count):
        rng = np.random.default_rng(index)
        wide = size(index) if callable(size) else size
        shapes = {t.name: [d if isinstance(d, int) else wide for d in t.shape] for t in graph.inputs}
        made.append({t.name: np.asarray(make(shapes[t.name], rng), t.dtype) for t in graph.inputs})
    specs = [TensorSpec(name, array.dtype, array.shape) for name, array in made[0].items()]
    return Data(specs, count, lambda: iter(made), "random samples")


def smooth(graph: gs.Graph, step: Smooth | None = None, data: Data | None = None) -> Outcome:
    """Applies the pass and asserts what always holds: a valid graph, facts that agree with what was changed."""
    nodes = len(graph.nodes)
    outcome = (step or Smooth()).apply(graph, Context(calibration=data or samples(graph)))
    check(graph)
    json.dumps(outcome.facts)
    sites = outcome.facts["sites"]
    assert [site["node"] for site in sites] == [change.node for change in outcome.changed]
    assert len(graph.nodes) - nodes <= sum(site["inserted"] for site in sites)  # less what led to a weight
    return outcome


def snr(before: np.ndarray, after: np.ndarray) -> float:
    lost = np.square(before.astype(np.float64) - after).sum()
    return float(10 * np.log10(np.square(before.astype(np.float64)).sum() / lost)) if lost else np.inf


def outputs(graph: gs.Graph, data: Data) -> np.ndarray:
    return np.concatenate([run(graph, feed)["y"].reshape(-1) for feed in data])


def regions(graph: gs.Graph) -> list[Region]:
    """The regions that can be scaled without new nodes."""
    shapes = shapes_on(graph, {name: values.shape for name, values in next(iter(samples(graph))).items()})
    done: set[int] = set()
    found = []
    for linear in linears(graph):
        if id(linear.data) not in done:
            region = trace(graph, linear.data, linear.in_axis, shapes)
            done |= {id(end.linear.data) for end in region.readers() if end.linear}
            if not region.why_fixed(region.places[id(linear.data)][1]):
                found.append(region)
    return found


def plant(graph: gs.Graph, shifted: bool = False) -> None:
    """Makes an eighth of the channels of every region 20 to 200 times larger, and shifts all where that is free."""
    for number, region in enumerate(regions(graph)):
        rng = np.random.default_rng(number)
        chosen = rng.choice(np.flatnonzero(region.free), max(1, region.size // 8), replace=False)
        scale, shift = np.ones(region.size), None
        scale[chosen] = 1 / np.geomspace(20, 200, len(chosen))
        ends = [end.linear for end in region.ends if end.shifted and end.linear is not None]
        if shifted and not region.no_shift and all(e.node.op != "MatMul" or e.bias_node is not None for e in ends):
            shift = np.where(region.shiftable, 30 * rng.standard_normal(region.size), 0.0)
        rescale(graph, region, scale, shift)


# ---- exact ---------------------------------------------------------------------------------------------------------


def observe_in_float64(graph: gs.Graph, observers: Mapping[str, list[ChannelStatistics]], data: Data, progress) -> None:
    """Statistics from the reference evaluator: ONNX Runtime has no Erf and no Conv in float64."""
    model, large = export(graph)
    model.graph.initializer.extend(tensor_proto(values, proto.name) for proto, values in large)
    known = {value.name for value in (*model.graph.input, *model.graph.output)}
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in sorted({*observers} - known))
    names = [value.name for value in model.graph.output]
    for feed in data:
        values = dict(feed) | dict(zip(names, evaluator(model).run(names, dict(feed)), strict=True))
        for name, (observer,) in observers.items():
            observer.add(values[name].astype(np.float32))


@pytest.mark.parametrize("insert", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", BLOCKS)
def test_every_method_is_exact(name, method, insert, monkeypatch):
    """To 1e-12 on inputs of other sizes than those of the calibration, too; without ``insert`` no node is added."""
    monkeypatch.setattr("channelfold.passes.smooth.smooth.observe", observe_in_float64)
    graph = block(name, "double")
    plant(graph, shifted=True)
    data = samples(graph, 2, size=3)
    checked = [next(iter(data)), feeds(graph, size=5)]
    before, nodes, old = [run(graph, feed) for feed in checked], len(graph.nodes), listing(graph)
    outcome = smooth(graph, dataclasses.replace(METHODS[method], allow_insert=insert), data)
    assert outcome.changed
    for feed, values in zip(checked, before, strict=True):
        assert_same(values, run(graph, feed), 1e-11 if insert else 1e-12)
    if not insert:
        assert [line.split("(")[0] for line in listing(graph).splitlines()] == [
            line.split("(")[0] for line in old.splitlines()
        ]
        assert len(graph.nodes) == nodes


@given(data=st.data(), method=st.sampled_from([*METHODS]), insert=st.booleans())
@settings(max_examples=150, deadline=None, suppress_health_check=(HealthCheck.too_slow,))
def test_random_networks(data, method, insert):
    """Whatever the graph: no crash, the same outputs, and no node that was not asked for."""
    graph = data.draw(strategies.graphs())
    feed, before, nodes = feeds(graph), run(graph, feeds(graph)), len(graph.nodes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("channelfold.passes.smooth.smooth.observe", observe_in_float64)
        smooth(graph, dataclasses.replace(METHODS[method], allow_insert=insert), samples(graph, 2, size=2))
    assert_same(before, run(graph, feed), 1e-9)
    assert insert or len(graph.nodes) <= nodes


@given(made=graphs(), method=st.sampled_from([*METHODS]), insert=st.booleans())
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
def test_random_regions(made, method, insert):
    """Attention, gates, joins and moves: regions that overlap, and nodes inserted inside of others."""
    graph, values = made
    feed, nodes = {"x": values["x"]}, len(graph.nodes)
    both = [feed, {"x": -0.7 * values["x"]}]
    data = Data([TensorSpec("x", values["x"].dtype, values["x"].shape)], 2, lambda: iter(both), "random samples")
    before = run(graph, feed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("channelfold.passes.smooth.smooth.observe", observe_in_float64)
        patch.setattr(
            "channelfold.passes.smooth.smooth.measured_shapes",
            lambda *_: {name: np.shape(v) for name, v in values.items()},
        )
        smooth(graph, dataclasses.replace(METHODS[method], allow_insert=insert), data)
    assert difference(before, run(graph, feed)) <= 1e-6
    assert insert or len(graph.nodes) <= nodes


@pytest.mark.parametrize("method", METHODS)
def test_a_second_run_stays_exact_and_changes_little(method):
    graph = block("pre-LN")
    plant(graph)
    data = samples(graph)
    before = outputs(graph, data)
    first = smooth(graph, METHODS[method], data)
    second = smooth(graph, METHODS[method], data)
    assert snr(before, outputs(graph, data)) > 100
    spread = {site["node"]: site["scale"][1] / site["scale"][0] for site in first.facts["sites"]}
    for site in second.facts["sites"]:  # what powers of two of four exponents leave is for the second run
        assert site["scale"][1] / site["scale"][0] < max(4.0, 0.5 * spread[site["node"]]) or method == "fp4-shift"


# ---- planted outliers ----------------------------------------------------------------------------------------------


def int8(graph: gs.Graph, data: Data) -> np.ndarray:
    Quantize(min_activation_snr=0).apply(graph, Context(calibration=data))
    return outputs(graph, data)


_BASELINES: dict[str, tuple[np.ndarray, float]] = {}


def baseline(name: str, data: Data) -> tuple[np.ndarray, float]:
    """The float outputs of a block, and what int8 leaves of them in dB."""
    if name not in _BASELINES:
        exact = outputs(block(name), data)
        _BASELINES[name] = exact, snr(exact, int8(block(name), data))
    return _BASELINES[name]


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_planted_outliers_ruin_int8(name, shifted):
    graph = block(name)
    data = samples(graph)
    exact, unplanted = baseline(name, data)
    plant(graph, shifted)
    assert snr(exact, outputs(graph, data)) > 100  # the function is what it was
    assert snr(exact, int8(graph, data)) < unplanted - 25


RECOVERING = ["auto", "smoothquant", "smoothquant, searched", "os-plus", "repq", "repq, median", "outliertune"]


@pytest.mark.parametrize("method", RECOVERING)
@pytest.mark.parametrize("name", BLOCKS)
def test_planted_scales_are_found(name, method):
    """Within 1 dB of the network without outliers, or better. Searches leave convolutions with kernels alone."""
    graph = block(name)
    data = samples(graph)
    exact, unplanted = baseline(name, data)
    plant(graph)
    outcome = smooth(graph, METHODS[method], data)
    if name == "conv" and method in SEARCHED:
        assert [site["tensor"] for site in outcome.facts["sites"]] == ["n", "t"]
        return
    assert snr(exact, int8(graph, data)) > unplanted - 1


@pytest.mark.parametrize("method", ["auto", "os-plus", "repq", "repq, median", "outliertune"])
@pytest.mark.parametrize("name", BLOCKS)
def test_planted_shifts_are_found(name, method):
    graph = block(name)
    data = samples(graph)
    exact, unplanted = baseline(name, data)
    plant(graph, shifted=True)
    outcome = smooth(graph, METHODS[method], data)
    if name == "conv" and method in SEARCHED:
        assert [site["tensor"] for site in outcome.facts["sites"]] == ["n", "t"]
        return
    assert snr(exact, int8(graph, data)) > unplanted - 1


@pytest.mark.parametrize("method", ["auto", "os-plus", "repq", "outliertune"])
def test_without_shift_planted_shifts_stay(method):
    graph = block("pre-LN")
    data = samples(graph)
    exact, unplanted = baseline("pre-LN", data)
    plant(graph, shifted=True)
    bias = constants(graph)["qb"]
    smooth(graph, dataclasses.replace(METHODS[method], shift=False), data)
    np.testing.assert_array_equal(constants(graph)["qb"], bias)
    assert snr(exact, int8(graph, data)) < unplanted - 10


def test_powers_of_two_find_what_four_exponents_can():
    """fp4-shift divides the largest channels by 8 at most: 200 becomes 25."""
    graph = block("pre-LN")
    data = samples(graph)
    plant(graph)
    outcome = smooth(graph, METHODS["fp4-shift"], data)
    for site in outcome.facts["sites"]:
        assert np.log2(site["scale"]).tolist() == [-3, 0]
        assert site["outlier_ratio"][1] == pytest.approx(site["outlier_ratio"][0] / 8, rel=0.2)


def test_awq_lowers_the_error_of_four_bits():
    graph = block("pre-LN")
    data = samples(graph, 16)
    plant(graph)
    for site in smooth(graph, METHODS["awq"], data).facts["sites"]:
        before, after = site["output_snr_db"]
        assert after > before


@pytest.mark.parametrize("group", [0, 32])
def test_awq_lowers_the_error_of_three_bits_where_one_channel_of_a_hundred_is_50_times_larger(group):
    """On the outputs of rows that were not calibrated on; without quantization nothing changes."""
    gamma = np.ones(128)
    gamma[[17, 90]] = 50
    body = "n = LayerNormalization(x, g)\n y = MatMul(n, W)"
    signature = "(float[N,T,128] x) => (float[] y)"
    graph = build(signature, body, kind="float", g=gamma, W=(128, 64))
    data, other = samples(graph), {"x": random((9, 16, 128), "other").astype(np.float32)}
    before = run(graph, other)["y"]
    smooth(graph, Smooth("awq", weight_bits=3, group_size=group), data)
    assert snr(before, run(graph, other)["y"]) > 100

    def error(graph: gs.Graph) -> float:
        (linear,) = linears(graph)
        linear.set_weight(quantized_matrix(linear.weight(), Bits(0, 3, group)))
        return -snr(before, run(graph, other)["y"])

    assert error(graph) < error(build(signature, body, kind="float", g=gamma, W=(128, 64))) - 5


# ---- what a search promises ----------------------------------------------------------------------------------------


def site_errors(method: str, name: str, shifted: bool) -> dict[str, float]:
    """The output SNR of every site after a method, by tensor; that before it where it was left alone."""
    graph = block(name)
    plant(graph, shifted)
    return {site["tensor"]: site["output_snr_db"][1] for site in smooth(graph, METHODS[method]).facts["sites"]}


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("name", ["pre-LN", "RMS, SwiGLU, GQA"])
def test_auto_is_at_least_as_good_as_each_method_it_tries(name, shifted):
    """At the first site, before which nothing differs, and by the numbers at all of them."""
    auto = site_errors("auto", name, shifted)
    for method in ("smoothquant, searched", "os-plus"):
        other = site_errors(method, name, shifted)
        assert set(auto) >= set(other)
        for tensor, decibels in other.items():
            assert auto[tensor] >= decibels - 1e-6, tensor


@pytest.mark.parametrize("method", SEARCHED)
def test_a_search_is_never_worse_than_no_scale(method):
    """The error measured again on the graph as it came out, on all rows.

    Without what would change the outputs that it is a share of: a shift, and the scale between v and o.
    """
    graph = block("pre-LN")
    data = samples(graph, 2)
    (o,) = (linear.name for linear in linears(graph) if linear.data.name == "c")
    step = dataclasses.replace(METHODS[method], exclude=(o,), shift=False)
    bits = Bits(0 if method == "awq" else 8, step.weight_bits, step.group_size)

    def errors() -> dict[str, float]:
        found = {}
        observers = {name: ChannelStatistics(-1, 256) for name in ("n1", "c", "n2")}
        observe(graph, by_name(observers.items()), data)
        for name, observer in observers.items():
            readers = [linear for linear in linears(graph) if linear.data.name == name]
            found[name] = -10 * np.log10(LayerError.of(readers, observer.sample(), bits).error())
        return found

    before = errors()
    sites = {site["tensor"]: site["output_snr_db"] for site in smooth(graph, step, data).facts["sites"]}
    after = errors()
    assert sites
    assert "c" not in sites
    for name, decibels in sites.items():
        assert decibels == pytest.approx([before[name], after[name]], abs=0.05)  # float32 decides some roundings
        assert decibels[1] > decibels[0]
    assert all(after[name] == pytest.approx(before[name], abs=0.05) for name in after if name not in sites)


# ---- what a shift may and may not add ------------------------------------------------------------------------------

NORM = "n = LayerNormalization(x, g, b)\n"


@pytest.mark.parametrize(("insert", "ops"), [(False, 2), (True, 3)])
def test_a_shift_where_a_bias_would_be_a_new_node(insert, ops):
    graph = build(TOKENS, NORM + "y = MatMul(n, W)", kind="float", g=16, b=3 * random(16, "b"), W=(16, 16))
    outcome = smooth(graph, Smooth("repq", allow_insert=insert))
    assert len(graph.nodes) == ops
    assert outcome.facts["sites"][0]["inserted"] == ops - 2
    assert changes(outcome)[0].endswith("; nodes inserted: 1") is insert


def test_a_norm_without_bias_and_a_gemm_without_one_take_a_shift():
    graph = build("(float[N,16] x) => (float[] y)", "n = LayerNormalization(x, g)\n y = Gemm(n, W)", kind="float",
                  g=16, W=(16, 16))  # fmt: skip
    data = samples(graph, make=lambda shape, rng: rng.exponential(size=shape) ** 2)
    before = outputs(graph, data)
    smooth(graph, Smooth("repq"), data)
    assert [len(node.inputs) for node in graph.nodes] == [3, 3]
    assert snr(before, outputs(graph, data)) > 100


def test_explicit_nodes_behind_gelu():
    """Outliers behind an activation function, which no weight can take: Mul(1/s) in front of the linear."""
    body = "h = MatMul(x, V)\n e = Sigmoid(h)\n s = Mul(e, h)\n y = MatMul(s, W)"
    big = np.ones(16)
    big[:2] = 60
    graph = build(TOKENS, body, kind="float", V=random((16, 16), "V") * big, W=random((16, 16), "W") / big[:, None])
    data = samples(graph)
    before, plain = outputs(graph, data), listing(graph)
    refused = smooth(graph, Smooth("smoothquant"), data)
    assert (
        "Mul of two activations is in between" in refused.refused[1].reason or "reads it" in refused.refused[1].reason
    )
    assert listing(graph) == plain
    outcome = smooth(graph, Smooth("auto", allow_insert=True), data)
    (site,) = (site for site in outcome.facts["sites"] if site["tensor"] == "s")
    assert site["inserted"] == 1
    assert [node.op for node in graph.nodes] == ["Mul", "MatMul", "Sigmoid", "Mul", "Mul", "MatMul"]
    assert snr(before, outputs(graph, data)) > 100
    assert changes(outcome)[-1].startswith("an explicit Mul -> 1 linear: ")


def test_the_shortcut_of_a_post_ln_block_gets_what_was_taken_from_the_norm():
    """Two channels of the first norm 60 times larger than the others, in a weight of q, k and v that is small there."""
    big = np.ones(16)
    big[:2] = 60
    signature, body, given = BLOCKS["post-LN"]
    given = given | {name: given[name] * big for name in ("g1", "b1")}
    given |= {name: given[name] / big[:, None] for name in "QKV"}
    graph = build(signature, body, kind="float", **given)
    data = samples(graph)
    before, plain = (
        outputs(graph, data),
        snr(outputs(graph, data), int8(build(signature, body, kind="float", **given), data)),
    )
    outcome = smooth(graph, Smooth(allow_insert=True), data)
    (site,) = (site for site in outcome.facts["sites"] if site["tensor"] == "n0")
    assert site["inserted"] >= 1
    assert site["output_snr_db"][1] > site["output_snr_db"][0] + 10
    (restored,) = (node for node in graph.nodes if node.op == "Mul" and node.inputs[0].name == "n0")
    assert any(node.op in ("Add", "Mul") for node in graph.nodes if node.inputs[0] is restored.outputs[0])
    assert snr(before, outputs(graph, data)) > 100
    assert snr(before, int8(graph, data)) > plain + 5


def test_auto_inserts_no_node_that_gains_little():
    """2 dB where 3 are wanted; the method by its own name takes them."""
    weight = random((64, 200), "W") * np.geomspace(1, 4, 64)[:, None]

    def made() -> gs.Graph:
        return build("(float[N,T,64] x) => (float[] y)", "e = Sigmoid(x)\n y = MatMul(e, W)", kind="float", W=weight)

    graph = made()
    plain = listing(graph)
    outcome = smooth(graph, Smooth("auto", allow_insert=True, shift=False))
    assert reasons(outcome) == ["e stays as it is: no scale makes its quantized outputs better by enough"]
    assert listing(graph) == plain
    (site,) = smooth(made(), Smooth("smoothquant", search_alpha=True, allow_insert=True)).facts["sites"]
    assert 0 < site["output_snr_db"][1] - site["output_snr_db"][0] < 3


# ---- options -------------------------------------------------------------------------------------------------------


def test_patterns_choose_sites():
    names = {"MatMul_1": "/attn/q", "MatMul_3": "/attn/k", "MatMul_5": "/attn/v"}

    def named() -> gs.Graph:
        graph = block("pre-LN")
        plant(graph)
        for node in graph.nodes:
            node.name = names.get(node.name, node.name)
        return graph

    step = Smooth("smoothquant")
    everything = {site["tensor"] for site in smooth(named(), step).facts["sites"]}
    assert everything == {"n1", "c", "n2"}
    only = smooth(named(), dataclasses.replace(step, include=("/attn/*",)))
    assert {site["tensor"] for site in only.facts["sites"]} == {"n1"}
    assert any(reason.endswith("not included by any pattern") for reason in reasons(only))
    others = smooth(named(), dataclasses.replace(step, exclude=("/attn/*",)))
    assert {site["tensor"] for site in others.facts["sites"]} == {"c", "n2"}
    assert any(reason.endswith("excluded by pattern '/attn/*'") for reason in reasons(others))


@pytest.mark.parametrize("name", ["MatMul_1", "MatMul_3", "MatMul_5"])
def test_a_pattern_that_excludes_one_reader_excludes_what_is_scaled_with_it(name):
    graph = block("pre-LN")
    plant(graph)
    before = constants(graph)
    outcome = smooth(graph, Smooth("smoothquant", exclude=(name,)))
    assert {site["tensor"] for site in outcome.facts["sites"]} == {"c", "n2"}
    assert f"MatMul: a linear that shares its scale is excluded by pattern {name!r}" in reasons(outcome)
    assert all(constants(graph)[weight] is before[weight] for weight in ("Q", "K", "g1"))


@pytest.mark.parametrize("name", ["MatMul_1", "MatMul_3", "MatMul_5"])
def test_a_pattern_that_includes_one_reader_includes_what_is_scaled_with_it(name):
    graph = block("pre-LN")
    plant(graph)
    (site,) = smooth(graph, Smooth("smoothquant", include=(name,))).facts["sites"]
    assert sorted(site["readers"]) == ["MatMul_1", "MatMul_3", "MatMul_5"]


def test_alpha_decides_who_pays():
    """With 1 all channels of the activation are alike afterwards, with 0 all columns of the weights."""
    for alpha in (0.0, 1.0):
        graph = build(TOKENS, NORM + "y = MatMul(n, W)", kind="float", g=positive(16, "g"), b=16, W=(16, 16))
        data = samples(graph)
        outcome = smooth(graph, Smooth("smoothquant", alpha=alpha), data)
        seen = ChannelStatistics(-1)
        observe(graph, {"n": [seen]}, data)
        columns = np.abs(constants(graph)["W"]).max(axis=1)
        assert (seen.amax if alpha else columns) == pytest.approx(np.median(seen.amax if alpha else columns), rel=1e-5)
        assert changes(outcome)[0].startswith(
            f"LayerNormalization LayerNormalization_0 -> 1 linear: smoothquant, alpha {alpha:g}; "
        )
        if alpha:
            assert outcome.facts["sites"][0]["outlier_ratio"][1] == pytest.approx(1, rel=1e-5)


def test_bits_are_those_the_search_expects():
    """Fewer bits, more error."""
    found = []
    for bits in (8, 4):
        graph = block("pre-LN")
        plant(graph)
        sites = smooth(graph, Smooth("auto", activation_bits=bits, weight_bits=bits, group_size=8)).facts["sites"]
        found.append(sites[0]["output_snr_db"][1])
    assert found[0] > found[1] + 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -0.1}, "'alpha' is -0.1. Expected 0 to 1"),
        ({"alpha": 1.5}, "'alpha' is 1.5. Expected 0 to 1"),
        ({"activation_bits": 1}, "'activation_bits' is 1. Expected 2 to 16"),
        ({"weight_bits": 17}, "'weight_bits' is 17. Expected 2 to 16"),
        ({"group_size": -1}, "'group_size' is -1. Expected 0 to 1048576"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UsageError, match=message):
        Smooth(**options)


# ---- what is left alone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("z = LayerNormalization(x, g, b)\n y = MatMul(z, W)", "it is an output of the graph"),
        (f"{NORM} t = Tanh(n)\n a = MatMul(n, W)\n y = Add(a, t)\n z = Relu(x)", "Tanh reads it"),
        ("y = MatMul(x, W)\n z = Relu(y)", "an input of the graph feeds it"),
        ("t = Sigmoid(x)\n y = MatMul(t, W)\n z = Relu(x)", "Sigmoid is in between"),
    ],
)  # fmt: skip
def test_sites_that_cannot_be_scaled(body, reason):
    graph = build("(float[N,T,16] x) => (float[] y, float[] z)", body, kind="float", g=positive(16, "g"), b=16,
                  W=(16, 16))  # fmt: skip
    plain, before = listing(graph), constants(graph)
    outcome = smooth(graph)
    (refusal,) = outcome.refused
    assert refusal.reason == f"MatMul: {refusal.code}"
    assert refusal.code == f"{reason} (allow_insert puts an explicit Mul there)"
    assert listing(graph) == plain
    assert all(constants(graph)[name] is values for name, values in before.items())


def test_a_tied_embedding_is_refused_for_what_its_copy_weighs():
    body = "e = Gather(E, i)\n n = LayerNormalization(e, g, b)\n W = Transpose(E)\n y = MatMul(n, W)"
    graph = build("(float[1] unused, int64[N,T] i) => (float[] y)", body, kind="float", E=(5000, 64), g=positive(64),
                  b=64)  # fmt: skip
    made = [{"unused": np.zeros(1, np.float32), "i": np.arange(12).reshape(3, 4) + index} for index in range(3)]
    data = Data([TensorSpec(k, v.dtype, v.shape) for k, v in made[0].items()], 3, lambda: iter(made), "ids")
    before = constants(graph)
    for method in ("auto", "smoothquant"):
        (reason,) = reasons(smooth(graph, METHODS[method], data))
        assert reason.startswith("n stays as it is: a new weight for MatMul_3 would make the file 1.3 MB larger (")
    assert all(constants(graph)[name] is values for name, values in before.items())


@pytest.mark.parametrize("method", SEARCHED)
def test_a_search_refuses_layers_with_a_kernel(method):
    outcome = smooth(block("conv"), METHODS[method])
    (refusal,) = (refusal for refusal in outcome.refused if refusal.node == "Conv_3")
    assert refusal.reason == (
        "r stays as it is: a search needs layers without a kernel; smoothquant, repq or equalize do not search"
    )


@pytest.mark.parametrize("method", ["smoothquant", "repq", "outliertune", "fp4-shift"])
def test_channels_that_are_alike_stay(method):
    """Every channel from -1 to 1, and every column of the weight with the same largest value."""
    graph = build(TOKENS, "n = Mul(x, g)\n y = MatMul(n, W)", kind="float", g=np.ones(16), W=np.ones((16, 16)))

    def make(shape, rng):
        values = rng.uniform(-1, 1, shape)
        values[:, 0], values[:, 1] = 1, -1
        return values

    assert reasons(smooth(graph, METHODS[method], samples(graph, make=make))) == [
        "n stays as it is: its channels are alike already"
    ]


def test_a_search_that_finds_nothing_better():
    """Integers that int8 holds exactly, in the activation and in the weights."""

    def make(shape, rng):
        values = rng.integers(-127, 128, shape)
        values[:, 0] = 127
        return values

    weight = np.rint(127 * np.clip(random((16, 16), "W") / 3, -1, 1))
    weight[0] = 127
    graph = build(TOKENS, "n = Mul(x, g)\n y = MatMul(n, W)", kind="float", g=np.ones(16), W=weight)
    for method in SEARCHED[:3]:
        assert reasons(smooth(graph, METHODS[method], samples(graph, make=make))) == [
            "n stays as it is: no scale makes its quantized outputs better"
        ]


def test_dead_channels_stay_dead():
    """What is always zero in calibration may not be so later: its scale is 1."""

    def make(shape, rng):
        values = rng.standard_normal(shape) * np.geomspace(0.1, 50, 16)
        values[..., [2, 9]] = 0
        return values

    for method, step in METHODS.items():
        graph = build(TOKENS, "n = Mul(x, g)\n y = MatMul(n, W)", kind="float", g=np.ones(16), W=(16, 16))
        assert len(smooth(graph, step, samples(graph, make=make)).changed) == 1, method
        assert constants(graph)["g"][[2, 9]].tolist() == [1, 1], method
        np.testing.assert_array_equal(constants(graph)["W"][[2, 9]], random((16, 16), "W").astype(np.float32)[[2, 9]])


# ---- data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", "smoothquant"])
def test_samples_of_different_lengths(method):
    graph = block("pre-LN")
    plant(graph, shifted=True)
    data = samples(graph, 5, size=lambda index: 3 + 4 * index)
    before = outputs(graph, data)
    assert len(smooth(graph, METHODS[method], data).changed) == 3
    assert snr(before, outputs(graph, data)) > 90


@pytest.mark.parametrize("method", METHODS)
def test_float16_weights_keep_their_type(method):
    graph = build(
        TOKENS, NORM + "h = MatMul(n, V)\n c = Add(h, vb)\n r = Relu(c)\n y = MatMul(r, W)", kind="float16",
        g=positive(16, "g"), b=16, V=random((16, 16), "V") / 4, vb=16, W=random((16, 16), "W") / 4,
    )  # fmt: skip
    data = samples(graph)
    before = outputs(graph, data)
    assert smooth(graph, METHODS[method], data).changed
    assert {values.dtype for values in constants(graph).values()} == {np.dtype(np.float16)}
    assert snr(before, outputs(graph, data)) > 50  # a few roundings to 11 bits


def test_data_are_needed():
    graph = block("conv")
    empty = Data([TensorSpec("x", np.dtype(np.float32), (1, 16, 6, 6))], 0, lambda: iter(()), "nothing")
    for context in (Context(), Context(calibration=empty)):
        with pytest.raises(DataError, match=r"Smoothing needs calibration data\. Give some with --calibration"):
            Smooth().apply(graph, context)


def test_nan_in_calibration_names_the_tensor_and_the_sample():
    graph = block("pre-LN")
    plain = listing(graph)

    def make(shape, rng):
        values = rng.standard_normal(shape)
        values[0, 0, 0] = np.nan if rng.integers(2) else 1
        return values

    with pytest.raises(
        DataError, match=r"Activation 'n1' of sample \d cannot be used: it holds NaN\. Check that sample"
    ):
        smooth(graph, data=samples(graph, 8, make=make))
    assert listing(graph) == plain


def test_a_tensor_that_no_sample_reached():
    graph = build("(float[N,16] x) => (float[] y)", "n = LayerNormalization(x, g)\n y = Gemm(n, W)", kind="float",
                  g=16, W=(16, 16))  # fmt: skip
    outcome = smooth(graph, Smooth("smoothquant"), samples(graph, size=0))
    assert reasons(outcome) == ["n stays as it is: no calibration sample reached it"]


@pytest.mark.parametrize("insert", [False, True])
def test_a_tensor_that_is_read_along_two_axes(insert):
    body = "n = Mul(x, g)\n a = Conv(n, W)\n m = MatMul(n, V)\n y = Add(a, m)"
    for method in METHODS.values():
        graph = build("(float[1,16,20] x) => (float[] y)", body, kind="float", g=np.ones((16, 1)), W=(16, 16, 1),
                      V=(20, 20))  # fmt: skip
        plain = listing(graph)
        outcome = smooth(graph, dataclasses.replace(method, allow_insert=insert))
        assert reasons(outcome)[0].startswith("Conv: linears read it along two axes")
        assert listing(graph) == plain


def test_a_tensor_that_is_pinned_in_one_site_and_has_nodes_of_its_own_in_another():
    """x is in the region of c, which joins it to h, but as an input of the graph it cannot be scaled there."""
    body = "a = MatMul(x, V)\n h = MatMul(x, U)\n c = Concat<axis=2>(h, x)\n b = MatMul(c, W)\n y = Add(a, b)"
    for method, step in METHODS.items():
        graph = build(TOKENS, body, kind="float", V=(16, 16), U=random((16, 16), "U") * np.geomspace(1, 90, 16),
                      W=(32, 16))  # fmt: skip
        data = samples(graph, make=lambda shape, rng: rng.standard_normal(shape) * np.geomspace(1, 90, 16))
        before = outputs(graph, data)
        outcome = smooth(graph, dataclasses.replace(step, allow_insert=True), data)
        found = {site["tensor"]: sorted(site["readers"]) for site in outcome.facts["sites"]}
        assert found.get("c", ["MatMul_3"]) == ["MatMul_3"], method
        assert found.get("x", ["MatMul_0", "MatMul_1"]) == ["MatMul_0", "MatMul_1"], method
        assert found, method
        assert snr(before, outputs(graph, data)) > 100, method


def test_one_axis_by_two_numbers():
    """Axis 1 of three is axis -2, where the weight of a MatMul is on the left."""
    body = "n = Mul(x, g)\n a = Conv(n, W)\n m = MatMul(V, n)\n y = Add(a, m)"
    graph = build("(float[1,16,20] x) => (float[] y)", body, kind="float", g=np.geomspace(1, 50, 16)[:, None],
                  W=(16, 16, 1), V=(16, 16))  # fmt: skip
    data = samples(graph)
    before = outputs(graph, data)
    (site,) = smooth(graph, data=data).facts["sites"]
    assert site["readers"] == ["Conv_1", "MatMul_2"]
    assert snr(before, outputs(graph, data)) > 100


def test_a_factor_that_is_not_by_channel_does_not_take_the_scale_of_an_insertion():
    """Mul by a number for each image: its other reader, an output of the graph, must see what it saw before."""
    body = "p = Sigmoid(x)\n z = Mul(p, c)\n y = MatMul(p, W)"
    graph = build("(float[2,5,16] x) => (float[] y, float[] z)", body, kind="float", c=positive((2, 1, 1)),
                  W=random((16, 16), "W") * np.geomspace(1, 300, 16)[:, None])  # fmt: skip
    feed = feeds(graph)
    before = run(graph, feed)
    assert smooth(graph, Smooth("smoothquant", allow_insert=True)).changed
    assert_same(before, run(graph, feed), 1e-5)
    assert [node.op for node in graph.nodes] == ["Sigmoid", "Mul", "Mul", "MatMul"]


def test_a_weight_that_two_sites_share_is_scaled_for_each():
    body = "n = Mul(x, g)\n a = MatMul(n, W)\n r = Relu(a)\n y = MatMul(r, W)"
    for method, step in METHODS.items():
        graph = build(TOKENS, body, kind="float", g=np.geomspace(1, 50, 16), W=random((16, 16), "W") / 4)
        data = samples(graph)
        before = outputs(graph, data)
        assert smooth(graph, step, data).changed, method
        assert snr(before, outputs(graph, data)) > 100, method
