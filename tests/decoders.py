"""Models whose weights stand in bodies of If, Loop and Scan, as exporters write them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx.parser
from onnx import TensorProto, helper, numpy_helper

from channelfold.runtime.io.files import import_model
from channelfold.tests.graphs import random

OPSETS = [helper.make_opsetid("", 17)]
WIDTH = 32


def value(name: str, *shape: int | str | None, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, list(shape))


def weight(name: str, *shape: int) -> onnx.TensorProto:
    return numpy_helper.from_array((random(shape, name) / np.sqrt(shape[0])).astype(np.float32), name)


def node(op: str, inputs: str, outputs: str, **attrs) -> onnx.NodeProto:
    names = outputs.split()
    return helper.make_node(op, inputs.split(), names, f"n_{names[0]}", **attrs)


def model(nodes: list, inputs: list, outputs: list, weights: Sequence = (), opset: int = 17) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "decoder", inputs, outputs, list(weights))
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.checker.check_model(made, full_check=True)
    return made


def merged(own: bool = False) -> onnx.ModelProto:
    """A decoder as optimum merges it: an If by the input ``use_cache_branch``, both branches with the same weights.

    The branches read the weights of the outer graph, or hold copies of their ``own``. With a cache, the past comes in
    front of the keys; the other branch leaves the past as it is.
    """
    held = [weight(name, WIDTH, WIDTH) for name in ("Wq", "Wk", "Wo")]
    held += [weight("W1", WIDTH, 4 * WIDTH), weight("W2", 4 * WIDTH, WIDTH)]

    def branch(tag: str, cached: bool) -> onnx.GraphProto:
        names = {name: f"{name}_{tag}" for name in ("q", "k0", "k", "t", "s", "p", "a", "o", "h", "r", "f")}
        own_held = []
        inside = {proto.name: proto.name for proto in held}
        for proto in held if own else ():
            own_held.append(numpy_helper.from_array(numpy_helper.to_array(proto), f"{proto.name}_{tag}"))
            inside[proto.name] = own_held[-1].name
        n = names | inside
        nodes = [node("MatMul", f"x {n['Wq']}", n["q"]), node("MatMul", f"x {n['Wk']}", n["k0"])]
        nodes += [node("Concat", f"past {n['k0']}", n["k"], axis=1) if cached else node("Identity", n["k0"], n["k"])]
        nodes += [
            node("Transpose", n["k"], n["t"], perm=[0, 2, 1]),
            node("MatMul", f"{n['q']} {n['t']}", n["s"]),
            node("Softmax", n["s"], n["p"], axis=-1),
            node("MatMul", f"{n['p']} {n['k']}", n["a"]),
            node("MatMul", f"{n['a']} {n['Wo']}", n["o"]),
            node("MatMul", f"{n['o']} {n['W1']}", n["h"]),
            node("Relu", n["h"], n["r"]),
            node("MatMul", f"{n['r']} {n['W2']}", n["f"]),
        ]
        outputs = [value(n["f"], "b", "s", WIDTH), value(n["k"], "b", "all", WIDTH)]
        return helper.make_graph(nodes, f"{tag}_branch", [], outputs, own_held)

    choice = helper.make_node(
        "If", ["use_cache_branch"], ["y", "present"], "choice",
        then_branch=branch("then", True), else_branch=branch("else", False),
    )  # fmt: skip
    inputs = [
        value("x", "b", "s", WIDTH),
        value("past", "b", "p", WIDTH),
        value("use_cache_branch", 1, kind=TensorProto.BOOL),
    ]
    return model(
        [choice],
        inputs,
        [value("y", "b", "s", WIDTH), value("present", "b", "all", WIDTH)],
        [] if own else held,
    )


def steps(count: int = 4, kinds: tuple[bool, ...] = (False, True)) -> list[dict[str, np.ndarray]]:
    """Feeds of ``merged``, for a first step without a cache, and for later ones with a cache."""
    made = []
    for index in range(count):
        rng, cached = np.random.default_rng(index), kinds[index % len(kinds)]
        made.append(
            {
                "x": rng.standard_normal((1, 1 if cached else 6, WIDTH), np.float32),
                "past": rng.standard_normal((1, 5 if cached else 0, WIDTH), np.float32),
                "use_cache_branch": np.array([cached]),
            }
        )
    return made


def loop() -> onnx.ModelProto:
    """h = relu(h W + x U) as often as ``trips`` says; every state comes out, and the sum of the iteration numbers."""
    body = helper.make_graph(
        [
            node("MatMul", "h W", "a"),
            node("MatMul", "x U", "u"),
            node("Add", "a u", "sum"),
            node("Relu", "sum", "next"),
            node("Identity", "next", "seen"),
            node("Cast", "i", "number", to=TensorProto.FLOAT),
            node("Add", "count number", "counted"),
            node("Identity", "going", "again"),
        ],
        "body",
        [
            value("i", kind=TensorProto.INT64),
            value("going", kind=TensorProto.BOOL),
            value("h", "b", WIDTH),
            value("count"),
        ],
        [value("again", kind=TensorProto.BOOL), value("next", "b", WIDTH), value("counted"), value("seen", "b", WIDTH)],
        [weight("W", WIDTH, WIDTH)],
    )
    zero = numpy_helper.from_array(np.array(0, np.float32), "zero")
    return model(
        [helper.make_node("Loop", ["trips", "", "h0", "zero"], ["last", "total", "states"], "loop", body=body)],
        [value("trips", kind=TensorProto.INT64), value("h0", "b", WIDTH), value("x", "b", WIDTH)],
        [value("last", "b", WIDTH), value("total"), value("states", "t", "b", WIDTH)],
        [weight("U", WIDTH, WIDTH), zero],
    )


def scan() -> onnx.ModelProto:
    """An RNN over axis 1 of x, backward: h = tanh(x_t W + h U)."""
    body = helper.make_graph(
        [
            node("MatMul", "x_t W", "a"),
            node("MatMul", "h U", "u"),
            node("Add", "a u", "sum"),
            node("Tanh", "sum", "next"),
            node("Identity", "next", "seen"),
        ],
        "body",
        [value("h", "b", WIDTH), value("x_t", "b", WIDTH)],
        [value("next", "b", WIDTH), value("seen", "b", WIDTH)],
    )
    attrs = {"num_scan_inputs": 1, "scan_input_axes": [1], "scan_input_directions": [1], "scan_output_axes": [1]}
    return model(
        [helper.make_node("Scan", ["h0", "x"], ["last", "states"], "scan", body=body, **attrs)],
        [value("h0", "b", WIDTH), value("x", "b", "t", WIDTH)],
        [value("last", "b", WIDTH), value("states", "b", "t", WIDTH)],
        [weight("W", WIDTH, WIDTH), weight("U", WIDTH, WIDTH)],
    )


DECODER = """<ir_version: 9, opset_import: ["": 17]>
    m (int64[b,s] tokens, int64[b,t] seen, int64[b,s] place, float[b,1,p,4] past)
    => (float[b,s,6] y, float[b,1,u,4] now)
    <int64[1] one = {1}, int64[2] two = {1, 2}, float big = {-1000.0}, float unit = {1.0}> {
        e = Gather(table, tokens)
        angle = Cast<to = 1>(place)
        wave = Cos(angle)
        turn = Unsqueeze(wave, minus)
        x = Mul(e, turn)
        k = Unsqueeze(x, one)
        now = Concat<axis = 2>(past, k)
        t = Transpose<perm = [0, 1, 3, 2]>(now)
        scores = MatMul(k, t)
        m0 = Cast<to = 1>(seen)
        m1 = Sub(unit, m0)
        m2 = Mul(m1, big)
        m3 = Unsqueeze(m2, two)
        masked = Add(scores, m3)
        weights = Softmax<axis = -1>(masked)
        mixed = MatMul(weights, now)
        out = Squeeze(mixed, one)
        y = MatMul(out, W)
    }"""


def decoder(text: str = DECODER):
    """A decoder of one head with a cache that grows, whose mask and positions the graph computes with."""
    made = onnx.parser.parse_model(text)
    for name, values in {"table": random((50, 4), "t"), "W": random((4, 6), "w")}.items():
        made.graph.initializer.append(onnx.numpy_helper.from_array(values.astype(np.float32), name))
    made.graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1]), "minus"))
    return import_model(made)
