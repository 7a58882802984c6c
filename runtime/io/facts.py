"""What a model file says of itself: inputs, outputs, opsets, sizes."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.runtime.io import edit
from channelfold.runtime.io.files import all_graphs, locations
from channelfold.runtime.io.meanings import meanings
from channelfold.runtime.io.session import TensorSpec

_INTEGER = ("ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "QAttention", "QGemm", "DynamicQuantizeMatMul")


def required_inputs(graph: gs.Graph) -> tuple[TensorSpec, ...]:
    """The inputs without a default value, which a feed must have, described as ONNX Runtime would describe them."""
    carried = vars(graph).get("carried")
    defaults = {tensor.name for tensor in carried.graph.initializer} if carried else set()
    return with_meanings(graph, [one for one in map(spec, graph.inputs) if one.name not in defaults])


def with_meanings(graph: gs.Graph, specs: Iterable[TensorSpec]) -> tuple[TensorSpec, ...]:
    """Descriptions of inputs with what the graph says of their values."""
    known = meanings(graph)
    return tuple(dataclasses.replace(one, meaning=known.get(one.name)) for one in specs)


def computes_as_written(graph: gs.Graph) -> bool:
    """Whether a file is quantized for TensorRT: no activation in the file is uint8, no operator computes in integers.

    TensorRT quantizes activations to int8 with the zero point 0; files for ONNX Runtime on CPUs hold uint8 activations,
    or operators that compute in integers themselves.
    """
    nodes = [node for part in all_graphs(graph) for node in part.nodes]
    points = [node.inputs[2] for node in nodes if node.op == "QuantizeLinear" and len(node.inputs) > 2]
    return not any(point.dtype == np.uint8 for point in points) and not any(
        node.op.startswith("QLinear") or node.op in _INTEGER for node in nodes
    )


def fuses_rightly(graph: gs.Graph) -> bool:
    """Whether ONNX Runtime (1.32) computes QDQ nodes rightly when it fuses them: not those with scales of float16."""
    quantizers = (node for part in all_graphs(graph) for node in part.nodes if node.op == "QuantizeLinear")
    return not any(edit.dtype(node.inputs[1]) == np.float16 for node in quantizers)


def model_facts(path: Path, graph: gs.Graph, external: Sequence[Path] | None = None) -> dict[str, Any]:
    """The ``model`` entry of a report record; ``bytes`` counts the file and its ``external_files``."""
    external = external_files(path) if external is None else external
    counts = Counter(node.op for part in all_graphs(graph) for node in part.nodes)
    return {
        "path": str(path),
        "bytes": path.stat().st_size + sum(file.stat().st_size for file in external),
        "nodes": sum(counts.values()),
        "ops": dict(counts.most_common()),
        "opset": graph.opset,
    }


def environment() -> dict[str, str]:
    """What a result may depend on: the machine, Python, and the versions of the packages that compute."""
    versions = {"system": platform.platform(), "python": platform.python_version()}
    for package in ("onnxruntime", "onnxruntime-gpu", "onnx", "numpy", "tensorrt", "tensorrt-rtx-cu12"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def external_files(path: Path) -> list[Path]:
    """The files beside a (readable) model that hold its weights."""
    return [path.parent / name for name in sorted(locations(path))]


def spec(tensor: Any) -> TensorSpec:
    dtype = tensor.dtype if isinstance(tensor.dtype, np.dtype) and tensor.dtype.kind != "V" else None
    return TensorSpec(tensor.name, dtype, tuple(tensor.shape or ()))
