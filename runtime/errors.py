"""What a command can end with.

Exceptions, all of which end a command with one clear line and an exit code::

    ChannelfoldError            1   something failed; the message ends with the next step
    ├── UsageError              2   an option, a recipe or a name is wrong
    ├── ModelError              1   a model file cannot be read, or is not what it should be
    ├── LimitError              1   a model takes more memory or time than it may
    ├── DataError               1   calibration or evaluation data do not fit the model
    ├── OutputError             1   a result cannot be written
    ├── DependencyError         1   an optional package (ONNX Runtime, TensorRT) is missing or broken
    ├── VerificationError       1   an exact pass changed the function; it was rolled back
    ├── BuildError              1   TensorRT refused the network
    └── GateError               3   an accuracy gate was missed
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class ChannelfoldError(Exception):
    """An error for the user. ``message`` says what happened, ``hint`` what to do next."""

    exit_code = 1

    def __init__(self, message: str, hint: str = ""):
        super().__init__(f"{message.rstrip('.')}. {hint}".strip() if hint else message)


class UsageError(ChannelfoldError):
    exit_code = 2


class ModelError(ChannelfoldError):
    pass


class LimitError(ChannelfoldError):
    pass


class DataError(ChannelfoldError):
    pass


class OutputError(ChannelfoldError):
    pass


class DependencyError(ChannelfoldError):
    pass


class VerificationError(ChannelfoldError):
    pass


class BuildError(ChannelfoldError):
    pass


class GateError(ChannelfoldError):
    exit_code = 3


def nearest(name: str, known: Iterable[str]) -> str:
    """``did you mean 'x'?`` for a misspelt name, else the list of known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}"


def nearest_path(path: Path) -> str:
    """``did you mean 'x'?`` for a path that does not exist: the nearest name there, of its suffix where any is."""
    if not path.parent.is_dir():
        return f"There is no folder {path.parent} either"
    files = list(path.parent.iterdir())
    alike = any(file.suffix == path.suffix for file in files)
    names = [file.name for file in files if file.suffix == path.suffix or not alike or file.is_dir()]
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"Did you mean {str(path.parent / close[0])!r}?" if close else f"Check the name and the folder {path.parent}"


def no_progress(stage: str, done: int, total: int) -> None:
    """The silent progress callback."""
