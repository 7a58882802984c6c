"""Lines of a text file as samples of a language model, through the tokenizer that belongs to the model.

A line becomes the ids that its tokenizer.json makes of it, special tokens included, and fills the other inputs by what
they mean (``runtime.io.meanings``): masks, token types, positions. Lines are padded only where the model fixes a size.
A decoder with a cache gets rollouts: all tokens of a line but the last 8 with an empty cache, then the others one by
one, each with the cache that the model returned. Lines are read anew in every iteration; none is kept in memory.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from channelfold.runtime.data.feeds import batch_size, describe
from channelfold.runtime.data.probes import STEPS, Run, Step, rollout, rolls
from channelfold.runtime.data.reading import TEXT_OPTIONS, Reading
from channelfold.runtime.data.sources import Data, check_inputs
from channelfold.runtime.errors import DataError, DependencyError, ModelError, UsageError, nearest_path
from channelfold.runtime.io.session import Feed, Meaning, TensorSpec

LONGEST = 512  # tokens of a text, where neither the user nor the model nor the tokenizer says how many there may be
_FILE = "tokenizer.json"
_CHUNK = 64  # lines that are tokenized at once
_PADS = ("[PAD]", "<pad>", "<|endoftext|>", "</s>")
_ENCODINGS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}  # what Windows writes; all others are UTF-8
_FILLED = ("ids", "mask", "zeros", "position", "past", "branch", "past_length", "total_length", "last_position")
_NPZ = "Write the samples with numpy.savez, input names as keys"


def open_text(
    path: Path, inputs: Sequence[TensorSpec], reading: Reading, beside: Path | None = None, run: Run | None = None
) -> Data:
    """The lines of a file of text as data.

    ``beside``: the folder of the model, in which or above which a tokenizer.json is taken when ``reading`` names none.
    ``run`` runs the model, for the steps of rollouts.

    Raises DataError where text, tokenizer and model do not fit together, UsageError without a tokenizer, and
    DependencyError without the package tokenizers.
    """
    check_inputs(inputs)
    if not path.is_file():
        raise DataError(f"There is no {path}", nearest_path(path))
    source = tokenizer_file(reading, beside, path)
    tokenizer, limits = _tokenizer(source)
    texts = _Texts(path, source, tokenizer, *_roles(inputs), run)
    notes = texts.measure(reading, limits)
    notes += [] if reading.tokenizer else [f"The tokenizer is {source}, because it lies beside the model"]
    count = texts.count
    description = f"{describe(count, 1, 'step')} of {texts.used} texts" if texts.steps else describe(
        count, texts.batch, "text")  # fmt: skip
    done = f"{source.name}, at most {texts.longest} tokens"
    done += f", padded to {texts.width} with id {texts.pad}" if texts.width else ""
    return Data(inputs, count, texts.feeds, f"{description} from {path.name}", notes, preparation=done,
                heeds=TEXT_OPTIONS)  # fmt: skip


def tokenizer_file(reading: Reading, beside: Path | None, path: Path) -> Path:
    """The tokenizer.json that the user names, as a file or as a folder that holds one, or the one near the model."""
    if reading.tokenizer is not None:
        given = Path(reading.tokenizer)
        file = given / _FILE if given.is_dir() else given
        if not file.is_file():
            raise DataError(f"There is no {file}", nearest_path(file))
        return file
    near = [] if beside is None else [beside / _FILE, beside.resolve().parent / _FILE]
    found = next((file for file in near if file.is_file()), None)
    if found is None:
        raise UsageError(f"{path} is text, and no tokenizer is given", f"Add --tokenizer, the {_FILE} of the model")
    return found


def _tokenizer(file: Path) -> tuple[Any, list[int]]:
    """The tokenizer in a file, and the lengths that the file and the settings beside it allow."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise DependencyError(f"Texts are read with tokenizers ({error})", "Run: pip install tokenizers") from None
    try:
        tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
        limits = [tokenizer.truncation["max_length"]] if tokenizer.truncation else []
    except Exception as error:  # the package raises Exception itself
        hint = "Give the tokenizer.json that save_pretrained() of a fast tokenizer of transformers writes"
        raise DataError(f"{file} is not a tokenizer.json ({error})", hint) from None
    try:
        said = json.loads((file.parent / "tokenizer_config.json").read_text(encoding="utf-8"))["model_max_length"]
        limits += [int(said)] if 1 <= said < 1e6 else []  # transformers writes 1e30 for "unknown"
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return tokenizer, limits


def _roles(inputs: Sequence[TensorSpec]) -> tuple[list[TensorSpec], TensorSpec]:
    """All inputs with their meanings, and the one that takes the ids. Raises DataError for what a text cannot fill."""
    specs = [dataclasses.replace(spec, meaning=spec.meaning or _by_name(spec)) for spec in inputs]
    ids = [spec for spec in specs if spec.meaning is not None and spec.meaning.kind == "ids"]
    if not ids:
        raise DataError(f"No input takes the ids of a text: {', '.join(map(str, inputs))}", _NPZ)
    for spec in specs:
        meaning = spec.meaning
        shaped = meaning is None or meaning.kind not in ("ids", "mask", "zeros") or len(spec.shape) == 2
        grown = spec.shape[meaning.axis] if meaning is not None and meaning.axis is not None else 0
        held = isinstance(grown, int) and grown > 0
        if meaning is None or meaning.kind not in _FILLED or not shaped or held or (len(ids) > 1 and spec is ids[1]):
            raise DataError(f"A text cannot fill the input {spec}", _NPZ)
    return specs, ids[0]


def _by_name(spec: TensorSpec) -> Meaning | None:
    known = re.search(r"(^|_)(input_ids|ids|tokens)$", spec.name) and spec.dtype is not None and spec.dtype.kind in "iu"
    return Meaning("ids", below=0) if known else None


@dataclass
class _Texts:
    """The texts of a file. What ``measure`` finds decides how they are cut, padded and rolled out."""

    path: Path
    source: Path
    tokenizer: Any
    inputs: Sequence[TensorSpec]
    ids: TensorSpec
    run: Run | None
    batch: int = 1
    longest: int = LONGEST
    width: int = 0  # of padded ids, 0: as long as the text
    pad: int = 0
    used: int = 0
    steps: int = 0  # of one token, at the end of each text
    count: int = 0  # of feeds

    def measure(self, reading: Reading, limits: Sequence[int]) -> list[str]:
        """Decides all that depends on the texts; notes. Raises DataError for ids that are not of the model."""
        self._limit(reading, limits)
        padding = self.tokenizer.padding or {}
        known = (self.tokenizer.token_to_id(name) for name in _PADS)
        self.pad = padding.get("pad_id", next((number for number in known if number is not None), 0))
        self.tokenizer.no_padding()
        lengths, highest, empty, cut = array("L"), 0, 0, 0
        for encoding in self._encodings():
            empty += not encoding.ids
            cut += bool(encoding.overflowing)
            if encoding.ids:
                lengths.append(len(encoding.ids))
                highest = max(highest, *encoding.ids)
        notes = self._check(highest)
        dropped = len(lengths) % self.batch
        self.used = len(lengths) - dropped
        if not self.used:
            few = f"only {len(lengths)}, and the model takes batches of {self.batch}" if lengths else "none"
            raise DataError(f"{self.path} holds too few texts: {few}", "Write one text a line")
        fixed = self.ids.shape[1]
        self.width = fixed if isinstance(fixed, int) else max(lengths) if self.batch > 1 else 0
        if self.width:
            self._check_padding(min(lengths) < self.width, notes)
        self.steps = self._steps()
        pieces = [min(lengths[i : i + self.batch]) for i in range(0, self.used, self.batch)] if self.steps else []
        self.count = sum(1 + min(self.steps, n - 1) for n in pieces) if self.steps else self.used // self.batch
        notes += [f"{empty} empty lines were left out"] if empty else []
        notes += [f"{cut} of {len(lengths)} texts are longer than {self.longest} tokens and were cut"] if cut else []
        notes += [f"{dropped} texts did not fill a batch of {self.batch} and were dropped"] if dropped else []
        return notes

    def _limit(self, reading: Reading, limits: Sequence[int]) -> None:
        """Finds the batch and the length of a text, and sets the length in the tokenizer."""
        self.batch = batch_size([self.ids]) or 1
        rows = [spec.meaning.below for spec in self.inputs if spec.meaning and spec.meaning.kind == "position"]
        hard = [row for row in rows if row > 2] + ([self.ids.shape[1]] if isinstance(self.ids.shape[1], int) else [])
        least = min(hard, default=0)
        if reading.max_length and least and reading.max_length > least:
            raise UsageError(f"--max-length is {reading.max_length}, and the model takes {least} tokens", "Give less")
        self.longest = reading.max_length or min([*hard, *limits, LONGEST])
        if self.longest < 2:
            raise DataError(f"The model takes {self.longest} token at a time", _NPZ)
        try:
            self.tokenizer.enable_truncation(max_length=self.longest)
            self.tokenizer.encode("a b c d")
        except Exception as error:  # special tokens alone are longer
            raise UsageError(f"{self.longest} tokens are too few for a text ({error})", "Give more") from None

    def _check(self, highest: int) -> list[str]:
        """A note where the vocabulary is much smaller than the table of the model; DataError where it is larger."""
        rows, size = self.ids.meaning.below if self.ids.meaning else 0, self.tokenizer.get_vocab_size()
        if rows and highest >= rows:
            raise DataError(
                f"{self.source} makes ids up to {highest}, and the model's table has {rows} rows",
                "Give the tokenizer of this model",
            )
        if size < 0.8 * rows:
            return [f"{self.source.name} knows {size} tokens, the model's table has {rows} rows: is it this model's?"]
        return []

    def _check_padding(self, needed: bool, notes: list[str]) -> None:
        masks = [spec for spec in self.inputs if spec.meaning and spec.meaning.kind == "mask"]
        if needed and not masks:
            notes.append(f"Texts were padded to {self.width} tokens, and the model has no mask: padding counts as text")
        if needed and any(spec.dtype is not None and spec.dtype.kind == "f" for spec in masks):
            raise DataError(f"What hides padding in the input {masks[0]} is not known", _NPZ)

    def _steps(self) -> int:
        """The single tokens at the end of each text: those of a rollout, where the first text shows that they run."""
        if self.run is None or not rolls(self.inputs) or self.width:
            return 0
        with_steps = dataclasses.replace(self, steps=STEPS)
        try:
            list(itertools.islice(with_steps.feeds(), 2))
        except ModelError:
            return 0
        return STEPS

    def feeds(self) -> Iterator[Feed]:
        encodings = (encoding for encoding in self._encodings() if encoding.ids)
        while len(group := list(itertools.islice(encodings, self.batch))) == self.batch:
            yield from self._feeds(group)

    def _feeds(self, group: Sequence[Any]) -> Iterator[Feed]:
        """The feeds of the texts that the model takes together."""
        width = self.width or max(len(encoding.ids) for encoding in group)
        ids, kinds = (np.full((len(group), width), fill, np.int64) for fill in (self.pad, 0))
        mask = np.zeros((len(group), width), np.int64)
        for row, encoding in enumerate(group):
            length = len(encoding.ids)
            ids[row, :length], kinds[row, :length], mask[row, :length] = encoding.ids, encoding.type_ids, 1

        def values(step: Step, number: int) -> Feed:
            new = slice(step.past, step.past + step.new)
            shapes = step.shapes()
            widths = [shapes[spec.name][-1] for spec in self.inputs if spec.meaning and spec.meaning.kind == "mask"]
            seen = mask[:, : step.past + step.new]
            seen = np.pad(seen, ((0, 0), (0, max(widths, default=0) - seen.shape[1]))) if widths else seen
            known: Mapping[str, Any] = {"ids": ids[:, new], "zeros": kinds[:, new], "mask": seen, "past": 0}
            return step.feed(np.random.default_rng(0), known)

        dims = {spec.shape[0]: len(group) for spec in self.inputs if spec.shape and isinstance(spec.shape[0], str)}
        single = min(self.steps, width - 1)
        if single and self.run is not None:
            yield from rollout(self.inputs, dims, [width - single] + [1] * single, self.run, values)
        else:
            yield values(Step(self.inputs, dims, 0, width, width, False), 0)

    def _encodings(self) -> Iterator[Any]:
        """What the tokenizer makes of every line; of empty ones too, as nothing."""
        lines = self._lines()
        while chunk := list(itertools.islice(lines, _CHUNK)):
            for line, encoding in zip(chunk, self.tokenizer.encode_batch(chunk), strict=True):
                yield encoding if line else _Nothing()

    def _lines(self) -> Iterator[str]:
        with self.path.open("rb") as file:
            encoding = _ENCODINGS.get(file.read(2), "utf-8-sig")
        number = 0
        with self.path.open(encoding=encoding, errors="surrogateescape") as file:
            try:
                for line in file:
                    number += 1
                    line.encode()
                    yield line.strip()
            except UnicodeError:
                raise DataError(f"{self.path} is not UTF-8 in line {number}", "Save it as UTF-8") from None


@dataclass(frozen=True)
class _Nothing:
    """What is made of an empty line."""

    ids: Sequence[int] = ()
    overflowing: Sequence[Any] = ()
