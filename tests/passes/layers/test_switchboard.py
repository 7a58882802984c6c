"""A configuration of the switchboard computes what the written file computes, and every site is measured truly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from channelfold import models
from channelfold.passes import pipeline
from channelfold.passes.base import Context
from channelfold.passes.layers import sensitivity, switchboard
from channelfold.passes.layers.output_error import Meter, decibels, spread
from channelfold.passes.layers.switchboard import Board, build, dequantized
from channelfold.passes.recipe import load_recipe, make
from channelfold.passes.search.options import board_of, recipe
from channelfold.runtime.data.sources import Data, open_data
from channelfold.runtime.io.emulate import emulate
from channelfold.runtime.io.facts import required_inputs
from channelfold.runtime.io.files import load, session
from channelfold.runtime.io.snapshot import Snapshot
from channelfold.tests.graphs import build as network
from channelfold.tests.graphs import random, samples

OPTIONS = {"w8": ("quantize-weights", {}), "w4": ("quantize-weights", {"weights": "int4", "group": 16})}


def quantized(graph: gs.Graph, data: Data, name: str, options: dict) -> gs.Graph:
    copy = Snapshot.of(graph).graph()
    return pipeline.run(copy, [make(name, options)], Context(data), verify=False)[0]


def shipped(name: str) -> tuple[gs.Graph, Data]:
    graph = load(models.path(models.MODELS[name].onnx))
    data = open_data(models.path(models.MODELS[name].calibration), required_inputs(graph)).first(16)
    return pipeline.run(graph, load_recipe("fold").passes, Context(data), verify=False)[0], data


def boards(graph: gs.Graph, data: Data, folder: Path, **options) -> tuple[Board, dict[str, gs.Graph]]:
    steps = {"int8": ("quantize", {"reduce_range": "off", "embeddings": False} | options), **OPTIONS}
    made = {option: make(name, settings) for option, (name, settings) in steps.items()}
    board = board_of(Snapshot.of(graph).graph(), made, Context(data), folder)
    written = {}
    for option in made:
        alone = recipe([], made, graph, board, {name: option for name in board.slots if option in board.options(name)})
        written[option] = pipeline.run(Snapshot.of(graph).graph(), alone, Context(data), verify=False)[0]
    return board, written


def emulated(graph: gs.Graph) -> gs.Graph:
    emulate(graph)
    return graph


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.square(a - b).sum() / np.square(b).sum())


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
@pytest.mark.parametrize("name", ["digits_cnn", "digits_vit"])
def test_every_option_of_all_nodes_is_the_file_of_its_pass(name, target, tmp_path):
    graph, data = shipped(name)
    board, written = boards(graph, data, tmp_path, target=target)
    everything = board.player(open=board.slots)
    for option, file in {"float": graph, **written}.items():
        chosen = {node: option for node in board.slots if option in board.options(node)}
        literal, closed = session(file, optimize=False), board.player(chosen)
        for feed in list(data)[:3]:
            (expected,) = literal.run(feed).values()
            lost = relative(expected, next(iter(session(graph).run(feed).values())))
            # a value on the edge of two codes may fall to either side
            assert relative(closed.run(feed)[0], expected) <= max(1e-9, 0.02 * lost)
            assert relative(everything.run(feed, chosen)[0], expected) <= max(1e-9, 0.15 * lost)


@pytest.mark.parametrize(("name", "target"), [("digits_vit", "tensorrt"), ("digits_cnn", "onnxruntime")])
def test_a_mix_is_the_file_that_excludes_the_other_nodes(name, target, tmp_path):
    graph, data = shipped(name)
    board, _ = boards(graph, data, tmp_path, target=target)
    nodes = [node for node in board.slots if "int8" in board.options(node)]
    options = {"target": target, "reduce_range": "off", "exclude": nodes[::2]}
    literal = session(quantized(graph, data, "quantize", options), optimize=False)
    chosen = dict.fromkeys(nodes[1::2], "int8")
    for feed in list(data)[:3]:
        (expected,) = literal.run(feed).values()
        assert relative(board.player(chosen).run(feed)[0], expected) < 1e-9
        assert relative(board.player(open=nodes[:4], chosen=chosen).run(feed)[0], expected) < 1e-9


@dataclass
class OfFloat(Context):
    """Shows a pass the data in the original graph, whatever the passes before have done to them."""

    original: gs.Graph | None = None

    def observe(self, graph, observers):
        assert self.original is not None
        super().observe(self.original, observers)


ACTING = {
    "int8": ("quantize", {"embeddings": False}),
    "fp8": ("quantize-weights", {"weights": "fp8", "activations": "fp8"}),
    "dgq": ("quantize-weights", {"weights": "dgq"}),
    "nvfp4": ("quantize-weights", {"weights": "nvfp4", "activations": "fp4"}),
}


@pytest.fixture(scope="module")
def with_floats(tmp_path_factory):
    """A network whose inputs int8 centers, by biases in front, a Sub and a Pad, with its data and its board."""
    body = """
        a = Gemm<transB=1>(x, A, p) b = Relu(a) c = Gemm<transB=1>(b, B, q) d = Relu(c) e = MatMul(d, C) f = Add(e, r)
        s = Sigmoid(f) m = MatMul(s, D) n = Add(m, r) k = Reshape(n, shape)
        g = Conv<pads=[1, 1, 1, 1]>(k, G, u) h = Relu(g) y = Conv<pads=[1, 1, 1, 1], group=16>(h, H, u)
    """
    weights = {name: random((64, 64), name) / 8 for name in "ABCD"} | {name: random((64,), name) for name in "pqr"}
    weights |= {"G": random((16, 16, 3, 3), "G"), "H": random((16, 1, 3, 3), "H"), "u": random((16,), "u")}
    weights |= {"shape": np.array([-1, 16, 2, 2])}
    graph = network("(float[N,64] x) => (float[] y)", body, kind="float", opset=23, **weights)
    data = samples(graph, size=32, make=lambda shape, rng: rng.standard_normal(shape))
    steps = {option: make(*pair) for option, pair in ACTING.items()}
    return graph, data, steps, board_of(Snapshot.of(graph).graph(), steps, Context(data), tmp_path_factory.mktemp("b"))


@pytest.mark.parametrize("mix", ["int8", "fp8", "dgq", "nvfp4 fp8", "int8 fp8 nvfp4 dgq", "fp8 int8"])
def test_formats_of_activations_in_one_file(mix, with_floats):
    graph, data, steps, board = with_floats
    nodes, options = list(board.slots), mix.split()
    assert {option for name in nodes for option in board.options(name)} == {"float", *ACTING}
    assert {"Clip", "Sub", "Pad"} < {node.op for node in load(board.folder / "board.onnx").nodes}
    chosen = {name: options[i % len(options)] for i, name in enumerate(nodes)}
    chosen = {name: option for name, option in chosen.items() if option in board.options(name)}
    passes = recipe([], steps, graph, board, chosen)
    ctx = OfFloat(data, original=graph)
    literal = emulated(pipeline.run(Snapshot.of(graph).graph(), passes, ctx, verify=False)[0])
    half = board.player(chosen, open=nodes[::2])
    for feed in list(data)[:3]:
        (expected,) = session(literal, optimize=False).run(feed).values()
        lost = relative(expected, next(iter(session(graph).run(feed).values())))
        for found in (board.player(chosen).run(feed), half.run(feed), half.run(feed, chosen)):
            assert relative(found[0], expected) <= 0.02 * lost


def test_the_bytes_of_two_levels_of_scales(with_floats):
    graph, *_, board = with_floats
    codes, scales = 64 * 64 // 2, 64 * 64 // 16
    assert board.slots[graph.nodes[0].name].sizes["nvfp4"] == codes + scales + 4


def test_the_bytes_of_an_option_are_those_in_the_file(tmp_path):
    graph, data = shipped("digits_cnn")
    board, written = boards(graph, data, tmp_path)
    slot = next(slot for slot in board.slots.values() if "int8" in slot.files)
    reader = next(node for node in written["int8"].nodes if node.name == slot.name)
    codes, scales, zeros = reader.inputs[1].inputs[0].inputs
    assert slot.sizes["int8"] == codes.values.nbytes + scales.values.nbytes + zeros.values.nbytes
    assert slot.sizes["float"] == 4 * codes.values.size
    assert board.size({}) > board.size(dict.fromkeys(board.slots, "w8" if "w8" in slot.files else "int8"))


def test_the_error_is_measured_in_front_of_a_closing_softmax(tmp_path):
    graph = network("(float[N,16] x) => (float[] y)", "a = MatMul(x, A) y = Softmax(a)", kind="float", A=(16, 16))
    board = build(graph, {"w8": quantized(graph, samples(graph, size=4), "quantize-weights", {})}, tmp_path)
    assert board.outputs == ("a",)


def test_the_site_that_holds_the_error_is_found_and_errors_add_up(tmp_path):
    weights = {name: random((32, 32), name) / 6 for name in "ABCDE"}
    weights["D"][:, 3] *= 30  # the range of what E reads is that of a channel which E hardly reads
    weights["E"][3] /= 30
    body = (
        "a = MatMul(x, A) b = Tanh(a) c = MatMul(b, B) d = Tanh(c) e = MatMul(d, C) f = MatMul(e, D) y = MatMul(f, E)"
    )
    graph = network("(float[N,32] x) => (float[] y)", body, kind="float", **weights)
    data = samples(graph, size=64, make=lambda shape, rng: rng.standard_normal(shape))
    variant = quantized(graph, data, "quantize", {"min_activation_snr": 0})
    board = build(graph, {"int8": variant}, tmp_path)
    files = sensitivity.keep(board, spread(data, 4), "s")
    errors = {site.nodes[0]: site.errors["int8"] for site in sensitivity.measure(board, files)}
    assert max(errors, key=errors.__getitem__) == "MatMul_6"
    assert errors["MatMul_6"] > 0.9 * sum(errors.values())
    whole = sensitivity.attempt(sensitivity.Trial(board, files, (dict.fromkeys(errors, "int8"),)))
    assert abs(decibels(sum(errors.values())) - decibels(whole.by_sample().mean())) < 1


def test_codes_are_taken_apart_as_onnx_does():
    graph = network("(float[2,4] x) => (float[] y)", "y = DequantizeLinear<axis=1, block_size=2>(q, s, z)",
                    kind="float", opset=21, q=np.arange(8, dtype=np.uint8).reshape(2, 4),
                    s=np.arange(1, 5, dtype=np.float32).reshape(2, 2), z=np.full((2, 2), 3, np.uint8))  # fmt: skip
    (node,) = graph.nodes
    expected = session(graph).run({"x": np.zeros((2, 4), np.float32)} if graph.inputs else {})["y"]
    np.testing.assert_array_equal(dequantized(*(tensor.values for tensor in node.inputs), node.attrs), expected)
    assert switchboard.settle(graph) == {}


def test_a_channel_axis_and_a_scalar_are_taken_apart_too():
    codes, scales = np.array([[2, 4], [6, 8]], np.int8), np.array([0.5, 2.0], np.float32)
    np.testing.assert_array_equal(dequantized(codes, scales, None, {"axis": 0}), [[1, 2], [12, 16]])
    np.testing.assert_array_equal(dequantized(codes, scales, None, {"axis": -1}), [[1, 8], [3, 16]])
    np.testing.assert_array_equal(dequantized(codes, np.float32(2), np.int8(1), {}), [[2, 6], [10, 14]])


@pytest.mark.parametrize(("labels", "classed"), [((), False), ((0,), True)])
def test_an_output_may_be_a_scalar(labels, classed):
    meter = Meter(1, [False], 1, labels)
    meter.see(0, {}, [np.array(2.0)], [[np.array(1.0)]])
    errors = meter.errors
    assert (errors.energy[0, 0], errors.lost[0, 0, 0], np.isnan(errors.agreed[0, 0, 0])) == (4.0, 1.0, True)
    assert errors.right[:, 0].tolist() == [classed, classed]
