"""The compiled programs in a TensorRT-RTX plan: every tensor and every kernel, read from their text.

A plan of tensorrt_rtx 1.7.1 holds its programs as text::

    header {
      accelerators={sm89 }
    descriptors {
      tensor={ dims={ 64 32 3 3 } name="__mye224dconst" type=int8 const_payload_size=18432 … }
      sub_tensor={ base="x" dims={ 1 "size" 384 } name="y" … }
    main {
      corrltn={ name="conv1" input={"x" "__mye224dconst" …} output={"y"} layers="[ONNX Layer: conv1]␟[ONNX Layer: dq]"}
    shape_main {
      mul={ output={"size" } input={"n" "__s^384i64" } }

Every tensor with its type, every kernel with its operands and the ONNX nodes that the kernel was made from (U+001F
separates them), then the integer arithmetic on open sizes. A name in quotes has ``"`` and ``\\`` escaped by a
backslash. A kernel that is built at load time (``runtime_fusion``) has an ``inner`` program, which holds the op that
multiplies; its number is in the field ``binary``. The format is undocumented: what does not look like this is left out.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

# Types as the plan's text spells them, and as reports do.
TYPES: dict[str, str] = {
    "int8": "int8", "fp8_e4m3": "fp8", "fp4_e2m1": "fp4", "int4": "int4", "half": "fp16", "bf16": "bf16",
    "float": "float",
}  # fmt: skip
CODES = ("int8", "int4", "fp8", "fp4")
# Ops that multiply and sum their first two operands; anything else that claims a node is a fused or generated kernel.
CONTRACTIONS = {"corrltn", "convltn", "deconvolution", "fully_connected"}

_STRING = r'"(?:[^"\\]|\\.)*+"'
_FLAT = rf"\{{(?:[^\"{{}}]|{_STRING})*+\}}"
_GROUP = rf"\{{(?:[^\"{{}}]|{_STRING}|{_FLAT})*+\}}"
_ENTRY = re.compile(rf"^ +(\w+)=\{{((?:[^\"{{}}]|{_STRING}|{_GROUP})*+)\}}", re.MULTILINE | re.DOTALL)
_FIELD = re.compile(rf"(\w+) ?= ?({_STRING}|{_GROUP}|[^\s{{}}]*)", re.DOTALL)
_QUOTED = re.compile(_STRING, re.DOTALL)
_SIZE = re.compile(rf"{_STRING}|-?\w+", re.DOTALL)
_SHAPES = re.compile(r"^shape_main \{$", re.MULTILINE)
_INNER = "accelerators={*}"
_PORTABLE = "hardware_forward_compatibility=1"
_SM = re.compile(r"accelerators=\{sm(\d+)")
_LAYER = "[ONNX Layer: "

Size = int | str  # a str is the name of the tensor that holds the size


@dataclass(frozen=True)
class Call:
    """An op of a program as the text has it. ``nodes``: the ONNX nodes that the op was made from."""

    kind: str
    fields: dict[str, str]
    inputs: list[str]
    outputs: list[str]

    @property
    def nodes(self) -> tuple[str, ...]:
        return layer_nodes(unquote(self.fields.get("layers", "")))

    @property
    def operands(self) -> list[str]:
        """The tensors that are multiplied, or all that a kernel of another kind reads."""
        return self.inputs[:2] if self.kind in CONTRACTIONS else self.inputs


@dataclass(frozen=True)
class Tensor:
    type: str
    dims: tuple[Size, ...]
    constant: bool


@dataclass
class Program:
    """The tensors of one program, and the calls in order. ``shapes``: the calls that compute open sizes.

    ``inner``: whether a kernel of another program runs this one. ``sm``: the GPU that the program is for, None for any.
    """

    inner: bool = False
    sm: int | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    shapes: list[Call] = field(default_factory=list)
    writers: dict[str, Call] = field(default_factory=dict)

    def type(self, name: str) -> str:
        return self.tensors[name].type if name in self.tensors else "?"

    def codes(self, name: str, depth: int = 8) -> str | None:
        """The type of the codes that a tensor is made of, by constants alone; "" for other constants, else None."""
        tensor = self.tensors.get(name)
        if tensor is not None and tensor.constant:
            kind = TYPES.get(tensor.type, "")
            return kind if kind in CODES else ""
        writer = self.writers.get(name)
        if writer is None or not writer.inputs or not depth:
            return None
        found = [self.codes(source, depth - 1) for source in writer.inputs]
        return None if None in found else next(filter(None, found), "")

    def held(self, call: Call) -> tuple[str, str]:
        """The type of the codes of the weight that a call reads, and the type into which they were written before."""
        origins = {name: self.codes(name) for name in call.operands}
        if all(origin is not None for origin in origins.values()):
            return "", ""  # writes out a weight, does not multiply
        for name, origin in origins.items():
            if origin:
                return origin, "" if self.tensors[name].constant else self.type(name)
        return "", ""

    def arithmetic(self, call: Call) -> str:
        """The type in which a call computes, "unknown" where its operands do not agree."""
        known = {name: TYPES.get(self.type(name), "unknown") for name in call.operands}
        if call.kind in CONTRACTIONS:
            return same(known[name] for name in call.operands)
        weight, _ = self.held(call)
        return generated(known[name] for name in call.operands if not (weight and self.codes(name)))


def same(types: Iterable[str]) -> str:
    found = set(types)
    return found.pop() if len(found) == 1 else "unknown"


def generated(types: Iterable[str]) -> str:
    """The arithmetic of a fused kernel (attention, a matrix-vector product …): the type of its data, if all agree.

    With int8 data the arithmetic is unknown: the kernel may dequantize the data first. Other integers are shapes.
    """
    data = {kind for kind in types if kind != "unknown"}
    return same(data) if "int8" not in data else "unknown"


def programs(plan: bytes | mmap.mmap) -> Iterator[Program]:
    """The programs of a plan in order, every one in front of its inner ones."""
    for start in re.finditer(rb"header \{\n  version = \d+\n", plan):
        end = plan.find(b"\0", start.end())
        yield _program(plan[start.start() : end if end >= 0 else len(plan)].decode("utf-8", "surrogateescape"))


def _program(text: str) -> Program:
    main, *shapes = _SHAPES.split(text, maxsplit=1)
    named = None if _PORTABLE in main else _SM.search(main)
    program = Program(inner=_INNER in main, sm=int(named[1]) if named else None)
    for kind, body in _ENTRY.findall(main):
        fields = dict(_FIELD.findall(body))
        if kind in ("tensor", "sub_tensor"):
            dims = tuple(
                int(size) if size.isdecimal() else unquote(size) for size in _SIZE.findall(fields.get("dims", ""))
            )
            constant = int(fields.get("const_payload_size") or 0) > 0
            program.tensors[unquote(fields.get("name", ""))] = Tensor(fields.get("type", "?"), dims, constant)
        elif "layers" in fields:
            call = _call(kind, fields)
            program.calls.append(call)
            program.writers |= dict.fromkeys(call.outputs, call)
    program.shapes = [_call(kind, dict(_FIELD.findall(body))) for part in shapes for kind, body in _ENTRY.findall(part)]
    return program


def _call(kind: str, fields: dict[str, str]) -> Call:
    inputs, outputs = (
        [unquote(name) for name in _QUOTED.findall(fields.get(key) or fields.get(f"{key}_args") or "")]
        for key in ("input", "output")
    )
    return Call(kind, fields, inputs, outputs)


def layer_nodes(metadata: str) -> tuple[str, ...]:
    """The node names in ``[ONNX Layer: a]␟[ONNX Layer: b]``; a name may hold brackets itself.

    A node in a body is called ``a | graph (then_branch) | b (If)``, which counts as ``a`` as well.
    """
    parts = re.split("[\x1e\x1f]", metadata) if re.search("[\x1e\x1f]", metadata) else [metadata]
    named = [p.removeprefix(_LAYER).removesuffix("]") for p in parts if p.startswith(_LAYER) and p.endswith("]")]
    return tuple(dict.fromkeys(name for full in named for name in (full, full.partition(" | ")[0])))


def unquote(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text[1:-1], flags=re.DOTALL) if text.startswith('"') else text
