from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from channelfold.passes.base import Context, Refused
from channelfold.passes.smooth import MergeChannels, SplitChannels
from channelfold.passes.smooth.merge import _paired
from channelfold.runtime.data.probes import random_data
from channelfold.runtime.data.sources import Data
from channelfold.runtime.errors import DataError, UsageError
from channelfold.runtime.io.facts import required_inputs
from channelfold.runtime.io.files import check
from channelfold.tests.graphs import assert_same, build, changes, constants, feeds, listing, random, reasons, run

TOKENS = "(float[N,5,16] x) => (float[] y)"
LINEAR = "u = MatMul(x, U)\n h = Add(u, b)\n y = MatMul(h, D)"
FFN = "u0 = MatMul(x, U)\n u = Add(u0, b)\n h = Relu(u)\n y = MatMul(h, D)"


def data(graph, n=4) -> Data:
    return random_data(required_inputs(graph), n, size=8)


def merge(graph, **options):
    outcome = MergeChannels(**options).apply(graph, Context(data(graph)))
    check(graph)
    return outcome


def up_and_bias(channels=20, copies=()) -> dict[str, Any]:
    """A weight and a bias in which (channel, source, factor) are multiples of other channels."""
    up, bias = random((16, channels), "U"), random(channels, "b")
    for channel, source, factor in copies:
        up[:, channel], bias[channel] = factor * up[:, source], factor * bias[source]
    return {"U": up, "b": bias}


# ---- which, and into what ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [LINEAR, FFN])
def test_equal_channels_merge_without_loss(body):
    copies = [(3, 6, 1.0), (10, 15, 1.0), (17, 4, 1.0), (0, 1, 1.0)]
    graph = build(TOKENS, body, D=(20, 4), **up_and_bias(copies=copies))
    feed, text, old = feeds(graph), listing(graph), constants(graph)
    before = run(graph, feed)
    outcome = merge(graph, align=16)
    assert_same(before, run(graph, feed))
    (site,) = outcome.facts["sites"]
    assert site["width"] == [20, 16]
    assert site["relative_change"] < 1e-12  # statistics are float32
    assert listing(graph) == text
    new = constants(graph)
    assert (new["U"].shape, new["b"].shape, new["D"].shape) == ((16, 16), (16,), (16, 4))
    merged = sorted(map(tuple, np.array([old["D"][i] + old["D"][j] for i, j, _ in copies])))
    kept = set(map(tuple, new["D"])) - set(map(tuple, old["D"]))
    np.testing.assert_allclose(sorted(kept), merged, rtol=1e-5)  # c comes from float32 rows


def test_a_mean_takes_the_place_of_a_pair_where_nothing_but_sums_is_in_between():
    graph = build(TOKENS, LINEAR, U=(16, 20), b=20, D=(20, 4))
    old = constants(graph)
    outcome = merge(graph, align=18, max_change=10.0)
    new = constants(graph)
    assert "2 pairs merged by their mean" in changes(outcome)[0]
    fresh = [i for i in range(18) if not (new["U"][:, i, None] == old["U"]).all(axis=0).any()]
    assert len(fresh) == 2
    for i in fresh:
        pairs = itertools.combinations(range(20), 2)
        ((a, b),) = [(a, b) for a, b in pairs if np.allclose((old["U"][:, a] + old["U"][:, b]) / 2, new["U"][:, i])]
        assert (a + b) % 2 == 1
        np.testing.assert_allclose(new["b"][i], (old["b"][a] + old["b"][b]) / 2, rtol=1e-15)
        np.testing.assert_allclose(new["D"][i], old["D"][a] + old["D"][b], rtol=1e-15)


def test_multiples_merge_without_loss_behind_an_activation():
    graph = build(TOKENS, FFN, D=(20, 4), **up_and_bias(copies=[(3, 6, 4.0), (10, 15, 0.1), (17, 4, 2.0), (0, 1, 7.0)]))
    feed = feeds(graph)
    before = run(graph, feed)
    outcome = merge(graph, align=16)
    assert_same(before, run(graph, feed), rtol=1e-6)  # c comes from float32 rows
    assert "4 pairs merged one for both" in changes(outcome)[0]


@pytest.mark.parametrize("linear", [True, False])
def test_the_cheapest_pairs_are_taken(linear):
    rows, matrix = random((30, 6), "rows"), random((5, 6), "matrix")
    merger = _paired(rows, matrix, np.ones(6, bool), 1, linear)
    costs = {}
    for i, j in itertools.permutations(range(6), 2):
        if (i + j) % 2 == 0:
            continue
        factor = rows[:, i] @ rows[:, j] / (rows[:, i] @ rows[:, i])
        new = rows.copy()
        new[:, j] = factor * rows[:, i]
        if linear:
            new[:, i] = new[:, j] = (rows[:, i] + rows[:, j]) / 2
        costs[i, j] = ((new @ matrix.T - rows @ matrix.T) ** 2).sum()
    pair = int(merger.kept[0]), int(merger.gone[0])
    assert costs[pair] == pytest.approx(min(costs.values()), rel=1e-12)
    change = merger.change(rows, np.ones(30), matrix) * ((rows @ matrix.T) ** 2).sum()
    assert change == pytest.approx(costs[pair], rel=1e-9)


def test_only_single_channels_are_paired():
    single = np.array([True, False, True, False, True, True])
    merger = _paired(random((9, 6), "r"), random((2, 6), "m"), single, 1, False)
    assert {*merger.kept, *merger.gone} & {1, 3} == set()
    with pytest.raises(Refused, match="2 pairs are to be merged, but only 1 can be"):
        _paired(random((9, 6), "r"), random((2, 6), "m"), single, 2, False)


# ---- after a split -----------------------------------------------------------------------------------------------


def after_split(body, **given):
    graph = build(TOKENS, body, **given)
    (site,) = SplitChannels(align=1, allow_insert="Layer" in body).apply(graph, Context(data(graph))).facts["sites"]
    return graph, site


def test_the_width_before_a_split_comes_back_and_the_copies_stay():
    copies = [(2 * i, 2 * i + 1, 2.0) for i in range(8, 20)]
    weights = up_and_bias(40, copies)
    weights["U"][:, 3] *= 60
    graph, site = after_split(FFN, D=(40, 8), **weights)
    parts = site["parts"]
    feed, split = feeds(graph), constants(graph)["U"][:, 3]
    before = run(graph, feed)
    outcome = merge(graph)
    assert_same(before, run(graph, feed), rtol=1e-6)  # c comes from float32 rows
    assert outcome.facts["sites"][0]["width"] == [39 + parts, 40]
    assert (constants(graph)["U"] == split[:, None]).all(axis=0).sum() == parts


def test_behind_a_norm_the_gather_picks_fewer():
    gamma = random(16, "g")
    gamma[2] *= 60
    body = "h = LayerNormalization(x, g, e)\n q = MatMul(h, Q)\n k = MatMul(h, K)\n y = Mul(q, k)"
    graph, site = after_split(body, g=gamma, e=16, Q=(16, 4), K=(16, 4))
    text = listing(graph)
    outcome = merge(graph, max_change=1.0)
    assert outcome.facts["sites"][0]["width"] == [site["width"][1], 16]
    assert listing(graph) == text
    index = constants(graph)["h_channels_indices"]
    assert len(index) == 16
    assert (index == 2).sum() == site["parts"]


def test_dead_channels_are_no_copies():
    weights = up_and_bias()
    down = random((20, 4), "D")
    for values in (weights["U"].T, weights["b"], down):
        values[4:9] = 0
    graph = build(TOKENS, FFN, D=down, **weights)
    outcome = merge(graph)
    assert (outcome.changed, outcome.refused) == ([], [])


# ---- refusals and options ----------------------------------------------------------------------------------------


def test_a_site_that_would_change_too_much_stays():
    graph = build(TOKENS, FFN, U=(16, 20), b=20, D=(20, 4))
    text = listing(graph)
    outcome = merge(graph, align=16, max_change=1e-6)
    (reason,) = [reason for reason in reasons(outcome) if "pairs" in reason]
    assert reason.startswith("h stays as it is: merging 4 pairs changes its outputs by 0.")
    assert reason.endswith("(max_change)")
    assert listing(graph) == text
    assert constants(graph)["U"].shape == (16, 20)


def test_behind_a_norm_nothing_is_merged():
    graph = build(TOKENS, "h = LayerNormalization(x, g)\n y = MatMul(h, D)", g=16, D=(16, 4))
    assert reasons(merge(graph, align=12)) == ["MatMul: LayerNormalization is in between"]


def test_it_needs_data():
    with pytest.raises(DataError, match="needs calibration data"):
        MergeChannels().apply(build(TOKENS, FFN, U=(16, 20), b=20, D=(20, 4)), Context())


@pytest.mark.parametrize(("option", "value"), [("align", -1), ("max_change", -1.0)])
def test_options_out_of_range(option, value):
    with pytest.raises(UsageError, match=option):
        MergeChannels(**{option: value})
