"""The findings of lint, by rule, the worst first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from channelfold.runtime.report.tables import Page

_STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}
_NODES = 5


def show(record: Mapping[str, Any], page: Page) -> None:
    """Prints ``lint`` of a record: what was repaired, then each rule that is broken, with its nodes."""
    found = record["lint"]
    gpu = f", SM {found['sm']}" if found["sm"] else ""
    for entry in found.get("fixed", ()):
        page.say(("repaired ", "green"), (entry["rule"], "bold"), f"  {_times(len(entry['nodes']), 'node')}")
    page.say((f"For {found['target']}{gpu}", "bold"), f"  {_counted(found)}", indent=0)
    rules: dict[str, list[Mapping[str, Any]]] = {}
    for finding in found["findings"]:
        rules.setdefault(finding["rule"], []).append(finding)
    for rule, findings in rules.items():
        first = findings[0]
        page.blank()
        page.say((first["level"], _STYLES[first["level"]]), "  ", (rule, "bold"), f"  {first['checks']}", indent=0)
        repair = " (--fix does)" if first["repairable"] and "fixed" not in found else ""
        page.grid([("else", f"{first['consequence']}."), ("fix", f"{first['fix']}.{repair}")])
        page.nodes([(finding["node"], finding["detail"]) for finding in findings], _NODES)


def _counted(found: Mapping[str, Any]) -> str:
    levels = [_times(found[f"{level}s"], level) for level in _STYLES if found[f"{level}s"]]
    return ", ".join(levels) if levels else "nothing found"


def _times(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"
