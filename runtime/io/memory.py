"""Where the weights of a session lie, so that the system has their memory back when the session is gone.

The C library of GNU maps a large block on its own, and gives its memory back when it is freed. But the first large
block that is freed raises the size from which blocks are large, up to 32 MB. From then on the weights of a session lie
in the heap, between smaller blocks that stay, and the heap keeps the memory of every session before.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
from collections.abc import Iterator
from typing import Any

_MAPPED = -3  # M_MMAP_THRESHOLD: blocks from here on are mapped
_KEPT = -1  # M_TRIM_THRESHOLD: what a heap keeps at its end
_LARGE, _LARGEST = 1 << 17, 1 << 25  # bytes: where the threshold begins, and the highest that it reaches on its own


@contextlib.contextmanager
def mapped() -> Iterator[None]:
    """Maps the large blocks that are taken inside, each on its own; elsewhere than on GNU nothing changes.

    A threshold that was set once moves no more, so the process is left with the highest that it would have come to.
    Activations and counts, which come and go with every sample, stay in the heap: to map them anew takes longer than
    to count them.
    """
    library = _library()
    if library is None:
        yield
        return
    library.mallopt(_MAPPED, _LARGE)
    try:
        yield
    finally:
        library.mallopt(_MAPPED, _LARGEST)
        library.mallopt(_KEPT, 2 * _LARGEST)


@functools.cache
def _library() -> Any:
    """The C library of GNU, if this process runs on it and nobody has set the threshold from outside."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    is_set = "MALLOC_MMAP_THRESHOLD_" in os.environ or "glibc.malloc.mmap_threshold" in tunables
    return None if is_set or platform.libc_ver()[0] != "glibc" else ctypes.CDLL("libc.so.6")
