"""Small networks and samples for tests of pruning, and what a pruned graph costs, counted from its file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Outcome
from channelfold.passes.channels.groups import Group, find_groups
from channelfold.passes.prune import Prune
from channelfold.runtime.data.sources import Data
from channelfold.runtime.io.files import check, load, save
from channelfold.runtime.io.shapes import measured_shapes
from channelfold.runtime.jobs.inspect_model import costs
from channelfold.tests.graphs import build, data_from, feeds, random, run

CNN = """
    a = Conv<pads=[1,1,1,1]>(x, A, a0)
    r = Relu(a)
    b = Conv<pads=[1,1,1,1], strides=[2,2]>(r, B, b0)
    s = Relu(b)
    g = GlobalAveragePool(s)
    f = Flatten(g)
    y = Gemm<transB=1>(f, C, c0)
"""
MLP = """
    a = Gemm<transB=1>(x, A, a0)
    r = Relu(a)
    b = Gemm<transB=1>(r, B, b0)
    s = Relu(b)
    y = Gemm<transB=1>(s, C, c0)
"""
FFN = """
    n = LayerNormalization<axis=-1>(t, g0, g1)
    h = MatMul(n, A)
    i = Add(h, a0)
    r = Relu(i)
    o = MatMul(r, B)
    y0 = Add(t, o)
    m = LayerNormalization<axis=-1>(y0, m0, m1)
    y = MatMul(m, C)
"""


def spread(shape: Sequence[int], name: str) -> np.ndarray:
    """Random weights that keep activations near one."""
    return random(tuple(shape), name) / np.sqrt(np.prod(shape[1:]))


def cnn(kind: str = "float", signature: str = "(float[N,3,12,12] x) => (float[N,10] y)", **constants: Any) -> gs.Graph:
    """Two convolutions of 16 and 24 channels, then 10 classes."""
    given: dict[str, Any] = {
        "A": spread((16, 3, 3, 3), "A"),
        "B": spread((24, 16, 3, 3), "B"),
        "C": spread((10, 24), "C"),
    }
    given |= {"a0": 16, "b0": 24, "c0": 10} | constants
    return build(signature, CNN, kind=kind, **given)


def mlp(kind: str = "float", **constants: Any) -> gs.Graph:
    """Two hidden layers of 32 and 24 neurons, on vectors of 16."""
    given: dict[str, Any] = {"A": spread((32, 16), "A"), "B": spread((24, 32), "B"), "C": spread((5, 24), "C")}
    given |= {"a0": 32, "b0": 24, "c0": 5} | constants
    return build("(float[N,16] x) => (float[N,5] y)", MLP, kind=kind, **given)


def ffn(signature: str = "(float[N,T,8] x) => (float[] y)", **constants: Any) -> gs.Graph:
    """A block of a transformer 16 wide, on a stream that a layer writes and two norms work on."""
    given: dict[str, Any] = {"T": spread((8, 16), "T"), "A": spread((16, 32), "A"), "B": spread((32, 16), "B")}
    given |= {"C": spread((16, 4), "C"), "g0": np.ones(16), "g1": 16, "m0": np.ones(16), "m1": 16, "a0": 32}
    return build(signature, "t = MatMul(x, T)" + FFN, kind="float", **given | constants)


def data_of(graph: gs.Graph, count: int = 8, size: int = 8, seed: int = 0, order: Sequence[int] = ()) -> Data:
    """Normal samples; ``order``: their numbers, if not 0, 1, 2 …"""
    made = []
    for index in order or range(count):
        rng = np.random.default_rng((seed, index))
        shapes = {t.name: [d if isinstance(d, int) else size for d in t.shape] for t in graph.inputs}
        made.append({t.name: rng.standard_normal(shapes[t.name]).astype(t.dtype) for t in graph.inputs})
    return data_from(*made)


def prune(graph: gs.Graph, data: Data | None = None, **options) -> Outcome:
    """Prunes a valid graph to a valid one, whose inputs and outputs are what they were."""
    before = specs(graph)
    outcome = Prune(**options).apply(graph, Context(calibration=data))
    check(graph)
    json.dumps(outcome.facts)
    for (name, dtype, old), now in zip(before, specs(graph), strict=True):
        known = tuple(after if size is None else size for size, after in zip(old, now[2], strict=True))
        assert now == (name, dtype, known)  # a size that nothing was known of may have become known
    return outcome


def specs(graph: gs.Graph) -> list[tuple]:
    return [(t.name, t.dtype, tuple(t.shape)) for t in (*graph.inputs, *graph.outputs)]


def kept(outcome: Outcome) -> dict[str, int]:
    """Channels left, by the tensor or node that names the group."""
    return {group["node"]: group["kept"] for group in outcome.facts["groups"]}


def written_costs(graph: gs.Graph, folder: Path) -> dict[str, int]:
    """Parameters and MACs of the file that a graph becomes."""
    save(graph, folder / "written.onnx")
    found = costs(load(folder / "written.onnx"))
    return {name: count for name, count in found.items() if count is not None}


def groups_of(graph: gs.Graph) -> list[Group]:
    return find_groups(graph, measured_shapes(graph, feeds(graph)))


def distance(graph: gs.Graph, other: gs.Graph, data: Data) -> float:
    """The root mean square of the difference of the outputs of two graphs, relative."""
    pairs = [(run(graph, feed)["y"].astype(np.float64), run(other, feed)["y"]) for feed in data]
    return float(np.sqrt(sum(np.sum((a - b) ** 2) for a, b in pairs) / sum(np.sum(a**2) for a, _ in pairs)))
