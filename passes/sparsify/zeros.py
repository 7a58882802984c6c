"""Weights set to zero in a pattern, with the shape of the graph as it was.

    W' = M * W        M of zeros and ones,  by the scores  s = |w_ij|  or  |w_ij| rms(x_j)   (``layers``)
    b' = b + (W - W') E[x]                  with data: the outputs keep their mean, borders included (``borders``)

    N:M            the best N of every M consecutive *input* channels, for each output channel and place of the kernel:
                   sparse tensor cores read 2:4 along the sum
    block          the best tiles of block x block, as many of each layer as ``ratios`` says
    unstructured   the best weights of each output channel, as many of each layer as ``ratios`` says

The gain is modest. ONNX Runtime multiplies by the zeros: no pattern saves time there. TensorRT has kernels for 2:4 on
the tensor cores of SM 80 and later, for Conv and MatMul in float16 and int8; it uses them on request alone
(``build --sparse-weights``), and only where they are faster than the dense kernels. TensorRT-RTX (1.7) accepts the flag
and builds the same plan, byte for byte, on SM 80, 86, 89 and 120. Blocks and unstructured zeros need a runtime made for
them. The file keeps its size until it is compressed.

Quantization may follow, because zero is exact in int8, and so may passes that scale channels.

Sources: Sun et al., Wanda, ICLR 2024; Mishra et al., Accelerating Sparse Deep Neural Networks, 2021; Xu et al., LPViT,
ECCV 2024; Sung et al., ECoFLaP, ICLR 2024.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Outcome, Refused
from channelfold.passes.layers.borders import inside
from channelfold.passes.layers.linear import Linear, usable
from channelfold.passes.sparsify import Sparsify
from channelfold.passes.sparsify import ratios as layer_ratios
from channelfold.passes.sparsify.layers import Layer, observers, shared, weights_of
from channelfold.passes.sparsify.masks import Tiles, by_row, n_of_m
from channelfold.runtime.errors import DataError
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import infer_shapes


class Work(Sparsify):
    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        for what in (self.scores, self.shared_by):
            if ctx.calibration is None and what in ("wanda", "ecoflap"):
                raise DataError(f"The option {what!r} needs calibration data", "Give some with --calibration")
        outcome = Outcome()
        infer_shapes(graph)
        layers = list(self._layers(graph, outcome))
        with_data = ctx.calibration is not None
        wanda = with_data and self.scores != "magnitude"
        if ctx.calibration is not None and (wanda or self.correct_bias):
            ctx.observe(graph, observers(layers))
            for layer in layers:
                if not layer.observed:
                    _refuse(layer, "no calibration sample reached it", outcome)
            layers = [layer for layer in layers if layer.observed]
        borders = None
        if with_data and self.correct_bias:
            borders = inside(graph, [linear for layer in layers for linear in layer.linears], ctx.data)
        counts = self._counts(graph, layers, wanda, ctx) if self.group is None and layers else [0] * len(layers)
        facts, untouched = [], 0
        for number, (layer, count) in enumerate(zip(layers, counts, strict=True)):
            ctx.progress("Setting weights to zero", number, len(layers))
            scores = layer.scores(wanda)
            mask = self._mask(layer, scores, count)
            if np.any(scores, where=~mask):
                facts.append(_sparsified(layer, scores, mask, borders, outcome))
            else:
                untouched += layer.size
                _refuse(layer, "nothing has to go, or is zero already", outcome)
        if facts:
            edit.remove_dead(graph)
        outcome.facts = _summary(facts, untouched) | {"scores": "wanda" if wanda else "magnitude", "sites": facts}
        return outcome

    def _layers(self, graph: gs.Graph, outcome: Outcome) -> Iterator[Layer]:
        for layer in shared(list(usable(graph, outcome, self._why_not, "stays dense"))):
            try:
                layer.check_growth()
            except Refused as error:
                for linear in layer.linears:
                    outcome.refuse(
                        linear.name, f"{linear.node.op} stays dense: {error}", "its weight has other readers"
                    )
            else:
                yield layer

    def _why_not(self, linear: Linear) -> str:
        if reason := self.patterns.why_not(linear.name):
            return reason
        if linear.depthwise:
            return "it is depthwise, so that an output has one input channel"
        if not edit.is_float_type(np.dtype(linear.source.dtype)):
            return f"its weight is stored as {linear.source.dtype}"
        if self.pattern == "block" and linear.groups > 1:
            return "it has groups"
        if self.group is not None:
            if linear.node.op == "ConvTranspose":
                return "no runtime has a sparse ConvTranspose"
            inputs = linear.channels[1] // linear.groups
            if inputs % self.group[1]:
                return f"{self.group[1]} does not divide its {inputs} input channels"
        if not np.isfinite(linear.weight()).all():
            return "its weight holds infinities or NaN"
        return "" if linear.weight().size else "its weight is empty"

    def _counts(self, graph: gs.Graph, layers: Sequence[Layer], wanda: bool, ctx: Context) -> list[int]:
        """The number of weights, or tiles, that each layer keeps."""
        block = self.pattern == "block"
        sizes = [Tiles(layer.shape, self.block).count if block else layer.size for layer in layers]
        dropped = round(self.share * sum(sizes))
        most = 1.0 if self.shared_by == "uniform" else self.max_layer_sparsity
        least = [max(1, size - math.floor(most * size)) for size in sizes]
        dropped = min(dropped, sum(sizes) - sum(least))  # a layer of one tile keeps the tile
        if self.shared_by == "equal-slope":
            costs = [_tile_costs(layer, self.block, layer.scores(wanda)) for layer in layers]
            return layer_ratios.equal_slope(dropped, costs, least)
        weights = [float(size) for size in sizes]
        if self.shared_by == "ecoflap":
            assert ctx.calibration is not None
            found = layer_ratios.sensitivities(graph, weights_of(layers), ctx.calibration, ctx.seed, ctx.progress)
            weights = [size * float(s) for size, s in zip(sizes, found, strict=True)]
        return layer_ratios.proportional(sum(sizes) - dropped, sizes, weights, least)

    def _mask(self, layer: Layer, scores: np.ndarray, count: int) -> np.ndarray:
        if self.group is not None:
            return n_of_m(scores, *self.group)
        if self.pattern == "block":
            return Tiles(layer.shape, self.block).best(np.square(scores), count)
        return by_row(scores, count)


def _tile_costs(layer: Layer, block: int, scores: np.ndarray) -> np.ndarray:
    """The share of the energy of a layer in each tile, divided by the weights of the tile, (tiles,)."""
    tiles = Tiles(layer.shape, block)
    energies = tiles.sums(np.square(scores))
    total = float(energies.sum())
    return (energies / tiles.sizes()).reshape(-1) / (total if total > 0 else 1.0)


def _refuse(layer: Layer, reason: str, outcome: Outcome) -> None:
    for linear in layer.linears:
        outcome.refuse(linear.name, f"{linear.node.op} stays as it is: {reason}", reason)


def _sparsified(
    layer: Layer, scores: np.ndarray, mask: np.ndarray, inside: Mapping[str, np.ndarray] | None, outcome: Outcome
) -> dict[str, Any]:
    """Drops the weights that the mask does not keep; ``energy_kept`` is the kept share of the squared scores."""
    energy = np.square(scores, dtype=np.float64)
    total = float(energy.sum())
    kept = float(energy.sum(where=mask)) / total if total > 0 else 1.0
    dense = layer.deflated()
    layer.keep(mask, inside)
    zeros = layer.size - int(np.count_nonzero(layer.linears[0].weight()))
    for linear in layer.linears:
        outcome.change(linear.name, f"{linear.node.op}: {zeros / layer.size:.1%} zeros, {kept:.2%} of the energy kept")
    return {
        "node": layer.name,
        "shape": list(layer.shape),
        "size": layer.size,
        "zeros": zeros,
        "sparsity": zeros / layer.size,
        "energy_kept": kept,
        "deflated_bytes": {"before": round(dense), "after": round(layer.deflated())},
    }


def _summary(facts: Sequence[dict[str, Any]], untouched: int) -> dict[str, Any]:
    """Sums over all layers; ``untouched`` counts the weights of unchanged layers.

    ``deflated_bytes``: the bytes of the changed weights in a compressed archive, before and after.
    """
    weights, zeros = untouched + sum(fact["size"] for fact in facts), sum(fact["zeros"] for fact in facts)
    return {
        "weights": weights,
        "zeros": zeros,
        "sparsity": zeros / weights if weights else 0.0,
        "deflated_bytes": {when: sum(fact["deflated_bytes"][when] for fact in facts) for when in ("before", "after")},
    }


def worth(facts: Mapping[str, Any], pattern: str) -> list[str]:
    """The use of the zeros, in sentences for the end of a report, from the ``facts`` of an Outcome."""
    if not facts["zeros"]:
        return ["No weight was set to zero: the result computes with the weights that the model had"]
    before, after = (facts["deflated_bytes"][when] / 1e6 for when in ("before", "after"))
    size = f"the file keeps its size, but compresses better: these weights to about {after:.1f} MB from {before:.1f} MB"
    if pattern == "2:4":
        faster = "TensorRT can use them from SM 80 on, in float16 and int8: channelfold build --sparse-weights"
    else:
        faster = f"TensorRT has no kernels for {pattern}"
    return [f"Zeros save no time in ONNX Runtime. {faster}; {size}"]
