"""How far the outputs of two models are apart: over all samples, over each, and against the gates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from channelfold.runtime.report.tables import UNKNOWN, Page, number

LEVELS = {"ok": "green", "degraded": "yellow", "collapsed": "bold red"}
_DRAWN = 4  # outputs whose samples are drawn, those with the lowest ratios


def show(record: Mapping[str, Any], page: Page) -> None:
    """Prints ``accuracy`` of a record."""
    comparison("Accuracy", record["accuracy"], page)


def gates(record: Mapping[str, Any], page: Page) -> None:
    """Prints ``gates`` of a record."""
    told = {True: ("met", "green"), False: ("MISSED", "bold red")}
    rows = [
        (gate["gate"], gate["output"], gate["found"], gate["wanted"], told[gate["met"]]) for gate in record["gates"]
    ]
    page.table("Gates", ("<of", ">found", "<wanted", "<"), rows)


def comparison(heading: str, found: Mapping[str, Any], page: Page) -> None:
    """Prints a comparison of outputs."""
    level, reasons = found["verdict"]["level"], found["verdict"]["reasons"]
    page.say((heading, "bold"), "  ", (level.upper(), LEVELS[level]), f"  {found['data']}", indent=0)
    columns = (">SNR dB", ">cosine", ">rel. L2", ">max err", ">agree", ">worst sample")
    page.fill("", columns, [(output["name"], *_figures(output)) for output in found["outputs"]])
    page.note("agree: the same argmax, or equal elements where an output is not floating")
    for output in found["outputs"]:
        if output["reference_nan"] or output["reference_inf"]:
            there = f"{output['reference_nan']} NaN and {output['reference_inf']} Inf in the original"
            page.say((f"{output['name']}: {there}", "yellow"))
    if found["extra"]:
        page.say((f"only the new model has: {', '.join(found['extra'])}", "yellow"))
    for reason in reasons:
        page.say((f"{level}: ", LEVELS[level]), reason)
    if page.whole:
        _samples(found, page)


def _samples(found: Mapping[str, Any], page: Page) -> None:
    """Shows how the samples differ, and those with the lowest ratios."""
    if spread := found.get("spread"):
        rows = [(name, *(number(value, "{:.1f}") for value in one["quartiles"])) for name, one in spread.items()]
        page.fill(
            "SNR in dB of single samples", (">lowest", ">quarter", ">median", ">three quarters", ">highest"), rows
        )
        for name in sorted(spread, key=lambda name: float(spread[name]["quartiles"][0]))[:_DRAWN]:
            one = spread[name]
            page.bars(f"Samples by the SNR of {name}", "dB", one["low"], one["step"], one["counts"])
    if worst := found.get("worst"):
        rows = [(f"#{one['sample']}", one["output"], number(one["snr"], "{:.1f}")) for one in worst]
        page.table("Samples with the lowest SNR", ("<output", ">dB"), rows)
        page.thumbnails([(one["picture"], f"#{one['sample']}, {number(one['snr'], '{:.1f} dB')}") for one in worst])


def _figures(output: Mapping[str, Any]) -> list[str]:
    forms = {"snr": "{:.2f}", "cosine": "{:.5f}", "relative_l2": "{:.1e}", "max_error": "{:.1e}"}
    agreement = output["equal"] if output["agreement"] is None else output["agreement"]
    worst = output["worst_sample"]
    told = UNKNOWN if worst is None else f"#{worst} {number(output['worst_snr'], '{:.1f} dB')}"
    return [*(number(output[key], form) for key, form in forms.items()), number(agreement, "{:.2%}"), told]
