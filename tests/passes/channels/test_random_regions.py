"""Random graphs of what a region can meet: whatever scale and shift is moved, the outputs stay what they were."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from channelfold.passes.base import Refused
from channelfold.passes.channels.rescale import rescale
from channelfold.passes.channels.scale_regions import trace
from channelfold.passes.layers.linear import linears, view
from channelfold.runtime.io.files import check, infer_shapes
from channelfold.runtime.io.shapes import shapes_on
from channelfold.tests.graphs import listing, run
from channelfold.tests.region_strategies import difference, graphs

RTOL = 1e-8  # of the largest output; scales are up to e^3 and quotients of small numbers are among the operators


def attempt(graph: gs.Graph, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    """The outputs; None where the graph does not run on inputs of this shape, or leaves the range of RTOL."""
    try:
        made = run(graph, feed)
    except Exception:
        return None
    return made if all((np.abs(values) < 1e4).all() for values in made.values()) else None


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(graphs(), st.integers(0, 2**32 - 1))
def test_any_region_can_be_rescaled(made, seed):
    graph, values = made
    infer_shapes(graph)
    shapes = {name: np.shape(array) for name, array in values.items()}
    written, feed, rng = listing(graph), {"x": values["x"]}, np.random.default_rng(seed)
    declared = zip(graph.inputs[0].shape, shapes["x"], strict=True)
    sizes = [n if isinstance(n, int) else old + 1 + axis for axis, (n, old) in enumerate(declared)]
    larger = {"x": rng.standard_normal(sizes)}
    before, elsewhere = run(graph, feed), attempt(graph, larger)
    done = []
    for node in [linear.node for linear in linears(graph)]:
        for insert in (False, True):
            try:
                found = view(graph, node)
                region = trace(graph, found.data, found.in_axis, shapes, insert)
                scale = np.exp(rng.normal(size=region.size))
                rescale(graph, region, scale, None if region.no_shift else rng.normal(size=region.size))
            except Refused:
                continue
            shapes = shapes_on(graph, {"x": shapes["x"]}) | shapes  # with the tensors that are new
            done.append(f"{node.name}, insert {insert}: {[(end.role, end.node.name) for end in region.ends]}")
    check(graph)
    assert difference(before, run(graph, feed)) <= RTOL, "\n".join([written, *done, listing(graph)])
    if elsewhere is not None:
        assert difference(elsewhere, run(graph, larger)) <= RTOL, "\n".join([written, *done, listing(graph)])
