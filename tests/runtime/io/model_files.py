"""A model of weights that are full of one number, and what its files hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
from onnx import helper, numpy_helper

from channelfold.runtime.io.files import load, read


def model_of(value: float = 1.0, weights: int = 3, size: int = 300) -> onnx.ModelProto:
    """y = x + w0 + w1 + …, every weight full of ``value``."""
    names = [f"w{i}" for i in range(weights)]
    initializers = [numpy_helper.from_array(np.full(size, value, np.float32), name) for name in names]
    x, y = (helper.make_tensor_value_info(name, 1, [size]) for name in "xy")
    nodes = [helper.make_node("Sum", ["x", *names], ["y"], "sum")]
    graph = helper.make_graph(nodes, "g", [x], [y], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def weights_in(path: Path) -> set[float]:
    """The different values in the weights of a file."""
    tensors = load(path).nodes[0].inputs[1:]
    assert len(tensors) == 3
    return {float(v) for tensor in tensors for v in np.unique(read(tensor))}


def files_beside(path: Path) -> list[str]:
    return sorted(file.name for file in path.parent.iterdir())
