"""The times of the nodes of every site from a record of ``bench``, which may come from another machine.

A record holds files of one network: of each the hash of the model, the device that ran it, its time, the type of what
is float in it, and by linear node the time and the option that the node has. Usable is a record with the given model
among its files, of nodes with the same names, on a device of the target. The times of an option come from the last such
file in which all nodes that can have the option do, all others being float.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_graphsurgeon as gs

from channelfold.passes.layers.sensitivity import Site
from channelfold.passes.layers.switchboard import FLOAT
from channelfold.passes.operators import operator
from channelfold.passes.search.latency import ORIGINAL, Timed, mixes
from channelfold.passes.search.options import OPTIONS
from channelfold.runtime.errors import DataError, UsageError
from channelfold.runtime.io import edit
from channelfold.runtime.io.emulate import DYNAMIC

ONNXRUNTIME = "ONNX Runtime"
_FORMATS = {"uint8": "int8", "uint4": "int4", "float8_e4m3fn": "fp8", "float4_e2m1fn": "fp4"}
_SCALED = {"fp4": "nvfp4"}  # of weights, whose scales are codes as well
_OTHER = "another format"


@dataclass(frozen=True)
class Recorded:
    """A file as timed: ``ms`` of a run; of every linear node the milliseconds and the option, in ``nodes``.

    ``model``: the hash of the model file. ``device``: ONNX Runtime, or the architecture of a GPU such as "SM 89".
    ``type``: of what is float in the file.
    """

    name: str
    model: str
    device: str
    type: str
    ms: float
    nodes: Mapping[str, tuple[float, str]]


@dataclass(frozen=True)
class Table:
    """The files of a record ``path``, and the ``environment`` that has run them."""

    path: Path
    files: Sequence[Recorded]
    environment: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> Table:
        """Raises DataError where a file is no record of ``bench``."""
        try:
            found = json.loads(path.read_text())
            files = [
                Recorded(**{**one, "nodes": {n: (float(ms), str(o)) for n, (ms, o) in one["nodes"].items()}})
                for one in found["files"]
            ]
            return cls(path, files, dict(found["environment"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is no table of times ({error})", "channelfold bench --record writes one") from None

    def on(self, device: str) -> Table:
        """The part of a device. Raises UsageError without one."""
        files = [one for one in self.files if one.device == device]
        if not files:
            others = ", ".join(dict.fromkeys(one.device for one in self.files))
            raise UsageError(f"{self.path.name} has times of {others}, and the target is {device}", "Time it there")
        return replace(self, files=files)

    def original(self, model: Path) -> Recorded:
        """The file of a model. Raises UsageError without one."""
        own = digest(model)
        found = next((one for one in self.files if one.model == own), None)
        if found is None:
            hint = f"Time it with the others: channelfold bench {model.name} … --record {self.path.name}"
            raise UsageError(f"{self.path.name} has no times of {model.name}", hint)
        return found

    def timed(self, model: Path, sites: Sequence[Site], kind: str) -> dict[str, Timed]:
        """The times of the given model and of the mixes that were timed, with what is float of the type ``kind``.

        Raises UsageError without times of the network in float.
        """
        found = {ORIGINAL: Timed(self.original(model).ms, ())}
        for name, mix in mixes(sites).items():
            wanted = {node: option for site, option in zip(sites, mix, strict=True) for node in site.nodes}
            fits = [one for one in self.files if one.type == kind and _has(one, wanted)]
            if fits:
                times = [sum(fits[-1].nodes[node][0] for node in site.nodes) for site in sites]
                found[name] = Timed(fits[-1].ms, times)
        if FLOAT not in found:
            nodes = [node for site in sites for node in site.nodes]
            raise UsageError(f"{self.path.name} has no usable times: {self._why_not(nodes, kind)}", "Time it as well")
        return found

    def _why_not(self, nodes: Collection[str], kind: str) -> str:
        """Why no file of the table is the network in float."""
        whole = [one for one in self.files if one.nodes.keys() >= set(nodes)]
        if not whole:
            missing = next(node for node in nodes if node not in self.files[-1].nodes)
            return f"no file has the node {missing} and all others, as the file that channelfold fold writes"
        kinds = ", ".join(dict.fromkeys(f"{one.name} ({one.type})" for one in whole))
        return f"no file has all nodes in {kind}, but for {kinds}"


def _has(file: Recorded, wanted: Mapping[str, str]) -> bool:
    return all(node in file.nodes and file.nodes[node][1] == option for node, option in wanted.items())


def gpu(sm: int) -> str:
    """The device of an engine."""
    return f"SM {sm}"


def digest(path: Path) -> str:
    """The hash of a model file, without that of weights beside it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def options_in(graph: gs.Graph) -> dict[str, str]:
    """The option that every linear node and table of a graph has, by the types of what it reads."""
    return {node.name: _option(node) for node in graph.nodes if operator(node).kind == "gather" or _is_linear(node)}


def float_type(graph: gs.Graph) -> str:
    """The type in which most linear nodes of a graph compute what is float."""
    kinds = [str(edit.dtype(node.outputs[0])) for node in graph.nodes if _is_linear(node)]
    return max(set(kinds), key=kinds.count, default="float32")


def _is_linear(node: gs.Node) -> bool:
    return operator(node).weighted or node.op == "MatMulNBits"


def _option(node: gs.Node) -> str:
    if node.op == "MatMulNBits":
        weights, activations = f"int{node.attrs.get('bits', 4)}", "none"
    else:
        formats = dict(_formats(node))
        weights, activations = formats.get(True, "none"), formats.get(False, "none")
        weights = _SCALED.get(weights, weights)
    if (weights, activations) == ("none", "none"):
        return FLOAT
    return next((name for name, o in OPTIONS.items() if (o.weights, o.activations) == (weights, activations)), _OTHER)


def _formats(node: gs.Node) -> Iterator[tuple[bool, str]]:
    """Whether it is a weight, and the type of the codes, of each operand of a node that is quantized."""
    for tensor in node.inputs[:2]:
        before = edit.producer(tensor)
        while before is not None and operator(before).copies:
            before = edit.producer(before.inputs[0])
        if before is not None and before.op == "DequantizeLinear":
            yield isinstance(before.inputs[0], gs.Constant), _codes(before)
    readers = edit.consumers(node.outputs[0]) if operator(node).kind == "gather" else []
    yield from ((True, _codes(reader)) for reader in readers if reader.op == "DequantizeLinear")


def _codes(node: gs.Node) -> str:
    """The type of what a DequantizeLinear reads."""
    before = edit.producer(node.inputs[0])
    if before is not None and before.op == DYNAMIC:
        return "fp4"
    found = str(edit.dtype(node.inputs[2] if edit.has_input(node, 2) else node.inputs[0]))
    return _FORMATS.get(found, found)
