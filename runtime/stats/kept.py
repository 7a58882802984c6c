"""What observers have seen, kept in a folder while they observe: a later run goes on where an interrupted one stopped.

A file holds what some observers saw of the first samples of some data in one model. Its name is the hash of everything
that this depends on: the graph with its weights, all data, the observers and their settings, the version. So a file
that is found can be used, and what is asked for again, by another command as well, takes no run of the model at all.
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

import channelfold
from channelfold.runtime.data.sources import Data
from channelfold.runtime.io.files import writing
from channelfold.runtime.io.snapshot import Snapshot

BLOCK = 16  # samples, after each of which the file is written anew …
_SHARE = 20  # … unless writing would take more than one part of so many of the time
_SEEN = "samples"


class Kept:
    """The file of some observers, given by the names of their tensors, in a folder."""

    def __init__(self, folder: Path, graph: gs.Graph, observers: Mapping[str, Sequence[Any]], data: Data):
        self._observers = list({id(one): one for seen in observers.values() for one in seen}.values())
        digest = hashlib.sha256(f"{channelfold.__version__} {Snapshot.of(graph).fingerprint()}".encode())
        digest.update(f"{data.fingerprint} {len(data)}".encode())
        places = {id(one): str(number) for number, one in enumerate(self._observers)}
        digest.update(repr([(name, [places[id(one)] for one in seen]) for name, seen in observers.items()]).encode())
        digest.update(repr([_settings(one) for one in self._observers]).encode())
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"statistics-{digest.hexdigest()[:32]}.npz"
        self._saved, self._cost = time.monotonic(), 0.0

    def restore(self) -> int:
        """Gives the observers, which have seen nothing yet, what is in the file; the number of samples seen."""
        try:
            with self.path.open("rb") as file, np.load(file, allow_pickle=False) as found:
                values = dict(found)
                samples = int(values[_SEEN])
        except (
            OSError,
            ValueError,
            KeyError,
            EOFError,
            zipfile.BadZipFile,
        ):  # none, or a damaged one, which is written anew
            return 0
        for number, observer in enumerate(self._observers):
            _restore(observer, values, f"{number}.")
        return samples

    def save(self, samples: int, last: bool = False) -> None:
        """Writes what the observers saw of so many samples, at the end of a block."""
        begin = time.monotonic()
        if not last and (samples % BLOCK or begin - self._saved < _SHARE * self._cost):
            return
        state = {name: values for n, one in enumerate(self._observers) for name, values in _state(one, f"{n}.")}
        with writing(self.path) as file:
            np.savez(file, **state, **{_SEEN: np.array(samples)})  # pyright: ignore[reportArgumentType]
        self._saved = time.monotonic()
        self._cost = self._saved - begin


def _settings(observer: Any) -> tuple[str, dict[str, str]]:
    """The type of an observer that has seen nothing, and its fields."""
    own = (field for field in dataclasses.fields(observer) if field.init and not field.name.startswith("_"))
    return type(observer).__qualname__, {field.name: repr(getattr(observer, field.name)) for field in own}


def _fields(thing: Any) -> Iterator[tuple[str, Any]]:
    return ((field.name, getattr(thing, field.name)) for field in dataclasses.fields(thing))


def _state(thing: Any, path: str) -> Iterator[tuple[str, np.ndarray]]:
    """What a dataclass holds: arrays and numbers, by name. What is None is left out."""
    for name, value in _fields(thing):
        if dataclasses.is_dataclass(value):
            yield from _state(value, f"{path}{name}.")
        elif isinstance(value, Mapping):
            yield from ((f"{path}{name}[{key}]", np.asarray(entry)) for key, entry in value.items())
        elif value is not None:
            yield f"{path}{name}", np.asarray(value)


def _restore(thing: Any, values: Mapping[str, np.ndarray], path: str) -> None:
    for name, old in list(_fields(thing)):
        key = f"{path}{name}"
        if dataclasses.is_dataclass(old):
            _restore(old, values, f"{key}.")
        elif isinstance(old, Mapping):
            start = f"{key}["
            entries = {k[len(start) : -1]: v.item() for k, v in values.items() if k.startswith(start)}
            setattr(thing, name, {key: type(old.get(key, 0))(entry) for key, entry in entries.items()})
        elif key in values:
            new = values[key]
            new = array.array(old.typecode, new.tobytes()) if isinstance(old, array.array) else new
            setattr(thing, name, new.item() if isinstance(new, np.ndarray) and not new.ndim else new)
