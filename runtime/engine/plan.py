"""Reading a TensorRT plan back: in which arithmetic does each Conv, Gemm and MatMul of the ONNX file really run?

A quantized ONNX node does not always become a quantized kernel: with a scale of shape [1] instead of a scalar, or a
weight scale on the wrong axis, TensorRT dequantizes everything and convolves in float without a warning. Two sources
tell:

``read_plan``       needs no GPU. A TensorRT-RTX plan holds its compiled programs as text (tensorrt_rtx 1.7.1)::

    descriptors {
      tensor={ dims={ 64 32 3 3 } name="__mye224dconst" type=int8 … }
    main {
      corrltn={ name="conv1" input={"x" "__mye224dconst" …} output={"y"} layers="[ONNX Layer: conv1]␟[ONNX Layer: dq]"}

    Every tensor with its type, then every op with its operands and the ONNX nodes it was made from (U+001F separates).
    A name in quotes has ``"`` and ``\\`` escaped by a backslash. Fused kernels built at load time (``runtime_fusion``)
    have a program of their own, which holds the op that multiplies. The format is undocumented, so what does not look
    like this is reported as not readable, never as an error.

``read_inspector``  reads the JSON that TensorRT's EngineInspector writes on a machine with a GPU (see
    ``tensorrt.inspect``).

The arithmetic of an ONNX node is the type of the two operands that are multiplied, not the type of the weight in
memory: an int8 weight that is dequantized before a float MatMul counts as float.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

# Types as the plan's text spells them, then as the inspector does ("Row major Int8 format", "Half", "FP32" …).
_PLAN_TYPES: dict[str, str] = {
    "int8": "int8", "fp8_e4m3": "fp8", "fp4_e2m1": "fp4", "half": "fp16", "bf16": "bf16", "float": "float",
}  # fmt: skip
_INSPECTOR_TYPES: tuple[tuple[str, str], ...] = (
    (r"\bint8\b", "int8"), (r"\bfp8\b", "fp8"), (r"\bfp4\b", "fp4"), (r"\b(bf16|bfloat16)\b", "bf16"),
    (r"\b(half|fp16)\b", "fp16"), (r"\b(float|fp32)\b", "float"),
)  # fmt: skip

# Ops that multiply and sum their first two operands; anything else that claims a node is a fused or generated kernel.
_CONTRACTIONS = {"corrltn", "convltn", "deconvolution", "fully_connected"}
_CONTRACTION_LAYER = re.compile(r"conv|gemm|matrixmultiply|matmul", re.IGNORECASE)

_STRING = r'"(?:[^"\\]|\\.)*+"'
_GROUP = rf"\{{(?:[^\"{{}}]|{_STRING})*+\}}"
_ENTRY = re.compile(rf"^ +(\w+)=\{{((?:[^\"{{}}]|{_STRING}|{_GROUP})*+)\}}", re.MULTILINE | re.DOTALL)
_FIELD = re.compile(rf"(\w+) ?= ?({_STRING}|{_GROUP}|[^\s{{}}]*)", re.DOTALL)
_QUOTED = re.compile(_STRING, re.DOTALL)
_LAYER = "[ONNX Layer: "


@dataclass(frozen=True)
class NodeRun:
    """How one ONNX node runs: its arithmetic, the op of the plan that computes it, the types of its operands.

    ``arithmetic`` is int8, fp8, fp4, fp16, bf16, float (float32 or TF32), unknown. ``op`` is empty for a node that the
    plan does not name, because TensorRT has removed the node or folded it into a constant.
    """

    arithmetic: str
    op: str = ""
    operands: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlanReport:
    """``nodes``: how each of the requested ONNX nodes runs. ``reason`` says why a plan is not ``readable``."""

    readable: bool
    reason: str = ""
    source: Literal["plan", "inspector"] = "plan"
    nodes: dict[str, NodeRun] = field(default_factory=dict)


@dataclass(frozen=True)
class _Op:
    kind: str
    operands: tuple[str, ...]  # types, as the source spells them
    arithmetic: str
    contraction: bool
    nodes: tuple[str, ...]


def contractions(graph: gs.Graph) -> dict[str, str]:
    """By name, the first output of every Conv, ConvTranspose, Gemm and MatMul, in subgraphs too."""
    found = {}
    for node in graph.nodes:
        if node.op in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            found[node.name] = node.outputs[0].name
        for value in node.attrs.values():
            if isinstance(value, type(graph)):
                found |= contractions(value)
    return found


def read_plan(plan: Path | bytes, nodes: Mapping[str, str]) -> PlanReport:
    """How ONNX nodes run in a tensorrt_rtx plan. Never raises: the report on an unreadable plan has a reason.

    ``nodes`` maps node names to the nodes' first outputs (see ``contractions``): TensorRT calls a node that has no name
    in the file ``node_of_OUTPUT``. Nodes that share a name are 'unknown' unless all of them run alike.
    """
    try:
        if isinstance(plan, bytes):
            return _report(list(_plan_ops(plan)), nodes, "plan")
        with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _report(list(_plan_ops(data)), nodes, "plan")
    except (OSError, ValueError) as error:
        return PlanReport(False, f"the plan cannot be read ({error})")


def read_inspector(layers: str, nodes: Mapping[str, str]) -> PlanReport:
    """As ``read_plan``, from EngineInspector's JSON of an engine built with detailed profiling verbosity."""
    try:
        return _report(list(_inspector_ops(json.loads(layers))), nodes, "inspector")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return PlanReport(False, f"the inspector's JSON has an unknown form ({error})", "inspector")


def _report(ops: list[_Op], nodes: Mapping[str, str], source: Literal["plan", "inspector"]) -> PlanReport:
    by_node: dict[str, list[_Op]] = {}
    for op in ops:
        for node in op.nodes:
            by_node.setdefault(node, []).append(op)
    if not by_node:
        return PlanReport(False, "it names no ONNX node in a form known here (known: tensorrt_rtx 1.7)", source)
    runs = {name: _run(by_node.get(f"node_of_{out}") or by_node.get(name, [])) for name, out in nodes.items()}
    return PlanReport(True, "", source, runs)


def _run(ops: list[_Op]) -> NodeRun:
    """How a node runs, from all ops that name the node. Where some of the ops multiply, only these count."""
    ops = [op for op in ops if op.contraction] or ops
    if not ops:
        return NodeRun("unknown")
    if len({op.arithmetic for op in ops}) > 1:
        return NodeRun("unknown", " + ".join(sorted({op.kind for op in ops})))
    return NodeRun(ops[0].arithmetic, ops[0].kind, ops[0].operands)


def _plan_ops(plan: bytes | mmap.mmap) -> Iterator[_Op]:
    for start in re.finditer(rb"header \{\n  version = \d+\n", plan):
        end = plan.find(b"\0", start.end())
        text = plan[start.start() : end if end >= 0 else len(plan)].decode("utf-8", "surrogateescape")
        types: dict[str, str] = {}
        for kind, body in _ENTRY.findall(text):
            fields = dict(_FIELD.findall(body))
            if kind in ("tensor", "sub_tensor"):
                types[_unquote(fields.get("name", ""))] = fields.get("type", "?")
            elif "layers" in fields:
                inputs = fields.get("input") or fields.get("input_args") or ""
                yield _plan_op(kind, fields, [types.get(_unquote(name), "?") for name in _QUOTED.findall(inputs)])


def _plan_op(kind: str, fields: dict[str, str], inputs: list[str]) -> _Op:
    contraction = kind in _CONTRACTIONS
    operands = tuple(inputs[:2] if contraction else inputs)
    known = [_PLAN_TYPES.get(operand, "unknown") for operand in operands]
    label = kind if contraction else f"{kind} {fields.get('name', '')}".strip()
    arithmetic = _same(known) if contraction else _generated(known)
    return _Op(label, operands, arithmetic, contraction, _layer_nodes(_unquote(fields["layers"])))


def _inspector_ops(engine: dict[str, Any]) -> Iterator[_Op]:
    for layer in engine["Layers"]:
        if not isinstance(layer, dict):
            raise ValueError("only layer names: the engine was built without detailed profiling verbosity")
        kind = str(layer.get("LayerType", "?"))
        operands = tuple(str(tensor.get("Format/Datatype", "?")) for tensor in layer.get("Inputs", ()))
        known = [_inspector_type(operand) for operand in operands]
        contraction = bool(_CONTRACTION_LAYER.search(kind))
        # Only the first input is an operand for sure: weights are not listed, and a fused Add brings its own input.
        arithmetic = _same(known[:1]) if contraction else _generated(known)
        yield _Op(kind, operands, arithmetic, contraction, _layer_nodes(str(layer.get("Metadata", ""))))


def _inspector_type(text: str) -> str:
    return next((known for pattern, known in _INSPECTOR_TYPES if re.search(pattern, text, re.IGNORECASE)), "unknown")


def _same(types: list[str]) -> str:
    return types[0] if len(set(types)) == 1 else "unknown"


def _generated(types: list[str]) -> str:
    """The arithmetic of a fused kernel (attention, a matrix-vector product …): the type of its data, if all agree.

    With int8 data the arithmetic is unknown: the kernel may dequantize the data first. Other integers are shapes.
    """
    data = [kind for kind in types if kind != "unknown"]
    return _same(data) if "int8" not in data else "unknown"


def _layer_nodes(metadata: str) -> tuple[str, ...]:
    """The node names in ``[ONNX Layer: a]␟[ONNX Layer: b]``; a name may hold brackets itself.

    A node in a body is called ``a | graph (then_branch) | b (If)``, which counts as ``a`` as well.
    """
    parts = re.split("[\x1e\x1f]", metadata) if re.search("[\x1e\x1f]", metadata) else [metadata]
    named = [p.removeprefix(_LAYER).removesuffix("]") for p in parts if p.startswith(_LAYER) and p.endswith("]")]
    return tuple(dict.fromkeys(name for full in named for name in (full, full.partition(" | ")[0])))


def _unquote(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text[1:-1], flags=re.DOTALL) if text.startswith('"') else text
