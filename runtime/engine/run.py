"""Engines run on the GPU of this machine, with the same ``run`` as an ONNX Runtime session.

The engine runs in a process of its own, as the build does (``build``). Feeds and results cross the pipe as ``.npz``
archives, each behind its length and the seconds that the run took (8 bytes each, little endian); an archive with the
one key ``error`` reports a failure.
"""

from __future__ import annotations

import importlib
import io
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from channelfold.runtime.errors import ModelError
from channelfold.runtime.io.session import Feed

_HEAD = struct.Struct("<qd")
_LAYERS = "layers"
_RUNS = 20  # of an engine whose layers are timed
_COMMAND = (sys.executable, "-P", "-m", "channelfold.runtime.engine.run")


class EngineSession:
    """An engine ready to run, as a context manager. ``package`` (tensorrt or tensorrt_rtx) has built the engine.

    ``seconds``: the time of the last run, with the copies to and from the GPU and without the pipe. With ``layers`` a
    run returns the ``names`` of the engine's layers and their times in ``ms`` in place of the outputs. Needs a GPU of
    the engine's architecture. Raises ModelError when the engine cannot be loaded or run.
    """

    seconds = 0.0

    def __init__(self, engine: str | Path, package: str, command: tuple[str, ...] = _COMMAND, *, layers: bool = False):
        self._name = Path(engine).name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the session
        self._child = subprocess.Popen(
            [*command, str(engine), *([_LAYERS] if layers else [])],
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
            found = receive(self._child.stdout)
        except OSError:
            found = None
        if found is None:
            self._log.seek(0)
            lines = self._log.read().decode("utf-8", "replace").strip().splitlines() or ["it ended without a word"]
            raise ModelError(f"The engine {self._name} cannot be run: {lines[-1][:300]}", "Build it on this machine.")
        reply, self.seconds = found
        if set(reply) == {"error"}:
            raise ModelError(f"The engine {self._name} failed: {reply['error']}", "See whether the shapes fit it.")
        return reply

    def timed(self, feed: Feed) -> float:
        """The seconds of a run."""
        self.run(feed)
        return self.seconds


def send(pipe: IO[bytes], arrays: Mapping[str, Any], seconds: float = 0.0) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **{f"_{name}": value for name, value in arrays.items()})  # a name such as "file" is savez's own
    pipe.write(_HEAD.pack(buffer.tell(), seconds) + buffer.getvalue())
    pipe.flush()


def receive(pipe: IO[bytes]) -> tuple[dict[str, np.ndarray], float] | None:
    """The next arrays, and the seconds that they took; None at the end of the pipe."""
    head = pipe.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    size, seconds = _HEAD.unpack(head)
    with np.load(io.BytesIO(pipe.read(size))) as archive:
        return {name[1:]: archive[name] for name in archive.files}, seconds


def serve(infer: Callable[[Feed], Mapping[str, Any]], feeds: IO[bytes], results: IO[bytes]) -> None:
    """Answers feeds until the pipe ends."""
    while (received := receive(feeds)) is not None:
        started = time.perf_counter()
        try:
            reply = {name: np.asarray(value) for name, value in infer(received[0]).items()}
        except Exception as error:  # the user reads the error, and the next feed may be fine
            reply = {"error": np.array(str(error)[:300])}
        send(results, reply, time.perf_counter() - started)


def layer_times(runner: Any, trt: Any) -> Callable[[Feed], Mapping[str, Any]]:
    """A function of a feed: the ``names`` of an engine's layers, and the medians of their times in ``ms``."""
    times: dict[str, list[float]] = {}

    class Profiler(trt.IProfiler):
        def report_layer_time(self, layer_name: str, ms: float) -> None:
            times.setdefault(layer_name, []).append(ms)

    runner.context.profiler = profiler = Profiler()

    def infer(feed: Feed) -> Mapping[str, Any]:
        for _ in range(_RUNS):
            runner.infer(feed)
        assert profiler is runner.context.profiler
        return {"names": np.array(list(times)), "ms": np.array([statistics.median(found) for found in times.values()])}

    return infer


def _main() -> None:
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # native code prints to stdout
    from polygraphy.backend.common import BytesFromPath
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    with TrtRunner(EngineFromBytes(BytesFromPath(sys.argv[1]))) as runner:
        rtx = os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] == "1"
        trt = importlib.import_module("tensorrt_rtx" if rtx else "tensorrt")
        infer = layer_times(runner, trt) if _LAYERS in sys.argv[2:] else runner.infer
        serve(infer, sys.stdin.buffer, results)


if __name__ == "__main__":
    _main()
