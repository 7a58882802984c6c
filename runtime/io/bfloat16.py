"""bfloat16 models on a processor: a twin in float32 that rounds the result of every node to bfloat16.

ONNX Runtime has next to no bfloat16 kernels on a CPU. A kernel of a GPU multiplies bfloat16 numbers, sums the products
in float32 and rounds the sum, which is what the twin computes:

    y = MatMul(x, W)     becomes     y = float32(bfloat16(MatMul(x, float32(W))))
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs

from channelfold.runtime.io import edit
from channelfold.runtime.io.bodies import bodies
from channelfold.runtime.io.convert import all_graphs
from channelfold.runtime.io.files import free_name, infer_shapes, load, read, session, stored
from channelfold.runtime.io.session import Session

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_TO = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT


def computes(graph: gs.Graph) -> bool:
    """Whether a graph holds tensors of bfloat16."""
    tensors = (t for part in all_graphs(graph) for node in part.nodes for t in (*node.inputs, *node.outputs))
    attributes = (node.attrs.get("to") for part in all_graphs(graph) for node in part.nodes if node.op == "Cast")
    return _TO[0] in attributes or any(edit.dtype(tensor) == _BFLOAT16 for tensor in tensors if tensor.name)


def twin_session(path: Path, **options: Any) -> Session:
    """A session on the twin of the model in a file."""
    graph = load(path)
    make_twin(graph)
    return session(graph, **options)


def make_twin(graph: gs.Graph) -> None:
    """Makes a graph its own twin. Inputs and outputs of bfloat16 become float32."""
    infer_shapes(graph)
    pending = bodies(graph)
    while pending:
        body = pending.pop()
        with body.apart() as part:
            infer_shapes(part)
        pending += body.bodies()
    done: set[int] = set()
    for part in all_graphs(graph):
        for tensor in (t for node in part.nodes for t in node.inputs):
            if isinstance(tensor, gs.Constant) and edit.dtype(tensor) == _BFLOAT16 and id(tensor) not in done:
                done.add(id(tensor))
                tensor.values = stored(graph, np.asarray(read(tensor)).astype(np.float32), tensor.name)
        nodes = []
        for tensor in part.inputs:
            if edit.dtype(tensor) == _BFLOAT16:
                nodes += _rounded_input(graph, tensor)
        for node in part.nodes:
            nodes += [node, *_rounded(graph, node)]
        part.nodes[:] = nodes


def _rounded_input(graph: gs.Graph, tensor: gs.Variable) -> list[gs.Node]:
    """Casts that round an input, which becomes float32, for all its readers."""
    result = gs.Variable(free_name(graph, f"{tensor.name}_exact"), np.dtype(np.float32), tensor.shape)
    edit.redirect(tensor, result)
    tensor.dtype = np.dtype(np.float32)
    return _rounding(graph, tensor, result)


def _rounded(graph: gs.Graph, node: gs.Node) -> list[gs.Node]:
    """Casts behind a node that round its results of bfloat16; the node itself computes in float32 then."""
    new: list[gs.Node] = []
    for index, tensor in enumerate(list(node.outputs)):
        if tensor.is_empty() or edit.dtype(tensor) != _BFLOAT16:
            continue
        exact = gs.Variable(free_name(graph, f"{tensor.name}_exact"), np.dtype(np.float32), tensor.shape)
        edit.set_output(node, index, exact)
        new += _rounding(graph, exact, tensor)
        tensor.dtype = np.dtype(np.float32)
    for name, value in node.attrs.items():
        if name in ("to", "dtype", "output_dtype") and value == _TO[0] and new:
            node.attrs[name] = _TO[1]
        elif isinstance(value, gs.Constant) and edit.dtype(value) == _BFLOAT16:
            node.attrs[name] = gs.Constant(value.name, np.asarray(value.values).astype(np.float32))
    return new


def _rounding(graph: gs.Graph, source: gs.Variable, result: gs.Variable) -> list[gs.Node]:
    half = gs.Variable(free_name(graph, f"{result.name}_rounded"), _BFLOAT16, result.shape)
    return [
        gs.Node("Cast", free_name(graph, f"{to.name}_Cast"), {"to": code}, [read], [to])
        for read, code, to in ((source, _TO[0], half), (half, _TO[1], result))
    ]
