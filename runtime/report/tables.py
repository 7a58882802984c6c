"""Lines, tables and figures of a record in a terminal. Every text passes ``safe``.

All renderers of records draw on a ``Page`` and never touch the console itself::

    page = Page(Console())
    page.fill("Engines", ["<for", ">size"], [("m.engine", "SM 89", size(940))])
    page.say(("refused: ", "bold"), reason)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from channelfold.runtime.report.names import safe, shorten, shorten_all

UNKNOWN = "–"  # in place of a figure
Cell = str | tuple[str, str]  # a text, or a text and its style
_BLOCKS = "▁▂▃▄▅▆▇█"
_WHOLE = "whole names: --json, or pipe the output"


class Page:
    """Draws on a console. No text can steer the terminal, because every text passes ``safe``.

    In a terminal, lines fit its width, and names are shortened between their parts. In a file or a pipe nothing is
    shortened or wrapped.
    """

    whole = False  # whether long lists are shown to their end

    def __init__(self, console: Console):
        self._console = console
        if not console.is_terminal:
            console.width = 10_000

    def blank(self) -> None:
        self._console.print()

    def say(self, *cells: Cell, indent: int = 2, wrap: bool = True) -> None:
        """Prints a line. With ``wrap`` False a long line is not broken, so that users can copy the line whole."""
        line = _text(*cells)
        content = Padding(line, (0, 0, 0, indent), expand=False) if indent else line
        self._console.print(content, highlight=False, soft_wrap=not wrap)

    def note(self, words: str, indent: int = 2) -> None:
        """Prints a dim line, such as the legend of a table."""
        self.say((words, "dim"), indent=indent)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], indent: int = 2) -> None:
        """Prints a table without borders. The title heads the first column, whose labels are not shortened.

        Each of the other ``columns`` is its alignment (``<`` or ``>``) and its heading. Empty columns are left out.
        """
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column(_text((title, "bold not dim")), no_wrap=True)
        filled = _filled(columns, rows)
        for column, _ in filled:
            # rich measures a table with a column of no width too narrow
            table.add_column(_text(column[1:]), justify="right" if column[0] == ">" else "left", min_width=1)
        for (label, *_), *cells in zip(rows, *(cells for _, cells in filled), strict=True):
            table.add_row(_text(" " * indent, label), *map(_text, cells))
        self._console.print(table, highlight=False)

    def fill(self, title: str, columns: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> None:
        """Prints a table of rows that begin with a name, which gets the width that the other columns leave."""
        names = [safe(name) for name, *_ in rows]
        shown = shorten_all(names, max(12, self.room(columns, rows)))
        self.table(title, columns, [(name, *cells) for name, (_, *cells) in zip(shown, rows, strict=True)])
        if shown != names:
            self.note(_WHOLE)

    def room(self, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> int:
        """The width that the other columns leave to the names."""
        taken = (max(len(column) - 1, *map(_width, cells)) + 2 for column, cells in _filled(columns, rows))
        return self._console.width - 2 - sum(taken)

    def curve(self, label: str, unit: str, series: Mapping[str, Sequence[tuple[str, Any]]]) -> None:
        """Prints figures in a row as blocks of different heights; of neighbours that share a block the least counts.

        A series is a list of pairs (name, figure), and has a name of its own where there are several.
        """
        for name, points in series.items():
            values = finite([value for _, value in points])
            if len(values) < 2:
                continue
            words = f"{label} {name}".strip()
            low, span = min(values), (max(values) - min(values)) or 1.0
            width = min(len(values), max(self._console.width - 4 - len(words), 8), 64)
            parts = [values[i * len(values) // width : (i + 1) * len(values) // width] for i in range(width)]
            blocks = (_BLOCKS[round((min(part) - low) / span * (len(_BLOCKS) - 1))] for part in parts)
            self.say(f"{words}  ", "".join(blocks))

    def bars(self, label: str, unit: str, low: float, step: float, counts: Sequence[int]) -> None:
        """Draws the counts of values in equal steps from ``low`` on; in a terminal nothing."""

    def points(self, label: str, x: str, y: str, found: Sequence[tuple[float, float, str, bool]]) -> None:
        """Draws points (x, y, words, marked) on two axes; in a terminal nothing."""

    def thumbnails(self, found: Sequence[tuple[str, str]]) -> None:
        """Shows pictures, pairs of a data URI and words; in a terminal nothing."""

    def grid(self, rows: Sequence[Sequence[Cell]], indent: int = 2, gap: int = 2) -> None:
        """Prints rows of a label and its remark, without headings."""
        grid = Table.grid(padding=(0, gap))
        grid.add_column(no_wrap=True)
        for row in rows:
            grid.add_row(*map(_text, row))
        self._console.print(Padding(grid, (0, 0, 0, indent), expand=False), highlight=False)

    def nodes(self, rows: Sequence[tuple[str, str]], limit: int, heading: Sequence[Cell] = ()) -> None:
        """Prints a heading and the names of the first ``limit`` nodes, each with a remark."""
        if heading:
            self.say(*heading)
        shown = [(self.name(node), (remark, "dim")) for node, remark in rows[:limit]]
        self.grid(shown, indent=4)
        more = [f"… and {len(rows) - limit} more"] if len(rows) > limit else []
        if any(name != safe(node) for (name, _), (node, _) in zip(shown, rows, strict=False)):
            more.append(_WHOLE)
        if more:
            self.note("; ".join(more), indent=4)

    def name(self, name: str, taken: int = 0) -> str:
        """The name in half of the width that is not ``taken``."""
        return shorten(safe(name), max((self._console.width - taken) // 2, 12))


def _filled(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> list[tuple[str, Sequence[Cell]]]:
    """The columns that are not empty, with their cells."""
    cells = list(zip_longest(*(row[1:] for row in rows), fillvalue=""))
    return [
        (column, column_cells)
        for column, column_cells in zip(columns, cells, strict=False)
        if any(map(_width, column_cells))
    ]


def _text(*cells: Cell) -> Text:
    # Text alone, never markup: names may hold brackets.
    return Text.assemble(*(safe(cell) if isinstance(cell, str) else (safe(cell[0]), cell[1]) for cell in cells))


def _width(cell: Cell) -> int:
    return len(cell if isinstance(cell, str) else cell[0])


def finite(values: Sequence[Any]) -> list[float]:
    """Figures of a record as numbers; an infinite one counts as the nearest finite one, an unknown one as the least."""
    known = [value for value in values if isinstance(value, int | float)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    return [value if isinstance(value, int | float) else high if value == "inf" else low for value in values]


def number(value: Any, form: str) -> str:
    """A figure of the record: a number, "inf" or "-inf", or None."""
    if value is None:
        return UNKNOWN
    if value == 0:
        return "0"
    return value if isinstance(value, str) else form.format(value)


def ratio(value: Any) -> str:
    """A ratio of the record: a number, infinite or "inf", or None."""
    return number(value, "{:.1f}" if value is None or float(value) < 100 else "{:.0f}")


def times(before: float, after: float, less: str, more: str) -> str:
    """``2.99x smaller``: a figure before against the figure after, with the words for less and for more."""
    ratio = before / after
    return f"{ratio:.2f}x {less}" if ratio >= 1 else f"{1 / ratio:.2f}x {more}"


def told(value: Any) -> str:
    """The value of an option in words."""
    words = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return {"": "none", "None": "none", "True": "on", "False": "off"}.get(words, words)


def count(value: int | None) -> str:
    """``1.40 M`` for 1398912; a dash for None."""
    return UNKNOWN if value is None else _scaled(value, "{:.2f} {}") or str(value)


def size(value: int) -> str:
    """``1.4 MB`` for 1398912 bytes."""
    return _scaled(value, "{:.1f} {}B") or f"{value} B"


def _scaled(value: int, form: str) -> str:
    units = (("G", 1e9), ("M", 1e6), ("k", 1e3))
    return next((form.format(value / scale, unit) for unit, scale in units if value >= scale), "")
