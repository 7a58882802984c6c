"""Arrays in ``.npy`` files and ``.npz`` archives, read block by block so that no array need fit in memory.

An ``.npz`` is a zip archive of ``.npy`` members, and an ``.npy`` is a header (dtype, shape, order) followed by values.
In C order consecutive samples are consecutive bytes, so a sample is one read, in a compressed member as well as in a
plain file. Formats: numpy.lib.format and the zip application note.
"""

from __future__ import annotations

import contextlib
import math
import weakref
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from channelfold.runtime.errors import ChannelfoldError, DataError, OutputError
from channelfold.runtime.io import temporary

_PICKLED = "Store plain numbers; samples of different shapes go into a folder, one file each"


@dataclass(frozen=True)
class Stored:
    """One array on disk: its file, its member where the file is an archive, its dtype, shape and memory order."""

    path: Path
    member: str | None
    dtype: np.dtype
    shape: tuple[int, ...]
    fortran: bool


@dataclass(frozen=True)
class Deferred:
    """An array that is computed each time it is read, such as an image."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


Array = Stored | Deferred | np.ndarray


def read_headers(path: Path) -> dict[str, Stored]:
    """The arrays of a ``.npz``, by key, or the array of a ``.npy``, under the key ``""``. Values are not read.

    Raises DataError when the file is no such file, is cut short, or holds pickled objects.
    """
    if path.suffix == ".npy":
        with _failures(path), path.open("rb") as file:
            return {"": _check_length(_header(file, path, None), path.stat().st_size - file.tell())}
    arrays = {}
    with _failures(path), zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.filename.endswith(".npy"):
                with archive.open(info) as file:
                    stored = _header(file, path, info.filename)
                    arrays[info.filename.removesuffix(".npy")] = _check_length(stored, info.file_size - file.tell())
    if not arrays:
        raise DataError(f"{path} is a zip archive without a single array", "Write it with numpy.savez")
    return arrays


def _header(file: IO[bytes], path: Path, member: str | None) -> Stored:
    shape, fortran, dtype = _read_header(file)
    if dtype.hasobject:
        where = f"{path}: {member.removesuffix('.npy')!r}" if member else str(path)
        raise DataError(f"{where} holds pickled Python objects, which are never loaded", _PICKLED)
    return Stored(path, member, dtype, shape, fortran)


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"format version {version} holds no plain array")


def _check_length(stored: Stored, available: int) -> Stored:
    if any(size < 0 for size in stored.shape):
        raise ValueError(f"its header announces the shape {stored.shape}")
    if available < (needed := math.prod(stored.shape) * stored.dtype.itemsize):
        raise ValueError(f"{needed} bytes of values are announced and {available} are there")
    return stored


@contextlib.contextmanager
def _failures(path: Path) -> Iterator[None]:
    """Turns the exceptions of numpy and zipfile for a bad file into a DataError that says what the file is."""
    try:
        yield
    except ChannelfoldError:
        raise
    except Exception as error:  # a file can be wrong in more ways than numpy and zipfile have exceptions for
        raise DataError(_diagnosis(path, error), "Write it again with numpy.save or numpy.savez") from None


def _diagnosis(path: Path, error: Exception) -> str:
    try:
        with path.open("rb") as file:
            start = file.read(6)
    except OSError:
        return f"{path} cannot be read ({error})"
    expected = b"\x93NUMPY" if path.suffix == ".npy" else b"PK"
    if not start:
        return f"{path} is empty"
    if not start.startswith(expected):
        other = {b"\x93NUMPY": ", but an .npy file", b"PK\x03\x04": ", but a zip archive"}
        kind = next((kind for magic, kind in other.items() if start.startswith(magic)), "")
        return f"{path} is not an {path.suffix} file{kind}"
    return f"{path} is damaged or cut short ({error})"


class Reader(contextlib.AbstractContextManager):
    """Reads stored arrays. The last archive stays open, because opening takes time in proportion to the members."""

    def __init__(self) -> None:
        self._archive: zipfile.ZipFile | None = None
        self._path: Path | None = None

    def __exit__(self, *exception: object) -> None:
        if self._archive:
            self._archive.close()

    def blocks(self, array: Array, count: int, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        """The values of ``array``, in C order, as ``count`` blocks of ``shape``. One block is in memory at a time.

        Raises DataError when the file is damaged.
        """
        if isinstance(array, Stored) and not array.fortran:
            yield from self._stream(array, count, shape)
            return
        if isinstance(array, Deferred):
            array = array.read()
        values = (self._whole(array) if isinstance(array, Stored) else array).reshape(count, *shape)
        for index in range(count):
            yield values[index, ...]

    def _stream(self, stored: Stored, count: int, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        size = math.prod(shape) * stored.dtype.itemsize
        with _failures(stored.path), self._open(stored) as file:
            _read_header(file)
            for _ in range(count):
                data = file.read(size)
                if len(data) < size:
                    raise EOFError("values are missing at its end")
                yield np.ndarray(shape, stored.dtype, data)

    def _whole(self, stored: Stored) -> np.ndarray:
        (values,) = self._stream(stored, 1, stored.shape[::-1])
        return values.T

    def _open(self, stored: Stored) -> IO[bytes]:
        if stored.member is None:
            return stored.path.open("rb")
        if self._archive is None or stored.path != self._path:
            self.__exit__()
            self._archive, self._path = zipfile.ZipFile(stored.path), stored.path
        return self._archive.open(stored.member)


class Spill:
    """A temporary ``.npz`` for feeds from a source that can be read only once. The file is removed with this object."""

    def __init__(self) -> None:
        self._file = file = temporary.opened(".npz")
        self.path = Path(file.name)
        self._archive = zipfile.ZipFile(file, "w")
        self._feeds = 0
        weakref.finalize(self, _discard, self._archive, file)

    def add(self, feed: Mapping[str, np.ndarray]) -> dict[str, Array]:
        """Writes one feed; returns its arrays as Stored. Raises OutputError when the disk is full."""
        stored: dict[str, Array] = {}
        self._feeds += 1
        try:
            for name, array in feed.items():
                member = f"{self._feeds}/{name}.npy"
                with self._archive.open(member, "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, array, allow_pickle=False)
                fortran = array.flags.f_contiguous and not array.flags.c_contiguous
                stored[name] = Stored(self.path, member, array.dtype, array.shape, fortran)
        except OSError as error:
            raise OutputError(
                f"The data cannot be kept in {self.path.parent} ({error.strerror})", "Point TMPDIR at a larger disk"
            ) from None
        return stored

    def close(self) -> None:
        """Completes the archive. Nothing can be read before."""
        self._archive.close()
        self._file.flush()


def _discard(archive: zipfile.ZipFile, file: IO[bytes]) -> None:
    archive.close()
    file.close()
    Path(file.name).unlink(missing_ok=True)
