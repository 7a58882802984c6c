"""The page for contributors is true: its code runs, from top to bottom."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

from channelfold.passes.operators import OPERATORS

PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()


def test_the_code_of_the_page_runs(monkeypatch, capsys):
    monkeypatch.setattr("channelfold.passes.operators.OPERATORS", dict(OPERATORS))
    page = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)
    for code in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        exec(code, vars(page))
    first, second = capsys.readouterr().out.splitlines()
    assert first == "8 of 8 channels of MatMul_0 can go"
    assert second == "['Relu'] Neg: cancels Neg_0 0.0"


def test_the_files_that_the_page_names_are_there():
    root = Path(__file__).parents[1]
    for path in re.findall(r"`((?:passes|runtime|tests)/[\w/.]+)`", PAGE):
        assert (root / path).exists(), path
