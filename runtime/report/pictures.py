"""Pictures of a web page as SVG: lines along the depth, bars, points. Static, drawn with the colours of the page.

A picture is a function of figures and texts; the texts are escaped here, so that no name can be more than a text.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from html import escape

from channelfold.runtime.report.names import safe

_WIDTH, _HEIGHT = 720, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 34  # room for the labels
_MOST = 400  # points of a line


def lines(label: str, unit: str, series: Sequence[tuple[str, Sequence[tuple[str, float, str]]]]) -> str:
    """Series of (name, height, words), each as a line from left to right; a point tells its name and its words."""
    series = [(name, thinned(points)) for name, points in series]
    heights = [height for _, points in series for _, height, _ in points]
    frame = _Frame.around([0, max(len(points) for _, points in series) - 1], heights)
    drawn = []
    for number, (_, points) in enumerate(series):
        places = [(frame.x(i), frame.y(height)) for i, (_, height, _) in enumerate(points)]
        drawn.append(f'<polyline class="line c{number}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>')
        drawn += [
            _dot(x, y, f"c{number}", f"{name}: {words}")
            for (x, y), (name, _, words) in zip(places, points, strict=True)
        ]
    key = _key([name for name, _ in series])
    return _figure(label, [*frame.levels(), frame.title("input → output", unit), *drawn], key)


def bars(label: str, unit: str, low: float, step: float, counts: Sequence[int]) -> str:
    """Counts of values in equal steps from ``low`` on."""
    frame = _Frame.around([low, low + step * len(counts)], [0, *counts])
    drawn = []
    for number, count in enumerate(counts):
        left, right = frame.x(low + step * number), frame.x(low + step * (number + 1))
        top = frame.y(count)
        told = f"{low + step * number:g} to {low + step * (number + 1):g} {unit}: {count}"
        size = f'width="{max(right - left - 1, 1):.1f}" height="{max(frame.bottom - top, 0):.1f}"'
        drawn.append(f'<rect class="fill c0" x="{left:.1f}" y="{top:.1f}" {size}><title>{_text(told)}</title></rect>')
    return _figure(label, [*frame.levels(whole=True), *frame.ticks(), frame.title(unit, "samples"), *drawn])


def points(label: str, x: str, y: str, found: Sequence[tuple[float, float, str, bool]]) -> str:
    """Points (x, y, words, marked) on two axes, joined in the order of x."""
    across = [one[0] for one in found]
    margin = (max(across) - min(across)) / 20
    frame = _Frame.around([min(across) - margin, max(across) + margin], [one[1] for one in found])
    places = [(frame.x(across), frame.y(up), words, marked) for across, up, words, marked in sorted(found)]
    line = " ".join(f"{left:.1f},{top:.1f}" for left, top, *_ in places)
    dots = [_dot(left, top, "c1 marked" if marked else "c0", words) for left, top, words, marked in places]
    marks = [
        f'<text x="{min(left + 9, _WIDTH - 60):.1f}" y="{max(top - 8, 10):.1f}" class="marked">chosen</text>'
        for left, top, _, marked in places
        if marked
    ]
    drawn = [*frame.levels(), *frame.ticks(), frame.title(x, y), f'<polyline class="line c0" points="{line}"/>']
    return _figure(label, [*drawn, *dots, *marks])


def thinned(row: Sequence[tuple[str, float, str]], most: int = _MOST) -> list[tuple[str, float, str]]:
    """At most ``most`` of some points in a row: of neighbours the one whose height is farthest from the median."""
    width, usual = min(len(row), most), statistics.median(height for _, height, _ in row)
    parts = [row[i * len(row) // width : (i + 1) * len(row) // width] for i in range(width)]
    return [max(part, key=lambda point: abs(point[1] - usual)) for part in parts]


class _Frame:
    """The scales of two axes."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], step: tuple[float, float]):
        self._x, self._y, self._step = x, y, step
        self.bottom = _HEIGHT - _BOTTOM

    @classmethod
    def around(cls, across: Sequence[float], up: Sequence[float]) -> _Frame:
        """The scales that hold these values, with round numbers at the ends of the vertical one."""
        steps = _round_step(min(across), max(across), 8), _round_step(min(up), max(up), 4)
        low, high = math.floor(min(up) / steps[1]) * steps[1], math.ceil(max(up) / steps[1]) * steps[1]
        return cls((min(across), max(across)), (low, high if high > low else low + steps[1]), steps)

    def x(self, value: float) -> float:
        low, high = self._x
        return _LEFT + (value - low) / ((high - low) or 1.0) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self._y
        return self.bottom - (value - low) / (high - low) * (self.bottom - _TOP)

    def levels(self, whole: bool = False) -> Iterator[str]:
        """Horizontal lines with their values."""
        for value in _steps(*self._y, self._step[1]):
            if whole and value != round(value):
                continue
            y = self.y(value)
            yield f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>'
            yield f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_scaled(value)}</text>'

    def ticks(self) -> Iterator[str]:
        """Values along the horizontal axis."""
        for value in _steps(*self._x, self._step[0]):
            yield f'<text x="{self.x(value):.1f}" y="{self.bottom + 15}" text-anchor="middle">{_scaled(value)}</text>'

    def title(self, x: str, y: str) -> str:
        """What stands on the axes."""
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        turned = f'transform="translate(11 {self.bottom / 2 + 4:.0f}) rotate(-90)" text-anchor="middle"'
        below = f'<text x="{middle:.0f}" y="{_HEIGHT - 4}" text-anchor="middle">{_text(x)}</text>'
        return f"{below}<text {turned}>{_text(y)}</text>"


def _round_step(low: float, high: float, parts: int) -> float:
    """The least of 1, 2, 5, 10 … (and their tenths) that divides a span into at most ``parts``."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / parts))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor * parts >= span * (1 - 1e-9))


def _steps(low: float, high: float, step: float) -> list[float]:
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _scaled(value: float) -> str:
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:g}{unit}"
    return f"{value:.6g}"


def _dot(x: float, y: float, style: str, words: str) -> str:
    radius = 6 if "marked" in style else 3
    return f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{_text(words)}</title></circle>'


def _key(names: Sequence[str]) -> str:
    if len(names) < 2:
        return ""
    return "".join(f'<span class="key c{number}">{_text(name)}</span>' for number, name in enumerate(names))


def _figure(label: str, drawn: Sequence[str], key: str = "") -> str:
    frame = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(safe(label), quote=True)}"'
    return f"<figure><figcaption>{_text(label)}{key}</figcaption><svg {frame}>{''.join(drawn)}</svg></figure>"


def _text(words: str) -> str:
    return escape(safe(words), quote=False)
