"""PP-OCRv4 recognition: read rendered lines of text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tasks.base import Feed, OpenSet, Task, session
from tasks.sources import sentences

LINES = 200
HEIGHT = 48


def fonts(open_set: OpenSet) -> list[str]:
    dejavu = open_set.data / "deb_fonts-dejavu-core/usr/share/fonts/truetype/dejavu"
    liberation = open_set.data / "deb_fonts-liberation/usr/share/fonts/truetype/liberation"
    first = [dejavu / f"DejaVu{style}.ttf" for style in ("Sans", "SansMono", "Serif")]
    return [str(path) for path in [*first, *sorted(liberation.glob("Liberation*-Regular.ttf"))]]


def rendered(text: str, font: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Black on white with noise, scaled to 48 rows: float32 (1, 3, 48, width) in [-1, 1], channels blue, green, red."""
    face = ImageFont.truetype(font, size)
    left, top, right, bottom = (int(edge) for edge in face.getbbox(text))
    image = Image.new("RGB", (right - left + 12, bottom - top + 12), "white")
    ImageDraw.Draw(image).text((6 - left, 6 - top), text, fill="black", font=face)
    pixels = np.asarray(image).astype(np.float32)
    pixels = pixels + rng.normal(0, 25, pixels.shape)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    width = max(16, int(image.width * HEIGHT / image.height))
    blue_first = np.asarray(image.resize((width, HEIGHT), Image.Resampling.BILINEAR))[:, :, ::-1]
    return ((blue_first / 255.0 - 0.5) / 0.5).astype(np.float32).transpose(2, 0, 1)[None]


def lines(open_set: OpenSet, corpus: list[str], n: int, seed: int) -> Iterator[tuple[str, str, np.ndarray]]:
    """(sentence, the up to four words shown, their image), in all fonts in turn."""
    rng, faces = np.random.default_rng(seed), fonts(open_set)
    for i in range(n):
        sentence = corpus[int(rng.integers(len(corpus)))]
        words = sentence.split()
        first = int(rng.integers(0, max(1, len(words) - 4)))
        text = " ".join(words[first : first + 4])
        size = int(rng.integers(14, 36))
        yield sentence, text, rendered(text, faces[i % len(faces)], size, rng)


def long_sentences(open_set: OpenSet) -> list[str]:
    return [sentence for sentence in sentences(open_set) if len(sentence) > 20]


def edit_distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def ocr_rec(open_set: OpenSet, model: Path) -> dict[str, Any]:
    """Share of characters read right (1 - edit distance / length, blanks ignored) on 200 lines."""
    # The alphabet stands in the metadata of the float model; a compressed one may have lost it.
    metadata = session(open_set.models / "ocr_rec.onnx").get_modelmeta().custom_metadata_map
    alphabet = ["", *metadata["character"].splitlines(), " "]
    run = session(model)
    wrong, total, exact = 0, 0, 0
    for _, text, image in lines(open_set, long_sentences(open_set), LINES, seed=0):
        best = run.run(None, {"x": image})[0][0].argmax(1)
        read = "".join(alphabet[c] for i, c in enumerate(best) if c and (i == 0 or best[i - 1] != c))
        truth, read = text.replace(" ", ""), read.replace(" ", "")
        wrong += edit_distance(truth, read)
        total += len(truth)
        exact += truth == read
    return {
        "characters": round(1 - wrong / total, 4),
        "lines_exact": round(exact / LINES, 3),
        "lines": LINES,
        "length": total,
    }


def ocr_rec_samples(open_set: OpenSet) -> Iterator[Feed]:
    """64 lines, of their own width each, from sentences of which the evaluation shows nothing."""
    corpus = long_sentences(open_set)
    evaluated = {sentence for sentence, _, _ in lines(open_set, corpus, LINES, seed=0)}
    others = [sentence for sentence in corpus if sentence not in evaluated]
    return ({"x": image} for _, _, image in lines(open_set, others, 64, seed=100))


TASKS = (Task("ocr_rec", "ocr_rec.onnx", "characters", ocr_rec, ocr_rec_samples),)
