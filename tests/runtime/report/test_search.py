"""The tables of a search."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from channelfold.runtime.report import search
from channelfold.runtime.report.tables import Page


def record(**own: float) -> dict[str, Any]:
    point: dict[str, Any] = {
        "bytes": 1000, "cost": 0.5, "latency": 0.25, "start": "smooth", "options": {"float": 0.1, "int8": 0.9},
        "predicted_db": 41.0, "error_db": 42.0, "snr_db": 43.0, "agreement": 0.75, "loss": 0.01, "low": 0.0,
        "high": 0.02, "chosen": True, "proof": {"snr_db": 44.0, "loss": 0.02, "low": 0.01, "high": 0.03},
    }  # fmt: skip
    return {"options": ["float", "int8"], "points": [point | own], "sites": [], "limits": {}, "met": True,
            "loss": "energy", "samples": {"steering": 1, "proof": 1}}  # fmt: skip


def shown(found: dict[str, Any]) -> list[str]:
    printed = io.StringIO()
    search.show({"search": found}, Page(Console(file=printed, width=200)))
    return printed.getvalue().splitlines()


@pytest.mark.parametrize(("predicted", "marked"), [(44.9, False), (45.1, True), (38.9, True)])
def test_predictions_that_are_off_are_marked(predicted: float, marked: bool):
    _, row, *notes = shown(record(predicted_db=predicted))
    assert ("off" in row.split()) == marked
    assert any("1 of 1 predictions are off by over 3 dB" in note for note in notes) == marked


def test_every_figure_of_the_front_stands_under_its_heading():
    heading, row = shown(record())[:2]
    for name, figure in {
        "cost": "50.0%", "latency": "25%", "float": "10%", "int8": "90%", "predicted dB": "41.0", "error dB": "42.0",
        "SNR dB": "43.0", "agree": "75.0%", "lost": "1.00%",
    }.items():  # fmt: skip
        end = heading.index(name) + len(name)
        assert row[:end].endswith(figure), (name, heading, row)
    for name, figure in {"start": "smooth", "on other samples": "44.0 dB, 2.00% (1.00% to 3.00%)"}.items():
        assert row[heading.index(name) :].startswith(figure)
