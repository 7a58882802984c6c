"""Pictures: figures stand where the axes say, and texts are no more than texts."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from channelfold.runtime.report import pictures

EVIL = "</title></svg><script>alert(1)</script>\"'&"


def drawn(picture: str) -> ElementTree.Element:
    return ElementTree.fromstring(picture)


def labels(picture: str) -> dict[float, float]:
    """Heights in the picture by the values that stand at them."""
    texts = (text for text in drawn(picture).iter("text") if text.get("text-anchor") == "end")
    return {float(text.text or ""): float(text.get("y") or 0) - 4 for text in texts}


def test_points_stand_at_the_height_of_their_figures():
    picture = pictures.lines(
        "SNR", "dB", [("", [("a", 10.0, "10.0 dB"), ("b", 42.0, "42.0 dB"), ("c", 30.0, "30 dB")])]
    )
    heights = labels(picture)
    dots = [(dot.get("cy"), "".join(dot.itertext())) for dot in drawn(picture).iter("circle")]
    (low, at_low), (high, at_high) = min(heights.items()), max(heights.items())
    assert low <= 10 < 42 <= high
    for (y, told), value in zip(dots, (10, 42, 30), strict=True):
        assert float(y or 0) == pytest.approx(at_low + (value - low) / (high - low) * (at_high - at_low), abs=0.1)
        assert f"{value}" in told


def test_bars_are_as_high_as_their_counts():
    picture = pictures.bars("samples", "dB", 20, 2, [1, 0, 4])
    heights = [float(bar.get("height") or 0) for bar in drawn(picture).iter("rect")]
    assert heights == [pytest.approx(heights[2] / 4, abs=0.1), 0, heights[2]]
    assert "24 to 26 dB: 4" in picture


def test_of_many_points_dips_and_peaks_stay():
    row = [(str(i), {1234: 3.0, 4321: 90.0}.get(i, 40.0 + i % 2), "") for i in range(5000)]
    kept = pictures.thinned(row)
    assert len(kept) == 400
    assert {row[1234], row[4321]} <= set(kept)
    assert pictures.thinned(row[:3]) == row[:3]


@pytest.mark.parametrize("value", [0.0, -3.5, 1e-9, 7e11])
def test_equal_figures_have_a_picture(value):
    for picture in (
        pictures.lines("l", "u", [("", [("a", value, ""), ("b", value, "")])]),
        pictures.points("l", "x", "y", [(value, value, "", True), (value, value, "", False)]),
    ):
        assert "nan" not in picture
        drawn(picture)


def test_texts_are_escaped():
    for picture in (
        pictures.lines(EVIL, EVIL, [(EVIL, [(EVIL, 1.0, EVIL), (EVIL, 2.0, EVIL)]), (EVIL, [(EVIL, 1.0, EVIL)] * 2)]),
        pictures.bars(EVIL, EVIL, 0, 1, [1, 2]),
        pictures.points(EVIL, EVIL, EVIL, [(0, 0, EVIL, True), (1, 1, EVIL, False)]),
    ):
        assert not re.search("<script", picture)
        assert EVIL in "".join(drawn(picture).itertext())
