"""Tables: constants from which a node takes whole rows, such as embeddings."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from channelfold.passes.operators import operator
from channelfold.runtime.io import edit


def table_of(node: gs.Node) -> gs.Constant | None:
    """The floating point constant of at least two axes that a node takes rows of; None where it takes none."""
    if not node.inputs or not isinstance(table := node.inputs[0], gs.Constant):
        return None
    if len(table.shape) < 2 or not edit.is_float_type(table.dtype):
        return None
    by_axis = operator(node).kind == "gather" and node.attrs.get("axis", 0) in (0, -len(table.shape))
    return table if by_axis or _takes_rows(node) else None


def _takes_rows(node: gs.Node) -> bool:
    """Whether a GatherND does what a Gather of the first axis does."""
    shape = node.inputs[1].shape if node.op == "GatherND" else None
    return bool(shape) and shape[-1] == 1 and not node.attrs.get("batch_dims", 0)
