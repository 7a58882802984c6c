"""Which operators multiply by the integer weights of a graph when ONNX Runtime runs the graph.

    W_q -> DequantizeLinear -> MatMul      fused:  MatMulIntegerToFloat, QGemm, QLinearConv … reads W_q itself
                                           not fused:  DequantizeLinear expands W_q to float on every call

The answer is read from the graph that ONNX Runtime's optimizer leaves, which no rule of ours can foretell: what fuses
depends on shapes, on readers, on the order of its rewrites.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs

from channelfold.runtime.io.files import session

EXPANDS = "DequantizeLinear"


def readers_of_integers(graph: gs.Graph) -> dict[str, set[str]]:
    """The operators that read each integer constant after optimization, by the name of the constant.

    Raises ModelError where ONNX Runtime refuses the graph.
    """
    with tempfile.TemporaryDirectory(prefix="channelfold-") as folder:
        path = Path(folder, "optimized.onnx")
        session(graph, optimized=path)
        model = onnx.load(path, load_external_data=False)
    found: dict[str, set[str]] = {}
    for part in _graphs(model.graph):
        for node in part.node:
            for name in node.input:
                found.setdefault(name, set()).add(node.op_type)
    whole = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    names = {t.name for part in _graphs(model.graph) for t in part.initializer if t.data_type in whole}
    return {name: found[name] for name in names & found.keys()}


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)
