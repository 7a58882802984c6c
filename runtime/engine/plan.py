"""Reading a TensorRT plan back: in which arithmetic does each Conv, Gemm and MatMul of the ONNX file really run?

A quantized ONNX node does not always become a quantized kernel: with a scale of shape [1] instead of a scalar, or a
weight scale on the wrong axis, TensorRT dequantizes everything and convolves in float without a warning. Two sources
tell:

``read_plan``       needs no GPU: the text of the compiled programs in a TensorRT-RTX plan, see ``program``. A plan that
                    does not look like that is reported as not readable, never as an error.

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
import mmap
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from channelfold.runtime.engine.kernels import Kernel, kernels
from channelfold.runtime.engine.program import (
    CODES,
    CONTRACTIONS,
    Call,
    Program,
    generated,
    layer_nodes,
    programs,
    same,
)

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

# Types as the inspector spells them ("Row major Int8 format", "Half", "FP32" …).
_INSPECTOR_TYPES: tuple[tuple[str, str], ...] = (
    (r"\bint8\b", "int8"), (r"\bfp8\b", "fp8"), (r"\bfp4\b", "fp4"), (r"\b(bf16|bfloat16)\b", "bf16"),
    (r"\b(half|fp16)\b", "fp16"), (r"\b(float|fp32)\b", "float"),
)  # fmt: skip

_CONTRACTION_LAYER = re.compile(r"conv|gemm|matrixmultiply|matmul", re.IGNORECASE)
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
        if self.arithmetic in CODES or not self.weight:
            return self.arithmetic
        return "dequantized first" if self.expanded else "fused"


@dataclass(frozen=True)
class PlanReport:
    """``nodes``: how each of the requested ONNX nodes runs. ``reason`` says why a plan is not ``readable``.

    ``kernels``: all that the engine launches; the inspector does not tell their products. ``sm``: that of the GPU, None
    for any.
    """

    readable: bool
    reason: str = ""
    source: Literal["plan", "inspector"] = "plan"
    nodes: dict[str, NodeRun] = field(default_factory=dict)
    kernels: list[Kernel] = field(default_factory=list)
    sm: int | None = None

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


def read_plan(
    plan: Path | bytes, nodes: Mapping[str, str], shapes: Mapping[str, Sequence[int]] = MappingProxyType({})
) -> PlanReport:
    """How ONNX nodes run in a tensorrt_rtx plan. Never raises: the report on an unreadable plan has a reason.

    ``nodes`` maps node names to the nodes' first outputs (see ``contractions``): TensorRT calls a node that has no name
    in the file ``node_of_OUTPUT``. Nodes that share a name are 'unknown' unless all of them run alike. ``shapes``:
    those of inputs with open sizes, for which the kernels are reported.
    """
    try:
        if isinstance(plan, bytes):
            found = list(programs(plan))
        else:
            with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                found = list(programs(data))
    except (OSError, ValueError) as error:
        return PlanReport(False, f"the plan cannot be read ({error})")
    ops = [_plan_op(program, call) for program in found for call in program.calls]
    report = _report(ops, nodes, "plan")
    sm = next((program.sm for program in found if program.sm), None)
    return replace(report, kernels=kernels(found, shapes), sm=sm) if report.readable else report


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


def _scaled_wrongly(program: Program, call: Call) -> bool:
    """Whether the result of a contraction is multiplied by more scales than it has columns, or rows.

    TensorRT pads the columns of some products, which then have a few more than there are scales.
    """
    widths = [program.tensors[name].dims for name in call.outputs if name in program.tensors]
    scales = [
        program.tensors[name].dims
        for reader in program.calls
        if set(reader.inputs) & set(call.outputs)
        for name in reader.inputs
        if _SCALES in name and name in program.tensors
    ]
    return any(
        isinstance(size, int) and isinstance(width, int) and size > width and [n for n in dims if n != 1] == [size]
        for result in widths
        for dims in scales
        for size, width in zip(dims[::-1], result[::-1], strict=False)
    )


def _plan_op(program: Program, call: Call) -> _Op:
    contraction = call.kind in CONTRACTIONS
    operands = tuple(map(program.type, call.operands))
    label = call.kind if contraction else f"{call.kind} {call.fields.get('name', '')}".strip()
    weight, expanded = program.held(call)
    arithmetic = program.arithmetic(call)
    wrong = contraction and arithmetic in CODES and _scaled_wrongly(program, call)
    return _Op(label, operands, arithmetic, contraction, call.nodes, weight, expanded, wrong)


def _inspector_ops(engine: dict[str, Any]) -> Iterator[_Op]:
    for layer in engine["Layers"]:
        if not isinstance(layer, dict):
            raise ValueError("only layer names: the engine was built without detailed profiling verbosity")
        kind = str(layer.get("LayerType", "?"))
        operands = tuple(str(tensor.get("Format/Datatype", "?")) for tensor in layer.get("Inputs", ()))
        known = [_inspector_type(operand) for operand in operands]
        contraction = bool(_CONTRACTION_LAYER.search(kind))
        # Only the first input is an operand for sure: weights are not listed, and a fused Add brings its own input.
        arithmetic = same(known[:1]) if contraction else generated(known)
        yield _Op(kind, operands, arithmetic, contraction, layer_nodes(str(layer.get("Metadata", ""))))


def _inspector_type(text: str) -> str:
    return next((known for pattern, known in _INSPECTOR_TYPES if re.search(pattern, text, re.IGNORECASE)), "unknown")
