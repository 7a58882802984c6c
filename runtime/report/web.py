"""The record as one web page: what the terminal shows, whole, with pictures, search, sorting and links to nodes.

The page is drawn by the same code as the terminal's report, on another ``Page``: its figures are the same texts. It
needs no network and holds its styles and its script. Every text is escaped, and the page's own policy lets no script
run but the one whose hash it names, so that no name in a model can do anything but be read. The last tags of cells and
rows are left out, as HTML allows: there may be a million of them.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from channelfold.runtime.report import pictures
from channelfold.runtime.report.names import safe
from channelfold.runtime.report.tables import Cell, Page, finite, number, size

_ASSETS = Path(__file__).parent / "assets"
_SHOWN, _SPARED = 40, 20  # rows of a table that show at first, and further ones that a button would not be worth
_LONG = 30  # characters of a cell that is not made narrow
_SHARE = re.compile(r"\d+(?:\.\d+)?%")
_PICTURE = re.compile(r"data:image/png;base64,[A-Za-z0-9+/=]+")
_COLUMNS = 24  # of a table, of which the style knows the side


class Card(NamedTuple):
    """A figure of the summary; ``section`` tells more, ``style`` as in a ``Cell``."""

    section: str
    label: str
    figure: str
    remark: str = ""
    style: str = ""


class Web(Page):
    """Collects HTML. Nothing is shortened, and long lists are whole."""

    whole = True

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._anchors: set[str] = set()
        self.sections: dict[str, str] = {}

    def text(self) -> str:
        """The HTML so far."""
        return "\n".join([*self._parts, "</section>"] if self.sections else self._parts)

    def section(self, key: str, title: str) -> None:
        """Begins a section."""
        end = "</section>\n" if self.sections else ""
        self.sections[key] = title
        self._parts.append(f'{end}<section id="{_attribute(key)}"><h2>{_cell(title)}</h2>')

    def blank(self) -> None:
        pass

    def say(self, *cells: Cell, indent: int = 2, wrap: bool = True) -> None:
        if not indent and _plain(cells[0]) in self.sections.values():  # the section has this heading
            cells = cells[1:]
        style = "" if wrap else ' class="copy"'
        tag = "p" if indent or not wrap else "h3"
        if cells:
            self._parts.append(f"<{tag}{style}>{''.join(map(_cell, cells))}</{tag}>")

    def note(self, words: str, indent: int = 2) -> None:
        self._parts.append(f'<p class="dim">{_cell(words)}</p>')

    def cards(self, cards: Sequence[Card]) -> None:
        """Shows figures side by side."""
        shown = []
        for card in cards:
            label = f'<a href="#{_attribute(card.section)}">{_cell(card.label)}</a>'
            figure = f"<b>{_cell((card.figure, card.style))}</b>"
            shown.append(f"<li>{label}{figure}<small>{_cell(card.remark)}</small></li>")
        self._parts.append(f'<ul class="cards">{"".join(shown)}</ul>')

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], indent: int = 2) -> None:
        self._table(title, columns, [(f"<tr><th scope=row>{_cell(label)}", cells) for label, *cells in rows])

    def fill(self, title: str, columns: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> None:
        named = [(safe(name), cells) for name, *cells in rows]
        begun = [(f"<tr{self._anchor(name)}><th scope=row>{_link(name)}", cells) for name, cells in named]
        self._table(title, columns, begun)

    def _table(self, title: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Cell]]]) -> None:
        """Adds a table of rows that are begun already, with their cells."""
        used = [i for i in range(len(columns)) if any(i < len(cells) and _plain(cells[i]) for _, cells in rows)]
        headings = "".join(f"<th scope=col>{_cell(columns[i][1:])}" if columns[i][1:] else "<td>" for i in used)
        sides = " ".join(f"r{place}" for place, i in enumerate(used, 2) if columns[i][:1] == ">")
        lines = [begun + "".join(_td(cells[i]) if i < len(cells) else "<td>" for i in used) for begun, cells in rows]
        if len(lines) > _SHOWN + _SPARED:
            lines.insert(_SHOWN, '<tbody class="rest">')
        first = "name" if title in ("", *self.sections.values()) else title
        head = f"<thead><tr><th scope=col>{_cell(first)}{headings}</thead>"
        body = "\n".join(["<tbody>", *lines])
        frame = f'class="wide" role="group" aria-label="{_attribute(title) or "figures"}"'
        self._parts.append(f'<div {frame}><table class="{sides}">{head}\n{body}</table></div>')

    def grid(self, rows: Sequence[Sequence[Cell]], indent: int = 2, gap: int = 2) -> None:
        lines = "\n".join(f"<tr>{''.join(f'<td>{_cell(cell)}' for cell in row)}" for row in rows)
        self._parts.append(f'<table class="plain"><tbody>\n{lines}</table>')

    def nodes(self, rows: Sequence[tuple[str, str]], limit: int, heading: Sequence[Cell] = ()) -> None:
        lines = [f"<tr{self._anchor(safe(name))}><td>{_link(safe(name))}<td>{_cell(why)}" for name, why in rows]
        opened = " open" if len(rows) <= limit else ""
        body = "\n".join(lines)
        told = "".join(map(_cell, heading)) or f"{len(rows)} node{'s' * (len(rows) != 1)}"
        self._parts.append(
            f'<details{opened}><summary>{told}</summary><table class="plain"><tbody>\n{body}</table></details>'
        )

    def room(self, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> int:
        return 1 << 30

    def name(self, name: str, taken: int = 0) -> str:
        return safe(name)

    def shares(self, label: str, parts: Sequence[tuple[str, int]]) -> None:
        """Draws sizes in bytes side by side, in proportion."""
        total = sum(count for _, count in parts) or 1
        pieces = "".join(f'<i class="c{i % 6}" style="flex-grow:{count}"></i>' for i, (_, count) in enumerate(parts))
        told = [f"{name} {size(count)}, {count / total:.1%}" for name, count in parts]
        key = "".join(f'<span class="key c{i % 6}">{_cell(words)}</span>' for i, words in enumerate(told))
        frame = f'class="shares" role="img" aria-label="{_attribute("; ".join([label, *told]))}"'
        self._parts.append(f"<figure><figcaption>{_cell(label)}{key}</figcaption><div {frame}>{pieces}</div></figure>")

    def curve(self, label: str, unit: str, series: Mapping[str, Sequence[tuple[str, Any]]]) -> None:
        drawn = []
        for name, points in series.items():
            told = [f"{number(value, '{:.1f}')} {unit}" for _, value in points]
            heights = finite([value for _, value in points])
            drawn.append((name, [(node, h, words) for (node, _), h, words in zip(points, heights, told, strict=True)]))
        if all(len(points) > 1 for _, points in drawn):
            self._parts.append(pictures.lines(label, unit, drawn))

    def bars(self, label: str, unit: str, low: float, step: float, counts: Sequence[int]) -> None:
        if len(counts) > 1:
            self._parts.append(pictures.bars(label, unit, low, step, counts))

    def points(self, label: str, x: str, y: str, found: Sequence[tuple[float, float, str, bool]]) -> None:
        if len(found) > 1:
            self._parts.append(pictures.points(label, x, y, found))

    def thumbnails(self, found: Sequence[tuple[str, str]]) -> None:
        pieces = [
            f'<li><img src="{picture}" alt="picture of the sample"><small>{_cell(words)}</small></li>'
            for picture, words in found
            if _PICTURE.fullmatch(picture)
        ]
        if pieces:
            self._parts.append(f'<ul class="pictures">{"".join(pieces)}</ul>')

    def _anchor(self, name: str) -> str:
        if not name or name in self._anchors:
            return ""
        self._anchors.add(name)
        return f' id="node:{_attribute(name)}"'


def page(title: str, verdict: Cell, body: Web) -> str:
    """The whole page around the sections of ``body``."""
    style, script = ((_ASSETS / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    right = ",".join(f".r{place} :is(th,td):nth-child({place})" for place in range(2, _COLUMNS))
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src '{_hash(script)}'"
    links = "".join(f'<a href="#{_attribute(key)}">{_cell(name)}</a>' for key, name in body.sections.items())
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_cell(title)}</title>
<style>{style}{right}{{text-align:right}}</style>
<noscript><style>.rest {{ display: table-row-group; }} .tools {{ display: none; }}</style></noscript>
</head>
<body>
<header>
<h1>{_cell(title)} {_cell(verdict)}</h1>
<div class="tools">
<label>Find <input id="find" type="search" placeholder="node, operator, reason"></label>
<label><input id="marked" type="checkbox"> only warnings</label>
<output id="found" for="find marked"></output>
</div>
</header>
<nav aria-label="Sections">{links}</nav>
<main>
{body.text()}
</main>
<script>{script}</script>
</body>
</html>
"""


def _hash(script: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _plain(cell: Cell) -> str:
    return safe(cell if isinstance(cell, str) else cell[0])


def _td(cell: Cell) -> str:
    """A cell of a table; a share has a bar behind it."""
    words = _plain(cell)
    if _SHARE.fullmatch(words):
        return f'<td style="--share:{words}">{_cell(cell)}'
    return f"<td class=long>{_cell(cell)}" if len(words) > _LONG else f"<td>{_cell(cell)}"


def _cell(cell: Cell) -> str:
    if isinstance(cell, str):
        return escape(safe(cell), quote=False)
    return f'<span class="{cell[1]}">{_cell(cell[0])}</span>' if cell[0] else ""


def _attribute(text: str) -> str:
    return escape(safe(text), quote=True)


def _link(name: str) -> str:
    return f'<a class="node" href="#{_attribute(quote(f"node:{name}"))}">{_cell(name)}</a>' if name else ""
