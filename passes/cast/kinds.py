"""The types that values have, and those that operators allow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs

from channelfold.runtime.errors import ModelError
from channelfold.runtime.io import edit
from channelfold.runtime.io.bodies import Body, bodies
from channelfold.runtime.io.files import infer_shapes, session

FLOAT = np.dtype(np.float32)
LAST_OPSET = 24  # TensorRT's parser reads up to 25
TYPE_ATTRIBUTES = {"Cast": "to", "EyeLike": "dtype"}  # of operators whose result has the type that an attribute says
_FLOATS = {"Resize": (1, 2)}  # inputs that stay float32, whatever ONNX allows: no value flows from them
_KEPT_OUTPUTS = {"LayerNormalization": (1, 2)}  # of the type that stash_type says


@dataclass(frozen=True)
class Half:
    """A type of 16 bits: its largest and its smallest normal number, the largest relative L2 error of rounding."""

    name: str
    dtype: np.dtype
    limit: float
    smallest: float
    rounding: float

    @property
    def code(self) -> int:
        """The number of the type in ONNX."""
        return onnx.helper.np_dtype_to_tensor_dtype(self.dtype)

    @property
    def onnx(self) -> str:
        """The name that ONNX has for tensors of the type."""
        return f"tensor({self.name})"

    def rounded(self, values: np.ndarray) -> np.ndarray:
        """Values as the type holds them, in float32; infinite where they overflow."""
        with np.errstate(over="ignore"):
            return np.asarray(values, np.float32).astype(self.dtype).astype(np.float32)


HALVES = {
    "float16": Half("float16", np.dtype(np.float16), 65504.0, 2.0**-14, 2.0**-10),
    "bfloat16": Half("bfloat16", np.dtype(ml_dtypes.bfloat16), float(ml_dtypes.finfo("bfloat16").max), 2.0**-126, 1.0),
}


class Kinds:
    """The types of all tensors of a model, in its bodies too, as far as inference or else ONNX Runtime knows them."""

    def __init__(self, graph: gs.Graph):
        self._known: dict[int, np.dtype | None] = {}
        infer_shapes(graph)
        self._take(graph)
        untyped = [t.name for node in graph.nodes for t in node.outputs if t.name and self._known.get(id(t)) is None]
        if untyped:
            self._ask(graph, untyped)
        for body in all_bodies(graph):
            with body.apart() as part:
                infer_shapes(part)
                self._take(part)

    def of(self, tensor: gs.Tensor) -> np.dtype | None:
        return edit.dtype(tensor) if isinstance(tensor, gs.Constant) else self._known.get(id(tensor))

    def is_float32(self, tensor: gs.Tensor) -> bool:
        return not tensor.is_empty() and self.of(tensor) == FLOAT

    def _take(self, graph: gs.Graph) -> None:
        for tensor in (*graph.inputs, *(t for node in graph.nodes for t in node.outputs)):
            if isinstance(tensor, gs.Variable) and tensor.type == "tensor_type" and tensor.name:
                self._known[id(tensor)] = edit.dtype(tensor)

    def _ask(self, graph: gs.Graph, names: list[str]) -> None:
        try:
            found = {spec.name: spec.dtype for spec in session(graph, names, optimize=False).outputs}
        except ModelError:  # what stays unknown stays as it is
            return
        for node in graph.nodes:
            for tensor in node.outputs:
                if found.get(tensor.name) is not None:
                    self._known[id(tensor)] = found[tensor.name]


def all_bodies(graph: gs.Graph) -> Iterator[Body]:
    """Every body of a model, those in bodies too."""
    pending = bodies(graph)
    while pending:
        yield (body := pending.pop(0))
        pending += body.bodies()


@dataclass(frozen=True)
class Allowed:
    """The positions of the float32 inputs and outputs of a node that may have a type of 16 bits."""

    inputs: frozenset[int]
    outputs: frozenset[int]


def allowed(node: gs.Node, kinds: Kinds, opset: int, half: Half) -> Allowed | str:
    """What of a node may have 16 bits; a reason where its main input or its result may not."""
    if not edit.is_standard(node):
        return f"{node.domain} is not a domain of ONNX, and does not say which types it allows"
    if not onnx.defs.has(node.op, opset):
        return "it is no operator of ONNX"
    schema = onnx.defs.get_schema(node.op, opset)
    found = []
    for tensors, formals, kept in (
        (node.inputs, schema.inputs, _FLOATS.get(node.op, ())),
        (node.outputs, schema.outputs, _KEPT_OUTPUTS.get(node.op, ())),
    ):
        floats = [i for i, tensor in enumerate(tensors) if kinds.is_float32(tensor) and i not in kept]
        may = frozenset(i for i in floats if half.onnx in formals[min(i, len(formals) - 1)].types)
        if floats and floats[0] not in may:
            later = opset_of(node.op, opset + 1, half)
            return f"ONNX has no {half.name} {node.op}" + (f" before opset {later}" if later else "")
        found.append(may)
    return Allowed(*found)


def _allows(op: str, opset: int, half: Half) -> bool:
    """Whether an operator takes 16 bits where it takes float32: its first such input, else its result."""
    schema = onnx.defs.get_schema(op, opset)
    floats = (formal.types for formal in (*schema.inputs, *schema.outputs) if "tensor(float)" in formal.types)
    return half.onnx in next(floats, ())


def opset_of(op: str, opset: int, half: Half) -> int:
    """The lowest opset from ``opset`` on at which an operator takes 16 bits; 0 where none does."""
    if not onnx.defs.has(op, opset):
        return 0
    return next((version for version in range(opset, LAST_OPSET + 1) if _allows(op, version, half)), 0)
