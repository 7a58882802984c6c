"""Hidden channels of FFNs replaced by the best linear stand-in, without training.

    y = W2 a + b2,   a = act(W1 x + b1)      (or with a gate)
    ~ (W2_K + N) a_K + M x + (b2 + m)        K: the hidden channels that stay, S: the channels that go

[M N] is the ridge regression of W2_S a_S on [x; a_K] over the calibration data (``least_squares``), and m corrects the
mean. M = 0 is pruning with reconstruction, M = N = 0 plain pruning, and the fold of RePaViT, which idles each channel
of S, is one choice of M. For the same channels no choice has a smaller reconstruction error. M costs inputs x outputs
MACs, which must be worth more than hidden channels at the same cost. Beside a parallel linear M costs nothing.

S grows channel by channel, always by the channel that adds the least reconstruction error. One budget decides how many
channels each FFN keeps: ``knapsack`` minimizes the sum of the errors of all FFNs at the outputs of the model, where the
error of an FFN is multiplied by its measured sensitivity (``output_error``). The covariances are those of the original
model. They take one run over the data where they fit into memory, and two runs otherwise.

The regression has as many unknowns per output as there are channels. With fewer than ten positions per channel the
error on other data is a multiple of the error on the calibration data; the default ridge is then larger.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Outcome, Refused
from channelfold.passes.channels.scale_regions import Shape
from channelfold.passes.ffn import ApproximateFfn
from channelfold.passes.ffn.blocks import Ffn, StandIn, find_ffns
from channelfold.passes.layers.linear import view
from channelfold.passes.layers.output_error import Outputs, replaced
from channelfold.passes.numeric import least_squares
from channelfold.passes.numeric.knapsack import knapsack
from channelfold.passes.numeric.least_squares import Removal
from channelfold.runtime.io.files import infer_shapes
from channelfold.runtime.io.shapes import measured_shapes
from channelfold.runtime.stats.covariance import LIMIT, Moments, bytes_of, collect

_NOTHING = 1e-10  # of the energy: a smaller error is too small to measure a sensitivity
RIDGE = 0.3  # times features / positions; measured on a BERT with 2,900 and 34,600 positions


class Work(ApproximateFfn):
    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        outcome = Outcome()
        infer_shapes(graph)
        shapes = measured_shapes(graph, self.feed(ctx))
        ffns = list(self._ffns(graph, shapes, outcome))
        whole = sum(bytes_of(ffn.inputs + ffn.hidden) for ffn in ffns) <= LIMIT
        sites: list[_Site] = []
        held: list[Moments] = []
        for ffn, moments in self._seen(graph, ffns, ctx):
            ctx.progress("Ordering hidden channels", len(sites), len(ffns))
            try:
                sites.append(self._study(ffn, moments))
                held += [moments] if whole else []
            except Refused as error:
                outcome.refuse(ffn.name, str(error), "data")
        if not sites:
            return outcome
        reference = Outputs(graph, ctx.data)
        for number, site in enumerate(sites):
            ctx.progress("Measuring sensitivities", number, len(sites))
            site.measure(graph, reference)
        choices = self._choose(sites)
        ffns = [site.ffn for site in sites]
        again = zip(ffns, held, strict=True) if whole else self._seen(graph, ffns, ctx)
        plans = [
            self._stand_in(moments, ffn, site.removed(choice), choice.branch)
            for (ffn, moments), site, choice in zip(again, sites, choices, strict=True)
        ]
        facts = [site.cut(c, p, shapes, outcome) for site, c, p in zip(sites, choices, plans, strict=True)]
        outcome.facts = {
            "ffns": facts,
            "predicted_output_error": math.sqrt(sum(f["sensitivity"] * f["error"] ** 2 for f in facts)),
            "output_error": math.sqrt(reference.error(graph)),
        }
        return outcome

    def _ffns(self, graph: gs.Graph, shapes: dict[str, Shape], outcome: Outcome) -> Iterator[Ffn]:
        for ffn in find_ffns(graph, shapes, outcome):
            if reason := self.patterns.why_not(ffn.name):
                outcome.refuse(ffn.name, reason, "excluded")
            elif self.branch == "always" and ffn.no_branch:
                outcome.refuse(ffn.name, f"no dense branch: {ffn.no_branch}", ffn.no_branch)
            else:
                yield ffn

    def _seen(self, graph: gs.Graph, ffns: list[Ffn], ctx: Context) -> Iterator[tuple[Ffn, Moments]]:
        """Each FFN with the moments of [x; a], or of a alone where the FFN gets no branch."""

        def wanted(ffn: Ffn) -> tuple[Moments, int]:
            up, branched = ffn.ups[0], self.branch != "never" and not ffn.no_branch
            axes = {up.data.name: up.in_axis} if branched else {}
            return Moments(axes | {ffn.down.data.name: ffn.down.in_axis}), ffn.inputs + ffn.hidden

        remaining = iter(ffns)
        for group in collect(graph, map(wanted, ffns), ctx.data, ctx.progress):
            while group:
                yield next(remaining), group.pop(0)

    def _study(self, ffn: Ffn, moments: Moments) -> _Site:
        """The error curves of an FFN. Raises Refused where the data are too few."""
        if moments.count < ffn.hidden:
            raise Refused(f"{moments.count} positions were seen, too few for {ffn.hidden} hidden channels")
        covariance, matrix = moments.covariance, ffn.matrix()
        first = len(covariance) - ffn.hidden
        inner, gram = covariance[first:, first:], matrix.T @ matrix
        energy = least_squares.energy(inner, matrix)
        if not energy > 0:
            raise Refused("its output is constant on the calibration data")
        ridge, units = self._ridge(moments, ffn), np.arange(ffn.hidden)[:, None]
        plain = least_squares.order(inner, gram, units, ridge)
        dense = None
        if first:
            dense = least_squares.order(covariance, np.pad(gram, ((first, 0), (first, 0))), first + units, ridge)
        trial = self._stand_in(moments, ffn, plain.order[: ffn.hidden // 2], False)
        return _Site(ffn, energy, plain, dense, trial)

    def _stand_in(self, moments: Moments, ffn: Ffn, removed: np.ndarray, branch: bool) -> StandIn:
        return stand_in(moments, ffn.matrix(), removed, branch, self._ridge(moments, ffn))

    def _ridge(self, moments: Moments, ffn: Ffn) -> float:
        return RIDGE * (ffn.inputs + ffn.hidden) / moments.count if self.ridge is None else self.ridge

    def _choose(self, sites: list[_Site]) -> list[_Choice]:
        """The choice for each FFN, with the least error at the outputs for a budget, or the least MACs for an error."""
        options = [list(site.choices(self.align, self.branch, self.keep_hidden is not None)) for site in sites]
        if self.max_error is not None:
            budget, priced = self.max_error**2, [[(-c.macs, c.harm) for c in choices] for choices in options]
        elif self.keep_macs is not None:
            budget = self.keep_macs * sum(site.ffn.macs(site.ffn.hidden) for site in sites)
            priced = [[(-c.harm, c.macs) for c in choices] for choices in options]
        else:
            budget = (self.keep_hidden or 1.0) * sum(site.ffn.hidden for site in sites)
            priced = [[(-c.harm, c.kept) for c in choices] for choices in options]
        return [choices[place] for choices, place in zip(options, knapsack(priced, budget), strict=True)]


def stand_in(moments: Moments, matrix: np.ndarray, removed: np.ndarray, branch: bool, ridge: float) -> StandIn:
    """The best stand-in for the channels ``removed`` that ``matrix`` (outputs, hidden) reads.

    ``moments`` holds the hidden channels, and before them the input channels, which a ``branch`` needs.
    """
    covariance, mean, hidden = moments.covariance, moments.mean, matrix.shape[1]
    first = len(mean) - hidden
    kept = np.setdiff1d(np.arange(hidden), removed)
    inputs = first if branch else 0
    features = np.concatenate([np.arange(inputs), first + kept])
    target = np.zeros((len(matrix), len(mean)))
    target[:, first + removed] = matrix[:, removed]
    found = least_squares.regress(covariance, target, features, ridge)
    error = least_squares.residual(covariance, target, features, found)
    offset = target @ mean - found @ mean[features]
    dense = found[:, :inputs] if branch else None
    return StandIn(kept, matrix[:, kept] + found[:, inputs:], offset, dense, error)


@dataclass(frozen=True)
class _Choice:
    """An FFN with ``kept`` hidden channels; ``harm`` is the squared error that it makes at the outputs of the model."""

    kept: int
    branch: bool
    error: float
    harm: float
    macs: int


@dataclass
class _Site:
    """An FFN, the energy of its output, its curves of squared errors, and a stand-in that measures the sensitivity."""

    ffn: Ffn
    energy: float
    plain: Removal
    dense: Removal | None
    trial: StandIn
    sensitivity: float = 1.0

    def measure(self, graph: gs.Graph, reference: Outputs) -> None:
        """Measures the sensitivity with the outputs of the model. Raises ModelError."""
        down = view(graph, self.ffn.down.node)
        weight = np.zeros((self.ffn.outputs, self.ffn.hidden))
        weight[:, self.trial.kept] = self.trial.matrix
        bias, error = down.bias(), self.trial.error
        if bias is None:
            error += float(self.trial.offset @ self.trial.offset)
        if error <= _NOTHING * self.energy or not reference.names:
            return
        with replaced(down, weight.reshape(down.weight().shape), None if bias is None else bias + self.trial.offset):
            self.sensitivity = reference.error(graph) * self.energy / error

    def choices(self, align: int, branch: str, by_channels: bool) -> Iterator[_Choice]:
        """All choices; ``by_channels`` yields one choice for each number of channels, with a branch where it pays."""
        hidden = self.ffn.hidden
        yield self._choice(hidden, False)
        for kept in range(min(align, hidden), hidden, align):
            plain, dense = self._choice(kept, False), self._choice(kept, True) if self.dense else None
            if dense is None or branch == "never":
                yield plain
            elif branch == "always":
                yield dense
            elif not by_channels:
                yield from (plain, dense)
            else:
                same = min(hidden, -(-dense.macs * hidden // self.ffn.macs(hidden)))  # channels for the price
                yield dense if dense.error <= self._choice(same, False).error else plain

    def _choice(self, kept: int, branch: bool) -> _Choice:
        curve = self.dense if branch and self.dense is not None else self.plain
        error = float(curve.errors[self.ffn.hidden - kept]) / self.energy
        return _Choice(kept, branch, error, self.sensitivity * error, self.ffn.macs(kept, branch))

    def removed(self, choice: _Choice) -> np.ndarray:
        curve = self.dense if choice.branch and self.dense is not None else self.plain
        return curve.order[: self.ffn.hidden - choice.kept]

    def cut(self, choice: _Choice, plan: StandIn, shapes: dict[str, Shape], outcome: Outcome) -> dict[str, Any]:
        """Applies a plan; returns its facts."""
        ffn, before = self.ffn, self.ffn.hidden
        macs, error = [ffn.macs(before), ffn.macs(before)], 0.0
        if choice.kept < before:
            try:
                ffn.cut(plan, shapes)
                macs[1], error = choice.macs, math.sqrt(plan.error / self.energy)
                into = f"{ffn.parallel.name} beside it" if ffn.parallel is not None else "a dense branch"
                with_branch = f" and {into}" if choice.branch else ""
                what = f"{before} -> {choice.kept} hidden channels{with_branch}, output {error:.2%} off"
                outcome.change(ffn.name, what)
            except Refused as reason:
                outcome.refuse(ffn.name, str(reason), "overflow")
        return {
            "node": ffn.name,
            "hidden": [before, ffn.hidden],
            "branch": choice.branch and ffn.hidden < before,
            "macs": macs,
            "error": error,
            "sensitivity": self.sensitivity,
        }
