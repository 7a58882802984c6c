"""Checks of outputs before the work: can a file be written, and which existing file may be replaced."""

from __future__ import annotations

import tempfile
from pathlib import Path

from channelfold.runtime.errors import ModelError, OutputError
from channelfold.runtime.io.files import read_skeleton

_FOREIGN = (b"PK", b"\x93NUMPY", b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"%PDF", b"\x1f\x8b", b"BM")


def check_kind(out: Path, kind: str) -> None:
    """Raises OutputError where a file of a kind cannot be written, or would replace one that is not of the kind."""
    if out.is_dir():
        raise OutputError(f"{out} is a folder", "Give the name of a file")
    if out.is_file() and not is_of_kind(out, kind):
        raise OutputError(f"{out} is there, and is not {kind}", "Remove it, or give another output")
    check_folder(out.parent)


def check_folder(folder: Path, make: bool = True) -> None:
    """Writes a file in the folder, which is made where it is missing. Raises OutputError.

    With ``make=False`` nothing is made: the file is written in the nearest folder above that is there.
    """
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=next(place for place in (folder, *folder.parents) if place.exists())):
            pass
    except OSError as error:
        raise OutputError(f"Nothing can be written in {folder} ({error.strerror})", "Give another output") from None


def is_of_kind(path: Path, kind: str) -> bool:
    """Whether an output of a kind may replace a file.

    Kinds: ``an ONNX file``, ``an engine``, ``a report``, ``a web page``, ``a recipe``.

    The file must be of that kind, or empty.
    """
    if not path.stat().st_size:
        return True
    with path.open("rb") as file:
        start = file.read(4096)
    if kind == "a web page":
        return start.lower().startswith(b"<!doctype html>")
    if kind == "a recipe":
        return b"[[pass]]" in start
    if kind == "a report":
        return b'"schema"' in start and b'"tool"' in start
    try:
        is_model = read_skeleton(path)[0].HasField("graph")
    except ModelError:
        is_model = False
    return is_model if kind == "an ONNX file" else not is_model and not start.startswith(_FOREIGN) and b"\0" in start
