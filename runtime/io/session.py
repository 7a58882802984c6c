"""ONNX Runtime: one session class that opens paths, and the check that its installation is sound."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from channelfold.runtime.errors import DependencyError, LimitError, ModelError
from channelfold.runtime.io import limits, memory, wire

_EXACT = "session.x64quantprecision"  # on x86 without VNNI: u8 x u8 products, which do not saturate
_PRODUCTS = "session.qdq_matmulnbits_accuracy_level"  # 1: float activations in products with stored weights; 4: int8
_WRONG = "ReluQuantRewrite"  # drops a Relu in front of a quantizer to fp8, as if its codes had no sign (1.32)
_UNFUSED = "session.disable_quant_qdq"
_FOLDER = "session.model_external_initializers_file_folder_path"  # heeded with a model in memory, from 1.22 on
_WEIGHTS = "session.optimized_model_external_initializers_file_name"
_LEAST = "session.optimized_model_external_initializers_min_size_in_bytes"
_SPINS = "session.intra_op.allow_spinning"
_AS_STORED = "session.disable_prepacking"

_TIMED = "_kernel_time"

_NAMES = 1 << 26  # bytes; a larger file holds its weights
_LARGE = 1 << 24  # bytes of a file whose weights are mapped

Feed = dict[str, np.ndarray]

_NUMPY_TYPES = {
    "float": "float32", "double": "float64", "float16": "float16", "int8": "int8", "int16": "int16", "int32": "int32",
    "int64": "int64", "uint8": "uint8", "uint16": "uint16", "uint32": "uint32", "uint64": "uint64", "bool": "bool",
    "string": "object",
}  # fmt: skip


@dataclass(frozen=True)
class Meaning:
    """What the values of an input mean.

    ``kind``: ``ids`` (integers below ``below``), ``position`` (where in the sequence the new tokens are), ``mask`` (1:
    takes part), ``zeros``, ``branch`` (whether there is a past), ``past_length``, ``total_length`` (past and new
    tokens), ``last_position`` (the total less one), or ``past``: the cache of the tokens before, which the output
    ``present`` continues. It grows along ``axis`` or, where that is None, keeps its size. ``width``: the size of the
    last axis of a cache, where the operator that reads it knows more than the input says.
    """

    kind: str
    below: int = 2
    present: str = ""
    axis: int | None = None
    width: int | None = None


@dataclass(frozen=True)
class TensorSpec:
    """Name, numpy dtype and shape of a model input or output. A symbolic dimension is a string, an unknown one None.

    ``dtype`` is None where numpy has no such type (sequences, optionals, bfloat16 …). ``meaning`` is what the graph
    says of the values of an input, where that is known.
    """

    name: str
    dtype: np.dtype | None
    shape: tuple[int | str | None, ...]
    meaning: Meaning | None = field(default=None, compare=False)

    @property
    def is_open(self) -> bool:
        """Whether a size is symbolic or unknown."""
        return not all(isinstance(dim, int) for dim in self.shape)

    def __str__(self) -> str:
        dims = ", ".join("?" if d is None else str(d) for d in self.shape)
        return f"{self.name}: {self.dtype if self.dtype is not None else 'unknown'}[{dims}]"


def onnxruntime() -> Any:
    """The onnxruntime module, with its telemetry off unless ORT_DISABLE_TELEMETRY says otherwise.

    Raises DependencyError when the module is missing, or when ``onnxruntime`` and ``onnxruntime-gpu`` are both
    installed: both packages write the same folder, so the later package has overwritten the earlier one.
    """
    installed = [name for name in ("onnxruntime", "onnxruntime-gpu") if _installed(name)]
    if len(installed) == 2:
        raise DependencyError(
            "onnxruntime and onnxruntime-gpu are both installed, and they overwrite each other's files",
            "Run: pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime (or onnxruntime-gpu)",
        )
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # heeded only when it is there before the import
    try:
        import onnxruntime
    except ImportError as error:
        raise DependencyError(
            f"ONNX Runtime cannot be imported ({error})", "Run: pip install onnxruntime (or onnxruntime-gpu)"
        ) from None
    onnxruntime.set_default_logger_severity(4)
    return onnxruntime


@functools.cache  # it reads files, and a session is opened many times
def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


class Session:
    """An ONNX Runtime session on a model.

    ``model`` is the path of its file; or, for a graph that is in no file, the serialized model without its large
    weights, whose external data lie in files below ``folder``. ONNX Runtime maps external data, it does not copy them.
    ``size``: the bytes of the model with its weights, on which the limits of a run depend.
    ``optimize=False`` switches graph optimization off. ``exact`` keeps int8 products from saturating on x86 processors
    without VNNI, and activations from being rounded to 8 bits in front of stored weights, so that a measurement is of
    the file and not of this machine. ``fuse=False`` leaves QDQ nodes, and float weights behind them, as they are.
    ``optimized`` is where ONNX Runtime writes the graph that it makes of the model, weights beside it.
    ``arena=False``: memory is given back after every run, instead of being kept for the next. ``timed``: the file is
    opened and run as any program would, so that its time can be measured; otherwise the weights inside a large file are
    mapped too, and threads that wait for each other sleep, instead of keeping the processors from other work.
    ``prepack=False``: weights stay in their file, of which ONNX Runtime otherwise holds a copy in the layout of its
    kernels. ``providers`` defaults to the CPU. ``profile``: how the name of a file begins to which ONNX Runtime writes
    the time of every node, see ``events``.

    Raises ModelError when ONNX Runtime refuses the model.
    """

    def __init__(
        self,
        model: str | Path | bytes,
        *,
        folder: str | Path | None = None,
        size: int | None = None,
        optimize: bool = True,
        exact: bool = False,
        fuse: bool = True,
        optimized: Path | None = None,
        threads: int | None = None,
        arena: bool = True,
        timed: bool = False,
        profile: Path | None = None,
        prepack: bool = True,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ):
        ort = onnxruntime()
        name = "the model" if isinstance(model, bytes) else Path(model).name
        self._size, self._before = _size(model) if size is None else size, limits.memory()
        self._run_options = ort.RunOptions()
        if not timed and not isinstance(model, bytes):
            model, folder = _mapped(Path(model)) or (model, folder)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.enable_cpu_mem_arena, options.intra_op_num_threads = arena, threads or 0
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if optimized:
            options.optimized_model_filepath = str(optimized)
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        entries = {
            _EXACT: "1" if exact else None,
            _PRODUCTS: "1" if exact else None,
            _UNFUSED: None if fuse else "1",
            _WEIGHTS: f"{optimized.name}.data" if optimized else None,
            _LEAST: "1024" if optimized else None,
            _AS_STORED: None if prepack and not optimized else "1",  # where a graph is written, nothing will run
            _SPINS: None if timed else "0",
            _FOLDER: None if folder is None else str(folder),
        }
        for key, value in entries.items():
            if value is not None:
                options.add_session_config_entry(key, value)
        off = [] if fuse and not exact else [_WRONG]
        self._session = self._opened(model, name, options, providers, off, exact and optimize)
        self.inputs = tuple(_spec(value) for value in self._session.get_inputs())
        self.outputs = tuple(_spec(value) for value in self._session.get_outputs())
        self._types = {spec.name: spec.dtype for spec in self.inputs}

    def _opened(
        self, model: str | Path | bytes, name: str, options: Any, providers: Sequence[str], off: list[str], again: bool
    ) -> Any:
        """ONNX Runtime's session without the optimizers ``off``; ``again``: without any where those fail."""
        ort = onnxruntime()
        source = model if isinstance(model, bytes) else str(model)
        try:
            try:
                with memory.mapped():
                    return ort.InferenceSession(source, options, list(providers), disabled_optimizers=off)
            except Exception:
                if not again:
                    raise
                # its exact kernels fail on an int8 weight that several nodes share; without them it is exact as well
                options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
                return ort.InferenceSession(source, options, providers=list(providers))
        except Exception as error:
            raise ModelError(f"ONNX Runtime cannot open {name}: {_first_line(error)}") from None

    def accepted(self, feed: Feed) -> Feed:
        """The part of a feed for which the model has inputs. A pass may have removed inputs that nothing reads."""
        return {name: values for name, values in feed.items() if name in self._types}

    def run(self, feed: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, Any]:
        """Runs one feed and returns outputs by name: the named outputs, by default all outputs. Raises ModelError.

        Floating point numbers are converted to the type of their input.
        """
        names = list(outputs) if outputs is not None else [spec.name for spec in self.outputs]
        try:
            with limits.watch().over(self._run_options, self._size, self._before):
                given = {name: self._typed(name, values) for name, values in feed.items()}
                return dict(zip(names, self._session.run(names, given, self._run_options), strict=True))
        except LimitError:
            raise
        except Exception as error:
            raise ModelError(f"ONNX Runtime failed while running the model: {_first_line(error)}") from None

    def events(self) -> list[tuple[str, str, float]]:
        """Name, operator and milliseconds of every run of a node so far. Ends the profile."""
        found = json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))
        return [
            (event["name"].removesuffix(_TIMED), event["args"]["op_name"], event["dur"] / 1e3)
            for event in found
            if event.get("cat") == "Node" and event["name"].endswith(_TIMED)
        ]

    def _typed(self, name: str, values: Any) -> Any:
        wanted = self._types.get(name)
        floats = wanted is not None and wanted.kind == "f" and getattr(values, "dtype", wanted) != wanted
        return values.astype(wanted) if floats and values.dtype.kind == "f" else values


def _size(model: str | Path | bytes) -> int:
    """Bytes of a model, with those of the files beside it that it names."""
    if isinstance(model, bytes):
        return len(model)
    path = Path(model)
    try:
        data = path.read_bytes() if path.stat().st_size < _NAMES else b""
        others = (other for other in path.parent.iterdir() if other.name.encode(errors="replace") in data)
        return path.stat().st_size + sum(other.stat().st_size for other in others if other.is_file())
    except OSError:
        return 0


def _mapped(path: Path) -> tuple[bytes, Path] | None:
    """(the model in a large file, with its weights as external data in that same file; the folder); else None.

    ONNX Runtime reads a file into memory twice, parsed and as tensors, and maps external data.
    """
    with contextlib.suppress(OSError, ValueError):  # no file, no ONNX, or a name that ONNX cannot refer to
        if path.stat().st_size >= _LARGE and not path.is_symlink():  # external data lie in the folder itself
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return wire.skeleton(data, path.name, inner=False), path.absolute().parent
    return None


def _spec(value: Any) -> TensorSpec:
    kind = value.type.removeprefix("tensor(").removesuffix(")")
    dtype = np.dtype(_NUMPY_TYPES[kind]) if kind in _NUMPY_TYPES else None
    return TensorSpec(value.name, dtype, tuple(d or None if isinstance(d, str) else d for d in value.shape or ()))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:400] if str(error).strip() else type(error).__name__
