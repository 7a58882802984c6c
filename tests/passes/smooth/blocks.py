"""Small blocks of networks, their samples, outliers to plant in them, and what int8 leaves of their outputs."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Outcome
from channelfold.passes.channels.rescale import rescale
from channelfold.passes.channels.scale_regions import Region, trace
from channelfold.passes.layers.linear import linears
from channelfold.passes.quantize import Quantize
from channelfold.passes.smooth import Smooth
from channelfold.runtime.data.sources import Data
from channelfold.runtime.io.files import check
from channelfold.runtime.io.shapes import shapes_on
from channelfold.runtime.stats.channels import ChannelStatistics
from channelfold.tests.graphs import build, evaluator, positive, random, run, samples, whole

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


def observe_in_float64(graph: gs.Graph, observers: Mapping[str, list[ChannelStatistics]], data: Data, *_) -> None:
    """Statistics from the reference evaluator: ONNX Runtime has no Erf and no Conv in float64."""
    model = whole(graph)
    known = {value.name for value in (*model.graph.input, *model.graph.output)}
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in sorted({*observers} - known))
    names = [value.name for value in model.graph.output]
    for feed in data:
        values = dict(feed) | dict(zip(names, evaluator(model).run(names, dict(feed)), strict=True))
        for name, (observer,) in observers.items():
            observer.add(values[name].astype(np.float32))


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


def planted(name: str, shifted: bool = False) -> tuple[gs.Graph, Data, np.ndarray, float]:
    """A block with outliers, its samples, and the baseline of the block without them."""
    graph = block(name)
    data = samples(graph)
    exact, unplanted = baseline(name, data)
    plant(graph, shifted)
    return graph, data, exact, unplanted
