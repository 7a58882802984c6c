"""Calibration and evaluation data from files, Python objects and scripts. Every feed fits the model.

Feeds are single samples wherever the model allows this; feeds.py has the rules.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import itertools
import os
import re
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from channelfold.runtime.data import images
from channelfold.runtime.data.feeds import Batch, Feeds
from channelfold.runtime.data.npz import Spill, read_headers
from channelfold.runtime.data.reading import IMAGE_OPTIONS, Reading
from channelfold.runtime.errors import ChannelfoldError, DataError, nearest, nearest_path
from channelfold.runtime.io.session import Feed, TensorSpec


@dataclass(eq=False)
class Data:
    """Feeds for a model. They can be iterated any number of times, always with the same values.

    ``inputs``: the model inputs that the feeds fit. ``count``: the number of feeds. ``feeds`` begins an iteration.
    ``description``: for reports, such as "64 samples from calib.npz". ``notes``: changes to the data (casts,
    ignored keys, dropped samples), one sentence each. ``synthetic``: True for random data, which prove nothing
    about accuracy. ``preparation``: what was done to images or texts, in words. ``heeds``: the options of
    ``Reading`` that these data heed.

    Iterating raises DataError when a file is damaged or a value is not finite or does not fit its input's dtype.
    """

    inputs: Sequence[TensorSpec]
    count: int
    feeds: Callable[[], Iterator[Feed]]
    description: str
    notes: Sequence[str] = ()
    synthetic: bool = False
    preparation: str = ""
    heeds: Sequence[str] = ()

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Feed]:
        return self.feeds()

    def first(self, n: int) -> Data:
        """The first ``n`` feeds; this object itself where it has ``n`` feeds or fewer."""
        if n >= len(self):
            return self
        description = f"the first {n} of {self.description}"
        return dataclasses.replace(
            self, count=n, feeds=lambda: itertools.islice(self.feeds(), n), description=description
        )

    def at(self, places: Collection[int]) -> Data:
        """The feeds at these places, in order."""
        places = frozenset(places)
        return dataclasses.replace(
            self,
            count=len(places),
            feeds=lambda: (feed for place, feed in enumerate(self) if place in places),
            description=f"{len(places)} of {self.description}",
        )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names, dtypes, shapes and bytes of all feeds; does not depend on how they were stored."""
        digest = hashlib.sha256()
        for feed in self:
            for name, array in sorted(feed.items()):
                digest.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
                digest.update(repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes())
        return digest.hexdigest()


def open_data(source: Any, inputs: Sequence[TensorSpec], reading: Reading = Reading()) -> Data:
    """Opens calibration or evaluation data for a model with these inputs.

    ``source`` is the path of a ``.npz`` (keys are input names, axis 0 counts samples), of a ``.npy`` (models with one
    input), or of a folder of either, one batch a file, in natural order; the path of an image, or of a folder of
    images, which are read as ``reading`` says; or a Python object: a mapping of names to arrays, an iterable of such
    mappings, or a reader with ONNX Runtime's ``get_next()``. A source that may be readable only once is read into a
    temporary file. All arrays may have one axis more than the inputs: a stack of feeds.

    Raises DataError, which names the file, the key, the expected and the found arrays.
    """
    check_inputs(inputs)
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        files, notes = _files(path)
        origin = path.name or str(path)
        if files[0].suffix.lower() in images.SUFFIXES:
            batches, said, preparation = images.read(files, inputs, reading)
            data = _assemble(inputs, batches, origin, [*notes, *said])
            return dataclasses.replace(data, preparation=preparation, heeds=IMAGE_OPTIONS)
        batches, ignored = _file_batches(files, inputs)
        return _assemble(inputs, batches, origin, [*notes, *ignored])
    batches, origin = _object_batches(source, inputs)
    return _assemble(inputs, batches, origin, [])


def load_script(path: str | Path, inputs: Sequence[TensorSpec]) -> Data:
    """Data from a script in Polygraphy's form, whose ``load_data()`` returns or yields feeds. Runs the script's code.

    Raises DataError when there is no such function, and, with the line of the script, when the script fails.
    """
    check_inputs(inputs)
    path = Path(path)
    if not path.is_file():
        raise DataError(f"There is no {path}", nearest_path(path))
    batches, _ = _object_batches(_run_script(path), inputs)
    return _assemble(inputs, batches, f"load_data() in {path.name}", [])


def _assemble(inputs: Sequence[TensorSpec], batches: Sequence[Batch], origin: str, notes: Sequence[str]) -> Data:
    feeds = Feeds(batches, inputs, origin)
    description = f"{feeds.description} from {origin}"
    return Data(inputs, len(feeds), feeds.__iter__, description, notes=(*notes, *feeds.notes))


def check_inputs(inputs: Sequence[TensorSpec]) -> None:
    """Raises DataError where a model has no inputs, or inputs of types that numpy has no arrays for."""
    for spec in inputs:
        if spec.dtype is None:
            raise DataError(
                f"Input {spec.name!r} has a type that numpy has no arrays for (a sequence, an optional, bfloat16 …)",
                "Export the model with plain tensors as inputs",
            )
    if not inputs:
        raise DataError("The model has no inputs, so there is nothing to feed", "Check the exported model")


def _file_batches(files: Sequence[Path], inputs: Sequence[TensorSpec]) -> tuple[list[Batch], list[str]]:
    batches, ignored = [], {}
    for file in files:
        stored = read_headers(file)
        if file.suffix == ".npy":
            if len(inputs) > 1:
                raise DataError(
                    f"{file} holds one array, and the model has {len(inputs)} inputs: {_names(inputs)}",
                    "Store them in one .npz, with the input names as keys",
                )
            stored = {inputs[0].name: stored[""]}
        elif len(inputs) == 1 and set(stored) == {"arr_0"}:  # numpy.savez(x), without a name
            stored = {inputs[0].name: stored["arr_0"]}
        batches.append(Batch(str(file), _pick(stored, inputs, str(file))))
        ignored |= dict.fromkeys(stored.keys() - {spec.name for spec in inputs})
    return batches, [f"Not inputs of the model, not fed to it: {', '.join(sorted(ignored))}"] if ignored else []


def _files(path: Path) -> tuple[list[Path], list[str]]:
    """The files with samples, all of one kind, and notes on others. Images may stand in folders, one for each class."""
    if not path.exists():
        raise DataError(f"There is no {path}", nearest_path(path))
    if path.suffix == ".py":
        raise DataError(f"{path} is a Python script, which is run only on request", "Pass it to load_script()")
    if path.is_file():
        if _kind(path) is None:
            raise DataError(f"{path} is neither .npz nor .npy, no image and no .txt", "Write samples with numpy.savez")
        return [path], []
    found = _visible(path, "*")
    if not any(map(_kind, found)):
        found += [file for file in _visible(path, "*/**/*") if _kind(file) == "images"]
    kinds = {kind for file in found if (kind := _kind(file))}
    if len(kinds) > 1:
        both = " and ".join(sorted(kinds, reverse=True))
        raise DataError(f"The folder {path} holds both {both} files, and only one kind can be meant", "Move one away")
    if not kinds:
        raise DataError(
            f"The folder {path} holds no .npz and no .npy files, and no images", "Write one such file for each batch"
        )
    (kind,) = kinds
    files = sorted((file for file in found if _kind(file) == kind), key=lambda file: _natural(file.relative_to(path)))
    others = len(found) - len(files)
    return files, [f"{others} other file{'s' * (others != 1)} in {path.name} ignored"] if others else []


def _kind(file: Path) -> str | None:
    if file.suffix.lower() in images.SUFFIXES:
        return "images"
    return file.suffix if file.suffix in (".npz", ".npy") else None


def _visible(folder: Path, pattern: str) -> list[Path]:
    found = (file for file in folder.glob(pattern) if file.is_file())
    return [file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def _natural(path: Path) -> list[list[tuple[int, str]]]:
    return [
        [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)]
        for name in path.parts
    ]


def _object_batches(source: Any, inputs: Sequence[TensorSpec]) -> tuple[list[Batch], str]:
    if isinstance(source, Mapping):
        return [Batch("the data", _arrays(source, "the data", inputs))], "arrays in memory"
    if isinstance(source, Sequence):
        held = [(f"feed {index}", item) for index, item in enumerate(source)]
        return [Batch(label, _arrays(item, label, inputs)) for label, item in held], "arrays in memory"
    if callable(getattr(source, "get_next", None)):
        items, origin = _read_all(source), f"a data reader ({type(source).__name__})"
    elif isinstance(source, Iterable):
        items, origin = source, f"a Python {type(source).__name__}"
    else:
        raise DataError(
            f"Data cannot be read from {type(source).__name__!r}",
            "Give a path, a list of feeds (input name to array), or an object with get_next()",
        )
    spill = Spill()
    batches = []
    for index, item in enumerate(items):
        label = f"feed {index}"
        batches.append(Batch(label, spill.add(_arrays(item, label, inputs)), spill))
    spill.close()
    return batches, origin


def _read_all(reader: Any) -> Iterator[Any]:
    if callable(rewind := getattr(reader, "rewind", None)):
        rewind()
    while (item := reader.get_next()) is not None:
        yield item


def _run_script(path: Path) -> Iterator[Any]:
    with _running(path) as module:
        if not hasattr(module, "load_data"):
            raise DataError(f"{path} defines no load_data()", "Write one that yields feeds: {input name: array}")
        yield from module.load_data()


def call_script(path: Path, function: str, *arguments: Any) -> Any:
    """What a function of a Python script returns. Raises DataError as ``load_script`` does."""
    if not path.is_file():
        raise DataError(f"There is no {path}", nearest_path(path))
    with _running(path) as module:
        if not hasattr(module, function):
            raise DataError(f"{path} defines no {function}()", nearest(function, vars(module)))
        return getattr(module, function)(*arguments)


@contextlib.contextmanager
def _running(path: Path) -> Iterator[Any]:
    """The module that a script makes. Raises DataError, with the line of the script, where its code fails."""
    spec = importlib.util.spec_from_file_location(f"_channelfold_data_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise DataError(f"{path} is not a Python script", "Give a .py file with the function")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
        yield module
    except ChannelfoldError:
        raise
    except (
        Exception,
        SystemExit,
    ) as error:  # after sys.exit() in a script the command must fail
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f"{path}, line {lines[-1]}" if lines else str(path)
        raise DataError(f"{where}: {type(error).__name__}: {error}", "Mend the script") from None
    finally:
        sys.path.remove(str(path.parent.resolve()))
        sys.modules.pop(spec.name, None)


def _arrays(item: Any, label: str, inputs: Sequence[TensorSpec]) -> dict[str, np.ndarray]:
    if not isinstance(item, Mapping):
        raise DataError(
            f"{label} is of type {type(item).__name__!r}, not a dict of input names and arrays",
            f"Give feeds such as {{{inputs[0].name!r}: array}}",
        )
    return {name: _as_array(value, f"{label}: {name!r}") for name, value in _pick(item, inputs, label).items()}


def _as_array(value: Any, where: str) -> np.ndarray:
    try:
        array = np.asarray(value)
    except ValueError:
        raise DataError(
            f"{where} is not an array (its rows differ in length)", "Give one feed for each shape"
        ) from None
    if array.dtype.kind == "O":
        if not all(isinstance(text, str) for text in array.flat):
            raise DataError(f"{where} is an array of Python objects", "Give numbers, all rows of one length")
        return array.astype(np.str_)
    return array


def _pick(arrays: Mapping[str, Any], inputs: Sequence[TensorSpec], label: str) -> dict[str, Any]:
    missing = [spec.name for spec in inputs if spec.name not in arrays]
    if missing:
        raise DataError(
            f"{label} lacks {', '.join(map(repr, missing))}. The model's inputs: {_names(inputs)}; "
            f"found: {', '.join(sorted(map(str, arrays))) or 'nothing'}",
            nearest(missing[0], map(str, arrays)) if arrays else "Use the input names as keys",
        )
    return {spec.name: arrays[spec.name] for spec in inputs}


def _names(inputs: Sequence[TensorSpec]) -> str:
    return ", ".join(spec.name for spec in inputs)
