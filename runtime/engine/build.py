"""Building TensorRT engines: strongly typed, from a model's path, one engine per GPU architecture (SM).

Two TensorRTs share one API. ``tensorrt`` builds for the GPU of the machine it runs on. ``tensorrt_rtx`` builds for any
SM that it knows without a GPU (https://docs.nvidia.com/deeplearning/tensorrt-rtx, "CPU-only AOT"). ``backend`` chooses:
``tensorrt`` where it has its GPU, else ``tensorrt_rtx``, unless the variable POLYGRAPHY_USE_TENSORRT_RTX says 0 or 1.

The build runs in a process of its own (``child``), because

- Polygraphy reads this variable once, when it is imported, and a fresh process needs no import order;
- the builder is native code: an abort or the out-of-memory killer ends the child, and the user reads what happened;
- the memory of the builder (several times the weights) is all given back;
- the output of native code is caught there and does not mix with the data on the user's stdout.

Precision lies in the graph (QDQ nodes and Casts); for the rest TensorRT's defaults hold, TF32 in float products among
them.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Literal

from channelfold.runtime import errors
from channelfold.runtime.engine.plan import PlanReport, contractions, read_inspector, read_plan
from channelfold.runtime.errors import (
    BuildError,
    ChannelfoldError,
    DataError,
    DependencyError,
    OutputError,
    UsageError,
    no_progress,
)
from channelfold.runtime.io.session import Feed, TensorSpec

_SIZES = 64  # integers of an input that may hold sizes; longer inputs hold indices or tokens

Progress = Callable[[str, int, int], None]
Dims = Sequence[int | str | None]

# What tensorrt_rtx can build for without that GPU; other architectures (90: H100, 100: B200 …) only on such a machine.
SM_NAMES = {75: "RTX 20, T4", 80: "A100", 86: "RTX 30, A10", 89: "RTX 40, L4, L40", 120: "RTX 50", 121: "GB10"}
# The newest opset TensorRT 11's importer knows. It reads a newer one by old rules and does not say so.
# https://docs.nvidia.com/deeplearning/tensorrt/latest/reference/onnx-opset-guide.html
MAX_OPSET = 25

# Seen with 1.7.1: plans of 2:4 Conv and MatMul in float16 and int8, with and without the flag, are the same bytes.
NO_SPARSE_KERNELS = (
    "tensorrt_rtx takes the flag for sparse weights, but its plan is the same without it: nothing says that zeros save "
    "time. The package tensorrt, on the GPU itself, has kernels for them"
)

_RTX = "pip install polygraphy tensorrt-rtx-cu12"
INSTALL = f"{_RTX} (builds without a GPU), or polygraphy tensorrt (needs an NVIDIA GPU)"


# ---- shapes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShapeRange:
    """The shapes that a dynamic input may take, one int per axis. Kernels are tuned for ``opt``.

    For an input that *is* a shape (of a Reshape, an Expand …) the ints are its values. Raises UsageError
    unless 0 <= min <= opt <= max on every axis.
    """

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.min) == len(self.opt) == len(self.max):
            raise UsageError(f"The shapes {self} differ in rank", "Give MIN, OPT and MAX the same number of axes.")
        for axis, (low, tuned, high) in enumerate(zip(self.min, self.opt, self.max, strict=True)):
            if not 0 <= low <= tuned <= high:
                raise UsageError(f"The shapes {self} are not in order on axis {axis}", "MIN <= OPT <= MAX must hold.")

    def __str__(self) -> str:
        return ":".join("x".join(map(str, dims)) for dims in astuple(self))


def parse_shape(text: str) -> tuple[str, ShapeRange]:
    """``NAME:MIN:OPT:MAX`` (dims separated by ``x`` or ``,``; the name may hold colons) → name and range.

    Raises UsageError saying which part is wrong.
    """
    example = "For example: --shape image:1x3x224x224:8x3x224x224:16x3x224x224"
    name, *parts = text.rsplit(":", 3)
    if len(parts) != 3 or not name:
        raise UsageError(f"--shape {text!r} is not of the form NAME:MIN:OPT:MAX", example)
    shapes = []
    for label, part in zip(("MIN", "OPT", "MAX"), parts, strict=True):
        dims = re.split("[x,]", part)
        if not all(dim.strip().isdecimal() for dim in dims):
            raise UsageError(
                f"--shape {text!r}: {label} is {part!r}, which is not a shape such as 1x3x224x224", example
            )
        shapes.append(tuple(map(int, dims)))
    try:
        return name, ShapeRange(*shapes)
    except UsageError as error:
        raise UsageError(f"--shape {text!r}: {error}") from None


def default_shapes(inputs: Sequence[TensorSpec], samples: Iterable[Feed] | None) -> dict[str, ShapeRange]:
    """The range of every dynamic input: the smallest, median and largest size of each axis in the feeds.

    A dynamic axis 0 counts as the batch and may always shrink to 1. Raises UsageError, with an example of the option to
    give, for dynamic inputs without feeds; DataError for a feed that does not fit.
    """
    dynamic = {spec.name: spec.shape for spec in inputs if spec.is_open}
    seen: dict[str, list[tuple[int, ...]]] = {name: [] for name in dynamic}
    for feed in (samples or ()) if dynamic else ():
        for name, dims in dynamic.items():
            if name not in feed:
                raise DataError(f"A feed lacks input {name!r}; it has {', '.join(feed)}", "Give every input a value.")
            shape = feed[name].shape
            if not fits(shape, dims):
                raise DataError(
                    f"A feed has shape {shape} for input {name!r}, which is {dims_text(dims)}", "Mend the data."
                )
            seen[name].append(shape)
    if not all(seen.values()):
        raise no_shapes(dynamic)
    return {name: _range(shapes, batch=not isinstance(dynamic[name][0], int)) for name, shapes in seen.items()}


def default_values(inputs: Sequence[TensorSpec], samples: Iterable[Feed] | None) -> dict[str, ShapeRange]:
    """Smallest, median and largest value, one by one, of every input that may hold sizes: a few integers."""
    integers = [s for s in inputs if str(s.dtype) in ("int32", "int64") and len(s.shape) < 2]
    few = [s.name for s in integers if all(isinstance(d, int) and d <= _SIZES for d in s.shape)]
    seen: dict[str, list[tuple[int, ...]]] = {}
    for feed in (samples or ()) if few else ():
        for name in few:
            seen.setdefault(name, []).append(tuple(map(int, feed[name].reshape(-1))))
    return {name: _range(rows) for name, rows in seen.items() if all(value >= 0 for row in rows for value in row)}


def _range(rows: list[tuple[int, ...]], batch: bool = False) -> ShapeRange:
    """Smallest, median and largest number of each column; with ``batch``, the first column may shrink to 1."""
    low, tuned, high = (tuple(map(pick, zip(*rows, strict=True))) for pick in (min, statistics.median_low, max))
    return ShapeRange((min(low[0], 1), *low[1:]) if batch else low, tuned, high)


def no_shapes(dynamic: Mapping[str, Dims], sizes: Sequence[str] = ()) -> UsageError:
    """The error for inputs without a range of shapes, with an option to copy.

    ``sizes``: the inputs that are shapes; their option takes values instead of shapes.
    """
    listed = ", ".join(f"{name!r} {dims_text(dims)}" for name, dims in dynamic.items())
    name, dims = next(iter(dynamic.items()))
    low, tuned, high = (
        "x".join(str(dim if isinstance(dim, int) else (batch if axis == 0 else other)) for axis, dim in enumerate(dims))
        for batch, other in ((1, 1), (8, 128), (16, 256))
    )
    values = f"; of {', '.join(map(repr, sizes))}, which holds sizes, the values" if sizes else ""
    return UsageError(
        f"Inputs have dynamic axes and no range of shapes: {listed}",
        f"Give calibration data, or for each input an option such as --shape '{name}:{low}:{tuned}:{high}' "
        f"(smallest, usual, largest shape{values})",
    )


def fits(shape: Sequence[int], dims: Dims) -> bool:
    """Whether a shape has the rank and the fixed sizes of ``dims``."""
    return len(shape) == len(dims) and all(not isinstance(d, int) or d == n for d, n in zip(dims, shape, strict=True))


def dims_text(dims: Dims) -> str:
    """``[batch, 3, ?]``"""
    return f"[{', '.join('?' if dim is None else str(dim) for dim in dims)}]"


# ---- which TensorRT, which GPU -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backend:
    """The package that builds an engine. ``reason`` is the reason for this choice, for messages.

    ``target``: an SM, "gpu" (that of this machine) or None (tensorrt_rtx's portable engine for SM 80 and later).
    """

    name: Literal["tensorrt", "tensorrt_rtx"]
    reason: str
    target: int | Literal["gpu"] | None = None


def backend(sm: int | None = None) -> Backend:
    """The TensorRT that builds an engine for ``sm`` on this machine; by default for its GPU, if it has one.

    Raises DependencyError when there is no TensorRT, UsageError when TensorRT cannot build for ``sm`` here.
    """
    gpu, no_gpu = local_gpu()
    forced = os.environ.get("POLYGRAPHY_USE_TENSORRT_RTX")
    name: Literal["tensorrt", "tensorrt_rtx"] = "tensorrt_rtx"
    if forced is not None:
        name, reason = "tensorrt" if forced == "0" else "tensorrt_rtx", f"POLYGRAPHY_USE_TENSORRT_RTX is {forced!r}"
    elif not _installed("tensorrt"):
        reason = "the package tensorrt is not installed"
    elif gpu is None:
        reason = f"tensorrt needs a GPU, and {no_gpu}"
    elif sm not in (None, gpu) and _installed("tensorrt_rtx"):
        reason = f"tensorrt builds only for the GPU of this machine, SM {gpu}"
    else:
        name, reason = "tensorrt", f"tensorrt is installed and this machine has a GPU, SM {gpu}"
    for package in (name, "polygraphy"):
        if not _installed(package):
            raise DependencyError(f"The package {package} is missing; {name} was chosen: {reason}", f"Run: {INSTALL}")
    if name == "tensorrt" and gpu is None:
        raise DependencyError(f"tensorrt cannot build here: {no_gpu}", f"Run: {_RTX}")
    return Backend(name, reason, _target(sm, gpu, name, reason))


def _target(sm: int | None, gpu: int | None, name: str, reason: str) -> int | Literal["gpu"] | None:
    wanted = sm or gpu
    if name == "tensorrt_rtx" and (wanted is None or wanted in SM_NAMES):
        return wanted
    if wanted == gpu:
        return "gpu"
    if name == "tensorrt":
        raise UsageError(
            f"tensorrt builds only for the GPU of this machine (SM {gpu}), not for SM {sm}",
            f"Build on such a machine, or run: {_RTX}",
        )
    raise UsageError(
        f"An engine for SM {sm} can be built only on a machine with such a GPU (tensorrt_rtx was chosen: {reason})",
        f"Possible here: {', '.join(f'{known} ({names})' for known, names in SM_NAMES.items())}",
    )


def _installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def local_gpu() -> tuple[int | None, str]:
    """The SM of the first GPU that the NVIDIA driver offers, or None and the reason."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return None, "there is no NVIDIA driver on this machine"
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    errors = (
        cuda.cuInit(0),
        cuda.cuDeviceGet(ctypes.byref(device), 0),
        cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device),  # COMPUTE_CAPABILITY_MAJOR
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device),
    )
    if any(errors):
        return None, f"the NVIDIA driver offers no usable GPU (CUDA error {next(filter(None, errors))})"
    return major.value * 10 + minor.value, ""


# ---- build -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Engine:
    """A built engine.

    ``sm``: the GPU architecture, None for any from SM 80 on. ``backend`` and ``version``: the package that built the
    engine. ``size``: in bytes. ``seconds``: the time of the build. ``plan``: the arithmetic of the nodes. ``warnings``:
    those of TensorRT.
    """

    path: str
    sm: int | None
    backend: str
    version: str
    size: int
    seconds: float
    plan: PlanReport
    warnings: tuple[str, ...] = ()


def build(
    model: str | Path,
    engine: str | Path,
    *,
    sm: int | None = None,
    shapes: Mapping[str, ShapeRange] | None = None,
    values: Mapping[str, ShapeRange] | None = None,
    sparse_weights: bool = False,
    progress: Progress = no_progress,
) -> Engine:
    """Builds the ONNX file ``model`` (external data beside it) into the file ``engine``, which appears when complete.

    ``sm``: the GPU architecture, 10 x compute capability (89 for 8.9); by default the GPU of this machine, without one
    the portable engine of tensorrt_rtx. ``shapes``: a range for every dynamic input. ``values``: a range of values of
    small integer inputs, used for inputs that are shapes. ``sparse_weights`` lets TensorRT take kernels for 2:4 sparse
    weights where they are faster. ``progress`` gets TensorRT's phases, with the steps done and in all.

    Raises ModelError (unreadable model), UsageError (``sm``, ``shapes``), DependencyError (no TensorRT here),
    BuildError (TensorRT refuses the network, or crashes), OutputError.
    """
    from channelfold.runtime.io import files

    started = time.monotonic()
    model, engine = Path(model), Path(engine)
    graph = files.load(model)
    if graph.opset > MAX_OPSET:
        raise BuildError(
            f"{model.name} has opset {graph.opset}; TensorRT knows up to {MAX_OPSET} and misreads newer ones",
            f"Export the model with opset {MAX_OPSET} or lower.",
        )
    if engine.is_dir():
        raise OutputError(f"{engine} is a folder", "Give the path of a file, such as model.engine.")
    nodes = contractions(graph)
    del graph
    chosen = backend(sm)
    request = {"task": "build", "backend": chosen.name, "model": str(model), "target": chosen.target}
    request |= {"sparse_weights": sparse_weights}
    for key, ranges in (("shapes", shapes), ("values", values)):
        request[key] = {name: astuple(shape) for name, shape in (ranges or {}).items()}
    with files.writing(engine) as file:
        done = _run(request | {"engine": file.name}, model.name, progress)
    tuned = {name: shape.opt for name, shape in (shapes or {}).items()}
    report = read_plan(engine, nodes, tuned) if chosen.name == "tensorrt_rtx" else inspect(engine, nodes, chosen.name)
    return Engine(
        path=str(engine),
        sm=local_gpu()[0] if chosen.target == "gpu" else chosen.target,
        backend=chosen.name,
        version=done["version"],
        size=engine.stat().st_size,
        seconds=round(time.monotonic() - started, 3),
        plan=report,
        warnings=(
            *done["warnings"],
            *((NO_SPARSE_KERNELS,) if sparse_weights and chosen.name == "tensorrt_rtx" else ()),
        ),
    )


def inspect(engine: str | Path, nodes: Mapping[str, str], package: str) -> PlanReport:
    """How nodes run, by EngineInspector of ``package`` (tensorrt, tensorrt_rtx). ``nodes``: as for ``read_plan``.

    Needs a GPU of the engine's SM. Never raises: the report on an engine that cannot be loaded is not readable.
    """
    try:
        request = {"task": "inspect", "backend": package, "engine": str(engine)}
        return read_inspector(_run(request, Path(engine).name, no_progress)["layers"], nodes)
    except ChannelfoldError as error:
        return PlanReport(False, str(error), "inspector")


_COMMAND = (sys.executable, "-P", "-m", "channelfold.runtime.engine.child")


def _run(request: dict[str, Any], what: str, progress: Progress, command: Sequence[str] = _COMMAND) -> dict[str, Any]:
    """Sends ``request`` to the child. Returns the child's result, or raises the child's error."""
    rtx = "1" if request["backend"] == "tensorrt_rtx" else "0"
    reply: dict[str, Any] = {}
    stage = "start"
    with tempfile.TemporaryFile() as log:
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=os.environ | {"POLYGRAPHY_USE_TENSORRT_RTX": rtx},
            encoding="ascii",
        ) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            try:
                with contextlib.suppress(BrokenPipeError), child.stdin:
                    json.dump(request, child.stdin)
                for line in child.stdout:
                    reply = json.loads(line)
                    if "progress" in reply:
                        stage = reply["progress"][0]
                        progress(*reply["progress"])
            except BaseException:
                child.kill()
                raise
        log.seek(0)
        text = log.read().decode("utf-8", "replace")
    if "error" in reply:
        kind, message = reply["error"]
        raise getattr(errors, kind)(message)
    if "result" not in reply:
        raise _crash(child.returncode, what, stage, text)
    return reply["result"]


def _crash(code: int, what: str, stage: str, log: str) -> BuildError:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    last = f"; its last words: {lines[-1][:300]}" if lines else ""
    try:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    except ValueError:
        how = f"ended with status {code}"
    if "SIGKILL" in how:
        hint = "This is how a lack of memory ends: give it more, or a smaller MAX in --shape."
    else:
        hint = "A crash of TensorRT itself: try another version of it."
    return BuildError(f"TensorRT's builder {how} on {what} in phase '{stage}'{last}", hint)
