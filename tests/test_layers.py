"""The order of the house: what a storey may import, no circles, no private names of another file."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAMILIES = "fold smooth prune sparsify ffn quantize cast"
STOREYS = (  # from the ground up: a file imports from its own storey and those before it
    "__version__ models errors",
    "io",
    "data engine",
    "stats",
    "options",
    "base operators numeric verify undo bodies",
    "layers",
    "lint explain",
    "channels",
    FAMILIES,
    "passes pipeline checkpoint recipe smooth_methods search",
    "report",
    "jobs flags shell",
    "cli",
)
FLOOR = {room: floor for floor, rooms in enumerate(STOREYS) for room in rooms.split()}


def sources() -> dict[str, str]:
    """The product by dotted name, without the package's own."""
    files = [path for folder in ("passes", "runtime") for path in (ROOT / folder).rglob("*.py")] + [ROOT / "cli.py"]
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files)
    return dict(zip(names, (path.read_text() for path in files), strict=True))


def room(name: str) -> str:
    """The folder, or the file of no folder, that a module is in: ``io`` of ``runtime.io.files``."""
    first, *rest = name.split(".")
    return rest[0] if first in ("passes", "runtime") and rest else first


def imports(name: str, text: str, code: Mapping[str, str]) -> Iterator[tuple[str, str, bool]]:
    """(module, name in it or "", whether loading the file runs the import) of what a file imports of the product."""
    tree = ast.parse(text)
    outer = set(tree.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "channelfold":
            module = (node.module or "").removeprefix("channelfold").removeprefix(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}".strip(".")
                yield (inner, "", node in outer) if inner in code or not module else (module, alias.name, node in outer)


def faults(code: Mapping[str, str]) -> list[str]:
    found, loads = [], {}
    for name, text in code.items():
        for module, what, loaded in imports(name, text, code):
            mine, other = room(name), room(module)
            if FLOOR[other] > FLOOR[mine]:
                found.append(f"{name} imports {module}, which is above it")
            if mine != other and {mine, other} <= set(FAMILIES.split()):
                found.append(f"{name} imports another family, {module}")
            if what.startswith("_") and not what.startswith("__"):
                found.append(f"{name} imports {what}, which is private to {module}")
            if loaded and module in code:
                loads.setdefault(name, set()).add(module)
    return found + [f"a circle through {name}" for name in loads if name in reached(name, loads)]


def reached(name: str, loads: Mapping[str, set[str]]) -> set[str]:
    found, ahead = set(), [name]
    while ahead:
        ahead += (new := loads.get(ahead.pop(), set()) - found)
        found |= new
    return found


def test_the_order_holds():
    assert faults(sources()) == []


@pytest.mark.parametrize(
    ("name", "line", "says"),
    [
        ("runtime.io.edit", "from channelfold.passes.base import Pass", "is above it"),
        ("passes.layers.linear", "def f():\n    from channelfold.passes.fold import constants", "is above it"),
        ("passes.fold.pad", "from channelfold.passes.quantize import qdq", "another family"),
        ("passes.fold.pad", "from channelfold.passes.layers.linear import _resolve", "private"),
        ("runtime.io.files", "from channelfold.runtime.io import edit", "a circle through runtime.io.files"),
    ],
)
def test_an_import_against_the_order_is_found(name, line, says):
    code = sources()
    assert any(says in fault for fault in faults(code | {name: f"{code[name]}\n{line}\n"}))
