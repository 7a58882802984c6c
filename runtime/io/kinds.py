"""Kinds of output files: which existing file may be replaced by an output."""

from __future__ import annotations

from pathlib import Path

from channelfold.runtime.errors import ModelError
from channelfold.runtime.io.files import read_skeleton

_FOREIGN = (b"PK", b"\x93NUMPY", b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"%PDF", b"\x1f\x8b", b"BM")


def is_of_kind(path: Path, kind: str) -> bool:
    """Whether an output of a kind (``an ONNX file``, ``an engine``, ``a report``, ``a web page``) may replace a file.

    The file must be of that kind, or empty.
    """
    if not path.stat().st_size:
        return True
    with path.open("rb") as file:
        start = file.read(4096)
    if kind == "a web page":
        return start.lower().startswith(b"<!doctype html>")
    if kind == "a report":
        return b'"schema"' in start and b'"tool"' in start
    try:
        is_model = read_skeleton(path)[0].HasField("graph")
    except ModelError:
        is_model = False
    return is_model if kind == "an ONNX file" else not is_model and not start.startswith(_FOREIGN) and b"\0" in start
