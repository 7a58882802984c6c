"""Channels of activations changed site by site, by what the calibration data say of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Outcome, Pass, Refused
from channelfold.passes.channels.scale_regions import Shape
from channelfold.passes.layers.linear import Linear, view
from channelfold.passes.layers.quantization_error import ROWS
from channelfold.runtime.io.files import infer_shapes
from channelfold.runtime.io.shapes import measured_shapes
from channelfold.runtime.stats.channels import ChannelStatistics
from channelfold.runtime.stats.observe import by_name

Shapes = dict[str, Shape]


def change_each(
    step: Pass,
    graph: gs.Graph,
    ctx: Context,
    find: Callable[[Shapes, Outcome], list[Linear]],
    change: Callable[[Linear, Shapes, ChannelStatistics, Outcome], dict[str, Any]],
) -> Outcome:
    """Finds sites, observes what they read, and changes one after the other; a fact for each that was changed.

    ``change`` raises Refused, with nothing changed, where a site stays as it is.
    """
    outcome, facts = Outcome(), []
    infer_shapes(graph)
    shapes = measured_shapes(graph, step.feed(ctx))
    sites = find(shapes, outcome)
    observers = {linear.data.name: ChannelStatistics(linear.in_axis, ROWS) for linear in sites}
    ctx.observe(graph, by_name(observers.items()))
    for number, linear in enumerate(sites):
        ctx.progress(step.needs_data, number, len(sites))
        seen = observers[linear.data.name]
        with outcome.refusing(linear.name, f"{linear.data.name} stays as it is"):
            if not seen.positions:
                raise Refused("no calibration sample reached it")
            facts.append(change(view(graph, linear.node), shapes, seen, outcome))
    outcome.facts = {"sites": facts}
    return outcome
