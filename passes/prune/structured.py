"""Structured pruning: channels cut from every tensor that has them, and the layers that read them reconstructed.

    y = W [x_K; x_S]   becomes   y = (W_K + W_S R) x_K + (b + W_S o),     R, o = argmin E ||x_S - R x_K - o||^2

K are the channels that stay, S the channels that go, x the input of a layer. The channels come in groups
(``channels.groups``): a cut of S takes its rows out of every weight, bias and norm that makes x, so the graph is
smaller, not masked. The pass takes four steps, each with options:

1. ``importance`` ranks the units of each group. With data, ``sensitivity`` weights the losses of a group by their
   effect on the outputs of the model.
2. ``allocation`` gives each group its number of units under a budget of multiply-accumulates or parameters, ``latency``
   under a measured time, ``tolerance`` under an error of the outputs.
3. ``cut`` makes the cut. A proof follows: the cut graph computes the same as the uncut graph with the same channels
   masked (``cut.mask``), up to the tolerance of the verification.
4. ``reconstruct`` computes R and o in closed form, from calibration data or from the covariance that the writers'
   weights imply (``importance.implied``; a data-free reconstruction as in neuron merging, Kim et al., NeurIPS 2020).
   Without R the bias alone is corrected. No offset is right at the border of a zero-padded convolution: there o = 0,
   and R is fitted without an offset. ``reconstruct_outputs`` corrects the remaining error further, layer by layer.

A group on whose channels a norm works (the width of a transformer) is cut on request alone: the norm of the channels
that stay differs from the norm of all channels, and no reconstruction makes up for that.

Sources: Fang et al., DepGraph, CVPR 2023 (groups); Shen et al., Structural Pruning via Latency-Saliency Knapsack,
NeurIPS 2022; Kurtic et al., ZipLM, NeurIPS 2023.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Outcome, Refused
from channelfold.passes.channels.cut import cut, mask
from channelfold.passes.channels.groups import Copies, Group, find_groups, regions_of
from channelfold.passes.channels.maps import Shape
from channelfold.passes.layers.output_error import held_out
from channelfold.passes.prune import Prune, allocation, importance, reconstruct_outputs, sensitivity
from channelfold.passes.prune.costs import GroupCosts, Keeps, Kind
from channelfold.passes.prune.importance import RankedGroups, Ranking
from channelfold.passes.prune.latency import a_feed, within_latency
from channelfold.passes.prune.reconstruct import ReadStatistics, Reconstruct, Reconstruction, matters
from channelfold.passes.prune.tolerance import TRIED, of_variance, within_tolerance
from channelfold.passes.prune.trial import Trial
from channelfold.passes.verify import Verdict, Verifier
from channelfold.runtime.data.probes import shapes_of
from channelfold.runtime.errors import UsageError
from channelfold.runtime.io.files import infer_shapes
from channelfold.runtime.io.snapshot import Snapshot

_CORRECTIONS = 8  # of a budget that units of unequal size, and new biases, exceed a little


class Work(Prune):
    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        infer_shapes(graph)
        outcome = Outcome()
        shapes = shapes_of(graph, ctx.calibration, ctx.seed)
        found = find_groups(graph, shapes, self.own_cache)
        groups = list(self._usable(found, outcome))
        if not groups:
            return outcome
        for given, option in ((self.tolerance is not None, "tolerance"), (self.compensate == "outputs", "compensate")):
            if given and ctx.calibration is None:
                raise UsageError(f"{option!r} compares outputs, which needs calibration data", "Give some")
        seen, unseen = self._held_out(ctx)
        statistics = ReadStatistics(graph, regions_of(groups), seen)
        mode = "lstsq" if self.compensate in ("auto", "outputs") else self.compensate
        reconstruct = partial(Reconstruction.of, mode=mode, ridge=self.ridge)
        ranked = RankedGroups(groups, self._rankings(groups, statistics, ctx))
        if unseen is not None:
            ranked = sensitivity.scaled(graph, ranked, statistics, reconstruct, unseen)
        costs, copies = GroupCosts(graph, groups, shapes), Copies(graph, found)
        if self.keep_latency is not None:
            feed = a_feed(graph, ctx)
            keeps, share = within_latency(copies, ranked, self.keep_latency, self.align, feed, ctx.progress)
            outcome.facts["latency"] = {"kept": share}
        elif self.tolerance is not None and ctx.calibration is not None:
            trial = Trial(graph, ranked, statistics, reconstruct, ctx.calibration.first(TRIED))
            keeps = within_tolerance(trial, ranked, costs, self.tolerance, self.align, ctx.progress)
            outcome.facts["output_error"] = of_variance(trial, keeps)
        else:
            keeps = self._allocate(ranked, costs, statistics)
        if unseen is not None and (rest := unseen.calibration) is not None and rest is not seen.calibration:
            statistics.add(rest)
        made = [] if mode == "none" else list(_reconstructions(statistics, reconstruct, shapes, keeps))
        outcome.facts |= _facts(ranked, costs, keeps)
        proof = self._cut(graph, ctx, copies, keeps, outcome)
        outcome.facts["parameters"]["after"] += sum(one.install(graph, outcome) for one in made)
        if self.compensate == "outputs":
            outcome.facts["corrected"] = _corrected(graph, copies, made, keeps, ctx)
        for group in outcome.facts["groups"]:
            if group["kept"] < group["channels"]:
                what = f"{group['op']}: {group['channels']} -> {group['kept']} channels"
                outcome.change(group["node"], f"{what}, {group['parameters_saved']:,.0f} parameters saved")
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
        """The data for the statistics, and the data for the sensitivities; None where no sensitivity is needed."""
        measured = self.ratio is None and self.tolerance is None and self.allocation != "uniform"
        if ctx.calibration is None or not measured:
            return ctx, None
        seen, unseen = held_out(ctx.calibration)
        return replace(ctx, calibration=seen), replace(ctx, calibration=unseen)

    # ---- the channels that go ----------------------------------------------------------------------------------------

    def _rankings(self, groups: Sequence[Group], statistics: ReadStatistics, ctx: Context) -> list[Ranking]:
        """The ranking of the units of each group."""
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

    def _allocate(self, ranked: RankedGroups, costs: GroupCosts, statistics: ReadStatistics) -> Keeps:
        """The labels that stay under the ratio, or under the budget of multiply-accumulates or parameters."""
        sizes = ranked.sizes
        if self.ratio is not None:
            return ranked.keeps(allocation.at_share(sizes, 1 - self.ratio, self.align))
        kind: Kind = "macs" if self.keep_macs is not None else "parameters"
        share = self.keep_macs if self.keep_macs is not None else self.keep_params
        assert share is not None
        whole = costs.exact(kind, {}) or 1.0
        total = allocation.Costs(sizes, [replace(term, amount=term.amount / whole) for term in costs.terms(kind)])
        budget, exact = share, np.inf
        for _ in range(_CORRECTIONS):
            try:
                keeps = ranked.keeps(self._counts(sizes, ranked.values, total, budget))
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

    # ---- the cut -----------------------------------------------------------------------------------------------------

    def _cut(
        self, graph: gs.Graph, ctx: Context, copies: Copies, keeps: Keeps, outcome: Outcome
    ) -> dict[str, Any] | None:
        """Cuts the graph, proves that the cut equals a mask of the same channels, returns the record of the proof."""
        cut(graph, list(keeps.values()))
        if not self.verify:
            return None
        twin, cuts = copies.make(keeps)
        infer_shapes(twin)  # the masks need dtypes
        try:
            mask(twin, cuts)
        except Refused as error:
            verdict = Verdict({"unverified": str(error)}, f"the cut was not proven: {error}")
        else:
            verdict = Verifier(ctx.calibration, ctx.seed).verify(Snapshot.of(twin), Snapshot.of(graph))
        if verdict.warning:
            outcome.warnings.append(verdict.warning)
        return verdict.record


def _reconstructions(
    statistics: ReadStatistics, reconstruct: Reconstruct, shapes: Mapping[str, Shape], keeps: Keeps
) -> Iterator[Reconstruction]:
    """New weights and biases for every layer that reads channels that go, in the shapes after the cut."""
    rows = {place: keep[labels - 1] for region, keep in keeps.values() for place, (_, labels) in region.axes.items()}
    for read, moments in statistics.each():
        stays = keeps[id(read.region)][1][read.labels - 1]
        for linear in read.linears if not stays.all() else ():
            result = linear.node.outputs[0]
            out = rows.get((id(result), linear.out_axis % len(shapes[result.name])))
            yield reconstruct(linear, stays, out, moments)


def _corrected(
    graph: gs.Graph, copies: Copies, made: Sequence[Reconstruction], keeps: Keeps, ctx: Context
) -> list[str]:
    """Corrects the outputs of the reconstructed layers; returns the names of the layers that changed."""
    assert ctx.calibration is not None
    whole, _ = copies.make({})
    stays: dict[str, list[tuple[int, np.ndarray]]] = {}
    for region, keep in keeps.values():
        for (_, axis), (tensor, labels) in region.axes.items():
            stays.setdefault(tensor.name, []).append((axis, keep[labels - 1]))
    known = {id(one.node) for one in made}
    nodes = [node for node in graph.nodes if id(node) in known]
    return reconstruct_outputs.correct(graph, whole, nodes, stays, ctx.calibration, ctx.progress)


def _facts(ranked: RankedGroups, costs: GroupCosts, keeps: Keeps) -> dict[str, Any]:
    """The facts of the report on the model and on every group."""
    kinds: tuple[Kind, ...] = ("macs", "parameters")
    found: dict[str, Any] = {
        k: {"before": round(costs.exact(k, {})), "after": round(costs.exact(k, keeps))} for k in kinds
    }
    found["groups"] = []
    for group, ranking in zip(ranked.groups, ranked.rankings, strict=True):
        region, keep = keeps[id(group.region)]
        stays = keep[group.labels - 1]
        alone = np.ones(region.size, bool)
        alone[group.labels - 1] = stays
        entry = {"node": group.name, "op": group.writers[0].layer.op, "channels": int(group.channels.sum())}
        entry |= {"kept": int(group.channels[stays].sum()), "units": group.units}
        for k in kinds:
            entry[f"{k}_saved"] = found[k]["before"] - round(costs.exact(k, {id(region): (region, alone)}))
        entry["importance_lost"] = float(ranking.values[-1] - ranking.values[int(stays.sum())])
        found["groups"].append(entry)
    return found
