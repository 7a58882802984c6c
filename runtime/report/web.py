"""The record as one web page: what the terminal shows, whole, with search, sorting and links to nodes.

The page is drawn by the same code as the terminal's report, on another ``Page``: its figures are the same texts. It
needs no network and holds its styles and its script. Every text is escaped, and the page's own policy lets no script
run but the one whose hash it names, so that no name in a model can do anything but be read.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from channelfold.runtime.report.names import safe
from channelfold.runtime.report.tables import Cell, Page, heights_of, number, size

_ASSETS = Path(__file__).parent / "assets"


class Web(Page):
    """Collects HTML. Nothing is shortened, and long lists are whole."""

    whole = True

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._anchors: set[str] = set()

    def text(self) -> str:
        """The HTML so far."""
        return "\n".join(self._parts)

    def blank(self) -> None:
        pass

    def say(self, *cells: Cell, indent: int = 2, wrap: bool = True) -> None:
        self._parts.append(f"<p>{''.join(map(_cell, cells))}</p>")

    def note(self, words: str, indent: int = 2) -> None:
        self._parts.append(f'<p class="dim">{_cell(words)}</p>')

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], indent: int = 2) -> None:
        self._table(title, columns, [(_cell(label), cells) for label, *cells in rows], [""] * len(rows))

    def fill(self, title: str, columns: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> None:
        names = [safe(name) for name, *_ in rows]
        self._table(
            title, columns, [(_link(name), cells) for name, (_, *cells) in zip(names, rows, strict=True)], names
        )

    def _table(
        self, title: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Cell]]], names: Sequence[str]
    ) -> None:
        used = [i for i in range(len(columns)) if any(_plain(cells[i]) for _, cells in rows if i < len(cells))]
        headings = "".join(f'<th scope="col"{_side(columns[i])}>{_cell(columns[i][1:])}</th>' for i in used)
        lines = []
        for (label, cells), name in zip(rows, names, strict=True):
            figures = "".join(f"<td{_side(columns[i])}>{_cell(cells[i]) if i < len(cells) else ''}</td>" for i in used)
            lines.append(f'<tr{self._anchor(name)}><th scope="row">{label}</th>{figures}</tr>')
        caption = f"<caption>{_cell(title)}</caption>" if title else ""
        head = f'<thead><tr><th scope="col">{_cell(title) or "name"}</th>{headings}</tr></thead>'
        body = "\n".join(lines)
        self._parts.append(f'<div class="wide"><table>{caption}{head}<tbody>\n{body}\n</tbody></table></div>')

    def grid(self, rows: Sequence[Sequence[Cell]], indent: int = 2, gap: int = 2) -> None:
        lines = "\n".join(f"<tr>{''.join(f'<td>{_cell(cell)}</td>' for cell in row)}</tr>" for row in rows)
        self._parts.append(f'<div class="wide"><table class="plain"><tbody>\n{lines}\n</tbody></table></div>')

    def nodes(self, rows: Sequence[tuple[str, str]], limit: int) -> None:
        lines = [f"<tr{self._anchor(safe(n))}><td>{_link(safe(n))}</td><td>{_cell(why)}</td></tr>" for n, why in rows]
        opened = " open" if len(rows) <= limit else ""
        body = "\n".join(lines)
        self._parts.append(
            f"<details{opened}><summary>{len(rows)} nodes</summary>"
            f'<div class="wide"><table class="plain"><tbody>\n{body}\n</tbody></table></div></details>'
        )

    def room(self, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> int:
        return 1 << 30

    def name(self, name: str, taken: int = 0) -> str:
        return safe(name)

    def bar(self, label: str, parts: Sequence[tuple[str, int]]) -> None:
        """Draws sizes in bytes side by side, in proportion."""
        total = sum(count for _, count in parts) or 1
        pieces = "".join(
            f'<span class="part p{i % 6}" style="flex-grow:{count}">{_cell(name)} {count / total:.0%}</span>'
            for i, (name, count) in enumerate(parts)
        )
        told = ", ".join(f"{name} {size(count)}" for name, count in parts)
        self._parts.append(f'<div class="bar" role="img" aria-label="{_attribute(f"{label}: {told}")}">{pieces}</div>')

    def curve(self, label: str, points: Sequence[tuple[str, Any]]) -> None:
        """Draws figures in a row as a line; each point tells its name and its figure."""
        heights = heights_of([value for _, value in points])
        if len(heights) < 2:
            return
        step = 600 / (len(heights) - 1)
        places = [(i * step, 100 - 96 * height) for i, height in enumerate(heights)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        told = (_cell(f"{name}: {number(value, '{:.1f}')}") for name, value in points)
        dots = "".join(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2"><title>{text}</title></circle>'
            for (x, y), text in zip(places, told, strict=True)
        )
        picture = f'<polyline points="{line}" fill="none" stroke="currentColor"/>{dots}'
        frame = f'viewBox="-4 0 608 104" role="img" aria-label="{_attribute(label)}"'
        self._parts.append(f"<figure><figcaption>{_cell(label)}</figcaption><svg {frame}>{picture}</svg></figure>")

    def section(self, key: str) -> None:
        """Begins a section; those of ``key`` "" stand at the top."""
        end = "</section>\n" if any(part.startswith("<section") for part in self._parts) else ""
        self._parts.append(f'{end}<section id="{_attribute(key)}">')

    def _anchor(self, name: str) -> str:
        if not name or name in self._anchors:
            return ""
        self._anchors.add(name)
        return f' id="node:{_attribute(name)}"'


def page(title: str, body: Web, sections: Sequence[str]) -> str:
    """The whole page around the sections of ``body``."""
    style, script = ((_ASSETS / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src '{_hash(script)}'"
    links = "".join(f'<a href="#{_attribute(key)}">{_cell(key)}</a>' for key in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_cell(title)}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{_cell(title)}</h1>
<nav aria-label="Sections">{links}</nav>
<label>Find a node <input id="find" type="search" placeholder="name, operator, reason"></label>
<output id="found" for="find"></output>
</header>
<main>
{body.text()}
</section>
</main>
<script>{script}</script>
</body>
</html>
"""


def _hash(script: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _plain(cell: Cell) -> str:
    return safe(cell if isinstance(cell, str) else cell[0])


def _cell(cell: Cell) -> str:
    if isinstance(cell, str):
        return escape(safe(cell), quote=False)
    return f'<span class="{cell[1]}">{_cell(cell[0])}</span>' if cell[0] else ""


def _attribute(text: str) -> str:
    return escape(safe(text), quote=True)


def _side(column: str) -> str:
    return ' class="right"' if column[:1] == ">" else ""


def _link(name: str) -> str:
    return f'<a class="node" href="#{_attribute(quote(f"node:{name}"))}">{_cell(name)}</a>' if name else ""


def summary(record: Mapping[str, Any], body: Web) -> None:
    """The first section: verdict, size and where the weights are, at one look."""
    before, after = record.get("model") or {}, record.get("output") or {}
    facts: list[tuple[str, str]] = []
    if after:
        facts.append(("file", f"{size(before['bytes'])} → {size(after['bytes'])}"))
        facts.append(("nodes", f"{before['nodes']} → {after['nodes']}"))
    weights = record.get("weights") or {}
    if weights.get("rows"):
        facts.append(("weights quantized", f"{weights['share']:.1%}"))
        states: dict[str, int] = {}
        for row in weights["rows"]:
            states[row["state"]] = states.get(row["state"], 0) + row["bytes"]
        body.bar("weights", sorted(states.items(), key=lambda item: -item[1]))
    for engine in record.get("engines", ()):
        plan = engine["plan"]
        facts.append((f"engine SM {engine['sm']}", f"{plan['int8']} of {plan['total']} nodes run as int8"))
    body.grid(facts)
