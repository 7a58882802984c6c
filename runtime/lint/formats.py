"""Findings in the forms that other programs read: SARIF 2.1.0 (code scanning) and JUnit (test reports)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import channelfold
from channelfold.runtime.lint import Finding, Rule

_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def sarif(findings: Sequence[Finding], rules: Sequence[Rule], model: Path) -> str:
    """A SARIF log with one run. A finding is located by the file of the model and the name of the node."""
    place = {rule.id: index for index, rule in enumerate(rules)}
    described: list[dict[str, Any]] = [
        {
            "id": rule.id,
            "shortDescription": {"text": rule.checks},
            "fullDescription": {"text": f"{rule.checks} Otherwise: {rule.consequence}."},
            "help": {"text": f"{rule.fix}."},
            "defaultConfiguration": {"level": rule.level},
        }
        for rule in rules
    ]
    results: list[dict[str, Any]] = [
        {
            "ruleId": found.rule.id,
            "ruleIndex": place[found.rule.id],
            "level": found.level,
            "message": {"text": _message(found)},
            "locations": [
                {
                    "physicalLocation": {"artifactLocation": {"uri": model.as_posix()}},
                    "logicalLocations": [{"name": found.node, "kind": "node"}],
                }
            ],
        }
        for found in findings
    ]
    driver = {"name": "channelfold", "version": channelfold.__version__, "rules": described}
    log = {"$schema": _SCHEMA, "version": "2.1.0", "runs": [{"tool": {"driver": driver}, "results": results}]}
    return json.dumps(log, indent=2) + "\n"


def junit(findings: Sequence[Finding], rules: Sequence[Rule], model: Path) -> str:
    """A JUnit report with a test case for each rule, which fails where nodes break the rule; notes do not fail."""
    suite = ElementTree.Element("testsuite", name=f"channelfold lint {model.name}", tests=str(len(rules)))
    failed = 0
    for rule in rules:
        case = ElementTree.SubElement(suite, "testcase", classname="channelfold.lint", name=rule.id)
        own = [found for found in findings if found.rule is rule]
        lines = "\n".join(_printable(f"{found.node}: {found.detail}") for found in own)
        if any(found.level != "note" for found in own):
            failed += 1
            told = f"{rule.consequence}. {rule.fix}."
            ElementTree.SubElement(case, "failure", type=own[0].level, message=told).text = lines
        elif own:
            ElementTree.SubElement(case, "system-out").text = lines
    suite.set("failures", str(failed))
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _message(found: Finding) -> str:
    detail = f" ({found.detail})" if found.detail else ""
    return f"{found.node}{detail}: {found.rule.checks} {found.rule.consequence}. {found.rule.fix}."


def _printable(text: str) -> str:
    """The text without characters that XML does not have."""
    return "".join(char if char.isprintable() else "?" for char in text)
