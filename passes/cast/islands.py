"""Which nodes stay float32, each with its reason, and which follow their neighbours.

A node stays float32 where

    it cannot       ONNX or the target has no such operator in 16 bits, or its constants do not survive
    it was asked    by name or operator
    its values      overflow on the calibration data, times a headroom; or, as divisors, fall below the normal numbers
    it is a norm    without data or in bfloat16, as a whole; with data where one of its nodes stays
    it is unsure    without data: squares, exponents and sums
    it is exact     it computes with positions and sizes, which 16 bits would round

Operators that only move values have no opinion: between two islands they stay float32 as well, so that no value is
converted twice. The same holds for anything that is no product of matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import onnx_graphsurgeon as gs

from channelfold.passes.cast.exact import Exact
from channelfold.passes.cast.kinds import TYPE_ATTRIBUTES, Allowed, Half, Kinds, allowed
from channelfold.passes.cast.norms import norms, squares
from channelfold.passes.cast.ranges import Magnitudes
from channelfold.passes.cast.values import Masks, Rounded, rounded
from channelfold.passes.operators import operator
from channelfold.runtime.io import edit
from channelfold.runtime.io.convert import all_graphs

_UNBUILT = {  # operators that TensorRT refuses in a type
    "bfloat16": ("ConvTranspose", "GRU", "Mish", "HardSwish", "LpNormalization", "MeanVarianceNormalization"),
    "float16": (),
}
_DIVIDES = {"Div": 1, "Reciprocal": 0, "Log": 0, "Sqrt": 0}  # the input whose smallest value matters
_SQUARES = ("InstanceNormalization", "GroupNormalization", "LpNormalization", "MeanVarianceNormalization")
_SUMS = ("ReduceMean", "GlobalAveragePool", "AveragePool")  # divide a sum that may overflow
_GROWS = ("ReduceSumSquare", "ReduceL2", "ReduceSum", "ReduceProd", "ReduceLogSumExp", "ReduceL1", "Exp", "CumSum")
_TOWARDS = ("Sqrt", "Reciprocal", "Pow", "Log", "Add", "Max", "Clip")  # a division
_CONTRACTIONS = ("conv", "gemm", "matmul", "einsum", "recurrent", "attention")


@dataclass
class Constants:
    """What becomes of the constants: those that were limited, with the limit, and what rounding did to each."""

    limits: dict[tuple[int, int], float] = field(default_factory=dict)  # (constant, node): the limit
    seen: dict[int, Rounded] = field(default_factory=dict)
    limited: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Reason:
    code: str
    detail: str = ""


class Islands:
    """``why``: the reasons of the nodes that stay float32, by id. ``float32``: ids of all nodes that do so.

    ``asked`` says why a node is to stay, "" where nothing says so. ``built``: TensorRT builds the graph. ``io``: inputs
    and outputs of the model take the type.
    """

    def __init__(
        self,
        graph: gs.Graph,
        kinds: Kinds,
        half: Half,
        asked: Callable[[gs.Node], str],
        seen: Mapping[str, Magnitudes],
        headroom: float,
        built: bool,
        io: bool,
    ):
        self.kinds, self.half, self._asked, self._seen = kinds, half, asked, seen
        self._headroom, self._unbuilt = headroom, _UNBUILT[half.name] if built else ()
        parts = list(all_graphs(graph))
        self.outputs = {id(tensor) for part in parts for tensor in part.outputs}
        self.inputs: set[int] = set()  # those of the model that take the type
        if io:
            self.inputs = {id(t) for t in graph.inputs if kinds.is_float32(t) and not self._overflows(t)}
            inside = {id(tensor) for part in parts[1:] for tensor in part.outputs}
            kept = {id(t) for t in graph.outputs if not self._takes(graph, t)}
            self.outputs = inside | kept
        self.nodes = [node for part in parts for node in part.nodes]
        self.typed = [node for node in self.nodes if any(map(kinds.is_float32, (*node.inputs, *node.outputs)))]
        exact = Exact(self.typed, kinds)
        self._masks = Masks(self.outputs, exact.tensors)
        self.constants = Constants()
        self.why: dict[int, Reason] = {}
        self.silent: set[int] = set()  # nodes with bodies
        self.allowed: dict[int, Allowed] = {}
        self._masked: set[int] = set()
        for node in self.typed:
            self._judge(node, graph.opset)
        for node in exact.nodes:
            self._keep(node, "it computes with integers, which 16 bits would round")
        self._keep_what_overflows()
        self._keep_norms()
        self.float32 = {*self.why, *self.silent}
        self._wanted: dict[int, list[bool]] = {}
        self._settle()

    def _overflows(self, tensor: gs.Tensor) -> bool:
        seen = self._seen.get(tensor.name)
        return seen is not None and seen.largest * self._headroom > self.half.limit

    def _takes(self, graph: gs.Graph, tensor: gs.Tensor) -> bool:
        """Whether an output of the model can take the type: nodes compute the tensor, and its values fit."""
        node = edit.producer(tensor)
        known = node is not None and edit.in_graph(graph, node) and self.kinds.is_float32(tensor)
        return known and not self._overflows(tensor)

    # ---- reasons ------------------------------------------------------------------------------------------------

    def _keep(self, node: gs.Node, code: str, detail: str = "") -> None:
        if id(node) not in self.silent:
            self.why.setdefault(id(node), Reason(code, detail))

    def _judge(self, node: gs.Node, opset: int) -> None:
        if any(isinstance(value, gs.Graph) for value in node.attrs.values()):
            self.silent.add(id(node))
            return
        unknown = [t.name for t in (*node.inputs, *node.outputs) if not t.is_empty() and self.kinds.of(t) is None]
        if unknown:
            self._keep(node, "the types of its tensors are not known", f"{unknown[0]!r} is no tensor of a known type")
            return
        found = allowed(node, self.kinds, opset, self.half)
        if isinstance(found, str):
            self._keep(node, found)
        elif node.op in self._unbuilt:
            self._keep(node, f"TensorRT has no {self.half.name} {node.op}")
        elif reason := self._asked(node):
            self._keep(node, reason)
        elif (operator(node).random and node.op != "Dropout") or node.op == "BitCast":
            self._keep(node, "its results depend on the type")
        else:
            self.allowed[id(node)] = found
            self._judge_constants(node, found)

    def _judge_constants(self, node: gs.Node, found: Allowed) -> None:
        """Keeps a node whose constants would overflow or vanish; limits those of which the limit alone matters."""
        for index in found.inputs:
            tensor = node.inputs[index]
            if not isinstance(tensor, gs.Constant):
                continue
            seen = self.constants.seen.get(id(tensor)) or rounded(tensor, self.half)
            self.constants.seen[id(tensor)] = seen
            name = tensor.name
            if seen.overflow and math.isinf(limit := self._masks.bound(node, index, self.half)):
                self._keep(node, "a constant overflows", f"{name} reaches {seen.largest:.4g}")
            elif seen.overflow:
                self.constants.limits[id(tensor), id(node)] = limit
                self.constants.limited[name] = limit
                self._masked |= self._masks.hidden(node)
            elif seen.nonzero and seen.zero == seen.nonzero:
                self._keep(node, "a constant becomes zero", f"{name} is {seen.largest:.4g} at most")
                self._keep_towards_division(node)
            elif seen.error > self.half.rounding and not operator(node).adds:
                detail = f"{name} changes by {seen.error:.2g}, for its values are {seen.largest:.4g} at most"
                self._keep(node, "a constant falls below the normal numbers", detail)

    def _keep_towards_division(self, node: gs.Node) -> None:
        """Keeps what leads from a node to a division: in y / max(v, e) all must be as small as e is."""
        pending = [node]
        while pending:
            for reader in (r for t in pending.pop().outputs for r in edit.consumers(t)):
                others = [t for t in reader.inputs if not isinstance(t, gs.Constant) and not t.is_empty()]
                onward = len(others) == 1 and (reader.op in _TOWARDS or operator(reader).moves)
                if id(reader) not in self.why and (onward or reader.op in ("Div", "Mul")) and edit.is_standard(reader):
                    self._keep(reader, "it divides by what a constant keeps from zero")
                    pending += [reader] if onward else []

    def _keep_what_overflows(self) -> None:
        """Keeps the nodes that read or write a tensor whose values 16 bits do not reach, and those that sum so far."""
        for node in self.typed if self._seen else ():
            tensors = [t for t in (*node.inputs, *node.outputs) if isinstance(t, gs.Variable)]
            for tensor in tensors:
                seen = self._seen.get(tensor.name)
                if seen is None or id(tensor) in self._masked or operator(node).asks_shape:
                    continue
                if self._overflows(tensor):
                    self._keep(node, "a value overflows", f"{tensor.name} reaches {seen.largest:.4g}")
            if (small := self._small_divisor(node)) is not None:
                seen = self._seen[small.name]
                code = "a divisor falls below the normal numbers"
                for other in (*small.inputs, *edit.consumers(small)):
                    self._keep(other, code, f"{small.name} falls to {seen.smallest:.4g}")
            if (inner := self._largest_inside(node)) * self._headroom > self.half.limit:
                self._keep(node, "a value inside overflows", f"{inner:.4g}")

    def _small_divisor(self, node: gs.Node) -> gs.Tensor | None:
        place = _DIVIDES.get(node.op)
        if place is None or isinstance(tensor := node.inputs[place], gs.Constant):
            return None
        seen = self._seen.get(tensor.name)
        return tensor if seen is not None and seen.smallest / self._headroom < self.half.smallest else None

    def _largest_inside(self, node: gs.Node) -> float:
        """The largest number that an operator computes on the way to its results, as far as it is known."""
        read, made = (self._seen.get(tensors[0].name) if tensors else None for tensors in (node.inputs, node.outputs))
        if read is None or made is None:
            return 0.0
        if node.op in _SQUARES:
            return read.largest**2 * self._headroom
        if node.op in _SUMS:
            return made.largest * read.elements / max(made.elements, 1)
        return made.largest**2 * self._headroom if node.op == "ReduceL2" else 0.0

    def _keep_norms(self) -> None:
        """Keeps what may overflow unseen, and a norm as a whole where a node of it stays; every norm of bfloat16."""
        unsure = "it may overflow, and no data tell"
        for node in self.typed:
            if self._unseen(node) and (squares(node) or node.op in (*_GROWS, *_SQUARES)):
                self._keep(node, unsure)
        for nodes in norms(self.typed):
            unseen = any(map(self._unseen, nodes))
            if unseen or self.half.name == "bfloat16" or any(id(node) in self.why for node in nodes):
                for node in nodes:
                    self._keep(node, unsure if unseen else "a norm takes a difference, which 16 bits would round")

    def _unseen(self, node: gs.Node) -> bool:
        """Whether values may overflow, and no data have reached the results of a node."""
        results = [tensor for tensor in node.outputs if self.kinds.is_float32(tensor)]
        return self.half.name == "float16" and not any(tensor.name in self._seen for tensor in results)

    # ---- neighbours ---------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Lets nodes between two islands stay float32, until nothing changes."""
        changed = True
        while changed:
            self._wanted = self._wanted_as_float32()
            new = {id(node) for node in self.typed if id(node) not in self.float32 and self._between(node)}
            changed = bool(new)
            self.float32 |= new

    def _between(self, node: gs.Node) -> bool:
        """Whether all that a node reads is float32, and all its readers want float32; of a node that moves, whether
        something and some do: a cache then grows as it is, and only what is new is converted.
        """
        if is_product(node):
            return False
        read = [t for t in node.inputs if isinstance(t, gs.Variable) and self.kinds.is_float32(t)]
        wanted = [self._wanted.get(id(t), []) for t in node.outputs if self.kinds.is_float32(t)]
        if not wanted:
            return False
        if is_free(node):
            return (not read or any(map(self.stays, read))) and any(map(any, wanted))
        return bool(read) and all(map(self.stays, read)) and all(each and all(each) for each in wanted)

    def _wanted_as_float32(self) -> dict[int, list[bool]]:
        """For every tensor, by id, whether each of its readers, or what reads it through moves, wants float32."""
        found: dict[int, list[bool]] = {key: [True] for key in self.outputs}
        for node in reversed(self.typed):
            onward = is_free(node) and any(any(found.get(id(tensor), ())) for tensor in node.outputs)
            for index, tensor in enumerate(node.inputs):
                if self.kinds.is_float32(tensor) and (need := self.needs(node, index)):
                    found.setdefault(id(tensor), []).append(onward or need == "float32")
        return found

    def stays(self, tensor: gs.Tensor) -> bool:
        """Whether a float32 tensor is written as float32."""
        node = edit.producer(tensor)
        if node is None:
            return id(tensor) not in self.inputs
        place = next(i for i, other in enumerate(node.outputs) if other is tensor)
        return id(node) in self.float32 or place not in self.allowed[id(node)].outputs

    def needs(self, node: gs.Node, index: int) -> str:
        """The type in which a node reads a float32 input: ``half``, ``float32``, or "" for either."""
        if operator(node).asks_shape or (node.op == "Cast" and id(node) not in self.why):
            return ""
        if id(node) in self.float32 or index not in self.allowed[id(node)].inputs:
            return "float32"
        return "half"


def is_free(node: gs.Node) -> bool:
    """Whether a node takes the type that its neighbours have."""
    return edit.is_standard(node) and (operator(node).moves or node.op in (*TYPE_ATTRIBUTES, "ConstantOfShape"))


def is_product(node: gs.Node) -> bool:
    return operator(node).kind in _CONTRACTIONS


def divisors(graph: gs.Graph) -> set[str]:
    """The names of the tensors whose smallest value decides whether a division overflows."""
    nodes = (node for part in all_graphs(graph) for node in part.nodes)
    return {node.inputs[_DIVIDES[node.op]].name for node in nodes if node.op in _DIVIDES and edit.is_standard(node)}
