"""Structured pruning: channels taken out of all tensors that have them, and what reads the rest refitted.

    y = W [x_K; x_S]   becomes   y = (W_K + W_S R) x_K + (b + W_S o),     R, o = argmin E ||x_S - R x_K - o||^2

K are the channels that stay, S those that go, x what a layer reads. In between stand the groups of ``channels.groups``:
cutting S takes its rows out of every weight, bias and norm that makes x, so that the graph is smaller, not masked.

Four steps, each of which can be chosen. How much each unit of a group matters (``importance``). How many units each
group keeps: under a budget of multiply-accumulates, parameters (``allocation``) or measured time (``latency``),
or while the outputs stay within a tolerance (``tolerance``); with data, what a group loses is weighted by what
that does to the outputs (``sensitivity``). The cut itself, which is proven: the cut graph computes what the uncut one
does with the same channels silenced (``cut.mask``), to the tolerance of the verification. And R and o (``refit``), in
closed form: from calibration data, or from what the writers' weights imply (``importance.implied``; a data-free
reconstruction as in neuron merging, Kim et al., NeurIPS 2020); R = 0 leaves a correction of the bias. At the border of
a zero-padded convolution an offset would be wrong: there o = 0 and R is fitted without it. What that leaves can be
corrected further, layer by layer (``refit_outputs``).

Groups on whose channels a norm works (the width of a transformer) are not cut unless asked for: there the norm of what
is left differs from the norm of all, and no compensation makes up for it.

Sources: Fang et al., DepGraph, CVPR 2023 (groups); Shen et al., Structural Pruning via Latency-Saliency Knapsack,
NeurIPS 2022; Kurtic et al., ZipLM, NeurIPS 2023.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Outcome, Refused
from channelfold.passes.channels.cut import cut, mask
from channelfold.passes.channels.groups import Copies, Group, find_groups, regions_of
from channelfold.passes.channels.maps import Shape
from channelfold.passes.layers.linear import Linear
from channelfold.passes.prune import Prune, allocation, importance, refit_outputs, sensitivity
from channelfold.passes.prune.costs import GroupCosts, Keeps, Kind
from channelfold.passes.prune.importance import MeanCovariance, Ranking
from channelfold.passes.prune.latency import a_feed, units_within_latency
from channelfold.passes.prune.refit import Fit, ReadStatistics, matters
from channelfold.passes.prune.tolerance import TRIED, units_within_tolerance
from channelfold.passes.prune.trial import Trial
from channelfold.passes.verify import Verdict, Verifier
from channelfold.runtime.data.probes import shapes_of
from channelfold.runtime.errors import UsageError
from channelfold.runtime.io.files import infer_shapes
from channelfold.runtime.io.session import Feed
from channelfold.runtime.io.snapshot import Snapshot

_CORRECTIONS = 8  # of a budget that units of unequal size, and new biases, have made a little more of


class Work(Prune):
    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        infer_shapes(graph)
        outcome = Outcome()
        shapes = shapes_of(graph, ctx.calibration, ctx.seed)
        found = find_groups(graph, shapes)
        groups = list(self._usable(found, outcome))
        if not groups:
            return outcome
        if self.compensate == "outputs" and ctx.calibration is None:
            raise UsageError("'compensate' is 'outputs', which needs calibration data", "Give some, or choose 'lstsq'")
        seen, unseen = self._held_out(ctx)
        statistics = ReadStatistics(graph, regions_of(groups), seen)
        rankings = self._rankings(groups, statistics, ctx)
        if unseen is not None:
            rankings = sensitivity.scaled(graph, groups, rankings, statistics, self._fit, unseen)
        costs, copies = GroupCosts(graph, groups, shapes), Copies(graph, found)
        if self.keep_latency is not None:
            keeps = self._within_latency(groups, rankings, copies, a_feed(graph, ctx), ctx, outcome)
        elif self.tolerance is not None:
            if ctx.calibration is None:
                raise UsageError(
                    "'tolerance' is of the outputs, which needs calibration data", "Give some, or a budget"
                )
            trial = Trial(graph, regions_of(groups), statistics, self._fit, ctx.calibration.first(TRIED))
            keeps = self._within_tolerance(groups, rankings, trial, costs, ctx, outcome)
        else:
            keeps = self._allocate(groups, rankings, costs, statistics)
        if unseen is not None and (rest := unseen.calibration) is not None and rest is not seen.calibration:
            statistics.add(rest)
        fits = [] if self.compensate == "none" else self._fits(statistics, shapes, keeps)
        outcome.facts |= _facts(groups, rankings, costs, keeps)
        proof = self._cut(graph, ctx, copies, keeps, outcome)
        outcome.facts["parameters"]["after"] += sum(fit.install(graph, outcome) for fit in fits)
        if self.compensate == "outputs":
            outcome.facts["corrected"] = self._correct(graph, copies, fits, keeps, ctx)
        _say(outcome)
        outcome.facts |= {"statistics": statistics.source, "slice_equals_mask": proof}
        infer_shapes(graph)
        return outcome

    def _usable(self, groups: Sequence[Group], outcome: Outcome) -> Iterator[Group]:
        """The groups that may be cut; refuses the others."""
        for group in groups:
            if code := self._why_not(group):
                outcome.refuse(group.name, f"its {int(group.channels.sum())} channels stay: {code}", code)
            else:
                yield group

    def _why_not(self, group: Group) -> str:
        if reason := self.patterns.why_not(*(part.node.name for part in group.writers)):
            return reason
        if not group.free.any() or group.units < 2:
            return max(group.reasons, key=lambda reason: group.reasons[reason], default="it is the only one")
        return (
            f"{group.region.reduced}; 'width' cuts it all the same" if group.region.reduced and not self.width else ""
        )

    def _held_out(self, ctx: Context) -> tuple[Context, Context | None]:
        """The data that statistics come from, and those that sensitivities are measured on where they count."""
        measured = self.ratio is None and self.tolerance is None and self.allocation != "uniform"
        if ctx.calibration is None or not measured:
            return ctx, None
        seen, unseen = sensitivity.held_out(ctx.calibration)
        return replace(ctx, calibration=seen), replace(ctx, calibration=unseen)

    # ---- what goes ---------------------------------------------------------------------------------------------------

    def _rankings(self, groups: Sequence[Group], statistics: ReadStatistics, ctx: Context) -> list[Ranking]:
        """The order in which the units of each group go, and what the others are worth."""
        if self.importance in ("l1", "l2"):
            return [importance.ranked(g, importance.magnitudes(g, int(self.importance[1]))) for g in groups]
        if self.importance == "bn":
            scores = [importance.gammas(g) for g in groups]
            if all(score is None for score in scores):
                raise UsageError("'importance' is 'bn', and no group passes a BatchNormalization", "Choose 'l2'")
            return [
                importance.ranked(g, importance.magnitudes(g, 1) if score is None else score)
                for g, score in zip(groups, scores, strict=True)
            ]
        if self.importance == "activation" and ctx.calibration is None:
            raise UsageError("'importance' is 'activation', which needs calibration data", "Give some, or choose 'l2'")
        readers = [sum(matters(read, group) for read in statistics.reads) for group in groups]
        found: list[Ranking | None] = [None] * len(groups)
        energies = [np.zeros(group.units) for group in groups]
        for done, (read, moments) in enumerate(statistics.each()):
            ctx.progress("Ranking channels", done, len(statistics.reads))
            for number, group in enumerate(groups):
                if not matters(read, group):
                    continue
                if self.importance != "activation" and readers[number] == 1 and moments.covariance.ndim == 2:
                    found[number] = importance.reconstruction(group, read, moments, self.ridge)
                else:
                    energies[number] += importance.energies(group, read, moments)
        return [
            ranking or importance.ranked(g, energy if energy.any() else importance.magnitudes(g, 2) / g.units)
            for g, ranking, energy in zip(groups, found, energies, strict=True)
        ]

    def _allocate(
        self, groups: Sequence[Group], rankings: Sequence[Ranking], costs: GroupCosts, statistics: ReadStatistics
    ) -> Keeps:
        sizes = _sizes(groups)
        if self.ratio is not None:
            return _keeps(groups, rankings, allocation.at_share(sizes, 1 - self.ratio, self.align))
        kind: Kind = "macs" if self.keep_macs is not None else "parameters"
        share = self.keep_macs if self.keep_macs is not None else self.keep_params
        assert share is not None
        whole = costs.exact(kind, {}) or 1.0
        total = allocation.Costs(sizes, [replace(term, amount=term.amount / whole) for term in costs.terms(kind)])
        values = [ranking.values for ranking in rankings]
        budget, exact = share, np.inf
        for _ in range(_CORRECTIONS):
            try:
                keeps = _keeps(groups, rankings, self._counts(sizes, values, total, budget))
            except UsageError:
                if budget == share:
                    raise
                break
            added = statistics.new_biases(keeps) if kind == "parameters" and self.compensate != "none" else 0
            exact = (costs.exact(kind, keeps) + added) / whole
            if exact <= share * (1 + 1e-9):
                return keeps
            budget *= share / exact
        raise UsageError(
            f"A share of {share:g} of the {kind} cannot be met: with unequal units and new biases it is {exact:.3f}",
            "Raise it, or lower 'align'",
        )

    def _counts(
        self, sizes: Sequence[allocation.Group], values: Sequence[np.ndarray], total: allocation.Costs, budget: float
    ) -> list[int]:
        if self.allocation == "uniform":
            return allocation.uniform(sizes, total, budget, self.align)
        if self.allocation == "ranked":
            return allocation.ranked(sizes, values, total, budget, self.align)
        return allocation.under_budget(sizes, values, total, budget, self.align)

    def _within_latency(
        self,
        groups: Sequence[Group],
        rankings: Sequence[Ranking],
        copies: Copies,
        feed: Feed,
        ctx: Context,
        outcome: Outcome,
    ) -> Keeps:
        assert self.keep_latency is not None
        kept, taken = units_within_latency(
            copies,
            lambda kept: _keeps(groups, rankings, kept),
            _sizes(groups),
            [ranking.values for ranking in rankings],
            self.keep_latency,
            self.align,
            feed,
            ctx.progress,
        )
        outcome.facts = {"latency": {"kept": taken}}
        return _keeps(groups, rankings, kept)

    def _within_tolerance(
        self,
        groups: Sequence[Group],
        rankings: Sequence[Ranking],
        trial: Trial,
        costs: GroupCosts,
        ctx: Context,
        outcome: Outcome,
    ) -> Keeps:
        assert self.tolerance is not None
        sizes = _sizes(groups)
        kept, errors = units_within_tolerance(
            trial,
            lambda kept: _keeps(groups, rankings, kept),
            sizes,
            allocation.Costs(sizes, costs.terms("macs")),
            self.tolerance,
            self.align,
            ctx.progress,
        )
        outcome.facts = {"output_error": errors}
        return _keeps(groups, rankings, kept)

    # ---- what stays makes up for it ----------------------------------------------------------------------------------

    def _fits(self, statistics: ReadStatistics, shapes: Mapping[str, Shape], keeps: Keeps) -> list[Fit]:
        """New weights and biases of all that reads channels that go, for the graph after the cut."""
        rows = {
            place: keep[labels - 1] for region, keep in keeps.values() for place, (_, labels) in region.axes.items()
        }
        fits = []
        for read, moments in statistics.each():
            stays = keeps[id(read.region)][1][read.labels - 1]
            for linear in read.linears if not stays.all() else ():
                result = linear.node.outputs[0]
                out = rows.get((id(result), linear.out_axis % len(shapes[result.name])))
                fits.append(self._fit(linear, stays, out, moments))
        return fits

    def _fit(self, linear: Linear, stays: np.ndarray, rows: np.ndarray | None, moments: MeanCovariance) -> Fit:
        mode = "lstsq" if self.compensate in ("auto", "outputs") else self.compensate
        return Fit.of(linear, stays, rows, moments, mode, self.ridge)

    def _correct(self, graph: gs.Graph, copies: Copies, fits: Sequence[Fit], keeps: Keeps, ctx: Context) -> list[str]:
        """Takes the errors that are left out of the outputs of what was refitted; the names of what changed."""
        assert ctx.calibration is not None
        whole, _ = copies.make({})
        stays: dict[str, list[tuple[int, np.ndarray]]] = {}
        for region, keep in keeps.values():
            for (_, axis), (tensor, labels) in region.axes.items():
                stays.setdefault(tensor.name, []).append((axis, keep[labels - 1]))
        refitted = {id(fit.node) for fit in fits}
        nodes = [node for node in graph.nodes if id(node) in refitted]
        return refit_outputs.correct(graph, whole, nodes, stays, ctx.calibration, ctx.progress)

    def _cut(
        self, graph: gs.Graph, ctx: Context, copies: Copies, keeps: Keeps, outcome: Outcome
    ) -> dict[str, Any] | None:
        """Cuts, and proves that it is what silencing the same channels is; returns the record of the proof."""
        cut(graph, list(keeps.values()))
        if not self.verify:
            return None
        twin, cuts = copies.make(keeps)
        infer_shapes(twin)  # and dtypes, which the masks need
        try:
            mask(twin, cuts)
        except Refused as error:
            verdict = Verdict({"unverified": str(error)}, f"the cut was not proven: {error}")
        else:
            verdict = Verifier(ctx.calibration, ctx.seed).verify(Snapshot.of(twin), Snapshot.of(graph))
        if verdict.warning:
            outcome.warnings.append(verdict.warning)
        return verdict.record


def _sizes(groups: Sequence[Group]) -> list[allocation.Group]:
    return [allocation.Group(g.name, g.units, max(1, int((~g.free).sum())), int(np.median(g.channels))) for g in groups]


def _keeps(groups: Sequence[Group], rankings: Sequence[Ranking], kept: Sequence[int]) -> Keeps:
    """The labels that stay when each group keeps so many of its units, the last of its ranking."""
    keeps: Keeps = {}
    for group, ranking, count in zip(groups, rankings, kept, strict=True):
        _, keep = keeps.setdefault(id(group.region), (group.region, np.ones(group.region.size, bool)))
        keep[group.labels[ranking.order[: group.units - count]] - 1] = False
    return {key: (region, region.completed(keep)) for key, (region, keep) in keeps.items()}


def _facts(groups: Sequence[Group], rankings: Sequence[Ranking], costs: GroupCosts, keeps: Keeps) -> dict[str, Any]:
    """What the report says of the model and of every group."""
    kinds: tuple[Kind, ...] = ("macs", "parameters")
    found: dict[str, Any] = {
        k: {"before": round(costs.exact(k, {})), "after": round(costs.exact(k, keeps))} for k in kinds
    }
    found["groups"] = []
    for group, ranking in zip(groups, rankings, strict=True):
        region, keep = keeps[id(group.region)]
        stays = keep[group.labels - 1]
        alone = np.ones(region.size, bool)
        alone[group.labels - 1] = stays
        only = {id(region): (region, alone)}
        saved = {f"{k}_saved": found[k]["before"] - round(costs.exact(k, only)) for k in kinds}
        lost = float(ranking.values[-1] - ranking.values[int(stays.sum())])
        found["groups"].append(
            {
                "node": group.name,
                "op": group.writers[0].layer.op,
                "channels": int(group.channels.sum()),
                "kept": int(group.channels[stays].sum()),
                "units": group.units,
                **saved,
                "importance_lost": lost,
            }
        )
    return found


def _say(outcome: Outcome) -> None:
    """One change for every group that has lost channels."""
    for group in outcome.facts["groups"]:
        if group["kept"] < group["channels"]:
            what = f"{group['op']}: {group['channels']} -> {group['kept']} channels"
            outcome.change(group["node"], f"{what}, {group['parameters_saved']:,.0f} parameters saved")
