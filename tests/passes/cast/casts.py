"""A graph cast with all that always holds, run as it is or, for bfloat16, as its twin."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Outcome
from channelfold.passes.cast import Cast
from channelfold.runtime.data.sources import Data
from channelfold.runtime.io import edit
from channelfold.runtime.io.bfloat16 import twin_session
from channelfold.runtime.io.convert import all_graphs
from channelfold.runtime.io.files import check, save, session, weightless

EPSILON = {"float16": 2.0**-11, "bfloat16": 2.0**-8}


def cast(graph: gs.Graph, step: Cast | None = None, data: Data | None = None) -> Outcome:
    """Casts, and asserts what always holds: strong types, the same inputs and outputs, no Cast twice or for nothing."""
    step = step or Cast()
    sides = [(t.name, t.dtype) for t in (*graph.inputs, *graph.outputs)]
    outcome = step.apply(graph, Context(calibration=data))
    check(graph)
    onnx.shape_inference.infer_shapes(weightless(graph), check_type=True, strict_mode=True)
    assert step.retypes or sides == [(t.name, t.dtype) for t in (*graph.inputs, *graph.outputs)]
    json.dumps(outcome.facts)
    for part in all_graphs(graph):
        nodes = [node for node in part.nodes if node.op == "Cast"]
        read = [(id(node.inputs[0]), str(node.attrs["to"])) for node in nodes]
        assert len(set(read)) == len(read), "a tensor is cast twice"
        for node in nodes:
            assert edit.dtype(node.inputs[0]) != edit.dtype(node.outputs[0]) or edit.dtype(node.outputs[0]) is None
    return outcome


def twin(graph: gs.Graph, folder: Path, feed: Mapping[str, Any]) -> dict[str, Any]:
    """What a bfloat16 graph computes."""
    save(graph, folder / "bfloat16.onnx")
    return twin_session(folder / "bfloat16.onnx").run(feed)


def computed(graph: gs.Graph, feed: Mapping[str, Any]) -> dict[str, Any]:
    return session(graph, optimize=False).run(feed)


def error(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> float:
    """The largest relative L2 error of the outputs."""
    assert list(before) == list(after)
    norms = [
        (np.linalg.norm(after[n].astype(float) - b.astype(float)), np.linalg.norm(b.astype(float)))
        for n, b in before.items()
    ]
    return max(noise / max(signal, 1e-30) for noise, signal in norms)
