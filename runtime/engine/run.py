"""Engines run on the GPU of this machine, with the same ``run`` as an ONNX Runtime session.

The engine runs in a process of its own, as the build does (``build``). Feeds and results cross the pipe as ``.npz``
archives, each behind its length (8 bytes, little endian); an archive with the one key ``error`` reports a failure.
"""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from channelfold.runtime.errors import ModelError
from channelfold.runtime.io.session import Feed

_COMMAND = (sys.executable, "-P", "-m", "channelfold.runtime.engine.run")


class EngineSession:
    """An engine ready to run, as a context manager. ``package`` (tensorrt or tensorrt_rtx) has built the engine.

    Needs a GPU of the engine's architecture. Raises ModelError when the engine cannot be loaded or run.
    """

    def __init__(self, engine: str | Path, package: str, command: tuple[str, ...] = _COMMAND):
        self._name = Path(engine).name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the session
        self._child = subprocess.Popen(
            [*command, str(engine)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | {"POLYGRAPHY_USE_TENSORRT_RTX": "1" if package == "tensorrt_rtx" else "0"},
        )

    def __enter__(self) -> EngineSession:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.communicate()
        self._log.close()

    def run(self, feed: Feed) -> dict[str, np.ndarray]:
        """The outputs for one feed, by name."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            send(self._child.stdin, feed)
            reply = receive(self._child.stdout)
        except OSError:
            reply = None
        if reply is None:
            self._log.seek(0)
            lines = self._log.read().decode("utf-8", "replace").strip().splitlines() or ["it ended without a word"]
            raise ModelError(f"The engine {self._name} cannot be run: {lines[-1][:300]}", "Build it on this machine.")
        if set(reply) == {"error"}:
            raise ModelError(f"The engine {self._name} failed: {reply['error']}", "See whether the shapes fit it.")
        return reply


def send(pipe: IO[bytes], arrays: Mapping[str, Any]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **{f"_{name}": value for name, value in arrays.items()})  # a name such as "file" is savez's own
    pipe.write(struct.pack("<q", buffer.tell()) + buffer.getvalue())
    pipe.flush()


def receive(pipe: IO[bytes]) -> dict[str, np.ndarray] | None:
    """The next arrays; None at the end of the pipe."""
    head = pipe.read(8)
    if len(head) < 8:
        return None
    with np.load(io.BytesIO(pipe.read(struct.unpack("<q", head)[0]))) as archive:
        return {name[1:]: archive[name] for name in archive.files}


def serve(infer: Callable[[Feed], Mapping[str, Any]], feeds: IO[bytes], results: IO[bytes]) -> None:
    """Answers feeds until the pipe ends."""
    while (feed := receive(feeds)) is not None:
        try:
            reply = {name: np.asarray(value) for name, value in infer(feed).items()}
        except Exception as error:  # the user reads the error, and the next feed may be fine
            reply = {"error": np.array(str(error)[:300])}
        send(results, reply)


def _main() -> None:
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # native code prints to stdout
    from polygraphy.backend.common import BytesFromPath
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    with TrtRunner(EngineFromBytes(BytesFromPath(sys.argv[1]))) as runner:
        serve(runner.infer, sys.stdin.buffer, results)


if __name__ == "__main__":
    _main()
