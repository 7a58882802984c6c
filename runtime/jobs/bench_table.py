"""The table of times that bench records for a search: ``passes.search.tabled`` reads it.

``files``: [{name, model: the hash of the model file, device, type: of what is float, ms: of all nodes, nodes: {linear
node: [ms, option]}}], and beside them ``nodes``: {file: [{name, op, ms}]} as they ran, ``environment`` and ``schema``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from channelfold.passes.layers.owners import owners
from channelfold.passes.search.tabled import ONNXRUNTIME, digest, float_type, gpu, options_in
from channelfold.runtime.io import files
from channelfold.runtime.stats.profile import NodeTime

Ran = Sequence[Mapping[str, Any]]  # nodes with their names, operators and milliseconds


def of_model(name: str, path: Path, ran: Ran) -> dict[str, Any]:
    """The entry of a model that ONNX Runtime has run."""
    nodes = [NodeTime(node["name"], node["op"], node["ms"]) for node in ran]
    return _entry(name, path, ONNXRUNTIME, ran, lambda names: owners(path, nodes, [[one] for one in names]))


def of_engine(name: str, model: Path, told: Mapping[str, Any], ran: Ran) -> dict[str, Any]:
    """The entry of an engine of a model, with what its plan has ``told``. A layer belongs to its first linear node."""
    kernels = {kernel["name"]: kernel["nodes"] for kernel in told["kernels"]}

    def times(names: Sequence[str]) -> list[float]:
        found = dict.fromkeys(names, 0.0)
        for layer in ran:
            nodes = kernels.get(layer["name"], layer["name"].replace("+", " ").split())
            if owner := next((node for node in nodes if node in found), None):
                found[owner] += layer["ms"]
        return list(found.values())

    return _entry(name, model, gpu(told["sm"]), ran, times)


def _entry(name: str, model: Path, device: str, ran: Ran, times: Any) -> dict[str, Any]:
    graph = files.load(model)
    files.infer_shapes(graph)
    options = options_in(graph)
    nodes = {node: pair for node, *pair in zip(options, times(list(options)), options.values(), strict=True)}
    entry = {"name": name, "model": digest(model), "device": device, "type": float_type(graph)}
    return entry | {"ms": sum(node["ms"] for node in ran), "nodes": nodes}
