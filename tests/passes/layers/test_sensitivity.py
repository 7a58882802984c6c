"""Sensitivities keep to a number of runs, and what stays float is what measures best."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from channelfold.passes.layers import sensitivity
from channelfold.passes.layers.output_error import Errors
from channelfold.passes.layers.sensitivity import Crew, Site, Trial, brief, measure, worst
from channelfold.passes.layers.switchboard import FLOAT, Board, Slot

SITES = 20
BOARD = Board(
    Path(), ("y",), ("y",), (False,), "",
    {f"n{i}": Slot(f"n{i}", "MatMul", (), {FLOAT: (), "int8": ()}, {FLOAT: 4, "int8": 1}, {}) for i in range(SITES)},
    (), ("int8",), macs={f"n{i}": 1 for i in range(SITES)},
)  # fmt: skip
ALONE = {f"n{i}": 0.5**i for i in range(SITES)}
LOUD = {f"s{i}": 1.0 + 9 * (i % 2) for i in range(16)}  # what a sample multiplies errors by


@pytest.fixture
def tried(monkeypatch):
    """All trials; errors add up, and a sample multiplies all of them."""
    found: list[Trial] = []

    def attempt(trial: Trial) -> Errors:
        found.append(trial)
        lost = [
            [[LOUD[s] * sum(ALONE[n] for n in chosen if chosen[n] == "int8")] for s in trial.samples]
            for chosen in trial.tried
        ]
        shape = len(trial.samples), 1
        return Errors(np.ones(shape), np.array(lost), np.ones((len(lost), *shape)), np.ones(shape, bool))

    monkeypatch.setattr(sensitivity, "attempt", attempt)
    return found


@pytest.mark.parametrize("runs", [1, 64, 256])
def test_sensitivities_keep_to_a_number_of_runs(runs, tried):
    sites = measure(BOARD, list(LOUD), runs=runs)
    share = {name: 1 - place / SITES for place, name in enumerate(BOARD.slots)}  # a stem runs once for a block
    spent = sum(len(trial.samples) * len(trial.tried) * max(map(share.__getitem__, trial.open)) for trial in tried)
    least = 2 * sum(4 * share[f"n{i}"] for i in range(0, SITES, 4))
    assert spent <= max(runs, least)
    assert min(len(site.by_sample["int8"]) for site in sites) >= 2
    errors = {site.nodes[0]: site.errors["int8"] for site in sites}
    ratios = [errors[name] / ALONE[name] for name in errors]  # few samples stand for all
    assert ratios == pytest.approx([ratios[0]] * SITES)


def test_with_all_runs_every_site_is_measured_on_every_sample(tried):
    sites = measure(BOARD, list(LOUD), runs=np.inf)
    assert {len(site.by_sample["int8"]) for site in sites} == {16}


def test_what_stays_float_is_what_measures_best(tried):
    sites = [Site((name,), {"int8": error}, by_sample={"int8": [error]}) for name, error in ALONE.items()]
    assert [site.nodes for site in worst(BOARD, list(LOUD), sites, "int8", 2, Crew())] == [("n0",), ("n1",)]
    loud = dataclasses.replace(sites[9], errors={"int8": 100.0}, by_sample={"int8": [0.0, 0.0, 300.0]})
    sites = [*sites[:9], loud, *sites[10:]]  # whose mean is that of one sample
    assert [site.nodes for site in worst(BOARD, list(LOUD), sites, "int8", 1, Crew())] == [("n0",)]


def test_nothing_stays_float_where_no_choice_gains(tried, monkeypatch):
    monkeypatch.setitem(ALONE, "n0", 0.0)
    sites = [Site((f"n{i}",), {"int8": 2.0 - i}, by_sample={"int8": [2.0 - i]}) for i in range(2)]
    assert worst(BOARD, list(LOUD), sites, "int8", 1, Crew()) == []


@pytest.mark.parametrize(("first", "kept"), [(1, slice(0, 64)), (0, slice(-64, None))])
def test_texts_are_cut_where_they_are_not_padding(first, kept):
    feed = {"ids": np.arange(100)[None], "mask": np.array([[first] + 99 * [1]])}
    text = dataclasses.replace(BOARD, mask="mask", texts=("ids", "mask"))
    (short,) = brief(text, [feed])
    assert np.array_equal(short["ids"], feed["ids"][:, kept])
    assert brief(BOARD, [feed])[0] is feed
