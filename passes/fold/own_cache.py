"""The nodes that keep the interface of a decoder's own cache dropped, in pairs.

    x = Concat(past / s, new), present = x s   ->   present = Concat(past, new)
    x = Concat(Gather(past, kept), new), present = Gather(Pad(x), places)   ->   the same, for heads that are gone

By induction the other outputs are the same where every past is a present that the model returned, or empty. So the
values and the shapes of the cache may change here, as nowhere else, and rollouts verify the step: both graphs run a
prefill and several steps, each with its own cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Outcome, Refused
from channelfold.passes.fold import OwnCache
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import infer_shapes
from channelfold.runtime.io.meanings import cache_pairs


class Work(OwnCache):
    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        outcome = Outcome(facts={"cache": {}})
        known = {tensor.name: tensor for tensor in (*graph.inputs, *graph.outputs)}
        for past, present in cache_pairs(graph).items():
            pair = _Pair(graph, known[past], known[present])
            steps: list[dict[str, Any]] = []
            with outcome.refusing(past, "its interface stays"):
                while (step := pair.outermost()) is not None:
                    steps.append(step)
            if steps:
                outcome.facts["cache"][past] = {"present": present, "steps": steps}
                outcome.change(past, f"{past} and {present}: {' and '.join(_said(step) for step in steps)}")
        edit.sweep(graph)
        infer_shapes(graph)
        return outcome


def _said(step: dict[str, Any]) -> str:
    if "scale" in step:
        return "scaled by channel"
    return f"{len(step['kept'])} of {step['size']} positions of axis {step['axis']} are left"


@dataclass
class _Pair:
    graph: gs.Graph
    past: gs.Variable
    present: gs.Variable

    def outermost(self) -> dict[str, Any] | None:
        """Drops the outermost nodes at both ends, and says what they did; None where there are none.

        Raises Refused where the ends do not fit.
        """
        readers, writer = edit.consumers(self.past), edit.producer(self.present)
        assert writer is not None
        head = readers[0] if len(readers) == 1 and _by_constant(readers[0]) else None
        tail = writer if _by_constant(writer) else None
        if head is None and tail is None:
            return None
        if head is None or tail is None or head.op != tail.op:
            raise Refused("what the model does to past and present is not the same")
        step, inner, tails = _scaled(head, tail) if head.op == "Mul" else _selected(head, tail)
        size = self.past.shape
        edit.bypass(self.graph, self.past, [head], head.outputs[0])
        edit.bypass(self.graph, inner, tails, self.present)
        if "kept" in step and size is not None:
            axis = step["axis"]
            for tensor in (self.past, self.present):
                if tensor.shape is not None:
                    tensor.shape = [*tensor.shape[:axis], len(step["kept"]), *tensor.shape[axis + 1 :]]
        return step


def _by_constant(node: gs.Node) -> bool:
    return node.op in ("Mul", "Gather") and isinstance(node.inputs[1], gs.Constant)


def _scaled(head: gs.Node, tail: gs.Node) -> tuple[dict[str, Any], gs.Tensor, list[gs.Node]]:
    inverse, scale = (np.asarray(edit.value(node.inputs[1])) for node in (head, tail))
    exponents = np.log2(np.abs(scale.astype(np.float64)))
    if inverse.shape != scale.shape or not np.array_equal(inverse * scale, np.ones_like(scale)):
        raise Refused("the scales of past and present are not inverse")
    if not np.array_equal(exponents, np.rint(exponents)):
        raise Refused("its scales are no powers of two")
    return {"scale": scale.tolist()}, tail.inputs[0], [tail]


def _selected(head: gs.Node, tail: gs.Node) -> tuple[dict[str, Any], gs.Tensor, list[gs.Node]]:
    kept, places = (np.asarray(edit.value(node.inputs[1])) for node in (head, tail))
    pad, axis = edit.producer(tail.inputs[0]), int(head.attrs["axis"])
    expected = np.full(len(places), len(kept))
    expected[kept] = np.arange(len(kept))
    if pad is None or pad.op != "Pad" or not np.array_equal(places, expected):
        raise Refused("the heads of past and present are not the same")
    return {"axis": axis, "kept": kept.tolist(), "size": len(places)}, pad.inputs[0], [pad, tail]
