"""A region: tensors that are scaled together, and where that ends. ``channels`` finds them, ``rescale`` moves them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.layers.linear import Linear


@dataclass(frozen=True)
class End:
    """Where a region ends in constants.

    ``role``: "out" and "in" are the output and input channels of a ``linear``, "norm" the gamma and beta of a norm,
    "factor" the constant operand of a Mul or Div, "term" that of an Add, Sub, Min or Max. ``index``: the classes, a
    vector over the channels, or an array that broadcasts against the operand's reader. ``shifted``: whether the shift
    ends here too. ``forward``: of a term, whether the region is on the side of the input, not of the result.
    """

    role: str
    node: gs.Node
    index: np.ndarray
    shifted: bool
    linear: Linear | None = None
    forward: bool = False


@dataclass(frozen=True)
class Cut:
    """An edge where the scale is undone by explicit nodes: in front of ``reader``, or (None) behind the writer."""

    tensor: gs.Tensor
    reader: gs.Node | None
    index: np.ndarray
    reason: str
    shifted: bool = True


@dataclass
class Region:
    """Tensors that are scaled together. ``index`` arrays hold signed class numbers; class c is row c - 1 of a scale.

    ``fixed``: why each class is pinned, "" where it is free. ``unshifted``: why each class cannot be shifted, "" where
    it can. ``places``: the tensors and their maps, by id.
    """

    ends: list[End]
    cuts: list[Cut]
    fixed: list[str]
    unshifted: list[str]
    places: dict[int, tuple[gs.Tensor, np.ndarray]]

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
        """Why no class can be shifted; empty when one can."""
        return "" if self.shiftable.any() else next(iter(self.unshifted), "it has no channels")

    def readers(self) -> list[End]:
        return [end for end in self.ends if end.role == "in"]

    def why_fixed(self, index: np.ndarray) -> str:
        """Why no class of an index map is free; empty when one is."""
        reasons = [self.fixed[abs(int(c)) - 1] for c in np.unique(index)]
        return "" if "" in reasons else next(iter(reasons), "it has no channels")
