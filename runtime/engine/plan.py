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
memory: an int8 weight that is dequantized before a float MatMul counts as float. Of a weight that the plan keeps in few
bits the report says who reads the codes: the kernel that multiplies, or a kernel in front, which writes out the whole
weight on every call. Small in memory is not fast then.

One form TensorRT builds and computes wrongly, without a warning: a weight with several scales along its inputs, times
an activation that is quantized. The product of integers is multiplied by a row of (K / g) N scales, of which the kernel
reads the first N. ``blocks`` finds this form in a graph, the plan shows the row.
"""

from __future__ import annotations

import json
import math
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
    "int8": "int8", "fp8_e4m3": "fp8", "fp4_e2m1": "fp4", "int4": "int4", "half": "fp16", "bf16": "bf16",
    "float": "float",
}  # fmt: skip
_INSPECTOR_TYPES: tuple[tuple[str, str], ...] = (
    (r"\bint8\b", "int8"), (r"\bfp8\b", "fp8"), (r"\bfp4\b", "fp4"), (r"\b(bf16|bfloat16)\b", "bf16"),
    (r"\b(half|fp16)\b", "fp16"), (r"\b(float|fp32)\b", "float"),
)  # fmt: skip

# Ops that multiply and sum their first two operands; anything else that claims a node is a fused or generated kernel.
_CONTRACTIONS = {"corrltn", "convltn", "deconvolution", "fully_connected"}
_CONTRACTION_LAYER = re.compile(r"conv|gemm|matrixmultiply|matmul", re.IGNORECASE)

_STRING = r'"(?:[^"\\]|\\.)*+"'
_FLAT = rf"\{{(?:[^\"{{}}]|{_STRING})*+\}}"
_GROUP = rf"\{{(?:[^\"{{}}]|{_STRING}|{_FLAT})*+\}}"
_ENTRY = re.compile(rf"^ +(\w+)=\{{((?:[^\"{{}}]|{_STRING}|{_GROUP})*+)\}}", re.MULTILINE | re.DOTALL)
_FIELD = re.compile(rf"(\w+) ?= ?({_STRING}|{_GROUP}|[^\s{{}}]*)", re.DOTALL)
_QUOTED = re.compile(_STRING, re.DOTALL)
_LAYER = "[ONNX Layer: "
_CODES = ("int8", "int4", "fp8", "fp4")
_OPEN = -1  # a size that is a tensor of its own
_SCALES = "folded"  # in the name of the product of the scales of two operands


@dataclass(frozen=True)
class NodeRun:
    """How one ONNX node runs: its arithmetic, the op of the plan that computes it, the types of its operands.

    ``arithmetic`` is int8, fp8, fp4, fp16, bf16, float (float32 or TF32), unknown. ``op`` is empty for a node that the
    plan does not name, because TensorRT has removed the node or folded it into a constant. ``weight`` is the type of a
    weight that the plan keeps as int8, int4, fp8 or fp4, and ``expanded`` the type into which a kernel in front writes
    it; empty where the kernel that multiplies reads the codes. ``wrong``: all blocks of the weight get the scales of
    the first block.
    """

    arithmetic: str
    op: str = ""
    operands: tuple[str, ...] = ()
    weight: str = ""
    expanded: str = ""
    wrong: bool = False

    @property
    def verdict(self) -> str:
        """wrong, the arithmetic in few bits, "dequantized first", "fused" (codes, float arithmetic), or arithmetic."""
        if self.wrong:
            return "wrong"
        if self.arithmetic in _CODES or not self.weight:
            return self.arithmetic
        return "dequantized first" if self.expanded else "fused"


@dataclass(frozen=True)
class PlanReport:
    """``nodes``: how each of the requested ONNX nodes runs. ``reason`` says why a plan is not ``readable``."""

    readable: bool
    reason: str = ""
    source: Literal["plan", "inspector"] = "plan"
    nodes: dict[str, NodeRun] = field(default_factory=dict)

    @property
    def wrong(self) -> list[str]:
        """The nodes that the engine computes wrongly."""
        return [name for name, run in self.nodes.items() if run.wrong]


@dataclass(frozen=True)
class _Op:
    kind: str
    operands: tuple[str, ...]  # types, as the source spells them
    arithmetic: str
    contraction: bool
    nodes: tuple[str, ...]
    weight: str = ""
    expanded: str = ""
    wrong: bool = False


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
    """How a node runs, from all ops that name the node. Where some of the ops multiply, only these count.

    The codes of the weight are seen where the kernel is called, which may be outside the program that multiplies.
    """
    first = sorted(ops, key=lambda op: not op.contraction)
    held = next(((op.weight, op.expanded) for op in first if op.weight), ("", ""))
    wrong = any(op.wrong for op in ops)
    ops = [op for op in ops if op.contraction] or ops
    if not ops:
        return NodeRun("unknown")
    if len({op.arithmetic for op in ops}) > 1:
        return NodeRun("unknown", " + ".join(sorted({op.kind for op in ops})), (), *held, wrong)
    return NodeRun(ops[0].arithmetic, ops[0].kind, ops[0].operands, *held, wrong)


@dataclass(frozen=True)
class _Call:
    """An op of a program as the text has it."""

    kind: str
    fields: dict[str, str]
    inputs: list[str]
    outputs: list[str]


@dataclass(frozen=True)
class _Tensor:
    type: str
    dims: tuple[int, ...]
    constant: bool


@dataclass
class _Program:
    """The tensors of one program, and the calls in order."""

    tensors: dict[str, _Tensor] = field(default_factory=dict)
    calls: list[_Call] = field(default_factory=list)
    writers: dict[str, _Call] = field(default_factory=dict)

    def type(self, name: str) -> str:
        return self.tensors[name].type if name in self.tensors else "?"

    def codes(self, name: str, depth: int = 8) -> str | None:
        """The type of the codes that a tensor is made of, by constants alone; "" for other constants, else None."""
        tensor = self.tensors.get(name)
        if tensor is not None and tensor.constant:
            kind = _PLAN_TYPES.get(tensor.type, "")
            return kind if kind in _CODES else ""
        writer = self.writers.get(name)
        if writer is None or not writer.inputs or not depth:
            return None
        found = [self.codes(source, depth - 1) for source in writer.inputs]
        return None if None in found else next(filter(None, found), "")

    def held(self, call: _Call, operands: list[str]) -> tuple[str, str]:
        """The type of the codes of the weight that a call reads, and the type into which they were written before."""
        origins = {name: self.codes(name) for name in operands}
        if all(origin is not None for origin in origins.values()):
            return "", ""  # writes out a weight, does not multiply
        for name, origin in origins.items():
            if origin:
                return origin, "" if self.tensors[name].constant else self.type(name)
        return "", ""

    def scaled_wrongly(self, call: _Call) -> bool:
        """Whether the result of a contraction is multiplied by more scales than it has columns, or rows."""
        widths = [self.tensors[name].dims for name in call.outputs if name in self.tensors]
        scales = [
            self.tensors[name].dims
            for reader in self.calls
            if set(reader.inputs) & set(call.outputs)
            for name in reader.inputs
            if _SCALES in name and name in self.tensors
        ]
        return any(
            size > 1 and math.prod(dims) == size and width not in (size, _OPEN)
            for result in widths
            for dims in scales
            for size, width in zip(dims[::-1], result[::-1], strict=False)
        )


def _plan_ops(plan: bytes | mmap.mmap) -> Iterator[_Op]:
    for start in re.finditer(rb"header \{\n  version = \d+\n", plan):
        end = plan.find(b"\0", start.end())
        program = _program(plan[start.start() : end if end >= 0 else len(plan)].decode("utf-8", "surrogateescape"))
        yield from (_plan_op(program, call) for call in program.calls if "layers" in call.fields)


def _program(text: str) -> _Program:
    program = _Program()
    for kind, body in _ENTRY.findall(text):
        fields = dict(_FIELD.findall(body))
        if kind in ("tensor", "sub_tensor"):
            sizes = fields.get("dims", "").strip("{} ").split()
            dims = tuple(int(size) if size.isdecimal() else _OPEN for size in sizes)
            constant = int(fields.get("const_payload_size") or 0) > 0
            program.tensors[_unquote(fields.get("name", ""))] = _Tensor(fields.get("type", "?"), dims, constant)
        elif "layers" in fields:
            inputs, outputs = (
                [_unquote(name) for name in _QUOTED.findall(fields.get(key) or fields.get(f"{key}_args") or "")]
                for key in ("input", "output")
            )
            call = _Call(kind, fields, inputs, outputs)
            program.calls.append(call)
            program.writers |= dict.fromkeys(outputs, call)
    return program


def _plan_op(program: _Program, call: _Call) -> _Op:
    contraction = call.kind in _CONTRACTIONS
    names = call.inputs[:2] if contraction else call.inputs
    operands = tuple(map(program.type, names))
    known = [_PLAN_TYPES.get(operand, "unknown") for operand in operands]
    label = call.kind if contraction else f"{call.kind} {call.fields.get('name', '')}".strip()
    weight, expanded = program.held(call, names)
    data = [kind for kind, name in zip(known, names, strict=True) if not (weight and program.codes(name))]
    arithmetic = _same(known) if contraction else _generated(data)
    wrong = contraction and arithmetic in _CODES and program.scaled_wrongly(call)
    nodes = _layer_nodes(_unquote(call.fields["layers"]))
    return _Op(label, operands, arithmetic, contraction, nodes, weight, expanded, wrong)


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
