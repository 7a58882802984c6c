"""The process in which TensorRT runs (see ``build``): ``python -m channelfold.runtime.engine.child``.

It reads one request, a JSON object, from stdin, and writes JSON lines to stdout: ``{"progress": [phase, step, steps]}``
any number of times, then ``{"result": …}`` or ``{"error": [exception, text]}``. Logs go to stderr, and so does whatever
native code prints on stdout.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from channelfold.runtime.engine.build import INSTALL, Dims, ShapeRange, dims_text, fits, no_shapes
from channelfold.runtime.errors import BuildError, ChannelfoldError, DependencyError, OutputError, UsageError, nearest

Say = Callable[..., None]


class _Log(logging.Handler):
    """TensorRT's and Polygraphy's warnings and errors, as text without prefixes."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.warnings: list[str] = []
        self.errors: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr, flush=True)
        if record.levelno == logging.WARNING:
            self.warnings.append(record.getMessage())
        elif record.levelno == logging.ERROR:
            self.errors.append(record.getMessage())

    @classmethod
    def attach(cls) -> _Log:
        from polygraphy.logger import G_LOGGER

        G_LOGGER.letter = G_LOGGER.colors = False
        G_LOGGER.module_severity = G_LOGGER.WARNING
        G_LOGGER.use_python_logging_system = True
        log = cls()
        logging.getLogger("Polygraphy").addHandler(log)
        return log


def _build_here(request: dict[str, Any], say: Say) -> dict[str, Any]:
    trt = importlib.import_module(request["backend"])
    from polygraphy.backend.trt import CreateNetwork, EngineBytesFromNetwork
    from polygraphy.backend.trt.util import get_trt_logger

    log = _Log.attach()
    typed = hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")  # a later TensorRT may know nothing else
    try:
        builder, network = CreateNetwork(strongly_typed=typed)()
    except Exception as error:
        # Without a driver the bindings raise a bare TypeError; the reason is in the log.
        reason = _clean(log.errors[0] if log.errors and isinstance(error, TypeError) else str(error))
        raise DependencyError(
            f"{trt.__name__} {trt.__version__} cannot start: {reason}",
            "Look at the driver with nvidia-smi, and run: pip install -U polygraphy",
        ) from None
    trt.init_libnvinfer_plugins(get_trt_logger(), "")
    parser = trt.OnnxParser(network, get_trt_logger())
    say(progress=["Reading the model", 0, 1])
    if not parser.parse_from_file(request["model"]):
        _refuse_model([parser.get_error(index) for index in range(parser.num_errors)], log, Path(request["model"]).name)
    _decompose_attention(trt, network)
    config = _config(trt, request["target"], _monitor(trt, say))(builder, network)
    if request["sparse_weights"]:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    shapes, values = ({name: ShapeRange(*s) for name, s in request[key].items()} for key in ("shapes", "values"))
    profile = _profile(builder, network, shapes, values)
    if profile is not None:
        config.add_optimization_profile(profile)
    log.errors.clear()  # asking an input whether it is a shape can log some
    try:
        plan = EngineBytesFromNetwork((builder, network, parser), lambda *_: config)()
    except Exception as error:
        _refuse_network(log.errors[0] if log.errors else str(error), Path(request["model"]).name)
    try:
        Path(request["engine"]).write_bytes(plan)
    except OSError as error:
        raise OutputError(f"Cannot write the engine ({error.strerror})", "Free some space.") from None
    return {"version": trt.__version__, "warnings": _worth_telling(log.warnings)}


def _config(trt: Any, target: int | str | None, monitor: Any) -> Callable[..., Any]:
    if trt.__name__ == "tensorrt":
        from polygraphy.backend.trt import CreateConfig

        return CreateConfig(profiles=[], progress_monitor=monitor, tf32=True)
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

    if isinstance(target, int) and not hasattr(trt.ComputeCapability, f"SM{target}"):
        raise UsageError(
            f"tensorrt_rtx {trt.__version__} does not know SM {target}", "pip install -U tensorrt-rtx-cu12"
        )
    capabilities = [divmod(target, 10)] if isinstance(target, int) else None
    return CreateConfigRTX(
        profiles=[], progress_monitor=monitor, use_gpu=target == "gpu", compute_capabilities=capabilities
    )


def _monitor(trt: Any, say: Say, every: float = 0.1) -> Any:
    """A monitor that reports the phases of TensorRT, and their steps at most ten times a second."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}
            self.told = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            self._tell(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if time.monotonic() - self.told >= every:
                self._tell(phase_name, step)
            return True

        def phase_finish(self, phase_name: str) -> None:
            pass

        def _tell(self, phase: str, step: int) -> None:
            self.told = time.monotonic()
            say(progress=[phase, step, self.steps.get(phase, 0)])

    return Monitor()


def _decompose_attention(trt: Any, network: Any) -> None:
    """Allows TensorRT to build an Attention node without a fused kernel (for example in float) from MatMuls."""
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    for layer in network:
        if kind is not None and layer.type == kind:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def _profile(
    builder: Any,
    network: Any,
    shapes: Mapping[str, ShapeRange],
    values: Mapping[str, ShapeRange] = MappingProxyType({}),
) -> Any:
    """TensorRT's optimization profile for the network's inputs; None when nothing is dynamic. Raises UsageError.

    ``values``: ranges of the values of integer inputs, used for inputs that are shapes.
    """
    inputs = {tensor.name: tensor for tensor in (network.get_input(index) for index in range(network.num_inputs))}
    dims: dict[str, Dims] = {}
    for name, tensor in inputs.items():
        # An input that is a shape has a fixed number of values, and none of them is known.
        known = tuple(tensor.shape) if not tensor.is_shape_tensor else (-1,) * (tensor.shape[0] if tensor.shape else 1)
        dims[name] = [tensor.get_dimension_name(axis) or None if n < 0 else n for axis, n in enumerate(known)]
    sizes = [name for name, tensor in inputs.items() if tensor.is_shape_tensor]
    shapes = {name: values[name] for name in sizes if name in values} | dict(shapes)
    for name, given in shapes.items():
        if name not in dims:
            raise UsageError(f"The model has no input {name!r} to give shapes to", nearest(name, dims))
        if not all(fits(shape, dims[name]) for shape in astuple(given)):
            raise UsageError(
                f"The shapes {given} do not fit input {name!r}, which is {dims_text(dims[name])}",
                "Keep the number of axes and the sizes that are fixed.",
            )
    dynamic = {name: known for name, known in dims.items() if not all(isinstance(n, int) for n in known)}
    missing = {name: known for name, known in dynamic.items() if name not in shapes}
    if missing:
        raise no_shapes(missing, [name for name in sizes if name in missing])
    if not dynamic:
        return None
    profile = builder.create_optimization_profile()
    for name in dynamic:
        assign = profile.set_shape_input if inputs[name].is_shape_tensor else profile.set_shape
        assign(name, *astuple(shapes[name]))
    return profile


def _inspect_here(request: dict[str, Any], say: Say) -> dict[str, Any]:
    trt = importlib.import_module(request["backend"])
    logger = trt.Logger(trt.Logger.ERROR)
    trt.init_libnvinfer_plugins(logger, "")
    try:
        engine = trt.Runtime(logger).deserialize_cuda_engine(Path(request["engine"]).read_bytes())
    except TypeError:  # how the bindings say that there is no driver
        engine = None
    if engine is None:
        raise BuildError("The engine cannot be loaded", "That takes the GPU and the TensorRT version it was built for.")
    return {"layers": engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)}


def _main() -> None:
    with os.fdopen(os.dup(1), "w", encoding="ascii") as channel:
        os.dup2(2, 1)  # what native code prints on stdout must not mix with the messages

        def say(**message: Any) -> None:
            print(json.dumps(message), file=channel, flush=True)

        request = json.load(sys.stdin)
        try:
            say(result={"build": _build_here, "inspect": _inspect_here}[request["task"]](request, say))
        except ChannelfoldError as error:
            say(error=[type(error).__name__, str(error)])
        except ImportError as error:
            say(error=["DependencyError", f"{request['backend']} cannot be imported ({error}). Run: {INSTALL}"])


# ---- what TensorRT says, in words that help ----------------------------------------------------------------------

_HINTS = (
    (r"[Nn]on-zero zero point", "Quantization must be symmetric: give every QuantizeLinear and DequantizeLinear the "
     "int8 zero point 0."),
    (r"Scale coefficients must all be positive", "Clamp the scales of dead channels to a small positive number."),
    (r"Int32 but must have type", "Keep the bias in float, without DequantizeLinear."),
    (r"UINT8", "Store quantized weights as int8 with zero point 0."),
    (r"^(QLinear\w+|\w+Integer|DynamicQuantizeLinear):", "Use the QDQ form: a float op between DequantizeLinear and "
     "QuantizeLinear."),
    (r"[Pp]lugin", "This is no standard ONNX op: export without the fused ops of ONNX Runtime's optimizer."),
    (r"same input types|must have type", "All inputs of an op need one type: insert a Cast."),
    (r"ISqueezeLayer without an axes", "Give the Squeeze its axes, or keep MIN above 1 on that axis of --shape."),
    (r"nitializer", "TensorRT has int8, int4, fp8 E4M3 and fp4 tensors, but no uint4, int16, E5M2 or strings."),
    (r"FP32 GEMM is not supported", "Cast the model to fp16 for SM 75."),
    (r"HW-specific datatypes", "fp8 needs SM 89 or newer, fp4 SM 120 or newer: use int8 for this GPU."),
    (r"Quantized constant", "Put the DequantizeLinear before the op that reads the int8 constant, not behind it."),
    (r"dtype == myelinType", "TensorRT-RTX convolves in int8 from 1.7 on: pip install -U 'tensorrt-rtx-cu12>=1.7'"),
    (r"deconv", "Keep ConvTranspose in float or fp16."),
    (r"Attention nodes with one output", "Keep the key and value caches outside the Attention node."),
    (r"not registered|must match", "The graph itself is not valid: check it with onnx.checker."),
    (r"must be FP16", "Cast the model to fp16."),
    (r"(?i)out ?of ?memory|bad_alloc", "Give it more memory, or a smaller MAX in --shape."),
)  # fmt: skip


def _refuse_model(errors: list[Any], log: _Log, model: str) -> NoReturn:
    """Raises BuildError for a model that the ONNX parser refuses: the node, its op, the reason, what to change."""
    if not errors:
        raise BuildError(f"TensorRT cannot read {model}: {_clean(' '.join(log.errors) or 'no reason given')}")
    first, *others = errors
    op = first.node_operator()
    if first.node() < 0:  # not about a node; the reason is in the log only
        reason = _clean(log.errors[0] if log.errors else first.desc())
        raise BuildError(f"TensorRT refuses {model}: {reason}", _hint(op, reason))
    reason = _clean(first.desc()).removeprefix(f"{first.node_name()}: ") if first.desc() != "false" else "unknown op"
    more = f"; {len(others)} more: {', '.join(map(_node, others[:3]))}" if others else ""
    raise BuildError(f"TensorRT refuses {_node(first)} of {model}: {reason}{more}", _hint(op, reason))


def _refuse_network(text: str, model: str) -> NoReturn:
    reason = _clean(text)
    raise BuildError(f"TensorRT cannot build {model}: {reason}", _hint("", reason))


def _node(error: Any) -> str:
    if not error.node_name():
        return f"node number {error.node()} ({error.node_operator()}, without a name)"
    return f"node {error.node_name()!r} ({error.node_operator()})"


def _hint(op: str, reason: str) -> str:
    found = (hint for pattern, hint in _HINTS if re.search(pattern, f"{op}: {reason}"))
    return next(found, "Write that part of the graph with other ONNX ops.")


def _clean(text: str) -> str:
    """The sentence of a TensorRT message, without code locations and dumps."""
    kinds = (r"Error Code \d+: [\w ]+ \((.+?)\)?$", r"Assertion failed: .*?(?<![:\s]): (.+)", r'&& "([^"]+)"')
    sentence = next((match[1] for kind in kinds if (match := re.search(kind, text, re.MULTILINE))), text)
    for noise, instead in (
        (r"^\[?[\w.]+\.(cpp|hpp|h):\d+:( \w+\])? *", ""),
        (r"\s+In \w+ at \S+:\d+", ""),
        (r"\s*(Instruction: |Please set k).*", ""),
        (r":\s+\d+: (\w+): .* // (.*)", r" \1 (\2)"),
        (r"\s+", " "),
    ):
        sentence = re.sub(noise, instead, sentence, flags=re.DOTALL)
    return sentence.strip().rstrip(".!?")[:400]


def _worth_telling(warnings: list[str]) -> list[str]:
    """The warnings of TensorRT without the routine ones; the worst warnings in plain words."""
    told = []
    for text in warnings:
        if "UINT8 zero_point" in text:
            told.append(
                "uint8 quantization runs as int8: values above 127 are clamped, half the range is lost. "
                "Quantize with int8 zero points"
            )
        elif match := re.match(r"Profile k(\w+) values are not self-consistent\. (.*)", text, re.DOTALL):
            told.append(f"The engine will fail at the {match[1]} shapes: {_clean(match[2])}")
        elif not re.search("Make sure input|Empty initializer|UINT8 data .* converted to INT32", text):
            told.append(_clean(text))
    return list(dict.fromkeys(told))


if __name__ == "__main__":
    _main()
