"""Weights clipped where clipping lowers the quantization error: the largest weight of a group sets the step of all.

    w' = clip(w, -m, m),   m = max|w| (1 - i / 20),  i = 0 .. 9         for each output row and group of inputs
    i  = argmin  sum over x of (w x - Q(w') x)^2                        x the inputs of the group, on a sample of rows

Q is the quantizer that the weights are clipped for, ``weight_bits`` with one scale for ``group_size`` inputs. i = 0
clips nothing, so no group gets worse; a linear whose outputs as a whole do not get better stays as it is. The pass
stores w' as float, so clipping changes the function of the model.

Projections of queries and keys are left alone, as their errors go through a softmax: linears from which a product of
two activations is reached, without another linear in between, where that product has no softmax behind it (or input 0
or 1 of an attention operator). A fused projection of queries, keys and values is one of them.

Source: Lin et al., AWQ, MLSys 2024, and its released code.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Outcome, Refused
from channelfold.passes.layers.linear import Linear, check_growth, usable, view
from channelfold.passes.layers.quantization_error import ROWS, Bits
from channelfold.passes.operators import operator
from channelfold.passes.quantize import ClipWeights
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import infer_shapes
from channelfold.runtime.stats.channels import ChannelStatistics
from channelfold.runtime.stats.observe import by_name

_RATIOS = tuple(1 - i / 20 for i in range(1, 10))
_CHUNK = 1 << 22  # values that are in work at a time


class Work(ClipWeights):
    @property
    def bits(self) -> Bits:
        return Bits(0, self.weight_bits, self.group_size)

    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        outcome = Outcome()
        infer_shapes(graph)
        scores = score_projections(graph)
        sites = list(usable(graph, outcome, lambda linear: self._why_not(linear, scores), "stays as it is"))
        observers = {site.data.name: ChannelStatistics(site.in_axis, ROWS) for site in sites}
        ctx.observe(graph, by_name(observers.items()))
        facts = []
        for number, site in enumerate(sites):
            ctx.progress("Clipping weights", number, len(sites))
            try:
                facts.append(self._clip(view(graph, site.node), observers[site.data.name], outcome))
            except Refused as error:
                outcome.refuse(site.name, f"{site.node.op} stays as it is: {error}", error.code)
        outcome.facts = {"sites": facts}
        return outcome

    def _why_not(self, linear: Linear, scores: set[int]) -> str:
        if id(linear.node) in scores:
            return "it projects queries or keys"
        if reason := self.patterns.why_not(linear.name):
            return reason
        if any(size > 1 for size in linear.kernel):
            return "it has a kernel"
        return "it has groups" if linear.groups > 1 else ""

    def _clip(self, linear: Linear, seen: ChannelStatistics, outcome: Outcome) -> dict[str, Any]:
        if not seen.positions:
            raise Refused("no calibration sample reached it")
        if seen.axis != linear.in_axis:
            raise Refused("another node reads its activation along another axis")
        check_growth(linear)
        old = linear.weight()
        new, before, after, clipped = clipped_matrix(old.reshape(old.shape[:2]), *seen.sample(), self.bits)
        if not after < before:
            raise Refused("clipping does not make its quantized outputs better")
        decibels = [float(-10 * np.log10(error)) if error > 0 else float("inf") for error in (before, after)]
        linear.set_weight(new.reshape(old.shape))
        outcome.change(
            linear.name,
            f"{linear.node.op}: {clipped:.0%} of the groups clipped, output {decibels[0]:.1f} -> {decibels[1]:.1f} dB",
        )
        return {"node": linear.name, "output_snr_db": decibels, "clipped_groups": clipped}


def clipped_matrix(
    weight: np.ndarray, rows: np.ndarray, weights: np.ndarray, bits: Bits
) -> tuple[np.ndarray, float, float, float]:
    """(clipped weight, error before, error after, share of the groups clipped) of a matrix (out, in).

    ``rows`` (n, in) float32; row i stands for ``weights[i]`` rows of the data. Errors are the errors of the quantized
    outputs as a share of the energy of the outputs.
    """
    outs, ins = weight.shape
    size = min(bits.group, ins) or ins
    groups = -(-ins // size)
    inputs = _grouped(rows * np.sqrt(weights, dtype=np.float32)[:, None], size)  # (n, groups, size)
    flat = inputs.reshape(len(rows), -1)[:, :ins]
    step = max(1, _CHUNK // max(ins, groups * len(rows)))
    new = np.empty_like(weight)
    signal, noise, clipped = 0.0, np.zeros(2), 0
    for start in range(0, outs, step):
        part = weight[start : start + step]
        limits, better = _limits(part.astype(np.float32), inputs, bits)
        bounds = np.repeat(np.where(better, limits, np.inf), size, axis=1)[:, :ins].astype(part.dtype)
        new[start : start + step] = np.clip(part, -bounds, bounds)
        exact = part.astype(np.float32) @ flat.T
        signal += np.square(exact, dtype=np.float64).sum()
        for place, values in enumerate((part, new[start : start + step])):
            error = bits.format.rounded(values.astype(np.float32)) @ flat.T - exact
            noise[place] += np.square(error, dtype=np.float64).sum()
        clipped += int(better.sum())
    before, after = noise / signal if signal else np.zeros(2)
    return new, float(before), float(after), clipped / (outs * groups)


def _limits(part: np.ndarray, inputs: np.ndarray, bits: Bits) -> tuple[np.ndarray, np.ndarray]:
    """The best limit of each output row and group (out, groups), and whether it is better than none."""
    size, ins = inputs.shape[2], part.shape[1]
    by_group = inputs.transpose(1, 2, 0)  # (groups, size, n)
    peaks = np.abs(_grouped(part, size)).max(axis=2)

    def errors(limits: np.ndarray) -> np.ndarray:
        bounds = np.repeat(limits, size, axis=1)[:, :ins]
        lost = _grouped(bits.format.rounded(np.clip(part, -bounds, bounds)) - part, size)
        made = lost.transpose(1, 0, 2) @ by_group  # (groups, out, n)
        return np.einsum("gon,gon->og", made, made, dtype=np.float64)

    unclipped = best = errors(peaks)
    limits = peaks
    for ratio in _RATIOS:
        tried = peaks * np.float32(ratio)
        found = errors(tried)
        limits, best = np.where(found < best, tried, limits), np.minimum(found, best)
    return limits, best < unclipped


def _grouped(values: np.ndarray, size: int) -> np.ndarray:
    """(n, in) as (n, groups, size), with zeros at the end."""
    count, ins = values.shape
    padded = np.zeros((count, -(-ins // size) * size), values.dtype)
    padded[:, :ins] = values
    return padded.reshape(count, -1, size)


def score_projections(graph: gs.Graph) -> set[int]:
    """Ids of the nodes that queries and keys are projected with: see the docstring of the module."""
    found: set[int] = set()
    for node in graph.nodes:
        kind = operator(node).kind
        if kind == "attention":
            found |= _sources(graph, node.inputs[:2])[0]
        elif kind in ("einsum", "matmul") and not _is_linear(graph, node):
            linears, softmax = _sources(graph, node.inputs)
            if not softmax:
                found |= linears
    return found


def _sources(graph: gs.Graph, tensors: list[gs.Tensor]) -> tuple[set[int], bool]:
    """(ids of the linears that come first on the way up from some tensors, whether a softmax is in between)."""
    linears: set[int] = set()
    softmax, seen = False, set()
    pending = [node for tensor in tensors if (node := edit.producer(tensor)) is not None]
    while pending:
        node = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        kind = operator(node).kind
        softmax |= kind == "softmax"
        if _is_linear(graph, node):
            linears.add(id(node))
        elif kind not in ("attention", "einsum", "matmul", "softmax"):
            pending += [source for tensor in node.inputs if (source := edit.producer(tensor)) is not None]
    return linears, softmax


def _is_linear(graph: gs.Graph, node: gs.Node) -> bool:
    try:
        view(graph, node)
    except Refused:
        return False
    return True
