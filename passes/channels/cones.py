"""The nodes between some tensors and one behind them: their cone.

A cone of channels holds nodes that treat every element alike, nodes that move elements, and what computes their masks
and indices from shapes. It ends where channels are mixed: at linears, norms over channels, softmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from channelfold.passes.base import InBetween, Refused
from channelfold.runtime.io import edit

LARGEST_CONE, DEEPEST = 400, 200  # nodes; the masks of PyTorch's exporters take about 50

MOVES = {  # the inputs that hold data, not parameters; None: all of them
    "Identity": (0,), "Dropout": (0,), "Transpose": (0,), "Reshape": (0,), "Flatten": (0,), "Squeeze": (0,),
    "Unsqueeze": (0,), "Expand": (0,), "Tile": (0,), "Slice": (0,), "Split": (0,), "Gather": (0,), "GatherND": (0,),
    "GatherElements": (0,), "Pad": (0, 2), "Concat": None, "ScatterND": (0, 2), "ScatterElements": (0, 2),
}  # fmt: skip
ARITHMETIC = ("Add", "Sub", "Mul", "Div")
ELEMENTWISE = {
    *ARITHMETIC, "Neg", "Abs", "Cast", "Celu", "Clip", "Elu", "Equal", "Erf", "Exp", "Gelu", "Greater",
    "GreaterOrEqual", "HardSigmoid", "HardSwish", "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Min", "Mish",
    "Not", "PRelu", "Pow", "Reciprocal", "Relu", "Selu", "Shrink", "Sigmoid", "Sign", "Softplus", "Softsign", "Sqrt",
    "Swish", "Tanh", "ThresholdedRelu", "Where",
}  # fmt: skip
_CONTRIBUTED = ("Gelu", "FastGelu", "QuickGelu")  # of com.microsoft, without the bias that some of them take


@dataclass(frozen=True)
class Cone:
    """The nodes between some tensors (``roots``) and one behind them, in order.

    ``unknown``: masks that are computed from the values of other tensors, with what computes them.
    """

    target: gs.Tensor
    nodes: list[gs.Node]
    roots: list[gs.Tensor]
    unknown: dict[int, str]

    @property
    def linear(self) -> bool:
        """Whether nothing in it is nonlinear."""
        for node in self.nodes:
            scaled = node.op in ("Mul", "Div") and any(isinstance(t, gs.Constant) for t in node.inputs)
            if not scaled and node.op not in ("Add", "Sub", "Neg", "BatchNormalization", *MOVES):
                return False
        return True

    @property
    def varied(self) -> bool:
        """Whether anything in it may treat channels differently, or nothing in it is nonlinear."""
        moved = any(n.op in MOVES and n.op not in ("Identity", "Dropout", "Transpose") for n in self.nodes)
        scaled = any(isinstance(t, gs.Constant) and math.prod(t.shape) > 1 for n in self.nodes for t in n.inputs)
        return moved or scaled or self.linear or self.mixed

    @property
    def mixed(self) -> bool:
        """Whether it puts a tensor together from several."""
        return any(n.op in ("Where", "Concat", "ScatterND", "ScatterElements") for n in self.nodes)


def cone(graph: gs.Graph, target: gs.Tensor, is_root: Callable[[gs.Tensor], bool], roots: int) -> Cone:
    """The nodes that ``target`` is computed by, back to at most so many tensors for which ``is_root`` holds.

    Raises Refused where it depends on the values of anything else, or a node on the way mixes channels.
    """
    found = Cone(target, [], [], {})
    seen: set[int] = set()

    def visit(tensor: gs.Tensor, depth: int) -> None:
        if isinstance(tensor, gs.Constant) or tensor.is_empty() or id(tensor) in seen:
            return
        seen.add(id(tensor))
        if is_root(tensor):
            found.roots.append(tensor)
            if len(found.roots) > roots:
                raise Refused("several linears feed it")
            return
        node = edit.producer(tensor)
        if node is None or not edit.in_graph(graph, node):
            raise InBetween(f"{'the input ' if node is None else ''}{tensor.name!r}")
        if id(node) in seen:
            return
        seen.add(id(node))
        if depth == DEEPEST or len(found.nodes) == LARGEST_CONE:
            raise Refused("too many nodes are in between", what="too many nodes")
        if not is_shape(node):
            if edit.is_float(tensor) and not is_followed(node):
                raise InBetween(f"{node.op}")
            for place, source in enumerate(node.inputs):
                visit_input(node, place, source, depth + 1)
        found.nodes.append(node)

    def visit_input(node: gs.Node, place: int, source: gs.Tensor, depth: int) -> None:
        try:
            visit(source, depth)
        except Refused as error:
            if node.op != "Where" or place:
                raise
            found.unknown[id(source)] = error.what

    visit(target, 0)
    if not found.roots:
        raise Refused("nothing feeds it")
    return found


def is_shape(node: gs.Node) -> bool:
    """Whether a node looks at the shape of its input alone."""
    return node.op in ("Shape", "Size") and edit.is_standard(node)


def is_followed(node: gs.Node) -> bool:
    """Whether a node on floating point data keeps channels apart, or only moves them."""
    if node.domain == "com.microsoft":
        return node.op in _CONTRIBUTED and len(node.inputs) == 1
    return edit.is_standard(node) and (node.op in ELEMENTWISE or node.op in MOVES or node.op == "BatchNormalization")
