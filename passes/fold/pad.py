"""Zero padding folded into the convolutions behind it.

    Conv(pads=p)(Pad(q)(x))  =  Conv(pads=p + q)(x)        for q >= 0 on the spatial axes, filled with zeros

All readers of the Pad must be Conv nodes, and each Conv gets the padding. Scales pass a padded Conv and shifts do not,
as with the Pad, so ``fold-affine`` may run before or after. Pads computed from constants need ``fold-constants`` first.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Outcome, Refused
from channelfold.passes.fold import FoldPad
from channelfold.passes.operators import operator
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import infer_shapes


class Work(FoldPad):
    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        outcome = Outcome()
        found = [node for node in graph.nodes if operator(node).kind == "pad"]
        if found:
            infer_shapes(graph)
        for node in reversed(found):  # of two Pads in a row the second must go first
            with outcome.refusing(node.name, "Pad"):
                convs, pads = _convs(graph, node), _spatial_pads(node)
                for conv in convs:
                    own = conv.attrs.get("pads") or [0] * len(pads)
                    if conv.attrs.pop("auto_pad", "NOTSET") == "VALID":
                        own = [0] * len(pads)
                    conv.attrs["pads"] = [a + b for a, b in zip(own, pads, strict=True)]
                edit.bypass(graph, node.inputs[0], [node], node.outputs[0])
                outcome.change(node.name, f"Pad: {pads} into {', '.join(conv.name for conv in convs)}")
        edit.sweep(graph)
        return outcome


def _convs(graph: gs.Graph, node: gs.Node) -> list[gs.Node]:
    """The Conv nodes that read a Pad. Raises Refused where anything else reads it."""
    padded = node.outputs[0]
    readers = edit.consumers(padded)
    if edit.is_output(graph, padded) or not readers:
        raise Refused("its result is an output of the graph")
    for reader in readers:
        if not edit.in_graph(graph, reader):
            raise Refused("a subgraph reads it")
        if reader.op != "Conv" or not edit.is_standard(reader) or reader.inputs[0] is not padded:
            raise Refused(f"{reader.op} reads it, and only a Conv can add the zeros itself")
        if sum(t is padded for t in reader.inputs) != 1:
            raise Refused("Conv reads it as a weight")
        if (mode := reader.attrs.get("auto_pad", "NOTSET")) not in ("NOTSET", "VALID"):
            raise Refused(f"the Conv behind it pads by itself ({mode})")
    return readers


def _spatial_pads(node: gs.Node) -> list[int]:
    """The zeros that a Pad adds, in the order of a Conv: all starts, then all ends. Raises Refused."""
    if (mode := node.attrs.get("mode", "constant")) != "constant":
        raise Refused(f"it pads by mode {mode}, not with zeros")
    if (edit.scalar(node.inputs[2]) if edit.has_input(node, 2) else node.attrs.get("value", 0.0)) != 0:
        raise Refused("it pads with a value that is not zero, or that is computed at run time")
    pads = edit.argument(node, 1, "pads")
    if pads is None:
        raise Refused("its pads are computed at run time")
    if edit.has_input(node, 3):
        axes, size = edit.argument(node, 3, ""), edit.rank(node.inputs[0])
        if axes is None or size is None:
            raise Refused("its axes are computed at run time, or the rank of its input is unknown")
        given, pads = pads.reshape(2, -1), np.zeros((2, size), np.int64)
        pads[:, axes] = given
    pads = pads.reshape(2, -1)
    if np.any(pads < 0):
        raise Refused("its pads are negative")
    if np.any(pads[:, :2]):
        raise Refused("it pads the batch or the channels")
    return [int(p) for p in pads[:, 2:].reshape(-1)]
