"""Temporary files whose names carry their process: the next run removes those of processes that were killed.

A process also holds a lock on its temporary files, because a folder may be shared with other machines and containers,
where the number of a process means nothing.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows, where nothing tells whether a process is gone, and so leftovers stay
    fcntl = None


def beside(path: Path) -> Path:
    """A new hidden name in the folder of a file."""
    return path.parent / f".{_name()}"


def opened(suffix: str = "") -> IO[bytes]:
    """A new file in the temporary folder. Raises OSError."""
    file = _new(suffix).open("x+b")
    hold(file.fileno())
    return file


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A new folder in the temporary folder, for as long as the context lasts. Raises OSError."""
    path = _new()
    path.mkdir(mode=0o700)
    handle = os.open(path, os.O_RDONLY) if fcntl else None
    if handle is not None:
        hold(handle)
    try:
        yield path
    finally:
        if handle is not None:
            os.close(handle)
        shutil.rmtree(path, ignore_errors=True)


def hold(handle: int) -> None:
    """Locks an open file, as a sign that its process lives, until the file is closed."""
    if fcntl:
        with contextlib.suppress(OSError):  # some file systems have no locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def abandoned(folder: Path, pattern: str = ".channelfold-*-*.tmp") -> list[Path]:
    """The temporary files and folders of processes that are gone."""
    return [path for path in folder.glob(pattern) if _is_abandoned(path)] if Path("/proc/self").exists() else []


def _is_abandoned(path: Path) -> bool:
    owner = path.name.split("-")[1]
    if not fcntl or not owner.isdigit() or Path("/proc", owner).exists() or path.is_symlink():
        return False
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def _name(suffix: str = "") -> str:
    return f"channelfold-{os.getpid()}-{secrets.token_hex(4)}{suffix}.tmp"


def _new(suffix: str = "") -> Path:
    place = Path(tempfile.gettempdir())
    _clean(place)
    return place / _name(suffix)


@functools.cache  # once in a process
def _clean(place: Path) -> None:
    for path in abandoned(place, "channelfold-*-*.tmp"):
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
