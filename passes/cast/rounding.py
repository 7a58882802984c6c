"""What 16 bits do to weights: biases take back the mean of the error, and the worst products stay float32.

    y = W x + b   becomes   y = W' x + b',    W' = round(W),   D = W' - W,   b' = b - D E[x]

The squared error of a product is (D E[x])^2 + D^2 Var[x]. The first term is large where a product has few inputs, as
that of a depthwise convolution. Where the first term is small, a new bias gains nothing and moves the outputs either
way: float16 weights changed those of PLCMOS by 5e-5, and by 1.5e-4 with all biases corrected.

One product can cause nearly all of an error: in bfloat16 the first depthwise convolution of EfficientNet-Lite0 changes
the outputs by 9.0 %, all others together by 3.5 %. So products are rounded in groups, with all others exact, and the
groups that change the outputs most are halved, down to single products. The squared errors of groups add up.
"""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, DoesNotFit
from channelfold.passes.cast.kinds import FLOAT, Half
from channelfold.passes.layers.borders import inside
from channelfold.passes.layers.linear import Linear, linears
from channelfold.passes.layers.output_error import Outputs
from channelfold.runtime.data.sources import Data
from channelfold.runtime.errors import no_progress
from channelfold.runtime.io import edit
from channelfold.runtime.io.bfloat16 import computes, make_twin
from channelfold.runtime.io.front import behind_of, unknown
from channelfold.runtime.io.snapshot import Snapshot
from channelfold.runtime.stats.channels import ChannelMoments
from channelfold.runtime.stats.observe import by_name

Progress = Callable[[str, int, int], None]

_SAMPLES = 8
_GROUPS = 16
_MEAN = 0.2  # of the squared error of a product: the part that a bias has to take back at least
_SHARE = 5  # one product in so many stays float32 at most


def products(graph: gs.Graph) -> list[Linear]:
    """The linears of a graph whose weights a cast rounds."""
    found = linears(graph)
    return [one for one in found if one.source.dtype == one.dtype == FLOAT and one.factor("alpha") == 1]


@dataclass
class Means:
    """What products read on average: the ``moments`` of the channels of a tensor, by its name and their axis, and by
    the name of a product which places of its kernel lie ``inside`` (``borders``). Empty where biases stay.
    """

    moments: Mapping[tuple[str, int], ChannelMoments] = field(default_factory=dict)
    inside: Mapping[str, np.ndarray] = field(default_factory=dict)

    def correct_bias(self, linear: Linear, half: Half) -> None:
        """Lets a bias take back what rounding the weight does on average, where there is a place and that is much."""
        seen = self.moments.get((linear.data.name, linear.in_axis))
        if seen is None or not seen.positions or not linear.takes_bias:
            return
        weight, bias, inside = linear.weight(), linear.bias(), self.inside.get(linear.name, 1.0)
        change = half.rounded(weight) - weight
        missed = linear.respond(change * inside, seen.mean)
        taken, rest = np.square(missed).sum(), linear.respond(np.square(change) * inside, seen.variance).sum()
        if taken < _MEAN * (taken + rest):
            return
        corrected = (0.0 if bias is None else bias) - missed
        if np.isfinite(half.rounded(corrected)).all():
            with contextlib.suppress(DoesNotFit):
                linear.set_bias(corrected)


def measured_means(graph: gs.Graph, ctx: Context) -> Means:
    """What the products of a graph whose weights are rounded read on the calibration data."""
    behind = behind_of(graph, unknown(graph))
    sites = [one for one in products(graph) if one.takes_bias and id(one.data) not in behind]
    found = {(site.data.name, site.in_axis): ChannelMoments(site.in_axis) for site in sites}
    ctx.observe(graph, by_name((name, seen) for (name, _), seen in found.items()))
    return Means(found, inside(graph, sites, ctx.data))


class Trials:
    """The relative L2 error of the outputs, the largest of all outputs, when a graph or parts of it are cast.

    ``names``: the products whose weights the cast rounds.
    """

    def __init__(
        self,
        graph: gs.Graph,
        names: Sequence[str],
        data: Data,
        half: Half,
        means: Means,
        progress: Progress = no_progress,
    ):
        self._before, self._half, self._means = Snapshot.of(graph), half, means
        self._names, self._progress = names, progress
        self._outputs = Outputs(graph, data.first(_SAMPLES))

    def of(self, cast: Callable[[gs.Graph], None]) -> float:
        """The error of a copy of the graph that ``cast`` has changed."""
        self._progress("Rounding", 0, 0)
        copy = self._before.graph()
        cast(copy)
        if computes(copy):
            make_twin(copy)
        lost, energies = self._outputs.lost(copy), self._outputs.energies
        return max((np.sqrt(lost[name] / energy) for name, energy in energies.items() if energy > 0), default=0.0)

    def keep(self, wanted: float, cast: Callable[[gs.Graph, Collection[str]], None]) -> tuple[dict[str, float], float]:
        """The products to keep in float32 so that the error is ``wanted``, with the error of each, and the error left.

        None are kept where the error stays larger and is not halved: all products have their share in it then.
        ``cast`` casts a graph, but for the products of some names.
        """
        kept: dict[str, float] = {}
        error = first = self.of(lambda copy: cast(copy, kept))
        if error <= wanted:
            return kept, error
        factor = None
        for name, own, total, rest in self._worst():
            kept[name] = own
            factor = factor or error**2 / max(total, 1e-30)
            full = len(kept) * _SHARE >= len(self._names)
            if full or factor * rest <= wanted**2:
                error = self.of(lambda copy: cast(copy, kept))
                factor = error**2 / max(rest, 1e-30)
            if full or error <= wanted:
                break
        return (kept, error) if error <= max(wanted, first / 2) else ({}, first)

    def _worst(self) -> Iterator[tuple[str, float, float, float]]:
        """Every product, from the largest error on: (name, error, squared errors of all and of those that follow)."""
        size = max(1, -(-len(self._names) // _GROUPS))
        pending = [self._judged(self._names[start : start + size]) for start in range(0, len(self._names), size)]
        heapq.heapify(pending)
        total = -sum(error for error, _ in pending)
        while pending:
            error, group = heapq.heappop(pending)
            if len(group) == 1:
                yield group[0], float(np.sqrt(-error)), total, -sum(left for left, _ in pending)
                continue
            middle = len(group) // 2
            for part in (group[:middle], group[middle:]):
                heapq.heappush(pending, self._judged(part))

    def _judged(self, group: Sequence[str]) -> tuple[float, list[str]]:
        """The squared error of a group of products in 16 bits, negative so that the largest comes first."""

        def cast(copy: gs.Graph) -> None:
            for linear in (one for one in products(copy) if one.name in names):
                self._round(copy, linear)

        names = set(group)
        return -(self.of(cast) ** 2), list(group)

    def _round(self, graph: gs.Graph, linear: Linear) -> None:
        """Rounds what a linear multiplies and adds."""
        self._means.correct_bias(linear, self._half)
        linear.set_weight(self._half.rounded(linear.weight()))
        bias = linear.bias()
        if bias is not None and np.isfinite(held := self._half.rounded(bias)).all():  # an Add that overflows is float32
            linear.set_bias(held)
        source, port = linear.data, 1 - linear.weight_input
        for kind in (self._half.dtype, FLOAT):
            result = gs.Variable(f"{linear.name}_{port}_{kind}", kind, source.shape)
            node = gs.Node("Cast", result.name, {"to": self._half.code if kind != FLOAT else 1}, [source], [result])
            edit.insert(graph, node, before=linear.node)
            source = result
        edit.set_input(linear.node, port, source)
