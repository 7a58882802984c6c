"""Weights and biases rounded to 16 bits together, so that the errors of what a product reads cancel on the data.

    y = W x + b   becomes   y = W' x + b',    E |y' - y|^2 = tr (D E[z z^T] D^T),    D = [W' - W, b' - b],  z = [x, 1]

Rounding to nearest makes each error small by itself. A depthwise convolution reads nine neighbours that are nearly
equal, so what matters is the sum of nine errors. Weights that are rounded one after the other (``numeric.joint``), each
so that it makes up for those before, change the outputs of EfficientNet-Lite0 in bfloat16 by .7e-2 in place of 12e-2.
What is left then are the biases: a rounded bias changes every position alike, 3e-2 in all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.cast.kinds import FLOAT, Half
from channelfold.passes.layers.linear import Linear, linears
from channelfold.passes.layers.patches import Patches, moments_size
from channelfold.passes.numeric import joint
from channelfold.runtime.data.sources import Data
from channelfold.runtime.io import edit
from channelfold.runtime.io.front import behind_of, unknown
from channelfold.runtime.stats.covariance import LIMIT
from channelfold.runtime.stats.observe import by_name, observe, within

Progress = Callable[[str, int, int], None]

_DAMPING = 0.01  # of the mean of E[x^2]; .001 is worse for EfficientNet-Lite0 on samples that nothing was fitted to


def products(graph: gs.Graph) -> list[Linear]:
    """The linears of a graph whose weights a cast rounds."""
    found = linears(graph)
    return [one for one in found if one.source.dtype == one.dtype == FLOAT and one.factor("alpha") == 1]


@dataclass(frozen=True)
class Fit:
    """A weight, and a bias where there is one, as float32 numbers that 16 bits hold."""

    weight: np.ndarray
    bias: np.ndarray | None

    def install(self, linear: Linear) -> None:
        linear.set_weight(self.weight.astype(FLOAT))
        if self.bias is not None:
            linear.set_bias(self.bias.astype(FLOAT))


Fits = Mapping[str, Fit]


def fitted(graph: gs.Graph, names: Sequence[str], data: Data, half: Half, progress: Progress) -> dict[str, Fit]:
    """The weights and biases of the products of some names, but for those that the data do not reach.

    What has several readers keeps one value for all, so it is not fitted.
    """
    behind, wanted = behind_of(graph, unknown(graph)), set(names)
    sites = [one for one in products(graph) if one.name in wanted and id(one.data) not in behind and _alone(graph, one)]
    found: dict[str, Fit] = {}
    for group in within(LIMIT, ((one, moments_size(one)) for one in sites)):
        seen: dict[tuple[str, str], Patches] = {}
        readers: list[tuple[Linear, Patches]] = []
        for linear in group:
            if (patches := Patches.of(linear)) is not None:
                readers.append((linear, seen.setdefault((linear.data.name, repr(patches)), patches)))
        observe(graph, by_name((name, patches) for (name, _), patches in seen.items()), data, progress)
        for number, (linear, patches) in enumerate(readers):
            progress("Rounding", number, len(readers))
            if patches.count:
                found[linear.name] = _fit(linear, patches.products(), half)
    return found


def _alone(graph: gs.Graph, linear: Linear) -> bool:
    """Whether nothing else reads the weight or the bias."""
    places = [(linear.node, linear.weight_input), *([linear.bias_place] if linear.bias_place else [])]
    constants = [node.inputs[port] for node, port in places]
    return not linear.chain and all(len(t.outputs) == 1 and not edit.is_output(graph, t) for t in constants)


def _fit(linear: Linear, products: np.ndarray, half: Half) -> Fit:
    weight, bias = linear.weight(), linear.bias()
    count = products.shape[1] - 1
    flat = weight.reshape(linear.groups, -1, count)
    power = np.trace(products[:, :count, :count], axis1=1, axis2=2) / count
    products[:, np.arange(count), np.arange(count)] += np.where(power > 0, _DAMPING * power, 1.0)[:, None]

    def snap(values: np.ndarray) -> np.ndarray:
        return half.rounded(np.clip(values, -half.limit, half.limit))

    if not linear.takes_bias:
        found = joint.rounded(flat, products[:, :count, :count], snap, flat == 0)
        return Fit(found.reshape(weight.shape).astype(half.dtype), None)
    own = (np.zeros(len(weight)) if bias is None else bias).reshape(linear.groups, -1, 1).astype(FLOAT)
    fixed = np.concatenate([flat == 0, np.zeros(own.shape, bool)], axis=2)  # the zeros of a sparse weight stay
    found = joint.rounded(np.concatenate([flat, own], axis=2), products, snap, fixed).astype(half.dtype)
    return Fit(found[:, :, :count].reshape(weight.shape), found[:, :, count].reshape(-1))
