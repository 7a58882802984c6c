"""Samples for a graph, a graph quantized with all that always holds, and what is lost."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Outcome
from channelfold.passes.quantize import Quantize
from channelfold.runtime.data.sources import Data
from channelfold.runtime.io.files import check, session
from channelfold.tests.graphs import build, random
from channelfold.tests.graphs import samples as samples_of

samples = functools.partial(samples_of, size=2)


def quantize(graph: gs.Graph, step: Quantize | None = None, data: Data | None = None) -> Outcome:
    """Quantizes and asserts what always holds: a valid graph, the same inputs and outputs, facts that are JSON."""
    sides = [(t.name, t.dtype, t.shape) for t in (*graph.inputs, *graph.outputs)]
    outcome = (step or Quantize()).apply(graph, Context(calibration=data or samples(graph)))
    check(graph)
    assert sides == [(t.name, t.dtype, t.shape) for t in (*graph.inputs, *graph.outputs)]
    json.dumps(outcome.facts)
    check_counts(outcome)
    return outcome


def check_counts(outcome: Outcome) -> None:
    """The facts count the linears among the sites; the other sites are tables of Gather."""
    changed = [change.node for change in outcome.changed if not change.what.startswith("Gather")]
    refused = [refusal.node for refusal in outcome.refused if not refusal.reason.startswith("Gather")]
    assert outcome.facts["quantized"] == len(changed)
    assert changed == outcome.facts["quantized_nodes"]
    assert outcome.facts["linears"] == len(changed) + len(refused)


def optimized(graph: gs.Graph, folder: Path) -> list[str]:
    """The operators that ONNX Runtime makes of a graph."""
    session(graph, optimized=folder / "optimized.onnx")
    return [n.op_type for n in onnx.load(folder / "optimized.onnx", load_external_data=False).graph.node]


def snr(before: dict, after: dict) -> float:
    noise = sum(np.square(before[name].astype(np.float64) - after[name]).sum() for name in before)
    signal = sum(np.square(before[name].astype(np.float64)).sum() for name in before)
    return float(10 * np.log10(signal / noise)) if noise else np.inf


def network() -> gs.Graph:
    """Convolutions with a residual, pools and a classifier, 16 channels wide from the start."""
    weights: dict[str, Any] = {"W1": (32, 16, 3, 3), "W2": (32, 32, 3, 3), "W3": (24, 32)}
    for name, shape in weights.items():
        weights[name] = np.sqrt(2 / np.prod(shape[1:])) * random(shape, name)
    return build(
        "(float[N,16,8,8] x) => (float[] y)",
        """
        c1 = Conv<pads=[1,1,1,1]>(x, W1, b1)
        r1 = Relu(c1)
        p = MaxPool<kernel_shape=[2,2],strides=[2,2]>(r1)
        c2 = Conv<pads=[1,1,1,1]>(p, W2, b2)
        s = Add(c2, p)
        r2 = Relu(s)
        g = GlobalAveragePool(r2)
        f = Flatten(g)
        y = Gemm<transB=1>(f, W3, b3)
        """,
        kind="float",
        **weights,
        b1=0.1 * random(32, "b1"),
        b2=0.1 * random(32, "b2"),
        b3=0.1 * random(24, "b3"),
    )
