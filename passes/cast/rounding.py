"""What rounding to 16 bits does to the outputs, and what is done about that: from what is free to what costs most.

1. Weights and biases are rounded together, so that their errors cancel (``fit``). This costs nothing at run time.
2. What stands between products stays float32, where that halves the error: sums of a residual stream, norms, functions.
   Products compute in 16 bits, and TensorRT fuses the casts: the engine of MiniLM for SM 89 has as many kernels, and
   moves 24.5 MB in place of 23.9.
3. The products that change the outputs most for what they cost stay float32, up to a fifth of the multiplications. One
   product can cause nearly all of an error: so products are rounded in groups, with all others exact, and the worst
   groups are halved, down to single products. The squared errors of groups add up.

Errors are measured on samples that nothing was fitted to, where there are enough.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.cast.fit import Fits, Progress, fitted, products
from channelfold.passes.cast.kinds import FLOAT, Half
from channelfold.passes.layers.linear import Linear
from channelfold.passes.layers.output_error import Outputs, held_out
from channelfold.runtime.data.sources import Data
from channelfold.runtime.errors import no_progress
from channelfold.runtime.io import edit
from channelfold.runtime.io.bfloat16 import computes, make_twin
from channelfold.runtime.io.shapes import shapes_on
from channelfold.runtime.io.snapshot import Snapshot

_SAMPLES = 8
_SEEN = 64  # samples that weights are fitted to
_GROUPS = 16
_SHARE = 0.2  # of the multiplications that stay float32; the last product to do so may go beyond
_SAFE = 0.8  # of the wanted error, since other samples may lose more


@dataclass(frozen=True)
class Plan:
    """What is done for the sake of the outputs.

    ``fits``: weights as they were fitted. ``between``: what stands between products stays float32. ``kept``: the
    products that do so, each with the error that rounding it alone causes.
    """

    fits: Fits = field(default_factory=dict)
    between: bool = False
    kept: Mapping[str, float] = field(default_factory=dict)


Casts = Callable[[gs.Graph, Plan], object]


class Trials:
    """The relative L2 error of the outputs, the largest of all outputs, when a graph or parts of it are cast.

    ``names``: the products whose weights the cast rounds. ``cast`` casts a graph by a plan.
    """

    def __init__(
        self,
        graph: gs.Graph,
        names: Sequence[str],
        data: Data,
        half: Half,
        cast: Casts,
        progress: Progress = no_progress,
    ):
        self._before, self._half, self._cast = Snapshot.of(graph), half, cast
        self._names, self._progress = names, progress
        seen, unseen = held_out(data)
        self._macs = _macs(graph, names, data)
        self._seen, unseen = (seen, unseen) if len(unseen) >= _SAMPLES else (data, data)  # too few tell nothing
        self._outputs = Outputs(graph, unseen.first(_SAMPLES))

    def plan(self, wanted: float, fit: bool) -> tuple[Plan, float]:
        """What makes the error ``wanted``, or as small as it gets; the error then. ``fit``: weights may be fitted."""
        wanted *= _SAFE
        plan = Plan()
        error = self._of_plan(plan)
        if fit and error > wanted:
            fits = fitted(self._before.graph(), self._names, self._seen.first(_SEEN), self._half, self._progress)
            if (less := self._of_plan(Plan(fits))) < error:
                plan, error = Plan(fits), less
        if error <= wanted:
            return plan, error
        between = replace(plan, between=True)
        if (less := self._of_plan(between)) <= max(wanted, error / 2):
            plan, error = between, less
        return (plan, error) if error <= wanted else self._keep(plan, error, wanted)

    def _keep(self, plan: Plan, first: float, wanted: float) -> tuple[Plan, float]:
        """The plan with the products to keep in float32 so that the error, ``first`` without, is ``wanted``.

        None are kept where the error stays larger and is not halved: all products have their share in it then.
        """
        kept: dict[str, float] = {}
        error, factor, price = first, None, 0.0
        for name, own, total, rest in self._worst(plan.fits):
            kept[name] = own
            factor = factor or error**2 / max(total, 1e-30)
            price += self._macs[name]
            full = price >= _SHARE * sum(self._macs.values())
            if full or factor * rest <= wanted**2:
                error = self._of_plan(replace(plan, kept=kept))
                factor = error**2 / max(rest, 1e-30)
            if full or error <= wanted:
                break
        return (replace(plan, kept=kept), error) if error <= max(wanted, first / 2) else (plan, first)

    def _of_plan(self, plan: Plan) -> float:
        return self._of(lambda copy: self._cast(copy, plan))

    def _of(self, change: Callable[[gs.Graph], object]) -> float:
        """The error of a copy of the graph that ``change`` has changed; 0 where no output can be compared."""
        if not self._outputs.kept:
            return 0.0
        self._progress("Rounding", 0, 0)
        copy = self._before.graph()
        change(copy)
        if computes(copy):
            make_twin(copy)
        by_output = self._outputs.errors(copy).relative()[0].mean(axis=0)
        return float(np.sqrt(by_output.max(initial=0.0)))

    def share(self, plan: Plan) -> float:
        """The share of the multiplications that stay float32 by a plan."""
        return sum(self._macs[name] for name in plan.kept) / sum(self._macs.values()) if plan.kept else 0.0

    def _worst(self, fits: Fits) -> Iterator[tuple[str, float, float, float]]:
        """Every product, the most error for its price first: (name, error, squared errors of all and of those left).

        Beside its multiplications a product costs casts, which count as much as an average product.
        """
        size = max(1, -(-len(self._names) // _GROUPS))
        mean = sum(self._macs.values()) / max(len(self._macs), 1)
        pending: list[tuple[float, list[str], float]] = []

        def add(group: list[str]) -> None:
            error = self._judged(group, fits)
            heapq.heappush(pending, (-error / sum(self._macs[name] + mean for name in group), group, error))

        for start in range(0, len(self._names), size):
            add(list(self._names[start : start + size]))
        total = sum(error for *_, error in pending)
        while pending:
            _, group, error = heapq.heappop(pending)
            if len(group) == 1:
                yield group[0], float(np.sqrt(error)), total, sum(left for *_, left in pending)
                continue
            middle = len(group) // 2
            add(group[:middle])
            add(group[middle:])

    def _judged(self, group: Sequence[str], fits: Fits) -> float:
        """The squared error of a group of products in 16 bits."""

        def change(copy: gs.Graph) -> None:
            for linear in (one for one in products(copy) if one.name in names):
                self._round(copy, linear, fits)

        names = set(group)
        return self._of(change) ** 2

    def _round(self, graph: gs.Graph, linear: Linear, fits: Fits) -> None:
        """Rounds what a linear multiplies and adds."""
        if linear.name in fits:
            fits[linear.name].install(linear)
        else:
            linear.set_weight(self._half.rounded(linear.weight()))
            bias = linear.bias()
            if bias is not None and np.isfinite(held := self._half.rounded(bias)).all():  # else the Add is float32
                linear.set_bias(held)
        source, port = linear.data, 1 - linear.weight_input
        for kind in (self._half.dtype, FLOAT):
            result = gs.Variable(f"{linear.name}_{port}_{kind}", kind, source.shape)
            node = gs.Node("Cast", result.name, {"to": self._half.code if kind != FLOAT else 1}, [source], [result])
            edit.insert(graph, node, before=linear.node)
            source = result
        edit.set_input(linear.node, port, source)


def _macs(graph: gs.Graph, names: Sequence[str], data: Data) -> dict[str, int]:
    """The multiplications of products on the first sample, by name; 1 where shapes do not tell."""
    shapes = shapes_on(graph, {name: values.shape for feed in data.first(1) for name, values in feed.items()})
    found = dict.fromkeys(names, 1)
    for one in products(graph):
        if one.name in found and (shape := shapes.get(one.node.outputs[0].name)) is not None:
            found[one.name] = math.prod(shape) * one.channels[1] // one.groups * math.prod(one.kernel)
    return found
