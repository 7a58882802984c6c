"""Regions: tensors that are scaled together. ``scale_regions`` finds regions, ``rescale`` scales them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.layers.linear import Linear, view


@dataclass(frozen=True)
class End:
    """Constants where a region ends.

    ``role`` names the constants: "out" and "in" are the output and input channels of ``linear``, "norm" is the gamma
    and beta of a norm, "factor" the constant operand of a Mul or Div, "term" that of an Add, Sub, Min or Max. ``index``
    holds the classes: a vector over the channels, or an array that broadcasts against the inputs of ``node``.
    ``shifted`` tells whether the constants take the shift too. ``forward`` tells whether the region holds the input of
    a term, not its result.
    """

    role: str
    node: gs.Node
    index: np.ndarray
    shifted: bool
    linear: Linear | None = None
    forward: bool = False


@dataclass(frozen=True)
class Cut:
    """An edge where explicit nodes undo the scale: in front of ``reader``, or behind the writer (reader None)."""

    tensor: gs.Tensor
    reader: gs.Node | None
    index: np.ndarray
    reason: str
    shifted: bool = True


@dataclass
class Region:
    """Tensors that are scaled together. ``index`` arrays hold signed class numbers; class c is row c - 1 of a scale.

    ``fixed`` gives the reason why each class is pinned, "" for a free class. ``unshifted`` gives the reason why each
    class takes no shift, "" for a class that does. ``places`` holds the tensors and their maps, by id of the tensor.
    ``caches`` lists the pasts and presents of the model's own cache in the region, with their maps.
    """

    ends: list[End]
    cuts: list[Cut]
    fixed: list[str]
    unshifted: list[str]
    places: dict[int, tuple[gs.Tensor, np.ndarray]]
    caches: list[tuple[gs.Tensor, np.ndarray]] = field(default_factory=list)

    @property
    def size(self) -> int:
        return len(self.fixed)

    @property
    def free(self) -> np.ndarray:
        return np.array([not reason for reason in self.fixed], bool)

    @property
    def shiftable(self) -> np.ndarray:
        return np.array([not reason for reason in self.unshifted], bool)

    @property
    def no_shift(self) -> str:
        """Why no class takes a shift; empty where a class does."""
        return "" if self.shiftable.any() else next(iter(self.unshifted), "it has no channels")

    def on(self, graph: gs.Graph) -> Region:
        """The same region of a copy of the graph, whose nodes and tensors have the same names; without places."""
        nodes = {node.name: node for node in graph.nodes}
        tensors = {t.name: t for node in graph.nodes for t in (*node.inputs, *node.outputs)}
        caches = [(tensors[tensor.name], index) for tensor, index in self.caches]

        def moved(end: End) -> End:
            node = nodes[end.node.name]
            return replace(end, node=node, linear=view(graph, node) if end.linear is not None else None)

        cuts = [
            replace(cut, tensor=tensors[cut.tensor.name], reader=nodes[cut.reader.name] if cut.reader else None)
            for cut in self.cuts
        ]
        return replace(self, ends=[moved(end) for end in self.ends], cuts=cuts, places={}, caches=caches)

    def readers(self) -> list[End]:
        return [end for end in self.ends if end.role == "in"]

    def why_fixed(self, index: np.ndarray) -> str:
        """Why no class of an index map is free; empty where a class is."""
        reasons = [self.fixed[abs(int(c)) - 1] for c in np.unique(index)]
        return "" if "" in reasons else next(iter(reasons), "it has no channels")
