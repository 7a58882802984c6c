"""Regions of small graphs that a scale moves through."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.channels.region import Region
from channelfold.passes.channels.rescale import rescale
from channelfold.passes.channels.scale_regions import trace
from channelfold.passes.layers.linear import linears
from channelfold.runtime.io.files import check
from channelfold.runtime.io.shapes import shapes_on
from channelfold.tests.graphs import assert_same, feeds, run

TOKENS = "(float[N,T,4] x) => (float[] y)"
IMAGE = "(float[N,3,6,6] x) => (float[] y)"
ROWS = "(float[N,4] x) => (float[] y)"


def region_of(graph: gs.Graph, *, start: str = "", insert: bool = False) -> Region:
    """The region of what the last linear reads, or of a tensor with channels along its last axis."""
    last = linears(graph)[-1]
    tensor, axis = (graph.tensors()[start], -1) if start else (last.data, last.in_axis)
    shapes = shapes_on(graph, {name: values.shape for name, values in feeds(graph, size=3).items()})
    return trace(graph, tensor, axis, shapes, insert)


def ends(region: Region) -> str:
    """``role result`` of every end, in alphabetical order."""
    return ", ".join(sorted(f"{end.role} {end.node.outputs[0].name.removesuffix('_unbiased')}" for end in region.ends))


def moved(graph: gs.Graph, *, rtol: float | None = None, **options) -> Region:
    """Moves a random scale, and a shift where there can be one, through a region.

    The outputs stay what they were, for the sizes the region was traced with and for others.
    """
    region = region_of(graph, **options)
    checked = [feeds(graph, size=3), feeds(graph, size=5)]
    before = [run(graph, feed) for feed in checked]
    rng = np.random.default_rng(0)
    scale, shift = np.exp(rng.normal(size=region.size)), rng.normal(size=region.size)
    assert region.free.any(), region.fixed
    rescale(graph, region, scale, None if region.no_shift else shift)
    check(graph)
    for feed, old in zip(checked, before, strict=True):
        assert_same(old, run(graph, feed), rtol)
    return region
