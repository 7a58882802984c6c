"""The kernels that an engine launches, with their products and the bytes that they read and write, from its plan.

    products     MACs of convolutions, matrix products and fused attention, in the type that the plan says
    traffic      bytes of all tensors that the kernel reads and writes, each once; of a table that is gathered from as
                 many as the result has

Open sizes are computed as the engine computes them: from the shapes of its inputs, by the plan's own integer program.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from channelfold.runtime.engine.program import CONTRACTIONS, TYPES, Call, Program, Size, Tensor, same, unquote

_BITS = {"int8": 8, "uint8": 8, "bool": 8, "fp8_e4m3": 8, "fp4_e2m1": 4, "int4": 4, "half": 16, "bf16": 16}
_BITS |= {"float": 32, "int32": 32, "int64": 64, "double": 64}
_CONSTANT = "__s^"  # how names of constant sizes begin: __s^384i64, __s^M1i64
_ATTENTION = "mha"  # in the name of a kernel that multiplies queries with keys and probabilities with values
_SHAPE_CALL = "shape_call"  # no kernel: where the integer program runs
_GATHERS = "Gath"  # in the name of a kernel that reads rows of tables


@dataclass(frozen=True)
class Data:
    """A tensor that a kernel reads or writes: its type, its bytes, and whether it is a constant."""

    type: str
    bytes: int
    constant: bool


@dataclass(frozen=True)
class Kernel:
    """A kernel. ``nodes``: the ONNX nodes that it was made from. ``macs``: of products in the type ``arithmetic``.

    ``arithmetic`` is empty for a kernel without products. ``measured``: whether all sizes are known.
    """

    name: str
    nodes: tuple[str, ...]
    arithmetic: str
    macs: int
    data: tuple[Data, ...]
    measured: bool = True

    @property
    def traffic(self) -> int:
        return sum(one.bytes for one in self.data)


def kernels(programs: Sequence[Program], shapes: Mapping[str, Sequence[int]]) -> list[Kernel]:
    """The kernels of a plan in order. ``shapes``: those of the inputs whose sizes the model leaves open."""
    found: list[Kernel] = []
    for number, program in enumerate(programs):
        if program.inner:
            continue
        inner = []
        for other in programs[number + 1 :]:
            if not other.inner:
                break
            inner.append(other)
        sizes = _sizes(program, shapes)
        found += [_kernel(program, call, inner, sizes) for call in program.calls if call.kind != _SHAPE_CALL]
    return found


def _kernel(program: Program, call: Call, inner: Sequence[Program], sizes: Mapping[str, int]) -> Kernel:
    name = unquote(call.fields.get("name", call.kind))
    whole, contractions = program, [call] if call.kind in CONTRACTIONS else []
    number = call.fields.get("binary", "")
    if call.kind == "runtime_fusion" and number.isdecimal() and int(number) < len(inner):
        whole = inner[int(number)]
        contractions = [op for op in whole.calls if op.kind in CONTRACTIONS and set(op.nodes) <= set(call.nodes)]
    macs = [_macs(whole, op, sizes) for op in contractions]
    arithmetic = same(whole.arithmetic(op) for op in contractions) if contractions else ""
    if _ATTENTION in name:
        macs, arithmetic = [_attention(program, call, sizes)], program.arithmetic(call)
    known = {n: program.tensors[n] for n in (*call.inputs, *call.outputs) if n in program.tensors}
    data = [_data(tensor, sizes) for tensor in known.values()]
    written = sum(one.bytes for n, one in zip(known, data, strict=True) if one and n in call.outputs)
    read = [one for one in data if one]
    if _GATHERS in name:
        read = [Data(one.type, min(one.bytes, written), True) if one.constant else one for one in read]
    return Kernel(
        name,
        call.nodes,
        arithmetic,
        sum(count or 0 for count in macs),
        tuple(read),
        None not in (*macs, *data),
    )


def _data(tensor: Tensor, sizes: Mapping[str, int]) -> Data | None:
    """The bytes of a tensor; None where its sizes or its type are unknown."""
    dims = _dims(tensor.dims, sizes)
    if dims is None or tensor.type not in _BITS:
        return None
    return Data(TYPES.get(tensor.type, tensor.type), math.prod(dims) * _BITS[tensor.type] // 8, tensor.constant)


def _dims(dims: Iterable[Size], sizes: Mapping[str, int]) -> list[int] | None:
    found = [size if isinstance(size, int) else sizes.get(size) for size in dims]
    return None if None in found else [size for size in found if size is not None]


def _macs(program: Program, call: Call, sizes: Mapping[str, int]) -> int | None:
    """The MACs of a contraction; None where sizes are unknown."""
    tensors = [program.tensors.get(name) for name in (*call.operands, *call.outputs[:1])]
    known = [tensor and _dims(tensor.dims, sizes) for tensor in tensors]
    if len(known) != 3 or not all(known):
        return None
    data, weight, result = (dims or [] for dims in known)
    if call.kind == "deconvolution":
        return math.prod(data) * math.prod(weight[1:])
    if call.kind == "fully_connected":
        return math.prod(result) * data[-2 if call.fields.get("trA") == "true" and len(data) > 1 else -1]
    return math.prod(result) * math.prod(weight[1:])


def _attention(program: Program, call: Call, sizes: Mapping[str, int]) -> int | None:
    """The MACs of queries [n, m, d], keys [n, d, k] and values [n, k, v]; None for operands of another form."""
    tensors = [program.tensors[name] for name in call.inputs if name in program.tensors]
    known = [_dims(tensor.dims, sizes) for tensor in tensors if len(tensor.dims) > 2][:3]
    if len(known) != 3 or None in known:
        return None
    query, keys, values = (dims or [] for dims in known)
    length = values[-2]
    return math.prod(query) * length + math.prod(query[:-1]) * length * values[-1] if length in keys[-2:] else None


def _sizes(program: Program, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """The open sizes of a program by name, as far as the shapes of the inputs determine them."""
    known: dict[str, int] = {}
    for name, shape in shapes.items():
        tensor = program.tensors.get(f"{name}.1") or program.tensors.get(name)
        if tensor is not None and len(tensor.dims) == len(shape):
            known |= {dim: size for dim, size in zip(tensor.dims, shape, strict=True) if isinstance(dim, str)}
    left = list(program.shapes)
    while left:
        waiting = [call for call in left if not _computed(call, known)]
        if len(waiting) == len(left):
            break
        left = waiting
    return known


def _computed(call: Call, known: dict[str, int]) -> bool:
    """Computes one size, if what it is computed from is known. A copy tells its source as well."""
    if call.kind == "copy" and len(call.inputs) == len(call.outputs) == 1:
        source, target = call.inputs[0], call.outputs[0]
        if source not in known and target in known:
            known[source] = known[target]
    values = [_constant(name) if name.startswith(_CONSTANT) else known.get(name) for name in call.inputs]
    found = [value for value in values if value is not None]
    if not values or len(found) < len(values) or len(call.outputs) != 1:
        return False
    first, *others = found
    match call.kind, others:
        case "copy", []:
            result = first
        case "mul", _:
            result = math.prod(found)
        case "add", _:
            result = sum(found)
        case "sub", [other]:
            result = first - other
        case "div", [other] if other:
            result = abs(first) // abs(other) * (-1 if (first < 0) != (other < 0) else 1)  # as in C
        case "max", _:
            result = max(found)
        case "min", _:
            result = min(found)
        case _:
            return False
    known[call.outputs[0]] = result
    return True


def _constant(name: str) -> int | None:
    digits = name.removeprefix(_CONSTANT).replace("M", "-", 1).partition("i")[0]
    return int(digits) if digits.lstrip("-").isdecimal() else None
