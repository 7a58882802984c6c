"""Where the weights of a session lie, so that the system has their memory back when the session is gone.

The C library of GNU maps a large block on its own, and gives its memory back when it is freed. But the first large
block that is freed raises the size from which blocks are large, up to 32 MB. From then on the weights of a session lie
in the heap, between smaller blocks that stay, and the heap keeps the memory of every session before.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from typing import Any

_MAPPED, _KEPT = (
    -3,
    -1,
)  # M_MMAP_THRESHOLD: blocks from here on are mapped; M_TRIM_THRESHOLD: what a heap keeps at its end
_LARGE, _LARGEST = 1 << 17, 1 << 25  # bytes: where the threshold begins, and the highest that it reaches on its own


@contextlib.contextmanager
def mapped() -> Iterator[None]:
    """Maps the large blocks that are taken inside, each on its own; elsewhere than on GNU nothing changes."""
    library = _library()
    if library is None:
        yield
        return
    library.mallopt(_MAPPED, _LARGE)
    try:
        yield
    finally:
        library.mallopt(_MAPPED, _LARGEST)  # activations come and go with every sample, and stay in the heap
        library.mallopt(_KEPT, 2 * _LARGEST)


@functools.cache
def _library() -> Any:
    try:
        return ctypes.CDLL("libc.so.6")
    except OSError:
        return None
