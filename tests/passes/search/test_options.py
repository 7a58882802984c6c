"""Nodes of one file in different formats: what TensorRT makes of them, and the recipe that makes the file."""

from __future__ import annotations

import numpy as np
import pytest

from channelfold.passes import pipeline
from channelfold.passes.base import Context
from channelfold.passes.layers.targets import verdict
from channelfold.passes.recipe import Recipe, dumps, loads, make
from channelfold.passes.search import options
from channelfold.runtime.engine import build as tensorrt
from channelfold.runtime.io.files import save
from channelfold.runtime.io.snapshot import Snapshot
from channelfold.tests.graphs import build, random, samples

FORMATS = {
    "int8": "int8",
    "fp8": "fp8",
    "dgq": "int8",
    "nvfp4": "fp4",
    "w8": "fused",
    "w4": "fused",
}  # and how products run


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """Products one behind the other, where Relu lets int8 center what they read; and two that read the same."""
    body, weights = ["x0 = Identity(x)"], {}
    for i in range(12):
        body.append(f"m{i} = MatMul(x{i}, W{i}) g{i} = Add(m{i}, b{i}) x{i + 1} = Relu(g{i})")
        weights |= {f"W{i}": random((64, 64), f"W{i}") / 8, f"b{i}": random((64,), f"b{i}")}
    body.append("p = MatMul(x12, P) q = MatMul(x12, Q) y = Add(p, q)")
    weights |= {name: random((64, 64), name) / 8 for name in "PQ"}
    graph = build("(float[16,64] x) => (float[] y)", " ".join(body), kind="float", opset=23, **weights)
    for node in graph.nodes:
        node.name = node.outputs[0].name
    data = samples(graph, make=lambda shape, rng: rng.standard_normal(shape))
    steps = options.steps({}, [120])
    board = options.board_of(Snapshot.of(graph).graph(), steps, Context(data), tmp_path_factory.mktemp("board"))
    return graph, data, steps, board


@pytest.mark.rtx
@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_tensorrt_runs_every_node_of_a_mix_in_its_own_format(kind, network, tmp_path):
    """Every format in front of every other one, and two formats that read one tensor."""
    pytest.importorskip("tensorrt_rtx")
    graph, data, steps, board = network
    order = ["int8", "fp8", "nvfp4", "dgq", "w8", "w4", "int8", "dgq", "nvfp4", "fp8", "w4", "w8"]
    chosen = {f"m{i}": option for i, option in enumerate(order)} | {"p": "int8", "q": "nvfp4"}
    behind = [step for step in [options.cast([], {}, kind)] if step]
    passes = options.recipe([], steps, graph, board, chosen, behind)
    assert loads(dumps(Recipe("mix", tuple(passes)))).passes == tuple(passes)
    mixed, _ = pipeline.run(Snapshot.of(graph).graph(), passes, Context(data), verify=False)
    save(mixed, tmp_path / "m.onnx")
    engine = tensorrt.build(tmp_path / "m.onnx", tmp_path / "m.engine", sm=120)
    found = {name: node.verdict for name, node in engine.plan.nodes.items()}
    assert found == {name: FORMATS[option] for name, option in chosen.items()}


def test_formats_of_gpus_need_gpus_that_all_have_them():
    found = {tuple(sms): [o for o in ("fp8", "dgq", "nvfp4") if o in options.steps({}, sms)]
             for sms in ([], [75], [86], [89], [120], [89, 120], [86, 120])}  # fmt: skip
    assert found == {
        (): [], (75,): [], (86,): ["dgq"], (89,): ["fp8", "dgq"], (120,): ["fp8", "dgq", "nvfp4"],
        (89, 120): ["fp8", "dgq"], (86, 120): ["dgq"],
    }  # fmt: skip
    assert list(options.steps({"target": "onnxruntime"}, [120])) == ["int8", "w8", "w4"]
    for option, runs in FORMATS.items():
        row = options.OPTIONS[option]
        assert option == "int8" or verdict(row.weights, row.activations, "tensorrt", 120) == runs


def test_the_cost_of_an_option_is_bytes_and_bits(network):
    *_, board = network
    whole = options.Whole(bytes=10**6, macs=sum(board.macs.values()), minimize="arithmetic")
    sites = [options.Site((name,), sizes=board.slots[name].sizes) for name in board.slots]
    half = dict.fromkeys(board.slots, 2)
    first, *_, rest = whole.priced(board, sites, 14 * 64 * 64 * 2 + 1000, widths=half)
    costs = {option: cost * len(sites) * 32 for option, cost in first.costs.items()}
    assert costs == pytest.approx({"float": 16, "int8": 8, "fp8": 8, "dgq": 8, "nvfp4": 4, "w8": 16, "w4": 16})
    assert (first.sizes["float"], rest.sizes["float"]) == (64 * 64 * 2, 1000)
    assert np.isclose(rest.costs["float"], 0)


def test_what_was_taken_back_does_not_come_back_in_front_of_a_mix():
    body = "a = Gemm<transB=1>(x, A, p) b = Gemm<transB=1>(a, B, p) c = Gemm<transB=1>(b, C, p) y = Gemm(c, D)"
    weights = {name: random((64, 64), name) / 8 for name in "ABCD"} | {"p": random((64,), "p")}
    weights["A"][:4] *= 50
    weights["B"][:, :4] /= 50
    graph = build("(float[N,64] x) => (float[] y)", body, kind="float", **weights)
    ctx = Context(samples(graph, size=64, make=lambda shape, rng: rng.standard_normal(shape)))

    def ran(passes):
        return pipeline.run(Snapshot.of(graph).graph(), passes, ctx, verify=False)

    mix = make("quantize", {"exclude": ["Gemm_0", "Gemm_1", "Gemm_2"]})
    _, records = ran([make("smooth", {}), make("fold-constants", {})])
    changed = [change["node"] for change in records[0]["changed"]]
    assert changed
    steps = options.settled([make("smooth", {}), make("fold-constants", {})], records)
    assert (steps[0].options()["include"], steps[0].options()["roll_back"]) == (tuple(changed), False)
    _, again = ran([*steps, mix])
    assert [change["node"] for change in again[0]["changed"]] == changed
    assert [change["what"] for change in again[0]["changed"]] == [change["what"] for change in records[0]["changed"]]
    nothing = options.settled(steps[:1], [{"pass": "smooth", "changed": []}])
    assert nothing == steps[:1]
    assert options.settled([make("smooth", {})], [{"pass": "smooth", "changed": []}]) == []
