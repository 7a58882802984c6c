"""Smoothing is exact: every method on every block, random networks, random regions, a second run."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from channelfold.tests import strategies
from channelfold.tests.graphs import assert_same, data_from, feeds, listing, run, samples
from channelfold.tests.passes.smooth.blocks import (
    BLOCKS,
    METHODS,
    block,
    observe_in_float64,
    outputs,
    plant,
    smooth,
    snr,
)
from channelfold.tests.region_strategies import difference, graphs


@pytest.mark.parametrize("insert", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", BLOCKS)
def test_every_method_is_exact(name, method, insert, monkeypatch):
    """To 1e-12 on inputs of other sizes than those of the calibration, too; without ``insert`` no node is added."""
    monkeypatch.setattr("channelfold.runtime.stats.observe.observe", observe_in_float64)
    graph = block(name, "double")
    plant(graph, shifted=True)
    data = samples(graph, 2, size=3)
    checked = [next(iter(data)), feeds(graph, size=5)]
    before, nodes, old = [run(graph, feed) for feed in checked], len(graph.nodes), listing(graph)
    outcome = smooth(graph, dataclasses.replace(METHODS[method], allow_insert=insert), data)
    assert outcome.changed
    for feed, values in zip(checked, before, strict=True):
        assert_same(values, run(graph, feed), 1e-11 if insert else 1e-12)
    if not insert:
        assert [line.split("(")[0] for line in listing(graph).splitlines()] == [
            line.split("(")[0] for line in old.splitlines()
        ]
        assert len(graph.nodes) == nodes


@given(data=st.data(), method=st.sampled_from([*METHODS]), insert=st.booleans())
@settings(max_examples=150, deadline=None, suppress_health_check=(HealthCheck.too_slow,))
def test_random_networks(data, method, insert):
    """Whatever the graph: no crash, the same outputs, and no node that was not asked for."""
    graph = data.draw(strategies.graphs())
    feed, before, nodes = feeds(graph), run(graph, feeds(graph)), len(graph.nodes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("channelfold.runtime.stats.observe.observe", observe_in_float64)
        smooth(graph, dataclasses.replace(METHODS[method], allow_insert=insert), samples(graph, 2, size=2))
    assert_same(before, run(graph, feed), 1e-9)
    assert insert or len(graph.nodes) <= nodes


@given(made=graphs(), method=st.sampled_from([*METHODS]), insert=st.booleans())
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
def test_random_regions(made, method, insert):
    """Attention, gates, joins and moves: regions that overlap, and nodes inserted inside of others."""
    graph, values = made
    feed, nodes = {"x": values["x"]}, len(graph.nodes)
    data = data_from(feed, {"x": -0.7 * values["x"]})
    before = run(graph, feed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("channelfold.runtime.stats.observe.observe", observe_in_float64)
        patch.setattr(
            "channelfold.passes.smooth.activations.measured_shapes",
            lambda *_: {name: np.shape(v) for name, v in values.items()},
        )
        smooth(graph, dataclasses.replace(METHODS[method], allow_insert=insert), data)
    assert difference(before, run(graph, feed)) <= 1e-6
    assert insert or len(graph.nodes) <= nodes


@pytest.mark.parametrize("method", METHODS)
def test_a_second_run_stays_exact_and_changes_little(method):
    graph = block("pre-LN")
    plant(graph)
    data = samples(graph)
    before = outputs(graph, data)
    first = smooth(graph, METHODS[method], data)
    second = smooth(graph, METHODS[method], data)
    assert snr(before, outputs(graph, data)) > 100
    spread = {site["node"]: site["scale"][1] / site["scale"][0] for site in first.facts["sites"]}
    for site in second.facts["sites"]:  # what powers of two of four exponents leave is for the second run
        assert site["scale"][1] / site["scale"][0] < max(4.0, 0.5 * spread[site["node"]]) or method == "fp4-shift"
